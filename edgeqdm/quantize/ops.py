"""The two custom ops. Their eager form is the exact integer reference of every backend.

    edgeqdm::qlinear(x, weight_q, weight_scale, bias, act_scale_table, zero_point, step)
    edgeqdm::qconv2d(x, weight_q, weight_scale, bias, act_scale_table, zero_point,
                     out_scale_table, out_zero_point, step, stride, padding, dilation, groups)

`act_scale_table` and `out_scale_table` are float32 [S] (or [1]), indexed by the int64 scalar
`step`. Accumulation is exact: integers are carried in float32 while no partial sum can reach 2^24,
else in float64. Scales are multiplied in float32, in the order the integer kernels use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeqdm.numerics.affine import ACTIVATION_MAX, quantize_activation

FLOAT32_EXACT = 2**24


def at_step(table: Tensor, step: Tensor) -> Tensor:
    """Row of a table for a step; a table of one row serves every step."""
    return table[0] if table.shape[0] == 1 else table[step]


def _carrier(weight_q: Tensor, zero_point: int) -> torch.dtype:
    largest_code = max(zero_point, ACTIVATION_MAX - zero_point)
    row_sums = weight_q.reshape(weight_q.shape[0], -1).to(torch.int64).abs().sum(1)
    bound = int(row_sums.max()) * largest_code
    return torch.float32 if bound < FLOAT32_EXACT else torch.float64


@torch.library.custom_op("edgeqdm::qlinear", mutates_args=())
def qlinear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_scale_table: Tensor,
    zero_point: int,
    step: Tensor,
) -> Tensor:
    """Linear layer on integers, float32 [..., C_in] -> [..., C_out]; the output is not rounded.

    Source: ONNX Runtime `MatMulIntegerToFloat`: `acc * (scale * weight_scale) + bias`.
    """
    scale = at_step(act_scale_table, step)
    carrier = _carrier(weight_q, zero_point)
    codes = (quantize_activation(x, scale, zero_point) - zero_point).to(carrier)
    accumulator = F.linear(codes, weight_q.to(carrier)).to(torch.float32)
    y = accumulator * (scale * weight_scale)
    return y if bias is None else y + bias


@qlinear.register_fake
def _(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_scale_table: Tensor,
    zero_point: int,
    step: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_q.shape[0]))


@torch.library.custom_op("edgeqdm::qconv2d", mutates_args=())
def qconv2d(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_scale_table: Tensor,
    zero_point: int,
    out_scale_table: Tensor,
    out_zero_point: int,
    step: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution on integers, float32 [B, C_in, H, W] -> [B, C_out, H', W'].

    The bias-free output is rounded to 8 bits with its own scale before the bias is added, as
    `QLinearConv` does.

    Source: ONNX Runtime `QLinearConv`: `round(acc * (scale * weight_scale / out_scale))`.
    """
    scale, out_scale = at_step(act_scale_table, step), at_step(out_scale_table, step)
    carrier = _carrier(weight_q, zero_point)
    codes = (quantize_activation(x, scale, zero_point) - zero_point).to(carrier)
    accumulator = F.conv2d(
        codes,
        weight_q.to(carrier),
        None,
        list(stride),
        list(padding),
        list(dilation),
        groups,
    ).to(torch.float32)
    multiplier = (scale * weight_scale / out_scale)[:, None, None]
    rounded = torch.clamp(
        torch.round(accumulator * multiplier), -out_zero_point, ACTIVATION_MAX - out_zero_point
    )
    y = rounded * out_scale
    return y if bias is None else y + bias[:, None, None]


@qconv2d.register_fake
def _(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_scale_table: Tensor,
    zero_point: int,
    out_scale_table: Tensor,
    out_zero_point: int,
    step: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    def extent(axis: int) -> int:
        kernel = dilation[axis] * (weight_q.shape[2 + axis] - 1) + 1
        return int((x.shape[2 + axis] + 2 * padding[axis] - kernel) // stride[axis] + 1)

    return x.new_empty((x.shape[0], weight_q.shape[0], extent(0), extent(1)))


QLINEAR: Callable[..., Any] = torch.ops.edgeqdm.qlinear.default
QCONV2D: Callable[..., Any] = torch.ops.edgeqdm.qconv2d.default
"""The registered overloads, as an exported graph calls them."""
