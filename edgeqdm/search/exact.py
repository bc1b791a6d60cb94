"""The best plan of an additive model: what a search starts from.

    minimise    sum over groups and phases of damage[g, p, c]
    subject to  sum over phases of their share of steps * (sum of latency[g, c]
                    + sum of the shared costs that any choice of the phase calls for)
                + sum of fork[g] over the precisions of a group beyond its first <= budget
                sum of bytes[g, c] over the precisions that any phase uses <= limit

a multiple-choice knapsack, solved to optimality within `GAP`, or as far as `NODES` go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import highspy
import numpy as np
from highspy import HighsModelStatus, HighsVarType
from numpy.typing import NDArray

from edgeqdm.errors import NumericalError

Values = NDArray[np.float64]
GAP = 1e-4
"""Of the optimum found to the true one, relative: below what a measured damage is good for."""
NODES = 500
"""Of the solver's tree, after which the best choice found is taken: four times what the hardest of
some hundred models of 40 to 200 groups needed. A clock would make it depend on what else runs."""
SECONDS = 600.0
"""After which the solver is given up."""
RESOLVED = 0.01
"""Of the unit of damage, that an optimum must reach to be told from its neighbours."""


@dataclass(frozen=True)
class Shared:
    """Time that a phase takes once if it has any of these choices.

    Attributes:
        us: in microseconds.
        users: groups and their choices, [(g, c)].
    """

    us: float
    users: frozenset[tuple[int, int]]


@dataclass(frozen=True)
class Additive:
    """The additive model of one choice of phases.

    Attributes:
        damage: of a group in a phase at each of its choices, [P][G] arrays of [C]; infinite
            where it was not measured.
        latency_us: of a group at each of its choices, [G] arrays of [C].
        disk_bytes: the same, stored once for all phases that have it, [G] arrays of [C].
        shares: of the steps, by phase, sum 1, [P].
        shared: costs beside those of single choices.
        fork_us: what every choice of a group beyond the first one costs, [G]; empty: nothing.
    """

    damage: Sequence[Sequence[Values]]
    latency_us: Sequence[Values]
    disk_bytes: Sequence[Values]
    shares: Sequence[float]
    shared: Sequence[Shared] = ()
    fork_us: Sequence[float] = ()

    @property
    def n_phases(self) -> int:
        return len(self.damage)

    def cost(self, choices: Sequence[Sequence[int]]) -> tuple[float, float, float]:
        """Damage, latency and bytes of a choice for every phase and group."""
        damage = latency = 0.0
        for p, mine in enumerate(choices):
            damage += sum(float(self.damage[p][g][c]) for g, c in enumerate(mine))
            latency += self.shares[p] * self._phase_us(mine)
        stored = 0.0
        for g, each in enumerate(self.disk_bytes):
            there = {mine[g] for mine in choices}
            stored += sum(float(each[c]) for c in there)
            latency += (len(there) - 1) * self.forks()[g]
        return damage, latency, stored

    def forks(self) -> Sequence[float]:
        """`fork_us`, zeros where there are none."""
        return self.fork_us or [0.0] * len(self.latency_us)

    def _phase_us(self, mine: Sequence[int]) -> float:
        there = set(enumerate(mine))
        own = sum(float(self.latency_us[g][c]) for g, c in there)
        return own + sum(each.us for each in self.shared if each.users & there)


def fastest(model: Additive, *, max_bytes: float | None = None) -> list[int] | None:
    """The choices of least latency for all phases alike, [G]; None if none is small enough.

    Raises:
        NumericalError: EQ-5610, if the solver finds nothing or takes longer than `SECONDS`.
    """
    one = replace(model, damage=model.damage[:1], shares=(1.0,))
    layout = _Layout.of(one, stored=max_bytes is not None)
    costs = layout.latency(one)
    constraints = [*layout.one_each(), *layout.if_chosen(one)]
    if max_bytes is not None:
        constraints.append(Row.below(layout.bytes(one) / max_bytes, 1.0))
    found = _solve(layout, constraints, costs, np.isfinite(costs), gap=0.0)
    return None if found is None else found[0]


def slowest_us(model: Additive) -> float:
    """Latency of the least damage, where nothing is limited."""
    return model.cost(least_damage(model))[1]


def least_damage(model: Additive) -> list[list[int]]:
    """The choice of least damage, and of those the fastest."""
    return [
        [_least(each, model.latency_us[g]) for g, each in enumerate(phase)]
        for phase in model.damage
    ]


def _least(damage: Values, latency_us: Values) -> int:
    return min(range(len(damage)), key=lambda c: (damage[c], latency_us[c]))


def optimum(
    model: Additive, *, budget_us: float, max_bytes: float | None = None
) -> list[list[int]] | None:
    """The choice of least damage within a budget, [P][G]; None if there is none.

    Solved by HiGHS, the same on every run. With one phase a byte limit is a second
    knapsack; with several, a variable of its own says that a precision is stored.

    Raises:
        NumericalError: EQ-5610, if the solver finds nothing or takes longer than `SECONDS`.
    """
    forked = model.n_phases > 1 and any(model.fork_us)
    layout = _Layout.of(model, stored=max_bytes is not None or forked)
    damage = layout.damage(model)
    # The first choice of a group is no fork, but counted as one.
    room_us = budget_us + (sum(model.forks()) if layout.stored else 0.0)
    # In units of the budgets: the solver's tolerances are absolute.
    constraints = [
        *layout.one_each(),
        *layout.if_chosen(model),
        Row.below(layout.latency(model) / budget_us, room_us / budget_us),
    ]
    if max_bytes is not None:
        constraints.append(Row.below(layout.bytes(model) / max_bytes, 1.0))
    allowed = np.isfinite(damage)
    unit = float(damage[allowed].max(initial=0.0)) or 1.0
    while (found := _solve(layout, constraints, damage / unit, allowed)) is not None:
        total = model.cost(found)[0]
        if total >= RESOLVED * unit or total <= 0:
            break
        # The solver takes differences below 1e-6 for none. What alone does more damage than a
        # whole plan is in no better plan, and without it the unit can be the plan's own damage.
        allowed, unit = allowed & (damage <= total), total
    return found


@dataclass(frozen=True)
class Row:
    """low <= sum of values[i] * x[places[i]] <= high."""

    places: Sequence[int]
    values: Sequence[float]
    low: float
    high: float

    @staticmethod
    def below(values: Values, high: float) -> Row:
        places = np.flatnonzero(values)
        return Row(places.tolist(), values[places].tolist(), -np.inf, high)


def _solve(
    layout: _Layout,
    rows: Sequence[Row],
    costs: Values,
    allowed: NDArray[np.bool_],
    *,
    gap: float = GAP,
) -> list[list[int]] | None:
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    for option, value in {
        "output_flag": False,
        "threads": 1,
        "mip_rel_gap": gap,
        "mip_abs_gap": 0.0,
        "mip_max_nodes": NODES,
        "time_limit": SECONDS,
    }.items():
        solver.setOptionValue(option, value)
    solver.passModel(_program(layout, rows, np.where(allowed, costs, 0), np.where(allowed, 1, 0)))
    solver.run()
    status = solver.getModelStatus()
    if status == HighsModelStatus.kInfeasible:
        return None
    solution = solver.getSolution()
    if status == HighsModelStatus.kTimeLimit or not solution.value_valid:
        raise NumericalError(
            "EQ-5610",
            f"the integer program is not solved after {NODES} nodes or {SECONDS:g} s: "
            f"{solver.modelStatusToString(status)}",
            hint="tie layers to blocks, or allow fewer phases",
        )
    return layout.read(np.asarray(solution.col_value))


def _program(layout: _Layout, rows: Sequence[Row], costs: Values, upper: Values) -> highspy.HighsLp:
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = layout.n_variables, len(rows)
    program.col_cost_, program.col_upper_ = costs, upper
    program.col_lower_ = np.zeros(layout.n_variables)
    program.integrality_ = [
        HighsVarType.kInteger if at < layout.n_chosen else HighsVarType.kContinuous
        for at in range(layout.n_variables)
    ]
    program.row_lower_ = np.array([row.low for row in rows])
    program.row_upper_ = np.array([row.high for row in rows])
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.cumsum([0, *(len(row.places) for row in rows)])
    program.a_matrix_.index_ = np.concatenate([row.places for row in rows])
    program.a_matrix_.value_ = np.concatenate([row.values for row in rows])
    return program


@dataclass(frozen=True)
class _Layout:
    """Places of the variables: chosen[p, g, c], then shared[p, k], then stored[g, c].

    Only the chosen ones are declared whole: the others are so by themselves.
    """

    widths: tuple[int, ...]
    n_phases: int
    n_shared: int
    stored: bool

    @staticmethod
    def of(model: Additive, *, stored: bool) -> _Layout:
        widths = tuple(len(each) for each in model.latency_us)
        return _Layout(widths, model.n_phases, len(model.shared), stored)

    @property
    def row(self) -> int:
        return sum(self.widths)

    @property
    def n_chosen(self) -> int:
        return self.row * self.n_phases

    @property
    def n_variables(self) -> int:
        return self.n_chosen + self.n_phases * self.n_shared + self.row * self.stored

    @property
    def offsets(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.widths)[:-1]]).astype(np.int64)

    def damage(self, model: Additive) -> Values:
        chosen = np.concatenate([np.concatenate(list(phase)) for phase in model.damage])
        return np.concatenate([chosen, np.zeros(self.n_variables - self.n_chosen)])

    def latency(self, model: Additive) -> Values:
        own, once = np.concatenate(model.latency_us), np.array([each.us for each in model.shared])
        shares = np.asarray(model.shares)
        forks = np.repeat(np.asarray(model.forks()), self.widths) * self.stored
        parts = [np.kron(shares, own), np.kron(shares, once), forks[: self.row * self.stored]]
        return np.concatenate(parts)

    def bytes(self, model: Additive) -> Values:
        others = np.zeros(self.n_variables - self.row)
        return np.concatenate([others, *model.disk_bytes])

    def one_each(self) -> list[Row]:
        return [
            Row(range(p * self.row + o, p * self.row + o + w), [1.0] * w, 1.0, 1.0)
            for p in range(self.n_phases)
            for o, w in zip(self.offsets, self.widths, strict=True)
        ]

    def if_chosen(self, model: Additive) -> list[Row]:
        """Whatever a choice calls for is there."""
        pairs = [
            (p * self.row + int(self.offsets[g]) + c, self.n_chosen + p * self.n_shared + k)
            for p in range(self.n_phases)
            for k, each in enumerate(model.shared)
            for g, c in sorted(each.users)
        ]
        if self.stored:
            first = self.n_variables - self.row
            pairs += [(at, first + at % self.row) for at in range(self.n_chosen)]
        return [Row(pair, (1.0, -1.0), -np.inf, 0.0) for pair in pairs]

    def read(self, x: Values) -> list[list[int]]:
        return [
            [
                int(np.argmax(x[p * self.row + o : p * self.row + o + w]))
                for o, w in zip(self.offsets, self.widths, strict=True)
            ]
            for p in range(self.n_phases)
        ]
