"""The ONNX Runtime target: the kit every backend passes, and what is special to this one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from google.protobuf.message import EncodeError
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from edgeqdm.backends.onnxruntime import backend
from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.backends.onnxruntime.forms import GRAPH
from edgeqdm.emit import playback
from edgeqdm.emit.backend import Backend, Exportable
from edgeqdm.errors import UnsupportedError, VerifyError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.plan import Phase
from edgeqdm.ir.precision import W8A8
from edgeqdm.numerics.affine import quantize_activation
from edgeqdm.quantize.modules import QuantizedConv2d, QuantizedLinear
from edgeqdm.quantize.ops import at_step
from edgeqdm.testing.conformance import STEPS, BackendConformance, Emitted, tiny_quantized

Layer = QuantizedConv2d | QuantizedLinear
Tensors = dict[str, NDArray[np.generic]]


class Graph:
    """An emitted graph that also returns what every integer layer was fed and returned."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        graph = self.model.graph
        self._constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self._producer = {name: node for node in graph.node for name in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def kernel(self, layer: Layer) -> Any:
        """The one integer node that holds the layer's weights."""
        convolution = isinstance(layer, QuantizedConv2d)
        kind, place = ("QLinearConv", 3) if convolution else ("MatMulInteger", 1)
        weight = layer.weight_q.numpy() if convolution else layer.weight_q.numpy().T
        nodes = [node for node in self.model.graph.node if node.op_type == kind]
        (found,) = [n for n in nodes if np.array_equal(self._constants[n.input[place]], weight)]
        return found

    def input_of(self, kernel: Any) -> str:
        quantize = self._producer[kernel.input[0]]
        assert quantize.op_type == "QuantizeLinear"
        name: str = quantize.input[0]
        return name

    def output_of(self, kernel: Any) -> str:
        """Codes of a convolution; the scaled sum plus bias of a linear layer."""
        name: str = kernel.output[0]
        if kernel.op_type == "QLinearConv":
            return name
        for expected in ("Cast", "Mul", "Add"):
            (node,) = self._consumers[name]
            assert node.op_type == expected
            name = node.output[0]
        return name

    def run(self, names: list[str], feeds: Tensors) -> Tensors:
        """Unoptimized, so that the asked-for tensors exist and nothing is fused."""
        unique = list(dict.fromkeys(names))
        outputs = [onnx.ValueInfoProto(name=name) for name in unique]
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        model.graph.output.extend(o for o in outputs if o.name not in feeds)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found = session.run(unique, feeds)
        return dict(zip(unique, found, strict=True))


def pre_rounding(layer: QuantizedConv2d, x: Tensor, step: int) -> NDArray[np.float64]:
    """The convolution's output in units of its output scale, float64, before it is rounded."""
    index = torch.tensor(step)
    scale, out_scale = at_step(layer.act_scale_table, index), at_step(layer.out_scale_table, index)
    codes = (quantize_activation(x, scale, layer.zero_point) - layer.zero_point).double()
    accumulator = torch.nn.functional.conv2d(
        codes,
        layer.weight_q.double(),
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    multiplier = scale.double() * layer.weight_scale.double() / out_scale.double()
    exact: NDArray[np.float64] = (accumulator * multiplier[:, None, None]).numpy()
    return exact


def eager_codes(layer: QuantizedConv2d, x: Tensor, step: int) -> NDArray[np.float32]:
    """Output codes of the eager op, its bias left out."""
    bare = copy.copy(layer)
    bare._buffers = {**layer._buffers, "bias": None}
    bare._clock.step = torch.tensor(step)
    y = bare(x)
    out_scale = at_step(layer.out_scale_table, torch.tensor(step))
    codes: NDArray[np.float32] = (torch.round(y / out_scale) + layer.out_zero_point).numpy()
    return codes


class TestOnnxRuntime(BackendConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return OnnxRuntimeBackend()

    @pytest.mark.usefixtures("exact_kernels")
    def test_every_layer_equals_the_eager_op_on_the_same_input_bits(self, emitted: Emitted) -> None:
        graph = Graph(emitted.package / GRAPH)
        network = emitted.quantized.network
        layers = [m for m in network.modules() if isinstance(m, QuantizedConv2d | QuantizedLinear)]
        assert len(layers) == emitted.manifest.integer_layers
        kernels = [graph.kernel(layer) for layer in layers]
        names = [f(kernel) for kernel in kernels for f in (graph.input_of, graph.output_of)]
        golden = playback.read_safetensors(emitted.package / "golden.safetensors")
        for step in range(STEPS):
            feeds = {
                "sample": golden["inputs"][step],
                "step": np.array(step, np.int64),
                "label": golden["conditioning"],
            }
            found = graph.run(names, feeds)
            for layer, fed, returned in zip(layers, names[::2], names[1::2], strict=True):
                check_layer(layer, torch.from_numpy(found[fed]), found[returned], step)

    def test_graph_is_one_file_of_known_size(self, emitted: Emitted) -> None:
        layers = emitted.quantized.network.modules()
        integer = sum(
            m.weight_q.numel() for m in layers if isinstance(m, QuantizedConv2d | QuantizedLinear)
        )
        model = onnx.load(emitted.package / GRAPH)
        stored = sum(
            numpy_helper.to_array(t).size
            for t in model.graph.initializer
            if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
        )
        # Weights once, as one byte each, and nowhere as floats too.
        assert stored == integer

    def test_graph_inputs_are_what_the_runtime_feeds(self, emitted: Emitted) -> None:
        model = onnx.load(emitted.package / GRAPH)
        assert [i.name for i in model.graph.input] == ["sample", "step", "label"]
        step = model.graph.input[1].type.tensor_type
        assert step.elem_type == onnx.TensorProto.INT64
        assert len(step.shape.dim) == 0
        assert model.ir_version == 10
        assert [(o.domain, o.version) for o in model.opset_import if not o.domain] == [("", 21)]


def check_layer(layer: Layer, x: Tensor, found: NDArray[np.generic], step: int) -> None:
    if isinstance(layer, QuantizedLinear):
        layer._clock.step = torch.tensor(step)
        # Not fused, so multiplication and addition round one after the other, as in the eager op.
        np.testing.assert_array_equal(found, layer(x).numpy())
        return
    different = eager_codes(layer, x, step) != found
    exact = pre_rounding(layer, x, step)
    from_tie = np.abs(exact - np.floor(exact) - 0.5)
    # Two correct roundings of the same float32 product can differ at a tie and nowhere else.
    assert np.all(from_tie[different] < 1e-3)
    assert different.mean() <= 1e-4


def test_menu_and_versions_name_what_the_target_is() -> None:
    backend = OnnxRuntimeBackend()
    assert backend.name == "onnxruntime"
    assert set(backend.menu()) == set(LayerKind)
    assert all(W8A8 in precisions for precisions in backend.menu().values())
    assert set(backend.versions()) == {"onnx", "onnxruntime"}


def test_several_phases_are_accepted() -> None:
    quantized = tiny_quantized("dit")
    (phase,) = quantized.plan.phases
    phases = (
        Phase(start=0, stop=1, layers=phase.layers),
        Phase(start=1, stop=STEPS, layers=phase.layers),
    )
    plan = quantized.plan.model_copy(update={"phases": phases})
    assert OnnxRuntimeBackend().check(plan, quantized.info) == ()


@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 64, b"not a graph"], ids=["empty", "zeros", "text"]
)
def test_graph_the_runtime_refuses_is_a_verify_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / GRAPH).write_bytes(data)
    for use in (OnnxRuntimeBackend().open, OnnxRuntimeBackend().count_kernels):
        with pytest.raises(VerifyError) as caught:
            use(tmp_path)
        assert caught.value.code == "EQ-8301"
        assert caught.value.path == str(tmp_path / GRAPH)


def test_a_graph_beyond_the_limit_of_protobuf_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GiB of weights are too much for a test: what protobuf raises then stands for them."""

    class Huge:
        def SerializeToString(self, deterministic: bool) -> bytes:  # noqa: N802
            raise EncodeError("Failed to serialize proto")

    monkeypatch.setattr(backend, "finish", lambda program: Huge())
    monkeypatch.setattr(backend, "check_graph", lambda graph: None)
    monkeypatch.setattr(backend, "export_onnx", lambda *arguments: None)
    monkeypatch.setattr(backend, "fork", lambda graph: graph)
    with pytest.raises(UnsupportedError, match="2 GiB") as caught:
        OnnxRuntimeBackend().emit(Exportable(torch.nn.Identity(), {}))
    assert caught.value.code == "EQ-4433"
