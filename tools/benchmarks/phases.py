"""Memory and time of one graph with 1 to 4 phases.

    python tools/benchmarks/phases.py -o docs/benchmarks/phases.json

W8A8; in every phase but the first a twentieth of the integer layers, others each time, are W4A8.
All else is shared. Each graph is loaded in a process of its own, evaluated at every step, and what
the process then holds beyond what it held before is told: resident, file mappings included, and
anonymous. Times are CPU time of one thread, all graphs interleaved in one process, at step 1.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime as ort
import ort_forms
import reports
import torch
import typer

from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.backends.onnxruntime.forms import GRAPH
from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit.package import exportable
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.profile.opkeys import evaluation_batch
from edgeqdm.quantize.quantizer import quantize
from edgeqdm.stages import rule_plan

OTHER = Precision("w4a8")
SHARE = 0.05
MOST_PHASES = 4
MIB = 2**20


def in_phases(rule: DeploymentPlan, n: int) -> DeploymentPlan:
    """The rule's plan in n phases of about equal length, each with layers of its own at `OTHER`."""
    (only,) = rule.phases
    layers = only.integer_layers()
    count = max(1, round(SHARE * len(layers)))
    phases = []
    for p in range(n):
        # From the middle of the network on, where the layers are the largest.
        first = len(layers) // 2 + (p - 1) * count
        changed = {layers[k % len(layers)] for k in range(first, first + count)} if p else set()
        assigned = tuple(
            a.model_copy(update={"precision": OTHER}) if a.layer in changed else a
            for a in only.layers
        )
        start, stop = p * rule.n_steps // n, (p + 1) * rule.n_steps // n
        phases.append(only.model_copy(update={"start": start, "stop": stop, "layers": assigned}))
    return rule.model_copy(update={"phases": tuple(phases)})


def emit_all(denoiser: Denoiser, folder: Path) -> dict[int, Path]:
    """A graph for every number of phases."""
    rule = rule_plan(denoiser)
    trajectories = collect_trajectories(denoiser, 2, seed=0)
    seen = observe(denoiser, trajectories, rule.phases[0].integer_layers())
    found = {}
    for n in range(1, MOST_PHASES + 1):
        quantized = quantize(denoiser, in_phases(rule, n), seen, ranges="minmax")
        found[n] = folder / f"{n}.onnx"
        found[n].write_bytes(OnnxRuntimeBackend().emit(exportable(quantized))[GRAPH].data)
    return found


def held() -> tuple[float, float]:
    """Resident and anonymous memory of this process, in MiB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return sizes["Rss"], sizes["Anonymous"]


def load_and_run(graph: Path, n_steps: int, batch: int) -> dict[str, float]:
    """What a session adds to this process."""
    before = held()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    fed: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else batch for size in value.shape]
        kind = np.float32 if value.type == "tensor(float)" else np.int64
        fed[value.name] = np.zeros(shape, kind)
    loaded = held()
    for step in range(n_steps):
        session.run(None, {**fed, "step": np.array(step)})
    after = held()
    return {
        "loaded_resident_mib": loaded[0] - before[0],
        "loaded_anonymous_mib": loaded[1] - before[1],
        "resident_mib": after[0] - before[0],
        "anonymous_mib": after[1] - before[1],
    }


def in_own_process(graph: Path, n_steps: int, batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", json.dumps([str(graph), n_steps, batch])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Rows by number of phases, and their ratios to one phase."""
    denoiser = ort_forms.open_model(name)
    batch = evaluation_batch(denoiser)
    with tempfile.TemporaryDirectory() as folder:
        graphs = emit_all(denoiser, Path(folder))
        models = {str(n): onnx.load(path) for n, path in graphs.items()}
        us = ort_forms.timed(models, batch, rounds)
        rows = {}
        for n, path in graphs.items():
            memory = in_own_process(path, denoiser.program.n_steps, batch)
            forks = sum(node.op_type == "If" for node in models[str(n)].graph.node)
            rows[str(n)] = {
                "file_mib": path.stat().st_size / MIB,
                "forks": forks,
                "us": us[str(n)],
                **memory,
            }
    first = rows["1"]
    for row in rows.values():
        for what in ("us", "resident_mib", "anonymous_mib", "file_mib"):
            row[f"{what}_ratio"] = round(row[what] / first[what], 4)
    return {"batch": batch, "phases": rows}


def main(
    out: Annotated[Path, typer.Option("-o", "--out")] = Path("docs/benchmarks/phases.json"),
    model: Annotated[list[str], typer.Option()] = list(ort_forms.MODELS),  # noqa: B006
    rounds: Annotated[int, typer.Option(min=30)] = 60,
    task: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Emit, load and time every number of phases."""
    if task:
        graph, n_steps, batch = json.loads(task)
        print(json.dumps(load_and_run(Path(graph), n_steps, batch)))
        return
    torch.set_num_threads(1)
    report = {
        **reports.head("phases.py"),
        "models": {name: measure(name, rounds) for name in model},
    }
    reports.write(report, out)


if __name__ == "__main__":
    typer.run(main)
