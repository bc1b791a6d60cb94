"""The comparison with other quantizers measures every row on one float graph."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from edgeqdm import load, pipeline
from edgeqdm.errors import InputError
from edgeqdm.ir.precision import ActivationPolicy
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.testing.tiny import write_tiny_dit

STEPS = 2
OURS = ("edgeqdm, constant scales", "edgeqdm, scales per step")
PEERS = (
    "static QDQ, all ops, per tensor",
    "static QDQ, Conv/MatMul/Gemm",
    "the same, first/last/embedding float",
    "dynamic",
)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return load(write_tiny_dit(tmp_path_factory.mktemp("model")), steps=STEPS)


def test_our_rows_are_the_default_and_the_same_with_constant_scales(
    peers: ModuleType, denoiser: Denoiser
) -> None:
    constant, stepwise = peers.our_plans(denoiser, "onnxruntime").values()
    assert stepwise == pipeline.rule_plan(denoiser)
    ours = [plan.phases[0].layers for plan in (constant, stepwise)]
    for one, other in zip(*ours, strict=True):
        assert (one.layer, one.precision) == (other.layer, other.precision)
    policies = [{x.policy for x in layers if x.precision.integer} for layers in ours]
    assert policies == [{ActivationPolicy.STATIC}, {ActivationPolicy.TEMPORAL}]


def test_every_row_is_measured_or_says_why_not(
    peers: ModuleType, denoiser: Denoiser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = peers.measure(denoiser, samples=2, images=2, fid=0, rounds=1, work=tmp_path)
    rows = {row.name: row for row in found["report"].rows}
    assert list(rows)[:3] == ["float", *OURS]
    assert {*rows, *found["errors"]} == {"float", *OURS, *PEERS}
    for name in OURS:
        assert rows[name].integer_kernels == rows[name].planned_layers > 0
    assert all(rows[name].integer_kernels > 0 for name in PEERS if name in rows)
    assert set(found["output_sqnr_db"]) == set(rows)
    assert {len(found["output_sqnr_db"][name]) for name in rows} == {STEPS}
    peers.show(found["report"], {"absent": "why [it] failed"}, found["output_sqnr_db"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in rows)
    assert "absent: failed: why [it] failed" in shown


def test_images_that_feature_fid_is_not_defined_on_are_refused_first(
    peers: ModuleType, denoiser: Denoiser, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="EQ-3601"):
        peers.measure(denoiser, samples=2, images=2, fid=65, rounds=1, work=tmp_path)
    assert list(tmp_path.iterdir()) == []
