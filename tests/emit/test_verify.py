"""Every way a package can differ from what it claims is found, and named by its code."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.numpy import save_file

from edgeqdm.backends import load_backend
from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit import playback
from edgeqdm.emit.backend import Array, Evaluate, KernelCount
from edgeqdm.emit.export import export_onnx
from edgeqdm.emit.integrity import seal_manifest
from edgeqdm.emit.package import emit_package, exportable
from edgeqdm.emit.verify import verify_package
from edgeqdm.errors import VerifyError
from edgeqdm.ir.codec import read_record
from edgeqdm.ir.package import Manifest
from edgeqdm.quantize.modules import StepClock, SteppedNetwork
from edgeqdm.quantize.quantizer import QuantizedDenoiser, quantize
from edgeqdm.testing.conformance import STEPS, EagerBackend, quantize_tiny, small_denoiser


def small(target: str) -> QuantizedDenoiser:
    return quantize_tiny(small_denoiser(DDPMScheduler(clip_sample=False)), target)


@pytest.fixture(scope="module")
def backend() -> EagerBackend:
    return EagerBackend(small(EagerBackend.name))


@pytest.fixture(scope="module")
def emitted(backend: EagerBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("packages") / "small"
    emit_package(backend.quantized, backend, package)
    return package


@pytest.fixture
def package(emitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(emitted, tmp_path / "package"))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_manifest(package: Path, change: Callable[[Any], Any]) -> None:
    path = package / "manifest.json"
    edit_json(path, change)
    path.write_bytes(seal_manifest(read_record(path, Manifest)))


def reseal(package: Path) -> None:
    """Make the manifest list exactly what lies there, as an attacker would."""

    def relist(manifest: Any) -> None:
        old, manifest["files"] = manifest["files"], {}
        for path in sorted(p for p in package.rglob("*") if p.is_file()):
            relative = path.relative_to(package).as_posix()
            if relative == "manifest.json":
                continue
            data = path.read_bytes()
            role = old.get(relative, {"role": "model"})["role"]
            sha256 = hashlib.sha256(data).hexdigest()
            manifest["files"][relative] = {"sha256": sha256, "size": len(data), "role": role}
        if "plan.json" in manifest["files"]:
            manifest["plan_sha256"] = manifest["files"]["plan.json"]["sha256"]

    edit_manifest(package, relist)


def edit_golden(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = package / "golden.safetensors"
    tensors = {name: value.copy() for name, value in playback.read_safetensors(path).items()}
    change(tensors)
    save_file(tensors, path)
    reseal(package)


def fails(package: Path, backend: Any, code: str, message: str | None = None) -> VerifyError:
    with pytest.raises(VerifyError, match=message) as caught:
        verify_package(package, backend)
    assert caught.value.code == code
    return caught.value


def test_untouched_package_passes_without_deviation(package: Path, backend: EagerBackend) -> None:
    found = verify_package(package, backend)
    assert found.planned == found.kernels.integer == 2
    assert found.deviation == (0.0,) * STEPS


@pytest.mark.parametrize(
    "relative", ["model.txt", "golden.safetensors", "runtime/python/solver.py"]
)
def test_changed_byte_is_found(package: Path, backend: EagerBackend, relative: str) -> None:
    path = package / relative
    data = path.read_bytes()
    path.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    fails(package, backend, "EQ-8110", relative)


def test_missing_and_foreign_files_are_found(package: Path, backend: EagerBackend) -> None:
    (package / "plan.json").unlink()
    (package / "extra.txt").write_text("not listed")
    problem = fails(package, backend, "EQ-8110", r"plan\.json.*missing")
    assert "extra.txt" in problem.message


def test_package_of_another_target_is_refused(package: Path) -> None:
    fails(package, load_backend("onnxruntime"), "EQ-8201", "eager")


def _set(field: str, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        *parents, last = field.split(".")
        for parent in parents:
            document = document[parent]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("integer_layers", 1, "integer_layers is 2, the manifest says 1"),
        ("n_steps", 7, r"plan\.n_steps is 3"),
        ("guidance", 1.0, r"schedule\.guidance is 2\.0"),
        ("program_sha256", "0" * 64, "program_sha256"),
        ("plan_sha256", "0" * 64, "plan_sha256"),
        ("model.fingerprint", "0" * 64, r"plan\.model"),
        ("model.sample_shape", [1, 2, 3], r"schedule\.sample_shape"),
    ],
)
def test_manifest_that_tells_another_story_is_found(
    package: Path, backend: EagerBackend, field: str, value: Any, message: str
) -> None:
    edit_manifest(package, _set(field, value))
    fails(package, backend, "EQ-8202", message)


def test_plan_with_a_layer_less_is_found(package: Path, backend: EagerBackend) -> None:
    def weaken(plan: Any) -> None:
        first = next(a for a in plan["phases"][0]["layers"] if a["precision"] == "w8a8")
        first["precision"] = "fp32"

    edit_json(package / "plan.json", weaken)
    reseal(package)
    fails(package, backend, "EQ-8202", "integer_layers is 1, the manifest says 2")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guidance", 1.5),
        ("program.initial_sigma", 2.0),
        ("decoder.factor", 1),
        ("label_names", ["a"]),
        ("golden_noise_rms", [1.0]),
    ],
)
def test_changed_schedule_is_found(
    package: Path, backend: EagerBackend, field: str, value: Any
) -> None:
    edit_json(package / "schedule.json", _set(field, value))
    reseal(package)
    fails(package, backend, "EQ-8202")


def test_table_that_is_not_that_of_the_schedule_is_found(
    package: Path, backend: EagerBackend
) -> None:
    path = package / "schedule.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    reseal(package)
    fails(package, backend, "EQ-8207", "not the table of schedule.json")
    path.unlink()
    reseal(package)
    fails(package, backend, "EQ-8207", "not the table of schedule.json")


def test_schedule_that_no_table_can_hold_is_found(package: Path, backend: EagerBackend) -> None:
    edit_json(package / "schedule.json", _set("label_names", ["x" * 65536]))
    edit_manifest(package, _set("model.label_names", ["x" * 65536]))
    reseal(package)
    fails(package, backend, "EQ-8207", "more than 65535 bytes")


@pytest.mark.parametrize("name", ["plan.json", "schedule.json"])
def test_package_without_plan_or_schedule_is_refused(
    package: Path, backend: EagerBackend, name: str
) -> None:
    (package / name).unlink()
    reseal(package)
    with pytest.raises(VerifyError, match="no such file"):
        verify_package(package, backend)


class FewerKernels(EagerBackend):
    def count_kernels(self, package: Path) -> KernelCount:
        return KernelCount(1, 1, {"eager": 1, "MatMul": 1})


def test_layer_that_does_not_run_on_integers_is_found(package: Path, backend: EagerBackend) -> None:
    fails(package, FewerKernels(backend.quantized), "EQ-8203", "only 1 of 2")


class FewerLater(EagerBackend):
    def count_kernels(self, package: Path) -> KernelCount:
        return KernelCount(2, 0, {"eager": 2}, {0: 2, 1: 0})


def test_every_phase_needs_its_kernels(tmp_path: Path, backend: EagerBackend) -> None:
    plan = backend.quantized.plan
    (only,) = plan.phases
    later = only.model_copy(update={"start": 1})
    phases = (only.model_copy(update={"stop": 1}), later)
    package = tmp_path / "phases"
    denoiser = backend.quantized.denoiser
    trajectories = collect_trajectories(denoiser, 4, seed=1)
    seen = observe(denoiser, trajectories, only.integer_layers())
    quantized = quantize(denoiser, plan.model_copy(update={"phases": phases}), seen)
    emit_package(quantized, EagerBackend(quantized), package)
    verify_package(package, EagerBackend(quantized))
    fails(package, FewerLater(quantized), "EQ-8203", "only 0 of 2 planned layers run as integer")


class Deviating(EagerBackend):
    """Adds to the output of one step."""

    def __init__(self, quantized: QuantizedDenoiser, step: int, offset: float) -> None:
        super().__init__(quantized)
        self.step, self.offset = step, np.float32(offset)

    def open(self, package: Path, *, threads: int = 1) -> Evaluate:
        right = super().open(package)

        def evaluate(x: Array, step: int, conditioning: Any) -> Array:
            f = right(x, step, conditioning)
            return f + self.offset if step == self.step else f

        return evaluate


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("offset", [1.0, np.nan, np.inf])
def test_runtime_that_computes_something_else_is_found(
    package: Path, backend: EagerBackend, step: int, offset: float
) -> None:
    fails(package, Deviating(backend.quantized, step, offset), "EQ-8204", f"step {step} deviates")


def test_runtime_within_the_allowed_share_passes(package: Path, backend: EagerBackend) -> None:
    noise = playback.open_player(package).golden_noise_rms[1]
    offset = 0.9 * playback.GOLDEN_SHARE * noise
    found = verify_package(package, Deviating(backend.quantized, 1, offset))
    # float32 rounding of outputs of size 1 against an offset of the size of the noise.
    expected = (0.0, 0.9 * playback.GOLDEN_SHARE, 0.0)
    assert found.deviation == pytest.approx(expected, rel=1e-2)


def test_edited_golden_outputs_are_found(package: Path, backend: EagerBackend) -> None:
    def double(tensors: dict[str, Any]) -> None:
        tensors["outputs"] *= 2

    edit_golden(package, double)
    fails(package, backend, "EQ-8204", "golden run not met")


@pytest.mark.parametrize("name", ["initial", "samples"])
def test_sampler_that_gives_other_samples_is_found(
    package: Path, backend: EagerBackend, name: str
) -> None:
    def shift(tensors: dict[str, Any]) -> None:
        tensors[name][-1] += 0.01

    edit_golden(package, shift)
    fails(package, backend, "EQ-8206", "does not reproduce")


def _without_inputs(tensors: dict[str, Any]) -> None:
    del tensors["inputs"]


def _fewer_steps(tensors: dict[str, Any]) -> None:
    tensors["inputs"] = tensors["inputs"][:1]


def _other_shape(tensors: dict[str, Any]) -> None:
    tensors["inputs"] = tensors["inputs"][..., :5]


def _other_labels(tensors: dict[str, Any]) -> None:
    tensors["conditioning"] = tensors["conditioning"] + 1000


@pytest.mark.parametrize("change", [_without_inputs, _fewer_steps, _other_shape, _other_labels])
def test_golden_run_that_cannot_be_replayed_is_found(
    package: Path, backend: EagerBackend, change: Callable[[dict[str, Any]], None]
) -> None:
    edit_golden(package, change)
    fails(package, backend, "EQ-8205", "cannot be replayed")


def test_golden_file_that_is_missing_or_no_tensor_file_is_found(
    package: Path, backend: EagerBackend
) -> None:
    (package / "golden.safetensors").write_bytes(b"nothing")
    reseal(package)
    fails(package, backend, "EQ-8205")
    (package / "golden.safetensors").unlink()
    reseal(package)
    fails(package, backend, "EQ-8205")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("packages") / "onnxruntime"
    emit_package(small("onnxruntime"), load_backend("onnxruntime"), package)
    return package


def test_float_model_in_place_of_the_integer_one_is_found(real: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(real, tmp_path / "package"))
    backend = load_backend("onnxruntime")
    assert verify_package(package, backend).kernels.integer == 2
    quantized = small("onnxruntime")
    floats = SteppedNetwork(
        quantized.denoiser.module, torch.tensor(quantized.denoiser.program.timesteps), StepClock()
    )
    model = export_onnx(floats.eval(), exportable(quantized).inputs, {})
    (package / "model.onnx").write_bytes(model.SerializeToString())
    reseal(package)
    fails(package, backend, "EQ-8203", "only 0 of 2")
