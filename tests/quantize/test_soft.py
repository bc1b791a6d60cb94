"""A soft network computes what its hardened form computes on integers, and can be trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from edgeqdm.errors import EdgeqdmError, InputError, UnsupportedError
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, TABLE, ActivationPolicy, Precision
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.layers import get_layer, network_of
from edgeqdm.numerics.affine import quantize_weight, weight_max
from edgeqdm.numerics.grouping import search_grouped
from edgeqdm.numerics.ranges import ActivationScales, search_weight
from edgeqdm.quantize.modules import StepClock, coded_layer
from edgeqdm.quantize.parameters import LayerParameters, Parameters, Variant, WeightCodes
from edgeqdm.quantize.plans import default_plan
from edgeqdm.quantize.quantizer import assemble
from edgeqdm.quantize.soft import SoftLayer, SoftNetwork, harden, soften
from edgeqdm.quantize.soft_activations import SoftActivation, SoftClock, TabledQuantizer
from edgeqdm.quantize.soft_weights import (
    FixedWeight,
    HalfWeight,
    LearnedWeight,
    RoundedWeight,
    SoftWeight,
)
from edgeqdm.testing.conformance import STEPS, small_denoiser

LINEAR = ("w8a8", "w6a8", "w4a8", "w4a4", "w8a8dyn", "w4g32a8", "w4g32a8dyn", "w4g64", "fp16")
CONV = ("w8a8", "w6a8", "w4a8", "w4a4", "w4", "fp16")
FORMS: tuple[type[SoftWeight], ...] = (RoundedWeight, LearnedWeight, FixedWeight)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def code(weight: Tensor, precision: Precision) -> WeightCodes:
    bits = precision.weight_bits
    if bits == 16:
        return WeightCodes(weight.to(torch.float16), None, None, 16)
    if precision.group_size:
        return WeightCodes.of_groups(search_grouped(weight, bits, precision.group_size))
    scale = search_weight(weight, bits)
    return WeightCodes(quantize_weight(weight, scale, bits), scale, None, bits)


def parameters_of(
    layer: nn.Linear | nn.Conv2d, precision: Precision, policy: ActivationPolicy
) -> LayerParameters:
    """Codes by search and made-up scales, growing with the step."""
    weight = code(layer.weight.detach(), precision)
    if policy not in (ActivationPolicy.TEMPORAL, ActivationPolicy.STATIC):
        return LayerParameters(weight)
    rows = STEPS if policy is ActivationPolicy.TEMPORAL else 1
    bits = precision.activation_bits
    grown = torch.linspace(1.0, 1.4, rows)
    activation = ActivationScales(grown * 5.3 / 2**bits, 2 ** (bits - 1) - 1, bits)
    output = ActivationScales(grown * 0.023, 120) if isinstance(layer, nn.Conv2d) else None
    return LayerParameters(weight, activation, output)


class OneLayer(nn.Module):
    """A network of one layer that can be quantized, between two that stay in float."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 64, 1), nn.Conv2d(64, 4, 1)
        self.last_axis = kind == "linear"
        self.layer: nn.Module = nn.Linear(64, 64)
        if kind == "conv":
            self.layer = nn.Conv2d(64, 64, 3, padding=1, stride=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.first(x) + t[:, None, None, None] / 1000
        if self.last_axis:
            return self.last(self.layer(y.movedim(1, -1)).movedim(-1, 1))
        return self.last(self.layer(y))


def one_layer(kind: str) -> Denoiser:
    torch.manual_seed(1)
    example = (random(2, 4, 8, 8), torch.tensor([9, 9]))
    scheduler = DDPMScheduler(clip_sample=False)
    return wrap(OneLayer(kind), scheduler, example, steps=STEPS)


def plan_of(
    denoiser: Denoiser, *phases: tuple[int, int, Precision, ActivationPolicy | None]
) -> DeploymentPlan:
    def assignments(
        chosen: Precision, policy: ActivationPolicy | None
    ) -> Sequence[LayerAssignment]:
        return tuple(
            LayerAssignment(
                layer=x.name,
                precision=chosen if x.name == "layer" else FP32,
                activation=policy if x.name == "layer" else None,
                reason="test",
            )
            for x in denoiser.info.layers
        )

    return DeploymentPlan(
        target="onnxruntime",
        model=denoiser.info.fingerprint,
        n_steps=STEPS,
        phases=tuple(
            Phase(start=start, stop=stop, layers=tuple(assignments(chosen, policy)))
            for start, stop, chosen, policy in phases
        ),
    )


def initial(denoiser: Denoiser, plan: DeploymentPlan) -> Parameters:
    found = {}
    for phase in plan.phases:
        for assignment in phase.layers:
            if assignment.precision not in (FP32, TABLE):
                variant = Variant.of(assignment)
                layer = get_layer(denoiser.module, variant.layer)
                assert isinstance(layer, nn.Linear | nn.Conv2d)
                found[variant] = parameters_of(layer, variant.precision, variant.policy)
    return Parameters(found)


def set_hard(soft: SoftNetwork, hard: bool) -> None:
    for layer in soft.layers.values():
        if isinstance(layer.weight, RoundedWeight):
            layer.weight.hard = hard


def soft_and_integer(
    kind: str,
    phases: Sequence[tuple[int, int, Precision, ActivationPolicy | None]],
    form: type[SoftWeight],
    steps: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs of the layer itself in both networks, each [B, ...], on the same samples."""
    denoiser = one_layer(kind)
    plan = plan_of(denoiser, *phases)
    parameters = initial(denoiser, plan)
    soft = soften(denoiser, plan, parameters, weight=form)
    set_hard(soft, True)
    quantized = assemble(denoiser, plan, parameters)
    x = random(len(steps), 4, 8, 8, seed=5)
    with torch.no_grad():
        found = soft(x, steps)
        expected = [quantized.network(x[k : k + 1], step) for k, step in enumerate(steps)]
    return found, torch.cat(expected)


def assert_same_but_for_ties(found: Tensor, expected: Tensor) -> None:
    """float32 sums in another order; where that crosses a rounding boundary, one code differs."""
    difference = (found - expected).abs()
    scale = float(expected.abs().max())
    assert float((difference > 1e-5 * scale).float().mean()) < 0.005
    assert float(difference.max()) < 0.02 * scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", [ActivationPolicy.TEMPORAL, ActivationPolicy.STATIC])
@pytest.mark.parametrize(
    ("kind", "precision"), [("linear", x) for x in LINEAR] + [("conv", x) for x in CONV]
)
def test_soft_layer_agrees_with_the_integer_layer_at_every_step(
    kind: str, precision: str, policy: ActivationPolicy, form: type[SoftWeight]
) -> None:
    """T3 and Q8: batches mix steps; every row equals its own run on integers."""
    chosen = Precision(precision)
    if policy not in chosen.policies:
        policy = chosen.policies[0]
    steps = torch.tensor([2, 0, 1, 1])
    found, expected = soft_and_integer(kind, [(0, STEPS, chosen, policy)], form, steps)
    assert_same_but_for_ties(found, expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [("w4a4", "w4a8"), ("w8", "w8a8"), ("w8a8dyn", "w8a8"), ("w4g32a8", "w4g32a8dyn")],
)
def test_phases_of_different_activations_share_one_weight(first: str, second: str) -> None:
    """C9: a sample is rounded as its own step asks."""
    phases = [(0, 1, Precision(first), None), (1, STEPS, Precision(second), None)]
    steps = torch.tensor([2, 0, 1, 0])
    found, expected = soft_and_integer("linear", phases, RoundedWeight, steps)
    assert_same_but_for_ties(found, expected)


def test_single_layer_matches_the_coded_module_it_becomes() -> None:
    layer = nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=1, groups=4)
    precision, policy = Precision("w8a8"), ActivationPolicy.TEMPORAL
    parameters = parameters_of(layer, precision, policy)
    clock, soft_clock = StepClock(), SoftClock(steps=torch.tensor([1, 1]))
    clock.step = torch.tensor(1)
    assert parameters.activation is not None
    assert parameters.output is not None

    def rounds(scales: ActivationScales) -> SoftActivation:
        quantizer = TabledQuantizer(scales, range(STEPS), STEPS)
        return SoftActivation([quantizer], [0] * STEPS, soft_clock, "layer")

    soft = SoftLayer(
        layer,
        layer.bias,
        LearnedWeight(layer.weight, parameters.weight),
        rounds(parameters.activation),
        rounds(parameters.output),
    )
    bias = layer.bias
    assert bias is not None
    integer = coded_layer(layer, parameters, precision, bias.detach(), clock)
    x = random(2, 8, 8, 8)
    assert_same_but_for_ties(soft(x).detach(), integer(x))


def moved(parameters: LayerParameters) -> LayerParameters:
    """Trained weights: not what the float layer's round to."""
    weight = parameters.weight
    return replace(parameters, weight=replace(weight, codes=weight.codes * 1.25))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["w8a8", "w4a4", "w4g32a8", "w4g64", "fp16"])
def test_untrained_network_hardens_to_what_it_was_made_of(
    precision: str, form: type[SoftWeight]
) -> None:
    denoiser = one_layer("linear")
    plan = plan_of(denoiser, (0, STEPS, Precision(precision), None))
    parameters = initial(denoiser, plan)
    if precision == "fp16":
        parameters = replace(parameters, layers={k: moved(v) for k, v in parameters.layers.items()})
    hardened = harden(soften(denoiser, plan, parameters, weight=form))
    assert hardened.layers.keys() == parameters.layers.keys()
    assert not hardened.floats
    for variant, before in parameters.layers.items():
        after = hardened.layers[variant]
        assert torch.equal(after.weight.codes, before.weight.codes)
        assert after.weight.codes.dtype == before.weight.codes.dtype
        assert after.weight.group_size == before.weight.group_size
        for one, other in (
            (after.weight.scale, before.weight.scale),
            (after.weight.zero_point, before.weight.zero_point),
        ):
            assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]
        assert (after.activation is None) == (before.activation is None)
        if after.activation is not None and before.activation is not None:
            assert torch.equal(after.activation.scale, before.activation.scale)
            assert after.activation.zero_point == before.activation.zero_point


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4g32a8"])
def test_soft_weight_starts_as_the_float_weight_inside_its_range(precision: str) -> None:
    """E6."""
    weight = random(16, 64)
    coded = code(weight, Precision(precision))
    soft = RoundedWeight(weight, coded)().detach()
    low, high = (
        (0, 15)
        if coded.zero_point is not None
        else (-weight_max(coded.bits), weight_max(coded.bits))
    )
    in_range = (coded.codes > low) & (coded.codes < high)
    assert float((soft - weight)[in_range].abs().max()) < 1e-5


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4g32a8", "w4g48a8"])
def test_hard_codes_are_floor_or_ceil_of_the_scaled_weight(precision: str) -> None:
    """E7."""
    weight = random(16, 80)
    coded = code(weight, Precision(precision))
    rounding = RoundedWeight(weight, coded)
    with torch.no_grad():
        rounding.alpha.copy_(random(*rounding.alpha.shape, seed=9))
    found = rounding.codes()
    assert found.scale is not None
    if found.zero_point is None:
        ratio, low, high = weight / found.scale[:, None], -127, 127
        if coded.bits == 4:
            low, high = -7, 7
        codes = found.codes.float()
    else:
        group = torch.arange(weight.shape[1]) // found.group_size
        ratio = weight / found.scale[:, group] + found.zero_point[:, group]
        low, high = 0, 15
        codes = found.codes.float()
    floor, ceil = ratio.floor().clamp(low, high), ratio.ceil().clamp(low, high)
    # A ratio within float32 error of a whole number may be seen on its other side.
    near = (ratio - ratio.round()).abs() < 1e-4
    assert bool(((codes == floor) | (codes == ceil) | near).all())


