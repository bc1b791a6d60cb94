"""The header of a quantized model's file: what its packed tensors mean."""

from __future__ import annotations

from pydantic import Field

from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import ActivationPolicy, Precision
from edgeqdm.ir.record import Record
from edgeqdm.ir.schedule import CorrectedSchedule, SamplerProgram

FORMAT = "edgeqdm-quantized"


class StoredWeight(Record):
    """Codes of one layer's weight, packed bit by bit; shared by all variants that name it."""

    key: str
    shape: tuple[int, ...]
    bits: int
    group_size: int


class StoredScales(Record):
    """What of an activation's scales is not a tensor."""

    zero_point: int = Field(ge=0)
    bits: int


class StoredVariant(Record):
    """One layer at one precision."""

    layer: str
    precision: Precision
    activation: ActivationPolicy
    weight: str
    """Key of a `StoredWeight`."""
    input: StoredScales | None
    output: StoredScales | None


class QuantizedFile(Record):
    """Everything of a quantized model's file but the tensors."""

    format: str = FORMAT
    schema_version: int = 1
    edgeqdm_version: str
    program: SamplerProgram
    guidance: float
    plan: DeploymentPlan
    weights: tuple[StoredWeight, ...]
    variants: tuple[StoredVariant, ...]
    correction: CorrectedSchedule | None
    generated: tuple[str, ...]
    """Scale tables that come from a network of the timestep, in the order of its outputs."""
    split_skips: bool
