"""The search itself: Optuna proposes plans, prices are looked up, images are drawn."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from edgeqdm.errors import EdgeqdmError, InputError, NumericalError, StorageError
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.profile.predict import LatencyModel, StorageModel
from edgeqdm.quantize.quantizer import QuantizedDenoiser
from edgeqdm.search import storage
from edgeqdm.search.space import Candidate, Param, SearchSpace
from edgeqdm.search.storage import append_to_ledger, read_ledger, storage_errors

SAMPLERS = ("TPESampler", "NSGAIISampler", "GPSampler", "RandomSampler")
DEFAULT_SAMPLER = "TPESampler"
RUNGS = (4, 16)
PRUNE_MARGIN_DB = 0.5
PRUNE_DEVIATIONS = 2.0
MAX_ATTEMPTS = 3
MAX_IDLE = 200
"""Trials in a row that are pruned or fail, after which the space is taken as exhausted."""
SETTLE_S = 1.0
FINGERPRINT, ORIGIN = "fingerprint", "origin"
Progress = Callable[[int, int], None]


class Judge(Protocol):
    """What draws the images of a plan, see `Evaluator`."""

    def quantized(self, plan: DeploymentPlan) -> QuantizedDenoiser: ...

    def image_sqnr_db(self, quantized: QuantizedDenoiser, images: range) -> Any: ...


@dataclass(frozen=True)
class Price:
    """What is known of a plan before it is run."""

    latency_us: float
    disk_bytes: int
    resident_bytes: int


@dataclass(frozen=True)
class Limits:
    """What a plan must keep.

    Attributes:
        latency_us: of one evaluation of one image, the mean over the steps.
        disk_bytes: of the package's graph.
    """

    latency_us: float | None = None
    disk_bytes: int | None = None

    def excess(self, price: Price) -> dict[str, float]:
        """By how much a price is beyond each limit there is, relative; 0 or less keeps it."""
        found = {}
        if self.latency_us is not None:
            found["latency"] = price.latency_us / self.latency_us - 1
        if self.disk_bytes is not None:
            found["bytes"] = price.disk_bytes / self.disk_bytes - 1
        return found

    def keeps(self, price: Price) -> bool:
        return all(value <= 0 for value in self.excess(price).values())


@dataclass(frozen=True)
class Pricing:
    """Latency and bytes of a candidate, from the profile.

    Attributes:
        space: of the candidates.
        latency: of the network on the device.
        storage: of the network on the target.
    """

    space: SearchSpace
    latency: LatencyModel
    storage: StorageModel

    def price(self, candidate: Candidate) -> Price:
        merged = candidate.merged()
        phases = [self.space.assignment(choices) for choices in merged.precisions]
        stops = (*merged.starts[1:], self.space.n_steps)
        steps = [b - a for a, b in zip(merged.starts, stops, strict=True)]
        each = self.latency.predict_phases_us(phases)
        mean = sum(n * us for n, us in zip(steps, each, strict=True)) / self.space.n_steps
        disk, resident = self.storage.predict_bytes(phases)
        return Price(mean, disk, resident)


@dataclass(frozen=True)
class Objective:
    """(predicted latency in ms, mean image SQNR in dB) of a trial.

    A plan beyond the limits is pruned unseen. Others are drawn on few images first and go on only
    while no finished plan that is as fast is clearly better on the same images.

    Attributes:
        pricing: looks latency and bytes up; nothing is timed.
        judge: draws images.
        limits: of latency and bytes.
        rungs: numbers of images, ascending.
    """

    pricing: Pricing
    judge: Judge
    limits: Limits
    rungs: Sequence[int] = RUNGS

    def __call__(self, trial: optuna.Trial) -> tuple[float, float]:
        space = self.pricing.space
        candidate = suggest(trial, space)
        price = self.pricing.price(candidate)
        trial.set_user_attr("disk_bytes", price.disk_bytes)
        trial.set_user_attr("resident_bytes", price.resident_bytes)
        trial.set_user_attr("latency_ms", price.latency_us / 1e3)
        trial.set_user_attr("phases", len(candidate.starts))
        if _beyond(trial, price, self.limits):
            trial.set_user_attr("pruned", "beyond the limits")
            raise optuna.TrialPruned
        others = _completed(trial.study)
        twin = _twin(candidate, space, others)
        found = [] if twin is None else list(twin.user_attrs["image_db"])
        if twin is not None:
            trial.set_user_attr("same_as", twin.number)
        else:
            quantized = self._quantized(candidate)
            for rung in self.rungs:
                found += self._judged(quantized, range(len(found), rung))
                if rung != self.rungs[-1] and _beaten(price.latency_us / 1e3, found, others):
                    trial.set_user_attr("pruned", f"beaten on {rung} images")
                    trial.set_user_attr("image_db", found)
                    raise optuna.TrialPruned
        trial.set_user_attr("image_db", found)
        return price.latency_us / 1e3, float(np.mean(found))

    def _quantized(self, candidate: Candidate) -> QuantizedDenoiser:
        with _drawing():
            return self.judge.quantized(self.pricing.space.plan(candidate))

    def _judged(self, quantized: QuantizedDenoiser, images: range) -> list[float]:
        with _drawing():
            found = [float(db) for db in self.judge.image_sqnr_db(quantized, images)]
        if not np.all(np.isfinite(found)):
            raise NumericalError("EQ-5622", f"objectives are not finite: image SQNR {found}")
        return found


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """Whatever one plan breaks on fails its trial, and no more than that."""
    try:
        yield
    except (EdgeqdmError, MemoryError, OSError):
        raise
    except Exception as problem:
        message = f"the plan cannot be drawn: {type(problem).__name__}: {problem}"
        raise NumericalError("EQ-5623", message) from problem


def suggest(trial: optuna.Trial, space: SearchSpace) -> Candidate:
    """Ask a trial for a point of the space."""
    params: dict[str, Param] = {}
    if len(space.policies) > 1:
        params["policy"] = trial.suggest_categorical("policy", [str(p) for p in space.policies])
    for p in range(1, space.max_phases):
        params[f"start{p}"] = trial.suggest_int(f"start{p}", 1, space.n_steps)
    for p in range(space.max_phases):
        for group in space.groups:
            name = f"{group.name}@{p}"
            params[name] = trial.suggest_categorical(name, [str(c) for c in group.choices])
    return space.candidate(params)


def _beyond(trial: optuna.Trial, price: Price, limits: Limits) -> bool:
    """Whether the price breaks a limit; tells Optuna by how much."""
    known = trial.constraints
    for name, value in limits.excess(price).items():
        if name not in known:
            trial.set_constraint(name, value)
    return not limits.keeps(price)


def _completed(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _twin(
    candidate: Candidate, space: SearchSpace, others: Sequence[FrozenTrial]
) -> FrozenTrial | None:
    """A finished trial that stands for the same plan."""
    return next((t for t in others if space.candidate(t.params) == candidate), None)


def _beaten(latency_ms: float, found: Sequence[float], others: Sequence[FrozenTrial]) -> bool:
    """Whether a plan that is as fast is better on the same images, beyond chance."""
    mine = np.asarray(found)
    for trial in others:
        if trial.values[0] > latency_ms:
            continue
        lead = np.asarray(trial.user_attrs["image_db"][: len(mine)]) - mine
        doubt = PRUNE_DEVIATIONS * float(lead.std(ddof=1)) / len(mine) ** 0.5
        if float(lead.mean()) - doubt > PRUNE_MARGIN_DB:
            return True
    return False


def unknown_sampler(name: str) -> InputError:
    """The error for a sampler that is none of `SAMPLERS`."""
    return InputError(
        "EQ-3620",
        f"there is no sampler {name!r}",
        path="sampler",
        hint=f"choose among {', '.join(SAMPLERS)}",
    )


class NumberedSampler(BaseSampler):
    """Another sampler for every trial, seeded by the trial's number, and for every parameter.

    A search that is interrupted proposes the same as one that is not, because nothing is carried
    from trial to trial but what the study stores.
    """

    def __init__(self, name: str, seed: int) -> None:
        if name not in SAMPLERS:
            raise unknown_sampler(name)
        self._make = getattr(optuna.samplers, name)
        self._seed = seed
        self._latest: tuple[int, BaseSampler] | None = None

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if self._latest is None or self._latest[0] != trial.number:
            self._latest = trial.number, self._seeded(trial)
        return self._latest[1]

    def _seeded(self, trial: FrozenTrial, param_name: str = "") -> BaseSampler:
        text = f"{self._seed} {trial.number} {param_name}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made: BaseSampler = self._make(seed=seed)
        return made

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(_without(study, trial), trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        # A trial that is run again has some of its parameters: what the others get must not depend
        # on how many were drawn before them.
        sampler = self._seeded(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._of(trial).after_trial(study, trial, state, values)


def _without(study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
    """The study as a trial sees it that is run again: its first attempt is no other trial.

    GPSampler writes its proposal into the trial and keeps away from those of running trials.
    """
    view = copy.copy(study)

    def others(*args: Any, **kwargs: Any) -> list[FrozenTrial]:
        return [t for t in study._get_trials(*args, **kwargs) if t.number != trial.number]

    view._get_trials = others  # type: ignore[method-assign]
    return view


def prepare(
    study: optuna.Study,
    fingerprint: Mapping[str, str],
    starts: Sequence[tuple[str, Mapping[str, Param]]],
) -> None:
    """Say what a study is for and what it begins with; a second call changes nothing.

    Args:
        study: new, or of the same fingerprint.
        fingerprint: what its trials depend on, by name.
        starts: parameters of the first trials, each with where it comes from.

    Raises:
        StorageError: EQ-6310, if the study was made for something else; names what differs.
    """
    check_fingerprint(study, fingerprint)
    there = {t.user_attrs.get(ORIGIN) for t in study.get_trials(deepcopy=False)}
    for origin, params in starts:
        if origin not in there:
            study.enqueue_trial(dict(params), user_attrs={ORIGIN: origin})
    # Last: workers take it for the sign that all is there.
    if FINGERPRINT not in study.user_attrs:
        study.set_user_attr(FINGERPRINT, dict(fingerprint))


def check_fingerprint(study: optuna.Study, fingerprint: Mapping[str, str]) -> None:
    """Raise StorageError EQ-6310 if the study's trials depend on other things; new ones pass."""
    stored = study.user_attrs.get(FINGERPRINT)
    if stored is not None:
        check_same(stored, fingerprint, study.study_name)


