"""The variance that a sampler loses to quantization is given back, step by step.

The float network is exact for independent Gaussian pixels, whose score is linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeqdm.correct.match import FloatRuns, match_variance
from edgeqdm.errors import InputError, NumericalError, UnsupportedError
from edgeqdm.ir.schedule import CorrectedSchedule, CorrectionKey, SamplerProgram
from edgeqdm.models.levels import NoiseLevels, noise_levels
from edgeqdm.models.sampler import compile_sampler, scheduler_from_name
from edgeqdm.numerics import philox, solver

# diffusers hands tensors to numpy in ways that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:__array_wrap__ must accept:DeprecationWarning",
)

Sample = NDArray[np.float32]
Network = Callable[[Sample, int], Sample]
STEPS, RUNS, SHAPE = 8, 24, (2, 8, 8)
STD = 0.5
# Outputs are float32, and what they say of a clean sample is a difference of two much
# larger numbers: bounds of 1e-3 leave room for that and are a thirtieth of what factors change.
SAMPLERS = [
    ("ddim", "epsilon", 0.0),
    ("ddim", "v_prediction", 0.0),
    ("ddim", "sample", 0.0),
    ("ddim", "epsilon", 1.0),
    ("ddpm", "v_prediction", 0.0),
    ("dpmsolver++", "epsilon", 0.0),
    ("dpmsolver++_sde", "epsilon", 0.0),
    ("euler", "epsilon", 0.0),
    ("euler_ancestral", "epsilon", 0.0),
    ("pndm", "epsilon", 0.0),
    ("flow_euler", "flow_prediction", 0.0),
]
each_sampler = pytest.mark.parametrize(("name", "prediction", "eta"), SAMPLERS)


class Gaussian:
    """Pixels N(0, STD^2) and the network that knows it."""

    def __init__(self, name: str, prediction: str, eta: float, **changes: Any) -> None:
        config = {
            "num_train_timesteps": 200,
            "beta_start": 1e-3,
            "beta_end": 0.06,
            "beta_schedule": "linear",
            "prediction_type": prediction,
            "clip_sample": False,
            **changes,
        }
        self.program = compile_sampler(scheduler_from_name(name, config), STEPS, eta=eta)
        self.levels = noise_levels(self.program)

    def clean(self, x: Sample, step: int) -> NDArray[np.float64]:
        signal, noise = self.levels.signal[step], self.levels.noise[step]
        expected: NDArray[np.float64] = signal * STD**2 / ((signal * STD) ** 2 + noise**2) * x
        return expected

    def saying(self, clean: NDArray[np.float64], x: Sample, step: int) -> Sample:
        """The output that says `clean` of the clean sample."""
        signal, noise = self.levels.signal[step], self.levels.noise[step]
        eps = (x - signal * clean) / noise
        answer = {
            "epsilon": eps,
            "v_prediction": signal * eps - noise * clean,
            "sample": clean,
            "flow_prediction": eps - clean,
        }
        return answer[self.program.prediction_type].astype(np.float32)

    def exact(self, x: Sample, step: int) -> Sample:
        return self.saying(self.clean(x, step), x, step)

    def shrunk(self, x: Sample, step: int) -> Sample:
        return self.saying(factor(step) * self.clean(x, step) + 0.01, x, step)

    def noisy(self, x: Sample, step: int) -> Sample:
        chance = np.random.default_rng(step)
        clean = self.clean(x, step)
        error = 0.2 * clean.std() * chance.standard_normal(x.shape)
        return self.saying(0.9 * clean + error, x, step)

    def sample(
        self, network: Network, correction: CorrectedSchedule | None = None, seed: int = 0
    ) -> tuple[Sample, FloatRuns]:
        inputs, outputs = [], []

        def predict(x: Sample, step: int) -> Sample:
            inputs.append(np.array(x))
            outputs.append(network(x, step))
            return outputs[-1]

        drawn = solver.run(
            solver.Table.from_json(
                self.program.model_dump(mode="json"),
                None if correction is None else correction.model_dump(mode="json"),
            ),
            predict,
            philox.batch_normal(seed, philox.INITIAL_STREAM, range(RUNS), SHAPE),
            lambda i: philox.batch_normal(seed, philox.step_stream(i), range(RUNS), SHAPE),
        )
        return drawn, FloatRuns(np.stack(inputs), np.stack(outputs))

    def match(self, network: Network, before: CorrectedSchedule | None = None) -> CorrectedSchedule:
        _, runs = self.sample(self.exact)
        first = before or nothing(self.program)
        return match_variance(self.program, self.levels, first, network, runs)


def factor(step: int) -> float:
    return 0.97 - 0.01 * (step % 3)


def nothing(program: SamplerProgram, **changes: Any) -> CorrectedSchedule:
    n, channels = program.n_steps, SHAPE[0]
    fields: dict[str, Any] = {
        "key": CorrectionKey(model="m", sampler="s", guidance=1.0, precision="p"),
        "gain": (1.0,) * n,
        "bias": ((0.0,) * channels,) * n,
        "noise_std": tuple((std,) * channels for std in program.noise_std),
        "clamped": (False,) * n,
    }
    return CorrectedSchedule(**fields | changes)


def spread(values: Sample) -> float:
    return float(((values - values.mean(0, dtype=np.float64)) ** 2).sum())


@each_sampler
def test_a_shrunk_prediction_is_given_its_factor_back(
    name: str, prediction: str, eta: float
) -> None:
    """Everything the network lost is known, so the float model's samples come back."""
    model = Gaussian(name, prediction, eta)
    found = model.match(model.shrunk)
    # Where a flow begins, nothing is known of the clean sample yet: what it says does not vary.
    wanted = [1 / factor(i) if signal > 0 else 1 for i, signal in enumerate(model.levels.signal)]
    np.testing.assert_allclose(found.gain, wanted, rtol=1e-3)
    reference, _ = model.sample(model.exact)
    raw, _ = model.sample(model.shrunk)
    again, _ = model.sample(model.shrunk, found)
    assert np.abs(again - reference).max() < 1e-3 < 1e-2 < np.abs(raw - reference).max()


