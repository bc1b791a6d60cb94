"""Compiles the C++ runtime for tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from edgeqdm.emit.render import cpp_runtime, cpp_sources
from edgeqdm.ir.package import ScheduleFile

DEPS_VARIABLE = "EDGEQDM_NATIVE_DEPS"
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
STANDARD = ("-std=c++17", "-ffp-contract=off")


def native_deps(root: Path) -> Path | None:
    """Folder with `include/onnxruntime_c_api.h`, made by tools/native_deps.sh, if there is one."""
    folder = Path(os.environ.get(DEPS_VARIABLE) or root / "build" / "native")
    return folder if (folder / "include" / "onnxruntime_c_api.h").exists() else None


def write_cpp(folder: Path, schedule: ScheduleFile) -> Path:
    """Write the sources that every target shares, as in a package; returns their folder."""
    for name, text in cpp_runtime(schedule).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "runtime" / "cpp"


def write_target(folder: Path, backend: str) -> None:
    """Write the sources of one target beside them."""
    for name, text in cpp_sources(files(f"edgeqdm.backends.{backend}").joinpath("templates/cpp")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def compile_cpp(out: Path, sources: Iterable[Path], *options: str, compiler: str = "c++") -> Path:
    """Compile and link in one call; the compiler's words are in the error if it fails."""
    command = [compiler, *STANDARD, *map(str, sources), *options, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return out
