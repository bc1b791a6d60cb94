"""Every precision of the menu: the kernel the runtime makes of it computes the eager op.

All layers stand side by side in one network, each fed the same input; one export serves them all.
"""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from edgeqdm.backends.onnxruntime import lowering
from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.backends.onnxruntime.forms import GRAPH
from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit import playback
from edgeqdm.emit.backend import Exportable
from edgeqdm.emit.package import emit_package
from edgeqdm.emit.verify import Verification, verify_package
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import TABLE, Precision
from edgeqdm.numerics.affine import quantize_weight
from edgeqdm.numerics.grouping import search_grouped
from edgeqdm.numerics.ranges import ActivationScales, search_weight
from edgeqdm.quantize.modules import StepClock, SteppedNetwork, coded_layer
from edgeqdm.quantize.parameters import LayerParameters, WeightCodes
from edgeqdm.quantize.plans import default_plan
from edgeqdm.quantize.quantizer import quantize
from edgeqdm.testing.conformance import small_denoiser, tiny_quantized

SHAPE = (4, 8, 8)
WIDTH, OUTPUTS = 64, 40
STEPS = 3
TABLED = ("w8a8", "w6a8", "w4a8")
PER_TOKEN = ("w8a8dyn", "w4a8dyn")
BLOCKWISE = ("w4g32a8dyn", "w8g32a8dyn", "w4g16a8dyn", "w8g64a8dyn")
WEIGHT_ONLY = ("w8", "w6", "w4", "w4g32", "w8g32")
LINEAR = (*TABLED, *PER_TOKEN, *BLOCKWISE, *WEIGHT_ONLY)
CONV = ("w8a8", "w6a8", "w4a8", "w8", "w4")
# Float32 sums of at most 64 products in another order, relative to the largest output. One
# activation code that differed would be 1e-3 and more.
SUMMATION = 4e-6


class SideBySide(nn.Module):
    """Layers on one input; output [B, layers, ...]. Linear layers read [B, 4, 64]."""

    def __init__(self, layers: dict[str, nn.Module], *, flat: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers.values())
        self.flat = flat

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        fed = x.flatten(2) if self.flat else x
        return torch.stack([layer(fed) for layer in self.layers], 1)


def codes_for(weight: Tensor, precision: Precision) -> WeightCodes:
    if precision.group_size:
        found = search_grouped(weight, precision.weight_bits, precision.group_size)
        return WeightCodes.of_groups(found)
    scale = search_weight(weight, precision.weight_bits)
    codes = quantize_weight(weight, scale, precision.weight_bits)
    return WeightCodes(codes, scale, None, precision.weight_bits)


def make_layer(kind: LayerKind, text: str, seed: int, clock: StepClock) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layer: nn.Linear | nn.Conv2d
    if kind is LayerKind.LINEAR:
        layer = nn.Linear(WIDTH, OUTPUTS)
    else:
        layer = nn.Conv2d(SHAPE[0], OUTPUTS, 3, padding=1)
    weight = torch.randn(layer.weight.shape, generator=generator) * 0.1
    bias = torch.randn(OUTPUTS, generator=generator)
    precision = Precision(text)
    activation = output = None
    if precision.integer and not precision.dynamic:
        # A zero_point of its own: equal layers would be merged.
        table = torch.tensor([0.05, 0.02, 0.0123])
        activation = ActivationScales(table, 100 + seed)
        output = ActivationScales(table, 140) if kind is LayerKind.CONV2D else None
    parameters = LayerParameters(codes_for(weight, precision), activation, output)
    return coded_layer(layer, parameters, precision, bias, clock)


def network_of(kind: LayerKind, texts: tuple[str, ...]) -> SteppedNetwork:
    clock = StepClock()
    layers = {text: make_layer(kind, text, seed, clock) for seed, text in enumerate(texts)}
    side_by_side = SideBySide(layers, flat=kind is LayerKind.LINEAR)
    return SteppedNetwork(side_by_side, torch.arange(STEPS), clock).eval()


