"""P-numbers name the properties of a PTQD correction that each test holds down."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeqdm.errors import InputError
from edgeqdm.numerics.noise import (
    LOWEST_NEGATIVE_K,
    SNR_CAP_DB,
    NoiseFit,
    NoiseSums,
    fit_noise,
    reduced_noise_std,
    snr_db,
    step_aware_bits,
    sum_noise,
)

Floats = NDArray[np.float64]

MEANS = np.array([0.2, -0.5, 1.0])
BIAS = np.array([0.03, -0.02, 0.01])


def _outputs(
    k: float, noise: float, *, bias: Floats = BIAS, images: int = 64, seed: int = 0
) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    shape = (images, 3, 16, 16)
    f = MEANS[:, None, None] + rng.standard_normal(shape)
    d = k * f + bias[:, None, None] + noise * rng.standard_normal(shape)
    return f, f + d


def _corrected(f_hat: Floats, fit: NoiseFit) -> Floats:
    return (f_hat - fit.bias[:, None, None]) / (1.0 + fit.gain_error)


def _rms(x: Floats) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _assert_same_sums(a: NoiseSums, b: NoiseSums, scale: float) -> None:
    # Float64 rounding of about 1e3 additions, relative to the largest term that is summed.
    assert a.n == b.n
    for name in ("mean_f", "mean_d"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-12 * scale)
    for name in ("ff", "fd", "dd"):
        np.testing.assert_allclose(
            getattr(a, name), getattr(b, name), rtol=0, atol=1e-12 * a.n * scale**2
        )


def test_p1_the_fit_recovers_gain_bias_and_variance() -> None:
    """P1."""
    f, f_hat = _outputs(k=0.08, noise=0.15)
    fit = fit_noise(sum_noise(f, f_hat))
    # 64 * 256 elements per channel: standard errors are 0.9 % of k, 0.6 % of s / sqrt(2).
    assert fit.gain_error == pytest.approx(0.08, rel=0.01)
    standard_error = 0.15 * np.sqrt((1.0 + MEANS**2) / fit.n)
    assert np.all(np.abs(fit.bias - BIAS) < 3 * standard_error)
    np.testing.assert_allclose(np.sqrt(fit.variance), 0.15, rtol=0.01)
    assert not fit.clamped_k
    assert fit.n == 64 * 256


def test_p1_correction_removes_the_channel_means_and_leaves_only_the_residual() -> None:
    """P1."""
    f, f_hat = _outputs(k=0.08, noise=0.15)
    error = _corrected(f_hat, fit_noise(sum_noise(f, f_hat))) - f
    assert np.abs(error.mean((0, 2, 3))).max() < 1e-6
    # The rms of 49 152 normal values is known to 0.3 %; 0.139 after correction, 0.183 before.
    assert _rms(error) == pytest.approx(0.15 / 1.08, rel=0.01)
    raw = np.mean((0.08 * MEANS + BIAS) ** 2) + 0.08**2 + 0.15**2
    assert _rms(f_hat - f) == pytest.approx(np.sqrt(raw), rel=0.01)


def test_p1_the_error_after_correction_has_exactly_the_fitted_variance() -> None:
    """P1."""
    f, f_hat = _outputs(k=0.08, noise=0.15)
    fit = fit_noise(sum_noise(f, f_hat))
    error = _corrected(f_hat, fit) - f
    np.testing.assert_allclose(
        error.var((0, 2, 3)), fit.variance / (1 + fit.gain_error) ** 2, rtol=1e-9
    )


def test_p1_channel_means_do_not_leak_into_the_gain() -> None:
    """P1."""
    bias = 0.5 * MEANS
    f, f_hat = _outputs(k=0.08, noise=0.01, bias=bias)
    d = f_hat - f
    pooled = np.cov(d.ravel(), f.ravel())
    assert pooled[0, 1] / pooled[1, 1] > 0.2
    fit = fit_noise(sum_noise(f, f_hat))
    assert fit.gain_error == pytest.approx(0.08, rel=0.01)
    np.testing.assert_allclose(fit.bias, bias, atol=2e-3)


def test_the_fit_equals_least_squares_with_a_column_per_channel() -> None:
    f, f_hat = _outputs(k=0.3, noise=0.5, images=2)
    channel = np.broadcast_to(np.arange(3)[:, None, None], f.shape).ravel()
    design = np.column_stack([f.ravel(), *(channel == c for c in range(3))])
    expected = np.linalg.lstsq(design, (f_hat - f).ravel(), rcond=None)[0]
    fit = fit_noise(sum_noise(f, f_hat))
    np.testing.assert_allclose([fit.gain_error, *fit.bias], expected, rtol=1e-10)


def test_p2_an_exact_output_fits_as_exactly_nothing() -> None:
    """P2."""
    f, _ = _outputs(k=0.0, noise=0.0)
    fit = fit_noise(sum_noise(f, f))
    assert (fit.gain_error, fit.correlation, fit.clamped_k) == (0.0, 0.0, False)
    assert not fit.bias.any()
    assert not fit.variance.any()


def test_p3_a_pure_gain_is_recovered_and_undone_to_float_precision() -> None:
    """P3."""
    f, _ = _outputs(k=0.0, noise=0.0)
    fit = fit_noise(sum_noise(f, 1.1 * f))
    assert fit.gain_error == pytest.approx(0.1, rel=1e-12)
    assert fit.correlation == pytest.approx(1.0, rel=1e-12)
    np.testing.assert_allclose(_corrected(1.1 * f, fit), f, rtol=1e-12, atol=1e-12)


def test_p4_a_negative_gain_becomes_zero_and_only_the_bias_is_corrected() -> None:
    """P4."""
    f, f_hat = _outputs(k=-0.1, noise=0.15)
    fit = fit_noise(sum_noise(f, f_hat))
    assert fit.gain_error == 0.0
    assert fit.clamped_k
    assert fit.correlation < -0.5
    d = f_hat - f
    # For k = 0 the residual is D itself.
    np.testing.assert_allclose(fit.bias, d.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(fit.variance, d.var((0, 2, 3)), rtol=1e-12)


def test_p4_a_negative_gain_may_be_allowed() -> None:
    """P4."""
    f, f_hat = _outputs(k=-0.1, noise=0.15)
    fit = fit_noise(sum_noise(f, f_hat), allow_negative=True)
    assert fit.gain_error == pytest.approx(-0.1, rel=0.02)
    assert not fit.clamped_k


def test_p4_an_allowed_negative_gain_stops_where_it_would_double_the_output() -> None:
    """P4."""
    f, f_hat = _outputs(k=-0.9, noise=0.15)
    fit = fit_noise(sum_noise(f, f_hat), allow_negative=True)
    assert fit.gain_error == LOWEST_NEGATIVE_K
    assert fit.clamped_k
    residual = f_hat - f - fit.gain_error * f
    np.testing.assert_allclose(fit.bias, residual.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(fit.variance, residual.var((0, 2, 3)), rtol=1e-10)


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_a_constant_output_tells_nothing_about_the_gain(level: float) -> None:
    f = np.full((3, 2, 7, 7), level)
    fit = fit_noise(sum_noise(f, f + 0.01))
    assert (fit.gain_error, fit.correlation) == (0.0, 0.0)
    np.testing.assert_allclose(fit.bias, 0.01, rtol=1e-9)


def test_a_large_mean_costs_the_variance_no_accuracy() -> None:
    rng = np.random.default_rng(1)
    f = 1e6 + rng.standard_normal((32, 1, 16, 16))
    d = 0.05 * (f - 1e6) + 1e-3 * rng.standard_normal(f.shape)
    sums = sum_noise(f[:1], (f + d)[:1])
    for image in range(1, len(f)):
        sums = sums.add(f[image : image + 1], (f + d)[image : image + 1])
    # f + d is rounded to 1e6 * 2^-53 = 1e-10, far below the noise of 1e-3.
    assert fit_noise(sums).variance[0] == pytest.approx(1e-6, rel=0.05)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    order=st.randoms(use_true_random=False),
    offset=st.floats(-100.0, 100.0),
    seed=st.integers(0, 2**16),
)
def test_merging_in_any_order_equals_one_pass(
    sizes: list[int], order: random.Random, offset: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    f = offset + rng.standard_normal((sum(sizes), 2, 3, 3))
    f_hat = f + 0.1 * rng.standard_normal(f.shape)
    cuts = np.cumsum(sizes)[:-1]
    parts = [sum_noise(a, b) for a, b in zip(np.split(f, cuts), np.split(f_hat, cuts), strict=True)]
    order.shuffle(parts)
    while len(parts) > 1:
        parts.append(parts.pop(0).merge(parts.pop(0)))
    _assert_same_sums(parts[0], sum_noise(f, f_hat), scale=1.0 + abs(offset))


@pytest.mark.parametrize(
    "shapes", [((2, 3, 4, 4), (2, 3, 4, 5)), ((3, 4, 4), (3, 4, 4)), ((0, 3, 4, 4), (0, 3, 4, 4))]
)
def test_outputs_that_do_not_pair_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    with pytest.raises(InputError) as caught:
        sum_noise(np.zeros(shapes[0]), np.zeros(shapes[1]))
    assert caught.value.code == "EQ-3401"


def test_sums_of_different_channel_counts_are_refused() -> None:
    one, two = (sum_noise(np.zeros((1, c, 2, 2)), np.zeros((1, c, 2, 2))) for c in (1, 2))
    with pytest.raises(InputError, match="1 and 2 channels"):
        one.merge(two)


def test_snr_is_the_ratio_of_mean_squares() -> None:
    f, f_hat = _outputs(k=0.08, noise=0.15)
    expected = 10 * np.log10(np.mean(f**2) / np.mean((f_hat - f) ** 2))
    assert snr_db(sum_noise(f, f_hat)) == pytest.approx(expected, rel=1e-12)


def test_snr_without_noise_or_signal_is_the_cap() -> None:
    zero, one = np.zeros((1, 1, 2, 2)), np.ones((1, 1, 2, 2))
    assert snr_db(sum_noise(one, one)) == SNR_CAP_DB
    assert snr_db(sum_noise(zero, zero)) == SNR_CAP_DB
    assert snr_db(sum_noise(zero, one)) == -SNR_CAP_DB


def test_snr_of_one_float32_ulp_is_below_the_cap() -> None:
    f = np.ones((1, 1, 256, 256), dtype=np.float32)
    f_hat = f.copy()
    f_hat[0, 0, 0, 0] = np.nextafter(np.float32(1), np.float32(2))
    assert 150.0 < snr_db(sum_noise(f, f_hat)) < SNR_CAP_DB


def test_p6_variance_is_conserved_where_it_can_be_afforded() -> None:
    """P6."""
    variance = np.array([0.0, 0.01, 0.04])
    std, clamped = reduced_noise_std(0.5, -0.8, variance, 0.1)
    assert not clamped
    np.testing.assert_allclose(std**2 + 0.8**2 * variance / 1.1**2, 0.25, rtol=1e-14)


def test_p6_noise_beyond_the_budget_leaves_exactly_zero() -> None:
    """P6."""
    std, clamped = reduced_noise_std(0.1, 1.0, np.array([1e-4, 4.0]), 0.0)
    assert clamped
    assert std[0] == pytest.approx(math.sqrt(0.01 - 1e-4))
    assert std[1] == 0.0


def test_p6_a_step_without_noise_stays_without_noise() -> None:
    """P6."""
    std, clamped = reduced_noise_std(0.0, 1.0, np.array([1.0, 0.0]), 0.2)
    assert not clamped
    assert std.tolist() == [0.0, 0.0]


def test_p2_no_variance_leaves_the_noise_bit_for_bit() -> None:
    """P2."""
    for sigma in np.random.default_rng(0).uniform(1e-6, 80.0, 200):
        std, clamped = reduced_noise_std(float(sigma), -0.7, np.zeros(3), 0.0)
        assert std.tolist() == [float(sigma)] * 3
        assert not clamped


def test_a_cap_leaves_the_rest_of_the_noise() -> None:
    std, clamped = reduced_noise_std(2.0, 1.0, np.array([100.0]), 0.0, cap=0.9)
    assert clamped
    assert std[0] == pytest.approx(2.0 * math.sqrt(0.1))


@given(
    noise_std=st.floats(0.0, 1e6),
    weight=st.floats(-1e6, 1e6),
    variance=st.lists(st.floats(0.0, 1e12), min_size=1, max_size=4),
    k=st.floats(LOWEST_NEGATIVE_K, 10.0),
    cap=st.floats(0.0, 1.0),
)
def test_p6_corrected_noise_is_a_number_and_never_above_the_original(
    noise_std: float, weight: float, variance: list[float], k: float, cap: float
) -> None:
    """P6."""
    std, _ = reduced_noise_std(noise_std, weight, np.array(variance), k, cap=cap)
    assert std.shape == (len(variance),)
    assert np.all((std >= 0.0) & (std <= noise_std))


@pytest.mark.parametrize(
    ("noise_std", "variance", "k", "cap"),
    [
        (-1.0, 0.1, 0.0, 1.0),
        (1.0, -0.1, 0.0, 1.0),
        (1.0, math.inf, 0.0, 1.0),
        (math.nan, 0.1, 0.0, 1.0),
        (1.0, 0.1, -1.0, 1.0),
        (1.0, 0.1, math.nan, 1.0),
        (1.0, 0.1, 0.0, 1.5),
    ],
)
def test_impossible_noise_is_refused(
    noise_std: float, variance: float, k: float, cap: float
) -> None:
    with pytest.raises(InputError) as caught:
        reduced_noise_std(noise_std, 1.0, np.array([variance]), k, cap=cap)
    assert caught.value.code == "EQ-3402"


def test_p9_the_fewest_bits_whose_ratio_exceeds_the_forward_one_are_taken() -> None:
    """P9."""
    # Noisiest step first: the forward ratio rises along the steps, so few bits come first.
    forward = [0.01, 0.5, 4.0, 30.0, 1e4]
    quantized = {8: [90.0] * 5, 4: [6.0, 5.0, 4.0, 3.0, 3.0]}
    assert step_aware_bits(quantized, forward) == (4, 4, 8, 8, 8)


def test_p9_no_width_that_satisfies_means_the_most_bits() -> None:
    """P9."""
    assert step_aware_bits({4: [1.0, 1.0], 8: [2.0, 2.0]}, [9.0, 9.0]) == (8, 8)


def test_p9_all_widths_that_satisfy_mean_the_fewest_bits() -> None:
    """P9."""
    assert step_aware_bits({8: [2.0, math.inf], 4: [1.0, math.inf]}, [0.1, 0.1]) == (4, 4)


def test_p9_equal_ratios_do_not_satisfy() -> None:
    """P9."""
    assert step_aware_bits({4: [1.0], 8: [2.0]}, [1.0]) == (8,)


@given(
    forward=st.lists(st.floats(0.0, 1e6), min_size=2, max_size=20),
    ratio=st.floats(0.01, 1e3),
)
def test_p9_bits_never_fall_while_the_forward_ratio_rises(
    forward: list[float], ratio: float
) -> None:
    """P9."""
    n = len(forward)
    bits = step_aware_bits({4: [ratio] * n, 8: [16 * ratio] * n}, sorted(forward))
    assert list(bits) == sorted(bits)


@pytest.mark.parametrize("quantized", [{}, {4: [1.0]}, {4: [1.0, math.nan]}])
def test_p9_incomplete_tables_are_refused(quantized: dict[int, list[float]]) -> None:
    """P9."""
    with pytest.raises(InputError) as caught:
        step_aware_bits(quantized, [1.0, 1.0])
    assert caught.value.code == "EQ-3403"
