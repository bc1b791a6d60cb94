"""The runtime in a package refuses what `check_files` refuses, without this library."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import runpy
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeqdm import pipeline
from edgeqdm.emit import playback
from edgeqdm.emit.integrity import check_files, seal_manifest
from edgeqdm.errors import (
    EdgeqdmError,
    InputError,
    OutputError,
    ResourceError,
    UnsupportedError,
    VerifyError,
)
from edgeqdm.ir.package import SCHEMA_VERSION, Artifact
from edgeqdm.numerics.solver import Table
from edgeqdm.testing.manifests import tiny_manifest

CONTENTS = {"model.ort": b"graph", "plan.json": b"{}\n", "weights.bin": bytes(range(16))}
MANIFEST = tiny_manifest(
    files={
        name: Artifact(sha256=hashlib.sha256(data).hexdigest(), size=len(data), role="model")
        for name, data in CONTENTS.items()
    }
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, data in CONTENTS.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "manifest.json").write_bytes(seal_manifest(MANIFEST))
    return tmp_path


def refusal(runtime: ModuleType, package: Path) -> str:
    with pytest.raises(runtime.RunError) as caught:
        runtime.check_hashes(package)
    assert caught.value.exit_code == VerifyError.exit_code
    return str(caught.value)


def test_runtime_reads_the_manifests_that_are_written_with_it(runtime: ModuleType) -> None:
    assert runtime.SCHEMA_VERSION == SCHEMA_VERSION


@pytest.mark.parametrize(
    ("names", "graphs"),
    [
        (["model.onnx", "plan.json"], {0: "model.onnx"}),
        (["a/model.onnx", "model.ort"], {0: "model.ort"}),
        (
            ["model.step0.onnx", "model.step12.onnx", "model.stepx.onnx"],
            {0: "model.step0.onnx", 12: "model.step12.onnx"},
        ),
        (["model.step3.onnx"], None),
        (["plan.json"], None),
    ],
)
def test_graphs_are_those_that_the_manifest_lists(
    runtime: ModuleType, names: list[str], graphs: dict[int, str] | None
) -> None:
    if graphs is not None:
        assert runtime.find_graphs(names) == graphs
        return
    with pytest.raises(runtime.RunError, match="no graph") as caught:
        runtime.find_graphs(names)
    assert caught.value.exit_code == VerifyError.exit_code


@pytest.mark.parametrize("version", ["1.22.1", "1.9.0", "0.30.0"])
def test_runtime_refuses_an_onnxruntime_that_is_too_old(
    runtime: ModuleType, package: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(runtime.ort, "__version__", version)
    with pytest.raises(runtime.RunError, match=f"onnxruntime {version} is too old") as caught:
        runtime.open_network(package, {0: "model.onnx"}, 1)
    assert caught.value.exit_code == UnsupportedError.exit_code


def test_both_runtimes_ask_for_the_same_onnxruntime(runtime: ModuleType) -> None:
    source = files("edgeqdm.backends.onnxruntime").joinpath("templates/cpp/src")
    text = source.joinpath("onnxruntime_library.cpp").read_text()
    oldest = ".".join(map(str, runtime.OLDEST_RUNTIME))
    assert f'oldest_library = "{oldest}.0"' in text


def test_runtime_accepts_an_untouched_package(runtime: ModuleType, package: Path) -> None:
    check_files(package)
    runtime.check_hashes(package)


@pytest.mark.parametrize("mask", [0x01, 0x02, 0x04, 0x10, 0x20, 0x80, 0xFF])
def test_runtime_refuses_every_changed_byte_of_the_manifest(
    runtime: ModuleType, package: Path, mask: int
) -> None:
    path = package / "manifest.json"
    sealed = path.read_bytes()
    for index in range(mask % 3, len(sealed), 3):
        changed = bytearray(sealed)
        changed[index] ^= mask
        path.write_bytes(changed)
        assert "manifest.json" in refusal(runtime, package)
    path.write_bytes(sealed)
    runtime.check_hashes(package)


def test_runtime_names_a_changed_manifest_beside_every_bad_file(
    runtime: ModuleType, package: Path
) -> None:
    path = package / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"2026", b"2027"))
    (package / "plan.json").write_bytes(b"[]\n")
    (package / "weights.bin").unlink()
    message = refusal(runtime, package)
    named = ("manifest.json (changed)", "plan.json (changed)", "weights.bin (missing)")
    assert message == f"package is damaged: {', '.join(named)} - copy it again"


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_runtime_refuses_a_manifest_of_another_version(
    runtime: ModuleType, package: Path, version: object
) -> None:
    path = package / "manifest.json"
    document = {**json.loads(path.read_bytes()), "schema_version": version}
    del document["manifest_sha256"]
    path.write_text(json.dumps(document))
    assert f"schema_version {version!r}, this runtime reads 1" in refusal(runtime, package)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [m],
        lambda m: {},
        lambda m: m | {"files": []},
        lambda m: m | {"files": {"plan.json": 3}},
        lambda m: m | {"manifest_sha256": 3},
        lambda m: m | {"manifest_sha256": ""},
        lambda m: m | {"manifest_sha256": "\ud800"},
        lambda m: m | {"manifest_sha256": m["plan_sha256"]},
        lambda m: {k: v for k, v in m.items() if k != "manifest_sha256"},
    ],
)
def test_runtime_refuses_a_manifest_of_another_form(
    runtime: ModuleType, package: Path, change: Callable[[Any], Any]
) -> None:
    path = package / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_bytes()))))
    assert "manifest.json" in refusal(runtime, package)


LABELS = {"kind": "label", "shape": [], "n_labels": 10, "null_label": None}
EMBEDDING = {"kind": "embedding", "shape": [2], "n_labels": 0, "null_label": None}
PROGRAM = {
    "timesteps": [900.0, 100.0],
    "integer_timesteps": True,
    "initial_sigma": 1.0,
    "input_scale": [1.0, 1.0],
    "sample_weights": [[0.9], [0.8]],
    "output_weights": [[0.1], [0.2]],
    "noise_std": [0.1, 0.0],
    "clip": None,
}
SessionRun = Callable[[Any, dict[str, Any]], list[Any]]
Main = Callable[..., tuple[int, str]]


def echo(_: Any, fed: dict[str, Any]) -> list[Any]:
    return [next(iter(fed.values()))]


class Session:
    """A session of three inputs that computes what a test asks for."""

    def __init__(self, run: SessionRun) -> None:
        self.run = run

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in ("sample", "step", "conditioning")]


@pytest.fixture
def main(
    runtime: ModuleType,
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Main:
    """Run the program on an untouched package: exit code and standard error."""

    def call(
        *arguments: str, kind: dict[str, Any] = LABELS, run: SessionRun = echo
    ) -> tuple[int, str]:
        player = playback.Player(
            table=Table.from_json(PROGRAM),
            guidance=1.0,
            conditioning=kind,
            decoder={"kind": "identity", "factor": 1},
            sample_shape=(1, 2, 2),
            label_names=(),
            null_embedding=None,
            golden_noise_rms=(0.1, 0.1),
        )
        monkeypatch.setattr(runtime, "PACKAGE", package)
        monkeypatch.setattr(playback, "open_player", lambda _: player)
        monkeypatch.setattr(runtime.ort, "InferenceSession", lambda *_, **__: Session(run))
        monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(package / "x.png"), *arguments])
        return runtime.main(), capsys.readouterr().err

    return call


def embedding_file(folder: Path, value: NDArray[Any]) -> str:
    path = folder / "e.npy"
    np.save(path, value)
    return str(path)


def test_runtime_draws_labels_and_embeddings(main: Main, tmp_path: Path) -> None:
    assert main("--label", "3,5", "--count", "2") == (0, "")
    assert main("--label", "3", "--count", "4") == (0, "")
    latents = tmp_path / "latents.npy"
    file = embedding_file(tmp_path, np.zeros((3, 2)))
    assert main("--embedding", file, "--latents", str(latents), kind=EMBEDDING) == (0, "")
    assert np.load(latents).shape == (3, 1, 2, 2)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--label=99999999999999999999", "label 99999999999999999999 is out of range 0..9"),
        ("--label=-1", "label -1 is out of range 0..9"),
        ("--label 3,5 --count 8", "--count 8 contradicts 2 labels"),
        ("--embedding e.npy --label 3", "--embedding decides alone"),
        ("--embedding e.npy --count 3", "--embedding decides alone"),
        ("--threads 0", "--threads must be at least 1"),
        ("--threads 257", "--threads must be at most 256"),
        ("--columns 0", "--columns must be at least 1"),
        ("--count 0", "--count must be at least 1"),
        ("--seed 18446744073709551616", "seed"),
    ],
)
def test_runtime_refuses_wrong_options_on_one_line(
    main: Main, arguments: str, message: str
) -> None:
    exit_code, shown = main(*arguments.split())
    assert exit_code == InputError.exit_code
    assert shown.startswith(f"error: {message}")
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04truncated", b"\x93NUMPY\x01\x00", b"text"])
def test_runtime_refuses_a_damaged_embedding_file(main: Main, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "e.npy"
    path.write_bytes(data)
    exit_code, shown = main("--embedding", str(path), kind=EMBEDDING)
    assert exit_code == InputError.exit_code
    assert shown.startswith(f"error: {path} is not a .npy file: ")
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (EMBEDDING, np.zeros(()), "does not hold one embedding per image"),
        (EMBEDDING, np.zeros((0, 2)), "does not hold one embedding per image"),
        (EMBEDDING, np.zeros((1, 2), np.int64), "holds int64, embeddings are floats"),
        (EMBEDDING, np.full((1, 2), 1e300), "holds NaN or a value beyond float32"),
        (EMBEDDING, np.zeros((1, 3)), "conditioning must be (1, 2), got (1, 3)"),
        (LABELS, np.zeros(1), "this model needs a label, not float32"),
    ],
)
def test_runtime_refuses_wrong_embeddings(
    main: Main, tmp_path: Path, kind: dict[str, Any], value: NDArray[Any], message: str
) -> None:
    exit_code, shown = main("--embedding", embedding_file(tmp_path, value), kind=kind)
    assert exit_code == InputError.exit_code
    assert message in shown


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (RuntimeError("first\nsecond"), 10, "error: internal: RuntimeError: first\n"),
        (MemoryError("x"), ResourceError.exit_code, "error: out of memory - draw fewer images"),
    ],
)
def test_a_failure_of_the_session_is_one_line(
    main: Main, error: Exception, exit_code: int, message: str
) -> None:
    def failing(*_: Any) -> list[Any]:
        raise error

    found, shown = main("--label", "3", run=failing)
    assert found == exit_code
    assert shown.startswith(message)
    assert len(shown.splitlines()) == 1


def test_a_full_disk_is_named_with_the_latents(
    main: Main, runtime: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replace = os.replace

    def full(source: str, target: Path) -> None:
        if target.suffix == ".npy":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(runtime.os, "replace", full)
    latents = tmp_path / "latents.npy"
    expected = f"error: cannot write {latents}: No space left on device\n"
    assert main("--latents", str(latents)) == (OutputError.exit_code, expected)
    assert not list(tmp_path.glob(".*"))


def test_what_is_no_regular_file_is_not_replaced(main: Main, tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for path in (fifo, link):
        expected = f"error: cannot write {path}: not a regular file; name another\n"
        assert main("--out", str(path)) == (OutputError.exit_code, expected)
        assert main("--latents", str(path)) == (OutputError.exit_code, expected)
    assert fifo.is_fifo()
    assert link.is_symlink()
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_results_go_where_links_lead(main: Main, tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "to" / "x.npy", tmp_path / "link.npy"
    target.parent.mkdir()
    link.symlink_to("to/x.npy")
    if exists:
        target.write_text("old")
    assert main("--latents", str(link)) == (0, "")
    assert link.is_symlink()
    assert np.load(target).shape == (10, 1, 2, 2)
    assert [p.name for p in target.parent.iterdir()] == ["x.npy"]


def test_two_results_are_not_one_file(main: Main, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("x.png")
    for name in ("x.png", "link"):
        exit_code, shown = main("--latents", str(tmp_path / name))
        assert exit_code == InputError.exit_code
        assert shown.startswith("error: --out and --latents are the same file: ")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_results_have_the_longest_names_and_the_mode_of_the_umask(
    main: Main, tmp_path: Path, mask: int, mode: int
) -> None:
    path = tmp_path / ("x" * 251 + ".npy")
    before = os.umask(mask)
    try:
        assert main("--latents", str(path)) == (0, "")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_impossible_outputs_are_refused_before_the_first_step(main: Main, tmp_path: Path) -> None:
    def failing(*_: Any) -> list[Any]:
        raise AssertionError

    path = tmp_path / "no" / "x.npy"
    expected = f"error: cannot write {path}: No such file or directory\n"
    for option in ("--out", "--latents"):
        assert main(option, str(path), run=failing) == (OutputError.exit_code, expected)


def test_an_interrupt_while_writing_leaves_nothing(
    main: Main, runtime: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime.os, "replace", interrupted)
    assert main() == (130, "")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["onnxruntime", "numpy"])
def test_a_missing_library_ends_with_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    source = files("edgeqdm.backends.onnxruntime").joinpath("templates/run.py")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(source))
    assert ended.value.code == UnsupportedError.exit_code
    expected = f"error: {name} is missing - pip install numpy onnxruntime\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("exit_code", "kind", "code"),
    [
        (2, InputError, "EQ-3702"),
        (3, InputError, "EQ-3702"),
        (4, UnsupportedError, "EQ-4701"),
        (7, OutputError, "EQ-7701"),
        (8, VerifyError, "EQ-8701"),
        (9, ResourceError, "EQ-9701"),
        (-9, ResourceError, "EQ-9701"),
        (1, EdgeqdmError, "EQ-0701"),
        (10, EdgeqdmError, "EQ-0701"),
        (-11, EdgeqdmError, "EQ-0701"),
    ],
)
def test_an_exit_code_of_the_runtime_becomes_the_error_it_stands_for(
    package: Path, exit_code: int, kind: type[EdgeqdmError], code: str
) -> None:
    script = package / "runtime" / "python" / "run.py"
    script.parent.mkdir(parents=True)
    end = f"os.kill(os.getpid(), {-exit_code})" if exit_code < 0 else f"sys.exit({exit_code})"
    script.write_text(f"import os, sys\nprint('error: why', file=sys.stderr, flush=True)\n{end}\n")
    with pytest.raises(EdgeqdmError) as caught:
        pipeline.run(package, "x.png", embedding="e.npy")
    assert (type(caught.value), caught.value.code) == (kind, code)
