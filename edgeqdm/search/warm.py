"""Where a search starts: the exact optima of the additive model, for a ladder of budgets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from edgeqdm.ir.precision import FP32, Precision
from edgeqdm.ir.sensitivity import SensitivityReport
from edgeqdm.search.exact import Additive, fastest_us, optimum, slowest_us
from edgeqdm.search.space import Candidate, SearchSpace
from edgeqdm.search.study import Limits, Pricing

LEAST_RUNGS, MOST_RUNGS = 6, 48
NEVER = 1e6
"""Damage of a precision that was not measured: larger than any that was."""


def ladder(
    pricing: Pricing,
    sensitivity: SensitivityReport,
    *,
    limits: Limits,
    n: int,
) -> list[tuple[str, Candidate]]:
    """Candidates to begin with, each with where it comes from, no two alike.

    The plan by rule's precision and every other one alone; then, for every number of phases and
    `n` budgets between the fastest plan and the one of least damage, the candidate of least total
    damage. Phases begin where the ranges of the sensitivities begin.
    """
    space = pricing.space
    found: dict[Candidate, str] = {}
    for precision in _precisions(space):
        found.setdefault(space.uniform(precision).merged(), f"uniform {precision}")
    for n_phases in range(1, space.max_phases + 1):
        for budget, candidate in _optima(pricing, sensitivity, limits, n, n_phases):
            told = f"additive optimum, {n_phases} phases, {budget / 1e3:.3f} ms"
            found.setdefault(candidate.merged(), told)
    return [(origin, candidate) for candidate, origin in found.items()]


def rungs_for(trials: int, phases: int) -> int:
    """Budgets of a ladder that leaves half of the trials to the search."""
    return max(LEAST_RUNGS, min(MOST_RUNGS, trials // (2 * phases)))


def _precisions(space: SearchSpace) -> list[Precision]:
    return list(dict.fromkeys(c for group in space.groups for c in group.choices))


def fastest_plan_us(pricing: Pricing) -> float:
    """Predicted latency of the fastest plan of a space."""
    space = pricing.space
    model = additive(pricing, None, (0,))
    choices = [int(np.argmin(each)) for each in model.latency_us]
    mine = tuple(g.choices[c] for g, c in zip(space.groups, choices, strict=True))
    return pricing.price(Candidate((0,), (mine,))).latency_us


def least_bytes(pricing: Pricing) -> int:
    """Predicted bytes of the smallest plan of a space."""
    space = pricing.space
    model = additive(pricing, None, (0,))
    choices = [int(np.argmin(each)) for each in model.disk_bytes]
    mine = tuple(g.choices[c] for g, c in zip(space.groups, choices, strict=True))
    return pricing.price(Candidate((0,), (mine,))).disk_bytes


def additive(
    pricing: Pricing, sensitivity: SensitivityReport | None, starts: Sequence[int]
) -> Additive:
    """The additive model of a space for phases that start at given steps.

    A range of steps that two phases share counts in each by its share. Without sensitivities all
    damage is 0.
    """
    space = pricing.space
    stops = (*starts[1:], space.n_steps)
    phases = list(zip(starts, stops, strict=True))
    known = (
        {}
        if sensitivity is None
        else {(entry.layer, entry.precision): entry.propagated for entry in sensitivity.entries}
    )
    ranges = () if sensitivity is None else sensitivity.ranges

    def damage(layers: Sequence[str], choice: Precision, start: int, stop: int) -> float:
        total = 0.0
        for layer in layers:
            precision = space.layer_precision(layer, choice)
            if precision == FP32 or sensitivity is None:
                continue
            measured = known.get((layer, precision))
            if measured is None:
                return NEVER
            total += sum(
                value * max(0, min(stop, r.stop) - max(start, r.start)) / (r.stop - r.start)
                for value, r in zip(measured, ranges, strict=True)
            )
        return total

    def summed(kind: int) -> list[np.ndarray]:
        return [
            np.array(
                [
                    sum(
                        _layer_cost(pricing, layer, space.layer_precision(layer, c))[kind]
                        for layer in group.layers
                    )
                    for c in group.choices
                ]
            )
            for group in space.groups
        ]

    return Additive(
        damage=[
            [np.array([damage(g.layers, c, a, b) for c in g.choices]) for g in space.groups]
            for a, b in phases
        ],
        latency_us=summed(0),
        disk_bytes=summed(1),
        shares=[(b - a) / space.n_steps for a, b in phases],
    )


def _layer_cost(pricing: Pricing, layer: str, precision: Precision) -> tuple[float, float]:
    return (
        pricing.latency.layer_us(layer, precision),
        float(pricing.storage.layer_bytes(layer, precision)[0]),
    )


def _optima(
    pricing: Pricing, sensitivity: SensitivityReport, limits: Limits, n: int, n_phases: int
) -> list[tuple[float, Candidate]]:
    space = pricing.space
    inner = [r.start for r in sensitivity.ranges[1:]]
    models = [
        additive(pricing, sensitivity, (0, *cut))
        for cut in itertools.combinations(inner, n_phases - 1)
    ]
    cuts = list(itertools.combinations(inner, n_phases - 1))
    if not models:
        return []
    # What no choice changes: layers outside the space and everything that is no layer.
    fixed = _fixed_costs(pricing)
    least, most = fastest_us(models[0]), max(slowest_us(model) for model in models)
    if limits.latency_us is not None:
        most = min(most, limits.latency_us - fixed[0])
    if most < least:
        return []
    room = None if limits.disk_bytes is None else limits.disk_bytes - fixed[1]
    if room is not None and room <= 0:
        return []
    found = []
    for budget in _budgets(least, most, n):
        best: tuple[float, Candidate] | None = None
        for cut, model in zip(cuts, models, strict=True):
            choices = optimum(model, budget_us=float(budget), max_bytes=room)
            if choices is None:
                continue
            damage = model.cost(choices)[0]
            precisions = tuple(
                tuple(g.choices[c] for g, c in zip(space.groups, mine, strict=True))
                for mine in choices
            )
            if best is None or damage < best[0]:
                best = damage, Candidate((0, *cut), precisions)
        if best is not None:
            found.append((float(budget) + fixed[0], best[1]))
    return found


def _budgets(least: float, most: float, n: int) -> list[float]:
    """Denser towards the fastest, where a little time buys most."""
    # The least budget is met by one choice exactly: rounding must not put it out of reach.
    return [float(b) * (1 + 1e-9) for b in least + (most - least) * np.linspace(0, 1, n) ** 2]


def _fixed_costs(pricing: Pricing) -> tuple[float, float]:
    """Latency and bytes of everything that is in no group."""
    space = pricing.space
    probe = space.uniform(FP32)
    price = pricing.price(probe)
    (mine,) = probe.precisions
    parts = [
        _layer_cost(pricing, layer, space.layer_precision(layer, choice))
        for group, choice in zip(space.groups, mine, strict=True)
        for layer in group.layers
    ]
    return (
        price.latency_us - sum(latency for latency, _ in parts),
        price.disk_bytes - sum(stored for _, stored in parts),
    )
