"""The scale benchmark goes from weights to a verified package and says what each stage took."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgeqdm.errors import VerifyError

FILE = Path(__file__).parents[2] / "tools" / "benchmarks" / "scale.py"
HEAD = {"commit": "a", "machine": {"cores": 2}, "settings": {"size": "tiny"}}


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


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
