"""Networks of the timestep start as the tables they replace."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from edgeqdm.numerics.ranges import ActivationScales
from edgeqdm.numerics.temporal import TemporalScales
from edgeqdm.quantize.soft_activations import TabledQuantizer
from edgeqdm.quantize.soft_temporal import FedQuantizer, start_at


def timesteps(n: int) -> torch.Tensor:
    return torch.linspace(999, 0, n, dtype=torch.float64)


def smooth_tables(n: int) -> list[ActivationScales]:
    """Scales that grow, fall, stay and bend, as layers of a denoiser do, [S] each."""
    t = timesteps(n) / 999
    rows = (0.1 + t, 2 - 1.7 * t, 0.5 + 0 * t, 0.2 + (3 * t).sin().abs())
    return [ActivationScales(row.float(), 7, 4) for row in rows]


@cache
def started(n: int) -> TemporalScales:
    return start_at(smooth_tables(n), timesteps(n), generator=torch.Generator().manual_seed(0))


def deviation(scales: TemporalScales, n: int) -> float:
    tables = torch.stack([table.scale for table in smooth_tables(n)])
    return float((scales.tabulate(timesteps(n)) / tables).log().abs().max())


@pytest.mark.parametrize("n", [2, 20])
def test_networks_start_near_the_tables(n: int) -> None:
    """A few percent are less than a code of 4 bits resolves."""
    assert deviation(started(n), n) < 0.05


def test_networks_interpolate_between_the_steps_they_started_at() -> None:
    """T6."""
    assert deviation(started(20), 191) < 0.1


def test_fed_quantizer_rounds_as_one_with_the_same_table() -> None:
    given_scales = ActivationScales(torch.tensor([0.1, 0.2, 0.3]), 7, 4)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([2, 0, 1, 1])
    fed, tabled = FedQuantizer(given_scales), TabledQuantizer(given_scales, range(3), 3)
    assert torch.equal(fed(x, steps), tabled(x, steps))
    fed.table = (given_scales.scale * 2).requires_grad_(True)
    fed(x, steps).square().sum().backward()
    assert fed.table.grad is not None
    assert bool((fed.table.grad != 0).all())
    assert torch.equal(fed.scales().scale, given_scales.scale * 2)
