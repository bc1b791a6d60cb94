"""Quantization noise of a network output: how it is fitted, and what a sampler may absorb of it.

The noise `D = f_hat - f` of a quantized output f_hat against the float output f is modelled as

    D = k f + D'        D' ~ N(mu_c, sigma_q,c^2), uncorrelated with f

Source: He et al. 2023, "PTQD", https://arxiv.org/abs/2305.10657, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeqdm.errors import InputError

Floats = NDArray[np.float64]
Output = NDArray[np.floating[Any]]

LOWEST_NEGATIVE_K = -0.5
"""With `allow_negative`, the correction never multiplies an output by more than 2."""
SNR_CAP_DB = 300.0
"""Stands for "no noise" (and, negated, "no signal"), so that every ratio is a finite number.
Float32 outputs that differ at all lie below it."""
_SMALLEST_RELATIVE_SPREAD = 1e-12
# A channel mean in float64 is rounded; a spread this far below the mean is that rounding, and its
# regression slope would be noise over noise. Float32 outputs resolve 6e-8.


@dataclass(frozen=True, eq=False)
class NoiseSums:
    """What a noise fit needs of all outputs seen so far; sums merge, so outputs may stream.

    Held as means and centred sums, because raw sums of squares cancel when a mean is large.

    Attributes:
        n: elements seen per channel, B H W.
        mean_f: mean of f, [C].
        mean_d: mean of D = f_hat - f, [C].
        ff: sum of (f - mean_f)^2, [C].
        fd: sum of (f - mean_f)(D - mean_d), [C].
        dd: sum of (D - mean_d)^2, [C].
    """

    n: int
    mean_f: Floats
    mean_d: Floats
    ff: Floats
    fd: Floats
    dd: Floats

    def add(self, f: Output, f_hat: Output) -> NoiseSums:
        """These sums with the outputs [B, C, H, W] of one more batch."""
        return self.merge(sum_noise(f, f_hat))

    def merge(self, other: NoiseSums) -> NoiseSums:
        """Sums of both sets of outputs together.

        Raises:
            InputError: the channel counts differ.

        Source: Chan, Golub, LeVeque 1983, "Algorithms for Computing the Sample Variance".
        """
        if self.mean_f.shape != other.mean_f.shape:
            raise InputError(
                "EQ-3401",
                f"outputs with {self.mean_f.size} and {other.mean_f.size} channels cannot be "
                "merged",
                hint="measure the outputs of one model",
            )
        n = self.n + other.n
        share = other.n / n
        shift_f, shift_d = other.mean_f - self.mean_f, other.mean_d - self.mean_d
        weight = self.n * share
        return NoiseSums(
            n=n,
            mean_f=self.mean_f + share * shift_f,
            mean_d=self.mean_d + share * shift_d,
            ff=self.ff + other.ff + weight * shift_f**2,
            fd=self.fd + other.fd + weight * shift_f * shift_d,
            dd=self.dd + other.dd + weight * shift_d**2,
        )


def sum_noise(f: Output, f_hat: Output) -> NoiseSums:
    """Sums of one batch.

    Args:
        f: float output after guidance, [B, C, H, W].
        f_hat: quantized output for the same input, [B, C, H, W].

    Raises:
        InputError: the shapes differ, are not [B, C, H, W], or hold no element.
    """
    if f.shape != f_hat.shape or f.ndim != 4 or f.size == 0:
        raise InputError(
            "EQ-3401",
            f"float and quantized output must both be [B, C, H, W], found {f.shape} and "
            f"{f_hat.shape}",
            hint="pass the outputs of both models for one input, after guidance",
        )
    signal = f.astype(np.float64)
    noise = f_hat.astype(np.float64) - signal
    mean_f, mean_d = signal.mean((0, 2, 3)), noise.mean((0, 2, 3))
    signal -= mean_f[:, None, None]
    noise -= mean_d[:, None, None]
    return NoiseSums(
        n=f.size // f.shape[1],
        mean_f=mean_f,
        mean_d=mean_d,
        ff=np.square(signal).sum((0, 2, 3)),
        fd=(signal * noise).sum((0, 2, 3)),
        dd=np.square(noise).sum((0, 2, 3)),
    )


@dataclass(frozen=True, eq=False)
class NoiseFit:
    """The noise model of one step.

    Attributes:
        gain_error: k, the part of D that follows f; the value to correct with.
        bias: mu, mean of D - k f, [C].
        variance: sigma_q^2, variance of D - k f, [C].
        clamped_k: True where the fitted k was below what may be corrected and was raised.
        correlation: Pearson r of D and f about their channel means, before any clamping.
        n: elements per channel behind the fit.
    """

    gain_error: float
    bias: Floats
    variance: Floats
    clamped_k: bool
    correlation: float
    n: int


def fit_noise(sums: NoiseSums, *, allow_negative: bool = False) -> NoiseFit:
    """Least squares of D on f with one slope k and one intercept mu_c per channel.

    One common intercept would let the channel means of D and f leak into k. Bias and variance are
    those of the residual for the k that is used, so they stay right where k is clamped.

    Args:
        sums: outputs of one step.
        allow_negative: keep k < 0 down to -0.5. By default it becomes 0, because dividing by less
            than 1 amplifies D' (PTQD section 4).

    Returns:
        k = 0 where f does not vary within any channel: nothing can be told about k there.
    """
    fitted, correlation = _regress(sums)
    k = max(fitted, LOWEST_NEGATIVE_K if allow_negative else 0.0)
    residual = sums.dd - 2.0 * k * sums.fd + k**2 * sums.ff
    return NoiseFit(
        gain_error=k,
        bias=sums.mean_d - k * sums.mean_f,
        variance=np.maximum(residual, 0.0) / sums.n,
        clamped_k=k != fitted,
        correlation=correlation,
        n=sums.n,
    )


def _regress(sums: NoiseSums) -> tuple[float, float]:
    ff, fd, dd = float(sums.ff.sum()), float(sums.fd.sum()), float(sums.dd.sum())
    if ff <= _SMALLEST_RELATIVE_SPREAD**2 * sums.n * float(np.square(sums.mean_f).sum()):
        return 0.0, 0.0
    scale = math.sqrt(ff) * math.sqrt(dd)
    correlation = min(max(fd / scale, -1.0), 1.0) if scale > 0.0 else 0.0
    return fd / ff, correlation


def snr_db(sums: NoiseSums) -> float:
    """Signal to noise ratio of the quantized output, `10 log10(E f^2 / E D^2)`.

    Returns:
        dB within +-SNR_CAP_DB; the cap itself where D is 0, its negative where only f is 0.
    """
    noise = float((sums.dd + sums.n * np.square(sums.mean_d)).sum())
    signal = float((sums.ff + sums.n * np.square(sums.mean_f)).sum())
    if noise == 0.0:
        return SNR_CAP_DB
    if signal == 0.0:
        return -SNR_CAP_DB
    ratio = 10.0 * (math.log10(signal) - math.log10(noise))
    return min(max(ratio, -SNR_CAP_DB), SNR_CAP_DB)


def reduced_noise_std(
    noise_std: float, output_weight: float, variance: Floats, k: float, *, cap: float = 1.0
) -> tuple[Floats, bool]:
    """Noise a step has left to add after quantization noise has added some already.

    D' reaches the next sample as `output_weight / (1 + k)` times itself, so

        s'^2 = max(sigma^2 - B^2 sigma_q^2 / (1 + k)^2, 0)

    keeps the variance of the step. B keeps the original sigma; only what is drawn is reduced.

    Args:
        noise_std: sigma of the step; 0 stays 0, there is nothing to absorb with.
        output_weight: B, weight of the network output in the next sample.
        variance: sigma_q^2, [C].
        k: gain error that the output is corrected with; 1 + k > 0.
        cap: largest share of sigma^2 that may be absorbed, 0..1.

    Returns:
        `(std, clamped)`: s' [C], never above noise_std and equal to it where the variance is 0;
        and whether in any channel the quantization noise exceeds what may be absorbed.

    Raises:
        InputError: 1 + k <= 0, a negative or infinite variance or noise_std, a cap outside 0..1.

    Source: PTQD section 4, written for any step that is linear in its output. Unlike the
    published code, which puts s' into the direction term of DDIM too and so adds variance.
    """
    _check_budget(noise_std, variance, k, cap)
    if noise_std == 0.0:
        return np.zeros_like(variance), False
    with np.errstate(over="ignore"):
        absorbed = np.square(np.sqrt(variance) * (abs(output_weight) / (1.0 + k)) / noise_std)
    # As a share of sigma^2 rather than a difference: exact where nothing is absorbed.
    return noise_std * np.sqrt(1.0 - np.minimum(absorbed, cap)), bool((absorbed > cap).any())


def _check_budget(noise_std: float, variance: Floats, k: float, cap: float) -> None:
    budget = np.append(variance, noise_std)
    if not bool((np.isfinite(budget) & (budget >= 0.0)).all()):
        raise InputError(
            "EQ-3402",
            f"noise must be finite and >= 0, found noise_std {noise_std}, variance {variance}",
            hint="measure the quantization noise again",
        )
    if not 1.0 + k > 0.0:
        raise InputError(
            "EQ-3402",
            f"the gain error k is {k}; an output cannot be divided by 1 + k <= 0",
            hint="fit k with fit_noise, which keeps it in range",
        )
    if not 0.0 <= cap <= 1.0:
        raise InputError("EQ-3402", f"cap is {cap}", hint="give the share of the variance, 0 to 1")


def step_aware_bits(
    snr_quantized: Mapping[int, Sequence[float]], snr_forward: Sequence[float]
) -> tuple[int, ...]:
    """Activation bits of every step: the fewest whose quantization noise hides in the diffusion's.

    The smallest b with `snr_quantized[b][i] > snr_forward[i]`; the largest b where none satisfies.

    Args:
        snr_quantized: per bit width, `||f|| / ||D_b||` of every step, [S]: a ratio of amplitudes.
            Take D after correction, then measure again with the bits chosen.
        snr_forward: `alpha_bar / (1 - alpha_bar)` of every step, [S]: a ratio of powers. The two
            units differ as published.

    Returns:
        Bits per step, [S].

    Raises:
        InputError: no bit width is offered, a table has another length, or holds a NaN.

    Source: PTQD section 4.
    """
    if not snr_quantized:
        raise InputError("EQ-3403", "no bit width to choose from", hint="measure one or more")
    for name, table in [("forward", snr_forward), *snr_quantized.items()]:
        if len(table) != len(snr_forward) or any(math.isnan(value) for value in table):
            raise InputError(
                "EQ-3403",
                f"a table of ratios has {len(table)} rows for {len(snr_forward)} steps, or a NaN",
                path=f"snr of {name}",
                hint="measure every bit width at every step",
            )
    ascending = sorted(snr_quantized)
    return tuple(
        next((b for b in ascending if snr_quantized[b][step] > forward), ascending[-1])
        for step, forward in enumerate(snr_forward)
    )
