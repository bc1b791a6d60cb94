"""Keeps the variance of the samples, which a quantized network changes step by step.

A network fitted to another one by least squares, in training above all, answers with less variance
the larger its error is: at best `Var f_hat = Var f - E D^2`. Each step loses little of what samples
differ by, and all steps together visibly much: images stay close to those of the float model and
are all a little nearer to their mean.

What a step says of the clean sample, u = f - c x, is therefore scaled by

    r = sqrt(Var u_float / Var u),    f <- r u + c x - m

with c the output that would say nothing of it (x0_hat = 0) and m what moves the mean of f to that
of the float model. Var is what runs differ by at the same element, summed over all elements: of the
quantized sampler, with all earlier steps corrected, and of the float sampler from the same noise.

Errors that do not follow the output add to Var u instead, and are scaled down with it. The variance
that PTQD takes out of the noise of a stochastic sampler for them is not given back.

Source: edgeqdm's own. The gain of He et al. 2023, "PTQD", https://arxiv.org/abs/2305.10657, is
that of one step on the float sampler's samples, and scales what is known of the noise too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeqdm.correct.closed_loop import sampler_table
from edgeqdm.correct.measure import require_finite
from edgeqdm.correct.steps import unknown_prediction
from edgeqdm.errors import InputError
from edgeqdm.ir.schedule import CorrectedSchedule, SamplerProgram
from edgeqdm.models.levels import NoiseLevels
from edgeqdm.numerics import solver

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
Value = TypeVar("Value")
LARGEST_CHANGE = 1.25
"""Of r, up or down. At the noisiest steps of a network that predicts the noise, u is smaller than
the error of f: there the variance is that of the error and says nothing of the samples'."""


@dataclass(frozen=True, eq=False)
class FloatRuns:
    """Runs of the float sampler, all of them at every step.

    Attributes:
        inputs: what the network was fed, float32 [S, N, C, H, W].
        outputs: network output after guidance, float32 [S, N, C, H, W]; 2C channels with a learned
            variance.
    """

    inputs: Array
    outputs: Array


