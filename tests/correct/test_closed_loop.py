"""I7: on data with an exact score, corrections from the closed loop are as good as from the open.

The float network is the exact noise prediction for independent pixels of a Gaussian mixture, whose
mean and variance are known in closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeqdm.correct.apply import correct_schedule
from edgeqdm.correct.closed_loop import Recorded, closed_loop_samples, second_pass
from edgeqdm.correct.match import FloatRuns, match_variance
from edgeqdm.correct.measure import NoiseStatistics, Predictor, measure_noise
from edgeqdm.errors import InputError, NumericalError
from edgeqdm.ir.schedule import CorrectedSchedule, CorrectionKey, SamplerProgram
from edgeqdm.models.levels import NoiseLevels
from edgeqdm.models.sampler import compile_sampler, scheduler_from_name
from edgeqdm.numerics import philox, solver

# diffusers hands tensors to numpy in ways that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:__array_wrap__ must accept:DeprecationWarning",
)

Sample = NDArray[np.float32]
KEY = CorrectionKey(model="m" * 64, sampler="s" * 64, guidance=1.0, precision="p" * 64)
SHAPE = (1, 16, 16)
STEPS = 30
WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([-1.2, 0.8])
STD = 0.25
DATA_MEAN = float(WEIGHTS @ MEANS)
DATA_VARIANCE = float(WEIGHTS @ (MEANS**2) - DATA_MEAN**2 + STD**2)


@dataclass(frozen=True)
class _Mixture:
    program: SamplerProgram
    alpha_bar: NDArray[np.float64]

    def exact(self, x: Sample, step: int, _: Any = None) -> Sample:
        a = self.alpha_bar[step]
        variance = a * STD**2 + 1 - a
        away = x[..., None].astype(np.float64) - np.sqrt(a) * MEANS
        logits = np.log(WEIGHTS) - away**2 / (2 * variance)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        return np.asarray(np.sqrt(1 - a) / variance * (share * away).sum(-1), np.float32)

    def quantized(self, x: Sample, step: int, _: Any = None) -> Sample:
        """An error that follows output and sample, saturates, and has a random part."""
        f = self.exact(x, step)
        rng = np.random.default_rng([step, int(abs(float(x[0, 0, 0, 0])) * 2**20)])
        noise = 0.1 * rng.standard_normal(x.shape)
        return np.asarray(1.08 * f + 0.03 + 0.04 * np.tanh(2 * x) + noise, np.float32)


@cache
def _mixture(name: str) -> _Mixture:
    config = {
        "num_train_timesteps": 200,
        "beta_start": 1e-3,
        "beta_end": 0.06,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "clip_sample": False,
    }
    scheduler = scheduler_from_name(name, config)
    program = compile_sampler(scheduler, STEPS)
    timesteps = np.array(program.timesteps, dtype=int)
    return _Mixture(program, scheduler.alphas_cumprod.double().numpy()[timesteps])


def _draw(
    model: _Mixture,
    predict: Predictor[None],
    correction: CorrectedSchedule | None,
    *,
    seed: int = 3,
) -> NDArray[np.float64]:
    images = range(32)
    table = solver.Table.from_json(
        model.program.model_dump(mode="json"),
        None if correction is None else correction.model_dump(mode="json"),
    )
    drawn = solver.run(
        table,
        lambda x, step: np.asarray(predict(x, step, None), np.float32),
        philox.batch_normal(seed, philox.INITIAL_STREAM, images, SHAPE),
        lambda step: philox.batch_normal(seed, philox.step_stream(step), images, SHAPE),
    )
    return drawn.astype(np.float64)


@cache
def _open_loop(name: str) -> NoiseStatistics:
    model = _mixture(name)
    fed = closed_loop_samples(
        model.program, None, model.exact, [(range(32), None)], sample_shape=SHAPE, seed=1
    )
    return measure_noise(model.exact, model.quantized, fed, n_steps=STEPS)


@cache
def _closed_loop(name: str) -> NoiseStatistics:
    model = _mixture(name)
    first = correct_schedule(model.program, _open_loop(name), KEY)
    runs = [(range(16), None), (range(16, 32), None)]
    return second_pass(
        model.program, first, model.exact, model.quantized, runs, sample_shape=SHAPE, seed=2
    )


def _matched(name: str, correction: CorrectedSchedule) -> CorrectedSchedule:
    """As corrections are by default."""
    model = _mixture(name)
    levels = NoiseLevels(np.sqrt(model.alpha_bar), np.sqrt(1 - model.alpha_bar))
    fed: list[Sample] = []
    outputs: list[Sample] = []

    def listening(x: Sample, step: int, _: None) -> Sample:
        fed.append(x)
        outputs.append(model.exact(x, step))
        return outputs[-1]

    _draw(model, listening, None, seed=1)
    runs = FloatRuns(np.stack(fed), np.stack(outputs))
    return match_variance(model.program, levels, correction, model.quantized, runs)


def _unmatched(name: str, correction: CorrectedSchedule) -> CorrectedSchedule:
    return correction


@pytest.mark.parametrize("last", [_unmatched, _matched])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++"])
def test_i7_a_closed_loop_pass_brings_the_moments_no_further_from_the_truth(
    name: str, last: Callable[[str, CorrectedSchedule], CorrectedSchedule]
) -> None:
    """I7: nor does the open loop: against the data in closed form and against the float sampler."""
    model = _mixture(name)
    float_moments = _moments(_draw(model, model.exact, None))
    data = np.array([DATA_MEAN, DATA_VARIANCE])
    raw = _moments(_draw(model, model.quantized, None))
    once, again = (
        last(name, correct_schedule(model.program, statistics, KEY))
        for statistics in (_open_loop(name), _closed_loop(name))
    )
    drawn = _draw(model, model.quantized, once)
    opened = _moments(drawn)
    closed = _moments(_draw(model, model.quantized, again))
    fourth = np.mean((drawn - drawn.mean()) ** 4)
    two_se = 2 * np.sqrt(np.array([drawn.var(), fourth - drawn.var() ** 2]) / drawn.size)
    assert np.all(np.abs(closed - data) <= np.abs(opened - data) + two_se)
    # A correction restores the float sampler, whose own steps are too coarse for the data.
    for corrected in (opened, closed):
        assert np.all(np.abs(corrected - data) <= np.abs(raw - data) + two_se)
        assert np.all(np.abs(corrected - float_moments) <= np.abs(raw - float_moments) + two_se)
    # The toy is not trivial: uncorrected samples are clearly off.
    assert np.any(np.abs(raw - float_moments) > 2 * two_se)


def _moments(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([drawn.mean(), drawn.var()])


def test_samples_are_those_of_the_corrected_quantized_sampler() -> None:
    model = _mixture("ddpm")
    correction = correct_schedule(model.program, _open_loop("ddpm"), KEY)
    fed: list[Sample] = []

    def listening(x: Sample, step: int, _: None) -> Sample:
        fed.append(x.copy())
        return model.quantized(x, step)

    runs = [(range(4), None), ((9, 4), None)]
    found = list(
        closed_loop_samples(model.program, correction, listening, runs, sample_shape=SHAPE, seed=5)
    )
    assert [step for step, _, _ in found] == 2 * list(range(STEPS))
    assert all(np.array_equal(x, y) for (_, x, _), y in zip(found, fed, strict=True))
    # Image 4 of the second run starts from its own noise.
    sigma = np.float32(model.program.initial_sigma)
    expected = sigma * philox.standard_normal(5, philox.INITIAL_STREAM, 4, SHAPE)
    assert np.array_equal(found[STEPS][1][1], expected)
    # The first input is the same without correction, the last is not.
    plain = list(
        closed_loop_samples(
            model.program, None, model.quantized, runs[:1], sample_shape=SHAPE, seed=5
        )
    )
    assert np.array_equal(plain[0][1], found[0][1])
    assert not np.allclose(plain[-1][1], found[STEPS - 1][1], atol=1e-3)


def test_the_quantized_network_is_asked_once_per_sample_and_conditioning_is_handed_on() -> None:
    model = _mixture("ddim")
    asked: list[tuple[str, int, str]] = []

    def predictor(name: str) -> Predictor[str]:
        def predict(x: Sample, step: int, label: str) -> Sample:
            asked.append((name, step, label))
            return model.exact(x, step)

        return predict

    statistics = second_pass(
        model.program,
        None,
        predictor("float"),
        predictor("quantized"),
        [(range(2), "cat"), (range(2, 4), "dog")],
        sample_shape=SHAPE,
        seed=0,
    )
    expected = [
        (n, i, c) for n in ("float", "quantized") for i in range(STEPS) for c in ("cat", "dog")
    ]
    assert sorted(asked) == sorted(expected)
    assert statistics.k == (0.0,) * STEPS
    assert statistics.n == (4 * 256,) * STEPS


def test_p2_a_quantized_network_like_the_float_one_changes_nothing_in_the_second_pass() -> None:
    """P2."""
    model = _mixture("ddpm")
    statistics = second_pass(
        model.program,
        None,
        model.exact,
        model.exact,
        [(range(2), None)],
        sample_shape=SHAPE,
        seed=0,
    )
    found = correct_schedule(model.program, statistics, KEY)
    assert found.gain == (1.0,) * STEPS
    assert found.noise_std == tuple((std,) for std in model.program.noise_std)


def test_a_correction_of_another_number_of_steps_is_refused() -> None:
    model = _mixture("ddpm")
    correction = correct_schedule(model.program, _open_loop("ddpm"), KEY)
    cut = correction.model_copy(update={"gain": correction.gain[1:]})
    with pytest.raises(InputError, match="29 steps, the sampler has 30") as caught:
        second_pass(
            model.program,
            cut,
            model.exact,
            model.exact,
            [(range(1), None)],
            sample_shape=SHAPE,
            seed=0,
        )
    assert caught.value.code == "EQ-3431"


def test_no_runs_at_all_are_refused() -> None:
    model = _mixture("ddpm")
    with pytest.raises(InputError, match="no sample at 30 of 30 steps"):
        second_pass(model.program, None, model.exact, model.exact, [], sample_shape=SHAPE, seed=0)


def test_a_quantized_network_that_overflows_is_named_with_its_step() -> None:
    model = _mixture("ddim")

    def broken(x: Sample, step: int, _: None) -> Sample:
        return np.full_like(x, np.inf) if step == STEPS - 1 else model.exact(x, step)

    with np.errstate(invalid="ignore"), pytest.raises(NumericalError, match="quantized") as caught:
        second_pass(
            model.program,
            None,
            model.exact,
            broken,
            [(range(1), None)],
            sample_shape=SHAPE,
            seed=0,
        )
    assert caught.value.path == f"step {STEPS - 1}"


def test_samples_carry_what_the_quantized_network_answered() -> None:
    model = _mixture("ddim")
    fed = closed_loop_samples(
        model.program, None, model.quantized, [(range(1), None)], sample_shape=SHAPE, seed=0
    )
    for step, x, recorded in fed:
        assert isinstance(recorded, Recorded)
        assert np.array_equal(recorded.output, model.quantized(x, step))
