"""Which steps of a sampler can do with fewer activation bits.

Source: He et al. 2023, "PTQD", https://arxiv.org/abs/2305.10657, section 4; the rule is written
for predictions other than the noise and for contiguous phases here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from edgeqdm.correct.corrector import require_steps
from edgeqdm.correct.measure import NoiseStatistics
from edgeqdm.errors import InputError, UnsupportedError
from edgeqdm.ir.schedule import SamplerProgram
from edgeqdm.models.levels import NoiseLevels
from edgeqdm.numerics.noise import step_aware_bits


def activation_bits_by_step(
    program: SamplerProgram,
    levels: NoiseLevels,
    statistics_by_bits: Mapping[int, NoiseStatistics],
    *,
    power_ratio: bool = False,
) -> tuple[int, ...]:
    """The fewest activation bits of every step whose noise hides in that of the diffusion.

    The smallest b with SNR^Q_b > SNR^F, the largest where none satisfies. Choose, then measure
    again at the bits chosen: statistics belong to the final network. The phases of a plan are
    contiguous, see `contiguous`.

    Args:
        program: the sampler.
        levels: of signal and noise at its steps.
        statistics_by_bits: per activation width, weights as they will be.
        power_ratio: square SNR^Q, so that both ratios are powers. As published, SNR^Q is a ratio of
            amplitudes and SNR^F, `signal^2 / noise^2`, one of powers.

    Returns:
        Bits per step, [S].

    Raises:
        InputError: no bit width is offered, or statistics lack a step.
        UnsupportedError: the prediction type is unknown.
    """
    exponent = 2.0 if power_ratio else 1.0
    quantized = {
        bits: [snr**exponent for snr in quantization_snr(program, levels, statistics)]
        for bits, statistics in statistics_by_bits.items()
    }
    pairs = zip(levels.signal.tolist(), levels.noise.tolist(), strict=True)
    forward = [(signal / noise) ** 2 if noise > 0.0 else math.inf for signal, noise in pairs]
    return step_aware_bits(quantized, forward)


def quantization_snr(
    program: SamplerProgram, levels: NoiseLevels, statistics: NoiseStatistics
) -> tuple[float, ...]:
    """SNR^Q of every step, `||eps_hat|| / ||D_eps||`, a ratio of amplitudes.

    D_eps is what is left of the error of eps_hat after correction with gain and bias. Where the
    network predicts something else, `eps_hat = p x + q f` and so `D_eps = q D`:

        epsilon   p = 0           q = 1
        v         p = noise       q = signal
        sample    p = 1 / noise   q = -signal / noise
        flow      p = 1           q = 1 - sigma

    Args:
        program: the sampler.
        levels: of signal and noise at its steps.
        statistics: of every step.

    Returns:
        [S]; inf where nothing is left of the error.

    Raises:
        InputError: statistics lack a step.
        UnsupportedError: the prediction type is unknown.
    """
    _check(program, statistics)
    rows = zip(levels.signal.tolist(), levels.noise.tolist(), strict=True)
    return tuple(
        _step_snr(*_eps_weights(program.prediction_type, signal, noise), statistics, step)
        for step, (signal, noise) in enumerate(rows)
    )


def _check(program: SamplerProgram, statistics: NoiseStatistics) -> None:
    require_steps(program, statistics)
    unmeasured = [step for step, n in enumerate(statistics.n) if n == 0]
    if unmeasured:
        raise InputError(
            "EQ-3433",
            f"nothing was measured at steps {', '.join(map(str, unmeasured))}",
            path="statistics",
            hint="measure every bit width at every step",
        )


def _step_snr(p: float, q: float, statistics: NoiseStatistics, step: int) -> float:
    mean, variance = statistics.output_mean[step], statistics.output_variance[step]
    output_power = sum(m**2 + v for m, v in zip(mean, variance, strict=True)) / len(mean)
    cross = 2.0 * p * q * statistics.input_output[step]
    eps_power = p**2 * statistics.input_power[step] + cross + q**2 * output_power
    left = statistics.variance[step]
    error = abs(q) * math.sqrt(sum(left) / len(left)) / (1.0 + statistics.k[step])
    return math.sqrt(max(eps_power, 0.0)) / error if error > 0.0 else math.inf


def _eps_weights(prediction_type: str, signal: float, noise: float) -> tuple[float, float]:
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return noise, signal
    if prediction_type == "sample":
        return 1.0 / noise, -signal / noise
    if prediction_type == "flow_prediction":
        return 1.0, signal
    raise unknown_prediction(prediction_type)


def unknown_prediction(prediction_type: str) -> UnsupportedError:
    """To be raised where signal and noise must be told from a prediction."""
    return UnsupportedError(
        "EQ-4431",
        f"how noise follows from a prediction of type {prediction_type!r} is not known",
        path="prediction_type",
        hint="give every step the same bits, and do not match the variance",
    )


def contiguous(bits: Sequence[int], *, min_run: int = 1) -> tuple[int, ...]:
    """Bits whose runs of equal steps are long enough to be phases.

    Of all choices that give no step fewer bits than it has and whose runs are at least `min_run`
    long, the one with the fewest bits in total; of those, the one with the fewest runs.

    Args:
        bits: per step, [S].
        min_run: least length of a run; one run of the largest bits where there are fewer steps.

    Raises:
        InputError: there is no step, or `min_run` is below 1.
    """
    if len(bits) == 0 or min_run < 1:
        raise InputError(
            "EQ-3434",
            f"{len(bits)} steps cannot be split into runs of at least {min_run}",
            path="min_run",
            hint="give at least one step, and runs of at least 1",
        )
    starts = _run_starts(bits, min(min_run, len(bits)))
    runs = [bits[start:end] for start, end in pairwise([*starts, len(bits)])]
    return tuple(max(run) for run in runs for _ in run)


def _run_starts(bits: Sequence[int], least: int) -> list[int]:
    """First step of every run, by dynamic programming over where the last run starts."""
    # best[end]: (bits in total, number of runs, start of the last run) of the steps before end.
    best: list[tuple[float, int, int]] = [(0, 0, 0)]
    for end in range(1, len(bits) + 1):
        highest, found = 0, (math.inf, 0, 0)
        for start in range(end - 1, -1, -1):
            highest = max(highest, bits[start])
            if end - start >= least:
                total, runs, _ = best[start]
                found = min(found, (total + highest * (end - start), runs + 1, start))
        best.append(found)
    starts = [best[-1][2]]
    while starts[0] > 0:
        starts.insert(0, best[starts[0]][2])
    return starts