def match_variance(
    program: SamplerProgram,
    levels: NoiseLevels,
    correction: CorrectedSchedule,
    quantized: Callable[[Array, int], Array],
    runs: FloatRuns,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> CorrectedSchedule:
    """The correction, and after it the factor and bias that keep the float sampler's moments.

    Args:
        program: the sampler.
        levels: of signal and noise at its steps.
        correction: what is done to the outputs before.
        quantized: (network input [N, C, H, W] of all runs, step) -> output after guidance.
        runs: of the float sampler, at least two; with one there is no variance, and r is 1.
        progress: called after every step with (done, total).

    Raises:
        InputError: the correction, the levels or the runs have another number of steps than the
            program.
        NumericalError: an output is NaN or Inf; names the step.
        UnsupportedError: the prediction type is unknown.
    """
    _require_steps(program, levels, correction, runs)
    silent = _silent_outputs(program, levels)
    weights = correction.input_weight or (0.0,) * program.n_steps
    matched = correction.model_copy(update={"input_weight": weights})
    channels = runs.inputs.shape[2]
    plain, table = sampler_table(program, None), sampler_table(program, matched)
    samples: deque[Array] = deque(maxlen=plain.sample_weights.shape[1])
    outputs: deque[Array] = deque(maxlen=plain.output_weights.shape[1])
    sample = runs.inputs[0] / plain.input_scale[0]
    for step in range(program.n_steps):
        fed = plain.input_scale[step] * sample
        found = np.asarray(quantized(fed, step), np.float32)
        require_finite(found, "quantized", step)
        f_hat, variance = found[:, :channels], found[:, channels:]
        mine = solver.correct(table, step, f_hat, fed), fed
        wanted = runs.outputs[step, :, :channels], runs.inputs[step]
        matched = _with_step(matched, step, silent[step], mine, wanted)
        if progress is not None:
            progress(step + 1, program.n_steps)
        if step + 1 == program.n_steps:
            break
        table = sampler_table(program, matched)
        samples.appendleft(sample)
        outputs.appendleft(solver.correct(table, step, f_hat, fed))
        noise = _drawn(plain, step, runs) if plain.adds_noise(step) else None
        sample = solver.advance(table, step, tuple(samples), tuple(outputs), noise, variance)
    return matched


def _require_steps(
    program: SamplerProgram, levels: NoiseLevels, correction: CorrectedSchedule, runs: FloatRuns
) -> None:
    counts = {
        "correction": len(correction.gain),
        "levels": len(levels.noise),
        "inputs": len(runs.inputs),
        "outputs": len(runs.outputs),
    }
    for name, count in counts.items():
        if count != program.n_steps:
            raise InputError(
                "EQ-3435",
                f"{count} steps, the sampler has {program.n_steps}",
                path=name,
                hint="collect the runs and measure the correction with this sampler",
            )


def _silent_outputs(program: SamplerProgram, levels: NoiseLevels) -> Floats:
    """c [S], by which an input is multiplied to be the output that says `x0_hat = 0`."""
    signal, noise = levels.signal, levels.noise
    with np.errstate(divide="ignore"):
        by_type = {
            "epsilon": 1.0 / noise,
            "v_prediction": signal / noise,
            "sample": np.zeros_like(noise),
            "flow_prediction": 1.0 / noise,
        }
    if program.prediction_type not in by_type:
        raise unknown_prediction(program.prediction_type)
    return by_type[program.prediction_type]


def _with_step(
    correction: CorrectedSchedule,
    step: int,
    silent: float,
    mine: tuple[Array, Array],
    wanted: tuple[Array, Array],
) -> CorrectedSchedule:
    """The correction with one more step matched, from (output, network input) of both samplers."""
    r = _factor(silent, mine, wanted)
    added = (1.0 - r) * silent if r != 1.0 else 0.0
    excess = r * mine[0].astype(np.float64) + added * mine[1] - wanted[0]
    gain = r * correction.gain[step]
    bias = np.array(correction.bias[step]) + excess.mean((0, 2, 3)) / gain
    weights = correction.input_weight or ()
    return correction.model_copy(
        update={
            "gain": _replaced(correction.gain, step, gain),
            "bias": _replaced(correction.bias, step, tuple(bias.tolist())),
            "input_weight": _replaced(weights, step, float(r * weights[step] + added)),
        }
    )


def _factor(silent: float, mine: tuple[Array, Array], wanted: tuple[Array, Array]) -> float:
    """r, or 1 where the variances cannot be compared."""
    # c is infinite without noise left, where an output says nothing of the clean sample.
    if not np.isfinite(silent):
        return 1.0
    spread, whole = (_variance(f.astype(np.float64) - silent * x) for f, x in (mine, wanted))
    r = float(np.sqrt(whole / spread)) if spread > 0.0 else 1.0
    return r if 1.0 / LARGEST_CHANGE <= r <= LARGEST_CHANGE else 1.0


def _replaced(row: tuple[Value, ...], step: int, value: Value) -> tuple[Value, ...]:
    return (*row[:step], value, *row[step + 1 :])


def _variance(values: Floats) -> float:
    return float(((values - values.mean(0)) ** 2).sum())


def _drawn(plain: solver.Table, step: int, runs: FloatRuns) -> Array:
    """The noise of a step, z, from where it led the float sampler."""
    channels = runs.inputs.shape[2]

    def newest(table: Array) -> range:
        return range(step, max(step - table.shape[1], -1), -1)

    samples = [runs.inputs[i] / plain.input_scale[i] for i in newest(plain.sample_weights)]
    outputs = [runs.outputs[i, :, :channels] for i in newest(plain.output_weights)]
    variance = runs.outputs[step, :, channels:]
    zero = np.zeros_like(samples[0])
    still = solver.advance(plain, step, samples, outputs, zero, variance)
    std = solver.advance(plain, step, samples, outputs, zero + 1, variance) - still
    moved = runs.inputs[step + 1] / plain.input_scale[step + 1] - still
    z: Array = np.divide(moved, std, out=zero, where=std > 0)
    return z
