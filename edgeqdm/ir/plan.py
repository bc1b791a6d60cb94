"""Which precision every layer has at every step."""

from __future__ import annotations

from pydantic import Field, model_validator

from edgeqdm.ir.precision import Precision
from edgeqdm.ir.record import Record


class LayerAssignment(Record):
    """The precision of one layer in one phase, and why."""

    layer: str
    precision: Precision
    reason: str


class Phase(Record):
    """A contiguous run of steps, `start <= i < stop`, in which every layer has one precision."""

    start: int = Field(ge=0)
    stop: int = Field(gt=0)
    layers: tuple[LayerAssignment, ...]

    def quantized(self) -> tuple[str, ...]:
        """Names of the layers that are not left in float."""
        return tuple(a.layer for a in self.layers if a.precision is not Precision.FP32)


class DeploymentPlan(Record):
    """Precisions for one model, one sampler and one target."""

    schema_version: int = 1
    target: str
    model: str
    """Fingerprint of the float model."""
    n_steps: int = Field(gt=0)
    phases: tuple[Phase, ...]

    @model_validator(mode="after")
    def _phases_cover_all_steps(self) -> DeploymentPlan:
        bounds = [(p.start, p.stop) for p in self.phases]
        expected = 0
        for start, stop in bounds:
            if start != expected or stop <= start:
                raise ValueError(f"phases must cover steps 0..{self.n_steps} in order: {bounds}")
            expected = stop
        if expected != self.n_steps:
            raise ValueError(f"phases end at step {expected}, the sampler has {self.n_steps}")
        return self
