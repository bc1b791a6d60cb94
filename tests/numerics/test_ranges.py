"""What a scale search must keep, whatever the tensor looks like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from edgeqdm.numerics.affine import (
    MIN_SCALE,
    activation_max,
    dequantize_activation,
    quantize_activation,
    quantize_weight,
    weight_max,
)
from edgeqdm.numerics.ranges import (
    LOSS_POWER,
    ActivationScales,
    StepRanges,
    candidate_zero_points,
    full_scale,
    minmax_activation,
    minmax_weight,
    search_activation,
    search_weight,
    search_with_zero_point,
)

SAMPLES = hnp.arrays(np.float32, (3, 24), elements=st.floats(-1e6, 1e6, width=32))


def ranges_of(samples: Tensor) -> StepRanges:
    return StepRanges(samples, samples.amin(1), samples.amax(1))


def rounded(samples: Tensor, scales: ActivationScales) -> Tensor:
    scale = scales.scale[:, None]
    codes = quantize_activation(samples, scale, scales.zero_point)
    return dequantize_activation(codes, scale, scales.zero_point)


def loss(samples: Tensor, scales: ActivationScales) -> Tensor:
    return (rounded(samples, scales) - samples).abs().pow(LOSS_POWER).mean(1)


def min_max(samples: Tensor, zero_point: int) -> ActivationScales:
    """The scale that just covers both ends; an end with no codes at all is clipped."""
    low, high = samples.amin(1).clamp(max=0), samples.amax(1).clamp(min=0)
    needed = torch.zeros_like(low)
    if zero_point > 0:
        needed = torch.maximum(needed, -low / zero_point)
    if zero_point < activation_max(8):
        needed = torch.maximum(needed, high / (activation_max(8) - zero_point))
    scale = torch.where(needed > 0, needed.clamp(min=MIN_SCALE), torch.ones_like(needed))
    return ActivationScales(scale, zero_point)


def mean_squared_error(samples: Tensor, scales: ActivationScales) -> float:
    return float((rounded(samples, scales) - samples).square().mean())


@settings(max_examples=10)
@given(samples=SAMPLES, zero_point=st.sampled_from([0, 1, 97, 128, 255]))
def test_search_is_never_worse_than_min_max_at_any_step(
    samples: NDArray[np.float32], zero_point: int
) -> None:
    x = torch.from_numpy(samples)
    scale, found = search_with_zero_point(ranges_of(x), zero_point)
    covering = min_max(x, zero_point)
    assert bool((found <= loss(x, covering)).all())
    torch.testing.assert_close(found, loss(x, ActivationScales(scale, zero_point)), rtol=0, atol=0)


@settings(max_examples=10)
@given(samples=SAMPLES)
def test_scales_are_finite_positive_and_zero_is_representable(
    samples: NDArray[np.float32],
) -> None:
    found = search_activation(ranges_of(torch.from_numpy(samples)))
    assert found.scale.dtype == torch.float32
    assert found.scale.shape == (3,)
    assert bool(torch.isfinite(found.scale).all() and (found.scale >= MIN_SCALE).all())
    assert 0 <= found.zero_point <= activation_max(8)
    assert bool((rounded(torch.zeros(3, 1), found) == 0).all())


@settings(max_examples=10)
@given(samples=SAMPLES, exponent=st.integers(-10, 10))
def test_search_commutes_with_powers_of_two(samples: NDArray[np.float32], exponent: int) -> None:
    # Losses below float32's smallest number all look alike: keep away from it.
    x = torch.from_numpy(samples)
    x = torch.where(x.abs() < 1e-3, 0.0, x)
    one, other = search_activation(ranges_of(x)), search_activation(ranges_of(x * 2.0**exponent))
    assert one.zero_point == other.zero_point
    # pow(2.4) rounds differently at another exponent, which can decide between equal candidates.
    relative = loss(x, one), loss(x * 2.0**exponent, other) / 2.0 ** (exponent * LOSS_POWER)
    torch.testing.assert_close(*relative, rtol=1e-3, atol=1e-12)


def test_one_sided_tensor_gets_zero_point_0_and_half_the_error_of_symmetric_codes() -> None:
    x = torch.rand(4, 4096)
    found = search_activation(ranges_of(x))
    assert found.zero_point == 0
    symmetric, _ = search_with_zero_point(ranges_of(x), 128)
    error = mean_squared_error(x, found) ** 0.5
    # 255 codes instead of 127 over the same range: half the width; 1% for the drawn sample.
    assert error < 0.505 * mean_squared_error(x, ActivationScales(symmetric, 128)) ** 0.5


def test_tensor_below_zero_gets_zero_point_255() -> None:
    assert search_activation(ranges_of(-torch.rand(4, 1024))).zero_point == activation_max(8)


def test_silu_output_gets_a_zero_point_near_0() -> None:
    x = torch.nn.functional.silu(3 * torch.randn(6, 4096))
    found = search_activation(ranges_of(x))
    assert found.zero_point < 30
    symmetric, _ = search_with_zero_point(ranges_of(x), 128)
    # Only the few codes below zero are lost against the one-sided case.
    error, of_symmetric = loss(x, found), loss(x, ActivationScales(symmetric, 128))
    assert bool((error < 0.5 * of_symmetric).all())


def test_centred_tensor_keeps_a_zero_point_near_128() -> None:
    assert abs(search_activation(ranges_of(torch.randn(6, 4096))).zero_point - 128) < 16


def test_steps_are_searched_independently_for_a_given_zero_point() -> None:
    x = torch.randn(5, 256) * torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0])[:, None]
    together, _ = search_with_zero_point(ranges_of(x), 128)
    alone = [search_with_zero_point(ranges_of(x[i : i + 1]), 128)[0] for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("loudness", [2.0**-20, 2.0**20])
def test_loudness_of_a_step_does_not_decide_the_zero_point(loudness: float) -> None:
    x = torch.cat([torch.rand(2, 512) - 0.1, torch.randn(1, 512)])
    louder = torch.cat([x[:2], loudness * x[2:]])
    found = search_activation(ranges_of(louder)).zero_point
    assert found == search_activation(ranges_of(x)).zero_point


def test_all_zero_tensor_gets_scale_1() -> None:
    found = search_activation(ranges_of(torch.zeros(3, 8)))
    assert found.scale.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-20])
def test_values_too_small_to_matter_get_a_finite_scale(value: float) -> None:
    found = search_activation(ranges_of(torch.tensor([[0.0, value], [-value, value]])))
    assert bool((found.scale >= MIN_SCALE).all() and torch.isfinite(1 / found.scale).all())


@pytest.mark.parametrize("value", [1e17, 1e30])
def test_values_too_large_for_the_loss_are_still_covered(value: float) -> None:
    x = value * torch.linspace(-1, 1, 101)[None]
    found = search_activation(ranges_of(x))
    assert bool(torch.isfinite(found.scale).all())
    # A code is at most 1/100 of the span of about 2 value; rounding loses at most half of one.
    assert float((rounded(x, found) - x).abs().max()) < 0.02 * value


def test_single_outlier_does_not_take_the_codes_of_all_others() -> None:
    x = torch.randn(1, 4096)
    x[0, 0] = 16.0
    found = search_activation(ranges_of(x))
    assert mean_squared_error(x[:, 1:], found) < mean_squared_error(x[:, 1:], min_max(x, 128))


def test_range_outside_the_samples_is_still_a_starting_point() -> None:
    samples = torch.randn(1, 64)
    seen = StepRanges(samples, torch.tensor([-8.0]), torch.tensor([8.0]))
    _, found = search_with_zero_point(seen, 128)
    assert bool(found <= loss(samples, ActivationScales(torch.tensor([8.0 / 127]), 128)))


@settings(max_examples=10)
@given(samples=SAMPLES)
def test_candidate_zero_points_are_sorted_codes_with_the_symmetric_one(
    samples: NDArray[np.float32],
) -> None:
    found = candidate_zero_points(ranges_of(torch.from_numpy(samples)))
    assert list(found) == sorted(set(found))
    assert 128 in found
    assert all(0 <= z <= activation_max(8) for z in found)


@given(weight=hnp.arrays(np.float32, (4, 12), elements=st.floats(-1e6, 1e6, width=32)))
def test_weight_scale_is_never_worse_than_the_peak_and_keeps_codes_in_range(
    weight: NDArray[np.float32],
) -> None:
    w = torch.from_numpy(weight)
    scale = search_weight(w)
    assert bool(torch.isfinite(scale).all() and (scale >= MIN_SCALE).all())
    peak = w.abs().amax(1)
    full = torch.where(peak > 0, (peak / weight_max(8)).clamp(min=MIN_SCALE), torch.ones_like(peak))

    def error(scale: Tensor) -> Tensor:
        return (quantize_weight(w, scale) * scale[:, None] - w).double().square().mean(1)

    # Both sums are float32 inside the search.
    assert bool((error(scale) <= error(full) * (1 + 1e-5)).all())


def test_dead_output_channel_gets_scale_1_and_codes_of_0() -> None:
    weight = torch.randn(3, 4, 3, 3)
    weight[1] = 0
    scale = search_weight(weight)
    assert float(scale[1]) == 1.0
    assert not bool(quantize_weight(weight, scale)[1].any())


def test_weight_scales_of_channels_are_independent() -> None:
    weight = torch.randn(5, 16) * torch.tensor([1e-6, 1e-2, 1.0, 1e2, 1e6])[:, None]
    together = search_weight(weight)
    alone = torch.cat([search_weight(weight[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)


def test_denormal_weights_get_a_finite_scale() -> None:
    scale = search_weight(torch.full((2, 3), 1e-44))
    assert scale.tolist() == [MIN_SCALE, MIN_SCALE]


BITS = pytest.mark.parametrize("bits", [4, 8])


def error_at(samples: Tensor, scales: ActivationScales) -> Tensor:
    scale = scales.scale[:, None]
    codes = quantize_activation(samples, scale, scales.zero_point, scales.bits)
    return (dequantize_activation(codes, scale, scales.zero_point) - samples).abs()


@BITS
def test_search_of_any_width_is_never_worse_than_min_max(bits: int) -> None:
    x = torch.randn(4, 2048) * torch.tensor([0.1, 1.0, 3.0, 10.0])[:, None] + 0.3
    found = search_activation(ranges_of(x), bits=bits)
    plain = minmax_activation(ranges_of(x), bits=bits)
    assert found.bits == plain.bits == bits
    assert 0 <= found.zero_point <= activation_max(bits)
    # Over all steps: the zero_point they share need not be the best one of every step.
    energy = x.abs().pow(LOSS_POWER).mean(1)
    losses = [(error_at(x, s).pow(LOSS_POWER).mean(1) / energy).sum() for s in (found, plain)]
    assert float(losses[0]) < float(losses[1])


def test_fewer_bits_clip_more() -> None:
    x = ranges_of(torch.randn(3, 4096))
    found = {bits: search_activation(x, bits=bits).scale * activation_max(bits) for bits in (4, 8)}
    assert bool((found[4] < 0.9 * found[8]).all())


@BITS
@given(samples=SAMPLES)
@settings(max_examples=10)
def test_min_max_clips_nothing_at_any_step(bits: int, samples: NDArray[np.float32]) -> None:
    x = torch.from_numpy(samples)
    found = minmax_activation(ranges_of(x), bits=bits)
    assert 0 <= found.zero_point <= activation_max(bits)
    # A side that the zero_point leaves without a code is narrower than half a code of the widest
    # step; everything else is off by half a scale and the rounding of at most 255 codes.
    span = (x.max().clamp(min=0) - x.min().clamp(max=0)) / activation_max(bits)
    slack = 1 + 4 * activation_max(bits) * torch.finfo(torch.float32).eps
    half = torch.maximum(found.scale, span)[:, None] / 2
    assert bool((error_at(x, found) <= half * slack + 1e-30).all())


def test_min_max_takes_the_zero_point_of_the_widest_range() -> None:
    x = torch.tensor([[-1.0, 0.5], [-0.1, 3.0]])
    found = minmax_activation(ranges_of(x))
    assert found.zero_point == round(1.0 / 4.0 * 255)
    expected = [1.0 / 64, 3.0 / (255 - 64)]
    torch.testing.assert_close(found.scale, torch.tensor(expected), rtol=1e-6, atol=0)


def test_full_scale_of_4_bits_reaches_both_ends() -> None:
    low, high = torch.tensor([-8.0, -1.0, 0.0]), torch.tensor([1.0, 7.0, 0.0])
    assert full_scale(low, high, 8, 4).tolist() == [1.0, 1.0, 1.0]
    # Without codes below 0 that side is clipped.
    assert full_scale(low, high, 0, 4).tolist() == pytest.approx([1 / 15, 7 / 15, 1.0])


def test_merged_ranges_are_one_row_of_all_samples_and_the_outermost_extremes() -> None:
    seen = StepRanges(torch.randn(3, 8), torch.tensor([-2.0, -5, -1]), torch.tensor([4.0, 1, 9]))
    found = seen.merged()
    assert found.samples.shape == (1, 24)
    assert torch.equal(found.samples.sort().values[0], seen.samples.flatten().sort().values)
    assert (found.low.tolist(), found.high.tolist()) == ([-5.0], [9.0])
    assert search_activation(found).scale.shape == (1,)


def test_rows_of_some_steps_are_those_of_the_table() -> None:
    seen = ranges_of(torch.randn(5, 8))
    found = seen.at(range(1, 4))
    assert torch.equal(found.samples, seen.samples[1:4])
    assert torch.equal(found.low, seen.low[1:4])
    assert torch.equal(found.high, seen.high[1:4])


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_weight_search_of_any_width_is_never_worse_than_min_max(bits: int) -> None:
    weight = torch.randn(16, 72) * torch.logspace(-3, 3, 16)[:, None]
    weight[3] = 0

    def error(scale: Tensor) -> Tensor:
        codes = quantize_weight(weight, scale, bits)
        return (codes * scale[:, None] - weight).double().square().mean(1)

    found, plain = search_weight(weight, bits), minmax_weight(weight, bits)
    assert float(found[3]) == float(plain[3]) == 1.0
    # Both sums are float32 inside the search.
    assert bool((error(found) <= error(plain) * (1 + 1e-5)).all())
    peak = weight.abs().amax(1)
    reached = quantize_weight(weight, plain, bits).abs().amax(1)
    assert bool(((reached == weight_max(bits)) == (peak > 0)).all())
    if bits == 4:
        assert float(error(found).sum()) < 0.95 * float(error(plain).sum())
