"""Activations that are rounded as on the device while gradients pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from edgeqdm.errors import UnsupportedError
from edgeqdm.numerics.affine import MIN_SCALE
from edgeqdm.numerics.dynamic import quantize_per_token, quantize_per_token_group
from edgeqdm.numerics.grouping import grouped_view
from edgeqdm.numerics.ranges import ActivationScales
from edgeqdm.numerics.rounding import drop_mix, straight_through
from edgeqdm.numerics.temporal import fake_quantize


@dataclass
class SoftClock:
    """Tells every layer of the running batch.

    Attributes:
        steps: int64 [B], the step of every sample; they may differ.
        generator: of QDrop.
        drop: probability that an element of an activation is not quantized; 0 is off.
    """

    steps: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    generator: torch.Generator = field(default_factory=torch.Generator)
    drop: float = 0.0


class TabledQuantizer(nn.Module):
    """Rounds with a scale per step, or one for all, learned as logarithm of its ratio to the first.

    Args:
        scales: the first ones.
        used: steps that use them, ascending; other steps share the scale of the nearest.
        n_steps: S.

    Attributes:
        log_ratio: float32 parameter, one per used step, or [1].
        row_of_step: int64 [S], which of them a step uses.
    """

    first_scale: Tensor
    row_of_step: Tensor

    def __init__(self, scales: ActivationScales, used: Sequence[int], n_steps: int) -> None:
        super().__init__()
        self.zero_point, self.bits = scales.zero_point, scales.bits
        self.constant = scales.scale.shape[0] == 1
        rows = [0] if self.constant else list(used)
        nearest = [min(range(len(rows)), key=lambda k: abs(rows[k] - i)) for i in range(n_steps)]
        self.register_buffer("first_scale", scales.scale[rows])
        self.register_buffer("row_of_step", torch.tensor(nearest))
        self.log_ratio = nn.Parameter(torch.zeros(len(rows)))

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        """x [B, ...], steps int64 [B]."""
        rows = self.row_of_step.index_select(0, steps)
        scale = self._table().index_select(0, rows)
        return fake_quantize(
            x, scale.reshape(-1, *([1] * (x.dim() - 1))), self.zero_point, self.bits
        )

    def scales(self) -> ActivationScales:
        """What is stored: float32 [S], or [1]."""
        table = self._table().detach()
        whole = table.clone() if self.constant else table[self.row_of_step]
        return ActivationScales(whole, self.zero_point, self.bits)

    def _table(self) -> Tensor:
        return (self.first_scale * torch.exp(self.log_ratio)).clamp(min=MIN_SCALE)


class DynamicQuantizer(nn.Module):
    """Rounds with scales from the values themselves, straight through; nothing to learn."""

    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        return straight_through(self._rounded(x.detach()), x)

    def scales(self) -> None:
        return None

    def _rounded(self, x: Tensor) -> Tensor:
        if not self.group_size:
            codes, scale = quantize_per_token(x, self.bits)
            return codes * scale
        codes, scale = quantize_per_token_group(x, self.group_size, self.bits)
        groups = grouped_view(codes, self.group_size) * scale[..., None]
        return groups.flatten(-2)[..., : x.shape[-1]]


class FloatActivation(nn.Module):
    """Leaves an activation as it is."""

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        return x

    def scales(self) -> None:
        return None


Quantizer = TabledQuantizer | DynamicQuantizer | FloatActivation


class SoftActivation(nn.Module):
    """One tensor of a layer, rounded as the plan says at the step of each sample.

    Args:
        quantizers: one per variant of the layer.
        of_step: which of them a step uses, [S].
        clock: tells the steps of the running batch.
        layer: name, for errors.
    """

    of_step: Tensor

    def __init__(
        self,
        quantizers: Sequence[Quantizer],
        of_step: Sequence[int],
        clock: SoftClock,
        layer: str,
    ) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        self.register_buffer("of_step", torch.tensor(of_step))
        self._clock, self._layer = clock, layer
        self._float = all(isinstance(each, FloatActivation) for each in quantizers)

    def forward(self, x: Tensor) -> Tensor:
        if self._float:
            return x
        return drop_mix(self._quantized(x), x, self._clock.drop, self._clock.generator)

    def scales(self) -> tuple[ActivationScales | None, ...]:
        """What is stored, per variant."""
        return tuple(cast(Quantizer, each).scales() for each in self.quantizers)

    def _quantized(self, x: Tensor) -> Tensor:
        steps = self._steps_of_rows(x)
        if len(self.quantizers) == 1:
            return cast(Tensor, self.quantizers[0](x, steps))
        variants = self.of_step.index_select(0, steps)
        y = x
        for index in variants.unique().tolist():
            rows = (variants == index).nonzero()[:, 0]
            y = y.index_copy(0, rows, self.quantizers[index](x[rows], steps[rows]))
        return y

    def _steps_of_rows(self, x: Tensor) -> Tensor:
        steps = self._clock.steps
        per_sample, rest = divmod(x.shape[0], len(steps))
        if rest or not per_sample:
            raise UnsupportedError(
                "EQ-4241",
                f"the input of {list(x.shape)} cannot be split among {len(steps)} samples",
                path=self._layer,
                hint="leave the layer in fp32; its first axis must be the batch",
            )
        return steps if per_sample == 1 else steps.repeat_interleave(per_sample)
