"""Variants of one model side by side: CPU time, image error, size, kernels, feature-FID."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeqdm.bench.latency import time_interleaved
from edgeqdm.bench.quality import feature_fid, sqnr_db
from edgeqdm.emit import playback
from edgeqdm.emit.backend import Array, Evaluate, KernelCount
from edgeqdm.ir.report import BenchReport, BenchRow, Host
from edgeqdm.ir.schedule import CorrectedSchedule
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.numerics import solver
from edgeqdm.profile.protocol import cpu
from edgeqdm.quantize.quantizer import QuantizedDenoiser

SAMPLING_BATCH = 50
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    Attributes:
        name: for the table.
        evaluate: the network on this host, one thread.
        player: schedule, guidance and decoder to run it with.
        kernels: what executes.
        planned: integer layers promised.
        bytes_on_disk: of everything it needs.
        starts: first step of every phase; each is timed, and weighs as many steps as it has.
    """

    name: str
    evaluate: Evaluate
    player: playback.Player
    kernels: KernelCount
    planned: int
    bytes_on_disk: int
    starts: tuple[int, ...] = (0,)


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def host(libraries: Mapping[str, str], threads: int) -> Host:
    """This machine."""
    return Host(
        machine=platform.machine(),
        cpu=cpu()[0],
        system=platform.system(),
        python=platform.python_version(),
        libraries=dict(libraries),
        threads=threads,
    )


def float_predictor(denoiser: Denoiser) -> Evaluate:
    """The float model in torch, without guidance: the player applies that."""

    def evaluate(x: Array, step: int, conditioning: NDArray[Any] | None) -> Array:
        fed = [] if conditioning is None else [torch.from_numpy(conditioning)]
        with torch.no_grad():
            t = denoiser.timestep(step, len(x))
            found: Array = denoiser.module(torch.from_numpy(x), t, *fed).numpy()
        return found

    return evaluate


def reference_predictor(quantized: QuantizedDenoiser) -> Evaluate:
    """The exact integer reference in torch, without guidance: the player applies that."""

    @torch.no_grad()
    def evaluate(x: Array, step: int, conditioning: NDArray[Any] | None) -> Array:
        fed = [] if conditioning is None else [torch.from_numpy(conditioning)]
        found: Array = quantized.network(torch.from_numpy(x), torch.tensor(step), *fed).numpy()
        return found

    return evaluate


def player_of(denoiser: Denoiser, correction: CorrectedSchedule | None = None) -> playback.Player:
    """What a package would sample with, without making one."""
    null = denoiser.null_embedding
    return playback.Player(
        table=solver.Table.from_json(
            denoiser.program.model_dump(mode="json"),
            None if correction is None else correction.model_dump(mode="json"),
        ),
        guidance=denoiser.guidance.scale,
        conditioning=denoiser.info.conditioning.model_dump(),
        decoder=denoiser.info.decoder.model_dump(),
        sample_shape=denoiser.info.sample_shape,
        label_names=denoiser.info.label_names,
        null_embedding=None if null is None else null.numpy(),
        golden_noise_rms=(),
    )


def uncorrected(player: playback.Player, denoiser: Denoiser) -> playback.Player:
    """The same player with the plain sampler, as the float model and other tools use it."""
    table = solver.Table.from_json(denoiser.program.model_dump(mode="json"))
    return replace(player, table=table)


def draw(
    player: playback.Player,
    evaluate: Evaluate,
    conditioning: NDArray[Any] | None,
    n_images: int,
    seed: int,
) -> Array:
    """Samples [N, C, H, W] in batches; image k is the same whatever N is."""
    found = []
    for start in range(0, n_images, SAMPLING_BATCH):
        images = range(start, min(start + SAMPLING_BATCH, n_images))
        mine = None if conditioning is None else conditioning[images.start : images.stop]
        found.append(playback.sample(player, evaluate, mine, seed=seed, images=images))
    return np.concatenate(found)


