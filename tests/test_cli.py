from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import edgeqdm.models.load
import edgeqdm.models.split
from edgeqdm import cli, cli_output, pipeline
from edgeqdm.cli_inputs import read_embeddings
from edgeqdm.emit import launch
from edgeqdm.emit.backend import KernelCount
from edgeqdm.emit.integrity import seal_manifest
from edgeqdm.emit.verify import Verification
from edgeqdm.errors import (
    EdgeqdmError,
    InputError,
    ModelError,
    NumericalError,
    OutputError,
    ResourceError,
    StorageError,
    UnsupportedError,
    VerifyError,
)
from edgeqdm.ir.codec import dump_record, parse_record
from edgeqdm.ir.model import Conditioning, Decoder, LayerInfo, LayerKind, ModelInfo
from edgeqdm.ir.package import Artifact, ScheduleFile
from edgeqdm.ir.plan import DeploymentPlan, Phase
from edgeqdm.ir.report import BenchReport, BenchRow, Host
from edgeqdm.ir.schedule import SamplerProgram
from edgeqdm.testing.manifests import tiny_manifest

MANIFEST = tiny_manifest(
    integer_layers=7,
    files={"model.onnx": Artifact(sha256="0" * 64, size=2_500_000, role="model")},
)
VERIFICATION = Verification(
    MANIFEST, KernelCount(integer=7, floating=2, by_name={"QLinearConv": 7}), 7, (0.1, 0.25, 0.2)
)
ROW = BenchRow(
    name="float",
    cpu_ms_per_step=12.5,
    cpu_ratio=None,
    image_sqnr_db=20.25,
    bytes_on_disk=2_500_000,
    integer_kernels=0,
    planned_layers=0,
    float_kernels=40,
    feature_fid=None,
)
REPORT = BenchReport(
    model="unet-fmnist",
    sampler="DDIMScheduler",
    n_steps=3,
    guidance=2.0,
    images=16,
    rounds=60,
    fid_images=0,
    host=Host(machine="m", cpu="c", system="s", python="3", libraries={}, threads=1),
    rows=(ROW,),
)
PROGRAM = SamplerProgram(
    sampler="DDIMScheduler",
    settings={"eta": 0.5, "steps": 3},
    prediction_type="epsilon",
    timesteps=(2.0, 1.0, 0.0),
    integer_timesteps=True,
    initial_sigma=1.0,
    input_scale=(1.0,) * 3,
    sample_weights=((1.0,),) * 3,
    output_weights=((1.0,),) * 3,
    noise_std=(0.0,) * 3,
)
SCHEDULE = ScheduleFile(
    program=PROGRAM,
    correction=None,
    guidance=2.0,
    conditioning=Conditioning(kind="none"),
    decoder=Decoder(),
    sample_shape=(4, 16, 16),
    label_names=(),
    golden_noise_rms=(1.0,) * 3,
)
VERB_ARGUMENTS = {
    "doctor": ["doctor"],
    "emit": ["emit", "model", "-o", "out"],
    "verify": ["verify", "package"],
    "run": ["run", "package", "-o", "sheet.png"],
    "bench": ["bench", "package"],
    "demo": ["demo"],
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def write_package(
    folder: Path, schedule: bytes = dump_record(SCHEDULE), model: ModelInfo = MANIFEST.model
) -> None:
    """A sealed package of a schedule and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "schedule.json").write_bytes(schedule)
    sha256 = hashlib.sha256(schedule).hexdigest()
    listed = {"schedule.json": Artifact(sha256=sha256, size=len(schedule), role="schedule")}
    manifest = tiny_manifest(files=listed, model=model)
    (folder / "manifest.json").write_bytes(seal_manifest(manifest))


class Calls(dict[str, dict[str, Any]]):
    """Arguments every replaced function was called with, by name."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    monkeypatch.chdir(tmp_path)
    write_package(tmp_path / "package")
    found = Calls()
    results = {
        "emit": MANIFEST,
        "verify": VERIFICATION,
        "run": "sheet.png: 10 images",
        "bench": REPORT,
        "demo": pipeline.DemoResult(Path("p"), Path("p.png"), REPORT, VERIFICATION),
        "doctor": (
            pipeline.Finding("torch", "2.13", True, ""),
            pipeline.Finding("cpu", "no VNNI", False, 'pip install "x[y]"'),
        ),
        "load": "the denoiser",
    }

    def replace(owner: Any, name: str) -> None:
        def stand_in(*positional: Any, **named: Any) -> Any:
            found[name] = {"positional": positional, **named}
            progress = named.get("progress")
            if progress is not None:
                progress("trajectories", 1, 2)
                progress("trajectories", 2, 2)
            return results[name]

        monkeypatch.setattr(owner, name, stand_in)

    for name in VERB_ARGUMENTS:
        replace(launch if name == "run" else pipeline, name)
    replace(edgeqdm.models.load, "load")
    monkeypatch.setattr(edgeqdm.models.load, "reference_names", lambda: ("tiny",))
    return found


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raising(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "verify", raising)


def lines(text: str) -> list[str]:
    return text.splitlines()


@pytest.mark.parametrize("verb", VERB_ARGUMENTS)
def test_every_verb_succeeds_and_prints_a_result(calls: Calls, verb: str) -> None:
    result = call(*VERB_ARGUMENTS[verb])
    assert (result.exit_code, result.exception) == (0, None)
    assert result.stdout.strip()


@pytest.mark.parametrize("verb", VERB_ARGUMENTS)
def test_json_is_one_object_on_stdout_and_nothing_on_stderr(calls: Calls, verb: str) -> None:
    result = call(*VERB_ARGUMENTS[verb], "--json")
    assert isinstance(json.loads(result.stdout), dict)
    assert (result.exit_code, result.stderr) == (0, "")


def test_long_stages_say_now_and_then_how_long_they_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(cli_output.time, "monotonic", lambda: clock[0])
    with cli_output.Output().working() as progress:
        for done in range(1, 11):
            progress("reconstruct", done, 10)
            clock[0] += 24.0
    assert lines(capsys.readouterr().err) == [
        "reconstruct: 1 of 10",
        "reconstruct: 3 of 10, about 3 min left",
        "reconstruct: 5 of 10, about 2 min left",
        "reconstruct: 7 of 10, about 1 min left",
        "reconstruct: 9 of 10, about 0 min left",
    ]


@pytest.mark.parametrize("verb", VERB_ARGUMENTS)
def test_quiet_prints_nothing(calls: Calls, verb: str) -> None:
    result = call(*VERB_ARGUMENTS[verb], "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_a_stage_is_one_plain_line_where_there_is_no_terminal(calls: Calls) -> None:
    result = call("emit", "model", "-o", "out")
    assert lines(result.stderr) == ["load: 1 of 1", "trajectories: 1 of 2"]


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_bars_with_an_eta(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_color: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    with cli_output.Output().working() as progress:
        progress("observe", 1, 2)
    shown = capsys.readouterr().err
    assert "observe" in shown
    assert "1/2" in shown
    assert "ETA" in shown
    # 38 begins an 8-bit colour, 3x one of the eight first colours.
    assert ("\x1b[38" in shown or "\x1b[3" in shown) is not no_color


def test_emit_hands_every_option_on(calls: Calls, tmp_path: Path) -> None:
    plan = DeploymentPlan(
        target="onnxruntime", model="m", n_steps=5, phases=(Phase(start=0, stop=5, layers=()),)
    )
    (tmp_path / "plan.json").write_bytes(dump_record(plan))
    save_file({"conditioning": torch.ones(2, 3, 4), "null": torch.zeros(3, 4)}, "c.safetensors")
    options = "--target t --form small --scheduler ddim --steps 5 --eta 0.5 --guidance 3"
    files = "--plan plan.json --conditioning c.safetensors --work w --force --online --no-correct"
    result = call(
        "emit",
        "org/name",
        "--out",
        "o",
        *options.split(),
        "--samples",
        "8",
        "--seed",
        "9",
        *files.split(),
    )
    assert result.exit_code == 0, result.output
    loaded = calls["load"]
    assert torch.equal(loaded.pop("conditioning"), torch.ones(2, 3, 4))
    assert torch.equal(loaded.pop("null_conditioning"), torch.zeros(3, 4))
    assert loaded == {
        "positional": ("org/name",),
        "scheduler": "ddim",
        "steps": 5,
        "guidance": 3.0,
        "eta": 0.5,
        "local_files_only": False,
    }
    emitted = calls["emit"]
    emitted.pop("progress")
    assert emitted == {
        "positional": ("the denoiser", Path("o")),
        "target": "t",
        "form": "small",
        "samples": 8,
        "seed": 9,
        "plan": plan,
        "correction": False,
        "quantized": None,
        "work": Path("w"),
        "force": True,
    }


def test_emit_defaults_are_those_of_the_pipeline(calls: Calls) -> None:
    assert call("emit", "model", "-o", "out").exit_code == 0
    emitted = calls["emit"]
    assert (emitted["target"], emitted["form"]) == (pipeline.DEFAULT_TARGET, "standard")
    # Left to the pipeline, which refuses them where they would do nothing.
    assert (emitted["samples"], emitted["seed"]) == (None, None)
    assert (emitted["plan"], emitted["work"]) == (None, None)
    assert (emitted["correction"], emitted["force"]) == (True, False)
    assert (calls["load"]["guidance"], calls["load"]["local_files_only"]) == (None, True)


def test_verify_prints_target_files_kernels_and_the_worst_deviation(calls: Calls) -> None:
    shown = call("verify", "package").stdout
    assert "onnxruntime" in shown
    assert "1 ok" in shown
    assert "7 of 7" in shown
    assert "7 QLinearConv" in shown
    assert "0.25 of the quantization noise at worst, step 1; 1.5 is" in shown


def test_verify_json_names_the_worst_step(calls: Calls) -> None:
    value = json.loads(call("verify", "package", "--json").stdout)
    assert (value["integer_kernels"], value["planned_layers"], value["float_kernels"]) == (7, 7, 2)
    assert (value["worst_step"], value["worst_deviation"]) == (1, 0.25)


def test_run_hands_every_option_on(calls: Calls) -> None:
    chosen = ["--seed", "3", "--label", "Bag,2", "--count", "4", "--threads", "2"]
    result = call("run", "package", "-o", "s.png", *chosen)
    assert result.stdout == "sheet.png: 10 images\n"
    assert calls["run"] == {
        "positional": (Path("package"), Path("s.png")),
        "seed": 3,
        "label": "Bag,2",
        "count": 4,
        "embedding": None,
        "threads": 2,
    }


def test_bench_loads_the_model_with_the_settings_of_the_package(calls: Calls) -> None:
    assert call("bench", "package", "--rounds", "7", "--images", "5", "--fid", "100").exit_code == 0
    loaded = calls["load"]
    assert loaded["positional"] == ("reference:tiny",)
    assert (loaded["steps"], loaded["guidance"], loaded["eta"]) == (3, 2.0, 0.5)
    measured = calls["bench"]
    assert (measured["model"], measured["rounds"]) == ("the denoiser", 7)
    assert (measured["images"], measured["fid"]) == (5, 100)


def test_bench_takes_another_model_and_sampler(calls: Calls) -> None:
    assert call("bench", "package", "--model", "./mine", "--scheduler", "euler").exit_code == 0
    assert calls["load"]["positional"] == ("./mine",)
    assert calls["load"]["scheduler"] == "euler"


def test_bench_asks_for_a_model_that_is_not_shipped(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgeqdm.models.load, "reference_names", tuple)
    result = call("bench", "package")
    assert result.exit_code == 3
    assert result.stderr.endswith(" - name its folder with --model\n")


def test_bench_writes_a_report_that_reads_back(calls: Calls, tmp_path: Path) -> None:
    assert call("bench", "package", "-o", "bench.json").exit_code == 0
    data = (tmp_path / "bench.json").read_bytes()
    assert parse_record(data, BenchReport, name="bench.json") == REPORT


def test_bench_table_shows_a_dash_for_what_was_not_measured(calls: Calls) -> None:
    rows = [line.split() for line in lines(call("bench", "package").stdout)]
    row = next(cells for cells in rows if cells[:1] == ["float"])
    assert row == ["float", "12.50", "-", "20.2", "2.50", "0", "of", "0", "40"]


def test_bench_of_no_package_is_an_input_error(calls: Calls) -> None:
    result = call("bench", "nothing")
    assert result.exit_code == 3
    assert "(nothing)" in result.stderr


def test_bench_of_a_damaged_package_is_a_verify_error(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "package" / "schedule.json").write_text("{")
    assert call("bench", "package").exit_code == 8


@pytest.mark.parametrize("data", [b"{}", dump_record(SCHEDULE).replace(b"0.5", b"0.7")])
def test_bench_of_an_edited_package_is_a_verify_error(
    calls: Calls, tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "package" / "schedule.json").write_bytes(data)
    result = call("bench", "package", "--quiet")
    assert (result.exit_code, result.stderr[:15]) == (8, "error[EQ-8110]:")
    assert "load" not in calls


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"eta": 0.5}, "steps is null"),
        ({"eta": 0.5, "steps": "3"}, 'steps is "3"'),
        ({"eta": 0.5, "steps": 3.5}, "steps is 3.5"),
        ({"eta": 0.5, "steps": True}, "steps is true"),
        ({"eta": 0.5, "steps": 0}, "steps is 0"),
        ({"steps": 3}, "eta is null"),
        ({"eta": "much", "steps": 3}, 'eta is "much"'),
        ({"eta": -1.0, "steps": 3}, "eta is -1.0"),
    ],
)
def test_bench_of_a_package_with_other_settings_is_a_verify_error(
    calls: Calls, tmp_path: Path, settings: dict[str, Any], found: str
) -> None:
    """Sealed again by whoever changed it, so that no hash tells."""
    program = PROGRAM.model_copy(update={"settings": settings})
    data = dump_record(SCHEDULE.model_copy(update={"program": program}))
    write_package(tmp_path / "package", data)
    result = call("bench", "package", "--quiet")
    assert result.exit_code == 8
    assert result.stderr.startswith(f"error[EQ-8801]: program.settings.{found}, not a number from")
    assert "schedule.json" in result.stderr


