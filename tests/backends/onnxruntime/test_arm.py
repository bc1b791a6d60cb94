"""The C++ runtime of a package on 64-bit Arm: cross-compiled, run by qemu, held against x86.

Emulation shows that the numbers are right, and nothing of their speed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler
from numpy.typing import NDArray

from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit import playback
from edgeqdm.emit.package import emit_package
from edgeqdm.ir.plan import Phase
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.quantize.plans import default_plan, float_plan
from edgeqdm.quantize.quantizer import quantize
from edgeqdm.testing.arm import Arm, build_for_arm, missing_for_arm
from edgeqdm.testing.conformance import STEPS, small_denoiser
from edgeqdm.testing.native import DEPS_VARIABLE, native_deps

ROOT = Path(__file__).parents[3]
FLOAT = 1e-5
"""Largest difference of a float package, relative: sums in another order."""
INTEGER = 0.03
"""RMS difference of an integer package, relative: codes on the other side of a half-tie. Measured:
1.3 and 0.7 % after 20 steps of unet-fmnist and dit-fmnist."""
KINDS = {
    "w8a8": (W8A8,),
    "w4g32a8dyn": (Precision("w4g32a8dyn"),),
    "phases": (W8A8, FP32, Precision("w4a8")),
    "fp32": (FP32,),
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a package per kind of precision, of a small network with all kinds of layers."""
    folder = tmp_path_factory.mktemp("packages")
    denoiser = small_denoiser(DDIMScheduler(clip_sample=False))
    seen = None
    for name, precisions in KINDS.items():
        phases = []
        for k, precision in enumerate(precisions):
            plan = (
                float_plan(denoiser.info, "onnxruntime", STEPS)
                if precision == FP32
                else default_plan(denoiser.info, "onnxruntime", STEPS, body=precision)
            )
            start, stop = (n * STEPS // len(precisions) for n in (k, k + 1))
            phases.append(Phase(start=start, stop=stop, layers=plan.phases[0].layers))
            if seen is None:
                names = plan.phases[0].integer_layers()
                seen = observe(denoiser, collect_trajectories(denoiser, 4, seed=1), names)
        plan = plan.model_copy(update={"phases": tuple(phases)})
        emit_package(quantize(denoiser, plan, seen), OnnxRuntimeBackend(), folder / name)
    return folder


@pytest.fixture(scope="module")
def arm(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Arm:
    deps = native_deps(ROOT)
    if deps is None or not (deps / "lib-aarch64").is_dir():
        pytest.skip(f"no library for Arm: tools/native_deps.sh build/native, {DEPS_VARIABLE}")
    missing = missing_for_arm()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    source = packages / "w8a8" / "runtime" / "cpp"
    return build_for_arm(source, "edgeqdm-run", tmp_path_factory.mktemp("arm"), deps)


def samples_here(package: Path, labels: Sequence[int]) -> NDArray[np.float32]:
    return playback.sample(
        playback.open_player(package),
        OnnxRuntimeBackend().open(package),
        np.array(labels),
        seed=7,
        images=range(len(labels)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_x86(arm: Arm, packages: Path, tmp_path: Path, kind: str) -> None:
    files = ["--out", tmp_path / "sheet.png", "--latents", tmp_path / "x.npy"]
    done = arm.run("--package", packages / kind, "--seed", "7", "--label", "0,2,1", *files)
    assert done.returncode == 0, done.stderr
    found, expected = np.load(tmp_path / "x.npy"), samples_here(packages / kind, (0, 2, 1))
    size = float(np.sqrt(np.mean(expected**2)))
    if kind == "fp32":
        assert np.abs(found - expected).max() <= FLOAT * np.abs(expected).max()
    assert np.sqrt(np.mean((found - expected) ** 2)) <= INTEGER * size


@pytest.mark.parametrize("kind", KINDS)
def test_the_golden_run_is_met(arm: Arm, packages: Path, kind: str) -> None:
    done = arm.run("--package", packages / kind, "--self-test")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert len(found["deviation"]) == STEPS
    assert found["sampler"] <= 1e-6


def test_a_damaged_package_is_refused(arm: Arm, packages: Path, tmp_path: Path) -> None:
    package = shutil.copytree(packages / "w8a8", tmp_path / "package")
    graph = package / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    done = arm.run("--package", package, "--out", tmp_path / "sheet.png")
    assert done.returncode == 8
    assert done.stderr == "error: package is damaged: model.onnx (size) - copy it again\n"
    assert not (tmp_path / "sheet.png").exists()
