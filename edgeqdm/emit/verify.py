"""Is a package what it says: whole, unchanged, correct and integer?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeqdm.emit import playback
from edgeqdm.emit.backend import Backend, KernelCount
from edgeqdm.emit.integrity import check_files
from edgeqdm.errors import VerifyError
from edgeqdm.ir.codec import read_record
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
    read_record(package / "schedule.json", ScheduleFile, error=VerifyError)
    planned = len(plan.phases[0].quantized())
    if planned != manifest.integer_layers:
        raise VerifyError(
            "EQ-8202",
            f"the plan has {planned} integer layers, the manifest {manifest.integer_layers}",
            path=package / "plan.json",
        )
    kernels = backend.count_kernels(package)
    if kernels.integer < planned:
        raise VerifyError(
            "EQ-8203",
            f"only {kernels.integer} of {planned} planned layers run as integer kernels",
            path=package,
            hint="another runtime version optimises the graph differently; emit again for it",
        )
    player = playback.open_player(package)
    golden = playback.read_safetensors(package / "golden.safetensors")
    result = playback.self_test(player, backend.open(package), golden)
    if not result.passed:
        worst = max(range(len(result.deviation)), key=result.deviation.__getitem__)
        raise VerifyError(
            "EQ-8204",
            f"golden run not met: step {worst} deviates by {result.deviation[worst]:.2f} of the "
            f"quantization noise, at most {playback.GOLDEN_SHARE} is rounding",
            path=package,
            hint="this runtime computes something else; compare its version with the manifest",
        )
    return Verification(manifest, kernels, planned, result.deviation)
