"""One table: ONNX Runtime's own quantizers and ours on the same float graph.

    python tools/benchmarks/peers.py --model unet-fmnist --model dit-fmnist -o build/peers.json

Every row is measured in one process. CPU time is that of one thread for one step of one image,
guidance included, the variants interleaved in changing order. Image error is that of free runs
from equal noise against the float model in torch. All quantizers see the same trajectories of the
float model. A quantizer that fails keeps its row, with the text of its error.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime as ort
import reports
import typer
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from rich.console import Console
from rich.table import Table

from edgeqdm import load, pipeline
from edgeqdm.backends import load_backend
from edgeqdm.bench.compare import (
    Variant,
    compare,
    conditioning_for,
    float_predictor,
    folder_bytes,
    player_of,
)
from edgeqdm.bench.quality import check_fid, sqnr_db
from edgeqdm.calibrate.trajectories import Trajectories
from edgeqdm.emit import playback
from edgeqdm.emit.package import emit_package
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import ActivationPolicy
from edgeqdm.ir.report import BenchReport
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer

MATRIX_OPS = ["Conv", "MatMul", "Gemm"]
CALIBRATION_RUNS = 32
SEEDS = (1000, 1001, 1002)
QUANTIZER_NODES = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat")
DYNAMIC_NODES = ("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulNBits")


class TrajectoryReader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds a quantizer the float model's own trajectories, every step of every run."""

    def __init__(self, trajectories: Trajectories, names: list[str]) -> None:
        self._feeds = self._all_feeds(trajectories, names)

    @staticmethod
    def _all_feeds(trajectories: Trajectories, names: list[str]) -> Iterator[dict[str, Any]]:
        for step in range(trajectories.n_steps):
            for start in range(0, min(trajectories.n_runs, CALIBRATION_RUNS), 8):
                runs = slice(start, start + 8)
                values = [trajectories.inputs[step, runs].numpy(), np.array(step, np.int64)]
                if trajectories.conditioning is not None:
                    values.append(trajectories.conditioning[runs].numpy())
                yield dict(zip(names, values, strict=True))

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def our_plans(denoiser: Denoiser, target: str) -> dict[str, DeploymentPlan]:
    """Our own rows: what `edgeqdm emit` does by default, and the same with one scale per layer."""
    static = ActivationPolicy.STATIC
    return {
        "edgeqdm, constant scales": pipeline.rule_plan(denoiser, target, activation=static),
        "edgeqdm, scales per step": pipeline.rule_plan(denoiser, target),
    }


def left_in_float(graph: onnx.ModelProto, denoiser: Denoiser) -> list[str]:
    """Nodes of the first, the last and the embedding layers, found by their weights' values."""
    weights = set()
    for layer in denoiser.info.layers:
        if layer.role != "body":
            weight = get_layer(denoiser.module, layer.name).get_parameter("weight").detach().numpy()
            weights |= {weight.tobytes(), np.ascontiguousarray(weight.T).tobytes()}
    tensors = {t.name: numpy_helper.to_array(t).tobytes() for t in graph.graph.initializer}
    return [
        node.name
        for node in graph.graph.node
        if node.op_type in MATRIX_OPS and any(tensors.get(name) in weights for name in node.input)
    ]


def peers(
    denoiser: Denoiser, trajectories: Trajectories, float_graph: Path, folder: Path
) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Names of the peer rows and what makes their graph."""
    graph = onnx.load(float_graph)
    names = [i.name for i in graph.graph.input]
    static = {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "calibrate_method": CalibrationMethod.MinMax,
    }

    def make_static(name: str, **options: Any) -> Path:
        out = folder / f"{name}.onnx"
        reader = TrajectoryReader(trajectories, names)
        quantize_static(str(float_graph), str(out), reader, **static, **options)
        return out

    def make_dynamic() -> Path:
        out = folder / "dynamic.onnx"
        quantize_dynamic(str(float_graph), str(out), per_channel=True, weight_type=QuantType.QUInt8)
        return out

    excluded = left_in_float(graph, denoiser)
    # All ops per channel fails on more graphs than per tensor; both can end in a refused graph.
    yield "static QDQ, all ops, per tensor", lambda: make_static("all", per_channel=False)
    matrix = {"per_channel": True, "op_types_to_quantize": MATRIX_OPS}
    yield "static QDQ, Conv/MatMul/Gemm", lambda: make_static("matrix", **matrix)
    yield (
        "the same, first/last/embedding float",
        lambda: make_static("body", nodes_to_exclude=excluded, **matrix),
    )
    yield "dynamic", make_dynamic


def as_package(graph: Path, folder: Path) -> Path:
    """A folder that the backend can open: the graph under the name it looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    graph.replace(folder / "model.onnx")
    return folder


