"""What runs a recipe, all of it in its folder, so that each stage goes on where it stopped:

profile -> search -> emit -> verify

profile.json   latencies of this host, and kept-profile/ until they are measured
search/        see `edgeqdm.searching`
package/       what is deployed
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeqdm import pipeline, searching, tuning
from edgeqdm.backends import load_backend
from edgeqdm.bench.compare import host
from edgeqdm.cli_inputs import load_model
from edgeqdm.emit.package import check_plan
from edgeqdm.emit.verify import Verification
from edgeqdm.emit.writer import check_destination
from edgeqdm.errors import EdgeqdmError, InputError, StorageError, VerifyError
from edgeqdm.ir.codec import read_record
from edgeqdm.ir.package import Manifest, ScheduleFile
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.profile import LatencyProfile
from edgeqdm.ir.search import ParetoReport
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.profile.adopt import PROFILE, Adopted, read_profile
from edgeqdm.recipe import HOST, EmitPart, ProfilePart, Recipe, settings_of
from edgeqdm.stages import Progress, rule_plan

SEARCH, PACKAGE, KEPT_PROFILE = "search", "package", "kept-profile"


@dataclass(frozen=True)
class Optimized:
    """What `optimize` made.

    Attributes:
        profile: file of the latencies, or the name of those that are shipped.
        search: folder of the search.
        report: the front.
        plan: of the trial that was emitted.
        package: folder of the package.
        kept: the package was there already, of this very plan.
        verification: of the package.
    """

    profile: str
    search: Path
    report: ParetoReport
    plan: DeploymentPlan
    package: Path
    kept: bool
    verification: Verification


def optimize(
    recipe: Recipe,
    *,
    conditioning: Path | None = None,
    online: bool = False,
    force: bool = False,
    notice: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Optimized:
    """Profile, search, emit and verify; the same call goes on.

    A package that is there and was made of the same plan is only verified.

    Args:
        recipe: what to do, and where.
        conditioning: safetensors file of embeddings, for a model that takes them.
        online: download the model from the hub.
        force: make the package again, even of the same plan.
        notice: told what a user should know, one sentence each.
        progress: told of finished work.

    Raises:
        EdgeqdmError: of the class and exit code that fits; finished stages stay.
    """
    out = Path(recipe.out)
    backend = load_backend(recipe.target, recipe.emit.form)
    told = notice or _untold
    measured = recipe.profile.source != HOST or (out / PROFILE).exists()
    adopted = _adopt(recipe, told) if measured else None
    denoiser = _load(recipe, conditioning, online, progress)
    # Before the search: a plan by rule has the kinds of scales that it will choose.
    check_plan(rule_plan(denoiser, recipe.target), denoiser.info, backend)
    check_destination(out / PACKAGE, force=True)
    if adopted is None:
        _measure(recipe, denoiser, _part("profile", progress))
        adopted = _adopt(recipe, told)
    report = _search(recipe, denoiser, adopted, told, _part("search", progress))
    plan = searching.plan_of_trial(
        denoiser,
        out / SEARCH,
        str(recipe.emit.trial),
        progress=_part("plan", progress),
    )
    kept = not force and _is_made(out / PACKAGE, plan, recipe.emit)
    if not kept:
        _emit(recipe, denoiser, plan, _part("emit", progress))
    return Optimized(
        profile=str(_profile_source(recipe)),
        search=out / SEARCH,
        report=report,
        plan=plan,
        package=out / PACKAGE,
        kept=kept,
        verification=_verified(out / PACKAGE, kept, progress),
    )


def _untold(said: str) -> None:
    return


def _part(name: str, progress: Progress | None) -> Progress | None:
    """Progress of stages under names of their own: two of them measure, two of them emit."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)


def _load(
    recipe: Recipe, conditioning: Path | None, online: bool, progress: Progress | None
) -> Denoiser:
    denoiser = load_model(
        recipe.model,
        scheduler=recipe.sampler.scheduler,
        steps=recipe.sampler.steps,
        guidance=recipe.sampler.guidance,
        eta=recipe.sampler.eta,
        conditioning=conditioning,
        online=online,
        split_skips=recipe.split_skips,
    )
    if progress is not None:
        progress("load", 1, 1)
    return denoiser


def _profile_source(recipe: Recipe) -> str | Path:
    asked = recipe.profile.source
    return Path(recipe.out) / PROFILE if asked == HOST else asked


def _again(recipe: Recipe) -> str:
    """What to do about a profile that cannot be used."""
    if recipe.profile.source != HOST:
        return "name another profile"
    return f"remove {_profile_source(recipe)} to measure again"


def _measure(recipe: Recipe, denoiser: Denoiser, progress: Progress | None) -> None:
    out, asked = Path(recipe.out), recipe.profile
    tuning.profile_host(
        denoiser,
        out / PROFILE,
        target=recipe.target,
        threads=asked.threads,
        precisions=recipe.search.precisions,
        wholes=asked.wholes,
        seconds=asked.seconds,
        work=out / KEPT_PROFILE,
        progress=progress,
    )
    shutil.rmtree(out / KEPT_PROFILE, ignore_errors=True)


