"""Is a package what it says: whole, unchanged, correct and integer?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from edgeqdm.emit import playback
from edgeqdm.emit.backend import Backend, KernelCount
from edgeqdm.emit.integrity import check_files
from edgeqdm.emit.table import TABLE, pack_table
from edgeqdm.errors import EdgeqdmError, UnsupportedError, VerifyError
from edgeqdm.ir.codec import describe, digest, read_bytes, read_record, sha256_file
from edgeqdm.ir.package import Manifest, ScheduleFile
from edgeqdm.ir.plan import DeploymentPlan


@dataclass(frozen=True)
class Verification:
    """What was found in a package that passed.

    Attributes:
        manifest: the package's manifest.
        kernels: kernels the runtime on this host executes.
        planned: integer layers the plan promises.
        deviation: RMS deviation from the golden outputs over the quantization noise, [S].
    """

    manifest: Manifest
    kernels: KernelCount
    planned: int
    deviation: tuple[float, ...]


def verify_package(package: Path, backend: Backend) -> Verification:
    """Check files, plan, kernels and golden run; nothing of the package's code is executed.

    Raises:
        VerifyError: naming everything that is wrong at the first stage that fails.
    """
    manifest = check_files(package)
    if manifest.target != backend.name:
        raise VerifyError(
            "EQ-8201", f"package is for {manifest.target}, not {backend.name}", path=package
        )
    plan = read_record(package / "plan.json", DeploymentPlan, error=VerifyError)
    schedule = read_record(package / "schedule.json", ScheduleFile, error=VerifyError)
    _check_agreement(package, manifest, plan, schedule)
    planned = plan.n_integer_layers
    backend = _in_form(package, manifest, backend)
    kernels = backend.count_kernels(package)
    _check_kernels(package, plan, kernels)
    result, off = _replay(package, backend)
    if not result.passed:
        worst = max(range(len(result.deviation)), key=lambda i: _badness(result.deviation[i]))
        raise VerifyError(
            "EQ-8204",
            f"golden run not met: step {worst} deviates by {result.deviation[worst]:.2f} of the "
            f"quantization noise, at most {playback.GOLDEN_SHARE} is rounding",
            path=package,
            hint="this runtime computes something else; compare its version with the manifest",
        )
    if off > playback.SAMPLER_TOLERANCE:
        raise VerifyError(
            "EQ-8206",
            f"the sampler does not reproduce the golden samples: they differ by {off:.1g}",
            path=package / "schedule.json",
            hint="schedule or correction was changed by hand: emit the package again",
        )
    _check_table(package, schedule)
    return Verification(manifest, kernels, planned, result.deviation)


def _check_kernels(package: Path, plan: DeploymentPlan, kernels: KernelCount) -> None:
    """Raise VerifyError unless every phase has as many integer kernels as integer layers."""
    for phase in plan.phases:
        found, planned = kernels.integer_at(phase.start), len(phase.integer_layers())
        if found < planned:
            where = "" if len(plan.phases) == 1 else f" from step {phase.start} on"
            raise VerifyError(
                "EQ-8203",
                f"only {found} of {planned} planned layers run as integer kernels{where}",
                path=package,
                hint="another runtime version optimises the graph differently; emit again for it",
            )


def _in_form(package: Path, manifest: Manifest, backend: Backend) -> Backend:
    if manifest.form not in backend.forms:
        raise VerifyError(
            "EQ-8208",
            f"{backend.name} knows no form {describe(manifest.form)}",
            path=package,
            hint=f"known: {', '.join(backend.forms)}",
        )
    return backend.in_form(manifest.form)


def _check_table(package: Path, schedule: ScheduleFile) -> None:
    """Raise VerifyError unless schedule.bin holds the numbers of schedule.json."""
    try:
        expected = pack_table(schedule)
    except (UnsupportedError, ValueError) as problem:
        reason = problem.message if isinstance(problem, UnsupportedError) else str(problem)
        raise _wrong_table(package, reason) from problem
    path = package / TABLE
    if not path.exists() or read_bytes(path, error=VerifyError) != expected:
        raise _wrong_table(package, f"{TABLE} is not the table of schedule.json")


def _wrong_table(package: Path, reason: str) -> VerifyError:
    hint = "the package was changed by hand: emit it again"
    return VerifyError("EQ-8207", reason, path=package / TABLE, hint=hint)


def _check_agreement(
    package: Path, manifest: Manifest, plan: DeploymentPlan, schedule: ScheduleFile
) -> None:
    """Raise VerifyError unless manifest, plan and schedule tell the same story."""
    program, info = schedule.program, manifest.model
    stories: dict[str, tuple[object, object]] = {
        "integer_layers": (manifest.integer_layers, plan.n_integer_layers),
        "plan_sha256": (manifest.plan_sha256, sha256_file(package / "plan.json")),
        "program_sha256": (manifest.program_sha256, digest(program)),
        "plan.model": (info.fingerprint, plan.model),
        "plan.target": (manifest.target, plan.target),
        "plan.n_steps": (manifest.n_steps, plan.n_steps),
        "schedule.n_steps": (manifest.n_steps, program.n_steps),
        "schedule.guidance": (manifest.guidance, schedule.guidance),
        "schedule.conditioning": (info.conditioning, schedule.conditioning),
        "schedule.decoder": (info.decoder, schedule.decoder),
        "schedule.sample_shape": (info.sample_shape, schedule.sample_shape),
        "schedule.label_names": (info.label_names, schedule.label_names),
        **_correction_story(schedule),
        "schedule.golden_noise_rms": (manifest.n_steps, len(schedule.golden_noise_rms)),
    }
    wrong = [
        f"{name} is {describe(other)}, the manifest says {describe(own)}"
        for name, (own, other) in stories.items()
        if own != other
    ]
    if wrong:
        hint = "the package was changed by hand: emit it again"
        raise VerifyError("EQ-8202", "; ".join(wrong), path=package, hint=hint)


def _correction_story(schedule: ScheduleFile) -> dict[str, tuple[object, object]]:
    if schedule.correction is None:
        return {}
    key = schedule.correction.key
    return {
        "schedule.correction.key.sampler": (digest(schedule.program), key.sampler),
        "schedule.correction.key.guidance": (schedule.guidance, key.guidance),
    }


def _replay(package: Path, backend: Backend) -> tuple[playback.SelfTest, float]:
    evaluate = backend.open(package)
    try:
        player = playback.open_player(package)
        golden = playback.read_safetensors(package / "golden.safetensors")
        return playback.self_test(player, evaluate, golden), playback.replay_sampler(player, golden)
    except EdgeqdmError:
        raise
    # A runtime raises its own classes for tensors that do not fit its graph.
    except Exception as error:
        raise VerifyError(
            "EQ-8205",
            f"the golden run cannot be replayed: {type(error).__name__}: {error}",
            path=package / "golden.safetensors",
            hint="the package was changed by hand: emit it again",
        ) from error


def _badness(deviation: float) -> float:
    return math.inf if math.isnan(deviation) else deviation
