"""Rules choose a precision for every layer by its role and kind, and say why."""

from __future__ import annotations

import pytest

from edgeqdm.errors import InputError
from edgeqdm.ir.model import Conditioning, Decoder, LayerInfo, LayerKind, ModelInfo
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment
from edgeqdm.ir.precision import FP16, FP32, TABLE, ActivationPolicy, Precision
from edgeqdm.quantize.plans import default_plan, float_plan, with_activation_bits

CONV, LINEAR = LayerKind.CONV2D, LayerKind.LINEAR
INFO = ModelInfo(
    name="toy",
    family="Toy",
    sample_shape=(4, 8, 8),
    conditioning=Conditioning(kind="none"),
    decoder=Decoder(),
    layers=(
        LayerInfo(name="first", kind=CONV, weight_shape=(8, 4, 3, 3), role="input"),
        LayerInfo(name="time", kind=LINEAR, weight_shape=(8, 8), role="embedding"),
        LayerInfo(name="class", kind=CONV, weight_shape=(8, 8, 1, 1), role="embedding"),
        LayerInfo(name="conv", kind=CONV, weight_shape=(8, 8, 3, 3), role="body"),
        LayerInfo(name="mix", kind=LINEAR, weight_shape=(8, 8), role="body"),
        LayerInfo(name="last", kind=CONV, weight_shape=(4, 8, 3, 3), role="output"),
    ),
    fingerprint="a" * 64,
)


def layers_of(plan: DeploymentPlan, phase: int = 0) -> dict[str, LayerAssignment]:
    return {a.layer: a for a in plan.phases[phase].layers}


def precisions_of(plan: DeploymentPlan, phase: int = 0) -> dict[str, str]:
    return {name: str(a.precision) for name, a in layers_of(plan, phase).items()}


def test_default_plan_codes_the_body_and_leaves_ends_and_embeddings_in_float() -> None:
    plan = default_plan(INFO, "onnxruntime", 5)
    assert (plan.target, plan.model, plan.n_steps) == ("onnxruntime", "a" * 64, 5)
    assert [(p.start, p.stop) for p in plan.phases] == [(0, 5)]
    floats = dict.fromkeys(("first", "time", "class", "last"), "fp32")
    assert precisions_of(plan) == {**floats, "conv": "w8a8", "mix": "w8a8"}
    assert tuple(a.layer for a in plan.phases[0].layers) == tuple(x.name for x in INFO.layers)


@pytest.mark.parametrize(
    ("body", "conv"),
    [
        ("w4a8", "w4a8"),
        ("w4g64a8", "w4a8"),
        ("w8a8dyn", "w8a8"),
        ("w4g64a8dyn", "w4a8"),
        ("w4g128", "w4"),
        ("w6", "w6"),
        ("fp16", "fp16"),
        ("fp32", "fp32"),
    ],
)
def test_a_convolution_gets_the_body_precision_without_groups_and_run_time_scales(
    body: str, conv: str
) -> None:
    found = precisions_of(default_plan(INFO, "onnxruntime", 5, body=Precision(body)))
    assert (found["mix"], found["conv"]) == (body, conv)


@pytest.mark.parametrize(
    ("body", "conv", "mix"),
    [
        ("w4a8", "w8a8", "w8a8"),
        ("w4g64a8dyn", "w8a8", "w8g64a8dyn"),
        ("w6a4", "w8a4", "w8a4"),
        ("w4", "w8", "w8"),
        ("w8a8", "w8a8", "w8a8"),
        ("fp16", "fp16", "fp16"),
    ],
)
def test_fine_layers_keep_8_bit_weights_and_all_else(body: str, conv: str, mix: str) -> None:
    plan = default_plan(INFO, "onnxruntime", 5, body=Precision(body), fine=["conv", "mix"])
    found = precisions_of(plan)
    assert (found["conv"], found["mix"]) == (conv, mix)
    widened = conv != body
    assert ("finest resolution" in layers_of(plan)["conv"].reason) == widened


