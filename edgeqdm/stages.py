"""The stages between a float model and a quantized one, each usable alone.

calibrate -> quantize (-> finetune) -> measure -> correct
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from numpy import float32
from numpy.typing import NDArray
from torch import Tensor

from edgeqdm import __version__
from edgeqdm.calibrate.observe import (
    LayerObservation,
    load_observations,
    observe,
    save_observations,
)
from edgeqdm.calibrate.select import (
    Selection,
    allocate,
    load_selection,
    record_features,
    save_selection,
    select,
)
from edgeqdm.calibrate.trajectories import (
    CHUNK,
    Trajectories,
    collect_trajectories,
    load_tensors,
    save_tensors,
)
from edgeqdm.correct.apply import correct_schedule
from edgeqdm.correct.closed_loop import second_pass
from edgeqdm.correct.corrector import Corrector
from edgeqdm.correct.match import FloatRuns, match_variance
from edgeqdm.correct.measure import NoiseStatistics, measure_noise
from edgeqdm.correct.steps import activation_bits_by_step, contiguous
from edgeqdm.emit.package import correction_key
from edgeqdm.emit.writer import check_file_destination
from edgeqdm.errors import InputError, UnsupportedError
from edgeqdm.ir.codec import digest, dump_record, parse_record
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, W8A8, ActivationPolicy, Precision
from edgeqdm.ir.record import Record
from edgeqdm.ir.schedule import CorrectedSchedule, SamplerProgram
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.levels import NoiseLevels, noise_levels
from edgeqdm.numerics.noise import SNR_CAP_DB
from edgeqdm.quantize import finetune as finetuning
from edgeqdm.quantize import quantizer
from edgeqdm.quantize.blocks import most_reused
from edgeqdm.quantize.finetune import Finetuned, FinetuneSettings
from edgeqdm.quantize.fold import dependence, table_cost
from edgeqdm.quantize.group_plan import GroupPlan, plan_groups
from edgeqdm.quantize.group_search import GroupSearchSettings
from edgeqdm.quantize.plans import FINE_BITS, default_plan, with_activation_bits
from edgeqdm.quantize.quantizer import QuantizedDenoiser, Ranges, precision_digest
from edgeqdm.quantize.reconstruct import BlockReport, ReconstructionSettings, reconstruct
from edgeqdm.quantize.store import load_quantized, save_quantized
from edgeqdm.quantize.tdq import ScaleGenerator, fit_generator

Kept = TypeVar("Kept", bound=Record)
Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""
DEFAULT_TARGET = "onnxruntime"
DEFAULT_SAMPLES = 64
CLOSED_LOOP_SEED = 2**49
UNSEEN_SEED = 2**50
"""Of trajectories that a network was not trained on, combined with those it was."""
SHORTEST_PHASE = 2
"""Steps."""
FINE_SHARE = 0.1
"""Of the body's weights: 4 more bits for them are at most 1.3 % of the float32 bytes. In W4A8
rounded to nearest, 8 bits in down_blocks.0 and up_blocks.2 of `unet-fmnist`, which hold the finest
resolution, are worth 7 dB at the last step and 6 dB in the images; in up_blocks.0, up_blocks.1 or
all attention they are worth less than 1 dB each."""


@dataclass(frozen=True)
class Calibration:
    """What the float model does along its own trajectories."""

    trajectories: Trajectories
    observations: dict[str, LayerObservation]


def calibrate(
    denoiser: Denoiser,
    *,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Sample `samples` full-precision trajectories and record every layer's range at every step.

    Args:
        denoiser: the float model.
        samples: number of trajectories.
        seed: of noise and conditioning.
        work: folder for finished parts; the same call goes on from them.
        progress: told of finished work.

    Raises:
        StorageError: if a finished part is damaged or was edited; names the file. So does every
            stage that keeps one.
    """
    trajectories = collect_trajectories(
        denoiser, samples, seed=seed, work=work, progress=stage("trajectories", progress)
    )
    names = tuple(layer.name for layer in denoiser.info.layers)
    key = _key(__version__, trajectories.key(), digest(denoiser.info), digest(denoiser.program))
    file = None if work is None else work / f"observations-{key}.st"
    found = None if file is None else load_observations(file)
    if found is None:
        found = observe(denoiser, trajectories, names, progress=stage("observe", progress))
        if file is not None:
            save_observations(found, file)
    return Calibration(trajectories, found)


