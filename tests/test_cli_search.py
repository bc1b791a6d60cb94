"""sensitivity, search, pareto and emit --search, as a user types them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from edgeqdm import cli, searching, tuning
from edgeqdm.ir.codec import dump_record, read_record
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.policy import StepPolicy
from edgeqdm.ir.precision import FP32, TABLE, W8A8
from edgeqdm.ir.profile import (
    BoundaryCost,
    BoundaryKind,
    Device,
    Flag,
    LatencyEntry,
    LatencyProfile,
    PhaseCost,
    Protocol,
    Runtime,
    Timing,
    sealed_profile,
)
from edgeqdm.ir.search import ParetoReport, SearchRecord
from edgeqdm.ir.sensitivity import SensitivityReport
from edgeqdm.models.load import load
from edgeqdm.profile.adopt import PROFILE
from edgeqdm.search.evaluate import Evaluator
from edgeqdm.search.storage import DATABASE, LEDGER, LOCK
from edgeqdm.testing.tiny import DIT_CONFIG, build_network, write_pipeline

TRIALS = 8
SAMPLER = ("--scheduler", "ddim", "--steps", 4)
SETTINGS = ("--precision", "w8a8", "--samples", 2, "--images", 2)
ONE_BLOCK = DIT_CONFIG | {"num_layers": 1}
OVERHEAD_US, SHARED_US = 0.7003, 2.0
"""Such that the fastest plan takes 0.0703 ms, which is rounded down."""
PNG, PDF = b"\x89PNG\r\n", b"%PDF-"


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


def check(refused: tuple[int, str], exit_code: int, code: str, *texts: object) -> None:
    found, line = refused
    assert (found, line[:15]) == (exit_code, f"error[{code}]:"), line
    for text in texts:
        assert str(text) in line


def quick_folder() -> tempfile.TemporaryDirectory[str]:
    """In memory where it can be: SQLite waits for a disk several times per trial."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def beside_kept(folder: Path) -> dict[str, bytes]:
    """All but finished parts, of which a verb may leave more."""
    return {
        name: data
        for name, data in contents(folder).items()
        if not name.startswith(f"{searching.KEPT}/")
    }


def timing(us: float) -> Timing:
    return Timing(median_us=us, p10_us=us, p90_us=us, ci95_us=(us, us), n=9)


def profile_of(model: Path) -> LatencyProfile:
    """Of a device that nobody has: integers are faster in all operations but the first.

    So the same plans are found wherever the tests run, and nothing has to be timed.
    """
    denoiser = load(str(model), scheduler="ddim", steps=4)
    space = tuning.open_space(denoiser, precisions=(W8A8,))
    keys = list(dict.fromkeys(key for key, _ in space.entries()))
    shapes = dict.fromkeys(space.network.keys[n[0]].input_shape for n in space.network.siblings)
    entries = []
    for rank, key in enumerate(keys):
        plain = 10.0 + 3 * rank
        for precision, us in ((FP32, plain), (W8A8, plain * (0.4 if rank else 1.2))):
            entries.append(
                LatencyEntry(
                    key=key,
                    precision=precision,
                    provenance="measured",
                    timing=timing(OVERHEAD_US + us),
                )
            )
    made = LatencyProfile(
        edgeqdm_version="0",
        created=datetime.now(UTC).isoformat(),
        target="onnxruntime",
        device=Device(name="a phone", machine="aarch64", system="none"),
        runtime=Runtime(name="onnxruntime", version="0"),
        threads=1,
        power_mode="unknown",
        protocol=Protocol(
            clock="thread_cpu",
            rounds=1,
            min_runs=1,
            ci_target=0.5,
            max_seconds=1.0,
            reference_us=(1.0,),
        ),
        overhead=timing(OVERHEAD_US),
        entries=tuple(entries),
        boundaries=tuple(
            BoundaryCost(
                kind=BoundaryKind.QUANTIZE,
                shape=shape,
                provenance="measured",
                timing=timing(OVERHEAD_US + SHARED_US),
            )
            for shape in shapes
        ),
    )
    return sealed_profile(made)


