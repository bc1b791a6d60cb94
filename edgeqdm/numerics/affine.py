"""The one affine quantizer: `real = scale * (q - zero_point)`."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATION_MAX = 255
"""Activations are stored as unsigned 8-bit codes, 0..255."""
WEIGHT_MAX = 127
"""Weights are stored as signed codes, -127..127, zero_point 0."""
MIN_SCALE = 2.0**-60
"""Floor of every scale: small enough to be exact, large enough that 1 / scale is finite."""


def quantize_activation(x: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    """Codes of `x` as float32 integers in 0..255, rounded half to even.

    Args:
        x: float32, any shape.
        scale: float32, broadcastable to x.
        zero_point: code of 0, 0..255.

    Source: ONNX operator `QuantizeLinear`, opset 21, uint8.
    """
    return torch.clamp(torch.round(x / scale) + zero_point, 0, ACTIVATION_MAX)


def dequantize_activation(codes: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    """Inverse of `quantize_activation` up to rounding and clipping."""
    return (codes - zero_point) * scale


def quantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 codes of a weight [C_out, ...] for one scale per output channel [C_out]."""
    per_channel = scale.reshape(-1, *([1] * (weight.dim() - 1)))
    return torch.clamp(torch.round(weight / per_channel), -WEIGHT_MAX, WEIGHT_MAX).to(torch.int8)
