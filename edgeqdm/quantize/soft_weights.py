"""Weights that are coded and can still be trained."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from edgeqdm.numerics.affine import MIN_SCALE, activation_max, weight_max
from edgeqdm.numerics.grouping import MAX_GROUP_SCALE, MIN_GROUP_SCALE
from edgeqdm.numerics.rounding import (
    initial_alpha,
    soft_rounding,
    straight_through,
    straight_through_round,
)
from edgeqdm.quantize.parameters import WeightCodes


class SoftWeight(nn.Module, ABC):
    """A weight as a layer computes with it, and the codes it ends up as.

    Args:
        weight: float32, of the layer's shape.
        coded: gives scale, zero_point, bits and group_size, and first codes.
    """

    def __init__(self, weight: Tensor, coded: WeightCodes) -> None:
        super().__init__()
        self.bits, self.group_size = coded.bits, coded.group_size

    @abstractmethod
    def forward(self) -> Tensor:
        """float32 weight, of the layer's shape."""

    @abstractmethod
    def codes(self) -> WeightCodes:
        """What is stored of it."""


class FixedWeight(SoftWeight):
    """The codes as they are; nothing to train."""

    def __init__(self, weight: Tensor, coded: WeightCodes) -> None:
        super().__init__(weight, coded)
        self._coded = coded

    def forward(self) -> Tensor:
        return self._coded.dequantized()

    def codes(self) -> WeightCodes:
        return self._coded


class HalfWeight(SoftWeight):
    """Stored in 16 bits; trained in 32, rounded straight through.

    Attributes:
        weight: float32 parameter; starts at the given codes, and at the layer's own weight where
            that rounds to them.
    """

    def __init__(self, weight: Tensor, coded: WeightCodes) -> None:
        super().__init__(weight, coded)
        own = weight.detach()
        same = own.to(torch.float16) == coded.codes
        self.weight = nn.Parameter(torch.where(same, own, coded.dequantized()))

    def forward(self) -> Tensor:
        return straight_through(self.weight.to(torch.float16).to(torch.float32), self.weight)

    def codes(self) -> WeightCodes:
        return WeightCodes(self.weight.detach().to(torch.float16), None, None, 16)


class _GridWeight(SoftWeight):
    """A weight on a grid of integers; `zero_point` is None where codes are signed."""

    zero_point: Tensor | None

    def __init__(self, weight: Tensor, coded: WeightCodes) -> None:
        super().__init__(weight, coded)
        if coded.scale is None:
            raise ValueError("weights in 16 bits have no grid")
        self._shape = weight.shape
        self.register_buffer("zero_point", coded.zero_point)

    def _spread(self, table: Tensor) -> Tensor:
        """A value per channel [C_out], or per channel and group [C_out, G], for every weight."""
        if self.zero_point is None:
            return table.reshape(-1, *([1] * (len(self._shape) - 1)))
        rows, groups = table.shape
        return (
            table[..., None].expand(rows, groups, self.group_size).flatten(1)[:, : self._shape[1]]
        )

    def _clip(self, integers: Tensor) -> Tensor:
        """Whole numbers, zero_point subtracted, that have a code."""
        if self.zero_point is None:
            limit = weight_max(self.bits)
            return integers.clamp(-limit, limit)
        zero_point = self._spread(self.zero_point).to(torch.float32)
        return torch.clamp(integers, -zero_point, activation_max(self.bits) - zero_point)

    def _coded(self, integers: Tensor, scale: Tensor) -> WeightCodes:
        integers, scale = integers.detach(), scale.detach().clone()
        if self.zero_point is None:
            return WeightCodes(integers.to(torch.int8), scale, None, self.bits)
        codes = (integers + self._spread(self.zero_point)).to(torch.uint8)
        return WeightCodes(codes, scale, self.zero_point, self.bits, self.group_size)


class RoundedWeight(_GridWeight):
    """Fixed scales; learns for every weight whether it is rounded up or down.

    Soft, it starts as the float weight itself, clipped to the range of the codes.

    Attributes:
        alpha: float32, of the weight's shape; rounded up where it is 0 or more.
        hard: whether every weight is at floor or ceil, as it will be stored.

    Source: AdaRound, https://arxiv.org/abs/2004.10568.
    """

    scale: Tensor
    floor: Tensor

    def __init__(self, weight: Tensor, coded: WeightCodes) -> None:
        super().__init__(weight, coded)
        self.register_buffer("scale", coded.scale)
        ratio = weight.detach() / self._spread(self.scale)
        self.register_buffer("floor", torch.floor(ratio))
        self.alpha = nn.Parameter(initial_alpha(ratio - self.floor))
        self.hard = False

    def forward(self) -> Tensor:
        return self._integers(self.hard) * self._spread(self.scale)

    def codes(self) -> WeightCodes:
        return self._coded(self._integers(hard=True), self.scale)

    def _integers(self, hard: bool) -> Tensor:
        up = (self.alpha >= 0).to(self.floor.dtype) if hard else soft_rounding(self.alpha)
        return self._clip(self.floor + up)


class LearnedWeight(_GridWeight):
    """Learns the weight and its scales, rounding straight through.

    Scales are learned as logarithms of their ratio to the first ones: they stay positive, and one
    learning rate suits all of them. In groups they have float16 values at any time.

    Attributes:
        weight: float32 parameter.
        log_ratio: float32 [C_out] or [C_out, G].

    Source: LSQ, https://arxiv.org/abs/1902.08153, equations 1 to 3; section 2.2 for the gradient
    scale `1 / sqrt(n q_max)`, n being the weights that share a scale.
    """

    first_scale: Tensor

    def __init__(self, weight: Tensor, coded: WeightCodes) -> None:
        super().__init__(weight, coded)
        self.weight = nn.Parameter(weight.detach().clone())
        self.register_buffer("first_scale", coded.scale)
        self.log_ratio = nn.Parameter(torch.zeros_like(self.first_scale))
        top = weight_max(self.bits) if self.zero_point is None else activation_max(self.bits)
        sharing = weight.numel() / self.first_scale.numel()
        self._gradient_scale = (sharing * top) ** -0.5

    def forward(self) -> Tensor:
        scale = self._spread(self._scale())
        return straight_through_round(self._clip(self.weight / scale)) * scale

    def codes(self) -> WeightCodes:
        scale = self._scale()
        integers = torch.round(self._clip(self.weight / self._spread(scale)))
        return self._coded(integers, scale)

    def _scale(self) -> Tensor:
        damped = straight_through(self.log_ratio, self.log_ratio * self._gradient_scale)
        scale = self.first_scale * torch.exp(damped)
        if self.zero_point is None:
            return scale.clamp(min=MIN_SCALE)
        scale = scale.clamp(MIN_GROUP_SCALE, MAX_GROUP_SCALE)
        return straight_through(scale.to(torch.float16).to(torch.float32), scale)
