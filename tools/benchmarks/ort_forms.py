"""What every cheaper form of the ONNX Runtime graph buys: all of them on, and each one off.

    python tools/benchmarks/ort_forms.py -o docs/benchmarks/ort_forms.json

Whole denoisers in W8A8, timed on one thread beside the float32 graph as torch's exporter writes it:
the two reference models, and two large ones with random weights, of which only the time counts. CPU
time, all variants of a model interleaved in one process, medians. Then single operators at shapes
of these models, form beside form.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import reports
import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from onnx import helper, numpy_helper
from onnx_ir.passes.common import TopologicalSortPass

from edgeqdm import load
from edgeqdm.backends.onnxruntime import lowering
from edgeqdm.backends.onnxruntime.backend import INTEGER_KERNELS
from edgeqdm.backends.onnxruntime.phases import count_ops
from edgeqdm.bench.latency import time_interleaved
from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit.export import export_onnx
from edgeqdm.emit.package import exportable
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import Precision
from edgeqdm.ir.profile import OpKey
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.profile.kit import one_layer
from edgeqdm.profile.opkeys import evaluation_batch
from edgeqdm.quantize.plans import default_plan, float_plan
from edgeqdm.quantize.quantizer import QuantizedDenoiser, quantize
from edgeqdm.stages import rule_plan

TARGET = "onnxruntime"
LARGE: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "unet-large": (
        UNet2DModel,
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * 2),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 256,
        },
    ),
    "dit-b-2": (
        DiTTransformer2DModel,
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 12,
            "num_attention_heads": 12,
            "attention_head_dim": 64,
            "num_embeds_ada_norm": 10,
        },
    ),
}
MODELS = ("unet-fmnist", "dit-fmnist", *LARGE)
STEP = 1
Evaluate = Callable[[], object]


def open_model(name: str) -> Denoiser:
    """A reference model at 20 steps, or a large one with random weights at 4."""
    if name not in LARGE:
        return load(f"reference:{name}", steps=20)
    family, config = LARGE[name]
    torch.manual_seed(0)
    network = family(**config)
    with torch.no_grad():
        for parameter in network.parameters():
            # Trained networks have no layers of zeros, which DiT begins with.
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    part = "unet" if family is UNet2DModel else "transformer"
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(Path(folder) / part)
        DDIMScheduler(clip_sample=False).save_pretrained(Path(folder) / "scheduler")
        index = {
            "_class_name": "DDIMPipeline" if part == "unet" else "DiTPipeline",
            part: ["diffusers", family.__name__],
            "scheduler": ["diffusers", "DDIMScheduler"],
        }
        (Path(folder) / "model_index.json").write_text(json.dumps(index))
        return load(folder, steps=4)


def nothing(_: object) -> None:
    """Stands for a pass that is off."""


def without(*ops: object) -> dict[Any, Any]:
    """The translation less some operators, which the exporter then writes its own way."""
    return {op: form for op, form in lowering.TRANSLATION.items() if op not in ops}


NORM = torch.ops.aten.group_norm.default
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@contextmanager
def off(form: str) -> Iterator[dict[Any, Any]]:
    """The translation with one form off; what is no translation is patched meanwhile."""
    translation = {
        "group norm": without(NORM),
        "attention": without(ATTENTION),
        "float32": without(NORM, ATTENTION),
    }.get(form, lowering.TRANSLATION)
    if form not in ("biases", "float32"):
        yield translation
        return
    with mock.patch.object(lowering, "join_biases", nothing):
        yield translation


def lowered(quantized: QuantizedDenoiser, form: str = "") -> onnx.ModelProto:
    model = exportable(quantized)
    with off(form) as translation:
        return lowering.finish(export_onnx(model.network, model.inputs, translation))


def with_given_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with the scales of one step instead of tables.

    They are inputs that need not be fed: of constants the runtime would fuse other operators.
    """
    found = onnx.ModelProto()
    found.CopyFrom(model)
    tables = {t.name: t for t in found.graph.initializer if len(t.dims) == 1 and t.data_type == 1}
    for node in list(found.graph.node):
        if node.op_type == "Gather" and node.input[0] in tables and "step" in node.input[1]:
            value = numpy_helper.to_array(tables[node.input[0]])[STEP]
            found.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
            found.graph.input.append(helper.make_tensor_value_info(node.output[0], 1, []))
            found.graph.node.remove(node)
    return found


