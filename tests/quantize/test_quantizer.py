"""A quantized denoiser stays close to the float one, and what cannot be quantized is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from edgeqdm.calibrate.observe import LayerObservation, observe
from edgeqdm.calibrate.trajectories import Trajectories, collect_trajectories
from edgeqdm.errors import EdgeqdmError, InputError, NumericalError, UnsupportedError
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import Precision
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.layers import get_layer
from edgeqdm.numerics.affine import quantize_weight
from edgeqdm.numerics.ranges import StepRanges, search_activation, search_weight
from edgeqdm.quantize import quantizer
from edgeqdm.quantize.modules import QuantizedConv2d, QuantizedLinear
from edgeqdm.quantize.quantizer import (
    QuantizedDenoiser,
    default_plan,
    precision_digest,
    quantize,
)
from edgeqdm.testing.conformance import STEPS, quantize_tiny, small_denoiser, tiny_quantized

Observations = dict[str, LayerObservation]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return small_denoiser(DDPMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def trajectories(denoiser: Denoiser) -> Trajectories:
    return collect_trajectories(denoiser, 8, seed=2)


@pytest.fixture(scope="module")
def plan(denoiser: Denoiser) -> DeploymentPlan:
    return default_plan(denoiser.info, "onnxruntime", STEPS)


@pytest.fixture(scope="module")
def observations(
    denoiser: Denoiser, trajectories: Trajectories, plan: DeploymentPlan
) -> Observations:
    return observe(denoiser, trajectories, plan.phases[0].quantized())


@pytest.fixture(scope="module")
def quantized(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Observations
) -> QuantizedDenoiser:
    return quantize(denoiser, plan, observations)


def sqnr_db(signal: Tensor, found: Tensor) -> float:
    noise = (found - signal).double().square().sum()
    return float(10 * torch.log10(signal.double().square().sum() / noise))


def with_precision(plan: DeploymentPlan, name: str, precision: Precision) -> DeploymentPlan:
    (phase,) = plan.phases
    layers = tuple(
        a.model_copy(update={"precision": precision}) if a.layer == name else a
        for a in phase.layers
    )
    return plan.model_copy(update={"phases": (phase.model_copy(update={"layers": layers}),)})


def refused(
    error: type[EdgeqdmError], *arguments: Any, code: str, path: str | None = None
) -> EdgeqdmError:
    with pytest.raises(error) as caught:
        quantize(*arguments)
    assert caught.value.code == code
    if path is not None:
        assert caught.value.path == path
    return caught.value


def integer_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedConv2d | QuantizedLinear]]:
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedConv2d | QuantizedLinear):
            yield name, layer


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_every_step_keeps_20_db_on_trajectories_it_was_not_calibrated_on(kind: str) -> None:
    model = tiny_quantized(kind)
    fresh = collect_trajectories(model.denoiser, 4, seed=99)
    for step in range(STEPS):
        found = model.predict(fresh.inputs[step], step, fresh.conditioning)
        assert sqnr_db(fresh.outputs[step], found) >= 20.0


def test_default_plan_leaves_first_last_and_embedding_layers_in_float(
    denoiser: Denoiser, plan: DeploymentPlan
) -> None:
    assert plan.phases[0].quantized() == ("conv", "mix")
    assert {a.layer for a in plan.phases[0].layers} == {x.name for x in denoiser.info.layers}
    assert all(a.reason for a in plan.phases[0].layers)


def test_layers_hold_the_searched_scales_and_the_float_bias(
    denoiser: Denoiser, quantized: QuantizedDenoiser, observations: Observations
) -> None:
    layers = {name.rpartition(".")[2]: layer for name, layer in integer_layers(quantized.network)}
    assert layers.keys() == {"conv", "mix"}
    for name, layer in layers.items():
        original = get_layer(denoiser.module, name)
        weight, bias = original.get_parameter("weight").detach(), original.get_parameter("bias")
        scale = search_weight(weight)
        activation = search_activation(observations[name].input)
        assert torch.equal(layer.weight_scale, scale)
        assert torch.equal(layer.weight_q, quantize_weight(weight, scale))
        assert torch.equal(layer.act_scale_table, activation.scale)
        assert layer.zero_point == activation.zero_point
        assert isinstance(layer.bias, Tensor)
        assert torch.equal(layer.bias, bias.detach())


def test_float_denoiser_is_left_as_it_was(
    denoiser: Denoiser, quantized: QuantizedDenoiser, trajectories: Trajectories
) -> None:
    assert not list(integer_layers(denoiser.module))
    found = denoiser.predict(trajectories.inputs[0], 0, trajectories.conditioning)
    assert torch.equal(found, trajectories.outputs[0])


def test_plan_of_floats_gives_the_float_model(
    denoiser: Denoiser, plan: DeploymentPlan, trajectories: Trajectories
) -> None:
    floats = plan
    for name in plan.phases[0].quantized():
        floats = with_precision(floats, name, Precision.FP32)
    found = quantize(denoiser, floats, {})
    for step in range(STEPS):
        output = found.predict(trajectories.inputs[step], step, trajectories.conditioning)
        assert torch.equal(output, trajectories.outputs[step])


def test_every_step_uses_its_own_scales(
    quantized: QuantizedDenoiser, trajectories: Trajectories
) -> None:
    network = quantized.network
    x, labels = trajectories.inputs[0], trajectories.conditioning
    assert labels is not None
    tables = [layer.act_scale_table.clone() for _, layer in integer_layers(network)]
    with torch.no_grad():
        before = [network(x, torch.tensor(step), labels) for step in range(STEPS)]
        for _, layer in integer_layers(network):
            layer.act_scale_table[1] *= 4
        after = [network(x, torch.tensor(step), labels) for step in range(STEPS)]
    for (_, layer), table in zip(integer_layers(network), tables, strict=True):
        layer.act_scale_table.copy_(table)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False]


def test_plan_for_another_model_is_refused(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Observations
) -> None:
    other = plan.model_copy(update={"model": "f" * 64})
    refused(InputError, denoiser, other, observations, code="EQ-3202", path="plan.model")


def test_plan_for_another_number_of_steps_is_refused(
    denoiser: Denoiser, observations: Observations
) -> None:
    other = default_plan(denoiser.info, "onnxruntime", STEPS + 1)
    refused(InputError, denoiser, other, observations, code="EQ-3206", path="plan.n_steps")


def test_plan_of_two_phases_is_refused(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Observations
) -> None:
    layers = plan.phases[0].layers
    phases = (Phase(start=0, stop=1, layers=layers), Phase(start=1, stop=STEPS, layers=layers))
    other = plan.model_copy(update={"phases": phases})
    refused(UnsupportedError, denoiser, other, observations, code="EQ-4202")


def test_layer_that_was_not_observed_is_refused_by_name(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Observations
) -> None:
    missing = {"conv": observations["conv"]}
    refused(InputError, denoiser, plan, missing, code="EQ-3203", path="mix")


def test_observations_of_another_number_of_steps_are_refused(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Observations
) -> None:
    seen = observations["mix"]

    def cut(ranges: StepRanges) -> StepRanges:
        return StepRanges(ranges.samples[:2], ranges.low[:2], ranges.high[:2])

    short = {**observations, "mix": LayerObservation(cut(seen.input), cut(seen.output))}
    refused(InputError, denoiser, plan, short, code="EQ-3203", path="mix")


def test_layer_of_another_kind_is_refused(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Observations
) -> None:
    (phase,) = plan.phases
    norm = LayerAssignment(layer="norm", precision=Precision.W8A8, reason="test")
    phases = (phase.model_copy(update={"layers": (*phase.layers, norm)}),)
    other = plan.model_copy(update={"phases": phases})
    seen = {**observations, "norm": observations["conv"]}
    refused(InputError, denoiser, other, seen, code="EQ-3204", path="norm")


def test_accumulator_that_could_overflow_is_refused_by_name(
    denoiser: Denoiser,
    plan: DeploymentPlan,
    observations: Observations,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantizer, "INT32_LIMIT", 2**14)
    found = refused(NumericalError, denoiser, plan, observations, code="EQ-5203", path="conv")
    assert found.hint == "leave the layer in fp32"


class OneConvolution(nn.Module):
    """A float convolution at either end and the one under test between them."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.middle = middle

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.last(self.middle(self.first(x)))
        return out


