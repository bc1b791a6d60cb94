"""Graphs of nothing but a conversion between two layers."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeqdm.emit.export import OPSET
from edgeqdm.ir.profile import BoundaryKind

IR_VERSION = 10


def boundary_graph(kind: BoundaryKind, shape: tuple[int, ...]) -> onnx.ModelProto:
    """float32 `sample` of `shape` -> its codes, its codes in float again, or channels last.

    What follows a dequantization cannot be timed without the quantization before it.
    """
    scale = numpy_helper.from_array(np.array(0.03, np.float32), "scale")
    zero_point = numpy_helper.from_array(np.array(128, np.uint8), "zero_point")
    quantize = helper.make_node("QuantizeLinear", ["sample", "scale", "zero_point"], ["codes"])
    dequantize = helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["output"])
    channels_last = (0, *range(2, len(shape)), 1)
    transpose = helper.make_node("Transpose", ["sample"], ["output"], perm=list(channels_last))
    nodes, output, kind_of = {
        BoundaryKind.QUANTIZE: ([quantize], "codes", TensorProto.UINT8),
        BoundaryKind.DEQUANTIZE: ([quantize, dequantize], "output", TensorProto.FLOAT),
        BoundaryKind.LAYOUT: ([transpose], "output", TensorProto.FLOAT),
    }[kind]
    order = channels_last if kind is BoundaryKind.LAYOUT else range(len(shape))
    graph = helper.make_graph(
        nodes,
        "boundary",
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, kind_of, [shape[axis] for axis in order])],
        [] if kind is BoundaryKind.LAYOUT else [scale, zero_point],
    )
    return helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
