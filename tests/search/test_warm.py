"""A search begins with plans that nothing beats where damages really add up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, TABLE, W8A8, Precision
from edgeqdm.ir.profile import OpKey
from edgeqdm.ir.sensitivity import LayerSensitivity, SensitivityReport, StepRange
from edgeqdm.profile.opkeys import NetworkKeys
from edgeqdm.profile.predict import LatencyModel, StorageModel
from edgeqdm.search.exact import GAP
from edgeqdm.search.space import Candidate, make_space
from edgeqdm.search.study import Limits, Pricing
from edgeqdm.search.warm import (
    additive,
    fastest_plan_us,
    ladder,
    least_bytes,
    rungs_for,
)

W4A8, DYNAMIC = Precision("w4a8"), Precision("w8a8dyn")
CHOICES = (FP32, W8A8, W4A8)
STEPS, RUNGS = 12, 8
MODEL = "a" * 64
WIDTHS = {"time": 8, "q": 16, "k": 16, "v": 16, "up": 32, "down": 48, "out": 24}
SIBLINGS = (("q", "k", "v"),)
SHARE_US = {FP32: 1.0, W8A8: 0.31, W4A8: 0.37, DYNAMIC: 0.305}
RANGES = tuple(StepRange(start=a, stop=a + 3) for a in range(0, STEPS, 3))
SEARCHED = tuple(name for name in WIDTHS if name != "time")


def linear(width: int) -> OpKey:
    return OpKey(
        kind=LayerKind.LINEAR,
        input_shape=(1, 16, width),
        weight_shape=(width, width),
        bias=True,
    )


NETWORK = NetworkKeys(MODEL, 1, {name: linear(width) for name, width in WIDTHS.items()}, SIBLINGS)


def weight_bytes(shape: tuple[int, ...], precision: Precision) -> tuple[int, int]:
    """Codes and a scale per output channel, float32."""
    disk = math.prod(shape) * precision.weight_bits // 8 + 4 * shape[0]
    return disk, 2 * disk


def pricing_of(
    *,
    max_phases: int = 1,
    choices: tuple[Precision, ...] = CHOICES,
    tie: bool = False,
    quantize_us: float = 0.5,
    base_bytes: int = 1000,
    fork_us: float = 0.0,
) -> Pricing:
    """Layers cost their width to the 1.5; those fed the same tensor quantize it once."""
    layers = tuple(
        LayerAssignment(layer=name, precision=TABLE if name == "time" else W8A8, reason="by rule")
        for name in WIDTHS
    )
    phase = Phase(start=0, stop=STEPS, layers=layers)
    base = DeploymentPlan(target="onnxruntime", model=MODEL, n_steps=STEPS, phases=(phase,))
    space = make_space(
        base,
        NETWORK,
        {LayerKind.LINEAR: choices},
        tie=dict.fromkeys(SIBLINGS[0], "q") if tie else None,
        fixed=("time",),
        max_phases=max_phases,
    )
    net_us = {
        (linear(width), precision): width**1.5 * share
        for width in WIDTHS.values()
        for precision, share in SHARE_US.items()
    }
    latency = LatencyModel(NETWORK, net_us, {(1, 16, 16): quantize_us}, 7.0, {}, None, fork_us)
    storage = StorageModel(NETWORK, weight_bytes, base_bytes, {"time": 96})
    return Pricing(space, latency, storage)


def sensitivity() -> SensitivityReport:
    """Random damages; fewer bits always do more."""
    generator = np.random.default_rng(5)
    entries = []
    for name in SEARCHED:
        first = 10 ** generator.uniform(-6, -3, len(RANGES))
        for precision, factor in ((W8A8, 1.0), (W4A8, 20.0), (DYNAMIC, 1.0)):
            values = tuple(first * factor * generator.uniform(0.8, 1.2, len(RANGES)))
            entries.append(
                LayerSensitivity(
                    layer=name, precision=precision, forced=(0.0,) * STEPS, propagated=values
                )
            )
    return SensitivityReport(
        model=MODEL,
        sampler="b" * 64,
        n_steps=STEPS,
        images=2,
        seed=0,
        ranges=RANGES,
        entries=tuple(entries),
    )


REPORT = sensitivity()


def total_damage(pricing: Pricing, candidate: Candidate) -> float:
    """Damages of all layers and ranges added up; phases begin where ranges begin."""
    known = {(e.layer, e.precision): e.propagated for e in REPORT.entries}
    total = 0.0
    for k, each in enumerate(RANGES):
        p = sum(start <= each.start for start in candidate.starts) - 1
        for layer, precision in pricing.space.assignment(candidate.precisions[p]).items():
            if layer in SEARCHED and precision != FP32:
                total += known[layer, precision][k]
    return total


def random_candidates(pricing: Pricing, n: int, n_phases: int) -> list[Candidate]:
    generator = np.random.default_rng(n_phases)
    inner = [r.start for r in RANGES[1:]]
    found = []
    for _ in range(n):
        starts = (0, *sorted(generator.choice(inner, n_phases - 1, replace=False).tolist()))
        rows = tuple(
            tuple(g.choices[generator.integers(len(g.choices))] for g in pricing.space.groups)
            for _ in starts
        )
        found.append(Candidate(starts, rows))
    return found


def optima(found: Sequence[tuple[str, Candidate]]) -> list[Candidate]:
    return [candidate for origin, candidate in found if not origin.startswith("uniform")]


def test_it_begins_with_every_precision_alone_and_no_two_are_alike() -> None:
    pricing = pricing_of(max_phases=2)
    found = ladder(pricing, REPORT, limits=Limits(), n=RUNGS)
    for precision in CHOICES:
        assert (f"uniform {precision}", pricing.space.uniform(precision)) in found
    assert len({candidate for _, candidate in found}) == len(found)
    assert len({origin for origin, _ in found}) == len(found)
    assert all(candidate == candidate.merged() for _, candidate in found)


def test_they_are_points_of_the_space() -> None:
    pricing = pricing_of(max_phases=3)
    space = pricing.space
    for _, candidate in ladder(pricing, REPORT, limits=Limits(), n=4):
        assert len(candidate.starts) <= 3
        assert space.candidate(space.params(candidate)) == candidate


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    ("share", "disk_share"), [(0.3, None), (None, 0.5), (0.5, 0.5), (0.05, 0.9)]
)
def test_optima_keep_the_limits(tie: bool, share: float | None, disk_share: float | None) -> None:
    pricing = pricing_of(max_phases=2, tie=tie, fork_us=3.0)
    most = pricing.price(pricing.space.uniform(FP32))
    fastest, smallest = fastest_plan_us(pricing), least_bytes(pricing)
    limits = Limits(
        None if share is None else fastest + share * (most.latency_us - fastest),
        None if disk_share is None else int(smallest + disk_share * (most.disk_bytes - smallest)),
    )

    def keeps(candidate: Candidate) -> bool:
        price = pricing.price(candidate)
        fast = limits.latency_us is None or price.latency_us <= limits.latency_us
        return fast and (limits.disk_bytes is None or price.disk_bytes <= limits.disk_bytes)

    found = ladder(pricing, REPORT, limits=limits, n=RUNGS)
    assert any(keeps(candidate) for _, candidate in found)
    assert all(keeps(candidate) for candidate in optima(found))


@pytest.mark.parametrize("n_phases", [1, 2])
def test_where_damages_add_up_no_candidate_as_fast_does_less(n_phases: int) -> None:
    # Nothing is shared: then latencies add up too.
    pricing = pricing_of(max_phases=n_phases, quantize_us=0.0, fork_us=2.0)
    found = optima(ladder(pricing, REPORT, limits=Limits(), n=RUNGS))
    others = [
        (pricing.price(each).latency_us, total_damage(pricing, each))
        for phases in range(1, n_phases + 1)
        for each in random_candidates(pricing, 400, phases)
    ]
    compared = 0
    # The last rungs of a ladder are those of most phases.
    for candidate in (c for c in found if len(c.starts) == n_phases):
        latency, damage = pricing.price(candidate).latency_us, total_damage(pricing, candidate)
        beside = [other for us, other in others if us <= latency]
        compared += len(beside)
        assert all(damage <= other * (1 + 2 * GAP) + 1e-12 for other in beside)
    assert compared > 100


def test_phases_that_cost_more_than_they_save_are_none() -> None:
    def most_phases(fork_us: float) -> int:
        pricing = pricing_of(max_phases=2, fork_us=fork_us)
        found = ladder(pricing, REPORT, limits=Limits(), n=RUNGS)
        return max(len(candidate.starts) for _, candidate in found)

    assert most_phases(0.0) == 2
    assert most_phases(1e4) == 1


def test_one_phase_is_the_best_of_all_candidates() -> None:
    """All 729 of them."""
    pricing = pricing_of(quantize_us=0.0)
    every = [Candidate((0,), (row,)) for row in itertools.product(CHOICES, repeat=len(SEARCHED))]
    costs = [(pricing.price(c).latency_us, total_damage(pricing, c)) for c in every]
    for candidate in optima(ladder(pricing, REPORT, limits=Limits(), n=RUNGS)):
        latency = pricing.price(candidate).latency_us
        best = min(damage for us, damage in costs if us <= latency + 1e-9)
        assert total_damage(pricing, candidate) <= best * (1 + 2 * GAP) + 1e-12


def test_the_ladder_reaches_from_the_fastest_plan_to_the_least_damage() -> None:
    pricing = pricing_of(quantize_us=0.0)
    every = [c for _, c in ladder(pricing, REPORT, limits=Limits(), n=RUNGS)]
    latencies = [pricing.price(c).latency_us for c in every]
    assert min(latencies) == pytest.approx(fastest_plan_us(pricing))
    # All in fp32 does no damage at all.
    assert min(total_damage(pricing, c) for c in every) == 0.0


def test_progress_is_told_of_every_budget() -> None:
    told: list[tuple[int, int]] = []
    ladder(
        pricing_of(max_phases=2),
        REPORT,
        limits=Limits(),
        n=3,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_more_phases_than_ranges_have_no_optima() -> None:
    pricing = pricing_of(max_phases=len(RANGES) + 1)
    found = ladder(pricing, REPORT, limits=Limits(), n=2)
    assert max(len(candidate.starts) for _, candidate in found) <= len(RANGES)


def test_a_latency_below_the_fastest_leaves_the_uniform_ones_alone() -> None:
    pricing = pricing_of()
    limits = Limits(latency_us=0.5 * fastest_plan_us(pricing))
    assert optima(ladder(pricing, REPORT, limits=limits, n=RUNGS)) == []


@pytest.mark.parametrize("tie", [False, True])
def test_no_candidate_is_faster_than_the_fastest(tie: bool) -> None:
    """Also where the fastest kernel alone is not the one that shares its quantization."""
    pricing = pricing_of(choices=(*CHOICES, DYNAMIC), tie=tie, quantize_us=6.0)
    fastest = fastest_plan_us(pricing)
    for candidate in random_candidates(pricing, 300, 1):
        assert pricing.price(candidate).latency_us >= fastest - 1e-9
    for precision in pricing.space.groups[0].choices:
        uniform = pricing.space.uniform(precision)
        assert pricing.price(uniform).latency_us >= fastest - 1e-9


def test_the_fastest_of_the_small_ones_is_that_of_all_candidates() -> None:
    pricing = pricing_of(quantize_us=6.0)
    every = [Candidate((0,), (row,)) for row in itertools.product(CHOICES, repeat=len(SEARCHED))]
    prices = [pricing.price(candidate) for candidate in every]
    least, most = least_bytes(pricing), max(price.disk_bytes for price in prices)
    for max_bytes in (least, (3 * least + most) // 4, (least + most) // 2, most):
        best = min(price.latency_us for price in prices if price.disk_bytes <= max_bytes)
        assert fastest_plan_us(pricing, max_bytes) == pytest.approx(best)
    assert fastest_plan_us(pricing, least - 1) is None
    assert fastest_plan_us(pricing, 1) is None


def test_no_candidate_is_smaller_than_the_smallest() -> None:
    pricing = pricing_of(max_phases=2)
    least = least_bytes(pricing)
    assert pricing.price(pricing.space.uniform(W4A8)).disk_bytes == least
    for candidate in random_candidates(pricing, 100, 2):
        assert pricing.price(candidate).disk_bytes >= least


def test_the_additive_model_costs_what_the_prices_say() -> None:
    """But for what is in no group."""
    pricing = pricing_of(max_phases=2, quantize_us=0.0, base_bytes=0)
    starts = (0, 6)
    model = additive(pricing, REPORT, starts)
    zero = pricing.price(pricing.space.uniform(FP32))
    alone = additive(pricing, REPORT, (0,)).cost([[0] * len(SEARCHED)])
    for candidate in random_candidates(pricing, 50, 2):
        moved = Candidate(starts, candidate.precisions)
        choices = [
            [g.choices.index(c) for g, c in zip(pricing.space.groups, row, strict=True)]
            for row in moved.precisions
        ]
        damage, latency, stored = model.cost(choices)
        price = pricing.price(moved)
        assert damage == pytest.approx(total_damage(pricing, moved))
        assert latency - alone[1] == pytest.approx(price.latency_us - zero.latency_us)
        assert stored - alone[2] == pytest.approx(price.disk_bytes - zero.disk_bytes)


def test_a_range_that_two_phases_share_counts_in_each_by_its_share() -> None:
    pricing = pricing_of(max_phases=2)
    whole, parts = additive(pricing, REPORT, (0,)), additive(pricing, REPORT, (0, 4))
    for g in range(len(SEARCHED)):
        np.testing.assert_allclose(parts.damage[0][g] + parts.damage[1][g], whole.damage[0][g])
    (entry,) = (e for e in REPORT.entries if (e.layer, e.precision) == ("q", W8A8))
    # Steps 0..3: the first range of 3 steps and a third of the second.
    expected = entry.propagated[0] + entry.propagated[1] / 3
    assert parts.damage[0][0][CHOICES.index(W8A8)] == pytest.approx(expected)


def test_a_precision_that_was_not_measured_is_chosen_last() -> None:
    pricing = pricing_of()
    known = tuple(e for e in REPORT.entries if (e.layer, e.precision) != ("down", W4A8))
    partial = REPORT.model_copy(update={"entries": known})
    place = [g.name for g in pricing.space.groups].index("down")
    for candidate in optima(ladder(pricing, partial, limits=Limits(), n=RUNGS)):
        assert candidate.precisions[0][place] != W4A8


@pytest.mark.parametrize("trials", [1, 20, 200, 2000])
def test_a_quarter_of_the_trials_or_more_is_left_to_the_search(trials: int) -> None:
    begun = rungs_for(trials) + len(CHOICES)
    assert begun > len(CHOICES)
    assert trials < 20 or begun <= 0.75 * trials
