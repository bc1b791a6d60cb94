"""Several phases are one graph that computes, step by step, what each phase alone computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgeqdm import pipeline
from edgeqdm.backends.onnxruntime.backend import GRAPH, OnnxRuntimeBackend
from edgeqdm.backends.onnxruntime.phases import branches, count_ops, merge_phases
from edgeqdm.emit import playback
from edgeqdm.emit.backend import Evaluate, Exportable
from edgeqdm.emit.package import exportable
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.quantize.quantizer import QuantizedDenoiser, phase_network, quantize
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
        return list(self.model.graph.initializer)

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


@pytest.fixture(scope="module")
def apart(merged: Merged, tmp_path_factory: pytest.TempPathFactory) -> list[Merged]:
    """A graph for each phase."""
    found, inputs = [], exportable(merged.quantized).inputs
    for p, phase in enumerate(merged.quantized.plan.phases):
        folder = tmp_path_factory.mktemp("apart") / str(p)
        network = phase_network(merged.quantized, phase)
        found.append(Merged(merged.quantized, folder, write(Exportable(network, inputs), folder)))
    return found


def fed(denoiser: Denoiser, n: int = 3) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    x = torch.randn(n, *denoiser.info.sample_shape, generator=torch.Generator().manual_seed(1))
    return x.numpy(), np.arange(n, dtype=np.int64) % 3


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """The graph and all branches of it."""
    return [graph, *branches(graph)]


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


def test_the_network_of_a_phase_is_the_whole_one_at_its_steps(
    denoiser: Denoiser, merged: Merged
) -> None:
    x, labels = (torch.from_numpy(each) for each in fed(denoiser))
    with torch.no_grad():
        for phase in merged.quantized.plan.phases:
            alone = phase_network(merged.quantized, phase)
            for step in range(phase.start, phase.stop):
                index = torch.tensor(step)
                expected = merged.quantized.network(x, index, labels)
                assert torch.equal(alone(x, index, labels), expected)


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


def test_branches_of_a_phase_run_the_kernels_of_the_phase_alone(
    merged: Merged, apart: list[Merged]
) -> None:
    together, alone = (
        OnnxRuntimeBackend().count_kernels(each.folder).by_name for each in (merged, apart[0])
    )
    assert {k: n for k, n in together.items() if "Integer" in k or "QLinear" in k} == {
        k: n for k, n in alone.items() if "Integer" in k or "QLinear" in k
    }


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


def convolved(graph: onnx.GraphProto) -> set[str]:
    """Names of the weights and biases of float convolutions."""
    return {name for node in graph.node if node.op_type == "Conv" for name in node.input[1:]}


def test_a_tensor_is_stored_once_and_outside_all_branches(merged: Merged) -> None:
    """But those of float convolutions, and the steps at which later phases begin."""
    outer, *inner = graphs(merged.model.graph)
    shared = [t for graph in (outer, *inner) for t in graph.initializer]
    copied = [t for branch in inner for t in branch.initializer if t.name in convolved(branch)]
    for branch in inner:
        others = [t for t in branch.initializer if t.name not in convolved(branch)]
        assert all(int(np.prod(t.dims)) == 1 for t in others)
    again = len(copied) - len({content(t) for t in copied})
    assert len(contents(merged.model)) == len(shared) - again


def test_a_float_convolution_has_its_weight_in_its_branch(merged: Merged) -> None:
    """Only there can the runtime block it by channels."""
    outer, *inner = graphs(merged.model.graph)
    assert not convolved(outer)
    assert sum(bool(convolved(branch)) for branch in inner) == STEPS
    for branch in inner:
        assert convolved(branch) <= {t.name for t in branch.initializer}


def test_no_fork_is_inside_another_one(merged: Merged) -> None:
    """Two levels down the runtime would not pack the outer weights."""
    outer, *inner = graphs(merged.model.graph)
    assert sum(node.op_type == "If" for node in outer.node) == STEPS
    assert all(node.op_type != "If" for branch in inner for node in branch.node)


@pytest.mark.parametrize("starts", [(0, 1), (0, 2, 3), (0, 1, 2, 5, 9)])
def test_every_step_is_computed_by_its_phase(starts: tuple[int, ...]) -> None:
    """Also where the output has more channels than the sample, as with a learned variance."""

    def phase(k: int) -> onnx.ModelProto:
        addend = numpy_helper.from_array(np.array(k, np.float32), "addend")
        nodes = [
            onnx.helper.make_node("Concat", ["sample", "sample"], ["both"], "concat", axis=1),
            onnx.helper.make_node("Add", ["both", "addend"], ["output"], "add"),
        ]
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            nodes,
            "phase",
            [value("sample", 1, ["batch", 2]), value("step", TensorProto.INT64, [])],
            [value("output", 1, ["batch", 4])],
            [addend],
        )
        return onnx.helper.make_model(
            graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)]
        )

    model = merge_phases([(start, phase(k)) for k, start in enumerate(starts)])
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    for step in range(starts[-1] + 2):
        k = sum(start <= step for start in starts) - 1
        (found,) = session.run(None, {"sample": x, "step": np.array(step, np.int64)})
        np.testing.assert_array_equal(found, np.concatenate([x, x], 1) + k)


def test_names_are_defined_once(merged: Merged) -> None:
    names = [t.name for t in merged.stored] + [i.name for i in merged.model.graph.input]
    outputs = [
        name for graph in graphs(merged.model.graph) for node in graph.node for name in node.output
    ]
    defined = [*names, *(name for name in outputs if name)]
    assert len(defined) == len(set(defined))


def test_equal_phases_store_what_one_stores(apart: list[Merged]) -> None:
    """But for two numbers: the steps at which the others begin."""
    one = apart[0].model
    three = merge_phases([(step, one) for step in range(STEPS)])
    assert sum(contents(three).values()) <= sum(contents(one).values()) + 2 * 8
    stored = sum(len(t.raw_data) for graph in graphs(three.graph) for t in graph.initializer)
    assert stored < 1.1 * sum(len(t.raw_data) for t in one.graph.initializer)


def test_a_package_stores_what_its_phases_store_and_nothing_twice(
    merged: Merged, apart: list[Merged]
) -> None:
    alone = contents(*(each.model for each in apart))
    starts = [numpy_helper.from_array(np.array(start, np.int64)) for start in (1, 2)]
    alone |= {(t.data_type, (), numpy_helper.to_array(t).tobytes()): 8 for t in starts}
    assert contents(merged.model) == alone


def test_one_phase_is_left_as_it_is(apart: list[Merged]) -> None:
    assert merge_phases([(0, apart[0].model)]) is apart[0].model


def test_ops_are_counted_in_the_branch_with_most_of_them() -> None:
    def branch(n: int) -> onnx.GraphProto:
        nodes = [onnx.helper.make_node("Conv", ["x", "w"], [f"y{k}"]) for k in range(n)]
        return onnx.GraphProto(node=nodes, name=str(n))

    fork = onnx.helper.make_node("If", ["early"], ["y"])
    for name, n in (("then_branch", 2), ("else_branch", 3)):
        fork.attribute.append(onnx.helper.make_attribute(name, branch(n)))
    graph = onnx.GraphProto(node=[*branch(1).node, fork], name="outer")
    assert count_ops(graph, ("Conv", "Gemm")) == {"Conv": 4, "Gemm": 0}


@pytest.mark.usefixtures("exact_kernels")
def test_a_package_of_phases_verifies(merged: Merged) -> None:
    found = pipeline.verify(merged.folder)
    assert found.planned == found.kernels.integer == merged.quantized.plan.n_integer_layers
    assert found.manifest.integer_layers == found.planned
    assert max(found.deviation) <= playback.GOLDEN_SHARE


def test_a_package_holds_the_graphs_of_its_phases_merged(
    merged: Merged, apart: list[Merged]
) -> None:
    expected = merge_phases([(step, alone.model) for step, alone in enumerate(apart)])
    assert merged.model.graph == expected.graph
