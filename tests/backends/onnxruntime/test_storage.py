"""Bytes as they are counted are bytes as they are written; boundaries are what they are called."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.backends.onnxruntime.boundaries import boundary_graph
from edgeqdm.backends.onnxruntime.forms import GRAPH
from edgeqdm.backends.onnxruntime.storage import weight_bytes
from edgeqdm.emit.backend import Exportable
from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import TABLE, Precision
from edgeqdm.ir.profile import BoundaryKind, OpKey
from edgeqdm.profile.kit import one_layer
from edgeqdm.profile.requests import DEFAULT_PRECISIONS

MENU = OnnxRuntimeBackend().menu()
PRECISIONS = (*DEFAULT_PRECISIONS, *map(Precision, ("w4", "w4g32", "w8g32a8dyn")))
KERNELS = ("QLinearConv", "MatMulInteger", "MatMulNBits", "Conv", "Gemm", "MatMul")


def linear(outputs: int, inputs: int) -> OpKey:
    shape, weight = (2, 8, inputs), (outputs, inputs)
    return OpKey(kind=LayerKind.LINEAR, input_shape=shape, weight_shape=weight, bias=False)


CONV = OpKey(
    kind=LayerKind.CONV2D,
    input_shape=(2, 6, 8, 8),
    weight_shape=(10, 3, 3, 3),
    bias=False,
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    groups=2,
)
ODD = CONV.model_copy(
    update={"weight_shape": (5, 3, 3, 3), "groups": 1, "input_shape": (2, 3, 8, 8)}
)
CASES = [
    *((linear(40, 64), precision) for precision in PRECISIONS),
    *((CONV, precision) for precision in PRECISIONS if precision in MENU[LayerKind.CONV2D]),
    # An odd number of codes, and groups that the last inputs do not fill.
    *((ODD, Precision(text)) for text in ("w4a8", "w4", "w6a8")),
    *((linear(6, 72), Precision(text)) for text in ("w4g32a8dyn", "w8g16a8dyn", "w4g32")),
]


def emitted(network: nn.Module, key: OpKey) -> onnx.ModelProto:
    inputs = {"sample": torch.zeros(key.input_shape), "step": torch.tensor(0)}
    data = OnnxRuntimeBackend().emit(Exportable(network, inputs))[GRAPH].data
    model: onnx.ModelProto = onnx.load_from_string(data)
    return model


def stored_bytes(tensor: onnx.TensorProto) -> int:
    assert tensor.raw_data
    return len(tensor.raw_data)


def weight_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Initializers of at least one value per output channel: codes, scales and zero points.

    The zeros that QLinearConv wants for a zero point are not among them, nor the group of every
    column: all layers of one shape share one tensor of them.
    """
    zeros = {n.input[5] for n in model.graph.node if n.op_type == "QLinearConv"}
    tables = {n.input[0] for n in model.graph.node if n.op_type == "Gather"}
    gathered = {n.input[1] for n in model.graph.node if n.op_type == "Gather"}
    return [
        tensor
        for tensor in model.graph.initializer
        if len(tensor.dims) > 0
        and tensor.name not in zeros | gathered
        and not (tensor.name in tables and len(tensor.dims) == 1)
        and tensor.data_type != onnx.TensorProto.INT64
    ]


@pytest.mark.parametrize(("key", "precision"), CASES, ids=lambda value: str(value))
def test_weight_bytes_are_those_of_the_emitted_graph(key: OpKey, precision: Precision) -> None:
    model = emitted(one_layer(key, precision), key)
    found = sum(map(stored_bytes, weight_tensors(model)))
    on_disk, resident = weight_bytes(key.weight_shape, precision)
    assert found == on_disk
    assert resident >= on_disk
    # As a backend it says the same.
    assert OnnxRuntimeBackend().weight_bytes(key.weight_shape, precision) == (
        on_disk,
        resident,
    )


def test_fewer_bits_never_take_more_bytes_on_disk() -> None:
    for offered in MENU.values():
        for precision in offered:
            if precision == TABLE or precision.weight_bits != 8:
                continue
            narrow = Precision(precision.replace("w8", "w4"))
            for shape in ((320, 320), (7, 129), (64, 32, 3, 3)):
                four, eight = (weight_bytes(shape, p) for p in (narrow, precision))
                assert four[0] < eight[0]


