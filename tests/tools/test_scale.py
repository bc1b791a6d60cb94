"""The scale benchmark goes from weights to a verified package and says what each stage took."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from edgeqdm.errors import VerifyError
from edgeqdm.ir.plan import DeploymentPlan

HEAD = {"commit": "a", "machine": {"cores": 2}, "settings": {"size": "tiny"}}


def test_row_goes_from_weights_to_a_verified_package(scale: ModuleType, tmp_path: Path) -> None:
    """I8: memory is the process's own peak, sizes are those of the files."""
    scale.build(scale.MODELS["dit-xl-2"], "tiny", tmp_path)
    folder = tmp_path / "w8a8"
    folder.mkdir()
    row = scale.measure("dit-xl-2", "w8a8", "tiny", 2, 1, folder)
    assert [stage["name"] for stage in row["stages"]] == [
        "load",
        "trajectories",
        "observe",
        "plan",
        "quantize",
        "assemble",
        "store",
        "golden run",
        "lower",
        "write",
    ]
    assert row["peak_gib"] == max(stage["peak_gib"] for stage in row["stages"]) > 0
    for name, file in (("stored", "quantized.safetensors"), ("graph", "package/model.onnx")):
        # Written to one decimal.
        size = (folder / file).stat().st_size / 2**20
        assert row[f"{name}_mib"] == pytest.approx(size, abs=0.051)
    assert row["stored_mib"] < row["float32_mib"] / 2
    checked = scale.check("dit-xl-2", "w8a8", folder)
    assert checked["integer_kernels"] == row["integer_layers"] > 0


def test_the_peak_of_a_stage_is_what_it_held_at_most(scale: ModuleType) -> None:
    """I8."""
    stages = scale.Stages("a process")
    stages.begin("holds and lets go")
    # Pages count once they are written.
    held = np.ones(2**28, np.uint8)
    del held
    stages.begin("holds little")
    stages.end()
    if not stages.own_peaks:
        pytest.skip("this system does not start peaks of memory anew")
    large, small = stages.report()["stages"]
    assert large["peak_gib"] > large["end_gib"] + 0.2
    assert small["peak_gib"] < large["peak_gib"] - 0.2


class Planned(Exception):  # noqa: N818
    """Ends a measurement once its plan is made."""


def test_plan_has_the_choices_that_emit_makes(
    scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as layers that keep 8-bit weights, one here."""
    wide, found = "transformer_blocks.0.attn1.to_q", []

    def stop(_: Any, plan: DeploymentPlan, __: Any) -> None:
        found.append(plan)
        raise Planned

    scale.build(scale.MODELS["dit-xl-2"], "tiny", tmp_path)
    monkeypatch.setattr("edgeqdm.stages.most_reused", lambda *_: (wide,))
    monkeypatch.setattr(scale, "initialise", stop)
    with pytest.raises(Planned):
        scale.measure("dit-xl-2", "w4a8", "tiny", 2, 1, tmp_path / "w4a8")
    precisions = {a.layer: a.precision for a in found[0].phases[0].layers}
    assert precisions.pop(wide) == "w8a8"
    assert set(precisions.values()) == {"w4a8", "fp32", "w8", "table"}


def test_an_unknown_size_is_refused(
    scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or the full model would be measured.
    monkeypatch.setattr(scale, "run_row", pytest.fail)
    result = CliRunner().invoke(command(scale), ["--size", "tinny", "-o", str(tmp_path / "x.json")])
    assert result.exit_code == 2
    assert "there is no size 'tinny'; known: full, quarter, tiny" in result.output
    assert list(tmp_path.iterdir()) == []


def command(scale: ModuleType) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(scale.main)
    return app


def test_a_row_that_failed_is_tried_again(
    scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tried = tmp_path / "scale.json", []
    verified = {"stages": [], "check": {"stages": []}}
    failed: dict[str, Any] = {"stages": [], "check": {"error": "killed"}}
    rows = {"dit-xl-2 w8a8": verified, "dit-xl-2 w4g128a8dyn": failed}
    settings = {"size": "tiny", "steps": 2, "samples": 2, "threads": 2}
    of_here = {"commit": scale.reports.commit(), "machine": scale.reports.machine()}
    head = {**of_here, "settings": settings}
    out.write_text(json.dumps({**head, "rows": rows}))

    def run_row(name: str, precision: str, *_: Any) -> dict[str, Any]:
        tried.append(f"{name} {precision}")
        return verified

    monkeypatch.setattr(scale, "run_row", run_row)
    options = ["--size", "tiny", "--model", "dit-xl-2", "--work", str(tmp_path), "-o", str(out)]
    for _ in range(2):
        assert CliRunner().invoke(command(scale), options).exit_code == 0
    assert tried == ["dit-xl-2 w4g128a8dyn"]
    assert json.loads(out.read_text())["rows"] == dict.fromkeys(rows, verified)


def test_task_that_fails_is_a_result(scale: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"name": "dit-xl-2", "precision": "w8a8", "folder": "nowhere"}
    with pytest.raises(VerifyError):
        scale.do_task(json.dumps(["check", given, 1]))
    assert capsys.readouterr().out.startswith("VerifyError: error[EQ-8301]")


def test_rows_of_the_same_conditions_are_kept(scale: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    assert scale.kept(out, HEAD)["rows"] == {}
    out.write_text(json.dumps({**HEAD, "rows": {"a": {}}}))
    assert scale.kept(out, HEAD)["rows"] == {"a": {}}
    assert scale.kept(out, {**HEAD, "commit": "b"})["rows"] == {}


@pytest.mark.parametrize("name", ["dit-xl-2", "sd15-unet"])
def test_every_size_is_an_architecture(scale: ModuleType, name: str) -> None:
    model = scale.MODELS[name]
    for size in ("full", *model.smaller):
        with scale.torch.device("meta"):
            network = model.family(**model.sized(size))
        assert sum(p.numel() for p in network.parameters()) > 0
