"""Which samples of the trajectories to calibrate on, and how many from each step.

A step gets more samples the more other steps look like it (density) and the more its direction
differs from theirs (diversity), both seen in one feature in the middle of the network.

Source: EDA-DM, temporal distribution alignment, https://arxiv.org/abs/2401.04585.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeqdm.calibrate.trajectories import (
    CHUNK,
    Progress,
    Trajectories,
    checksum,
    load_tensors,
    save_tensors,
)
from edgeqdm.errors import InputError, ModelError, NumericalError, UnsupportedError
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer, network_of

_COSINE_EPS = 1e-6
_ROUNDING = 1e-12
"""Differences below this share of the values they come from are float64 rounding."""
_CHUNK_VALUES = 2**21
"""Values converted to float64 at a time, 16 MiB."""
_FIELDS = ("runs", "steps", "inputs", "outputs")


@dataclass(frozen=True)
class Allocation:
    """How many calibration samples come from each step.

    Attributes:
        counts: samples per step, S numbers.
        radius: mean squared difference up to which two steps count as alike.
        weights: what the counts are proportional to before rounding, S numbers >= 0.
    """

    counts: tuple[int, ...]
    radius: float
    weights: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Selection:
    """N calibration samples, each the x_t of one run at one step.

    Attributes:
        runs: index of the trajectory, int64 [N].
        steps: index of the step, 0 is the noisiest, int64 [N].
        inputs: what the network was fed, float32 [N, C, H, W].
        outputs: float network output after guidance, float32 [N, C, H, W].
        conditioning: label [N] or embedding [N, ...] of each sample, or None.
    """

    runs: Tensor
    steps: Tensor
    inputs: Tensor
    outputs: Tensor
    conditioning: Tensor | None

    @property
    def n_samples(self) -> int:
        return self.runs.shape[0]

    def key(self) -> str:
        """SHA-256 of everything in it."""
        return checksum(_tensors(self))


def feature_layer(denoiser: Denoiser) -> str:
    """The module whose input shows how far along the trajectory a sample is.

    The attention of a UNet's bottleneck, or the bottleneck without one; the block in the middle of
    a transformer; in any other network the body layer in the middle of the execution order.

    Returns:
        Name inside the network, as `get_layer` takes it.

    Raises:
        ModelError: if the network has no layer between its first and its last.

    Source: EDA-DM for the bottleneck; the middle block of a transformer plays its part.
    """
    network = network_of(denoiser.module)
    bottleneck = getattr(network, "mid_block", None)
    if isinstance(bottleneck, nn.Module):
        # Diffusers keeps None in the place of an attention that is switched off.
        attentions = [*(getattr(bottleneck, "attentions", None) or ()), None]
        return "mid_block" if attentions[0] is None else "mid_block.attentions.0"
    blocks = getattr(network, "transformer_blocks", None)
    if isinstance(blocks, nn.ModuleList) and len(blocks) > 0:
        return f"transformer_blocks.{len(blocks) // 2}"
    body = _body_in_order(denoiser)
    if not body:
        raise ModelError(
            "EQ-3210",
            "the network has no layer between its first and its last, so none shows the step",
            path=denoiser.info.name,
            hint="take the same number of samples from every step instead",
        )
    return body[len(body) // 2]


def _body_in_order(denoiser: Denoiser) -> list[str]:
    order: dict[str, None] = {}

    def run(name: str, *_: Any) -> None:
        order.setdefault(name)

    with ExitStack() as hooks:
        for layer in denoiser.info.layers:
            if layer.role == "body":
                module = get_layer(denoiser.module, layer.name)
                handle = module.register_forward_pre_hook(partial(run, layer.name))
                hooks.callback(handle.remove)
        conditioning = denoiser.draw_conditioning(1, torch.Generator().manual_seed(0))
        denoiser.predict(torch.zeros(1, *denoiser.info.sample_shape), 0, conditioning)
    return list(order)


def record_features(
    denoiser: Denoiser,
    trajectories: Trajectories,
    *,
    n_runs: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """What the feature layer is fed when the first runs are replayed.

    Args:
        denoiser: the float model the trajectories were sampled with.
        trajectories: S steps.
        n_runs: runs to replay; all of them where there are fewer.
        progress: called after every evaluation of the network.

    Returns:
        float32 [S, B, C, P] with P positions (pixels or tokens). B is the number of runs, twice
        that under guidance: both evaluations are seen, as they will be at run time.

    Raises:
        InputError: if n_runs < 1 or the trajectories have another number of steps than the sampler.
        ModelError: if the network has no layer to look at.
        NumericalError: if the feature is NaN or Inf; names layer and step.
        UnsupportedError: if the layer is fed no tensor at some step.
    """
    _check_replay(denoiser, trajectories, n_runs)
    name = feature_layer(denoiser)
    layer = get_layer(denoiser.module, name)
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fed = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        # A layer that runs twice in one evaluation shows its first input.
        if fed is not None and not seen:
            seen.append(_by_position(layer, fed))

    runs = range(min(n_runs, trajectories.n_runs))
    chunks = [slice(start, min(start + CHUNK, len(runs))) for start in runs[::CHUNK]]
    found: list[list[Tensor]] = [[] for _ in range(trajectories.n_steps)]
    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        for done, chunk in enumerate(chunks):
            conditioning = trajectories.conditioning
            mine = None if conditioning is None else conditioning[chunk]
            for step, features in enumerate(found):
                seen.clear()
                denoiser.predict(trajectories.inputs[step, chunk], step, mine)
                features.append(_checked(seen, name, step))
                if progress is not None:
                    total = len(chunks) * trajectories.n_steps
                    progress(done * trajectories.n_steps + step + 1, total)
    finally:
        handle.remove()
    return torch.stack([torch.cat(features) for features in found])


def _check_replay(denoiser: Denoiser, trajectories: Trajectories, n_runs: int) -> None:
    if n_runs < 1:
        message = f"features need at least 1 run, got {n_runs}"
        raise InputError("EQ-3211", message, path="n_runs")
    found, expected = trajectories.n_steps, denoiser.program.n_steps
    if found != expected:
        raise InputError(
            "EQ-3211",
            f"the trajectories have {found} steps, the sampler has {expected}",
            path=denoiser.info.name,
            hint="collect trajectories with this model and this sampler",
        )


def _by_position(layer: nn.Module, fed: Tensor) -> Tensor:
    """A copy as float32 [B, C, P]: pixels of [B, C, H, W], all between B and C elsewhere."""
    if fed.ndim == 4 and not isinstance(layer, nn.Linear):
        found = fed.flatten(2)
    else:
        found = fed.reshape(fed.shape[0], -1, fed.shape[-1]).transpose(1, 2)
    return found.to(torch.float32, copy=True)


def _checked(seen: list[Tensor], name: str, step: int) -> Tensor:
    if not seen:
        message = f"the layer is fed no tensor at step {step}"
        hint = "only networks that run every layer at every step can be calibrated"
        raise UnsupportedError("EQ-4203", message, path=name, hint=hint)
    if not bool(torch.isfinite(seen[0]).all()):
        message = f"an activation is NaN or Inf at step {step}"
        hint = "the float model overflows here; it cannot be calibrated"
        raise NumericalError("EQ-5202", message, path=name, hint=hint)
    return seen[0]


def density(features: Tensor, radius: float) -> Tensor:
    """How many other steps look like each step.

    `D_i = #{j != i : mean((F_i - F_j)^2) <= radius}`; equality holds up to float64 rounding.

    Args:
        features: float [S, B, C, P].
        radius: mean squared difference, at least 0.

    Returns:
        int64 [S].

    Raises:
        InputError: if the features are not finite or of another shape, or the radius is negative.

    Source: EDA-DM, density term, https://arxiv.org/abs/2401.04585.
    """
    _check_features(features)
    _check_radius(radius)
    return _distances(features).count_within(radius)


def diversity(features: Tensor) -> Tensor:
    """How much the direction of each step differs from that of the others.

    `V_i = sum over j != i, b, p of 1 - cos(F_i[b, :, p], F_j[b, :, p])`, cosine along channels.

    Args:
        features: float [S, B, C, P].

    Returns:
        float64 [S]. Norms are taken as at least 1e-6, so a zero vector differs from all by 1.

    Raises:
        InputError: if the features are not finite or of another shape.

    Source: EDA-DM, variety term, https://arxiv.org/abs/2401.04585.
    """
    _check_features(features)
    n_steps = features.shape[0]
    cosines = torch.zeros(n_steps, dtype=torch.float64)
    for chunk in _chunks(features):
        unit = chunk / chunk.norm(dim=1, keepdim=True).clamp_min(_COSINE_EPS)
        # Row sums of the Gram matrix less its diagonal, without the S^2 products of the matrix.
        cosines += (unit * (unit.sum(0) - unit)).sum((1, 2))
    n_positions = features.shape[1] * features.shape[3]
    return (n_steps - 1) * n_positions - cosines


def relative_radius(features: Tensor, quantile: float = 0.25) -> float:
    """A radius that scales with the features: a quantile of all distances between two steps.

    Args:
        features: float [S, B, C, P].
        quantile: share of the pairs of steps that lie within the radius, 0 to 1.

    Returns:
        Mean squared difference; 0 for a single step.

    Raises:
        InputError: if the features are not finite or of another shape, or the quantile is not
            within 0 to 1.
    """
    _check_features(features)
    if not 0 <= quantile <= 1:
        message = f"a quantile is within 0 to 1, got {quantile}"
        raise InputError("EQ-3213", message, path="quantile")
    return _distances(features).quantile(quantile)


@dataclass(frozen=True)
class _Distances:
    """Mean squared differences of all pairs of steps, float64 [S, S], and their rounding error."""

    values: Tensor
    rounding: Tensor

    def count_within(self, radius: float) -> Tensor:
        close = self.values <= radius + self.rounding
        return close.fill_diagonal_(False).sum(1)

    def quantile(self, quantile: float) -> float:
        n_steps = self.values.shape[0]
        if n_steps == 1:
            return 0.0
        above = torch.triu_indices(n_steps, n_steps, 1)
        return float(torch.quantile(self.values[above[0], above[1]], quantile))


def _distances(features: Tensor) -> _Distances:
    n_steps = features.shape[0]
    gram = torch.zeros(n_steps, n_steps, dtype=torch.float64)
    for chunk in _chunks(features):
        # Distances stay the same and lose fewer digits in the difference below.
        centred = (chunk - chunk.mean(0)).flatten(1)
        gram += centred @ centred.T
    # A matrix product need not be symmetric in the last bit.
    gram = (gram + gram.T) / 2
    norms = gram.diagonal()[:, None] + gram.diagonal()
    n_values = features[0].numel()
    return _Distances((norms - 2 * gram).clamp_min(0) / n_values, _ROUNDING * norms / n_values)


def _chunks(features: Tensor) -> Iterator[Tensor]:
    """Float64 [S, C, p] of some positions of one sample at a time."""
    n_steps, n_samples, n_channels, _ = features.shape
    n_positions = max(1, _CHUNK_VALUES // (n_steps * n_channels))
    for sample in range(n_samples):
        for part in features[:, sample].split(n_positions, dim=2):
            yield part.double()


def _check_features(features: Tensor) -> None:
    if features.ndim != 4 or features.numel() == 0 or not features.is_floating_point():
        found = f"{features.dtype} {list(features.shape)}"
        message = f"features must be float [S, B, C, P] and not empty, found {found}"
        raise InputError("EQ-3212", message, path="features")
    for step, feature in enumerate(features):
        if not bool(torch.isfinite(feature).all()):
            message = f"the features are NaN or Inf at step {step}"
            raise InputError("EQ-3212", message, path="features")


def _check_radius(radius: float) -> None:
    if not 0 <= radius < math.inf:
        message = f"a radius is a finite number >= 0, got {radius}"
        raise InputError("EQ-3213", message, path="radius")


def allocate(
    features: Tensor,
    n_samples: int,
    *,
    diversity_weight: float = 1.2,
    radius: float | None = None,
    minimum: int = 0,
    maximum: int | None = None,
) -> Allocation:
    """Share calibration samples out over the steps.

    Density and diversity are each brought to 0..1 over the steps, and a step's share is
    proportional to `density + diversity_weight * diversity`. A term that is the same at all steps
    is left out; with neither term, every step has the same share.

    Args:
        features: float [S, B, C, P], see `record_features`.
        n_samples: samples in all, at least 1.
        diversity_weight: at least 0; the authors use 1.0 to 5.0, depending on the model.
        radius: see `density`; None for `relative_radius` of these features. The authors' fixed
            radii, 0.3 and 3, depend on the scale of the features.
        minimum: samples every step gets, taken from the steps with most. 0 as published, where a
            step may be left without any.
        maximum: samples a step has, the number of trajectories; what exceeds it goes to the steps
            with fewest. None for no limit.

    Returns:
        Counts that add up to n_samples. Rounding is half to even; missing samples go to the
        largest counts, of equal ones the noisiest first, and excess ones are taken from the
        cleanest steps.

    Raises:
        InputError: if an argument is out of range, or n_samples are not enough for the minimum.

    Source: EDA-DM, temporal distribution alignment, https://arxiv.org/abs/2401.04585.
    """
    _check_features(features)
    _check_shares(features.shape[0], n_samples, diversity_weight, minimum, maximum)
    distances = _distances(features)
    if radius is None:
        radius = distances.quantile(0.25)
    _check_radius(radius)
    n_steps, n_runs, _, n_positions = features.shape
    # The largest sum of 1 - cos that is possible says what counts as rounding.
    rounding = _ROUNDING * 2 * n_steps * n_runs * n_positions
    density_term = _min_max(distances.count_within(radius).double(), 0.0)
    diversity_term = _min_max(diversity(features), rounding)
    weights = density_term + diversity_weight * diversity_term
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    counts = _raise_to(minimum, _round_shares(weights, n_samples))
    if maximum is not None:
        # Raising what is left free is the same as lowering what is taken.
        counts = [maximum - free for free in _raise_to(0, [maximum - count for count in counts])]
    return Allocation(tuple(counts), radius, tuple(weights.tolist()))


def _check_shares(
    n_steps: int, n_samples: int, diversity_weight: float, minimum: int, maximum: int | None
) -> None:
    if not 0 <= diversity_weight < math.inf:
        message = f"a weight is a finite number >= 0, got {diversity_weight}"
        raise InputError("EQ-3213", message, path="diversity_weight")
    if n_samples < 1:
        message = f"calibration needs at least 1 sample, got {n_samples}"
        raise InputError("EQ-3214", message, path="n_samples")
    if minimum < 0:
        message = f"a minimum is 0 or more, got {minimum}"
        raise InputError("EQ-3214", message, path="minimum")
    if minimum * n_steps > n_samples:
        raise InputError(
            "EQ-3214",
            f"{n_samples} samples are not enough for {minimum} at each of {n_steps} steps",
            path="minimum",
            hint=f"take at least {minimum * n_steps} samples",
        )
    if maximum is not None and not max(minimum, 1) <= maximum >= n_samples / n_steps:
        raise InputError(
            "EQ-3214",
            f"{n_samples} samples of {n_steps} steps cannot be at most {maximum} at each",
            path="maximum",
            hint=f"take at most {maximum * n_steps} samples",
        )


def _min_max(values: Tensor, rounding: float) -> Tensor:
    low, high = torch.aminmax(values)
    if float(high - low) <= rounding:
        return torch.zeros_like(values)
    return (values - low) / (high - low)


def _round_shares(weights: Tensor, n_samples: int) -> list[int]:
    """Integers that add up to n_samples in the proportion of weights, not all of which are 0."""
    counts = torch.round(weights / weights.sum() * n_samples).long()
    missing = n_samples - int(counts.sum())
    if missing > 0:
        counts[counts.sort(descending=True, stable=True).indices[:missing]] += 1
    elif missing < 0:
        # Rounding adds at most 1/2 to a count above 0, so these are always enough.
        counts[counts.nonzero().flatten().flip(0)[:-missing]] -= 1
    return [int(count) for count in counts]


def _raise_to(minimum: int, counts: list[int]) -> list[int]:
    """Counts of at least `minimum` with the same sum; of equal counts the cleanest step gives."""
    raised = [max(minimum, count) for count in counts]
    # Negative, because a heap gives its smallest entry.
    givers = [(-count, -step) for step, count in enumerate(raised)]
    heapq.heapify(givers)
    for _ in range(sum(raised) - sum(counts)):
        negative_count, negative_step = givers[0]
        heapq.heapreplace(givers, (negative_count + 1, negative_step))
        raised[-negative_step] -= 1
    return raised


def select(trajectories: Trajectories, counts: Sequence[int], *, seed: int = 0) -> Selection:
    """Draw `counts[i]` samples of step i, each from another trajectory.

    Trajectories are drawn in a random order, each at a random step, and used again only after all
    others were: no trajectory gives more than one sample more than another, and none gives the
    same step twice.

    Args:
        trajectories: S steps.
        counts: samples per step, S numbers; N in all.
        seed: of the draw.

    Returns:
        N samples in random order, so that consecutive ones come from different steps.

    Raises:
        InputError: if counts do not fit the steps, or a step is to give more samples than there
            are trajectories.

    Source: EDA-DM, https://arxiv.org/abs/2401.04585, with one trajectory per sample where there
        are enough.
    """
    _check_counts(trajectories, counts)
    if not 0 <= seed < 2**64:
        raise InputError("EQ-3217", f"a seed is 0 or more and below 2^64, got {seed}", path="seed")
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(trajectories.n_steps).repeat_interleave(torch.tensor(list(counts)))
    # Dealt out in turn, the samples of one step, at most n_runs, go to different trajectories.
    turn = torch.arange(len(steps)) % trajectories.n_runs
    runs = torch.randperm(trajectories.n_runs, generator=generator)[turn]
    order = torch.randperm(len(steps), generator=generator)
    runs, steps = runs[order], steps[order]
    conditioning = trajectories.conditioning
    return Selection(
        runs,
        steps,
        trajectories.inputs[steps, runs],
        trajectories.outputs[steps, runs],
        None if conditioning is None else conditioning[runs],
    )


def _check_counts(trajectories: Trajectories, counts: Sequence[int]) -> None:
    n_steps, n_runs = trajectories.n_steps, trajectories.n_runs
    if len(counts) != n_steps:
        message = f"{len(counts)} counts for {n_steps} steps"
        raise InputError("EQ-3215", message, path="counts")
    if min(counts) < 0 or sum(counts) == 0:
        message = f"counts are 0 or more and not all 0, found {list(counts)[:10]}"
        raise InputError("EQ-3215", message, path="counts")
    largest = max(counts)
    if largest > n_runs:
        raise InputError(
            "EQ-3216",
            f"step {list(counts).index(largest)} is to give {largest} samples, one per trajectory, "
            f"and there are {n_runs} trajectories",
            path="counts",
            hint=f"collect at least {largest} trajectories, or take fewer samples",
        )


def save_selection(selection: Selection, file: Path) -> None:
    """Write a selection to a safetensors file, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    save_tensors(_tensors(selection), file)


def load_selection(file: Path) -> Selection | None:
    """Read what `save_selection` wrote; None if it is missing.

    Raises:
        StorageError: if it is damaged or was edited.
    """
    tensors = load_tensors(file)
    if tensors is None:
        return None
    runs, steps, inputs, outputs = (tensors[name] for name in _FIELDS)
    return Selection(runs, steps, inputs, outputs, tensors.get("conditioning"))


def _tensors(selection: Selection) -> dict[str, Tensor]:
    fields = {name: getattr(selection, name) for name in (*_FIELDS, "conditioning")}
    return {name: value for name, value in fields.items() if value is not None}
