"""Trials are judged, pruned and kept as promised, and what is proposed survives a restart."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState

from edgeqdm.errors import InputError, NumericalError, StorageError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.ir.profile import OpKey
from edgeqdm.profile.opkeys import NetworkKeys
from edgeqdm.profile.predict import LatencyModel, StorageModel
from edgeqdm.quantize.quantizer import QuantizedDenoiser
from edgeqdm.search import study as study_module
from edgeqdm.search.space import Candidate, make_space
from edgeqdm.search.storage import DIRECTIONS, LEDGER, open_sqlite, read_ledger
from edgeqdm.search.study import (
    MAX_ATTEMPTS,
    ORIGIN,
    RUNGS,
    SAMPLERS,
    Judge,
    Limits,
    NumberedSampler,
    Objective,
    Owner,
    Pricing,
    front,
    hypervolume,
    n_complete,
    prepare,
    work_on,
)

W4A8 = Precision("w4a8")
STEPS, MODEL = 8, "a" * 64
WIDTHS = {"q": 8, "up": 16, "down": 24}
SHARE_US = {FP32: 1.0, W8A8: 0.3, W4A8: 0.4}
LOSS_DB = {FP32: 0.0, W8A8: 1.0, W4A8: 6.0}
"""Of one layer at all steps, before it is weighed by its width."""


def linear(width: int) -> OpKey:
    return OpKey(
        kind=LayerKind.LINEAR,
        input_shape=(1, 16, width),
        weight_shape=(width, width),
        bias=True,
    )


def weight_bytes(shape: tuple[int, ...], precision: Precision) -> tuple[int, int]:
    disk = math.prod(shape) * precision.weight_bits // 8
    return disk, 2 * disk


def make_pricing() -> Pricing:
    network = NetworkKeys(MODEL, 1, {name: linear(w) for name, w in WIDTHS.items()}, ())
    layers = tuple(LayerAssignment(layer=n, precision=W8A8, reason="by rule") for n in WIDTHS)
    phase = Phase(start=0, stop=STEPS, layers=layers)
    base = DeploymentPlan(target="onnxruntime", model=MODEL, n_steps=STEPS, phases=(phase,))
    space = make_space(base, network, {LayerKind.LINEAR: tuple(LOSS_DB)}, max_phases=2)
    net_us = {(linear(w), p): 10.0 * w * s for w in WIDTHS.values() for p, s in SHARE_US.items()}
    latency = LatencyModel(network, net_us, {}, 100.0, {}, None)
    storage = StorageModel(network, weight_bytes, 1000, {})
    return Pricing(space, latency, storage)


PRICING = make_pricing()
SPACE = PRICING.space


def mean_db(plan: DeploymentPlan) -> float:
    """60 dB less what layers lose, a step at a time."""
    lost = sum(
        LOSS_DB[a.precision] * WIDTHS[a.layer] / 16 * (phase.stop - phase.start) / STEPS
        for phase in plan.phases
        for a in phase.layers
    )
    return 60.0 - lost


def gentle_db(plan: DeploymentPlan, k: int) -> float:
    """So near to each other that none is clearly beaten."""
    return 0.02 * mean_db(plan) + 0.001 * k


@dataclass
class FakeJudge:
    """Images whose error is a function of the plan; image k is k tenths of a dB better."""

    plans: list[DeploymentPlan] = field(default_factory=list)
    drawn: list[range] = field(default_factory=list)
    db: Callable[[DeploymentPlan, int], float] = lambda plan, k: mean_db(plan) + 0.1 * k

    def quantized(self, plan: DeploymentPlan) -> QuantizedDenoiser:
        self.plans.append(plan)
        return cast(QuantizedDenoiser, plan)

    def image_sqnr_db(self, quantized: QuantizedDenoiser, images: range) -> Any:
        self.drawn.append(images)
        return np.array([self.db(cast(DeploymentPlan, quantized), k) for k in images])


def objective(judge: Judge, limits: Limits | None = None) -> Objective:
    return Objective(PRICING, judge, limits or Limits())


def in_memory(sampler: str = "RandomSampler", seed: int = 0) -> optuna.Study:
    return optuna.create_study(directions=DIRECTIONS, sampler=NumberedSampler(sampler, seed))


def enqueue(study: optuna.Study, *candidates: Candidate) -> None:
    for candidate in candidates:
        study.enqueue_trial(dict(SPACE.params(candidate)))


def params_of(study: optuna.Study) -> list[dict[str, Any]]:
    """By number."""
    return [trial.params for trial in study.get_trials(deepcopy=False)]


def quick_folder() -> tempfile.TemporaryDirectory[str]:
    """In memory where it can be: SQLite waits for a disk several times per trial."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield Path(folder)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / LEDGER


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> optuna.Study:
    """40 complete trials at random."""
    study = in_memory()
    Owner(
        study, objective(FakeJudge(db=gentle_db)), tmp_path_factory.mktemp("searched") / LEDGER
    ).run(40)
    return study