def _adopt(recipe: Recipe, notice: Callable[[str], None]) -> Adopted:
    """The profile of the recipe, with hints that name what a recipe's user can do."""
    source, asked = _profile_source(recipe), recipe.profile
    again = _again(recipe)
    try:
        found = read_profile(source, target=recipe.target, accept=asked.accept_flags)
    except InputError as error:
        if error.code == "EQ-3522":
            flags = ", ".join((*asked.accept_flags, error.message.rpartition("flagged ")[2]))
            error.hint = f"{again}, or --set profile.accept_flags='[{flags}]'"
        elif error.code in ("EQ-3520", "EQ-3521"):
            error.hint = f"{again}, or name another `out`" if asked.source == HOST else again
        raise
    for warning in found.warnings:
        notice(warning)
    if asked.source == HOST:
        _check_host(found.profile, Path(source))
        for difference in _asked_otherwise(found.profile, asked):
            notice(f"{source} is {difference}; {again}")
    return found


def _check_host(profile: LatencyProfile, file: Path) -> None:
    """Raise StorageError EQ-6401 if the kept profile was measured elsewhere."""
    if searching.is_this_host(profile):
        return
    name, versions = profile.runtime.name, load_backend(profile.target).versions()
    here = host(versions, threads=1)
    compared = {
        "device": (profile.device.name, here.cpu),
        "machine": (profile.device.machine, here.machine),
        name: (profile.runtime.version, versions.get(name, "not installed")),
    }
    differing = [
        f"{what} {theirs}, here {mine}"
        for what, (theirs, mine) in compared.items()
        if theirs != mine
    ]
    raise StorageError(
        "EQ-6401",
        f"the profile is not of this host: {'; '.join(differing)}",
        path=file,
        hint=f"remove it to measure again, or use it: --set profile.source={file}",
    )


def _asked_otherwise(profile: LatencyProfile, asked: ProfilePart) -> list[str]:
    """What else a measurement would be asked for now; the least time per graph is not kept."""
    # Every precision has a whole network of its own, beside those that mix them.
    mixed = max(0, len(profile.wholes) - len({entry.precision for entry in profile.entries}))
    compared = (
        (profile.threads, asked.threads, "threads"),
        (mixed, asked.wholes, "mixed networks as a whole"),
    )
    return [f"of {was} {what}, not {now}" for was, now, what in compared if was != now]


def _search(
    recipe: Recipe,
    denoiser: Denoiser,
    adopted: Adopted,
    notice: Callable[[str], None],
    progress: Progress | None,
) -> ParetoReport:
    asked, profile = recipe.search, adopted.profile
    try:
        settings = settings_of(
            recipe,
            float_ms=lambda: searching.float_ms(denoiser, profile, recipe.target, asked.precisions),
            accepted=adopted.accepted,
        )
        return searching.search(
            denoiser,
            Path(recipe.out) / SEARCH,
            profile,
            settings=settings,
            trials=asked.trials,
            source=searching.Source(recipe.model, recipe.sampler.scheduler, recipe.split_skips),
            storage=asked.storage,
            study=asked.study,
            notice=notice,
            progress=progress,
        )
    except InputError as error:
        if error.code == "EQ-3510" and recipe.profile.source == HOST:
            error.hint = _again(recipe)
        raise


def _is_made(package: Path, plan: DeploymentPlan, asked: EmitPart) -> bool:
    """Whether the package was made of this plan, in the form and with a correction as asked."""
    try:
        made = read_record(package / "plan.json", DeploymentPlan)
        schedule = read_record(package / "schedule.json", ScheduleFile)
        manifest = read_record(package / "manifest.json", Manifest)
    except EdgeqdmError:
        return False
    corrected = schedule.correction is not None
    return made == plan and corrected == asked.correct and manifest.form == asked.form


def _emit(
    recipe: Recipe, denoiser: Denoiser, plan: DeploymentPlan, progress: Progress | None
) -> None:
    out, asked = Path(recipe.out), recipe.search
    pipeline.emit(
        denoiser,
        out / PACKAGE,
        target=recipe.target,
        samples=asked.samples,
        seed=asked.seed,
        plan=plan,
        form=recipe.emit.form,
        correction=recipe.emit.correct,
        work=out / SEARCH / searching.KEPT,
        # It was made by this recipe; whatever is no package is never replaced.
        force=True,
        progress=progress,
    )


def _verified(package: Path, kept: bool, progress: Progress | None) -> Verification:
    try:
        found = pipeline.verify(package)
    except VerifyError as error:
        if kept:
            error.hint = "--force makes the package again"
        raise
    if progress is not None:
        progress("verify", 1, 1)
    return found
