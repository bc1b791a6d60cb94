"""The main job on a tiny model: emit, verify, run, bench, interrupt, resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler
from PIL import Image

from edgeqdm import load, pipeline, run, verify
from edgeqdm.errors import InputError, OutputError, VerifyError
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.sampler import compile_sampler
from edgeqdm.testing.tiny import write_tiny_unet

STEPS = 4


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return load(write_tiny_unet(tmp_path_factory.mktemp("model")), steps=STEPS, scheduler="ddim")


@pytest.fixture(scope="module")
def package(denoiser: Denoiser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packages") / "tiny"
    pipeline.emit(denoiser, out, samples=4)
    return out


def test_a_finished_package_verifies_and_leaves_no_work_behind(package: Path) -> None:
    found = verify(package)
    assert found.kernels.integer == found.planned > 0
    assert [path.name for path in package.parent.iterdir()] == [package.name]


def test_package_runs_where_torch_cannot_be_imported(package: Path, tmp_path: Path) -> None:
    report = run(package, tmp_path / "sheet.png", label="1", count=3, seed=5)
    assert "3 images, seed 5" in report
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size[0] > picture.size[1] > 0


def test_two_runs_with_one_seed_give_one_picture(package: Path, tmp_path: Path) -> None:
    pictures = []
    for name in ("a.png", "b.png"):
        run(package, tmp_path / name, label="2", count=1, seed=9)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"label": "99"}, "out of range"),
        ({"label": "Hat"}, "unknown label"),
        ({"count": 0}, "count"),
    ],
)
def test_wrong_label_or_count_is_named(
    package: Path, tmp_path: Path, options: dict[str, object], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        run(package, tmp_path / "sheet.png", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "sheet.png").exists()


def test_unwritable_picture_is_an_output_error(package: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        run(package, tmp_path / "missing" / "sheet.png")


def test_bench_reports_float_first_and_both_measured(package: Path, denoiser: Denoiser) -> None:
    report = pipeline.bench(package, model=denoiser, rounds=3, images=2)
    floating, ours = report.rows
    assert (floating.name, ours.name) == ("float", "package")
    assert floating.cpu_ratio == 1.0
    assert floating.integer_kernels == 0
    assert ours.integer_kernels == ours.planned_layers > 0
    # ONNX Runtime's float graph against torch: rounding only.
    assert floating.image_sqnr_db is not None
    assert floating.image_sqnr_db > 90.0
    assert ours.image_sqnr_db is not None
    assert 15.0 < ours.image_sqnr_db < floating.image_sqnr_db
    assert report.provenance == "measured"


def test_bench_refuses_a_model_with_another_sampler(package: Path, denoiser: Denoiser) -> None:
    other = replace(denoiser, program=compile_sampler(DDIMScheduler(), STEPS + 1))
    with pytest.raises(InputError, match="sampler"):
        pipeline.bench(package, model=other, rounds=1, images=1)


@pytest.mark.parametrize(("fid", "code"), [(64, "EQ-3602"), (65, "EQ-3601")])
def test_bench_refuses_what_feature_fid_is_not_defined_on_before_it_measures(
    package: Path, denoiser: Denoiser, fid: int, code: str
) -> None:
    stages: list[str] = []
    with pytest.raises(InputError) as caught:
        pipeline.bench(
            package,
            model=denoiser,
            rounds=1,
            fid=fid,
            progress=lambda name, *_: stages.append(name),
        )
    assert (caught.value.code, stages) == (code, [])


@pytest.mark.parametrize("stage", ["trajectories", "observe", "correct", "emit"])
def test_an_interrupted_emit_leaves_nothing_and_resumes(
    denoiser: Denoiser, package: Path, tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "package"

    def interrupt(name: str, done: int, total: int) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.emit(denoiser, out, samples=4, progress=interrupt)
    assert not out.exists()
    stages: list[str] = []
    pipeline.emit(denoiser, out, samples=4, progress=lambda name, *_: stages.append(name))
    if stage in ("correct", "emit"):
        assert "observe" not in stages
    for name in ("model.onnx", "schedule.json", "plan.json"):
        assert (out / name).read_bytes() == (package / name).read_bytes()


def test_existing_folder_is_refused_before_any_work(denoiser: Denoiser, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    stages: list[str] = []
    with pytest.raises(OutputError, match="not a package"):
        pipeline.emit(
            denoiser, tmp_path / "mine", force=True, progress=lambda name, *_: stages.append(name)
        )
    assert not stages
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_one_changed_byte_is_found(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in package.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    verify(copy)
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    with pytest.raises(VerifyError, match=r"model\.onnx"):
        verify(copy)
    with pytest.raises(VerifyError, match=r"model\.onnx"):
        run(copy, tmp_path / "sheet.png")


def test_latents_of_the_runtime_are_those_of_the_same_seed_in_any_batch(
    package: Path, tmp_path: Path
) -> None:
    found = []
    for count in ("1", "3"):
        file = tmp_path / f"{count}.npy"
        arguments = ["--label", "1", "--count", count, "--latents", str(file)]
        pipeline.run_package(package, ["--out", str(tmp_path / "x.png"), *arguments])
        found.append(np.load(file)[0])
    # The same noise; kernels may sum in another order for another batch, which can move a
    # rounding half-tie: allow a few codes of the tiny model's output.
    assert np.mean(np.abs(found[0] - found[1])) < 0.05


def test_doctor_names_what_this_host_has() -> None:
    findings = {finding.what: finding for finding in pipeline.doctor()}
    assert findings["target onnxruntime"].ok
    assert findings["torch"].ok


def test_plan_in_a_package_gives_a_reason_for_every_layer(package: Path) -> None:
    plan = json.loads((package / "plan.json").read_text())
    layers = plan["phases"][0]["layers"]
    assert all(layer["reason"].startswith(layer["precision"]) for layer in layers)
    assert {layer["precision"] for layer in layers} == {"w8a8", "fp32", "table"}
