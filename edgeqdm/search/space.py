"""What a search may choose: phase boundaries, a precision per group of layers and phase."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgeqdm.errors import InputError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, ActivationPolicy, Precision
from edgeqdm.profile.opkeys import NetworkKeys
from edgeqdm.profile.requests import Candidates, nearest

Tie = Literal["layer", "siblings", "block"]
"""Layers that share a precision: none, those fed the same tensor, those of a block."""
Param = str | int
POLICIES = (ActivationPolicy.TEMPORAL, ActivationPolicy.STATIC)


@dataclass(frozen=True)
class Group:
    """Layers that share one choice.

    Attributes:
        name: of its first layer.
        layers: in the order of `info.layers`.
        choices: for the group; a layer whose kind has no such kernel takes its nearest.
    """

    name: str
    layers: tuple[str, ...]
    choices: tuple[Precision, ...]


@dataclass(frozen=True)
class Candidate:
    """One point of the space.

    Attributes:
        starts: first step of every phase, the first one 0, ascending, [P].
        precisions: of every group in every phase, [P][G].
        policy: of activations whose scales are tabulated.
    """

    starts: tuple[int, ...]
    precisions: tuple[tuple[Precision, ...], ...]
    policy: ActivationPolicy = ActivationPolicy.TEMPORAL

    def merged(self) -> Candidate:
        """The same with equal neighbours as one phase."""
        kept = [
            k for k, mine in enumerate(self.precisions) if not k or mine != self.precisions[k - 1]
        ]
        return Candidate(
            tuple(self.starts[k] for k in kept),
            tuple(self.precisions[k] for k in kept),
            self.policy,
        )


@dataclass(frozen=True)
class SearchSpace:
    """All plans of a network on a target.

    Attributes:
        base: precision of the layers that are in no group, and their reasons.
        network: its operations.
        offered: precisions by kind of layer.
        groups: what is chosen.
        max_phases: most phases of a plan.
        policies: what may be chosen for tabulated activations.
    """

    base: DeploymentPlan
    network: NetworkKeys
    offered: Candidates
    groups: tuple[Group, ...]
    max_phases: int
    policies: tuple[ActivationPolicy, ...]

    @property
    def n_steps(self) -> int:
        return self.base.n_steps

    def layer_precision(self, layer: str, choice: Precision) -> Precision:
        """What a layer gets where its group has this choice."""
        offered = self.offered[self.network.keys[layer].kind]
        return choice if choice in offered else nearest(choice, offered)

    def assignment(self, choices: Sequence[Precision]) -> dict[str, Precision]:
        """Precision of every layer for the choices of all groups."""
        found = {a.layer: a.precision for a in self.base.phases[0].layers}
        for group, choice in zip(self.groups, choices, strict=True):
            found |= {layer: self.layer_precision(layer, choice) for layer in group.layers}
        return found

    def uniform(self, precision: Precision) -> Candidate:
        """One phase, one precision for all groups that offer it; others take their nearest."""
        return Candidate((0,), (tuple(nearest(precision, g.choices) for g in self.groups),))

    def plan(
        self, candidate: Candidate, reasons: Mapping[tuple[str, int], str] | None = None
    ) -> DeploymentPlan:
        """The candidate as a plan.

        Args:
            candidate: a point of this space.
            reasons: why a layer has its precision in a phase, by layer and phase.
        """
        merged, told = candidate.merged(), reasons or {}
        kept = {a.layer: a for a in self.base.phases[0].layers}
        chosen = {layer for group in self.groups for layer in group.layers}
        stops = (*merged.starts[1:], self.n_steps)
        phases = []
        for p, (start, stop) in enumerate(zip(merged.starts, stops, strict=True)):
            of_layer = self.assignment(merged.precisions[p])
            layers = tuple(
                kept[name]
                if name not in chosen
                else LayerAssignment(
                    layer=name,
                    precision=precision,
                    activation=_policy(precision, merged.policy),
                    reason=told.get((name, p), f"{precision}: chosen by search"),
                )
                for name, precision in of_layer.items()
            )
            phases.append(Phase(start=start, stop=stop, layers=layers))
        return self.base.model_copy(update={"phases": tuple(phases)})

    def params(self, candidate: Candidate) -> dict[str, Param]:
        """The candidate as Optuna parameters; phases it does not have repeat its last."""
        found: dict[str, Param] = {}
        if len(self.policies) > 1:
            found["policy"] = str(candidate.policy)
        n_phases = len(candidate.starts)
        for p in range(1, self.max_phases):
            # A phase that starts where the sampler ends is empty.
            found[f"start{p}"] = candidate.starts[p] if p < n_phases else self.n_steps
        for p in range(self.max_phases):
            mine = candidate.precisions[min(p, n_phases - 1)]
            for group, choice in zip(self.groups, mine, strict=True):
                found[f"{group.name}@{p}"] = str(choice)
        return found

    def candidate(self, params: Mapping[str, Param]) -> Candidate:
        """The point that Optuna parameters stand for; starts may be in any order."""
        starts = [0, *sorted(int(params[f"start{p}"]) for p in range(1, self.max_phases))]
        # Of phases that start at the same step, the last one counts.
        stops = (*starts[1:], self.n_steps)
        used = [p for p, (a, b) in enumerate(zip(starts, stops, strict=True)) if b > a]
        precisions = tuple(
            tuple(Precision(str(params[f"{group.name}@{p}"])) for group in self.groups)
            for p in used
        )
        policy = ActivationPolicy(str(params.get("policy", self.policies[0])))
        return Candidate(tuple(starts[p] for p in used), precisions, policy).merged()

    def check(self, params: Mapping[str, Param]) -> None:
        """Raise InputError EQ-3610 unless these are parameters of this space."""
        known = set(self.params(self.uniform(FP32)))
        if set(params) != known:
            odd = sorted(set(params) ^ known)[0]
            raise InputError("EQ-3610", "not a parameter of this search", path=odd)


def _policy(precision: Precision, wanted: ActivationPolicy) -> ActivationPolicy | None:
    return wanted if wanted in precision.policies and wanted != precision.policies[0] else None


def make_space(
    base: DeploymentPlan,
    network: NetworkKeys,
    offered: Candidates,
    *,
    tie: Mapping[str, str] | None = None,
    fixed: Collection[str] = (),
    max_phases: int = 1,
    policies: tuple[ActivationPolicy, ...] = (ActivationPolicy.TEMPORAL,),
) -> SearchSpace:
    """The space of all layers but the fixed ones.

    Args:
        base: a plan of one phase.
        network: its operations.
        offered: precisions by kind.
        tie: name of the group of a layer; layers that are absent are groups of their own.
        fixed: layers that keep the precision of `base`.
        max_phases: most phases of a plan.
        policies: what may be chosen for tabulated activations.

    Raises:
        InputError: EQ-3611, if there is nothing to choose, or more phases than steps.
    """
    if not 1 <= max_phases <= base.n_steps:
        raise InputError(
            "EQ-3611",
            f"{max_phases} phases for {base.n_steps} steps",
            path="phases",
            hint=f"give 1 to {base.n_steps}",
        )
    members: dict[str, list[str]] = {}
    for layer in network.keys:
        if layer not in fixed:
            members.setdefault((tie or {}).get(layer, layer), []).append(layer)
    groups = []
    for layers in members.values():
        kinds: set[LayerKind] = {network.keys[layer].kind for layer in layers}
        every = dict.fromkeys(itertools.chain.from_iterable(offered[kind] for kind in offered))
        choices = tuple(p for p in every if any(p in offered[kind] for kind in kinds))
        if len(choices) > 1:
            groups.append(Group(layers[0], tuple(layers), choices))
    if not groups:
        raise InputError(
            "EQ-3611",
            "there is nothing to choose: every layer is fixed or has one precision",
            path="precision",
            hint="name at least two precisions",
        )
    return SearchSpace(base, network, offered, tuple(groups), max_phases, policies)
