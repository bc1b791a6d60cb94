"""Several phases are one graph that computes, step by step, what each phase alone computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgeqdm import pipeline
from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.backends.onnxruntime.forms import GRAPH
from edgeqdm.backends.onnxruntime.phases import (
    CHOOSE,
    DOMAIN,
    branches,
    count_ops,
    count_ops_by_step,
    fork,
)
from edgeqdm.emit import playback
from edgeqdm.emit.backend import Evaluate, Exportable
from edgeqdm.emit.package import exportable
from edgeqdm.ir.plan import DeploymentPlan, Phase
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.profile.opkeys import network_keys
from edgeqdm.quantize.quantizer import QuantizedDenoiser, assemble, quantize
from edgeqdm.stages import calibrate, rule_plan
from edgeqdm.testing.conformance import STEPS, tiny_quantized

W4A8 = Precision("w4a8")
SAMPLES = 4
# Float32 sums in another order where the optimizer fused other nodes; a code that differed would
# be 1e-3 and more of the largest output.
SUMMATION = 1e-6


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    """The tiny UNet in 3 steps: each is a phase."""
    return tiny_quantized("unet").denoiser


def in_phases(
    rule: DeploymentPlan, precisions: Sequence[Precision], stops: Sequence[int]
) -> DeploymentPlan:
    """The rule's plan with all its integer layers at one precision in every phase."""
    (only,) = rule.phases
    phases = []
    for start, stop, precision in zip((0, *stops), stops, precisions, strict=False):
        layers = tuple(
            a.model_copy(update={"precision": precision}) if a.precision.integer else a
            for a in only.layers
        )
        phases.append(only.model_copy(update={"start": start, "stop": stop, "layers": layers}))
    return rule.model_copy(update={"phases": tuple(phases)})


@dataclass(frozen=True)
class Merged:
    """A plan of several phases, emitted."""

    quantized: QuantizedDenoiser
    folder: Path
    model: onnx.ModelProto

    @property
    def stored(self) -> list[TensorProto]:
        return [t for graph in graphs(self.model.graph) for t in graph.initializer]

    def open(self) -> Evaluate:
        return OnnxRuntimeBackend().open(self.folder)


def write(model: Exportable, folder: Path) -> onnx.ModelProto:
    folder.mkdir()
    data = OnnxRuntimeBackend().emit(model)[GRAPH].data
    (folder / GRAPH).write_bytes(data)
    return onnx.load_from_string(data)


