"""P-numbers name the properties of a PTQD correction that each test holds down."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler
from numpy.typing import NDArray

from edgeqdm.correct.apply import correct_schedule
from edgeqdm.correct.corrector import Corrector, Ptqd
from edgeqdm.correct.measure import NoiseStatistics, measure_noise
from edgeqdm.errors import InputError
from edgeqdm.ir.schedule import CorrectedSchedule, CorrectionKey, SamplerProgram
from edgeqdm.models.sampler import compile_sampler
from edgeqdm.numerics.noise import reduced_noise_std

# diffusers hands tensors to numpy in ways that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Sample = NDArray[np.float32]
KEY = CorrectionKey(model="m" * 64, sampler="s" * 64, guidance=3.0, precision="p" * 64)
STEPS = 4
MEAN = np.array([0.6, -0.3], np.float32)[:, None, None]
"""Of the float output in each channel."""
BIAS = np.array([0.05, -0.02], np.float32)[:, None, None]


def _program() -> SamplerProgram:
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_end=0.2, clip_sample=False)
    return compile_sampler(scheduler, STEPS)


def _float(x: Sample, step: int, _: None) -> Sample:
    return np.asarray(x + MEAN, np.float32)


def _quantized(x: Sample, step: int, _: None, *, k: float) -> Sample:
    noise = np.random.default_rng(step).standard_normal(x.shape)
    return np.asarray((1 + k) * _float(x, step, None) + BIAS + 0.1 * noise, np.float32)


def _samples() -> list[tuple[int, Sample, None]]:
    rng = np.random.default_rng(9)
    return [(i, rng.standard_normal((16, 2, 8, 8), np.float32), None) for i in range(STEPS)]


def _measured(k: float = 0.1) -> NoiseStatistics:
    return measure_noise(
        _float, lambda x, step, fed: _quantized(x, step, fed, k=k), _samples(), n_steps=STEPS
    )


def _error(correction: CorrectedSchedule, *, k: float = 0.1) -> tuple[Sample, Sample]:
    """Of corrected outputs at step 1: mean [C] and what is left of it, [B, C, H, W]."""
    _, x, _ = _samples()[1]
    f_hat = _quantized(x, 1, None, k=k).astype(np.float64)
    bias = np.array(correction.bias[1])[:, None, None]
    error = correction.gain[1] * (f_hat - bias) - _float(x, 1, None)
    return error.mean((0, 2, 3)), error


@pytest.mark.parametrize("gain", [True, False])
def test_p1_the_bias_is_gone_with_and_without_the_gain(gain: bool) -> None:
    """P1."""
    correction = Ptqd(gain=gain).correct(_program(), _measured(), KEY)
    mean, _ = _error(correction)
    assert np.all(np.abs(mean) < 1e-6)
    assert (correction.gain == (1.0,) * STEPS) is not gain


def test_p1_gain_without_bias_leaves_the_residual_mean_only() -> None:
    """P1."""
    statistics = _measured()
    correction = Ptqd(bias=False).correct(_program(), statistics, KEY)
    mean, _ = _error(correction)
    np.testing.assert_allclose(mean, np.array(statistics.mu[1]) / (1 + statistics.k[1]), atol=1e-6)
    assert correction.bias == ((0.0, 0.0),) * STEPS


@pytest.mark.parametrize(
    ("gain", "bias", "variance"), list(itertools.product([False, True], repeat=3))
)
def test_parts_are_switched_one_by_one(gain: bool, bias: bool, variance: bool) -> None:
    program, statistics = _program(), _measured()
    found = Ptqd(gain=gain, bias=bias, variance=variance).correct(program, statistics, KEY)
    original = tuple((std, std) for std in program.noise_std)
    assert (found.gain != (1.0,) * STEPS) is gain
    assert (found.bias != ((0.0, 0.0),) * STEPS) is bias
    assert (found.noise_std != original) is variance


def test_nothing_switched_on_corrects_nothing() -> None:
    program = _program()
    found = Ptqd(gain=False, bias=False, variance=False).correct(program, _measured(), KEY)
    assert found.gain == (1.0,) * STEPS
    assert found.noise_std == tuple((std, std) for std in program.noise_std)


def test_p6_without_the_gain_the_uncorrelated_noise_alone_is_absorbed() -> None:
    """P6."""
    program, statistics = _program(), _measured()
    found = Ptqd(gain=False).correct(program, statistics, KEY)
    for step in range(STEPS):
        expected, _ = reduced_noise_std(
            program.noise_std[step],
            program.output_weights[step][0],
            np.array(statistics.variance[step]),
            0.0,
        )
        assert found.noise_std[step] == tuple(expected)


def test_p6_no_more_than_the_allowed_share_is_absorbed() -> None:
    """P6."""
    program = _program()
    loud = _measured().model_copy(update={"variance": ((1e6, 1e6),) * STEPS})
    found = Ptqd(absorb=0.75).correct(program, loud, KEY)
    np.testing.assert_allclose(
        np.array(found.noise_std)[:, 0], 0.5 * np.array(program.noise_std), rtol=1e-12
    )


def test_p4_a_negative_gain_error_is_corrected_when_allowed() -> None:
    """P4."""
    statistics, program = _measured(k=-0.1), _program()
    assert statistics.k == (0.0,) * STEPS
    default = Ptqd().correct(program, statistics, KEY)
    allowed = Ptqd(allow_negative=True).correct(program, statistics, KEY)
    assert default.gain == (1.0,) * STEPS
    # Standard error of k: 0.1 / sqrt(2048).
    np.testing.assert_allclose(allowed.gain, 1 / 0.9, atol=0.01)
    rms = [np.sqrt(np.mean(_error(found, k=-0.1)[1] ** 2)) for found in (default, allowed)]
    assert rms[1] < rms[0]


def test_p4_negative_statistics_are_clamped_unless_allowed() -> None:
    """P4."""
    statistics = measure_noise(
        _float,
        lambda x, step, fed: _quantized(x, step, fed, k=-0.1),
        _samples(),
        n_steps=STEPS,
        allow_negative=True,
    )
    assert max(statistics.k) < -0.08
    clamped = Ptqd().correct(_program(), statistics, KEY)
    as_fitted = Ptqd().correct(_program(), _measured(k=-0.1), KEY)
    assert clamped.gain == as_fitted.gain == (1.0,) * STEPS
    np.testing.assert_allclose(clamped.bias, as_fitted.bias, rtol=1e-9)
    np.testing.assert_allclose(clamped.noise_std, as_fitted.noise_std, rtol=1e-9)


def test_p4_a_negative_gain_error_never_doubles_an_output() -> None:
    """P4."""
    found = Ptqd(allow_negative=True).correct(_program(), _measured(k=-0.9), KEY)
    assert found.gain == (2.0,) * STEPS


def test_p5_a_step_left_out_of_the_statistics_is_not_corrected() -> None:
    """P5."""
    samples = [sample for sample in _samples() if sample[0] != 2]
    statistics = measure_noise(
        _float,
        lambda x, step, fed: _quantized(x, step, fed, k=0.1),
        samples,
        n_steps=STEPS,
        allow_missing=True,
    )
    for corrector in (Ptqd(), Ptqd(gain=False), Ptqd(allow_negative=True)):
        found = corrector.correct(_program(), statistics, KEY)
        assert found.gain[2] == 1.0
        assert found.bias[2] == (0.0, 0.0)
        assert found.noise_std[2] == (_program().noise_std[2],) * 2
        assert found.bias[1] != (0.0, 0.0)


@pytest.mark.parametrize("absorb", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(absorb: float) -> None:
    with pytest.raises(InputError, match="absorb") as caught:
        Ptqd(absorb=absorb)
    assert caught.value.code == "EQ-3430"


def _learning(**options: Any) -> SamplerProgram:
    scheduler = DDPMScheduler(
        num_train_timesteps=100,
        beta_end=0.2,
        variance_type="learned_range",
        **{"clip_sample": False} | options,
    )
    return compile_sampler(scheduler, STEPS)


def test_a_learned_variance_gives_what_arrives_of_the_noise() -> None:
    program, statistics = _learning(), _measured()
    found = Ptqd(absorb=0.9).correct(program, statistics, KEY)
    assert found.absorbed is not None
    assert found.absorbed.largest_share == 0.9
    assert found.noise_std == tuple((std, std) for std in program.noise_std)
    for step in range(STEPS):
        weight = program.output_weights[step][0] * found.gain[step]
        expected = weight**2 * np.array(statistics.variance[step])
        np.testing.assert_allclose(found.absorbed.variance[step], expected, rtol=1e-12)
    assert found.gain == Ptqd().correct(_program(), statistics, KEY).gain


def test_p6_noise_above_the_upper_bound_of_a_learned_variance_is_marked() -> None:
    """P6."""
    loud = _measured().model_copy(update={"variance": ((1e6, 1e6),) * STEPS})
    assert Ptqd().correct(_learning(), loud, KEY).clamped == (True, True, True, False)
    assert not any(Ptqd().correct(_learning(), _measured(k=0.0), KEY).clamped[:2])


@pytest.mark.parametrize(
    ("program", "corrector"),
    [
        (_learning(), Ptqd(variance=False)),
        (_learning(clip_sample=True), Ptqd()),
        (_program(), Ptqd()),
    ],
    ids=["switched off", "clipping", "fixed variance"],
)
def test_nothing_is_absorbed_elementwise_otherwise(
    program: SamplerProgram, corrector: Ptqd
) -> None:
    found = corrector.correct(program, _measured(), KEY)
    assert found.absorbed is None
    assert "absorbed" not in found.model_dump(mode="json")


def test_another_corrector_takes_the_place_of_ptqd() -> None:
    class Halving:
        @property
        def name(self) -> str:
            return "halving"

        def correct(
            self, program: SamplerProgram, statistics: NoiseStatistics, key: CorrectionKey
        ) -> CorrectedSchedule:
            plain = Ptqd(gain=False, bias=False, variance=False)
            found = plain.correct(program, statistics, key)
            return found.model_copy(update={"gain": (0.5,) * program.n_steps})

    corrector: Corrector = Halving()
    found = correct_schedule(_program(), _measured(), KEY, corrector=corrector)
    assert found.gain == (0.5,) * STEPS
    assert correct_schedule(_program(), _measured(), KEY) == Ptqd().correct(
        _program(), _measured(), KEY
    )