def test_learned_scale_has_the_lsq_gradient() -> None:
    """T4: inside `round(u) - u`, outside the last code, times 1 / sqrt(n q_max)."""
    weight = torch.tensor([[0.9, -0.34, 0.26, -2.0]])
    scale = torch.tensor([0.1])
    coded = WeightCodes(quantize_weight(weight, scale, 4), scale, None, 4)
    learned = LearnedWeight(weight, coded)
    learned().sum().backward()
    slopes = torch.tensor([7.0, -3 + 3.4, 3 - 2.6, -7.0])
    # By the logarithm of the scale: one more factor, the scale itself.
    expected = slopes.sum() * scale / (4 * 7) ** 0.5
    assert learned.log_ratio.grad is not None
    assert torch.allclose(learned.log_ratio.grad, expected, atol=1e-6)
    assert learned.weight.grad is not None
    assert learned.weight.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_scales_of_a_step_learn_from_its_samples_only() -> None:
    denoiser = one_layer("linear")
    plan = plan_of(denoiser, (0, STEPS, Precision("w4a8"), None))
    soft = soften(denoiser, plan, initial(denoiser, plan))
    soft(random(2, 4, 8, 8), torch.tensor([0, 2])).square().mean().backward()
    (quantizer,) = soft.layers["layer"].input.quantizers
    assert isinstance(quantizer, TabledQuantizer)
    assert quantizer.log_ratio.grad is not None
    assert (quantizer.log_ratio.grad != 0).tolist() == [True, False, True]


