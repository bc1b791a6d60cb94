"""Activation scales of a soft network that come from one network of the timestep.

Source: TDQ, https://arxiv.org/abs/2306.02316, section 3, quantization-aware training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from edgeqdm.errors import InputError
from edgeqdm.ir.precision import ActivationPolicy
from edgeqdm.numerics.ranges import ActivationScales, StepRanges
from edgeqdm.numerics.temporal import TemporalScales, fit_temporal
from edgeqdm.quantize.parameters import Variant
from edgeqdm.quantize.soft import SoftNetwork
from edgeqdm.quantize.soft_activations import SoftActivation, TabledQuantizer
from edgeqdm.quantize.tdq import ScaleGenerator

START_ITERATIONS = 300
"""Of the regression on the first tables: half as many miss some by 7 %, these by 1 %."""


class FedQuantizer(TabledQuantizer):
    """Rounds with a table that somebody else computes; learns nothing itself.

    Attributes:
        table: float32 [S]; may carry gradients.
    """

    def __init__(self, scales: ActivationScales) -> None:
        n_steps = scales.scale.shape[0]
        super().__init__(scales, range(n_steps), n_steps)
        self.log_ratio.requires_grad_(False)
        self.table = scales.scale

    def _table(self) -> Tensor:
        return self.table


class FedNetwork:
    """A soft network whose temporal tables one `TemporalScales` makes.

    Every table becomes an output of these networks, which start near the tables.

    Args:
        soft: its temporal quantizers are replaced.
        timesteps: of the sampler, [S].
        generator: draws the initial weights.

    Attributes:
        scales: the networks of the timestep, to be trained with the rest.

    Raises:
        InputError: if no activation is temporal.
    """

    def __init__(
        self, soft: SoftNetwork, timesteps: Sequence[float], generator: torch.Generator
    ) -> None:
        self._timesteps = torch.tensor(timesteps, dtype=torch.float64)
        self._fed: dict[str, FedQuantizer] = {}
        for name, activation, index in list(_temporal(soft)):
            fed = FedQuantizer(_given(activation, index))
            activation.quantizers[index] = fed
            self._fed[name] = fed
        if not self._fed:
            raise InputError(
                "EQ-3269",
                "no activation of the plan has temporal scales",
                path="settings.temporal",
                hint="give layers the activation policy `temporal`, or train without `temporal`",
            )
        tables = [fed.scales() for fed in self._fed.values()]
        self.scales = start_at(tables, self._timesteps, generator=generator)

    def feed(self) -> None:
        """Evaluates the networks at every step and hands each quantizer its table."""
        tables = self.scales(self._timesteps)
        for index, quantizer in enumerate(self._fed.values()):
            quantizer.table = tables[:, index]

    def generator(self) -> ScaleGenerator:
        """The networks as they are stored; they stay shared."""
        return ScaleGenerator(tuple(self._fed), self.scales)


def start_at(
    tables: Sequence[ActivationScales], timesteps: Tensor, *, generator: torch.Generator
) -> TemporalScales:
    """Networks of the timestep that return given tables, nearly.

    Waves of the timestep's embedding that are left out stay so under training: their weights are 0
    and get no gradient.

    Args:
        tables: [S] each.
        timesteps: float64 [S].
        generator: draws the initial weights.
    """
    # The regression looks at the tables alone; what the layers saw is not needed.
    unseen = StepRanges(torch.ones(1, 1), torch.zeros(1), torch.ones(1))
    scales = fit_temporal(
        [unseen] * len(tables),
        timesteps,
        [table.zero_point for table in tables],
        torch.stack([table.scale for table in tables]),
        bits=[table.bits for table in tables],
        generator=generator,
        iterations=START_ITERATIONS,
        refinements=0,
    )
    kept = (scales.weights[0] != 0).to(torch.float32)
    scales.weights[0].register_hook(lambda gradient: gradient * kept)
    return scales


def _temporal(soft: SoftNetwork) -> Iterator[tuple[str, SoftActivation, int]]:
    """Name of every temporal table as `ScaleGenerator` spells it, and where its quantizer is."""
    for name, layer in soft.layers.items():
        for index, variant in enumerate(soft.variants[name]):
            for side, activation in (("input", layer.input), ("output", layer.output)):
                if activation is not None and _is_temporal(variant, activation, index):
                    yield f"{side}/{variant}", activation, index


def _is_temporal(variant: Variant, activation: SoftActivation, index: int) -> bool:
    tabled = isinstance(activation.quantizers[index], TabledQuantizer)
    return tabled and variant.policy is ActivationPolicy.TEMPORAL


def _given(activation: SoftActivation, index: int) -> ActivationScales:
    scales = activation.scales()[index]
    if scales is None:
        raise ValueError("a table without scales")
    return scales
