"""The C++ runtime of a package on 64-bit Arm: cross-compiled, run by qemu, held against x86.

Emulation shows that the numbers are right, and nothing of their speed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
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
from edgeqdm.testing.conformance import STEPS, small_denoiser
from edgeqdm.testing.native import DEPS_VARIABLE, native_deps

ROOT = Path(__file__).parents[3]
TOOLS = ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
SYSROOT = Path("/usr/aarch64-linux-gnu")
CPU = "cortex-a76"
# Dot products and half precision, as CPU has them: what is claimed here is executed there.
FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp"
FLOAT = 1e-5
"""Largest difference of a float package, relative: sums in another order."""
INTEGER = 0.03
"""RMS difference of an integer package, relative: codes on the other side of a half-tie. Measured:
0.8 and 0.6 % after 20 steps of unet-fmnist and dit-fmnist."""
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


@dataclass(frozen=True)
class Arm:
    """A built tool, and how it is run here."""

    tool: Path
    prefix: Path
    library: Path

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        paths = f"LD_LIBRARY_PATH=/lib,EDGEQDM_ONNXRUNTIME={self.library}"
        emulator = ["qemu-aarch64-static", "-cpu", CPU, "-L", str(self.prefix), "-E", paths]
        command = [*emulator, str(self.tool), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def write_prefix(folder: Path) -> Path:
    """What the emulated program sees as its root: Arm's libraries and an Arm /proc/cpuinfo.

    ONNX Runtime reads that file before `main`, and the host's, which is an x86's, ends it with a
    signal.
    """
    (folder / "proc").mkdir(parents=True)
    (folder / "lib").symlink_to(SYSROOT / "lib")
    core = (
        "processor\t: {}\nBogoMIPS\t: 50.00\nFeatures\t: " + FEATURES + "\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\n"
        "CPU part\t: 0xd0b\nCPU revision\t: 1\n\n"
    )
    (folder / "proc" / "cpuinfo").write_text("".join(map(core.format, range(os.cpu_count() or 1))))
    return folder


@pytest.fixture(scope="module")
def arm(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Arm:
    deps = native_deps(ROOT)
    if deps is None or not (deps / "lib-aarch64").is_dir():
        pytest.skip(f"no library for Arm: tools/native_deps.sh build/native, {DEPS_VARIABLE}")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or not SYSROOT.is_dir():
        pytest.skip(f"not installed: {', '.join(missing) or SYSROOT}")
    source = packages / "w8a8" / "runtime" / "cpp"
    folder = tmp_path_factory.mktemp("arm")
    library = deps / "lib-aarch64" / "libonnxruntime.so"
    configure = ["cmake", "-S", str(source), "-B", str(folder / "build"), "-DEDGEQDM_WERROR=ON"]
    configure += [
        f"-DCMAKE_TOOLCHAIN_FILE={source / 'toolchains' / 'aarch64-linux.cmake'}",
        f"-DONNXRUNTIME_INCLUDE={deps / 'include'}",
    ]
    for command in (configure, ["cmake", "--build", str(folder / "build"), "-j1"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return Arm(folder / "build" / "edgeqdm-run", write_prefix(folder / "root"), library)


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
    assert done.stderr == "error: package is damaged: model.onnx (size)\n"
    assert not (tmp_path / "sheet.png").exists()
