"""The table is run term by term in float32, and its misuse is refused."""

from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeqdm.ir.schedule import (
    AbsorbedVariance,
    ClipStep,
    CorrectedSchedule,
    CorrectionKey,
    LearnedVariance,
    SamplerProgram,
)
from edgeqdm.numerics import philox, solver

SHAPE = (2, 3, 4, 5)
N_STEPS = 5

# Row [1, 2, 3] of the sample after all steps of the run at the end of this file.
GOLDEN = (0.15446734, 1.219509, 0.18922168, 0.13807094, 0.97535044)


def random_program(
    seed: int, n_samples: int = 2, n_outputs: int = 3, *, clip: bool = False
) -> SamplerProgram:
    """A sampler with random weights; its last step adds no noise."""
    generator = np.random.default_rng(seed)

    def column() -> tuple[float, ...]:
        return tuple(generator.uniform(0.1, 1.0, N_STEPS).tolist())

    def history(width: int) -> tuple[tuple[float, ...], ...]:
        weights = generator.uniform(-1.0, 1.0, (N_STEPS, width))
        age, step = np.arange(width), np.arange(N_STEPS)[:, None]
        return tuple(tuple(row) for row in np.where(age <= step, weights, 0.0).tolist())

    clip_step = ClipStep(limit=0.5, sample_weight=column(), output_weight=column(), weight=column())
    return SamplerProgram(
        sampler="RandomScheduler",
        settings={"eta": 0.0},
        prediction_type="epsilon",
        timesteps=tuple(float(t) for t in range(N_STEPS, 0, -1)),
        integer_timesteps=True,
        initial_sigma=1.7,
        input_scale=column(),
        sample_weights=history(n_samples),
        output_weights=history(n_outputs),
        noise_std=(*column()[:-1], 0.0),
        clip=clip_step if clip else None,
    )


def random_correction(
    seed: int, n_channels: int = SHAPE[1], *, weighted: bool = False
) -> CorrectedSchedule:
    generator = np.random.default_rng(seed)
    noise_std = generator.uniform(0.0, 1.0, (N_STEPS, n_channels))
    noise_std[1] = 0.0
    return CorrectedSchedule(
        key=CorrectionKey(model="m", sampler="s", guidance=1.0, precision="p"),
        gain=tuple(generator.uniform(0.9, 1.1, N_STEPS).tolist()),
        bias=tuple(map(tuple, generator.uniform(-0.1, 0.1, (N_STEPS, n_channels)).tolist())),
        noise_std=tuple(map(tuple, noise_std.tolist())),
        clamped=(False,) * N_STEPS,
        input_weight=tuple(generator.uniform(-0.1, 0.1, N_STEPS).tolist()) if weighted else None,
    )


def table_of(program: SamplerProgram, correction: CorrectedSchedule | None = None) -> solver.Table:
    stored = None if correction is None else correction.model_dump(mode="json")
    return solver.Table.from_json(program.model_dump(mode="json"), stored)


def predict(sample: np.ndarray, step: int) -> np.ndarray:
    return np.tanh(sample + np.float32(0.1 * step))


def initial_noise() -> np.ndarray:
    return philox.batch_normal(0, philox.INITIAL_STREAM, range(SHAPE[0]), SHAPE[1:])


def step_noise(step: int) -> np.ndarray:
    return philox.batch_normal(0, philox.step_stream(step), range(SHAPE[0]), SHAPE[1:])


