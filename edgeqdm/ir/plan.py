"""Which precision every layer has at every step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from edgeqdm.ir.precision import ActivationPolicy, Precision
from edgeqdm.ir.record import Record


class LayerAssignment(Record):
    """The precision of one layer in one phase, and why."""

    layer: str
    precision: Precision
    activation: ActivationPolicy | None = None
    """None: what the precision implies, see `policy`."""
    reason: str

    @property
    def policy(self) -> ActivationPolicy:
        """Where the scale of the layer's input comes from."""
        return self.activation or self.precision.policies[0]

    @model_validator(mode="after")
    def _one_policy_per_tensor(self) -> LayerAssignment:
        allowed = self.precision.policies
        if self.policy not in allowed:
            raise ValueError(
                f"layer {self.layer}: precision {self.precision} and activation "
                f"{self.activation} exclude each other on one tensor; "
                f"{self.precision} takes {' or '.join(allowed)}"
            )
        return self


class Phase(Record):
    """A contiguous run of steps, `start <= i < stop`, in which every layer has one precision."""

    start: int = Field(ge=0)
    stop: int = Field(gt=0)
    layers: tuple[LayerAssignment, ...]

    def integer_layers(self) -> tuple[str, ...]:
        """Names of the layers that an integer kernel computes."""
        return tuple(a.layer for a in self.layers if a.precision.integer)

    @model_validator(mode="after")
    def _a_layer_has_one_precision(self) -> Phase:
        names = [assignment.layer for assignment in self.layers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"phase {self.start}..{self.stop} names {', '.join(twice)} twice")
        return self


class Prediction(Record):
    """What was expected of a plan when it was chosen."""

    profile_sha256: str
    """Of the latency profile."""
    device: str
    latency_ms: float
    """Of one evaluation of one image, the mean over the steps."""
    provenance: Literal["measured", "estimated"]
    """Of the profile's entries; the sum itself is a prediction."""
    disk_bytes: int
    image_sqnr_db: float
    """Mean over the images the plan was judged on."""
    accepted_flags: tuple[str, ...] = ()
    """Flags of the profile that its user accepted."""


class DeploymentPlan(Record):
    """Precisions for one model, one sampler and one target."""

    schema_version: int = 1
    target: str
    model: str
    """Fingerprint of the float model."""
    n_steps: int = Field(gt=0)
    phases: tuple[Phase, ...]
    prediction: Prediction | None = None
    """None where the plan was made by rule or by hand."""

    @property
    def starts(self) -> tuple[int, ...]:
        """First step of every phase."""
        return tuple(phase.start for phase in self.phases)

    @property
    def n_integer_layers(self) -> int:
        """Integer layers of a step, the most of any phase."""
        return max(len(phase.integer_layers()) for phase in self.phases)

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
