"""plan, quantize, finetune, retabulate and emit --quantized, as a user types them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup
from typer.testing import CliRunner, Result

from edgeqdm import cli, pipeline
from edgeqdm.cli_output import quantization_table, quantization_value
from edgeqdm.ir.codec import dump_record, read_record
from edgeqdm.ir.package import ScheduleFile
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import ActivationPolicy, Precision
from edgeqdm.ir.schedule import CorrectedSchedule
from edgeqdm.models.load import load
from edgeqdm.pipeline import QuantizedModel
from edgeqdm.quantize.finetune import Finetuned
from edgeqdm.quantize.store import load_quantized
from edgeqdm.testing.tiny import write_tiny_dit, write_tiny_unet

README = Path(__file__).parents[1] / "README.md"
VERBS = ("plan", "quantize", "finetune", "retabulate", "emit")
SAMPLER = ("--scheduler", "ddim", "--steps", "4")
FEW = ("--samples", "4")
TEMPORAL = "transformer_blocks.0.attn1.to_q"
"""The one layer with a table of scales: a network of the timestep is fitted for it alone."""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def value_of(*arguments: object) -> dict[str, Any]:
    """The JSON object a verb prints; nothing else may be printed."""
    result = call(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refusal(*arguments: object) -> tuple[int, str]:
    """Exit code and the one line of an error."""
    result = call(*arguments, "--quiet")
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return result.exit_code, line


class Folder:
    """A tiny DiT and what the verbs made of it, each file by the verb that wrote it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = write_tiny_dit(path / "model")
        self.plan, self.file = path / "plan.json", path / "quantized.safetensors"
        self.values: dict[str, dict[str, Any]] = {}
        self.values["plan"] = value_of(
            *("plan", self.model, "-o", self.plan, *SAMPLER, "--precision", "w4g32a8dyn")
        )
        self.by_rule = read_record(self.plan, DeploymentPlan)
        self.edit(lambda layer: layer["layer"] == TEMPORAL, {"precision": "w8a8"})
        self.values["quantize"] = value_of(
            *("quantize", self.model, "-o", self.file, "--plan", self.plan, "--mlp"),
            *(*SAMPLER, *FEW),
        )

    def edit(
        self, chosen: Callable[[dict[str, Any]], bool], fields: dict[str, Any], to: str = ""
    ) -> Path:
        """Edit a plan as its user does, in JSON."""
        plan = json.loads(self.plan.read_text())
        for layer in filter(chosen, plan["phases"][0]["layers"]):
            layer.update(fields)
        file = self.path / to if to else self.plan
        file.write_text(json.dumps(plan))
        return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("folder"))


def test_a_plan_by_rule_has_the_precision_that_was_asked(folder: Folder) -> None:
    layers = folder.by_rule.phases[0].layers
    body = [a for a in layers if a.precision == "w4g32a8dyn"]
    assert len(body) == 12
    assert {a.precision for a in layers} == {"w4g32a8dyn", "fp32", "table"}
    assert folder.values["plan"] == {
        "plan": str(folder.plan),
        "phases": ["0..3"],
        "integer_layers": 12,
        "unsupported": [],
    }


def test_the_edited_plan_is_what_is_stored(folder: Folder) -> None:
    denoiser = load(str(folder.model), scheduler="ddim", steps=4)
    held = load_quantized(folder.file, denoiser)
    assert held.quantized.plan == read_record(folder.plan, DeploymentPlan)
    assert {a.precision for a in held.quantized.plan.phases[0].layers} >= {"w8a8", "w4g32a8dyn"}
    assert held.generator is not None
    assert held.generator.names == (f"input/{TEMPORAL}/w8a8/temporal",)
    value = folder.values["quantize"]
    assert value["file"] == str(folder.file)
    assert value["integer_layers"] == 12
    assert value["phases"] == [[0, 4]]
    assert len(value["snr_db"]) == 4
    assert value["blocks"] == []
    assert 0 < value["stored_bytes"] < value["float_bytes"]