def run_by_the_formula(
    program: SamplerProgram, correction: CorrectedSchedule | None = None
) -> list[np.ndarray]:
    """The formula of `edgeqdm.ir.schedule`, in float64 up to the network."""
    samples = [program.initial_sigma * initial_noise().astype(np.float64)]
    outputs: list[np.ndarray] = []
    for i in range(program.n_steps):
        scaled = (program.input_scale[i] * samples[-1]).astype(np.float32)
        output = predict(scaled, i).astype(np.float64)
        std = np.full(SHAPE[1], program.noise_std[i])
        if correction is not None:
            bias = np.array(correction.bias[i]).reshape(1, -1, 1, 1)
            output = correction.gain[i] * (output - bias)
            if correction.input_weight is not None:
                output = output + correction.input_weight[i] * scaled.astype(np.float64)
            std = np.array(correction.noise_std[i])
        outputs.append(output)
        x = std.reshape(1, -1, 1, 1) * step_noise(i)
        for k, weight in enumerate(program.sample_weights[i][: i + 1]):
            x = x + weight * samples[i - k]
        for j, weight in enumerate(program.output_weights[i][: i + 1]):
            x = x + weight * outputs[i - j]
        if program.clip is not None:
            clean = program.clip.sample_weight[i] * samples[i]
            clean = clean + program.clip.output_weight[i] * outputs[i]
            limit = program.clip.limit
            x = x + program.clip.weight[i] * np.clip(clean, -limit, limit)
        samples.append(x)
    return samples[1:]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_samples=st.integers(1, 4),
    n_outputs=st.integers(1, 4),
    clip=st.booleans(),
    corrected=st.booleans(),
    weighted=st.booleans(),
)
def test_run_equals_the_formula_in_float64(
    seed: int, n_samples: int, n_outputs: int, clip: bool, corrected: bool, weighted: bool
) -> None:
    program = random_program(seed, n_samples, n_outputs, clip=clip)
    correction = random_correction(seed, weighted=weighted) if corrected else None
    found: list[np.ndarray] = []
    solver.run(
        table_of(program, correction),
        predict,
        initial_noise(),
        step_noise,
        lambda step, sample: found.append(sample),
    )
    for expected, sample in zip(run_by_the_formula(program, correction), found, strict=True):
        assert sample.dtype == np.float32
        # Ten float32 terms of up to 2^4 in each of five steps.
        np.testing.assert_allclose(sample, expected, rtol=0.0, atol=1e-4)


def test_terms_are_added_in_the_documented_order_in_float32() -> None:
    table = table_of(random_program(1, clip=True))
    x0, x1, f0, f1, f2, z = (step_noise(i) for i in range(6))
    clip = table.clip
    assert clip is not None
    clean = clip.sample_weight[3] * x0 + clip.output_weight[3] * f0
    expected = table.sample_weights[3, 0] * x0
    expected = expected + table.sample_weights[3, 1] * x1
    for age, output in enumerate((f0, f1, f2)):
        expected = expected + table.output_weights[3, age] * output
    expected = expected + table.noise_std[3] * z
    expected = expected + clip.weight[3] * np.clip(clean, -clip.limit, clip.limit)
    found = solver.advance(table, 3, (x0, x1), (f0, f1, f2), z)
    assert found.tobytes() == expected.tobytes()


def test_coefficients_are_rounded_once_from_float64() -> None:
    program = random_program(2)
    table = table_of(program)
    assert table.sample_weights.dtype == np.float32
    assert np.array_equal(table.sample_weights, np.array(program.sample_weights, dtype=np.float32))
    assert table.initial_sigma == np.float32(1.7)


def test_result_does_not_depend_on_the_batch() -> None:
    table = table_of(random_program(3, clip=True), random_correction(3))
    both = solver.run(table, predict, initial_noise(), step_noise)
    for i in range(SHAPE[0]):
        alone = solver.run(
            table, predict, initial_noise()[i : i + 1], lambda s, i=i: step_noise(s)[i : i + 1]
        )
        assert alone.tobytes() == both[i : i + 1].tobytes()


def test_output_is_left_as_it_is_without_correction() -> None:
    output = step_noise(0)
    assert solver.correct(table_of(random_program(0)), 0, output, output) is output


