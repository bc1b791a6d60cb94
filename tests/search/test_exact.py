"""The optimum of the additive model is the one that trying every choice finds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import highspy
import numpy as np
import pytest
from highspy import HighsModelStatus
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeqdm.errors import NumericalError
from edgeqdm.search import exact
from edgeqdm.search.exact import (
    GAP,
    Additive,
    Shared,
    Values,
    fastest,
    least_damage,
    optimum,
    slowest_us,
)

TOLERANCE = 1e-6
"""By which HiGHS may break a constraint of size 1."""


@dataclass(frozen=True)
class Everything:
    """Every choice of a small model: damage, latency and bytes, each [N]."""

    damage: Values
    latency_us: Values
    stored: Values

    def least(self, budget_us: float, max_bytes: float | None) -> float | None:
        fits = self.latency_us <= budget_us
        if max_bytes is not None:
            fits &= self.stored <= max_bytes
        return float(self.damage[fits].min()) if fits.any() else None


def try_all(model: Additive) -> Everything:
    """All choices of all phases at once, by outer sums over the phases."""
    widths = [len(each) for each in model.latency_us]
    row = np.array(list(itertools.product(*map(range, widths))))
    groups = range(len(widths))
    offsets = np.cumsum([0, *widths[:-1]])
    used = (1 << (row + offsets)).sum(1)
    latency = np.sum([model.latency_us[g][row[:, g]] for g in groups], 0)
    for each in model.shared:
        called = np.any([row[:, g] == c for g, c in each.users], 0)
        latency = latency + each.us * called
    damage, total, masks = np.zeros(1), np.zeros(1), np.zeros(1, np.int64)
    for p, phase in enumerate(model.damage):
        mine = np.sum([phase[g][row[:, g]] for g in groups], 0)
        damage = np.add.outer(damage, mine).ravel()
        total = np.add.outer(total, model.shares[p] * latency).ravel()
        masks = np.bitwise_or.outer(masks, used).ravel()
    sizes = np.concatenate(model.disk_bytes)
    bits = np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes)) & 1
    forks = np.repeat(model.forks(), widths)
    total = total + (bits @ forks)[masks] - sum(model.forks())
    return Everything(damage, total, (bits @ sizes)[masks])


small = st.integers(0, 20).map(float)


@st.composite
def models(draw: st.DrawFn, *, shared: bool = True, forks: bool = True) -> Additive:
    """1-3 phases, 2-4 groups, 2-3 choices; latencies and bytes are whole numbers."""
    widths = draw(st.lists(st.integers(2, 3), min_size=2, max_size=4))
    steps = draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))

    def values(each: st.SearchStrategy[float], width: int) -> NDArray[np.float64]:
        return np.array(draw(st.lists(each, min_size=width, max_size=width)))

    cost = st.integers(1, 30).map(float)
    every = [(g, c) for g, width in enumerate(widths) for c in range(width)]
    users = st.frozensets(st.sampled_from(every), min_size=1)
    return Additive(
        damage=[[values(small, width) for width in widths] for _ in steps],
        latency_us=[values(cost, width) for width in widths],
        disk_bytes=[values(cost, width) for width in widths],
        shares=[n / sum(steps) for n in steps],
        shared=draw(st.lists(st.builds(Shared, cost, users), max_size=3)) if shared else (),
        fork_us=values(small, len(widths)).tolist() if forks else (),
    )


def fastest_us(model: Additive) -> float:
    return model.cost([fastest(model)] * model.n_phases)[1]


def budget_between(model: Additive, share: float) -> float:
    most = sum(float(latency.max()) for latency in model.latency_us)
    most += sum(each.us for each in model.shared)
    return fastest_us(model) + share * (most - fastest_us(model)) + 1e-4


shares = st.floats(0, 1)
limits = st.one_of(st.none(), st.integers(5, 120).map(lambda n: n + 0.5))


@given(models(), shares, limits)
def test_the_optimum_is_the_least_damage_of_all_choices_that_fit(
    model: Additive, share: float, max_bytes: float | None
) -> None:
    budget = budget_between(model, share)
    expected = try_all(model).least(budget, max_bytes)
    found = optimum(model, budget_us=budget, max_bytes=max_bytes)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert model.cost(found)[0] <= expected * (1 + GAP) + 1e-9


@given(models(), shares, limits)
def test_no_optimum_is_beyond_a_limit(
    model: Additive, share: float, max_bytes: float | None
) -> None:
    budget = budget_between(model, share)
    found = optimum(model, budget_us=budget, max_bytes=max_bytes)
    if found is not None:
        _, latency, stored = model.cost(found)
        assert latency <= budget * (1 + TOLERANCE)
        assert max_bytes is None or stored <= max_bytes * (1 + TOLERANCE)


@given(models(), shares, shares, limits)
def test_more_time_never_means_more_damage(
    model: Additive, one: float, other: float, max_bytes: float | None
) -> None:
    tight, loose = (
        optimum(model, budget_us=budget_between(model, share), max_bytes=max_bytes)
        for share in sorted((one, other))
    )
    if tight is not None:
        assert loose is not None
        assert model.cost(loose)[0] <= model.cost(tight)[0] * (1 + GAP) + 1e-9


@pytest.mark.parametrize("largest", [1.0, 1e3, 1e6, np.inf])
def test_one_large_damage_does_not_blur_the_small_ones(largest: float) -> None:
    """A precision that was not measured does infinite damage; others do 1e-6 to 1e-2."""
    generator = np.random.default_rng(0)
    for _ in range(10):
        damage = 10 ** generator.uniform(-6, -2, (2, 4, 3))
        damage[0, 0, 0] = largest
        latency = [generator.integers(1, 31, 3).astype(float) for _ in range(4)]
        model = Additive([list(p) for p in damage], latency, latency, [0.25, 0.75])
        budget = budget_between(model, 0.5)
        expected = try_all(model).least(budget, None)
        found = optimum(model, budget_us=budget)
        assert found is not None
        assert expected is not None
        assert model.cost(found)[0] <= expected * (1 + GAP)


@given(models(), shares)
def test_a_byte_limit_that_everything_keeps_changes_nothing(model: Additive, share: float) -> None:
    budget = budget_between(model, share)
    every = model.n_phases * sum(float(each.sum()) for each in model.disk_bytes)
    free = optimum(model, budget_us=budget)
    kept = optimum(model, budget_us=budget, max_bytes=every)
    assert free is not None
    assert kept is not None
    assert model.cost(kept)[0] == pytest.approx(model.cost(free)[0], rel=GAP, abs=1e-9)


@given(models())
def test_without_a_limit_the_optimum_is_the_least_damage(model: Additive) -> None:
    found = optimum(model, budget_us=1e6)
    assert found is not None
    assert model.cost(found)[0] == pytest.approx(model.cost(least_damage(model))[0], abs=1e-9)


@given(models())
def test_nothing_is_faster_than_the_fastest(model: Additive) -> None:
    # Shares of thirds and sevenths do not add up to 1 in binary.
    assert fastest_us(model) == pytest.approx(try_all(model).latency_us.min())


@given(models(shared=False, forks=False))
def test_the_slowest_is_the_fastest_of_least_damage(model: Additive) -> None:
    everything = try_all(model)
    least = everything.damage.min()
    best = everything.latency_us[everything.damage <= least + 1e-9].min()
    assert slowest_us(model) == pytest.approx(best)


def one_phase(damage: list[list[float]], latency: list[list[float]]) -> Additive:
    return Additive(
        damage=[[np.array(each) for each in damage]],
        latency_us=[np.array(each) for each in latency],
        disk_bytes=[np.ones(len(each)) for each in latency],
        shares=[1.0],
    )


def test_a_budget_below_the_fastest_has_no_optimum() -> None:
    model = one_phase([[0.0, 1.0], [0.0, 1.0]], [[10.0, 4.0], [10.0, 5.0]])
    assert optimum(model, budget_us=8.9) is None
    assert optimum(model, budget_us=9.0) == [[1, 1]]


def test_a_limit_below_the_smallest_has_no_optimum() -> None:
    model = one_phase([[0.0, 1.0], [0.0, 1.0]], [[10.0, 4.0], [10.0, 5.0]])
    assert optimum(model, budget_us=100.0, max_bytes=1.9) is None
    assert optimum(model, budget_us=100.0, max_bytes=2.0) is not None


def test_the_damage_that_buys_most_time_is_taken() -> None:
    """Only one of two layers needs to be fast, and the second one bears it better."""
    model = one_phase([[0.0, 3.0], [0.0, 1.0]], [[10.0, 5.0], [10.0, 5.0]])
    assert optimum(model, budget_us=15.0) == [[0, 1]]


def test_two_phases_of_one_precision_are_stored_once() -> None:
    damage = [np.array([0.0, 1.0]), np.array([0.0, 1.0])]
    other = [np.array([1.0, 0.0]), np.array([1.0, 0.0])]
    model = Additive([damage, other], [np.ones(2)] * 2, [np.full(2, 4.0)] * 2, [0.5, 0.5])
    assert optimum(model, budget_us=2.0) == [[0, 0], [1, 1]]
    assert model.cost([[0, 0], [1, 1]]) == (0.0, 2.0, 16.0)
    for limit, damages in ((16.0, 0.0), (15.0, 1.0), (8.0, 2.0)):
        found = optimum(model, budget_us=2.0, max_bytes=limit)
        assert found is not None
        assert model.cost(found)[0] == damages
        assert model.cost(found)[2] <= limit


def test_a_fork_costs_what_it_does_and_counts_from_the_second_choice() -> None:
    damage = [[np.array([0.0, 1.0])], [np.array([1.0, 0.0])], [np.array([0.0, 1.0])]]
    model = Additive(damage, [np.ones(2)], [np.ones(2)], [1 / 3] * 3, fork_us=[5.0])
    assert model.cost([[0], [0], [0]])[1] == pytest.approx(1.0)
    assert model.cost([[0], [1], [0]])[1] == pytest.approx(6.0)
    for budget, damages in ((6.1, 0.0), (5.9, 1.0)):
        found = optimum(model, budget_us=budget)
        assert found is not None
        assert model.cost(found)[0] == damages
        assert model.cost(found)[1] <= budget


def test_no_damage_at_all_is_no_division_by_0() -> None:
    model = one_phase([[0.0, 0.0], [0.0, 0.0]], [[10.0, 4.0], [10.0, 5.0]])
    found = optimum(model, budget_us=9.0)
    assert found == [[1, 1]]


def test_what_two_layers_share_is_paid_once() -> None:
    """Alone, neither is faster at its second choice; together they are."""
    both = frozenset({(0, 1), (1, 1)})
    model = replace(
        one_phase([[0.0, 1.0], [0.0, 1.0]], [[10.0, 4.0], [10.0, 5.0]]), shared=[Shared(8.0, both)]
    )
    assert fastest(model) == [1, 1]
    assert model.cost([[1, 0]])[1] == 22.0
    assert model.cost([[1, 1]])[1] == 17.0
    assert optimum(model, budget_us=19.9) == [[1, 1]]
    assert optimum(model, budget_us=16.9) is None


def test_what_was_not_measured_is_not_chosen_at_any_price() -> None:
    model = one_phase([[0.0, np.inf], [0.0, 1.0]], [[10.0, 4.0], [10.0, 5.0]])
    assert optimum(model, budget_us=15.0) == [[0, 1]]
    assert optimum(model, budget_us=14.0) is None


# Where the solver stops.


def knapsack() -> Additive:
    """Too hard to be solved at the root: a phase wants what another one does not."""
    generator = np.random.default_rng(1)
    first = [
        np.concatenate([[0.0], 10 ** generator.uniform(-6, -3, CHOICES - 1)]) for _ in range(60)
    ]
    faster = [np.concatenate([[1.0], generator.uniform(0.25, 0.9, CHOICES - 1)]) for _ in first]
    smaller = [np.concatenate([[4.0], generator.uniform(0.5, 2.0, CHOICES - 1)]) for _ in first]
    sizes = 10 ** generator.uniform(1, 3, len(first))
    return Additive(
        damage=[
            [each * 10 ** generator.uniform(-0.7, 0.7) for each in first] for _ in range(PHASES)
        ],
        latency_us=[size * each for size, each in zip(sizes, faster, strict=True)],
        disk_bytes=[100 * size * each for size, each in zip(sizes, smaller, strict=True)],
        shares=[1 / PHASES] * PHASES,
    )


CHOICES, PHASES = 5, 3
HARD = knapsack()
HARD_BUDGET_US = fastest_us(HARD) + 0.3 * (slowest_us(HARD) - fastest_us(HARD))
HARD_BYTES = 0.4 * sum(float(each.max()) for each in HARD.disk_bytes)


@pytest.fixture(scope="module")
def proven() -> list[list[int]] | None:
    return optimum(HARD, budget_us=HARD_BUDGET_US, max_bytes=HARD_BYTES)


class Watched(highspy.Highs):
    """Remembers how every solve ended."""

    ended: ClassVar[list[HighsModelStatus]] = []

    def getModelStatus(self) -> HighsModelStatus:  # noqa: N802
        self.ended.append(super().getModelStatus())
        return self.ended[-1]


class Late(highspy.Highs):
    """Out of time at the very end, its best choice in hand."""

    def getModelStatus(self) -> HighsModelStatus:  # noqa: N802
        return HighsModelStatus.kTimeLimit


def test_after_its_nodes_the_best_found_is_taken_and_it_is_always_the_same(
    proven: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "NODES", 1)
    monkeypatch.setattr(highspy, "Highs", Watched)
    found = [optimum(HARD, budget_us=HARD_BUDGET_US, max_bytes=HARD_BYTES) for _ in range(3)]
    assert HighsModelStatus.kSolutionLimit in Watched.ended
    assert found[0] == found[1] == found[2]
    assert found[0] is not None
    assert proven is not None
    damage, latency, stored = HARD.cost(found[0])
    assert latency <= HARD_BUDGET_US * (1 + TOLERANCE)
    assert stored <= HARD_BYTES * (1 + TOLERANCE)
    assert HARD.cost(proven)[0] <= damage * (1 + GAP)


def test_what_the_clock_cuts_short_is_no_optimum_however_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would be another one on a machine that is busier."""
    monkeypatch.setattr(highspy, "Highs", Late)
    with pytest.raises(NumericalError, match="Time limit") as caught:
        optimum(one_phase([[0.0, 1.0]], [[10.0, 4.0]]), budget_us=5.0)
    assert caught.value.code == "EQ-5610"


def test_nodes_that_find_nothing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "NODES", 0)
    with pytest.raises(NumericalError, match="after 0 nodes") as caught:
        optimum(HARD, budget_us=HARD_BUDGET_US, max_bytes=HARD_BYTES)
    assert caught.value.code == "EQ-5610"
