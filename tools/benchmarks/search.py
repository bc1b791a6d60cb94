"""What the search finds, beside simpler ways to spend as many images.

    python tools/benchmarks/search.py run -o docs/benchmarks/search.json
    python tools/benchmarks/search.py remeasure -o docs/benchmarks/search.json

Every method may draw the same number of images and is judged by the hypervolume of its front:
predicted latency against mean image SQNR, up to the float network's latency and down to
`LEAST_DB`. `uniform` is one precision for all layers; `greedy` lowers precisions in the order of
their measured damage, as automatic mixed precision in AIMET does; `random` and `cold` are Optuna's
RandomSampler and TPESampler without a start; `ladder` is the optima of the additive model alone;
`search` is what `edgeqdm search` does, with one phase and with up to three. `greedy`, `ladder` and
`search` use sensitivities, whose cost is told apart, in images.

A seed decides the noise of the images and the sampler; calibration and sensitivities are shared.
Finished runs in the file are not repeated. `remeasure` emits plans and measures them on this
machine, on images that no search saw, beside ONNX Runtime's own quantizers.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import peers
import reports
import torch
import typer

from edgeqdm import load, pipeline, searching
from edgeqdm.backends import load_backend
from edgeqdm.bench.compare import Variant, compare, folder_bytes
from edgeqdm.emit import playback
from edgeqdm.emit.writer import write_file_atomically
from edgeqdm.errors import NumericalError
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, Precision
from edgeqdm.ir.report import BenchReport
from edgeqdm.ir.search import SearchSettings
from edgeqdm.ir.sensitivity import SensitivityReport
from edgeqdm.profile.adopt import read_profile
from edgeqdm.profile.requests import DEFAULT_PRECISIONS
from edgeqdm.quantize.quantizer import QuantizedDenoiser
from edgeqdm.search.evaluate import Decibels, Evaluator, pooled_db
from edgeqdm.search.space import Candidate
from edgeqdm.search.study import (
    MAX_IDLE,
    Limits,
    NumberedSampler,
    Objective,
    Pricing,
    front,
    hypervolume,
)
from edgeqdm.search.warm import additive, ladder, rungs_for

MODELS = ("unet-fmnist", "dit-fmnist")
METHODS = ("uniform", "greedy", "random", "cold", "ladder", "search", "search, 3 phases")
LEAST_DB = 20.0
RUNGS = (4, 16)
STEPS = 20
SLOWER = 1.05
CONTENDERS = 6
COPY = ", copy "
SHARES = (0.5, 0.52, 0.55, 0.6, 0.7)
"""Of the float network's latency, that fronts are compared at."""
app = typer.Typer()


class Counting:
    """Judges, and counts the images it draws."""

    def __init__(self, judge: Evaluator) -> None:
        self.judge, self.images = judge, 0

    def quantized(self, plan: DeploymentPlan) -> QuantizedDenoiser:
        return self.judge.quantized(plan)

    def image_sqnr_db(self, quantized: QuantizedDenoiser, images: range) -> Decibels:
        self.images += len(images)
        return self.judge.image_sqnr_db(quantized, images)


def task_of(name: str, profile: str, work: Path, *, phases: int) -> searching.Task:
    """What `edgeqdm search` would make, calibrated once for all seeds."""
    denoiser = load(f"reference:{name}", steps=STEPS)
    settings = SearchSettings(precisions=DEFAULT_PRECISIONS, phases=phases, images=RUNGS)
    adopted = read_profile(profile).profile
    return searching.make_task(denoiser, work / name, adopted, settings)


def damage_of(task: searching.Task, progress: Any = None) -> SensitivityReport:
    return searching.sensitivity(
        task.denoiser,
        task.observations,
        searching.variants(task.space),
        images=task.settings.sensitivity_images,
        ranges=task.settings.ranges,
        work=task.folder / searching.KEPT,
        progress=progress,
    )


def greedy(pricing: Pricing, damage: SensitivityReport, n: int) -> list[Candidate]:
    """From float down: the faster precision of least damage first; `n` points along the way."""
    space, model = pricing.space, additive(pricing, damage, (0,))
    moves = sorted(
        (float(model.damage[0][g][c]), g, c)
        for g, group in enumerate(space.groups)
        for c in range(len(group.choices))
    )
    current = [group.choices.index(FP32) for group in space.groups]
    points, fastest = [], pricing.price(space.uniform(FP32)).latency_us
    for _, g, c in moves:
        tried = [*current[:g], c, *current[g + 1 :]]
        chosen = tuple(group.choices[k] for group, k in zip(space.groups, tried, strict=True))
        latency = pricing.price(Candidate((0,), (chosen,))).latency_us
        if latency < fastest:
            current, fastest = tried, latency
            points.append(Candidate((0,), (chosen,)))
    places = np.linspace(0, len(points) - 1, min(n, len(points))).round().astype(int)
    return [points[k] for k in dict.fromkeys(places.tolist())]


