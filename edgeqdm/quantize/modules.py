"""Layers that call the custom ops, and the denoiser made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeqdm.ir.precision import Precision
from edgeqdm.numerics.ranges import ActivationScales
from edgeqdm.quantize.ops import (
    choose,
    dequantize,
    qconv2d,
    qlinear,
    qlinear_dynamic,
    qlinear_grouped,
)
from edgeqdm.quantize.parameters import LayerParameters, WeightCodes

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""stride, padding, dilation and groups of a convolution."""


class StepClock:
    """Carries the step and the conditioning from the network's input to every layer."""

    step: Tensor
    conditioning: tuple[Tensor, ...] = ()

    def __deepcopy__(self, memo: object) -> StepClock:
        # What it carries is of one call, and of an export it cannot be copied.
        return StepClock()


class CodedLayer(nn.Module):
    """A layer whose weight is stored as codes, and its bias in float."""

    weight_q: Tensor
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: WeightCodes, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight_q", weight.codes)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("weight_zero_point", weight.zero_point)
        self.register_buffer("bias", bias)
        self.group_size = weight.group_size

    def float_weight(self) -> Tensor:
        if self.weight_scale is None:
            return self.weight_q.to(torch.float32)
        return cast(
            Tensor,
            dequantize(self.weight_q, self.weight_scale, self.weight_zero_point, self.group_size),
        )


class TabledLayer(CodedLayer):
    """A coded layer whose input has a scale per step (or one for all) and a constant zero_point."""

    act_scale_table: Tensor

    def __init__(
        self,
        weight: WeightCodes,
        bias: Tensor | None,
        activation: ActivationScales,
        clock: StepClock,
    ) -> None:
        super().__init__(weight, bias)
        self.register_buffer("act_scale_table", activation.scale)
        self.zero_point = activation.zero_point
        self.activation_bits = activation.bits
        self._clock = clock


class QuantizedLinear(TabledLayer):
    """A linear layer on integers; `weight_q` is int8 [C_out, C_in]."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(
            Tensor,
            qlinear(
                input,
                self.weight_q,
                self.weight_scale,
                self.bias,
                self.act_scale_table,
                self.zero_point,
                self.activation_bits,
                self._clock.step,
            ),
        )


class GroupedLinear(TabledLayer):
    """A linear layer on integers with weight scales per group; `weight_q` is uint8."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(
            Tensor,
            qlinear_grouped(
                input,
                self.weight_q,
                self.weight_scale,
                self.weight_zero_point,
                self.bias,
                self.group_size,
                self.act_scale_table,
                self.zero_point,
                self.activation_bits,
                self._clock.step,
            ),
        )


class QuantizedConv2d(TabledLayer):
    """A convolution on integers; `weight_q` is int8 [C_out, C_in / groups, KH, KW]."""

    out_scale_table: Tensor

    def __init__(
        self,
        weight: WeightCodes,
        bias: Tensor | None,
        activation: ActivationScales,
        output: ActivationScales,
        geometry: Geometry,
        clock: StepClock,
    ) -> None:
        super().__init__(weight, bias, activation, clock)
        self.register_buffer("out_scale_table", output.scale)
        self.out_zero_point = output.zero_point
        self.stride, self.padding, self.dilation = (list(g) for g in geometry[:3])
        self.groups = geometry[3]

    def forward(self, input: Tensor) -> Tensor:
        return cast(
            Tensor,
            qconv2d(
                input,
                self.weight_q,
                self.weight_scale,
                self.bias,
                self.act_scale_table,
                self.zero_point,
                self.activation_bits,
                self.out_scale_table,
                self.out_zero_point,
                self._clock.step,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
            ),
        )


class DynamicLinear(CodedLayer):
    """A linear layer on integers that scales its input by the values themselves."""

    def __init__(self, weight: WeightCodes, bias: Tensor | None, activation_bits: int) -> None:
        super().__init__(weight, bias)
        self.activation_bits = activation_bits

    def forward(self, input: Tensor) -> Tensor:
        return cast(
            Tensor,
            qlinear_dynamic(
                input,
                self.weight_q,
                self.weight_scale,
                self.weight_zero_point,
                self.bias,
                self.group_size,
                self.activation_bits,
            ),
        )


class WeightOnlyLinear(CodedLayer):
    """A linear layer in float with coded weights."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.float_weight(), self.bias)


class WeightOnlyConv2d(CodedLayer):
    """A convolution in float with coded weights."""

    def __init__(self, weight: WeightCodes, bias: Tensor | None, geometry: Geometry) -> None:
        super().__init__(weight, bias)
        self.stride, self.padding, self.dilation = (list(g) for g in geometry[:3])
        self.groups = geometry[3]

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(
            input,
            self.float_weight(),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class PhasedLayer(nn.Module):
    """A layer whose precision differs between phases; steps choose among its variants."""

    def __init__(
        self, variants: Sequence[nn.Module], of_step: Sequence[int], clock: StepClock
    ) -> None:
        super().__init__()
        self.variants = nn.ModuleList(variants)
        self.of_step = tuple(of_step)
        self._clock = clock

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            outputs = [variant(input) for variant in self.variants]
            return cast(Tensor, choose(input, outputs, self.of_step, self._clock.step))
        chosen = self.variants[self.of_step[int(self._clock.step)]]
        return cast(Tensor, chosen(input))


def coded_layer(
    layer: nn.Linear | nn.Conv2d,
    parameters: LayerParameters,
    precision: Precision,
    bias: Tensor | None,
    clock: StepClock,
) -> nn.Module:
    """The layer as its precision computes it.

    Args:
        layer: what it replaces; gives the geometry of a convolution.
        parameters: codes and scales.
        precision: any but `fp32` and `table`.
        bias: float32 [C_out].
        clock: told of the step by the network.
    """
    weight, activation, output = parameters.weight, parameters.activation, parameters.output
    if isinstance(layer, nn.Conv2d):
        geometry = (layer.stride, cast(Sequence[int], layer.padding), layer.dilation, layer.groups)
        if activation is None or output is None:
            return WeightOnlyConv2d(weight, bias, geometry)
        return QuantizedConv2d(weight, bias, activation, output, geometry, clock)
    if precision.dynamic:
        return DynamicLinear(weight, bias, precision.activation_bits)
    if activation is None:
        return WeightOnlyLinear(weight, bias)
    form = GroupedLinear if weight.group_size else QuantizedLinear
    return form(weight, bias, activation, clock)


class SteppedNetwork(nn.Module):
    """A denoiser that is told the step index and looks the timestep up itself.

    Inputs: sample float32 [B, C, H, W] (already multiplied by `input_scale`), step int64 scalar,
    and the conditioning. Output: f [B, C, H, W].
    """

    timesteps: Tensor

    def __init__(self, network: nn.Module, timesteps: Tensor, clock: StepClock) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("timesteps", timesteps)
        self._clock = clock

    def forward(self, sample: Tensor, step: Tensor, *conditioning: Tensor) -> Tensor:
        self._clock.step = step
        self._clock.conditioning = conditioning
        t = torch.index_select(self.timesteps, 0, step.reshape(1)).expand(sample.shape[0])
        return cast(Tensor, self.network(sample, t, *conditioning))
