"""The timing protocol, not the times."""

from __future__ import annotations

from edgeqdm.bench.latency import WARM_UP_ROUNDS, time_interleaved


def test_every_variant_is_called_once_per_round_in_changing_order() -> None:
    calls: list[str] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = time_interleaved(variants, rounds=20)
    rounds = [calls[k : k + 3] for k in range(0, len(calls), 3)]
    assert len(rounds) == WARM_UP_ROUNDS + 20
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert all(timing.n == 20 for timing in timings.values())


def test_percentiles_are_ordered() -> None:
    timing = time_interleaved({"sum": lambda: sum(range(1000))}, rounds=9)["sum"]
    assert 0 <= timing.p25_us <= timing.p50_us <= timing.p75_us