@each_sampler
def test_samples_of_a_network_with_errors_vary_as_those_of_the_float_one(
    name: str, prediction: str, eta: float
) -> None:
    model = Gaussian(name, prediction, eta)
    found = model.match(model.noisy)
    reference, theirs = model.sample(model.exact)
    corrected, mine = model.sample(model.noisy, found)
    silent = {
        "epsilon": 1 / model.levels.noise,
        "v_prediction": model.levels.signal / model.levels.noise,
        "sample": 0 * model.levels.noise,
        "flow_prediction": 1 / model.levels.noise,
    }[prediction]
    table = solver.Table.from_json(
        model.program.model_dump(mode="json"), found.model_dump(mode="json")
    )
    for step in range(model.program.n_steps):
        x = mine.inputs[step]
        f = solver.correct(table, step, mine.outputs[step], x)
        said = spread(f - np.float32(silent[step]) * x)
        true = spread(theirs.outputs[step] - np.float32(silent[step]) * theirs.inputs[step])
        assert said == pytest.approx(true, rel=1e-3)
        means = (f - theirs.outputs[step]).mean((0, 2, 3))
        np.testing.assert_allclose(means, 0, atol=1e-5)
    raw, _ = model.sample(model.noisy)
    left, lost = (abs(spread(x) / spread(reference) - 1) for x in (corrected, raw))
    assert left < lost


@pytest.mark.parametrize("seed", range(3))
def test_unseen_runs_gain_too(seed: int) -> None:
    model = Gaussian("ddim", "epsilon", 0.0)
    found = model.match(model.noisy)
    reference, _ = model.sample(model.exact, seed=seed + 1)
    raw, _ = model.sample(model.noisy, seed=seed + 1)
    corrected, _ = model.sample(model.noisy, found, seed=seed + 1)
    left, lost = (abs(spread(x) / spread(reference) - 1) for x in (corrected, raw))
    assert left < 0.5 * lost


@each_sampler
def test_p2_a_network_without_errors_is_left_alone(name: str, prediction: str, eta: float) -> None:
    """P2. The noise of a step is that of the float runs, or the samples would not be theirs."""
    model = Gaussian(name, prediction, eta)
    found = model.match(model.exact)
    np.testing.assert_allclose(found.gain, 1, atol=1e-4)
    np.testing.assert_allclose(found.bias, 0, atol=1e-4)
    assert found.input_weight is not None
    np.testing.assert_allclose(found.input_weight, 0, atol=1e-3)
    assert found.noise_std == nothing(model.program).noise_std


def test_what_was_corrected_before_counts() -> None:
    """Twice the output and a bias, taken out by the correction that is there, are no error."""
    model = Gaussian("ddim", "v_prediction", 0.0)
    n = model.program.n_steps
    before = nothing(model.program, gain=(0.5,) * n, bias=((0.25,) * 2,) * n)
    found = model.match(lambda x, step: 2 * model.exact(x, step) + np.float32(0.25), before)
    np.testing.assert_allclose(found.gain, 0.5, rtol=1e-5)
    np.testing.assert_allclose(found.bias, 0.25, atol=1e-5)


def test_outputs_without_variance_keep_their_factor() -> None:
    model = Gaussian("ddim", "epsilon", 0.0)
    _, runs = model.sample(model.exact)
    alone = FloatRuns(runs.inputs[:, :1], runs.outputs[:, :1])
    found = match_variance(model.program, model.levels, nothing(model.program), model.shrunk, alone)
    assert found.gain == (1.0,) * STEPS
    assert found.input_weight == (0.0,) * STEPS
    assert any(bias != (0.0, 0.0) for bias in found.bias)


def test_a_factor_out_of_bounds_says_nothing() -> None:
    model = Gaussian("ddim", "sample", 0.0)
    for far in (0.7, 1.4):
        found = model.match(lambda x, step, far=far: far * model.exact(x, step))
        assert found.gain[0] == 1.0
        assert found.input_weight == (0.0,) * STEPS
    near = model.match(lambda x, step: 0.9 * model.exact(x, step))
    np.testing.assert_allclose(near.gain, 1 / 0.9, rtol=1e-3)


