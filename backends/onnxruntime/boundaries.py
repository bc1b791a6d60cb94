"""Graphs of nothing but a conversion between two layers."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeqdm.emit.export import OPSET
from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.profile import BoundaryKind

IR_VERSION = 10


def boundary_graph(kind: BoundaryKind, shape: tuple[int, ...]) -> onnx.ModelProto:
    """float32 `sample` of `shape` -> its codes.

    Raises:
        UnsupportedError: EQ-4432, for other kinds: the graph of a layer contains them.
    """
    if kind is not BoundaryKind.QUANTIZE:
        raise UnsupportedError(
            "EQ-4432",
            f"no layer leaves {kind} to another one",
            path=str(kind),
            hint="ask for quantize, which layers fed the same tensor share",
        )
    scale = numpy_helper.from_array(np.array(0.03, np.float32), "scale")
    zero_point = numpy_helper.from_array(np.array(128, np.uint8), "zero_point")
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["sample", "scale", "zero_point"], ["codes"])],
        "boundary",
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, shape)],
        [scale, zero_point],
    )
    return helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
