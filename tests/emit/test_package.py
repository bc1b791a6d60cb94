"""A package holds everything a device needs, says what it is, and appears whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import edgeqdm
from edgeqdm.emit import playback
from edgeqdm.emit.backend import Exportable, File
from edgeqdm.emit.golden import GOLDEN_IMAGES, GOLDEN_SEED, make_golden
from edgeqdm.emit.integrity import check_files
from edgeqdm.emit.package import correction_key, emit_package, exportable
from edgeqdm.errors import InputError, OutputError, UnsupportedError
from edgeqdm.ir.codec import digest, read_record
from edgeqdm.ir.package import Manifest, ScheduleFile
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment
from edgeqdm.ir.precision import W8A8
from edgeqdm.ir.schedule import CorrectedSchedule
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.load import load
from edgeqdm.numerics import philox
from edgeqdm.quantize.quantizer import QuantizedDenoiser
from edgeqdm.testing import tiny
from edgeqdm.testing.conformance import (
    STEPS,
    EagerBackend,
    Emitted,
    quantize_tiny,
    small_denoiser,
)

FILES = {
    "MODEL_CARD.md": "card",
    "golden.safetensors": "golden",
    "model.txt": "model",
    "plan.json": "plan",
    "runtime/python/philox.py": "runtime",
    "runtime/python/playback.py": "runtime",
    "runtime/python/solver.py": "runtime",
    "schedule.bin": "schedule",
    "schedule.json": "schedule",
}


@pytest.fixture(scope="module")
def quantized() -> QuantizedDenoiser:
    return quantize_tiny(small_denoiser(DDPMScheduler(clip_sample=False)), EagerBackend.name)


@pytest.fixture(scope="module")
def emitted(quantized: QuantizedDenoiser, tmp_path_factory: pytest.TempPathFactory) -> Emitted:
    package = tmp_path_factory.mktemp("packages") / "small"
    return Emitted(quantized, package, emit_package(quantized, EagerBackend(quantized), package))


def correction_of(quantized: QuantizedDenoiser) -> CorrectedSchedule:
    channels = quantized.info.sample_shape[0]
    return CorrectedSchedule(
        key=correction_key(quantized),
        gain=(0.9,) * STEPS,
        bias=((0.01,) * channels,) * STEPS,
        noise_std=((0.0,) * channels,) * STEPS,
        clamped=(False,) * STEPS,
    )


def test_manifest_lists_every_file_with_its_role(emitted: Emitted) -> None:
    assert {path: file.role for path, file in emitted.manifest.files.items()} == FILES
    assert check_files(emitted.package) == emitted.manifest


def test_manifest_says_what_the_package_was_made_of(emitted: Emitted) -> None:
    manifest, quantized = emitted.manifest, emitted.quantized
    assert manifest.edgeqdm_version == edgeqdm.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", manifest.created)
    assert (manifest.target, manifest.n_steps, manifest.guidance) == ("eager", STEPS, 2.0)
    assert manifest.model == quantized.info
    assert manifest.integer_layers == 2
    assert manifest.program_sha256 == digest(quantized.denoiser.program)
    assert manifest.plan_sha256 == manifest.files["plan.json"].sha256
    assert set(manifest.library_versions) == {"diffusers", "numpy", "torch", "eager"}
    assert read_record(emitted.package / "manifest.json", Manifest) == manifest


def test_plan_and_schedule_read_back_equal(emitted: Emitted) -> None:
    quantized, package = emitted.quantized, emitted.package
    assert read_record(package / "plan.json", DeploymentPlan) == quantized.plan
    schedule = read_record(package / "schedule.json", ScheduleFile)
    assert schedule.program == quantized.denoiser.program
    assert schedule.guidance == quantized.denoiser.guidance.scale
    assert schedule.decoder == quantized.info.decoder
    assert schedule.correction is None


def test_emitting_twice_differs_in_the_creation_time_only(emitted: Emitted, tmp_path: Path) -> None:
    emit_package(emitted.quantized, EagerBackend(emitted.quantized), tmp_path / "again")
    for relative in FILES:
        one, other = emitted.package / relative, tmp_path / "again" / relative
        assert one.read_bytes() == other.read_bytes(), relative
    manifests = [
        json.loads((folder / "manifest.json").read_text())
        for folder in (emitted.package, tmp_path / "again")
    ]
    for manifest in manifests:
        del manifest["created"], manifest["manifest_sha256"]
    assert manifests[0] == manifests[1]


def test_golden_run_is_a_free_run_of_the_integer_reference(emitted: Emitted) -> None:
    player = playback.open_player(emitted.package)
    golden = playback.read_safetensors(emitted.package / "golden.safetensors")
    shape = (GOLDEN_IMAGES, *player.sample_shape)
    assert golden["initial"].shape == shape
    for name in ("inputs", "outputs", "samples"):
        assert golden[name].shape == (STEPS, *shape)
    initial = philox.batch_normal(GOLDEN_SEED, 0, range(GOLDEN_IMAGES), player.sample_shape)
    np.testing.assert_array_equal(golden["initial"], initial)
    samples = playback.sample(
        player,
        EagerBackend(emitted.quantized).open(emitted.package),
        golden["conditioning"],
        seed=GOLDEN_SEED,
        images=range(GOLDEN_IMAGES),
    )
    np.testing.assert_array_equal(samples, golden["samples"][-1])


def test_golden_noise_is_the_distance_to_the_float_model(emitted: Emitted) -> None:
    player = playback.open_player(emitted.package)
    golden = playback.read_safetensors(emitted.package / "golden.safetensors")
    labels = torch.from_numpy(golden["conditioning"].copy())
    for step in range(STEPS):
        x = torch.from_numpy(golden["inputs"][step].copy())
        f = emitted.quantized.denoiser.predict(x, step, labels).numpy()
        distance = np.sqrt(np.mean(np.square(golden["outputs"][step] - f.astype(np.float64))))
        assert player.golden_noise_rms[step] == pytest.approx(float(distance))


def test_float_network_fails_the_golden_run_by_exactly_the_noise(emitted: Emitted) -> None:
    player = playback.open_player(emitted.package)
    golden = playback.read_safetensors(emitted.package / "golden.safetensors")
    denoiser = emitted.quantized.denoiser

    @torch.no_grad()
    def floats(x: playback.Array, step: int, labels: playback.Array | None) -> playback.Array:
        assert labels is not None
        t = denoiser.timestep(step, len(x))
        found: playback.Array = denoiser.module(
            torch.from_numpy(x), t, torch.from_numpy(labels)
        ).numpy()
        return found

    result = playback.self_test(player, floats, golden)
    assert result.deviation == pytest.approx((1.0,) * STEPS, rel=1e-4)


def test_model_card_names_licence_sampler_and_every_option(emitted: Emitted) -> None:
    card = (emitted.package / "MODEL_CARD.md").read_text("utf-8")
    for word in ("small", "eager", "DDPMScheduler", "unknown", "pixel_shuffle", "2 of 5"):
        assert word in card, word
    assert emitted.quantized.info.fingerprint in card
    assert "{{" not in card
    assert "{%" not in card


def test_graph_inputs_have_a_batch_of_two_and_a_scalar_step(quantized: QuantizedDenoiser) -> None:
    model = exportable(quantized)
    assert list(model.inputs) == ["sample", "step", "label"]
    assert model.inputs["sample"].shape == (2, *quantized.info.sample_shape)
    assert model.inputs["step"].shape == ()
    assert model.inputs["label"].dtype == torch.int64


def test_correction_travels_with_the_schedule_and_changes_the_samples(
    emitted: Emitted, tmp_path: Path
) -> None:
    quantized = emitted.quantized
    correction = correction_of(quantized)
    backend = EagerBackend(quantized)
    emit_package(quantized, backend, tmp_path / "corrected", correction=correction)
    schedule = read_record(tmp_path / "corrected" / "schedule.json", ScheduleFile)
    assert schedule.correction == correction
    plain, corrected = make_golden(quantized, None), make_golden(quantized, correction)
    np.testing.assert_array_equal(plain.tensors["outputs"][0], corrected.tensors["outputs"][0])
    assert not np.array_equal(plain.tensors["samples"], corrected.tensors["samples"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "0" * 64), ("sampler", "0" * 64), ("guidance", 7.5), ("precision", "0" * 64)],
)
def test_correction_measured_on_something_else_is_refused(
    quantized: QuantizedDenoiser, tmp_path: Path, field: str, value: str | float
) -> None:
    correction = correction_of(quantized)
    key = correction.key.model_copy(update={field: value})
    other = correction.model_copy(update={"key": key})
    with pytest.raises(InputError, match=field):
        emit_package(quantized, EagerBackend(quantized), tmp_path / "package", correction=other)
    assert list(tmp_path.iterdir()) == []


def test_refused_plan_names_layer_and_reason_and_leaves_nothing(
    quantized: QuantizedDenoiser, tmp_path: Path
) -> None:
    (phase,) = quantized.plan.phases
    unknown = LayerAssignment(layer="no.such", precision=W8A8, reason="test")
    phases = (phase.model_copy(update={"layers": (*phase.layers, unknown)}),)
    other = QuantizedDenoiser(
        quantized.denoiser,
        quantized.plan.model_copy(update={"phases": phases}),
        quantized.parameters,
        quantized.network,
        quantized.tables_sha256,
    )
    with pytest.raises(UnsupportedError, match=r"no\.such: no such layer, use another") as caught:
        emit_package(other, EagerBackend(other), tmp_path / "package")
    assert caught.value.code == "EQ-4201"
    assert list(tmp_path.iterdir()) == []


class Failing(EagerBackend):
    def emit(self, model: Exportable) -> Mapping[str, File]:
        raise RuntimeError("the lowering broke")


class Escaping(EagerBackend):
    def emit(self, model: Exportable) -> Mapping[str, File]:
        return {"../model.txt": File(b"", "model")}


@pytest.mark.parametrize(("backend", "error"), [(Failing, RuntimeError), (Escaping, OutputError)])
def test_failing_backend_leaves_nothing(
    quantized: QuantizedDenoiser,
    tmp_path: Path,
    backend: type[EagerBackend],
    error: type[Exception],
) -> None:
    with pytest.raises(error):
        emit_package(quantized, backend(quantized), tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def test_existing_package_is_replaced_only_when_asked(
    emitted: Emitted, quantized: QuantizedDenoiser, tmp_path: Path
) -> None:
    backend = EagerBackend(quantized)
    emit_package(quantized, backend, tmp_path / "package")
    with pytest.raises(OutputError, match="exists"):
        emit_package(quantized, backend, tmp_path / "package")
    emit_package(quantized, backend, tmp_path / "package", force=True)
    check_files(tmp_path / "package")


@pytest.fixture(scope="module")
def with_embeddings(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    folder = tiny.write_tiny_conditional_unet(tmp_path_factory.mktemp("model"))
    embeddings = tiny.tiny_embeddings(4)
    return load(
        folder,
        steps=1,
        guidance=3.0,
        conditioning=embeddings,
        null_conditioning=torch.zeros(tiny.EMBEDDING_SHAPE),
    )


def test_null_embedding_travels_with_the_package(with_embeddings: Denoiser, tmp_path: Path) -> None:
    quantized = quantize_tiny(with_embeddings, EagerBackend.name)
    backend = EagerBackend(quantized)
    manifest = emit_package(quantized, backend, tmp_path / "package")
    assert manifest.files["conditioning.safetensors"].role == "schedule"
    player = playback.open_player(tmp_path / "package")
    np.testing.assert_array_equal(player.null(), np.zeros(tiny.EMBEDDING_SHAPE, np.float32))
    golden = playback.read_safetensors(tmp_path / "package" / "golden.safetensors")
    assert golden["conditioning"].shape == (GOLDEN_IMAGES, *tiny.EMBEDDING_SHAPE)
    assert playback.self_test(player, backend.open(tmp_path / "package"), golden).passed
    assert list(exportable(quantized).inputs) == ["sample", "step", "embedding"]
