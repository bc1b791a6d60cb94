"""A space turns what a sampler proposes into plans, and plans back into proposals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeqdm.errors import InputError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, TABLE, W8A8, ActivationPolicy, Precision
from edgeqdm.ir.profile import OpKey
from edgeqdm.profile.opkeys import NetworkKeys
from edgeqdm.search.space import POLICIES, Candidate, SearchSpace, make_space

W4A8, W8, DYNAMIC = Precision("w4a8"), Precision("w8"), Precision("w8a8dyn")
STEPS = 10
MODEL = "a" * 64
OFFERED = {
    LayerKind.CONV2D: (FP32, W8A8, W4A8),
    LayerKind.LINEAR: (FP32, W8A8, W4A8, DYNAMIC),
}
LINEAR = OpKey(kind=LayerKind.LINEAR, input_shape=(1, 16, 8), weight_shape=(8, 8), bias=True)
CONV = OpKey(
    kind=LayerKind.CONV2D,
    input_shape=(1, 4, 8, 8),
    weight_shape=(8, 4, 3, 3),
    bias=True,
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
)
KEYS = {"time": LINEAR, "conv_in": CONV, "q": LINEAR, "k": LINEAR, "conv": CONV}
NETWORK = NetworkKeys(MODEL, 1, KEYS, (("q", "k"),))
RULE = {"time": TABLE, "conv_in": FP32, "q": W8A8, "k": W8A8, "conv": W8A8}


def base_plan() -> DeploymentPlan:
    layers = tuple(
        LayerAssignment(layer=name, precision=p, reason=f"{p}: by rule") for name, p in RULE.items()
    )
    phase = Phase(start=0, stop=STEPS, layers=layers)
    return DeploymentPlan(target="onnxruntime", model=MODEL, n_steps=STEPS, phases=(phase,))


def space_of(
    *,
    tie: Mapping[str, str] | None = None,
    fixed: Collection[str] = ("time",),
    max_phases: int = 3,
    policies: tuple[ActivationPolicy, ...] = POLICIES,
    offered: Mapping[LayerKind, tuple[Precision, ...]] = OFFERED,
) -> SearchSpace:
    return make_space(
        base_plan(),
        NETWORK,
        offered,
        tie=tie,
        fixed=fixed,
        max_phases=max_phases,
        policies=policies,
    )


SPACE = space_of()


@st.composite
def candidates(draw: st.DrawFn, space: SearchSpace = SPACE) -> Candidate:
    """1-3 phases that begin anywhere; neighbours may be equal."""
    inner = draw(st.sets(st.integers(1, STEPS - 1), max_size=space.max_phases - 1))
    precisions = tuple(
        tuple(draw(st.sampled_from(group.choices)) for group in space.groups)
        for _ in range(1 + len(inner))
    )
    return Candidate((0, *sorted(inner)), precisions, draw(st.sampled_from(space.policies)))


@st.composite
def proposals(draw: st.DrawFn, space: SearchSpace = SPACE) -> dict[str, Any]:
    """Whatever a sampler may propose, phases in any order."""
    found: dict[str, Any] = {"policy": str(draw(st.sampled_from(space.policies)))}
    for p in range(1, space.max_phases):
        found[f"start{p}"] = draw(st.integers(1, STEPS))
    for p in range(space.max_phases):
        for group in space.groups:
            found[f"{group.name}@{p}"] = str(draw(st.sampled_from(group.choices)))
    return found


def by_step(space: SearchSpace, candidate: Candidate) -> list[dict[str, Precision]]:
    """Precision of every layer at every step."""
    plan = space.plan(candidate)
    return [
        {a.layer: a.precision for a in phase.layers}
        for phase in plan.phases
        for _ in range(phase.start, phase.stop)
    ]


@given(candidates())
def test_a_candidate_comes_back_from_its_parameters(candidate: Candidate) -> None:
    assert SPACE.candidate(SPACE.params(candidate)) == candidate.merged()


@given(candidates())
def test_parameters_of_a_candidate_are_those_of_the_space(candidate: Candidate) -> None:
    SPACE.check(SPACE.params(candidate))


@given(proposals())
def test_a_proposal_comes_back_as_the_same_candidate(params: dict[str, Any]) -> None:
    candidate = SPACE.candidate(params)
    assert SPACE.candidate(SPACE.params(candidate)) == candidate


@given(proposals())
def test_no_candidate_has_equal_neighbours_or_an_empty_phase(params: dict[str, Any]) -> None:
    candidate = SPACE.candidate(params)
    assert candidate.starts[0] == 0
    assert list(candidate.starts) == sorted(set(candidate.starts))
    assert all(start < STEPS for start in candidate.starts)
    rows = candidate.precisions
    assert all(rows[k] != rows[k - 1] for k in range(1, len(rows)))


@given(proposals(), st.permutations([1, 2]))
def test_starts_may_be_in_any_order(params: dict[str, Any], order: list[int]) -> None:
    swapped = params | {f"start{k}": params[f"start{p}"] for k, p in enumerate(order, start=1)}
    assert SPACE.candidate(swapped) == SPACE.candidate(params)


@given(candidates())
def test_merging_changes_no_precision_at_any_step(candidate: Candidate) -> None:
    assert by_step(SPACE, candidate.merged()) == by_step(SPACE, candidate)
    phase_of = [sum(start <= i for start in candidate.starts) - 1 for i in range(STEPS)]
    for i, row in enumerate(by_step(SPACE, candidate)):
        chosen = candidate.precisions[phase_of[i]]
        assert row == SPACE.assignment(chosen)


@given(candidates())
def test_a_plan_covers_all_steps_and_names_every_layer_in_the_order_of_the_network(
    candidate: Candidate,
) -> None:
    plan = SPACE.plan(candidate)
    assert (plan.n_steps, plan.model, plan.target) == (STEPS, MODEL, "onnxruntime")
    assert plan.phases[0].start == 0
    assert plan.phases[-1].stop == STEPS
    for phase in plan.phases:
        assert [a.layer for a in phase.layers] == list(KEYS)


@given(candidates())
def test_layers_outside_the_groups_keep_what_the_base_says(candidate: Candidate) -> None:
    (kept,) = (a for a in base_plan().phases[0].layers if a.layer == "time")
    for phase in SPACE.plan(candidate).phases:
        assert phase.layers[0] == kept


@given(candidates())
def test_every_layer_gets_a_precision_its_kind_has_a_kernel_for(candidate: Candidate) -> None:
    for phase in SPACE.plan(candidate).phases:
        for a in phase.layers[1:]:
            assert a.precision in OFFERED[KEYS[a.layer].kind]


@given(candidates())
def test_the_policy_stands_where_activations_are_tabulated(candidate: Candidate) -> None:
    for phase in SPACE.plan(candidate).phases:
        for a in phase.layers[1:]:
            tabulated = candidate.policy in a.precision.policies
            assert a.policy == (candidate.policy if tabulated else a.precision.policies[0])


def test_equal_neighbours_become_one_phase() -> None:
    a, b = (W8A8,) * 4, (FP32,) * 4
    assert Candidate((0, 3, 7), (a, a, b)).merged() == Candidate((0, 7), (a, b))
    assert Candidate((0, 3, 7), (a, b, b)).merged() == Candidate((0, 3), (a, b))
    assert Candidate((0, 3, 7), (a, b, a)).merged() == Candidate((0, 3, 7), (a, b, a))
    assert Candidate((0, 3), (a, a)).merged() == Candidate((0,), (a,))


def test_a_phase_that_starts_where_the_sampler_ends_is_empty() -> None:
    params = SPACE.params(SPACE.uniform(W8A8))
    assert (params["start1"], params["start2"]) == (STEPS, STEPS)
    late = params | {f"{g.name}@2": "fp32" for g in SPACE.groups}
    assert SPACE.candidate(late) == SPACE.candidate(params)


def test_a_phase_between_equal_starts_is_empty() -> None:
    names = [g.name for g in SPACE.groups]
    params = SPACE.params(SPACE.uniform(W8A8)) | {"start1": 4, "start2": 4}
    params |= {f"{name}@1": "w4a8" for name in names} | {f"{name}@2": "fp32" for name in names}
    assert SPACE.candidate(params) == Candidate((0, 4), ((W8A8,) * 4, (FP32,) * 4))


@pytest.mark.parametrize("precision", [FP32, W8A8, W4A8, DYNAMIC])
def test_a_uniform_candidate_has_one_phase_and_one_precision(precision: Precision) -> None:
    (phase,) = SPACE.plan(SPACE.uniform(precision)).phases
    found = {a.layer: a.precision for a in phase.layers}
    assert found["q"] == found["k"] == precision
    # No convolution has scales at run time: tabulated ones of the same width are nearest.
    assert found["conv"] == found["conv_in"] == (W8A8 if precision == DYNAMIC else precision)


def test_tied_layers_are_one_group_of_one_choice() -> None:
    space = space_of(tie={"q": "attention", "k": "attention"})
    assert [(g.name, g.layers) for g in space.groups] == [
        ("conv_in", ("conv_in",)),
        ("q", ("q", "k")),
        ("conv", ("conv",)),
    ]
    found = space.assignment((FP32, W4A8, W8A8))
    assert found["q"] == found["k"] == W4A8
    assert "k@0" not in space.params(space.uniform(FP32))


def test_a_group_of_both_kinds_is_offered_what_any_of_them_has() -> None:
    space = space_of(tie={"q": "block", "conv": "block"})
    (group,) = (g for g in space.groups if g.name == "q")
    assert group.layers == ("q", "conv")
    assert group.choices == (FP32, W8A8, W4A8, DYNAMIC)
    choices = tuple(DYNAMIC if g is group else FP32 for g in space.groups)
    assert space.assignment(choices)["q"] == DYNAMIC
    assert space.assignment(choices)["conv"] == W8A8


def test_fixed_layers_are_in_no_group() -> None:
    space = space_of(fixed=("time", "conv_in", "k"))
    assert [g.name for g in space.groups] == ["q", "conv"]
    plan = space.plan(space.uniform(W4A8))
    found = {a.layer: a.precision for a in plan.phases[0].layers}
    assert {name: found[name] for name in ("time", "conv_in", "k")} == {
        "time": TABLE,
        "conv_in": FP32,
        "k": W8A8,
    }


def test_reasons_stand_in_the_plan_by_layer_and_phase() -> None:
    candidate = Candidate((0, 4), ((W8A8,) * 4, (FP32,) * 4))
    plan = SPACE.plan(candidate, {("q", 1): "kept fp32: because"})
    told = [{a.layer: a.reason for a in phase.layers} for phase in plan.phases]
    assert told[1]["q"] == "kept fp32: because"
    assert told[0]["q"] == "w8a8: chosen by search"
    assert told[0]["time"] == told[1]["time"] == "table: by rule"


def test_one_policy_is_no_parameter() -> None:
    space = space_of(policies=POLICIES[:1])
    assert "policy" not in space.params(space.uniform(W8A8))


@pytest.mark.parametrize(
    ("change", "odd"),
    [({"q@7": "fp32"}, "q@7"), ({"q@0": None}, "q@0"), ({"strat1": 3}, "strat1")],
    ids=["phase", "missing", "typo"],
)
def test_other_parameters_are_refused_by_name(change: dict[str, Any], odd: str) -> None:
    params = SPACE.params(SPACE.uniform(W8A8)) | change
    params = {name: value for name, value in params.items() if value is not None}
    with pytest.raises(InputError) as caught:
        SPACE.check(params)
    assert (caught.value.code, caught.value.path) == ("EQ-3610", odd)


@pytest.mark.parametrize("phases", [0, -1, STEPS + 1])
def test_more_phases_than_steps_are_refused(phases: int) -> None:
    with pytest.raises(InputError, match=f"{phases} phases for {STEPS} steps") as caught:
        space_of(max_phases=phases)
    assert (caught.value.code, caught.value.path) == ("EQ-3611", "phases")


def test_as_many_phases_as_steps_are_a_space() -> None:
    space = space_of(max_phases=STEPS)
    assert len(space.params(space.uniform(W8A8))) == 1 + (STEPS - 1) + STEPS * 4


@pytest.mark.parametrize(
    "options",
    [
        {"fixed": tuple(KEYS)},
        {"offered": {LayerKind.CONV2D: (FP32,), LayerKind.LINEAR: (FP32,)}},
    ],
    ids=["fixed", "one precision"],
)
def test_nothing_to_choose_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="nothing to choose") as caught:
        space_of(**options)
    assert caught.value.code == "EQ-3611"
