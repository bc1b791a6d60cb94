"""Weights with one scale and zero_point per row and group of input channels.

    w ~ scale * (code - zero_point),    codes 0..2^bits - 1

A group is `group_size` neighbouring input channels; the last one of a row is narrower where the
width is no multiple. One group per row is `group_size = width`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeqdm.errors import InputError
from edgeqdm.numerics.affine import activation_max
from edgeqdm.numerics.ranges import LOSS_POWER

MIN_GROUP_SCALE = 2.0**-24
"""Smallest float16; it is widened to float32 before any arithmetic."""
MAX_GROUP_SCALE = 65504.0
"""Largest float16."""
SMALLEST_GROUP_SHRINK = {4: 0.8, 6: 0.93, 8: 0.975}
N_GROUP_SHRINKS = 16
"""On normal and heavy-tailed weights in groups of 32 to 128 the squared error falls by 5 to 10 % (4
bits), 3 % (6) and 2 to 3 % (8). Twice the candidates, other zero points or ends that shrink
separately gain less than 0.6 % more."""
FLOAT32_EXACT_GROUP = 256
"""Codes and zero points are at most 255 apart on both sides: 256 x 255^2 < 2^24."""
CACHED_TOKENS = 512
"""Tokens multiplied at a time: their sums stay in the cache while groups are added, up to a third
faster than all tokens at once."""
SEARCH_ELEMENTS = 2**21
"""Weights searched at a time: bounds the memory to a few copies of so many numbers."""


@dataclass(frozen=True)
class GroupedWeight:
    """A weight matrix as codes.

    Attributes:
        codes: uint8 [N, K], 0..2^bits - 1.
        scale: float32 [N, G], each exact in float16.
        zero_point: uint8 [N, G], the code of 0.
        bits: width of a code.
        group_size: input channels that share a scale; G is `n_groups(K, group_size)`.

    Raises:
        InputError: EQ-3226, if the shapes do not belong together.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        _check_matrix(self.codes)
        _check_tables(self.codes, self.scale, self.zero_point, self.group_size)