def conditioning_for(denoiser: Denoiser, n_images: int, seed: int) -> NDArray[Any] | None:
    """Balanced conditioning for n images."""
    drawn = denoiser.draw_conditioning(n_images, torch.Generator().manual_seed(seed))
    return None if drawn is None else drawn.numpy()


def compare(
    denoiser: Denoiser,
    variants: tuple[Variant, ...],
    *,
    libraries: Mapping[str, str],
    rounds: int,
    images: int,
    seeds: tuple[int, ...],
    fid_images: int = 0,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure every variant; the first one is the float baseline of the ratios.

    Args:
        denoiser: float model in torch, the reference of all image errors.
        variants: at least one.
        libraries: versions to record.
        rounds: timed steps of one image per variant and phase.
        images: images per seed of the free runs.
        seeds: of the free runs; must differ from the calibration's.
        fid_images: images for feature-FID, 0 to leave it out; the same noise for every variant.
        progress: called after every (variant, seed) and every FID run.
    """
    total = (len(variants) + 1) * len(seeds) + (len(variants) if fid_images else 0)
    done = _Counter(total, progress)
    ratios = _cpu_times(denoiser, variants, rounds)
    errors = _image_errors(denoiser, variants, images, seeds, done)
    rows = []
    for variant in variants:
        fid = None
        if fid_images:
            fed = conditioning_for(denoiser, fid_images, seeds[0])
            samples = draw(variant.player, variant.evaluate, fed, fid_images, seeds[0] + 1_000_000)
            fid = feature_fid(playback.decode(variant.player, samples))
            done.tick()
        cpu_us = ratios[variant.name]
        rows.append(
            BenchRow(
                name=variant.name,
                cpu_ms_per_step=cpu_us / 1e3,
                cpu_ratio=cpu_us / ratios[variants[0].name],
                image_sqnr_db=errors[variant.name],
                bytes_on_disk=variant.bytes_on_disk,
                integer_kernels=variant.kernels.integer,
                planned_layers=variant.planned,
                float_kernels=variant.kernels.floating,
                feature_fid=fid,
            )
        )
    return BenchReport(
        model=denoiser.info.name,
        sampler=denoiser.program.sampler,
        n_steps=denoiser.program.n_steps,
        guidance=denoiser.guidance.scale,
        images=images * len(seeds),
        rounds=rounds,
        fid_images=fid_images,
        host=host(libraries, threads=1),
        rows=tuple(rows),
    )


class _Counter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def tick(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _cpu_times(denoiser: Denoiser, variants: tuple[Variant, ...], rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, *denoiser.info.sample_shape), dtype=np.float32)
    fed = conditioning_for(denoiser, 1, 0)
    n_steps = denoiser.program.n_steps

    def call(variant: Variant, step: int) -> Callable[[], object]:
        return lambda: playback.guided(variant.player, variant.evaluate, x, step, fed)

    phases = {v.name: list(zip(v.starts, (*v.starts[1:], n_steps), strict=True)) for v in variants}
    calls = {
        f"{start} {variant.name}": call(variant, (start + stop) // 2)
        for variant in variants
        for start, stop in phases[variant.name]
    }
    timings = time_interleaved(calls, rounds=rounds)
    return {
        name: sum((b - a) / n_steps * timings[f"{a} {name}"].p25_us for a, b in bounds)
        for name, bounds in phases.items()
    }


def _image_errors(
    denoiser: Denoiser,
    variants: tuple[Variant, ...],
    images: int,
    seeds: tuple[int, ...],
    done: _Counter,
) -> dict[str, float]:
    reference: list[Array] = []
    found: dict[str, list[Array]] = {variant.name: [] for variant in variants}
    plain = uncorrected(variants[0].player, denoiser)
    for seed in seeds:
        fed = conditioning_for(denoiser, images, seed)
        reference.append(draw(plain, float_predictor(denoiser), fed, images, seed))
        done.tick()
        for variant in variants:
            found[variant.name].append(draw(variant.player, variant.evaluate, fed, images, seed))
            done.tick()
    whole = np.concatenate(reference)
    return {name: sqnr_db(whole, np.concatenate(samples)) for name, samples in found.items()}
