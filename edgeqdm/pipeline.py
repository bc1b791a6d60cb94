"""The whole story, one function per stage.

    load -> trajectories -> observe -> quantize -> correct -> emit -> verify -> run -> bench

Every stage returns a frozen value and can be used alone; long stages leave finished work in a
folder and go on from it.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeqdm import __version__
from edgeqdm.backends import backend_names, load_backend
from edgeqdm.bench.compare import (
    Variant,
    compare,
    draw,
    float_predictor,
    folder_bytes,
    uncorrected,
)
from edgeqdm.bench.picture import side_by_side
from edgeqdm.bench.quality import check_fid_images
from edgeqdm.calibrate.observe import (
    LayerObservation,
    load_observations,
    observe,
    save_observations,
)
from edgeqdm.calibrate.trajectories import CHUNK, Trajectories, collect_trajectories
from edgeqdm.correct.apply import correct_schedule
from edgeqdm.correct.measure import NoiseStatistics, measure_noise
from edgeqdm.emit import playback
from edgeqdm.emit.backend import Backend
from edgeqdm.emit.integrity import check_files
from edgeqdm.emit.package import check_plan, correction_key, emit_package, exportable
from edgeqdm.emit.verify import Verification, verify_package
from edgeqdm.emit.writer import check_destination, write_file_atomically
from edgeqdm.errors import (
    EdgeqdmError,
    InputError,
    OutputError,
    ResourceError,
    UnsupportedError,
    VerifyError,
)
from edgeqdm.ir.codec import digest, dump_record, read_record
from edgeqdm.ir.package import Manifest
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.report import BenchReport
from edgeqdm.ir.schedule import CorrectedSchedule
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.load import load
from edgeqdm.quantize import quantizer
from edgeqdm.quantize.quantizer import (
    QuantizedDenoiser,
    default_plan,
    float_plan,
    precision_digest,
)

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""
DEFAULT_TARGET = "onnxruntime"
DEFAULT_SAMPLES = 64
DEMO_MODEL = "reference:unet-fmnist"
DEMO_SEED = 7
BENCH_SEEDS = 2**48


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
    """
    trajectories = collect_trajectories(
        denoiser, samples, seed=seed, work=work, progress=_stage("trajectories", progress)
    )
    names = tuple(layer.name for layer in denoiser.info.layers)
    key = _key(__version__, trajectories.key(), digest(denoiser.info), digest(denoiser.program))
    file = None if work is None else work / f"observations-{key}.st"
    found = None if file is None else load_observations(file)
    if found is None:
        found = observe(denoiser, trajectories, names, progress=_stage("observe", progress))
        if file is not None:
            save_observations(found, file)
    return Calibration(trajectories, found)


def quantize(
    denoiser: Denoiser,
    calibration: Calibration,
    *,
    plan: DeploymentPlan | None = None,
    target: str = DEFAULT_TARGET,
) -> QuantizedDenoiser:
    """Integer layers as the plan says; by default W8A8 for all but first, last and embeddings."""
    chosen = plan or default_plan(denoiser.info, target, denoiser.program.n_steps)
    return quantizer.quantize(denoiser, chosen, calibration.observations)


def correct(
    quantized: QuantizedDenoiser,
    calibration: Calibration,
    *,
    work: Path | None = None,
    progress: Progress | None = None,
) -> CorrectedSchedule:
    """Measure the quantization noise of the finished network and correct the sampler for it."""
    key = _key(__version__, calibration.trajectories.key(), precision_digest(quantized))
    file = None if work is None else work / f"noise-{key}.json"
    statistics = _stored_statistics(file)
    if statistics is None:
        statistics = _measure(quantized, calibration.trajectories, _stage("correct", progress))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomically(file, dump_record(statistics))
    program = quantized.denoiser.program
    return correct_schedule(program, statistics, correction_key(quantized))


def _stored_statistics(file: Path | None) -> NoiseStatistics | None:
    if file is None or not file.exists():
        return None
    try:
        return read_record(file, NoiseStatistics)
    except InputError:
        # Damaged work is worth no more than missing work: it is measured again.
        return None


