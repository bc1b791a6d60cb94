"""The custom ops in the forms ONNX Runtime has integer kernels for.

Convolution: `QuantizeLinear -> QLinearConv (no bias) -> DequantizeLinear -> Add(bias)`.
Linear: `QuantizeLinear -> MatMulInteger -> Cast -> Mul(scale * weight_scale) -> Add(bias)`, which
the runtime fuses to `MatMulIntegerToFloat`. Scales are rank-0 tensors gathered by `step`; codes are
uint8 with a constant zero_point, weights int8 with zero_point 0 per output channel; weights of 4
bits are stored in 4 and cast where the graph is loaded. Linear with groups and run-time scales:
`MatMulNBits` at accuracy level 4, which quantizes each token and block itself.
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
from onnxscript import values

from edgeqdm.backends.onnxruntime.blockwise import to_matmulnbits
from edgeqdm.backends.onnxruntime.phases import CHOOSE as CHOOSE_NODE
from edgeqdm.backends.onnxruntime.phases import DOMAIN, OF_STEP
from edgeqdm.backends.onnxruntime.rewrites import dequantize_at_load, join_biases
from edgeqdm.emit.export import CHOOSE, DEQUANTIZE, QCONV2D, QLINEAR, QLINEAR_DYNAMIC
from edgeqdm.errors import UnsupportedError

IR_VERSION = 10
MICROSOFT = "com.microsoft"
FOUR_BITS = {
    onnx.TensorProto.INT8: (onnx.TensorProto.INT4, -8, 7),
    onnx.TensorProto.UINT8: (onnx.TensorProto.UINT4, 0, 15),
}
"""Per type of codes: the narrow type, its least and its largest code."""
ON_INTEGERS = 4
"""`accuracy_level` at which `MatMulNBits` quantizes its input to 8 bits."""


def constant(value: np.ndarray) -> Any:
    return op.Constant(value=numpy_helper.from_array(value))


def _zero_point(zero_point: int) -> Any:
    return constant(np.array(zero_point, np.uint8))


def _at_step(table: Any, step: Any) -> Any:
    # Not a constant 0 for a table of one row: the runtime would fold the scale into weight_scale
    # and no longer recognise a MatMulIntegerToFloat.
    index = step if table.shape[0] != 1 else op.Min(step, constant(np.array(0, np.int64)))
    return op.Gather(table, index, axis=0)


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
    activation_bits: int,
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
        constant(np.zeros(channels, np.int8)),
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
    return op.Add(real, op.Unsqueeze(bias, constant(np.array([1, 2], np.int64))))


def group_norm_to_onnx(
    x: Any,
    num_groups: int,
    weight: Any | None = None,
    bias: Any | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Group normalisation as instance normalisation over the groups, then scale and shift.

    ONNX Runtime has no CPU kernel for `GroupNormalization` and expands it to about twelve nodes.
    Scale and shift are a batch normalisation of mean 0 and variance 1, one pass over the map where
    `Mul` and `Add` are two.
    """
    flat = op.Reshape(x, constant(np.array([0, num_groups, -1], np.int64)))
    ones, zeros = np.ones(num_groups, np.float32), np.zeros(num_groups, np.float32)
    unit = op.InstanceNormalization(flat, constant(ones), constant(zeros), epsilon=eps)
    y = op.Reshape(unit, constant(np.array([0, *x.shape[1:]], np.int64)))
    if weight is None and bias is None:
        return y
    ones, zeros = (constant(np.full(x.shape[1], value, np.float32)) for value in (1, 0))
    scale, shift = ones if weight is None else weight, zeros if bias is None else bias
    return op.BatchNormalization(y, scale, shift, zeros, ones, epsilon=0.0)


