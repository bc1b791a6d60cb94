"""The runtime in a package refuses what `check_files` refuses, without this library."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
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
from edgeqdm.ir.model import Conditioning, Decoder, ModelInfo
from edgeqdm.ir.package import SCHEMA_VERSION, UNSEALED, Artifact, Manifest
from edgeqdm.numerics.solver import Table

CONTENTS = {"plan.json": b"{}\n", "weights.bin": bytes(range(16))}
MANIFEST = Manifest(
    edgeqdm_version="0.1.0",
    created="2026-01-01T00:00:00Z",
    target="onnxruntime",
    model=ModelInfo(
        name="tiny",
        family="UNet2DModel",
        sample_shape=(1, 8, 8),
        conditioning=Conditioning(kind="none"),
        decoder=Decoder(),
        layers=(),
        fingerprint="0" * 64,
    ),
    guidance=1.0,
    n_steps=2,
    program_sha256="0" * 64,
    plan_sha256="0" * 64,
    integer_layers=0,
    library_versions={},
    files={
        name: Artifact(sha256=hashlib.sha256(data).hexdigest(), size=len(data), role="model")
        for name, data in CONTENTS.items()
    },
    manifest_sha256=UNSEALED,
)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`run.py` as a module; what it does to the interpreter is undone afterwards."""
    monkeypatch.setitem(sys.modules, "playback", playback)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    source = files("edgeqdm.backends.onnxruntime").joinpath("templates/run.py")
    spec = importlib.util.spec_from_file_location("packaged_run", str(source))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert message == f"package is damaged: {', '.join(named)}"


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
