"""The custom ops. Their eager form is the exact integer reference of every backend.

    edgeqdm::qlinear(x, weight_q, weight_scale, bias, act_scale_table, zero_point,
                     activation_bits, step)
    edgeqdm::qconv2d(x, weight_q, weight_scale, bias, act_scale_table, zero_point,
                     activation_bits, out_scale_table, out_zero_point, step,
                     stride, padding, dilation, groups)
    edgeqdm::qlinear_grouped(x, weight_q, weight_scale, weight_zero_point, bias, group_size,
                             act_scale_table, zero_point, activation_bits, step)
    edgeqdm::qlinear_dynamic(x, weight_q, weight_scale, weight_zero_point, bias, group_size,
                             activation_bits)
    edgeqdm::dequantize(weight_q, weight_scale, weight_zero_point, group_size)
    edgeqdm::choose(x, outputs, of_step, step)

`act_scale_table` and `out_scale_table` are float32 [S] (or [1]), indexed by the int64 scalar
`step`. Per output channel, `weight_q` is int8 and `weight_scale` [C_out]; in groups, `weight_q` is
uint8 [C_out, C_in], `weight_scale` and `weight_zero_point` are [C_out, G]. Accumulation is exact:
integers are carried in float32 while no partial sum can reach 2^24, else in float64. Scales are
multiplied in float32, in the order the integer kernels use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeqdm.numerics.affine import (
    ACTIVATION_BITS,
    activation_max,
    centred_codes,
    weight_max,
)
from edgeqdm.numerics.dynamic import quantize_per_token, quantize_per_token_group
from edgeqdm.numerics.grouping import GroupedWeight, dequantize_grouped, grouped_matmul

FLOAT32_EXACT = 2**24


def at_step(table: Tensor, step: Tensor) -> Tensor:
    """Row of a table for a step; a table of one row serves every step."""
    return table[0] if table.shape[0] == 1 else table[step]


def _carried(weight_q: Tensor, largest_code: int) -> Tensor:
    """The weight in the narrowest float type in which no partial sum of a row can round."""
    weight = weight_q.to(torch.float32)
    # Row sums beyond 2^24 round themselves, by less than 1 in 1e6.
    bound = float(weight.flatten(1).abs().sum(1).max()) * largest_code
    return weight if bound < FLOAT32_EXACT * (1 - 1e-6) else weight.to(torch.float64)


@torch.library.custom_op("edgeqdm::qlinear", mutates_args=())
def qlinear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_scale_table: Tensor,
    zero_point: int,
    activation_bits: int,
    step: Tensor,
) -> Tensor:
    """Linear layer on integers, float32 [..., C_in] -> [..., C_out]; the output is not rounded.

    Source: ONNX Runtime `MatMulIntegerToFloat`: `acc * (scale * weight_scale) + bias`.
    """
    scale = at_step(act_scale_table, step)
    weight = _carried(weight_q, max(zero_point, activation_max(activation_bits) - zero_point))
    codes = centred_codes(x, scale, zero_point, activation_bits).to(weight.dtype)
    y = F.linear(codes, weight).to(torch.float32).mul_(scale * weight_scale)
    return y if bias is None else y + bias


@qlinear.register_fake
def _(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_scale_table: Tensor,
    zero_point: int,
    activation_bits: int,
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
    activation_bits: int,
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
    weight = _carried(weight_q, max(zero_point, activation_max(activation_bits) - zero_point))
    codes = centred_codes(x, scale, zero_point, activation_bits).to(weight.dtype)
    accumulator = F.conv2d(
        codes,
        weight,
        None,
        list(stride),
        list(padding),
        list(dilation),
        groups,
    ).to(torch.float32)
    multiplier = (scale * weight_scale / out_scale)[:, None, None]
    highest = activation_max(ACTIVATION_BITS) - out_zero_point
    rounded = accumulator.mul_(multiplier).round_().clamp_(-out_zero_point, highest)
    y = rounded.mul_(out_scale)
    return y if bias is None else y.add_(bias[:, None, None])


@qconv2d.register_fake
def _(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    act_scale_table: Tensor,
    zero_point: int,
    activation_bits: int,
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


@torch.library.custom_op("edgeqdm::qlinear_grouped", mutates_args=())
def qlinear_grouped(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    group_size: int,
    act_scale_table: Tensor,
    zero_point: int,
    activation_bits: int,
    step: Tensor,
) -> Tensor:
    """Linear layer with one weight scale per row and group of input channels, scale from a table.

    Source: Q-DiT, section 3.2; the integer sum of a group is rescaled and added in float32.
    """
    scale = at_step(act_scale_table, step)
    codes = centred_codes(x, scale, zero_point, activation_bits)
    weight = _grouped(weight_q, weight_scale, weight_zero_point, group_size)
    y = grouped_matmul(codes, scale, weight)
    return y if bias is None else y + bias


@qlinear_grouped.register_fake
def _(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    bias: Tensor | None,
    group_size: int,
    act_scale_table: Tensor,
    zero_point: int,
    activation_bits: int,
    step: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_q.shape[0]))


@torch.library.custom_op("edgeqdm::qlinear_dynamic", mutates_args=())
def qlinear_dynamic(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    activation_bits: int,
) -> Tensor:
    """Linear layer whose activation scales come from the values: per token, or token and group.

    `group_size` 0 is one scale per token and int8 weights per output channel.

    Source: Q-DiT, section 3.3, on the symmetric grid; in groups ONNX Runtime `MatMulNBits`,
    accuracy level 4.
    """
    if weight_zero_point is None:
        codes, scale = quantize_per_token(x, activation_bits)
        carried = _carried(weight_q, weight_max(activation_bits))
        accumulator = F.linear(codes.to(carried.dtype), carried).to(torch.float32)
        y = accumulator * weight_scale * scale
    else:
        codes, scale = quantize_per_token_group(x, group_size, activation_bits)
        weight = _grouped(weight_q, weight_scale, weight_zero_point, group_size)
        y = grouped_matmul(codes, scale, weight)
    return y if bias is None else y + bias


@qlinear_dynamic.register_fake
def _(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    activation_bits: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_q.shape[0]))


@torch.library.custom_op("edgeqdm::dequantize", mutates_args=())
def dequantize(
    weight_q: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, group_size: int
) -> Tensor:
    """float32 weight of its codes, for layers whose activations stay in float."""
    if weight_zero_point is None:
        return weight_q.to(torch.float32) * weight_scale.reshape(-1, *([1] * (weight_q.dim() - 1)))
    weight = _grouped(weight_q, weight_scale, weight_zero_point, group_size)
    # A narrower last group is cut off a padded row; the op promises a row without a gap.
    return dequantize_grouped(weight).contiguous()


@dequantize.register_fake
def _(
    weight_q: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, group_size: int
) -> Tensor:
    return weight_scale.new_empty(weight_q.shape)


@torch.library.custom_op("edgeqdm::choose", mutates_args=())
def choose(x: Tensor, outputs: Sequence[Tensor], of_step: Sequence[int], step: Tensor) -> Tensor:
    """The output of the variant that a step uses, `outputs[of_step[step]]`.

    All of them are outputs of one layer that is fed `x`, which tells layers that are fed alike.
    """
    return outputs[of_step[int(step)]].clone()


@choose.register_fake
def _(x: Tensor, outputs: Sequence[Tensor], of_step: Sequence[int], step: Tensor) -> Tensor:
    return outputs[0].new_empty(outputs[0].shape)


def _grouped(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> GroupedWeight:
    # The width of the codes plays no part in the arithmetic.
    return GroupedWeight(codes, scale, zero_point, 8, group_size)


QLINEAR: Callable[..., Any] = torch.ops.edgeqdm.qlinear.default
QCONV2D: Callable[..., Any] = torch.ops.edgeqdm.qconv2d.default
QLINEAR_GROUPED: Callable[..., Any] = torch.ops.edgeqdm.qlinear_grouped.default
QLINEAR_DYNAMIC: Callable[..., Any] = torch.ops.edgeqdm.qlinear_dynamic.default
DEQUANTIZE: Callable[..., Any] = torch.ops.edgeqdm.dequantize.default
CHOOSE: Callable[..., Any] = torch.ops.edgeqdm.choose.default
"""The registered overloads, as an exported graph calls them."""