def check_same(
    stored: Mapping[str, str], fingerprint: Mapping[str, str], where: str | Path
) -> None:
    """Raise StorageError EQ-6310 unless two fingerprints are equal; names what differs."""
    names = [*stored, *(name for name in fingerprint if name not in stored)]
    differing = [name for name in names if stored.get(name) != fingerprint.get(name)]
    if differing:
        told = "; ".join(
            f"{name} {_short(stored.get(name))}, here {_short(fingerprint.get(name))}"
            for name in differing
        )
        raise StorageError(
            "EQ-6310",
            f"the search was made for something else: {told}",
            path=where,
            hint="give what it was made for, or start another search in a new folder",
        )


def _short(value: str | None) -> str:
    return "missing" if value is None else value[:40]


def n_complete(study: optuna.Study) -> int:
    """Trials that have been drawn to the end."""
    return len(_completed(study))


@dataclass(frozen=True)
class Owner:
    """Runs a study that this process alone writes to.

    Attributes:
        study: with its sampler.
        objective: of a trial.
        ledger: file that finished trials are written to as well.
    """

    study: optuna.Study
    objective: Callable[[optuna.Trial], tuple[float, float]]
    ledger: Path

    def run(self, target: int, *, progress: Progress | None = None) -> None:
        """Go on until `target` trials are complete.

        Trials of a process that died are run again, under their own numbers.

        Raises:
            NumericalError: EQ-5620, if more than half of at least 10 trials fail, with the reason
                of the last.
        """
        with storage_errors(self.study.study_name):
            self._catch_up()
            for orphan in self._running():
                self._run(optuna.Trial(self.study, orphan._trial_id))
            idle = 0
            while (done := n_complete(self.study)) < target and idle < MAX_IDLE:
                if progress is not None:
                    progress(done, target)
                trial = self._run(self.study.ask())
                idle = 0 if trial.state is TrialState.COMPLETE else idle + 1
                check_failures(self.study)
            if progress is not None:
                progress(min(done, target), target)

    def _catch_up(self) -> None:
        """Write trials down that were finished when the process died before it did."""
        known = read_ledger(self.ledger)
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in known:
                append_to_ledger(self.ledger, trial)

    def _running(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _run(self, trial: optuna.Trial) -> FrozenTrial:
        attempts = trial.user_attrs.get("attempts", 0) + 1
        trial.set_user_attr("attempts", attempts)
        if attempts > MAX_ATTEMPTS:
            trial.set_user_attr("reason", f"the process died {MAX_ATTEMPTS} times over it")
            return self._tell(trial, TrialState.FAIL, None)
        try:
            values = _with_reason(self.objective)(trial)
        except (KeyboardInterrupt, SystemExit):
            # Who stops a search does not say anything of its trial.
            trial.set_user_attr("attempts", attempts - 1)
            raise
        except optuna.TrialPruned:
            return self._tell(trial, TrialState.PRUNED, None)
        except NumericalError:
            return self._tell(trial, TrialState.FAIL, None)
        return self._tell(trial, TrialState.COMPLETE, values)

    def _tell(
        self, trial: optuna.Trial, state: TrialState, values: tuple[float, float] | None
    ) -> FrozenTrial:
        found = self.study.tell(trial, values, state=state)
        append_to_ledger(self.ledger, found)
        return found


def _with_reason(
    objective: Callable[[optuna.Trial], tuple[float, float]],
) -> Callable[[optuna.Trial], tuple[float, float]]:
    """The objective, which leaves the reason in a trial that fails."""

    def judged(trial: optuna.Trial) -> tuple[float, float]:
        try:
            return objective(trial)
        except NumericalError as error:
            trial.set_user_attr("reason", str(error))
            raise

    return judged


def check_failures(study: optuna.Study) -> None:
    """Raise NumericalError EQ-5620 if more than half of at least 10 trials failed."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    failed = [t for t in trials if t.state is TrialState.FAIL and "reason" in t.user_attrs]
    if len(trials) >= 10 and len(failed) > len(trials) / 2:
        raise NumericalError(
            "EQ-5620",
            f"{len(failed)} of {len(trials)} trials failed, the last one: "
            f"{failed[-1].user_attrs['reason']}",
            path=study.study_name,
            hint="check the float model and the profile's precisions",
        )


def work_on(
    study: optuna.Study,
    objective: Callable[[optuna.Trial], tuple[float, float]],
    target: int,
    *,
    progress: Progress | None = None,
) -> None:
    """Go on with a study that other processes work on too, until `target` trials are complete.

    One trial at a time through `study.optimize`: only there does Optuna beat the heart and take
    trials of dead workers up again. At the end no trial is running.
    """
    idle, judged = 0, _with_reason(objective)
    with storage_errors(study.study_name), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
        while (done := n_complete(study)) < target and idle < MAX_IDLE:
            if progress is not None:
                progress(done, target)
            study.optimize(judged, n_trials=1, catch=(NumericalError,))
            idle = 0 if n_complete(study) > done else idle + 1
            check_failures(study)
        _settle(study)
    if progress is not None:
        progress(min(done, target), target)


def _settle(study: optuna.Study) -> None:
    """Wait until no trial is running: others end theirs, and those of the dead are failed.

    One that lives longer than a dead one would is left to whom it belongs.
    """
    waited, before = 0.0, -1
    while running := study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        waited = waited + SETTLE_S if len(running) == before else 0.0
        if waited > storage.GRACE_S + storage.HEARTBEAT_S:
            return
        before = len(running)
        time.sleep(SETTLE_S)
        optuna.storages.fail_stale_trials(study)


def front(study: optuna.Study, limits: Limits | None = None) -> list[FrozenTrial]:
    """Complete trials that no other beats in both objectives, fastest first, each plan once."""
    most = None if limits is None else limits.latency_us
    kept: list[FrozenTrial] = []
    best = -np.inf
    ordered = sorted(_completed(study), key=lambda t: (t.values[0], -t.values[1], t.number))
    for trial in ordered:
        if trial.values[1] > best and (most is None or trial.values[0] * 1e3 <= most):
            kept.append(trial)
            best = trial.values[1]
    return kept


def hypervolume(
    points: Sequence[tuple[float, float]], *, slowest_ms: float, least_db: float
) -> float:
    """Area between a front and a reference point, in ms * dB.

    Args:
        points: (latency in ms, SQNR in dB).
        slowest_ms: latency of the reference point.
        least_db: SQNR of the reference point.
    """
    area, before = 0.0, least_db
    for latency, db in sorted(points, key=lambda point: (point[0], -point[1])):
        if latency < slowest_ms and db > before:
            area += (slowest_ms - latency) * (db - before)
            before = db
    return area