class Run:
    """A finished search of a DiT of one block; a twin of it has other weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model, self.twin = (
            write_pipeline(folder / "model", build_network(ONE_BLOCK, seed=seed), ONE_BLOCK)
            for seed, folder in enumerate((path, path / "twin"))
        )
        self.profile = path / "phone.json"
        self.profile.write_bytes(dump_record(profile_of(self.model)))
        self.folder = path / "search"
        self.value = value_of(*self.search(self.folder))

    def search(
        self, out: Path, *more: object, model: Path | None = None, profile: Path | None = None
    ) -> tuple[object, ...]:
        """The command; of an option that is given twice, the last counts."""
        given = ("search", model or self.model, "-o", out, "--profile", profile or self.profile)
        return (*given, *SETTINGS, *SAMPLER, "--trials", TRIALS, *more)

    def emit(self, out: Path, *more: object, model: Path | None = None) -> tuple[object, ...]:
        given = ("emit", model or self.model, "-o", out, "--search", self.folder)
        return (*given, *SAMPLER, *more)

    @property
    def front(self) -> list[dict[str, Any]]:
        plans: list[dict[str, Any]] = self.value["plans"]
        return plans


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with quick_folder() as folder:
        yield Run(Path(folder))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield Path(folder)


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Path:
    """Of the finished search, to be damaged."""
    return Path(shutil.copytree(run.folder, tmp_path / "copy"))


@pytest.fixture
def started(run: Run, tmp_path: Path) -> Path:
    """A folder that no trial was judged in yet, though all before trials is done."""
    folder = tmp_path / "started"
    shutil.copytree(run.folder / searching.KEPT, folder / searching.KEPT)
    return folder


def states(folder: Path) -> list[str]:
    """Of the ledger's trials, in order."""
    lines = (folder / LEDGER).read_text().splitlines()
    return [json.loads(line.partition(" ")[2])["state"] for line in lines]


# A search and its front.


def test_a_search_ends_with_exactly_the_trials_that_were_asked_for(run: Run) -> None:
    assert run.value["complete"] == TRIALS
    assert states(run.folder).count("COMPLETE") == TRIALS
    assert run.value["failed"] == 0
    report = read_record(run.folder / searching.PARETO, ParetoReport)
    assert report.model_dump(mode="json") == run.value
    record = read_record(run.folder / searching.SEARCH, SearchRecord)
    assert (record.source, record.scheduler, record.steps) == (str(run.model), "ddim", 4)
    assert (record.trials, record.settings.precisions) == (TRIALS, (W8A8,))


def test_a_slower_plan_of_the_front_is_a_better_one(run: Run) -> None:
    assert len(run.front) > 1
    for name in ("latency_ms", "image_sqnr_db"):
        values = [plan[name] for plan in run.front]
        assert values == sorted(set(values))
    assert all(plan["measured_ms"] is None for plan in run.front), "the profile is not of this host"


def test_the_same_command_goes_on_with_more_trials_and_keeps_the_old_ones(
    run: Run, copy: Path
) -> None:
    before = (copy / LEDGER).read_bytes()
    found = value_of(*run.search(copy, "--trials", TRIALS + 2))
    assert found["complete"] == TRIALS + 2
    assert (copy / LEDGER).read_bytes().startswith(before)
    assert states(copy).count("COMPLETE") == TRIALS + 2


@pytest.mark.parametrize("trials", [TRIALS, 1])
def test_a_finished_search_is_only_told_again(run: Run, copy: Path, trials: int) -> None:
    before = {**contents(copy), DATABASE: b"", searching.SEARCH: b""}
    assert value_of(*run.search(copy, "--trials", trials)) == run.value
    assert {**contents(copy), DATABASE: b"", searching.SEARCH: b""} == before


def test_an_interrupted_search_ends_where_it_would_have_ended(
    run: Run, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = Evaluator.image_sqnr_db, []

    def interrupted(*arguments: Any) -> Any:
        drawn.append(arguments)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "image_sqnr_db", interrupted)
        code, line = refusal(*run.search(started))
    assert (code, line) == (130, "interrupted: run the same command again to go on")
    assert not (started / searching.PARETO).exists()
    check(refusal("pareto", started), 3, "EQ-3634", started)
    assert value_of(*run.search(started)) == run.value


def test_people_are_shown_the_front_and_where_it_is(run: Run, copy: Path) -> None:
    result = call(*run.search(copy))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split()[:5] == ["trial", "ms", "of", "float", "dB"]
    assert [line.split()[0] for line in lines[2 : 2 + len(run.front)]] == [
        str(plan["trial"]) for plan in run.front
    ]
    assert lines[-1] == str(copy / searching.PARETO)
    told = [line.rpartition(": ")[0] for line in result.stderr.splitlines()]
    assert told[0] == "load"
    assert "trials" in told