# What a trial comes to.


def test_a_trial_is_latency_and_the_mean_over_its_images(ledger: Path) -> None:
    study, judge = in_memory(), FakeJudge()
    candidate = Candidate((0, 2), ((FP32, W8A8, W4A8), (W8A8, W8A8, FP32)))
    enqueue(study, candidate)
    Owner(study, objective(judge), ledger).run(1)
    (trial,) = study.get_trials()
    price, plan = PRICING.price(candidate), SPACE.plan(candidate)
    # 100 us, then 2 of 8 steps and 6 of 8 at the shares above.
    slow = 100 + 80 + 0.3 * 160 + 0.4 * 240
    fast = 100 + 0.3 * 80 + 0.3 * 160 + 240
    assert price.latency_us == pytest.approx(0.25 * slow + 0.75 * fast)
    expected = mean_db(plan) + 0.1 * np.mean(range(RUNGS[-1]))
    assert trial.values == pytest.approx((price.latency_us / 1e3, expected))
    assert judge.plans == [plan]
    assert judge.drawn == [range(4), range(4, 16)]
    assert len(trial.user_attrs["image_db"]) == RUNGS[-1]
    assert trial.user_attrs["disk_bytes"] == price.disk_bytes
    assert trial.user_attrs["phases"] == 2


def test_a_search_ends_at_exactly_as_many_complete_trials_as_asked_for(ledger: Path) -> None:
    study = in_memory()
    told: list[tuple[int, int]] = []
    owner = Owner(study, objective(FakeJudge(db=gentle_db)), ledger)
    owner.run(7, progress=lambda done, total: told.append((done, total)))
    assert n_complete(study) == 7
    assert told[0] == (0, 7)
    assert told[-1] == (7, 7)
    owner.run(7)
    owner.run(3)
    assert n_complete(study) == 7


def test_every_finished_trial_stands_in_the_ledger(ledger: Path) -> None:
    study = in_memory()
    slow = PRICING.price(SPACE.uniform(FP32)).latency_us
    Owner(study, objective(FakeJudge(), Limits(latency_us=0.7 * slow)), ledger).run(8)
    kept = read_ledger(ledger)
    trials = study.get_trials()
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert list(kept) == [t.number for t in trials]
    for trial in trials:
        mine = kept[trial.number]
        assert (mine.state, mine.params, mine.values) == (trial.state, trial.params, trial.values)


# The front.


def dominates(one: FrozenTrial, other: FrozenTrial) -> bool:
    better = one.values[0] <= other.values[0] and one.values[1] >= other.values[1]
    return better and tuple(one.values) != tuple(other.values)


def test_a_front_is_what_no_other_trial_beats(searched: optuna.Study) -> None:
    trials = searched.get_trials(states=(TrialState.COMPLETE,))
    expected = {tuple(t.values) for t in trials if not any(dominates(other, t) for other in trials)}
    found = [tuple(t.values) for t in front(searched)]
    assert len(found) > 2
    assert set(found) == expected
    assert len(found) == len(expected)
    assert found == sorted(found)
    assert {tuple(t.values) for t in searched.best_trials} == expected


