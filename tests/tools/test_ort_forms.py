"""What the benchmark of forms times computes the same in every form."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgeqdm.emit import playback
from edgeqdm.testing.conformance import tiny_quantized


@pytest.fixture(scope="module")
def graphs(forms: ModuleType) -> Any:
    return forms.graphs_of(tiny_quantized("unet").denoiser)


def run(model: onnx.ModelProto) -> Any:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    fed: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 2 for size in value.shape]
        floats = value.type == "tensor(float)"
        fed[value.name] = (
            random.standard_normal(shape, np.float32) if floats else np.ones(shape, np.int64)
        )
    return session.run(None, fed)[0]


def test_every_variant_computes_the_network(graphs: Any) -> None:
    exact = run(graphs["float32"])
    size = float(np.sqrt(np.mean(exact**2)))
    np.testing.assert_allclose(run(graphs["float32, our forms"]), exact, rtol=0, atol=1e-5 * size)
    ours = run(graphs["all on"])
    noise = float(np.sqrt(np.mean((ours - exact) ** 2)))
    assert 0 < noise < 0.1 * size
    for name in graphs:
        if name.endswith(" off"):
            off = float(np.sqrt(np.mean((run(graphs[name]) - ours) ** 2)))
            assert off <= playback.GOLDEN_SHARE * noise, name


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_what_is_off_is_off(graphs: Any) -> None:
    on = kinds(graphs["all on"])
    assert on["MultiHeadAttention"] > 0
    assert on["Softmax"] == on["GroupNormalization"] == 0
    assert kinds(graphs["attention off"])["Softmax"] == on["MultiHeadAttention"]
    assert kinds(graphs["group norm off"])["GroupNormalization"] == on["InstanceNormalization"]
    assert kinds(graphs["biases off"])["Add"] > on["Add"]
    own = kinds(graphs["shared quantization off"])
    assert own["QuantizeLinear"] == own["MatMulInteger"] + own["QLinearConv"]
    assert own["QuantizeLinear"] > on["QuantizeLinear"]
    assert kinds(graphs["scale tables off"])["Gather"] < on["Gather"]
    assert kinds(graphs["time tables off"])["Gemm"] > on["Gemm"]
    plain = kinds(graphs["float32"])
    assert plain["GroupNormalization"] > 0
    assert plain["MultiHeadAttention"] == plain["QLinearConv"] == 0


def test_forms_of_one_operator_compute_the_same(forms: ModuleType) -> None:
    for variants in (forms.norm_forms(8, 4, 2), forms.attention_forms(6, 2, 4)):
        first, *others = (run(model) for model in variants.values())
        assert len(others) == 2
        for other in others:
            # A code may round the other way.
            atol = 1 if first.dtype == np.uint8 else 1e-5
            np.testing.assert_allclose(other.astype(float), first.astype(float), rtol=0, atol=atol)


def test_a_report_has_ratios_and_medians(forms: ModuleType, monkeypatch: Any) -> None:
    denoiser = tiny_quantized("unet").denoiser
    monkeypatch.setattr(forms, "open_model", lambda name: denoiser)
    monkeypatch.setattr(forms, "timed", lambda graphs, *_: {name: 2.0 for name in graphs})
    found = forms.measure("unet-fmnist", 30)
    assert found["ratio_to_float32"] == found["ratio_to_float32_in_our_forms"] == 1.0
    assert set(found["off_over_on"].values()) == {1.0}
    assert found["scale_tables_share"] == 0.0
    assert found["batch"] == 2
