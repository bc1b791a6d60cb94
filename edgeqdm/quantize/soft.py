"""A quantized network that can be trained: computed in float, rounded as on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeqdm.errors import InputError, UnsupportedError
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, TABLE, Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer, network_of, set_layer
from edgeqdm.numerics.ranges import ActivationScales
from edgeqdm.quantize.parameters import LayerParameters, Parameters, Variant
from edgeqdm.quantize.soft_activations import (
    DynamicQuantizer,
    FloatActivation,
    Quantizer,
    SoftActivation,
    SoftClock,
    TabledQuantizer,
)
from edgeqdm.quantize.soft_weights import FixedWeight, HalfWeight, RoundedWeight, SoftWeight


class SoftLayer(nn.Module):
    """A convolution or linear layer on rounded values, of which rounding and scales can be learned.

    A convolution's bias-free output is rounded too, as the integer kernel does.

    Attributes:
        input: rounds the input.
        weight: the weight; may be exchanged for another form of it.
        output: rounds a convolution's output before its bias; None where the kernel is float.
        bias: float32 parameter [C_out] or None.
    """

    bias: Tensor | None

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        bias: Tensor | None,
        weight: SoftWeight,
        input: SoftActivation,
        output: SoftActivation | None,
    ) -> None:
        super().__init__()
        self.input, self.weight, self.output = input, weight, output
        own = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_parameter("bias", own)
        self._geometry: tuple[object, ...] | None = None
        if isinstance(layer, nn.Conv2d):
            self._geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.input(input), self.weight()
        if self._geometry is None:
            return F.linear(x, weight, self.bias)
        y = F.conv2d(x, weight, None, *self._geometry)  # type: ignore[call-overload]
        if self.output is not None:
            y = self.output(y)
        return cast(Tensor, y if self.bias is None else y + self.bias[:, None, None])


class SoftNetwork(nn.Module):
    """A network whose planned layers are `SoftLayer`, called with one step per sample.

    It is in eval mode and stays so: dropout of weights or labels is no part of quantization.

    Attributes:
        module: the copied network; the float one is untouched.
        clock: set by every call; its `drop` and `generator` are for the caller to set.
        layers: soft layers by name.
        variants: of every soft layer, in the order of its quantizers.
        float_state: tensors of the float network, by name inside it.
    """

    timesteps: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        module: nn.Module,
        variants: Mapping[str, tuple[Variant, ...]],
        tables: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.module, self.clock = module, SoftClock()
        self.variants, self.tables = dict(variants), dict(tables)
        program = denoiser.program
        dtype = torch.int64 if program.integer_timesteps else torch.float32
        self.register_buffer("timesteps", torch.tensor(program.timesteps).to(dtype))
        self.float_state = network_of(denoiser.module).state_dict()

    @property
    def layers(self) -> dict[str, SoftLayer]:
        return {name: cast(SoftLayer, get_layer(self.module, name)) for name in self.variants}

    def forward(self, x: Tensor, steps: Tensor, *conditioning: Tensor) -> Tensor:
        """x float32 [B, C, H, W], scaled; steps int64 [B]; returns f [B, C, H, W] unguided."""
        self.clock.steps = steps
        t = self.timesteps.index_select(0, steps)
        return cast(Tensor, self.module(x, t, *conditioning))


def soften(
    denoiser: Denoiser,
    plan: DeploymentPlan,
    parameters: Parameters,
    *,
    weight: type[SoftWeight] = RoundedWeight,
) -> SoftNetwork:
    """A trainable copy of a network as a plan quantizes it.

    Layers in fp32 stay as they are. Layers with precision `table` are computed in float, which is
    what their tables hold.

    Args:
        denoiser: the float model, untouched.
        plan: precision of every layer.
        parameters: first codes and scales, and tensors that differ from the float model's.
        weight: form of the weights: `RoundedWeight` learns their rounding, `LearnedWeight` weights
            and scales, `FixedWeight` nothing. Weights in fp16 that learn are a `HalfWeight`.

    Raises:
        UnsupportedError: if phases store different weights of one layer; names it.
        InputError: if a planned layer has no parameters.
    """
    variants = {name: tuple(steps) for name, steps in coded_variants(plan).items()}
    originals = [get_layer(denoiser.module, name) for name in variants]
    # Layers about to be replaced are shared, not copied: they are most of the memory.
    module = copy.deepcopy(denoiser.module, {id(each): each for each in originals})
    # Not strict: only what differs is there.
    network_of(module).load_state_dict(_uncoded(parameters.floats, variants), strict=False)
    soft = SoftNetwork(denoiser, module, variants, parameters.tables).eval()
    put_soft_layers(soft, denoiser, plan, parameters, tuple(variants), weight=weight)
    return soft


def put_soft_layers(
    soft: SoftNetwork,
    denoiser: Denoiser,
    plan: DeploymentPlan,
    parameters: Parameters,
    names: Sequence[str],
    *,
    weight: type[SoftWeight],
) -> None:
    """Puts new soft layers of given codes and scales in the place of some, see `soften`.

    Raises:
        See `soften`.
    """
    coded = coded_variants(plan)
    for name in names:
        original = cast(nn.Linear | nn.Conv2d, get_layer(denoiser.module, name))
        bias = parameters.floats.get(f"{name}.bias", original.bias)
        found = {variant: _parameters_of(variant, parameters) for variant in coded[name]}
        half = next(iter(found)).precision.weight_bits == 16
        form = HalfWeight if half and weight is not FixedWeight else weight
        layer = _soft_layer(original, bias, found, coded[name], form, plan.n_steps, soft.clock)
        set_layer(soft.module, name, layer.eval())


def harden(soft: SoftNetwork) -> Parameters:
    """Codes, scales and changed tensors as they are stored, of every variant of the plan."""
    layers = {}
    for name, layer in soft.layers.items():
        mine, weight = soft.variants[name], layer.weight.codes()
        activations = layer.input.scales()
        outputs = [None] * len(mine) if layer.output is None else layer.output.scales()
        for variant, activation, output in zip(mine, activations, outputs, strict=True):
            layers[variant] = LayerParameters(weight, activation, output)
    return Parameters(layers, soft.tables, _changed_floats(soft))


def coded_variants(plan: DeploymentPlan) -> dict[str, dict[Variant, list[int]]]:
    """Every layer that is coded, its variants and the steps each is used at.

    Raises:
        UnsupportedError: if phases store different weights of one layer; names it.
    """
    found: dict[str, dict[Variant, list[int]]] = {}
    for phase in plan.phases:
        for assignment in phase.layers:
            mine = found.setdefault(assignment.layer, {})
            steps = mine.setdefault(Variant.of(assignment), [])
            steps.extend(range(phase.start, phase.stop))
    for name, variants in found.items():
        stored = {(v.precision.weight_bits, v.precision.group_size) for v in variants}
        if len(stored) > 1:
            listed = ", ".join(sorted({v.precision for v in variants}))
            raise UnsupportedError(
                "EQ-4240",
                f"phases store different weights of one layer: {listed}",
                path=name,
                hint="give the layer one weight width and group size in all phases",
            )
    whole: tuple[Precision, ...] = (FP32, TABLE)
    return {n: v for n, v in found.items() if next(iter(v)).precision not in whole}


def _uncoded(floats: Mapping[str, Tensor], coded: Iterable[str]) -> dict[str, Tensor]:
    prefixes = tuple(f"{name}." for name in coded)
    return {name: tensor for name, tensor in floats.items() if not name.startswith(prefixes)}


def _parameters_of(variant: Variant, parameters: Parameters) -> LayerParameters:
    if variant not in parameters.layers:
        raise InputError(
            "EQ-3250",
            "no parameters for a planned layer",
            path=str(variant),
            hint="initialise parameters with this plan",
        )
    return parameters.layers[variant]


def _soft_layer(
    layer: nn.Linear | nn.Conv2d,
    bias: Tensor | None,
    found: Mapping[Variant, LayerParameters],
    used: Mapping[Variant, Sequence[int]],
    form: type[SoftWeight],
    n_steps: int,
    clock: SoftClock,
) -> SoftLayer:
    of_step = [next(k for k, mine in enumerate(used.values()) if i in mine) for i in range(n_steps)]
    first = next(iter(found))

    def tabled(scales: ActivationScales | None, steps: Sequence[int]) -> Quantizer:
        if scales is None:
            return FloatActivation()
        return TabledQuantizer(scales, steps, n_steps)

    def of_input(variant: Variant) -> Quantizer:
        if variant.precision.dynamic:
            return DynamicQuantizer(variant.precision.activation_bits, variant.precision.group_size)
        return tabled(found[variant].activation, used[variant])

    outputs = [tabled(found[variant].output, used[variant]) for variant in found]
    rounds_output = any(isinstance(each, TabledQuantizer) for each in outputs)
    return SoftLayer(
        layer,
        bias,
        form(layer.weight, found[first].weight),
        SoftActivation([of_input(variant) for variant in found], of_step, clock, first.layer),
        SoftActivation(outputs, of_step, clock, first.layer) if rounds_output else None,
    )


def _changed_floats(soft: SoftNetwork) -> dict[str, Tensor]:
    original = soft.float_state
    coded = tuple(f"{name}." for name in soft.variants)
    folded = tuple(f"{name}." for name in soft.tables)
    kept = {f"{name}.bias" for name in soft.variants}
    return {
        name: tensor.detach().clone()
        for name, tensor in network_of(soft.module).state_dict().items()
        if (name in kept or not name.startswith(coded))
        and not name.startswith(folded)
        and not torch.equal(tensor, original[name])
    }
