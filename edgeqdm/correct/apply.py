"""Turns measured quantization noise into a corrected sampler, and guards what it is used for."""

from __future__ import annotations

import numpy as np

from edgeqdm.correct.measure import NoiseStatistics
from edgeqdm.errors import InputError
from edgeqdm.ir.schedule import CorrectedSchedule, CorrectionKey, SamplerProgram
from edgeqdm.numerics.noise import reduced_noise_std


def correct_schedule(
    program: SamplerProgram,
    statistics: NoiseStatistics,
    key: CorrectionKey,
    *,
    variance: bool = True,
) -> CorrectedSchedule:
    """The correction of every step, as numbers a device multiplies and adds.

    The output is corrected, `(f - mu) / (1 + k)`, before it enters the sampler's history or a
    clipping. The sampler's weights stay as they are; only the noise it draws is reduced.

    Args:
        program: the sampler the statistics were measured on.
        statistics: one row per step of the program.
        key: what the statistics were measured on.
        variance: also let the sampler's noise absorb quantization noise, where it adds any. Has no
            effect where a budget per step does not hold: with clipping, which is not linear, and
            with a history, where one error enters several steps.

    Raises:
        InputError: the statistics have another number of steps than the program.

    Source: He et al. 2023, "PTQD", https://arxiv.org/abs/2305.10657, section 4.
    """
    if statistics.n_steps != program.n_steps:
        raise InputError(
            "EQ-3421",
            f"statistics of {statistics.n_steps} steps, the sampler has {program.n_steps}",
            hint="measure the noise again with this sampler",
        )
    rows = [
        _noise_row(program, statistics, step, reduce=variance and _has_step_budget(program))
        for step in range(program.n_steps)
    ]
    return CorrectedSchedule(
        key=key,
        gain=tuple(1.0 / (1.0 + k) for k in statistics.k),
        bias=statistics.mu,
        noise_std=tuple(std for std, _ in rows),
        clamped=tuple(clamped for _, clamped in rows),
    )


def _has_step_budget(program: SamplerProgram) -> bool:
    tables = (*program.sample_weights, *program.output_weights)
    return program.clip is None and not any(any(row[1:]) for row in tables)


def _noise_row(
    program: SamplerProgram, statistics: NoiseStatistics, step: int, *, reduce: bool
) -> tuple[tuple[float, ...], bool]:
    noise_std = program.noise_std[step]
    residual = statistics.variance[step]
    if not reduce:
        return (noise_std,) * len(residual), False
    std, clamped = reduced_noise_std(
        noise_std, program.output_weights[step][0], np.array(residual), statistics.k[step]
    )
    return tuple(std.tolist()), clamped


def require_key(correction: CorrectedSchedule, key: CorrectionKey) -> None:
    """Refuses a correction that was measured on something else.

    Args:
        correction: the correction to be used.
        key: what it is to be used for.

    Raises:
        InputError: naming every field of the key that differs, and both values.
    """
    differing = [
        f"{field} (measured on {found!r}, wanted for {wanted!r})"
        for field in CorrectionKey.model_fields
        if (found := getattr(correction.key, field)) != (wanted := getattr(key, field))
    ]
    if differing:
        raise InputError(
            "EQ-3422",
            f"the correction was measured on something else: {'; '.join(differing)}",
            hint="measure the noise again after any change of model, sampler, guidance or bits",
        )
