"""What a search was asked for, and what it found."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from edgeqdm.ir.precision import Precision
from edgeqdm.ir.profile import Flag
from edgeqdm.ir.record import Record

Tie = Literal["layer", "siblings", "block"]
Positive = Annotated[float, Field(gt=0)]


class SearchSettings(Record):
    """What every trial of a search depends on, beside the model and the profile."""

    target: str = "onnxruntime"
    precisions: tuple[Precision, ...]
    """That layers may take, each where the target has a kernel for it."""
    tie: Tie = "siblings"
    """Layers that share a precision: none, those fed the same tensor, those of a block."""
    phases: int = Field(default=1, ge=1)
    """Most phases of a plan."""
    policies: bool = False
    """Also choose between temporal and static scales of activations."""
    latency_ms: Positive | None = None
    """Of one evaluation of one image, at most."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Of the package's graph, at most."""
    sampler: str = "TPESampler"
    """By Optuna's name."""
    samples: int = Field(default=64, ge=1)
    """Calibration trajectories."""
    images: tuple[Annotated[int, Field(ge=2)], ...] = (4, 16)
    """Images a trial is judged on, more and more, ascending."""
    sensitivity_images: int = Field(default=8, ge=1)
    ranges: int = Field(default=5, ge=1)
    """Ranges of steps that damage is measured in."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    accepted_flags: tuple[Flag, ...] = ()
    """Of the profile."""

    @field_validator("images")
    @classmethod
    def _ascending(cls, images: tuple[int, ...]) -> tuple[int, ...]:
        if not images or list(images) != sorted(set(images)):
            raise ValueError(f"images must ascend, found {images}")
        return images


class FoundPlan(Record):
    """One trial of a search's front."""

    trial: int
    latency_ms: float
    """Predicted, of one evaluation of one image, the mean over the steps."""
    image_sqnr_db: float
    """Mean over the images the search judged it on."""
    disk_bytes: int
    """Predicted, of the package's graph."""
    resident_bytes: int
    """Predicted, of the weights in the runtime."""
    phases: int
    origin: str
    """`search`, or what it was enqueued as."""
    measured_ms: float | None = None
    """Of the emitted graph on this host, CPU time; None where it was not measured."""
    measured_ratio: float | None = None
    """The same divided by the float graph's, interleaved."""
    measured_sqnr_db: float | None = None
    """Of the emitted graph on images that no trial saw, taken together."""


class ParetoReport(Record):
    """The plans that no other beats in both latency and image error, fastest first."""

    schema_version: int = 1
    study: str
    model: str
    """Fingerprint."""
    profile_sha256: str
    complete: int
    pruned: int
    failed: int
    float_ms: float
    """Predicted latency of the float network."""
    provenance: Literal["measured", "estimated"]
    """`measured` if every latency entry of the profile was."""
    plans: tuple[FoundPlan, ...]


class SearchRecord(Record):
    """`search.json` of a search folder: all a worker needs to be told."""

    schema_version: int = 1
    edgeqdm_version: str
    study: str
    source: str
    """Of the model, as the user gave it; empty where it was handed over in Python."""
    scheduler: str | None
    steps: int
    eta: float
    guidance: float
    split_skips: bool
    settings: SearchSettings
    trials: int
    fingerprint: dict[str, str]
