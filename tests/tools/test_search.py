"""Methods that are compared spend the same images, and are told as they were found."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
import pytest
from typer.testing import CliRunner

from edgeqdm import searching
from edgeqdm.errors import NumericalError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.ir.profile import LatencyProfile, OpKey
from edgeqdm.ir.sensitivity import LayerSensitivity, SensitivityReport, StepRange
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.profile.opkeys import NetworkKeys
from edgeqdm.profile.predict import LatencyModel, StorageModel
from edgeqdm.profile.requests import DEFAULT_PRECISIONS
from edgeqdm.search.space import Candidate, make_space
from edgeqdm.search.study import MAX_IDLE, Limits, Pricing
from edgeqdm.search.warm import fastest_plan_us, ladder, rungs_for

W4A8, W8, DYNAMIC, GROUPED = (Precision(p) for p in ("w4a8", "w8", "w8a8dyn", "w4g32a8dyn"))
METHODS = ("uniform", "greedy", "random", "cold", "ladder", "search", "search, 3 phases")
FIXED = ("uniform", "greedy", "ladder")
MODEL, STEPS, IMAGES = "a" * 64, 12, 16
WIDTHS = {"q": 16, "k": 16, "v": 16, "up": 32, "down": 48, "out": 24}
SIBLINGS = (("q", "k", "v"),)
SHARE_US = {FP32: 1.0, W8A8: 0.31, W4A8: 0.37, W8: 0.8, DYNAMIC: 0.42, GROUPED: 0.5}
LOSS_DB = {FP32: 0.0, W8A8: 1.0, W4A8: 6.0, W8: 0.4, DYNAMIC: 0.8, GROUPED: 4.0}
"""Of one layer at all steps, before it is weighed by its width."""
FACTORS = {W8A8: 1.0, W4A8: 20.0, W8: 0.5, DYNAMIC: 0.9, GROUPED: 12.0}
RANGES = tuple(StepRange(start=a, stop=a + 3) for a in range(0, STEPS, 3))


def linear(width: int) -> OpKey:
    shape, weight = (1, 16, width), (width, width)
    return OpKey(kind=LayerKind.LINEAR, input_shape=shape, weight_shape=weight, bias=True)


def weight_bytes(shape: tuple[int, ...], precision: Precision) -> tuple[int, int]:
    disk = math.prod(shape) * precision.weight_bits // 8
    return disk, 2 * disk


def pricing_of(
    *,
    max_phases: int = 1,
    tie: bool = True,
    quantize_us: float = 0.5,
    shares: Mapping[Precision, float] = SHARE_US,
) -> Pricing:
    """Layers cost their width to the 1.5; those fed the same tensor quantize it once."""
    network = NetworkKeys(MODEL, 1, {name: linear(w) for name, w in WIDTHS.items()}, SIBLINGS)
    layers = tuple(LayerAssignment(layer=n, precision=W8A8, reason="by rule") for n in WIDTHS)
    phase = Phase(start=0, stop=STEPS, layers=layers)
    space = make_space(
        DeploymentPlan(target="onnxruntime", model=MODEL, n_steps=STEPS, phases=(phase,)),
        network,
        {LayerKind.LINEAR: tuple(shares)},
        tie=dict.fromkeys(SIBLINGS[0], "q") if tie else None,
        max_phases=max_phases,
    )
    net_us = {
        (linear(width), precision): width**1.5 * share
        for width in WIDTHS.values()
        for precision, share in shares.items()
    }
    latency = LatencyModel(network, net_us, {(1, 16, 16): quantize_us}, 7.0, {}, None)
    return Pricing(space, latency, StorageModel(network, weight_bytes, 1000, {}))


def sensitivity(
    *, seed: int = 5, factors: Mapping[Precision, float] = FACTORS
) -> SensitivityReport:
    """Random damages, of all precisions of a layer in the same proportion."""
    generator = np.random.default_rng(seed)
    entries = []
    for name in WIDTHS:
        first = 10 ** generator.uniform(-6, -3, len(RANGES))
        entries += [
            LayerSensitivity(
                layer=name,
                precision=precision,
                forced=(0.0,) * STEPS,
                propagated=tuple((first * factor).tolist()),
            )
            for precision, factor in factors.items()
        ]
    return SensitivityReport(
        model=MODEL,
        sampler="b" * 64,
        n_steps=STEPS,
        images=2,
        seed=0,
        ranges=RANGES,
        entries=tuple(entries),
    )


DAMAGE = sensitivity()


def damage_at(pricing: Pricing, report: SensitivityReport, g: int, choice: Precision) -> float:
    """Of a group at a precision, over all steps."""
    layers = pricing.space.groups[g].layers
    return sum(
        sum(e.propagated) for e in report.entries if e.layer in layers and e.precision == choice
    )


def mean_db(plan: DeploymentPlan) -> float:
    """60 dB less what layers lose, a step at a time."""
    return 60.0 - sum(
        LOSS_DB[a.precision] * WIDTHS[a.layer] / 16 * (phase.stop - phase.start) / STEPS
        for phase in plan.phases
        for a in phase.layers
    )


@dataclass
class FakeJudges:
    """Stands for `Evaluator`, and counts what it is asked for.

    Attributes:
        seeds: of every judge that was made.
        images: drawn by all of them.
        plans: asked for.
        db: of an image of a plan.
    """

    seeds: list[int] = field(default_factory=list)
    images: int = 0
    plans: list[DeploymentPlan] = field(default_factory=list)
    db: Callable[[DeploymentPlan, int], float] = lambda plan, k: mean_db(plan) + 0.1 * k

    def __call__(self, *_: object, seed: int, n_images: int, work: Path) -> FakeJudges:
        assert n_images == IMAGES
        self.seeds.append(seed)
        return self

    def quantized(self, plan: DeploymentPlan) -> DeploymentPlan:
        self.plans.append(plan)
        return plan

    def image_sqnr_db(self, plan: DeploymentPlan, images: range) -> Any:
        self.images += len(images)
        return np.array([self.db(plan, k) for k in images])


@pytest.fixture
def judges(searches: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeJudges:
    made = FakeJudges()
    monkeypatch.setattr(searches, "Evaluator", made)
    return made


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    yield
    optuna.logging.set_verbosity(before)


def task_of(pricing: Pricing) -> searching.Task:
    """As much of one as a method looks at."""
    absent = cast(Any, None)
    return searching.Task(absent, Path(), absent, absent, pricing, Limits(), {}, {})


def task_for(method: str) -> searching.Task:
    return task_of(pricing_of(max_phases=3 if "phases" in method else 1))


# Greedy.


def latencies(pricing: Pricing, points: Sequence[Candidate]) -> list[float]:
    return [pricing.price(each).latency_us for each in points]


@pytest.mark.parametrize("seed", range(10))
def test_greedy_goes_down_from_float_one_group_at_a_time(searches: ModuleType, seed: int) -> None:
    pricing, report = pricing_of(), sensitivity(seed=seed)
    path = [pricing.space.uniform(FP32), *searches.greedy(pricing, report, 10**6)]
    for before, after in itertools.pairwise(path):
        pairs = zip(before.precisions[0], after.precisions[0], strict=True)
        assert sum(a != b for a, b in pairs) == 1
    assert np.all(np.diff(latencies(pricing, path)) < 0)


@pytest.mark.parametrize("seed", range(10))
def test_greedy_takes_the_precisions_in_the_order_of_their_damage(
    searches: ModuleType, seed: int
) -> None:
    pricing, report = pricing_of(), sensitivity(seed=seed)
    path = [pricing.space.uniform(FP32), *searches.greedy(pricing, report, 10**6)]
    taken = [
        damage_at(pricing, report, g, new)
        for before, after in itertools.pairwise(path)
        for g, (old, new) in enumerate(zip(before.precisions[0], after.precisions[0], strict=True))
        if old != new
    ]
    assert taken == sorted(taken)
    assert len(taken) > len(pricing.space.groups)


def test_greedy_ends_at_the_fastest_plan(searches: ModuleType) -> None:
    # Nothing is shared: then the fastest plan has the fastest kernel everywhere.
    pricing = pricing_of(quantize_us=0.0)
    last = searches.greedy(pricing, DAMAGE, 10**6)[-1]
    assert pricing.price(last).latency_us == pytest.approx(fastest_plan_us(pricing))


def test_greedy_leaves_a_precision_out_that_is_not_faster(searches: ModuleType) -> None:
    pricing = pricing_of(shares={**SHARE_US, GROUPED: 1.0, W8: 1.2})
    for each in searches.greedy(pricing, DAMAGE, 10**6):
        assert not {GROUPED, W8} & {*each.precisions[0]}


def test_greedy_never_slows_a_plan_down_where_a_quantization_is_shared(
    searches: ModuleType,
) -> None:
    """Three layers on constant scales quantize once; alone, each of them looks faster."""
    quantize_us, scaled = 6.0, 3 * 16**1.5 * 0.31
    # Between what three layers take less three quantizations, and less two.
    between = (scaled - 2.5 * quantize_us) / (3 * 16**1.5)
    shares = {FP32: 1.0, W8A8: 0.31, DYNAMIC: between}
    pricing = pricing_of(quantize_us=quantize_us, shares=shares)
    report = sensitivity(factors={DYNAMIC: 0.5, W8A8: 1.0})
    points = searches.greedy(pricing, report, 10**6)
    assert np.all(np.diff(latencies(pricing, points)) < 0)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 7, 10**6])
def test_greedy_gives_as_many_points_as_asked_for_or_as_there_are(
    searches: ModuleType, n: int
) -> None:
    pricing = pricing_of()
    every = searches.greedy(pricing, DAMAGE, 10**6)
    found = searches.greedy(pricing, DAMAGE, n)
    assert len(found) == min(n, len(every))
    places = [every.index(each) for each in found]
    assert places == sorted(places)
    assert not found or found[0] == every[0]
    assert len(found) < 2 or found[-1] == every[-1]


# Where methods begin.


def test_all_methods_are_known_here(searches: ModuleType) -> None:
    assert searches.METHODS == METHODS
    assert searches.RUNGS[-1] == IMAGES


def test_uniform_begins_with_every_precision_alone(searches: ModuleType) -> None:
    found = searches.starts_of("uniform", pricing_of(), DAMAGE, 20)
    assert [set(each.precisions[0]) for each in found] == [{p} for p in DEFAULT_PRECISIONS]


def test_greedy_begins_with_uniform_plans_and_spends_the_other_trials(
    searches: ModuleType,
) -> None:
    pricing = pricing_of()
    found = searches.starts_of("greedy", pricing, DAMAGE, 10)
    assert found[:6] == searches.starts_of("uniform", pricing, DAMAGE, 10)
    assert found[6:] == searches.greedy(pricing, DAMAGE, 4)
    assert len(found) == 10


@pytest.mark.parametrize("method", ["random", "cold"])
def test_methods_without_a_start_begin_with_nothing(searches: ModuleType, method: str) -> None:
    assert searches.starts_of(method, pricing_of(), DAMAGE, 20) == []


@pytest.mark.parametrize("trials", [8, 40])
def test_ladder_begins_with_a_budget_for_every_trial_but_the_uniform_ones(
    searches: ModuleType, trials: int
) -> None:
    pricing = pricing_of()
    found = searches.starts_of("ladder", pricing, DAMAGE, trials)
    assert found == [c for _, c in ladder(pricing, DAMAGE, limits=Limits(), n=trials - 6)]
    assert len(found) <= trials


@pytest.mark.parametrize(("method", "phases"), [("search", 1), ("search, 3 phases", 3)])
@pytest.mark.parametrize("trials", [8, 40])
def test_search_begins_as_the_command_does(
    searches: ModuleType, method: str, phases: int, trials: int
) -> None:
    pricing = pricing_of(max_phases=phases)
    found = searches.starts_of(method, pricing, DAMAGE, trials)
    n = rungs_for(trials)
    assert found == [c for _, c in ladder(pricing, DAMAGE, limits=Limits(), n=n)]
    assert (max(len(each.starts) for each in found) > 1) == (phases > 1)


@pytest.mark.parametrize("method", METHODS)
def test_every_start_is_a_point_of_the_space(searches: ModuleType, method: str) -> None:
    pricing = task_for(method).pricing
    for each in searches.starts_of(method, pricing, DAMAGE, 12):
        assert pricing.space.candidate(pricing.space.params(each)) == each.merged()


@pytest.mark.parametrize("method", ["greedy", "ladder"])
def test_fewer_trials_than_precisions_leave_the_uniform_plans_alone(
    searches: ModuleType, method: str
) -> None:
    pricing = pricing_of()
    found = searches.starts_of(method, pricing, DAMAGE, 4)
    assert set(found) == set(searches.starts_of("uniform", pricing, DAMAGE, 4))


# One method.


def area_of(front: Sequence[Mapping[str, Any]], slowest_ms: float, least_db: float) -> float:
    """Under the staircase, a column at a time."""
    inside = [p for p in front if p["ms"] < slowest_ms and p["db"] > least_db]
    edges = [*(p["ms"] for p in inside), slowest_ms]
    heights = [p["db"] - least_db for p in inside]
    return float(np.diff(edges) @ heights)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_counts_its_images_and_overdraws_by_less_than_one_trial(
    searches: ModuleType, judges: FakeJudges, method: str
) -> None:
    trials = 9
    found = searches.run_method(method, task_for(method), DAMAGE, 0, trials)
    assert found["images"] == judges.images
    assert 0 < found["images"] < (trials + 1) * IMAGES
    if method not in FIXED:
        assert found["images"] >= trials * IMAGES
    json.dumps(found)


@pytest.mark.parametrize("method", FIXED)
def test_methods_without_a_sampler_end_with_their_last_plan(
    searches: ModuleType, judges: FakeJudges, method: str
) -> None:
    task = task_for(method)
    found = searches.run_method(method, task, DAMAGE, 0, 40)
    assert found["trials"] == len(searches.starts_of(method, task.pricing, DAMAGE, 40))
    assert found["images"] < 40 * IMAGES


@pytest.mark.parametrize("method", METHODS)
def test_hypervolume_is_the_area_under_the_front(
    searches: ModuleType, judges: FakeJudges, method: str
) -> None:
    task = task_for(method)
    found = searches.run_method(method, task, DAMAGE, 1, 8)
    float_ms = task.pricing.price(task.space.uniform(FP32)).latency_us / 1e3
    expected = area_of(found["front"], float_ms, searches.LEAST_DB)
    assert found["hypervolume"] == pytest.approx(expected)
    assert expected > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_front_is_told_with_what_its_plans_are(
    searches: ModuleType, judges: FakeJudges, method: str
) -> None:
    task = task_for(method)
    front = searches.run_method(method, task, DAMAGE, 0, 8)["front"]
    assert np.all(np.diff([[p["ms"], p["db"]] for p in front], axis=0) > 0)
    for point in front:
        candidate = searches.read(point)
        price = task.pricing.price(candidate)
        assert point["ms"] == price.latency_us / 1e3
        assert (point["bytes"], point["phases"]) == (price.disk_bytes, len(candidate.starts))
        drawn = [judges.db(task.space.plan(candidate), k) for k in range(IMAGES)]
        assert point["db"] == pytest.approx(np.mean(drawn))
        # Images taken together are as bad as the mean of their noise.
        noise = np.mean([10 ** (-db / 10) for db in drawn])
        assert point["pooled_db"] == pytest.approx(-10 * np.log10(noise))


def test_a_seed_decides_the_noise_and_what_is_proposed(
    searches: ModuleType, judges: FakeJudges
) -> None:
    runs = [searches.run_method("cold", task_for("cold"), DAMAGE, seed, 8) for seed in (3, 3, 4)]
    assert judges.seeds == [searching.JUDGE_SEEDS + seed for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0]["front"] != runs[2]["front"]


def test_cold_is_guided_after_ten_trials(searches: ModuleType, judges: FakeJudges) -> None:
    found = {}
    for method in ("random", "cold"):
        judges.plans.clear()
        searches.run_method(method, task_for(method), DAMAGE, 0, 16)
        found[method] = list(judges.plans)
    # TPE begins at random, here from the same seeds.
    assert found["random"][:10] == found["cold"][:10]
    assert found["random"][10:] != found["cold"][10:]


def test_a_plan_that_fails_is_on_no_front_and_ends_nothing(
    searches: ModuleType, judges: FakeJudges
) -> None:
    bad = pricing_of().space.plan(pricing_of().space.uniform(W8A8))
    judges.db = lambda plan, k: math.nan if plan == bad else mean_db(plan) + 0.1 * k
    task = task_for("uniform")
    found = searches.run_method("uniform", task, DAMAGE, 0, 8)
    assert found["trials"] == len(DEFAULT_PRECISIONS)
    plans = [task.space.plan(searches.read(p)) for p in found["front"]]
    assert plans
    assert bad not in plans


def test_a_method_of_which_every_plan_fails_ends(
    searches: ModuleType, judges: FakeJudges, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: DeploymentPlan) -> DeploymentPlan:
        judges.plans.append(plan)
        if len(judges.plans) > 2 * MAX_IDLE:
            pytest.fail(f"still proposing after {2 * MAX_IDLE} plans that failed")
        raise NumericalError("EQ-5601", "made up")

    monkeypatch.setattr(judges, "quantized", fail)
    try:
        found = searches.run_method("random", task_for("random"), DAMAGE, 0, 2)
    except NumericalError:
        return
    assert found["front"] == []


# Contenders.


def point(ms: float, db: float) -> dict[str, float]:
    return {"ms": ms, "db": db}


def test_contenders_are_better_and_at_most_a_twentieth_slower(searches: ModuleType) -> None:
    front = [point(0.8, 30.0), point(0.9, 33.0), point(1.05, 35.0), point(1.051, 36.0)]
    assert searches.contenders(front, 1.0, 30.0) == front[1:3]
    assert searches.contenders(front, 0.5, 30.0) == []
    assert searches.contenders([], 1.0, 30.0) == []


def test_of_many_contenders_some_are_taken_evenly_with_both_ends(searches: ModuleType) -> None:
    front = [point(0.5 + 0.01 * k, 30.0 + k) for k in range(40)]
    found = searches.contenders(front, 1.0, 20.0)
    assert len(found) == searches.CONTENDERS
    assert (found[0], found[-1]) == (front[0], front[-1])


def test_copies_of_a_plan_are_one_row_of_their_mean(searches: ModuleType) -> None:
    found = [("float", 1.0), ("w8a8", 0.5), ("w8a8, copy 2", 0.6), ("search, 1.2 ms", 0.44)]
    rows = [
        SimpleNamespace(name=name, cpu_ratio=ratio, image_sqnr_db=30.0, bytes_on_disk=2_000_000)
        for name, ratio in found
    ]
    shown = searches.measured_table(SimpleNamespace(rows=rows)).splitlines()[2:]
    assert shown == [
        "| float | 1.000 |  | 1.818 | 30.0 | 2.0 |",
        "| w8a8 | 0.550 | 0.500 to 0.600 | 1.000 | 30.0 | 2.0 |",
        "| search, 1.2 ms | 0.440 |  | 0.800 | 30.0 | 2.0 |",
    ]


# The file.

PROFILE_SHA = "c" * 64


@dataclass
class Runs:
    """Stands for the runs themselves.

    Attributes:
        out: the file.
        told: (method, most phases, seed, trials) of every run.
        beside: runs that another process writes while one is under way.
    """

    out: Path
    told: list[tuple[str, int, int, int]] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)

    def task_of(self, name: str, profile: str, work: Path, *, phases: int) -> Any:
        pricing, sealed = pricing_of(), SimpleNamespace(payload_sha256=PROFILE_SHA)
        return SimpleNamespace(phases=phases, profile=sealed, pricing=pricing, space=pricing.space)

    def run_method(
        self, method: str, task: Any, damage: object, seed: int, trials: int
    ) -> dict[str, Any]:
        self.told.append((method, task.phases, seed, trials))
        if self.beside:
            report = read(self.out)
            report["runs"] |= self.beside
            self.out.write_text(json.dumps(report))
        return {"hypervolume": 1.0, "images": 2, "trials": 3, "front": []}


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    return {"cost": {}} | found


@pytest.fixture
def runs(searches: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs(tmp_path / "search.json")
    monkeypatch.setattr(searches, "task_of", made.task_of)
    monkeypatch.setattr(searches, "damage_of", lambda *_: DAMAGE)
    monkeypatch.setattr(searches, "run_method", made.run_method)
    return made


def run(searches: ModuleType, out: Path, *options: object) -> None:
    arguments = ["run", "-o", out, "--work", out.parent / "work", *options]
    result = CliRunner().invoke(searches.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0


ONE_MODEL = ("--model", "dit-fmnist", "--trials", 7)


def test_every_method_runs_with_every_seed_and_its_phases(searches: ModuleType, runs: Runs) -> None:
    run(searches, runs.out, *ONE_MODEL, "--seeds", 2)
    assert runs.told == [
        (method, 3 if method == "search, 3 phases" else 1, seed, 7)
        for seed in range(2)
        for method in METHODS
    ]
    stored = read(runs.out)["runs"]
    assert list(stored) == [f"dit-fmnist/{m}/{seed}/7" for seed in range(2) for m in METHODS]
    assert all(each["profile_sha256"] == PROFILE_SHA for each in stored.values())
    assert all(each["commit"] and each["command"] for each in stored.values())


def test_finished_runs_are_not_repeated(searches: ModuleType, runs: Runs) -> None:
    kept = {"hypervolume": 9.0}
    runs.out.write_text(json.dumps({"runs": {"dit-fmnist/cold/0/7": kept}, "cost": {}}))
    options = (*ONE_MODEL, "--method", "cold", "--method", "uniform", "--seeds", 1)
    for _ in range(2):
        run(searches, runs.out, *options)
    assert [method for method, *_ in runs.told] == ["uniform"]
    assert read(runs.out)["runs"]["dit-fmnist/cold/0/7"] == kept
    run(searches, runs.out, *options, "--trials", 8)
    assert [told[0] for told in runs.told[1:]] == ["cold", "uniform"]


def test_what_another_process_wrote_meanwhile_is_kept(searches: ModuleType, runs: Runs) -> None:
    runs.beside = {"unet-fmnist/cold/0/7": {"hypervolume": 5.0}}
    before: dict[str, Any] = {
        "runs": {},
        "cost": {"unet-fmnist": {}},
        "remeasured": {"unet-fmnist": {}},
    }
    runs.out.write_text(json.dumps(before))
    run(searches, runs.out, *ONE_MODEL, "--method", "cold", "--seeds", 1)
    report = read(runs.out)
    assert set(report["runs"]) == {"unet-fmnist/cold/0/7", "dit-fmnist/cold/0/7"}
    assert report["runs"]["unet-fmnist/cold/0/7"] == {"hypervolume": 5.0}
    assert set(report["cost"]) == {"unet-fmnist", "dit-fmnist"}
    assert report["remeasured"] == before["remeasured"]


def test_a_run_that_another_process_finished_first_is_skipped(
    searches: ModuleType, runs: Runs
) -> None:
    runs.beside = {"dit-fmnist/cold/1/7": {"hypervolume": 5.0}}
    run(searches, runs.out, *ONE_MODEL, "--method", "cold", "--seeds", 2)
    assert [seed for _, _, seed, _ in runs.told] == [0]


def test_sensitivities_cost_what_was_evaluated_for_them(searches: ModuleType, runs: Runs) -> None:
    run(searches, runs.out, *ONE_MODEL, "--method", "cold", "--seeds", 1)
    cost = read(runs.out)["cost"]["dit-fmnist"]
    n = len(WIDTHS) * len(FACTORS)
    assert cost["sensitivity_variants"] == n
    # All steps once for the outputs; then, for every range, from where it begins to the end.
    evaluations = 20 + (20 - 0) + (20 - 3) + (20 - 6) + (20 - 9)
    assert cost["sensitivity_in_images"] == pytest.approx(n * DAMAGE.images * evaluations / 20)
    assert cost["budget_in_images"] == 7 * IMAGES
    pricing = pricing_of()
    assert cost["float_ms"] == pricing.price(pricing.space.uniform(FP32)).latency_us / 1e3


# The table.


def test_the_best_within_a_latency_may_be_exactly_as_slow(searches: ModuleType) -> None:
    front = [point(1.0, 30.0), point(2.0, 40.0), point(3.0, 50.0)]
    assert [searches.at_most(front, ms) for ms in (0.9, 1.0, 2.9)] == [None, 30.0, 40.0]


def test_the_table_has_a_line_per_method_and_means_over_seeds(searches: ModuleType) -> None:
    def told(volume: float, ms: float, db: float) -> dict[str, Any]:
        return {"hypervolume": volume, "front": [point(ms, db)]}

    report = {
        "cost": {"dit": {"float_ms": 10.0}},
        "runs": {
            "dit/cold/0/7": told(1.0, 5.1, 30.0),
            "dit/cold/1/7": told(2.0, 5.3, 40.0),
            "dit/cold/0/8": told(9.0, 1.0, 99.0),
            "unet/cold/0/7": told(9.0, 1.0, 99.0),
        },
    }
    lines = searches.summary(report, "dit", 7).splitlines()
    assert lines[0].startswith("| dit | ")
    # At 0.52 of the float latency one seed has no plan: then there is no mean.
    assert lines[2:] == ["| cold | 1.0 2.0 | 1.5 | none | none | 35.0 | 35.0 | 35.0 |"]
    assert len({line.count("|") for line in lines}) == 1


def test_a_model_is_calibrated_searched_and_told(
    searches: ModuleType,
    denoiser: Denoiser,
    profile: LatencyProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole way, on a tiny one."""
    monkeypatch.setattr(searches, "STEPS", denoiser.program.n_steps)
    monkeypatch.setattr(searches, "load", lambda *_, **__: denoiser)
    monkeypatch.setattr(searches, "read_profile", lambda _: SimpleNamespace(profile=profile))
    out = tmp_path / "search.json"
    chosen = ("--method", "uniform", "--method", "search, 3 phases")
    run(searches, out, "--model", "dit-fmnist", *chosen, "--seeds", 1, "--trials", 8)
    report = read(out)
    uniform, found = (report["runs"][f"dit-fmnist/{m}/0/8"] for m in chosen[1::2])
    assert uniform["trials"] == len(DEFAULT_PRECISIONS)
    assert 8 * IMAGES <= found["images"] < 9 * IMAGES
    assert {uniform["profile_sha256"], found["profile_sha256"]} == {profile.payload_sha256}
    task = searches.task_of("dit-fmnist", "made_up", tmp_path / "work", phases=3)
    for each in (uniform, found):
        float_ms = task.pricing.price(task.space.uniform(FP32)).latency_us / 1e3
        area = area_of(each["front"], float_ms, searches.LEAST_DB)
        assert each["hypervolume"] == pytest.approx(area)
    (worked,) = (tmp_path / "work").iterdir()
    assert worked.name == "dit-fmnist"
    assert report["cost"]["dit-fmnist"]["sensitivity_variants"] == len(
        searching.variants(task.space)
    )
