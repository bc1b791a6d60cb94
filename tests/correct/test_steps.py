"""P9 and C10: the fewest bits whose corrected noise hides in the diffusion's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeqdm.correct.measure import NoiseStatistics, measure_noise
from edgeqdm.correct.steps import activation_bits_by_step, contiguous, quantization_snr
from edgeqdm.errors import InputError, UnsupportedError
from edgeqdm.ir.schedule import SamplerProgram
from edgeqdm.models.levels import NoiseLevels, noise_levels
from edgeqdm.models.sampler import compile_sampler

# diffusers hands tensors to numpy in ways that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Sample = NDArray[np.float32]
STEPS = 6
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def _program(prediction_type: str) -> SamplerProgram:
    if prediction_type == "flow_prediction":
        return compile_sampler(FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), STEPS)
    scheduler = DDIMScheduler(
        num_train_timesteps=100,
        beta_end=0.2,
        clip_sample=False,
        prediction_type=prediction_type,
    )
    return compile_sampler(scheduler, STEPS)


def _eps(x: Sample, step: int, _: None) -> Sample:
    return np.asarray(0.8 * x + 0.1, np.float32)


def _eps_error(x: Sample, step: int) -> NDArray[np.float64]:
    rng = np.random.default_rng([step, 1])
    return 0.05 * x + 0.02 + 0.1 * rng.standard_normal(x.shape)


def _samples(n_steps: int = STEPS) -> list[tuple[int, Sample, None]]:
    rng = np.random.default_rng(3)
    return [(i, rng.standard_normal((8, 2, 16, 16), np.float32), None) for i in range(n_steps)]


def _as_predicted(
    eps: NDArray[np.floating], x: Sample, prediction_type: str, signal: float, noise: float
) -> Sample:
    """A noise prediction as the prediction of another kind, by the definitions of the kinds."""
    clean = (x - noise * eps) / signal
    found = {
        "epsilon": eps,
        "sample": clean,
        "v_prediction": signal * eps - noise * clean,
        "flow_prediction": eps - clean,
    }[prediction_type]
    return np.asarray(found, np.float32)


def _measured(program: SamplerProgram, levels: NoiseLevels) -> NoiseStatistics:
    def convert(eps: NDArray[np.floating], x: Sample, step: int) -> Sample:
        signal, noise = float(levels.signal[step]), float(levels.noise[step])
        return _as_predicted(eps, x, program.prediction_type, signal, noise)

    return measure_noise(
        lambda x, step, fed: convert(_eps(x, step, None), x, step),
        lambda x, step, fed: convert(_eps(x, step, None) + _eps_error(x, step), x, step),
        _samples(),
        n_steps=STEPS,
    )


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_snr_is_that_of_the_noise_prediction_whatever_is_predicted(
    prediction_type: str,
) -> None:
    program = _program(prediction_type)
    levels = noise_levels(program)
    if prediction_type == "flow_prediction":
        # The first step is fed pure noise; a velocity says nothing about eps there.
        signal = np.maximum(levels.signal, 0.01)
        levels = NoiseLevels(signal, 1 - signal)
    statistics = _measured(program, levels)
    found = quantization_snr(program, levels, statistics)
    for step, x, _ in _samples():
        eps, error = _eps(x, step, None).astype(np.float64), _eps_error(x, step)
        # Correct the converted output, then convert its error back: a slope against another f.
        k = np.array(statistics.k[step])
        signal, noise = float(levels.signal[step]), float(levels.noise[step])
        f, f_hat = (
            _as_predicted(e, x, prediction_type, signal, noise).astype(np.float64)
            for e in (eps, eps + error)
        )
        left = (f_hat - np.array(statistics.mu[step])[:, None, None]) / (1 + k) - f
        as_eps = {
            "epsilon": left,
            "v_prediction": signal * left,
            "sample": -signal / noise * left,
            "flow_prediction": signal * left,
        }[prediction_type]
        expected = np.sqrt(np.mean(eps**2) / np.mean(as_eps**2))
        # Float32 outputs.
        assert found[step] == pytest.approx(expected, rel=1e-3)


def test_c10_the_corrected_error_counts() -> None:
    """C10."""
    program = _program("epsilon")
    levels = noise_levels(program)
    statistics = measure_noise(
        _eps,
        lambda x, step, fed: np.asarray(
            1.5 * _eps(x, step, None) + 2.0 + 1e-3 * _eps_error(x, step), np.float32
        ),
        _samples(),
        n_steps=STEPS,
    )
    # Raw, the error is larger than the signal; corrected, it is 1e-4.
    assert max(statistics.snr_db) < 0
    assert min(quantization_snr(program, levels, statistics)) > 1000


def _uniform(snr: Sequence[float]) -> NoiseStatistics:
    """Statistics of a noise prediction with these amplitude ratios."""
    n = len(snr)
    return NoiseStatistics(
        k=(0.0,) * n,
        mu=((0.0,),) * n,
        variance=tuple((1 / value**2,) for value in snr),
        correlation=(0.0,) * n,
        n=(64,) * n,
        clamped_gain=(False,) * n,
        snr_db=(0.0,) * n,
        output_mean=((0.6,),) * n,
        output_variance=((0.64,),) * n,
        covariance=((0.0,),) * n,
        input_power=(1.0,) * n,
        input_output=(0.0,) * n,
    )


def test_p9_early_steps_take_few_bits_late_steps_many() -> None:
    """P9."""
    program = _program("epsilon")
    levels = noise_levels(program)
    forward = (levels.signal / levels.noise) ** 2
    assert np.all(np.diff(forward) > 0)
    middle = math.sqrt(forward[2] * forward[3])
    by_bits = {8: _uniform([1e3] * STEPS), 4: _uniform([middle] * STEPS)}
    assert activation_bits_by_step(program, levels, by_bits) == (4, 4, 4, 8, 8, 8)


def test_p9_none_satisfying_takes_most_bits_all_satisfying_fewest() -> None:
    """P9."""
    program = _program("epsilon")
    levels = noise_levels(program)
    low, high = _uniform([1e-4] * STEPS), _uniform([1e4] * STEPS)
    assert activation_bits_by_step(program, levels, {4: low, 8: low}) == (8,) * STEPS
    assert activation_bits_by_step(program, levels, {4: high, 8: high}) == (4,) * STEPS


def test_p9_both_ratios_may_be_powers() -> None:
    """P9."""
    program = _program("epsilon")
    levels = noise_levels(program)
    forward = (levels.signal / levels.noise) ** 2
    # Amplitudes whose squares lie just above the forward ratio, wherever that exceeds 1.
    by_bits = {4: _uniform([1.01 * math.sqrt(value) for value in forward]), 8: _uniform([1e3] * 6)}
    published = activation_bits_by_step(program, levels, by_bits)
    powers = activation_bits_by_step(program, levels, by_bits, power_ratio=True)
    assert powers == (4,) * STEPS
    assert published == tuple(8 if value > 1.1 else 4 for value in forward)
    assert 8 in published


def test_steps_without_noise_take_the_fewest_bits() -> None:
    program = _program("epsilon")
    silent = _uniform([1e4] * STEPS).model_copy(update={"variance": ((0.0,),) * STEPS})
    levels = noise_levels(program)
    assert quantization_snr(program, levels, silent) == (math.inf,) * STEPS
    assert activation_bits_by_step(program, levels, {4: silent, 8: silent}) == (4,) * STEPS


def test_statistics_of_another_sampler_are_refused() -> None:
    program = _program("epsilon")
    with pytest.raises(InputError, match="statistics of 5 steps"):
        activation_bits_by_step(program, noise_levels(program), {8: _uniform([1.0] * 5)})


def test_steps_that_were_not_measured_are_refused() -> None:
    program = _program("epsilon")
    statistics = _uniform([1.0] * STEPS).model_copy(update={"n": (64, 0, 64, 0, 64, 64)})
    with pytest.raises(InputError, match="steps 1, 3") as caught:
        activation_bits_by_step(program, noise_levels(program), {8: statistics})
    assert caught.value.code == "EQ-3433"


def test_an_unknown_prediction_is_refused() -> None:
    program = _program("epsilon")
    other = program.model_copy(update={"prediction_type": "score"})
    with pytest.raises(UnsupportedError, match="'score'") as caught:
        quantization_snr(other, noise_levels(program), _uniform([1.0] * STEPS))
    assert caught.value.code == "EQ-4431"


def test_a_short_run_takes_the_bits_of_a_neighbour() -> None:
    assert contiguous((4, 4, 4, 8, 4, 4, 8, 8, 8), min_run=3) == (4, 4, 4, 8, 8, 8, 8, 8, 8)
    assert contiguous((4, 8, 4, 4, 4), min_run=2) == (8, 8, 4, 4, 4)
    assert contiguous((4, 4, 8), min_run=1) == (4, 4, 8)
    assert contiguous((4, 8), min_run=5) == (8, 8)


def _best_by_trying_all(bits: tuple[int, ...], min_run: int) -> int:
    n = len(bits)
    least = min(min_run, n)
    totals = []
    for cut in itertools.product([False, True], repeat=n - 1):
        edges = [0, *(i + 1 for i, c in enumerate(cut) if c), n]
        lengths = [(end - start, max(bits[start:end])) for start, end in itertools.pairwise(edges)]
        if min(length for length, _ in lengths) >= least:
            totals.append(sum(length * high for length, high in lengths))
    return min(totals)


@settings(deadline=None, max_examples=30)
@given(
    bits=st.lists(st.sampled_from([4, 6, 8]), min_size=1, max_size=9).map(tuple),
    min_run=st.integers(1, 5),
)
def test_runs_are_long_enough_never_lower_and_cost_the_least(
    bits: tuple[int, ...], min_run: int
) -> None:
    found = contiguous(bits, min_run=min_run)
    assert all(a >= b for a, b in zip(found, bits, strict=True))
    runs = [len(list(group)) for _, group in itertools.groupby(found)]
    assert min(runs) >= min(min_run, len(bits))
    assert sum(found) == _best_by_trying_all(bits, min_run)


@pytest.mark.parametrize(("bits", "min_run"), [((), 1), ((4, 8), 0)])
def test_no_steps_or_no_run_length_is_refused(bits: tuple[int, ...], min_run: int) -> None:
    with pytest.raises(InputError, match="cannot be split") as caught:
        contiguous(bits, min_run=min_run)
    assert caught.value.code == "EQ-3434"