def test_learned_grouped_scales_are_float16_values() -> None:
    weight = random(8, 64)
    learned = LearnedWeight(weight, code(weight, Precision("w4g32a8")))
    with torch.no_grad():
        learned.log_ratio.copy_(random(8, 2) * 0.1)
    found = learned.codes()
    assert found.scale is not None
    assert torch.equal(found.scale, found.scale.half().float())
    assert torch.equal(learned(), found.dequantized())


def test_trained_scales_and_floats_end_in_the_parameters() -> None:
    denoiser = one_layer("conv")
    plan = plan_of(denoiser, (0, STEPS, Precision("w8a8"), None))
    before = {k: v.clone() for k, v in denoiser.module.state_dict().items()}
    soft = soften(denoiser, plan, initial(denoiser, plan), weight=LearnedWeight)
    optimizer = torch.optim.SGD(soft.parameters(), lr=0.5)
    soft(random(3, 4, 8, 8), torch.tensor([0, 1, 2])).square().mean().backward()
    optimizer.step()
    hardened = harden(soft)
    assert set(hardened.floats) == {
        "first.weight",
        "first.bias",
        "last.weight",
        "last.bias",
        "layer.bias",
    }
    after = denoiser.module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    quantized = assemble(denoiser, plan, hardened)
    x, step = random(1, 4, 8, 8, seed=8), torch.tensor(1)
    with torch.no_grad():
        assert_same_but_for_ties(soft(x, step[None]), quantized.network(x, step))
    again = soften(denoiser, plan, hardened, weight=FixedWeight)
    with torch.no_grad():
        assert torch.allclose(again(x, step[None]), soft(x, step[None]), atol=1e-5)


