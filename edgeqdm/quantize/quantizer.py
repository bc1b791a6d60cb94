"""A float denoiser and its observations in, a denoiser of coded layers out."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor, nn

from edgeqdm.calibrate.observe import LayerObservation
from edgeqdm.errors import InputError, NumericalError, UnsupportedError
from edgeqdm.ir.codec import digest
from edgeqdm.ir.model import LayerKind, ModelInfo
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment
from edgeqdm.ir.precision import FP16, FP32, TABLE, ActivationPolicy
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer, network_of, set_layer
from edgeqdm.numerics.affine import activation_max, quantize_weight
from edgeqdm.numerics.grouping import grouped_minmax, search_grouped
from edgeqdm.numerics.ranges import (
    ActivationScales,
    StepRanges,
    minmax_activation,
    minmax_weight,
    search_activation,
    search_weight,
)
from edgeqdm.quantize.fold import DeadLayer, TableLayer, dependence, live, record_tables
from edgeqdm.quantize.modules import (
    CodedLayer,
    DynamicLinear,
    PhasedLayer,
    QuantizedConv2d,
    StepClock,
    SteppedNetwork,
    TabledLayer,
    coded_layer,
)
from edgeqdm.quantize.parameters import (
    LayerParameters,
    Parameters,
    Variant,
    WeightCodes,
    steps_of_variants,
)

INT32_LIMIT = 2**31
TABULATED = (ActivationPolicy.STATIC, ActivationPolicy.TEMPORAL)
Ranges = Literal["search", "minmax"]
"""How first scales are found: least error, or nothing clipped (the plain baseline)."""


@dataclass(frozen=True)
class QuantizedDenoiser:
    """A denoiser whose planned layers compute on codes.

    Attributes:
        denoiser: the float model it was made from.
        plan: precision of every layer.
        parameters: codes and scales of every layer.
        network: takes (sample, step, *conditioning), see `SteppedNetwork`.
        tables_sha256: over the codes, all scales and what else differs from the float model.
    """

    denoiser: Denoiser
    plan: DeploymentPlan
    parameters: Parameters
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


def quantize(
    denoiser: Denoiser,
    plan: DeploymentPlan,
    observations: Mapping[str, LayerObservation],
    *,
    ranges: Ranges = "search",
) -> QuantizedDenoiser:
    """Replace every planned layer by its coded form, rounded to the nearest code.

    Raises:
        See `initialise` and `check_plan`.
    """
    return assemble(denoiser, plan, initialise(denoiser, plan, observations, ranges=ranges))


def initialise(
    denoiser: Denoiser,
    plan: DeploymentPlan,
    observations: Mapping[str, LayerObservation],
    *,
    ranges: Ranges = "search",
) -> Parameters:
    """First codes and scales of every planned layer.

    Weights are rounded to the nearest code. A temporal activation gets a scale per step, a static
    one a single scale, both with one zero_point for the steps that use them.

    Args:
        denoiser: the float model.
        plan: precision of every layer.
        observations: by layer; layers whose activations are not tabulated need none.
        ranges: how scales are found.

    Raises:
        InputError: if the plan is for another model or sampler, or a planned layer was not observed
            at every step.
        UnsupportedError: if a precision does not fit a layer.
        NumericalError: if an int32 accumulator could overflow or a layer has no range; names layer
            and step.
    """
    check_plan(denoiser, plan)
    layers = {}
    variants = steps_of_variants(plan)
    for variant, steps in variants.items():
        if variant.precision in (FP32, TABLE):
            continue
        layer = get_layer(denoiser.module, variant.layer)
        tabled = variant.policy in TABULATED
        seen = _observation(variant.layer, observations, plan.n_steps) if tabled else None
        layers[variant] = code_layer(layer, variant, seen, steps, plan.n_steps, ranges=ranges)
    folded = [v.layer for v in variants if v.precision == TABLE]
    return Parameters(layers, record_tables(denoiser, live(denoiser, folded)))


def code_layer(
    layer: nn.Module,
    variant: Variant,
    seen: LayerObservation | None,
    steps: Sequence[int],
    n_steps: int,
    *,
    ranges: Ranges = "search",
) -> LayerParameters:
    """First codes and scales of one layer at one precision.

    Args:
        layer: the float layer.
        variant: its name, precision and activation policy; neither `fp32` nor `table`.
        seen: ranges of its input and output; not needed where activations are not tabulated.
        steps: those that use the variant.
        n_steps: S.
        ranges: how scales are found.
    """
    whole = _quantizable(variant.layer, layer)
    weight = _code_weight(whole, variant, ranges)
    if variant.policy not in TABULATED or seen is None:
        return LayerParameters(weight)
    found = _tabulated(whole, variant, weight, seen, steps, ranges, n_steps)
    _check_accumulator(variant.layer, found)
    return found


def _quantizable(name: str, layer: nn.Module) -> nn.Linear | nn.Conv2d:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise InputError("EQ-3204", f"cannot quantize a {type(layer).__name__}", path=name)
    if isinstance(layer, nn.Conv2d) and (
        isinstance(layer.padding, str) or layer.padding_mode != "zeros"
    ):
        raise InputError(
            "EQ-3205",
            f"padding {layer.padding!r} with mode {layer.padding_mode!r} has no integer form",
            path=name,
            hint="leave the layer in fp32",
        )
    return layer


def _code_weight(layer: nn.Linear | nn.Conv2d, variant: Variant, ranges: Ranges) -> WeightCodes:
    weight, precision = layer.weight.detach(), variant.precision
    bits, group_size = precision.weight_bits, precision.group_size
    if precision == FP16:
        return WeightCodes(_to_half(weight, variant.layer), None, None, 16)
    if group_size:
        find = search_grouped if ranges == "search" else grouped_minmax
        return WeightCodes.of_groups(find(weight, bits, group_size))
    scale = search_weight(weight, bits) if ranges == "search" else minmax_weight(weight, bits)
    return WeightCodes(quantize_weight(weight, scale, bits), scale, None, bits)


def _to_half(weight: Tensor, name: str) -> Tensor:
    half = weight.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        peak = float(weight.abs().max())
        raise NumericalError(
            "EQ-5204", f"a weight of {peak:g} overflows float16", path=name, hint="use fp32"
        )
    return half


def _observation(
    name: str, observations: Mapping[str, LayerObservation], n_steps: int
) -> LayerObservation:
    if name not in observations:
        raise InputError("EQ-3203", "planned layer was not observed", path=name)
    seen = observations[name]
    if len(seen.input.low) != n_steps:
        message = f"observed at {len(seen.input.low)} steps, the plan has {n_steps}"
        raise InputError("EQ-3203", message, path=name, hint="calibrate with this sampler")
    for side, found in (("input", seen.input), ("output", seen.output)):
        _check_range(name, side, found)
    return seen


def _check_range(name: str, side: str, found: StepRanges) -> None:
    span = found.high - found.low
    bad = ~torch.isfinite(span) | ((found.high == 0) & (found.low == 0))
    if bool(bad.any()):
        step = int(bad.nonzero()[0])
        low, high = float(found.low[step]), float(found.high[step])
        raise NumericalError(
            "EQ-5205",
            f"the range of its {side} is {low:g} to {high:g} at step {step}; it has no scale",
            path=name,
            hint="leave the layer in fp32, or calibrate with more samples",
        )


def _tabulated(
    layer: nn.Linear | nn.Conv2d,
    variant: Variant,
    weight: WeightCodes,
    seen: LayerObservation,
    steps: Sequence[int],
    ranges: Ranges,
    n_steps: int,
) -> LayerParameters:
    static = variant.policy is ActivationPolicy.STATIC

    def scales(found: StepRanges, bits: int) -> ActivationScales:
        rows = list(steps)
        used = StepRanges(found.samples[rows], found.low[rows], found.high[rows])
        find = search_activation if ranges == "search" else minmax_activation
        each = find(used.merged() if static else used, bits=bits)
        return each if static else _spread(each, steps, n_steps)

    output = scales(seen.output, 8) if isinstance(layer, nn.Conv2d) else None
    return LayerParameters(weight, scales(seen.input, variant.precision.activation_bits), output)


def _spread(found: ActivationScales, steps: Sequence[int], n_steps: int) -> ActivationScales:
    # Rows of steps that never use them repeat the nearest row, so that every table has S rows.
    nearest = [min(range(len(steps)), key=lambda k: abs(steps[k] - i)) for i in range(n_steps)]
    return ActivationScales(found.scale[nearest], found.zero_point, found.bits)


def _check_accumulator(name: str, parameters: LayerParameters) -> None:
    # Source: the widest dot product must stay inside int32 for every input.
    weight, activation = parameters.weight, parameters.activation
    if activation is None or weight.zero_point is not None:
        return
    largest = max(activation.zero_point, activation_max(activation.bits) - activation.zero_point)
    codes = weight.codes
    bound = int(codes.reshape(codes.shape[0], -1).to(torch.int64).abs().sum(1).max()) * largest
    if bound >= INT32_LIMIT:
        raise NumericalError(
            "EQ-5203",
            f"the int32 accumulator could reach {bound}",
            path=name,
            hint="leave the layer in fp32",
        )


def assemble(denoiser: Denoiser, plan: DeploymentPlan, parameters: Parameters) -> QuantizedDenoiser:
    """The denoiser that computes with given codes and scales.

    Raises:
        InputError: if a planned layer has no parameters.
    """
    check_plan(denoiser, plan)
    clock = StepClock()
    by_layer: dict[str, list[LayerAssignment]] = {}
    for phase in plan.phases:
        for assignment in phase.layers:
            by_layer.setdefault(assignment.layer, []).append(assignment)
    module = _copy_without_weights(denoiser.module, by_layer)
    network_of(module).load_state_dict(dict(parameters.floats), strict=False)
    kinds = dependence(denoiser) if parameters.tables else {}
    folded: dict[str, nn.Module] = {
        name: TableLayer(table, clock, by_label=kinds[name] == "label")
        for name, table in parameters.tables.items()
    }
    of_step = [p for p, phase in enumerate(plan.phases) for _ in range(phase.start, phase.stop)]
    for name, assignments in by_layer.items():
        layer = get_layer(module, name)
        variants = list(dict.fromkeys(map(Variant.of, assignments)))
        built = [_build(layer, variant, parameters, folded, clock) for variant in variants]
        if len(built) == 1:
            set_layer(module, name, built[0])
        else:
            chosen = [variants.index(Variant.of(a)) for a in assignments]
            set_layer(module, name, PhasedLayer(built, [chosen[p] for p in of_step], clock))
    program = denoiser.program
    timesteps = torch.tensor(program.timesteps)
    timesteps = timesteps.to(torch.int64 if program.integer_timesteps else torch.float32)
    network = SteppedNetwork(module, timesteps, clock).eval()
    return QuantizedDenoiser(
        denoiser, plan, parameters, network, _tables_sha256(module, parameters)
    )


def _copy_without_weights(
    module: nn.Module, by_layer: Mapping[str, Sequence[LayerAssignment]]
) -> nn.Module:
    # Weights about to be replaced are shared, not copied: they are most of the memory.
    replaced = [n for n, mine in by_layer.items() if all(a.precision != FP32 for a in mine)]
    weights = [get_layer(module, name).weight for name in replaced]
    return copy.deepcopy(module, {id(weight): weight for weight in weights})


def _build(
    layer: nn.Module,
    variant: Variant,
    parameters: Parameters,
    folded: Mapping[str, nn.Module],
    clock: StepClock,
) -> nn.Module:
    if variant.precision == FP32:
        return copy.deepcopy(layer)
    if variant.precision == TABLE:
        # What feeds nothing but tables needs none itself.
        return folded.get(variant.layer) or DeadLayer(_quantizable(variant.layer, layer))
    if variant not in parameters.layers:
        raise InputError("EQ-3208", "no parameters for a planned layer", path=str(variant))
    layer = _quantizable(variant.layer, layer)
    bias = parameters.floats.get(f"{variant.layer}.bias", layer.bias)
    own = None if bias is None else bias.detach()
    return coded_layer(layer, parameters.layers[variant], variant.precision, own, clock)


def check_plan(denoiser: Denoiser, plan: DeploymentPlan) -> None:
    """Refuse a plan for another model or sampler, and precisions that do not fit their layer."""
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
            hint=f"sample in {plan.n_steps} steps, or make a plan for this sampler",
        )
    named = [{a.layer: a for a in phase.layers} for phase in plan.phases]
    kinds = {layer.name: layer.kind for layer in denoiser.info.layers}
    for name in dict.fromkeys(name for phase in named for name in phase):
        assignments = [phase.get(name) for phase in named]
        if name not in kinds:
            near = get_close_matches(name, kinds, n=1)
            hint = f"did you mean {near[0]}?" if near else "`edgeqdm plan` writes the names of all"
            raise InputError("EQ-3270", "the model has no such layer", path=name, hint=hint)
        _check_layer(name, kinds[name], assignments)


def _check_layer(name: str, kind: LayerKind, assignments: list[LayerAssignment | None]) -> None:
    precisions = [None if a is None else a.precision for a in assignments]
    if None in precisions:
        raise InputError(
            "EQ-3207",
            f"phase {precisions.index(None)} does not name the layer, other phases do",
            path=name,
            hint="name every layer in every phase",
        )
    for precision in dict.fromkeys(p for p in precisions if p is not None):
        if kind is LayerKind.CONV2D and (precision.group_size or precision.dynamic):
            form = "groups of input channels" if precision.group_size else "run-time scales"
            plain = f"w{precision.weight_bits}a{precision.activation_bits}"
            raise UnsupportedError(
                "EQ-4202",
                f"{precision} on a convolution: no kernel has {form} there",
                path=name,
                hint=f"use {plain if precision.integer else f'w{precision.weight_bits}'}",
            )
    if TABLE in precisions and set(precisions) != {TABLE}:
        raise UnsupportedError(
            "EQ-4204", "a table replaces a layer in all phases or in none", path=name
        )


def _tables_sha256(module: nn.Module, parameters: Parameters) -> str:
    found = hashlib.sha256()
    for name, layer in module.named_modules():
        if isinstance(layer, CodedLayer | TableLayer):
            found.update(
                f"{name} {layer.group_size if isinstance(layer, CodedLayer) else 0}".encode()
            )
            for key, buffer in sorted(layer.named_buffers()):
                found.update(key.encode())
                found.update(buffer.numpy().tobytes())
        if isinstance(layer, DynamicLinear):
            found.update(str(layer.activation_bits).encode())
        if isinstance(layer, TabledLayer):
            found.update(f"{layer.zero_point} {layer.activation_bits}".encode())
        if isinstance(layer, QuantizedConv2d):
            found.update(str(layer.out_zero_point).encode())
    for name, tensor in sorted(parameters.floats.items()):
        found.update(name.encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def precision_digest(quantized: QuantizedDenoiser) -> str:
    """SHA-256 of everything the quantization error depends on beside model and sampler."""
    whole = f"{digest(quantized.plan)} {quantized.tables_sha256}"
    return hashlib.sha256(whole.encode()).hexdigest()