def test_an_error_is_one_json_object_on_standard_error(run: Run, tmp_path: Path) -> None:
    result = call(*run.search(tmp_path / "new", "--sampler", "Dice"), "--json")
    assert (result.exit_code, result.stdout) == (3, "")
    assert json.loads(result.stderr)["error"]["code"] == "EQ-3620"


def test_plans_keep_a_budget_of_latency_and_bytes(run: Run, started: Path) -> None:
    most_ms = run.value["float_ms"] * 0.9
    most_bytes = max(plan["disk_bytes"] for plan in run.front) - 1
    limits = ("--latency", most_ms, "--max-bytes", most_bytes)
    found = value_of(*run.search(started, *limits, "--trials", 3))
    assert found["plans"]
    assert all(plan["latency_ms"] <= most_ms for plan in found["plans"])
    assert all(plan["disk_bytes"] <= most_bytes for plan in found["plans"])


def test_phases_and_ties_can_be_searched_and_become_a_plan(
    run: Run, started: Path, tmp_path: Path
) -> None:
    options = ("--phases", 2, "--tie", "block", "--policies", "--sampler", "RandomSampler")
    found = value_of(*run.search(started, *options))
    assert found["complete"] == TRIALS
    plan = tmp_path / "plan.json"
    value_of("pareto", started, "--trial", "best", "--plan", plan)
    assert len(read_record(plan, DeploymentPlan).phases) <= 2


def test_phases_that_the_profile_cannot_price_are_told_of(run: Run, started: Path) -> None:
    profile = read_record(run.profile, LatencyProfile)
    pair = PhaseCost(
        model=load(str(run.model), scheduler="ddim", steps=4).info.fingerprint,
        batch=1,
        precisions={},
        other={},
        provenance="measured",
        alone=timing(100.0),
        among=timing(130.0),
    )
    priced = started.parent / "priced.json"
    priced.write_bytes(
        dump_record(sealed_profile(profile.model_copy(update={"phase_costs": (pair,)})))
    )
    for source, phases, told in ((run.profile, 1, 0), (run.profile, 2, 1), (priced, 2, 0)):
        out = started.parent / f"{source.stem}-{phases}"
        shutil.copytree(started, out)
        found = call(*run.search(out, "--phases", phases, "--trials", 2, profile=source))
        assert found.exit_code == 0
        assert found.stderr.count("no graph of several phases") == told


