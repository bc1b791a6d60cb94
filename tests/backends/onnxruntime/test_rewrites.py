"""Cheaper forms compute what the plain ones compute."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from edgeqdm.backends.onnxruntime.lowering import TRANSLATION, finish
from edgeqdm.backends.onnxruntime.phases import branches, fork
from edgeqdm.backends.onnxruntime.rewrites import join_biases
from edgeqdm.emit.export import export_onnx
from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import Precision
from edgeqdm.ir.profile import OpKey
from edgeqdm.profile.kit import one_layer

C, SIDE = 4, 3
SUMMATION = 1e-6
"""Float32 sums in another order."""


def run(model: onnx.ModelProto, **fed: NDArray[Any]) -> NDArray[np.float32]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    given = {"step": np.array(0, np.int64), **fed}
    found: NDArray[np.float32] = session.run(None, {k: given[k] for k in names})[0]
    return found


# Biases.


def graph_of(
    nodes: list[onnx.NodeProto], outputs: tuple[str, ...] = ("output",), **tensors: NDArray[Any]
) -> onnx.ModelProto:
    """x and shortcut [B, C, 3, 3], e [B, C]; a and b are biases [C] and `maps` the axes of one."""
    value = helper.make_tensor_value_info
    random = np.random.default_rng(0)
    stored = {
        "a": random.standard_normal(C).astype(np.float32),
        "b": random.standard_normal(C).astype(np.float32),
        "maps": np.array([1, 2], np.int64),
        "plane": np.array([2, 3], np.int64),
        **tensors,
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            value("x", 1, ["batch", C, SIDE, SIDE]),
            value("shortcut", 1, ["batch", C, SIDE, SIDE]),
            value("e", 1, ["batch", C]),
        ],
        [value(name, 1, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def node(kind: str, inputs: str, output: str) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], output)


BIASED = [node("Unsqueeze", "a maps", "a1"), node("Add", "x a1", "y")]
EMBEDDED = [*BIASED, node("Unsqueeze", "e plane", "e1")]
BOTH = [*BIASED, node("Unsqueeze", "b maps", "b1"), node("Add", "shortcut b1", "z")]
INPUTS = {
    "x": np.random.default_rng(1).standard_normal((2, C, SIDE, SIDE)).astype(np.float32),
    "shortcut": np.random.default_rng(2).standard_normal((2, C, SIDE, SIDE)).astype(np.float32),
    "e": np.random.default_rng(3).standard_normal((2, C)).astype(np.float32),
}


def joined(model: onnx.ModelProto) -> onnx.ModelProto:
    whole = onnx_ir.from_proto(model)
    join_biases(whole.graph)
    return onnx_ir.to_proto(whole)


def passes(model: onnx.ModelProto) -> int:
    """Additions to a whole map."""
    shapes = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    sizes = {v.name: v.type.tensor_type.shape.dim for v in (*shapes.value_info, *shapes.output)}
    adds = [n for n in model.graph.node if n.op_type == "Add"]
    return sum(sizes[n.output[0]][-1].dim_value == SIDE for n in adds)


@pytest.mark.parametrize(
    ("nodes", "before", "after"),
    [
        ([*EMBEDDED, node("Add", "y e1", "output")], 2, 1),
        ([*EMBEDDED, node("Add", "e1 y", "output")], 2, 1),
        ([*BOTH, node("Add", "y z", "output")], 3, 2),
        ([*BOTH, node("Add", "z y", "output")], 3, 2),
        # Nothing to join: no bias, or one that is not constant.
        ([*BIASED, node("Add", "y shortcut", "output")], 2, 2),
        ([*EMBEDDED, node("Add", "x e1", "z"), node("Add", "y z", "output")], 3, 3),
    ],
)
def test_joined_biases_add_up_to_the_same(
    nodes: list[onnx.NodeProto], before: int, after: int
) -> None:
    model = graph_of(nodes)
    found = joined(model)
    assert (passes(model), passes(found)) == (before, after)
    np.testing.assert_allclose(run(found, **INPUTS), run(model, **INPUTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [np.ones((C, 1, 1)), np.full((C, 1, 1), 2.0)])
def test_a_bias_may_be_stored_as_a_map_is_added_to(bias: NDArray[np.float64]) -> None:
    nodes = [
        node("Add", "x a1", "y"),
        node("Unsqueeze", "e plane", "e1"),
        node("Add", "y e1", "output"),
    ]
    model = graph_of(nodes, a1=bias.astype(np.float32))
    found = joined(model)
    assert passes(found) == 1
    np.testing.assert_allclose(run(found, **INPUTS), run(model, **INPUTS), rtol=0, atol=1e-6)


def test_a_map_that_others_read_too_keeps_its_bias() -> None:
    nodes = [*EMBEDDED, node("Add", "y e1", "output"), node("Neg", "y", "other")]
    assert passes(joined(graph_of(nodes, ("output", "other")))) == 2
    assert (
        passes(joined(graph_of([*EMBEDDED, node("Add", "y e1", "output")], ("output", "y")))) == 2
    )


@pytest.mark.parametrize("shape", [(1, SIDE, SIDE), (C, SIDE, SIDE), (C, 1)])
def test_a_constant_that_is_no_bias_is_left(shape: tuple[int, ...]) -> None:
    nodes = [
        node("Add", "x a1", "y"),
        node("Unsqueeze", "e plane", "e1"),
        node("Add", "y e1", "output"),
    ]
    if shape == (C, 1):
        shape = (1, 1, SIDE)
    model = graph_of(nodes, a1=np.ones(shape, np.float32))
    assert passes(joined(model)) == 2


# Attention.


class Attention(nn.Module):
    """x [B, L, D] and step -> attention of its heads over x or a part of it."""

    def __init__(self, heads: int, *, cross: int | None = None, **options: Any) -> None:
        super().__init__()
        self.heads, self.cross, self.options = heads, cross, options

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        def apart(y: Tensor) -> Tensor:
            return y.view(y.shape[0], -1, self.heads, y.shape[2] // self.heads).transpose(1, 2)

        fed = x if self.cross is None else x[:, : self.cross]
        y = F.scaled_dot_product_attention(apart(x), apart(fed), apart(2 * fed), **self.options)
        return y.transpose(1, 2).reshape(x.shape)


def exported(network: nn.Module, x: Tensor) -> onnx.ModelProto:
    with torch.no_grad():
        return finish(export_onnx(network, {"sample": x, "step": torch.tensor(0)}, TRANSLATION))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (Attention(1), (2, 9, 8)),
        (Attention(4), (2, 16, 32)),
        (Attention(2, cross=5), (3, 7, 12)),
        (Attention(2, scale=0.3), (2, 6, 8)),
    ],
)
def test_attention_equals_torch(network: Attention, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = exported(network, x)
    assert sum(n.op_type == "MultiHeadAttention" for n in model.graph.node) == 1
    assert not {"Softmax", "MatMul"} & {n.op_type for n in model.graph.node}
    expected = network(x, torch.tensor(0)).numpy()
    np.testing.assert_allclose(run(model, sample=x.numpy()), expected, rtol=0, atol=1e-5)


class Unequal(nn.Module):
    """Attention that is no multi-head attention; x [B, 8, 12]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.memory = nn.Parameter(torch.randn(1, 2, 5, 6, generator=torch.manual_seed(0)))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        heads = x.view(x.shape[0], 8, 2, 6).transpose(1, 2)
        if self.kind == "wider values":
            return F.scaled_dot_product_attention(heads, heads, torch.cat([heads, heads], -1))
        if self.kind == "memory for all":
            return F.scaled_dot_product_attention(heads, self.memory, self.memory)
        if self.kind == "one head":
            return F.scaled_dot_product_attention(x, x, x)
        assert self.kind == "groups of heads"
        groups = heads.unsqueeze(1)
        return F.scaled_dot_product_attention(groups, groups, groups)


