"""Keeps the variance of the samples, which a quantized network shrinks step by step.

A network fitted to another one by least squares, in training above all, answers with less variance
the larger its error is: at best `Var f_hat = Var f - E D^2`. Each step loses little of what samples
differ by, and all steps together visibly much: images stay close to those of the float model and
are all a little nearer to their mean.

What a step says of the clean sample, u = f - c x, is therefore scaled by

    r = sqrt(Var u_float / Var u),    f <- r u + c x

with c the output that would say nothing of it (x0_hat = 0). Variances are those over runs, at each
element, of the quantized sampler with all earlier steps corrected, and of the float sampler from
the same noise.

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

from edgeqdm.correct.steps import unknown_prediction
from edgeqdm.errors import InputError
from edgeqdm.ir.schedule import CorrectedSchedule, SamplerProgram
from edgeqdm.models.levels import NoiseLevels
from edgeqdm.numerics import solver

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
Value = TypeVar("Value")
LARGEST_CHANGE = 2.0
"""Of r, up or down: beyond it the outputs have nothing to do with each other."""


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
        InputError: the correction or the runs have another number of steps than the program.
        UnsupportedError: the prediction type is unknown.
    """
    if not len(correction.gain) == len(runs.inputs) == program.n_steps:
        raise InputError(
            "EQ-3434",
            f"a correction of {len(correction.gain)} steps and runs of {len(runs.inputs)}, the "
            f"sampler has {program.n_steps}",
            hint="collect the runs and measure the correction with this sampler",
        )
    silent = _silent_outputs(program, levels)
    matched = correction.model_copy(update={"input_weight": (0.0,) * program.n_steps})
    channels = runs.inputs.shape[2]
    plain = _table(program, None)
    samples: deque[Array] = deque(maxlen=plain.sample_weights.shape[1])
    outputs: deque[Array] = deque(maxlen=plain.output_weights.shape[1])
    sample = runs.inputs[0] / plain.input_scale[0]
    for step in range(program.n_steps):
        fed = plain.input_scale[step] * sample
        found = np.asarray(quantized(fed, step), np.float32)
        f_hat, variance = found[:, :channels], found[:, channels:]
        f = runs.outputs[step, :, :channels]
        before = solver.correct(_table(program, matched), step, f_hat, fed)
        matched = _with_step(matched, step, silent[step], (before, fed), (f, runs.inputs[step]))
        if progress is not None:
            progress(step + 1, program.n_steps)
        if step + 1 == program.n_steps:
            break
        table = _table(program, matched)
        samples.appendleft(sample)
        outputs.appendleft(solver.correct(table, step, f_hat, fed))
        noise = _drawn(plain, step, runs) if plain.adds_noise(step) else None
        sample = solver.advance(table, step, tuple(samples), tuple(outputs), noise, variance)
    return matched


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
    r = 1.0
    # Without noise left, or without signal yet, an output says nothing or all of the clean sample.
    if np.isfinite(silent):
        spread = [_variance(f.astype(np.float64) - silent * x) for f, x in (mine, wanted)]
        if min(spread) > 0.0:
            r = float(np.clip(np.sqrt(spread[1] / spread[0]), 1 / LARGEST_CHANGE, LARGEST_CHANGE))
    weight = (1.0 - r) * silent if r != 1.0 else 0.0
    excess = r * mine[0].astype(np.float64) + weight * mine[1] - wanted[0]
    gain = r * correction.gain[step]
    bias = np.array(correction.bias[step]) + excess.mean((0, 2, 3)) / gain
    return correction.model_copy(
        update={
            "gain": _replaced(correction.gain, step, gain),
            "bias": _replaced(correction.bias, step, tuple(bias.tolist())),
            "input_weight": _replaced(correction.input_weight or (), step, weight),
        }
    )


def _replaced(row: tuple[Value, ...], step: int, value: Value) -> tuple[Value, ...]:
    return (*row[:step], value, *row[step + 1 :])


def _variance(values: Floats) -> float:
    return float(((values - values.mean(0)) ** 2).sum())


def _drawn(plain: solver.Table, step: int, runs: FloatRuns) -> Array:
    """The noise of a step, z, from where it led the float sampler."""
    channels = runs.inputs.shape[2]

    def newest(steps: int, table: Array) -> tuple[Array, ...]:
        return tuple(table[i] for i in range(step, max(step - steps, -1), -1))

    scale = plain.input_scale.reshape(-1, 1, 1, 1, 1)
    samples = newest(plain.sample_weights.shape[1], runs.inputs / scale)
    outputs = newest(plain.output_weights.shape[1], runs.outputs[:, :, :channels])
    variance = runs.outputs[step, :, channels:]
    zero = np.zeros_like(samples[0])
    still = solver.advance(plain, step, samples, outputs, zero, variance)
    std = solver.advance(plain, step, samples, outputs, zero + 1, variance) - still
    moved = runs.inputs[step + 1] / plain.input_scale[step + 1] - still
    z: Array = np.divide(moved, std, out=zero, where=std > 0)
    return z


def _table(program: SamplerProgram, correction: CorrectedSchedule | None) -> solver.Table:
    return solver.Table.from_json(
        program.model_dump(mode="json"),
        None if correction is None else correction.model_dump(mode="json"),
    )
