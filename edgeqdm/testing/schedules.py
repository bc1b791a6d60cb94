"""Schedules with random numbers and every part a sampler may have."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from edgeqdm.ir.model import Conditioning, Decoder
from edgeqdm.ir.package import ScheduleFile
from edgeqdm.ir.schedule import (
    AbsorbedVariance,
    ClipStep,
    CorrectedSchedule,
    CorrectionKey,
    LearnedVariance,
    SamplerProgram,
)

PARTS = ("clip", "correction", "input_weight", "learned", "bounds", "absorbed")
LABELS = Conditioning(kind="label", n_labels=3, null_label=3)
_Rows = tuple[tuple[float, ...], ...]


def random_schedule(
    seed: int,
    parts: Collection[str] = (),
    *,
    steps: int = 5,
    history: tuple[int, int] = (2, 3),
    sample_shape: tuple[int, int, int] = (3, 4, 5),
    guidance: float = 1.0,
    conditioning: Conditioning | None = None,
    decoder: Decoder | None = None,
    label_names: tuple[str, ...] = (),
) -> ScheduleFile:
    """A schedule with those of `PARTS` that are asked for and make sense together."""
    generator = np.random.default_rng(seed)
    return ScheduleFile(
        program=_program(generator, parts, steps, history),
        correction=_correction(generator, parts, steps, sample_shape[0]),
        guidance=guidance,
        conditioning=conditioning or Conditioning(kind="none"),
        decoder=decoder or Decoder(),
        sample_shape=sample_shape,
        label_names=label_names,
        golden_noise_rms=_column(generator, steps),
    )


def _column(generator: np.random.Generator, steps: int) -> tuple[float, ...]:
    return tuple(generator.uniform(0.1, 1.0, steps).tolist())


def _rows(values: np.ndarray) -> _Rows:
    return tuple(tuple(row) for row in values.tolist())


def _program(
    generator: np.random.Generator,
    parts: Collection[str],
    steps: int,
    history: tuple[int, int],
) -> SamplerProgram:
    def weights(width: int) -> _Rows:
        drawn = generator.uniform(-1.0, 1.0, (steps, width))
        return _rows(np.tril(drawn))

    clip = None
    if "clip" in parts:
        sides = [_column(generator, steps) for _ in range(3)]
        clip = ClipStep(limit=0.5, sample_weight=sides[0], output_weight=sides[1], weight=sides[2])
    learned = None
    if "learned" in parts:
        learned = LearnedVariance()
    if "learned" in parts and "bounds" in parts:
        low = generator.uniform(-9.0, -5.0, steps)
        learned = LearnedVariance(log_min=tuple(low.tolist()), log_max=tuple((low + 3).tolist()))
    return SamplerProgram(
        sampler="RandomScheduler",
        settings={},
        prediction_type="epsilon",
        timesteps=tuple(float(t) for t in range(steps, 0, -1)),
        integer_timesteps=True,
        initial_sigma=1.7,
        input_scale=_column(generator, steps),
        sample_weights=weights(history[0]),
        output_weights=weights(history[1]),
        noise_std=(*_column(generator, steps)[:-1], 0.0),
        clip=clip,
        learned_variance=learned,
    )


def _correction(
    generator: np.random.Generator, parts: Collection[str], steps: int, channels: int
) -> CorrectedSchedule | None:
    if "correction" not in parts:
        return None
    noise_std = generator.uniform(0.1, 1.0, (steps, channels))
    noise_std[steps // 2] = 0.0
    noise_std[0, 0] = 0.0
    absorbed = None
    if "learned" in parts and "absorbed" in parts:
        variance = _rows(generator.uniform(0.0, 0.01, (steps, channels)))
        absorbed = AbsorbedVariance(variance=variance, largest_share=0.7)
    weight = tuple(generator.uniform(-0.1, 0.1, steps).tolist())
    return CorrectedSchedule(
        key=CorrectionKey(model="m", sampler="s", guidance=1.0, precision="p"),
        gain=tuple(generator.uniform(0.9, 1.1, steps).tolist()),
        bias=_rows(generator.uniform(-0.1, 0.1, (steps, channels))),
        noise_std=_rows(noise_std),
        clamped=(False,) * steps,
        absorbed=absorbed,
        input_weight=weight if "input_weight" in parts else None,
    )
