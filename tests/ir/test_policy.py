"""Phases become a step policy where servers have one that says the same, and are refused else."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.codec import dump_record
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.policy import StepPolicy, step_policy_of
from edgeqdm.ir.precision import FP32, W8A8, Precision

W8 = Precision("w8")
INTEGER = {"q": W8A8, "conv": Precision("w4a8"), "norm": FP32}
FLOAT = {"q": W8, "conv": FP32, "norm": FP32}


def plan_of(*phases: tuple[int, Mapping[str, Precision]]) -> DeploymentPlan:
    made, start = [], 0
    for n_steps, precisions in phases:
        layers = tuple(
            LayerAssignment(layer=name, precision=p, reason="test")
            for name, p in precisions.items()
        )
        made.append(Phase(start=start, stop=start + n_steps, layers=layers))
        start += n_steps
    return DeploymentPlan(target="onnxruntime", model="a" * 64, n_steps=start, phases=tuple(made))


def modes(policy: StepPolicy, n_steps: int) -> list[str]:
    """What a server does at every step."""
    found = [policy.default_mode] * n_steps
    for i in range(policy.first_steps.count):
        found[i] = policy.first_steps.mode
    for i in range(policy.last_steps.count):
        found[n_steps - 1 - i] = policy.last_steps.mode
    return list(found)


def test_one_phase_on_integers_has_no_special_steps() -> None:
    policy = step_policy_of(plan_of((8, INTEGER)))
    assert (policy.first_steps.count, policy.last_steps.count) == (0, 0)
    assert policy.default_mode == "native"


def test_a_plan_without_integers_runs_as_it_is_with_activations_in_float() -> None:
    assert modes(step_policy_of(plan_of((8, FLOAT))), 8) == ["a16"] * 8


@given(st.integers(0, 3), st.integers(1, 6), st.integers(0, 3))
def test_first_and_last_phases_in_float_are_first_and_last_steps(
    first: int, middle: int, last: int
) -> None:
    phases = [(first, FLOAT), (middle, INTEGER), (last, FLOAT)]
    policy = step_policy_of(plan_of(*(phase for phase in phases if phase[0])))
    assert (policy.first_steps.count, policy.last_steps.count) == (first, last)
    assert modes(policy, first + middle + last) == (
        ["a16"] * first + ["native"] * middle + ["a16"] * last
    )


def test_phases_on_other_integers_are_native_all_the_same() -> None:
    wider = {**INTEGER, "conv": W8A8}
    policy = step_policy_of(plan_of((2, FLOAT), (3, INTEGER), (3, wider)))
    assert (policy.first_steps.count, policy.last_steps.count) == (2, 0)


def test_two_phases_in_float_at_one_end_count_together() -> None:
    weights = {**FLOAT, "conv": W8}
    policy = step_policy_of(plan_of((2, FLOAT), (1, weights), (5, INTEGER)))
    assert policy.first_steps.count == 3


def test_a_phase_in_float_between_others_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="first and last") as caught:
        step_policy_of(plan_of((2, INTEGER), (3, FLOAT), (3, INTEGER)))
    assert caught.value.code == "EQ-4330"
    assert caught.value.hint


def test_a_phase_with_some_integer_layers_in_float_is_refused_by_layer() -> None:
    mixed = {**INTEGER, "conv": FP32}
    with pytest.raises(UnsupportedError, match=r"steps 2\.\.4") as caught:
        step_policy_of(plan_of((2, INTEGER), (3, mixed)))
    assert (caught.value.code, caught.value.path) == ("EQ-4330", "conv")


def test_layers_that_are_never_on_integers_do_not_matter() -> None:
    policy = step_policy_of(plan_of((4, INTEGER), (4, {**INTEGER, "norm": W8})))
    assert modes(policy, 8) == ["native"] * 8


def test_the_file_has_the_keys_of_the_specification_and_no_others() -> None:
    written = json.loads(dump_record(step_policy_of(plan_of((3, FLOAT), (5, INTEGER)))))
    assert written == {
        "schema_version": 1,
        "type": "first_last_n",
        "index_space": "denoising_loop_iteration",
        "scope": ["transformer"],
        "default_mode": "native",
        "first_steps": {"count": 3, "mode": "a16"},
        "last_steps": {"count": 0, "mode": "a16"},
        "overlap": "a16",
    }