def test_a_front_is_measured_where_that_is_asked_for_and_stays_so(
    run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few at a time.
    monkeypatch.setattr(searching, "TOGETHER", 2)
    found = value_of(*run.search(copy, "--remeasure"))
    for plan in found["plans"]:
        assert plan["measured_ms"] > 0
        assert plan["measured_ratio"] > 0
        assert plan["measured_sqnr_db"] > 0
    assert value_of(*run.search(copy)) == found
    assert value_of("pareto", copy) == found


# The front, its plot and its plans.


def test_pareto_tells_what_the_search_told(run: Run) -> None:
    before = contents(run.folder)
    assert value_of("pareto", run.folder) == run.value
    shown = call("pareto", run.folder).stdout.splitlines()
    assert [line.split()[0] for line in shown[2:]] == [str(plan["trial"]) for plan in run.front]
    fastest = run.front[0]
    assert f"{fastest['latency_ms']:.3f}" in shown[2]
    assert f"{fastest['image_sqnr_db']:.1f}" in shown[2]
    assert fastest["origin"] in shown[2]
    assert contents(run.folder) == before


@pytest.mark.parametrize(
    ("ending", "head"),
    [(".png", PNG), (".PDF", PDF), (".svg", b"<?xml")],
    ids=["png", "pdf", "svg"],
)
def test_a_front_is_plotted_as_its_file_ends(
    run: Run, tmp_path: Path, ending: str, head: bytes
) -> None:
    plot = tmp_path / f"front{ending}"
    assert value_of("pareto", run.folder, "--plot", plot) == run.value
    assert plot.read_bytes().startswith(head)


@pytest.mark.parametrize("name", ["front.html", "front"])
def test_a_plot_that_cannot_be_drawn_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    check(refusal("pareto", run.folder, "--plot", tmp_path / name), 3, "EQ-3650", ".png")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_a_trial_has_its_prediction_and_reasons(run: Run, tmp_path: Path) -> None:
    file, fastest = tmp_path / "plan.json", run.front[0]
    result = call("pareto", run.folder, "--trial", fastest["trial"], "--plan", file)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"plan  {file}"
    check_plan(run, read_record(file, DeploymentPlan), fastest)


def check_plan(run: Run, plan: DeploymentPlan, found: dict[str, Any]) -> None:
    told = plan.prediction
    assert told is not None
    assert told.latency_ms == found["latency_ms"]
    assert told.image_sqnr_db == found["image_sqnr_db"]
    assert told.disk_bytes == found["disk_bytes"]
    assert (told.device, told.provenance) == ("a phone", "measured")
    assert told.profile_sha256 == run.value["profile_sha256"]
    assert len(plan.phases) == found["phases"]
    for layer in (layer for phase in plan.phases for layer in phase.layers):
        assert layer.reason
        if layer.precision != TABLE:
            assert " us" in layer.reason
            assert layer.reason.startswith(f"{layer.precision}: ") or layer.precision == FP32
            assert layer.reason.startswith("kept fp32: ") or layer.precision != FP32


def test_the_phases_of_a_trial_are_written_as_servers_read_them(run: Run, tmp_path: Path) -> None:
    """The first trial leaves all layers in float, the second puts all it may on integers."""
    for trial, mode in enumerate(("a16", "native")):
        file = tmp_path / f"{mode}.json"
        value_of("pareto", run.folder, "--trial", trial, "--step-policy", file)
        policy = read_record(file, StepPolicy)
        assert (policy.default_mode, policy.first_steps.count) == (mode, 0)


def test_a_file_that_is_there_is_replaced_by_force_only(run: Run, tmp_path: Path) -> None:
    for option in ("--plot", "--plan", "--step-policy"):
        file = tmp_path / f"{option}.png"
        file.write_text("mine")
        trial = () if option == "--plot" else ("--trial", 1)
        given = ("pareto", run.folder, *trial, option, file)
        check(refusal(*given), 7, "EQ-7804", file)
        assert file.read_text() == "mine"
        value_of(*given, "--force")
        assert file.read_bytes() != b"mine"


def test_a_plan_of_no_trial_is_refused(run: Run, tmp_path: Path) -> None:
    for option in ("--plan", "--step-policy"):
        refused = refusal("pareto", run.folder, option, tmp_path / "file.json")
        check(refused, 3, "EQ-3806", option, "name a trial")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_nothing_is_written_of_is_refused(run: Run) -> None:
    check(refusal("pareto", run.folder, "--trial", 1), 3, "EQ-3806", "--trial")


def test_files_that_are_of_no_search_are_not_replaced(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / PROFILE
    mine.parent.mkdir()
    mine.write_text("mine")
    check(refusal(*run.search(mine.parent)), 7, "EQ-7113", mine)
    assert mine.read_text() == "mine"


def test_a_front_is_there_though_its_measurement_was_stopped(
    run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (copy / searching.PARETO).unlink()
    monkeypatch.setattr(searching, "measure_plans", stop)
    assert call(*run.search(copy, "--remeasure")).exit_code == 130
    assert value_of("pareto", copy) == run.value


def test_a_trial_that_there_is_not_leaves_no_other_file_either(run: Run, tmp_path: Path) -> None:
    """Or the same command with a right number would find the plot in its way."""
    given = ("--plot", tmp_path / "front.png", "--plan", tmp_path / "plan.json")
    check(refusal("pareto", run.folder, "--trial", 99, *given), 3, "EQ-3632")
    assert list(tmp_path.iterdir()) == []


# A package of a trial.


@pytest.mark.parametrize("trial", ["best", "1"])
def test_a_trial_becomes_a_verified_package_that_says_why(
    run: Run, tmp_path: Path, trial: str
) -> None:
    before, out = beside_kept(run.folder), tmp_path / "package"
    value = value_of(*run.emit(out, "--trial", trial))
    assert value["package"] == str(out)
    plan = read_record(out / "plan.json", DeploymentPlan)
    by_number = {str(found["trial"]): found for found in run.front}
    assert plan.prediction is not None
    # Which trial is best is a rule of its own; here, that it is one of the front.
    (chosen,) = (
        [p for p in run.front if p["latency_ms"] == plan.prediction.latency_ms]
        if trial == "best"
        else [by_number.get(trial, told_of_trial(run, int(trial)))]
    )
    check_plan(run, plan, chosen)
    verified = value_of("verify", out)
    assert verified["planned_layers"] == plan.n_integer_layers
    assert value["manifest"]["integer_layers"] == plan.n_integer_layers
    assert beside_kept(run.folder) == before


def told_of_trial(run: Run, number: int) -> dict[str, Any]:
    """What the ledger has of a trial, named as a front's plans name it."""
    for line in (run.folder / LEDGER).read_text().splitlines():
        entry = json.loads(line.partition(" ")[2])
        if entry["number"] == number:
            latency_ms, image_sqnr_db = entry["values"]
            told = {"latency_ms": latency_ms, "image_sqnr_db": image_sqnr_db}
            return {**entry["user_attrs"], **told}
    raise AssertionError(f"no trial {number}")


def test_best_is_the_default_and_no_slower_than_was_asked(
    run: Run, started: Path, tmp_path: Path
) -> None:
    front = value_of(*run.search(started, "--latency", "0.9x", "--trials", 3))["plans"]
    value_of(*run.emit(tmp_path / "package", "--search", started))
    plan = read_record(tmp_path / "package" / "plan.json", DeploymentPlan)
    assert plan.prediction is not None
    assert plan.prediction.image_sqnr_db == max(each["image_sqnr_db"] for each in front)
    assert plan.prediction.latency_ms <= run.value["float_ms"] * 0.9


@pytest.mark.parametrize("trial", ["99", "-1", "1.5", "first", "\u00b2", "9" * 5000])
def test_a_trial_that_there_is_not_is_refused_with_those_there_are(
    run: Run, tmp_path: Path, trial: str
) -> None:
    before = beside_kept(run.folder)
    refused = refusal(*run.emit(tmp_path / "package", f"--trial={trial}"))
    check(refused, 3, "EQ-3632", "give `best` or one of 0, 1, 2")
    assert list(tmp_path.iterdir()) == []
    assert beside_kept(run.folder) == before


@pytest.mark.parametrize(
    "options", [("--plan", "plan.json"), ("--quantized", "q.st"), ("--samples", 3), ("--seed", 1)]
)
def test_what_a_search_has_decided_cannot_be_given_beside_it(
    run: Run, tmp_path: Path, options: tuple[object, ...]
) -> None:
    check(refusal(*run.emit(tmp_path / "package", *options)), 3, "EQ-3806", options[0])
    given = ("emit", run.model, "-o", tmp_path / "package", "--trial", "best")
    check(refusal(*given), 3, "EQ-3806", "--trial", "name the search")
    assert list(tmp_path.iterdir()) == []


def test_a_package_of_another_model_or_sampler_is_refused(run: Run, tmp_path: Path) -> None:
    before, out = beside_kept(run.folder), tmp_path / "package"
    check(refusal(*run.emit(out, model=run.twin)), 6, "EQ-6310", "model ", run.folder)
    check(refusal(*run.emit(out, "--steps", 5)), 6, "EQ-6310", "sampler ", run.folder)
    assert list(tmp_path.iterdir()) == []
    assert beside_kept(run.folder) == before


# Sensitivities.


@pytest.fixture(scope="module")
def measured(run: Run) -> tuple[object, ...]:
    """The command, its float runs kept."""
    given = ("sensitivity", run.model, "--precision", "w8a8", "--images", 2, "--ranges", 2)
    return (*given, "--samples", 2, "--work", run.path / "work", *SAMPLER)


@pytest.mark.parametrize(
    ("ending", "head"), [(".png", PNG), (".html", b"<!doctype html>")], ids=["png", "html"]
)
def test_sensitivities_are_stored_and_drawn(
    measured: tuple[object, ...], tmp_path: Path, ending: str, head: bytes
) -> None:
    out, plot = tmp_path / "sens.json", tmp_path / f"sens{ending}"
    value = value_of(*measured, "-o", out, "--plot", plot)
    report = read_record(out, SensitivityReport)
    assert value == {"report": str(out), "entries": len(report.entries), "plot": str(plot)}
    assert {entry.precision for entry in report.entries} == {W8A8}
    assert len({entry.layer for entry in report.entries}) == len(report.entries)
    assert (report.images, report.n_steps, len(report.ranges)) == (2, 4, 2)
    assert all(damage > 0 for entry in report.entries for damage in entry.forced)
    data = plot.read_bytes()
    assert data[: len(head)].lower() == head.lower()
    if ending == ".html":
        assert all(entry.layer in data.decode() for entry in report.entries)


def test_sensitivities_are_not_written_over_a_file_or_as_an_unknown_plot(
    measured: tuple[object, ...], tmp_path: Path
) -> None:
    out = tmp_path / "sens.json"
    check(refusal(*measured, "-o", out, "--plot", tmp_path / "sens.txt"), 3, "EQ-3650", ".html")
    check(refusal(*measured, "-o", out, "--precision", "w4a4"), 4, "EQ-4310", "w4a4")
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    check(refusal(*measured, "-o", out), 7, "EQ-7804", out)
    assert out.read_text() == "mine"


# What cannot be searched.


@pytest.mark.parametrize(
    ("options", "exit_code", "code", "texts"),
    [
        (("--latency", "0.000001"), 5, "EQ-5621", ("no plan reaches 1e-06 ms", "fastest possible")),
        (("--latency", "0.0001x"), 5, "EQ-5621", ("no plan reaches", "fastest possible")),
        (("--max-bytes", 1), 5, "EQ-5621", ("no plan fits into 1 bytes", "smallest possible")),
        (("--latency", "soon"), 3, "EQ-3807", ("'soon'", "0.6x")),
        (("--latency", "nan"), 3, "EQ-3807", ("'nan'",)),
        (("--sampler", "Dice"), 3, "EQ-3620", ("'Dice'", "TPESampler, NSGAIISampler, GPSampler")),
        (("--tie", "twins"), 3, "EQ-3633", ("'twins'", "'block'")),
        (("--precision", "w5a8"), 3, "EQ-3805", ("'w5a8'", "w8a8")),
        (("--precision", "w4a4"), 4, "EQ-4310", ("w4a4", "w4a8")),
        (("--precision", "w8"), 3, "EQ-3510", ("lacks", " at w8", "profile kit --missing-from")),
        (("--profile", "gone.json"), 3, "EQ-3523", ("gone.json",)),
        (("--accept-flag", "haunted"), 3, "EQ-3809", ("'haunted'", "throttled")),
        (("--trials", 0), 2, "EQ-2001", ("--trials",)),
        (("--images", 1), 2, "EQ-2001", ("--images",)),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_work(
    run: Run,
    tmp_path: Path,
    options: tuple[object, ...],
    exit_code: int,
    code: str,
    texts: tuple[str, ...],
) -> None:
    check(refusal(*run.search(tmp_path / "new", *options)), exit_code, code, *texts)
    assert set(contents(tmp_path)) <= {f"new/{LOCK}"}


@pytest.mark.parametrize(("option", "unit"), [("--latency", "ms"), ("--max-bytes", "")])
def test_the_least_that_a_refusal_names_can_be_reached(
    run: Run, started: Path, option: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever types the number that the message gives gets a plan, not the message again."""
    # No other plan is as small: after the one that is known beforehand, all are pruned.
    monkeypatch.setattr("edgeqdm.search.study.MAX_IDLE", 4)
    _, line = refusal(*run.search(started, option, "0.000001" if unit else 1))
    told = re.search(rf"possible (?:is predicted at|has) ([0-9.]+) ?{unit} ", line)
    assert told is not None, line
    assert value_of(*run.search(started, option, told[1], "--trials", 4))["plans"]


def test_one_trial_within_a_tight_budget_is_one_that_keeps_it(
    run: Run, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a start costs is known before it is run: those beyond the budget need no trial."""
    monkeypatch.setattr("edgeqdm.search.study.MAX_IDLE", 4)
    most_ms = run.front[0]["latency_ms"] + 1e-6
    found = value_of(*run.search(started, "--latency", most_ms, "--trials", 1))
    assert (found["complete"], len(found["plans"])) == (1, 1)


def test_an_edited_or_flagged_profile_is_refused(run: Run, tmp_path: Path) -> None:
    profile = read_record(run.profile, LatencyProfile)
    edited, flagged = tmp_path / "edited.json", tmp_path / "flagged.json"
    edited.write_bytes(dump_record(profile.model_copy(update={"threads": 2})))
    flagged.write_bytes(
        dump_record(sealed_profile(profile.model_copy(update={"flags": (Flag.THROTTLED,)})))
    )
    new = tmp_path / "new"
    check(refusal(*run.search(new, profile=edited)), 3, "EQ-3520", edited)
    check(refusal(*run.search(new, profile=flagged)), 3, "EQ-3522", "--accept-flag throttled")
    assert not new.exists()


def test_an_sqlite_file_as_storage_is_refused(run: Run, copy: Path) -> None:
    before, url = contents(copy), f"sqlite:///{copy.parent}/shared.db"
    refused = refusal(*run.search(copy, "--storage", url, "--trials", TRIALS + 1))
    check(refused, 4, "EQ-4320", "PostgreSQL")
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_an_sqlite_file_as_storage_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    check(refusal(*run.search(tmp_path / "new", "--storage", "sqlite:///x.db")), 4, "EQ-4320")
    assert set(contents(tmp_path)) <= {f"new/{LOCK}"}


@pytest.mark.parametrize("verb", ["pareto", "emit"])
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_a_search_is_refused_and_left_alone(
    run: Run, tmp_path: Path, verb: str, there: bool
) -> None:
    folder = tmp_path / "mine"
    if there:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    given = ("pareto", folder) if verb == "pareto" else run.emit(tmp_path / "p", "--search", folder)
    check(refusal(*given), 3, "EQ-3630", folder, "edgeqdm search")
    assert contents(tmp_path) == ({"mine/notes.txt": b"mine"} if there else {})


# A folder that is not what it was, or another's.


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--seed", 1), "settings.seed 0, here 1"),
        (("--images", 3), "settings.images"),
        (("--max-bytes", 10**9), "settings.max_bytes None, here 1000000000"),
        (("--sampler", "RandomSampler"), "settings.sampler TPESampler, here RandomSampler"),
        (("--steps", 5), "sampler "),
        (("--eta", 0.5), "sampler "),
        (("--precision", "fp32"), "settings.precisions"),
    ],
)
def test_other_settings_are_refused_by_their_names(
    run: Run, copy: Path, options: tuple[object, ...], name: str
) -> None:
    before = beside_kept(copy)
    check(refusal(*run.search(copy, *options)), 6, "EQ-6310", name, copy)
    assert beside_kept(copy) == before


def test_another_model_or_profile_is_refused_though_it_has_the_same_name(
    run: Run, copy: Path, tmp_path: Path
) -> None:
    before, other = beside_kept(copy), tmp_path / "other.json"
    profile = read_record(run.profile, LatencyProfile)
    other.write_bytes(dump_record(sealed_profile(profile.model_copy(update={"threads": 2}))))
    check(refusal(*run.search(copy, model=run.twin)), 6, "EQ-6310", "model ", copy)
    check(refusal(*run.search(copy, profile=other)), 6, "EQ-6310", "profile ", copy)
    assert beside_kept(copy) == before


def test_a_folder_holds_one_study_only(run: Run, copy: Path) -> None:
    before = contents(copy)
    refused = refusal(*run.search(copy, "--study", "another"))
    check(refused, 6, "EQ-6311", "'model'", "'another'", copy)
    assert contents(copy) == before


def test_another_model_is_refused_though_the_database_is_gone(run: Run, copy: Path) -> None:
    """What the search was for is written down twice."""
    (copy / DATABASE).unlink()
    before = beside_kept(copy)
    check(refusal(*run.search(copy, model=run.twin)), 6, "EQ-6310", "model ")
    check(refusal(*run.search(copy, "--seed", 1)), 6, "EQ-6310", "settings.seed")
    assert beside_kept(copy) == before


def test_another_model_is_refused_though_the_search_file_is_gone(run: Run, copy: Path) -> None:
    (copy / searching.SEARCH).unlink()
    before = beside_kept(copy)
    check(refusal(*run.search(copy, model=run.twin)), 6, "EQ-6310", "model ")
    assert beside_kept(copy) == before
    assert value_of(*run.search(copy)) == run.value


@pytest.mark.parametrize(
    "name", [searching.SEARCH, searching.PARETO, PROFILE, searching.SENSITIVITY]
)
def test_a_damaged_file_of_a_search_is_named(run: Run, copy: Path, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:-20])
    before = beside_kept(copy)
    given = run.emit(copy.parent / "package", "--search", copy)
    code, line = refusal(*(("pareto", copy) if name == searching.PARETO else given))
    assert (code, str(copy / name) in line) == (6, True), line
    assert beside_kept(copy) == before
    assert not (copy.parent / "package").exists()


def test_edited_latencies_of_a_search_are_refused(run: Run, copy: Path) -> None:
    file = copy / PROFILE
    profile = read_record(file, LatencyProfile)
    slower = tuple(e.model_copy(update={"timing": timing(500.0)}) for e in profile.entries)
    file.write_bytes(dump_record(profile.model_copy(update={"entries": slower})))
    code, line = refusal(*run.emit(copy.parent / "package", "--search", copy))
    assert code in (3, 6)
    assert str(file) in line
    assert not (copy.parent / "package").exists()


# The database and its ledger.


def noise(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(bytes(255 - byte for byte in data[:4096]) + data[4096:])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [noise, cut, emptied])
def test_a_damaged_database_is_made_again_of_the_ledger_and_kept(
    run: Run, copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy / DATABASE)
    damaged, ledger = (copy / DATABASE).read_bytes(), (copy / LEDGER).read_bytes()
    result = call(*run.search(copy))
    assert result.exit_code == 0
    (note,) = [line for line in result.stderr.splitlines() if f"note: {DATABASE}" in line]
    assert f"made again of {len(states(copy))} trials" in note
    assert f"{DATABASE}.corrupt-1 kept" in note
    assert (copy / f"{DATABASE}.corrupt-1").read_bytes() == damaged
    assert (copy / LEDGER).read_bytes() == ledger
    assert value_of("pareto", copy) == run.value


def test_a_deleted_database_is_made_again_and_the_search_goes_on(run: Run, copy: Path) -> None:
    (copy / DATABASE).unlink()
    ledger = (copy / LEDGER).read_bytes()
    result = call(*run.search(copy, "--trials", TRIALS + 1))
    assert result.exit_code == 0
    assert f"note: {DATABASE}: missing; made again of " in result.stderr
    assert (copy / LEDGER).read_bytes().startswith(ledger)
    assert value_of("pareto", copy)["complete"] == TRIALS + 1
    assert not list(copy.glob("*.corrupt-*"))


def test_with_json_a_mended_database_leaves_nothing_else_to_read(run: Run, copy: Path) -> None:
    (copy / DATABASE).unlink()
    assert value_of(*run.search(copy)) == run.value


def test_a_damaged_line_of_the_ledger_is_named_and_kept(run: Run, copy: Path) -> None:
    lines = (copy / LEDGER).read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"number":1', b'"number":7')
    (copy / LEDGER).write_bytes(b"".join(lines))
    before = beside_kept(copy)
    for given in (run.search(copy), run.emit(copy.parent / "package", "--search", copy)):
        check(refusal(*given), 6, "EQ-6305", "line 2 of the ledger", copy / LEDGER)
        assert beside_kept(copy) == before
    # As the message says.
    (copy / LEDGER).write_bytes(b"".join(lines[:1] + lines[2:]))
    assert value_of(*run.search(copy)) == run.value


def test_where_database_and_ledger_are_lost_the_damaged_one_is_kept(run: Run, copy: Path) -> None:
    (copy / LEDGER).unlink()
    cut(copy / DATABASE)
    damaged, front = (copy / DATABASE).read_bytes(), (copy / searching.PARETO).read_bytes()
    aside = copy / f"{DATABASE}.corrupt-1"
    check(refusal(*run.search(copy)), 6, "EQ-6303", aside)
    assert aside.read_bytes() == damaged
    assert (copy / searching.PARETO).read_bytes() == front


def test_a_search_whose_trials_lie_elsewhere_is_not_begun_anew_here(run: Run, copy: Path) -> None:
    """As is one in a database of several workers: its folder holds neither file."""
    for name in (DATABASE, LEDGER):
        (copy / name).unlink()
    before = beside_kept(copy)
    assert refusal(*run.emit(copy.parent / "package", "--search", copy))[0] in (3, 6)
    assert beside_kept(copy) == before


def test_a_file_in_place_of_the_folder_is_kept(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "search"
    file.write_text("mine")
    check(refusal(*run.search(file)), 6, "EQ-6302", file)
    assert contents(tmp_path) == {"search": b"mine"}


# Two processes.

HOLD = (
    "import sys, pathlib; from edgeqdm.search.storage import locked\n"
    "with locked(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


@pytest.fixture
def holder(copy: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the copy."""
    command = [sys.executable, "-c", HOLD, str(copy)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_search_in_a_folder_is_refused_with_the_number_of_the_first(
    run: Run, copy: Path, holder: subprocess.Popen[str]
) -> None:
    before = contents(copy)
    check(refusal(*run.search(copy)), 6, "EQ-6301", f"process {holder.pid}", copy)
    assert contents(copy) == before
    assert value_of("pareto", copy) == run.value


def test_whoever_reads_a_plan_mends_nothing_of_a_search_that_runs(
    run: Run, copy: Path, holder: subprocess.Popen[str]
) -> None:
    """A line without its end is one that is being written, not one that was torn."""
    with (copy / LEDGER).open("ab") as file:
        file.write(b"01234567 {")
    before = beside_kept(copy)
    call("pareto", copy, "--trial", "best", "--plan", copy.parent / "plan.json")
    assert beside_kept(copy) == before


# Help.


@pytest.mark.parametrize("verb", ["sensitivity", "search", "pareto", "worker"])
def test_help_of_a_verb_has_an_example_and_fits_a_line(verb: str) -> None:
    text = call(verb, "--help").stdout
    assert f"\n  edgeqdm {verb} " in text
    assert all(len(line) <= 100 for line in text.splitlines())
