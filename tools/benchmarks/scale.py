"""Do large models go through, how long does every stage take, and how much memory?

    python tools/benchmarks/scale.py -o docs/benchmarks/scale.json

DiT-XL/2 and the UNet of Stable Diffusion 1.5, with random weights: nothing is downloaded and no
image is judged. Every model and precision runs in a process of its own, from loading to the written
package, and its package is verified in another one. Finished rows of the same commit, size and
settings are kept, so an interrupted run goes on; rows that failed are tried again.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import reports
import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from rich.console import Console
from rich.table import Table

from edgeqdm.backends import load_backend
from edgeqdm.bench.compare import folder_bytes
from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit.package import emit_package
from edgeqdm.emit.verify import verify_package
from edgeqdm.ir.precision import TABLE, Precision
from edgeqdm.models.load import load
from edgeqdm.quantize.quantizer import assemble, initialise
from edgeqdm.quantize.store import save_quantized
from edgeqdm.stages import rule_plan

TARGET = "onnxruntime"
EMBEDDING = Precision("w8")
LIMIT_GIB = 20.0
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Model:
    """An architecture in three sizes, and the precisions of its body."""

    family: type[Any]
    config: Mapping[str, Any]
    smaller: Mapping[str, Mapping[str, Any]]
    precisions: tuple[str, ...]
    embeddings: tuple[int, int] | None = None

    def sized(self, size: str) -> dict[str, Any]:
        return {**self.config, **self.smaller.get(size, {})}


MODELS = {
    "dit-xl-2": Model(
        DiTTransformer2DModel,
        {
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "patch_size": 2,
            "sample_size": 32,
            "num_embeds_ada_norm": 1000,
        },
        {
            "quarter": {"num_layers": 7},
            "tiny": {
                "num_layers": 1,
                "num_attention_heads": 2,
                "sample_size": 8,
                "num_embeds_ada_norm": 10,
            },
        },
        ("w8a8", "w4g128a8dyn"),
    ),
    "sd15-unet": Model(
        UNet2DConditionModel,
        {
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "sample_size": 64,
            "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        },
        {
            "quarter": {"block_out_channels": (160, 320, 640, 640)},
            "tiny": {
                "block_out_channels": (32, 32, 32, 32),
                "layers_per_block": 1,
                "cross_attention_dim": 32,
                "sample_size": 16,
            },
        },
        ("w8a8", "w4a8"),
        embeddings=(77, 768),
    ),
}


@dataclass(frozen=True)
class Stage:
    """What one stage took; the peak is that of the whole process while the stage ran."""

    name: str
    wall_minutes: float
    cpu_minutes: float
    peak_gib: float
    """Largest resident memory, file mappings included."""
    end_gib: float
    """Resident memory when the stage ended."""


class Stages:
    """Measures stages that follow each other; beginning one ends the one before."""

    def __init__(self, title: str) -> None:
        self.done: list[Stage] = []
        self.own_peaks = True
        self._title = title
        self._running: tuple[str, float, float] | None = None

    def begin(self, name: str) -> None:
        self.end()
        self.own_peaks &= reset_peak()
        self._running = (name, time.perf_counter(), time.process_time())

    def end(self) -> None:
        if self._running is None:
            return
        name, wall, cpu = self._running
        self._running = None
        memory = resident_gib()
        minutes = (time.perf_counter() - wall) / 60, (time.process_time() - cpu) / 60
        stage = Stage(
            name, round(minutes[0], 3), round(minutes[1], 3), memory["VmHWM"], memory["VmRSS"]
        )
        self.done.append(stage)
        print(
            f"{self._title}: {name} {60 * minutes[0]:.0f} s, peak {stage.peak_gib:.2f} GiB, "
            f"left {stage.end_gib:.2f} GiB",
            file=sys.stderr,
            flush=True,
        )

    def report(self) -> dict[str, Any]:
        self.end()
        return {
            "stages": [asdict(stage) for stage in self.done],
            "peak_gib": max(stage.peak_gib for stage in self.done),
            "wall_minutes": round(sum(stage.wall_minutes for stage in self.done), 2),
            "cpu_minutes": round(sum(stage.cpu_minutes for stage in self.done), 2),
            "peaks_reset_between_stages": self.own_peaks,
        }


def reset_peak() -> bool:
    """Start a new peak of resident memory; False where the system does not permit it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_gib() -> dict[str, float]:
    """`VmHWM`, the peak, and `VmRSS`, the present."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        return {"VmHWM": round(peak, 3), "VmRSS": round(peak, 3)}
    fields = dict(line.split(":", 1) for line in lines)
    return {k: round(int(fields[k].split()[0]) * 1024 / GIB, 3) for k in ("VmHWM", "VmRSS")}


class StagedBackend:
    """A backend that begins a stage where it lowers the network, and the next one after."""

    def __init__(self, backend: Any, stages: Stages) -> None:
        self._backend, self._stages = backend, stages

    def emit(self, model: Any) -> Any:
        self._stages.begin("lower")
        files = self._backend.emit(model)
        self._stages.begin("write")
        return files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def build(model: Model, size: str, folder: Path) -> None:
    """A diffusers folder with random weights."""
    if (folder / "scheduler" / "scheduler_config.json").exists():
        return
    torch.manual_seed(0)
    network = model.family(**model.sized(size))
    network.save_pretrained(folder / "network")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")


def load_random(model: Model, size: str, folder: Path, steps: int) -> Any:
    conditioning = None
    if model.embeddings is not None:
        shape = (4, model.embeddings[0], model.sized(size)["cross_attention_dim"])
        conditioning = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return load(folder / "network", steps=steps, guidance=1.0, conditioning=conditioning)


def measure(
    name: str, precision: str, size: str, steps: int, samples: int, folder: Path
) -> dict[str, Any]:
    """One row: from the weights on disk to a package in `folder`."""
    model, stages = MODELS[name], Stages(f"{name} {precision}")
    stages.begin("load")
    denoiser = load_random(model, size, folder.parent, steps)
    stages.begin("trajectories")
    trajectories = collect_trajectories(denoiser, samples)
    stages.begin("observe")
    observed = observe(denoiser, trajectories, tuple(x.name for x in denoiser.info.layers))
    stages.begin("plan")
    plan = rule_plan(denoiser, TARGET, body=Precision(precision), embedding=EMBEDDING)
    stages.begin("quantize")
    parameters = initialise(denoiser, plan, observed)
    stages.begin("assemble")
    quantized = assemble(denoiser, plan, parameters)
    stages.begin("store")
    stored = folder / "quantized.safetensors"
    save_quantized(quantized, stored)
    stages.begin("golden run")
    package = folder / "package"
    backend: Any = StagedBackend(load_backend(TARGET), stages)
    emit_package(quantized, backend, package, force=True)
    report = stages.report()
    parameters_of = denoiser.module.parameters()
    n_parameters = sum(p.numel() for p in parameters_of)
    return {
        **report,
        "parameters": n_parameters,
        "float32_mib": _mib(4 * n_parameters),
        "stored_mib": _mib(stored.stat().st_size),
        "package_mib": _mib(folder_bytes(package)),
        "graph_mib": _mib((package / "model.onnx").stat().st_size),
        "layers": len(denoiser.info.layers),
        "integer_layers": plan.n_integer_layers,
        "tables": sum(a.precision == TABLE for a in plan.phases[0].layers),
    }


def check(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """Verify the package of a row, which torch has no part in."""
    stages = Stages(f"{name} {precision}")
    backend = load_backend(TARGET)
    stages.begin("open")
    backend.open(folder / "package")
    stages.begin("verify")
    found = verify_package(folder / "package", backend)
    report = stages.report()
    return {
        **report,
        "integer_kernels": found.kernels.integer,
        "planned_integer_layers": found.planned,
        "golden_deviation": max(found.deviation),
    }


def _mib(n_bytes: int) -> float:
    return round(n_bytes / MIB, 1)


def in_own_process(task: str, arguments: dict[str, Any], threads: int) -> dict[str, Any]:
    """The result of a task of this file in a fresh interpreter; its error as `{"error": ...}`."""
    finished = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps([task, arguments, threads])],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},
    )
    if finished.returncode:
        return {"error": finished.stdout.strip() or f"exit code {finished.returncode}"}
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def do_task(text: str) -> None:
    """What a fresh interpreter does for `in_own_process`."""
    task, given, threads = json.loads(text)
    torch.set_num_threads(threads)
    folder = Path(given.pop("folder"))
    tasks: dict[str, Callable[..., dict[str, Any] | None]] = {
        "build": lambda name, size: build(MODELS[name], size, folder),
        "measure": lambda **rest: measure(**rest, folder=folder),
        "check": lambda **rest: check(**rest, folder=folder),
    }
    try:
        result = tasks[task](**given)
    # A stage that fails, for whatever reason, is a result.
    except Exception as error:
        print(f"{type(error).__name__}: {error}"[:500])
        raise
    print(json.dumps(result or {}))


def show(rows: Mapping[str, Any]) -> None:
    """Print one line per stage."""
    console = Console(width=110)
    for name, row in rows.items():
        table = Table(title=name)
        for column in ("stage", "wall min", "CPU min", "peak GiB"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for part in (row, row.get("check", {})):
            for stage in part.get("stages", []):
                values = (stage["wall_minutes"], stage["cpu_minutes"], stage["peak_gib"])
                table.add_row(stage["name"], *(f"{value:.2f}" for value in values))
        console.print(table)
        for part in (row, row.get("check", {})):
            if "error" in part:
                console.print(f"{name}: failed: {part['error']}", markup=False)


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="JSON to write")] = Path(
        "build/scale.json"
    ),
    model: Annotated[list[str], typer.Option(help="repeatable")] = list(MODELS),  # noqa: B006
    size: Annotated[str, typer.Option(help="full, quarter or tiny")] = "full",
    steps: Annotated[int, typer.Option(help="DDIM steps")] = 2,
    samples: Annotated[int, typer.Option(help="calibration trajectories")] = 2,
    threads: Annotated[int, typer.Option(help="of torch")] = 2,
    work: Annotated[Path, typer.Option(help="weights and packages")] = Path("build/scale"),
    keep: Annotated[bool, typer.Option(help="leave weights and packages there")] = False,
    task: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure every model at every one of its precisions and write the rows as JSON."""
    if task:
        return do_task(task)
    check_size(size)
    settings = {"size": size, "steps": steps, "samples": samples, "threads": threads}
    head = {"commit": reports.commit(), "machine": reports.machine(), "settings": settings}
    result = kept(out, head)
    # Every model at its first precision before any at its second.
    by_model = [[(name, p) for p in MODELS[name].precisions] for name in model]
    todo = [row for same in zip(*by_model, strict=True) for row in same]
    started, done = time.perf_counter(), 0
    for number, (name, precision) in enumerate(todo, start=1):
        if is_finished(result["rows"].get(f"{name} {precision}", {})):
            continue
        left = (time.perf_counter() - started) / max(done, 1) * (len(todo) - number + 1) / 60
        eta = f", about {left:.0f} min left" if done else ""
        print(f"{number}/{len(todo)} {name} {precision}{eta}", file=sys.stderr, flush=True)
        row = run_row(name, precision, settings, work / f"{name}-{size}")
        result["rows"][f"{name} {precision}"] = row
        done += 1
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    show(result["rows"])
    if not keep:
        for name in model:
            shutil.rmtree(work / f"{name}-{size}", ignore_errors=True)
    return None


