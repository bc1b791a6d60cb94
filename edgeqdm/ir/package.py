"""The manifest of a package."""

from __future__ import annotations

from pydantic import Field

from edgeqdm.ir.model import Conditioning, Decoder, ModelInfo
from edgeqdm.ir.record import Record
from edgeqdm.ir.schedule import CorrectedSchedule, SamplerProgram

FORMAT = "edgeqdm-package"
SCHEMA_VERSION = 1
UNSEALED = "0" * 64
"""`manifest_sha256` of a manifest that is not yet written."""


class Artifact(Record):
    """One file of a package."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)
    role: str
    """`model`, `plan`, `schedule`, `golden`, `runtime` or `card`."""


class Manifest(Record):
    """`manifest.json`: what a package is, the hash of every other file in it and its own.

    Its own hash, the seal, finds damage and careless edits; whoever changes a package on purpose
    can compute a new one.
    """

    format: str = FORMAT
    schema_version: int = SCHEMA_VERSION
    edgeqdm_version: str
    created: str
    """UTC, ISO 8601, seconds."""
    target: str
    form: str = "standard"
    """Of the target's forms of a package; older packages know one only."""
    model: ModelInfo
    guidance: float
    n_steps: int
    program_sha256: str
    plan_sha256: str
    integer_layers: int
    """Layers the plan promises to run as integer kernels."""
    library_versions: dict[str, str]
    files: dict[str, Artifact]
    """By relative POSIX path; `manifest.json` itself is not listed."""
    manifest_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of the bytes of `manifest.json` with these 64 digits, which occur there only once,
    replaced by zeros."""


class ScheduleFile(Record):
    """`schedule.json`: everything a device needs beside the graph, as numbers."""

    schema_version: int = SCHEMA_VERSION
    program: SamplerProgram
    correction: CorrectedSchedule | None
    guidance: float
    conditioning: Conditioning
    decoder: Decoder
    sample_shape: tuple[int, int, int]
    label_names: tuple[str, ...]
    golden_noise_rms: tuple[float, ...]
    """[S]: RMS of (integer reference - float model) of the network output, teacher-forced."""
