"""What errors are made of, against errors made by hand."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from edgeqdm.calibrate.observe import LayerObservation
from edgeqdm.correct.measure import measure_noise
from edgeqdm.numerics.ranges import StepRanges


def test_shares_are_those_the_error_was_made_of(noise: ModuleType) -> None:
    """f of variance 4; D = 0.1 f + (0.3, -0.3) + noise of variance 0.05."""
    chance = np.random.default_rng(0)
    f = 2.0 * chance.standard_normal((400, 2, 16, 16))
    bias = np.array([0.3, -0.3])[:, None, None]
    error = 0.1 * f + bias + 0.05**0.5 * chance.standard_normal(f.shape)
    statistics = measure_noise(
        lambda x, step, fed: f.astype(np.float32),
        lambda x, step, fed: (f + error).astype(np.float32),
        [(0, f.astype(np.float32), None)],
        n_steps=1,
    )
    found = noise.shares(statistics)
    power = 0.04 + 0.09 + 0.05
    assert found["gain"] == pytest.approx([0.04 / power], rel=0.02)
    assert found["bias"] == pytest.approx([0.09 / power], rel=0.02)
    assert sum(share for (share,) in found.values()) == pytest.approx(1.0)
    assert statistics.snr_db[0] == pytest.approx(10 * np.log10(4.0 / power), abs=0.05)


def test_a_ratio_is_of_peaks_of_either_sign(noise: ModuleType) -> None:
    ranges = StepRanges(
        low=torch.tensor([-6.0, -1.0]),
        high=torch.tensor([2.0, 1.5]),
        samples=torch.zeros(2, 4),
    )
    assert noise.range_ratios({"a": LayerObservation(ranges, ranges)}) == [4.0]


def test_linear_layers_are_told_from_others(noise: ModuleType) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Conv2d(1, 2, 3, bias=False))
    assert noise.linear_share(module) == 12 / (12 + 4 + 18)
