"""What one device needs for one operation, and how that was found out."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Hashable, Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from edgeqdm.ir.codec import dump_record
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import FP32, Precision
from edgeqdm.ir.record import Record

UNSEALED_PROFILE = "0" * 64
Microseconds = Annotated[float, Field(gt=0, le=1e9)]
"""Above 0 and at most 1,000 seconds: what is larger was not given in microseconds."""
Text = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\x20-\x7e]+$")]


def _with_zone(text: str) -> str:
    try:
        zone = datetime.fromisoformat(text).tzinfo
    except ValueError:
        zone = None
    if zone is None:
        raise ValueError(
            f"{text[:40]!r} is no time with a zone; write it as 2026-11-01T12:00:00Z is written"
        )
    return text


Time = Annotated[Text, AfterValidator(_with_zone)]
"""ISO 8601, with a zone: without one nobody could say how old it is."""
LayerName = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]*$")]
Provenance = Literal["measured", "estimated"]


class Flag(StrEnum):
    """What speaks against a figure."""

    THROTTLED = "throttled"
    """The device grew slower while it was measured."""
    NOISY = "noisy"
    """Runs differ much: coefficient of variation above 5 %, or MAD above 3 % of the median."""
    CI_NOT_REACHED = "ci_not_reached"
    """The confidence interval of the median was still too wide when time was up."""
    UNSTABLE = "unstable"
    """Medians of the rounds differ by more than 5 %."""
    EMULATOR = "emulator"
    LOW_BATTERY = "low_battery"
    ACCELERATOR_FALLBACK = "accelerator_fallback"


REFUSED_FLAGS = frozenset(
    {Flag.THROTTLED, Flag.EMULATOR, Flag.LOW_BATTERY, Flag.ACCELERATOR_FALLBACK}
)
"""Flags of figures that nothing may be decided on unless the user accepts them by name."""


class OpKey(Record):
    """One operation as a device sees it: layers with equal keys cost the same."""

    kind: LayerKind
    input_shape: tuple[int, ...]
    """[B, C, H, W] of a convolution, [B, ..., C_in] of a linear layer."""
    weight_shape: tuple[int, ...]
    bias: bool
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = Field(default=1, ge=1)

    def __str__(self) -> str:
        parts = [f"{self.kind} {_sizes(self.input_shape)} * {_sizes(self.weight_shape)}"]
        parts += [f"s{_alike(self.stride)}"] if self.stride else []
        parts += [f"p{_alike(self.padding)}"] if any(self.padding) else []
        parts += [f"d{_alike(self.dilation)}"] if set(self.dilation) - {1} else []
        parts += [f"g{self.groups}"] if self.groups > 1 else []
        parts += [] if self.bias else ["no bias"]
        return " ".join(parts)


def _sizes(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))


def _alike(values: tuple[int, ...]) -> str:
    """Values of both axes, or the one that both have."""
    return str(values[0]) if len(set(values)) == 1 else _sizes(values)


class Timing(Record):
    """Distribution of the time of one evaluation, in microseconds."""

    median_us: Microseconds
    p10_us: Microseconds
    p90_us: Microseconds
    ci95_us: tuple[Microseconds, Microseconds]
    """95 % confidence interval of the median, from order statistics."""
    n: int = Field(ge=1)
    flags: tuple[Flag, ...] = ()

    @model_validator(mode="after")
    def _in_order(self) -> Timing:
        low, high = self.ci95_us
        if not self.p10_us <= self.median_us <= self.p90_us:
            raise ValueError(
                f"p10_us, median_us and p90_us must ascend, found "
                f"{self.p10_us:g}, {self.median_us:g}, {self.p90_us:g}"
            )
        if not low <= self.median_us <= high:
            raise ValueError(
                f"median_us {self.median_us:g} lies outside ci95_us {low:g} to {high:g}"
            )
        return self


class LatencyEntry(Record):
    """One operation at one precision."""

    key: OpKey
    precision: Precision
    provenance: Provenance
    timing: Timing


class BoundaryKind(StrEnum):
    """What may stand between two layers."""

    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"
    LAYOUT = "layout"


class BoundaryCost(Record):
    """One conversion of a tensor between two layers."""

    kind: BoundaryKind
    shape: tuple[int, ...]
    provenance: Provenance
    timing: Timing


class WholeGraph(Record):
    """A whole network at given precisions: what the sum of its entries is fitted to."""

    model: str
    """Fingerprint."""
    batch: int = Field(ge=1)
    """Samples of one evaluation, 2 where guidance is on."""
    precisions: dict[LayerName, Precision]
    """By layer; layers that are absent are in fp32."""
    model_bytes: int = Field(ge=0)
    """Of its files."""
    provenance: Provenance
    timing: Timing

    def identity(self) -> Hashable:
        """What it has been measured of: two with the same identity are one network."""
        return self.model, self.batch, beyond_fp32(self.precisions)


class PhaseCost(Record):
    """A network alone, and as the running phase of a graph that holds another one too."""

    model: str
    """Fingerprint."""
    batch: int = Field(ge=1)
    """Samples of one evaluation, 2 where guidance is on."""
    precisions: dict[LayerName, Precision]
    """Of the phase that ran, by layer; layers that are absent are in fp32."""
    other: dict[LayerName, Precision]
    """Of the phase that did not."""
    provenance: Provenance
    alone: Timing
    among: Timing

    def identity(self) -> Hashable:
        """What it has been measured of."""
        return self.model, self.batch, beyond_fp32(self.precisions), beyond_fp32(self.other)


def beyond_fp32(precisions: Mapping[str, Precision]) -> frozenset[tuple[str, Precision]]:
    """Layers and precisions, less those in fp32, which may as well be absent."""
    return frozenset(each for each in precisions.items() if each[1] != FP32)


class Device(Record):
    """Where it was measured."""

    name: Text
    machine: Text
    """Architecture, e.g. `x86_64`."""
    system: Text
    features: tuple[Text, ...] = ()
    """Of the instruction set, those that decide over kernels, e.g. `avx512_vnni`."""


class Runtime(Record):
    """What executed the graphs."""

    name: Text
    version: Text


class Environment(Record):
    """What the tool that measured could see of the device, beside the times."""

    tool: Text
    cpus: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """It ran on, ascending."""
    max_khz: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Highest frequencies of these CPUs, each once; none where the system does not tell."""
    governors: tuple[Text, ...] = ()
    """Of their frequency, each once, when the measurement began."""