@pytest.fixture(scope="module")
def merged(denoiser: Denoiser, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """A package at w8a8, then fp32, then w4a8."""
    plan = in_phases(rule_plan(denoiser), (W8A8, FP32, W4A8), (1, 2, 3))
    package = tmp_path_factory.mktemp("merged") / "package"
    pipeline.emit(denoiser, package, samples=SAMPLES, plan=plan, correction=False)
    quantized = quantize(denoiser, plan, calibrate(denoiser, samples=SAMPLES).observations)
    return Merged(quantized, package, onnx.load(package / GRAPH))


def alone(quantized: QuantizedDenoiser, phase: Phase) -> QuantizedDenoiser:
    """A plan that has this phase at all steps, with the codes and scales that are there."""
    whole = phase.model_copy(update={"start": 0, "stop": quantized.plan.n_steps})
    plan = quantized.plan.model_copy(update={"phases": (whole,)})
    return assemble(quantized.denoiser, plan, quantized.parameters)


@pytest.fixture(scope="module")
def apart(merged: Merged, tmp_path_factory: pytest.TempPathFactory) -> list[Merged]:
    """A graph for each phase."""
    found, inputs = [], exportable(merged.quantized).inputs
    for p, phase in enumerate(merged.quantized.plan.phases):
        folder = tmp_path_factory.mktemp("apart") / str(p)
        network = alone(merged.quantized, phase).network
        found.append(Merged(merged.quantized, folder, write(Exportable(network, inputs), folder)))
    return found


def fed(denoiser: Denoiser, n: int = 3) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    x = torch.randn(n, *denoiser.info.sample_shape, generator=torch.Generator().manual_seed(1))
    return x.numpy(), np.arange(n, dtype=np.int64) % 3


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """The graph and all branches of it, however deep."""
    return [graph, *(each for branch in branches(graph) for each in graphs(branch))]


def contents(*models: onnx.ModelProto) -> dict[tuple[int, tuple[int, ...], bytes], int]:
    """Every different tensor of some graphs, and its bytes."""
    found = {}
    for model in models:
        for graph in graphs(model.graph):
            for tensor in graph.initializer:
                values = numpy_helper.to_array(tensor)
                narrow = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4)
                found[content(tensor)] = -(-values.size // 2) if narrow else values.nbytes
    return found


def content(tensor: TensorProto) -> tuple[int, tuple[int, ...], bytes]:
    values = numpy_helper.to_array(tensor)
    return tensor.data_type, tuple(tensor.dims), values.tobytes()


def test_a_step_computes_what_the_graph_of_its_phase_computes(
    denoiser: Denoiser, merged: Merged, apart: list[Merged]
) -> None:
    together = merged.open()
    x, labels = fed(denoiser)
    for step, alone in enumerate(apart):
        expected = alone.open()(x, step, labels)
        found = together(x, step, labels)
        atol = SUMMATION * float(np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_phases_differ_so_that_one_could_not_stand_for_another(
    denoiser: Denoiser, apart: list[Merged]
) -> None:
    x, labels = fed(denoiser)
    for step in range(STEPS):
        outputs = [alone.open()(x, step, labels) for alone in apart]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(outputs[one] - outputs[other]).max() > 1e-3


@pytest.mark.usefixtures("exact_kernels")
def test_the_runtime_follows_the_reference_at_every_step(
    denoiser: Denoiser, merged: Merged
) -> None:
    evaluate = merged.open()
    x, labels = fed(denoiser)
    for step in range(STEPS):
        with torch.no_grad():
            given = (torch.from_numpy(x), torch.tensor(step), torch.from_numpy(labels))
            expected = merged.quantized.network(*given).numpy()
        noise = (
            expected
            - denoiser.module(given[0], denoiser.timestep(step, len(x)), given[2]).detach().numpy()
        )
        found = evaluate(x, step, labels)
        floor = playback.FLOAT_NOISE * np.sqrt(np.mean(expected**2))
        rms = max(float(np.sqrt(np.mean(noise**2))), float(floor))
        assert np.sqrt(np.mean((found - expected) ** 2)) <= playback.GOLDEN_SHARE * rms


def test_inputs_and_output_are_those_of_one_phase(merged: Merged, apart: list[Merged]) -> None:
    for alone in apart:
        assert list(merged.model.graph.input) == list(alone.model.graph.input)
        (found,), (expected,) = merged.model.graph.output, alone.model.graph.output
        assert (found.name, found.type) == (expected.name, expected.type)
        assert merged.model.ir_version == alone.model.ir_version
    assert {(o.domain, o.version) for o in merged.model.opset_import} == {
        (o.domain, o.version) for alone in apart for o in alone.model.opset_import
    }


def test_the_graph_is_valid_onnx(merged: Merged) -> None:
    standard = onnx.ModelProto()
    standard.CopyFrom(merged.model)
    onnx.checker.check_model(standard, full_check=False)


def test_kernels_are_those_of_the_phase_with_most(merged: Merged) -> None:
    plan = merged.quantized.plan
    found = OnnxRuntimeBackend().count_kernels(merged.folder)
    assert found.integer == plan.n_integer_layers > 0
    assert len(plan.phases[1].integer_layers()) == 0


def test_integer_kernels_are_those_of_that_phase_alone(merged: Merged, apart: list[Merged]) -> None:
    together, first = (
        OnnxRuntimeBackend().count_kernels(each.folder).by_name for each in (merged, apart[0])
    )
    assert {k: n for k, n in together.items() if "Integer" in k or "QLinear" in k} == {
        k: n for k, n in first.items() if "Integer" in k or "QLinear" in k
    }


def test_a_fork_chooses_what_the_plan_says(denoiser: Denoiser, merged: Merged) -> None:
    """At every step; layers that are fed the same tensor fork together."""
    network = network_keys(denoiser)
    planned = set(merged.quantized.plan.phases[0].integer_layers())
    forks = [n for n in merged.model.graph.node if n.op_type == "If"]
    assert len(forks) == len({network.fed_with(layer) for layer in planned}) < len(planned)
    assert sum(len(fork.output) for fork in forks) == len(planned)


def test_weights_of_4_bits_are_stored_in_4(merged: Merged) -> None:
    narrow = [t for t in merged.stored if t.data_type == TensorProto.INT4]
    sizes = {x.name: x for x in merged.quantized.info.layers}
    planned = merged.quantized.plan.phases[2].integer_layers()
    variants = merged.quantized.parameters.layers
    codes = [m.weight.codes for v, m in variants.items() if v.precision == W4A8]
    assert len(codes) == len(planned)
    assert set(planned) <= set(sizes)
    # Two layers with equal codes would share one tensor: random ones have none.
    assert sum(int(np.prod(t.dims)) for t in narrow) == sum(c.numel() for c in codes)
    assert sum(len(t.raw_data) for t in narrow) == sum(-(-c.numel() // 2) for c in codes)


def read_by(graph: onnx.GraphProto, *kinds: str) -> set[str]:
    """Names of the tensors that nodes of some kinds read."""
    return {name for node in graph.node if node.op_type in kinds for name in node.input[1:]}


def test_a_float_convolution_has_its_weight_in_its_branch(merged: Merged) -> None:
    """Only there can the runtime block it by channels."""
    outer, *inner = graphs(merged.model.graph)
    ends = read_by(outer, "Conv")
    convolved = [branch for branch in inner if read_by(branch, "Conv")]
    assert len(ends) == 4
    assert len(convolved) > 4
    for branch in convolved:
        assert read_by(branch, "Conv") <= {tensor.name for tensor in branch.initializer}


def test_what_phases_have_in_common_is_not_in_a_branch(merged: Merged) -> None:
    outer, *inner = graphs(merged.model.graph)
    common = {"InstanceNormalization", "MultiHeadAttention", "Concat", "Resize"}
    assert {node.op_type for node in outer.node} >= common
    assert not {node.op_type for branch in inner for node in branch.node} & common


def choosing(of_step: Sequence[int], addends: Sequence[NDArray[np.float32]]) -> onnx.ModelProto:
    """x + a and 2 x + a, fed alike, with a chosen by the step; the sum of both."""
    n = max(of_step) + 1
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    tensors = [numpy_helper.from_array(a, f"a{v}") for v, a in enumerate(addends)]
    nodes = []
    for v in range(n):
        name = tensors[v % len(tensors)].name
        nodes.append(make("Add", ["sample", name], [f"once{v}"], f"once{v}"))
        nodes.append(make("Add", ["sample", "sample"], [f"double{v}"], f"double{v}"))
        nodes.append(make("Add", [f"double{v}", name], [f"twice{v}"], f"twice{v}"))
    for what in ("once", "twice"):
        outputs = [f"{what}{v}" for v in range(n)]
        given = ["sample", "step", *outputs]
        nodes.append(make(CHOOSE, given, [what], what, domain=DOMAIN, of_step=list(of_step)))
    nodes.append(make("Add", ["once", "twice"], ["output"], "sum"))
    graph = onnx.helper.make_graph(
        nodes,
        "choosing",
        [value("sample", 1, ["batch", len(addends[0])]), value("step", TensorProto.INT64, [])],
        [value("output", 1, ["batch", len(addends[0])])],
        tensors,
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, 1)]
    return onnx.helper.make_model(graph, ir_version=10, opset_imports=opsets)


OF_STEP = [(0, 1), (0, 1, 0), (0, 0, 1, 2), (1, 2, 0, 0, 3, 1)]


@pytest.mark.parametrize("of_step", OF_STEP)
@pytest.mark.parametrize("width", [3, 5000], ids=["small", "large"])
@pytest.mark.parametrize("shared", [False, True])
def test_every_step_is_computed_by_its_variant(
    of_step: tuple[int, ...], width: int, shared: bool
) -> None:
    n = 1 if shared else max(of_step) + 1
    addends = [np.full(width, k + 1, np.float32) for k in range(n)]
    model = fork(choosing(of_step, addends))
    onnx.checker.check_model(model, full_check=True)
    forks = [node for node in model.graph.node if node.op_type == "If"]
    assert [len(node.output) for node in forks] == [2]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.arange(2 * width, dtype=np.float32).reshape(2, width)
    for step, variant in enumerate(of_step):
        (found,) = session.run(None, {"sample": x, "step": np.array(step, np.int64)})
        np.testing.assert_array_equal(found, 3 * x + 2 * (1 if shared else variant + 1))


def test_a_large_tensor_of_both_branches_is_stored_once() -> None:
    addend = np.arange(5000, dtype=np.float32)
    outer, *inner = graphs(fork(choosing((0, 1), [addend])).graph)
    assert [tensor.name for tensor in outer.initializer if tensor.data_type == 1] == ["a0"]
    assert not any(branch.initializer for branch in inner)
    # Two levels down it would not be packed.
    outer, *inner = graphs(fork(choosing((0, 1, 2), [addend])).graph)
    assert sum(len(branch.initializer) for branch in inner) == 2


def test_a_large_tensor_of_one_branch_stands_outside() -> None:
    """The runtime would keep a second copy."""
    addends = [np.full(5000, k, np.float32) for k in range(2)]
    outer, *inner = graphs(fork(choosing((0, 1), addends)).graph)
    assert {t.name for t in outer.initializer if t.data_type == 1} == {"a0", "a1"}
    assert not any(branch.initializer for branch in inner)


def test_a_small_tensor_of_both_branches_is_in_both() -> None:
    outer, *inner = graphs(fork(choosing((0, 1), [np.ones(3, np.float32)])).graph)
    assert not [tensor for tensor in outer.initializer if tensor.data_type == 1]
    assert [len(branch.initializer) for branch in inner] == [1, 1]


def test_the_variant_of_most_steps_is_decided_first() -> None:
    addends = [np.full(3, k, np.float32) for k in range(3)]
    (made,) = [n for n in fork(choosing((0, 2, 2, 1), addends)).graph.node if n.op_type == "If"]
    first = next(a.g for a in made.attribute if a.name == "then_branch")
    assert {float(numpy_helper.to_array(t)[0]) for t in first.initializer} == {2.0}


def test_names_are_defined_once(merged: Merged) -> None:
    names = [t.name for t in merged.stored] + [i.name for i in merged.model.graph.input]
    outputs = [
        name for graph in graphs(merged.model.graph) for node in graph.node for name in node.output
    ]
    defined = [*names, *(name for name in outputs if name)]
    assert len(defined) == len(set(defined))


def test_a_package_stores_what_its_phases_store_and_nothing_large_twice(
    merged: Merged, apart: list[Merged]
) -> None:
    expected = contents(*(each.model for each in apart))
    tables = [t for t in merged.stored if t.data_type == TensorProto.BOOL]
    expected |= {content(t): numpy_helper.to_array(t).nbytes for t in tables}
    found = contents(merged.model)

    def large(tensors: dict[Any, int]) -> dict[Any, int]:
        # Biases that a graph adds to each other, of at most 16 channels, it stores as their sum.
        return {key: n for key, n in tensors.items() if n > 4 * 16}

    assert large(found) == large(expected)
    again = sum(numpy_helper.to_array(t).nbytes for t in merged.stored) - sum(
        numpy_helper.to_array(t).nbytes for t in {content(t): t for t in merged.stored}.values()
    )
    assert again < 0.05 * sum(expected.values())


def test_one_phase_is_left_as_it_is(apart: list[Merged]) -> None:
    assert fork(apart[0].model) is apart[0].model


def test_ops_are_counted_at_the_step_that_runs_most_of_them() -> None:
    def branch(n: int) -> onnx.GraphProto:
        nodes = [onnx.helper.make_node("Conv", ["x", "w"], [f"y{k}"]) for k in range(n)]
        return onnx.GraphProto(node=nodes, name=str(n))

    def made(condition: str, there: int, otherwise: int) -> onnx.NodeProto:
        node = onnx.helper.make_node("If", [condition], ["y"])
        for name, n in (("then_branch", there), ("else_branch", otherwise)):
            node.attribute.append(onnx.helper.make_attribute(name, branch(n)))
        return node

    tables = {"early": [True, False, False], "late": [False, False, True]}
    gathers = [onnx.helper.make_node("Gather", [f"t/{k}", "step"], [k]) for k in tables]
    graph = onnx.GraphProto(
        node=[*branch(1).node, *gathers, made("early", 4, 1), made("late", 3, 2)],
        initializer=[numpy_helper.from_array(np.array(t), f"t/{k}") for k, t in tables.items()],
        name="outer",
    )
    # 1 + 4 + 2 at the first step; 1 + 1 + 3 at the last.
    assert count_ops(graph, ("Conv", "Gemm")) == {"Conv": 7, "Gemm": 0}
    by_step = count_ops_by_step(graph, ("Conv",))
    assert by_step == {0: {"Conv": 7}, 1: {"Conv": 4}, 2: {"Conv": 5}}
    # Neither a table of booleans nor a condition has to do with the steps just for being one.
    mask = numpy_helper.from_array(np.zeros(1000, bool), "mask")
    graph.initializer.append(mask)
    graph.node.append(onnx.helper.make_node("Gather", ["mask", "indices"], ["masked"]))
    graph.node.append(made("an input", 1, 5))
    assert count_ops(graph, ("Conv", "Gemm")) == {"Conv": 12, "Gemm": 0}


@pytest.mark.usefixtures("exact_kernels")
def test_a_package_of_phases_verifies(merged: Merged) -> None:
    found = pipeline.verify(merged.folder)
    assert found.planned == found.kernels.integer == merged.quantized.plan.n_integer_layers
    assert found.manifest.integer_layers == found.planned
    assert max(found.deviation) <= playback.GOLDEN_SHARE