def starts_of(
    method: str, pricing: Pricing, damage: SensitivityReport, trials: int
) -> list[Candidate]:
    """What a method is told to begin with."""
    uniform = [pricing.space.uniform(precision) for precision in DEFAULT_PRECISIONS]
    if method == "uniform":
        return uniform
    if method == "greedy":
        return [*uniform, *greedy(pricing, damage, max(0, trials - len(uniform)))]
    if method in ("random", "cold"):
        return []
    n = max(0, trials - len(uniform)) if method == "ladder" else rungs_for(trials)
    return [candidate for _, candidate in ladder(pricing, damage, limits=Limits(), n=n)]


def run_method(
    method: str, task: searching.Task, damage: SensitivityReport, seed: int, trials: int
) -> dict[str, Any]:
    """Fronts and hypervolume of one method with one seed."""
    judge = Counting(
        Evaluator(
            task.denoiser,
            task.observations,
            seed=searching.JUDGE_SEEDS + seed,
            n_images=RUNGS[-1],
            work=task.folder / searching.KEPT,
        )
    )
    space, pricing = task.space, task.pricing
    objective = Objective(pricing, judge, Limits(), RUNGS)
    starts = starts_of(method, pricing, damage, trials)
    sampler = "RandomSampler" if method == "random" else "TPESampler"
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.sampler = NumberedSampler(sampler, seed)
    for candidate in starts:
        study.enqueue_trial(space.params(candidate))
    fixed = method in ("uniform", "greedy", "ladder")
    idle = 0
    while judge.images < trials * RUNGS[-1] and idle < MAX_IDLE and not (fixed and _done(study)):
        before = judge.images
        study.optimize(objective, n_trials=1, catch=(NumericalError,))
        idle = 0 if judge.images > before else idle + 1
    found = front(study)
    float_ms = pricing.price(space.uniform(FP32)).latency_us / 1e3
    points = [(t.values[0], t.values[1]) for t in found]
    return {
        "hypervolume": hypervolume(points, slowest_ms=float_ms, least_db=LEAST_DB),
        "images": judge.images,
        "trials": len(study.trials),
        "front": [
            {
                "ms": t.values[0],
                "db": t.values[1],
                "pooled_db": pooled_db(t.user_attrs["image_db"]),
                "bytes": t.user_attrs["disk_bytes"],
                "phases": t.user_attrs["phases"],
                **written(space.candidate(t.params)),
            }
            for t in found
        ],
    }


def written(candidate: Candidate) -> dict[str, Any]:
    """A candidate as a file holds it: precisions of the groups, one text per phase."""
    rows = [" ".join(row) for row in candidate.precisions]
    return {"starts": list(candidate.starts), "precisions": rows}


def read(point: dict[str, Any]) -> Candidate:
    """The candidate that was `written`."""
    rows = [tuple(map(Precision, row.split())) for row in point["precisions"]]
    return Candidate(tuple(point["starts"]), tuple(rows))


def _done(study: optuna.Study) -> bool:
    return all(t.state is not optuna.trial.TrialState.WAITING for t in study.trials)


Report = dict[str, Any]


def _load(out: Path) -> Report:
    return json.loads(out.read_text()) if out.exists() else {"runs": {}, "cost": {}}


def _save(out: Path, report: Report) -> None:
    report["machine"] = reports.machine()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(out, (json.dumps(report, indent=1) + "\n").encode())


def cost_of(task: searching.Task, damage: SensitivityReport, trials: int) -> dict[str, float]:
    """What all methods share: the float network's latency, and sensitivities beside the budget."""
    steps = STEPS + sum(STEPS - r.start for r in damage.ranges)
    uniform = task.space.uniform(FP32)
    return {
        "float_ms": task.pricing.price(uniform).latency_us / 1e3,
        "sensitivity_variants": len(damage.entries),
        "sensitivity_in_images": len(damage.entries) * damage.images * steps / STEPS,
        "budget_in_images": trials * RUNGS[-1],
    }