def test_what_is_matched_is_left_alone() -> None:
    """The weight of the input that a correction has already counts."""
    model = Gaussian("ddim", "v_prediction", 0.0)
    once = model.match(model.shrunk)
    twice = model.match(model.shrunk, once)
    assert once.input_weight is not None
    assert twice.input_weight is not None
    np.testing.assert_allclose(twice.gain, once.gain, rtol=1e-5)
    np.testing.assert_allclose(twice.input_weight, once.input_weight, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral"])
def test_the_noise_of_the_correction_is_drawn(name: str) -> None:
    """Half the noise leaves too little variance; the outputs are matched along those samples."""
    model = Gaussian(name, "epsilon", 0.0)
    half = tuple((0.5 * std,) * SHAPE[0] for std in model.program.noise_std)
    before = nothing(model.program, noise_std=half)
    fed: list[Sample] = []

    def listening(x: Sample, step: int) -> Sample:
        fed.append(np.array(x))
        return model.exact(x, step)

    found = model.match(listening, before)
    assert found.noise_std == half
    _, theirs = model.sample(model.exact, found)
    for mine, wanted in zip(fed, theirs.inputs, strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-3)


def test_clipping_is_done_along_the_way() -> None:
    model = Gaussian("ddim", "epsilon", 0.0, clip_sample=True, clip_sample_range=0.4)
    assert model.program.clip is not None
    reference, _ = model.sample(model.exact)
    again, _ = model.sample(model.shrunk, model.match(model.shrunk))
    raw, _ = model.sample(model.shrunk)
    assert np.abs(again - reference).max() < 1e-3 < 1e-2 < np.abs(raw - reference).max()


def test_a_step_without_noise_is_left_alone() -> None:
    """What the network says there is no prediction of a clean sample."""
    model = Gaussian("ddim", "epsilon", 0.0)
    noise = model.levels.noise.copy()
    noise[-1] = 0.0
    model_levels, (_, runs) = NoiseLevels(model.levels.signal, noise), model.sample(model.exact)
    found = match_variance(model.program, model_levels, nothing(model.program), model.shrunk, runs)
    assert found.gain[-1] == 1.0
    assert found.gain[0] != 1.0


def test_a_learned_variance_is_that_of_the_quantized_network() -> None:
    model = Gaussian("ddpm", "epsilon", 0.0, variance_type="learned_range")
    fed: list[Sample] = []

    def learned(network: Network, low: float) -> Network:
        def both(x: Sample, step: int) -> Sample:
            fed.append(np.array(x))
            return np.concatenate([network(x, step), np.tanh(x) + np.float32(low)], 1)

        return both

    first, (_, runs) = nothing(model.program), model.sample(learned(model.exact, 0.0))
    for network, low in ((model.exact, 0.0), (model.exact, -0.5), (model.shrunk, -0.5)):
        fed.clear()
        found = match_variance(model.program, model.levels, first, learned(network, low), runs)
        seen = np.stack(fed)
        _, again = model.sample(learned(network, low), found)
        np.testing.assert_allclose(seen, again.inputs, atol=2e-3)
        if network == model.exact and low == 0.0:
            np.testing.assert_allclose(found.gain, 1, atol=1e-4)


@pytest.mark.parametrize("part", ["inputs", "outputs", "levels", "correction"])
def test_parts_of_another_sampler_are_refused(part: str) -> None:
    model = Gaussian("ddim", "epsilon", 0.0)
    _, runs = model.sample(model.exact)
    cut = {
        "inputs": replace(runs, inputs=runs.inputs[1:]),
        "outputs": replace(runs, outputs=runs.outputs[1:]),
    }
    levels, first = model.levels, nothing(model.program)
    if part == "levels":
        levels = NoiseLevels(levels.signal[1:], levels.noise[1:])
    if part == "correction":
        first = first.model_copy(update={"gain": first.gain[1:]})
    with pytest.raises(InputError, match="7 steps, the sampler has 8") as refused:
        match_variance(model.program, levels, first, model.exact, cut.get(part, runs))
    assert (refused.value.code, refused.value.path) == ("EQ-3435", part)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_refused(bad: float) -> None:
    """Along the quantized sampler's own samples, where no measurement has been."""
    model = Gaussian("ddim", "epsilon", 0.0)

    def failing(x: Sample, step: int) -> Sample:
        found = model.exact(x, step)
        found[0, 0, 0, 0] = bad if step == 3 else 0.0
        return found

    with pytest.raises(NumericalError, match="1 NaN or Inf") as refused:
        model.match(failing)
    assert (refused.value.code, refused.value.path) == ("EQ-5401", "step 3")


def test_an_unknown_prediction_is_refused() -> None:
    model = Gaussian("ddim", "epsilon", 0.0)
    _, runs = model.sample(model.exact)
    other = model.program.model_copy(update={"prediction_type": "odd"})
    with pytest.raises(UnsupportedError, match="'odd'"):
        match_variance(other, model.levels, nothing(other), model.exact, runs)
