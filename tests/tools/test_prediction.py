"""Predictions are compared with measurements of plans that no fit has seen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgeqdm import tuning
from edgeqdm.ir.codec import read_record
from edgeqdm.ir.precision import FP32, TABLE, W8A8, Precision
from edgeqdm.ir.profile import Flag, KitManifest, LatencyProfile, PhaseCost, WholeGraph
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.profile import host
from edgeqdm.profile.kit import KIT, KitRequest
from edgeqdm.profile.predict import LatencyModel, count_forks
from edgeqdm.profile.requests import full_request

FIELDS = {
    "plans",
    "speed",
    "as_it_is",
    "at_this_speed",
    "among",
    "left_out_of_the_fit",
    "predicted_us",
    "measured_us",
    "flagged",
}
AMONG_US = 30.0
positive = st.lists(st.floats(1.0, 1e6), min_size=1, max_size=8)


def key_of(precisions: Mapping[str, Precision]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((layer, str(each)) for layer, each in precisions.items()))


@dataclass
class Bench:
    """Times what kits hold without running it: `factor` times what the sums say.

    Attributes:
        factor: how much slower this device is than its profile says.
        made: requests of kits, by folder.
        timed: folders, one per run.
        flags: of the timings, by the place of a plan.
    """

    denoiser: Denoiser
    profile: LatencyProfile
    factor: float = 1.0
    made: dict[Path, KitRequest] = field(default_factory=dict)
    timed: list[Path] = field(default_factory=list)
    flags: dict[int, tuple[Flag, ...]] = field(default_factory=dict)

    @cached_property
    def space(self) -> tuning.Space:
        return tuning.open_space(self.denoiser)

    @cached_property
    def latency(self) -> LatencyModel:
        return tuning.cost_model(self.profile, self.space).latency

    def make_kit(self, _: Denoiser, __: object, request: KitRequest, out: Path) -> None:
        out.mkdir(parents=True)
        (out / KIT).touch()
        self.made[out] = request

    def run_kit(self, kit: Path, **_: object) -> LatencyProfile:
        assert list(kit.glob("results-*.jsonl")) == []
        (kit / "results-1.jsonl").touch()
        self.timed.append(kit)
        wholes = [self._timed(k, each) for k, each in enumerate(self.made[kit].wholes)]
        phases = [self.among(*pair) for pair in self.made[kit].pairs]
        return self.profile.model_copy(
            update={"wholes": tuple(wholes), "phase_costs": tuple(phases)}
        )

    def among(self, first: Mapping[str, Precision], other: Mapping[str, Precision]) -> PhaseCost:
        """Takes `AMONG_US` longer than alone."""
        alone = self._timed(-1, first).timing
        us = alone.median_us + self.factor * AMONG_US
        found = {"median_us": us, "p10_us": us, "p90_us": us, "ci95_us": (us, us)}
        return PhaseCost(
            model=self.space.network.model,
            batch=1,
            precisions=dict(first),
            other=dict(other),
            provenance="measured",
            alone=alone,
            among=alone.model_copy(update=found),
        )

    def _timed(self, place: int, precisions: Mapping[str, Precision]) -> WholeGraph:
        us = self.factor * self.latency.predict_us(precisions)
        like = self.profile.wholes[0]
        found = {"median_us": us, "p10_us": us, "p90_us": us, "ci95_us": (us, us)}
        timing = like.timing.model_copy(update={**found, "flags": self.flags.get(place, ())})
        return like.model_copy(update={"precisions": dict(precisions), "timing": timing})


@pytest.fixture
def bench(
    prediction: ModuleType,
    denoiser: Denoiser,
    profile: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    made = Bench(denoiser, profile)
    monkeypatch.setattr(prediction, "load", lambda *_, **__: denoiser)
    monkeypatch.setattr(prediction, "make_kit", made.make_kit)
    monkeypatch.setattr(prediction, "run_kit", made.run_kit)
    return made


# The errors.


def test_errors_by_hand(prediction: ModuleType) -> None:
    found = prediction.errors([110.0, 60.0, 50.0], [100.0, 80.0, 50.0])
    assert found == {"mean": pytest.approx(0.35 / 3), "worst": pytest.approx(0.25)}


@given(positive)
def test_what_is_predicted_exactly_has_no_error(prediction: ModuleType, times: list[float]) -> None:
    assert prediction.errors(times, times) == {"mean": 0.0, "worst": 0.0}


@given(positive, st.floats(0.5, 2.0), st.data())
def test_errors_are_relative_and_the_mean_is_never_above_the_worst(
    prediction: ModuleType, times: list[float], factor: float, data: st.DataObject
) -> None:
    same_length = st.lists(st.floats(1.0, 1e6), min_size=len(times), max_size=len(times))
    predicted = data.draw(same_length)
    found = prediction.errors(predicted, times)
    # The mean of equal numbers may differ from them in the last place.
    assert 0 <= found["mean"] <= found["worst"] * (1 + 1e-12)
    rescaled = prediction.errors([factor * us for us in predicted], [factor * us for us in times])
    # An error near 0 is the difference of two numbers near 1.
    assert rescaled == pytest.approx(found, rel=1e-9, abs=1e-12)


@given(positive, st.floats(0.1, 10.0))
def test_a_constant_factor_is_the_error_of_every_plan(
    prediction: ModuleType, times: list[float], factor: float
) -> None:
    found = prediction.errors([factor * us for us in times], times)
    assert found["mean"] == pytest.approx(abs(factor - 1), abs=1e-12)
    assert found["worst"] == pytest.approx(abs(factor - 1), abs=1e-12)


# What is measured.


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.8])
def test_a_device_that_is_slower_throughout_is_predicted_at_its_speed(
    prediction: ModuleType, bench: Bench, tmp_path: Path, factor: float
) -> None:
    bench.factor = factor
    found = prediction.measured("dit", bench.profile, 3, 0.02, tmp_path)
    assert found["speed"] == pytest.approx(factor)
    assert found["at_this_speed"] == pytest.approx({"mean": 0.0, "worst": 0.0}, abs=1e-9)
    off = abs(1 / factor - 1)
    assert found["as_it_is"] == pytest.approx({"mean": off, "worst": off}, abs=1e-9)


@pytest.mark.parametrize("charged", [0.0, 30.0])
def test_phases_are_predicted_with_what_the_profile_says_they_cost(
    prediction: ModuleType, bench: Bench, tmp_path: Path, charged: float
) -> None:
    bench.factor = 2.0
    if charged:
        pair = bench.among(bench.profile.wholes[0].precisions, {})
        dearer = {field: charged + 1.0 for field in ("median_us", "p90_us")}
        one = {"median_us": 1.0, "p10_us": 1.0, "p90_us": 1.0, "ci95_us": (1.0, 1.0)}
        alone = pair.alone.model_copy(update=one)
        among = alone.model_copy(update={**dearer, "ci95_us": (1.0, charged + 1.0)})
        pair = pair.model_copy(update={"alone": alone, "among": among})
        bench.profile = bench.profile.model_copy(update={"phase_costs": (pair,)})
    found = prediction.measured("dit", bench.profile, 3, 0.02, tmp_path)["among"]
    (request,) = bench.made.values()
    drawn = request.wholes[-3:]
    assert list(request.pairs) == list(itertools.pairwise(drawn))
    sums = [bench.latency.predict_us(first) for first, _ in request.pairs]
    network = bench.space.network
    per_fork = charged / count_forks(network, [bench.profile.wholes[0].precisions, {}])
    forked = [per_fork * count_forks(network, pair) for pair in request.pairs]
    missing = abs(
        np.array([(f - AMONG_US) / (us + AMONG_US) for f, us in zip(forked, sums, strict=True)])
    )
    assert found["pairs"] == 2
    expected = {"mean": float(missing.mean()), "worst": float(missing.max())}
    assert found["at_this_speed"] == pytest.approx(expected, abs=1e-9)


def test_sums_that_are_exact_leave_no_error_out_of_the_fit(
    prediction: ModuleType, bench: Bench, tmp_path: Path
) -> None:
    found = prediction.measured("dit", bench.profile, 2, 0.02, tmp_path)["left_out_of_the_fit"]
    mixed = [w for w in bench.profile.wholes if len(set(w.precisions.values())) > 1]
    assert found["n"] == len(mixed) >= 3
    assert found["worst"] == pytest.approx(0.0, abs=1e-9)


def test_only_random_plans_count_and_the_float_graph_gives_the_speed(
    prediction: ModuleType, bench: Bench, tmp_path: Path
) -> None:
    found = prediction.measured("dit", bench.profile, 3, 0.02, tmp_path)
    (request,) = bench.made.values()
    n_uniform = len(dict.fromkeys(p for each in bench.space.offered.values() for p in each))
    assert len(request.wholes) == n_uniform + 3
    expected = [bench.latency.predict_us(each) for each in request.wholes[n_uniform:]]
    # Written to one decimal.
    assert found["predicted_us"] == pytest.approx(expected, abs=0.051)
    assert (found["plans"], len(found["measured_us"])) == (3, 3)
    assert set(request.wholes[0].values()) <= {FP32, TABLE}


def test_flagged_timings_are_counted(prediction: ModuleType, bench: Bench, tmp_path: Path) -> None:
    bench.flags = {0: (Flag.NOISY, Flag.UNSTABLE), 7: (Flag.NOISY,)}
    assert prediction.measured("dit", bench.profile, 2, 0.02, tmp_path)["flagged"] == 2


def test_the_same_plans_are_drawn_every_time_and_more_of_them_begin_alike(
    prediction: ModuleType, bench: Bench, tmp_path: Path
) -> None:
    for folder, n in (("one", 3), ("two", 3), ("three", 5)):
        prediction.measured("dit", bench.profile, n, 0.02, tmp_path / folder)
    one, two, three = (request.wholes for request in bench.made.values())
    assert one == two == three[: len(one)]


def test_no_mixed_plan_is_one_that_a_profile_is_fitted_to(
    prediction: ModuleType, bench: Bench, tmp_path: Path
) -> None:
    prediction.measured("dit", bench.profile, 20, 0.02, tmp_path)
    space = bench.space
    (request,) = bench.made.values()
    fitted = full_request(space.network, space.offered, tables=space.tables).wholes
    seen = {key_of(each) for each in fitted}
    # Plans of one precision are timed too, and may be drawn.
    mixed = [each for each in request.wholes if len({*each.values()} - {TABLE}) > 1]
    drawn = [each for each in mixed if each not in request.wholes[:6]]
    assert len(drawn) > 10
    assert all(key_of(each) not in seen for each in drawn)


def test_a_kit_is_made_once_and_timed_anew_every_time(
    prediction: ModuleType, bench: Bench, tmp_path: Path
) -> None:
    for _ in range(2):
        prediction.measured("dit", bench.profile, 2, 0.02, tmp_path)
    assert len(bench.made) == 1
    assert bench.timed == [*bench.made] * 2


def test_plans_of_another_seed_are_not_those_of_a_kit_that_is_there(
    prediction: ModuleType, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prediction.measured("dit", bench.profile, 3, 0.02, tmp_path)["predicted_us"]
    monkeypatch.setattr(prediction, "SEED", prediction.SEED + 1)
    anew = prediction.measured("dit", bench.profile, 3, 0.02, tmp_path / "new")["predicted_us"]
    assert anew != first
    again = prediction.measured("dit", bench.profile, 3, 0.02, tmp_path)["predicted_us"]
    assert again == anew


# End to end.


def command(prediction: ModuleType) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(prediction.main)
    return app


def written(
    prediction: ModuleType,
    denoiser: Denoiser,
    profile: LatencyProfile,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """The report of two plans, measured on this host."""
    asked: list[str] = []

    def load(source: str, **_: object) -> Denoiser:
        asked.append(source)
        return denoiser

    monkeypatch.setattr(prediction, "load", load)
    # Every precision more is one more graph to export.
    few = partial(tuning.open_space, precisions=(FP32, W8A8))
    monkeypatch.setattr(tuning, "open_space", few)
    # Else a graph is timed for seconds where this host is not quiet.
    monkeypatch.setattr(host, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(prediction, "read_profile", lambda _: SimpleNamespace(profile=profile))
    out = folder / "deep" / "prediction.json"
    options = ["-o", str(out), "--work", str(folder), "--model", "dit-fmnist"]
    options += ["--plans", "2", "--seconds", "0.01", "--profile", "made_up"]
    result = CliRunner().invoke(command(prediction), options, catch_exceptions=False)
    assert result.exit_code == 0
    assert asked == ["reference:dit-fmnist"]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_report_holds_what_was_measured(
    prediction: ModuleType,
    denoiser: Denoiser,
    profile: LatencyProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = written(prediction, denoiser, profile, tmp_path, monkeypatch)
    assert set(report) == {"command", "commit", "machine", "profile", "models"}
    assert report["profile"] == "made_up"
    assert {"cpu", "system", "libraries"} <= set(report["machine"])
    found = report["models"]["dit-fmnist"]
    assert set(found) == FIELDS
    (kit,) = tmp_path.glob("prediction-*")
    wholes = [g for g in read_record(kit / KIT, KitManifest).graphs if g.role == "whole"]
    space = tuning.open_space(denoiser)
    latency = tuning.cost_model(profile, space).latency
    sums = [latency.predict_us(graph.precisions) for graph in wholes[-2:]]
    assert found["predicted_us"] == pytest.approx(sums, abs=0.051)
    assert found["plans"] == len(found["measured_us"]) == 2
    assert min(found["measured_us"]) > 0
    assert 0 <= found["flagged"] <= len(wholes)
    predicted, measured = np.array(found["predicted_us"]), np.array(found["measured_us"])
    for name, factor in (("as_it_is", 1.0), ("at_this_speed", found["speed"])):
        again = prediction.errors((factor * predicted).tolist(), measured.tolist())
        # Of times written to 0.1 us, some of which are a few hundred only.
        assert found[name] == pytest.approx(again, rel=0.01, abs=0.001)
