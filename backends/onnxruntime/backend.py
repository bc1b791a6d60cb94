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

from edgeqdm.backends.onnxruntime import npu
from edgeqdm.backends.onnxruntime.blockwise import BLOCK_SIZES
from edgeqdm.backends.onnxruntime.boundaries import boundary_graph
from edgeqdm.backends.onnxruntime.forms import (
    FORMS,
    GRAPH,
    NPU,
    ORT,
    ORT_GRAPH,
    SMALL,
    STEP_GRAPH,
    graph_files,
)
from edgeqdm.backends.onnxruntime.half import round_to_half, store_in_16_bits
from edgeqdm.backends.onnxruntime.lint import check_graph
from edgeqdm.backends.onnxruntime.lowering import TRANSLATION, finish
from edgeqdm.backends.onnxruntime.npu_lint import check_npu_graph
from edgeqdm.backends.onnxruntime.ort_format import OPERATORS, require_converter, to_ort
from edgeqdm.backends.onnxruntime.phases import count_ops, count_ops_by_step, fork
from edgeqdm.backends.onnxruntime.storage import weight_bytes
from edgeqdm.emit.backend import (
    STANDARD,
    Array,
    Backend,
    Evaluate,
    Exportable,
    File,
    KernelCount,
    Menu,
    Network,
    Unsupported,
)
from edgeqdm.emit.export import export_onnx
from edgeqdm.emit.render import CPP_FOLDER, RUNTIME_FOLDER, WEB_FOLDER, cpp_sources
from edgeqdm.errors import UnsupportedError, VerifyError
from edgeqdm.ir.model import LayerKind, ModelInfo
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, TABLE, Precision
from edgeqdm.ir.profile import BoundaryKind

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
    forms: tuple[str, ...] = FORMS

    def __init__(self, form: str = STANDARD) -> None:
        self.form = form

    def in_form(self, form: str) -> Backend:
        return OnnxRuntimeBackend(form)

    def menu(self) -> Menu:
        if self.form == NPU:
            return dict.fromkeys(LayerKind, (*ANY_LAYER, FP32, TABLE))
        return {
            LayerKind.CONV2D: (*ANY_LAYER, FP32, TABLE),
            LayerKind.LINEAR: (*ANY_LAYER, *LINEAR_ONLY, FP32, TABLE),
        }

    def check(self, plan: DeploymentPlan, info: ModelInfo) -> tuple[Unsupported, ...]:
        if self.form == ORT:
            require_converter()
        if self.form == NPU and (unfit := npu.unfit(plan)):
            return unfit
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

    def rounded(self, network: Network) -> Network:
        return round_to_half(network) if self.form == SMALL else network

    def emit(self, model: Exportable) -> Mapping[str, File]:
        graphs = _npu_graphs(model) if self.form == NPU else self._one_graph(model)
        files = {path: File(data, "model") for path, data in graphs.items()}
        files[f"{RUNTIME_FOLDER}/run.py"] = File(_template("run.py"), "runtime")
        if self.form != NPU:
            # A browser has none of the providers that this form is for.
            page = {f"{WEB_FOLDER}/{k}": _template(f"web/{k}") for k in WEB_FILES}
            files |= {path: File(data, "runtime") for path, data in page.items()}
        return files | _cpp_network()

    def _one_graph(self, model: Exportable) -> dict[str, bytes]:
        graph = finish(export_onnx(model.network, model.inputs, TRANSLATION))
        if self.form == SMALL:
            store_in_16_bits(graph.graph)
        check_graph(graph)
        data = _serialized(fork(graph))
        if self.form != ORT:
            return {GRAPH: data}
        converted, operators = to_ort(data)
        return {ORT_GRAPH: converted, OPERATORS: operators}

    def count_kernels(self, package: Path) -> KernelCount:
        files = graph_files(package, self.form)
        if self.form == NPU:
            return _count_units(files)
        (path,) = files.values()
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            options = _options(1)
            options.optimized_model_filepath = str(optimized)
            _session(path, options)
            graph = onnx.load(optimized).graph
        integer = count_ops(graph, INTEGER_KERNELS)
        floating = count_ops(graph, FLOAT_KERNELS)
        by_step = count_ops_by_step(graph, INTEGER_KERNELS)
        return KernelCount(
            integer=sum(integer.values()),
            floating=sum(floating.values()),
            by_name={k: n for k, n in {**integer, **floating}.items() if n},
            integer_from={start: sum(found.values()) for start, found in by_step.items()},
        )

    def open(self, package: Path, *, threads: int = 1) -> Evaluate:
        files = graph_files(package, self.form)
        sessions = {start: _session(path, _options(threads)) for start, path in files.items()}
        names = [i.name for i in sessions[0].get_inputs()]

        def evaluate(x: Array, step: int, conditioning: NDArray[Any] | None) -> Array:
            session = sessions[max(start for start in sessions if start <= step)]
            values: list[NDArray[Any]] = [x, np.array(step, np.int64)]
            values += [] if conditioning is None else [conditioning]
            found: Array = session.run(None, dict(zip(names, values, strict=True)))[0]
            return found

        return evaluate

    def weight_bytes(self, weight_shape: tuple[int, ...], precision: Precision) -> tuple[int, int]:
        return weight_bytes(weight_shape, precision)

    def bench_tool(self) -> Mapping[str, File]:
        return {"bench.py": File(_template("bench.py"), "tool")}

    def emit_boundary(self, kind: BoundaryKind, shape: tuple[int, ...]) -> Mapping[str, File]:
        return {GRAPH: File(_serialized(boundary_graph(kind, shape)), "model")}

    def versions(self) -> Mapping[str, str]:
        return {"onnx": onnx.__version__, "onnxruntime": ort.__version__}


def _npu_graphs(model: Exportable) -> dict[str, bytes]:
    graphs = npu.graphs(export_onnx(model.network, model.inputs, npu.TRANSLATION))
    for graph in graphs.values():
        check_npu_graph(graph)
    return {STEP_GRAPH.format(k): _serialized(graph) for k, graph in graphs.items()}


def _count_units(files: Mapping[int, Path]) -> KernelCount:
    """How many of them a provider takes is its own decision."""
    counts = {}
    for start, path in files.items():
        # So that a damaged graph is told of as elsewhere.
        _session(path, _options(1))
        counts[start] = npu.count_units(onnx.load(path).graph)
    integer, floating = max(counts.values(), key=lambda found: sum(found[0].values()))
    by_name = {f"{name} between Q/DQ": n for name, n in integer.items()} | dict(floating)
    return KernelCount(
        integer=sum(integer.values()),
        floating=sum(floating.values()),
        by_name={name: n for name, n in by_name.items() if n},
        integer_from={start: sum(found[0].values()) for start, found in counts.items()},
    )


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


def _session(path: Path, options: Any) -> Any:
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # ONNX Runtime raises its own classes, RuntimeError and UnicodeDecodeError for bad graphs.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise VerifyError(
            "EQ-8301", f"ONNX Runtime refuses the graph: {reason}", path=path
        ) from error
