"""Rules an emitted graph must keep so that it runs on integer kernels everywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import numpy_helper

from edgeqdm.errors import VerifyError

Tensors = dict[str, np.ndarray]
Producers = dict[str, onnx.NodeProto]
Rule = Callable[[onnx.NodeProto, Tensors, Producers], str | None]


def check_graph(model: onnx.ModelProto) -> None:
    """Raise VerifyError listing every node that breaks a rule, by name and rule."""
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    # What is stored in fewer bits is widened where the graph is loaded.
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in tensors:
            wide = onnx.helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
            tensors[node.output[0]] = tensors[node.input[0]].astype(wide)
    producers = {output: node for node in model.graph.node for output in node.output}
    faults = [*_graph_faults(model)]
    for node in model.graph.node:
        for rule in RULES.get(node.op_type, ()):
            fault = rule(node, tensors, producers)
            if fault is not None:
                faults.append(f"{node.name}: {fault}")
    if faults:
        listed = "; ".join(faults[:10])
        raise VerifyError("EQ-8302", f"{len(faults)} faults in the graph: {listed}")


def _graph_faults(model: onnx.ModelProto) -> list[str]:
    faults = []
    names = [node.name for node in model.graph.node]
    if len(set(names)) != len(names):
        faults.append("node names are not unique")
    if any(node.metadata_props or node.doc_string for node in model.graph.node):
        faults.append("nodes carry metadata with local paths")
    return faults


def _scale(name: str, tensors: Tensors, producers: Producers) -> str | None:
    values = tensors.get(name)
    if values is None:
        source = producers.get(name)
        if source is None or source.op_type != "Gather" or source.input[0] not in tensors:
            return f"scale {name} is neither a constant nor gathered from a table"
        values = tensors[source.input[0]]
        if values.ndim != 1:
            return f"scale table {source.input[0]} has rank {values.ndim}, not 1"
    elif values.ndim != 0:
        return f"scale {name} has rank {values.ndim}: that means per axis"
    if not np.all(np.isfinite(values)) or not np.all(values > 0):
        return f"scale {name} is not finite and positive at every step"
    return None


def _quantize(node: onnx.NodeProto, tensors: Tensors, producers: Producers) -> str | None:
    zero_point = tensors.get(node.input[2]) if len(node.input) > 2 else None
    if zero_point is None or zero_point.dtype != np.uint8:
        return "zero_point is not a uint8 constant: leaves the fast kernels"
    return _scale(node.input[1], tensors, producers)


def _qlinear_conv(node: onnx.NodeProto, tensors: Tensors, producers: Producers) -> str | None:
    if len(node.input) > 8 and node.input[8]:
        return "QLinearConv has a bias: leaves the fast kernel, and is dropped by some runtimes"
    weight, weight_zero_point = tensors.get(node.input[3]), tensors.get(node.input[5])
    if weight is None or weight.dtype != np.int8:
        return "weight is not an int8 constant"
    if weight_zero_point is None or np.any(weight_zero_point):
        return "weight zero_point is not a constant 0"
    return _scale(node.input[1], tensors, producers) or _scale(node.input[6], tensors, producers)


def _matmul_integer(node: onnx.NodeProto, tensors: Tensors, producers: Producers) -> str | None:
    weight = tensors.get(node.input[1])
    if weight is None or weight.dtype != np.int8:
        return "weight is not an int8 constant"
    if len(node.input) > 3 and node.input[3]:
        return "weight has a zero_point: leaves the fast kernels"
    return None


def _matmul_nbits(node: onnx.NodeProto, tensors: Tensors, producers: Producers) -> str | None:
    levels = [a.i for a in node.attribute if a.name == "accuracy_level"]
    return None if levels == [4] else "MatMulNBits computes in float below accuracy level 4"


def _refused(node: onnx.NodeProto, tensors: Tensors, producers: Producers) -> str | None:
    return f"{node.op_type} has no fast kernel on this target"


RULES: dict[str, tuple[Rule, ...]] = {
    "QuantizeLinear": (_quantize,),
    "QLinearConv": (_qlinear_conv,),
    "MatMulInteger": (_matmul_integer,),
    "ConvInteger": (_refused,),
    "MatMulNBits": (_matmul_nbits,),
    "QLinearMatMul": (_refused,),
}