def test_a_front_keeps_the_limit(searched: optuna.Study) -> None:
    whole = front(searched)
    middle = whole[len(whole) // 2].values[0]
    kept = front(searched, Limits(latency_us=middle * 1e3))
    assert [t.number for t in kept] == [t.number for t in whole if t.values[0] <= middle]


def test_an_empty_study_has_an_empty_front() -> None:
    assert front(in_memory()) == []


def test_hypervolume_of_two_steps_by_hand() -> None:
    """(4-1) * 10 and (4-2) * 10 more; the third adds nothing, the others are out of bounds."""
    points = [(2.0, 30.0), (1.0, 20.0), (3.0, 25.0), (5.0, 90.0), (0.5, 10.0)]
    assert hypervolume(points, slowest_ms=4.0, least_db=10.0) == 50.0


@given(st.lists(st.tuples(st.floats(0, 12), st.floats(-5, 40)), max_size=8))
def test_hypervolume_is_the_share_of_points_that_some_plan_beats(
    points: list[tuple[float, float]],
) -> None:
    """Against a grid of 100 x 100."""
    ms, db = np.meshgrid((np.arange(100) + 0.5) / 10, (np.arange(100) + 0.5) / 2.5)
    beaten = np.zeros(ms.shape, bool)
    for latency, quality in points:
        beaten |= (ms > latency) & (db < quality)
    found = hypervolume(points, slowest_ms=10.0, least_db=0.0)
    # A staircase cuts at most as many cells as it has on two sides of the grid.
    assert found == pytest.approx(beaten.mean() * 400.0, abs=200 * 400.0 / 1e4)


# Pruning.


@pytest.mark.parametrize("limit", ["latency", "bytes"])
def test_a_plan_beyond_a_limit_is_pruned_unseen(ledger: Path, limit: str) -> None:
    price = PRICING.price(SPACE.uniform(FP32))
    limits = (
        Limits(latency_us=price.latency_us * 0.9)
        if limit == "latency"
        else Limits(disk_bytes=price.disk_bytes - 1)
    )
    study, judge = in_memory(), FakeJudge()
    enqueue(study, SPACE.uniform(FP32), SPACE.uniform(W8A8))
    Owner(study, objective(judge, limits), ledger).run(1)
    beyond, within = study.get_trials()
    assert (beyond.state, within.state) == (TrialState.PRUNED, TrialState.COMPLETE)
    assert beyond.user_attrs["pruned"] == "beyond the limits"
    assert beyond.constraints[limit] > 0
    assert judge.plans == [SPACE.plan(SPACE.uniform(W8A8))]


def test_a_plan_exactly_at_the_limits_is_judged(ledger: Path) -> None:
    price = PRICING.price(SPACE.uniform(W8A8))
    study, judge = in_memory(), FakeJudge()
    enqueue(study, SPACE.uniform(W8A8))
    Owner(study, objective(judge, Limits(price.latency_us, price.disk_bytes)), ledger).run(1)
    assert len(judge.plans) == 1


def test_a_twin_is_not_judged_again(ledger: Path) -> None:
    study, judge = in_memory(), FakeJudge()
    params = SPACE.params(SPACE.uniform(W8A8))
    # Another point of the space that stands for the same plan.
    twin = params | {"start1": 3}
    study.enqueue_trial(dict(params))
    study.enqueue_trial(dict(twin))
    Owner(study, objective(judge), ledger).run(2)
    first, second = study.get_trials()
    assert len(judge.plans) == 1
    assert second.state is TrialState.COMPLETE
    assert second.values == first.values
    assert second.user_attrs["same_as"] == 0
    assert second.user_attrs["image_db"] == first.user_attrs["image_db"]


def test_a_plan_that_is_clearly_beaten_is_pruned_on_few_images(ledger: Path) -> None:
    study, judge = in_memory(), FakeJudge()
    # Four bits are slower than eight here, and worse.
    enqueue(study, SPACE.uniform(W8A8), SPACE.uniform(W4A8))
    Owner(study, objective(judge), ledger).run(2)
    beaten = study.get_trials()[1]
    assert beaten.state is TrialState.PRUNED
    assert beaten.user_attrs["pruned"] == "beaten on 4 images"
    assert len(beaten.user_attrs["image_db"]) == RUNGS[0]
    assert judge.drawn[:3] == [range(4), range(4, 16), range(4)]


@pytest.mark.parametrize(
    ("first", "second", "db"),
    [
        pytest.param(FP32, W4A8, mean_db, id="faster"),
        pytest.param(W8A8, W4A8, lambda plan: 0.02 * mean_db(plan), id="hardly worse"),
    ],
)
def test_a_plan_that_is_not_clearly_beaten_is_drawn_to_the_end(
    ledger: Path, first: Precision, second: Precision, db: Callable[[DeploymentPlan], float]
) -> None:
    study = in_memory()
    enqueue(study, SPACE.uniform(first), SPACE.uniform(second))
    Owner(study, objective(FakeJudge(db=lambda plan, k: db(plan))), ledger).run(2)
    assert [t.state for t in study.get_trials()] == [TrialState.COMPLETE] * 2


def test_a_lead_that_may_be_chance_prunes_nothing(ledger: Path) -> None:
    """On the mean 2 dB worse, and 10 dB better or 14 dB worse image by image."""

    def db(plan: DeploymentPlan, k: int) -> float:
        four_bits = plan.phases[0].layers[0].precision == W4A8
        return 40.0 - (2.0 + 12.0 * (-1) ** k if four_bits else 0.0)

    study = in_memory()
    enqueue(study, SPACE.uniform(W8A8), SPACE.uniform(W4A8))
    Owner(study, objective(FakeJudge(db=db)), ledger).run(2)
    assert [t.state for t in study.get_trials()] == [TrialState.COMPLETE] * 2


# Failures.

Runner = Callable[[optuna.Study, Objective, Path, int], None]


def as_owner(study: optuna.Study, judged: Objective, ledger: Path, target: int) -> None:
    Owner(study, judged, ledger).run(target)


def as_worker(study: optuna.Study, judged: Objective, ledger: Path, target: int) -> None:
    work_on(study, judged, target)


EXPERIMENTAL = pytest.mark.filterwarnings("ignore:.*fail_stale_trials is experimental")
"""What Optuna says of its heartbeats whenever `optimize` begins."""
runners = pytest.mark.parametrize(
    "run",
    [pytest.param(as_owner, id="owner"), pytest.param(as_worker, id="worker", marks=EXPERIMENTAL)],
)


def failing_at(precision: Precision, value: float) -> FakeJudge:
    def db(plan: DeploymentPlan, k: int) -> float:
        bad = any(a.precision == precision for phase in plan.phases for a in phase.layers)
        return value if bad else mean_db(plan)

    return FakeJudge(db=db)


@runners
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_objective_that_is_not_finite_fails_and_is_on_no_front(
    ledger: Path, value: float, run: Runner
) -> None:
    study = in_memory()
    enqueue(study, SPACE.uniform(W4A8), SPACE.uniform(W8A8), SPACE.uniform(FP32))
    run(study, objective(failing_at(W4A8, value)), ledger, 2)
    bad = study.get_trials()[0]
    assert bad.state is TrialState.FAIL
    assert "objectives are" in bad.user_attrs["reason"]
    assert bad.number not in [t.number for t in front(study)]
    assert all(np.isfinite(t.values).all() for t in front(study))


@dataclass
class Broken(FakeJudge):
    """Images that hold NaN, as `Evaluator` reports them."""

    def image_sqnr_db(self, quantized: QuantizedDenoiser, images: range) -> Any:
        raise NumericalError("EQ-5602", "images [0] hold NaN or Inf")


@runners
def test_a_search_whose_trials_mostly_fail_ends_with_the_reason(ledger: Path, run: Runner) -> None:
    study = in_memory()
    with pytest.raises(NumericalError, match="images \\[0\\] hold NaN") as caught:
        run(study, objective(Broken()), ledger, 20)
    assert caught.value.code == "EQ-5620"
    trials = study.get_trials()
    assert len(trials) == 10
    assert all("EQ-5602" in t.user_attrs["reason"] for t in trials)


@runners
def test_a_search_of_which_fewer_than_half_fail_goes_on(ledger: Path, run: Runner) -> None:
    study = in_memory()
    # One of two layers' worth of choices: about one plan in three of these fails.
    run(study, objective(failing_at_first_layer()), ledger, 12)
    assert n_complete(study) == 12
    assert any(t.state is TrialState.FAIL for t in study.get_trials())


def failing_at_first_layer() -> FakeJudge:
    def db(plan: DeploymentPlan, k: int) -> float:
        if plan.phases[0].layers[0].precision == W4A8:
            raise NumericalError("EQ-5602", "images [0] hold NaN or Inf")
        return gentle_db(plan, k)

    return FakeJudge(db=db)


def test_a_space_in_which_nothing_keeps_the_limits_ends(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "MAX_IDLE", 15)
    study = in_memory()
    Owner(study, objective(FakeJudge(), Limits(latency_us=1.0)), ledger).run(5)
    assert [t.state for t in study.get_trials()] == [TrialState.PRUNED] * 15


# Samplers.


def test_an_unknown_sampler_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InputError, match="'CmaEsSampler'") as caught:
        NumberedSampler("CmaEsSampler", 0)
    assert caught.value.code == "EQ-3620"
    assert all(name in (caught.value.hint or "") for name in SAMPLERS)


