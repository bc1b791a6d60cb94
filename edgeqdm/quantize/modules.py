"""Layers that call the custom ops, and the denoiser made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from edgeqdm.numerics.ranges import ActivationScales
from edgeqdm.quantize.ops import qconv2d, qlinear


class StepClock:
    """Carries the step from the network's input to every quantized layer."""

    step: Tensor


class QuantizedLinear(nn.Module):
    """A linear layer on integers; `weight_q` is int8 [C_out, C_in]."""

    weight_q: Tensor
    weight_scale: Tensor
    act_scale_table: Tensor

    def __init__(
        self,
        weight_q: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: ActivationScales,
        clock: StepClock,
    ) -> None:
        super().__init__()
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("act_scale_table", activation.scale)
        self.zero_point = activation.zero_point
        self._clock = clock

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
                self._clock.step,
            ),
        )


class QuantizedConv2d(nn.Module):
    """A convolution on integers; `weight_q` is int8 [C_out, C_in / groups, KH, KW]."""

    weight_q: Tensor
    weight_scale: Tensor
    act_scale_table: Tensor
    out_scale_table: Tensor

    def __init__(
        self,
        weight_q: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: ActivationScales,
        output: ActivationScales,
        geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
        clock: StepClock,
    ) -> None:
        super().__init__()
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("act_scale_table", activation.scale)
        self.register_buffer("out_scale_table", output.scale)
        self.zero_point = activation.zero_point
        self.out_zero_point = output.zero_point
        self.stride, self.padding, self.dilation = (list(g) for g in geometry[:3])
        self.groups = geometry[3]
        self._clock = clock

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
                self.out_scale_table,
                self.out_zero_point,
                self._clock.step,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
            ),
        )


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
        t = torch.index_select(self.timesteps, 0, step.reshape(1)).expand(sample.shape[0])
        return cast(Tensor, self.network(sample, t, *conditioning))