@dataclass(frozen=True)
class Ran:
    """An emitted network, what the runtime made of it, and the outputs of both at every step."""

    graph: bytes
    optimized: onnx.ModelProto
    found: dict[str, NDArray[np.float32]]
    """By precision, [S, B, ...]."""
    expected: dict[str, NDArray[np.float32]]

    @property
    def nodes(self) -> Counter[str]:
        return Counter(node.op_type for node in self.optimized.graph.node)


def run_graph(graph: bytes, x: Tensor, optimized: Path) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimized)
    session: Any = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    steps = (np.array(step, np.int64) for step in range(STEPS))
    return np.stack([session.run(None, {"sample": x.numpy(), "step": s})[0] for s in steps])


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    # Tokens of very different size, one of zeros.
    loudness = torch.tensor([1.0, 0.01, 30.0, 0.0]).reshape(4, 1, 1)
    return torch.randn(3, *SHAPE, generator=generator) * loudness


def emit(network: SteppedNetwork) -> bytes:
    example = {"sample": torch.zeros(2, *SHAPE), "step": torch.tensor(0)}
    return OnnxRuntimeBackend().emit(Exportable(network, example))[GRAPH].data


def ran(kind: LayerKind, texts: tuple[str, ...], folder: Path) -> Ran:
    network, x = network_of(kind, texts), inputs()
    graph = emit(network)
    with torch.no_grad():
        eager = np.stack([network(x, torch.tensor(step)).numpy() for step in range(STEPS)])
    found = run_graph(graph, x, folder / "optimized.onnx")
    by_text = [{text: y[:, :, i] for i, text in enumerate(texts)} for y in (found, eager)]
    return Ran(graph, onnx.load(folder / "optimized.onnx"), *by_text)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return ran(LayerKind.LINEAR, LINEAR, tmp_path_factory.mktemp("linear"))


@pytest.fixture(scope="module")
def conv(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return ran(LayerKind.CONV2D, CONV, tmp_path_factory.mktemp("conv"))


def assert_sums_equal(ran: Ran, text: str) -> None:
    atol = SUMMATION * float(np.abs(ran.expected[text]).max())
    np.testing.assert_allclose(ran.found[text], ran.expected[text], rtol=0, atol=atol)


def test_layers_here_are_on_the_menu() -> None:
    menu = OnnxRuntimeBackend().menu()
    assert set(LINEAR) <= set(menu[LayerKind.LINEAR])
    assert set(CONV) <= set(menu[LayerKind.CONV2D])
    assert all(not p.group_size and not p.dynamic for p in menu[LayerKind.CONV2D])
    assert all(TABLE in precisions for precisions in menu.values())


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("text", TABLED)
def test_linear_with_a_table_of_scales_equals_the_eager_op(linear: Ran, text: str) -> None:
    expected = linear.expected[text]
    # The fused kernel may multiply and add with one rounding instead of two; before the bias is
    # added a value may be larger than after it.
    ulp = np.spacing(np.abs(expected).max(initial=8))
    np.testing.assert_allclose(linear.found[text], expected, rtol=0, atol=ulp)


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("text", PER_TOKEN)
def test_linear_with_scales_per_token_equals_the_eager_op_exactly(linear: Ran, text: str) -> None:
    np.testing.assert_array_equal(linear.found[text], linear.expected[text])


def test_scales_per_token_are_not_fused_into_the_integer_product(linear: Ran) -> None:
    """Fused, ONNX Runtime 1.31.1 multiplies rows by the scales of other tokens."""
    assert linear.nodes["MatMulInteger"] == len(PER_TOKEN)
    assert linear.nodes["MatMulIntegerToFloat"] == len(TABLED)


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="kernels for Arm quantize the activation in another way",
)
@pytest.mark.parametrize("text", BLOCKWISE)
def test_linear_in_groups_equals_the_eager_op(linear: Ran, text: str) -> None:
    """Q8: exact integers inside a group; groups are added in another order."""
    assert_sums_equal(linear, text)


