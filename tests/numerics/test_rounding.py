"""Learned rounding starts at the float weight and ends at floor or ceil."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeqdm.numerics.rounding import (
    drop_mix,
    initial_alpha,
    rounding_regulariser,
    soft_rounding,
    straight_through,
    straight_through_round,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_initial_alpha_reproduces_every_fraction() -> None:
    """E6: the sigmoid and its logarithm cost a few float32 roundings."""
    fraction = torch.linspace(0, 1, 1001)[:-1]
    assert torch.allclose(soft_rounding(initial_alpha(fraction)), fraction, atol=1e-6)


def test_half_and_more_is_rounded_up_at_first() -> None:
    fraction = torch.tensor([0.0, 0.49, 0.51, 0.999])
    assert (initial_alpha(fraction) >= 0).tolist() == [False, False, True, True]


@given(st.floats(-50, 50))
def test_soft_rounding_stays_between_floor_and_ceil(alpha: float) -> None:
    assert 0 <= float(soft_rounding(torch.tensor(alpha))) <= 1


def test_soft_rounding_reaches_both_ends() -> None:
    assert soft_rounding(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("beta", [20.0, 2.0])
def test_regulariser_is_one_for_undecided_and_zero_for_decided_rounding(beta: float) -> None:
    assert float(rounding_regulariser(torch.zeros(3), beta)) == 1.0
    assert float(rounding_regulariser(torch.tensor([-9.0, 9.0]), beta)) == 0.0


def test_regulariser_pushes_away_from_the_middle() -> None:
    alpha = torch.tensor([-0.5, 0.5], requires_grad=True)
    rounding_regulariser(alpha, 2.0).backward()
    assert alpha.grad is not None
    assert alpha.grad[0] > 0 > alpha.grad[1]


def test_straight_through_value_is_exact_and_its_gradient_is_of_the_original() -> None:
    x = (random(1000) * 100).requires_grad_()
    rounded = straight_through_round(x)
    assert torch.equal(rounded, torch.round(x))
    rounded.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(straight_through(x * 0.1, x), x * 0.1)


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.8])
def test_drop_takes_that_share_of_the_elements_from_the_original(probability: float) -> None:
    """E10: the share of 40 000 draws is within 4 deviations, at most 1 %, of the probability."""
    x = random(200, 200)
    mixed = drop_mix(x + 1, x, probability, torch.Generator().manual_seed(3))
    kept = mixed == x + 1
    assert torch.equal(mixed[~kept], x[~kept])
    assert abs(float((~kept).float().mean()) - probability) < 0.01


def test_drop_of_zero_draws_nothing() -> None:
    """E10."""
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    x = random(4)
    assert drop_mix(x, x + 1, 0.0, generator) is x
    assert torch.equal(generator.get_state(), state)


def test_drop_repeats_with_its_generator() -> None:
    """E10."""
    first, second = (
        drop_mix(torch.ones(50), torch.zeros(50), 0.5, torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert torch.equal(first, second)
