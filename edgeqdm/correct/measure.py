"""Measures the noise that quantization adds to a network output, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from edgeqdm.errors import InputError, NumericalError
from edgeqdm.ir.record import Record
from edgeqdm.numerics.noise import (
    SNR_CAP_DB,
    Floats,
    NoiseSums,
    Output,
    fit_noise,
    snr_db,
    sum_noise,
)

Fed = TypeVar("Fed")
"""What a predictor takes beside sample and step, e.g. labels [B]; handed through untouched."""
Predictor = Callable[[NDArray[np.float32], int, Fed], Output]
"""(network input [B, C, H, W], step, conditioning) -> output after guidance, [B, C, H, W], or
[B, 2C, H, W] with a learned variance behind the prediction."""


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
    """[S]: elements per channel behind each row; 0 where nothing was measured."""
    clamped_gain: tuple[bool, ...]
    """[S]: True where the fitted k was too low to be corrected and was raised."""
    snr_db: tuple[float, ...]
    """[S]: 10 log10 of mean f^2 over mean D^2; +-300 stands for no noise or no signal."""
    output_mean: tuple[tuple[float, ...], ...]
    """[S, C]: mean of the float output f."""
    output_variance: tuple[tuple[float, ...], ...]
    """[S, C]: variance of f."""
    covariance: tuple[tuple[float, ...], ...]
    """[S, C]: covariance of the error D and f."""
    input_power: tuple[float, ...]
    """[S]: mean of x^2, x being what the network was fed."""
    input_output: tuple[float, ...]
    """[S]: mean of x f."""

    @property
    def n_steps(self) -> int:
        return len(self.k)

    def fitted_k(self, step: int) -> float:
        """The least squares slope of D on f, before any clamping; 0 where f does not vary."""
        spread = sum(self.output_variance[step])
        return sum(self.covariance[step]) / spread if spread > 0.0 else 0.0

    def residual(self, step: int, k: float) -> tuple[Floats, Floats]:
        """Mean and variance [C] of `D - k f` for any k; exactly `mu`, `variance` for its own."""
        excess = self.k[step] - k
        spread = np.array(self.output_variance[step])
        uncorrelated = np.array(self.covariance[step]) - self.k[step] * spread
        mean = np.array(self.mu[step]) + excess * np.array(self.output_mean[step])
        added = 2.0 * excess * uncorrelated + excess**2 * spread
        return mean, np.maximum(np.array(self.variance[step]) + added, 0.0)

    @model_validator(mode="after")
    def _rows_are_steps(self) -> NoiseStatistics:
        by_channel = (
            self.mu,
            self.variance,
            self.output_mean,
            self.output_variance,
            self.covariance,
        )
        by_step = (self.correlation, self.n, self.clamped_gain, self.snr_db, self.input_power)
        tables = (*by_channel, *by_step, self.input_output)
        if not self.k or any(len(table) != len(self.k) for table in tables):
            raise ValueError(f"every table must have one row per step ({len(self.k)})")
        if len({len(row) for table in by_channel for row in table}) != 1 or not self.mu[0]:
            raise ValueError("mu and all moments must have one column per channel")
        squares = (*self.variance, *self.output_variance, self.input_power)
        if min(self.k) <= -1.0 or min(min(row) for row in squares) < 0.0:
            raise ValueError("1 + k must be positive and no variance negative")
        return self


def measure_noise(
    reference: Predictor[Fed],
    quantized: Predictor[Fed],
    samples: Iterable[tuple[int, NDArray[np.float32], Fed]],
    *,
    n_steps: int,
    allow_negative: bool = False,
    allow_missing: bool = False,
) -> NoiseStatistics:
    """Statistics of `quantized - reference` at every step, both fed the same samples.

    Samples stream; only sums over them are kept. Measure last, on the final weights and scales:
    whatever changes either invalidates the statistics. Of an output with a learned variance only
    the prediction, its first C channels, is looked at.

    Args:
        reference: the float network.
        quantized: the quantized network.
        samples: (step, network input [B, C, H, W], conditioning) from trajectories of the *float*
            network, in any order, as many per step as wanted. From those of the corrected
            quantized one they give the closed loop, see `closed_loop`.
        n_steps: S; every step 0..S-1 must occur.
        allow_negative: see `fit_noise`.
        allow_missing: a step without samples gets a row of zeros with n = 0, which corrects
            nothing, instead of an error.

    Raises:
        InputError: a step is missing or out of range, or samples and outputs differ in shape.
        NumericalError: an output is NaN or Inf.

    Source: He et al. 2023, "PTQD", https://arxiv.org/abs/2305.10657, section 4; teacher-forced
    as in its published code, residual statistics as in the paper.
    """
    sums: dict[int, _StepSums] = {}
    for step, x, conditioning in samples:
        if not 0 <= step < n_steps:
            raise InputError(
                "EQ-3411",
                f"a sample is of step {step}, the sampler has steps 0 to {n_steps - 1}",
                hint="draw the samples with the sampler that is to be corrected",
            )
        f = _predict(reference, "float", x, step, conditioning)
        f_hat = _predict(quantized, "quantized", x, step, conditioning)
        seen, found = sums.get(step), _StepSums.of(x, f, f_hat)
        sums[step] = found if seen is None else seen.merge(found)
    if not (allow_missing and sums):
        _require_all_steps(sums, n_steps)
    _require_equal_channels([step.noise for step in sums.values()])
    return _statistics([sums.get(step) for step in range(n_steps)], allow_negative)


@dataclass(frozen=True, eq=False)
class _StepSums:
    noise: NoiseSums
    input_power: float
    """Sum of x^2."""
    input_output: float
    """Sum of x f."""

    @classmethod
    def of(cls, x: Output, f: Output, f_hat: Output) -> _StepSums:
        noise = sum_noise(f, f_hat)
        flat = x.astype(np.float64).ravel()
        return cls(noise, float(flat @ flat), float(flat @ f.astype(np.float64).ravel()))

    def merge(self, other: _StepSums) -> _StepSums:
        return _StepSums(
            self.noise.merge(other.noise),
            self.input_power + other.input_power,
            self.input_output + other.input_output,
        )


def _predict(
    predictor: Predictor[Fed], name: str, x: NDArray[np.float32], step: int, conditioning: Fed
) -> Output:
    f = predictor(x, step, conditioning)
    if f.shape == (len(x), 2 * x.shape[1], *x.shape[2:]):
        f = f[:, : x.shape[1]]
    if f.shape != x.shape:
        raise InputError(
            "EQ-3413",
            f"the {name} network answers {f.shape} to a sample of {x.shape}",
            path=f"step {step}",
            hint="return the output after guidance, with C channels or 2C with a learned variance",
        )
    require_finite(f, name, step)
    return f


def require_finite(output: Output, name: str, step: int) -> None:
    """Refuses an output with NaN or Inf of the network `name`."""
    if not bool(np.isfinite(output).all()):
        bad = int((~np.isfinite(output)).sum())
        raise NumericalError(
            "EQ-5401",
            f"the {name} network returns {bad} NaN or Inf of {output.size}",
            path=f"step {step}",
            hint="leave the layer that overflows in float; check that the sample is finite",
        )


def _require_all_steps(sums: Mapping[int, object], n_steps: int) -> None:
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


def _statistics(sums: list[_StepSums | None], allow_negative: bool) -> NoiseStatistics:
    n_channels = next(step.noise.mean_f.size for step in sums if step is not None)
    rows = [_row(step, n_channels, allow_negative) for step in sums]
    return NoiseStatistics(
        **{field: tuple(row[field] for row in rows) for field in NoiseStatistics.model_fields}
    )


def _row(sums: _StepSums | None, n_channels: int, allow_negative: bool) -> dict[str, Any]:
    """One row of every table."""
    if sums is None:
        return _empty_row(n_channels)
    noise = sums.noise
    fit = fit_noise(noise, allow_negative=allow_negative)
    n_elements = noise.n * n_channels
    return {
        "k": fit.gain_error,
        "mu": tuple(fit.bias.tolist()),
        "variance": tuple(fit.variance.tolist()),
        "correlation": fit.correlation,
        "n": fit.n,
        "clamped_gain": fit.clamped_k,
        "snr_db": snr_db(noise),
        "output_mean": tuple(noise.mean_f.tolist()),
        "output_variance": tuple((noise.ff / noise.n).tolist()),
        "covariance": tuple((noise.fd / noise.n).tolist()),
        "input_power": sums.input_power / n_elements,
        "input_output": sums.input_output / n_elements,
    }


def _empty_row(n_channels: int) -> dict[str, Any]:
    by_channel = dict.fromkeys(
        ("mu", "variance", "output_mean", "output_variance", "covariance"), (0.0,) * n_channels
    )
    by_step = dict.fromkeys(("k", "correlation", "input_power", "input_output"), 0.0)
    return {**by_channel, **by_step, "n": 0, "clamped_gain": False, "snr_db": SNR_CAP_DB}