def attention_to_onnx(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention [B, H, L, D] in one operator, which never holds all scores of a long sequence.

    Its form [B, L, H D] is that of the layers around it: what turns the heads here is undone by
    what turned them there.
    """
    factor = _attention_factor(query, dropout_p, is_causal, scale, enable_gqa)
    if attn_mask is not None or not _is_multi_head(query, key, value):
        return _plain_attention(query, key, value, attn_mask, factor)
    heads, width = query.shape[1], query.shape[3]
    flat, apart = (
        constant(np.array([0, -1, *last], np.int64)) for last in ([heads * width], [heads, width])
    )
    q, k, v = (op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), flat) for x in (query, key, value))
    y = _multi_head_attention()(q, k, v, num_heads=heads, scale=factor)
    return op.Transpose(op.Reshape(y, apart), perm=[0, 2, 1, 3])


def plain_attention_to_onnx(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention [B, H, L, D] of standard operators."""
    factor = _attention_factor(query, dropout_p, is_causal, scale, enable_gqa)
    return _plain_attention(query, key, value, attn_mask, factor)


def _is_multi_head(query: Any, key: Any, value: Any) -> bool:
    """Whether the operator computes it: as many batches and heads in all three, of equal width."""
    shapes = [tuple(each.shape) for each in (query, key, value)]
    if any(len(shape) != len("BHLD") for shape in shapes):
        return False
    same = {(batch, heads, width) for batch, heads, _, width in shapes}
    return len(same) == 1 and isinstance(query.shape[1], int)


def _attention_factor(
    query: Any, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool
) -> float:
    if dropout_p or is_causal or enable_gqa:
        raise UnsupportedError(
            "EQ-4434",
            "causal attention, with dropout or with fewer key heads has no form here",
            hint="give the mask as a tensor, or leave the options out",
        )
    return query.shape[-1] ** -0.5 if scale is None else scale


def qlinear_dynamic_to_onnx(
    x: Any,
    weight_q: Any,
    weight_scale: Any,
    weight_zero_point: Any | None,
    bias: Any | None,
    group_size: int,
    activation_bits: int,
) -> Any:
    """`edgeqdm::qlinear_dynamic`; codes of groups are packed by `finish`."""
    if weight_zero_point is None:
        y = _per_token(x, weight_q, weight_scale)
    else:
        y = _matmul_nbits()(
            x,
            weight_q,
            weight_scale,
            weight_zero_point,
            K=weight_q.shape[1],
            N=weight_q.shape[0],
            bits=8,
            block_size=group_size,
            accuracy_level=ON_INTEGERS,
        )
    return y if bias is None else op.Add(y, bias)


def _plain_attention(query: Any, key: Any, value: Any, mask: Any | None, factor: float) -> Any:
    scaled = op.Mul(query, constant(np.array(factor, np.float32)))
    rank = len(key.shape)
    turned = [*range(rank - 2), rank - 1, rank - 2]
    scores = op.MatMul(scaled, op.Transpose(key, perm=turned))
    if mask is not None and mask.dtype == onnx_ir.DataType.BOOL:
        none, minus = (constant(np.array(v, np.float32)) for v in (0, -np.inf))
        mask = op.Where(mask, none, minus)
    masked = scores if mask is None else op.Add(scores, mask)
    return op.MatMul(op.Softmax(masked, axis=-1), value)


def _multi_head_attention() -> Any:
    schema = onnx.defs.OpSchema
    described = schema(
        "MultiHeadAttention",
        MICROSOFT,
        1,
        inputs=[schema.FormalParameter(name, "T") for name in ("query", "key", "value")],
        outputs=[schema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            schema.Attribute("num_heads", schema.AttrType.INT),
            schema.Attribute("scale", schema.AttrType.FLOAT, required=False),
        ],
    )
    return values.Op(values.Opset(MICROSOFT, 1), "MultiHeadAttention", described)


def _matmul_nbits() -> Any:
    # onnx knows no schema of the runtime's own operators; the exporter insists on one.
    schema = onnx.defs.OpSchema
    tensors = {"T": ["tensor(float)"], "B": ["tensor(uint8)"]}
    inputs = {"A": "T", "B": "B", "scales": "T", "zero_points": "B"}
    names = ("K", "N", "bits", "block_size", "accuracy_level")
    described = schema(
        "MatMulNBits",
        MICROSOFT,
        1,
        inputs=[schema.FormalParameter(name, kind) for name, kind in inputs.items()],
        outputs=[schema.FormalParameter("Y", "T")],
        type_constraints=[(kind, types, "") for kind, types in tensors.items()],
        attributes=[schema.Attribute(name, schema.AttrType.INT) for name in names],
    )
    return values.Op(values.Opset(MICROSOFT, 1), "MatMulNBits", described)


def _per_token(x: Any, weight_q: Any, weight_scale: Any) -> Any:
    peak = op.ReduceMax(op.Abs(x), constant(np.array([-1], np.int64)), keepdims=1)
    limit, floor = (constant(np.array(v, np.float32)) for v in (127.0, 2.0**-100))
    peak = op.Max(peak, floor)
    scale = op.Div(peak, limit)
    one, middle = constant(np.array(1, np.float32)), _zero_point(128)
    codes = op.QuantizeLinear(op.Mul(x, op.Div(limit, peak)), one, middle)
    accumulator = op.MatMulInteger(codes, op.Transpose(weight_q, perm=[1, 0]), middle)
    # One product after the other: the runtime takes Mul(scale, weight_scale) for the pattern of
    # MatMulIntegerToFloat and then applies the token scales to the wrong elements (1.31.1).
    y = op.Cast(accumulator, to=onnx.TensorProto.FLOAT)
    return op.Mul(op.Mul(y, weight_scale), scale)


def dequantize_to_onnx(
    weight_q: Any, weight_scale: Any, weight_zero_point: Any | None, group_size: int
) -> Any:
    """`edgeqdm::dequantize`: weights stay coded in the file, see `dequantize_at_load`."""
    if weight_zero_point is None:
        # The scale as a factor of its own: the runtime takes DequantizeLinear with one scale per
        # channel and MatMul for a MatMulNBits on 8-bit activations (1.31.1).
        one = constant(np.array(1, np.float32))
        inner = constant(np.arange(1, len(weight_q.shape), dtype=np.int64))
        return op.Mul(op.DequantizeLinear(weight_q, one), op.Unsqueeze(weight_scale, inner))
    return op.DequantizeLinear(
        weight_q, weight_scale, weight_zero_point, axis=1, block_size=group_size
    )


def choose_to_onnx(x: Any, outputs: Sequence[Any], of_step: Sequence[int], step: Any) -> Any:
    """`edgeqdm::choose`; what it becomes is decided when the graph is whole, see `phases`."""
    schema = onnx.defs.OpSchema
    variadic = schema.FormalParameterOption.Variadic
    described = schema(
        CHOOSE_NODE,
        DOMAIN,
        1,
        # All in one: the exporter gives what stands before a variadic input a second time (0.7.2).
        inputs=[schema.FormalParameter("x_step_outputs", "T", param_option=variadic)],
        outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(int64)"], "")],
        attributes=[schema.Attribute(OF_STEP, schema.AttrType.INTS)],
    )
    chosen = values.Op(values.Opset(DOMAIN, 1), CHOOSE_NODE, described)
    return chosen(x, step, *outputs, of_step=list(of_step))


TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.group_norm.default: group_norm_to_onnx,
    torch.ops.aten.scaled_dot_product_attention.default: attention_to_onnx,
    QLINEAR: qlinear_to_onnx,
    QCONV2D: qconv2d_to_onnx,
    QLINEAR_DYNAMIC: qlinear_dynamic_to_onnx,
    DEQUANTIZE: dequantize_to_onnx,
    CHOOSE: choose_to_onnx,
}