class Died(BaseException):
    """The process is gone."""


def search_in(
    folder: Path,
    sampler: str,
    target: int,
    judged: Callable[[optuna.Trial], tuple[float, float]] | None = None,
) -> list[dict[str, Any]]:
    """Go on with a study in a folder as a new process would; parameters by number."""
    study, _ = open_sqlite(folder, "study")
    study.sampler = NumberedSampler(sampler, 3)
    prepare(study, {"model": "a"}, [("uniform w8a8", SPACE.params(SPACE.uniform(W8A8)))])
    Owner(study, judged or objective(FakeJudge(db=gentle_db)), folder / LEDGER).run(target)
    return params_of(study)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_restarts_between_trials_change_no_proposal(tmp_path: Path, sampler: str) -> None:
    folders = [tmp_path / name for name in ("once", "thrice")]
    for folder in folders:
        folder.mkdir()
    whole = search_in(folders[0], sampler, 12)
    for target in (4, 8, 12):
        parts = search_in(folders[1], sampler, target)
    assert parts == whole
    # Beyond what TPE and GP draw at random, and no two of them the same by seed.
    assert len(whole) >= 12
    assert len({str(params) for params in whole}) >= 10


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("number", [3, 11])
def test_a_trial_that_died_between_two_parameters_gets_the_others_all_the_same(
    tmp_path: Path, sampler: str, number: int
) -> None:
    folders = [tmp_path / name for name in ("once", "died")]
    for folder in folders:
        folder.mkdir()
    whole = search_in(folders[0], sampler, 12)

    def dying(trial: optuna.Trial) -> tuple[float, float]:
        if trial.number == number:
            trial.suggest_int("start1", 1, STEPS)
            raise Died
        return objective(FakeJudge(db=gentle_db))(trial)

    with pytest.raises(Died):
        search_in(folders[1], sampler, 12, dying)
    assert search_in(folders[1], sampler, 12) == whole


