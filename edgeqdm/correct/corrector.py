"""Correctors turn measured quantization noise into a corrected sampler; PTQD is one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgeqdm.correct.measure import NoiseStatistics
from edgeqdm.errors import InputError
from edgeqdm.ir.schedule import (
    AbsorbedVariance,
    CorrectedSchedule,
    CorrectionKey,
    LearnedVariance,
    SamplerProgram,
)
from edgeqdm.numerics.noise import LOWEST_NEGATIVE_K, Floats, reduced_noise_std


class Corrector(Protocol):
    """What a method must offer to correct samplers: numbers in, numbers out, nothing learned."""

    @property
    def name(self) -> str:
        """For reports."""
        ...

    def correct(
        self, program: SamplerProgram, statistics: NoiseStatistics, key: CorrectionKey
    ) -> CorrectedSchedule:
        """The correction of every step, as numbers a device multiplies and adds.

        Args:
            program: the sampler the statistics were measured on.
            statistics: one row per step of the program, in its order.
            key: what the statistics were measured on; handed on.

        Raises:
            InputError: the statistics have another number of steps than the program.
        """
        ...


@dataclass(frozen=True)
class Ptqd:
    """`f <- (f - mu) / (1 + k)` and a noise that leaves room for what quantization adds.

    Each of the three parts works without the others.

    Attributes:
        gain: divide by 1 + k (CNC, correlated noise correction). Without it k counts as 0, and the
            bias is the mean of the whole error.
        bias: subtract mu (BC, bias correction).
        variance: reduce the noise that the sampler draws (VSC, variance schedule calibration); a
            learned variance elementwise, when it is known. Has
            no effect where a budget per step does not hold: with clipping, which is not linear, and
            with a history, where one error enters several steps.
        absorb: largest share of a step's variance that may be left to quantization noise, 0..1.
        allow_negative: correct k < 0 too, down to -0.5, whether or not it was clamped when the
            statistics were fitted. By default it counts as 0, because dividing by less than 1
            amplifies what remains.

    Raises:
        InputError: `absorb` is outside 0..1.

    Source: He et al. 2023, "PTQD", https://arxiv.org/abs/2305.10657, section 4.
    """

    gain: bool = True
    bias: bool = True
    variance: bool = True
    absorb: float = 1.0
    allow_negative: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.absorb <= 1.0:
            raise InputError(
                "EQ-3430",
                f"the share of the noise to absorb is {self.absorb}",
                path="absorb",
                hint="give a share of the variance, 0 to 1",
            )

    @property
    def name(self) -> str:
        return "ptqd"

    def correct(
        self, program: SamplerProgram, statistics: NoiseStatistics, key: CorrectionKey
    ) -> CorrectedSchedule:
        """See `Corrector`. The sampler's weights stay as they are."""
        require_steps(program, statistics)
        rows = [self._row(program, statistics, step) for step in range(program.n_steps)]
        gain, bias, noise_std, clamped = zip(*rows, strict=True)
        found = CorrectedSchedule(
            key=key, gain=gain, bias=bias, noise_std=noise_std, clamped=clamped
        )
        if program.learned_variance is None or not (self.variance and has_step_budget(program)):
            return found
        return self._absorb(program, program.learned_variance, statistics, found)

    def _row(
        self, program: SamplerProgram, statistics: NoiseStatistics, step: int
    ) -> tuple[float, tuple[float, ...], tuple[float, ...], bool]:
        k = self._gain_error(statistics, step)
        removed = k if self.gain else 0.0
        mean, _ = statistics.residual(step, removed)
        _, noise = statistics.residual(step, k)
        bias = mean if self.bias else np.zeros_like(mean)
        noise_std, clamped = self._noise(program, step, noise, removed)
        return 1.0 / (1.0 + removed), tuple(bias.tolist()), noise_std, clamped

    def _gain_error(self, statistics: NoiseStatistics, step: int) -> float:
        k = statistics.k[step]
        if not self.allow_negative:
            return max(k, 0.0)
        return max(statistics.fitted_k(step), LOWEST_NEGATIVE_K) if k <= 0.0 else k

    def _noise(
        self, program: SamplerProgram, step: int, variance: Floats, removed: float
    ) -> tuple[tuple[float, ...], bool]:
        noise_std = program.noise_std[step]
        absorbs = self.variance and program.learned_variance is None and has_step_budget(program)
        if not absorbs:
            return (noise_std,) * len(variance), False
        weight = program.output_weights[step][0]
        std, clamped = reduced_noise_std(noise_std, weight, variance, removed, cap=self.absorb)
        return tuple(std.tolist()), clamped

    def _absorb(
        self,
        program: SamplerProgram,
        learned: LearnedVariance,
        statistics: NoiseStatistics,
        found: CorrectedSchedule,
    ) -> CorrectedSchedule:
        """With what the device takes out of the variance that it learns only when it samples."""
        arriving = [
            _arriving(program, statistics, step, self._gain_error(statistics, step), gain)
            for step, gain in enumerate(found.gain)
        ]
        clamped = tuple(
            learned.log_max is not None
            and program.noise_std[step] > 0.0
            and bool((row > self.absorb * math.exp(learned.log_max[step])).any())
            for step, row in enumerate(arriving)
        )
        absorbed = AbsorbedVariance(
            variance=tuple(tuple(row.tolist()) for row in arriving), largest_share=self.absorb
        )
        return found.model_copy(update={"absorbed": absorbed, "clamped": clamped})


def _arriving(
    program: SamplerProgram, statistics: NoiseStatistics, step: int, k: float, gain: float
) -> Floats:
    """Variance [C] that what is left of the error adds to the next sample."""
    _, variance = statistics.residual(step, k)
    return variance * (program.output_weights[step][0] * gain) ** 2


def require_steps(program: SamplerProgram, statistics: NoiseStatistics) -> None:
    """Refuses statistics that have another number of steps than the sampler."""
    if statistics.n_steps != program.n_steps:
        raise InputError(
            "EQ-3421",
            f"statistics of {statistics.n_steps} steps, the sampler has {program.n_steps}",
            hint="measure the noise again with this sampler",
        )


def has_step_budget(program: SamplerProgram) -> bool:
    """Whether the noise of one output reaches exactly the next sample, and linearly."""
    tables = (*program.sample_weights, *program.output_weights)
    return program.clip is None and not any(any(row[1:]) for row in tables)
