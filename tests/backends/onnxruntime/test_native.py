"""The C++ runtime in a package: built from it, equal to run.py, and never ended by a signal."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import pty
import resource
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from edgeqdm import __version__
from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.backends.onnxruntime.forms import NPU, ORT, ORT_GRAPH, SMALL, STEP_GRAPH
from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit import playback
from edgeqdm.emit.integrity import seal_manifest
from edgeqdm.emit.package import correction_key, emit_package
from edgeqdm.emit.table import HEADER
from edgeqdm.errors import VerifyError
from edgeqdm.ir.codec import read_record
from edgeqdm.ir.package import Manifest
from edgeqdm.ir.plan import DeploymentPlan, Phase
from edgeqdm.ir.precision import FP32, ActivationPolicy
from edgeqdm.ir.schedule import CorrectedSchedule
from edgeqdm.models.denoiser import wrap
from edgeqdm.quantize.plans import default_plan
from edgeqdm.quantize.quantizer import QuantizedDenoiser, quantize
from edgeqdm.testing import tiny
from edgeqdm.testing.conformance import STEPS, quantize_tiny, small_denoiser, tiny_quantized
from edgeqdm.testing.native import WARNINGS, compile_cpp

ROOT = Path(__file__).parents[3]
NATIVE = ROOT / "tests" / "native"
RUN = "runtime/python/run.py"
STATIC = ActivationPolicy.STATIC
# Everything between the layers is the same library on the same input. A last bit of the noise that
# libm rounds differently could put an activation on the other side of a half-tie; with these
# seeds none does, and the samples are equal.
SAMPLES = 1e-6
# exp of the learned variance differs in its last bit at every second value, so one may.
LEARNED = 1e-2


def corrected(quantized: QuantizedDenoiser) -> CorrectedSchedule:
    channels = quantized.info.sample_shape[0]
    return CorrectedSchedule(
        key=correction_key(quantized),
        gain=(0.9, 1.0, 1.1),
        bias=((0.01,) * channels,) * STEPS,
        noise_std=((0.2,) * channels, (0.1,) * channels, (0.0,) * channels),
        clamped=(False,) * STEPS,
        input_weight=(0.1, 0.0, 0.05),
    )


def in_two_phases(plan: DeploymentPlan) -> DeploymentPlan:
    """Integers in the first step, floats in the rest."""
    (only,) = plan.phases
    float_layer = {"precision": FP32, "activation": None}
    floats = tuple(a.model_copy(update=float_layer) for a in only.layers)
    first = only.model_copy(update={"stop": 1})
    return plan.model_copy(update={"phases": (first, Phase(start=1, stop=STEPS, layers=floats))})


class EmbeddedNetwork(nn.Module):
    """x [B, 4, 8, 8], t [B], embeddings [B, 5, 12]; says the variance, too: [B, 8, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.conv_out = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        fed = torch.sin(self.embed(embeddings.mean(1)) + 0.01 * t[:, None])
        out: Tensor = self.conv_out(nn.functional.silu(self.conv_in(x) + fed[:, :, None, None]))
        return out


def emit_with_embeddings(package: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EmbeddedNetwork()
    denoiser = wrap(
        network,
        DDPMScheduler(variance_type="learned_range", clip_sample=False),
        (torch.zeros(4, 4, 8, 8), torch.full((4,), 9), tiny.tiny_embeddings(4)),
        steps=STEPS,
        guidance=3.0,
        null_conditioning=torch.zeros(tiny.EMBEDDING_SHAPE),
    )
    emit_package(quantize_tiny(denoiser), OnnxRuntimeBackend(), package)


def emit_in_phases(quantized: QuantizedDenoiser, package: Path) -> None:
    denoiser, plan = quantized.denoiser, in_two_phases(quantized.plan)
    trajectories = collect_trajectories(denoiser, 4, seed=1)
    seen = observe(denoiser, trajectories, plan.phases[0].integer_layers())
    emit_package(quantize(denoiser, plan, seen), OnnxRuntimeBackend(), package)


def static_in_phases(quantized: QuantizedDenoiser) -> QuantizedDenoiser:
    """Constant scales and two phases that differ."""
    denoiser = quantized.denoiser
    plan = in_two_phases(default_plan(denoiser.info, "onnxruntime", STEPS, activation=STATIC))
    runs = collect_trajectories(denoiser, 4, seed=1)
    return quantize(denoiser, plan, observe(denoiser, runs, plan.phases[0].integer_layers()))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one package per kind: labels, embeddings, phases, a correction."""
    folder = tmp_path_factory.mktemp("packages")
    emit_package(tiny_quantized("unet"), OnnxRuntimeBackend(), folder / "label")
    small = quantize_tiny(small_denoiser(DDPMScheduler(clip_sample=True)))
    backend = OnnxRuntimeBackend()
    emit_package(small, backend, folder / "corrected", correction=corrected(small))
    emit_with_embeddings(folder / "embedding")
    emit_in_phases(small, folder / "phases")
    emit_package(small, OnnxRuntimeBackend(SMALL), folder / "small")
    emit_package(small, OnnxRuntimeBackend(ORT), folder / "ort")
    emit_package(static_in_phases(small), OnnxRuntimeBackend(NPU), folder / "npu")
    return folder


@pytest.fixture
def package(packages: Path, tmp_path: Path) -> Path:
    """A package to damage."""
    return Path(shutil.copytree(packages / "label", tmp_path / "package"))


def build(packages: Path, release: Path, folder: Path, *options: str) -> Path:
    source = packages / "label" / "runtime" / "cpp"
    configure = ["cmake", "-S", str(source), "-B", str(folder), "-DEDGEQDM_WERROR=ON"]
    configure += [f"-DONNXRUNTIME_ROOT={release}", *options]
    for command in (configure, ["cmake", "--build", str(folder), "-j1"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def shared(packages: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build folder of the shared library and its tool, by the default compiler."""
    options = ("-DBUILD_SHARED_LIBS=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    return build(packages, release, tmp_path_factory.mktemp("shared"), *options)


@pytest.fixture(scope="module")
def sanitized(packages: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build folder of the static library and its tool with sanitizers, by clang if it is there."""
    options = ["-DEDGEQDM_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    if shutil.which("clang++"):
        options.append("-DCMAKE_CXX_COMPILER=clang++")
    return build(packages, release, tmp_path_factory.mktemp("sanitized"), *options)


@dataclass(frozen=True)
class Finished:
    exit_code: int
    output: str
    errors: str


def run(
    program: Path,
    *arguments: str | Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limits: Callable[[], None] | None = None,
) -> Finished:
    # Leaks are not looked for: ptrace, which that needs, is forbidden in many containers.
    settings = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **settings, **(environment or {})},
        preexec_fn=limits,
        capture_output=True,
        text=True,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def refused(found: Finished, exit_code: int, message: str) -> None:
    """One line, the documented code, no signal and no word of a sanitizer."""
    assert (found.exit_code, len(found.errors.splitlines())) == (exit_code, 1), found
    assert found.errors.startswith("error: ")
    assert message in found.errors


def expected_samples(package: Path, conditioning: NDArray[Any]) -> Any:
    form = read_record(package / "manifest.json", Manifest).form
    return playback.sample(
        playback.open_player(package),
        OnnxRuntimeBackend(form).open(package),
        conditioning,
        seed=7,
        images=range(len(conditioning)),
    )


def conditioning_of(kind: str, folder: Path) -> tuple[NDArray[Any], list[str]]:
    """Conditioning of three images and the options that ask for it."""
    if kind != "embedding":
        return np.array([0, 2, 1]), ["--label", "0,2,1"]
    embeddings = tiny.tiny_embeddings(3).numpy()
    np.save(folder / "e.npy", embeddings.astype(np.float64))
    return embeddings, ["--embedding", str(folder / "e.npy")]


@pytest.mark.parametrize(
    "kind", ["label", "embedding", "phases", "corrected", "small", "ort", "npu"]
)
def test_samples_and_pixels_are_those_of_the_python_runtime(
    shared: Path, packages: Path, tmp_path: Path, kind: str
) -> None:
    conditioning, options = conditioning_of(kind, tmp_path)
    files = ["--out", "sheet.png", "--latents", "x.npy", "--columns", "2"]
    package = packages / kind
    done = run(
        shared / "edgeqdm-run", "--package", package, "--seed", "7", *options, *files, cwd=tmp_path
    )
    assert done.exit_code == 0, done.errors
    assert done.output.startswith("sheet.png: 3 images, seed 7, ")
    found, expected = np.load(tmp_path / "x.npy"), expected_samples(package, conditioning)
    assert found.shape == expected.shape
    bound = LEARNED if kind == "embedding" else SAMPLES
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()
    pixels = playback.sheet(playback.decode(playback.open_player(package), found), 2)
    image = np.asarray(Image.open(tmp_path / "sheet.png"))
    shown = image.reshape(*pixels.shape[:2], -1)
    np.testing.assert_array_equal(shown[:, :, 0], pixels[:, :, 0])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_samples_do_not_depend_on_threads_or_provider_name(
    shared: Path, packages: Path, tmp_path: Path
) -> None:
    tool, common = shared / "edgeqdm-run", ("--package", packages / "label", "--label", "bag,COAT")
    for name, options in (("a", ["--threads", "2"]), ("b", ["--provider", "cpu", "--quiet"])):
        done = run(tool, *common, "--out", f"{name}.pgm", *options, cwd=tmp_path)
        assert done.exit_code == 0, done.errors
        assert (done.output == "") == ("--quiet" in options)
    assert (tmp_path / "a.pgm").read_bytes() == (tmp_path / "b.pgm").read_bytes()
    assert (tmp_path / "a.pgm").read_bytes().startswith(b"P5\n")


@pytest.mark.parametrize("kind", ["label", "embedding", "corrected"])
def test_self_test_says_what_the_python_runtime_says(
    shared: Path, packages: Path, kind: str
) -> None:
    done = run(shared / "edgeqdm-run", "--package", packages / kind, "--self-test")
    assert (done.exit_code, done.errors) == (0, "")
    player, backend = playback.open_player(packages / kind), OnnxRuntimeBackend()
    golden = playback.read_safetensors(packages / kind / "golden.safetensors")
    expected = playback.self_test(player, backend.open(packages / kind), golden)
    found = json.loads(done.output)
    assert found["passed"] is True
    assert found["deviation"] == pytest.approx(expected.deviation, rel=1e-4, abs=1e-9)
    assert found["sampler"] <= 1e-6
    assert done.output == json.dumps(found) + "\n"


SAME = [
    ("--label", "4", "--out", "x.png"),
    ("--label", "99999999999999999999", "--out", "x.png"),
    ("--label", "shoe,1", "--out", "x.png"),
    ("--label", "0,1", "--count", "8", "--out", "x.png"),
    ("--threads", "0", "--out", "x.png"),
    ("--seed", "18446744073709551616", "--out", "x.png"),
    ("--seed", "184467440737095516150", "--out", "x.png"),
    ("--seed", "-99999999999999999999", "--out", "x.png"),
    ("--out", "x.png", "--latents", "./x.png"),
    ("--embedding", "e.npy", "--label", "1", "--out", "x.png"),
    ("--embedding", "e.npy", "--out", "x.png"),
    ("--label", "1", "--out", "no/such/x.png"),
    (),
]


def test_wrong_options_have_the_words_and_codes_of_the_python_runtime(
    sanitized: Path, package: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "e.npy", np.zeros((1, 5, 12), np.float32))
    for arguments in SAME:
        found = run(sanitized / "edgeqdm-run", "--package", package, *arguments, cwd=tmp_path)
        expected = run(Path(sys.executable), package / RUN, *arguments, cwd=tmp_path)
        assert found == expected, arguments
        assert found.exit_code in (2, 3, 7)


def test_program_that_lies_in_its_package_finds_it(
    shared: Path, package: Path, tmp_path: Path
) -> None:
    folder = package / "runtime" / "cpp" / "build"
    folder.mkdir()
    for built in ("edgeqdm-run", "libedgeqdm.so"):
        shutil.copy2(shared / built, folder)
    found = run(folder / "edgeqdm-run", "--self-test", cwd=tmp_path)
    assert (found.exit_code, found.errors) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--no-such",), "unrecognized arguments: --no-such"),
        (("--seed",), "argument --seed: expected one argument"),
        (("--seed", "x"), "argument --seed: invalid int value: 'x'"),
        (("--self-test=1",), "unrecognized arguments"),
        (("--self-test",), "no package around this program"),
    ],
)
def test_usage_errors_end_with_2(shared: Path, arguments: tuple[str, ...], message: str) -> None:
    refused(run(shared / "edgeqdm-run", *arguments), 2, message)


def test_progress_is_shown_on_a_terminal_only(shared: Path, packages: Path, tmp_path: Path) -> None:
    reader, terminal = pty.openpty()
    command = [str(shared / "edgeqdm-run"), "--package", str(packages / "label"), "--out", "x.png"]
    subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=terminal, check=True)
    os.close(terminal)
    shown = os.read(reader, 4096).decode()
    os.close(reader)
    for step in range(1, STEPS + 1):
        assert f"\rstep {step}/{STEPS}, 0 s left " in shown
    assert run(Path(command[0]), *command[1:], cwd=tmp_path).errors == ""


def test_help_and_version_are_answered(shared: Path) -> None:
    assert run(shared / "edgeqdm-run", "--version") == Finished(0, f"{__version__}\n", "")
    assert "--self-test" in run(shared / "edgeqdm-run", "--help").output


def edit(package: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = package / name
    path.write_bytes(change(path.read_bytes()))


def reseal(package: Path, *, drop: str | None = None) -> None:
    """A manifest that lists what lies there, as whoever changes a package on purpose makes it."""
    manifest = read_record(package / "manifest.json", Manifest)
    files = {}
    for name, artifact in manifest.files.items():
        if name != drop and (package / name).exists():
            data = (package / name).read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            files[name] = artifact.model_copy(update={"sha256": sha256, "size": len(data)})
    sealed = seal_manifest(manifest.model_copy(update={"files": files}))
    (package / "manifest.json").write_bytes(sealed)


def rename_in_manifest(package: Path, old: str, new: str) -> None:
    manifest = read_record(package / "manifest.json", Manifest)
    files = {new if name == old else name: entry for name, entry in manifest.files.items()}
    sealed = seal_manifest(manifest.model_copy(update={"files": files}))
    (package / "manifest.json").write_bytes(sealed)


def link_elsewhere(package: Path, name: str) -> None:
    outside = package.parent / "outside"
    (package / name).rename(outside)
    (package / name).symlink_to(outside)


def table_of_nan(package: Path) -> None:
    """A table with NaN for its first timestep, and everything else in order."""

    def change(data: bytes) -> bytes:
        body = bytearray(data[HEADER.size :])
        body[88:92] = b"\x00\x00\xc0\x7f"
        magic, version, _, size = HEADER.unpack(data[: HEADER.size])
        return HEADER.pack(magic, version, zlib.crc32(body), size) + bytes(body)

    edit(package, "schedule.bin", change)
    reseal(package)


def other_version(package: Path) -> None:
    edit(
        package,
        "manifest.json",
        lambda d: d.replace(b'"schema_version": 1', b'"schema_version": 2'),
    )


def resealed(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(package: Path) -> None:
        change(package)
        reseal(package)

    return both


def cut(name: str) -> Callable[[Path], None]:
    return lambda package: edit(package, name, lambda data: data[: len(data) // 2])


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read"),
    "cut manifest": (cut("manifest.json"), "manifest.json cannot be read"),
    "no JSON": (lambda p: edit(p, "manifest.json", lambda _: b"{"), "manifest.json cannot be"),
    "edited manifest": (
        lambda p: edit(
            p, "manifest.json", lambda d: d.replace(b'"eager', b'"Eager').replace(b"20", b"21", 1)
        ),
        "manifest.json",
    ),
    "other version": (other_version, "schema_version 2, this runtime reads 1"),
    "manifest is a link": (lambda p: link_elsewhere(p, "manifest.json"), "manifest.json cannot"),
    "cut model": (cut("model.onnx"), "model.onnx (size)"),
    "changed model": (
        lambda p: edit(p, "model.onnx", lambda d: d[:99] + bytes([d[99] ^ 1]) + d[100:]),
        "model.onnx (changed)",
    ),
    "no plan": (lambda p: (p / "plan.json").unlink(), "plan.json (missing)"),
    "link": (lambda p: link_elsewhere(p, "plan.json"), "plan.json (not a path inside the package)"),
    "link to a folder": (
        lambda p: link_elsewhere(p, "runtime"),
        "runtime/python/run.py (not a path inside the package)",
    ),
    "hard link": (
        lambda p: os.link(p / "plan.json", p.parent / "other"),
        "plan.json (hard link)",
    ),
    "FIFO": (
        lambda p: ((p / "plan.json").unlink(), os.mkfifo(p / "plan.json"))[0],
        "plan.json (not a regular file)",
    ),
    "traversal": (
        lambda p: rename_in_manifest(p, "plan.json", "../plan.json"),
        "../plan.json (not a path inside the package)",
    ),
    "absolute": (
        lambda p: rename_in_manifest(p, "plan.json", "/etc/passwd"),
        "/etc/passwd (not a path inside the package)",
    ),
    "line break": (
        lambda p: rename_in_manifest(p, "plan.json", "a\nerror: b"),
        "a\\x0aerror: b (not a path inside the package)",
    ),
    "cut table": (resealed(cut("schedule.bin")), "schedule.bin: cut off or of a wrong size"),
    "damaged table": (
        resealed(lambda p: edit(p, "schedule.bin", lambda d: d[:-1] + b"\xff")),
        "schedule.bin: damaged (CRC-32)",
    ),
    "NaN in the table": (table_of_nan, "schedule.bin: a number that makes no sense"),
    "no table": (lambda p: reseal(p, drop="schedule.bin"), "schedule.bin: not in the manifest"),
    "no model": (lambda p: reseal(p, drop="model.onnx"), "model.onnx: not in the manifest"),
    "model that is none": (
        resealed(lambda p: edit(p, "model.onnx", lambda _: b"nothing")),
        "refuses model.onnx",
    ),
    "cut model, resealed": (resealed(cut("model.onnx")), "refuses model.onnx"),
    "golden that is none": (
        resealed(lambda p: edit(p, "golden.safetensors", lambda _: b"nothing")),
        "golden.safetensors: not a readable safetensors file",
    ),
    "golden that no one vouches for": (
        lambda p: reseal(p, drop="golden.safetensors"),
        "golden.safetensors: not in the manifest",
    ),
    "no golden": (
        resealed(lambda p: (p / "golden.safetensors").unlink()),
        "golden.safetensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_package_is_refused_by_name(sanitized: Path, package: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(package)
    found = run(sanitized / "edgeqdm-run", "--package", package, "--self-test")
    refused(found, VerifyError.exit_code, message)


def test_every_bad_file_is_named(sanitized: Path, package: Path) -> None:
    (package / "plan.json").unlink()
    edit(package, "schedule.json", lambda data: data[:-1] + b" ")
    edit(package, "manifest.json", lambda data: data.replace(b'"created": "20', b'"created": "21'))
    found = run(sanitized / "edgeqdm-run", "--package", package, "--self-test")
    named = ("manifest.json (changed)", "plan.json (missing)", "schedule.json (changed)")
    reason = f"package is damaged: {', '.join(named)} - copy it again\n"
    refused(found, VerifyError.exit_code, reason)
    expected = run(Path(sys.executable), package / RUN, "--self-test")
    assert found == expected


def test_files_that_are_not_listed_are_left_alone(sanitized: Path, package: Path) -> None:
    (package / "notes.txt").write_text("mine")
    assert run(sanitized / "edgeqdm-run", "--package", package, "--self-test").exit_code == 0


def test_model_of_another_shape_is_refused(sanitized: Path, package: Path, packages: Path) -> None:
    shutil.copy(packages / "embedding" / "model.onnx", package / "model.onnx")
    reseal(package)
    found = run(sanitized / "edgeqdm-run", "--package", package, "--self-test")
    refused(found, VerifyError.exit_code, "the model does not fit schedule.bin")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (STEP_GRAPH.format(0), None, "model.onnx: not in the manifest"),
        (STEP_GRAPH.format(1), "embedding", "the model does not fit schedule.bin"),
        (STEP_GRAPH.format(1), "cut", "refuses model.step1.onnx"),
    ],
)
def test_every_graph_of_the_phases_is_checked(
    sanitized: Path, packages: Path, tmp_path: Path, name: str, damage: str | None, message: str
) -> None:
    package = Path(shutil.copytree(packages / "npu", tmp_path / "package"))
    if damage == "embedding":
        shutil.copy(packages / damage / "model.onnx", package / name)
    elif damage == "cut":
        cut(name)(package)
    reseal(package, drop=None if damage else name)
    found = run(sanitized / "edgeqdm-run", "--package", package, "--self-test")
    refused(found, VerifyError.exit_code, message)


@pytest.mark.parametrize("kind", ["ort", "npu"])
def test_other_forms_pass_the_self_test(sanitized: Path, packages: Path, kind: str) -> None:
    package = packages / kind
    assert not (package / "model.onnx").exists()
    found = run(sanitized / "edgeqdm-run", "--package", package, "--self-test")
    assert found.exit_code == 0, found.errors
    expected = run(Path(sys.executable), package / RUN, "--self-test")
    mine, theirs = (json.loads(each.output)["deviation"] for each in (found, expected))
    np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_golden_run_that_is_not_met_ends_with_8(sanitized: Path, package: Path) -> None:
    golden = load_file(package / "golden.safetensors")
    golden["outputs"] = golden["outputs"] + np.float32(1)
    save_file(golden, package / "golden.safetensors")
    reseal(package)
    found = run(sanitized / "edgeqdm-run", "--package", package, "--self-test")
    refused(found, VerifyError.exit_code, "self-test failed")
    assert json.loads(found.output)["passed"] is False


@pytest.mark.parametrize("name", ["NoSuch", "CUDAExecutionProvider"])
def test_missing_provider_ends_with_4_and_the_ones_there_are(
    sanitized: Path, packages: Path, name: str
) -> None:
    tool, package = sanitized / "edgeqdm-run", packages / "label"
    found = run(tool, "--package", package, "--self-test", "--provider", name)
    refused(found, 4, f"no execution provider {name} here; this library has ")
    assert "CPUExecutionProvider" in found.errors


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((1, 5, 12), np.nan), "e.npy holds NaN or a value beyond float32"),
        (np.zeros((1, 5, 13)), "conditioning must be (1, 5, 12), got (1, 5, 13)"),
        (np.zeros((2, 12)), "conditioning must be (2, 5, 12), got (2, 12)"),
        (np.zeros((1, 5, 12), np.int32), "e.npy holds <i4, embeddings are floats"),
        (None, "e.npy: No such file or directory"),
    ],
)
def test_wrong_embeddings_end_with_3(
    sanitized: Path, packages: Path, tmp_path: Path, value: Any, message: str
) -> None:
    if value is not None:
        np.save(tmp_path / "e.npy", value)
    options = ("--package", packages / "embedding", "--embedding", "e.npy", "--out", "x.png")
    refused(run(sanitized / "edgeqdm-run", *options, cwd=tmp_path), 3, message)


def test_unwritable_results_end_with_7_and_leave_nothing(
    sanitized: Path, packages: Path, tmp_path: Path
) -> None:
    tool, common = sanitized / "edgeqdm-run", ("--package", packages / "label", "--label", "1")
    (tmp_path / "folder").mkdir()
    found = run(tool, *common, "--out", "folder", cwd=tmp_path)
    refused(found, 7, "cannot write folder: not a regular file; name another")
    found = run(tool, *common, "--out", "x.png", "--latents", "no/x.npy", cwd=tmp_path)
    refused(found, 7, "cannot write no/x.npy: No such file or directory")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # noqa: E731
    found = run(tool, *common, "--out", "y.png", cwd=tmp_path, limits=limit)
    refused(found, 7, "cannot write y.png: File too large")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]
    with Path("/dev/full").open("w") as full:
        command = [str(tool), *map(str, common), "--out", "z.png"]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=full, check=False)
    assert done.returncode == 7


def test_what_is_no_regular_file_is_not_replaced(
    sanitized: Path, packages: Path, tmp_path: Path
) -> None:
    tool, common = sanitized / "edgeqdm-run", ("--package", packages / "label", "--label", "1")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        ("fifo", "not a regular file; name another"),
        ("link", "not a regular file; name another"),
        ("loop", "Too many levels of symbolic links"),
    ):
        found = run(tool, *common, "--out", name, cwd=tmp_path)
        refused(found, 7, f"cannot write {name}: {reason}")
        found = run(tool, *common, "--out", "x.png", "--latents", name, cwd=tmp_path)
        refused(found, 7, f"cannot write {name}: {reason}")
    assert (tmp_path / "fifo").is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "link", "loop"]


def test_results_go_where_links_lead(sanitized: Path, packages: Path, tmp_path: Path) -> None:
    tool, common = sanitized / "edgeqdm-run", ("--package", packages / "label", "--label", "1")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "old.png").write_text("old")
    (tmp_path / "link.png").symlink_to("to/old.png")
    (tmp_path / "link.npy").symlink_to(tmp_path / "to" / "new.npy")
    done = run(tool, *common, "--out", "link.png", "--latents", "link.npy", cwd=tmp_path)
    assert done.exit_code == 0, done.errors
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "link.npy").is_symlink()
    assert (tmp_path / "to" / "old.png").read_bytes().startswith(b"\x89PNG")
    assert np.load(tmp_path / "to" / "new.npy").shape == (1, 4, 8, 8)
    found = run(tool, *common, "--out", "link.png", "--latents", "to/old.png", cwd=tmp_path)
    refused(found, 3, "--out and --latents are the same file: link.png")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_results_have_the_longest_names_and_the_mode_of_the_umask(
    sanitized: Path, packages: Path, tmp_path: Path, mask: int, mode: int
) -> None:
    name = "x" * 251 + ".png"
    options = ("--package", packages / "label", "--label", "1", "--out", name)

    def masked() -> None:
        os.umask(mask)

    done = run(sanitized / "edgeqdm-run", *options, cwd=tmp_path, limits=masked)
    assert done.exit_code == 0, done.errors
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_change_no_result(
    sanitized: Path, packages: Path, tmp_path: Path, closed: tuple[int, ...]
) -> None:
    options = ("--package", packages / "label", "--label", "1", "--out")

    def close() -> None:
        for stream in closed:
            os.close(stream)

    for name, how in (("a.png", None), ("b.png", close)):
        done = run(sanitized / "edgeqdm-run", *options, name, cwd=tmp_path, limits=how)
        assert (done.exit_code, done.errors) == (0, "")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_more_images_than_a_sheet_holds_are_refused_at_once(
    sanitized: Path, packages: Path, tmp_path: Path
) -> None:
    # The labels of so many alone would take 16 GB.
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (30, 30))  # noqa: E731
    for columns in ("10", "1", "2000000000"):
        options = ("--count", "2000000000", "--columns", columns, "--out", "x.png")
        common = ("--package", packages / "label", "--label", "1")
        found = run(sanitized / "edgeqdm-run", *common, *options, cwd=tmp_path, limits=limit)
        refused(found, 3, "a sheet of 2000000000 images is larger than 2 GiB - draw fewer images")


def test_too_little_memory_ends_with_9(shared: Path, packages: Path, tmp_path: Path) -> None:
    tool, common = shared / "edgeqdm-run", ("--package", packages / "label", "--out", "x.png")

    def limited(megabytes: int) -> Callable[[], None]:
        n_bytes = megabytes << 20
        return lambda: resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))

    for megabytes in (*range(40, 72, 2), 80, 96, 128):
        limits = limited(megabytes)
        found = run(tool, *common, "--count", "50", "--quiet", cwd=tmp_path, limits=limits)
        # Below what the loader needs to map ONNX Runtime it is the loader that ends with 127.
        assert found.exit_code in (0, 9, 127), (megabytes, found)
        assert found.exit_code == 127 or len(found.errors.splitlines()) == (found.exit_code == 9)
    for n_images in (20_000, 3_000_000):
        found = run(tool, *common, "--count", str(n_images), cwd=tmp_path, limits=limited(256))
        refused(found, 9, "out of memory - draw fewer images at once")


@pytest.fixture(scope="module")
def hooked(sanitized: Path, packages: Path, release: Path) -> Path:
    """The tool and `count_allocations` with an ONNX Runtime that does what a test asks for."""
    cpp = packages / "label" / "runtime" / "cpp"
    compiler = "clang++" if shutil.which("clang++") else "c++"
    wrapped = ("OrtGetApiBase", "malloc", "calloc", "realloc", "fsync")
    for name, main in (
        ("hooked", cpp / "src" / "main.cpp"),
        ("count", NATIVE / "count_allocations.cpp"),
    ):
        compile_cpp(
            sanitized / name,
            # In place of the library's own, which would load what cannot be wrapped.
            [main, NATIVE / "hooks.cpp", cpp / "src" / "onnxruntime_library.cpp"],
            "-DEDGEQDM_LINK_ONNXRUNTIME",
            *(f"-I{cpp}", f"-I{cpp / 'src'}", f"-I{NATIVE}", "-isystem", str(release / "include")),
            *(*WARNINGS, "-fsanitize=address,undefined", str(sanitized / "libedgeqdm.a")),
            *(f"-Wl,--wrap={function}" for function in wrapped),
            *(f"-L{release / 'lib'}", f"-Wl,-rpath,{release / 'lib'}", "-lonnxruntime"),
            compiler=compiler,
        )
    return sanitized


def test_steps_allocate_nothing_outside_of_onnx_runtime(hooked: Path, packages: Path) -> None:
    done = run(hooked / "count", packages / "label", "50")
    assert done.exit_code == 0, done.errors
    counted_at_all, steps, allocated = map(int, done.output.split())
    assert counted_at_all > 0
    assert steps >= 50
    assert allocated == 0


@pytest.mark.parametrize(
    ("environment", "exit_code", "message"),
    [
        ({"EDGEQDM_TEST_VERSION": "1.22.9"}, 4, "ONNX Runtime 1.22.9 is too old, this package"),
        ({"EDGEQDM_TEST_VERSION": "1.9"}, 4, "ONNX Runtime 1.9 is too old, this package needs 1."),
        ({"EDGEQDM_TEST_NO_API": "1"}, 4, "does not have the interface 1."),
        ({"EDGEQDM_TEST_RUN": "nan"}, 5, "the network gave NaN or infinity at step 1"),
        ({"EDGEQDM_TEST_RUN": "fail"}, 10, "the network fails: first\n"),
        ({"EDGEQDM_TEST_RUN": "memory"}, 9, "out of memory - draw fewer images at once"),
    ],
)
def test_failing_library_is_one_line_and_leaves_nothing(
    hooked: Path,
    packages: Path,
    tmp_path: Path,
    environment: dict[str, str],
    exit_code: int,
    message: str,
) -> None:
    options = ("--package", packages / "label", "--label", "1", "--out", "x.png")
    found = run(hooked / "hooked", *options, cwd=tmp_path, environment=environment)
    refused(found, exit_code, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("--out", "x.ppm"), 3, "these images are grey: name the file .pgm or .png"),
        (("--out", "no/x.png"), 7, "cannot write no/x.png: No such file or directory"),
        (("--out", "x.png", "--latents", "no/x"), 7, "cannot write no/x: No such file"),
        (("--out", "x.png", "--latents", "x.png"), 3, "--out and --latents are the same file"),
    ],
)
def test_impossible_outputs_are_refused_before_the_first_step(
    hooked: Path,
    packages: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    exit_code: int,
    message: str,
) -> None:
    options = ("--package", packages / "label", "--label", "1", *arguments)
    asked = {"EDGEQDM_TEST_RUN": "fail"}
    found = run(hooked / "hooked", *options, cwd=tmp_path, environment=asked)
    refused(found, exit_code, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("--label", "1", "--out", "x.png"), ("--self-test",)])
@pytest.mark.parametrize(("asked", "exit_code"), [("interrupt", 130), ("terminate", 143)])
def test_signals_end_with_their_codes_and_leave_nothing(
    hooked: Path,
    packages: Path,
    tmp_path: Path,
    asked: str,
    exit_code: int,
    arguments: tuple[str, ...],
) -> None:
    options = ("--package", packages / "label", *arguments)
    environment = {"EDGEQDM_TEST_RUN": asked}
    found = run(hooked / "hooked", *options, cwd=tmp_path, environment=environment)
    assert found == Finished(exit_code, "", "")
    assert list(tmp_path.iterdir()) == []


def test_signals_while_writing_leave_whole_files_only(
    hooked: Path, packages: Path, tmp_path: Path
) -> None:
    options = ("--package", packages / "label", "--label", "1", "--out", "x.png")
    asked = {"EDGEQDM_TEST_WRITE": "terminate"}
    found = run(hooked / "hooked", *options, "--latents", "x.npy", cwd=tmp_path, environment=asked)
    assert found == Finished(143, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (8, 8)


class Library:
    """libedgeqdm.so through its C ABI."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.edgeqdm_message.restype = ctypes.c_char_p
        self.c.edgeqdm_version.restype = ctypes.c_char_p
        self.c.edgeqdm_close.restype = None

    def open_memory(self, model: bytes, table: bytes, session: Any) -> int:
        n_model, n_table = ctypes.c_size_t(len(model)), ctypes.c_size_t(len(table))
        found: int = self.c.edgeqdm_open_memory(
            model, n_model, table, n_table, None, ctypes.c_size_t(0), None, ctypes.byref(session)
        )
        return found

    def begin(self, session: Any, labels: NDArray[np.int64]) -> int:
        found: int = self.c.edgeqdm_begin(
            session,
            ctypes.c_uint64(7),
            ctypes.c_uint32(0),
            len(labels),
            labels.ctypes.data_as(ctypes.c_void_p),
            None,
        )
        return found

    def latents(self, session: Any, n_images: int) -> tuple[int, Any]:
        samples = np.zeros((n_images, 4, 8, 8), np.float32)
        n = ctypes.c_size_t(samples.size)
        return self.c.edgeqdm_latents(session, samples.ctypes.data_as(ctypes.c_void_p), n), samples


@pytest.fixture
def library(shared: Path) -> Library:
    return Library(shared / "libedgeqdm.so")


@pytest.fixture
def session(library: Library, packages: Path) -> Any:
    opened = ctypes.c_void_p()
    model = (packages / "label" / "model.onnx").read_bytes()
    table = (packages / "label" / "schedule.bin").read_bytes()
    assert library.open_memory(model, table, opened) == 0
    yield opened
    library.c.edgeqdm_close(opened)


PROGRESS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)


def test_package_in_memory_can_be_cancelled_and_goes_on(
    library: Library, session: Any, packages: Path
) -> None:
    labels = np.array([0, 2, 1])
    assert library.begin(session, labels) == 0
    told: list[tuple[int, int]] = []

    def stop(done: int, steps: int, _: Any) -> int:
        told.append((done, steps))
        return 1

    assert library.c.edgeqdm_sample(session, PROGRESS(stop), None) == 130
    assert told == [(1, STEPS)]
    pixels = np.zeros(10, np.uint8)
    places = (pixels.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(10))
    assert library.c.edgeqdm_pixels(session, *places) == 3
    assert library.c.edgeqdm_message(session) == b"there are steps left"
    left = ctypes.c_uint32(99)
    assert library.c.edgeqdm_step(session, ctypes.byref(left)) == 0
    assert left.value == STEPS - 2
    assert library.c.edgeqdm_sample(session, None, None) == 0
    assert library.c.edgeqdm_step(session, ctypes.byref(left)) == 3
    assert left.value == STEPS - 2
    status, found = library.latents(session, 3)
    expected = expected_samples(packages / "label", labels)
    assert status == 0
    assert np.abs(found - expected).max() <= SAMPLES * np.abs(expected).max()


def test_graph_in_the_format_of_the_runtime_opens_from_memory(
    library: Library, packages: Path
) -> None:
    opened, package = ctypes.c_void_p(), packages / "ort"
    model, table = (package / ORT_GRAPH).read_bytes(), (package / "schedule.bin").read_bytes()
    assert library.open_memory(model, table, opened) == 0
    labels = np.array([2, 0])
    assert library.begin(opened, labels) == 0
    assert library.c.edgeqdm_sample(opened, None, None) == 0
    status, found = library.latents(opened, 2)
    expected = expected_samples(package, labels)
    assert status == 0
    assert np.abs(found - expected).max() <= SAMPLES * np.abs(expected).max()
    library.c.edgeqdm_close(opened)


def test_sessions_share_nothing(library: Library, session: Any, packages: Path) -> None:
    other, package = ctypes.c_void_p(), packages / "corrected"
    model, table = (package / "model.onnx").read_bytes(), (package / "schedule.bin").read_bytes()
    assert library.open_memory(model, table, other) == 0
    labels = {"label": np.array([0, 2]), "corrected": np.array([1])}
    drawn = {"label": session, "corrected": other}
    for kind, each in drawn.items():
        assert library.begin(each, labels[kind]) == 0
    for _ in range(STEPS):
        for each in drawn.values():
            assert library.c.edgeqdm_step(each, None) == 0
    for kind, each in drawn.items():
        status, found = library.latents(each, len(labels[kind]))
        expected = expected_samples(packages / kind, labels[kind])
        assert status == 0
        assert np.abs(found - expected).max() <= SAMPLES * np.abs(expected).max()
    library.c.edgeqdm_close(other)


def test_misuse_is_a_status_and_touches_nothing(
    library: Library, session: Any, packages: Path
) -> None:
    c, kept = library.c, ctypes.c_void_p(1234)
    assert library.open_memory(b"nothing", b"nothing", kept) == 8
    assert kept.value == 1234
    assert c.edgeqdm_open(None, None, ctypes.byref(kept)) == 3
    assert c.edgeqdm_open(str(packages).encode(), None, ctypes.byref(kept)) == 8
    assert kept.value == 1234
    for call in (c.edgeqdm_step, c.edgeqdm_describe):
        assert call(None, None) == 3
    assert c.edgeqdm_message(None) == b"the session is NULL"
    assert c.edgeqdm_step(session, None) == 3
    assert c.edgeqdm_message(session) == b"nothing has been begun"
    assert library.begin(session, np.array([0, 3])) == 3
    assert c.edgeqdm_message(session) == b"label 3 is out of range 0..2"
    assert c.edgeqdm_step(session, None) == 3
    assert library.begin(session, np.array([0])) == 0
    assert c.edgeqdm_message(session) == b""
    status, samples = library.latents(session, 2)
    assert (status, samples.any()) == (3, False)
    assert c.edgeqdm_open(b"", None, ctypes.byref(kept)) == 3
    assert kept.value == 1234
    assert c.edgeqdm_self_test(session, None, ctypes.c_size_t(3), None, None) == 3
    c.edgeqdm_close(None)


class Options(ctypes.Structure):
    _fields_ = (
        ("threads", ctypes.c_int),
        ("provider", ctypes.c_char_p),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_size_t),
        ("library", ctypes.c_char_p),
    )


@pytest.mark.parametrize("threads", [-1, 257, 2**31 - 1])
def test_threads_that_no_device_has_are_refused(
    library: Library, packages: Path, threads: int
) -> None:
    told, kept = ctypes.create_string_buffer(100), ctypes.c_void_p(1234)
    message = ctypes.cast(told, ctypes.c_char_p)
    options = Options(threads=threads, message=message, message_size=100)
    folder = str(packages / "label").encode()
    assert library.c.edgeqdm_open(folder, ctypes.byref(options), ctypes.byref(kept)) == 3
    assert told.value.startswith(b"threads must be at ")
    assert kept.value == 1234


@pytest.mark.parametrize("n", [1, 20, 21, 22, 23, 100])
def test_a_message_that_is_cut_ends_with_a_whole_character(library: Library, n: int) -> None:
    told = ctypes.create_string_buffer(n)
    message = ctypes.cast(told, ctypes.c_char_p)
    options, none = Options(message=message, message_size=n), ctypes.c_void_p()
    folder = "/nowhere/\u00e4\u00f6\u00fc".encode() * 5
    assert library.c.edgeqdm_open(folder, ctypes.byref(options), ctypes.byref(none)) == 8
    told.value.decode()


def test_what_the_progress_callback_may_not_do_is_refused(library: Library, session: Any) -> None:
    c, labels = library.c, np.array([0, 2])
    assert library.begin(session, labels) == 0
    found = []

    def again(done: int, steps: int, _: Any) -> int:
        deviation, passed = (ctypes.c_double * STEPS)(), ctypes.c_int()
        sampler, n = ctypes.c_double(), ctypes.c_size_t(STEPS)
        places = (deviation, n, ctypes.byref(sampler), ctypes.byref(passed))
        found.append(library.begin(session, labels))
        found.append(c.edgeqdm_step(session, None))
        found.append(c.edgeqdm_sample(session, PROGRESS(again), None))
        found.append(c.edgeqdm_self_test(session, *places))
        assert c.edgeqdm_message(session).startswith(b"the progress callback may")
        found.append(library.latents(session, 2)[0])
        return 0

    assert c.edgeqdm_sample(session, PROGRESS(again), None) == 0
    assert found == [3, 3, 3, 3, 0] * STEPS


def test_a_session_closed_by_its_progress_callback_ends_there(
    library: Library, packages: Path
) -> None:
    opened, folder = ctypes.c_void_p(), str(packages / "label").encode()
    assert library.c.edgeqdm_open(folder, None, ctypes.byref(opened)) == 0
    assert library.begin(opened, np.array([0])) == 0
    told: list[int] = []

    def close(done: int, steps: int, _: Any) -> int:
        told.append(done)
        library.c.edgeqdm_close(opened)
        return 0

    assert library.c.edgeqdm_sample(opened, PROGRESS(close), None) == 130
    assert told == [1]


def test_the_golden_run_is_found_from_another_working_directory(
    library: Library, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ctypes.c_void_p()
    monkeypatch.chdir(packages)
    assert library.c.edgeqdm_open(b"label", None, ctypes.byref(opened)) == 0
    monkeypatch.chdir(tmp_path)
    deviation, sampler, passed = (ctypes.c_double * STEPS)(), ctypes.c_double(), ctypes.c_int()
    places = (deviation, ctypes.c_size_t(STEPS), ctypes.byref(sampler), ctypes.byref(passed))
    assert library.c.edgeqdm_self_test(opened, *places) == 0, library.c.edgeqdm_message(opened)
    assert passed.value == 1
    library.c.edgeqdm_close(opened)


def test_a_golden_run_replaced_after_opening_is_refused(library: Library, package: Path) -> None:
    opened, golden = ctypes.c_void_p(), package / "golden.safetensors"
    assert library.c.edgeqdm_open(str(package).encode(), None, ctypes.byref(opened)) == 0
    golden.with_name("new").write_bytes(golden.read_bytes())
    golden.with_name("new").replace(golden)
    deviation, sampler, passed = (ctypes.c_double * STEPS)(), ctypes.c_double(), ctypes.c_int()
    places = (deviation, ctypes.c_size_t(STEPS), ctypes.byref(sampler), ctypes.byref(passed))
    assert library.c.edgeqdm_self_test(opened, *places) == 8
    expected = b"golden.safetensors was changed while it was read - try again"
    assert library.c.edgeqdm_message(opened) == expected
    library.c.edgeqdm_close(opened)


def test_shared_library_shows_its_c_functions_only(shared: Path) -> None:
    library = shared / "libedgeqdm.so"
    done = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}
    # Instantiations of the standard library stay visible, by its own wish.
    assert [name for name in names if name.startswith("_ZN7edgeqdm")] == []
    assert all(name.startswith("edgeqdm_") for name in names if not name.startswith("_Z"))


@pytest.mark.parametrize("how", ["option", "environment"])
@pytest.mark.parametrize("wrong", ["missing", "other", "old"])
def test_a_library_that_cannot_be_used_is_named(
    sanitized: Path, packages: Path, release: Path, tmp_path: Path, wrong: str, how: str
) -> None:
    library = {"missing": tmp_path / "no.so", "other": "libm.so.6"}.get(wrong)
    message = {"missing": "no.so", "other": "OrtGetApiBase"}.get(wrong, "1.22.0 is too old")
    if library is None:
        library, source = tmp_path / "old.so", tmp_path / "old.cpp"
        source.write_text(
            "#include <onnxruntime_c_api.h>\n"
            'static const char* version() noexcept { return "1.22.0"; }\n'
            "static const OrtApi* api(uint32_t) noexcept { return nullptr; }\n"
            "static const OrtApiBase base = {api, version};\n"
            'extern "C" const OrtApiBase* OrtGetApiBase() noexcept { return &base; }\n'
        )
        compile_cpp(library, [source], "-shared", "-fPIC", "-isystem", str(release / "include"))
    given = ["--library", str(library)] if how == "option" else []
    environment = {} if how == "option" else {"EDGEQDM_ONNXRUNTIME": str(library)}
    arguments = ("--package", packages / "label", "--self-test", *given)
    found = run(sanitized / "edgeqdm-run", *arguments, environment=environment)
    refused(found, 4, message)


def test_a_library_is_named_by_its_file(shared: Path, packages: Path, release: Path) -> None:
    """Before what the environment or the build says."""
    library = str((release / "lib" / "libonnxruntime.so").resolve())
    arguments = ("--package", packages / "label", "--self-test", "--library", library)
    environment = {"EDGEQDM_ONNXRUNTIME": "/nowhere"}
    assert run(shared / "edgeqdm-run", *arguments, environment=environment).exit_code == 0


def test_build_without_onnx_runtime_says_what_to_give(packages: Path, tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no C++ compiler")
    source = packages / "label" / "runtime" / "cpp"
    command = ["cmake", "-S", str(source), "-B", str(tmp_path), "-DONNXRUNTIME_ROOT=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "onnxruntime_c_api.h is not in '/nowhere/include'" in " ".join(done.stderr.split())