def check_size(size: str) -> None:
    """Raise BadParameter unless the models come in this size."""
    known = ("full", *dict.fromkeys(size for model in MODELS.values() for size in model.smaller))
    if size not in known:
        raise typer.BadParameter(f"there is no size {size!r}; known: {', '.join(known)}")


def is_finished(row: Mapping[str, Any]) -> bool:
    """Whether a row was measured and its package verified; any other is tried again."""
    return "check" in row and "error" not in row["check"]


def kept(out: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run under the same conditions, or none."""
    fresh = {"command": " ".join(["python", *sys.argv]), **head, "rows": {}}
    if not out.exists():
        return fresh
    found = json.loads(out.read_text())
    same = all(found.get(key) == value for key, value in head.items())
    return {**fresh, "rows": found["rows"]} if same else fresh


def run_row(name: str, precision: str, settings: dict[str, Any], home: Path) -> dict[str, Any]:
    """Build where needed, measure and verify, each in a process of its own."""
    threads, folder = settings["threads"], home / precision
    given = {"name": name, "folder": str(home), "size": settings["size"]}
    built = in_own_process("build", given, threads)
    if "error" in built:
        return built
    folder.mkdir(parents=True, exist_ok=True)
    given |= {"folder": str(folder), "precision": precision}
    rest = {key: settings[key] for key in ("steps", "samples")}
    row = in_own_process("measure", {**given, **rest}, threads)
    if "error" not in row:
        row["within_limit"] = row["peak_gib"] <= LIMIT_GIB
        del given["size"]
        row["check"] = in_own_process("check", given, threads)
    return row


if __name__ == "__main__":
    typer.run(main)