def test_dropped_activations_differ_and_repeat_with_the_generator() -> None:
    """E10."""
    denoiser = one_layer("linear")
    plan = plan_of(denoiser, (0, STEPS, Precision("w4a4"), None))
    soft = soften(denoiser, plan, initial(denoiser, plan))
    x, steps = random(2, 4, 8, 8), torch.tensor([0, 1])
    plain = soft(x, steps)
    assert torch.equal(soft(x, steps), plain)
    soft.clock.drop = 0.5
    soft.clock.generator = torch.Generator().manual_seed(1)
    first = soft(x, steps)
    soft.clock.generator = torch.Generator().manual_seed(1)
    assert torch.equal(soft(x, steps), first)
    assert not torch.equal(first, plain)


def test_half_of_the_elements_of_an_activation_pass_unquantized() -> None:
    """E10: 40 000 fair draws are within 4 deviations, 1 %, of one half; none without dropping."""
    scales = ActivationScales(torch.ones(STEPS), 128)
    clock = SoftClock(steps=torch.zeros(200, dtype=torch.int64))
    quantizer = TabledQuantizer(scales, range(STEPS), STEPS)
    activation = SoftActivation([quantizer], [0] * STEPS, clock, "layer")
    x = 0.1 + 0.3 * torch.rand(200, 200)
    assert not bool(activation(x).any())
    clock.drop, clock.generator = 0.5, torch.Generator().manual_seed(3)
    found = activation(x)
    assert bool(((found == 0) | (found == x)).all())
    assert abs(float((found == x).float().mean()) - 0.5) < 0.01