def test_neutral_correction_changes_no_bit() -> None:
    program = random_program(4)
    neutral = random_correction(4).model_copy(
        update={
            "gain": (1.0,) * N_STEPS,
            "bias": ((0.0,) * SHAPE[1],) * N_STEPS,
            "noise_std": tuple((std,) * SHAPE[1] for std in program.noise_std),
        }
    )
    plain = solver.run(table_of(program), predict, initial_noise(), step_noise)
    corrected = solver.run(table_of(program, neutral), predict, initial_noise(), step_noise)
    assert plain.tobytes() == corrected.tobytes()


def test_correction_divides_after_it_subtracts() -> None:
    correction = random_correction(5)
    table = table_of(random_program(5), correction)
    output = step_noise(0)
    bias = np.array(correction.bias[2], dtype=np.float32).reshape(1, -1, 1, 1)
    expected = np.float32(correction.gain[2]) * (output - bias)
    assert solver.correct(table, 2, output, initial_noise()).tobytes() == expected.tobytes()


def test_weighted_input_is_added_after_the_gain() -> None:
    correction = random_correction(5, weighted=True)
    weights = correction.input_weight
    assert weights is not None
    table = table_of(random_program(5), correction)
    output, fed = step_noise(0), initial_noise()
    bias = np.array(correction.bias[3], dtype=np.float32).reshape(1, -1, 1, 1)
    expected = np.float32(correction.gain[3]) * (output - bias) + np.float32(weights[3]) * fed
    assert solver.correct(table, 3, output, fed).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("corrected", "noisy"), [(False, [0, 1, 2, 3]), (True, [0, 2, 3, 4])])
def test_noise_is_asked_for_at_steps_that_add_some_only(corrected: bool, noisy: list[int]) -> None:
    asked: list[int] = []

    def noise(step: int) -> np.ndarray:
        asked.append(step)
        return step_noise(step)

    correction = random_correction(6) if corrected else None
    solver.run(table_of(random_program(6), correction), predict, initial_noise(), noise)
    assert asked == noisy


def test_network_sees_the_scaled_float32_sample() -> None:
    table = table_of(random_program(7))
    seen: list[np.ndarray] = []

    def spy(sample: np.ndarray, step: int) -> np.ndarray:
        seen.append(sample)
        return predict(sample, step)

    initial = initial_noise()
    solver.run(table, spy, initial, step_noise)
    assert seen[0].tobytes() == (table.input_scale[0] * (np.float32(1.7) * initial)).tobytes()
    assert all(sample.dtype == np.float32 for sample in seen)


def test_float64_and_integer_input_is_brought_to_float32() -> None:
    table = table_of(random_program(8))
    found = solver.run(
        table,
        lambda sample, step: predict(sample, step).astype(np.float64),
        initial_noise().astype(np.float64),
        lambda step: step_noise(step).astype(np.float64),
    )
    expected = solver.run(table, predict, initial_noise(), step_noise)
    assert found.dtype == np.float32
    assert found.tobytes() == expected.tobytes()


LOG_MIN, LOG_MAX = (-9.0, -8.0, -7.0, -6.0, 0.0), (-2.0, -2.5, -3.0, -3.5, 0.0)


def learning_program(*, bounds: bool = True) -> SamplerProgram:
    """One of another step's noise, which the network scales."""
    learned = LearnedVariance(log_min=LOG_MIN, log_max=LOG_MAX) if bounds else LearnedVariance()
    changes = {"learned_variance": learned, "noise_std": (1.0,) * (N_STEPS - 1) + (0.0,)}
    return random_program(9, 1, 1).model_copy(update=changes)


def absorbing(variance: float, *, share: float = 1.0) -> CorrectedSchedule:
    table = ((variance,) * SHAPE[1],) * N_STEPS
    absorbed = AbsorbedVariance(variance=table, largest_share=share)
    neutral = {
        "gain": (1.0,) * N_STEPS,
        "bias": ((0.0,) * SHAPE[1],) * N_STEPS,
        "noise_std": ((1.0,) * SHAPE[1],) * (N_STEPS - 1) + ((0.0,) * SHAPE[1],),
    }
    return random_correction(9).model_copy(update={**neutral, "absorbed": absorbed})


