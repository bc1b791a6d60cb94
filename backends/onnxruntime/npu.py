"""Graphs for execution providers that need constant scales: Q/DQ pairs, one graph per phase.

Convolution: `Q -> DQ -> Conv(DQ weight) -> Q -> DQ -> Add(bias)`.
Linear: `Q -> DQ -> MatMul(DQ weight) -> Add(bias)`.
Activations are uint8 with one constant scale, weights int8 with one scale per output channel and a
zero_point of 0; weights of 4 bits are widened. Layers in float with coded weights are as in the
standard form. The bias is added after the output is rounded, as the integer reference does, so a
Conv has none: the providers ask that it be constant where there is one, see
`docs/decisions/0015-constant-scales-for-npus.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import numpy_helper
from onnx_ir.passes import common as ir_passes
from onnxscript import opset21 as op

from edgeqdm.backends.onnxruntime.lowering import (
    choose_to_onnx,
    constant,
    dequantize_to_onnx,
    drop_unread,
    group_norm_to_onnx,
    plain_attention_to_onnx,
    simplify,
)
from edgeqdm.backends.onnxruntime.phases import DOMAIN, OF_STEP, is_choice
from edgeqdm.emit.backend import Unsupported
from edgeqdm.emit.export import CHOOSE, DEQUANTIZE, QCONV2D, QLINEAR
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import ActivationPolicy

CONSTANT = (ActivationPolicy.STATIC, ActivationPolicy.FLOAT)
MATRIX_OPS = ("Conv", "MatMul", "Gemm", "Einsum")


def unfit(plan: DeploymentPlan) -> tuple[Unsupported, ...]:
    """One line about all layers whose scale is no constant."""
    found = {
        assignment.layer: assignment.policy
        for phase in plan.phases
        for assignment in phase.layers
        if assignment.policy not in CONSTANT
    }
    if not found:
        return ()
    first, policy = next(iter(found.items()))
    others = f", as that of {len(found) - 1} other layers," if len(found) > 1 else ""
    reason = f"form npu needs constant scales, its {policy} one{others} is none"
    return (Unsupported(first, reason, "a plan of `edgeqdm plan --activation static`"),)


def _scale(table: Any) -> Any:
    # Rank 0, else it would be one scale per channel; a constant once `finish` has folded it.
    return op.Squeeze(table)


def _dequantized(weight_q: Any, weight_scale: Any, *, axis: int) -> Any:
    zeros = constant(np.zeros(weight_scale.shape[0], np.int8))
    return op.DequantizeLinear(weight_q, weight_scale, zeros, axis=axis)


def _rounded(x: Any, table: Any, zero_point: int) -> Any:
    scale, code_of_zero = _scale(table), constant(np.array(zero_point, np.uint8))
    codes = op.QuantizeLinear(x, scale, code_of_zero)
    return op.DequantizeLinear(codes, scale, code_of_zero)


def qlinear_to_onnx(
    x: Any,
    weight_q: Any,
    weight_scale: Any,
    bias: Any | None,
    act_scale_table: Any,
    zero_point: int,
    activation_bits: int,
    step: Any,
) -> Any:
    """`edgeqdm::qlinear`; its output is not rounded."""
    weight = _dequantized(op.Transpose(weight_q, perm=[1, 0]), weight_scale, axis=1)
    y = op.MatMul(_rounded(x, act_scale_table, zero_point), weight)
    return y if bias is None else op.Add(y, bias)


def qconv2d_to_onnx(
    x: Any,
    weight_q: Any,
    weight_scale: Any,
    bias: Any | None,
    act_scale_table: Any,
    zero_point: int,
    activation_bits: int,
    out_scale_table: Any,
    out_zero_point: int,
    step: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """`edgeqdm::qconv2d`."""
    y = op.Conv(
        _rounded(x, act_scale_table, zero_point),
        _dequantized(weight_q, weight_scale, axis=0),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )
    real = _rounded(y, out_scale_table, out_zero_point)
    if bias is None:
        return real
    return op.Add(real, op.Unsqueeze(bias, constant(np.array([1, 2], np.int64))))


TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.group_norm.default: group_norm_to_onnx,
    torch.ops.aten.scaled_dot_product_attention.default: plain_attention_to_onnx,
    QLINEAR: qlinear_to_onnx,
    QCONV2D: qconv2d_to_onnx,
    DEQUANTIZE: dequantize_to_onnx,
    CHOOSE: choose_to_onnx,
}


def graphs(model: onnx.ModelProto) -> Mapping[int, onnx.ModelProto]:
    """The graph of every phase, by its first step."""
    whole = simplify(model)
    _fold_scales(whole.graph)
    chosen = [
        tuple(attribute.ints)
        for node in whole.graph.node
        if is_choice(node)
        for attribute in node.attribute
        if attribute.name == OF_STEP
    ]
    # One row per step: what every layer uses there.
    rows = list(zip(*chosen, strict=True)) or [()]
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1]]
    return {start: _at_step(whole, start) for start in starts}


def _fold_scales(graph: onnx.GraphProto) -> None:
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Squeeze" and n.input[0] in tensors]:
        scale = numpy_helper.to_array(tensors[node.input[0]]).squeeze()
        graph.initializer.append(numpy_helper.from_array(np.array(scale), node.output[0]))
        graph.node.remove(node)
    drop_unread(graph)


def _at_step(model: onnx.ModelProto, step: int) -> onnx.ModelProto:
    whole = onnx_ir.from_proto(model)
    for node in [n for n in whole.graph if is_choice(n)]:
        variant = node.attributes[OF_STEP].as_ints()[step]
        output, given = node.outputs[0], node.inputs[2 + variant]
        assert given is not None
        if output.is_graph_output():
            name, output.name = output.name, None
            given.name = name
        onnx_ir.convenience.replace_all_uses_with(output, given, replace_graph_outputs=True)
        whole.graph.remove(node, safe=True)
    whole.graph.opset_imports.pop(DOMAIN, None)
    ir_passes.RemoveUnusedNodesPass()(whole)
    found = onnx_ir.to_proto(whole)
    del found.graph.value_info[:]
    return found


def count_units(graph: onnx.GraphProto) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Matrix operators of two dequantized operands, which a provider computes on integers; others.

    By name each.
    """
    producers = {name: node for node in graph.node for name in node.output}
    integer, floating = dict.fromkeys(MATRIX_OPS, 0), dict.fromkeys(MATRIX_OPS, 0)
    for node in graph.node:
        if node.op_type in MATRIX_OPS:
            sources = [producers.get(name) for name in node.input[:2]]
            coded = all(s is not None and s.op_type == "DequantizeLinear" for s in sources)
            (integer if coded else floating)[node.op_type] += 1
    return integer, floating