def with_own_quantization(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with a quantization for every layer, of scales that differ in the last digits.

    Equal nodes the runtime would share by itself.
    """
    found = onnx.ModelProto()
    found.CopyFrom(model)
    tensors = {t.name: numpy_helper.to_array(t) for t in found.graph.initializer}
    made = {node.output[0]: node for node in found.graph.node}
    seen = set()
    for k, node in enumerate(found.graph.node):
        if node.op_type not in ("MatMulInteger", "QLinearConv"):
            continue
        codes = node.input[0]
        if codes not in seen:
            seen.add(codes)
            continue
        quantize = made[codes]
        gather = made[quantize.input[1]]
        table = tensors[gather.input[0]] * np.float32(1 + 1e-6 * (k + 1))
        found.graph.initializer.append(numpy_helper.from_array(table, f"own/{k}/table"))
        scale = helper.make_node(
            "Gather", [f"own/{k}/table", *gather.input[1:]], [f"own/{k}/scale"], f"own/{k}/gather"
        )
        again = helper.make_node(
            "QuantizeLinear",
            [quantize.input[0], scale.output[0], quantize.input[2]],
            [f"own/{k}/codes"],
            f"own/{k}/quantize",
        )
        node.input[0] = again.output[0]
        found.graph.node.extend([scale, again])
    sorted_ = onnx_ir.from_proto(found)
    TopologicalSortPass()(sorted_)
    return onnx_ir.to_proto(sorted_)


def without_tables(denoiser: Denoiser) -> DeploymentPlan:
    """The rule's plan, with the layers that depend on the timestep computed."""
    return default_plan(denoiser.info, TARGET, denoiser.program.n_steps)


def graphs_of(denoiser: Denoiser) -> dict[str, onnx.ModelProto]:
    """The float32 graph, ours with all forms on, and ours with each one off."""
    plan = rule_plan(denoiser)
    trajectories = collect_trajectories(denoiser, 2, seed=0)
    seen = observe(denoiser, trajectories, plan.phases[0].integer_layers())

    def coded(plan: DeploymentPlan) -> QuantizedDenoiser:
        return quantize(denoiser, plan, seen, ranges="minmax")

    quantized = coded(plan)
    floats = coded(float_plan(denoiser.info, TARGET, denoiser.program.n_steps))
    found = {"float32": lowered(floats, "float32"), "all on": lowered(quantized)}
    found["float32, our forms"] = lowered(floats)
    for form in ("group norm", "attention", "biases"):
        found[f"{form} off"] = lowered(quantized, form)
    found["time tables off"] = lowered(coded(without_tables(denoiser)))
    found["shared quantization off"] = with_own_quantization(found["all on"])
    found["scale tables off"] = with_given_scales(found["all on"])
    return found


def opened(model: onnx.ModelProto, batch: int) -> Evaluate:
    """One evaluation of a graph on one thread, fed random values."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding, random = session.io_binding(), np.random.default_rng(0)
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else batch for size in value.shape]
        if value.type == "tensor(float)":
            binding.bind_cpu_input(value.name, random.standard_normal(shape, np.float32))
        else:
            given = STEP if value.name == "step" else 0
            binding.bind_cpu_input(value.name, np.full(shape, given, np.int64))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def timed(variants: Mapping[str, onnx.ModelProto], batch: int, rounds: int) -> dict[str, float]:
    """Median CPU time of every graph, in microseconds."""
    calls = {name: opened(model, batch) for name, model in variants.items()}
    found = time_interleaved(calls, rounds=rounds)
    return {name: round(each.p50_us, 1) for name, each in found.items()}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Times of a model's variants, and their ratios."""
    denoiser = open_model(name)
    graphs = graphs_of(denoiser)
    us = timed(graphs, evaluation_batch(denoiser), rounds)
    everything = us["all on"]
    return {
        "batch": evaluation_batch(denoiser),
        "us": us,
        "ratio_to_float32": round(everything / us["float32"], 4),
        "ratio_to_float32_in_our_forms": round(everything / us["float32, our forms"], 4),
        "off_over_on": {k: round(v / everything, 4) for k, v in us.items() if k.endswith(" off")},
        "scale_tables_share": round(1 - us["scale tables off"] / everything, 4),
        "integer_nodes": sum(count_ops(graphs["all on"].graph, INTEGER_KERNELS).values()),
    }


# Single operators.


class Chain:
    """A graph of one input, written node by node."""

    def __init__(self, *shape: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.shape = shape

    def add(self, kind: str, *inputs: Any, domain: str = "", **attributes: Any) -> str:
        names = []
        for each in inputs:
            if isinstance(each, str):
                names.append(each)
            else:
                names.append(f"t{len(self.tensors)}")
                self.tensors.append(numpy_helper.from_array(np.asarray(each), names[-1]))
        output = f"y{len(self.nodes)}"
        made = helper.make_node(kind, names, [output], output, domain=domain, **attributes)
        self.nodes.append(made)
        return output

    def model(self, opset: int = 21) -> onnx.ModelProto:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "chain",
            [value("x", 1, ["batch", *self.shape])],
            [onnx.ValueInfoProto(name=self.nodes[-1].output[0])],
            self.tensors,
        )
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return onnx.shape_inference.infer_shapes(
            helper.make_model(graph, ir_version=10, opset_imports=opsets)
        )


def norm_forms(channels: int, side: int, groups: int) -> dict[str, onnx.ModelProto]:
    """Group normalisation, SiLU and quantization of a map [C, H, W]."""
    random = np.random.default_rng(0)
    scale, shift = random.standard_normal((2, channels)).astype(np.float32)
    found = {}
    for form in ("GroupNormalization", "Mul, Add", "BatchNormalization"):
        chain = Chain(channels, side, side)
        if form == "GroupNormalization":
            y = chain.add(form, "x", scale, shift, num_groups=groups)
        else:
            ones, zeros = (np.full(groups, v, np.float32) for v in (1, 0))
            flat = chain.add("Reshape", "x", np.array([0, groups, -1]))
            unit = chain.add("InstanceNormalization", flat, ones, zeros)
            y = chain.add("Reshape", unit, np.array([0, channels, side, side]))
            ones, zeros = (np.full(channels, v, np.float32) for v in (1, 0))
            if form == "Mul, Add":
                y = chain.add("Mul", y, scale.reshape(-1, 1, 1))
                y = chain.add("Add", y, shift.reshape(-1, 1, 1))
            else:
                y = chain.add(form, y, scale, shift, zeros, ones, epsilon=0.0)
        y = chain.add("Mul", y, chain.add("Sigmoid", y))
        chain.add("QuantizeLinear", y, np.float32(0.02), np.uint8(128))
        found[form] = chain.model()
    return found


def attention_forms(length: int, heads: int, width: int) -> dict[str, onnx.ModelProto]:
    """Attention of x [L, D] over itself, heads turned and turned back."""
    found = {}
    for form in ("MatMul, Softmax, MatMul", "MultiHeadAttention", "Attention (opset 23)"):
        chain = Chain(length, heads * width)
        # Three different tensors, as q, k and v are.
        q, k, v = (chain.add("Mul", "x", np.float32(factor)) for factor in (1.0, 1.1, 1.2))
        opset = 21
        if form == "MultiHeadAttention":
            chain.add(form, q, k, v, num_heads=heads, domain="com.microsoft")
        elif form == "Attention (opset 23)":
            chain.add("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads)
            opset = 23
        else:
            apart = np.array([0, length, heads, width])
            q, k, v = (chain.add("Reshape", each, apart) for each in (q, k, v))
            q, v = (chain.add("Transpose", each, perm=[0, 2, 1, 3]) for each in (q, v))
            k = chain.add("Transpose", k, perm=[0, 2, 3, 1])
            scores = chain.add("MatMul", chain.add("Mul", q, np.float32(width**-0.5)), k)
            y = chain.add("MatMul", chain.add("Softmax", scores, axis=-1), v)
            y = chain.add("Transpose", y, perm=[0, 2, 1, 3])
            chain.add("Reshape", y, np.array([0, length, heads * width]))
        found[form] = chain.model(opset)
    return found


def weight_forms(outputs: int, inputs: int, precision: str) -> dict[str, onnx.ModelProto]:
    """A linear layer of one row with its weight in codes and its activations in float."""
    shape = (1, inputs)
    key = OpKey(
        kind=LayerKind.LINEAR, input_shape=shape, weight_shape=(outputs, inputs), bias=False
    )
    network = one_layer(key, Precision(precision))
    fed = {"sample": torch.zeros(2, inputs), "step": torch.tensor(0)}
    found = {"at load": lowering.finish(export_onnx(network, fed, lowering.TRANSLATION))}
    with mock.patch.object(lowering, "dequantize_at_load", nothing):
        found["at every run"] = lowering.finish(export_onnx(network, fed, lowering.TRANSLATION))
    return found


NORMS = ((128, 32, 32), (256, 16, 32), (256, 8, 32), (512, 4, 32), (32, 16, 8), (64, 8, 8))
ATTENTIONS = ((64, 3, 64), (256, 1, 256), (256, 12, 64), (1024, 1, 128), (1024, 8, 64))
WEIGHTS = ((256, 128, "w8"), (768, 768, "w8"), (768, 768, "w4"), (768, 768, "w4g64"))


def operators(rounds: int) -> dict[str, Any]:
    """Median CPU time of every form of an operator, in microseconds, by shape."""
    found: dict[str, Any] = {}
    for channels, side, groups in NORMS:
        name = f"group norm, SiLU, quantize C{channels} @{side} {groups} groups"
        found[name] = timed(norm_forms(channels, side, groups), 1, rounds)
    for length, heads, width in ATTENTIONS:
        name = f"attention L{length} {heads} heads of {width}"
        found[name] = timed(attention_forms(length, heads, width), 1, rounds)
    for outputs, inputs, precision in WEIGHTS:
        name = f"one row through {inputs} to {outputs}, {precision}"
        found[name] = timed(weight_forms(outputs, inputs, precision), 1, rounds)
    return found


def main(
    out: Annotated[Path, typer.Option("-o", "--out")] = Path("docs/benchmarks/ort_forms.json"),
    model: Annotated[list[str], typer.Option()] = list(MODELS),  # noqa: B006
    rounds: Annotated[int, typer.Option(min=30)] = 60,
) -> None:
    """Emit every variant and time it."""
    torch.set_num_threads(1)
    report = {
        **reports.head("ort_forms.py"),
        "models": {name: measure(name, rounds) for name in model},
        "operators": operators(rounds),
    }
    reports.write(report, out)


if __name__ == "__main__":
    typer.run(main)
