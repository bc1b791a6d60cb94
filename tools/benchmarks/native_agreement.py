"""Does the C++ benchmark tool measure what bench.py measures?

    python tools/benchmarks/native_agreement.py build/bench/edgeqdm-bench -o agreement.json

Both tools time one kit on this machine, on the same CPUs, by turns: bench.py, edgeqdm-bench, and
again. `ratio` is edgeqdm-bench over bench.py, of the medians of one figure; `net` is the same less
what an empty graph takes, which is what a profile is used for. `python` and `native` are the spread
of one tool with itself, its last run over its first: ratios cannot agree better than that. Finished
runs in the work folder are kept, so an interrupted comparison goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import reports
import typer

from edgeqdm import load, tuning
from edgeqdm.ir.profile import LatencyProfile
from edgeqdm.profile.kit import KIT, read_results

TOOLS = ("python", "native")
LEAST_NET_US = 2.0
"""Below it a net time is mostly the clock and the call."""


def run_tool(
    name: str, tool: Path, kit: Path, out: Path, *, threads: int, seconds: float
) -> LatencyProfile:
    """One run over the whole kit."""
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    command = {
        "python": [sys.executable, str(kit / "bench.py")],
        "native": [str(tool.absolute()), str(kit), "--cpus", cpus],
    }[name]
    command += ["--threads", str(threads), "--seconds", str(seconds), "--out", str(out)]
    command += ["--max-seconds", str(6 * seconds)]
    subprocess.run(command, check=True)
    return read_results(kit, out)


def figures(profile: LatencyProfile) -> dict[str, float]:
    """Medians by what they are of, in microseconds."""
    found = {f"{e.key} at {e.precision}": e.timing.median_us for e in profile.entries}
    found |= {
        f"{b.kind} {'x'.join(map(str, b.shape))}": b.timing.median_us for b in profile.boundaries
    }
    found |= {f"whole {k}": w.timing.median_us for k, w in enumerate(profile.wholes)}
    for k, cost in enumerate(profile.phase_costs):
        found |= {
            f"phase {k} alone": cost.alone.median_us,
            f"phase {k} among": cost.among.median_us,
        }
    return found


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile."""
    p10, median, p90 = (float(x) for x in np.percentile(ratios, [10, 50, 90]))
    return {"n": len(ratios), "p10": p10, "median": median, "p90": p90}


def agreement(runs: dict[str, list[LatencyProfile]]) -> dict[str, Any]:
    """Ratios of the two tools, and of each with itself."""
    taken = {name: [figures(p) for p in profiles] for name, profiles in runs.items()}
    overhead = {
        name: float(np.median([p.overhead.median_us for p in profiles]))
        for name, profiles in runs.items()
    }
    rows = []
    for what in taken["python"][0]:
        us = {name: float(np.median([f[what] for f in taken[name]])) for name in TOOLS}
        net = {name: us[name] - overhead[name] for name in TOOLS}
        row: dict[str, Any] = {"what": what, **{f"{name}_us": us[name] for name in TOOLS}}
        row["ratio"] = us["native"] / us["python"]
        if min(net.values()) >= LEAST_NET_US:
            row["net"] = net["native"] / net["python"]
        rows.append(row)
    summary = {"ratio": spread([row["ratio"] for row in rows])}
    nets = [row["net"] for row in rows if "net" in row]
    if nets:
        summary["net"] = spread(nets)
    for name in TOOLS:
        first, last = taken[name][0], taken[name][-1]
        summary[name] = spread([last[what] / first[what] for what in first])
    reference = {
        name: float(np.median([us for p in profiles for us in p.protocol.reference_us]))
        for name, profiles in runs.items()
    }
    return {"summary": summary, "overhead_us": overhead, "reference_us": reference, "rows": rows}


def compared(
    tool: Path, kit: Path, work: Path, *, pairs: int, threads: int, seconds: float
) -> dict[str, Any]:
    """Both tools on a kit, by turns."""
    runs: dict[str, list[LatencyProfile]] = {name: [] for name in TOOLS}
    for k in range(pairs):
        for name in TOOLS:
            out = work / f"{name}-{threads}-{seconds:g}-{k}.jsonl"
            runs[name].append(run_tool(name, tool, kit, out, threads=threads, seconds=seconds))
    return agreement(runs)


def main(
    tool: Annotated[Path, typer.Argument(help="The program edgeqdm-bench.")],
    out: Annotated[Path, typer.Option("-o", "--out")],
    model: Annotated[str, typer.Option()] = "reference:unet-fmnist",
    kit: Annotated[Path | None, typer.Option(help="One that is there; else it is made.")] = None,
    work: Annotated[Path, typer.Option()] = Path("build/agreement"),
    pairs: Annotated[int, typer.Option(min=1, help="Runs of each tool.")] = 2,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Least per figure.")] = 1.0,
    wholes: Annotated[int, typer.Option()] = 4,
) -> None:
    """Time, compare and write down."""
    work.mkdir(parents=True, exist_ok=True)
    if kit is None:
        kit = work / "kit"
        if not (kit / KIT).is_file():
            tuning.write_kit(load(model, steps=20), kit, wholes=wholes)
    found = compared(tool, kit, work, pairs=pairs, threads=threads, seconds=seconds)
    report = {
        **reports.head("native_agreement.py"),
        "kit": json.loads((kit / KIT).read_text())["model_name"],
        "pairs": pairs,
        "threads": threads,
        "seconds": seconds,
        **found,
    }
    reports.write(report, out)
    for name, part in found["summary"].items():
        typer.echo(
            f"{name:8} n {part['n']:4}  p10 {part['p10']:.4f}  median {part['median']:.4f}  "
            f"p90 {part['p90']:.4f}"
        )


if __name__ == "__main__":
    typer.run(main)
