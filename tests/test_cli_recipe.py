"""init and optimize, as a user types them."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from edgeqdm import cli
from edgeqdm.errors import NumericalError
from edgeqdm.ir.codec import dump_record, read_record
from edgeqdm.ir.package import Manifest
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.profile import Flag, LatencyProfile, sealed_profile
from edgeqdm.ir.search import ParetoReport
from edgeqdm.optimize import optimize
from edgeqdm.recipe import Recipe, read_recipe
from edgeqdm.testing.tiny import UNET_CONFIG, build_network, write_pipeline

SMALL_UNET = UNET_CONFIG | {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}
"""Without attention on its way down and up: exporting a graph takes a second or so."""
RECIPE = """\
model: {folder}/model
out: {folder}/out
sampler: {{scheduler: ddim, steps: 4}}
profile: {{seconds: 0.05, wholes: 3, accept_flags: [throttled]}}
search: {{trials: 4, precisions: [fp32, w8a8], images: 2, samples: 2}}
"""
STAGES = {
    "measure": "edgeqdm.tuning.run_kit",
    "search": "edgeqdm.searching._report",
    "emit": "edgeqdm.pipeline._emit",
    "verify": "edgeqdm.pipeline.verify_package",
}
"""What is interrupted in turn, each time in the last piece of work of a stage."""


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


def interrupted(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def untimed(task: object, study: object, report: ParetoReport, **options: object) -> ParetoReport:
    """The front is timed where the profile is of this host; tests of searching do that."""
    return report


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and time of change of every file."""
    return {
        path.relative_to(folder).as_posix(): (
            sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


class Run:
    """A recipe that was interrupted in every stage, each time started again by its own command."""

    def __init__(self, path: Path) -> None:
        self.recipe, self.out = path / "recipe.yaml", path / "out"
        self.package = self.out / "package"
        write_pipeline(path / "model", build_network(SMALL_UNET), SMALL_UNET)
        self.recipe.write_text(RECIPE.format(folder=path))
        self.stopped: dict[str, tuple[int, str]] = {}
        self.there: dict[str, set[str]] = {}
        for stage, name in STAGES.items():
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(name, interrupted)
                self.stopped[stage] = refusal("optimize", self.recipe)
            self.there[stage] = {each.name for each in self.out.iterdir()}
        self.value = value_of("optimize", self.recipe)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("edgeqdm.searching.measure_front", untimed)
        return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def _untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeqdm.searching.measure_front", untimed)


def again(run: Run, *options: object) -> dict[str, Any]:
    return value_of("optimize", run.recipe, *options)


def plan_of(run: Run) -> DeploymentPlan:
    return read_record(run.package / "plan.json", DeploymentPlan)


def changed(run: Run, folder: Path, text: str = "") -> Path:
    """A recipe in another folder, of the same profile, with lines that go before the run's."""
    file = folder / "recipe.yaml"
    file.write_text(f"extends: {run.recipe}\nout: {folder}/out\n{text}")
    (folder / "out").mkdir()
    shutil.copy(run.out / "profile.json", folder / "out")
    return file


def test_the_same_command_goes_on_after_an_interrupt_in_any_stage(run: Run) -> None:
    assert set(run.stopped.values()) == {(130, "interrupted: run the same command again to go on")}
    assert run.there == {
        "measure": {"kept-profile"},
        "search": {"profile.json", "search"},
        "emit": {"profile.json", "search"},
        "verify": {"profile.json", "search", "package"},
    }


def test_a_recipe_becomes_a_verified_package(run: Run) -> None:
    assert run.value["package"] == str(run.package)
    assert run.value["profile"] == str(run.out / "profile.json")
    report = read_record(run.out / "search" / "pareto.json", ParetoReport)
    assert run.value["pareto"] == report.model_dump(mode="json")
    assert report.complete == 4
    checked = value_of("verify", run.package)
    assert checked == {"package": str(run.package), **run.value["verification"]}
    assert run.value["manifest"]["n_steps"] == 4
    plan = plan_of(run)
    assert plan.prediction is not None
    assert plan.prediction.accepted_flags in ((), ("throttled",))


def test_a_second_run_changes_no_file_of_the_package(run: Run) -> None:
    before = digests(run.package)
    found = again(run)
    assert found["kept"]
    assert digests(run.package) == before
    assert found["pareto"] == run.value["pareto"]


def test_another_trial_replaces_the_package(run: Run) -> None:
    """The first trial leaves all layers in fp32, the second puts all it may on w8a8."""
    for trial in (1, 0):
        found = again(run, "--set", f"emit.trial={trial}")
        assert bool(found["manifest"]["integer_layers"]) == bool(trial)
        assert plan_of(run).n_integer_layers == found["manifest"]["integer_layers"]
        assert value_of("verify", run.package)["planned_layers"] == plan_of(run).n_integer_layers
    assert again(run, "--set", "emit.trial=0")["kept"]


def test_a_package_without_a_correction_is_another_one(run: Run) -> None:
    options = ("--set", "emit.trial=0", "--set", "emit.correct=false")
    assert not again(run, *options)["kept"]
    assert json.loads((run.package / "schedule.json").read_text())["correction"] is None
    assert again(run, *options)["kept"]


def test_force_makes_a_damaged_package_again(run: Run) -> None:
    again(run, "--set", "emit.trial=0")
    card = run.package / "MODEL_CARD.md"
    card.write_text(card.read_text() + "mine")
    code, line = refusal("optimize", run.recipe, "--set", "emit.trial=0")
    assert code == 8
    assert line.endswith(" - --force makes the package again")
    assert not again(run, "--set", "emit.trial=0", "--force")["kept"]


def test_a_trial_that_there_is_not_is_refused(run: Run) -> None:
    before = digests(run.package)
    code, line = refusal("optimize", run.recipe, "--set", "emit.trial=99")
    assert (code, line[:15]) == (3, "error[EQ-3632]:")
    assert digests(run.package) == before


def test_other_settings_of_the_search_are_refused(run: Run) -> None:
    code, line = refusal("optimize", run.recipe, "--set", "search.seed=1")
    assert (code, line[:15]) == (6, "error[EQ-6310]:")


def test_people_are_shown_the_front_and_the_package(run: Run) -> None:
    result = call("optimize", run.recipe)
    assert result.exit_code == 0
    first = result.stdout.splitlines()[0]
    assert first.split()[:3] == ["trial", "ms", "of"]
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"{run.package}: onnxruntime, ")
    assert " dB predicted, verified" in last
    stages = [line.rpartition(": ")[0] for line in result.stderr.splitlines()]
    assert {"load", "search: trials", "verify"} <= set(stages)
    assert stages.index("search: trials") < stages.index("verify")


def test_optimize_is_a_function_too(run: Run) -> None:
    again(run)
    told: list[str] = []
    found = optimize(read_recipe(run.recipe), progress=lambda stage, *_: told.append(stage))
    assert found.kept
    assert found.package == run.package
    assert found.plan == plan_of(run)
    assert found.report.complete == 4
    assert told[-1] == "verify"


def test_a_profile_of_another_target_is_refused_before_the_model_is_read(
    run: Run, tmp_path: Path
) -> None:
    file = changed(run, tmp_path, f"model: {tmp_path}/gone\n")
    edit_profile(tmp_path / "out" / "profile.json", {"target": "phone"})
    code, line = refusal("optimize", file)
    assert (code, line[:15]) == (3, "error[EQ-3521]:")
    assert "the profile is for target 'phone', not 'onnxruntime'" in line
    assert line.endswith(
        f" - remove {tmp_path}/out/profile.json to measure again, or name another `out`"
    )


def test_a_flagged_profile_is_refused_with_the_option_that_takes_it(
    run: Run, tmp_path: Path
) -> None:
    file = changed(run, tmp_path, "profile: {accept_flags: [emulator]}\n")
    edit_profile(tmp_path / "out" / "profile.json", {"flags": (Flag.LOW_BATTERY, Flag.EMULATOR)})
    code, line = refusal("optimize", file)
    assert (code, line[:15]) == (3, "error[EQ-3522]:")
    assert "or --set profile.accept_flags='[emulator, low_battery" in line


def test_a_profile_that_lacks_precisions_says_how_to_get_them(run: Run, tmp_path: Path) -> None:
    file = changed(run, tmp_path, "search: {precisions: [fp32, w8]}\n")
    code, line = refusal("optimize", file)
    assert (code, line[:15]) == (3, "error[EQ-3510]:")
    assert line.endswith(f" - remove {tmp_path}/out/profile.json to measure again")
    named = ("--set", f"profile.source={tmp_path}/out/profile.json")
    assert "remove" not in refusal("optimize", file, *named)[1]


def test_a_profile_of_other_threads_is_told(run: Run, tmp_path: Path) -> None:
    file = changed(run, tmp_path, "profile: {threads: 2}\nsearch: {latency: 1.0e-9}\n")
    told: list[str] = []
    with pytest.raises(NumericalError, match="no plan reaches"):
        optimize(read_recipe(file), notice=told.append)
    assert any("is of 1 threads, not 2; remove" in line for line in told)


def test_a_profile_of_other_whole_networks_is_told(run: Run, tmp_path: Path) -> None:
    file = changed(run, tmp_path, "profile: {wholes: 16}\nsearch: {latency: 1.0e-9}\n")
    told: list[str] = []
    with pytest.raises(NumericalError, match="no plan reaches"):
        optimize(read_recipe(file), notice=told.append)
    assert any("is of 3 mixed networks as a whole, not 16; remove" in line for line in told)


def test_a_profile_as_it_was_asked_for_needs_no_word(run: Run) -> None:
    again(run)
    told: list[str] = []
    optimize(read_recipe(run.recipe), notice=told.append)
    assert not [line for line in told if "remove" in line]


@pytest.mark.parametrize(
    ("part", "fields", "differing"),
    [
        ("device", {"name": "ARM Cortex-A76"}, "device ARM Cortex-A76, here "),
        ("device", {"machine": "armv7l"}, "machine armv7l, here "),
        ("runtime", {"version": "1.2.3"}, "onnxruntime 1.2.3, here "),
    ],
)
def test_a_profile_of_another_host_is_refused_before_the_model_is_read(
    run: Run, tmp_path: Path, part: str, fields: dict[str, str], differing: str
) -> None:
    file = changed(run, tmp_path, f"model: {tmp_path}/gone\n")
    kept = tmp_path / "out" / "profile.json"
    old = getattr(read_record(kept, LatencyProfile), part)
    edit_profile(kept, {part: old.model_copy(update=fields)})
    code, line = refusal("optimize", file)
    assert (code, line[:15]) == (6, "error[EQ-6401]:")
    assert f"the profile is not of this host: {differing}" in line
    assert line.count(", here ") == 1
    assert f"({kept})" in line
    assert line.endswith(f" - remove it to measure again, or use it: --set profile.source={kept}")


def test_a_profile_of_another_host_is_taken_when_it_is_named(run: Run, tmp_path: Path) -> None:
    file = changed(run, tmp_path, "search: {latency: 1.0e-9}\n")
    kept = tmp_path / "out" / "profile.json"
    device = read_record(kept, LatencyProfile).device
    edit_profile(kept, {"device": device.model_copy(update={"name": "ARM Cortex-A76"})})
    code, line = refusal("optimize", file, "--set", f"profile.source={kept}")
    assert (code, line[:15]) == (5, "error[EQ-5621]:")


def test_a_latency_may_be_a_share_of_the_float_models(run: Run, tmp_path: Path) -> None:
    file = changed(run, tmp_path, "search: {latency: 0.0001x}\n")
    code, line = refusal("optimize", file)
    assert (code, line[:15]) == (5, "error[EQ-5621]:")


def test_what_is_no_package_is_never_touched(run: Run, tmp_path: Path) -> None:
    file = changed(run, tmp_path)
    mine = tmp_path / "out" / "package" / "plan.json"
    mine.parent.mkdir()
    shutil.copy(run.package / "plan.json", mine)
    before = digests(mine.parent)
    for options in ((), ("--force",)):
        code, line = refusal("optimize", file, *options)
        assert (code, line[:15]) == (7, "error[EQ-7106]:")
        assert digests(mine.parent) == before
    assert not (tmp_path / "out" / "search").exists()


def test_a_file_of_the_users_inside_the_package_is_never_deleted(run: Run) -> None:
    mine = run.package / "notes.txt"
    mine.write_text("mine")
    try:
        code, line = refusal("optimize", run.recipe, "--force")
        assert (code, line[:15]) == (7, "error[EQ-7108]:")
        assert mine.read_text() == "mine"
    finally:
        mine.unlink()


def test_a_missing_profile_or_model_or_target_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {tmp_path}/gone\nout: {tmp_path}/out\n")
    assert refusal("optimize", file)[0] == 3
    code, line = refusal("optimize", file, "--set", "profile.source=gone.json")
    assert (code, line[:15]) == (3, "error[EQ-3523]:")
    code, line = refusal("optimize", file, "--set", "target=abacus")
    assert (code, line[:15]) == (4, "error[EQ-4301]:")
    code, line = refusal("optimize", file, "--set", "emit.form=tiny")
    assert (code, line[:15]) == (4, "error[EQ-4303]:")
    assert list(tmp_path.iterdir()) == [file]


def test_a_form_that_no_searched_plan_fits_is_refused_before_the_search(
    run: Run, tmp_path: Path
) -> None:
    options = ("--set", "emit.form=npu", "--set", f"out={tmp_path / 'out'}")
    code, line = refusal("optimize", run.recipe, *options)
    assert (code, line[:15]) == (4, "error[EQ-4201]:")
    assert "edgeqdm plan --activation static" in line
    assert not (tmp_path / "out").exists()


def test_another_form_makes_the_package_again(run: Run) -> None:
    for form, kept in (("small", False), ("small", True), ("standard", False)):
        assert value_of("optimize", run.recipe, "--set", f"emit.form={form}")["kept"] is kept
        assert read_record(run.package / "manifest.json", Manifest).form == form


def test_a_wrong_recipe_is_told_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\nout: o\nsearch:\n  trials: 0\n")
    code, line = refusal("optimize", file)
    assert code == 3
    assert line == (
        "error[EQ-3906]: search.trials: Input should be greater than or equal to 1, found 0 "
        f"({file}:4) - Complete trials in all."
    )
    code, line = refusal("optimize", file, "--set", "search.trials=1", "--set", "search.tie=x")
    assert code == 3
    assert "(--set search.tie)" in line


def test_init_writes_what_optimize_reads(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    value = value_of("init", "reference:unet-fmnist", "-o", out)
    assert value == {"recipe": str(out), "out": "build/unet-fmnist"}
    wanted = Recipe(model="reference:unet-fmnist", out="build/unet-fmnist")
    assert read_recipe(out) == wanted
    shown = call("init", "m", "-o", tmp_path / "m.yaml", "--target", "onnxruntime").stdout
    assert shown == f"{tmp_path}/m.yaml: edgeqdm optimize {tmp_path}/m.yaml makes build/m\n"


def test_init_replaces_a_recipe_by_force_only(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    out.write_text("hours of thought")
    code, line = refusal("init", "m", "-o", out)
    assert (code, line[:15]) == (7, "error[EQ-7804]:")
    assert out.read_text() == "hours of thought"
    value_of("init", "m", "-o", out, "--force")
    assert read_recipe(out).model == "m"


@pytest.mark.parametrize(
    ("arguments", "code"), [(("m", "--target", "abacus"), 4), (("",), 3), (("a\nb",), 3)]
)
def test_init_writes_no_recipe_that_cannot_be_run(
    tmp_path: Path, arguments: tuple[str, ...], code: int
) -> None:
    assert refusal("init", *arguments, "-o", tmp_path / "recipe.yaml")[0] == code
    assert list(tmp_path.iterdir()) == []


def edit_profile(file: Path, fields: dict[str, object]) -> None:
    """Another profile, as sound as the first."""
    found = read_record(file, LatencyProfile)
    file.write_bytes(dump_record(sealed_profile(found.model_copy(update=fields))))
