from __future__ import annotations

import pytest
from pydantic import ValidationError

from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import Precision


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


def test_quantized_lists_what_is_not_left_in_float() -> None:
    phase = Phase(
        start=0,
        stop=1,
        layers=(
            LayerAssignment(layer="conv_in", precision=Precision.FP32, reason="first layer"),
            LayerAssignment(layer="mid.conv1", precision=Precision.W8A8, reason="default"),
        ),
    )
    assert phase.quantized() == ("mid.conv1",)


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan([(0, 8)], 8).n_steps = 9