@dataclass(frozen=True)
class Method:
    """How codes and scales are decided.

    Attributes:
        ranges: first scales by least error, or by the extremes (the plain baseline).
        mlp: scales of temporal activations come from a small network of the timestep (TDQ), so
            that they can be tabulated again for other steps.
        reconstruction: round weights block by block so that outputs stay (EDA-DM); None rounds to
            the nearest.
        selected: samples of the trajectories that reconstruction sees.
        density: choose them by density and diversity (EDA-DM), or evenly over the steps.
    """

    ranges: Ranges = "search"
    mlp: bool = False
    reconstruction: ReconstructionSettings | None = None
    selected: int = 512
    density: bool = True


@dataclass(frozen=True)
class Quantization:
    """A quantized denoiser and how it came about.

    Attributes:
        quantized: the denoiser.
        blocks: what reconstruction did to every block; empty without it.
        generator: of the temporal scales, or None.
        training: what the last training came to, or None.
    """

    quantized: QuantizedDenoiser
    blocks: tuple[BlockReport, ...] = ()
    generator: ScaleGenerator | None = None
    training: Finetuned | None = None


def quantize(
    denoiser: Denoiser,
    calibration: Calibration,
    *,
    plan: DeploymentPlan | None = None,
    target: str = DEFAULT_TARGET,
    method: Method | None = None,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Quantization:
    """Coded layers as the plan says; by default W8A8 for all but first, last and embeddings.

    Args:
        denoiser: the float model.
        calibration: of this model and sampler.
        plan: precision of every layer.
        target: name of a backend, for the default plan.
        method: how codes and scales are decided.
        seed: of the selection and of reconstruction.
        work: folder for finished blocks; the same call goes on from them.
        progress: told of finished work.
    """
    chosen, method = plan or rule_plan(denoiser, target), method or Method()
    observations = calibration.observations
    parameters = quantizer.initialise(denoiser, chosen, observations, ranges=method.ranges)
    generator = None
    if method.mlp:
        generator = fit_generator(
            chosen, denoiser.program.timesteps, parameters, observations, seed=seed
        )
        parameters = generator.tabulate(parameters, denoiser.program.timesteps)
    blocks: tuple[BlockReport, ...] = ()
    if method.reconstruction is not None:
        found = reconstruct(
            denoiser,
            chosen,
            parameters,
            select_samples(denoiser, calibration, method, seed=seed, work=work, progress=progress),
            generator=generator,
            settings=method.reconstruction,
            seed=seed,
            work=work,
            progress=stage("reconstruct", progress),
        )
        parameters, blocks, generator = found.parameters, found.blocks, found.generator
    return Quantization(quantizer.assemble(denoiser, chosen, parameters), blocks, generator)


def rule_plan(
    denoiser: Denoiser,
    target: str = DEFAULT_TARGET,
    *,
    body: Precision = W8A8,
    embedding: Precision = FP32,
    fine: bool = True,
    activation: ActivationPolicy | None = None,
) -> DeploymentPlan:
    """`default_plan`, with choices that depend on the network.

    Layers of the timestep alone become tables where those are smaller. With `fine`, layers of the
    finest resolution keep 8-bit weights where they are at most `FINE_SHARE` of the body's, see
    `most_reused`.
    """
    timed = [name for name, kind in dependence(denoiser).items() if kind == "time"]
    cost = table_cost(denoiser, timed)
    if cost.table_bytes > cost.removed_bytes:
        timed = []
    narrow = body.coded and body.weight_bits < FINE_BITS
    return default_plan(
        denoiser.info,
        target,
        denoiser.program.n_steps,
        body=body,
        embedding=embedding,
        tables=timed,
        fine=most_reused(denoiser, FINE_SHARE) if fine and narrow else (),
        activation=activation,
    )


def select_samples(
    denoiser: Denoiser,
    calibration: Calibration,
    method: Method,
    *,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Samples of the trajectories for reconstruction, by density and diversity or evenly."""
    trajectories = calibration.trajectories
    asked = f"{method.selected} {method.density} {seed}"
    key = _key(__version__, trajectories.key(), digest(denoiser.info), asked)
    file = None if work is None else work / f"selection-{key}.st"
    found = None if file is None else load_selection(file)
    if found is not None:
        return found
    steps, most = trajectories.n_steps, trajectories.n_runs
    n_samples = min(method.selected, steps * most)
    if method.density:
        features = record_features(denoiser, trajectories, progress=stage("features", progress))
        minimum = min(2, n_samples // steps)
        counts = allocate(features, n_samples, minimum=minimum, maximum=most).counts
    else:
        whole, rest = divmod(n_samples, steps)
        counts = tuple(whole + (step < rest) for step in range(steps))
    found = select(trajectories, counts, seed=seed)
    if file is not None:
        save_selection(found, file)
    return found


def finetune(
    quantization: Quantization,
    trajectories: Trajectories,
    *,
    settings: FinetuneSettings,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Quantization:
    """Train the quantized denoiser to return what the float model returns on its trajectories."""
    quantized = quantization.quantized
    found = finetuning.finetune(
        quantized.denoiser,
        quantized.plan,
        quantized.parameters,
        trajectories,
        settings=settings,
        generator=quantization.generator,
        seed=seed,
        work=work,
        progress=stage("finetune", progress),
    )
    again = quantizer.assemble(quantized.denoiser, quantized.plan, found.parameters)
    return Quantization(again, quantization.blocks, found.generator, found)


def measure(
    quantized: QuantizedDenoiser,
    trajectories: Trajectories,
    *,
    work: Path | None = None,
    progress: Progress | None = None,
) -> NoiseStatistics:
    """Quantization noise of the finished network at every step of the float trajectories."""
    key = _key(__version__, trajectories.key(), precision_digest(quantized))
    file = None if work is None else work / f"measured-{key}.st"
    return _kept(
        file,
        NoiseStatistics,
        lambda: _measure(quantized, trajectories, stage("correct", progress)),
    )


def correct(
    quantized: QuantizedDenoiser,
    trajectories: Trajectories,
    *,
    corrector: Corrector | None = None,
    closed_loop: bool = False,
    matched: bool = True,
    work: Path | None = None,
    progress: Progress | None = None,
) -> CorrectedSchedule:
    """Correct the sampler for the quantization noise of the finished network.

    Args:
        quantized: with its final codes and scales.
        trajectories: of the float model; not those the network was trained on.
        corrector: default PTQD with all its parts.
        closed_loop: measure a second time, along the corrected quantized sampler's own samples.
        matched: keep the variance of the float model's samples, see `match_variance`; without
            effect for a sampler whose levels of signal and noise are not known, and for a network
            that makes no error.
        work: folder for finished parts.
        progress: told of finished work.

    Raises:
        NumericalError: an output is NaN or Inf, also along the quantized sampler's own samples.
        UnsupportedError: the variance of an unknown type of prediction is to be matched.
    """
    program, key = quantized.denoiser.program, correction_key(quantized)
    statistics = measure(quantized, trajectories, work=work, progress=progress)
    schedule = correct_schedule(program, statistics, key, corrector=corrector)
    if closed_loop:
        again = _measure_again(quantized, trajectories, schedule)
        schedule = correct_schedule(program, again, key, corrector=corrector)
    # Without errors r would differ from 1 by rounding only, and samples with it.
    exact = min(statistics.snr_db) == SNR_CAP_DB
    levels = _levels(program) if matched and not exact else None
    if levels is None:
        return schedule
    asked = (trajectories.key(), precision_digest(quantized), digest(schedule))
    file = None if work is None else work / f"matched-{_key(__version__, *asked)}.st"
    return _kept(
        file,
        CorrectedSchedule,
        lambda: _matched(quantized, trajectories, schedule, levels, stage("match", progress)),
    )


def _levels(program: SamplerProgram) -> NoiseLevels | None:
    try:
        return noise_levels(program)
    except (InputError, UnsupportedError):
        # A scheduler of one's own: its table samples, and what is signal in it is not known.
        return None


def _matched(
    quantized: QuantizedDenoiser,
    trajectories: Trajectories,
    schedule: CorrectedSchedule,
    levels: NoiseLevels,
    progress: Callable[[int, int], None] | None,
) -> CorrectedSchedule:
    program, fed = quantized.denoiser.program, trajectories.conditioning

    def predict(x: NDArray[float32], step: int) -> NDArray[float32]:
        parts = torch.arange(len(x)).split(CHUNK)
        answers = [
            quantized.predict(torch.from_numpy(x)[part], step, None if fed is None else fed[part])
            for part in parts
        ]
        return torch.cat(answers).numpy()

    runs = FloatRuns(trajectories.inputs.numpy(), trajectories.outputs.numpy())
    return match_variance(program, levels, schedule, predict, runs, progress=progress)


def _kept(file: Path | None, kind: type[Kept], make: Callable[[], Kept]) -> Kept:
    """A record out of its file, or made now and kept there."""
    stored = None if file is None else load_tensors(file)
    if stored is not None:
        return parse_record(stored["record"].numpy().tobytes(), kind, name=str(file))
    made = make()
    if file is not None:
        codes = torch.frombuffer(bytearray(dump_record(made)), dtype=torch.uint8)
        save_tensors({"record": codes}, file)
    return made


def _measure_again(
    quantized: QuantizedDenoiser, trajectories: Trajectories, schedule: CorrectedSchedule
) -> NoiseStatistics:
    denoiser = quantized.denoiser
    fed = trajectories.conditioning

    def runs() -> Iterator[tuple[range, Tensor | None]]:
        for start in range(0, trajectories.n_runs, CHUNK):
            images = range(start, min(start + CHUNK, trajectories.n_runs))
            yield images, None if fed is None else fed[images.start : images.stop]

    return second_pass(
        denoiser.program,
        schedule,
        lambda x, step, mine: denoiser.predict(torch.from_numpy(x), step, mine).numpy(),
        lambda x, step, mine: quantized.predict(torch.from_numpy(x), step, mine).numpy(),
        runs(),
        sample_shape=denoiser.info.sample_shape,
        seed=CLOSED_LOOP_SEED,
    )


def step_aware_plan(
    denoiser: Denoiser,
    calibration: Calibration,
    plan: DeploymentPlan,
    *,
    bits: tuple[int, ...] = (4, 8),
    work: Path | None = None,
    progress: Progress | None = None,
) -> DeploymentPlan:
    """The plan with fewer activation bits at steps whose diffusion noise hides the difference.

    Every width is quantized and measured. Steps between others of more bits get those, where they
    are fewer than `SHORTEST_PHASE` in a row.

    Raises:
        InputError: if the plan has phases already, or no layer on integers.

    Source: PTQD, section 4.3.
    """
    statistics = {
        width: measure(
            quantizer.quantize(
                denoiser,
                with_activation_bits(plan, [width] * plan.n_steps),
                calibration.observations,
            ),
            calibration.trajectories,
            work=work,
            progress=progress,
        )
        for width in bits
    }
    chosen = activation_bits_by_step(denoiser.program, noise_levels(denoiser.program), statistics)
    return with_activation_bits(plan, contiguous(chosen, min_run=SHORTEST_PHASE))


def search_groups(
    denoiser: Denoiser,
    calibration: Calibration,
    plan: DeploymentPlan,
    *,
    samples: int = 64,
    settings: GroupSearchSettings | None = None,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> GroupPlan:
    """A group size for every layer in groups, at no more bit operations than 128 for all.

    See `plan_groups`, which also takes another cost and another fitness.
    """
    method = Method(selected=samples)
    chosen = select_samples(denoiser, calibration, method, seed=seed, work=work, progress=progress)
    key = _key(__version__, digest(plan), chosen.key(), str(settings), str(seed))
    return plan_groups(
        denoiser,
        plan,
        calibration.observations,
        chosen,
        settings=settings,
        seed=seed,
        file=None if work is None else work / f"groups-{key}.json",
        progress=stage("groups", progress),
    )


def _measure(
    quantized: QuantizedDenoiser,
    trajectories: Trajectories,
    progress: Callable[[int, int], None] | None,
) -> NoiseStatistics:
    n_chunks = -(-trajectories.n_runs // CHUNK)

    def samples() -> Iterator[tuple[int, NDArray[float32], tuple[Tensor | None, Tensor]]]:
        for step in range(trajectories.n_steps):
            for chunk in range(n_chunks):
                runs = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
                fed = trajectories.conditioning
                mine = None if fed is None else fed[runs]
                yield (
                    step,
                    trajectories.inputs[step, runs].numpy(),
                    (mine, trajectories.outputs[step, runs]),
                )
            if progress is not None:
                progress(step + 1, trajectories.n_steps)

    return measure_noise(
        lambda x, step, fed: fed[1].numpy(),
        lambda x, step, fed: quantized.predict(torch.from_numpy(x), step, fed[0]).numpy(),
        samples(),
        n_steps=trajectories.n_steps,
    )


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized model's file.

    Attributes:
        file: what was written.
        plan: precision of every layer.
        stored_bytes: of all tensors in it.
        float_bytes: of the float32 model's tensors.
        snr_db: of the network output at every step, fed the float model's samples, [S].
        blocks: what reconstruction did to every block.
        training: what training came to, or None.
    """

    file: Path
    plan: DeploymentPlan
    stored_bytes: int
    float_bytes: int
    snr_db: tuple[float, ...]
    blocks: tuple[BlockReport, ...] = ()
    training: Finetuned | None = None


def quantize_to_file(
    denoiser: Denoiser,
    out: str | Path,
    *,
    plan: DeploymentPlan,
    method: Method,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    correction: bool = True,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Calibrate, quantize, correct and store a model; see `quantize`, and `emit` for what follows.

    Args:
        denoiser: the float model.
        out: file to write.
        plan: precision of every layer.
        method: how codes and scales are decided.
        samples: calibration trajectories.
        seed: of calibration, selection and reconstruction.
        correction: measure a correction of the sampler and store it too.
        work: folder for finished parts; default a hidden sibling of `out`, removed at the end.
        progress: told of finished work.
    """
    out = Path(out)
    check_file_destination(out)
    quantizer.check_plan(denoiser, plan)
    with working_folder(out, work) as folder:
        calibration = calibrate(
            denoiser, samples=samples, seed=seed, work=folder, progress=progress
        )
        found = quantize(
            denoiser,
            calibration,
            plan=plan,
            method=method,
            seed=seed,
            work=folder,
            progress=progress,
        )
        runs = calibration.trajectories
        return _store(found, runs, out, folder, correction=correction, progress=progress)


def finetune_file(
    denoiser: Denoiser,
    quantized: str | Path,
    out: str | Path,
    *,
    settings: FinetuneSettings,
    samples: int = 2 * DEFAULT_SAMPLES,
    seed: int = 0,
    correction: bool = True,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Train a stored quantized model further and store the result; see `finetune`.

    What is told of it and its correction are measured on trajectories it was not trained on.
    """
    out = Path(out)
    check_file_destination(out)
    stored = load_quantized(Path(quantized), denoiser)
    with working_folder(out, work) as folder:
        told = stage("trajectories", progress)
        seen, unseen = (
            collect_trajectories(denoiser, n_runs, seed=each, work=folder, progress=told)
            for n_runs, each in ((samples, seed), (DEFAULT_SAMPLES, seed ^ UNSEEN_SEED))
        )
        found = finetune(
            Quantization(stored.quantized, generator=stored.generator),
            seen,
            settings=settings,
            seed=seed,
            work=folder,
            progress=progress,
        )
        return _store(found, unseen, out, folder, correction=correction, progress=progress)


@contextmanager
def working_folder(out: Path, work: str | Path | None) -> Iterator[Path]:
    """Where finished parts are kept: in `work`, or in a hidden sibling of `out`.

    The sibling is removed when the block ends well; after an error or Ctrl-C, the same call goes
    on from it.
    """
    if work is not None:
        yield Path(work)
        return
    folder = out.parent / f".{out.name}.work"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _store(
    found: Quantization,
    trajectories: Trajectories,
    out: Path,
    work: Path,
    *,
    correction: bool,
    progress: Progress | None,
) -> QuantizedModel:
    quantized = found.quantized
    statistics = measure(quantized, trajectories, work=work, progress=progress)
    schedule = (
        correct(quantized, trajectories, work=work, progress=progress) if correction else None
    )
    size = save_quantized(quantized, out, correction=schedule, generator=found.generator)
    tensors = quantized.denoiser.module.state_dict().values()
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return QuantizedModel(
        out, quantized.plan, size, whole, statistics.snr_db, found.blocks, found.training
    )


def stage(name: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    """A progress callback that names its stage."""
    if progress is None:
        return None
    report = progress
    return lambda done, total: report(name, done, total)


def _key(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]
