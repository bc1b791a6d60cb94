"""Damage of one layer is what quantizing it alone does, computed directly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeqdm.calibrate.trajectories import Trajectories, collect_trajectories
from edgeqdm.errors import InputError, StorageError
from edgeqdm.ir.codec import digest
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.ir.sensitivity import SensitivityReport, StepRange
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.load import load
from edgeqdm.numerics import philox, solver
from edgeqdm.quantize import quantizer
from edgeqdm.quantize.plans import float_plan
from edgeqdm.quantize.quantizer import QuantizedDenoiser
from edgeqdm.search.sensitivity import measure_sensitivity, step_ranges
from edgeqdm.stages import Calibration, calibrate
from edgeqdm.testing.tiny import write_tiny_unet

STEPS, SEED = 4, 11
W4A8, W8 = Precision("w4a8"), Precision("w8")
WHOLE = (StepRange(start=0, stop=STEPS),)
HALVES = (StepRange(start=0, stop=2), StepRange(start=2, stop=STEPS))
Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    """With guidance and step noise, so that both are drawn again."""
    folder = write_tiny_unet(tmp_path_factory.mktemp("model"))
    return load(folder, steps=STEPS, guidance=2.0, eta=1.0)


@pytest.fixture(scope="module")
def calibration(denoiser: Denoiser) -> Calibration:
    return calibrate(denoiser, samples=2, seed=3)


@pytest.fixture(scope="module")
def trajectories(denoiser: Denoiser) -> Trajectories:
    return collect_trajectories(denoiser, 2, seed=SEED)


@pytest.fixture(scope="module")
def asked(denoiser: Denoiser) -> list[tuple[str, Precision]]:
    """A convolution and a linear layer of the body, one of them at two precisions."""
    body = {x.kind: x.name for x in denoiser.info.layers if x.role == "body"}
    convolution, linear = body.values()
    return [(convolution, W8A8), (convolution, W4A8), (linear, W8)]


Measure = Callable[..., SensitivityReport]


@pytest.fixture(scope="module")
def measure(
    denoiser: Denoiser,
    calibration: Calibration,
    trajectories: Trajectories,
    asked: list[tuple[str, Precision]],
) -> Measure:
    def found(**changes: Any) -> SensitivityReport:
        options: dict[str, Any] = {"asked": asked, "ranges": HALVES, "seed": SEED} | changes
        observations = options.pop("observations", calibration.observations)
        return measure_sensitivity(
            denoiser, observations, trajectories, options.pop("asked"), **options
        )

    return found


@pytest.fixture(scope="module")
def report(measure: Measure) -> SensitivityReport:
    return measure()


def alone(denoiser: Denoiser, layer: str, precision: Precision) -> DeploymentPlan:
    plan = float_plan(denoiser.info, "none", STEPS)
    (phase,) = plan.phases
    layers = tuple(
        a.model_copy(update={"precision": precision}) if a.layer == layer else a
        for a in phase.layers
    )
    return plan.model_copy(update={"phases": (phase.model_copy(update={"layers": layers}),)})


@pytest.fixture(scope="module")
def models(
    denoiser: Denoiser, calibration: Calibration, asked: list[tuple[str, Precision]]
) -> list[QuantizedDenoiser]:
    return [
        quantizer.quantize(denoiser, alone(denoiser, *each), calibration.observations)
        for each in asked
    ]


def noise_ratio(signal: Array, found: Array) -> float:
    error = np.square(found.astype(np.float64) - signal.astype(np.float64)).sum()
    return float(error / np.square(signal.astype(np.float64)).sum())


def free_run(
    denoiser: Denoiser,
    predict: Callable[[torch.Tensor, int, torch.Tensor | None], torch.Tensor],
    conditioning: torch.Tensor | None,
) -> Array:
    """Final samples from the noise of `SEED`."""
    shape, images = denoiser.info.sample_shape, range(2)
    return solver.run(
        solver.Table.from_json(denoiser.program.model_dump(mode="json")),
        lambda x, step: predict(torch.from_numpy(x), step, conditioning).numpy(),
        philox.batch_normal(SEED, philox.INITIAL_STREAM, images, shape),
        lambda step: philox.batch_normal(SEED, philox.step_stream(step), images, shape),
    )


def test_forced_damage_is_the_error_of_the_layer_alone_on_the_float_samples(
    report: SensitivityReport, models: list[QuantizedDenoiser], trajectories: Trajectories
) -> None:
    for entry, model in zip(report.entries, models, strict=True):
        for step in range(STEPS):
            found = model.predict(trajectories.inputs[step], step, trajectories.conditioning)
            expected = noise_ratio(trajectories.outputs[step].numpy(), found.numpy())
            assert entry.forced[step] == expected


def test_damage_over_all_steps_is_that_of_a_free_run(
    measure: Measure,
    models: list[QuantizedDenoiser],
    denoiser: Denoiser,
    trajectories: Trajectories,
) -> None:
    finals = free_run(denoiser, denoiser.predict, trajectories.conditioning)
    for entry, model in zip(measure(ranges=WHOLE).entries, models, strict=True):
        found = free_run(denoiser, model.predict, trajectories.conditioning)
        assert entry.propagated == (noise_ratio(finals, found),)


def test_damage_of_a_range_is_that_of_a_run_on_integers_in_it_alone(
    report: SensitivityReport,
    models: list[QuantizedDenoiser],
    denoiser: Denoiser,
    trajectories: Trajectories,
) -> None:
    finals = free_run(denoiser, denoiser.predict, trajectories.conditioning)
    for entry, model in zip(report.entries, models, strict=True):
        for within, damage in zip(HALVES, entry.propagated, strict=True):

            def predict(
                x: torch.Tensor,
                step: int,
                conditioning: torch.Tensor | None,
                within: StepRange = within,
                model: QuantizedDenoiser = model,
            ) -> torch.Tensor:
                chosen = model if within.start <= step < within.stop else denoiser
                return chosen.predict(x, step, conditioning)

            found = free_run(denoiser, predict, trajectories.conditioning)
            assert damage == noise_ratio(finals, found)


def test_every_range_does_damage_also_the_last_step_alone(measure: Measure) -> None:
    last = StepRange(start=STEPS - 1, stop=STEPS)
    found = measure(ranges=(StepRange(start=0, stop=STEPS - 1), last))
    assert all(damage > 0 for entry in found.entries for damage in entry.propagated)


def test_fewer_bits_do_more_damage(report: SensitivityReport) -> None:
    wide, narrow, _ = report.entries
    assert (wide.layer, narrow.precision) == (narrow.layer, W4A8)
    assert min(narrow.forced) > max(wide.forced)


def test_a_layer_left_in_float_does_none(
    measure: Measure, asked: list[tuple[str, Precision]]
) -> None:
    (entry,) = measure(asked=[(asked[0][0], FP32)]).entries
    # The forced output is the float network's own; so are the samples.
    assert entry.forced == (0.0,) * STEPS
    assert entry.propagated == (0.0,) * len(HALVES)


def test_a_report_says_what_it_was_measured_on(
    report: SensitivityReport, denoiser: Denoiser, asked: list[tuple[str, Precision]]
) -> None:
    assert [(e.layer, e.precision) for e in report.entries] == asked
    assert report.model == denoiser.info.fingerprint
    assert report.sampler == digest(denoiser.program)
    assert (report.n_steps, report.images, report.seed) == (STEPS, 2, SEED)
    assert report.ranges == HALVES


def test_progress_is_told_of_every_layer(
    measure: Measure, asked: list[tuple[str, Precision]]
) -> None:
    told: list[tuple[int, int]] = []
    measure(asked=asked[:2], progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_nothing_to_measure_is_refused(measure: Measure) -> None:
    with pytest.raises(InputError) as caught:
        measure(asked=[])
    assert caught.value.code == "EQ-3601"


# Kept work.


def never(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("computed again")


@pytest.fixture(scope="module")
def work(measure: Measure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "work"
    measure(work=folder)
    return folder


def test_finished_layers_are_taken_from_the_folder(
    measure: Measure, report: SensitivityReport, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "quantize", never)
    assert measure(work=work) == report


def test_an_interrupted_measurement_goes_on(
    measure: Measure,
    report: SensitivityReport,
    asked: list[tuple[str, Precision]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure(asked=asked[:2], work=tmp_path)
    quantized: list[str] = []
    real = quantizer.quantize

    def counted(denoiser: Denoiser, plan: DeploymentPlan, *rest: Any) -> QuantizedDenoiser:
        quantized.extend(a.layer for a in plan.phases[0].layers if a.precision != FP32)
        return real(denoiser, plan, *rest)

    monkeypatch.setattr(quantizer, "quantize", counted)
    assert measure(work=tmp_path) == report
    assert quantized == [asked[2][0]]


def test_other_ranges_or_another_seed_are_not_taken_from_the_folder(
    measure: Measure, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "quantize", never)
    for change in ({"ranges": WHOLE}, {"seed": SEED + 1}):
        with pytest.raises(AssertionError, match="computed again"):
            measure(work=work, **change)


def test_what_was_measured_with_another_calibration_is_not_taken_from_the_folder(
    measure: Measure, denoiser: Denoiser, report: SensitivityReport, work: Path
) -> None:
    other = calibrate(denoiser, samples=4, seed=7).observations
    expected = measure(observations=other)
    assert expected != report
    assert measure(observations=other, work=work) == expected
    assert measure(work=work) == report


def test_a_layer_is_kept_when_only_others_were_observed_anew(
    measure: Measure,
    calibration: Calibration,
    asked: list[tuple[str, Precision]],
    report: SensitivityReport,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {layer for layer, _ in asked}
    alone = {name: seen for name, seen in calibration.observations.items() if name in names}
    assert len(alone) < len(calibration.observations)
    monkeypatch.setattr(quantizer, "quantize", never)
    assert measure(observations=alone, work=work) == report


def test_a_damaged_file_is_refused_by_name(measure: Measure, work: Path) -> None:
    file = sorted(work.glob("sensitivity-*.st"))[0]
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        with pytest.raises(StorageError) as caught:
            measure(work=work)
    finally:
        file.write_bytes(data)
    assert (caught.value.code, caught.value.path) == ("EQ-6201", str(file))


# Ranges of steps.


@given(st.integers(1, 200), st.integers(1, 20))
def test_ranges_cover_all_steps_once_and_are_even(n_steps: int, n_ranges: int) -> None:
    found = step_ranges(n_steps, n_ranges)
    assert len(found) == min(n_steps, n_ranges)
    assert (found[0].start, found[-1].stop) == (0, n_steps)
    assert all(a.stop == b.start for a, b in itertools.pairwise(found))
    lengths = {r.stop - r.start for r in found}
    assert max(lengths) - min(lengths) <= 1


def test_ten_steps_in_three_ranges() -> None:
    assert [(r.start, r.stop) for r in step_ranges(10, 3)] == [(0, 3), (3, 7), (7, 10)]
