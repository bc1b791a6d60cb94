"""Predicted against measured latency of mixed plans that no fit has seen.

    python tools/benchmarks/prediction.py -o docs/benchmarks/prediction.json

The profiles are those that come with edgeqdm, measured on this machine; the plans are drawn with
another seed than the ones the sums were fitted to, emitted, and timed by the benchmark tool of a
kit: CPU time of one thread, in rounds of random order. `among` are the first of them in a graph
with another one as second phase. `speed` is the float graph's time then over its time in the
profile; errors are given as they are and with predictions multiplied by it, since a shared machine
is not equally fast at all times.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import reports
import torch
import typer

import edgeqdm
from edgeqdm import load, tuning
from edgeqdm.backends import load_backend
from edgeqdm.ir.precision import FP32, TABLE
from edgeqdm.ir.profile import LatencyProfile
from edgeqdm.profile.adopt import read_profile
from edgeqdm.profile.host import run_kit
from edgeqdm.profile.kit import KIT, KitRequest, make_kit
from edgeqdm.profile.requests import full_request, uniform_precisions

MODELS = ("unet-fmnist", "dit-fmnist")
SEED = 1000
PAIRS = 6


def errors(predicted: list[float], measured: list[float]) -> dict[str, float]:
    """Mean and worst absolute error, relative to what was measured."""
    relative = np.abs(np.array(predicted) / np.array(measured) - 1)
    return {"mean": float(relative.mean()), "worst": float(relative.max())}


def measured(
    name: str, profile: LatencyProfile, plans: int, seconds: float, work: Path
) -> dict[str, Any]:
    """Predictions and measurements of random plans of a model."""
    denoiser = load(f"reference:{name}", steps=20)
    space = tuning.open_space(denoiser, profile.target)
    latency = tuning.cost_model(profile, space).latency
    wholes = full_request(
        space.network, space.offered, tables=space.tables, n_wholes=plans, seed=SEED
    ).wholes
    uniform = uniform_precisions(space.network, space.offered, tables=space.tables)
    drawn = wholes[len(uniform) :]
    pairs = list(itertools.pairwise(drawn[: PAIRS + 1]))
    request = KitRequest(entries=[], wholes=wholes, pairs=pairs)
    key = hashlib.sha256(f"{edgeqdm.__version__} {reports.commit()} {request}".encode())
    kit = work / f"prediction-{name}-{key.hexdigest()[:16]}"
    if not (kit / KIT).is_file():
        make_kit(denoiser, load_backend(profile.target), request, kit)
    for old in kit.glob("results-*.jsonl"):
        old.unlink()
    found = run_kit(kit, threads=profile.threads, seconds=seconds)
    times = [whole.timing.median_us for whole in found.wholes]
    sums = [latency.predict_us(whole.precisions) for whole in found.wholes]
    plain = next(
        k for k, w in enumerate(found.wholes) if set(w.precisions.values()) <= {FP32, TABLE}
    )
    fitted = next(
        w.timing.median_us
        for w in profile.wholes
        if w.model == space.network.model and set(w.precisions.values()) <= {FP32, TABLE}
    )
    speed = times[plain] / fitted
    random = range(len(uniform), len(times))
    among = [cost.among.median_us for cost in found.phase_costs]
    priced = [latency.predict_phases_us([c.precisions, c.other])[0] for c in found.phase_costs]
    return {
        "plans": len(random),
        "speed": speed,
        "as_it_is": errors([sums[k] for k in random], [times[k] for k in random]),
        "at_this_speed": errors([speed * sums[k] for k in random], [times[k] for k in random]),
        "among": {
            "pairs": len(among),
            "as_it_is": errors(priced, among) if among else None,
            "at_this_speed": errors([speed * us for us in priced], among) if among else None,
        },
        "left_out_of_the_fit": None if latency.error is None else vars(latency.error),
        "predicted_us": [round(sums[k], 1) for k in random],
        "measured_us": [round(times[k], 1) for k in random],
        "flagged": sum(bool(whole.timing.flags) for whole in found.wholes),
    }


def main(
    out: Annotated[Path, typer.Option("-o", "--out")] = Path("docs/benchmarks/prediction.json"),
    profile: Annotated[str, typer.Option()] = "amd_epyc_onnxruntime_1t",
    work: Annotated[Path, typer.Option()] = Path("build/search"),
    model: Annotated[list[str], typer.Option()] = list(MODELS),  # noqa: B006
    plans: Annotated[int, typer.Option()] = 20,
    seconds: Annotated[float, typer.Option()] = 1.0,
) -> None:
    """Emit, time and compare."""
    torch.set_num_threads(1)
    adopted = read_profile(profile).profile
    report = {
        **reports.head("prediction.py"),
        "profile": profile,
        "models": {name: measured(name, adopted, plans, seconds, work) for name in model},
    }
    reports.write(report, out)


if __name__ == "__main__":
    typer.run(main)