@pytest.mark.parametrize("split", [True, False])
def test_bench_splits_the_model_of_a_package_with_split_skips(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: bool
) -> None:
    names = ("up.conv1.hidden", "up.conv1.skip") if split else ("up.skip", "other.hidden")
    layers = tuple(
        LayerInfo(name=name, kind=LayerKind.CONV2D, weight_shape=(1, 1, 1, 1), role="body")
        for name in names
    )
    write_package(tmp_path / "package", model=MANIFEST.model.model_copy(update={"layers": layers}))
    monkeypatch.setattr(edgeqdm.models.split, "split_skips", lambda found: f"{found}, split")
    assert call("bench", "package").exit_code == 0
    assert calls["bench"]["model"] == ("the denoiser, split" if split else "the denoiser")


def test_bench_report_that_cannot_be_written_is_refused_first(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    result = call("bench", "package", "-o", "there", "--quiet")
    assert (result.exit_code, result.stderr[:15]) == (7, "error[EQ-7103]:")
    assert not calls


def test_demo_names_package_and_picture(calls: Calls) -> None:
    result = call("demo", "-o", "there", "--fid", "100", "--force")
    assert "p.png" in result.stdout
    assert calls["demo"]["positional"] == (Path("there"),)
    assert (calls["demo"]["fid"], calls["demo"]["force"]) == (100, True)


def test_doctor_shows_the_hint_of_what_is_missing_unchanged(calls: Calls) -> None:
    shown = [line for line in lines(call("doctor").stdout) if line.strip()]
    (torch_line, cpu_line) = shown
    assert torch_line.split() == ["ok", "torch", "2.13"]
    assert cpu_line.split(maxsplit=2)[:2] == ["!!", "cpu"]
    # Square brackets are markup to rich and would vanish.
    assert 'no VNNI - pip install "x[y]"' in cpu_line


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (InputError("EQ-3001", "m"), 3),
        (UnsupportedError("EQ-4001", "m"), 4),
        (NumericalError("EQ-5001", "m"), 5),
        (StorageError("EQ-6001", "m"), 6),
        (OutputError("EQ-7001", "m"), 7),
        (VerifyError("EQ-8001", "m"), 8),
        (ResourceError("EQ-9001", "m"), 9),
    ],
)
def test_an_error_ends_with_its_exit_code_and_its_own_line(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, error: EdgeqdmError, exit_code: int
) -> None:
    fail_with(monkeypatch, error)
    result = call("verify", "package")
    assert result.exit_code == exit_code
    assert lines(result.stderr) == [str(error)]
    assert result.stdout == ""


