"""The timing protocol, not the times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgeqdm.bench import latency
from edgeqdm.bench.latency import WARM_SECONDS, WARM_UP_ROUNDS, time_interleaved


class Clock:
    """CPU time that passes only in calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(latency.time, "thread_time", lambda: self.now)

    def variant(self, name: str, first: float, later: float) -> Callable[[], None]:
        """Takes `first` seconds after another variant, else `later`."""

        def call() -> None:
            self.now += later if self.calls and self.calls[-1] == name else first
            self.calls.append(name)

        return call


def test_every_variant_has_a_turn_in_every_round_in_changing_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    variants = {name: clock.variant(name, 1.0, 0.5) for name in "abc"}
    timings = time_interleaved(variants, rounds=20)
    rounds = [clock.calls[k : k + 6] for k in range(0, len(clock.calls), 6)]
    assert len(rounds) == WARM_UP_ROUNDS + 20
    assert all(one[::2] == one[1::2] and sorted(one[::2]) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert all(timing.n == 20 for timing in timings.values())


def test_what_a_turn_begins_with_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow, fast = clock.variant("slow", 3.0, 1.0), clock.variant("fast", 0.004, 0.001)
    timings = time_interleaved({"slow": slow, "fast": fast}, rounds=4)
    for name, us in (("slow", 1e6), ("fast", 1e3)):
        assert [timings[name].p25_us, timings[name].p75_us] == pytest.approx([us, us])
    turns = clock.calls.count("slow") / 2
    # One of 4 ms if others ran before, then 1 ms each until 10 ms are over; and one that is timed.
    assert 8 <= clock.calls.count("fast") / turns <= WARM_SECONDS / 0.001 + 2


def test_percentiles_are_ordered() -> None:
    timing = time_interleaved({"sum": lambda: sum(range(1000))}, rounds=9)["sum"]
    assert 0 <= timing.p25_us <= timing.p50_us <= timing.p75_us