def _measure(
    quantized: QuantizedDenoiser,
    trajectories: Trajectories,
    progress: Callable[[int, int], None] | None,
) -> NoiseStatistics:
    n_chunks = -(-trajectories.n_runs // CHUNK)

    def samples() -> Iterator[tuple[int, NDArray[np.float32], tuple[Tensor | None, Tensor]]]:
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


def emit(
    denoiser: Denoiser,
    out: str | Path,
    *,
    target: str = DEFAULT_TARGET,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    plan: DeploymentPlan | None = None,
    correction: bool = True,
    work: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Calibrate, quantize, correct and write a package.

    Args:
        denoiser: the float model, from `load` or `wrap`.
        out: folder to create.
        target: name of a backend.
        samples: calibration trajectories.
        seed: of the calibration.
        plan: precision of every layer; default W8A8 for all but first, last and embeddings.
        correction: correct the sampler for the quantization noise (PTQD).
        work: folder for finished parts; default a hidden sibling of `out`, removed at the end.
        force: replace a package that is there already.
        progress: told of finished work.

    Raises:
        EdgeqdmError: of the class and exit code that fits; nothing is left at `out`.
    """
    out = Path(out)
    backend = load_backend(target)
    chosen = plan or default_plan(denoiser.info, target, denoiser.program.n_steps)
    quantizer.check_plan(denoiser, chosen)
    check_plan(chosen, denoiser.info, backend)
    check_destination(out, force=force)
    folder = out.parent / f".{out.name}.work" if work is None else Path(work)
    calibration = calibrate(denoiser, samples=samples, seed=seed, work=folder, progress=progress)
    quantized = quantize(denoiser, calibration, plan=chosen)
    schedule = (
        correct(quantized, calibration, work=folder, progress=progress) if correction else None
    )
    done = _stage("emit", progress)
    if done is not None:
        done(0, 1)
    manifest = emit_package(quantized, backend, out, correction=schedule, force=force)
    if done is not None:
        done(1, 1)
    if work is None:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def verify(package: str | Path) -> Verification:
    """Check a package: files, plan, kernels that execute, golden run."""
    folder = Path(package)
    return verify_package(folder, load_backend(_target_of(folder)))


def run(
    package: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    label: str | None = None,
    count: int | None = None,
    embedding: str | Path | None = None,
    threads: int = 1,
) -> str:
    """Sample with a package's own runtime, in a process that cannot import torch.

    Args:
        package: folder of the package.
        out: PNG file to write.
        seed: of the noise.
        label: label or labels, by number or name, comma-separated; default all once.
        count: number of images.
        embedding: `.npy` file with one embedding per image, for models that take embeddings.
        threads: of the runtime.

    Returns:
        The runtime's one-line report.
    """
    arguments = ["--seed", str(seed), "--out", str(out), "--threads", str(threads)]
    arguments += [] if label is None else ["--label", label]
    arguments += [] if count is None else ["--count", str(count)]
    arguments += [] if embedding is None else ["--embedding", str(embedding)]
    return run_package(Path(package), arguments)


def run_package(package: Path, arguments: list[str]) -> str:
    """Run a package's `run.py` where torch cannot be imported; raises as its exit code says."""
    script = package / "runtime" / "python" / "run.py"
    if not script.is_file():
        found = "not a package: no runtime in it" if package.is_dir() else "no such package"
        raise InputError("EQ-3701", found, path=package, hint="give a folder that emit made")
    block = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    finished = subprocess.run(
        [sys.executable, "-c", block, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
        raise _runtime_error(finished.returncode, lines[-1].removeprefix("error: "), package)
    return finished.stdout.strip()


def _runtime_error(exit_code: int, message: str, package: Path) -> EdgeqdmError:
    if exit_code in (2, InputError.exit_code):
        return InputError("EQ-3702", message, path=package)
    if exit_code == UnsupportedError.exit_code:
        return UnsupportedError("EQ-4701", message, path=package)
    if exit_code == OutputError.exit_code:
        return OutputError("EQ-7701", message)
    if exit_code == VerifyError.exit_code:
        return VerifyError("EQ-8701", message, path=package)
    if exit_code in (ResourceError.exit_code, -signal.SIGKILL):
        return ResourceError("EQ-9701", message, path=package, hint="draw fewer images at once")
    return EdgeqdmError("EQ-0701", message, path=package)


def _target_of(package: Path) -> str:
    manifest = package / "manifest.json"
    if not package.is_dir() or not manifest.exists():
        raise InputError(
            "EQ-3703", "not a package: no manifest.json", path=package, hint="give a package folder"
        )
    return read_record(manifest, Manifest, error=VerifyError).target


def _stage(name: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    report = progress
    return lambda done, total: report(name, done, total)


def _key(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]


def bench(
    package: str | Path,
    *,
    model: Denoiser,
    rounds: int = 60,
    images: int = 16,
    fid: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure a package beside the float graph of its model on the same runtime.

    Args:
        package: folder of the package.
        model: the float model it was made from, loaded with the same sampler and guidance.
        rounds: timed steps of one image, interleaved.
        images: images of the free run from equal noise.
        fid: images for feature-FID, 0 to leave it out.
        seed: of the noise, in a range of its own: calibration never sees it.
        progress: told of finished work.

    Raises:
        InputError: if the package is of another model, sampler or guidance.
    """
    folder = Path(package)
    backend = load_backend(_target_of(folder))
    manifest = check_files(folder)
    _require_same_model(manifest, model, folder)
    player = playback.open_player(folder)
    with tempfile.TemporaryDirectory() as scratch:
        variants = (
            float_variant(model, backend, Path(scratch), player),
            Variant(
                "package",
                backend.open(folder),
                player,
                backend.count_kernels(folder),
                manifest.integer_layers,
                folder_bytes(folder),
            ),
        )
        return compare(
            model,
            variants,
            libraries=backend.versions(),
            rounds=rounds,
            images=images,
            seeds=(BENCH_SEEDS + seed,),
            fid_images=fid,
            progress=_stage("bench", progress),
        )


def float_variant(
    model: Denoiser, backend: Backend, folder: Path, player: playback.Player
) -> Variant:
    """The float graph of a model on the target's runtime, written below `folder`."""
    plan = float_plan(model.info, backend.name, model.program.n_steps)
    contents = backend.emit(exportable(quantizer.quantize(model, plan, {})))
    for path, file in contents.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.data)
    graphs = sum(len(file.data) for file in contents.values() if file.role == "model")
    plain = uncorrected(player, model)
    return Variant("float", backend.open(folder), plain, backend.count_kernels(folder), 0, graphs)


def _require_same_model(manifest: Manifest, model: Denoiser, package: Path) -> None:
    wanted = {
        "model": (manifest.model.fingerprint, model.info.fingerprint),
        "sampler": (manifest.program_sha256, digest(model.program)),
        "guidance": (str(manifest.guidance), str(model.guidance.scale)),
    }
    differing = [f"{k} ({a[:12]}, given {b[:12]})" for k, (a, b) in wanted.items() if a != b]
    if differing:
        raise InputError(
            "EQ-3704",
            f"the package was made from another {', '.join(differing)}",
            path=package,
            hint="load the model with the scheduler, steps and guidance of the package",
        )


@dataclass(frozen=True)
class DemoResult:
    """What `demo` made.

    Attributes:
        package: the int8 package.
        picture: PNG, above the float model, below the package, from equal noise.
        report: the measured table.
        verification: of the package.
    """

    package: Path
    picture: Path
    report: BenchReport
    verification: Verification


def demo(
    out: str | Path = "build/demo",
    *,
    fid: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """The main job on the shipped UNet: emit, verify, run without torch, measure, draw.

    Args:
        out: folder for the package, the picture and the report.
        fid: images for feature-FID, 0 to leave it out.
        force: replace an earlier package.
        progress: told of finished work.
    """
    folder = Path(out)
    package, picture = folder / "package", folder / "side_by_side.png"
    denoiser = load(DEMO_MODEL)
    check_fid_images(fid)
    emit(denoiser, package, force=force, progress=progress)
    verification = verify(package)
    report = bench(package, model=denoiser, fid=fid, progress=progress)
    _draw_side_by_side(denoiser, package, picture)
    write_file_atomically(folder / "report.json", dump_record(report))
    return DemoResult(package, picture, report, verification)


def _draw_side_by_side(denoiser: Denoiser, package: Path, picture: Path) -> None:
    n_labels = denoiser.info.conditioning.n_labels
    player = playback.open_player(package)
    labels = np.arange(n_labels, dtype=np.int64)
    plain = uncorrected(player, denoiser)
    above = draw(plain, float_predictor(denoiser), labels, n_labels, DEMO_SEED)
    with tempfile.TemporaryDirectory() as scratch:
        latents = Path(scratch) / "latents.npy"
        arguments = ["--seed", str(DEMO_SEED), "--out", str(Path(scratch) / "sheet.png")]
        run_package(package, [*arguments, "--latents", str(latents)])
        below = np.load(latents, allow_pickle=False)
    names = denoiser.info.label_names or tuple(str(label) for label in labels)
    image = side_by_side(
        {"float": playback.decode(player, above), "package": playback.decode(player, below)},
        names,
        f"{denoiser.info.name}, {denoiser.program.n_steps} steps, equal noise",
    )
    write_file_atomically(picture, image)


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`."""

    what: str
    found: str
    ok: bool
    hint: str


def doctor() -> tuple[Finding, ...]:
    """What this host can build, verify and run, and how to get what is missing."""
    findings = [
        Finding("python", platform.python_version(), sys.version_info >= (3, 11), "use >= 3.11"),
        *(_library(name) for name in ("torch", "diffusers", "onnx", "onnxscript", "numpy")),
    ]
    for name in backend_names():
        try:
            versions = load_backend(name).versions()
            found = ", ".join(f"{k} {v}" for k, v in versions.items())
            findings.append(Finding(f"target {name}", found, True, ""))
        except UnsupportedError as error:
            findings.append(Finding(f"target {name}", error.message, False, error.hint or ""))
    flags = _cpu_flags()
    vnni = any("vnni" in flag for flag in flags)
    if flags and platform.machine() == "x86_64":
        hint = "int8 sums saturate on this CPU: figures measured here do not hold for VNNI or Arm"
        findings.append(Finding("cpu", "VNNI" if vnni else "no VNNI", vnni, "" if vnni else hint))
    return tuple(findings)


def _library(name: str) -> Finding:
    try:
        return Finding(name, version(name), True, "")
    except PackageNotFoundError:
        return Finding(name, "missing", False, f"pip install {name}")


def _cpu_flags() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    return next((tuple(x.split(":")[1].split()) for x in lines if x.startswith("flags")), ())