def n_groups(width: int, group_size: int) -> int:
    """Groups of a row of `width` input channels, the narrower last one included.

    Raises:
        InputError: EQ-3225, if either is below 1.
    """
    if width < 1 or group_size < 1:
        raise InputError(
            "EQ-3225",
            f"{width} input channels cannot be split into groups of {group_size}",
            hint="one group per row is group_size = width",
        )
    return -(-width // group_size)


def grouped_view(x: Tensor, group_size: int) -> Tensor:
    """[..., K] as [..., G, group_size]; missing channels of the last group are 0."""
    groups = n_groups(x.shape[-1], group_size)
    missing = groups * group_size - x.shape[-1]
    padded = F.pad(x, (0, missing)) if missing else x
    return padded.reshape(*x.shape[:-1], groups, group_size)


def grouped_minmax(weight: Tensor, bits: int, group_size: int) -> GroupedWeight:
    """Round-to-nearest on ranges that clip nothing: no error exceeds half a scale.

    Scales are rounded up to float16; rounded to nearest, the far end of a range could fall up to
    2^(bits - 12) scales outside it.

    Args:
        weight: float [N, K].
        bits: width of a code, 4, 6 or 8.
        group_size: input channels that share a scale; need not divide K.

    Raises:
        InputError: EQ-3225 to EQ-3228, for a shape, width or value that cannot be coded.

    Source: Q-DiT, https://arxiv.org/abs/2406.17343, group quantization. 0 is forced into every
    range; as published, a group of one sign would be clipped to next to nothing.
    """
    _check_weight(weight, bits)
    low, high = _extremes(grouped_view(weight.to(torch.float32), group_size))
    scale = _covering_scale(low, high, bits)
    zero_point = _zero_point(low, scale, bits)
    codes = round_grouped(weight, scale, zero_point, bits, group_size)
    return GroupedWeight(codes, scale, zero_point, bits, group_size)


def search_grouped(
    weight: Tensor, bits: int, group_size: int, *, power: float = LOSS_POWER
) -> GroupedWeight:
    """Codes whose scales lose least: every group tries ranges shrunk by a common factor.

    The first candidate is `grouped_minmax`, so no group ends with a larger loss than there.

    Args:
        weight: float [N, K].
        bits: width of a code: 4, 6 or 8.
        group_size: input channels that share a scale; need not divide K.
        power: p of the loss `sum |w - w_q|^p` of a group.

    Raises:
        InputError: EQ-3225 to EQ-3228, for a shape, width or value that cannot be coded.

    Source: the `mse` option of Q-DiT's published quantizer: L2.4 over shrunk ranges.
    """
    _check_weight(weight, bits)
    # Rows are independent of each other.
    rows = max(1, SEARCH_ELEMENTS // (n_groups(weight.shape[1], group_size) * group_size))
    found = [
        _search_rows(grouped_view(part.to(torch.float32), group_size), bits, power)
        for part in weight.split(rows)
    ]
    scale, zero_point = (torch.cat(parts) for parts in zip(*found, strict=True))
    codes = round_grouped(weight, scale, zero_point, bits, group_size)
    return GroupedWeight(codes, scale, zero_point, bits, group_size)


def round_grouped(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> Tensor:
    """Nearest codes for given scales, uint8 [N, K], rounded half to even.

    Args:
        weight: float [N, K].
        scale: float32 [N, G].
        zero_point: uint8 [N, G].
        bits: width of a code.
        group_size: input channels that share a scale.
    """
    _check_weight(weight, bits)
    _check_tables(weight, scale, zero_point, group_size)
    groups = grouped_view(weight.to(torch.float32), group_size)
    codes = _codes(groups, scale, zero_point.to(torch.float32), bits)
    return codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8)


def dequantize_grouped(weight: GroupedWeight) -> Tensor:
    """float32 [N, K]: `scale * (code - zero_point)`."""
    groups = grouped_view(weight.codes, weight.group_size).to(torch.float32)
    real = (groups - weight.zero_point[..., None]) * weight.scale[..., None]
    return real.flatten(1)[:, : weight.codes.shape[1]]


def grouped_matmul(codes: Tensor, activation_scale: Tensor, weight: GroupedWeight) -> Tensor:
    """Integer product of a linear layer, rescaled group by group, float32 [..., N].

    The sum inside a group is exact: integers are carried in float32 while none can reach 2^24,
    else in float64. Groups are then added in float32, `acc * scale * activation_scale` each.

    Args:
        codes: whole numbers [..., K] of magnitude at most 255, zero_point already subtracted.
        activation_scale: float32: a scalar, [..., 1] per token, or [..., G] per token and group.
        weight: N rows of K codes.

    Raises:
        InputError: EQ-3229, if the shapes do not belong together.

    Source: Q-DiT, group quantization; the kernel it stands for is ONNX Runtime `MatMulNBits`.
    """
    width, group_size = weight.codes.shape[1], weight.group_size
    groups = weight.scale.shape[1]
    columns = activation_scale.shape[-1] if activation_scale.dim() else 1
    if codes.shape[-1] != width or columns not in (1, groups):
        raise InputError(
            "EQ-3229",
            f"codes {list(codes.shape)} with scales {list(activation_scale.shape)} do not fit a "
            f"weight of {width} input channels in {groups} groups",
            hint="activation and weight share one group_size",
        )
    carrier = torch.float32 if group_size <= FLOAT32_EXACT_GROUP else torch.float64
    centred = grouped_view(weight.codes, group_size).to(carrier) - weight.zero_point[..., None]
    # Products with a contiguous row make the whole up to 1.7 times as fast.
    weight_scale = weight.scale.t().contiguous()
    tokens = codes.reshape(-1, width)
    scales = activation_scale.expand(*codes.shape[:-1], columns).reshape(-1, columns)
    y = torch.zeros(len(tokens), weight.codes.shape[0])
    for mine, scale, total in zip(
        tokens.split(CACHED_TOKENS),
        scales.split(CACHED_TOKENS),
        y.split(CACHED_TOKENS),
        strict=True,
    ):
        for index, part in enumerate(mine.split(group_size, -1)):
            rows = centred[:, index, : part.shape[1]]
            accumulator = F.linear(part.to(carrier), rows).to(torch.float32)
            of_group = scale[:, index if columns > 1 else 0, None]
            total.addcmul_(accumulator.mul_(weight_scale[index]), of_group)
    return y.reshape(*codes.shape[:-1], -1)


def _extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _to_float16(scale: Tensor) -> Tensor:
    return scale.clamp(MIN_GROUP_SCALE, MAX_GROUP_SCALE).to(torch.float16).to(torch.float32)


def _covering_scale(low: Tensor, high: Tensor, bits: int) -> Tensor:
    needed = (high - low) / activation_max(bits)
    nearest = _to_float16(needed)
    # Positive floats are ordered like their bit patterns.
    next_up = (nearest.to(torch.float16).view(torch.int16) + 1).view(torch.float16)
    scale = torch.where(nearest < needed, next_up.to(torch.float32), nearest)
    if not bool((scale <= MAX_GROUP_SCALE).all()):
        raise InputError(
            "EQ-3228",
            f"a group of weights spans {float((high - low).max()):.3g}, which is no finite scale "
            "of 16 bits",
            hint="the weights are not finite or far too large: check the checkpoint",
        )
    return scale


def _zero_point(low: Tensor, scale: Tensor, bits: int) -> Tensor:
    return torch.round(-low / scale).clamp(0, activation_max(bits)).to(torch.uint8)


def _codes(groups: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    codes = torch.round(groups / scale[..., None]).add_(zero_point[..., None])
    return codes.clamp_(0, activation_max(bits))


def _search_rows(groups: Tensor, bits: int, power: float) -> tuple[Tensor, Tensor]:
    """Best `(scale, zero_point)` of [N, G, group_size], [N, G] each."""
    low, high = _extremes(groups)
    full = _covering_scale(low, high, bits)
    best_scale, best_zero_point = full, _zero_point(low, full, bits)
    best_loss = torch.full_like(full, torch.inf)
    for shrink in torch.linspace(1.0, SMALLEST_GROUP_SHRINK[bits], N_GROUP_SHRINKS):
        scale = _to_float16(full * shrink)
        # Rounding to float16 moves the far end of the range, and with it the zero_point.
        zero_point = _zero_point(low * shrink, scale, bits)
        shift = zero_point.to(torch.float32)
        real = _codes(groups, scale, shift, bits).sub_(shift[..., None]).mul_(scale[..., None])
        loss = real.sub_(groups).abs_().pow_(power).sum(-1)
        better = loss < best_loss
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
        best_loss = torch.where(better, loss, best_loss)
    return best_scale, best_zero_point


def _check_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or 0 in weight.shape:
        raise InputError(
            "EQ-3226",
            f"a weight in groups has shape {list(weight.shape)}, not [outputs, inputs]",
            hint="only linear layers are quantized in groups",
        )


def _check_weight(weight: Tensor, bits: int) -> None:
    _check_matrix(weight)
    if bits not in SMALLEST_GROUP_SHRINK:
        raise InputError(
            "EQ-3227",
            f"weights in groups of {bits} bits",
            hint=f"widths are {', '.join(map(str, SMALLEST_GROUP_SHRINK))}",
        )


def _check_tables(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> None:
    expected = (codes.shape[0], n_groups(codes.shape[1], group_size))
    if tuple(scale.shape) != expected or tuple(zero_point.shape) != expected:
        raise InputError(
            "EQ-3226",
            f"a weight of shape {list(codes.shape)} in groups of {group_size} has scale "
            f"{list(scale.shape)} and zero_point {list(zero_point.shape)}, not {list(expected)}",
            hint="scale and zero_point have one entry per row and group",
        )