class Protocol(Record):
    """How it was measured."""

    clock: Literal["thread_cpu", "wall"]
    """CPU time of the calling thread, or elapsed time where there are several threads."""
    rounds: int = Field(ge=1)
    """Passes over all graphs, each in another order."""
    min_runs: int = Field(ge=1)
    ci_target: float = Field(gt=0, lt=1)
    """Half-width of the confidence interval at which an entry is finished, relative."""
    max_seconds: float = Field(gt=0)
    """Time after which it is given up for an entry."""
    reference_us: tuple[Microseconds, ...]
    """A fixed product of matrices before, between and after the rounds."""


class LatencyProfile(Record):
    """Latencies of one device, runtime, number of threads and power mode."""

    schema_version: int = 1
    edgeqdm_version: str
    created: Time
    target: str
    device: Device
    runtime: Runtime
    threads: int = Field(ge=1)
    power_mode: Text
    """As the user named it; `unknown` where nobody did."""
    protocol: Protocol
    flags: tuple[Flag, ...] = ()
    """Of the device as a whole."""
    overhead: Timing
    """An evaluation of a graph that computes nothing."""
    entries: tuple[LatencyEntry, ...]
    boundaries: tuple[BoundaryCost, ...] = ()
    wholes: tuple[WholeGraph, ...] = ()
    phase_costs: tuple[PhaseCost, ...] = Field(default=(), exclude_if=operator.not_)
    environment: Environment | None = Field(default=None, exclude_if=operator.not_)
    """None where the tool did not tell, as bench.py."""
    payload_sha256: str = UNSEALED_PROFILE
    """SHA-256 of the canonical JSON with this field zeroed."""

    @model_validator(mode="after")
    def _nothing_twice(self) -> LatencyProfile:
        named: list[tuple[Hashable, str]] = [
            *(((e.key, e.precision), f"{e.key} at {e.precision}") for e in self.entries),
            *(((b.kind, b.shape), f"{b.kind} of {_sizes(b.shape)}") for b in self.boundaries),
            *((w.identity(), f"wholes[{k}]") for k, w in enumerate(self.wholes)),
            *((p.identity(), f"phase_costs[{k}]") for k, p in enumerate(self.phase_costs)),
        ]
        twice = _named_twice(named)
        if twice is not None:
            raise ValueError(f"{twice} has more than one entry")
        return self