def test_an_error_as_json_has_five_fields(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, VerifyError("EQ-8001", "what", path="é\n\udcff", hint="do"))
    result = call("verify", "package", "--json")
    assert (result.exit_code, result.stdout) == (8, "")
    (line,) = lines(result.stderr)
    assert json.loads(line) == {
        "error": {
            "code": "EQ-8001",
            "message": "what",
            "path": "é\n\udcff",
            "hint": "do",
            "exit_code": 8,
        }
    }


def test_quiet_still_prints_errors(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, InputError("EQ-3001", "what"))
    assert call("verify", "package", "--quiet").stderr == "error[EQ-3001]: what\n"


def test_anything_else_is_an_internal_error_on_one_line(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, ValueError("first\nsecond"))
    result = call("verify", "package", "--quiet")
    assert result.exit_code == 10
    expected = "error[EQ-0000]: internal error: ValueError: first - report it with -v\n"
    assert result.stderr == expected


@pytest.mark.parametrize("option", ["-v", "--verbose"])
def test_verbose_adds_the_traceback(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    fail_with(monkeypatch, ValueError("first"))
    shown = lines(call("verify", "package", option).stderr)
    assert "Traceback (most recent call last):" in shown
    assert shown[-1].startswith("error[EQ-0000]")


def test_verbose_json_holds_the_traceback(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ValueError("first"))
    value = json.loads(call("verify", "package", "--json", "-v").stderr)
    assert value["error"]["exit_code"] == 10
    assert value["traceback"].startswith("Traceback")


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (MemoryError(), 9, "error[EQ-9801]: out of memory - "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 9, "error[EQ-9801"),
        (ModuleNotFoundError("no", name="onnx.checker"), 4, "error[EQ-4801]: onnx is not inst"),
        (ModuleNotFoundError("no", name="edgeqdm.gone"), 10, "error[EQ-0000]"),
        (OSError(errno.ENOSPC, "No space left on device"), 7, "error[EQ-7803]: cannot be wri"),
        (PermissionError(errno.EACCES, "Permission denied", "w/x"), 7, "error[EQ-7803]: cannot be"),
        (SystemExit(1), 10, "error[EQ-0000]: internal error: SystemExit: 1 - "),
    ],
)
def test_an_error_of_the_system_keeps_its_meaning(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, error: BaseException, exit_code: int, line: str
) -> None:
    fail_with(monkeypatch, error)
    result = call("verify", "package", "--quiet")
    assert result.exit_code == exit_code
    assert result.stderr.startswith(line)
    assert len(lines(result.stderr)) == 1