@pytest.mark.parametrize("text", WEIGHT_ONLY)
def test_linear_with_float_activations_equals_the_eager_op(linear: Ran, text: str) -> None:
    """The runtime may not take a layer for one with 8-bit activations."""
    assert_sums_equal(linear, text)


def test_only_layers_with_integer_activations_run_on_integer_kernels(linear: Ran) -> None:
    assert linear.nodes["MatMulNBits"] == len(BLOCKWISE)


@pytest.mark.usefixtures("exact_kernels")
@pytest.mark.parametrize("text", [text for text in CONV if "a" in text])
def test_convolution_on_integers_equals_the_eager_op_exactly(conv: Ran, text: str) -> None:
    np.testing.assert_array_equal(conv.found[text], conv.expected[text])


@pytest.mark.parametrize("text", [text for text in CONV if "a" not in text])
def test_convolution_with_float_activations_equals_the_eager_op(conv: Ran, text: str) -> None:
    assert_sums_equal(conv, text)
    assert conv.nodes["QLinearConv"] == sum("a" in other for other in CONV)


NARROW = {onnx.TensorProto.INT4: np.int8, onnx.TensorProto.UINT4: np.uint8}


def widened(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """The graph with its 4-bit weights stored in 8 bits, and how many there are."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    narrow = {t.name: t for t in wide.graph.initializer if t.data_type in NARROW}
    casts = [n for n in wide.graph.node if n.op_type == "Cast" and n.input[0] in narrow]
    for cast in casts:
        tensor = narrow[cast.input[0]]
        codes = numpy_helper.to_array(tensor).astype(NARROW[tensor.data_type])
        tensor.CopyFrom(numpy_helper.from_array(codes, cast.output[0]))
        wide.graph.node.remove(cast)
    return wide, sum(int(np.prod(tensor.dims)) for tensor in narrow.values())


@pytest.mark.parametrize(
    ("name", "n_weights"),
    [
        # w4a8 and w4.
        ("conv", 2 * OUTPUTS * SHAPE[0] * 9),
        # Where the kernel does not take 4 bits itself: w4a8, w4a8dyn, w4 and w4g32.
        ("linear", 4 * OUTPUTS * WIDTH),
    ],
)
def test_4_bit_storage_gives_the_bits_of_int8_storage_in_half_the_bytes(
    name: str, n_weights: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    emitted: Ran = request.getfixturevalue(name)
    wide, n_narrow = widened(onnx.load_from_string(emitted.graph))
    assert n_narrow == n_weights
    graph = wide.SerializeToString()
    outputs = run_graph(graph, inputs(), tmp_path / "optimized.onnx")
    for i, text in enumerate(emitted.found):
        np.testing.assert_array_equal(emitted.found[text], outputs[:, :, i])
    # Half the bytes, less the Cast and the second name of every layer.
    assert len(graph) - len(emitted.graph) > n_weights // 2 - 2 * 200
    # Widened once, where the graph is loaded.
    held = {tensor.data_type for tensor in emitted.optimized.graph.initializer}
    assert not held & NARROW.keys()


def test_codes_of_4_bits_are_stored_low_half_first() -> None:
    codes = np.array([[-7, 7, 0], [1, -1, 3]], np.int8)
    tensor = lowering._four_bits(codes, "codes", onnx.TensorProto.INT4)
    assert tensor.raw_data == bytes([0x79, 0x10, 0x3F])
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)
    odd = lowering._four_bits(codes[:, :1].repeat(3, 1)[:1], "odd", onnx.TensorProto.INT4)
    assert len(odd.raw_data) == 2
    np.testing.assert_array_equal(numpy_helper.to_array(odd).astype(np.int8), [[-7, -7, -7]])


# Of a DiT: every linear layer of the body gets the next of them.
MIXED = (
    *("w4a8", "w6a8", "w8a8dyn", "w4a8dyn", "w4g32a8dyn", "w4g16a8dyn", "w8g64a8dyn"),
    *("w4g64", "w8g32"),
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Verification, list[str]]:
    """The tiny DiT with every precision in it, and its label embedding as tables."""
    denoiser = tiny_quantized("dit").denoiser
    tables = [x.name for x in denoiser.info.layers if x.role == "embedding"]
    plan = default_plan(denoiser.info, "onnxruntime", STEPS, tables=tables)
    (phase,) = plan.phases
    body = [x.name for x in denoiser.info.layers if x.role == "body" and x.kind is LayerKind.LINEAR]
    chosen = {name: MIXED[i % len(MIXED)] for i, name in enumerate(body)}
    layers = tuple(
        a.model_copy(update={"precision": Precision(chosen.get(a.layer, a.precision))})
        for a in phase.layers
    )
    plan = plan.model_copy(update={"phases": (phase.model_copy(update={"layers": layers}),)})
    seen = observe(denoiser, collect_trajectories(denoiser, 4, seed=1), tuple(body))
    package = tmp_path_factory.mktemp("mixed") / "package"
    backend = OnnxRuntimeBackend()
    emit_package(quantize(denoiser, plan, seen), backend, package)
    return verify_package(package, backend), list(chosen.values())


def test_package_of_all_precisions_verifies(mixed: tuple[Verification, list[str]]) -> None:
    found, chosen = mixed
    assert set(chosen) == set(MIXED)
    assert max(found.deviation) <= playback.GOLDEN_SHARE
    assert found.planned == sum(Precision(text).integer for text in chosen)


def test_kernels_of_a_package_are_those_of_its_precisions(
    mixed: tuple[Verification, list[str]],
) -> None:
    found, chosen = mixed
    kernels = found.kernels.by_name
    assert kernels["MatMulIntegerToFloat"] == sum(text in TABLED for text in chosen)
    assert kernels["MatMulInteger"] == sum(text in PER_TOKEN for text in chosen)
    assert kernels["MatMulNBits"] == sum(text in BLOCKWISE for text in chosen)


@pytest.mark.parametrize("body", ["w8", "w4a8"])
def test_package_of_a_network_with_convolutions_verifies(body: str, tmp_path: Path) -> None:
    denoiser = small_denoiser(DDPMScheduler(clip_sample=False))
    plan = default_plan(denoiser.info, "onnxruntime", STEPS, body=Precision(body), tables=["embed"])
    seen = observe(denoiser, collect_trajectories(denoiser, 8, seed=2), ("conv", "mix"))
    backend = OnnxRuntimeBackend()
    emit_package(quantize(denoiser, plan, seen), backend, tmp_path / "package")
    found = verify_package(tmp_path / "package", backend)
    assert max(found.deviation) <= playback.GOLDEN_SHARE
    assert found.kernels.integer == found.planned == plan.n_integer_layers


@pytest.mark.parametrize(
    ("kind", "asked", "instead"),
    [
        (LayerKind.CONV2D, "w4a4", "w4a8"),
        (LayerKind.CONV2D, "w8a8dyn", "w8a8"),
        (LayerKind.CONV2D, "w4g32a8dyn", "w4a8"),
        (LayerKind.LINEAR, "w6a8dyn", "w6a8"),
        (LayerKind.LINEAR, "w4g48a8dyn", "w4g32a8dyn"),
        (LayerKind.LINEAR, "w4g64a8", "w4g64a8dyn"),
        (LayerKind.LINEAR, "fp16", "w8"),
    ],
)
def test_a_precision_without_a_kernel_is_refused_with_the_nearest_one(
    kind: LayerKind, asked: str, instead: str
) -> None:
    quantized = tiny_quantized("unet")
    layer = next(x for x in quantized.info.layers if x.kind is kind and x.role == "body")
    (phase,) = quantized.plan.phases
    layers = tuple(
        a.model_copy(update={"precision": Precision(asked)}) if a.layer == layer.name else a
        for a in phase.layers
    )
    plan = quantized.plan.model_copy(
        update={"phases": (phase.model_copy(update={"layers": layers}),)}
    )
    (refused,) = OnnxRuntimeBackend().check(plan, quantized.info)
    assert (refused.layer, refused.instead) == (layer.name, instead)
    assert refused.reason == f"{kind} has no {asked} kernel"
