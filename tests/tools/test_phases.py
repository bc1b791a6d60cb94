"""What the benchmark of phases measures: graphs that differ where it says, in one process each."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgeqdm.ir.precision import W8A8
from edgeqdm.stages import rule_plan
from edgeqdm.testing.conformance import STEPS, tiny_quantized


@pytest.mark.parametrize("n", [1, 2, 3])
def test_phases_share_all_but_a_few_layers(phases: ModuleType, n: int) -> None:
    rule = rule_plan(tiny_quantized("unet").denoiser)
    plan = phases.in_phases(rule, n)
    assert [phase.start for phase in plan.phases] == [p * STEPS // n for p in range(n)]
    changed = [{a.layer for a in p.layers if a.precision == phases.OTHER} for p in plan.phases]
    assert not changed[0]
    assert all(changed[1:])
    assert len(set().union(*changed)) == sum(map(len, changed))
    kept = {a.layer for a in rule.phases[0].layers if a.precision == W8A8}
    assert set().union(*changed) < kept


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps_rollup")
def test_rows_have_memory_and_ratios(
    phases: ModuleType, forms: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = tiny_quantized("unet").denoiser
    monkeypatch.setattr(phases, "MOST_PHASES", 2)
    monkeypatch.setattr(phases.ort_forms, "open_model", lambda name: denoiser)
    monkeypatch.setattr(phases.ort_forms, "timed", lambda models, *_: dict.fromkeys(models, 2.0))
    inside: list[Path] = []

    def here(graph: Path, n_steps: int, batch: int) -> Any:
        inside.append(graph)
        found = phases.load_and_run(graph, n_steps, batch)
        assert found["resident_mib"] >= found["anonymous_mib"] - 1
        return {**found, "resident_mib": 5.0, "anonymous_mib": 4.0}

    monkeypatch.setattr(phases, "in_own_process", here)
    found = phases.measure("unet-fmnist", 30)["phases"]
    assert [graph.name for graph in inside] == ["1.onnx", "2.onnx"]
    assert found["1"]["forks"] == 0 < found["2"]["forks"]
    assert found["2"]["us_ratio"] == found["2"]["resident_mib_ratio"] == 1.0
    assert found["2"]["file_mib_ratio"] > 1.0
