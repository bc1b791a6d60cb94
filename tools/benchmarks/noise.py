"""Why a method buys much or little: how ranges move over the steps, and what errors are made of.

    python tools/benchmarks/noise.py -o docs/benchmarks/noise.json

Of a model: how much wider a layer's input is at its widest step than at its narrowest, the most a
table of scales can tell apart from a constant. Of a width, reconstructed as in `ablation.py`: the
shares of the error's power that PTQD's gain and its bias take away. What `ablation.py` has finished
in the work folder is used again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import ablation
import numpy as np
import reports
import torch
import typer

from edgeqdm import load, pipeline
from edgeqdm.calibrate.observe import LayerObservation
from edgeqdm.correct.measure import NoiseStatistics


def shares(statistics: NoiseStatistics) -> dict[str, list[float]]:
    """Of mean D^2, D being the error of an output f, at every step.

    Returns:
        Each [S]: `gain`, the part that follows f; `bias`, the mean of every channel; `rest`, what
        no gain and no bias of a step can take away. They add up to 1.
    """
    found: dict[str, list[float]] = {"gain": [], "bias": [], "rest": []}
    for step in range(statistics.n_steps):
        k = statistics.fitted_k(step)
        mean, variance = statistics.residual(step, k)
        powers = {
            "gain": k**2 * sum(statistics.output_variance[step]),
            "bias": float(np.sum((mean + k * np.array(statistics.output_mean[step])) ** 2)),
            "rest": float(np.sum(variance)),
        }
        for name, power in powers.items():
            found[name].append(power / sum(powers.values()))
    return found


def range_ratios(observations: Mapping[str, LayerObservation]) -> list[float]:
    """Of every layer's input: the largest |x| of its widest step over that of its narrowest."""
    found = []
    for each in observations.values():
        peaks = torch.maximum(each.input.high.abs(), each.input.low.abs())
        found.append(float(peaks.max() / peaks.min()))
    return found


def linear_share(module: torch.nn.Module) -> float:
    """Weights of linear layers as a share of all, which is what groups can reach."""
    linear = (m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))
    return sum(linear) / sum(parameter.numel() for parameter in module.parameters())


def measured(model: str, widths: list[str], work: Path) -> dict[str, Any]:
    """Ratios of ranges of the float model, and SQNR and shares per step of every width."""
    denoiser = load(f"reference:{model}", steps=ablation.STEPS, eta=0.0)
    work = work / f"{model}-0"
    seed = ablation.CALIBRATION_SEED
    calibration = pipeline.calibrate(denoiser, samples=ablation.RUNS, seed=seed, work=work)
    ratios = range_ratios(calibration.observations)
    found: dict[str, Any] = {
        "linear_weight_share": linear_share(denoiser.module),
        "range_ratio": {"median": float(np.median(ratios)), "largest": max(ratios)},
    }
    for width in widths:
        name = "+ samples by density and diversity"
        row = next(each for each in ablation.rows_of(model, width) if each.name == name)
        options = {"iterations": 250, "batch": 16}
        made, _ = ablation.quantize_timed(denoiser, calibration, width, row, work, options)
        statistics = pipeline.measure(made.quantized, calibration.trajectories, work=work)
        found[width] = {"snr_db": list(statistics.snr_db), "shares": shares(statistics)}
    return found


def main(
    out: Annotated[Path, typer.Option("-o", "--out")] = Path("docs/benchmarks/noise.json"),
    work: Annotated[Path, typer.Option()] = Path("build/ablation"),
    model: Annotated[list[str], typer.Option()] = list(ablation.MODELS),  # noqa: B006
    width: Annotated[list[str], typer.Option()] = list(ablation.WIDTHS),  # noqa: B006
) -> None:
    """Measure, along the float model's DDIM trajectories with eta 0."""
    torch.set_num_threads(1)
    report = {
        **reports.head("noise.py"),
        "trajectories": ablation.RUNS,
        "models": {name: measured(name, width, work) for name in model},
    }
    reports.write(report, out)


if __name__ == "__main__":
    typer.run(main)
