"""What every benchmark's result says of itself: command, commit and machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

GIB = 2**30
LIBRARIES = ("torch", "diffusers", "onnx", "onnxruntime")


def head(script: str) -> dict[str, Any]:
    """The first fields of a report of this script."""
    command = " ".join(["python", f"tools/benchmarks/{script}", *sys.argv[1:]])
    return {"command": command, "commit": commit(), "machine": machine()}


def commit() -> str:
    """Hash of the measured tree, marked where files differ from it."""

    def git(*arguments: str) -> str:
        command, folder = ["git", *arguments], Path(__file__).parents[2]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        return done.stdout.strip()

    # The output is of no influence and may be one of the tracked files.
    dirty = bool(git("status", "--porcelain", "--untracked-files=no", "--", ":!docs"))
    return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")


def machine() -> dict[str, Any]:
    """This machine and its libraries."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def write(report: dict[str, Any], out: Path) -> None:
    """As indented JSON, in a folder that is made where there is none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
