"""Single layers: which kernels the runtime makes of them, and that these compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

import edgeqdm
from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.backends.onnxruntime.forms import GRAPH
from edgeqdm.backends.onnxruntime.lint import check_graph
from edgeqdm.emit.backend import Exportable
from edgeqdm.errors import VerifyError
from edgeqdm.numerics.ranges import ActivationScales
from edgeqdm.quantize.modules import (
    QuantizedConv2d,
    QuantizedLinear,
    StepClock,
    SteppedNetwork,
)
from edgeqdm.quantize.parameters import WeightCodes

SHAPE = (4, 8, 8)
STEPS = 3
TABLE = torch.tensor([0.05, 0.02, 0.0123])
OUT_TABLE = torch.tensor([0.9, 0.31, 0.17])
ONE_ROW = torch.tensor([0.02])
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
PLAIN: Geometry = ((1, 1), (1, 1), (1, 1), 1)


class OneLayer(nn.Module):
    """A network of one layer, called as the exported network is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def stepped(layer: nn.Module, clock: StepClock) -> SteppedNetwork:
    return SteppedNetwork(OneLayer(layer), torch.arange(STEPS), clock).eval()


def weights(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(shape[0], generator=generator) * 0.01 + 1e-3
    return codes, scale, torch.randn(shape[0], generator=generator)


def convolution(
    geometry: Geometry = PLAIN,
    *,
    with_bias: bool = True,
    table: Tensor = TABLE,
    out_table: Tensor = OUT_TABLE,
    zero_point: int = 117,
) -> SteppedNetwork:
    codes, scale, bias = weights(8, SHAPE[0] // geometry[3], 3, 3)
    clock = StepClock()
    fed, returned = ActivationScales(table, zero_point), ActivationScales(out_table, 140)
    layer = QuantizedConv2d(
        WeightCodes(codes, scale, None, 8),
        bias if with_bias else None,
        fed,
        returned,
        geometry,
        clock,
    )
    return stepped(layer, clock)


def linear(
    *, with_bias: bool = True, table: Tensor = TABLE, zero_point: int = 117
) -> SteppedNetwork:
    codes, scale, bias = weights(6, SHAPE[2])
    clock = StepClock()
    fed = ActivationScales(table, zero_point)
    layer = QuantizedLinear(
        WeightCodes(codes, scale, None, 8), bias if with_bias else None, fed, clock
    )
    return stepped(layer, clock)


def emit(network: SteppedNetwork) -> bytes:
    inputs = {"sample": torch.zeros(2, *SHAPE), "step": torch.tensor(0)}
    return OnnxRuntimeBackend().emit(Exportable(network, inputs))[GRAPH].data


@cache
def plain_convolution() -> tuple[SteppedNetwork, bytes]:
    network = convolution()
    return network, emit(network)


def optimized(graph: bytes, folder: Path) -> tuple[Any, Counter[str]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimized.onnx").graph.node
    return session, Counter(node.op_type for node in nodes)


def both(
    session: Any, network: SteppedNetwork, step: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    x = 2 * torch.randn(3, *SHAPE)
    with torch.no_grad():
        expected = network(x, torch.tensor(step)).numpy()
    fed = {"sample": x.numpy(), "step": np.array(step, np.int64)}
    return session.run(None, fed)[0], expected


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize(
    "network",
    [
        convolution(),
        convolution(with_bias=False, zero_point=0),
        convolution(((2, 2), (1, 1), (1, 1), 1), zero_point=255),
        convolution(((1, 1), (2, 0), (2, 1), 2)),
        convolution(table=ONE_ROW, out_table=ONE_ROW),
    ],
    ids=["plain", "no bias", "strided", "dilated groups", "one row"],
)
def test_convolution_runs_on_the_integer_kernel_and_equals_the_eager_op(
    network: SteppedNetwork, tmp_path: Path
) -> None:
    """T9: exported, at every step, to the last bit."""
    session, nodes = optimized(emit(network), tmp_path)
    assert nodes["QLinearConv"] == 1
    assert nodes["ConvInteger"] + nodes["Conv"] + nodes["FusedConv"] == 0
    for step in range(STEPS):
        found, expected = both(session, network, step)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize(
    "network",
    [linear(), linear(with_bias=False, zero_point=0), linear(table=ONE_ROW, zero_point=255)],
    ids=["plain", "no bias", "one row"],
)
def test_linear_layer_is_fused_with_its_bias_and_equals_the_eager_op(
    network: SteppedNetwork, tmp_path: Path
) -> None:
    session, nodes = optimized(emit(network), tmp_path)
    assert nodes["MatMulIntegerToFloat"] == 1
    assert nodes["MatMulInteger"] + nodes["Add"] + nodes["MatMulNBits"] == 0
    layer = network.get_submodule("network.layer")
    assert isinstance(layer, QuantizedLinear)
    for step in range(STEPS):
        found, expected = both(session, network, step)
        bias = layer.bias.numpy() if isinstance(layer.bias, Tensor) else 0
        # The fused kernel may multiply and add with one rounding instead of two: one unit in the
        # last place of the product, and one of the sum.
        ulp = np.spacing(np.abs(expected - bias)) + np.spacing(np.abs(expected))
        assert np.all(np.abs(found - expected) <= ulp)


@pytest.mark.parametrize(
    ("norm", "offset"),
    [
        (nn.GroupNorm(2, 4), 0.0),
        (nn.GroupNorm(4, 4, eps=1e-6), 1.0),
        (nn.GroupNorm(1, 4, affine=False), -3.0),
    ],
    ids=["groups", "instances", "not affine"],
)
def test_group_norm_equals_torch(norm: nn.GroupNorm, offset: float, tmp_path: Path) -> None:
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    session, nodes = optimized(emit(stepped(norm, StepClock())), tmp_path)
    assert nodes["GroupNormalization"] == 0
    assert nodes["InstanceNormalization"] == 1
    x = offset + torch.randn(3, *SHAPE)
    found = session.run(None, {"sample": x.numpy(), "step": np.array(0, np.int64)})[0]
    with torch.no_grad():
        # Float32 sums of at most 256 values of size 1, in another order.
        np.testing.assert_allclose(found, norm(x).numpy(), rtol=1e-5, atol=1e-5)


def test_emitted_bytes_are_deterministic_and_hold_no_local_path() -> None:
    network, graph = plain_convolution()
    assert emit(network) == graph
    private = (Path(edgeqdm.__file__).parents[1], Path.home(), Path(torch.__file__).parents[1])
    for word in (*(str(path) for path in private), "site-packages", ".py", "Traceback"):
        assert word.encode() not in graph


def test_scales_are_gathered_in_the_graph_and_shared() -> None:
    model = onnx.load_from_string(plain_convolution()[1])
    nodes = Counter(node.op_type for node in model.graph.node)
    assert nodes["Gather"] == 2
    assert nodes["Constant"] == 0
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert list(model.graph.value_info) == []


CONSTANTS: dict[str, NDArray[np.generic]] = {
    "table": np.array([0.1, 0.2], np.float32),
    "scale": np.array(0.1, np.float32),
    "wide_scale": np.array([0.1], np.float32),
    "bad_scale": np.array(np.inf, np.float32),
    "bad_table": np.array([0.1, 0.0], np.float32),
    "wide_table": np.array([[0.1, 0.2]], np.float32),
    "zero_point": np.array(128, np.uint8),
    "signed_zero_point": np.array(0, np.int8),
    "weight": np.ones((2, 4, 3, 3), np.int8),
    "unsigned_weight": np.ones((2, 4, 3, 3), np.uint8),
    "weight_scale": np.ones(2, np.float32),
    "weight_zero_point": np.zeros(2, np.int8),
    "shifted_zero_point": np.ones(2, np.int8),
    "matrix": np.ones((4, 2), np.int8),
    "float_matrix": np.ones((4, 2), np.float32),
    "bias": np.ones(2, np.int32),
}
QUANTIZE = ("QuantizeLinear", ("x", "scale", "zero_point"))
CONVOLVE = (
    "QLinearConv",
    (
        "codes",
        "scale",
        "zero_point",
        "weight",
        "weight_scale",
        "weight_zero_point",
        "scale",
        "zero_point",
    ),
)
MULTIPLY = ("MatMulInteger", ("codes", "matrix", "zero_point"))


def graph_of(*nodes: tuple[str, tuple[str, ...]]) -> onnx.ModelProto:
    made = [
        helper.make_node(kind, inputs, [f"y{k}"], name=f"node{k}")
        for k, (kind, inputs) in enumerate(nodes)
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in CONSTANTS.items()]
    return helper.make_model(helper.make_graph(made, "planted", [], [], constants))


def swapped(
    node: tuple[str, tuple[str, ...]], changes: Mapping[int, str]
) -> tuple[str, tuple[str, ...]]:
    kind, inputs = node
    return kind, tuple(changes.get(k, name) for k, name in enumerate(inputs))


def test_clean_graph_passes() -> None:
    gather = ("Gather", ("table", "step"))
    check_graph(graph_of(gather, swapped(QUANTIZE, {1: "y0"}), CONVOLVE, MULTIPLY))


@pytest.mark.parametrize(
    ("node", "fault"),
    [
        (swapped(QUANTIZE, {1: "wide_scale"}), "rank 1"),
        (swapped(QUANTIZE, {1: "bad_scale"}), "not finite and positive"),
        (swapped(QUANTIZE, {1: "elsewhere"}), "neither a constant nor gathered"),
        (swapped(QUANTIZE, {2: "signed_zero_point"}), "not a uint8 constant"),
        (("QuantizeLinear", ("x", "scale")), "not a uint8 constant"),
        (("QLinearConv", (*CONVOLVE[1], "bias")), "has a bias"),
        (swapped(CONVOLVE, {3: "unsigned_weight"}), "weight is not an int8"),
        (swapped(CONVOLVE, {3: "elsewhere"}), "weight is not an int8"),
        (swapped(CONVOLVE, {5: "shifted_zero_point"}), "not a constant 0"),
        (swapped(CONVOLVE, {1: "wide_scale"}), "rank 1"),
        (swapped(CONVOLVE, {6: "bad_scale"}), "not finite and positive"),
        (swapped(MULTIPLY, {1: "float_matrix"}), "weight is not an int8"),
        (("MatMulInteger", (*MULTIPLY[1], "signed_zero_point")), "weight has a zero_point"),
        (("ConvInteger", ("codes", "weight")), "no fast kernel"),
        (("MatMulNBits", ("x", "matrix")), "computes in float below accuracy level 4"),
        (("QLinearMatMul", ("codes", "matrix")), "no fast kernel"),
    ],
)
def test_planted_fault_is_found_and_named(node: tuple[str, tuple[str, ...]], fault: str) -> None:
    with pytest.raises(VerifyError, match="node0: .*" + fault) as caught:
        check_graph(graph_of(node))
    assert caught.value.code == "EQ-8302"


@pytest.mark.parametrize(
    ("table", "fault"), [("bad_table", "not finite and positive"), ("wide_table", "rank 2")]
)
def test_planted_table_is_found(table: str, fault: str) -> None:
    with pytest.raises(VerifyError, match=fault):
        check_graph(graph_of(("Gather", (table, "step")), swapped(QUANTIZE, {1: "y0"})))


def test_equal_node_names_and_metadata_are_found() -> None:
    model = graph_of(QUANTIZE, QUANTIZE)
    model.graph.node[1].name = model.graph.node[0].name
    model.graph.node[0].doc_string = "File model.py, line 1"
    with pytest.raises(VerifyError, match=r"2 faults.*not unique.*metadata"):
        check_graph(model)