def _named_twice(named: Iterable[tuple[Hashable, str]]) -> str | None:
    """Name of the first thing that was there before; what it is decides, not what it is called."""
    seen: set[Hashable] = set()
    for identity, name in named:
        if identity in seen:
            return name
        seen.add(identity)
    return None


def sealed_profile(profile: LatencyProfile) -> LatencyProfile:
    """The profile with its own hash."""
    blank = profile.model_copy(update={"payload_sha256": UNSEALED_PROFILE})
    found = hashlib.sha256(dump_record(blank)).hexdigest()
    return profile.model_copy(update={"payload_sha256": found})


def is_sealed(profile: LatencyProfile) -> bool:
    """Whether the profile is as it was written."""
    return sealed_profile(profile).payload_sha256 == profile.payload_sha256


class KitInput(Record):
    """One input of a graph, to be filled with standard normal values, or zeros for integers."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...]


class KitGraph(Record):
    """One graph of a kit, and what its time stands for."""

    name: Annotated[str, Field(pattern=r"^[0-9]{4}$")]
    """Folder below `graphs/`."""
    role: Literal["reference", "overhead", "entry", "boundary", "whole", "phase"]
    files: dict[str, str]
    """SHA-256 by path below the folder."""
    model_bytes: int = Field(default=0, ge=0)
    inputs: tuple[KitInput, ...]
    key: OpKey | None = None
    precision: Precision | None = None
    boundary: BoundaryKind | None = None
    shape: tuple[int, ...] = ()
    precisions: dict[LayerName, Precision] = Field(default_factory=dict)
    other: dict[LayerName, Precision] | None = None
    """Of the second phase of a `phase` graph; None is the same network alone."""

    def identity(self) -> Hashable:
        """What it stands for: a profile has one figure for it."""
        by_role: dict[str, Hashable] = {
            "entry": (self.key, self.precision),
            "boundary": (self.boundary, self.shape),
            "whole": beyond_fp32(self.precisions),
            "phase": (
                beyond_fp32(self.precisions),
                None if self.other is None else beyond_fp32(self.other),
            ),
        }
        return self.role, by_role.get(self.role)


class KitManifest(Record):
    """Everything a device has to time, `kit.json`."""

    schema_version: int = 1
    edgeqdm_version: str
    target: str
    model: str
    """Fingerprint."""
    model_name: str
    batch: int = Field(ge=1)
    graphs: tuple[KitGraph, ...]

    @field_validator("graphs")
    @classmethod
    def _complete(cls, graphs: tuple[KitGraph, ...]) -> tuple[KitGraph, ...]:
        for role in ("reference", "overhead"):
            if not any(graph.role == role for graph in graphs):
                raise ValueError(f"there is no {role} graph; make the kit again")
        by_name = _named_twice((graph.name, graph.name) for graph in graphs)
        twice = by_name or _named_twice((graph.identity(), graph.name) for graph in graphs)
        if twice is not None:
            raise ValueError(f"graph {twice} is there twice; make the kit again")
        alone = {beyond_fp32(g.precisions) for g in graphs if g.role == "phase" and g.other is None}
        for graph in graphs:
            if graph.other is not None and beyond_fp32(graph.precisions) not in alone:
                raise ValueError(f"there is no graph of {graph.name} alone; make the kit again")
        return graphs


class KitHeader(Record):
    """First line of a kit's results."""

    schema_version: int = 1
    kit_sha256: str
    created: Time
    device: Device
    runtime: Runtime
    threads: int = Field(ge=1)
    power_mode: Text
    clock: Literal["thread_cpu", "wall"]
    ci_target: float = Field(gt=0, lt=1)
    seconds: float = Field(gt=0)
    max_seconds: float = Field(gt=0)
    flags: tuple[Flag, ...] = ()
    environment: Environment | None = None


class KitSamples(Record):
    """Every other line of a kit's results: one graph in one round."""

    graph: str
    round: int = Field(ge=0)
    us: tuple[Microseconds, ...] = Field(min_length=1)