@pytest.mark.parametrize("kind", ["wider values", "memory for all", "one head", "groups of heads"])
def test_other_attention_equals_torch(kind: str) -> None:
    network, x = Unequal(kind), torch.randn(3, 8, 12, generator=torch.manual_seed(1))
    model = exported(network, x)
    assert not {"MultiHeadAttention"} & {n.op_type for n in model.graph.node}
    with torch.no_grad():
        expected = network(x, torch.tensor(0)).numpy()
    np.testing.assert_allclose(run(model, sample=x.numpy()), expected, rtol=0, atol=1e-5)


def optimized(model: onnx.ModelProto, folder: Path) -> onnx.GraphProto:
    """What the runtime makes of it at load."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx").graph


def test_heads_are_not_turned_twice(tmp_path: Path) -> None:
    """What turns them for the operator undoes what turned them for torch, at load."""
    model = exported(Attention(4), torch.zeros(2, 16, 32))
    graph = optimized(model, tmp_path)
    assert Counter(n.op_type for n in graph.node)["Transpose"] == 0


@pytest.mark.parametrize(
    "mask",
    [torch.ones(6, 6, dtype=torch.bool).tril(), torch.linspace(-2, 2, 36).reshape(1, 1, 6, 6)],
    ids=["bool", "float"],
)
def test_attention_with_a_mask_equals_torch(mask: Tensor) -> None:
    network = Attention(2, attn_mask=mask)
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = network(x, torch.tensor(0)).numpy()
    found = run(exported(network, x), sample=x.numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_causal_attention_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="EQ-4434"):
        exported(Attention(2, is_causal=True), torch.zeros(2, 6, 8))


# Group normalisation.


@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 8, 4, 4), (3, 16, 2, 6)])
@pytest.mark.parametrize("affine", [True, False])
def test_scale_and_shift_are_one_pass(shape: tuple[int, ...], affine: bool) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(4, shape[1], affine=affine)

        def forward(self, x: Tensor, step: Tensor) -> Tensor:
            out: Tensor = self.norm(x)
            return out

    network = Norm()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in network.parameters():
            each.copy_(torch.randn(each.shape, generator=generator))
    x = torch.randn(shape, generator=generator)
    model = exported(network, x)
    kinds = Counter(n.op_type for n in model.graph.node)
    assert kinds["BatchNormalization"] == affine
    assert not kinds["Mul"] + kinds["Add"]
    with torch.no_grad():
        expected = network(x, torch.tensor(0)).numpy()
    np.testing.assert_allclose(run(model, sample=x.numpy()), expected, rtol=0, atol=2e-6)


# Weights in codes, activations in float.


def linear(width: int) -> OpKey:
    shape, weight = (2, 8, width), (24, width)
    return OpKey(kind=LayerKind.LINEAR, input_shape=shape, weight_shape=weight, bias=False)


CONV = OpKey(
    kind=LayerKind.CONV2D,
    input_shape=(2, 6, 8, 8),
    weight_shape=(10, 6, 3, 3),
    bias=False,
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    groups=1,
)


@pytest.mark.parametrize(
    ("key", "precision"),
    [
        *((linear(64), text) for text in ("w8", "w6", "w4", "w8g32", "w4g16")),
        # Groups that the last inputs do not fill, and layers of which all would be folded early.
        *((linear(width), "w4g32") for width in (72, 8)),
        *((CONV, text) for text in ("w8", "w4")),
    ],
    ids=str,
)
def test_weights_are_dequantized_at_load(key: OpKey, precision: str, tmp_path: Path) -> None:
    network = one_layer(key, Precision(precision))
    x = torch.randn(key.input_shape, generator=torch.Generator().manual_seed(0))
    model = exported(network, x)
    coded = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4}
    weights = math.prod(key.weight_shape)
    stored = [t for t in model.graph.initializer if math.prod(t.dims) == weights]
    assert len(stored) == 1
    assert stored[0].data_type in coded

    graph = optimized(model, tmp_path)
    assert {n.op_type for n in graph.node} <= {"MatMul", "Conv", "ReorderInput", "ReorderOutput"}
    # Bit by bit; those of a convolution stand in blocks of channels by now.
    if key.kind is LayerKind.LINEAR:
        expected = network.layer.float_weight().numpy().T
        found = [t for t in map(numpy_helper.to_array, graph.initializer) if t.size == weights]
        np.testing.assert_array_equal(found[0], expected)
    with torch.no_grad():
        y = network(x, torch.tensor(0)).numpy()
    np.testing.assert_allclose(run(model, sample=x.numpy()), y, rtol=0, atol=2e-6)


class OfTwo(nn.Module):
    """Another precision at every step."""

    def __init__(self, key: OpKey, *precisions: str) -> None:
        super().__init__()
        self.variants = nn.ModuleList(one_layer(key, Precision(text)) for text in precisions)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        outputs = [each(x, step) for each in self.variants]
        of_step = list(range(len(outputs)))
        chosen: Tensor = torch.ops.edgeqdm.choose(x, outputs, of_step, step)
        return chosen


@pytest.mark.parametrize("precisions", [("w8", "w4"), ("w8", "w6", "w4g16")])
def test_weights_of_a_fork_are_dequantized_at_load(
    precisions: tuple[str, ...], tmp_path: Path
) -> None:
    # Large enough that its weights stand outside the branches.
    key = linear(1024)
    network, x = OfTwo(key, *precisions), torch.randn(key.input_shape)
    model = fork(exported(network, x))
    kinds = Counter(n.op_type for graph in graphs(optimized(model, tmp_path)) for n in graph.node)
    assert kinds["MatMul"] == len(precisions)
    assert not {"Cast", "Sub", "Mul", "DequantizeLinear"} & set(kinds)
    for step in range(len(precisions)):
        with torch.no_grad():
            expected = network(x, torch.tensor(step)).numpy()
        found = run(model, sample=x.numpy(), step=np.array(step, np.int64))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """A graph and all graphs inside it."""
    return [graph, *(inner for branch in branches(graph) for inner in graphs(branch))]
