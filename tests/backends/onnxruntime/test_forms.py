"""Every form of a package passes the kit, and computes what the standard form does."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgeqdm.backends import load_backend
from edgeqdm.backends.onnxruntime import npu
from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.backends.onnxruntime.forms import FORMS, GRAPH, NPU, ORT, ORT_GRAPH, SMALL, STEP_GRAPH
from edgeqdm.backends.onnxruntime.half import round_to_half, store_in_16_bits
from edgeqdm.backends.onnxruntime.npu_lint import check_npu_graph
from edgeqdm.backends.onnxruntime.ort_format import OPERATORS, to_ort
from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit import playback
from edgeqdm.emit.backend import STANDARD, Backend, Evaluate
from edgeqdm.emit.export import export_onnx
from edgeqdm.emit.integrity import seal_manifest
from edgeqdm.emit.package import emit_package, exportable
from edgeqdm.emit.verify import verify_package
from edgeqdm.errors import UnsupportedError, VerifyError
from edgeqdm.ir.codec import read_record
from edgeqdm.ir.package import Manifest
from edgeqdm.ir.plan import Phase
from edgeqdm.ir.precision import FP32, TABLE, ActivationPolicy, Precision
from edgeqdm.quantize.plans import default_plan
from edgeqdm.quantize.quantizer import QuantizedDenoiser, quantize
from edgeqdm.testing.conformance import (
    STEPS,
    BackendConformance,
    Emitted,
    quantize_tiny,
    run_blocked,
    small_denoiser,
    tiny_quantized,
)

STATIC = ActivationPolicy.STATIC


def models(package: Path) -> list[str]:
    return sorted(p.name for p in package.glob("model.*"))


def rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(values.astype(np.float64)))))


def outputs(evaluate: Evaluate, emitted: Emitted) -> NDArray[np.float32]:
    """Of every step, for the inputs of the golden run."""
    player = playback.open_player(emitted.package)
    golden = playback.read_safetensors(emitted.package / "golden.safetensors")
    found = [
        playback.guided(player, evaluate, golden["inputs"][i], i, golden["conditioning"])
        for i in range(STEPS)
    ]
    return np.stack(found)


@cache
def small_quantized(activation: ActivationPolicy | None) -> QuantizedDenoiser:
    return quantize_tiny(small_denoiser(DDPMScheduler()), activation=activation)


@cache
def standard_graph(kind: str, activation: ActivationPolicy | None) -> bytes:
    return OnnxRuntimeBackend().emit(exportable(quantized(kind, activation)))[GRAPH].data


def quantized(kind: str, activation: ActivationPolicy | None) -> QuantizedDenoiser:
    return (
        small_quantized(activation)
        if kind == "unet"
        else tiny_quantized(kind, activation=activation)
    )


def kind_of(emitted: Emitted) -> str:
    return "unet" if emitted.manifest.model.name == "small" else "dit"


class FormConformance(BackendConformance):
    """The kit on a transformer and, for a UNet, on a network of one block that exports faster."""

    @classmethod
    def quantized(cls, kind: str, backend: Backend) -> QuantizedDenoiser:
        return quantized(kind, cls.activation)

    def beside(self, emitted: Emitted, folder: Path) -> NDArray[np.float32]:
        """Outputs of the standard form at the same inputs."""
        (folder / GRAPH).write_bytes(standard_graph(kind_of(emitted), self.activation))
        return outputs(OnnxRuntimeBackend().open(folder), emitted)


def noise(emitted: Emitted) -> float:
    return max(playback.open_player(emitted.package).golden_noise_rms)


class TestSmall(FormConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return OnnxRuntimeBackend(SMALL)

    def test_floats_stand_in_16_bits_and_scales_in_32(self, emitted: Emitted) -> None:
        data = standard_graph(kind_of(emitted), None)
        standard, small = onnx.load_from_string(data), onnx.load(emitted.package / GRAPH)
        wide = {t.name: t for t in standard.graph.initializer}
        kinds = {t.name: t.data_type for t in small.graph.initializer}
        halved = [n for n in kinds if n.endswith("/16 bits")]
        assert halved
        for name in halved:
            before = wide[name.removesuffix("/16 bits")]
            assert (before.data_type, kinds[name]) == (TensorProto.FLOAT, TensorProto.FLOAT16)
        gathered = [n.input[0] for n in small.graph.node if n.op_type == "Gather"]
        tables = [n for n in gathered if n in kinds and n.endswith("scale_table")]
        scales = [n for n in kinds if n.endswith("weight_scale")]
        assert tables
        assert scales
        assert all(kinds[name] == TensorProto.FLOAT for name in [*tables, *scales])
        assert (emitted.package / GRAPH).stat().st_size < 0.97 * len(data)

    def test_outputs_are_within_the_rounding_of_the_standard_form(
        self, backend: Backend, emitted: Emitted, tmp_path: Path
    ) -> None:
        expected = self.beside(emitted, tmp_path)
        found = outputs(backend.open(emitted.package), emitted)
        # Floats of 11 bits move codes over a half-tie: less than quantization itself.
        assert 0 < rms(found - expected) < noise(emitted)


class TestOrt(FormConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return OnnxRuntimeBackend(ORT)

    def test_package_holds_the_graph_and_its_operators(self, emitted: Emitted) -> None:
        assert models(emitted.package) == [ORT_GRAPH]
        assert {emitted.manifest.files[n].role for n in (ORT_GRAPH, OPERATORS)} == {"model"}
        listed = (emitted.package / OPERATORS).read_text()
        assert "com.microsoft;1;" in listed
        assert "MatMulIntegerToFloat" in listed
        assert "/tmp" not in listed

    def test_outputs_equal_those_of_the_standard_form(
        self, backend: Backend, emitted: Emitted, tmp_path: Path
    ) -> None:
        expected = self.beside(emitted, tmp_path)
        found = outputs(backend.open(emitted.package), emitted)
        # Float convolutions are not blocked by channels: sums in another order, half-ties.
        assert rms(found - expected) < 0.5 * noise(emitted)

    # The runtime writes its tables in no fixed order: another file, the same outputs.
    @pytest.mark.parametrize("emitted", ["dit"], indirect=True)
    def test_emitting_twice_gives_the_same_files(
        self, backend: Backend, emitted: Emitted, tmp_path: Path
    ) -> None:
        again = emit_package(emitted.quantized, backend, tmp_path / "again")
        kept = emitted.manifest.files.keys() - {ORT_GRAPH}
        assert again.files.keys() - {ORT_GRAPH} == kept
        assert all(again.files[name] == emitted.manifest.files[name] for name in kept)
        np.testing.assert_array_equal(
            outputs(backend.open(tmp_path / "again"), emitted),
            outputs(backend.open(emitted.package), emitted),
        )


class TestNpu(FormConformance):
    activation = STATIC

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return OnnxRuntimeBackend(NPU)

    def test_graph_is_of_standard_operators(self, emitted: Emitted) -> None:
        model = onnx.load(emitted.package / STEP_GRAPH.format(0))
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
        assert {node.domain for node in model.graph.node} == {""}
        assert [i.name for i in model.graph.input] == ["sample", "step", "label"]
        assert models(emitted.package) == ["model.step0.onnx"]
        assert not (emitted.package / "runtime" / "web").exists()

    def test_unoptimized_graph_follows_the_integer_reference(self, emitted: Emitted) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        path = str(emitted.package / STEP_GRAPH.format(0))
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def evaluate(x: Any, step: int, labels: Any) -> Any:
            return session.run(None, {"sample": x, "step": np.array(step), "label": labels})[0]

        player = playback.open_player(emitted.package)
        golden = playback.read_safetensors(emitted.package / "golden.safetensors")
        assert playback.self_test(player, evaluate, golden).passed

    def test_outputs_are_those_of_the_standard_form(
        self, backend: Backend, emitted: Emitted, tmp_path: Path
    ) -> None:
        expected = self.beside(emitted, tmp_path)
        found = outputs(backend.open(emitted.package), emitted)
        # Products may be dequantized before they are summed: half-ties.
        assert rms(found - expected) < 0.5 * noise(emitted)


@cache
def phased() -> QuantizedDenoiser:
    """Three phases of constant scales; the first and the last are the same."""
    denoiser = small_denoiser(DDIMScheduler(clip_sample=False), steps=4)
    w8a8, other = (
        default_plan(denoiser.info, "onnxruntime", 4, body=p, activation=STATIC).phases[0].layers
        for p in (Precision("w8a8"), Precision("w4a8"))
    )
    phases = (
        Phase(start=0, stop=1, layers=w8a8),
        Phase(start=1, stop=3, layers=other),
        Phase(start=3, stop=4, layers=w8a8),
    )
    plan = default_plan(denoiser.info, "onnxruntime", 4).model_copy(update={"phases": phases})
    runs = collect_trajectories(denoiser, 4, seed=1)
    return quantize(denoiser, plan, observe(denoiser, runs, plan.phases[0].integer_layers()))


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("phased") / "package"
    emit_package(phased(), OnnxRuntimeBackend(NPU), package)
    return package


def test_every_phase_has_a_graph_named_by_its_first_step(phases: Path, tmp_path: Path) -> None:
    assert models(phases) == ["model.step0.onnx", "model.step1.onnx", "model.step3.onnx"]
    first, _, last = (onnx.load(phases / name) for name in models(phases))
    assert Counter(n.op_type for n in first.graph.node) == Counter(
        n.op_type for n in last.graph.node
    )
    found = verify_package(phases, load_backend("onnxruntime"))
    assert found.kernels.integer == found.planned == 2
    done = run_blocked(phases, ["--self-test"], tmp_path)
    assert done.exit_code == 0, done.errors
    # A step that took another phase's graph would be off by the difference of 4 and 8 bits.
    assert max(json.loads(done.output)["deviation"]) < 0.5


def test_a_phase_that_is_missing_is_found(phases: Path, tmp_path: Path) -> None:
    (copied := tmp_path / "package").mkdir()
    for name in models(phases)[1:]:
        (copied / name).write_bytes((phases / name).read_bytes())
    for use in (OnnxRuntimeBackend(NPU).open, OnnxRuntimeBackend(NPU).count_kernels):
        with pytest.raises(VerifyError, match="first step"):
            use(copied)


@pytest.mark.parametrize("body", ["w8a8", "w6a8", "w4a8", "w8", "w4"])
def test_npu_graph_of_every_precision_follows_the_reference(body: str) -> None:
    denoiser = small_denoiser(DDIMScheduler(clip_sample=False))
    plan = default_plan(
        denoiser.info,
        "onnxruntime",
        STEPS,
        body=Precision(body),
        embedding=Precision(body),
        activation=STATIC,
    )
    backend = OnnxRuntimeBackend(NPU)
    assert backend.check(plan, denoiser.info) == ()
    runs = collect_trajectories(denoiser, 4, seed=1)
    quantized = quantize(
        denoiser, plan, observe(denoiser, runs, tuple(x.name for x in denoiser.info.layers))
    )
    data = backend.emit(exportable(quantized))[STEP_GRAPH.format(0)].data
    x = torch.randn(2, *denoiser.info.sample_shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        expected = quantized.network(x, torch.tensor(1), labels).numpy()
    # With every optimization: Q/DQ pairs must not become other numbers on the way.
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    fed = {"sample": x.numpy(), "step": np.array(1), "label": labels.numpy()}
    assert rms(session.run(None, fed)[0] - expected) < 0.01 * rms(expected)


def test_weights_of_4_bits_are_bit_equal_to_those_stored_in_8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantized = phased()
    narrow = OnnxRuntimeBackend().emit(exportable(quantized))[GRAPH].data
    module = "edgeqdm.backends.onnxruntime.lowering._store_in_4_bits"
    monkeypatch.setattr(module, lambda graph: None)
    wide = OnnxRuntimeBackend().emit(exportable(quantized))[GRAPH].data
    assert len(narrow) < len(wide)
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    fed = {"sample": x, "step": np.array(1), "label": np.array([0, 1])}
    found, expected = (
        ort.InferenceSession(d, providers=["CPUExecutionProvider"]).run(None, fed)[0]
        for d in (narrow, wide)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", [SMALL, ORT])
def test_phases_may_take_the_other_forms(form: str, tmp_path: Path) -> None:
    emit_package(phased(), OnnxRuntimeBackend(form), tmp_path / "package")
    found = verify_package(tmp_path / "package", load_backend("onnxruntime"))
    assert found.kernels.integer == found.planned == 2


class Floats(nn.Module):
    def __init__(self, **values: list[float]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(value))


def test_only_tensors_that_float16_holds_are_rounded() -> None:
    network = Floats(
        plain=[1.0001, -3e-5, 0.0],
        overflow=[1.0, 7e4],
        subnormal=[3e-8, 1e-7],
        weight_scale=[1.0001],
        act_scale_table=[1.0001],
        timesteps=[999.1],
    )
    found = round_to_half(network)
    for name, buffer in network.named_buffers():
        same = torch.equal(found.get_buffer(name), buffer)
        assert same == (name != "plain"), name
    expected = network.get_buffer("plain").half().float()
    assert torch.equal(found.get_buffer("plain"), expected)


def test_a_tensor_is_stored_in_16_bits_only_if_none_of_it_is_lost() -> None:
    exact = np.arange(-200, 200, dtype=np.float32) / 8
    tensors = {"exact": exact, "lost": exact + np.float32(1e-4), "few": exact[:8]}
    graph = helper.make_graph(
        [], "g", [], [], [numpy_helper.from_array(a, n) for n, a in tensors.items()]
    )
    store_in_16_bits(graph)
    found = {t.name: t.data_type for t in graph.initializer}
    assert found == {"exact/16 bits": TensorProto.FLOAT16, "lost": 1, "few": 1}
    (cast,) = graph.node
    assert (list(cast.input), list(cast.output)) == (["exact/16 bits"], ["exact"])


@pytest.mark.parametrize("policy", [None, "w8a8dyn"])
def test_npu_refuses_scales_that_are_no_constants_in_one_line(policy: str | None) -> None:
    quantized = tiny_quantized("dit")
    plan = quantized.plan
    if policy:
        plan = default_plan(quantized.info, "onnxruntime", STEPS, body=Precision(policy))
    with pytest.raises(UnsupportedError) as caught:
        emit_package(
            QuantizedDenoiser(
                quantized.denoiser, plan, quantized.parameters, quantized.network, ""
            ),
            OnnxRuntimeBackend(NPU),
            Path("never"),
        )
    assert caught.value.code == "EQ-4201"
    assert caught.value.message.count("edgeqdm plan --activation static") == 1


def test_menu_of_npu_has_no_groups_and_no_run_time_scales() -> None:
    offered = {p for precisions in OnnxRuntimeBackend(NPU).menu().values() for p in precisions}
    assert not any(p.group_size or p.dynamic for p in offered)
    assert {FP32, TABLE, Precision("w8a8"), Precision("w4a8"), Precision("w4")} <= offered


def test_unknown_form_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError) as caught:
        load_backend("onnxruntime", "tiny")
    assert caught.value.code == "EQ-4303"
    assert caught.value.hint == "known: standard, small, ort, npu"
    for form in FORMS:
        assert load_backend("onnxruntime", form).form == form
    assert load_backend("onnxruntime").form == STANDARD


def test_ort_without_flatbuffers_is_refused_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = ("onnxruntime.tools", "ort_flatbuffers_py", "flatbuffers")
    for name in [m for m in sys.modules if m.startswith(loaded)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    quantized = tiny_quantized("dit")
    with pytest.raises(UnsupportedError) as caught:
        OnnxRuntimeBackend(ORT).check(quantized.plan, quantized.info)
    assert caught.value.code == "EQ-4435"
    assert caught.value.hint == "pip install flatbuffers"


def test_conversion_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    data = standard_graph("unet", None)
    capfd.readouterr()
    graph, listed = to_ort(data)
    assert graph[4:8] == b"ORTM"
    assert not any(line.startswith(b"#") for line in listed.splitlines())
    assert capfd.readouterr() == ("", "")


def test_manifest_of_an_older_package_is_of_the_standard_form(phases: Path, tmp_path: Path) -> None:
    manifest = read_record(phases / "manifest.json", Manifest)
    assert manifest.form == NPU
    document = json.loads((phases / "manifest.json").read_bytes())
    del document["form"]
    assert Manifest.model_validate_json(json.dumps(document)).form == STANDARD


def test_a_form_of_another_version_is_a_verify_error(phases: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for path in phases.rglob("*"):
        target = package / path.relative_to(phases)
        target.mkdir(exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    manifest = read_record(package / "manifest.json", Manifest)
    for form, code in (("newer", "EQ-8208"), (STANDARD, "EQ-8301")):
        changed = manifest.model_copy(update={"form": form})
        (package / "manifest.json").write_bytes(seal_manifest(changed))
        with pytest.raises(VerifyError) as caught:
            verify_package(package, load_backend("onnxruntime"))
        assert caught.value.code == code


@cache
def npu_graph() -> onnx.ModelProto:
    model = exportable(phased())
    return npu.graphs(export_onnx(model.network, model.inputs, npu.TRANSLATION))[0]


def of_type(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op_type)


def weight_node(model: onnx.ModelProto) -> onnx.NodeProto:
    names = {t.name for t in model.graph.initializer if t.data_type == TensorProto.INT8}
    return next(
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in names
    )


def _add(model: onnx.ModelProto, array: NDArray[Any]) -> str:
    model.graph.initializer.append(numpy_helper.from_array(array, "planted"))
    return "planted"


def per_channel(model: onnx.ModelProto) -> None:
    of_type(model, "QuantizeLinear").input[1] = _add(model, np.ones(4, np.float32))


def computed_scale(model: onnx.ModelProto) -> None:
    of_type(model, "QuantizeLinear").input[1] = "sample"


def infinite(model: onnx.ModelProto) -> None:
    of_type(model, "QuantizeLinear").input[1] = _add(model, np.array(np.inf, np.float32))


def signed(model: onnx.ModelProto) -> None:
    of_type(model, "QuantizeLinear").input[2] = _add(model, np.array(0, np.int8))


def weight_per_tensor(model: onnx.ModelProto) -> None:
    weight_node(model).input[1] = _add(model, np.array(0.5, np.float32))


def weight_offset(model: onnx.ModelProto) -> None:
    node = weight_node(model)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    node.input[2] = _add(model, tensors[node.input[2]] + np.int8(1))


def computed_bias(model: onnx.ModelProto) -> None:
    conv = of_type(model, "Conv")
    del conv.input[2:]
    conv.input.append("sample")


def own_operator(model: onnx.ModelProto) -> None:
    of_type(model, "Conv").domain = "com.microsoft"


def control_flow(model: onnx.ModelProto) -> None:
    of_type(model, "Add").op_type = "If"


def newer_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 24


def other_codes(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    node.input[0] = "sample"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (per_channel, "rank 1"),
        (computed_scale, "no constant"),
        (infinite, "not finite"),
        (signed, "int8, not uint8"),
        (weight_per_tensor, "one constant scale per output channel"),
        (weight_offset, "not a constant 0"),
        (computed_bias, "bias is no constant"),
        (own_operator, "Conv is none of the operators"),
        (control_flow, "If is none of the operators"),
        (newer_opset, "opset ai.onnx 24"),
        (other_codes, "neither a constant nor those of a QuantizeLinear"),
    ],
)
def test_lint_of_npu_names_what_a_provider_would_not_take(damage: Any, message: str) -> None:
    model = copy.deepcopy(npu_graph())
    check_npu_graph(model)
    damage(model)
    with pytest.raises(VerifyError, match=message) as caught:
        check_npu_graph(model)
    assert caught.value.code == "EQ-8303"