def test_plan_of_floats_gives_the_float_network() -> None:
    """I1."""
    denoiser = small_denoiser(DDPMScheduler(clip_sample=False), guidance=1.0)
    plan = default_plan(denoiser.info, "onnxruntime", STEPS, body=FP32)
    soft = soften(denoiser, plan, Parameters({}))
    x, labels = random(2, 4, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        assert torch.equal(soft(x, torch.tensor([1, 1]), labels), denoiser.predict(x, 1, labels))
    assert harden(soft) == Parameters({})


def test_soft_network_can_be_copied() -> None:
    denoiser = one_layer("linear")
    plan = plan_of(denoiser, (0, STEPS, Precision("w4a8"), None))
    soft = soften(denoiser, plan, initial(denoiser, plan), weight=LearnedWeight)
    other = copy.deepcopy(soft)
    x, steps = random(2, 4, 8, 8), torch.tensor([0, 2])
    assert torch.equal(other(x, steps), soft(x, steps))
    assert not set(map(id, other.parameters())) & set(map(id, soft.parameters()))


def refused(
    error: type[EdgeqdmError], denoiser: Denoiser, plan: DeploymentPlan, parameters: Parameters
) -> EdgeqdmError:
    with pytest.raises(error) as caught:
        soften(denoiser, plan, parameters)
    return caught.value


@pytest.mark.parametrize("other", ["w8a8", "w4g32a8", "fp32"])
def test_phases_that_store_two_weights_are_refused(other: str) -> None:
    denoiser = one_layer("linear")
    plan = plan_of(denoiser, (0, 1, Precision("w4a8"), None), (1, STEPS, Precision(other), None))
    problem = refused(UnsupportedError, denoiser, plan, initial(denoiser, plan))
    assert (problem.code, problem.path) == ("EQ-4240", "layer")


def test_missing_parameters_are_named() -> None:
    denoiser = one_layer("linear")
    plan = plan_of(denoiser, (0, STEPS, Precision("w4a8"), None))
    problem = refused(InputError, denoiser, plan, Parameters({}))
    assert (problem.code, problem.path) == ("EQ-3250", "layer/w4a8/temporal")


def test_input_that_is_no_batch_is_refused() -> None:
    scales = ActivationScales(torch.ones(STEPS), 128)
    clock = SoftClock(steps=torch.tensor([0, 1]))
    activation = SoftActivation([TabledQuantizer(scales, range(3), 3)], [0] * 3, clock, "mid.proj")
    with pytest.raises(UnsupportedError) as caught:
        activation(random(3, 4))
    assert (caught.value.code, caught.value.path) == ("EQ-4241", "mid.proj")


def test_rows_folded_into_the_batch_keep_the_step_of_their_sample() -> None:
    scales = ActivationScales(torch.tensor([1.0, 0.5, 0.1]), 128)
    clock = SoftClock(steps=torch.tensor([0, 2]))
    activation = SoftActivation([TabledQuantizer(scales, range(3), 3)], [0] * 3, clock, "layer")
    x = torch.full((4, 1), 0.72)
    assert torch.allclose(activation(x)[:, 0], torch.tensor([1.0, 1.0, 0.7, 0.7]))


def test_half_weight_is_trained_in_32_bits() -> None:
    weight = random(4, 4)
    half = HalfWeight(weight, WeightCodes(weight.half(), None, None, 16))
    assert torch.equal(half(), weight.half().float())
    half().sum().backward()
    assert half.weight.grad is not None
    assert torch.equal(half.weight.grad, torch.ones(4, 4))


def test_layers_keep_their_names() -> None:
    denoiser = one_layer("linear")
    plan = plan_of(denoiser, (0, STEPS, Precision("w4a8"), None))
    soft = soften(denoiser, plan, initial(denoiser, plan))
    assert set(soft.layers) == {"layer"}
    assert isinstance(network_of(soft.module).get_submodule("layer"), SoftLayer)
