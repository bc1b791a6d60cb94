"""What was measured of a package, and where."""

from __future__ import annotations

from edgeqdm.ir.record import Record


class Host(Record):
    """The machine and software a figure was measured on."""

    machine: str
    """Architecture, e.g. `x86_64`."""
    cpu: str
    system: str
    python: str
    libraries: dict[str, str]
    threads: int


class BenchRow(Record):
    """One variant of a model. Absent figures were not measured."""

    name: str
    cpu_ms_per_step: float
    """CPU time of one step of one image on one thread, guidance included, 25th percentile."""
    cpu_ratio: float | None
    """The same divided by the float variant's, interleaved in one process."""
    image_sqnr_db: float | None
    """Final samples of a free run against the float model from equal noise."""
    bytes_on_disk: int
    """The graph and, for a package, everything it ships."""
    integer_kernels: int
    planned_layers: int
    float_kernels: int
    """Convolution and matrix kernels in float, attention products included."""
    feature_fid: float | None


class BenchReport(Record):
    """A table of variants of one model, measured together."""

    schema_version: int = 1
    model: str
    sampler: str
    n_steps: int
    guidance: float
    images: int
    rounds: int
    fid_images: int
    provenance: str = "measured"
    host: Host
    rows: tuple[BenchRow, ...]
