"""Where a search starts: the exact optima of the additive model, for a ladder of budgets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgeqdm.ir.precision import FP32, Precision
from edgeqdm.ir.sensitivity import SensitivityReport
from edgeqdm.profile.predict import input_form
from edgeqdm.search.exact import Additive, Shared, fastest, optimum, slowest_us
from edgeqdm.search.space import Candidate, SearchSpace
from edgeqdm.search.study import Limits, Pricing

Progress = Callable[[int, int], None]
LEAST_RUNGS, MOST_RUNGS = 6, 48
PHASE_GAIN = 0.1
"""Of the damage, that one more phase must take away to be worth its weights."""


def ladder(
    pricing: Pricing,
    sensitivity: SensitivityReport,
    *,
    limits: Limits,
    n: int,
    progress: Progress | None = None,
) -> list[tuple[str, Candidate]]:
    """Candidates to begin with, each with where it comes from, no two alike.

    Every precision alone; then, for `n` budgets between the fastest plan and the one of least
    damage, the candidate of least total damage, of as many phases as are worth it (`PHASE_GAIN`).
    Phases begin where the ranges of the sensitivities begin.

    Args:
        pricing: of the space.
        sensitivity: damage of its layers.
        limits: that optima keep.
        n: budgets.
        progress: told of every budget.
    """
    space = pricing.space
    found: dict[Candidate, str] = {}
    for precision in _precisions(space):
        found.setdefault(space.uniform(precision).merged(), f"uniform {precision}")
    for budget, candidate in _optima(pricing, sensitivity, limits, n, progress):
        told = f"additive optimum, {_phases(len(candidate.starts))}, {budget / 1e3:.3f} ms"
        found.setdefault(candidate.merged(), told)
    return [(origin, candidate) for candidate, origin in found.items()]


def _phases(n: int) -> str:
    return "1 phase" if n == 1 else f"{n} phases"


def rungs_for(trials: int) -> int:
    """Budgets of a ladder that leaves a quarter of the trials to the search, of many more."""
    return max(LEAST_RUNGS, min(MOST_RUNGS, trials * 3 // 4 - LEAST_RUNGS))


def _precisions(space: SearchSpace) -> list[Precision]:
    return list(dict.fromkeys(c for group in space.groups for c in group.choices))


def fastest_plan_us(pricing: Pricing, max_bytes: int | None = None) -> float | None:
    """Predicted latency of the fastest plan of a space; None if none is small enough."""
    choices = _fastest(pricing, additive(pricing, None, (0,)), max_bytes)
    if choices is None:
        return None
    return pricing.price(_candidate(pricing, (0,), [choices])).latency_us


def _fastest(pricing: Pricing, model: Additive, max_bytes: int | None) -> list[int] | None:
    room = _room(pricing, max_bytes)
    return None if room is not None and room <= 0 else fastest(model, max_bytes=room)


def _room(pricing: Pricing, max_bytes: int | None) -> int | None:
    return None if max_bytes is None else max_bytes - _bytes_beside(pricing)


def _candidate(
    pricing: Pricing, starts: tuple[int, ...], choices: Sequence[Sequence[int]]
) -> Candidate:
    groups = pricing.space.groups
    precisions = [tuple(g.choices[c] for g, c in zip(groups, m, strict=True)) for m in choices]
    return Candidate(starts, tuple(precisions))


def least_bytes(pricing: Pricing) -> int:
    """Predicted bytes of the smallest plan of a space."""
    model = additive(pricing, None, (0,))
    choices = [int(np.argmin(each)) for each in model.disk_bytes]
    return pricing.price(_candidate(pricing, (0,), [choices])).disk_bytes


def additive(
    pricing: Pricing, sensitivity: SensitivityReport | None, starts: Sequence[int]
) -> Additive:
    """The additive model of a space for phases that start at given steps.

    A range of steps that two phases share counts in each by its share. Without sensitivities all
    damage is 0; with them, that of a precision which was not measured is infinite.
    """
    space = pricing.space
    stops = (*starts[1:], space.n_steps)
    phases = list(zip(starts, stops, strict=True))
    known = (
        {}
        if sensitivity is None
        else {(entry.layer, entry.precision): entry for entry in sensitivity.entries}
    )

    def damage(layers: Sequence[str], choice: Precision, start: int, stop: int) -> float:
        total = 0.0
        for layer in layers:
            precision = space.layer_precision(layer, choice)
            if precision == FP32 or sensitivity is None:
                continue
            measured = known.get((layer, precision))
            if measured is None:
                return math.inf
            total += sensitivity.damage(measured, start, stop)
        return total

    users, shared = _shared(pricing)

    def stored(layers: Sequence[str], choice: Precision) -> float:
        precisions = ((layer, space.layer_precision(layer, choice)) for layer in layers)
        return float(sum(_stored_bytes(pricing, *each) for each in precisions))

    return Additive(
        damage=[
            [np.array([damage(g.layers, c, a, b) for c in g.choices]) for g in space.groups]
            for a, b in phases
        ],
        latency_us=users,
        disk_bytes=[np.array([stored(g.layers, c) for c in g.choices]) for g in space.groups],
        shares=[(b - a) / space.n_steps for a, b in phases],
        shared=shared,
        fork_us=[pricing.latency.fork_once_us(g.layers) for g in space.groups],
    )


def _shared(pricing: Pricing) -> tuple[list[np.ndarray], list[Shared]]:
    """Latencies of the groups' choices, and what layers that are fed the same tensor share.

    An entry of the profile counts the quantization of the layer's input; a graph does it once for
    all that need it alike, so it is taken off each of them and told as a cost of its own.
    """
    space = pricing.space
    once = {
        layer: (number, pricing.latency.quantize_once_us(names))
        for number, names in enumerate(space.network.siblings)
        for layer in names
    }
    users: dict[tuple[Any, ...], set[tuple[int, int]]] = {}
    own: list[np.ndarray] = []
    for g, group in enumerate(space.groups):
        own.append(np.zeros(len(group.choices)))
        for (c, choice), layer in itertools.product(enumerate(group.choices), group.layers):
            precision = space.layer_precision(layer, choice)
            own[g][c] += pricing.latency.layer_us(layer, precision)
            form = input_form(precision)
            if layer in once and form is not None:
                number, us = once[layer]
                own[g][c] -= us
                users.setdefault((number, us, form), set()).add((g, c))
    return own, [Shared(us, frozenset(each)) for (_, us, _), each in users.items()]


def _optima(
    pricing: Pricing,
    sensitivity: SensitivityReport,
    limits: Limits,
    n: int,
    progress: Progress | None,
) -> list[tuple[float, Candidate]]:
    inner = [r.start for r in sensitivity.ranges[1:]]
    by_phases = [
        [
            ((0, *cut), additive(pricing, sensitivity, (0, *cut)))
            for cut in itertools.combinations(inner, n_phases - 1)
        ]
        for n_phases in range(1, min(pricing.space.max_phases, len(inner) + 1) + 1)
    ]
    ((_, alone),) = by_phases[0]
    first = _fastest(pricing, alone, limits.disk_bytes)
    if first is None:
        return []
    least = alone.cost([first])[1]
    # What no choice changes: layers outside the space, and everything that is no layer.
    fixed = pricing.price(_candidate(pricing, (0,), [first])).latency_us - least
    most = max(slowest_us(model) for models in by_phases for _, model in models)
    if limits.latency_us is not None:
        most = min(most, limits.latency_us - fixed)
    if most < least:
        return []
    found = []
    for done, budget in enumerate(_budgets(least, most, n), start=1):
        best: tuple[float, Candidate] | None = None
        for models in by_phases:
            mine = _least_damage(pricing, models, budget, limits.disk_bytes)
            if mine is not None and (best is None or mine[0] < (1 - PHASE_GAIN) * best[0]):
                best = mine
        if best is not None:
            found.append((budget + fixed, best[1]))
        if progress is not None:
            progress(done, n)
    return found


def _least_damage(
    pricing: Pricing,
    models: Sequence[tuple[tuple[int, ...], Additive]],
    budget_us: float,
    max_bytes: int | None,
) -> tuple[float, Candidate] | None:
    """The best optimum of models with as many phases; its damage and the candidate."""
    best: tuple[float, Candidate] | None = None
    for starts, model in models:
        room = _room(pricing, max_bytes)
        if room is not None and room <= 0:
            continue
        choices = optimum(model, budget_us=budget_us, max_bytes=room)
        if choices is None:
            continue
        damage = model.cost(choices)[0]
        if best is None or damage < best[0]:
            best = damage, _candidate(pricing, starts, choices)
    return best


def _budgets(least: float, most: float, n: int) -> list[float]:
    """Denser towards the fastest, where a little time buys most."""
    # The least budget is met by one choice exactly: rounding must not put it out of reach.
    return [float(b) * (1 + 1e-9) for b in least + (most - least) * np.linspace(0, 1, n) ** 2]


def _bytes_beside(pricing: Pricing) -> int:
    """Of a package, what is no weight of a group."""
    space = pricing.space
    (choices,) = space.uniform(FP32).precisions
    probe = space.assignment(choices)
    mine = sum(
        _stored_bytes(pricing, layer, probe[layer])
        for group in space.groups
        for layer in group.layers
    )
    return pricing.storage.predict_bytes([probe])[0] - mine


def _stored_bytes(pricing: Pricing, layer: str, precision: Precision) -> int:
    """Of a variant of a layer: its weight and its nodes."""
    return pricing.storage.layer_bytes(layer, precision)[0] + pricing.storage.variant_bytes
