"""Searches for the scale that loses least, on samples of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeqdm.numerics.affine import (
    ACTIVATION_BITS,
    MIN_SCALE,
    WEIGHT_BITS,
    activation_max,
    dequantize_activation,
    quantize_activation,
    weight_max,
)

LOSS_POWER = 2.4
SMALLEST_SHRINK = 0.8
"""Deeper clipping lowers the error of an activation and raises that of the image: what it cuts off
are few channels that mean much. Chosen on half-trained weights of the reference models, 8 unguided
images each: from 0.3 to 0.8 the free-running image SQNR rose from 38.9 to 42.5 dB (UNet) and from
40.0 to 45.5 dB (DiT)."""
SMALLEST_SHRINK_4_BITS = 0.3
"""With 16 codes the rounding error of a full range outweighs what clipping cuts off."""
SMALLEST_WEIGHT_SHRINK = {4: 0.4, 6: 0.6, 8: 0.7}
FINE_SHRINKS, COARSE_SHRINKS = 21, 6
COARSE_SAMPLES = 512
"""The zero_point is chosen on fewer samples and shrinks than the scales that go with it."""
SEARCH_ELEMENTS = 2**17
"""Weights searched at a time: 2.5 times as fast as all 6.5 million of a large layer at once."""


@dataclass(frozen=True)
class StepRanges:
    """What was seen of one tensor at every step.

    Attributes:
        samples: float32 [S, R], values drawn evenly from the tensor.
        low: float32 [S], smallest value seen.
        high: float32 [S], largest value seen.
    """

    samples: Tensor
    low: Tensor
    high: Tensor

    def at(self, steps: range) -> StepRanges:
        """The rows of some steps."""
        rows = slice(steps.start, steps.stop)
        return StepRanges(self.samples[rows], self.low[rows], self.high[rows])

    def merged(self) -> StepRanges:
        """All steps as one row, for a scale that serves them all."""
        low, high = self.low.amin()[None], self.high.amax()[None]
        return StepRanges(self.samples.reshape(1, -1), low, high)


@dataclass(frozen=True)
class ActivationScales:
    """Scales of one activation: a table over the steps and one zero_point for all of them.

    Attributes:
        scale: float32 [S], or [1] where one scale serves every step.
        zero_point: 0..2^bits - 1. Constant, because a run-time zero_point costs the fast kernels.
        bits: width of the codes.
    """

    scale: Tensor
    zero_point: int
    bits: int = ACTIVATION_BITS


def full_scale(low: Tensor, high: Tensor, zero_point: int, bits: int = ACTIVATION_BITS) -> Tensor:
    """Smallest scale that clips nothing between low and high, [S] each; 1 where both are 0."""
    # 0 is always representable; a side with no codes cannot be covered and is clipped.
    below, above = zero_point, activation_max(bits) - zero_point
    needed = torch.zeros_like(low)
    if below:
        needed = torch.maximum(needed, -low.clamp(max=0) / below)
    if above:
        needed = torch.maximum(needed, high.clamp(min=0) / above)
    return torch.where(needed > 0, needed.clamp(min=MIN_SCALE), torch.ones_like(needed))


def _loss(samples: Tensor, scale: Tensor, zero_point: int, bits: int, power: float) -> Tensor:
    codes = quantize_activation(samples, scale, zero_point, bits)
    return (dequantize_activation(codes, scale, zero_point) - samples).abs().pow(power).mean(-1)


def search_with_zero_point(
    ranges: StepRanges,
    zero_point: int,
    *,
    bits: int = ACTIVATION_BITS,
    power: float = LOSS_POWER,
    n_shrinks: int = FINE_SHRINKS,
) -> tuple[Tensor, Tensor]:
    """Best scale of every step for a given zero_point.

    Args:
        ranges: samples and extremes, [S, R] and [S].
        zero_point: code of 0.
        bits: width of the codes.
        power: p of the L_p loss; 2.4 is the choice of BRECQ and PTQD.
        n_shrinks: candidates between the full range and the deepest clipping.

    Returns:
        `(scale, loss)`, float32 [S] each; the loss is `mean |x - x_q|^p`.
    """
    full = full_scale(ranges.low, ranges.high, zero_point, bits)
    best_scale = full
    best_loss = torch.full_like(full, torch.inf)
    smallest = SMALLEST_SHRINK if bits >= ACTIVATION_BITS else SMALLEST_SHRINK_4_BITS
    for shrink in torch.linspace(1.0, smallest, n_shrinks):
        scale = (full * shrink).clamp(min=MIN_SCALE)
        loss = _loss(ranges.samples, scale[:, None], zero_point, bits, power)
        better = loss < best_loss
        best_scale = torch.where(better, scale, best_scale)
        best_loss = torch.where(better, loss, best_loss)
    return best_scale, best_loss


def candidate_zero_points(ranges: StepRanges, bits: int = ACTIVATION_BITS) -> tuple[int, ...]:
    """Zero points worth trying: those of the min-max ranges, the symmetric and the one-sided."""
    low, high = ranges.low.clamp(max=0), ranges.high.clamp(min=0)
    span = (high - low).clamp(min=MIN_SCALE)
    per_step = torch.round(-low / span * activation_max(bits))
    quantiles = torch.quantile(per_step, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    found = {round(float(q)) for q in quantiles} | {2 ** (bits - 1)}
    if bool((ranges.low >= 0).all()):
        found.add(0)
    return tuple(sorted(min(max(z, 0), activation_max(bits)) for z in found))


def search_activation(
    ranges: StepRanges, *, bits: int = ACTIVATION_BITS, power: float = LOSS_POWER
) -> ActivationScales:
    """Scales per step and the zero_point that is best over all steps together.

    The loss of a step is taken relative to the step's own energy, so that noisy steps with large
    values do not decide alone. One-sided tensors end up with a zero_point near 0 and lose no code.

    Source: L2.4 search of PTQD section 3 (after BRECQ); per-step scales after TDQ, section 3.
    """
    stride = max(1, ranges.samples.shape[1] // COARSE_SAMPLES)
    coarse = StepRanges(ranges.samples[:, ::stride], ranges.low, ranges.high)
    energy = coarse.samples.abs().pow(power).mean(-1)
    energy = energy.clamp(min=torch.finfo(torch.float32).tiny)

    def relative_loss(zero_point: int) -> float:
        _, loss = search_with_zero_point(
            coarse, zero_point, bits=bits, power=power, n_shrinks=COARSE_SHRINKS
        )
        return float((loss / energy).sum())

    zero_point = min(candidate_zero_points(ranges, bits), key=relative_loss)
    scale, _ = search_with_zero_point(ranges, zero_point, bits=bits, power=power)
    return ActivationScales(scale, zero_point, bits)


def minmax_activation(ranges: StepRanges, *, bits: int = ACTIVATION_BITS) -> ActivationScales:
    """Scales that clip nothing, with the zero_point of the widest range: the plain baseline."""
    low, high = float(ranges.low.min().clamp(max=0)), float(ranges.high.max().clamp(min=0))
    span = max(high - low, MIN_SCALE)
    zero_point = min(max(round(-low / span * activation_max(bits)), 0), activation_max(bits))
    return ActivationScales(full_scale(ranges.low, ranges.high, zero_point, bits), zero_point, bits)


def minmax_weight(weight: Tensor, bits: int = WEIGHT_BITS) -> Tensor:
    """Scale per output channel [C_out] that clips nothing; 1 for a channel of zeros."""
    peak = weight.reshape(weight.shape[0], -1).abs().amax(1)
    scale = (peak / weight_max(bits)).clamp(min=MIN_SCALE)
    return torch.where(peak > 0, scale, torch.ones_like(peak))


def search_weight(weight: Tensor, bits: int = WEIGHT_BITS) -> Tensor:
    """Scale per output channel that minimises the squared rounding error.

    Args:
        weight: float32 [C_out, ...].
        bits: width of the codes.

    Returns:
        float32 [C_out]; 1 for a channel of zeros.
    """
    rows = weight.reshape(weight.shape[0], -1)
    # Rows are independent of each other; a few at a time stay in the cache.
    n_rows = max(1, SEARCH_ELEMENTS // max(1, rows.shape[1]))
    return torch.cat([_search_rows(part, bits) for part in rows.split(n_rows)])


def _search_rows(rows: Tensor, bits: int) -> Tensor:
    limit, full = weight_max(bits), minmax_weight(rows, bits)
    best_scale = full
    best_loss = torch.full_like(full, torch.inf)
    for shrink in torch.linspace(1.0, SMALLEST_WEIGHT_SHRINK[bits], 31):
        scale = (full * shrink).clamp(min=MIN_SCALE)
        codes = torch.clamp(torch.round(rows / scale[:, None]), -limit, limit)
        loss = (codes * scale[:, None] - rows).pow(2).mean(1)
        better = loss < best_loss
        best_scale = torch.where(better, scale, best_scale)
        best_loss = torch.where(better, loss, best_loss)
    return best_scale
