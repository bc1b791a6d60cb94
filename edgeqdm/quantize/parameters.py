"""What quantization decides about a layer: the codes of its weights, the scales of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment
from edgeqdm.ir.precision import ActivationPolicy, Precision
from edgeqdm.numerics.grouping import GroupedWeight
from edgeqdm.numerics.ranges import ActivationScales
from edgeqdm.quantize.ops import dequantize


@dataclass(frozen=True)
class WeightCodes:
    """The stored weight of one layer.

    Attributes:
        codes: of the weight's shape; int8 per output channel, uint8 in groups, float16 for `fp16`.
        scale: float32 [C_out], or [C_out, G] in groups; None for `fp16`.
        zero_point: uint8 [C_out, G] in groups, else None.
        bits: width of a code.
        group_size: input channels that share a scale; 0 is all of them.
    """

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    bits: int
    group_size: int = 0

    def dequantized(self) -> Tensor:
        """float32 weight as the layer computes with it."""
        if self.scale is None:
            return self.codes.to(torch.float32)
        found: Tensor = dequantize(self.codes, self.scale, self.zero_point, self.group_size)
        return found

    @staticmethod
    def of_groups(weight: GroupedWeight) -> WeightCodes:
        return WeightCodes(
            weight.codes, weight.scale, weight.zero_point, weight.bits, weight.group_size
        )


@dataclass(frozen=True)
class LayerParameters:
    """One layer at one precision.

    Attributes:
        weight: stored weight.
        activation: scales of the input over all steps; None where it is dynamic or float.
        output: scales of a convolution's bias-free output over all steps, 8 bits; else None.
    """

    weight: WeightCodes
    activation: ActivationScales | None = None
    output: ActivationScales | None = None


@dataclass(frozen=True, order=True)
class Variant:
    """One layer at one precision; a layer has as many as the phases of a plan ask for."""

    layer: str
    precision: Precision
    policy: ActivationPolicy

    @staticmethod
    def of(assignment: LayerAssignment) -> Variant:
        return Variant(assignment.layer, assignment.precision, assignment.policy)

    def __str__(self) -> str:
        return f"{self.layer}/{self.precision}/{self.policy}"


def steps_of_variants(plan: DeploymentPlan) -> dict[Variant, list[int]]:
    """Every variant a plan asks for, with the steps that use it, ascending."""
    found: dict[Variant, list[int]] = {}
    for phase in plan.phases:
        for assignment in phase.layers:
            steps = found.setdefault(Variant.of(assignment), [])
            steps.extend(range(phase.start, phase.stop))
    return found


@dataclass(frozen=True)
class Parameters:
    """Everything quantization decided about a network.

    Attributes:
        layers: by variant.
        tables: exact outputs of layers with precision `table`, float32 [S, C] or [S, K, C] by
            label.
        floats: tensors of the float remainder that differ from the float model's, by name inside
            the network: norms and biases after quantization-aware training.
    """

    layers: Mapping[Variant, LayerParameters]
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    floats: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that codes and scales are made of, by name; for a fingerprint."""
        found = {f"float {name}": tensor for name, tensor in self.floats.items()}
        for variant, mine in self.layers.items():
            weight = {"codes": mine.weight.codes, "scale": mine.weight.scale}
            weight["zero_point"] = mine.weight.zero_point
            found |= {f"{variant} weight {k}": v for k, v in weight.items() if v is not None}
            for side, scales in (("input", mine.activation), ("output", mine.output)):
                if scales is not None:
                    found[f"{variant} {side} scale"] = scales.scale
                    found[f"{variant} {side} zero_point"] = torch.tensor(scales.zero_point)
        return found
