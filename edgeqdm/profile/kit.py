"""A folder of small graphs for a device to time, and a profile made of what comes back."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from edgeqdm import __version__
from edgeqdm.calibrate.observe import LayerObservation
from edgeqdm.emit.backend import Backend, Exportable, File
from edgeqdm.emit.package import exportable
from edgeqdm.emit.writer import staged_folder
from edgeqdm.errors import InputError, UnsupportedError
from edgeqdm.ir.codec import dump_record, parse_record, read_bytes
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, TABLE, Precision
from edgeqdm.ir.profile import (
    BoundaryCost,
    BoundaryKind,
    Flag,
    KitGraph,
    KitHeader,
    KitInput,
    KitManifest,
    KitSamples,
    LatencyEntry,
    LatencyProfile,
    OpKey,
    PhaseCost,
    Protocol,
    Timing,
    WholeGraph,
    beyond_fp32,
    sealed_profile,
)
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.numerics.ranges import StepRanges
from edgeqdm.profile import protocol
from edgeqdm.profile.opkeys import evaluation_batch, layer_of
from edgeqdm.quantize import quantizer
from edgeqdm.quantize.modules import StepClock, coded_layer
from edgeqdm.quantize.parameters import Variant

KIT = "kit.json"
TOOLS = "bench.py or edgeqdm-bench"
"""What writes results; each goes on with its own."""
GO_ON = f"run {TOOLS} again as before: it goes on where it stopped"
Progress = Callable[[int, int], None]
Precisions = Mapping[str, Precision]
"""By layer; layers that are absent stay in fp32."""
REFERENCE_SIZE = 768


class _OneLayer(nn.Module):
    """A layer in the place of a network: (x, step) -> y."""

    def __init__(self, layer: nn.Module, clock: StepClock) -> None:
        super().__init__()
        self.layer = layer
        self._clock = clock

    def forward(self, sample: Tensor, step: Tensor) -> Tensor:
        self._clock.step = step
        found: Tensor = self.layer(sample)
        return found


class _Nothing(nn.Module):
    def forward(self, sample: Tensor, step: Tensor) -> Tensor:
        return sample + 1.0


@dataclass(frozen=True)
class KitRequest:
    """What a kit is to hold.

    Attributes:
        entries: operations and precisions to time alone.
        boundaries: conversions of tensors of these shapes.
        wholes: networks to time as a whole.
        pairs: networks to time alone and in one graph with another.
    """

    entries: Sequence[tuple[OpKey, Precision]]
    boundaries: Sequence[tuple[BoundaryKind, tuple[int, ...]]] = ()
    wholes: Sequence[Precisions] = ()
    pairs: Sequence[tuple[Precisions, Precisions]] = ()

    @property
    def n_graphs(self) -> int:
        """Graphs of a kit for this, with the two that every kit has."""
        alone = {beyond_fp32(first) for first, _ in self.pairs}
        asked = (self.entries, self.boundaries, self.wholes, self.pairs, alone)
        return 2 + sum(map(len, asked))


def make_kit(
    denoiser: Denoiser,
    backend: Backend,
    request: KitRequest,
    out: Path,
    *,
    progress: Progress | None = None,
) -> KitManifest:
    """Write the graphs of a request, as the backend emits them, and the tool that times them.

    Weights are random and scales made up: what a kernel costs does not depend on them.

    Args:
        denoiser: gives the whole networks and their inputs.
        backend: of the target.
        request: what to time.
        out: folder to create.
        progress: told of every graph.

    Raises:
        InputError: if nothing is asked for, or something twice.
        UnsupportedError: a precision does not fit its layer.
        OutputError: the kit cannot be written.
    """
    if not request.entries and not request.wholes and not request.pairs:
        raise InputError("EQ-3501", "there is nothing to time", path="kit")
    _check_once(request)
    for key, precision in request.entries:
        _check_kernel(key, precision, backend)
    graphs: list[KitGraph] = []
    with staged_folder(out) as folder:
        for graph, contents in _graphs(denoiser, backend, request):
            name = f"{len(graphs):04d}"
            _write(folder / "graphs" / name, {path: file.data for path, file in contents.items()})
            hashes = {path: hashlib.sha256(f.data).hexdigest() for path, f in contents.items()}
            size = sum(len(file.data) for file in contents.values())
            told = {"name": name, "files": hashes, "model_bytes": size}
            graphs.append(graph.model_copy(update=told))
            if progress is not None:
                progress(len(graphs), request.n_graphs)
        manifest = KitManifest(
            edgeqdm_version=__version__,
            target=backend.name,
            model=denoiser.info.fingerprint,
            model_name=denoiser.info.name,
            batch=evaluation_batch(denoiser),
            graphs=tuple(graphs),
        )
        tool = {path: file.data for path, file in backend.bench_tool().items()}
        tool["protocol.py"] = files("edgeqdm.profile").joinpath("protocol.py").read_bytes()
        _write(folder, {**tool, KIT: dump_record(manifest)})
    return manifest


def _check_once(request: KitRequest) -> None:
    wholes = [beyond_fp32(precisions) for precisions in request.wholes]
    pairs = [(beyond_fp32(first), beyond_fp32(other)) for first, other in request.pairs]
    for what, asked in (
        ("operation", request.entries),
        ("boundary", request.boundaries),
        ("whole network", wholes),
        ("pair of phases", pairs),
    ):
        if len(set(asked)) < len(asked):
            raise InputError(
                "EQ-3508",
                f"the same {what} is to be timed twice",
                path="kit",
                hint="ask for it once: a profile has one figure for it",
            )


def _check_kernel(key: OpKey, precision: Precision, backend: Backend) -> None:
    offered = backend.menu()[key.kind]
    if precision == TABLE or precision not in offered:
        raise UnsupportedError(
            "EQ-4311",
            f"{key.kind} has no {precision} kernel",
            path=str(key),
            hint=f"choose among {', '.join(p for p in offered if p != TABLE)}",
        )


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    for path, data in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


Lowered = tuple[KitGraph, Mapping[str, File]]


def _graphs(denoiser: Denoiser, backend: Backend, request: KitRequest) -> Iterable[Lowered]:
    size = REFERENCE_SIZE
    product = nn.Linear(size, size, bias=False)
    yield _lowered(
        backend,
        _OneLayer(product.eval(), StepClock()),
        (1, size, size),
        KitGraph(name="0000", role="reference", files={}, inputs=()),
    )
    overhead = KitGraph(name="0000", role="overhead", files={}, inputs=())
    yield _lowered(backend, _Nothing(), (1, 4), overhead)
    for key, precision in request.entries:
        graph = KitGraph(
            name="0000", role="entry", files={}, inputs=(), key=key, precision=precision
        )
        yield _lowered(backend, one_layer(key, precision), key.input_shape, graph)
    for kind, shape in request.boundaries:
        graph = KitGraph(
            name="0000",
            role="boundary",
            files={},
            inputs=_inputs({"sample": torch.zeros(shape)}),
            boundary=kind,
            shape=shape,
        )
        yield graph, backend.emit_boundary(kind, shape)
    for precisions in request.wholes:
        yield _network(denoiser, backend, "whole", precisions)
    firsts = {beyond_fp32(first): first for first, _ in request.pairs}
    for precisions in firsts.values():
        yield _network(denoiser, backend, "phase", precisions)
    for precisions, other in request.pairs:
        yield _network(denoiser, backend, "phase", precisions, other)


def _lowered(
    backend: Backend, network: nn.Module, input_shape: tuple[int, ...], graph: KitGraph
) -> Lowered:
    # A batch of 1 would become a constant of the exported graph.
    example = torch.zeros(max(2, input_shape[0]), *input_shape[1:])
    contents = backend.emit(Exportable(network, {"sample": example, "step": torch.tensor(0)}))
    shapes = {"sample": torch.zeros(input_shape), "step": torch.tensor(0)}
    return graph.model_copy(update={"inputs": _inputs(shapes)}), _models(contents)


def _network(
    denoiser: Denoiser,
    backend: Backend,
    role: Literal["whole", "phase"],
    precisions: Precisions,
    other: Precisions | None = None,
) -> Lowered:
    phases = [precisions] if other is None else [precisions, other]
    plan = plan_of(denoiser, backend.name, phases)
    network = exportable(quantizer.quantize(denoiser, plan, made_up(denoiser), ranges="minmax"))
    batch = evaluation_batch(denoiser)
    inputs = {
        name: x if x.dim() == 0 else x[:1].expand(batch, *x.shape[1:])
        for name, x in network.inputs.items()
    }
    graph = KitGraph(
        name="0000",
        role=role,
        files={},
        # The step is 0: the first phase runs.
        inputs=_inputs(inputs),
        precisions=dict(precisions),
        other=None if other is None else dict(other),
    )
    return graph, _models(backend.emit(network))


def plan_of(denoiser: Denoiser, target: str, phases: Sequence[Precisions]) -> DeploymentPlan:
    """A plan of phases with these precisions, each about as long as the others."""
    n_steps = denoiser.program.n_steps
    bounds = [k * n_steps // len(phases) for k in range(len(phases) + 1)]
    return DeploymentPlan(
        target=target,
        model=denoiser.info.fingerprint,
        n_steps=n_steps,
        phases=tuple(
            Phase(start=start, stop=stop, layers=_assigned(denoiser, precisions))
            for start, stop, precisions in zip(bounds, bounds[1:], phases, strict=False)
        ),
    )


def _assigned(denoiser: Denoiser, precisions: Precisions) -> tuple[LayerAssignment, ...]:
    return tuple(
        LayerAssignment(layer=x.name, precision=precisions.get(x.name, FP32), reason="to be timed")
        for x in denoiser.info.layers
    )


def made_up(denoiser: Denoiser) -> dict[str, LayerObservation]:
    """Ranges of -4 to 4 at every layer and step, for graphs that are only timed."""
    seen = _made_up_ranges(denoiser.program.n_steps)
    return {layer.name: seen for layer in denoiser.info.layers}


def _made_up_ranges(n_steps: int) -> LayerObservation:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(n_steps, 64, generator=generator)
    # No two steps alike: equal rows could be folded to a constant.
    high = 4.0 + torch.arange(n_steps) / (4 * n_steps)
    ranges = StepRanges(samples, -high, high)
    return LayerObservation(ranges, ranges)


def one_layer(key: OpKey, precision: Precision, *, n_steps: int = 4) -> nn.Module:
    """A network of one layer, as a plan that gives it this precision would compute it."""
    layer, clock = layer_of(key), StepClock()
    if precision == FP32:
        return _OneLayer(layer, clock)
    variant = Variant("layer", precision, precision.policies[0])
    seen = _made_up_ranges(n_steps)
    parameters = quantizer.code_layer(
        layer, variant, seen, range(n_steps), n_steps, ranges="minmax"
    )
    bias = None if layer.bias is None else layer.bias.detach()
    return _OneLayer(coded_layer(layer, parameters, precision, bias, clock), clock)


def _models(contents: Mapping[str, File]) -> dict[str, File]:
    return {path: file for path, file in contents.items() if file.role == "model"}


def _inputs(values: Mapping[str, Tensor]) -> tuple[KitInput, ...]:
    return tuple(
        KitInput(
            name=name,
            dtype="float32" if value.is_floating_point() else "int64",
            shape=tuple(value.shape),
        )
        for name, value in values.items()
    )


def read_results(kit: Path, results: Path) -> LatencyProfile:
    """The profile that a device's results make.

    Args:
        kit: folder that `make_kit` wrote, or another copy of it.
        results: what its tool wrote.

    Raises:
        InputError: the results are of another kit, unfinished, damaged or out of any range; names
            the line and the field.
    """
    text = read_bytes(kit / KIT)
    manifest = parse_record(text, KitManifest, name=str(kit / KIT))
    lines = _read_lines(results)
    header = parse_record(lines[0], KitHeader, name=f"{results}, line 1")
    if header.kit_sha256 != hashlib.sha256(text).hexdigest():
        raise InputError(
            "EQ-3502",
            f"results of another kit ({header.kit_sha256[:12]})",
            path=results,
            hint=f"give the kit they were measured with, or measure {kit} again",
        )
    rounds = _read_samples(lines[1:], manifest, results)
    return sealed_profile(_profile(manifest, header, rounds))


def _read_lines(results: Path) -> list[bytes]:
    data = read_bytes(results)
    lines = data.split(b"\n")
    if lines.pop():
        raise InputError(
            "EQ-3503",
            f"line {len(lines) + 1} is cut off, at byte {len(data)}",
            path=results,
            hint=GO_ON,
        )
    if not lines:
        raise InputError("EQ-3503", "empty file", path=results, hint=f"time the kit with {TOOLS}")
    return lines


Rounds = dict[str, list[tuple[float, ...]]]


def _read_samples(lines: Sequence[bytes], manifest: KitManifest, results: Path) -> Rounds:
    known = {graph.name for graph in manifest.graphs}
    seen: dict[tuple[str, int], tuple[float, ...]] = {}
    for number, line in enumerate(lines, start=2):
        entry = parse_record(line, KitSamples, name=f"{results}, line {number}")
        if entry.graph not in known or (entry.graph, entry.round) in seen:
            what = "is there twice" if entry.graph in known else "is not in the kit"
            message = f"line {number}: graph {entry.graph}, round {entry.round}, {what}"
            hint = f"delete the line and run {TOOLS} again"
            raise InputError("EQ-3504", message, path=results, hint=hint)
        seen[entry.graph, entry.round] = entry.us
    rounds: Rounds = defaultdict(list)
    for name, turn in sorted(seen):
        rounds[name].append(seen[name, turn])
    unfinished = [n for n in sorted(known) if len(rounds[n]) < _rounds_needed(manifest, n)]
    if unfinished:
        raise InputError(
            "EQ-3505",
            f"{len(unfinished)} of {len(known)} graphs are not finished, {unfinished[0]} first",
            path=results,
            hint=GO_ON,
        )
    return rounds


def _rounds_needed(manifest: KitManifest, name: str) -> int:
    role = next(graph.role for graph in manifest.graphs if graph.name == name)
    return 2 if role == "reference" else protocol.ROUNDS


def _profile(manifest: KitManifest, header: KitHeader, rounds: Rounds) -> LatencyProfile:
    by_role: dict[str, list[KitGraph]] = defaultdict(list)
    for graph in manifest.graphs:
        by_role[graph.role].append(graph)
    reference = [sorted(each)[len(each) // 2] for each in rounds[by_role["reference"][0].name]]
    drifts = [d for each in rounds.values() if (d := protocol.drift(each)) is not None]

    def timing(graph: KitGraph) -> Timing:
        return timing_of(rounds[graph.name], ci_target=header.ci_target)

    alone = {beyond_fp32(g.precisions): g for g in by_role["phase"] if g.other is None}
    slowed = (Flag.THROTTLED,) if protocol.throttled(drifts, reference) else ()
    return LatencyProfile(
        edgeqdm_version=manifest.edgeqdm_version,
        created=header.created,
        target=manifest.target,
        device=header.device,
        runtime=header.runtime,
        threads=header.threads,
        power_mode=header.power_mode,
        protocol=Protocol(
            clock=header.clock,
            rounds=protocol.ROUNDS,
            min_runs=protocol.MIN_RUNS,
            ci_target=header.ci_target,
            max_seconds=header.max_seconds,
            reference_us=tuple(reference),
        ),
        flags=(*header.flags, *slowed),
        environment=header.environment,
        overhead=timing(by_role["overhead"][0]),
        entries=tuple(
            LatencyEntry(
                key=graph.key,
                precision=graph.precision,
                provenance="measured",
                timing=timing(graph),
            )
            for graph in by_role["entry"]
            if graph.key is not None and graph.precision is not None
        ),
        boundaries=tuple(
            BoundaryCost(
                kind=graph.boundary, shape=graph.shape, provenance="measured", timing=timing(graph)
            )
            for graph in by_role["boundary"]
            if graph.boundary is not None
        ),
        wholes=tuple(
            WholeGraph(
                model=manifest.model,
                batch=manifest.batch,
                precisions=graph.precisions,
                model_bytes=graph.model_bytes,
                provenance="measured",
                timing=timing(graph),
            )
            for graph in by_role["whole"]
        ),
        phase_costs=tuple(
            PhaseCost(
                model=manifest.model,
                batch=manifest.batch,
                precisions=graph.precisions,
                other=graph.other,
                provenance="measured",
                alone=timing(alone[beyond_fp32(graph.precisions)]),
                among=timing(graph),
            )
            for graph in by_role["phase"]
            if graph.other is not None
        ),
    )


def timing_of(rounds: Sequence[Sequence[float]], *, ci_target: float) -> Timing:
    """Distribution of a graph's samples, in microseconds, over all rounds."""
    samples = sorted(value for each in rounds for value in each)
    n = len(samples)
    low, high = protocol.median_interval(samples)
    flags = protocol.flags_of(rounds, ci_target=ci_target)
    return Timing(
        median_us=(samples[(n - 1) // 2] + samples[n // 2]) / 2,
        p10_us=samples[math.floor(0.1 * (n - 1))],
        p90_us=samples[math.ceil(0.9 * (n - 1))],
        ci95_us=(low, high),
        n=n,
        flags=tuple(Flag(flag) for flag in flags),
    )
