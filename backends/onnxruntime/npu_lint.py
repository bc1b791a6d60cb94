"""Rules that a graph of constant scales must keep so that execution providers take its layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import numpy_helper

from edgeqdm.emit.export import OPSET
from edgeqdm.errors import VerifyError

Tensors = dict[str, np.ndarray]
Producers = dict[str, onnx.NodeProto]
Rule = Callable[[onnx.NodeProto, Tensors, Producers], str | None]
FORBIDDEN = ("If", "Loop", "Scan", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
"""Control flow, which these providers do not enter, and integers outside of Q/DQ pairs."""


def check_npu_graph(model: onnx.ModelProto) -> None:
    """Raise VerifyError listing every node that breaks a rule, by name and rule."""
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    faults = [
        f"opset {entry.domain or 'ai.onnx'} {entry.version}"
        for entry in model.opset_import
        if entry.domain or entry.version > OPSET
    ]
    for node in model.graph.node:
        if node.domain or node.op_type in FORBIDDEN:
            faults.append(f"{node.name}: {node.op_type} is none of the operators providers take")
            continue
        rule = RULES.get(node.op_type)
        fault = None if rule is None else rule(node, tensors, producers)
        if fault is not None:
            faults.append(f"{node.name}: {fault}")
    if faults:
        listed = "; ".join(faults[:10])
        raise VerifyError("EQ-8303", f"{len(faults)} faults in the graph: {listed}")


def _is_scale(values: np.ndarray) -> bool:
    finite = bool(np.all(np.isfinite(values)) and np.all(values > 0))
    return values.dtype == np.float32 and finite


def _activation(node: onnx.NodeProto, tensors: Tensors, producers: Producers) -> str | None:
    scale, zero_point = (
        tensors.get(node.input[k]) if len(node.input) > k else None for k in (1, 2)
    )
    if scale is None or zero_point is None:
        return "scale or zero_point is no constant"
    if scale.ndim or zero_point.ndim:
        return f"scale has rank {scale.ndim}, zero_point {zero_point.ndim}: not one per tensor"
    if zero_point.dtype != np.uint8:
        return f"zero_point is {zero_point.dtype}, not uint8"
    return None if _is_scale(scale) else "scale is not finite and positive"


def _dequantize(node: onnx.NodeProto, tensors: Tensors, producers: Producers) -> str | None:
    codes = tensors.get(node.input[0])
    if codes is not None:
        return _weight(node, codes, tensors)
    source = producers.get(node.input[0])
    if source is None or source.op_type != "QuantizeLinear":
        return "codes are neither a constant nor those of a QuantizeLinear"
    return _activation(node, tensors, producers)


def _weight(node: onnx.NodeProto, codes: np.ndarray, tensors: Tensors) -> str | None:
    scale, zero_point = (
        tensors.get(node.input[k]) if len(node.input) > k else None for k in (1, 2)
    )
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if codes.dtype != np.int8:
        return f"weight is {codes.dtype}, not int8"
    if scale is not None and scale.ndim == 0 and scale == 1 and len(node.input) == 2:
        return None  # Of a layer in float, whose scales are a factor of their own.
    if scale is None or scale.shape != (codes.shape[axis],) or not _is_scale(scale):
        return "weight has not one constant scale per output channel, finite and positive"
    if zero_point is None or zero_point.dtype != np.int8 or np.any(zero_point):
        return "weight zero_point is not a constant 0"
    return None


def _bias(node: onnx.NodeProto, tensors: Tensors, producers: Producers) -> str | None:
    if len(node.input) < 3 or not node.input[2] or node.input[2] in tensors:
        return None
    return "bias is no constant"


RULES: dict[str, Rule] = {
    "QuantizeLinear": _activation,
    "DequantizeLinear": _dequantize,
    "Conv": _bias,
}
