"""The ONNX Runtime CPU target."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import EncodeError
from numpy.typing import NDArray

from edgeqdm.backends.onnxruntime.blockwise import BLOCK_SIZES
from edgeqdm.backends.onnxruntime.boundaries import boundary_graph
from edgeqdm.backends.onnxruntime.lint import check_graph
from edgeqdm.backends.onnxruntime.lowering import TRANSLATION, finish
from edgeqdm.backends.onnxruntime.phases import count_ops, fork
from edgeqdm.backends.onnxruntime.storage import weight_bytes
from edgeqdm.emit.backend import (
    Array,
    Evaluate,
    Exportable,
    File,
    KernelCount,
    Menu,
    Unsupported,
)
from edgeqdm.emit.export import export_onnx
from edgeqdm.emit.render import CPP_FOLDER, RUNTIME_FOLDER, WEB_FOLDER, cpp_sources
from edgeqdm.errors import UnsupportedError, VerifyError
from edgeqdm.ir.model import LayerKind, ModelInfo
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, TABLE, Precision
from edgeqdm.ir.profile import BoundaryKind

GRAPH = "model.onnx"
INTEGER_KERNELS = ("QLinearConv", "MatMulIntegerToFloat", "MatMulInteger", "MatMulNBits")
WEB_FILES = (
    "README.md",
    "index.html",
    "page.js",
    "philox.js",
    "playback.js",
    "runtime.js",
    "solver.js",
    "worker.js",
)
"""The page that samples in a browser, with onnxruntime-web beside it."""
FLOAT_KERNELS = (
    "Conv",
    "FusedConv",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "Einsum",
    "MultiHeadAttention",
)


ANY_LAYER = tuple(Precision(f"w{bits}{rest}") for rest in ("a8", "") for bits in (8, 6, 4))
LINEAR_ONLY = tuple(
    Precision(text)
    for bits in (8, 4)
    for text in (
        f"w{bits}a8dyn",
        *(f"w{bits}g{size}{rest}" for size in BLOCK_SIZES for rest in ("a8dyn", "")),
    )
)


class OnnxRuntimeBackend:
    """ONNX Runtime's CPU execution provider, x86 and Arm."""

    name = "onnxruntime"

    def menu(self) -> Menu:
        return {
            LayerKind.CONV2D: (*ANY_LAYER, FP32, TABLE),
            LayerKind.LINEAR: (*ANY_LAYER, *LINEAR_ONLY, FP32, TABLE),
        }

    def check(self, plan: DeploymentPlan, info: ModelInfo) -> tuple[Unsupported, ...]:
        kinds = {layer.name: layer.kind for layer in info.layers}
        menu = self.menu()
        found = []
        for phase in plan.phases:
            for assignment in phase.layers:
                kind = kinds.get(assignment.layer)
                if kind is None:
                    found.append(Unsupported(assignment.layer, "no such layer", "remove it"))
                elif assignment.precision not in menu[kind]:
                    reason = f"{kind} has no {assignment.precision} kernel"
                    instead = _nearest(assignment.precision, menu[kind])
                    found.append(Unsupported(assignment.layer, reason, instead))
        return tuple(found)

    def emit(self, model: Exportable) -> Mapping[str, File]:
        graph = finish(export_onnx(model.network, model.inputs, TRANSLATION))
        check_graph(graph)
        return {
            GRAPH: File(_serialized(fork(graph)), "model"),
            f"{RUNTIME_FOLDER}/run.py": File(_template("run.py"), "runtime"),
            **{f"{WEB_FOLDER}/{k}": File(_template(f"web/{k}"), "runtime") for k in WEB_FILES},
            **_cpp_network(),
        }

    def count_kernels(self, package: Path) -> KernelCount:
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            options = _options(1)
            options.optimized_model_filepath = str(optimized)
            _session(package, options)
            graph = onnx.load(optimized).graph
        integer = count_ops(graph, INTEGER_KERNELS)
        floating = count_ops(graph, FLOAT_KERNELS)
        return KernelCount(
            integer=sum(integer.values()),
            floating=sum(floating.values()),
            by_name={k: n for k, n in {**integer, **floating}.items() if n},
        )

    def open(self, package: Path, *, threads: int = 1) -> Evaluate:
        session = _session(package, _options(threads))
        names = [i.name for i in session.get_inputs()]

        def evaluate(x: Array, step: int, conditioning: NDArray[Any] | None) -> Array:
            values: list[NDArray[Any]] = [x, np.array(step, np.int64)]
            values += [] if conditioning is None else [conditioning]
            found: Array = session.run(None, dict(zip(names, values, strict=True)))[0]
            return found

        return evaluate

    def weight_bytes(
        self,
        kind: LayerKind,
        weight_shape: tuple[int, ...],
        precision: Precision,
    ) -> tuple[int, int]:
        return weight_bytes(kind, weight_shape, precision)

    def bench_tool(self) -> Mapping[str, File]:
        return {"bench.py": File(_template("bench.py"), "tool")}

    def emit_boundary(self, kind: BoundaryKind, shape: tuple[int, ...]) -> Mapping[str, File]:
        return {GRAPH: File(_serialized(boundary_graph(kind, shape)), "model")}

    def versions(self) -> Mapping[str, str]:
        return {"onnx": onnx.__version__, "onnxruntime": ort.__version__}


def _template(name: str) -> bytes:
    return files("edgeqdm.backends.onnxruntime").joinpath(f"templates/{name}").read_bytes()


def _cpp_network() -> dict[str, File]:
    sources = cpp_sources(files("edgeqdm.backends.onnxruntime").joinpath("templates/cpp"))
    return {f"{CPP_FOLDER}/{name}": File(text.encode(), "runtime") for name, text in sources}


def _serialized(graph: onnx.ModelProto) -> bytes:
    try:
        data: bytes = graph.SerializeToString(deterministic=True)
    except EncodeError as problem:
        raise UnsupportedError(
            "EQ-4433",
            "the graph exceeds 2 GiB, which is all one ONNX file can hold",
            path=GRAPH,
            hint="give more layers 8-bit or 4-bit weights, see `edgeqdm plan`",
        ) from problem
    return data


def _nearest(precision: Precision, offered: tuple[Precision, ...]) -> Precision:
    """The offered precision that differs least: in weights, then activations, then groups."""

    def distance(other: Precision) -> tuple[int, int, int, int]:
        return (
            abs(other.weight_bits - precision.weight_bits),
            abs(other.activation_bits - precision.activation_bits),
            abs(other.group_size - precision.group_size),
            other.dynamic != precision.dynamic,
        )

    return min((other for other in offered if other != TABLE), key=distance)


def _options(threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _session(package: Path, options: Any) -> Any:
    path = package / GRAPH
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # ONNX Runtime raises its own classes, RuntimeError and UnicodeDecodeError for bad graphs.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise VerifyError(
            "EQ-8301", f"ONNX Runtime refuses the graph: {reason}", path=path
        ) from error