@app.command()
def run(
    out: Annotated[Path, typer.Option("-o", "--out")] = Path("docs/benchmarks/search.json"),
    profile: Annotated[str, typer.Option()] = "amd_epyc_onnxruntime_1t",
    work: Annotated[Path, typer.Option()] = Path("build/search"),
    model: Annotated[list[str], typer.Option()] = list(MODELS),  # noqa: B006
    method: Annotated[list[str], typer.Option()] = list(METHODS),  # noqa: B006
    seeds: Annotated[int, typer.Option()] = 3,
    trials: Annotated[int, typer.Option()] = 40,
) -> None:
    """Run what the file does not have yet."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Of the code that runs, whatever is committed meanwhile.
    commit = reports.commit()
    for name in model:
        by_phases = {p: task_of(name, profile, work, phases=p) for p in (1, 3)}
        damage = damage_of(by_phases[1], lambda *told: print(*told, flush=True))
        report = _load(out)
        report["cost"][name] = cost_of(by_phases[1], damage, trials)
        _save(out, report)
        for seed in range(seeds):
            for each in method:
                key = f"{name}/{each}/{seed}/{trials}"
                report = _load(out)
                if key in report["runs"]:
                    continue
                task = by_phases[3 if "phases" in each else 1]
                found = run_method(each, task, damage, seed, trials)
                found["commit"] = commit
                found["command"] = "python tools/benchmarks/search.py " + " ".join(sys.argv[1:])
                found["profile_sha256"] = task.profile.payload_sha256
                # Read again: another process may have written another model's runs meanwhile.
                report = _load(out)
                report["runs"][key] = found
                _save(out, report)
                print(key, round(found["hypervolume"], 3), found["trials"], flush=True)


def contenders(front: list[dict[str, Any]], ms: float, db: float) -> list[dict[str, Any]]:
    """Of a front: plans better than `db` that are about as fast as `ms`, at most `CONTENDERS`."""
    found = [point for point in front if point["ms"] <= SLOWER * ms and point["db"] > db]
    if len(found) <= CONTENDERS:
        return found
    places = np.linspace(0, len(found) - 1, CONTENDERS).round().astype(int)
    return [found[k] for k in places.tolist()]


@app.command()
def remeasure(
    out: Annotated[Path, typer.Option("-o", "--out")] = Path("docs/benchmarks/search.json"),
    profile: Annotated[str, typer.Option()] = "amd_epyc_onnxruntime_1t",
    work: Annotated[Path, typer.Option()] = Path("build/search"),
    model: Annotated[list[str], typer.Option()] = list(MODELS),  # noqa: B006
    seed: Annotated[int, typer.Option()] = 0,
    trials: Annotated[int, typer.Option()] = 40,
    images: Annotated[int, typer.Option()] = 64,
    rounds: Annotated[int, typer.Option()] = 300,
    copies: Annotated[int, typer.Option(help="Of every plan: where one lies matters.")] = 3,
) -> None:
    """Emit found plans and measure them beside peers, on unseen images.

    Those near uniform W8A8, and the best within the largest of `SHARES`.
    """
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    commit = reports.commit()
    for name in model:
        report = _load(out)
        plans: dict[str, DeploymentPlan] = {}
        for phases, method in ((1, "search"), (3, "search, 3 phases")):
            task = task_of(name, profile, work, phases=phases)
            uniform = task.space.uniform(Precision("w8a8"))
            ms = task.pricing.price(uniform).latency_us / 1e3
            fronts = {
                each: report["runs"][f"{name}/{each}/{seed}/{trials}"]["front"]
                for each in ("uniform", method)
            }
            db = at_most(fronts["uniform"], ms * (1 + 1e-9))
            beside = contenders(fronts[method], ms, LEAST_DB if db is None else db)
            slow_ms = SHARES[-1] * report["cost"][name]["float_ms"]
            slow = max((p for p in fronts[method] if p["ms"] <= slow_ms), key=lambda p: p["db"])
            for point in (*beside, *([] if slow in beside else [slow])):
                name_of = f"{method}, {point['ms']:.3f} ms predicted"
                plans[name_of] = task.space.plan(read(point))
        plans = {"w8a8": task.space.plan(uniform), "w8a8 by rule": task.space.base, **plans}
        found, refused = _measured(task, plans, images=images, rounds=rounds, copies=copies)
        report = _load(out)
        report.setdefault("remeasured", {})[name] = {
            "commit": commit,
            "command": "python tools/benchmarks/search.py " + " ".join(sys.argv[1:]),
            "report": found.model_dump(mode="json"),
            "refused": refused,
        }
        _save(out, report)
        print(measured_table(found), flush=True)


def measured_table(report: BenchReport) -> str:
    """Markdown: CPU time, mean and range over the copies of a plan, and of uniform W8A8's."""
    ratios: dict[str, list[float]] = {}
    rows = {row.name: row for row in report.rows}
    for row in report.rows:
        if row.cpu_ratio is not None:
            ratios.setdefault(row.name.split(COPY)[0], []).append(row.cpu_ratio)
    rule = float(np.mean(ratios["w8a8"]))
    lines = [
        "| | CPU time | range | of uniform W8A8 | image SQNR dB | MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in ratios.items():
        mean, row = float(np.mean(found)), rows[name]
        cells = (
            name,
            f"{mean:.3f}",
            f"{min(found):.3f} to {max(found):.3f}" if len(found) > 1 else "",
            f"{mean / rule:.3f}",
            f"{row.image_sqnr_db:.1f}",
            f"{row.bytes_on_disk / 1e6:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def at_most(front: list[dict[str, Any]], ms: float) -> float | None:
    """Best image SQNR of a front within a latency; None if nothing is as fast."""
    found = [point["db"] for point in front if point["ms"] <= ms]
    return max(found) if found else None


def summary(report: Report, name: str, trials: int) -> str:
    """Markdown table of a model: hypervolume by seed, best dB at shares of the float latency."""
    float_ms = report["cost"][name]["float_ms"]
    head = " | ".join(f"dB at {share:.2f}" for share in SHARES)
    lines = [
        f"| {name} | hypervolume, ms dB, by seed | mean | {head} |",
        "|" + "---|" * (3 + len(SHARES)),
    ]
    for method in METHODS:
        runs = [
            run
            for key, run in report["runs"].items()
            if (key.split("/")[:2], key.split("/")[3]) == ([name, method], str(trials))
        ]
        if not runs:
            continue
        volumes = [run["hypervolume"] for run in runs]
        cells = [method, " ".join(f"{v:.1f}" for v in volumes), f"{np.mean(volumes):.1f}"]
        for share in SHARES:
            best = [at_most(run["front"], share * float_ms) for run in runs]
            known = [db for db in best if db is not None]
            cells.append(f"{np.mean(known):.1f}" if len(known) == len(runs) else "none")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@app.command()
def table(
    out: Annotated[Path, typer.Option("-o", "--out")] = Path("docs/benchmarks/search.json"),
    trials: Annotated[int, typer.Option()] = 40,
) -> None:
    """Print what was found as Markdown."""
    report = _load(out)
    for name in MODELS:
        print(summary(report, name, trials), end="\n\n")


def _measured(
    task: searching.Task,
    plans: dict[str, DeploymentPlan],
    *,
    images: int,
    rounds: int,
    copies: int,
) -> tuple[BenchReport, dict[str, str]]:
    backend, denoiser = load_backend(task.settings.target), task.denoiser
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, variants = Path(scratch), []
        for number, (name, plan) in enumerate(plans.items()):
            package = folder / f"package{number}"
            pipeline.emit(denoiser, package, plan=plan, work=task.folder / searching.KEPT)
            for copy in range(copies):
                variants.append(
                    Variant(
                        f"{name}{COPY}{copy + 1}" if copy else name,
                        backend.open(package),
                        playback.open_player(package),
                        backend.count_kernels(package),
                        plan.n_integer_layers,
                        folder_bytes(package),
                        plan.starts,
                    )
                )
        base = pipeline.float_variant(denoiser, backend, folder / "float", variants[0].player)
        variants.insert(0, base)
        runs = pipeline.calibrate(denoiser, work=task.folder / searching.KEPT).trajectories
        for name, make in peers.peers(denoiser, runs, folder / "float" / "model.onnx", folder):
            try:
                package = peers.as_package(make(), folder / name.replace("/", "-"))
                integer, matrix = peers.count_integer(package)
                network = backend.open(package)
            # A peer's failure, of whatever kind, is a result.
            except Exception as error:
                refused[name] = (str(error).splitlines() or [repr(error)])[0][:200]
                continue
            kernels = replace(base.kernels, integer=integer, floating=matrix)
            size = (package / "model.onnx").stat().st_size
            variants.append(Variant(name, network, base.player, kernels, integer, size))
        report = compare(
            denoiser,
            tuple(variants),
            libraries=backend.versions(),
            rounds=rounds,
            images=images,
            seeds=(searching.HELD_OUT_SEEDS,),
            progress=lambda done, total: print(f"{done}/{total}", file=sys.stderr),
        )
    return report, refused


if __name__ == "__main__":
    app()