def test_a_reader_that_has_gone_is_no_news(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    result = call("verify", "package", "--quiet")
    assert (result.exit_code, result.output) == (7, "")


def test_ctrl_c_ends_with_130_and_one_line(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    result = call("verify", "package", "--quiet")
    assert result.exit_code == 130
    assert result.stderr == "interrupted: run the same command again to go on\n"


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Ignored where the tests run in the background of a shell script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_sigterm_cleans_up_and_ends_with_143(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def interrupted(*_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)

    monkeypatch.setattr(pipeline, "verify", interrupted)
    monkeypatch.setattr(sys, "argv", ["edgeqdm", "verify", "package", "--quiet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, cleaned) == (143, [True])
    assert capsys.readouterr().err == "terminated: run the same command again to go on\n"


def swallow(*numbers: signal.Signals) -> None:
    """What native code does that calls Python and drops its exceptions."""
    for number in numbers:
        with contextlib.suppress(BaseException):
            signal.raise_signal(number)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("numbers", "code", "told"),
    [
        ([signal.SIGINT], 130, "interrupted"),
        ([signal.SIGTERM], 143, "terminated"),
        ([signal.SIGINT, signal.SIGTERM], 143, "terminated"),
    ],
)
def test_a_signal_that_native_code_makes_an_error_of_still_ends_with_its_code(
    numbers: list[signal.Signals],
    code: int,
    told: str,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreadable(*_: Any) -> None:
        swallow(*numbers)
        raise InputError("EQ-3127", "cannot be read")

    monkeypatch.setattr(pipeline, "verify", unreadable)
    monkeypatch.setattr(sys, "argv", ["edgeqdm", "verify", "package", "--quiet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert capsys.readouterr().err == f"{told}: run the same command again to go on\n"
    monkeypatch.setattr(sys, "argv", ["edgeqdm", "verify", "package", "-v"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "EQ-3127" in capsys.readouterr().err


@pytest.mark.usefixtures("handlers")
def test_a_run_knows_nothing_of_the_signals_of_another(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "verify", lambda *_: swallow(signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["edgeqdm", "verify", "package", "--quiet"])
    with pytest.raises(SystemExit):
        cli.main()
    fail_with(monkeypatch, InputError("EQ-3127", "cannot be read"))
    assert call("verify", "package", "--quiet").exit_code == 3


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_native_code_drops_ends_the_run_after_the_unit_of_work(
    number: signal.Signals, code: int, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = []

    def emitted(*_: Any, progress: Callable[[str, int, int], None], **__: Any) -> None:
        swallow(number)
        finished.append(1)
        progress("observe", 1, 2)
        finished.append(2)

    monkeypatch.setattr(pipeline, "emit", emitted)
    monkeypatch.setattr(sys, "argv", ["edgeqdm", "emit", "model", "-o", "out", "--quiet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, finished) == (code, [1])


@pytest.mark.usefixtures("handlers")
def test_an_ignored_ctrl_c_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(sys, "argv", ["edgeqdm", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_waiting_threads_give_way_unless_the_user_says_how_they_wait(
    given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "argv", ["edgeqdm", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert environment == expected


@pytest.mark.parametrize("module", ["cli", "emit.launch"])
def test_the_command_line_and_run_start_without_torch(module: str) -> None:
    """Its threads read the environment when it is loaded, and it takes seconds."""
    code = f"import sys, edgeqdm.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_is_a_program() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "edgeqdm", "--version"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, f"edgeqdm {edgeqdm.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-verb"],
        ["--no-such-option"],
        ["emit"],
        ["emit", "model"],
        ["emit", "model", "-o", "out", "--steps", "0"],
        ["emit", "model", "-o", "out", "--eta", "2"],
        ["emit", "model", "-o", "out", "--seed", "-1"],
        ["run", "package", "-o", "s.png", "--count", "many"],
        ["bench", "package", "--fid", "-1"],
        ["verify", "package", "another"],
    ],
)
def test_a_usage_error_ends_with_2_and_one_line(calls: Calls, arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    (line,) = lines(result.stderr)
    assert line.startswith("error[EQ-2001]: ")
    assert "--help" in line
    assert not calls


def test_a_usage_error_as_json_has_the_same_shape_as_any_other() -> None:
    found = json.loads(call("emit", "--json").stderr)["error"]
    assert (found["code"], found["exit_code"], found["path"]) == ("EQ-2001", 2, None)


@pytest.mark.parametrize("arguments", [[], ["--help"], *([verb, "-h"] for verb in VERB_ARGUMENTS)])
def test_help_fits_a_screen(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 0
    assert len(lines(result.stdout)) <= 36
    assert all(len(line) <= 100 for line in lines(result.stdout))


@pytest.mark.parametrize("verb", VERB_ARGUMENTS)
def test_help_of_every_verb_has_an_example(verb: str) -> None:
    assert f"\n  edgeqdm {verb}" in call(verb, "--help").stdout


def test_version_is_that_of_the_package() -> None:
    assert call("--version").stdout == f"edgeqdm {edgeqdm.__version__}\n"


def test_what_libraries_print_and_warn_of_is_dropped(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatty(*_: Any) -> Verification:
        print("chatter")
        warnings.warn("chatter", stacklevel=1)
        return VERIFICATION

    monkeypatch.setattr(pipeline, "verify", chatty)
    result = call("verify", "package", "--json")
    assert "chatter" not in result.output
    assert json.loads(result.stdout)["target"] == "onnxruntime"


def test_verbose_shows_what_libraries_print_but_not_on_stdout(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatty(*_: Any) -> Verification:
        print("chatter")
        return VERIFICATION

    monkeypatch.setattr(pipeline, "verify", chatty)
    result = call("verify", "package", "--json", "-v")
    assert "chatter" in result.stderr
    assert json.loads(result.stdout)["target"] == "onnxruntime"


def test_a_model_that_is_not_cached_is_hinted_the_option(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise ModelError("EQ-3139", "not in the cache", path="org/name", hint="load(...)")

    monkeypatch.setattr(edgeqdm.models.load, "load", absent)
    result = call("emit", "org/name", "-o", "out", "--quiet")
    assert result.exit_code == 3
    assert result.stderr.endswith(" - --online downloads it\n")


@pytest.mark.parametrize("names", [(), ("null",), ("conditioning", "other")])
def test_a_conditioning_file_with_other_tensors_is_refused(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    file = tmp_path / "c.safetensors"
    save_file({name: torch.zeros(1, 2, 3) for name in names}, file)
    with pytest.raises(InputError, match="holds") as refused:
        read_embeddings(file)
    assert refused.value.code == "EQ-3803"


def test_a_conditioning_file_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    file.write_bytes(b"not safetensors")
    with pytest.raises(InputError) as refused:
        read_embeddings(file)
    assert (refused.value.code, refused.value.path) == ("EQ-3802", str(file))


def test_a_missing_plan_is_an_input_error(calls: Calls) -> None:
    result = call("emit", "model", "-o", "out", "--plan", "gone.json", "--quiet")
    assert result.exit_code == 3
    assert "(gone.json)" in result.stderr


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", "from edgeqdm.cli import main; main()"]
    return subprocess.run(
        [*command, *arguments], stderr=subprocess.PIPE, text=True, check=False, **options
    )


def test_help_is_shown_without_torch_and_its_friends() -> None:
    script = (
        "import sys\n"
        "from edgeqdm.cli import app\n"
        "try:\n    app(['--help'])\n"
        "except SystemExit as ended:\n    assert ended.code == 0\n"
        "print(*sorted({'torch', 'diffusers', 'onnx', 'numpy', 'pydantic'} & set(sys.modules)))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert finished.stdout.startswith("Usage: edgeqdm")
    assert lines(finished.stdout)[-1] == ""


def test_an_unknown_folder_ends_with_3_and_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    finished = program("verify", str(gone), stdout=subprocess.PIPE)
    assert (finished.returncode, finished.stdout) == (3, "")
    (line,) = lines(finished.stderr)
    assert line.startswith("error[EQ-3703]: ")
    assert str(gone) in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_a_full_stdout_ends_with_7_and_one_line(argument: str) -> None:
    with open("/dev/full", "w") as full:
        finished = program(argument, stdout=full)
    assert finished.returncode == 7
    (line,) = lines(finished.stderr)
    assert "cannot be written: No space left on device" in line


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_closed_stdout_ends_with_7_and_one_line() -> None:
    finished = program("--version", preexec_fn=lambda: os.close(1))
    assert finished.returncode == 7
    assert lines(finished.stderr) == ["error[EQ-7802]: is closed (standard output)"]
