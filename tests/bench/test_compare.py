"""What a variant's time is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeqdm import load
from edgeqdm.bench import latency
from edgeqdm.bench.compare import Variant, compare, player_of
from edgeqdm.emit.backend import Array, KernelCount
from edgeqdm.testing.tiny import write_tiny_unet

STEPS = 8
SECONDS = [1.0] * 3 + [2.0] * 5
"""Of one evaluation, by step."""


class Timed:
    """A network that takes as long as its step says, by a clock that nothing else moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: set[int] = set()

    def evaluate(self, x: Array, step: int, _: NDArray[Any] | None) -> Array:
        self.now += SECONDS[step]
        self.steps.add(step)
        return np.zeros_like(x)


@pytest.mark.parametrize(
    ("starts", "seconds"),
    [((0,), 2.0), ((0, 3), (3 * 1.0 + 5 * 2.0) / 8), ((0, 1, 3, 6), (3 * 1.0 + 5 * 2.0) / 8)],
)
def test_a_phase_weighs_as_many_steps_as_it_has(
    starts: tuple[int, ...],
    seconds: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = Timed()
    monkeypatch.setattr(latency.time, "thread_time", lambda: timed.now)
    denoiser = load(write_tiny_unet(tmp_path / "model"), scheduler="ddim", steps=STEPS)
    kernels = KernelCount(integer=0, floating=0, by_name={})
    variants = tuple(
        Variant(name, timed.evaluate, player_of(denoiser), kernels, 0, 1, each)
        for name, each in (("plain", (0,)), ("phases", starts))
    )
    report = compare(denoiser, variants, libraries={}, rounds=3, images=1, seeds=(0,))
    plain, phases = report.rows
    assert plain.cpu_ms_per_step == pytest.approx(1e3 * SECONDS[STEPS // 2], rel=1e-9)
    assert phases.cpu_ms_per_step == pytest.approx(1e3 * seconds, rel=1e-9)
