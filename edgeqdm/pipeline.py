"""The whole story, one function per stage.

    load -> trajectories -> observe -> quantize -> correct -> emit -> verify -> run -> bench

Every stage returns a frozen value and can be used alone; long stages leave finished work in a
folder and go on from it.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

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
from edgeqdm.bench.quality import check_fid, check_fid_images
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit import playback
from edgeqdm.emit.backend import STANDARD, Backend, Unsupported
from edgeqdm.emit.integrity import check_files, manifest_of
from edgeqdm.emit.launch import run, run_package
from edgeqdm.emit.package import check_plan, emit_package, exportable
from edgeqdm.emit.verify import Verification, verify_package
from edgeqdm.emit.writer import check_destination, write_file_atomically
from edgeqdm.errors import (
    InputError,
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
from edgeqdm.quantize.plans import float_plan
from edgeqdm.quantize.quantizer import QuantizedDenoiser
from edgeqdm.quantize.store import load_quantized
from edgeqdm.stages import (
    DEFAULT_SAMPLES,
    DEFAULT_TARGET,
    Calibration,
    Method,
    Progress,
    Quantization,
    QuantizedModel,
    calibrate,
    correct,
    finetune,
    finetune_file,
    measure,
    quantize,
    quantize_to_file,
    rule_plan,
    search_groups,
    select_samples,
    stage,
    step_aware_plan,
    working_folder,
)

__all__ = [
    "DEFAULT_SAMPLES",
    "DEFAULT_TARGET",
    "Calibration",
    "Method",
    "Quantization",
    "QuantizedModel",
    "bench",
    "calibrate",
    "correct",
    "demo",
    "doctor",
    "emit",
    "finetune",
    "finetune_file",
    "measure",
    "quantize",
    "quantize_to_file",
    "rule_plan",
    "run",
    "search_groups",
    "select_samples",
    "step_aware_plan",
    "unsupported",
    "verify",
]

DEMO_MODEL = "reference:unet-fmnist"
DEMO_SEED = 7
BENCH_SEEDS = 2**48


def emit(
    denoiser: Denoiser,
    out: str | Path,
    *,
    target: str = DEFAULT_TARGET,
    form: str = STANDARD,
    samples: int | None = None,
    seed: int | None = None,
    plan: DeploymentPlan | None = None,
    correction: bool = True,
    quantized: str | Path | None = None,
    work: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Calibrate, quantize, correct and write a package.

    Args:
        denoiser: the float model, from `load` or `wrap`.
        out: folder to create.
        target: name of a backend.
        form: what the package looks like, of those that the target has.
        samples: calibration trajectories; default 64.
        seed: of the calibration; default 0.
        plan: precision of every layer; default W8A8 for all but first, last and embeddings.
        correction: correct the sampler for the quantization noise (PTQD).
        quantized: file of `quantize_to_file`, which has done all that already; a correction that
            it does not hold is measured.
        work: folder for finished parts; default a hidden sibling of `out`, removed at the end.
        force: replace a package that is there already.
        progress: told of finished work.

    Raises:
        EdgeqdmError: of the class and exit code that fits; nothing is left at `out`.
    """
    out = Path(out)
    backend = load_backend(target, form)
    check_destination(out, force=force)
    if quantized is not None and plan is not None:
        message = "a quantized model has its plan in it"
        raise InputError("EQ-3705", message, path="plan", hint="leave the plan or the file out")
    stored = None if quantized is None else load_quantized(Path(quantized), denoiser)
    if stored is not None and (stored.correction is not None or not correction):
        _refuse_calibration(samples, seed, correction)
    chosen = plan or (rule_plan(denoiser, target) if stored is None else stored.quantized.plan)
    quantizer.check_plan(denoiser, chosen)
    check_plan(chosen, denoiser.info, backend)
    n_runs, seed = DEFAULT_SAMPLES if samples is None else samples, seed or 0
    schedule = None if stored is None or not correction else stored.correction
    with working_folder(out, work) as folder:
        if stored is None:
            calibration = calibrate(
                denoiser, samples=n_runs, seed=seed, work=folder, progress=progress
            )
            found, told = quantize(denoiser, calibration, plan=chosen).quantized, None
        else:
            found, told = stored.quantized, stage("trajectories", progress)
        if correction and schedule is None:
            # Those of the calibration, where there was one.
            runs = collect_trajectories(denoiser, n_runs, seed=seed, work=folder, progress=told)
            schedule = correct(found, runs, work=folder, progress=progress)
        return _emit(found, schedule, backend, out, force=force, progress=progress)


def _refuse_calibration(samples: int | None, seed: int | None, correction: bool) -> None:
    """Raise InputError if the calibration that nothing needs was asked for with these settings."""
    given = [name for name, value in (("samples", samples), ("seed", seed)) if value is not None]
    if given:
        reason = "which holds its correction" if correction else "without a correction"
        raise InputError(
            "EQ-3706",
            f"{' and '.join(given)} would do nothing beside a quantized model, {reason}",
            path=given[0],
            hint=f"leave {' and '.join(given)} out",
        )


def _emit(
    quantized: QuantizedDenoiser,
    schedule: CorrectedSchedule | None,
    backend: Backend,
    out: Path,
    *,
    force: bool,
    progress: Progress | None,
) -> Manifest:
    done = stage("emit", progress)
    if done is not None:
        done(0, 1)
    manifest = emit_package(quantized, backend, out, correction=schedule, force=force)
    if done is not None:
        done(1, 1)
    return manifest


def unsupported(denoiser: Denoiser, plan: DeploymentPlan) -> tuple[Unsupported, ...]:
    """What `emit` would refuse of a plan for want of a kernel on its target, layer by layer.

    Raises:
        InputError: the plan does not fit the model or its sampler.
        UnsupportedError: a precision does not fit its layer, or the target cannot be loaded.
    """
    quantizer.check_plan(denoiser, plan)
    return load_backend(plan.target).check(plan, denoiser.info)


def verify(package: str | Path) -> Verification:
    """Check a package: files, plan, kernels that execute, golden run."""
    folder = Path(package)
    return verify_package(folder, load_backend(_target_of(folder)))


def _target_of(package: Path) -> str:
    return read_record(manifest_of(package), Manifest, error=VerifyError).target


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
        InputError: if the package is of another model, sampler or guidance, or its images are too
            few or not of the kind that feature-FID is defined on.
    """
    folder = Path(package)
    backend = load_backend(_target_of(folder))
    manifest = check_files(folder)
    formed = load_backend(manifest.target, manifest.form)
    _require_same_model(manifest, model, folder)
    player = playback.open_player(folder)
    plan = read_record(folder / "plan.json", DeploymentPlan, error=VerifyError)
    check_fid(fid, player)
    with tempfile.TemporaryDirectory() as scratch:
        variants = (
            float_variant(model, backend, Path(scratch), player),
            Variant(
                "package",
                formed.open(folder),
                player,
                formed.count_kernels(folder),
                manifest.integer_layers,
                folder_bytes(folder),
                plan.starts,
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
            progress=stage("bench", progress),
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