def test_embeddings_get_their_own_precision_or_a_table() -> None:
    plan = default_plan(INFO, "eager", 5, embedding=Precision("w4g32"), tables=["time"])
    found = precisions_of(plan)
    assert (found["time"], found["class"]) == (TABLE, "w4")
    assert precisions_of(default_plan(INFO, "eager", 5, embedding=FP16))["time"] == "fp16"


def test_only_embedding_layers_become_tables() -> None:
    found = precisions_of(default_plan(INFO, "eager", 5, tables=["conv", "first", "class"]))
    assert [name for name, precision in found.items() if precision == TABLE] == ["class"]


def test_a_static_policy_reaches_every_layer_that_can_have_it() -> None:
    static = ActivationPolicy.STATIC
    found = layers_of(
        default_plan(INFO, "eager", 5, body=Precision("w4g64a8dyn"), activation=static)
    )
    assert found["conv"].policy is static
    assert found["mix"].policy is ActivationPolicy.DYNAMIC_TOKEN_GROUP
    assert found["first"].policy is ActivationPolicy.FLOAT
    found = layers_of(default_plan(INFO, "eager", 5, activation=static))
    assert found["mix"].policy is static


def test_every_reason_begins_with_the_precision_and_says_more() -> None:
    plan = default_plan(INFO, "eager", 5, body=Precision("w4g64a8"), tables=["time"])
    for assignment in plan.phases[0].layers:
        precision, _, reason = assignment.reason.partition(": ")
        assert precision == assignment.precision
        assert reason


def test_float_plan_leaves_every_layer() -> None:
    plan = float_plan(INFO, "onnxruntime", 5)
    assert set(precisions_of(plan).values()) == {FP32}
    assert plan.n_integer_layers == 0


def test_every_change_of_activation_bits_begins_a_phase() -> None:
    plan = with_activation_bits(default_plan(INFO, "eager", 6), [8, 4, 4, 8, 8, 4])
    assert [(p.start, p.stop) for p in plan.phases] == [(0, 1), (1, 3), (3, 5), (5, 6)]
    assert [precisions_of(plan, p)["conv"] for p in range(4)] == ["w8a8", "w8a4", "w8a8", "w8a4"]
    for phase in range(4):
        assert precisions_of(plan, phase)["first"] == FP32


def test_constant_activation_bits_are_one_phase() -> None:
    plan = default_plan(INFO, "eager", 3)
    assert with_activation_bits(plan, [8, 8, 8]) == plan
    assert len(with_activation_bits(plan, [4, 4, 4]).phases) == 1


@pytest.mark.parametrize("body", ["w4g64a8", "w6a8", "w4g64a8dyn", "w8a8dyn"])
def test_weights_and_policies_stay_when_activation_bits_change(body: str) -> None:
    plan = default_plan(INFO, "eager", 2, body=Precision(body), activation=ActivationPolicy.STATIC)
    found = with_activation_bits(plan, [4, 8])
    assert layers_of(found, 1) == layers_of(plan)
    for name, assignment in layers_of(found, 0).items():
        before = layers_of(plan)[name]
        assert assignment.policy is before.policy
        assert assignment.precision.weight_bits == before.precision.weight_bits
        assert assignment.precision.group_size == before.precision.group_size
        if before.precision.integer:
            assert assignment.precision.activation_bits == 4
            assert "4-bit activations" in assignment.reason


def test_layers_with_float_activations_do_not_change() -> None:
    plan = default_plan(INFO, "eager", 2, body=Precision("w4g64"), tables=["time"])
    found = with_activation_bits(plan, [4, 8])
    assert layers_of(found, 0) == layers_of(found, 1) == layers_of(plan)


@pytest.mark.parametrize("bits", [[], [8], [8, 8, 8]])
def test_bits_of_another_number_of_steps_are_refused(bits: list[int]) -> None:
    with pytest.raises(InputError, match=f"bits of {len(bits)} steps for a plan of 2") as caught:
        with_activation_bits(default_plan(INFO, "eager", 2), bits)
    assert caught.value.code == "EQ-3209"


def test_a_plan_that_has_phases_already_is_refused() -> None:
    phased = with_activation_bits(default_plan(INFO, "eager", 2), [4, 8])
    with pytest.raises(InputError, match="2 phases"):
        with_activation_bits(phased, [8, 8])
