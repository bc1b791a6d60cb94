"""The runtime of packages as a module, and what this host's integer kernels can do."""

from __future__ import annotations

import importlib.util
import sys
from importlib.resources import files
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edgeqdm.emit import playback


@pytest.fixture(scope="session")
def exact_kernels() -> None:
    """Skip on x86 without VNNI: there uint8 x int8 goes through saturating 16-bit sums."""
    codes, weights, sums = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.INT32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "probe",
        [
            onnx.helper.make_tensor_value_info("a", codes, [1, 64]),
            onnx.helper.make_tensor_value_info("b", weights, [64, 16]),
        ],
        [onnx.helper.make_tensor_value_info("y", sums, [1, 16])],
    )
    opset = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    fed = {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)}
    if np.any(session.run(None, fed)[0] != 64 * 255 * 127):
        pytest.skip("this CPU has no exact uint8 x int8 kernel (x86 without VNNI)")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`run.py` as a module; what it does to the interpreter is undone afterwards."""
    monkeypatch.setitem(sys.modules, "playback", playback)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    source = files("edgeqdm.backends.onnxruntime").joinpath("templates/run.py")
    spec = importlib.util.spec_from_file_location("packaged_run", str(source))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
