"""The ablation keeps what belongs together apart, and tells the whole time of resumed work."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from edgeqdm import load, pipeline
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.quantize.finetune import FinetuneSettings
from edgeqdm.testing.tiny import write_tiny_dit

TRAINING = FinetuneSettings(iterations=2, batch=2)


@cache
def tiny(seed: int = 0) -> tuple[Denoiser, pipeline.Calibration, pipeline.Quantization]:
    """A denoiser, its calibration and W8A8 of it."""
    with TemporaryDirectory() as folder:
        denoiser = load(write_tiny_dit(Path(folder), seed=seed), steps=2)
    calibration = pipeline.calibrate(denoiser, samples=4)
    return denoiser, calibration, pipeline.quantize(denoiser, calibration)


@pytest.mark.parametrize("names", [["no such row"], ["+ groups", "+ bits by step"]])
def test_a_name_that_no_row_has_is_refused(
    ablation: ModuleType, tmp_path: Path, names: list[str]
) -> None:
    """Here only 4-bit activations are chosen by step."""
    chosen = ["--model", "dit-fmnist", "--width", "w4a8"]
    chosen += [word for name in names for word in ("--row", name)]
    paths = ["-o", str(tmp_path / "x.json"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(ablation.app, ["table", *chosen, *paths])
    assert result.exit_code == 2
    # Shown in a frame that breaks lines.
    shown = " ".join(result.output.replace("│", " ").split())
    assert f"no row is named '{names[-1]}'; known: round to nearest, min-max; " in shown
    assert list(tmp_path.iterdir()) == []


def test_float_images_of_one_model_are_not_those_of_another(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "IMAGE_SEEDS", (5,))

    def measured(seed: int, work: Path) -> dict[str, Any]:
        work.mkdir(exist_ok=True)
        found: dict[str, Any] = ablation.measure_images(
            tiny(seed)[2].quantized, None, work, {"images": 1}
        )
        return found

    shared, alone = tmp_path / "shared", tmp_path / "alone"
    measured(0, shared)
    assert measured(1, shared) == measured(1, alone)
    kept = {path.name for path in shared.iterdir()}
    measured(1, shared)
    assert {path.name for path in shared.iterdir()} == kept
    assert len(kept) == 2


def test_the_time_of_a_kept_selection_is_told_again(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])

    def select_samples(*_: Any) -> None:
        clock[0] += 60.0

    # The one that is timed; what reconstruction sees comes from the stage's own.
    monkeypatch.setattr(pipeline, "select_samples", select_samples)
    denoiser, calibration, _ = tiny()
    row = ablation.Row("one", groups=False, reconstruct="even")
    options = {"iterations": 1, "batch": 2}
    for _ in range(2):
        found, minutes = ablation.quantize_timed(
            denoiser, calibration, "w8a8", row, tmp_path, options
        )
        assert found.blocks
        assert minutes == 1.0


def test_rows_made_with_other_methods_are_made_again(ablation: ModuleType, tmp_path: Path) -> None:
    last = ablation.rows_of("dit-fmnist", "w4a8")[-1]
    task = ablation.Task("dit-fmnist", "w4a8", 0.0, last)
    plain = ablation.Task("dit-fmnist", "float", 0.0, None)
    report = {"options": {}, "rows": {}}
    file = tmp_path / "ablation.json"
    progress = ablation.Progress(report, file, 2)
    found = {
        "image_sqnr_db": [1.0, 2.0],
        "median_image_sqnr_db": [1.0, 2.0],
        "feature_fid": 0.25,
    }
    for each in (task, plain):
        progress.finish(each, found)
    assert ablation.read_report(file, {})["rows"].keys() == {task.key, plain.key}
    without = {name: value for name, value in found.items() if name != "feature_fid"}
    for other in (
        found | {"methods": {**task.methods, "matched": False}},
        found | {"methods": task.methods, "error": "interrupted"},
        without | {"methods": task.methods},
    ):
        stored = json.loads(file.read_text())
        stored["rows"][task.key] = other
        (tmp_path / "other.json").write_text(json.dumps(stored))
        assert ablation.read_report(tmp_path / "other.json", {})["rows"].keys() == {plain.key}


def test_a_change_goes_with_the_row_it_is_against(ablation: ModuleType, tmp_path: Path) -> None:
    names = [row.name for row in ablation.rows_of("dit-fmnist", "w4a8")[:3]]
    keys = [f"dit-fmnist/w4a8/eta 0/{name}" for name in names]
    measured = {"image_sqnr_db": [1.0, 2.0], "median_image_sqnr_db": [1.0, 2.0]}
    report = {"rows": {key: dict(measured) for key in keys}}
    ablation.write_report(report, tmp_path / "x.json")
    assert all("against_before" in report["rows"][key] for key in keys[1:])
    report["rows"][keys[1]] = {"error": "no memory"}
    ablation.write_report(report, tmp_path / "x.json")
    assert report["rows"][keys[2]] == measured


def test_the_page_tells_what_was_measured_and_nothing_else(
    ablation: ModuleType, tmp_path: Path
) -> None:
    first, searched = ablation.rows_of("dit-fmnist", "w4a8")[:2]
    measured = {
        "commit": "0123456789",
        "image_sqnr_db": [10.0, 11.0, 12.0],
        "image_sqnr_mean_db": 11.0,
        "image_sqnr_spread_db": 2.0,
        "median_image_sqnr_db": [10.0, 11.0, 15.0],
        "output_sqnr_db": 9.0,
        "weight_share": 0.125,
        "quantization_cpu_minutes": 0.5,
        "peak_rss_mb": 100.0,
    }
    better = {"image_sqnr_db": [11.0, 12.5, 13.0], "image_sqnr_mean_db": 12.2}
    fid = {"feature_fid": 0.25, "feature_fid_change": 0.1, "feature_fid_change_spread": 0.02}
    key = "dit-fmnist/w4a8/eta 1/"
    report = {
        "machine": {"cpu": "a processor", "system": "a system"},
        "options": {"images": 64, "fid": 2000, "iterations": 250, "minutes": 6.0},
        "rows": {
            key + first.name: measured | fid,
            key + searched.name: measured | better | {"commit": "abcdef0123-dirty"},
            key + "+ groups": {"error": "no memory", "commit": "9876543210"},
        },
    }
    ablation.write_report(report, tmp_path / "x.json")
    ablation.write_page(report, tmp_path / "x.md")
    page = (tmp_path / "x.md").read_text()
    assert "at 0123456, abcdef0-dirty." in page
    assert page.count("## ") == 1
    assert page.split("|\n", 2)[2] == (
        "| round to nearest, min-max | 11.0 (2.0) | - | 12.0 | 9.0 | 0.250 (+10.0 +- 2.0 %) "
        "| 0.125 | 0.5 | 100 |\n"
        "| + range search | 12.2 (2.0) | +1.17 +- 0.29 dB | 12.0 | 9.0 | - | 0.125 | 0.5 | 100 |\n"
    )