def predict_both(sample: np.ndarray, step: int) -> np.ndarray:
    return np.concatenate([predict(sample, step), np.sin(7 * sample)], axis=1)


def drawn_std(
    program: SamplerProgram, v: np.ndarray, correction: CorrectedSchedule | None = None
) -> np.ndarray:
    """Of the noise at step 1, in float64: the sample where all but the noise is 0."""
    x, one = np.zeros_like(v), np.ones_like(v)
    return solver.advance(table_of(program, correction), 1, (x,), (x,), one, v).astype(np.float64)


def test_a_learned_variance_lies_between_its_bounds_in_logarithms() -> None:
    v = np.linspace(-1.0, 1.0, num=int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)
    share = (v.astype(np.float64) + 1) / 2
    expected = np.exp(0.5 * (share * LOG_MAX[1] + (1 - share) * LOG_MIN[1]))
    # float32
    np.testing.assert_allclose(drawn_std(learning_program(), v), expected, rtol=1e-6)


def test_a_variance_without_bounds_is_the_output_and_never_negative() -> None:
    v = np.linspace(-1.0, 1.0, num=int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)
    found = drawn_std(learning_program(bounds=False), v)
    np.testing.assert_allclose(found, np.sqrt(np.maximum(v, 1e-20)), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(absorbed=st.floats(0.0, 1.0), share=st.floats(0.0, 1.0), bounds=st.booleans())
def test_p6_what_is_absorbed_leaves_a_learned_variance_elementwise(
    absorbed: float, share: float, bounds: bool
) -> None:
    """P6."""
    v = np.linspace(-1.0, 1.0, num=int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)
    program = learning_program(bounds=bounds)
    plain = np.maximum(drawn_std(program, v) ** 2, 1e-20)
    expected = np.maximum(np.maximum(plain - absorbed, (1 - share) * plain), 1e-20)
    found = drawn_std(program, v, absorbing(absorbed, share=share)) ** 2
    # float32: a difference of nearly equal variances keeps 1e-7 of them.
    assert np.all(np.abs(found - expected) <= 1e-6 * plain + 1e-25)
    assert np.all(found > 0)


def test_p2_nothing_absorbed_changes_no_bit_of_a_learned_variance() -> None:
    """P2."""
    program = learning_program()
    plain = solver.run(table_of(program), predict_both, initial_noise(), step_noise)
    again = table_of(program, absorbing(0.0))
    corrected = solver.run(again, predict_both, initial_noise(), step_noise)
    assert plain.tobytes() == corrected.tobytes()


def test_only_the_prediction_of_a_learned_variance_is_corrected() -> None:
    program = learning_program()
    bias = {"bias": ((0.5,) * SHAPE[1],) * N_STEPS}

    def shifted(sample: np.ndarray, step: int) -> np.ndarray:
        f = predict_both(sample, step)
        f[:, : SHAPE[1]] += np.float32(0.5)
        return f

    plain = solver.run(table_of(program), predict_both, initial_noise(), step_noise)
    table = table_of(program, absorbing(0.0).model_copy(update=bias))
    found = solver.run(table, shifted, initial_noise(), step_noise)
    np.testing.assert_allclose(found, plain, rtol=0.0, atol=1e-5)


def test_a_learned_variance_that_is_missing_is_refused() -> None:
    table, x = table_of(learning_program()), initial_noise()
    with pytest.raises(ValueError, match=r"output is \(2, 3, 4, 5\).*twice its channels"):
        solver.run(table, predict, x, step_noise)
    with pytest.raises(ValueError, match="step 1 takes its variance from the network"):
        solver.advance(table, 1, (x,), (x,), x)


@pytest.mark.parametrize("step", [-1, N_STEPS, 10**9])
def test_step_out_of_range_is_refused(step: int) -> None:
    """P5: what runs on a device never corrects a step that was not measured."""
    table = table_of(random_program(0))
    x = initial_noise()
    message = rf"step {step} is outside 0\.\.4"
    with pytest.raises(IndexError, match=message):
        solver.correct(table, step, x, x)
    with pytest.raises(IndexError, match=message):
        solver.advance(table, step, (x,), (x,), x)
    with pytest.raises(IndexError, match=message):
        table.adds_noise(step)


def test_step_that_is_no_whole_number_is_refused() -> None:
    x = initial_noise()
    with pytest.raises(TypeError):
        solver.correct(table_of(random_program(0)), 1.0, x, x)  # type: ignore[arg-type]


def test_missing_history_is_refused() -> None:
    table = table_of(random_program(0))
    x = initial_noise()
    with pytest.raises(ValueError, match="samples must reach 1 steps back, but only 1 given"):
        solver.advance(table, 3, (x,), (x, x, x), x)
    with pytest.raises(ValueError, match="outputs must reach 2 steps back, but only 2 given"):
        solver.advance(table, 3, (x, x), (x, x), x)


def test_missing_noise_is_refused() -> None:
    x = initial_noise()
    with pytest.raises(ValueError, match="step 3 adds noise"):
        solver.advance(table_of(random_program(0)), 3, (x, x), (x, x, x), None)


def test_correction_for_other_channels_is_refused() -> None:
    table = table_of(random_program(0), random_correction(0, n_channels=1))
    x = initial_noise()
    with pytest.raises(ValueError, match="bias has 1 channels, the sample 3"):
        solver.correct(table, 0, x, x)
    with pytest.raises(ValueError, match="noise_std has 1 channels, the sample 3"):
        solver.advance(table, 0, (x,), (x,), x)


def test_output_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step 0: output is \(2, 1, 4, 5\)"):
        solver.run(
            table_of(random_program(0)), lambda x, step: x[:, :1], initial_noise(), step_noise
        )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("timesteps", [], "timesteps must not be empty"),
        ("initial_sigma", float("inf"), "initial_sigma must be finite"),
        ("input_scale", [1.0], "input_scale must be a table of 5 numbers"),
        ("sample_weights", [[]] * 5, "sample_weights must be a table of 5 x n"),
        ("output_weights", [1.0] * 5, "output_weights must be a table of 5 x n"),
        ("noise_std", [float("nan")] * 5, "noise_std must be finite"),
        ("sample_weights", [[1e300]] * 5, "sample_weights must be finite in float32"),
    ],
)
def test_program_that_is_no_table_is_refused(field: str, value: Any, message: str) -> None:
    program = {**random_program(0).model_dump(mode="json"), field: value}
    with pytest.raises(ValueError, match=message):
        solver.Table.from_json(program)


