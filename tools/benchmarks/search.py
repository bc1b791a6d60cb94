"""What the search finds, beside simpler ways to spend as many images.

    python tools/benchmarks/search.py run -o docs/benchmarks/search.json
    python tools/benchmarks/search.py remeasure -o docs/benchmarks/search.json

Every method may draw the same number of images and is judged by the hypervolume of its front:
predicted latency against mean image SQNR, up to the float network's latency and down to
`LEAST_DB`. `uniform` is one precision for all layers; `greedy` lowers precisions in the order of
their measured damage, as automatic mixed precision in AIMET does; `random` and `cold` are Optuna's
RandomSampler and TPESampler without a start; `search` is what `edgeqdm search` does, with one phase
and with up to three. `greedy` and `search` use sensitivities, whose cost is told apart, in images.

A seed decides the noise of the images and the sampler; calibration and sensitivities are shared.
Finished runs in the file are not repeated. `remeasure` emits plans and measures them on this
machine, on images that no search saw, beside ONNX Runtime's own quantizers.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import ablation
import numpy as np
import optuna
import torch
import typer

from edgeqdm import load, searching
from edgeqdm.errors import NumericalError
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32
from edgeqdm.ir.search import SearchSettings
from edgeqdm.ir.sensitivity import SensitivityReport
from edgeqdm.profile.adopt import read_profile
from edgeqdm.profile.requests import DEFAULT_PRECISIONS
from edgeqdm.quantize.quantizer import QuantizedDenoiser
from edgeqdm.search.evaluate import Decibels, Evaluator, pooled_db
from edgeqdm.search.space import Candidate
from edgeqdm.search.study import Limits, NumberedSampler, Objective, Pricing, front, hypervolume
from edgeqdm.search.warm import additive, ladder, rungs_for

MODELS = ("unet-fmnist", "dit-fmnist")
METHODS = ("uniform", "greedy", "random", "cold", "search", "search, 3 phases")
LEAST_DB = 20.0
RUNGS = (4, 16)
STEPS = 20
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


def task_of(name: str, profile: str, work: Path, *, phases: int, seed: int) -> searching.Task:
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
    points = []
    for _, g, c in moves:
        if model.latency_us[g][c] < model.latency_us[g][current[g]]:
            current[g] = c
            chosen = tuple(group.choices[k] for group, k in zip(space.groups, current, strict=True))
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
        return [*uniform, *greedy(pricing, damage, trials - len(uniform))]
    if method in ("random", "cold"):
        return []
    n = rungs_for(trials, pricing.space.max_phases)
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
    fixed = method in ("uniform", "greedy")
    while judge.images < trials * RUNGS[-1] and not (
        fixed and len(study.trials) >= len(starts) and not _waiting(study)
    ):
        study.optimize(objective, n_trials=1, catch=(NumericalError,))
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
                "params": t.params,
            }
            for t in found
        ],
    }


def _waiting(study: optuna.Study) -> bool:
    return any(t.state is optuna.trial.TrialState.WAITING for t in study.trials)


Report = dict[str, Any]


def _load(out: Path) -> Report:
    return json.loads(out.read_text()) if out.exists() else {"runs": {}, "cost": {}}


def _save(out: Path, report: Report) -> None:
    report["machine"] = {"cpu": ablation.cpu_name(), "system": platform.system()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


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
    for name in model:
        by_phases = {p: task_of(name, profile, work, phases=p) for p in (1, 3)}
        damage = damage_of(by_phases[1], lambda *told: print(*told, flush=True))
        spent = len(damage.entries) * damage.images
        for seed in range(seeds):
            for each in method:
                key = f"{name}/{each}/{seed}/{trials}"
                report = _load(out)
                if key in report["runs"]:
                    continue
                task = by_phases[3 if "phases" in each else 1]
                found = run_method(each, task, damage, seed, trials)
                found["commit"] = ablation.commit()
                found["command"] = "python tools/benchmarks/search.py " + " ".join(sys.argv[1:])
                found["profile_sha256"] = task.profile.payload_sha256
                # Read again: another process may have written another model's runs meanwhile.
                report = _load(out)
                report["runs"][key] = found
                steps = STEPS + sum(STEPS - r.start for r in damage.ranges)
                report["cost"][name] = {
                    "sensitivity_variants": len(damage.entries),
                    "sensitivity_in_images": spent * steps / STEPS,
                    "budget_in_images": trials * RUNGS[-1],
                }
                _save(out, report)
                print(key, round(found["hypervolume"], 3), found["trials"], flush=True)


if __name__ == "__main__":
    app()
