"""The sampler as a table, and its correction for a quantized network.

One step of every linear sampler is

    x_next = sum_k a[i, k] x[i - k] + sum_j b[i, j] f[i - j] + c[i] z[i] + d[i] clip(x0_hat[i])

with `x[i]` the sample before step i, `f[i]` the network output at `input_scale[i] * x[i]` after
guidance and correction, and z ~ N(0, 1). Steps ascend, step 0 is the noisiest. Where the network
says the variance of the noise itself, `c[i]` is a factor of its standard deviation.
"""

from __future__ import annotations

from typing import Any

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from edgeqdm.ir.record import Record


class ClipStep(Record):
    """Clipping of the predicted clean sample, `x0_hat = p[i] x[i] + q[i] f[i]`, to +-limit."""

    limit: float = Field(gt=0)
    sample_weight: tuple[float, ...]
    """p, [S]"""
    output_weight: tuple[float, ...]
    """q, [S]"""
    weight: tuple[float, ...]
    """d, [S]: share of the clipped prediction in the next sample."""


class LearnedVariance(Record):
    """Variance of the noise, elementwise out of v, a second half of the output's channels.

    With bounds, `log variance = r log_max[i] + (1 - r) log_min[i]` and `r = (v + 1) / 2` (Nichol &
    Dhariwal 2021, equation 15, https://arxiv.org/abs/2102.09672). Without, it is v.
    """

    log_min: tuple[float, ...] | None = None
    """[S]; 0 where a step adds no noise."""
    log_max: tuple[float, ...] | None = None
    """[S]; 0 where a step adds no noise."""

    @model_validator(mode="after")
    def _bounds_come_in_pairs(self) -> LearnedVariance:
        if (self.log_min is None) != (self.log_max is None):
            raise ValueError("log_min and log_max must both be given, or neither")
        return self


class SamplerProgram(Record):
    """A sampler compiled to numbers; nothing of the schedule is recomputed on a device."""

    sampler: str
    """Class name of the diffusers scheduler this was compiled from."""
    settings: dict[str, str | int | float | bool | None]
    """Everything of the scheduler's configuration that the table depends on, with `eta` and the
    `steps` that were asked for, which some samplers exceed in evaluations."""
    prediction_type: str
    timesteps: tuple[float, ...]
    """What the network is fed at each step, [S]; descends."""
    integer_timesteps: bool
    """Whether the network is fed int64 (True) or float32 timesteps."""
    initial_sigma: float = Field(gt=0)
    """Standard deviation of the initial sample."""
    input_scale: tuple[float, ...]
    """[S]"""
    sample_weights: tuple[tuple[float, ...], ...]
    """a, [S, K]; column k weighs x[i - k] and is 0 where i < k."""
    output_weights: tuple[tuple[float, ...], ...]
    """b, [S, H]; column j weighs f[i - j] and is 0 where i < j."""
    noise_std: tuple[float, ...]
    """c, [S]; 0 where a step adds no noise."""
    clip: ClipStep | None = None
    learned_variance: LearnedVariance | None = None
    """The network's output has 2C channels where this is given; not written where it is not."""

    @property
    def n_steps(self) -> int:
        return len(self.timesteps)

    @model_validator(mode="after")
    def _tables_have_one_row_per_step(self) -> SamplerProgram:
        columns = [self.input_scale, self.sample_weights, self.output_weights, self.noise_std]
        if self.clip is not None:
            columns += [self.clip.sample_weight, self.clip.output_weight, self.clip.weight]
        learned = self.learned_variance
        if learned is not None and learned.log_min is not None and learned.log_max is not None:
            columns += [learned.log_min, learned.log_max]
        if not self.timesteps or any(len(column) != len(self.timesteps) for column in columns):
            raise ValueError(f"every table must have one row per timestep ({len(self.timesteps)})")
        for table in (self.sample_weights, self.output_weights):
            if not table[0] or len({len(row) for row in table}) != 1:
                raise ValueError("weight tables must be rectangular and not empty")
        return self

    @model_serializer(mode="wrap")
    def _omit_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_none(handler(self), "learned_variance")


class CorrectionKey(Record):
    """What a correction was measured on. It is refused for anything else (PTQD, section 4)."""

    model: str
    """SHA-256 over what is known of the float model, and its null conditioning."""
    sampler: str
    """SHA-256 of the SamplerProgram."""
    guidance: float
    precision: str
    """SHA-256 of the precision of every layer at every step, and of the scale tables."""


class AbsorbedVariance(Record):
    """What quantization noise takes out of a learned variance, elementwise and down to 1e-20."""

    variance: tuple[tuple[float, ...], ...]
    """[S, C], of what the quantization noise adds to the next sample."""
    largest_share: float = Field(ge=0, le=1)
    """Of the learned variance, that may be taken."""


class CorrectedSchedule(Record):
    """Per step `f <- gain[i] (f - bias[i, c]) + input_weight[i] x`, x being what the network was
    fed, then `noise_std[i]` instead of c[i]."""

    key: CorrectionKey
    gain: tuple[float, ...]
    """1 / (1 + k), [S], k being the part of the error that is correlated with the output; times the
    factor that keeps the samples' variance, where that is matched."""
    bias: tuple[tuple[float, ...], ...]
    """[S, C], subtracted before the gain."""
    noise_std: tuple[tuple[float, ...], ...]
    """[S, C]; never larger than the sampler's own."""
    clamped: tuple[bool, ...]
    """[S]; True where quantization noise exceeds the step's noise and only part is absorbed; of a
    learned variance, where it exceeds the upper bound."""
    absorbed: AbsorbedVariance | None = None
    """With a learned variance only; not written where it is not given."""
    input_weight: tuple[float, ...] | None = None
    """[S]; not written where it is not given, and 0 then."""

    @model_serializer(mode="wrap")
    def _omit_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_none(_without_none(handler(self), "absorbed"), "input_weight")


def _without_none(tree: dict[str, Any], field: str) -> dict[str, Any]:
    # A value without the field has the digest it had before there was such a field.
    if tree.get(field) is None:
        tree.pop(field, None)
    return tree
