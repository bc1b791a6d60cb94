"""When a measurement is finished, and which series are flagged."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeqdm.ir.profile import Flag
from edgeqdm.profile import protocol
from edgeqdm.profile.protocol import drift, finished, flags_of, median_interval, throttled

Series = NDArray[np.float64]
samples = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=200)
SIMULATIONS = 1000


def quiet(n: int, *, median: float = 100.0) -> Series:
    """Samples within 0.2 % of their median, in no order."""
    return np.random.default_rng(n).permutation(np.linspace(0.998, 1.002, n)) * median


def flags(*rounds: Series) -> set[str]:
    return set(flags_of([each.tolist() for each in rounds]))


@pytest.mark.parametrize("n", [6, 7, 10, 11, 30, 31, 90, 255, 1000, 3001])
def test_the_interval_holds_the_median_as_often_as_the_binomial_says(n: int) -> None:
    """Of 0, 1, ..., n - 1 an order statistic is its own rank."""
    low, high = map(int, median_interval(list(range(n))))
    # The median lies between two ranks if more than the lower and at most the upper are below it.
    covered = sum(math.comb(n, below) for below in range(low + 1, high + 1)) / 2**n
    assert covered >= 0.95
    assert low == n - 1 - high
    if n >= protocol.MIN_RUNS:
        assert covered <= 0.99


def test_the_interval_holds_the_true_median_of_skewed_times_in_93_of_100_series() -> None:
    generator = np.random.default_rng(0)
    for n in (30, 90):
        times = 100.0 * np.exp(0.3 * generator.standard_normal((SIMULATIONS, n)))
        intervals = np.array([median_interval(series.tolist()) for series in times])
        assert np.mean((intervals[:, 0] <= 100.0) & (intervals[:, 1] >= 100.0)) >= 0.93


@given(samples, st.randoms(use_true_random=False))
def test_the_interval_is_two_samples_around_the_median_in_whatever_order(
    times: list[float], order: object
) -> None:
    low, high = median_interval(times)
    assert low in times
    assert high in times
    assert low <= np.median(times) <= high
    assert median_interval(sorted(times, reverse=True)) == (low, high)


@given(samples, st.sampled_from([0.5, 2.0, 1024.0]))
def test_the_interval_scales_with_the_samples(times: list[float], factor: float) -> None:
    low, high = median_interval(times)
    assert median_interval([factor * t for t in times]) == (factor * low, factor * high)


def test_fewer_than_30_runs_are_never_enough() -> None:
    assert not finished([100.0] * (protocol.MIN_RUNS - 1))
    assert finished([100.0] * protocol.MIN_RUNS)


def test_a_median_is_known_when_half_its_interval_is_within_the_target() -> None:
    times = quiet(200)
    low, high = median_interval(times.tolist())
    relative = (high - low) / 2 / float(np.median(times))
    assert finished(times.tolist(), ci_target=1.001 * relative)
    assert not finished(times.tolist(), ci_target=0.999 * relative)


def test_a_quiet_series_has_no_flags() -> None:
    assert flags(quiet(60), quiet(60), quiet(60)) == set()


STEADY = [100.0, 101.0]
"""Of the reference graph."""


def simulated(generator: np.random.Generator, n: int, *, slower: float) -> list[list[float]]:
    """One round; deviations of 4 %, just under what counts as noisy."""
    grown = np.linspace(1.0, 1.0 + slower, n)
    series: list[float] = (100.0 * grown * np.exp(0.04 * generator.standard_normal(n))).tolist()
    return [series]


@pytest.mark.parametrize("n", [60, 90, 200])
def test_a_device_that_slows_by_a_tenth_is_found_and_a_steady_one_is_not(n: int) -> None:
    """Of one graph alone, which is the least there can be."""
    generator = np.random.default_rng(n)
    found = {0.0: 0, 0.1: 0}
    for slower in found:
        for _ in range(SIMULATIONS):
            drifted = drift(simulated(generator, n, slower=slower))
            assert drifted is not None
            found[slower] += throttled([drifted], STEADY)
    assert found[0.1] >= 0.95 * SIMULATIONS
    assert found[0.0] <= 0.06 * SIMULATIONS


def test_a_drift_is_the_ratio_of_the_last_third_to_the_first_in_the_median_round() -> None:
    steps = [np.repeat([100.0, 100.0, 100.0 * ratio], 20).tolist() for ratio in (0.9, 1.04, 1.5)]
    assert drift(steps) == pytest.approx(1.04, rel=1e-12)


def test_short_rounds_are_not_searched_for_a_drift() -> None:
    rising = np.linspace(100.0, 120.0, protocol.DRIFT_RUNS).tolist()
    assert drift([rising[:-1]]) is None
    assert drift([rising[:-1], rising]) == drift([rising])


def test_graphs_that_drift_alone_are_no_throttling_and_all_together_are() -> None:
    assert not throttled([1.0, 1.3, 1.0, 1.01, 1.2], STEADY)
    assert throttled([1.04, 1.05, 1.3, 1.04, 1.01], STEADY)
    assert not throttled([], STEADY)


@pytest.mark.parametrize(("last", "told"), [(100.0, False), (109.9, False), (110.1, True)])
def test_a_reference_that_grew_a_tenth_slower_is_throttling(last: float, told: bool) -> None:
    assert throttled([], [100.0, 103.0, last]) == told


def test_rounds_that_differ_are_unstable_and_have_no_drift() -> None:
    rounds = quiet(60), quiet(60, median=106.0), quiet(60, median=112.0)
    assert "unstable" in flags(*rounds)
    # A third of a quiet round: medians of 20 of its 60 samples.
    assert drift([each.tolist() for each in rounds]) == pytest.approx(1.0, abs=0.001)


@pytest.mark.parametrize(("median", "told"), [(104.9, False), (105.2, True), (95.4, False)])
def test_medians_of_rounds_may_differ_by_5_percent(median: float, told: bool) -> None:
    found = flags(quiet(61), quiet(61, median=median), quiet(61))
    assert ("unstable" in found) == told


def test_a_single_interrupt_is_not_noise() -> None:
    for n in (30, 60, 200):
        interrupted = quiet(n)
        interrupted[n // 2] = 10_000.0
        assert flags(interrupted) == set()


@pytest.mark.parametrize(("distance", "told"), [(8.5, False), (8.8, True)])
def test_a_standard_deviation_above_5_percent_is_noisy(distance: float, told: bool) -> None:
    """A third of the samples is `distance` percent away: the deviation is distance / sqrt(3)."""
    times = np.repeat([100.0, 100.0 - distance, 100.0 + distance], [200, 50, 50])
    assert ("noisy" in flags(times)) == told


@pytest.mark.parametrize(("other", "told"), [(106.0, False), (106.4, True)])
def test_samples_around_two_values_are_noisy(other: float, told: bool) -> None:
    """Half their distance, over the mean of the two: 2.9 % and 3.1 %."""
    assert ("noisy" in flags(np.tile([100.0, other], 60))) == told


def test_a_median_that_is_not_known_well_enough_is_flagged() -> None:
    few = quiet(29)
    assert flags(few) == {"ci_not_reached"}
    wide = 100.0 * np.exp(0.04 * np.random.default_rng(0).standard_normal(40))
    assert "ci_not_reached" in flags(wide)
    rounds = [wide.tolist()]
    assert "ci_not_reached" not in flags_of(rounds, ci_target=0.1)


@given(st.lists(st.lists(st.floats(0.01, 1e6), min_size=3, max_size=80), min_size=1, max_size=4))
def test_flags_are_known_to_profiles_and_do_not_depend_on_the_unit(
    rounds: list[list[float]],
) -> None:
    found = flags_of(rounds)
    assert {Flag(name) for name in found} <= set(Flag)
    doubled = [[2.0 * value for value in each] for each in rounds]
    assert flags_of(doubled) == found


def test_the_file_needs_nothing_but_numpy() -> None:
    blocked = ("torch", "edgeqdm", "onnx", "onnxruntime", "pydantic")
    start = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r})); "
        "sys.exit(not runpy.run_path(sys.argv[1])['finished']([1.0] * 30))"
    )
    path = Path(protocol.__file__)
    done = subprocess.run([sys.executable, "-I", "-c", start, str(path)], check=False)
    assert done.returncode == 0
