"""The stages between a profile and a plan: sensitivity -> search -> front -> plan.

A search folder holds all of it, so that each stage goes on where it stopped:

    search.json       what was asked for
    profile.json      the latencies it looks up
    sensitivity.json  damage of every layer, precision and range of steps
    study.db          Optuna's study, and ledger.jsonl, a line per finished trial
    pareto.json       the front
    kept/             calibration, sensitivities and float images
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from edgeqdm import __version__
from edgeqdm.backends import load_backend
from edgeqdm.bench.compare import Variant, compare, folder_bytes, host, player_of
from edgeqdm.calibrate.observe import LayerObservation, observation_tensors
from edgeqdm.calibrate.trajectories import checksum, collect_trajectories
from edgeqdm.emit.backend import Backend
from edgeqdm.emit.package import exportable
from edgeqdm.emit.writer import write_file_atomically
from edgeqdm.errors import InputError, NumericalError, OutputError, StorageError
from edgeqdm.ir.codec import digest, dump_record, read_record
from edgeqdm.ir.plan import DeploymentPlan, Prediction
from edgeqdm.ir.precision import FP32, TABLE, Precision
from edgeqdm.ir.profile import LatencyProfile, Provenance, is_sealed
from edgeqdm.ir.report import BenchReport, BenchRow
from edgeqdm.ir.search import FoundPlan, ParetoReport, SearchRecord, SearchSettings
from edgeqdm.ir.sensitivity import SensitivityReport
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.profile.adopt import PROFILE
from edgeqdm.profile.opkeys import NetworkKeys
from edgeqdm.profile.predict import costs_of_phases
from edgeqdm.quantize.blocks import find_blocks
from edgeqdm.search.evaluate import Evaluator
from edgeqdm.search.sensitivity import measure_sensitivity, step_ranges
from edgeqdm.search.space import POLICIES, Candidate, Param, SearchSpace, make_space
from edgeqdm.search.storage import (
    DATABASE,
    LEDGER,
    check_shared,
    locked,
    open_database,
    open_sqlite,
    study_of_ledger,
    write_ledger,
)
from edgeqdm.search.study import (
    DEFAULT_SAMPLER,
    FINGERPRINT,
    MAX_IDLE,
    ORIGIN,
    SAMPLERS,
    Limits,
    NumberedSampler,
    Objective,
    Owner,
    Pricing,
    check_fingerprint,
    check_same,
    front,
    prepare,
    unknown_sampler,
    work_on,
)
from edgeqdm.search.warm import fastest_plan_us, ladder, least_bytes, rungs_for
from edgeqdm.stages import Progress, calibrate, stage
from edgeqdm.tuning import Space, cost_model, open_space

SEARCH, PARETO, SENSITIVITY, KEPT = "search.json", "pareto.json", "sensitivity.json", "kept"
SENSITIVITY_SEEDS, JUDGE_SEEDS, HELD_OUT_SEEDS = 2**40, 2**41, 2**42
"""Noise of the three is never shared, nor with a calibration's."""
TRIALS, FOLDER = "trials", "folder"
MEASURED = ("measured_ms", "measured_ratio", "measured_sqnr_db")
CALIBRATION = "calibration"
UNPHASED = (
    "the profile has no graph of several phases: what they take longer than one is not predicted, "
    "and `edgeqdm profile kit --missing-from` makes a kit for it"
)
TOGETHER = 8
"""Plans that are measured in turns, in one process."""


@dataclass(frozen=True)
class Source:
    """How a model was loaded, so that a worker can load it again.

    Attributes:
        model: as the user named it; empty for one that was handed over in Python.
        scheduler: as the user named it.
        split_skips: whether skips have layers of their own.
    """

    model: str = ""
    scheduler: str | None = None
    split_skips: bool = False


def checked_settings(**values: Any) -> SearchSettings:
    """Settings, or the InputError that names the wrong one.

    Raises:
        InputError: EQ-3633.
    """
    if values.get("sampler", DEFAULT_SAMPLER) not in SAMPLERS:
        raise unknown_sampler(values["sampler"])
    try:
        return SearchSettings(**values)
    except ValidationError as problem:
        detail = problem.errors(include_url=False)[0]
        field = ".".join(map(str, detail["loc"]))
        message = f"{detail['msg'].removeprefix('Value error, ')}, found {detail['input']!r}"
        raise InputError("EQ-3633", message, path=field) from None