def finish(model: onnx.ModelProto) -> onnx.ModelProto:
    """`simplify`, with weights in the layout and the width that they are stored in."""
    finished = simplify(model)
    dequantize_at_load(finished.graph)
    _pack_blocks(finished.graph)
    _store_in_4_bits(finished.graph)
    return finished


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, share equal initializers and equal nodes, drop everything private.

    The exporter attaches source text and local paths to every node; they do not ship.
    """
    graph = onnx_ir.from_proto(model)
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    # One tensor for equal ones, then one node: layers that are fed alike quantize it once.
    ir_passes.DeduplicateHashedInitializersPass()(graph)
    ir_passes.CommonSubexpressionEliminationPass()(graph)
    join_biases(graph.graph)
    ir_passes.RemoveUnusedNodesPass()(graph)
    finished = onnx_ir.to_proto(graph)
    finished.ir_version = IR_VERSION
    _fold_transposes(finished.graph)
    _strip(finished)
    return finished


def _fold_transposes(graph: onnx.GraphProto) -> None:
    """Weights turned over; the exporter leaves those of a layer that is called more than once."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in tensors]:
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        turned = numpy_helper.to_array(tensors[node.input[0]]).transpose(order)
        graph.initializer.append(numpy_helper.from_array(turned.copy(), node.output[0]))
        graph.node.remove(node)
    drop_unread(graph)


