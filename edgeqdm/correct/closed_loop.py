"""A second pass of noise measurement, along the samples that the quantized network really meets.

The first pass feeds both networks what the float sampler produced. On a device the corrected
quantized sampler produces the samples, and they drift. Here that sampler runs, and the float
network only says what would have been right at each of its samples.

Source: edgeqdm's own extension of He et al. 2023, "PTQD", https://arxiv.org/abs/2305.10657, whose
statistics are those of the float trajectories.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from edgeqdm.correct.measure import Fed, NoiseStatistics, Predictor, measure_noise
from edgeqdm.errors import InputError
from edgeqdm.ir.schedule import CorrectedSchedule, SamplerProgram
from edgeqdm.numerics import philox, solver

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Recorded(Generic[Fed]):
    """What came with a sample of the closed loop.

    Attributes:
        conditioning: what both networks are given beside the sample.
        output: what the quantized network answered, [B, C, H, W]; it need not be asked again.
    """

    conditioning: Fed
    output: Array


def closed_loop_samples(
    program: SamplerProgram,
    correction: CorrectedSchedule | None,
    quantized: Predictor[Fed],
    runs: Iterable[tuple[Sequence[int], Fed]],
    *,
    sample_shape: tuple[int, ...],
    seed: int,
) -> Iterator[tuple[int, Array, Recorded[Fed]]]:
    """Run the corrected quantized sampler and yield what its network was fed.

    Args:
        program: the sampler.
        correction: its present correction; None for the plain sampler.
        quantized: the quantized network.
        runs: (numbers of the images, their conditioning), one batch after another. A batch is
            sampled to its end before it is yielded, so that its S inputs and outputs are held.
        sample_shape: (C, H, W).
        seed: of the initial and step noise, the same that `philox` gives a device. Take another
            than that of the trajectories of the first pass.

    Yields:
        (step, network input [B, C, H, W], conditioning and quantized output).

    Raises:
        InputError: the correction has another number of steps than the program.
    """
    table = sampler_table(program, correction)
    for images, conditioning in runs:
        yield from _run(table, quantized, images, conditioning, sample_shape, seed)


def second_pass(
    program: SamplerProgram,
    correction: CorrectedSchedule | None,
    reference: Predictor[Fed],
    quantized: Predictor[Fed],
    runs: Iterable[tuple[Sequence[int], Fed]],
    *,
    sample_shape: tuple[int, ...],
    seed: int,
    allow_negative: bool = False,
) -> NoiseStatistics:
    """Noise statistics along the corrected quantized sampler's own samples.

    They are those of the uncorrected network, as in the first pass, so the corrector takes them in
    place of the first ones. The key of the correction does not change.

    Args:
        program: the sampler.
        correction: from the statistics of the first pass.
        reference: the float network.
        quantized: the quantized network.
        runs: see `closed_loop_samples`.
        sample_shape: (C, H, W).
        seed: see `closed_loop_samples`.
        allow_negative: see `fit_noise`.

    Raises:
        InputError: the correction has another number of steps, or there are no runs.
        NumericalError: an output is NaN or Inf.
    """

    def reference_of(x: Array, step: int, fed: Recorded[Fed]) -> Array:
        return np.asarray(reference(x, step, fed.conditioning), np.float32)

    return measure_noise(
        reference_of,
        lambda x, step, fed: fed.output,
        closed_loop_samples(
            program, correction, quantized, runs, sample_shape=sample_shape, seed=seed
        ),
        n_steps=program.n_steps,
        allow_negative=allow_negative,
    )


def sampler_table(program: SamplerProgram, correction: CorrectedSchedule | None) -> solver.Table:
    """The table to sample with; refuses a correction of another number of steps."""
    if correction is not None and len(correction.gain) != program.n_steps:
        raise InputError(
            "EQ-3431",
            f"a correction of {len(correction.gain)} steps, the sampler has {program.n_steps}",
            hint="correct this sampler first, with statistics of its float trajectories",
        )
    return solver.Table.from_json(
        program.model_dump(mode="json"),
        None if correction is None else correction.model_dump(mode="json"),
    )


def _run(
    table: solver.Table,
    quantized: Predictor[Fed],
    images: Sequence[int],
    conditioning: Fed,
    shape: tuple[int, ...],
    seed: int,
) -> list[tuple[int, Array, Recorded[Fed]]]:
    found: list[tuple[int, Array, Recorded[Fed]]] = []

    def predict(x: Array, step: int) -> Array:
        output = np.array(quantized(x, step, conditioning), np.float32)
        found.append((step, np.array(x), Recorded(conditioning, output)))
        return output

    solver.run(
        table,
        predict,
        philox.batch_normal(seed, philox.INITIAL_STREAM, images, shape),
        lambda step: philox.batch_normal(seed, philox.step_stream(step), images, shape),
    )
    return found