def float_ms(
    denoiser: Denoiser, profile: LatencyProfile, target: str, precisions: Sequence[Precision]
) -> float:
    """Predicted latency of the float model."""
    opened = open_space(denoiser, target, precisions=precisions)
    return cost_model(profile, opened).latency.predict_us(dict.fromkeys(opened.tables, TABLE)) / 1e3


@dataclass(frozen=True)
class Task:
    """Everything that trials of a search share.

    Attributes:
        denoiser: the float model.
        folder: of the search.
        settings: what was asked for.
        profile: the latencies.
        pricing: what candidates cost.
        limits: what they must keep.
        observations: of the float model's layers.
        fingerprint: what trials depend on, by name.
    """

    denoiser: Denoiser
    folder: Path
    settings: SearchSettings
    profile: LatencyProfile
    pricing: Pricing
    limits: Limits
    observations: Mapping[str, LayerObservation]
    fingerprint: Mapping[str, str]

    @property
    def space(self) -> SearchSpace:
        return self.pricing.space

    def evaluator(self) -> Evaluator:
        """What draws the images that trials are judged on."""
        return Evaluator(
            self.denoiser,
            self.observations,
            seed=JUDGE_SEEDS + self.settings.seed,
            n_images=self.settings.images[-1],
            work=self.folder / KEPT,
        )


