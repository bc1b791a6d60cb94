from __future__ import annotations

import pytest
from pydantic import ValidationError

from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, W8A8, ActivationPolicy, Precision


def plan(bounds: list[tuple[int, int]], n_steps: int) -> DeploymentPlan:
    phases = tuple(Phase(start=start, stop=stop, layers=()) for start, stop in bounds)
    return DeploymentPlan(target="onnxruntime", model="0" * 64, n_steps=n_steps, phases=phases)


@pytest.mark.parametrize("bounds", [[(0, 8)], [(0, 3), (3, 8)], [(0, 1), (1, 2), (2, 8)]])
def test_phases_that_cover_all_steps_in_order_are_a_plan(bounds: list[tuple[int, int]]) -> None:
    assert [(p.start, p.stop) for p in plan(bounds, 8).phases] == bounds


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param([], id="none"),
        pytest.param([(1, 8)], id="late"),
        pytest.param([(0, 7)], id="short"),
        pytest.param([(0, 9)], id="long"),
        pytest.param([(0, 3), (4, 8)], id="gap"),
        pytest.param([(0, 4), (3, 8)], id="overlap"),
        pytest.param([(3, 8), (0, 3)], id="order"),
        pytest.param([(0, 8), (8, 8)], id="empty"),
    ],
)
def test_phases_that_do_not_are_refused(bounds: list[tuple[int, int]]) -> None:
    with pytest.raises(ValidationError, match="phases"):
        plan(bounds, 8)


def test_a_plan_of_no_steps_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        plan([], 0)


def test_integer_layers_are_those_not_left_in_float() -> None:
    phase = Phase(
        start=0,
        stop=1,
        layers=(
            LayerAssignment(layer="conv_in", precision=FP32, reason="first layer"),
            LayerAssignment(layer="mid.conv1", precision=W8A8, reason="default"),
        ),
    )
    assert phase.integer_layers() == ("mid.conv1",)


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan([(0, 8)], 8).n_steps = 9


@pytest.mark.parametrize(
    ("precision", "activation"),
    [
        ("w8a8dyn", ActivationPolicy.TEMPORAL),
        ("w8a8dyn", ActivationPolicy.STATIC),
        ("w4g64a8dyn", ActivationPolicy.TEMPORAL),
        ("w4g64a8dyn", ActivationPolicy.DYNAMIC_TOKEN),
        ("w8a8", ActivationPolicy.DYNAMIC_TOKEN),
        ("w8a8", ActivationPolicy.FLOAT),
        ("w4g64", ActivationPolicy.TEMPORAL),
        ("fp32", ActivationPolicy.STATIC),
    ],
)
def test_two_sources_of_one_scale_are_refused_naming_layer_and_both(
    precision: str, activation: ActivationPolicy
) -> None:
    """I4: a tensor has a table over the steps or scales from its values, never both."""
    with pytest.raises(ValidationError) as caught:
        LayerAssignment(
            layer="mid.attn.to_q",
            precision=Precision(precision),
            activation=activation,
            reason="test",
        )
    expected = f"layer mid.attn.to_q: precision {precision} and activation {activation} exclude"
    assert expected in str(caught.value)
    assert f"{precision} takes {Precision(precision).policies[0]}" in str(caught.value)


def test_policy_is_what_the_precision_implies_unless_given() -> None:
    plain = LayerAssignment(layer="conv", precision=W8A8, reason="test")
    assert plain.policy is ActivationPolicy.TEMPORAL
    static = LayerAssignment(
        layer="conv", precision=W8A8, activation=ActivationPolicy.STATIC, reason="test"
    )
    assert static.policy is ActivationPolicy.STATIC
    dynamic = LayerAssignment(layer="mix", precision=Precision("w8a8dyn"), reason="test")
    assert dynamic.policy is ActivationPolicy.DYNAMIC_TOKEN


def test_a_layer_named_twice_in_a_phase_is_refused_by_name() -> None:
    layers = tuple(
        LayerAssignment(layer=name, precision=precision, reason="test")
        for name, precision in (("conv", W8A8), ("mix", W8A8), ("conv", FP32))
    )
    with pytest.raises(ValidationError, match=r"phase 2\.\.5 names conv twice"):
        Phase(start=2, stop=5, layers=layers)


def test_integer_layers_of_a_plan_are_those_of_its_fullest_phase() -> None:
    def phase(start: int, *precisions: str) -> Phase:
        layers = tuple(
            LayerAssignment(layer=f"layer{i}", precision=Precision(text), reason="test")
            for i, text in enumerate(precisions)
        )
        return Phase(start=start, stop=start + 2, layers=layers)

    found = DeploymentPlan(
        target="onnxruntime",
        model="0" * 64,
        n_steps=4,
        phases=(phase(0, "fp32", "w8", "w8a8"), phase(2, "w4g64", "w4g64a8dyn", "w4a4")),
    )
    assert found.phases[0].integer_layers() == ("layer2",)
    assert found.n_integer_layers == 2
