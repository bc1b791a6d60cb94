"""The reference is numpy in float32, operation by operation as the kernel does them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from edgeqdm.errors import InputError
from edgeqdm.numerics.affine import weight_max
from edgeqdm.numerics.dynamic import MIN_PEAK, quantize_per_token, quantize_per_token_group

BITS = st.integers(2, 8)
VALUES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 20)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


def in_numpy(x: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], np.float32]:
    limit = np.float32(2 ** (bits - 1) - 1)
    peak = max(np.abs(x).max(), np.float32(MIN_PEAK))
    return np.rint(x * (limit / peak)), peak / limit


def same(found: Tensor, expected: object) -> bool:
    return bool(np.array_equal(found.numpy(), np.asarray(expected)))


@given(x=VALUES, bits=BITS)
def test_codes_per_token_are_a_loop_over_tokens(x: NDArray[np.float32], bits: int) -> None:
    """Q4: equal to fixed scales taken from the token's own extremes."""
    codes, scale = quantize_per_token(torch.from_numpy(x), bits)
    assert scale.shape == (x.shape[0], 1)
    for token, row in enumerate(x):
        expected, of_token = in_numpy(row, bits)
        assert same(codes[token], expected)
        assert same(scale[token, 0], of_token)


@given(x=VALUES, bits=BITS, group_size=st.integers(1, 24))
def test_codes_per_group_are_a_loop_over_tokens_and_groups(
    x: NDArray[np.float32], bits: int, group_size: int
) -> None:
    """Q4: the last group may be narrower."""
    codes, scale = quantize_per_token_group(torch.from_numpy(x), group_size, bits)
    assert codes.shape == x.shape
    for token, row in enumerate(x):
        for group, start in enumerate(range(0, x.shape[1], group_size)):
            part = slice(start, start + group_size)
            expected, of_group = in_numpy(row[part], bits)
            assert same(codes[token, part], expected)
            assert same(scale[token, group], of_group)


def test_division_is_rounded_once() -> None:
    """`127 / peak` as torch writes it rounds the reciprocal too, and moves codes next to a tie."""
    peak = torch.rand(20_000, 1) + 0.5
    x = torch.cat([peak, (torch.randint(0, 126, (20_000, 1)) + 0.5) * peak / 127], dim=1)
    codes, _ = quantize_per_token(x, 8)
    multiplier = np.float32(127) / peak.numpy()
    assert same(codes, np.rint(x.numpy() * multiplier))


def test_rounding_is_half_to_even() -> None:
    """The kernel's: test_matmulnbits.py compares the same values on the runtime."""
    x = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5])
    assert quantize_per_token(x, 8)[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126]


@given(x=VALUES, bits=BITS)
def test_codes_use_the_whole_symmetric_grid_and_no_more(x: NDArray[np.float32], bits: int) -> None:
    codes, scale = quantize_per_token(torch.from_numpy(x), bits)
    assert float(codes.abs().max()) <= weight_max(bits)
    assert bool(torch.isfinite(scale).all() and (scale > 0).all())
    live = np.abs(x).max(1) >= MIN_PEAK
    assert bool((codes.abs().amax(1)[torch.from_numpy(live)] == weight_max(bits)).all())


@given(x=VALUES, bits=BITS)
def test_error_is_at_most_half_a_scale(x: NDArray[np.float32], bits: int) -> None:
    tensor = torch.from_numpy(x)
    codes, scale = quantize_per_token(tensor, bits)
    # x * (limit / peak) is off by up to two float32 roundings of at most 127.
    assert float(((codes * scale - tensor).abs() / scale).max()) <= 0.5 + 127 * 2.0**-22


def test_a_token_does_not_see_the_others() -> None:
    """Q4: bit by bit, whatever shares the batch."""
    x = torch.randn(4, 6, 40)
    x[2, 1] *= 1e4
    codes, scale = quantize_per_token_group(x, 16, 8)
    for index in range(4):
        alone = quantize_per_token_group(x[index], 16, 8)
        torch.testing.assert_close(codes[index], alone[0], rtol=0, atol=0)
        torch.testing.assert_close(scale[index], alone[1], rtol=0, atol=0)


def test_one_group_as_wide_as_the_token_is_per_token() -> None:
    x = torch.randn(7, 40)
    codes, scale = quantize_per_token(x, 8)
    for group_size in (40, 64):
        grouped = quantize_per_token_group(x, group_size, 8)
        torch.testing.assert_close(grouped[0], codes, rtol=0, atol=0)
        torch.testing.assert_close(grouped[1], scale, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "x",
    [
        torch.full((2, 8), 3.0),
        torch.zeros(2, 8),
        torch.tensor([[0.0] * 7 + [1e30]]),
        torch.full((2, 8), 1e-44),
        torch.full((2, 8), 65504.0, dtype=torch.float16),
        torch.tensor([[65504.0, -65504.0]], dtype=torch.float16),
        torch.full((2, 8), 3e38),
    ],
    ids=["constant", "zeros", "outlier", "denormal", "half", "half range", "large"],
)
def test_extreme_tokens_are_coded_in_finite_numbers(x: Tensor, bits: int) -> None:
    """Q4."""
    for codes, scale in (quantize_per_token(x, bits), quantize_per_token_group(x, 4, bits)):
        assert codes.dtype == scale.dtype == torch.float32
        assert bool(torch.isfinite(codes).all() and torch.isfinite(scale).all())
        assert float(codes.abs().max()) <= weight_max(bits)
    codes, scale = quantize_per_token(x, bits)
    # The largest value has the largest code; one that is denormal may vanish.
    peak = x.float().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(
        codes.abs().amax(-1, keepdim=True) * scale, peak, atol=1e-30, rtol=1e-6
    )


def test_all_zero_groups_have_codes_of_zero() -> None:
    x = torch.randn(3, 32)
    x[:, 8:16] = 0
    codes, scale = quantize_per_token_group(x, 8, 8)
    assert bool((codes[:, 8:16] == 0).all())
    assert bool((scale[:, 1] > 0).all())


def test_an_undefined_value_is_not_hidden() -> None:
    x = torch.randn(2, 8)
    x[0, 3] = torch.nan
    codes, _ = quantize_per_token(x, 8)
    assert bool(torch.isnan(codes[0]).any())
    assert bool(torch.isfinite(codes[1]).all())


@pytest.mark.parametrize(
    ("x", "bits"), [(torch.ones(2, 4), 1), (torch.ones(2, 4), 9), (torch.ones(()), 8)]
)
def test_widths_without_a_symmetric_grid_are_refused(x: Tensor, bits: int) -> None:
    for call in (lambda: quantize_per_token(x, bits), lambda: quantize_per_token_group(x, 4, bits)):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.code == "EQ-3230"


def test_a_token_without_channels_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        quantize_per_token(torch.ones(2, 0), 8)
    assert caught.value.code == "EQ-3230"
