"""CPU time of several variants of one computation, interleaved in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

WARM_UP_ROUNDS = 5
WARM_SECONDS = 0.01
"""Of evaluations after others have run. `unet-fmnist` near W8A8 on x86-64, 1.4 ms, takes 1.6 times
as long in the first one and 1.04 times in the fifth."""


@dataclass(frozen=True)
class Timing:
    """CPU time of one call on one thread.

    Attributes:
        p25_us: 25th percentile, robust where other programs share the machine.
        p50_us: median.
        p75_us: 75th percentile.
        n: number of timed calls.
    """

    p25_us: float
    p50_us: float
    p75_us: float
    n: int


def time_interleaved(
    variants: Mapping[str, Callable[[], object]], *, rounds: int
) -> dict[str, Timing]:
    """Call every variant in every round, in changing order, and time the calling thread.

    Before each timed call a variant is called until `WARM_SECONDS` are over: a sampler evaluates
    one network again and again, and finds the caches as it left them, not as other networks did.

    The variants must compute on the calling thread alone (one intra-op thread), else their CPU
    time is not seen.

    Args:
        variants: computations to compare, by name.
        rounds: timed calls of each, after a warm-up.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = np.random.default_rng(0)
    for done in range(WARM_UP_ROUNDS + rounds):
        for k in order.permutation(len(names)):
            _warm(variants[names[k]])
            started = time.thread_time()
            variants[names[k]]()
            if done >= WARM_UP_ROUNDS:
                seconds[names[k]].append(time.thread_time() - started)
    return {name: _summary(values) for name, values in seconds.items()}


def _warm(call: Callable[[], object]) -> None:
    began = time.thread_time()
    while time.thread_time() < began + WARM_SECONDS:
        call()


def _summary(seconds: list[float]) -> Timing:
    p25, p50, p75 = (float(v) * 1e6 for v in np.percentile(seconds, [25, 50, 75]))
    return Timing(p25, p50, p75, len(seconds))