def count_integer(folder: Path) -> tuple[int, int]:
    """Integer and float matrix kernels in the optimised graph of any quantizer."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]
    (folder / "optimized.onnx").unlink()
    integer = sum(op in (*QUANTIZER_NODES, *DYNAMIC_NODES) for op in nodes)
    matrix = sum(op in ("Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul") for op in nodes)
    return integer, matrix


def output_sqnr(denoiser: Denoiser, variant: Variant, runs: int = 16) -> list[float]:
    """SQNR of the network output at every step, fed the float model's own samples, in dB."""
    fed = conditioning_for(denoiser, runs, SEEDS[0])
    shape = denoiser.info.sample_shape
    reference = float_predictor(denoiser)
    found = []

    def evaluate(x: Any, step: int, conditioning: Any) -> Any:
        f = reference(x, step, conditioning)
        found.append(sqnr_db(f, variant.evaluate(x, step, conditioning)))
        return f

    player = replace(variant.player, table=variant.player.table, sample_shape=shape)
    playback.sample(player, evaluate, fed, seed=SEEDS[0], images=range(runs))
    return found


def measure(
    denoiser: Denoiser, *, samples: int, images: int, fid: int, rounds: int, work: Path
) -> dict[str, Any]:
    """All rows of one model."""
    backend, title = load_backend("onnxruntime"), denoiser.info.name
    check_fid(fid, player_of(denoiser))
    calibration = pipeline.calibrate(denoiser, samples=samples, work=work)
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        variants: list[Variant] = []
        for name, plan in our_plans(denoiser, backend.name).items():
            quantized = pipeline.quantize(denoiser, calibration, plan=plan).quantized
            correction = pipeline.correct(quantized, calibration.trajectories, work=work)
            package = folder / name
            emit_package(quantized, backend, package, correction=correction)
            variants.append(
                Variant(
                    name,
                    backend.open(package),
                    playback.open_player(package),
                    backend.count_kernels(package),
                    plan.n_integer_layers,
                    folder_bytes(package),
                )
            )
        base = pipeline.float_variant(denoiser, backend, folder / "float", variants[0].player)
        variants.insert(0, base)
        for name, make in peers(
            denoiser, calibration.trajectories, folder / "float" / "model.onnx", folder
        ):
            try:
                package = as_package(make(), folder / name.replace("/", "-"))
                integer, matrix = count_integer(package)
                kernels = replace(base.kernels, integer=integer, floating=matrix)
                size = (package / "model.onnx").stat().st_size
                variant = Variant(name, backend.open(package), base.player, kernels, integer, size)
                variant.evaluate(*_probe(denoiser))
                variants.append(variant)
            # A peer's failure, of whatever kind, is a result.
            except Exception as error:
                errors[name] = str(error).splitlines()[0][:200] if str(error) else repr(error)
        report = compare(
            denoiser,
            tuple(variants),
            libraries=backend.versions(),
            rounds=rounds,
            images=images,
            seeds=SEEDS,
            fid_images=fid,
            progress=lambda done, total: print(f"{title}: {done}/{total}", file=sys.stderr),
        )
        outputs = {v.name: output_sqnr(denoiser, v) for v in variants}
    return {"report": report, "errors": errors, "output_sqnr_db": outputs}


def _probe(denoiser: Denoiser) -> tuple[Any, int, Any]:
    x = np.zeros((1, *denoiser.info.sample_shape), np.float32)
    return x, 0, conditioning_for(denoiser, 1, 0)


def show(report: BenchReport, errors: dict[str, str], outputs: dict[str, list[float]]) -> None:
    """Print the table."""
    table = Table(title=f"{report.model}: {report.sampler}, {report.n_steps} steps")
    for column in ("", "CPU time", "output SQNR", "image SQNR", "FID", "KiB", "int", "float"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in report.rows:
        sqnr = outputs[row.name]
        table.add_row(
            row.name,
            f"{row.cpu_ratio:.2f}",
            f"{min(sqnr):.1f}..{max(sqnr):.1f}",
            f"{row.image_sqnr_db:.1f}",
            "-" if row.feature_fid is None else f"{row.feature_fid:.2f}",
            f"{row.bytes_on_disk / 1024:.0f}",
            str(row.integer_kernels),
            str(row.float_kernels),
        )
    console = Console(width=140)
    console.print(table)
    for name, error in errors.items():
        console.print(f"{name}: failed: {error}", markup=False)


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="JSON to write")],
    model: Annotated[list[str], typer.Option(help="shipped model, repeatable")] = [  # noqa: B006
        "unet-fmnist",
        "dit-fmnist",
    ],
    images: Annotated[int, typer.Option(help="images per seed of the free runs")] = 64,
    fid: Annotated[int, typer.Option(help="images for feature-FID, 0 for none")] = 1000,
    rounds: Annotated[int, typer.Option(help="timed steps per variant")] = 300,
    work: Annotated[Path, typer.Option(help="calibration is kept here")] = Path("build/peers"),
) -> None:
    """Measure and print all rows of every model, and write them as JSON."""
    result: dict[str, Any] = {
        **reports.head("peers.py"),
        "models": {},
    }
    # The quantizers advise a pre-processing that changes nothing on these graphs, once per node.
    logging.getLogger().setLevel(logging.ERROR)
    for name in model:
        denoiser = load(f"reference:{name}")
        found = measure(
            denoiser,
            samples=pipeline.DEFAULT_SAMPLES,
            images=images,
            fid=fid,
            rounds=rounds,
            work=work / name,
        )
        show(found["report"], found["errors"], found["output_sqnr_db"])
        result["models"][name] = {**found, "report": found["report"].model_dump(mode="json")}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
