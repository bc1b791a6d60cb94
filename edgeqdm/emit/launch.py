"""Sampling with a package's own runtime, in a process that cannot import torch."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from edgeqdm.errors import (
    EdgeqdmError,
    InputError,
    OutputError,
    ResourceError,
    UnsupportedError,
    VerifyError,
)


def run(
    package: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    label: str | None = None,
    count: int | None = None,
    embedding: str | Path | None = None,
    threads: int = 1,
) -> str:
    """Sample with a package's own runtime, in a process that cannot import torch.

    Args:
        package: folder of the package.
        out: PNG file to write.
        seed: of the noise.
        label: label or labels, by number or name, comma-separated; default all once.
        count: number of images.
        embedding: `.npy` file with one embedding per image, for models that take embeddings.
        threads: of the runtime.

    Returns:
        The runtime's one-line report.
    """
    arguments = ["--seed", str(seed), "--out", str(out), "--threads", str(threads)]
    arguments += [] if label is None else ["--label", label]
    arguments += [] if count is None else ["--count", str(count)]
    arguments += [] if embedding is None else ["--embedding", str(embedding)]
    return run_package(Path(package), arguments)


def run_package(package: Path, arguments: list[str]) -> str:
    """Run a package's `run.py` where torch cannot be imported; raises as its exit code says."""
    script = package / "runtime" / "python" / "run.py"
    if not script.is_file():
        found = "not a package: no runtime in it" if package.is_dir() else "no such package"
        raise InputError("EQ-3701", found, path=package, hint="give a folder that emit made")
    block = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    finished = subprocess.run(
        [sys.executable, "-c", block, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
        raise _runtime_error(finished.returncode, lines[-1].removeprefix("error: "), package)
    return finished.stdout.strip()


def _runtime_error(exit_code: int, message: str, package: Path) -> EdgeqdmError:
    if exit_code in (2, InputError.exit_code):
        return InputError("EQ-3702", message, path=package, hint="see the options of `run`")
    if exit_code == UnsupportedError.exit_code:
        return UnsupportedError("EQ-4701", message, path=package)
    if exit_code == OutputError.exit_code:
        return OutputError("EQ-7701", message)
    if exit_code == VerifyError.exit_code:
        return VerifyError("EQ-8701", message, path=package, hint="emit or copy it again")
    if exit_code in (ResourceError.exit_code, -signal.SIGKILL):
        return ResourceError("EQ-9701", message, path=package, hint="draw fewer images at once")
    return EdgeqdmError("EQ-0701", message, path=package)
