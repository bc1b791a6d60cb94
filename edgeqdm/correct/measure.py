"""Measures the noise that quantization adds to a network output, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from edgeqdm.errors import InputError, NumericalError
from edgeqdm.ir.record import Record
from edgeqdm.numerics.noise import NoiseSums, Output, fit_noise, snr_db, sum_noise

Fed = TypeVar("Fed")
"""What a predictor takes beside sample and step, e.g. labels [B]; handed through untouched."""
Predictor = Callable[[NDArray[np.float32], int, Fed], Output]
"""(network input [B, C, H, W], step, conditioning) -> output after guidance, [B, C, H, W]."""


class NoiseStatistics(Record):
    """The noise model of every step. Row 0 is the noisiest step."""

    k: tuple[float, ...]
    """[S]: the part of the error that follows the output, as it is to be corrected."""
    mu: tuple[tuple[float, ...], ...]
    """[S, C]: mean of what remains of the error."""
    variance: tuple[tuple[float, ...], ...]
    """[S, C]: variance of what remains of the error."""
    correlation: tuple[float, ...]
    """[S]: Pearson r of error and output within channels, before any clamping of k."""
    n: tuple[int, ...]
    """[S]: elements per channel behind each row."""
    clamped_gain: tuple[bool, ...]
    """[S]: True where the fitted k was too low to be corrected and was raised."""
    snr_db: tuple[float, ...]
    """[S]: 10 log10 of mean f^2 over mean D^2; +-300 stands for no noise or no signal."""

    @property
    def n_steps(self) -> int:
        return len(self.k)

    @model_validator(mode="after")
    def _rows_are_steps(self) -> NoiseStatistics:
        tables = (self.mu, self.variance, self.correlation, self.n, self.clamped_gain, self.snr_db)
        if not self.k or any(len(table) != len(self.k) for table in tables):
            raise ValueError(f"every table must have one row per step ({len(self.k)})")
        if len({len(row) for row in (*self.mu, *self.variance)}) != 1 or not self.mu[0]:
            raise ValueError("mu and variance must have one column per channel")
        if min(self.k) <= -1.0 or min(min(row) for row in self.variance) < 0.0:
            raise ValueError("1 + k must be positive and no variance negative")
        return self


def measure_noise(
    reference: Predictor[Fed],
    quantized: Predictor[Fed],
    samples: Iterable[tuple[int, NDArray[np.float32], Fed]],
    *,
    n_steps: int,
    allow_negative: bool = False,
) -> NoiseStatistics:
    """Statistics of `quantized - reference` at every step, both fed the same samples.

    Samples stream; only sums over them are kept. Measure last, on the final weights and scales:
    whatever changes either invalidates the statistics.

    Args:
        reference: the float network.
        quantized: the quantized network.
        samples: (step, network input [B, C, H, W], conditioning) from trajectories of the *float*
            network, in any order, as many per step as wanted.
        n_steps: S; every step 0..S-1 must occur.
        allow_negative: see `fit_noise`.

    Raises:
        InputError: a step is missing or out of range, or samples and outputs differ in shape.
        NumericalError: an output is NaN or Inf.

    Source: He et al. 2023, "PTQD", https://arxiv.org/abs/2305.10657, section 4; teacher-forced
    as in its published code, residual statistics as in the paper.
    """
    sums: dict[int, NoiseSums] = {}
    for step, x, conditioning in samples:
        if not 0 <= step < n_steps:
            raise InputError(
                "EQ-3411",
                f"a sample is of step {step}, the sampler has steps 0 to {n_steps - 1}",
                hint="draw the samples with the sampler that is to be corrected",
            )
        f = _predict(reference, "float", x, step, conditioning)
        f_hat = _predict(quantized, "quantized", x, step, conditioning)
        seen = sums.get(step)
        sums[step] = sum_noise(f, f_hat) if seen is None else seen.add(f, f_hat)
    _require_all_steps(sums, n_steps)
    _require_equal_channels(sums.values())
    return _statistics([sums[step] for step in range(n_steps)], allow_negative)


def _predict(
    predictor: Predictor[Fed], name: str, x: NDArray[np.float32], step: int, conditioning: Fed
) -> Output:
    f = predictor(x, step, conditioning)
    if f.shape != x.shape:
        raise InputError(
            "EQ-3413",
            f"the {name} network answers {f.shape} to a sample of {x.shape}",
            path=f"step {step}",
            hint="return the output after guidance, without a learned variance",
        )
    if not bool(np.isfinite(f).all()):
        raise NumericalError(
            "EQ-5401",
            f"the {name} network returns {int((~np.isfinite(f)).sum())} NaN or Inf of {f.size}",
            path=f"step {step}",
            hint="leave the layer that overflows in float; check that the sample is finite",
        )
    return f


def _require_all_steps(sums: dict[int, NoiseSums], n_steps: int) -> None:
    missing = [step for step in range(n_steps) if step not in sums]
    if missing:
        raise InputError(
            "EQ-3412",
            f"no sample at {len(missing)} of {n_steps} steps: {', '.join(map(str, missing))}",
            hint="record whole trajectories; every step needs its own statistics",
        )


def _require_equal_channels(sums: Iterable[NoiseSums]) -> None:
    channels = sorted({step.mean_f.size for step in sums})
    if len(channels) != 1:
        raise InputError(
            "EQ-3414",
            f"samples have {', '.join(map(str, channels))} channels at different steps",
            hint="draw all samples from one model",
        )


def _statistics(sums: list[NoiseSums], allow_negative: bool) -> NoiseStatistics:
    fits = [fit_noise(step, allow_negative=allow_negative) for step in sums]
    return NoiseStatistics(
        k=tuple(fit.gain_error for fit in fits),
        mu=tuple(tuple(fit.bias.tolist()) for fit in fits),
        variance=tuple(tuple(fit.variance.tolist()) for fit in fits),
        correlation=tuple(fit.correlation for fit in fits),
        n=tuple(fit.n for fit in fits),
        clamped_gain=tuple(fit.clamped_k for fit in fits),
        snr_db=tuple(snr_db(step) for step in sums),
    )
