"""The best plan of an additive model: what a search starts from.

    minimise    sum over groups and phases of damage[g, p, c]
    subject to  sum of the phases' shares of steps * latency[g, c] <= budget
                sum of bytes[g, c] over the precisions that any phase uses <= limit

a multiple-choice knapsack, solved to optimality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from edgeqdm.errors import NumericalError

Values = NDArray[np.float64]
GAP = 1e-4
"""Of the optimum found to the true one, relative: below what a measured damage is good for."""
SECONDS = 20.0
_INFEASIBLE = 2
_LIMIT = 1


@dataclass(frozen=True)
class Additive:
    """The additive model of one choice of phases.

    Attributes:
        damage: of a group in a phase at each of its choices, [P][G] arrays of [C].
        latency_us: of a group at each of its choices, [G] arrays of [C].
        disk_bytes: the same, [G] arrays of [C].
        shares: of the steps, by phase, sum 1, [P].
    """

    damage: Sequence[Sequence[Values]]
    latency_us: Sequence[Values]
    disk_bytes: Sequence[Values]
    shares: Sequence[float]

    @property
    def n_phases(self) -> int:
        return len(self.damage)

    def cost(self, choices: Sequence[Sequence[int]]) -> tuple[float, float, float]:
        """Damage, latency and bytes of a choice for every phase and group."""
        damage = latency = 0.0
        for p, mine in enumerate(choices):
            damage += sum(float(self.damage[p][g][c]) for g, c in enumerate(mine))
            latency += self.shares[p] * sum(
                float(self.latency_us[g][c]) for g, c in enumerate(mine)
            )
        stored = sum(
            float(self.disk_bytes[g][c])
            for g in range(len(self.latency_us))
            for c in {mine[g] for mine in choices}
        )
        return damage, latency, stored


def fastest_us(model: Additive) -> float:
    """Least latency that any choice reaches."""
    return sum(float(latency.min()) for latency in model.latency_us)


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

    Solved by HiGHS, through `scipy.optimize.milp`. With one phase a byte limit is a second
    knapsack; with several, a variable of its own says that a precision is stored.

    Raises:
        NumericalError: EQ-5610, if the solver finds nothing in `SECONDS`.
    """
    layout = _Layout.of(model, stored=max_bytes is not None)
    weights = layout.chosen(model)
    constraints = [layout.one_each()]
    shares = np.concatenate([share * np.concatenate(model.latency_us) for share in model.shares])
    # In units of the budgets: the solver's tolerances are absolute.
    constraints.append(layout.limit(shares / budget_us, 1.0, of="chosen"))
    if max_bytes is not None:
        constraints.append(
            layout.limit(np.concatenate(model.disk_bytes) / max_bytes, 1.0, of="stored")
        )
        constraints.append(layout.stored_if_chosen())
    scale = float(np.abs(weights).max()) or 1.0
    objective = np.zeros(layout.n_variables)
    objective[: len(weights)] = weights / scale
    found = milp(
        objective,
        integrality=np.ones(layout.n_variables, np.int64),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.status == _INFEASIBLE:
        return None
    if found.x is None:
        raise NumericalError(
            "EQ-5610",
            f"the integer program has no solution after {SECONDS:g} s: {found.message}",
            hint="tie layers to blocks, or allow fewer phases",
        )
    return layout.read(found.x)


@dataclass(frozen=True)
class _Layout:
    """Places of the binary variables: chosen[p, g, c], then stored[g, c]."""

    widths: tuple[int, ...]
    n_phases: int
    stored: bool

    @staticmethod
    def of(model: Additive, *, stored: bool) -> _Layout:
        return _Layout(tuple(len(each) for each in model.latency_us), model.n_phases, stored)

    @property
    def row(self) -> int:
        return sum(self.widths)

    @property
    def n_variables(self) -> int:
        return self.row * (self.n_phases + self.stored)

    @property
    def offsets(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.widths)[:-1]]).astype(np.int64)

    def chosen(self, model: Additive) -> Values:
        return np.concatenate([np.concatenate(list(phase)) for phase in model.damage])

    def one_each(self) -> LinearConstraint:
        rows: list[int] = []
        columns: list[int] = []
        for p in range(self.n_phases):
            for g, (offset, width) in enumerate(zip(self.offsets, self.widths, strict=True)):
                rows += [p * len(self.widths) + g] * width
                columns += range(p * self.row + offset, p * self.row + offset + width)
        n_rows = self.n_phases * len(self.widths)
        places = (np.array(rows), np.array(columns))
        matrix = coo_array((np.ones(len(rows)), places), (n_rows, self.n_variables))
        return LinearConstraint(matrix.tocsr(), 1, 1)

    def limit(self, weights: Values, bound: float, *, of: str) -> LinearConstraint:
        start = 0 if of == "chosen" else self.n_phases * self.row
        row = np.zeros((1, self.n_variables))
        row[0, start : start + len(weights)] = weights
        return LinearConstraint(row, -np.inf, bound)

    def stored_if_chosen(self) -> LinearConstraint:
        n_rows = self.n_phases * self.row
        chosen = np.arange(n_rows)
        stored = n_rows + chosen % self.row
        rows = np.concatenate([chosen, chosen])
        values = np.concatenate([np.ones(n_rows), -np.ones(n_rows)])
        matrix = coo_array(
            (values, (rows, np.concatenate([chosen, stored]))), (n_rows, self.n_variables)
        )
        return LinearConstraint(matrix.tocsr(), -np.inf, 0)

    def read(self, x: Values) -> list[list[int]]:
        return [
            [
                int(np.argmax(x[p * self.row + o : p * self.row + o + w]))
                for o, w in zip(self.offsets, self.widths, strict=True)
            ]
            for p in range(self.n_phases)
        ]
