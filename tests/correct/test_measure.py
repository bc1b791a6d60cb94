"""P-numbers name the properties of a PTQD correction that each test holds down."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from edgeqdm.correct.measure import NoiseStatistics, measure_noise
from edgeqdm.errors import InputError, NumericalError
from edgeqdm.numerics.noise import SNR_CAP_DB

Sample = NDArray[np.float32]
STEPS = 3
GAIN_ERRORS = (0.2, 0.1, 0.05)


def _samples(
    steps: tuple[int, ...] = (0, 1, 2), batches: int = 4
) -> Iterator[tuple[int, Sample, float]]:
    rng = np.random.default_rng(0)
    for _ in range(batches):
        for step in steps:
            yield step, rng.standard_normal((8, 2, 8, 8), dtype=np.float32), 3.0


def _reference(x: Sample, step: int, label: float) -> Sample:
    f: Sample = x + np.float32(step + label)
    return f


def _noisy(x: Sample, step: int, label: float) -> Sample:
    rng = np.random.default_rng(int(abs(float(x[0, 0, 0, 0])) * 1e6))
    noise = 0.1 * rng.standard_normal(x.shape) + np.array([0.5, -0.5])[:, None, None]
    f = _reference(x, step, label)
    return np.asarray(f + GAIN_ERRORS[step] * f + noise, dtype=np.float32)


def test_p1_every_step_gets_its_own_noise_model() -> None:
    """P1."""
    statistics = measure_noise(_reference, _noisy, _samples(), n_steps=STEPS)
    # 4096 elements per step: standard errors 0.0011 of k, 0.008 of mu (f lies 3 to 5 from 0).
    np.testing.assert_allclose(statistics.k, GAIN_ERRORS, atol=0.005)
    np.testing.assert_allclose(statistics.mu, [[0.5, -0.5]] * STEPS, atol=0.03)
    np.testing.assert_allclose(statistics.variance, 0.01, rtol=0.1)
    assert statistics.n == (4 * 8 * 64,) * STEPS
    assert statistics.clamped_gain == (False,) * STEPS


def test_p2_a_network_like_the_reference_has_no_noise() -> None:
    """P2."""
    statistics = measure_noise(_reference, _reference, _samples(), n_steps=STEPS)
    assert statistics.k == statistics.correlation == (0.0,) * STEPS
    assert statistics.mu == statistics.variance == ((0.0, 0.0),) * STEPS
    assert statistics.snr_db == (SNR_CAP_DB,) * STEPS


def test_p4_a_negative_gain_error_is_clamped_and_marked() -> None:
    """P4."""

    def weaker(x: Sample, step: int, label: float) -> Sample:
        return np.float32(0.9) * _reference(x, step, label)

    clamped = measure_noise(_reference, weaker, _samples(), n_steps=STEPS)
    assert clamped.k == (0.0,) * STEPS
    assert clamped.clamped_gain == (True,) * STEPS
    allowed = measure_noise(_reference, weaker, _samples(), n_steps=STEPS, allow_negative=True)
    # Float32 outputs resolve 1e-7 of their size.
    np.testing.assert_allclose(allowed.k, -0.1, rtol=1e-4)
    assert allowed.clamped_gain == (False,) * STEPS


def test_p5_missing_steps_are_named() -> None:
    """P5: an error by default."""
    with pytest.raises(InputError, match=r"no sample at 2 of 4 steps: 1, 3") as caught:
        measure_noise(_reference, _noisy, _samples((0, 2)), n_steps=4)
    assert caught.value.code == "EQ-3412"


@pytest.mark.parametrize("allow_missing", [False, True])
def test_p5_no_samples_at_all_are_refused(allow_missing: bool) -> None:
    """P5."""
    with pytest.raises(InputError, match="no sample at 3 of 3 steps"):
        measure_noise(_reference, _noisy, iter(()), n_steps=STEPS, allow_missing=allow_missing)


def test_p5_a_missing_step_may_be_left_uncorrected() -> None:
    """P5."""
    everywhere = measure_noise(_reference, _noisy, _samples(), n_steps=STEPS)
    found = measure_noise(_reference, _noisy, _samples((0, 2)), n_steps=STEPS, allow_missing=True)
    assert found.n[1] == 0
    assert found.k[1] == 0.0
    assert found.mu[1] == found.variance[1] == (0.0, 0.0)
    # Other random samples of the same steps.
    np.testing.assert_allclose(found.k[::2], everywhere.k[::2], atol=0.005)


def test_moments_of_input_and_output_are_those_of_numpy() -> None:
    x = np.concatenate([x for step, x, _ in _samples() if step == 1]).astype(np.float64)
    f = x + 4.0
    statistics = measure_noise(_reference, _noisy, _samples(), n_steps=STEPS)
    # Float32 outputs resolve 6e-8 of their size.
    np.testing.assert_allclose(statistics.output_mean[1], f.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(statistics.output_variance[1], f.var((0, 2, 3)), rtol=1e-5)
    assert statistics.input_power[1] == pytest.approx(np.mean(x**2), rel=1e-6)
    assert statistics.input_output[1] == pytest.approx(np.mean(x * f), rel=1e-5)


def test_the_residual_for_another_k_is_that_of_the_errors_themselves() -> None:
    samples = [x for step, x, _ in _samples() if step == 0]
    f = np.concatenate([_reference(x, 0, 3.0) for x in samples]).astype(np.float64)
    d = np.concatenate([_noisy(x, 0, 3.0) for x in samples]).astype(np.float64) - f
    statistics = measure_noise(_reference, _noisy, _samples(), n_steps=STEPS)
    for k in (0.0, 0.7, -0.3):
        mean, variance = statistics.residual(0, k)
        np.testing.assert_allclose(mean, (d - k * f).mean((0, 2, 3)), rtol=1e-9)
        np.testing.assert_allclose(variance, (d - k * f).var((0, 2, 3)), rtol=1e-9)
    mean, variance = statistics.residual(0, statistics.k[0])
    assert tuple(mean) == statistics.mu[0]
    assert tuple(variance) == statistics.variance[0]
    assert statistics.fitted_k(0) == pytest.approx(statistics.k[0], rel=1e-12)


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_sampler_is_refused(step: int) -> None:
    with pytest.raises(InputError, match=f"step {step}, the sampler has steps 0 to 2"):
        measure_noise(_reference, _reference, _samples((0, step)), n_steps=STEPS)


def test_p11_rows_are_step_indices_whatever_the_order_of_the_samples() -> None:
    """P11."""
    forward = measure_noise(_reference, _noisy, _samples(), n_steps=STEPS)
    backward = measure_noise(_reference, _noisy, reversed([*_samples()]), n_steps=STEPS)
    # Row 0 is the noisiest step, which was given the largest gain error.
    assert list(forward.k) == sorted(forward.k, reverse=True)
    # Merging in another order rounds differently, by some 1e-16 per merge.
    np.testing.assert_allclose(forward.k, backward.k, rtol=1e-12)
    np.testing.assert_allclose(forward.mu, backward.mu, rtol=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["float", "quantized"])
def test_an_output_that_is_not_finite_names_network_and_step(which: str, bad: float) -> None:
    def broken(x: Sample, step: int, label: float) -> Sample:
        f = _reference(x, step, label)
        if step == 1:
            f[0, 1, 2, 3] = bad
        return f

    pair = (broken, _reference) if which == "float" else (_reference, broken)
    with pytest.raises(NumericalError, match=f"the {which} network") as caught:
        measure_noise(*pair, _samples(), n_steps=STEPS)
    assert caught.value.code == "EQ-5401"
    assert caught.value.path == "step 1"


def test_only_the_prediction_counts_in_an_output_with_a_learned_variance() -> None:
    def doubled(x: Sample, step: int, label: float) -> Sample:
        return np.concatenate([_reference(x, step, label), np.full_like(x, np.nan)], axis=1)

    def doubled_noisy(x: Sample, step: int, label: float) -> Sample:
        return np.concatenate([_noisy(x, step, label), 7.0 * x], axis=1)

    plain = measure_noise(_reference, _noisy, _samples(), n_steps=STEPS)
    assert measure_noise(doubled, doubled_noisy, _samples(), n_steps=STEPS) == plain


def test_an_output_of_another_shape_is_refused() -> None:
    def tripled(x: Sample, step: int, label: float) -> Sample:
        return np.concatenate([x, x, x], axis=1)

    with pytest.raises(InputError, match=r"\(8, 6, 8, 8\) to a sample of \(8, 2, 8, 8\)"):
        measure_noise(tripled, tripled, _samples(), n_steps=STEPS)


def test_a_model_whose_channels_change_between_steps_is_refused() -> None:
    samples = [(step, np.zeros((1, step + 1, 4, 4), np.float32), 0.0) for step in range(STEPS)]
    with pytest.raises(InputError, match="1, 2, 3 channels") as caught:
        measure_noise(_reference, _reference, samples, n_steps=STEPS)
    assert caught.value.code == "EQ-3414"


@given(scale=st.floats(1e-6, 1e6), noise=st.floats(0.0, 1e3))
def test_statistics_are_finite_and_survive_json(scale: float, noise: float) -> None:
    def reference(x: Sample, step: int, label: float) -> Sample:
        return np.float32(scale) * x

    def quantized(x: Sample, step: int, label: float) -> Sample:
        return reference(x, step, label) + np.float32(noise) * x[::-1]

    statistics = measure_noise(reference, quantized, _samples(batches=1), n_steps=STEPS)
    assert NoiseStatistics.model_validate_json(statistics.model_dump_json()) == statistics


@pytest.mark.parametrize(
    "change",
    [
        {"k": (0.0, 0.0)},
        {"k": (-1.0,)},
        {"mu": ((0.0,),)},
        {"mu": ((),), "variance": ((),)},
        {"variance": ((0.0, -1.0),)},
        {"snr_db": (float("nan"),)},
        {"output_variance": ((1.0, -1.0),)},
        {"covariance": ((0.1,),)},
        {"input_power": (-1.0,)},
    ],
)
def test_statistics_that_contradict_themselves_are_refused(change: dict[str, object]) -> None:
    fields: dict[str, object] = {
        "k": (0.1,),
        "mu": ((0.0, 0.0),),
        "variance": ((0.0, 0.0),),
        "correlation": (0.0,),
        "n": (64,),
        "clamped_gain": (False,),
        "snr_db": (20.0,),
        "output_mean": ((0.0, 0.0),),
        "output_variance": ((1.0, 1.0),),
        "covariance": ((0.1, 0.1),),
        "input_power": (1.0,),
        "input_output": (0.0,),
    }
    NoiseStatistics.model_validate(fields)
    with pytest.raises(ValidationError):
        NoiseStatistics.model_validate(fields | change)
