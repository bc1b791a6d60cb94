"""What one device needs for one operation, and how that was found out."""

from __future__ import annotations

import hashlib
from collections import Counter
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgeqdm.ir.codec import dump_record
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import Precision
from edgeqdm.ir.record import Record

UNSEALED_PROFILE = "0" * 64
Microseconds = Annotated[float, Field(gt=0, le=1e9)]
"""Above 0 and at most 1,000 seconds: what is larger was not given in microseconds."""
Text = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\x20-\x7e]+$")]
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
        shape, weight = ("x".join(map(str, s)) for s in (self.input_shape, self.weight_shape))
        window = f" s{self.stride[0]}" if self.stride else ""
        window += f" p{self.padding[0]}" if any(self.padding) else ""
        grouped = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.kind} {shape} * {weight}{window}{grouped}"


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
    created: Text
    """UTC, ISO 8601."""
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
    payload_sha256: str = UNSEALED_PROFILE
    """SHA-256 of the canonical JSON with this field zeroed."""

    @model_validator(mode="after")
    def _nothing_twice(self) -> LatencyProfile:
        named = [f"{e.key} at {e.precision}" for e in self.entries]
        named += [f"{b.kind} of {'x'.join(map(str, b.shape))}" for b in self.boundaries]
        twice = next((name for name, n in Counter(named).items() if n > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} has more than one entry")
        return self


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
    role: Literal["reference", "overhead", "entry", "boundary", "whole"]
    files: dict[str, str]
    """SHA-256 by path below the folder."""
    model_bytes: int = Field(default=0, ge=0)
    inputs: tuple[KitInput, ...]
    key: OpKey | None = None
    precision: Precision | None = None
    boundary: BoundaryKind | None = None
    shape: tuple[int, ...] = ()
    precisions: dict[LayerName, Precision] = Field(default_factory=dict)


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


class KitHeader(Record):
    """First line of a kit's results."""

    schema_version: int = 1
    kit_sha256: str
    created: Text
    device: Device
    runtime: Runtime
    threads: int = Field(ge=1)
    power_mode: Text
    clock: Literal["thread_cpu", "wall"]
    ci_target: float = Field(gt=0, lt=1)
    seconds: float = Field(gt=0)
    max_seconds: float = Field(gt=0)
    flags: tuple[Flag, ...] = ()


class KitSamples(Record):
    """Every other line of a kit's results: one graph in one round."""

    graph: str
    round: int = Field(ge=0)
    us: tuple[Microseconds, ...] = Field(min_length=1)