def _pack_blocks(graph: onnx.GraphProto) -> None:
    """Codes [N, K] of every `MatMulNBits` in the layout of the kernel, in 4 bits where they fit."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    done: dict[tuple[object, ...], list[str]] = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes = {attribute.name: attribute for attribute in node.attribute}
        codes, scale, zero_point = (tensors[name] for name in node.input[1:4])
        fits = max(int(numpy_helper.to_array(t).max()) for t in (codes, zero_point)) < 2**4
        attributes["bits"].i = 4 if fits else 8
        # Not by the codes alone: equal ones may serve nodes with other block sizes.
        key = (*node.input[1:4], attributes["block_size"].i)
        if key in done:
            node.input[1:4] = done[key]
            continue
        packed = to_matmulnbits(
            numpy_helper.to_array(codes),
            numpy_helper.to_array(zero_point),
            attributes["bits"].i,
            attributes["block_size"].i,
        )
        flat = numpy_helper.to_array(scale).reshape(-1)
        for place, array in zip((1, 2, 3), (packed[0], flat, packed[1]), strict=True):
            tensor = numpy_helper.from_array(array, f"{node.name}/{place}")
            graph.initializer.append(tensor)
            node.input[place] = tensor.name
        done[key] = list(node.input[1:4])
    drop_unread(graph)


def drop_unread(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _store_in_4_bits(graph: onnx.GraphProto) -> None:
    """Weights whose codes fit are stored in 4 bits and cast to 8, which is done at load."""
    weights = {node.input[i] for node in graph.node for i in _weight_inputs(node)}
    casts = []
    for tensor in graph.initializer:
        if tensor.name not in weights or tensor.data_type not in FOUR_BITS:
            continue
        codes, kind = numpy_helper.to_array(tensor), tensor.data_type
        narrow_kind, lowest, highest = FOUR_BITS[kind]
        if codes.size == 0 or codes.min() < lowest or codes.max() > highest:
            continue
        wide, narrow = tensor.name, f"{tensor.name}/4 bits"
        tensor.CopyFrom(_four_bits(codes, narrow, narrow_kind))
        casts.append(onnx.helper.make_node("Cast", [narrow], [wide], narrow, to=kind))
    for cast in reversed(casts):
        graph.node.insert(0, cast)


def _weight_inputs(node: onnx.NodeProto) -> tuple[int, ...]:
    places = {"QLinearConv": (3,), "MatMulInteger": (1,), "Cast": (0,)}
    return places.get(node.op_type, ())


def _four_bits(codes: np.ndarray, name: str, kind: int) -> onnx.TensorProto:
    nibbles = codes.reshape(-1).astype(np.uint8) & 0xF
    even = np.pad(nibbles, (0, nibbles.size % 2))
    packed = (even[::2] | (even[1::2] << 4)).tobytes()
    return onnx.helper.make_tensor(name, kind, codes.shape, packed, raw=True)


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
