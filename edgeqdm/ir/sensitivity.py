"""What quantizing one layer costs, step by step and in the final images."""

from __future__ import annotations

from pydantic import Field, model_validator

from edgeqdm.ir.precision import Precision
from edgeqdm.ir.record import Record


class StepRange(Record):
    """Steps `start <= i < stop`."""

    start: int = Field(ge=0)
    stop: int = Field(gt=0)


class LayerSensitivity(Record):
    """Damage of one layer at one precision, all other layers in float.

    Damage is error power over signal power.
    """

    layer: str
    precision: Precision
    forced: tuple[float, ...]
    """Of the network's output at every step, fed the float model's samples, [S]."""
    propagated: tuple[float, ...]
    """Of the final samples, the layer quantized in one range of steps only, [R]."""


class SensitivityReport(Record):
    """Damage of every layer at every precision."""

    schema_version: int = 1
    model: str
    """Fingerprint."""
    sampler: str
    """Digest of the program."""
    n_steps: int = Field(gt=0)
    images: int = Field(gt=0)
    """Trajectories it was measured on."""
    seed: int = Field(ge=0)
    ranges: tuple[StepRange, ...]
    entries: tuple[LayerSensitivity, ...]

    @model_validator(mode="after")
    def _shapes(self) -> SensitivityReport:
        for entry in self.entries:
            found = (len(entry.forced), len(entry.propagated))
            if found != (self.n_steps, len(self.ranges)):
                raise ValueError(
                    f"{entry.layer} at {entry.precision} has {found[0]} steps and {found[1]} "
                    f"ranges, not {self.n_steps} and {len(self.ranges)}"
                )
        return self

    def damage(self, entry: LayerSensitivity, start: int, stop: int) -> float:
        """Propagated damage of `start <= step < stop`; a range counts by its share of steps."""
        return sum(
            value * max(0, min(stop, r.stop) - max(start, r.start)) / (r.stop - r.start)
            for value, r in zip(entry.propagated, self.ranges, strict=True)
        )
