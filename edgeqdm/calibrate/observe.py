"""Range statistics of every layer at every step of the trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgeqdm.calibrate.trajectories import (
    CHUNK,
    Progress,
    Trajectories,
    load_tensors,
    save_tensors,
)
from edgeqdm.errors import NumericalError, UnsupportedError
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer
from edgeqdm.numerics.ranges import StepRanges

SAMPLES_PER_STEP = 4096
"""Values kept of one tensor at one step: enough for an L_p scale search to within 1%."""


@dataclass(frozen=True)
class LayerObservation:
    """What one layer was fed and what it returned, before its bias, over all steps."""

    input: StepRanges
    output: StepRanges


class _Reservoir:
    """Extremes and an even sample of one tensor at every step, filled chunk by chunk."""

    def __init__(self, n_steps: int, generator: torch.Generator) -> None:
        self.low = torch.full((n_steps,), torch.inf)
        self.high = torch.full((n_steps,), -torch.inf)
        self.values: list[list[Tensor]] = [[] for _ in range(n_steps)]
        self._generator = generator

    def add(self, step: int, x: Tensor, n_values: int) -> bool:
        """Keeps n_values of x; returns whether all values were finite."""
        flat = x.reshape(-1)
        low, high = torch.aminmax(flat)
        if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
            return False
        self.low[step] = torch.minimum(self.low[step], low)
        self.high[step] = torch.maximum(self.high[step], high)
        index = torch.randint(flat.numel(), (n_values,), generator=self._generator)
        self.values[step].append(flat[index])
        return True

    def ranges(self, name: str) -> StepRanges:
        missing = [step for step, values in enumerate(self.values) if not values]
        if missing:
            raise UnsupportedError(
                "EQ-4203",
                f"the layer does not run at {len(missing)} steps, the first is {missing[0]}",
                path=name,
                hint="only networks that run every layer at every step can be calibrated",
            )
        samples = torch.stack([torch.cat(values) for values in self.values])
        return StepRanges(samples, self.low, self.high)


@contextmanager
def _hooks(
    module: nn.Module, names: tuple[str, ...], seen: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    def hook_for(name: str) -> Callable[..., None]:
        def hook(
            layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
        ) -> None:
            seen(name, inputs[0] if inputs else named["input"], _without_bias(layer, output))

        return hook

    handles = [
        get_layer(module, name).register_forward_hook(hook_for(name), with_kwargs=True)
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_bias(layer: nn.Module, output: Tensor) -> Tensor:
    bias = layer.bias
    if not isinstance(bias, Tensor):
        return output
    return output - (bias[:, None, None] if isinstance(layer, nn.Conv2d) else bias)


def observe(
    denoiser: Denoiser,
    trajectories: Trajectories,
    layers: tuple[str, ...],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, LayerObservation]:
    """Replay the trajectories and record the ranges of every named layer at every step.

    Under guidance both the conditional and the unconditional evaluation are seen, as they will be
    at run time.

    Raises:
        NumericalError: if an activation is NaN or Inf; names layer and step.
        UnsupportedError: if a layer does not run at some step.
    """
    n_chunks = -(-trajectories.n_runs // CHUNK)
    generator = torch.Generator().manual_seed(seed)
    per_run = max(1, SAMPLES_PER_STEP // trajectories.n_runs)

    def reservoir() -> _Reservoir:
        return _Reservoir(trajectories.n_steps, generator)

    fed = {name: reservoir() for name in layers}
    returned = {name: reservoir() for name in layers}
    step = n_runs = 0

    def seen(name: str, x: Tensor, y: Tensor) -> None:
        n_values = per_run * n_runs
        if not fed[name].add(step, x, n_values) or not returned[name].add(step, y, n_values):
            raise NumericalError(
                "EQ-5202",
                f"an activation is NaN or Inf at step {step}",
                path=name,
                hint="the float model overflows here; it cannot be calibrated",
            )

    with _hooks(denoiser.module, layers, seen):
        for chunk in range(n_chunks):
            runs = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            conditioning = trajectories.conditioning
            mine = None if conditioning is None else conditioning[runs]
            n_runs = trajectories.inputs[0, runs].shape[0]
            for step in range(trajectories.n_steps):
                denoiser.predict(trajectories.inputs[step, runs], step, mine)
                if progress is not None:
                    progress(
                        chunk * trajectories.n_steps + step + 1, n_chunks * trajectories.n_steps
                    )
    return {
        name: LayerObservation(fed[name].ranges(name), returned[name].ranges(name))
        for name in layers
    }


def observation_tensors(observations: Mapping[str, LayerObservation]) -> dict[str, Tensor]:
    """Everything that observations hold, named `layer/side/field`."""
    return {
        f"{name}/{side}/{field}": getattr(getattr(seen, side), field)
        for name, seen in observations.items()
        for side in ("input", "output")
        for field in ("samples", "low", "high")
    }


def save_observations(observations: dict[str, LayerObservation], file: Path) -> None:
    """Write observations to a safetensors file, whole or not at all."""
    save_tensors(observation_tensors(observations), file)


def load_observations(file: Path) -> dict[str, LayerObservation] | None:
    """Read what `save_observations` wrote; None if it is missing.

    Raises:
        StorageError: if it is damaged or was edited.
    """
    tensors = load_tensors(file)
    if tensors is None:
        return None

    def ranges(name: str, side: str) -> StepRanges:
        return StepRanges(*(tensors[f"{name}/{side}/{k}"] for k in ("samples", "low", "high")))

    names = dict.fromkeys(key.rsplit("/", 2)[0] for key in tensors)
    return {name: LayerObservation(ranges(name, "input"), ranges(name, "output")) for name in names}