def one_convolution(middle: nn.Module) -> Denoiser:
    example = (torch.zeros(2, 4, 6, 6), torch.tensor([1, 1]))
    return wrap(OneConvolution(middle), DDPMScheduler(clip_sample=False), example, steps=STEPS)


@pytest.mark.parametrize(
    "middle",
    [
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same"),
    ],
    ids=["circular", "reflect", "same"],
)
def test_padding_without_an_integer_form_is_refused_by_name(middle: nn.Conv2d) -> None:
    with pytest.raises(InputError) as caught:
        quantize_tiny(one_convolution(middle))
    assert caught.value.code == "EQ-3205"
    assert caught.value.path == "middle"


@pytest.mark.parametrize(
    "middle",
    [
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        nn.Sequential(nn.Conv2d(4, 8, 2, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2)),
    ],
    ids=["dilated groups", "oblong", "strided"],
)
def test_geometry_of_a_convolution_is_kept(middle: nn.Module) -> None:
    model = quantize_tiny(one_convolution(middle))
    fresh = collect_trajectories(model.denoiser, 4, seed=99)
    for step in range(STEPS):
        assert sqnr_db(fresh.outputs[step], model.predict(fresh.inputs[step], step, None)) >= 20.0


def test_dead_channel_stays_dead() -> None:
    middle = nn.Conv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        middle.weight[2] = 0
    ((_, layer),) = integer_layers(quantize_tiny(one_convolution(middle)).network)
    assert float(layer.weight_scale[2]) == 1.0
    assert not bool(layer.weight_q[2].any())


def test_digest_changes_with_every_table_and_with_the_plan(
    denoiser: Denoiser,
    plan: DeploymentPlan,
    observations: Observations,
    quantized: QuantizedDenoiser,
) -> None:
    assert precision_digest(quantize(denoiser, plan, observations)) == precision_digest(quantized)
    seen = observations["conv"]
    wider = replace(seen.output, samples=2 * seen.output.samples, high=2 * seen.output.high)
    changed = {**observations, "conv": LayerObservation(seen.input, wider)}
    fewer = with_precision(plan, "mix", Precision.FP32)
    digests = {
        precision_digest(quantized),
        precision_digest(quantize(denoiser, plan, changed)),
        precision_digest(quantize(denoiser, fewer, observations)),
    }
    assert len(digests) == 3
