"""The one affine quantizer: `real = scale * (q - zero_point)`."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATION_BITS = 8
WEIGHT_BITS = 8
MIN_SCALE = 2.0**-60
"""Floor of every scale: small enough to be exact, large enough that 1 / scale is finite."""


def activation_max(bits: int) -> int:
    """Largest activation code; codes are unsigned, 0..2^bits - 1."""
    return (1 << bits) - 1


def weight_max(bits: int) -> int:
    """Largest weight code; codes are signed, -(2^(bits-1) - 1)..2^(bits-1) - 1, zero_point 0."""
    return (1 << (bits - 1)) - 1


def quantize_activation(
    x: Tensor, scale: Tensor, zero_point: int, bits: int = ACTIVATION_BITS
) -> Tensor:
    """Codes of `x` as float32 integers in 0..2^bits - 1, rounded half to even.

    Args:
        x: float32, any shape.
        scale: float32, broadcastable to x.
        zero_point: code of 0, 0..2^bits - 1.
        bits: width of the codes.

    Source: ONNX operator `QuantizeLinear`, opset 21, uint8.
    """
    return torch.clamp(torch.round(x / scale) + zero_point, 0, activation_max(bits))


def centred_codes(x: Tensor, scale: Tensor, zero_point: int, bits: int = ACTIVATION_BITS) -> Tensor:
    """`quantize_activation(...) - zero_point` in fewer passes over memory."""
    codes = torch.div(x, scale).round_()
    return codes.clamp_(-zero_point, activation_max(bits) - zero_point)


def dequantize_activation(codes: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    """Inverse of `quantize_activation` up to rounding and clipping."""
    return (codes - zero_point) * scale


def quantize_weight(weight: Tensor, scale: Tensor, bits: int = WEIGHT_BITS) -> Tensor:
    """int8 codes of a weight [C_out, ...] for one scale per output channel [C_out]."""
    per_channel = scale.reshape(-1, *([1] * (weight.dim() - 1)))
    limit = weight_max(bits)
    return torch.clamp(torch.round(weight / per_channel), -limit, limit).to(torch.int8)
