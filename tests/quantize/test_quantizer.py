"""A quantized denoiser stays close to the float one, and what cannot be quantized is refused."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from edgeqdm.calibrate.observe import LayerObservation, observe
from edgeqdm.calibrate.trajectories import Trajectories, collect_trajectories
from edgeqdm.errors import EdgeqdmError, InputError, NumericalError, UnsupportedError
from edgeqdm.ir.model import LayerInfo
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP16, FP32, TABLE, W8A8, ActivationPolicy, Precision
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.layers import get_layer
from edgeqdm.numerics.affine import quantize_weight
from edgeqdm.numerics.grouping import grouped_minmax
from edgeqdm.numerics.ranges import (
    StepRanges,
    minmax_activation,
    minmax_weight,
    search_activation,
    search_weight,
)
from edgeqdm.quantize import quantizer
from edgeqdm.quantize.fold import TableLayer, dependence
from edgeqdm.quantize.modules import (
    CodedLayer,
    PhasedLayer,
    QuantizedConv2d,
    QuantizedLinear,
    TabledLayer,
)
from edgeqdm.quantize.parameters import Parameters, Variant
from edgeqdm.quantize.plans import default_plan, float_plan, with_activation_bits
from edgeqdm.quantize.quantizer import (
    QuantizedDenoiser,
    Ranges,
    assemble,
    initialise,
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
    return observe(denoiser, trajectories, plan.phases[0].integer_layers())


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
    assert plan.phases[0].integer_layers() == ("conv", "mix")
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


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_plan_of_floats_gives_the_bits_of_the_float_network(kind: str) -> None:
    """I1, T7: with every feature off nothing is left of quantization."""
    denoiser = tiny_quantized(kind).denoiser
    found = quantize(denoiser, float_plan(denoiser.info, "onnxruntime", STEPS), {})
    x, labels = torch.randn(3, *denoiser.info.sample_shape), torch.tensor([0, 2, 1])
    for step in range(STEPS):
        assert torch.equal(found.predict(x, step, labels), denoiser.predict(x, step, labels))
    assert found.parameters == Parameters({})


def test_plan_of_floats_gives_the_float_model(
    denoiser: Denoiser, plan: DeploymentPlan, trajectories: Trajectories
) -> None:
    floats = plan
    for name in plan.phases[0].integer_layers():
        floats = with_precision(floats, name, FP32)
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


def test_module_that_is_no_layer_is_refused(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Observations
) -> None:
    (phase,) = plan.phases
    norm = LayerAssignment(layer="norm", precision=W8A8, reason="test")
    phases = (phase.model_copy(update={"layers": (*phase.layers, norm)}),)
    other = plan.model_copy(update={"phases": phases})
    seen = {**observations, "norm": observations["conv"]}
    refused(InputError, denoiser, other, seen, code="EQ-3270", path="norm")


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
    """P10: bits and scales are part of what a correction was measured on."""
    assert precision_digest(quantize(denoiser, plan, observations)) == precision_digest(quantized)
    seen = observations["conv"]
    wider = replace(seen.output, samples=2 * seen.output.samples, high=2 * seen.output.high)
    changed = {**observations, "conv": LayerObservation(seen.input, wider)}
    fewer = with_precision(plan, "mix", FP32)
    digests = {
        precision_digest(quantized),
        precision_digest(quantize(denoiser, plan, changed)),
        precision_digest(quantize(denoiser, fewer, observations)),
    }
    assert len(digests) == 3


class Wide(nn.Module):
    """A convolution and a linear layer wide enough for groups; x [B, 4, 6, 6], t [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 48, 1), nn.Conv2d(48, 4, 1)
        self.embed = nn.Linear(1, 48)
        self.conv = nn.Conv2d(48, 48, 3, padding=1)
        self.norm = nn.GroupNorm(4, 48)
        self.linear = nn.Linear(48, 48)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.first(x) + self.embed(torch.sin(0.01 * t)[:, None])[:, :, None, None]
        hidden = nn.functional.silu(self.norm(self.conv(hidden)))
        mixed = self.linear(hidden.flatten(2).transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.last(mixed.reshape(hidden.shape))
        return out


@dataclass(frozen=True)
class Calibrated:
    """A float denoiser with what calibration saw of it and fresh trajectories to judge by."""

    denoiser: Denoiser
    observations: Observations
    fresh: Trajectories

    def plan(
        self,
        precisions: Mapping[str, str],
        activation: ActivationPolicy | None = None,
    ) -> DeploymentPlan:
        """One phase; layers that are not named stay in float."""

        def assignment(layer: LayerInfo) -> LayerAssignment:
            chosen = Precision(precisions.get(layer.name, FP32))
            policy = activation if chosen != FP32 else None
            return LayerAssignment(
                layer=layer.name, precision=chosen, activation=policy, reason="test"
            )

        layers = tuple(map(assignment, self.denoiser.info.layers))
        return DeploymentPlan(
            target="onnxruntime",
            model=self.denoiser.info.fingerprint,
            n_steps=STEPS,
            phases=(Phase(start=0, stop=STEPS, layers=layers),),
        )

    def quantize(
        self,
        precisions: Mapping[str, str],
        activation: ActivationPolicy | None = None,
        ranges: Ranges = "search",
    ) -> QuantizedDenoiser:
        plan = self.plan(precisions, activation)
        return quantize(self.denoiser, plan, self.observations, ranges=ranges)

    def error(self, quantized: QuantizedDenoiser, step: int) -> float:
        """Mean squared error of a step's prediction, relative to its energy."""
        found = quantized.predict(self.fresh.inputs[step], step, self.fresh.conditioning)
        signal = self.fresh.outputs[step]
        return float((found - signal).square().mean() / signal.square().mean())

    def errors(self, quantized: QuantizedDenoiser) -> float:
        return sum(self.error(quantized, step) for step in range(STEPS))


@pytest.fixture(scope="module")
def wide() -> Calibrated:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Wide()
    example = (torch.zeros(2, 4, 6, 6), torch.tensor([1, 1]))
    denoiser = wrap(network, DDPMScheduler(clip_sample=False), example, steps=STEPS)
    seen = observe(denoiser, collect_trajectories(denoiser, 8, seed=2), ("conv", "linear"))
    return Calibrated(denoiser, seen, collect_trajectories(denoiser, 4, seed=99))


POLICIES = pytest.mark.parametrize(
    "policy", [ActivationPolicy.STATIC, ActivationPolicy.TEMPORAL], ids=str
)
KINDS = pytest.mark.parametrize("layer", ["conv", "linear"])


def ordered(wide: Calibrated, layer: str, policy: ActivationPolicy | None, *texts: str) -> None:
    """More bits come first, and every precision is closer to the float model than the next."""
    errors = [wide.errors(wide.quantize({layer: text}, policy)) for text in texts]
    assert errors == sorted(errors), dict(zip(texts, errors, strict=True))
    assert errors[0] > 0
    assert errors[-1] < 0.5


@POLICIES
@KINDS
def test_more_bits_are_closer_to_the_float_model(
    wide: Calibrated, layer: str, policy: ActivationPolicy
) -> None:
    """I2, I3: of weights and of activations, with a table and with one scale."""
    ordered(wide, layer, policy, "w8a8", "w6a8", "w4a8", "w4a4")
    ordered(wide, layer, policy, "w8a8", "w8a4", "w4a4")


@KINDS
def test_float_activations_are_closer_than_coded_ones(wide: Calibrated, layer: str) -> None:
    for bits in (4, 6, 8):
        ordered(wide, layer, None, f"w{bits}", f"w{bits}a8", f"w{bits}a4")
    ordered(wide, layer, None, "fp16", "w8", "w6", "w4")


@POLICIES
def test_smaller_groups_are_closer_to_the_float_model(
    wide: Calibrated, policy: ActivationPolicy
) -> None:
    """I2: 4-bit weights with groups lose less than without."""
    ordered(wide, "linear", policy, "w8g16a8", "w4g16a8", "w4g48a8", "w4a8", "w4g16a4")


def test_scales_from_the_values_need_no_calibration(wide: Calibrated) -> None:
    ordered(wide, "linear", None, "w8a8dyn", "w4a8dyn", "w4a4dyn")
    ordered(wide, "linear", None, "w8g16a8dyn", "w4g16a8dyn", "w4g32a8dyn", "w4g32a4dyn")
    for text in ("w8a8dyn", "w4g16a8dyn", "w4g16", "w8", "fp16"):
        plan = wide.plan({"linear": text})
        found = quantize(wide.denoiser, plan, {})
        assert found.tables_sha256 == wide.quantize({"linear": text}).tables_sha256


def test_static_scales_are_one_row_and_temporal_ones_a_row_per_step(wide: Calibrated) -> None:
    both = {"conv": "w8a8", "linear": "w4g16a8"}
    for policy, rows in ((ActivationPolicy.STATIC, 1), (ActivationPolicy.TEMPORAL, STEPS)):
        layers = [m for m in wide.quantize(both, policy).network.modules()]
        tabled = [m for m in layers if isinstance(m, TabledLayer)]
        assert [len(m.act_scale_table) for m in tabled] == [rows, rows]
        (conv,) = [m for m in layers if isinstance(m, QuantizedConv2d)]
        assert len(conv.out_scale_table) == rows


def test_a_static_scale_is_searched_on_all_steps_together(wide: Calibrated) -> None:
    found = wide.quantize({"conv": "w8a8"}, ActivationPolicy.STATIC).parameters
    (parameters,) = found.layers.values()
    seen = wide.observations["conv"]
    assert parameters.activation is not None
    assert parameters.output is not None
    for scales, ranges in ((parameters.activation, seen.input), (parameters.output, seen.output)):
        expected = search_activation(ranges.merged())
        assert torch.equal(scales.scale, expected.scale)
        assert scales.zero_point == expected.zero_point


def test_min_max_ranges_are_the_plain_baseline(wide: Calibrated) -> None:
    precisions = {"conv": "w4a8", "linear": "w4g16a4"}
    plain = wide.quantize(precisions, ranges="minmax")
    by_layer = {variant.layer: found for variant, found in plain.parameters.layers.items()}
    for name, bits in (("conv", 8), ("linear", 4)):
        scales = by_layer[name].activation
        expected = minmax_activation(wide.observations[name].input, bits=bits)
        assert scales is not None
        assert torch.equal(scales.scale, expected.scale)
        assert (scales.zero_point, scales.bits) == (expected.zero_point, bits)
    conv, linear = (get_layer(wide.denoiser.module, n).get_parameter("weight") for n in by_layer)
    assert by_layer["conv"].weight.scale is not None
    assert torch.equal(by_layer["conv"].weight.scale, minmax_weight(conv.detach(), 4))
    assert torch.equal(
        by_layer["linear"].weight.codes, grouped_minmax(linear.detach(), 4, 16).codes
    )


def test_a_network_of_codes_holds_no_float_copy_of_its_weights(wide: Calibrated) -> None:
    """I8: counted on the tensors in memory, where a code takes a byte whatever its width."""
    found = wide.quantize({"conv": "w4a8", "linear": "w4g16a8"})
    held = [
        tensor
        for module in found.network.modules()
        for place in (vars(module), module._parameters, module._buffers)
        for tensor in place.values()
        if isinstance(tensor, Tensor)
    ]
    floats = {name: 4 * p.numel() for name, p in wide.denoiser.module.named_parameters()}
    weights = (".conv.weight", ".linear.weight")
    coded = {name: n_bytes for name, n_bytes in floats.items() if name.endswith(weights)}
    assert len(coded) == 2
    # Scales of 48 rows, scale and zero_point of 48 x 3 groups, three rows of STEPS scales, and the
    # timesteps in int64.
    tables = 4 * 48 + 5 * 48 * 3 + 3 * 4 * STEPS + 8 * STEPS
    expected = sum(floats.values()) - sum(coded.values()) * 3 // 4 + tables
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == expected


@KINDS
def test_search_loses_less_than_min_max(wide: Calibrated, layer: str) -> None:
    plain = wide.quantize({layer: "w4a4"}, ranges="minmax")
    assert wide.errors(wide.quantize({layer: "w4a4"})) < wide.errors(plain)


def phased(wide: Calibrated, bits: Sequence[int]) -> QuantizedDenoiser:
    plan = wide.plan({"conv": "w4a8", "linear": "w8a8"})
    return quantize(wide.denoiser, with_activation_bits(plan, bits), wide.observations)


def test_the_step_picks_the_precision_of_its_phase(wide: Calibrated) -> None:
    """Each step equals the step of a plan that has this phase's precisions and steps alone."""
    found = phased(wide, [4, 4, 8])
    layers = {name.rpartition(".")[2]: m for name, m in found.network.named_modules()}
    for name in ("conv", "linear"):
        layer = layers[name]
        assert isinstance(layer, PhasedLayer)
        assert layer.of_step == (0, 0, 1)
    coarse, fine = phased(wide, [4, 4, 4]), phased(wide, [8, 8, 8])
    for step, (other, better) in enumerate([(fine, 1), (fine, 1), (coarse, -1)]):
        assert better * wide.error(other, step) < better * wide.error(found, step)


def test_weight_codes_are_the_same_in_all_phases(wide: Calibrated) -> None:
    found = phased(wide, [4, 8, 8])
    for name in ("conv", "linear"):
        variants = [p.weight for v, p in found.parameters.layers.items() if v.layer == name]
        assert len(variants) == 2
        assert torch.equal(variants[0].codes, variants[1].codes)
        assert variants[0].bits == variants[1].bits


def test_scales_of_a_phase_are_searched_on_its_steps_and_repeated_elsewhere(
    wide: Calibrated,
) -> None:
    layers = phased(wide, [4, 8, 8]).parameters.layers
    early = layers[Variant("conv", Precision("w4a4"), ActivationPolicy.TEMPORAL)].activation
    late = layers[Variant("conv", Precision("w4a8"), ActivationPolicy.TEMPORAL)].activation
    assert early is not None
    assert late is not None
    seen = wide.observations["conv"].input
    expected = search_activation(seen.at(range(0, 1)), bits=4)
    assert torch.equal(early.scale, expected.scale.expand(STEPS))
    assert (early.zero_point, early.bits) == (expected.zero_point, 4)
    expected = search_activation(seen.at(range(1, 3)), bits=8)
    assert torch.equal(late.scale, expected.scale[[0, 0, 1]])
    assert (late.zero_point, late.bits) == (expected.zero_point, 8)


def phases_of(plan: DeploymentPlan, *layers: tuple[LayerAssignment, ...]) -> DeploymentPlan:
    """A phase of one step for every tuple of layers, the last of them up to the end."""
    stops = [*range(1, len(layers)), STEPS]
    phases = tuple(
        Phase(start=start, stop=stop, layers=each)
        for start, stop, each in zip([0, *stops[:-1]], stops, layers, strict=True)
    )
    return plan.model_copy(update={"phases": phases})


def test_a_phase_in_float_gives_the_float_bits(wide: Calibrated) -> None:
    one = wide.plan({"conv": "w4a8", "linear": "w4g16a8dyn"})
    other = wide.plan({"linear": "w8"})
    plan = phases_of(one, one.phases[0].layers, wide.plan({}).phases[0].layers)
    found = quantize(wide.denoiser, plan, wide.observations)
    assert wide.error(found, 0) > 0
    for step in (1, 2):
        output = found.predict(wide.fresh.inputs[step], step, None)
        assert torch.equal(output, wide.fresh.outputs[step])
    mixed = phases_of(one, one.phases[0].layers, other.phases[0].layers)
    errors = [wide.error(quantize(wide.denoiser, mixed, wide.observations), i) for i in (0, 1)]
    assert errors[0] == wide.error(found, 0)
    assert 0 < errors[1] < errors[0]


def test_layer_missing_in_one_phase_is_refused_by_name(wide: Calibrated) -> None:
    plan = wide.plan({"conv": "w8a8"})
    layers = plan.phases[0].layers
    fewer = tuple(a for a in layers if a.layer != "linear")
    found = refused(
        InputError,
        wide.denoiser,
        phases_of(plan, layers, fewer),
        wide.observations,
        code="EQ-3207",
        path="linear",
    )
    assert "phase 1 does not name the layer" in found.message


@pytest.mark.parametrize(
    ("text", "reason", "instead"),
    [
        ("w4g32a8", "groups of input channels", "use w4a8"),
        ("w4g32a8dyn", "groups of input channels", "use w4a8"),
        ("w8a8dyn", "run-time scales", "use w8a8"),
        ("w6g64", "groups of input channels", "use w6"),
    ],
)
def test_groups_and_run_time_scales_of_a_convolution_are_refused_by_name(
    wide: Calibrated, text: str, reason: str, instead: str
) -> None:
    arguments = (wide.denoiser, wide.plan({"conv": text}), wide.observations)
    found = refused(UnsupportedError, *arguments, code="EQ-4202", path="conv")
    assert text in found.message
    assert reason in found.message
    assert found.hint == instead


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_range_without_a_scale_names_layer_side_and_step(
    wide: Calibrated, side: str, value: float
) -> None:
    seen = wide.observations["conv"]
    ranges: StepRanges = getattr(seen, side)
    low, high = ranges.low.clone(), ranges.high.clone()
    low[1] = high[1] = value
    broken = replace(seen, **{side: StepRanges(ranges.samples, low, high)})
    observations = {**wide.observations, "conv": broken}
    arguments = (wide.denoiser, wide.plan({"conv": "w8a8"}), observations)
    found = refused(NumericalError, *arguments, code="EQ-5205", path="conv")
    assert f"the range of its {side} is {value:g} to {value:g} at step 1" in found.message


def test_weight_beyond_float16_is_refused_by_name() -> None:
    middle = nn.Conv2d(4, 4, 1)
    with torch.no_grad():
        middle.weight[1, 2] = 7e4
    denoiser = one_convolution(middle)
    plan = default_plan(denoiser.info, "onnxruntime", STEPS, body=FP16)
    found = refused(NumericalError, denoiser, plan, {}, code="EQ-5204", path="middle")
    assert "a weight of 70000 overflows float16" in found.message


def test_half_weights_are_the_float_weights_rounded_once(wide: Calibrated) -> None:
    parameters = wide.quantize({"linear": "fp16"}).parameters
    (found,) = (p.weight for p in parameters.layers.values())
    weight = get_layer(wide.denoiser.module, "linear").get_parameter("weight").detach()
    assert torch.equal(found.dequantized(), weight.half().float())


def tabled(denoiser: Denoiser, names: Collection[str]) -> QuantizedDenoiser:
    plan = default_plan(denoiser.info, "onnxruntime", STEPS, body=FP32, tables=names)
    return quantize(denoiser, plan, {})


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_tables_in_place_of_all_embedding_layers_equal_the_float_model(kind: str) -> None:
    """Layers that feed tables only need none, whatever the shape of what they return."""
    denoiser = tiny_quantized(kind).denoiser
    names = dependence(denoiser)
    found = tabled(denoiser, names)
    assert 0 < len(found.parameters.tables) < len(names)
    x, labels = torch.randn(3, *denoiser.info.sample_shape), torch.tensor([0, 2, 1])
    for step in range(STEPS):
        # Rows of a matrix product may be summed in another order for another number of rows.
        torch.testing.assert_close(
            found.predict(x, step, labels), denoiser.predict(x, step, labels), rtol=0, atol=1e-5
        )


def test_a_table_stays_beside_quantized_layers(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Observations
) -> None:
    mixed = with_precision(plan, "embed", TABLE)
    found = quantize(denoiser, mixed, observations)
    assert sum(isinstance(m, TableLayer) for m in found.network.modules()) == 1
    x, labels = torch.randn(3, *denoiser.info.sample_shape), torch.tensor([0, 2, 1])
    without = quantize(denoiser, plan, observations)
    # A last bit may move an activation over a rounding boundary: less than the noise of rounding.
    assert sqnr_db(without.predict(x, 1, labels), found.predict(x, 1, labels)) > 40


def test_table_in_some_phases_only_is_refused_by_name(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Observations
) -> None:
    other = with_precision(plan, "embed", TABLE)
    both = phases_of(plan, plan.phases[0].layers, other.phases[0].layers)
    refused(UnsupportedError, denoiser, both, observations, code="EQ-4204", path="embed")


def test_layer_that_depends_on_the_sample_cannot_be_a_table(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Observations
) -> None:
    other = with_precision(plan, "mix", TABLE)
    refused(InputError, denoiser, other, observations, code="EQ-3240", path="mix")


def test_planned_layer_without_parameters_is_refused_by_variant(wide: Calibrated) -> None:
    plan = wide.plan({"linear": "w8a8"})
    with pytest.raises(InputError) as caught:
        assemble(wide.denoiser, plan, Parameters({}))
    assert caught.value.code == "EQ-3208"
    assert caught.value.path == "linear/w8a8/temporal"


def test_quantize_is_initialise_then_assemble(wide: Calibrated) -> None:
    plan = wide.plan({"conv": "w4a8", "linear": "w4g16a8dyn"})
    parameters = initialise(wide.denoiser, plan, wide.observations)
    found = assemble(wide.denoiser, plan, parameters)
    whole = quantize(wide.denoiser, plan, wide.observations)
    assert found.tables_sha256 == whole.tables_sha256
    x = wide.fresh.inputs[0]
    assert torch.equal(found.predict(x, 0, None), whole.predict(x, 0, None))


@pytest.mark.parametrize("name", ["conv.bias", "linear.bias", "norm.weight", "first.weight"])
def test_trained_floats_take_the_place_of_the_model_s_own(wide: Calibrated, name: str) -> None:
    plain = wide.quantize({"conv": "w8a8", "linear": "w4g16"})
    denoiser = replace(wide.denoiser, module=copy.deepcopy(wide.denoiser.module))
    before = {k: v.clone() for k, v in denoiser.module.state_dict().items()}
    value = torch.full_like(before[f"network.{name}"], 0.5)
    found = assemble(denoiser, plain.plan, replace(plain.parameters, floats={name: value}))
    assert found.tables_sha256 != plain.tables_sha256
    x = wide.fresh.inputs[0]
    assert not torch.equal(found.predict(x, 0, None), plain.predict(x, 0, None))
    assert torch.equal(found.network.state_dict()[f"network.network.{name}"], value)
    after = denoiser.module.state_dict()
    changed = [k for k, v in after.items() if not torch.equal(v, before[k])]
    assert changed == [], "the float model is left as it was"


def test_digest_tells_every_precision_policy_and_range_apart(wide: Calibrated) -> None:
    texts = ("w8a8", "w6a8", "w4a8", "w4a4", "w8a8dyn", "w8a4dyn", "w8", "w4g16", "w4g16a8dyn")
    models = [wide.quantize({"linear": text}) for text in texts]
    models.append(wide.quantize({"linear": "w8a8"}, ActivationPolicy.STATIC))
    models.append(wide.quantize({"linear": "w8a8"}, ranges="minmax"))
    assert len({precision_digest(model) for model in models}) == len(models)


def test_coded_layers_share_no_memory_with_the_float_weights(wide: Calibrated) -> None:
    found = wide.quantize({"conv": "w8a8", "linear": "fp16"})
    kept = {n: v.data_ptr() for n, v in wide.denoiser.module.named_parameters() if "weight" in n}
    for layer in found.network.modules():
        if isinstance(layer, CodedLayer):
            assert layer.weight_q.data_ptr() not in kept.values()
