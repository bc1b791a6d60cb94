"""Cheaper forms of what stands between the integer kernels, found by measuring.

`tools/benchmarks/ort_forms.py` measures each of them on and off.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
from onnx import numpy_helper

CHANNELS_OF_A_MAP = 3
"""Rank of a bias of feature maps, [C, 1, 1]."""


def join_biases(graph: onnx_ir.Graph) -> None:
    """Adds biases to each other, or to what is as small as they are, and then to the map.

        (y + b) + e                ->  y + (e + b)           e [B, C, 1, 1], a time embedding
        (y + b) + (shortcut + c)   ->  (y + shortcut) + (b + c)

    Each saves a pass over a feature map.
    """
    for node in list(graph):
        if node.op_type != "Add" or node.graph is None:
            continue
        for place in (0, 1):
            biased, other = node.inputs[place], node.inputs[1 - place]
            if biased is None or other is None or not _added_here_only(biased):
                continue
            if _is_narrow(other):
                _add_to_narrow(graph, node, biased, other)
                break
            if _added_here_only(other):
                _add_biases(graph, node, biased, other)
                break


def _added_here_only(value: onnx_ir.Value) -> bool:
    """Whether a value is a map and a bias of constants, and read once."""
    node = value.producer()
    if node is None or node.op_type != "Add" or len(value.uses()) != 1:
        return False
    return not value.is_graph_output() and _bias(node) is not None


def _bias(node: onnx_ir.Node) -> np.ndarray | None:
    """The constant [C, 1, 1] that an `Add` has as its second input."""
    value = node.inputs[1]
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Unsqueeze":
        stored, axes = (_constant(each) for each in producer.inputs)
        if stored is None or axes is None or stored.ndim != 1 or axes.tolist() != [1, 2]:
            return None
        return stored.reshape(-1, 1, 1)
    found = _constant(value)
    fits = found is not None and found.ndim == CHANNELS_OF_A_MAP and found.shape[1:] == (1, 1)
    return found if fits else None


def _constant(value: onnx_ir.Value | None) -> np.ndarray | None:
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def _is_narrow(value: onnx_ir.Value) -> bool:
    """Whether it is [B, C, 1, 1], made of [B, C]."""
    node = value.producer()
    if node is None or node.op_type != "Unsqueeze":
        return False
    axes = _constant(node.inputs[1])
    return axes is not None and axes.tolist() == [2, 3]


def _parts(value: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Node]:
    """Map, bias and the node that adds them."""
    node = value.producer()
    assert node is not None
    first, second = node.inputs
    assert first is not None
    assert second is not None
    return first, second, node


def _add_to_narrow(
    graph: onnx_ir.Graph, node: onnx_ir.Node, biased: onnx_ir.Value, narrow: onnx_ir.Value
) -> None:
    y, bias, before = _parts(biased)
    sum_ = onnx_ir.node("Add", [narrow, bias], name=f"{before.name}/narrow")
    sum_.outputs[0].name = f"{biased.name}/narrow"
    graph.insert_before(node, sum_)
    node.replace_input_with(0, y)
    node.replace_input_with(1, sum_.outputs[0])
    graph.remove(before, safe=True)


def _add_biases(
    graph: onnx_ir.Graph, node: onnx_ir.Node, biased: onnx_ir.Value, other: onnx_ir.Value
) -> None:
    y, _, before = _parts(biased)
    shortcut, _, beside = _parts(other)
    first, second = _bias(before), _bias(beside)
    assert first is not None
    assert second is not None
    name, summed = f"{biased.name}/biases", first + second
    joined = onnx_ir.Value(
        name=name,
        type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        shape=onnx_ir.Shape(summed.shape),
        const_value=onnx_ir.tensor(summed, name=name),
    )
    graph.register_initializer(joined)
    maps = onnx_ir.node("Add", [y, shortcut], name=f"{before.name}/maps")
    maps.outputs[0].name = f"{biased.name}/maps"
    graph.insert_before(node, maps)
    node.replace_input_with(0, maps.outputs[0])
    node.replace_input_with(1, joined)
    graph.remove([before, beside], safe=True)


def dequantize_at_load(graph: onnx.GraphProto) -> None:
    """Weights out of `DequantizeLinear`, which ONNX Runtime (1.31.1) computes at every run.

        scale * (code - zero_point)    as Cast, Sub and Mul, which it folds where it loads

    Not before: the exporter would fold them too, and the file hold floats.
    """
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    places: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            nodes.append(node)
        elif len(node.input) == 2:
            # By a scale of 1: that of its channels is a factor of its own.
            nodes.append(_cast(node.input[0], node.output[0]))
        else:
            nodes += _shifted_and_scaled(node, tensors[node.input[0]].shape[1], places)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in places.items())


def _shifted_and_scaled(
    node: onnx.NodeProto, width: int, places: dict[str, np.ndarray]
) -> list[onnx.NodeProto]:
    """Weight [N, K] of its codes, scale and zero_point per group of `block_size` columns."""
    block_size = next(a.i for a in node.attribute if a.name == "block_size")
    group = f"groups of {block_size} in {width}"
    places[group] = np.arange(width, dtype=np.int32) // block_size
    codes, scale, zero_point = node.input
    real, zeros, real_zeros, shifted, scales = (
        f"{node.output[0]}/{each}" for each in ("codes", "zeros", "zero", "shifted", "scales")
    )
    return [
        _cast(codes, real),
        onnx.helper.make_node("Gather", [zero_point, group], [zeros], zeros, axis=1),
        _cast(zeros, real_zeros),
        onnx.helper.make_node("Sub", [real, real_zeros], [shifted], shifted),
        onnx.helper.make_node("Gather", [scale, group], [scales], scales, axis=1),
        onnx.helper.make_node("Mul", [shifted, scales], [node.output[0]], node.output[0]),
    ]


def _cast(codes: str, real: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [codes], [real], real, to=onnx.TensorProto.FLOAT)
