"""When a measurement is finished, what speaks against it, and on what it was made; numpy alone.

A copy of this file travels with every benchmark kit.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROUNDS = 3
MIN_RUNS = 30
CI_TARGET = 0.01
WARM_UP_SECONDS = 0.2
BLOCK = 5
MAX_RUNS = 1000
MAX_SPREAD_OF_ROUNDS = 0.05
MAX_VARIATION = 0.05
MAX_DEVIATION = 0.03
MAX_DRIFT = 1.03
DRIFT_RUNS = 60
"""Below this many runs a drift of 3 % is seen in 12 % of the series that have none."""
MAX_REFERENCE_RATIO = 1.10
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
    "bf16",
)
LONGEST_NAME = 200


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, two order statistics of the samples.

    Source: the number of samples below the median is binomial(n, 1/2); normal approximation.
    """
    ordered = np.sort(np.asarray(samples, np.float64))
    n = len(ordered)
    half = 0.98 * math.sqrt(n)
    low = max(0, math.floor(n / 2 - half) - 1)
    high = min(n - 1, math.ceil(n / 2 + half))
    return float(ordered[low]), float(ordered[high])


def finished(samples: Sequence[float], *, ci_target: float = CI_TARGET) -> bool:
    """Whether there are enough samples and their median is known well enough."""
    if len(samples) < MIN_RUNS:
        return False
    low, high = median_interval(samples)
    return (high - low) / 2 <= ci_target * float(np.median(samples))


def flags_of(rounds: Sequence[Sequence[float]], *, ci_target: float = CI_TARGET) -> tuple[str, ...]:
    """What speaks against one graph's samples.

    Args:
        rounds: samples by round, in the order they were taken.
        ci_target: half-width of the median's interval that was asked for, relative.
    """
    samples = np.concatenate([np.asarray(each, np.float64) for each in rounds])
    median = float(np.median(samples))
    medians = [float(np.median(each)) for each in rounds if len(each)]
    deviation = float(np.median(np.abs(samples - median)))
    # Of the middle 98 %: an interrupt of milliseconds says nothing of an operation.
    low, high = np.percentile(samples, [1, 99])
    middle = samples[(samples >= low) & (samples <= high)]
    found = {
        "noisy": float(middle.std()) > MAX_VARIATION * median or deviation > MAX_DEVIATION * median,
        "ci_not_reached": not finished(samples.tolist(), ci_target=ci_target),
        "unstable": max(medians) > (1 + MAX_SPREAD_OF_ROUNDS) * min(medians),
    }
    return tuple(name for name, present in found.items() if present)


def drift(rounds: Sequence[Sequence[float]]) -> float | None:
    """How much slower a round ends than it began, the median of the rounds; None if too short.

    Inside a round: between rounds other graphs ran, and `unstable` compares those.
    """
    slower = []
    for each in rounds:
        third = len(each) // 3
        if len(each) >= DRIFT_RUNS:
            slower.append(float(np.median(each[-third:]) / np.median(each[:third])))
    return float(np.median(slower)) if slower else None


def throttled(drifts: Sequence[float], reference: Sequence[float]) -> bool:
    """Whether a device grew slower while it was measured.

    Throttling slows all graphs alike, so one that drifts alone says nothing.

    Args:
        drifts: of all graphs that were long enough.
        reference: times of the reference graph, in order, the first one before all others.
    """
    slower = bool(drifts) and float(np.median(drifts)) > MAX_DRIFT
    return slower or max(reference) > MAX_REFERENCE_RATIO * reference[0]


def cpu(proc: Path = Path("/proc")) -> tuple[str, list[str]]:
    """Name of the board or processor, and what decides over its kernels."""
    fields = [entry.partition(":") for entry in text_of(proc / "cpuinfo").splitlines()]

    def values(wanted: str) -> list[str]:
        return [value.strip() for key, _, value in fields if key.strip() == wanted]

    names = [
        # First: 32-bit Arm has a `model name` too, the same one on every board.
        text_of(proc / "device-tree" / "model"),
        *values("Hardware"),
        *values("model name"),
        arm_cores(values("CPU implementer"), values("CPU part")),
        platform.processor(),
        platform.machine(),
    ]
    flags = {flag for value in (*values("flags"), *values("Features")) for flag in value.split()}
    return next(filter(None, map(plain, names))), [f for f in FEATURES if f in flags]


def arm_cores(implementers: list[str], parts: list[str]) -> str:
    """Architecture and kinds of cores, in numbers: `aarch64 0x41/0xd05 0x41/0xd0b`."""
    kinds = sorted({f"{who}/{part}" for who, part in zip(implementers, parts, strict=False)})
    return " ".join([platform.machine(), *kinds]) if kinds else ""


def text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def plain(text: str) -> str:
    """What a profile can hold of it: a device tree ends its texts with a NUL."""
    return "".join(c for c in text if " " <= c <= "~").strip()[:LONGEST_NAME]
