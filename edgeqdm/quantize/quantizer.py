"""A float denoiser and its observations in, a denoiser of integer layers out."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeqdm.calibrate.observe import LayerObservation
from edgeqdm.errors import InputError, NumericalError, UnsupportedError
from edgeqdm.ir.codec import digest
from edgeqdm.ir.model import LayerInfo, ModelInfo
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer, set_layer
from edgeqdm.numerics.affine import ACTIVATION_MAX, quantize_weight
from edgeqdm.numerics.ranges import ActivationScales, search_activation, search_weight
from edgeqdm.quantize.modules import (
    QuantizedConv2d,
    QuantizedLinear,
    StepClock,
    SteppedNetwork,
)

INT32_LIMIT = 2**31
FLOAT_REASONS = {
    "input": "fp32: first layer, its rounding error reaches every other layer",
    "output": "fp32: last layer, its rounding error reaches the sample undamped",
    "embedding": "fp32: depends on timestep and conditioning only, costs next to nothing",
}


@dataclass(frozen=True)
class QuantizedDenoiser:
    """A denoiser whose planned layers compute on integers.

    Attributes:
        denoiser: the float model it was made from.
        plan: precision of every layer.
        network: takes (sample, step, *conditioning), see `SteppedNetwork`.
        tables_sha256: over the integer weights and all scales.
    """

    denoiser: Denoiser
    plan: DeploymentPlan
    network: SteppedNetwork
    tables_sha256: str

    @property
    def info(self) -> ModelInfo:
        return self.denoiser.info

    @torch.no_grad()
    def predict(self, x: Tensor, step: int, conditioning: Tensor | None) -> Tensor:
        """Network output [B, C, H, W] after guidance, on integers, for x = scaled sample."""
        stepped = _AtStep(self.network, torch.tensor(step))
        return self.denoiser.predict(x, step, conditioning, stepped)


class _AtStep(nn.Module):
    """A stepped network behind the float network's signature, for one step."""

    def __init__(self, network: SteppedNetwork, step: Tensor) -> None:
        super().__init__()
        self.network = network
        self.step = step

    def forward(self, x: Tensor, t: Tensor, *conditioning: Tensor) -> Tensor:
        found: Tensor = self.network(x, self.step, *conditioning)
        return found


def default_plan(info: ModelInfo, target: str, n_steps: int) -> DeploymentPlan:
    """W8A8 for every layer but the first, the last and the embeddings, at all steps."""
    return DeploymentPlan(
        target=target,
        model=info.fingerprint,
        n_steps=n_steps,
        phases=(
            Phase(start=0, stop=n_steps, layers=tuple(_default_assignment(x) for x in info.layers)),
        ),
    )


def float_plan(info: ModelInfo, target: str, n_steps: int) -> DeploymentPlan:
    """Every layer in float: the baseline that a quantized package is measured against."""
    layers = tuple(
        LayerAssignment(layer=x.name, precision=Precision.FP32, reason="fp32: float baseline")
        for x in info.layers
    )
    phase = Phase(start=0, stop=n_steps, layers=layers)
    return DeploymentPlan(target=target, model=info.fingerprint, n_steps=n_steps, phases=(phase,))


def _default_assignment(layer: LayerInfo) -> LayerAssignment:
    if layer.role == "body":
        reason = "w8a8: integer kernel on this target"
        return LayerAssignment(layer=layer.name, precision=Precision.W8A8, reason=reason)
    reason = FLOAT_REASONS[layer.role]
    return LayerAssignment(layer=layer.name, precision=Precision.FP32, reason=reason)