def sensitivity(
    denoiser: Denoiser,
    observations: Mapping[str, LayerObservation],
    asked: Sequence[tuple[str, Precision]],
    *,
    images: int,
    ranges: int,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> SensitivityReport:
    """Damage of layers at precisions, on trajectories that calibration did not see."""
    own = SENSITIVITY_SEEDS + seed
    runs = collect_trajectories(
        denoiser, images, seed=own, work=work, progress=stage("float runs", progress)
    )
    return measure_sensitivity(
        denoiser,
        observations,
        runs,
        asked,
        seed=own,
        ranges=step_ranges(denoiser.program.n_steps, ranges),
        work=work,
        progress=stage("sensitivity", progress),
    )


def variants(space: SearchSpace) -> list[tuple[str, Precision]]:
    """Every layer and coded precision that a plan of the space may hold."""
    return [
        (layer, precision)
        for group in space.groups
        for layer in group.layers
        for precision in dict.fromkeys(space.layer_precision(layer, c) for c in group.choices)
        if precision not in (FP32, TABLE)
    ]


def search(
    denoiser: Denoiser,
    folder: str | Path,
    profile: LatencyProfile,
    *,
    settings: SearchSettings,
    trials: int,
    source: Source | None = None,
    storage: str | None = None,
    study: str | None = None,
    remeasure: bool | None = None,
    notice: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> ParetoReport:
    """Search plans until `trials` of them are complete; the same call goes on.

    Args:
        denoiser: the float model.
        folder: of the search, made if it is not there.
        profile: latencies of the target.
        settings: what to search; must be the same when a search goes on.
        trials: complete ones in all; those found clearly worse early, or beyond a limit, do not
            count.
        source: how workers load the model.
        storage: URL of a database for several workers; default SQLite in the folder.
        study: its name; default the model's.
        remeasure: measure the front on this host; default whether the profile is of this host.
        notice: told what had to be mended in the folder.
        progress: told of finished work.

    Raises:
        NumericalError: EQ-5621, no plan keeps the limits; says what can be reached.
        StorageError: the folder's search is another one, is locked or damaged.
        InputError: the profile lacks operations, or a setting does not fit.
    """
    folder = Path(folder)
    name = study or denoiser.info.name
    if storage is not None:
        check_shared(storage)
    with locked(folder):
        _check_folder(folder, name)
        task = make_task(denoiser, folder, profile, settings, notice=notice, progress=progress)
        opened = _open_study(task, name, storage, notice)
        check_fingerprint(opened, task.fingerprint)
        _write_search(task, name, trials, source or Source())
        starts = _starts(task, trials, progress)
        opened.set_user_attr(TRIALS, trials)
        opened.set_user_attr(FOLDER, str(folder.resolve()))
        prepare(opened, task.fingerprint, starts)
        objective = Objective(task.pricing, task.evaluator(), task.limits, settings.images)
        told = stage("trials", progress)
        if storage is None:
            Owner(opened, objective, folder / LEDGER).run(trials, progress=told)
        else:
            work_on(opened, objective, trials, progress=told)
            write_ledger(folder, opened)
        report = _with_measured(_report(task, opened), folder)
        write_file_atomically(folder / PARETO, dump_record(report))
        _check_found(report, trials, notice)
        # CPU time of one thread is measured, and nothing else is comparable to it.
        if remeasure or (remeasure is None and profile.threads == 1 and is_this_host(profile)):
            report = measure_front(task, opened, report, progress=progress)
    return report


def _open_study(
    task: Task, name: str, storage: str | None, notice: Callable[[str], None] | None
) -> optuna.Study:
    if storage is None:
        opened, told = open_sqlite(task.folder, name)
        if notice is not None:
            for line in told:
                notice(line)
    else:
        opened = open_database(storage, name, create=True)
    opened.sampler = NumberedSampler(task.settings.sampler, task.settings.seed)
    return opened


def _starts(
    task: Task, trials: int, progress: Progress | None
) -> Sequence[tuple[str, Mapping[str, Param]]]:
    """What the study begins with, at most as many as there are to be trials."""
    found = _measured_damage(task, progress)
    rungs = ladder(
        task.pricing,
        found,
        limits=task.limits,
        n=rungs_for(trials),
        progress=stage("additive optima", progress),
    )
    within = [
        (origin, task.space.params(candidate))
        for origin, candidate in rungs
        if task.limits.keeps(task.pricing.price(candidate))
    ]
    return within[:trials]


def _check_found(report: ParetoReport, trials: int, notice: Callable[[str], None] | None) -> None:
    if not report.complete:
        raise NumericalError(
            "EQ-5624",
            f"none of {report.pruned + report.failed} trials could be drawn to the end",
            path=report.study,
            hint="allow more latency or bytes, or offer more precisions",
        )
    if report.complete < trials and notice is not None:
        notice(
            f"{report.complete} of {trials} trials are complete: the last {MAX_IDLE} were beyond "
            "a limit, clearly worse than others or failed"
        )


def _check_folder(folder: Path, name: str) -> None:
    known = [file for file in (SEARCH, DATABASE, LEDGER) if (folder / file).exists()]
    foreign = [file for file in (PROFILE, SENSITIVITY, PARETO) if (folder / file).exists()]
    if foreign and not known:
        raise OutputError(
            "EQ-7113",
            f"is there already, and the folder has no {SEARCH}",
            path=folder / foreign[0],
            hint="name an empty folder: this file would be replaced",
        )
    if SEARCH in known and (there := read_search(folder).study) != name:
        raise StorageError(
            "EQ-6311",
            f"the folder is a search of {there!r}, not of {name!r}",
            path=folder,
            hint="name another folder; of one model, --study tells studies apart",
        )


def make_task(
    denoiser: Denoiser,
    folder: Path,
    profile: LatencyProfile,
    settings: SearchSettings,
    *,
    notice: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Task:
    """Calibrate, price and check the limits; finished parts are taken from the folder.

    Raises:
        StorageError: EQ-6310, if the folder's search was made for something else.
    """
    opened = open_space(denoiser, settings.target, precisions=settings.precisions)
    space = _space(denoiser, opened, settings)
    cost = cost_model(profile, opened)
    if notice is not None:
        unphased = settings.phases > 1 and not costs_of_phases(profile, opened.network)
        for line in (*cost.warnings, *([UNPHASED] if unphased else [])):
            notice(line)
    pricing = Pricing(space, cost.latency, cost.storage)
    most = None if settings.latency_ms is None else settings.latency_ms * 1e3
    limits = Limits(most, settings.max_bytes)
    fingerprint = _fingerprint(denoiser, profile, space, settings)
    made_for = read_search(folder).fingerprint if (folder / SEARCH).is_file() else None
    if made_for is not None:
        # Before anything is computed: that takes minutes, and lies in the folder.
        check_same({k: v for k, v in made_for.items() if k != CALIBRATION}, fingerprint, folder)
    _check_limits(pricing, limits)
    calibration = calibrate(
        denoiser,
        samples=settings.samples,
        seed=settings.seed,
        work=folder / KEPT,
        progress=progress,
    )
    seen = calibration.observations
    fingerprint |= {CALIBRATION: checksum(observation_tensors(seen))}
    if made_for is not None:
        check_same(made_for, fingerprint, folder)
    return Task(denoiser, folder, settings, profile, pricing, limits, seen, fingerprint)


def _space(denoiser: Denoiser, opened: Space, settings: SearchSettings) -> SearchSpace:
    return make_space(
        opened.base,
        opened.network,
        opened.offered,
        tie=_ties(denoiser, opened.network, settings.tie),
        fixed=opened.tables,
        max_phases=settings.phases,
        policies=POLICIES if settings.policies else POLICIES[:1],
    )


def _ties(denoiser: Denoiser, network: NetworkKeys, tie: str) -> dict[str, str]:
    if tie == "siblings":
        return {layer: names[0] for names in network.siblings for layer in names}
    if tie == "block":
        blocks = find_blocks(denoiser, tuple(network.keys))
        return {layer: block.layers[0] for block in blocks for layer in block.layers}
    return {}


def _check_limits(pricing: Pricing, limits: Limits) -> None:
    least = least_bytes(pricing)
    if limits.disk_bytes is not None and least > limits.disk_bytes:
        raise NumericalError(
            "EQ-5621",
            f"no plan fits into {limits.disk_bytes} bytes; the smallest possible has {least} bytes",
            path="max_bytes",
            hint="allow more, or offer more precisions",
        )
    fastest = fastest_plan_us(pricing, limits.disk_bytes)
    if fastest is None or (limits.latency_us is not None and fastest > limits.latency_us):
        within = "" if limits.disk_bytes is None else f" within {limits.disk_bytes} bytes"
        told = "none was found" if fastest is None else f"{_milliseconds(fastest)} ms"
        raise NumericalError(
            "EQ-5621",
            f"no plan reaches {(limits.latency_us or 0) / 1e3:g} ms; the fastest possible{within} "
            f"is predicted at {told}",
            path="latency",
            hint="allow more, or offer more precisions",
        )


def _milliseconds(us: float) -> str:
    """Rounded up: whoever asks for this much gets a plan."""
    return f"{math.ceil(us) / 1e3:.3f}"


def _fingerprint(
    denoiser: Denoiser, profile: LatencyProfile, space: SearchSpace, settings: SearchSettings
) -> dict[str, str]:
    """What trials depend on, by name, but for the calibration."""
    choices = " ".join(f"{g.name}:{','.join(g.choices)}" for g in space.groups)
    return {
        "model": denoiser.info.fingerprint,
        "sampler": digest(denoiser.program),
        "guidance": str(denoiser.guidance.scale),
        "profile": profile.payload_sha256,
        "space": hashlib.sha256(choices.encode()).hexdigest(),
        "edgeqdm": __version__,
        **{
            f"settings.{name}": str(value)
            for name, value in settings.model_dump(mode="json").items()
        },
    }


def _measured_damage(task: Task, progress: Progress | None) -> SensitivityReport:
    settings = task.settings
    found = sensitivity(
        task.denoiser,
        task.observations,
        variants(task.space),
        images=settings.sensitivity_images,
        ranges=settings.ranges,
        seed=settings.seed,
        work=task.folder / KEPT,
        progress=progress,
    )
    write_file_atomically(task.folder / SENSITIVITY, dump_record(found))
    return found


def _write_search(task: Task, name: str, trials: int, source: Source) -> None:
    program = task.denoiser.program
    record = SearchRecord(
        edgeqdm_version=__version__,
        study=name,
        source=source.model,
        scheduler=source.scheduler,
        steps=program.n_steps,
        eta=float(program.settings.get("eta") or 0.0),
        guidance=task.denoiser.guidance.scale,
        split_skips=source.split_skips,
        settings=task.settings,
        trials=trials,
        fingerprint=dict(task.fingerprint),
    )
    write_file_atomically(task.folder / SEARCH, dump_record(record))
    write_file_atomically(task.folder / PROFILE, dump_record(task.profile))


def read_search(folder: str | Path) -> SearchRecord:
    """What a search folder was made for.

    Raises:
        InputError: if the folder holds no search.
    """
    file = Path(folder) / SEARCH
    if not file.is_file():
        raise InputError(
            "EQ-3630", f"holds no {SEARCH}", path=folder, hint="`edgeqdm search` makes one"
        )
    return read_record(file, SearchRecord, error=StorageError)


def _profile_of(folder: Path) -> LatencyProfile:
    profile = read_record(folder / PROFILE, LatencyProfile, error=StorageError)
    if not is_sealed(profile):
        raise StorageError(
            "EQ-6312",
            "the profile was edited after it was measured",
            path=folder / PROFILE,
            hint="go on with `edgeqdm search` and the profile it was made with",
        )
    return profile


def reopen(denoiser: Denoiser, folder: str | Path, *, progress: Progress | None = None) -> Task:
    """The task of a folder, for its own model."""
    folder = Path(folder)
    settings = read_search(folder).settings
    return make_task(denoiser, folder, _profile_of(folder), settings, progress=progress)


def work(
    denoiser: Denoiser,
    folder: str | Path,
    storage: str,
    study: str,
    *,
    progress: Progress | None = None,
) -> int:
    """Take trials of a shared study until it is done.

    Args:
        denoiser: the float model.
        folder: of the search, or a copy of it.
        storage: URL of the database.
        study: its name.
        progress: told of complete trials, of all workers.

    Returns:
        Complete trials of the study.

    Raises:
        StorageError: EQ-6310, if the study was made for something else than the folder's search.
    """
    opened = open_database(storage, study, create=False)
    if TRIALS not in opened.user_attrs or opened.user_attrs.get(FINGERPRINT) is None:
        raise _not_ready(study)
    task = reopen(denoiser, folder, progress=progress)
    check_fingerprint(opened, task.fingerprint)
    opened.sampler = NumberedSampler(task.settings.sampler, task.settings.seed)
    objective = Objective(task.pricing, task.evaluator(), task.limits, task.settings.images)
    target = int(opened.user_attrs[TRIALS])
    work_on(opened, objective, target, progress=stage("trials", progress))
    return sum(t.state is TrialState.COMPLETE for t in opened.get_trials(deepcopy=False))


def _report(task: Task, study: optuna.Study) -> ParetoReport:
    trials = study.get_trials(deepcopy=False)
    states = [trial.state for trial in trials]
    return ParetoReport(
        study=study.study_name,
        model=task.denoiser.info.fingerprint,
        profile_sha256=task.profile.payload_sha256,
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL),
        float_ms=task.pricing.price(task.space.uniform(FP32)).latency_us / 1e3,
        provenance=_provenance(task.profile),
        plans=tuple(_found(trial) for trial in front(study, task.limits)),
    )


def _found(trial: FrozenTrial) -> FoundPlan:
    attributes = trial.user_attrs
    return FoundPlan(
        trial=trial.number,
        latency_ms=trial.values[0],
        image_sqnr_db=trial.values[1],
        disk_bytes=attributes["disk_bytes"],
        resident_bytes=attributes["resident_bytes"],
        phases=attributes["phases"],
        origin=attributes.get(ORIGIN, "search"),
    )


def is_this_host(profile: LatencyProfile) -> bool:
    """Whether a profile was measured on a machine like this one, with this runtime."""
    versions = load_backend(profile.target).versions()
    here = host(versions, threads=1)
    same_machine = (profile.device.name, profile.device.machine) == (here.cpu, here.machine)
    return same_machine and versions.get(profile.runtime.name) == profile.runtime.version


def _with_measured(report: ParetoReport, folder: Path) -> ParetoReport:
    """The report with what an earlier run has measured of the same trials."""
    if not (folder / PARETO).is_file():
        return report
    old = {
        plan.trial: plan
        for plan in read_record(folder / PARETO, ParetoReport, error=StorageError).plans
    }
    plans = tuple(
        plan.model_copy(update={k: getattr(old[plan.trial], k) for k in MEASURED})
        if plan.trial in old
        else plan
        for plan in report.plans
    )
    return report.model_copy(update={"plans": plans})


def measure_front(
    task: Task,
    study: optuna.Study,
    report: ParetoReport,
    *,
    rounds: int = 60,
    images: int = 32,
    progress: Progress | None = None,
) -> ParetoReport:
    """Emit plans of a front and measure them beside the float graph, on images no trial saw.

    A few at a time: all of a round are in memory together. What is measured is written to the
    folder at once, and not measured again.
    """
    missing = [p for p in report.plans if p.measured_ms is None]
    params = {t.number: t.params for t in study.get_trials(deepcopy=False)}
    for first in range(0, len(missing), TOGETHER):
        plans = {
            str(p.trial): task.space.plan(task.space.candidate(params[p.trial]))
            for p in missing[first : first + TOGETHER]
        }
        told = None if progress is None else _shifted(progress, first, len(missing))
        found = measure_plans(task, plans, rounds=rounds, images=images, progress=told)
        report = _filled(report, {row.name: row for row in found.rows})
        write_file_atomically(task.folder / PARETO, dump_record(report))
    return report


def _filled(report: ParetoReport, rows: Mapping[str, BenchRow]) -> ParetoReport:
    plans = [
        plan.model_copy(
            update={
                "measured_ms": rows[str(plan.trial)].cpu_ms_per_step,
                "measured_ratio": rows[str(plan.trial)].cpu_ratio,
                "measured_sqnr_db": rows[str(plan.trial)].image_sqnr_db,
            }
        )
        if str(plan.trial) in rows
        else plan
        for plan in report.plans
    ]
    return report.model_copy(update={"plans": tuple(plans)})


def _shifted(progress: Progress, first: int, total: int) -> Progress:
    """Stages of one of several rounds, named by the plans they are of."""
    last = min(first + TOGETHER, total)

    def told(name: str, done: int, expected: int) -> None:
        progress(f"{name} {first + 1}-{last} of {total} plans", done, expected)

    return told


def measure_plans(
    task: Task,
    plans: Mapping[str, DeploymentPlan],
    *,
    rounds: int,
    images: int,
    progress: Progress | None = None,
) -> BenchReport:
    """Emitted graphs of plans beside the float graph: CPU time, image error, size."""
    backend, evaluator = load_backend(task.settings.target), task.evaluator()
    base = task.space.plan(task.space.uniform(FP32))
    done = stage("emit", progress)
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for number, (name, plan) in enumerate({"float": base, **plans}.items()):
            folder = Path(scratch) / str(number)
            rows.append(_variant(task, evaluator, backend, name, plan, folder))
            if done is not None:
                done(number + 1, len(plans) + 1)
        return compare(
            task.denoiser,
            tuple(rows),
            libraries=backend.versions(),
            rounds=rounds,
            images=images,
            seeds=(HELD_OUT_SEEDS + task.settings.seed,),
            progress=stage("measure", progress),
        )


def _variant(
    task: Task,
    evaluator: Evaluator,
    backend: Backend,
    name: str,
    plan: DeploymentPlan,
    folder: Path,
) -> Variant:
    for path, file in backend.emit(exportable(evaluator.quantized(plan))).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(file.data)
    return Variant(
        name,
        backend.open(folder),
        player_of(task.denoiser),
        backend.count_kernels(folder),
        plan.n_integer_layers,
        folder_bytes(folder),
        plan.starts,
    )


def best_of(report: ParetoReport, rule_ms: float | None) -> FoundPlan:
    """The plan of least image error among those that are not slower than `rule_ms`.

    Where all are slower, the fastest. Without `rule_ms`, every plan of the front counts.

    Raises:
        InputError: EQ-3631, if the front is empty.
    """
    if not report.plans:
        raise InputError(
            "EQ-3631", "no trial is complete yet", path=report.study, hint="go on with the search"
        )
    fast = [p for p in report.plans if rule_ms is None or p.latency_ms <= rule_ms]
    return max(fast, key=lambda p: p.image_sqnr_db) if fast else report.plans[0]


def plan_of_trial(
    denoiser: Denoiser,
    folder: str | Path,
    trial: str = "best",
    *,
    progress: Progress | None = None,
) -> DeploymentPlan:
    """The plan of a trial, with the reason for every precision; the folder may be in use.

    Args:
        denoiser: the model that was searched.
        folder: of the search.
        trial: a number, or `best`: the least image error within the latency that was asked for,
            else within that of the plan by rule.
        progress: told of finished work.

    Raises:
        InputError: EQ-3632, if there is no such trial, or it has no result.
    """
    folder = Path(folder)
    task = reopen(denoiser, folder, progress=progress)
    record = read_search(folder)
    chosen = _trial(task, study_of_ledger(folder, record.study), trial)
    candidate = task.space.candidate(chosen.params)
    report = read_record(folder / SENSITIVITY, SensitivityReport, error=StorageError)
    plan = task.space.plan(candidate, reasons(task.pricing, report, candidate))
    prediction = Prediction(
        profile_sha256=task.profile.payload_sha256,
        device=task.profile.device.name,
        latency_ms=chosen.values[0],
        provenance=_provenance(task.profile),
        disk_bytes=chosen.user_attrs["disk_bytes"],
        image_sqnr_db=chosen.values[1],
        accepted_flags=task.settings.accepted_flags,
    )
    return plan.model_copy(update={"prediction": prediction})


def _provenance(profile: LatencyProfile) -> Provenance:
    measured = all(entry.provenance == "measured" for entry in profile.entries)
    return "measured" if measured else "estimated"


def _trial(task: Task, study: optuna.Study, asked: str) -> FrozenTrial:
    complete = {
        t.number: t for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE
    }
    if asked == "best":
        rule = Candidate((0,), (_rule_choices(task),))
        limit = task.limits.latency_us or task.pricing.price(rule).latency_us
        return complete[best_of(_report(task, study), limit / 1e3).trial]
    by_name = {str(number): found for number, found in complete.items()}
    if asked not in by_name:
        raise InputError(
            "EQ-3632",
            f"there is no complete trial {asked!r}",
            path=study.study_name,
            hint=f"give `best` or one of {', '.join(map(str, sorted(complete)[:10]))} ...",
        )
    return by_name[asked]


def _rule_choices(task: Task) -> tuple[Precision, ...]:
    by_rule = {a.layer: a.precision for a in task.space.base.phases[0].layers}
    return tuple(
        by_rule[g.name] if by_rule[g.name] in g.choices else FP32 for g in task.space.groups
    )


def reasons(
    pricing: Pricing, report: SensitivityReport, candidate: Candidate
) -> dict[tuple[str, int], str]:
    """Why every layer has its precision: what it costs and saves, by layer and phase."""
    space, merged = pricing.space, candidate.merged()
    stops = (*merged.starts[1:], space.n_steps)
    found = {}
    for p, (start, stop) in enumerate(zip(merged.starts, stops, strict=True)):
        damage = {(e.layer, e.precision): report.damage(e, start, stop) for e in report.entries}
        for group, choice in zip(space.groups, merged.precisions[p], strict=True):
            for layer in group.layers:
                chosen = space.layer_precision(layer, choice)
                found[layer, p] = _reason(pricing, damage, layer, chosen)
    return found


def _reason(
    pricing: Pricing,
    damage: Mapping[tuple[str, Precision], float],
    layer: str,
    precision: Precision,
) -> str:
    offered = pricing.space.offered[pricing.space.network.keys[layer].kind]
    own, plain = (pricing.latency.layer_us(layer, p) for p in (precision, FP32))
    if precision == FP32:
        others = {p: pricing.latency.layer_us(layer, p) for p in offered if p != FP32}
        best = min(others, key=lambda p: others[p], default=FP32)
        if others and others[best] >= plain:
            return f"kept fp32: no gain measured ({plain:.1f} us, {best} {others[best]:.1f} us)"
        error = damage.get((layer, best))
        told = "" if error is None else f", error of the images by it alone {error:.1e}"
        return f"kept fp32: {best} would save {plain - others[best]:.1f} us{told}"
    error = damage.get((layer, precision))
    told = "" if error is None else f", error of the images by it alone {error:.1e}"
    saved = plain - own
    gain = f"saves {saved:.1f} of" if saved >= 0 else f"takes {-saved:.1f} us more than"
    return f"{precision}: {gain} {plain:.1f} us{told}"


def read_pareto(folder: str | Path) -> ParetoReport:
    """The front of a search as it stood when the search last ended.

    Raises:
        InputError: EQ-3630, if the folder holds no search; EQ-3634, if none of its runs ended.
    """
    folder = Path(folder)
    read_search(folder)
    if not (folder / PARETO).is_file():
        raise InputError(
            "EQ-3634", "the search has not ended yet", path=folder, hint="run it to its end"
        )
    return read_record(folder / PARETO, ParetoReport, error=StorageError)


def folder_of(storage: str, study: str) -> Path:
    """Where the search of a shared study was made.

    Raises:
        StorageError: EQ-6307, if there is no such folder on this host; EQ-6308, if the search has
            not begun.
    """
    opened = open_database(storage, study, create=False)
    where = opened.user_attrs.get(FOLDER)
    if where is None:
        raise _not_ready(study)
    if not (Path(where) / SEARCH).is_file():
        raise StorageError(
            "EQ-6307",
            "the search's folder is not on this host",
            path=str(where),
            hint="copy it here and name it with --folder",
        )
    return Path(where)


def _not_ready(study: str) -> StorageError:
    return StorageError(
        "EQ-6308",
        "the search has not got as far as its first trial",
        path=study,
        hint="wait until `edgeqdm search` counts trials, then start the worker again",
    )