def test_correction_for_other_steps_is_refused() -> None:
    """P5."""
    correction = {**random_correction(0).model_dump(mode="json"), "gain": [1.0]}
    with pytest.raises(ValueError, match="gain must be a table of 5 numbers"):
        solver.Table.from_json(random_program(0).model_dump(mode="json"), correction)


def test_table_cannot_be_changed() -> None:
    table = table_of(random_program(0))
    with pytest.raises(FrozenInstanceError):
        table.initial_sigma = np.float32(2.0)  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        table.sample_weights[0, 0] = 1.0


@pytest.mark.parametrize("module", [solver, philox], ids=["solver", "philox"])
def test_runtime_module_imports_numpy_and_the_standard_library_only(module: Any) -> None:
    allowed = {"__future__", "collections", "dataclasses", "numpy", "operator", "typing"}
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name
        for node in imports
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert {name.split(".")[0] for name in names} <= allowed


def test_run_stays_what_it_is() -> None:
    table = table_of(random_program(0, clip=True), random_correction(0))

    def clamp(sample: np.ndarray, step: int) -> np.ndarray:
        return np.clip(sample, np.float32(-0.8), np.float32(0.8))

    last = solver.run(table, clamp, initial_noise(), step_noise)
    # Exact but for the last bit of the logarithms and cosines in the noise.
    np.testing.assert_allclose(last[1, 2, 3], GOLDEN, rtol=0.0, atol=1e-6)
