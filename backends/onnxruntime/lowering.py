"""The custom ops in the forms ONNX Runtime has integer kernels for.

Convolution: `QuantizeLinear -> QLinearConv (no bias) -> DequantizeLinear -> Add(bias)`.
Linear: `QuantizeLinear -> MatMulInteger -> Cast -> Mul(scale * weight_scale) -> Add(bias)`, which
the runtime fuses to `MatMulIntegerToFloat`. Scales are rank-0 tensors gathered by `step`; codes are
uint8 with a constant zero_point, weights int8 with zero_point 0 per output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import numpy_helper
from onnx_ir.passes import common as ir_passes
from onnxscript import opset21 as op

from edgeqdm.emit.export import QCONV2D, QLINEAR

IR_VERSION = 10


def _constant(value: np.ndarray) -> Any:
    return op.Constant(value=numpy_helper.from_array(value))


def _zero_point(zero_point: int) -> Any:
    return _constant(np.array(zero_point, np.uint8))


def _at_step(table: Any, step: Any) -> Any:
    # Not a constant 0 for a table of one row: the runtime would fold the scale into weight_scale
    # and no longer recognise a MatMulIntegerToFloat.
    index = step if table.shape[0] != 1 else op.Min(step, _constant(np.array(0, np.int64)))
    return op.Gather(table, index, axis=0)


def qlinear_to_onnx(
    x: Any,
    weight_q: Any,
    weight_scale: Any,
    bias: Any | None,
    act_scale_table: Any,
    zero_point: int,
    step: Any,
) -> Any:
    """`edgeqdm::qlinear`; the product of the scales stays in the graph, else it is not fused."""
    scale = _at_step(act_scale_table, step)
    code_of_zero = _zero_point(zero_point)
    codes = op.QuantizeLinear(x, scale, code_of_zero)
    accumulator = op.MatMulInteger(codes, op.Transpose(weight_q, perm=[1, 0]), code_of_zero)
    y = op.Mul(op.Cast(accumulator, to=onnx.TensorProto.FLOAT), op.Mul(scale, weight_scale))
    return y if bias is None else op.Add(y, bias)


def qconv2d_to_onnx(
    x: Any,
    weight_q: Any,
    weight_scale: Any,
    bias: Any | None,
    act_scale_table: Any,
    zero_point: int,
    out_scale_table: Any,
    out_zero_point: int,
    step: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """`edgeqdm::qconv2d`; a bias in QLinearConv leaves the fast kernel, so it is added after."""
    scale, out_scale = _at_step(act_scale_table, step), _at_step(out_scale_table, step)
    code_of_zero, out_code_of_zero = _zero_point(zero_point), _zero_point(out_zero_point)
    channels = weight_q.shape[0]
    y = op.QLinearConv(
        op.QuantizeLinear(x, scale, code_of_zero),
        scale,
        code_of_zero,
        weight_q,
        weight_scale,
        _constant(np.zeros(channels, np.int8)),
        out_scale,
        out_code_of_zero,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )
    real = op.DequantizeLinear(y, out_scale, out_code_of_zero)
    if bias is None:
        return real
    return op.Add(real, op.Unsqueeze(bias, _constant(np.array([1, 2], np.int64))))


def group_norm_to_onnx(
    x: Any,
    num_groups: int,
    weight: Any | None = None,
    bias: Any | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Group normalisation as instance normalisation over the groups, then scale and shift.

    ONNX Runtime has no CPU kernel for `GroupNormalization` and expands it to about twelve nodes;
    this form runs in 0.7 of that time.
    """
    flat = op.Reshape(x, _constant(np.array([0, num_groups, -1], np.int64)))
    ones, zeros = np.ones(num_groups, np.float32), np.zeros(num_groups, np.float32)
    unit = op.InstanceNormalization(flat, _constant(ones), _constant(zeros), epsilon=eps)
    y = op.Reshape(unit, _constant(np.array([0, *x.shape[1:]], np.int64)))
    spatial = _constant(np.arange(1, len(x.shape) - 1, dtype=np.int64))
    if weight is not None:
        y = op.Mul(y, op.Unsqueeze(weight, spatial))
    return y if bias is None else op.Add(y, op.Unsqueeze(bias, spatial))


TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.group_norm.default: group_norm_to_onnx,
    QLINEAR: qlinear_to_onnx,
    QCONV2D: qconv2d_to_onnx,
}


def finish(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, share equal initializers and equal nodes, drop everything private.

    The exporter attaches source text and local paths to every node; they do not ship.
    """
    graph = onnx_ir.from_proto(model)
    for apply in (
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ir_passes.DeduplicateInitializersPass(),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.RemoveUnusedNodesPass(),
    ):
        apply(graph)
    finished = onnx_ir.to_proto(graph)
    finished.ir_version = IR_VERSION
    _strip(finished)
    return finished


def _strip(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
