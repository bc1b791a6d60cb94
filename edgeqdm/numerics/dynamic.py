"""Activation scales taken from the values themselves, at run time.

The grid is symmetric: codes -(2^(bits-1) - 1)..2^(bits-1) - 1, zero_point 0. The asymmetric form of
the paper has no kernel on the runtimes here.

Rounding is that of ONNX Runtime's `MatMulNBits` at accuracy level 4 on x86: `x * (127 / peak)`,
half to even; `x / scale` puts some values next to a rounding boundary on its other side.

Source: Q-DiT, https://arxiv.org/abs/2406.17343, dynamic activation quantization.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeqdm.errors import InputError
from edgeqdm.numerics.affine import weight_max
from edgeqdm.numerics.grouping import grouped_view

MIN_PEAK = 2.0**-100
"""Below it the largest value counts as this one, so that its reciprocal stays finite."""


def quantize_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes with one scale per token.

    Args:
        x: float [..., K]; the last axis is one token.
        bits: width of a code, 2 to 8.

    Returns:
        `(codes, scale)`: whole numbers as float32 [..., K] and float32 [..., 1]. Zeros have codes 0
        and a positive scale; an infinite or undefined value makes its token's codes undefined.

    Raises:
        InputError: EQ-3230, if a symmetric grid of so many bits does not exist or a token has no
            channel.
    """
    _check(x, bits)
    x = x.to(torch.float32)
    return _quantize(x, x.abs().amax(-1, keepdim=True), bits)


def quantize_per_token_group(x: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes with one scale per token and group of `group_size` channels.

    Args:
        x: float [..., K]; the last group is narrower where group_size does not divide K.
        group_size: neighbouring channels that share a scale.
        bits: width of a code, 2 to 8.

    Returns:
        `(codes, scale)`: whole numbers as float32 [..., K] and float32 [..., G]. Zeros have codes 0
        and a positive scale; an infinite or undefined value makes its group's codes undefined.

    Raises:
        InputError: EQ-3230, if a symmetric grid of so many bits does not exist or a token has no
            channel; EQ-3225, for a group_size below 1.
    """
    _check(x, bits)
    groups = grouped_view(x.to(torch.float32), group_size)
    codes, scale = _quantize(groups, groups.abs().amax(-1, keepdim=True), bits)
    return codes.flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def _quantize(x: Tensor, peak: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    peak = peak.clamp(min=MIN_PEAK)
    # Of a plain number over a tensor torch takes the reciprocal first, and so rounds twice.
    limit = torch.full_like(peak, weight_max(bits))
    return torch.round(x * (limit / peak)), peak / limit


def _check(x: Tensor, bits: int) -> None:
    if not 2 <= bits <= 8 or not x.dim() or not x.shape[-1]:
        raise InputError(
            "EQ-3230",
            f"an activation of shape {list(x.shape)} cannot be coded per token in {bits} bits",
            hint="a token is the last axis; widths are 2 to 8",
        )
