"""Profiles measured on this host, by the tool that devices run too."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from edgeqdm.errors import InputError, ResourceError
from edgeqdm.ir.profile import LatencyProfile
from edgeqdm.profile.kit import KIT, read_results

LONGEST_TEXT = 200
LONGEST_ERROR = 500
ASKED_FOR = 3
"""What the tool ends with where its last words say what to do."""
OWNED = {"EDGEQDM_BENCH_OWNED": "1"}
"""Has the tool end with this process, however that ends, by the pipe that is its input. A kit made
by an earlier version has a tool that does not know it: an option would stop that one."""
Progress = Callable[[int, int], None]
SECONDS, MAX_SECONDS = 1.0, 6.0


def check_text(field: str, text: str) -> None:
    """Raise InputError EQ-3507 unless a profile can hold this text; an empty name is none."""
    wrong = len(text) > LONGEST_TEXT or not (text.isascii() and text.isprintable())
    if wrong or (not text and field != "name"):
        raise InputError(
            "EQ-3507",
            f"{text[:40]!r} cannot stand in a profile",
            path=field,
            hint=f"give 1 to {LONGEST_TEXT} printable ASCII characters",
        )


def run_kit(
    kit: Path,
    *,
    threads: int = 1,
    power_mode: str = "unknown",
    name: str = "",
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> LatencyProfile:
    """Time a kit's graphs on this host, in a process of its own; a second call goes on.

    Args:
        kit: folder of `make_kit`.
        threads: of the runtime; with 1 it is CPU time, else elapsed time.
        power_mode: as it shall stand in the profile.
        name: of the device; default its processor.
        seconds: least per graph.
        progress: told of every graph in every round.

    Raises:
        InputError: if the folder is no kit.
        ResourceError: EQ-9501, if the tool fails; tells its last words.
    """
    if not (kit / KIT).is_file():
        raise InputError("EQ-3506", f"holds no {KIT}", path=kit, hint="`edgeqdm profile kit`")
    for field, text in (("name", name), ("power mode", power_mode)):
        check_text(field, text)
    mode = hashlib.sha256(f"{name}/{power_mode}".encode()).hexdigest()[:8]
    # The tool goes on only with results of the same name and mode.
    suffix = "" if (name, power_mode) == ("", "unknown") else f"-{mode}"
    out = kit / f"results-{threads}{suffix}.jsonl"
    command = [sys.executable, str(kit / "bench.py"), "--threads", str(threads)]
    command += ["--power-mode", power_mode, "--name", name, "--seconds", str(seconds)]
    command += ["--max-seconds", str(max(seconds, MAX_SECONDS)), "--out", str(out)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | OWNED,
    ) as tool:
        said = ""
        try:
            assert tool.stdout is not None
            for line in tool.stdout:
                said = line.strip() or said
                done, _, total = said.partition("/")
                if progress is not None and done.isdigit() and total.isdigit():
                    progress(int(done), int(total))
        except BaseException:
            tool.terminate()
            raise
    if tool.returncode:
        raise ResourceError(
            "EQ-9501",
            f"the tool that times kernels ended with {tool.returncode}: {said[:LONGEST_ERROR]}",
            path=kit,
            hint=None if tool.returncode == ASKED_FOR else "run it by hand: python bench.py",
        )
    return read_results(kit, out)