def test_another_seed_proposes_something_else(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        study = in_memory(seed=seed)
        Owner(study, objective(FakeJudge()), tmp_path / f"{seed}.jsonl").run(3)
        found.append(params_of(study))
    assert found[0] != found[1]


def test_trials_of_one_seed_differ_from_each_other(searched: optuna.Study) -> None:
    pairs = list(itertools.pairwise(params_of(searched)))
    assert all(one != other for one, other in pairs)


# What a study is for.

FINGERPRINT = {"model": "aaa", "profile": "bbb", "settings.seed": "0"}
STARTS = [
    ("uniform w8a8", SPACE.params(SPACE.uniform(W8A8))),
    ("uniform fp32", SPACE.params(SPACE.uniform(FP32))),
]


def test_preparing_twice_enqueues_nothing_twice(ledger: Path) -> None:
    study = in_memory()
    prepare(study, FINGERPRINT, STARTS)
    prepare(study, FINGERPRINT, STARTS)
    assert [t.user_attrs[ORIGIN] for t in study.get_trials()] == [origin for origin, _ in STARTS]
    Owner(study, objective(FakeJudge(db=gentle_db)), ledger).run(3)
    prepare(study, FINGERPRINT, STARTS)
    states = [t.state for t in study.get_trials()]
    assert states == [TrialState.COMPLETE] * 3


def test_a_search_begins_with_what_it_was_prepared_with(ledger: Path) -> None:
    study = in_memory()
    prepare(study, FINGERPRINT, STARTS)
    Owner(study, objective(FakeJudge(db=gentle_db)), ledger).run(3)
    trials = study.get_trials()
    assert [t.params for t in trials[:2]] == [params for _, params in STARTS]
    assert [t.user_attrs.get(ORIGIN) for t in trials] == [*(o for o, _ in STARTS), None]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"profile": "ccc"}, "profile bbb, here ccc"),
        ({"guidance": "2.0"}, "guidance missing, here 2.0"),
        ({"model": None}, "model aaa, here missing"),
    ],
    ids=["other", "more", "less"],
)
def test_a_study_made_for_something_else_is_refused_by_what_differs(
    change: Mapping[str, str | None], told: str
) -> None:
    study = in_memory()
    prepare(study, FINGERPRINT, STARTS[:1])
    other = {k: v for k, v in {**FINGERPRINT, **change}.items() if v is not None}
    with pytest.raises(StorageError) as caught:
        prepare(study, other, STARTS)
    assert caught.value.code == "EQ-6310"
    assert told in caught.value.message
    assert "settings.seed" not in caught.value.message
    assert len(study.get_trials()) == 1


def test_attempts_are_as_many_as_promised() -> None:
    assert MAX_ATTEMPTS == 3