def run(model: onnx.ModelProto, **fed: NDArray[Any]) -> NDArray[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run(None, fed)[0]
    return found


@pytest.mark.parametrize("shape", [(2, 5), (1, 16, 12), (2, 3, 5, 7)])
def test_a_boundary_computes_what_numpy_does(shape: tuple[int, ...]) -> None:
    model = boundary_graph(BoundaryKind.QUANTIZE, shape)
    onnx.checker.check_model(model)
    # Some values are beyond the range of the codes, 3.84.
    x = (2.0 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    expected = np.clip(np.rint(x / np.float32(0.03)) + 128, 0, 255).astype(np.uint8)
    found = run(model, sample=x)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", sorted(set(BoundaryKind) - {BoundaryKind.QUANTIZE}))
def test_a_boundary_that_entries_contain_is_refused(kind: BoundaryKind) -> None:
    with pytest.raises(UnsupportedError, match="EQ-4432") as caught:
        OnnxRuntimeBackend().emit_boundary(kind, (1, 4))
    assert caught.value.path == kind


def test_a_backend_emits_a_boundary_as_a_graph() -> None:
    contents = OnnxRuntimeBackend().emit_boundary(BoundaryKind.QUANTIZE, (1, 4))
    assert {path: file.role for path, file in contents.items()} == {GRAPH: "model"}
    model = onnx.load_from_string(contents[GRAPH].data)
    assert [node.op_type for node in model.graph.node] == ["QuantizeLinear"]


class Twice(nn.Module):
    """A network that calls one layer two times."""

    def __init__(self, once: nn.Module) -> None:
        super().__init__()
        self.once = once

    def forward(self, sample: Tensor, step: Tensor) -> Tensor:
        found: Tensor = self.once(torch.tanh(self.once(sample, step)), step)
        return found


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w8a8dyn"])
def test_a_layer_that_is_called_twice_is_stored_once_as_integers(precision: str) -> None:
    key = linear(64, 64)
    network = Twice(one_layer(key, Precision(precision)))
    model = emitted(network, key)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    kernels = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    assert len(kernels) == 2
    assert kernels[0].input[1] == kernels[1].input[1]
    weight = kernels[0].input[1]
    if precision == "w4a8":
        (cast,) = [node for node in model.graph.node if weight in node.output]
        assert cast.op_type == "Cast"
        weight = cast.input[0]
        assert tensors[weight].data_type == onnx.TensorProto.INT4
    else:
        assert tensors[weight].data_type == onnx.TensorProto.INT8
    turned = [n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in tensors]
    assert turned == []
    on_disk, _ = weight_bytes(key.weight_shape, Precision(precision))
    assert sum(map(stored_bytes, weight_tensors(model))) == on_disk
    for step in (0, 3):
        x = torch.randn(key.input_shape)
        with torch.no_grad():
            expected = network(x, torch.tensor(step)).numpy()
        fed = {"sample": x.numpy(), "step": np.array(step, np.int64)}
        found = run(model, **{i.name: fed[i.name] for i in model.graph.input})
        # Between the two a code may differ where the first sum was rounded another way: at most
        # one code of the largest weight, seldom.
        np.testing.assert_allclose(found, expected, atol=0.05)
        assert np.mean(np.abs(found - expected)) <= 1e-4


@pytest.mark.parametrize("precision", ["w8g32a8dyn", "w4g32a8dyn", "w8", "w4g32"])
def test_groups_of_a_layer_that_is_called_twice_are_stored_once(precision: str) -> None:
    key = linear(64, 64)
    model = emitted(Twice(one_layer(key, Precision(precision))), key)
    kernels = {"MatMulNBits", "MatMul", "Gemm"}
    assert sum(node.op_type in kernels for node in model.graph.node) == 2
    on_disk, _ = weight_bytes(key.weight_shape, Precision(precision))
    assert sum(map(stored_bytes, weight_tensors(model))) == on_disk


def test_weights_of_a_layer_called_twice_are_turned_over_as_numpy_turns_them() -> None:
    key = linear(32, 32)
    network = one_layer(key, Precision("w8a8"))
    codes = next(b for name, b in network.named_buffers() if name.endswith("weight_q"))
    model = emitted(Twice(network), key)
    stored = [numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) == 2]
    (weight,) = [array for array in stored if array.dtype == np.int8]
    np.testing.assert_array_equal(weight, codes.numpy().T)