def quantize(
    denoiser: Denoiser, plan: DeploymentPlan, observations: Mapping[str, LayerObservation]
) -> QuantizedDenoiser:
    """Replace every planned layer by its integer form.

    Weights are rounded to the nearest code of the best scale per output channel; activation scales
    are searched per step, with one zero_point per layer.

    Raises:
        InputError: if the plan is for another model or sampler, or a planned layer was not observed
            at every step.
        UnsupportedError: if the plan has more than one phase.
        NumericalError: if an int32 accumulator could overflow; names the layer.
    """
    check_plan(denoiser, plan)
    clock = StepClock()
    module = copy.deepcopy(denoiser.module)
    quantized = plan.phases[0].quantized()
    for name in quantized:
        if name not in observations:
            raise InputError("EQ-3203", "planned layer was not observed", path=name)
        n_observed = len(observations[name].input.low)
        if n_observed not in (1, plan.n_steps):
            message = f"observed at {n_observed} steps, the plan has {plan.n_steps}"
            raise InputError("EQ-3203", message, path=name, hint="calibrate with this sampler")
        layer = get_layer(module, name)
        set_layer(module, name, _integer_layer(name, layer, observations[name], clock))
    program = denoiser.program
    timesteps = torch.tensor(program.timesteps)
    timesteps = timesteps.to(torch.int64 if program.integer_timesteps else torch.float32)
    network = SteppedNetwork(module, timesteps, clock).eval()
    return QuantizedDenoiser(denoiser, plan, network, _tables_sha256(module))


def check_plan(denoiser: Denoiser, plan: DeploymentPlan) -> None:
    if plan.model != denoiser.info.fingerprint:
        raise InputError(
            "EQ-3202",
            f"the plan is for model {plan.model[:12]}, this is {denoiser.info.fingerprint[:12]}",
            path="plan.model",
            hint="make a plan for this model",
        )
    if plan.n_steps != denoiser.program.n_steps:
        raise InputError(
            "EQ-3206",
            f"the plan is for {plan.n_steps} steps, the sampler has {denoiser.program.n_steps}",
            path="plan.n_steps",
            hint="make a plan for this sampler",
        )
    if len(plan.phases) > 1:
        raise UnsupportedError(
            "EQ-4202",
            f"{len(plan.phases)} phases; a network is quantized for one",
            path="plan.phases",
            hint="use one phase for all steps",
        )


def _integer_layer(
    name: str, layer: nn.Module, seen: LayerObservation, clock: StepClock
) -> nn.Module:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise InputError("EQ-3204", f"cannot quantize a {type(layer).__name__}", path=name)
    weight = layer.weight.detach()
    weight_scale = search_weight(weight)
    weight_q = quantize_weight(weight, weight_scale)
    bias = None if layer.bias is None else layer.bias.detach()
    activation = search_activation(seen.input)
    _check_accumulator(name, weight_q, activation)
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(weight_q, weight_scale, bias, activation, clock)
    geometry = (layer.stride, _padding(name, layer), layer.dilation, layer.groups)
    output = search_activation(seen.output)
    return QuantizedConv2d(weight_q, weight_scale, bias, activation, output, geometry, clock)


def _padding(name: str, layer: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise InputError(
            "EQ-3205",
            f"padding {layer.padding!r} with mode {layer.padding_mode!r} has no integer form",
            path=name,
            hint="leave the layer in fp32",
        )
    return layer.padding


def _check_accumulator(name: str, weight_q: Tensor, activation: ActivationScales) -> None:
    # Source: the widest dot product must stay inside int32 for every input.
    largest = max(activation.zero_point, ACTIVATION_MAX - activation.zero_point)
    row_sums = weight_q.reshape(weight_q.shape[0], -1).to(torch.int64).abs().sum(1)
    bound = int(row_sums.max()) * largest
    if bound >= INT32_LIMIT:
        raise NumericalError(
            "EQ-5203",
            f"the int32 accumulator could reach {bound}",
            path=name,
            hint="leave the layer in fp32",
        )


def _tables_sha256(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLinear | QuantizedConv2d):
            found.update(f"{name} {layer.zero_point}".encode())
            for key, buffer in sorted(layer.named_buffers()):
                found.update(key.encode())
                found.update(buffer.numpy().tobytes())
            if isinstance(layer, QuantizedConv2d):
                found.update(str(layer.out_zero_point).encode())
    return found.hexdigest()


def precision_digest(quantized: QuantizedDenoiser) -> str:
    """SHA-256 of everything the quantization error depends on beside model and sampler."""
    whole = f"{digest(quantized.plan)} {quantized.tables_sha256}"
    return hashlib.sha256(whole.encode()).hexdigest()
