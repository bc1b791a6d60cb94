"""Damage of every layer at every precision: at each step, and in the final samples."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeqdm import __version__
from edgeqdm.calibrate.observe import LayerObservation, observation_tensors
from edgeqdm.calibrate.trajectories import Trajectories, checksum, load_tensors, save_tensors
from edgeqdm.errors import InputError
from edgeqdm.ir.codec import digest
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, Precision
from edgeqdm.ir.sensitivity import LayerSensitivity, SensitivityReport, StepRange
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.numerics import philox, solver
from edgeqdm.quantize import quantizer
from edgeqdm.quantize.quantizer import QuantizedDenoiser

DEFAULT_RANGES = 5
DEFAULT_IMAGES = 8
Progress = Callable[[int, int], None]
Array = NDArray[np.float32]
Asked = Sequence[tuple[str, Precision]]


def step_ranges(n_steps: int, n_ranges: int = DEFAULT_RANGES) -> tuple[StepRange, ...]:
    """Ranges that differ by at most one step in length."""
    bounds = np.linspace(0, n_steps, min(n_ranges, n_steps) + 1).round().astype(int)
    return tuple(StepRange(start=int(a), stop=int(b)) for a, b in itertools.pairwise(bounds))


def measure_sensitivity(
    denoiser: Denoiser,
    observations: Mapping[str, LayerObservation],
    trajectories: Trajectories,
    asked: Asked,
    *,
    seed: int,
    ranges: Sequence[StepRange] | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> SensitivityReport:
    """Quantize one layer at a time and see what becomes of the output and of the samples.

    Args:
        denoiser: the float model.
        observations: of its layers.
        trajectories: of the float model, from `collect_trajectories` with `seed`.
        asked: layers and precisions.
        seed: of the trajectories; their step noise is drawn again.
        ranges: of steps in which a layer is quantized alone; default `DEFAULT_RANGES` even ones.
        work: folder for finished layers; the same call goes on from them.
        progress: told of every layer and precision.

    Raises:
        InputError: EQ-3601, if nothing is asked for.
    """
    if not asked:
        raise InputError("EQ-3601", "no layer is to be measured", path="sensitivity")
    n_steps = denoiser.program.n_steps
    chosen = tuple(ranges or step_ranges(n_steps))
    runs = _Runs(denoiser, trajectories, seed)
    key = _key(denoiser, trajectories, seed, chosen)
    entries = []
    for done, (layer, precision) in enumerate(asked, start=1):
        file = None
        if work is not None:
            file = work / f"sensitivity-{_name(key, observations, layer, precision)}.st"
        kept = None if file is None else load_tensors(file)
        if kept is None:
            kept = _damage(runs, observations, layer, precision, chosen)
            if file is not None:
                save_tensors(kept, file)
        entries.append(
            LayerSensitivity(
                layer=layer,
                precision=precision,
                forced=tuple(kept["forced"].tolist()),
                propagated=tuple(kept["propagated"].tolist()),
            )
        )
        if progress is not None:
            progress(done, len(asked))
    return SensitivityReport(
        model=denoiser.info.fingerprint,
        sampler=digest(denoiser.program),
        n_steps=n_steps,
        images=trajectories.n_runs,
        seed=seed,
        ranges=chosen,
        entries=tuple(entries),
    )


def _key(
    denoiser: Denoiser, trajectories: Trajectories, seed: int, ranges: Sequence[StepRange]
) -> str:
    bounds = " ".join(f"{r.start}:{r.stop}" for r in ranges)
    parts = (__version__, digest(denoiser.info), trajectories.key(), str(seed), bounds)
    return " ".join(parts)


def _name(
    key: str, observations: Mapping[str, LayerObservation], layer: str, precision: Precision
) -> str:
    # A layer that is quantized alone is given scales of its own observation and of no other.
    mine = {layer: observations[layer]} if layer in observations else {}
    text = f"{key} {layer} {precision} {checksum(observation_tensors(mine))}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class _Runs:
    """The float trajectories, and how to go on from any step of them."""

    def __init__(self, denoiser: Denoiser, trajectories: Trajectories, seed: int) -> None:
        self.denoiser, self.trajectories = denoiser, trajectories
        self._seed = seed
        self._images = range(trajectories.n_runs)
        self._table = solver.Table.from_json(denoiser.program.model_dump(mode="json"))
        self.finals = self.final(None, StepRange(start=denoiser.program.n_steps - 1, stop=10**9))

    def forced(self, quantized: QuantizedDenoiser, step: int) -> float:
        """Error power over signal power of the output, fed the float samples."""
        runs = self.trajectories
        found = quantized.predict(runs.inputs[step], step, runs.conditioning)
        return ratio(runs.outputs[step].numpy(), found.numpy())

    def final(self, quantized: QuantizedDenoiser | None, within: StepRange) -> Array:
        """Samples after all steps, on integers within the range, in float elsewhere."""
        runs = self.trajectories

        def predict(x: Array, step: int) -> Array:
            # Up to the range nothing differs, so nothing is computed.
            if step < within.start or quantized is None:
                return runs.outputs[step].numpy()
            model = quantized if step < within.stop else self.denoiser
            return model.predict(torch.from_numpy(x), step, runs.conditioning).numpy()

        shape = self.denoiser.info.sample_shape
        return solver.run(
            self._table,
            predict,
            philox.batch_normal(self._seed, philox.INITIAL_STREAM, self._images, shape),
            lambda step: philox.batch_normal(
                self._seed, philox.step_stream(step), self._images, shape
            ),
        )


def _damage(
    runs: _Runs,
    observations: Mapping[str, LayerObservation],
    layer: str,
    precision: Precision,
    ranges: Sequence[StepRange],
) -> dict[str, Tensor]:
    plan = _alone(runs.denoiser, layer, precision)
    quantized = quantizer.quantize(runs.denoiser, plan, observations)
    forced = [runs.forced(quantized, step) for step in range(runs.denoiser.program.n_steps)]
    propagated = [ratio(runs.finals, runs.final(quantized, each)) for each in ranges]
    return {
        "forced": torch.tensor(forced, dtype=torch.float64),
        "propagated": torch.tensor(propagated, dtype=torch.float64),
    }


def _alone(denoiser: Denoiser, layer: str, precision: Precision) -> DeploymentPlan:
    layers = tuple(
        LayerAssignment(
            layer=x.name, precision=precision if x.name == layer else FP32, reason="alone"
        )
        for x in denoiser.info.layers
    )
    n_steps = denoiser.program.n_steps
    phase = Phase(start=0, stop=n_steps, layers=layers)
    return DeploymentPlan(
        target="none", model=denoiser.info.fingerprint, n_steps=n_steps, phases=(phase,)
    )


def ratio(reference: Array, found: Array) -> float:
    """Error power over signal power."""
    signal = float(np.square(reference, dtype=np.float64).sum())
    error = float(np.square(reference.astype(np.float64) - found).sum())
    return error / max(signal, 1e-300)