def test_a_quantized_file_becomes_a_package_that_verifies(folder: Folder, tmp_path: Path) -> None:
    package = tmp_path / "package"
    emitted = value_of("emit", folder.model, "-o", package, "--quantized", folder.file, *SAMPLER)
    assert emitted["package"] == str(package)
    assert emitted["manifest"]["integer_layers"] == 12
    checked = value_of("verify", package)
    assert (checked["integer_kernels"], checked["planned_layers"]) == (12, 12)
    assert json.loads((package / "schedule.json").read_text())["correction"] is not None
    assert read_record(package / "plan.json", DeploymentPlan) == read_record(
        folder.plan, DeploymentPlan
    )


def test_a_file_is_made_for_other_steps(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "more.safetensors"
    found = value_of(
        *("retabulate", folder.model, folder.file, "-o", out, "--scheduler", "ddim", "--steps", 7)
    )
    assert (found["file"], found["steps"]) == (str(out), 7)
    held = load_quantized(out, load(str(folder.model), scheduler="ddim", steps=7))
    assert held.quantized.plan.n_steps == 7
    assert held.correction is None
    assert found["stored_bytes"] > folder.values["quantize"]["stored_bytes"]


def test_steps_are_told_as_the_sampler_counts_them(folder: Folder, tmp_path: Path) -> None:
    """PNDM evaluates the network once more than it is asked to."""
    out = tmp_path / "pndm.safetensors"
    arguments = ("retabulate", folder.model, folder.file, "-o", out, "--scheduler", "pndm")
    found = value_of(*arguments, "--steps", 6)
    n_steps = load(str(folder.model), scheduler="pndm", steps=6).program.n_steps
    assert n_steps != 6
    assert found["steps"] == n_steps


def test_a_file_is_trained_further(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "tuned.safetensors"
    found = value_of(
        *("finetune", folder.model, folder.file, "-o", out, "--iterations", 2),
        *(*SAMPLER, *FEW, "--no-correct", "--work", tmp_path / "work"),
    )
    assert found["file"] == str(out)
    assert set(found) == set(folder.values["quantize"])
    assert (
        load_quantized(out, load(str(folder.model), scheduler="ddim", steps=4)).correction is None
    )
    assert found["training"]["iterations"] == 2
    assert any((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (0.001, "mean over the steps 20.0 -> 30.0 dB on held-out runs; 7 iterations, 1.5 CPU min"),
        (0.01, "no better on held-out runs, the given network is kept; 7 iterations, 1.5 CPU min"),
    ],
)
def test_training_tells_what_it_gained(folder: Folder, after: float, told: str) -> None:
    denoiser = load(str(folder.model), scheduler="ddim", steps=4)
    given = load_quantized(folder.file, denoiser).quantized
    training = Finetuned(given.parameters, None, 7, 90.0, 0.01, after, ())
    found = QuantizedModel(folder.file, given.plan, 1, 4, (20.0,) * 4, training=training)
    rows = dict(zip(*(column.cells for column in quantization_table(found).columns), strict=True))
    assert rows["training"] == told
    assert quantization_value(found)["training"] == {
        "improved": after < 0.01,
        "loss_before": 0.01,
        "loss_after": after,
        "iterations": 7,
        "seconds": 90.0,
    }


def test_results_for_people_name_file_size_and_quality(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "shown.safetensors"
    result = call(
        *("quantize", folder.model, "-o", out, "--precision", "w4a8", "--samples", 2),
        *("--reconstruct", "--iterations", 1, *SAMPLER, "--no-correct"),
    )
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["file", str(out)] in rows
    assert ["integer", "layers", "12"] in rows
    assert ["phases", "0..3"] in rows
    shown = result.stdout
    assert "of float32" in shown
    assert "dB at worst, step " in shown
    assert "of 2 blocks" in shown or "blocks, " in shown
    plan = call("plan", folder.model, "-o", tmp_path / "p.json", *SAMPLER)
    assert plan.stdout == f"{tmp_path / 'p.json'}: 12 integer layers, phases 0..3\n"
    stages = [line.partition(":")[0] for line in result.stderr.splitlines()]
    assert stages[:3] == ["load", "trajectories", "observe"]
    assert "reconstruct" in stages


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_split_skips_are_remembered_by_the_file_and_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads them splits the model again, without being told."""
    model, file = write_tiny_unet(tmp_path / "model"), tmp_path / "split.safetensors"
    plan = tmp_path / "plan.json"
    one_step = ("--scheduler", "ddim", "--steps", "1")
    value_of("plan", model, "-o", plan, "--precision", "w8", "--split-skips", *one_step)
    named = {a.layer for a in read_record(plan, DeploymentPlan).phases[0].layers}
    assert any(name.endswith(".skip") for name in named)
    value_of(
        *("quantize", model, "-o", file, "--plan", plan, "--split-skips", "--samples", 1),
        *(*one_step, "--no-correct"),
    )
    package = tmp_path / "package"
    value_of(
        "emit", model, "-o", package, "--plan", plan, "--split-skips", "--samples", 1, *one_step
    )
    with monkeypatch.context() as patched:
        # What follows once the model has been found to be the package's own.
        patched.setattr(pipeline, "float_variant", interrupted)
        again = call("bench", package, "--model", model, "--scheduler", "ddim", "--quiet")
    assert again.exit_code == 130
    more = ("--scheduler", "ddim", "--steps", "2")
    assert value_of("retabulate", model, file, "-o", tmp_path / "two.safetensors", *more)
    unsplit = ("quantize", model, "-o", tmp_path / "unsplit", "--plan", plan, "--samples", 1)
    code, line = refusal(*unsplit, *one_step)
    assert code == 3
    assert line.startswith("error[EQ-3202]")


def quantized_without_correction(folder: Folder, file: Path) -> None:
    options = ("--plan", folder.plan, "--no-correct", *SAMPLER, *FEW)
    value_of("quantize", folder.model, "-o", file, *options)


def schedule_of(package: Path) -> ScheduleFile:
    return read_record(package / "schedule.json", ScheduleFile)


def test_a_correction_that_a_file_lacks_is_measured(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the trajectories that were asked for, and equal to what `quantize` would have stored."""
    file, work = tmp_path / "bare.safetensors", tmp_path / "work"
    quantized_without_correction(folder, file)
    denoiser = load(str(folder.model), scheduler="ddim", steps=4)
    found: list[CorrectedSchedule | None] = []

    def keep(*_: Any, correction: CorrectedSchedule | None, **__: Any) -> None:
        found.append(correction)

    monkeypatch.setattr(pipeline, "emit_package", keep)
    samples = int(FEW[1])
    for options in ({}, {"seed": 1}, {"work": work}):
        pipeline.emit(denoiser, tmp_path / "out", quantized=file, samples=samples, **options)
    pipeline.emit(denoiser, tmp_path / "out", quantized=file, correction=False)
    calibration = pipeline.calibrate(denoiser, samples=samples)
    wanted = pipeline.correct(load_quantized(file, denoiser).quantized, calibration.trajectories)
    first, other, again, none = found
    assert first == again == wanted
    assert other is not None
    assert other.bias != wanted.bias
    assert none is None
    assert {path.name for path in tmp_path.iterdir()} == {file.name, work.name}
    assert {path.name.partition("-")[0] for path in work.iterdir()} == {
        "trajectories",
        "measured",
        "matched",
    }


def test_a_file_for_other_steps_is_corrected_for_them(folder: Folder, tmp_path: Path) -> None:
    file, package = tmp_path / "seven.safetensors", tmp_path / "package"
    seven = ("--scheduler", "ddim", "--steps", 7)
    value_of("retabulate", folder.model, folder.file, "-o", file, *seven)
    value_of("emit", folder.model, "-o", package, "--quantized", file, *seven, *FEW)
    correction = schedule_of(package).correction
    assert correction is not None
    assert len(correction.gain) == 7


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--samples", 4), "samples would do nothing beside a quantized model, which holds its"),
        (("--samples", 4, "--seed", 0), "samples and seed would do nothing beside a quantized"),
        (("--seed", 0, "--no-correct"), "seed would do nothing beside a quantized model, without"),
    ],
)
def test_a_calibration_that_nothing_needs_is_refused(
    folder: Folder, tmp_path: Path, options: tuple[object, ...], told: str
) -> None:
    code, line = read("emit", folder, folder.file, tmp_path / "out", *SAMPLER, *options)
    assert code == 3
    assert line.startswith(f"error[EQ-3706]: {told}")
    assert list(tmp_path.iterdir()) == []


def test_step_aware_plans_are_measured(folder: Folder, tmp_path: Path) -> None:
    """The tiny model's schedule has next to no signal at its noisy end."""
    plan = tmp_path / "plan.json"
    found = value_of(
        *("plan", folder.model, "-o", plan, "--precision", "w8a8", "--step-aware"),
        *(*SAMPLER, *FEW),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    phases = read_record(plan, DeploymentPlan).phases
    assert found["phases"] == [f"{p.start}..{p.stop - 1}" for p in phases]
    assert {a.precision for a in phases[0].layers} == {"w8a4", "fp32", "table"}


# What is refused.


def test_an_unknown_precision_is_refused_with_examples(folder: Folder, tmp_path: Path) -> None:
    for verb in ("plan", "quantize"):
        for option in ("--precision", "--embedding"):
            code, line = refusal(verb, folder.model, "-o", tmp_path / "x", option, "w5a8")
            assert code == 3
            assert line.startswith("error[EQ-3805]: 'w5a8' is no precision; examples: w8a8")
    assert list(tmp_path.iterdir()) == []


def quantized_with(folder: Folder, plan: Path) -> tuple[int, str]:
    out = folder.path / "refused.safetensors"
    found = refusal("quantize", folder.model, "-o", out, "--plan", plan, *SAMPLER, *FEW)
    assert not out.exists()
    assert not (folder.path / ".refused.safetensors.work").exists()
    return found


def test_a_plan_of_another_model_is_refused(folder: Folder, tmp_path: Path) -> None:
    plan = read_record(folder.plan, DeploymentPlan)
    other = tmp_path / "other.json"
    other.write_bytes(dump_record(plan.model_copy(update={"model": "f" * 64})))
    code, line = quantized_with(folder, other)
    assert code == 3
    assert line.startswith("error[EQ-3202]: the plan is for model ffffffffffff, this is ")
    assert line.endswith(" - make a plan for this model")


def test_a_plan_of_other_steps_is_refused(folder: Folder) -> None:
    code, line = refusal(
        *("quantize", folder.model, "-o", folder.path / "x", "--plan", folder.plan),
        *("--scheduler", "ddim", "--steps", 5),
    )
    assert (code, line[:15]) == (3, "error[EQ-3206]:")


@pytest.mark.parametrize("activation", ["temporal", "static"])
def test_two_sources_of_one_scale_are_refused(folder: Folder, activation: str) -> None:
    """A layer with run-time scales that is given a table as well."""
    wanted = {"precision": "w4g32a8dyn", "activation": activation}
    plan = folder.edit(lambda layer: layer["layer"] == TEMPORAL, wanted, "both.json")
    code, line = quantized_with(folder, plan)
    assert code == 3
    assert f"layer {TEMPORAL}: precision w4g32a8dyn and activation {activation} exclude" in line
    assert str(plan) in line


def test_an_unknown_layer_is_refused(folder: Folder) -> None:
    plan = folder.edit(
        lambda layer: layer["layer"] == TEMPORAL, {"layer": "no.such.layer"}, "unknown.json"
    )
    code, line = quantized_with(folder, plan)
    assert code == 3
    assert line.startswith("error[EQ-3270]: the model has no such layer (no.such.layer)")
    near = TEMPORAL.replace("to_q", "to_qq")
    plan = folder.edit(lambda a: a["layer"] == TEMPORAL, {"layer": near}, "near.json")
    _, line = quantized_with(folder, plan)
    assert line.endswith(f"({near}) - did you mean {TEMPORAL}?")


@pytest.mark.parametrize("precision", ["w4g32a8", "w8a8dyn", "w4g64"])
def test_groups_and_run_time_scales_of_a_convolution_are_refused(
    folder: Folder, precision: str
) -> None:
    plan = folder.edit(
        lambda layer: layer["layer"] == "pos_embed.proj", {"precision": precision}, "conv.json"
    )
    code, line = quantized_with(folder, plan)
    assert code == 4
    assert line.startswith(f"error[EQ-4202]: {precision} on a convolution")
    assert "(pos_embed.proj) - use w" in line


@pytest.mark.parametrize("text", ["", "{", "[]", '{"target": "onnxruntime"}', "\x00\xff"])
def test_a_plan_that_is_none_is_refused(folder: Folder, text: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(text)
    code, line = quantized_with(folder, plan)
    assert code == 3
    assert str(plan) in line


@pytest.mark.parametrize("verb", ["plan", "quantize", "finetune", "retabulate"])
def test_a_file_that_is_there_is_replaced_by_force_only(
    folder: Folder, tmp_path: Path, verb: str
) -> None:
    out = tmp_path / "mine"
    out.write_text("work of hours")
    read = (folder.file,) if verb in READERS else ()
    code, line = refusal(verb, folder.model, *read, "-o", out, *SAMPLER)
    assert code == 7
    assert line == f"error[EQ-7804]: a file is there already ({out}) - --force replaces it"
    assert out.read_text() == "work of hours"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("verb", ["plan", "retabulate"])
def test_force_replaces_a_file(folder: Folder, tmp_path: Path, verb: str) -> None:
    out = tmp_path / "mine"
    out.write_text("old")
    read = (folder.file,) if verb in READERS else ()
    value_of(verb, folder.model, *read, "-o", out, *SAMPLER, "--force")
    assert out.stat().st_size > len("old")


def test_layers_without_a_kernel_are_told_before_the_work(folder: Folder, tmp_path: Path) -> None:
    chosen = folder.edit(lambda a: a["layer"] == TEMPORAL, {"precision": "w4g32a8"}, "grouped.json")
    given = ("quantize", folder.model, "-o", tmp_path / "q", "--plan", chosen, *FEW, *SAMPLER)
    result = call(*given, "--no-correct")
    assert result.exit_code == 0
    told = f"{TEMPORAL}: linear has no w4g32a8 kernel, use w4g32a8dyn"
    assert result.stderr.splitlines()[:2] == [
        "load: 1 of 1",
        f"note: onnxruntime has no kernel, and emit will refuse: {told}",
    ]
    assert value_of(*given, "--no-correct", "--force")["unsupported"] == [told]
    assert folder.values["quantize"]["unsupported"] == []


def test_a_plan_tells_of_layers_without_a_kernel(folder: Folder, tmp_path: Path) -> None:
    given = ("plan", folder.model, "-o", tmp_path / "p.json", "--precision", "w4a4", *SAMPLER)
    told = value_of(*given)["unsupported"]
    assert len(told) == 12
    assert f"{TEMPORAL}: linear has no w4a4 kernel, use w4a8" in told
    shown = call(*given, "--force").stderr.splitlines()[-1]
    assert shown.startswith("note: onnxruntime has no kernel, and emit will refuse: ")
    assert shown.endswith("; 9 more")


def test_layers_that_the_plan_does_not_name_are_told(folder: Folder, tmp_path: Path) -> None:
    plan = json.loads(folder.plan.read_text())
    (phase,) = plan["phases"]
    phase["layers"] = [a for a in phase["layers"] if a["layer"] != TEMPORAL]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    given = ("quantize", folder.model, "-o", tmp_path / "q", "--plan", tmp_path / "plan.json")
    result = call(*given, *FEW, *SAMPLER, "--no-correct")
    assert result.exit_code == 0
    told = f"note: the plan names no precision and they stay in fp32: {TEMPORAL}"
    assert result.stderr.splitlines()[1] == told


def test_a_file_in_the_place_of_the_folder_is_told_before_the_work(
    folder: Folder, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    out = tmp_path / "taken" / "q.safetensors"
    result = call("quantize", folder.model, "-o", out, *SAMPLER)
    assert result.exit_code == 7
    assert str(out) in result.stderr
    assert "observe" not in result.stderr
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_plan_for_an_unknown_target_is_refused_before_the_work(
    folder: Folder, tmp_path: Path
) -> None:
    plan = json.loads(folder.plan.read_text()) | {"target": "toaster"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    out = tmp_path / "q.safetensors"
    given = ("--plan", tmp_path / "plan.json", *SAMPLER)
    code, line = refusal("quantize", folder.model, "-o", out, *given)
    assert (code, line[:15]) == (4, "error[EQ-4301]:")
    assert "toaster" in line


READERS = ("finetune", "retabulate", "emit")


def read(verb: str, folder: Folder, file: Path, out: Path, *options: object) -> tuple[int, str]:
    """The error of a verb that reads a quantized file."""
    given = ("--quantized", file) if verb == "emit" else (file,)
    found = refusal(verb, folder.model, *given, "-o", out, *(options or SAMPLER))
    assert not out.exists()
    return found


@pytest.mark.parametrize("verb", READERS)
def test_a_file_of_another_guidance_is_refused(folder: Folder, verb: str, tmp_path: Path) -> None:
    code, line = read(verb, folder, folder.file, tmp_path / "out", *SAMPLER, "--guidance", 3)
    assert code == 3
    assert line.startswith("error[EQ-3262]: made from something else: guidance 1 is not 3")
    assert str(folder.file) in line


@pytest.mark.parametrize("verb", READERS)
def test_a_missing_file_is_refused(folder: Folder, verb: str, tmp_path: Path) -> None:
    code, line = read(verb, folder, tmp_path / "gone.safetensors", tmp_path / "out")
    assert code == 3
    assert line.startswith(f"error[EQ-3260]: no such file ({tmp_path / 'gone.safetensors'})")


def test_an_error_is_one_object_for_a_program(folder: Folder, tmp_path: Path) -> None:
    arguments = ("finetune", folder.model, tmp_path / "gone", "-o", tmp_path / "out", *SAMPLER)
    result = call(*arguments, "--json")
    assert (result.exit_code, result.stdout) == (3, "")
    assert json.loads(result.stderr) == {
        "error": {
            "code": "EQ-3260",
            "message": "no such file",
            "path": str(tmp_path / "gone"),
            "hint": "name what `edgeqdm quantize` wrote",
            "exit_code": 3,
        }
    }


@pytest.mark.parametrize("verb", READERS)
def test_a_damaged_file_is_refused(folder: Folder, verb: str, tmp_path: Path) -> None:
    data = folder.file.read_bytes()
    for place, content in {
        "edited": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "cut": data[: len(data) // 2],
        "empty": b"",
    }.items():
        file = tmp_path / f"{place}.safetensors"
        file.write_bytes(content)
        code, line = read(verb, folder, file, tmp_path / "out")
        assert code == 6, place
        assert line.startswith("error[EQ-6260]: damaged: ")
        assert line.endswith(f"({file}) - name another file, or quantize again")


def test_a_file_of_another_sampler_is_not_emitted(folder: Folder, tmp_path: Path) -> None:
    other = ("--scheduler", "ddim", "--steps", "5")
    code, line = read("emit", folder, folder.file, tmp_path / "out", *other)
    assert code == 3
    assert "made from something else: sampler " in line


def test_scales_without_a_network_are_not_retabulated(folder: Folder, tmp_path: Path) -> None:
    denoiser = load(str(folder.model), scheduler="ddim", steps=4)
    plan = pipeline.rule_plan(denoiser, body=Precision("w8a8"))
    file = tmp_path / "bound.safetensors"
    method = pipeline.Method(ranges="minmax")
    pipeline.quantize_to_file(denoiser, file, plan=plan, method=method, samples=1, correction=False)
    code, line = read("retabulate", folder, file, tmp_path / "out", "--steps", 6)
    assert code == 3
    assert line.startswith("error[EQ-3266]: its temporal scales, of transformer_blocks.0.attn1.")
    assert line.endswith(" - quantize with --mlp, or again for these steps")


def test_ctrl_c_leaves_no_file_and_says_how_to_go_on(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("quantize", folder.model, "-o", tmp_path / "out.safetensors", *SAMPLER, *FEW)
    with monkeypatch.context() as patched:
        patched.setattr("edgeqdm.stages.measure", interrupted)
        result = call(*arguments, "--quiet")
    assert result.exit_code == 130
    assert result.stderr == "interrupted: run the same command again to go on\n"
    assert not (tmp_path / "out.safetensors").exists()
    assert call(*arguments, "--quiet").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize(
    ("option", "stage"), [("--step-aware", "measure"), ("--search-groups", "plan_groups")]
)
def test_an_interrupted_plan_goes_on_from_beside_its_file(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, stage: str
) -> None:
    precision = ("--precision", "w4g32a8", option)
    arguments = ("plan", folder.model, "-o", tmp_path / "plan.json", *precision, *SAMPLER, *FEW)
    with monkeypatch.context() as patched:
        patched.setattr(f"edgeqdm.stages.{stage}", interrupted)
        assert call(*arguments, "--quiet").exit_code == 130
    kept = {path.name for path in (tmp_path / ".plan.json.work").iterdir()}
    assert {name.partition("-")[0] for name in kept} >= {"trajectories", "observations"}
    assert [path.name for path in tmp_path.iterdir()] == [".plan.json.work"]


def test_a_plan_that_cannot_be_written_is_refused_first(folder: Folder, tmp_path: Path) -> None:
    code, line = refusal("plan", folder.model, "-o", tmp_path, "--step-aware", *SAMPLER)
    assert (code, line[:15]) == (7, "error[EQ-7103]:")
    assert list(tmp_path.iterdir()) == []


BY_RULE = "without --step-aware or --search-groups"


@pytest.mark.parametrize(
    ("verb", "options", "told"),
    [
        ("quantize", "--plan p --precision w4a8", "--precision would do nothing beside --plan"),
        ("quantize", "--plan p --embedding w8", "--embedding would do nothing beside --plan"),
        ("quantize", "--plan p --target onnxruntime", "--target would do nothing beside --plan"),
        ("quantize", "--iterations 3", "--iterations would do nothing without --reconstruct"),
        ("quantize", "--minutes 3", "--minutes would do nothing without --reconstruct"),
        ("plan", "--samples 3 --seed 0", f"--samples and --seed would do nothing {BY_RULE}"),
        ("plan", "--work w", f"--work would do nothing {BY_RULE}"),
        ("emit", "--quantized f --split-skips", "--split-skips would do nothing beside --quan"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    tmp_path: Path, verb: str, options: str, told: str
) -> None:
    """Before anything is read: neither model nor plan exists."""
    code, line = refusal(verb, tmp_path / "gone", "-o", tmp_path / "x", *options.split())
    assert code == 3
    assert line.startswith(f"error[EQ-3806]: {told}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["plan", "quantize"])
def test_an_unknown_target_is_refused_at_once(tmp_path: Path, verb: str) -> None:
    out = tmp_path / "x"
    code, line = refusal(verb, tmp_path / "gone", "-o", out, "--target", "abacus")
    assert (code, line[:15]) == (4, "error[EQ-4301]:")
    assert line.endswith(" - known: onnxruntime")


def test_defaults_hold_where_nothing_is_asked(folder: Folder, tmp_path: Path) -> None:
    """Of target, precision and embedding, which are told apart from what was asked."""
    plan = tmp_path / "plan.json"
    assert value_of("plan", folder.model, "-o", plan, *SAMPLER)
    wanted = pipeline.rule_plan(load(str(folder.model), scheduler="ddim", steps=4))
    assert read_record(plan, DeploymentPlan) == wanted
    file = tmp_path / "x.safetensors"
    value_of("quantize", folder.model, "-o", file, "--no-correct", *SAMPLER, "--samples", 1)
    held = load_quantized(file, load(str(folder.model), scheduler="ddim", steps=4))
    assert held.quantized.plan == wanted


def test_a_plan_of_constant_scales_has_no_other(folder: Folder, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    asked = ("--activation", "static", "--embedding", "w8a8")
    assert value_of("plan", folder.model, "-o", plan, *SAMPLER, *asked)
    (phase,) = read_record(plan, DeploymentPlan).phases
    policies = {a.policy for a in phase.layers if a.precision.integer}
    assert policies == {ActivationPolicy.STATIC}
    assert "embedding" in {x.role for x in load(str(folder.model)).info.layers}


@pytest.mark.parametrize(
    ("precision", "activation"), [("w8a8", "dynamic"), ("w8a8dyn", "static"), ("w8", "static")]
)
def test_scales_that_a_precision_cannot_have_are_refused(
    tmp_path: Path, precision: str, activation: str
) -> None:
    options = ("--precision", precision, "--activation", activation)
    code, line = refusal("plan", tmp_path / "gone", "-o", tmp_path / "p.json", *options)
    assert (code, line[:15]) == (3, "error[EQ-3830]:")
    assert precision in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "model"],
        ["quantize", "model"],
        ["quantize", "model", "-o", "x", "--iterations", "0"],
        ["quantize", "model", "-o", "x", "--minutes", "0"],
        ["finetune", "model", "-o", "x"],
        ["retabulate", "model", "-o", "x"],
        ["retabulate", "model", "file", "-o", "x", "--samples", "3"],
    ],
)
def test_a_usage_error_ends_with_2_and_one_line(arguments: list[str]) -> None:
    code, line = refusal(*arguments)
    assert code == 2
    assert line.startswith("error[EQ-2001]: ")


# What is written about it.


@cache
def group() -> Any:
    return typer.main.get_command(cli.app)


def documented_commands() -> list[list[str]]:
    """Words of every `edgeqdm` command of the README and of the verbs' own help."""
    texts = [README.read_text(encoding="utf-8")]
    texts += [call(verb, "--help").stdout for verb in group().commands]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    commands = [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?edgeqdm ", line)]
    return [shlex.split(command, comments=True)[1:] for command in commands]


def test_every_documented_command_parses() -> None:
    found = documented_commands()
    assert {words[0] for words in found} == set(group().commands)
    assert len(found) > 15
    for verb, *arguments in found:
        # Raises where an option does not exist or an argument is missing.
        group().commands[verb].make_context(verb, list(arguments))


def test_every_documented_option_exists() -> None:
    text = README.read_text(encoding="utf-8")
    known = {name for command in _commands(group()) for p in command.params for name in p.opts}
    written = {name for code in re.findall(r"`([^`\n]+)`", text) for name in _options(code)}
    assert {"--reconstruct", "--mlp", "--step-aware", "--minutes"} <= written <= known


def _commands(group: TyperGroup) -> Iterator[Any]:
    for command in group.commands.values():
        yield command
        if isinstance(command, TyperGroup):
            yield from _commands(command)


def _options(code: str) -> list[str]:
    # pip and other programs have options of their own.
    ours = code.startswith(("-", "edgeqdm", *group().commands))
    return re.findall(r"(?<!\S)--[a-z-]+", code) if ours else []


def test_every_documented_precision_exists() -> None:
    section = README.read_text(encoding="utf-8").partition("## Fewer bits")[2].partition("\n## ")[0]
    names = re.findall(r"`(w\d[^` ]*|fp\d+|table)`", section)
    assert len(names) >= 12
    for name in names:
        assert str(Precision(name)) == name


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_and_fits_a_line(verb: str) -> None:
    text = call(verb, "--help").stdout
    assert f"\n  edgeqdm {verb} " in text
    assert all(len(line) <= 100 for line in text.splitlines())
