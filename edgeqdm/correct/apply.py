"""Corrects a sampler with a corrector, and guards what a correction is used for."""

from __future__ import annotations

from edgeqdm.correct.corrector import Corrector, Ptqd
from edgeqdm.correct.measure import NoiseStatistics
from edgeqdm.errors import InputError
from edgeqdm.ir.schedule import CorrectedSchedule, CorrectionKey, SamplerProgram


def correct_schedule(
    program: SamplerProgram,
    statistics: NoiseStatistics,
    key: CorrectionKey,
    *,
    corrector: Corrector | None = None,
) -> CorrectedSchedule:
    """The sampler's correction by a corrector, PTQD with all its parts by default.

    Args:
        program: the sampler the statistics were measured on.
        statistics: one row per step of the program.
        key: what the statistics were measured on.
        corrector: the method.

    Raises:
        InputError: the statistics have another number of steps than the program.
    """
    return (corrector or Ptqd()).correct(program, statistics, key)


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
