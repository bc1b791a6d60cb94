"""Activation scales of a soft network that come from one network of the timestep.

Source: TDQ, https://arxiv.org/abs/2306.02316, section 3.
"""

from __future__ import annotations

import copy
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
    """A soft network whose temporal tables come from networks of the timestep.

    Waves of the timestep's embedding that are left out stay so under training: their weights are 0
    and get no gradient.

    Args:
        soft: its quantizers of the generated tables are replaced.
        timesteps: of the sampler, [S].
        generator: of some of its temporal tables.

    Attributes:
        scales: a copy of the networks, to be trained with the rest.
    """

    def __init__(
        self, soft: SoftNetwork, timesteps: Sequence[float], generator: ScaleGenerator
    ) -> None:
        self._timesteps = torch.tensor(timesteps, dtype=torch.float64)
        self._names = generator.names
        self.scales = copy.deepcopy(generator.scales).requires_grad_(True)
        kept = (self.scales.weights[0] != 0).to(torch.float32)
        self.scales.weights[0].register_hook(lambda gradient: gradient * kept)
        found: dict[str, FedQuantizer] = {}
        for name, activation, index in _temporal(soft):
            if name in self._names:
                found[name] = FedQuantizer(_given(activation, index))
                activation.quantizers[index] = found[name]
        self._fed = [found[name] for name in self._names]

    def feed(self) -> None:
        """Evaluates the networks at every step and hands each quantizer its table."""
        tables = self.scales(self._timesteps)
        for index, quantizer in enumerate(self._fed):
            quantizer.table = tables[:, index]

    def settle(self) -> ScaleGenerator:
        """Hands each quantizer the table that is stored, and returns what makes them."""
        for quantizer, table in zip(self._fed, self.scales.tabulate(self._timesteps), strict=True):
            quantizer.table = table
        return ScaleGenerator(self._names, copy.deepcopy(self.scales))


def generator_of(
    soft: SoftNetwork, timesteps: Sequence[float], generator: torch.Generator
) -> ScaleGenerator:
    """Networks that return the temporal tables of a soft network, nearly.

    Raises:
        InputError: if no activation is temporal.
    """
    found = {name: _given(activation, index) for name, activation, index in _temporal(soft)}
    if not found:
        raise InputError(
            "EQ-3269",
            "no activation of the plan has temporal scales",
            path="settings.temporal",
            hint="give layers the activation policy `temporal`, or train without `temporal`",
        )
    timed = torch.tensor(timesteps, dtype=torch.float64)
    return ScaleGenerator(tuple(found), start_at([*found.values()], timed, generator=generator))


def start_at(
    tables: Sequence[ActivationScales], timesteps: Tensor, *, generator: torch.Generator
) -> TemporalScales:
    """Networks of the timestep that return given tables, nearly.

    Args:
        tables: [S] each.
        timesteps: float64 [S].
        generator: draws the initial weights.
    """
    # The regression looks at the tables alone; what the layers saw is not needed.
    unseen = StepRanges(torch.ones(1, 1), torch.zeros(1), torch.ones(1))
    return fit_temporal(
        [unseen] * len(tables),
        timesteps,
        [table.zero_point for table in tables],
        torch.stack([table.scale for table in tables]),
        bits=[table.bits for table in tables],
        generator=generator,
        iterations=START_ITERATIONS,
        refinements=0,
    )


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
