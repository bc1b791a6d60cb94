"""The same package in every runtime: the same samples from the same seed?

    tools/native_deps.sh build/native; tools/web_deps.sh build/web
    python tools/benchmarks/runtimes.py -o docs/benchmarks/runtimes.json

The shipped reference models, quantized as `edgeqdm emit` does, drawn by the Python runtime, the C++
runtime on this machine, the C++ runtime for 64-bit Arm under emulation, and the page in a headless
Chromium. Samples are held against the Python runtime's: largest and RMS difference, relative to the
RMS of the samples, and the largest difference of a pixel. And what a step of the C++ runtime takes
beside its network (`host_loop.cpp`), one image, CPU time of one thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import reports
import torch
import typer
from numpy.typing import NDArray

from edgeqdm import load, pipeline
from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.bench.latency import time_interleaved
from edgeqdm.emit import playback
from edgeqdm.testing import browser as web
from edgeqdm.testing import native
from edgeqdm.testing.arm import build_for_arm, missing_for_arm

ROOT = Path(__file__).parents[2]
MODELS = ("unet-fmnist", "dit-fmnist")
SEED, LABELS = 7, "0,3,5,8"
BOUNDS = {"C++, x86-64": 1e-6, "C++, aarch64 (qemu)": 0.03, "browser": 0.03}
"""Of the RMS difference over the RMS of the samples. The first has the same library on the same
input; in the others float sums differ in their last bits, and codes that fall on the other side of
a half-tie are quantization noise drawn anew."""
Samples = NDArray[np.float32]


def by_python(package: Path, folder: Path) -> Samples:
    run = package / "runtime" / "python" / "run.py"
    return by_tool([sys.executable, str(run)], folder)


def by_tool(command: list[str], folder: Path) -> Samples:
    latents = folder / "x.npy"
    given = ["--seed", str(SEED), "--label", LABELS, "--quiet"]
    files = ["--out", str(folder / "sheet.png"), "--latents", str(latents)]
    subprocess.run([*command, *given, *files], check=True)
    found: Samples = np.load(latents)
    return found


def by_cpp(package: Path, folder: Path) -> Samples:
    deps = native.native_deps(ROOT)
    if deps is None:
        raise typer.BadParameter("no headers: tools/native_deps.sh build/native")
    (library,) = (Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*")
    build = folder / "cpp"
    source = package / "runtime" / "cpp"
    configure = ["cmake", "-S", str(source), "-B", str(build)]
    include = [f"-DONNXRUNTIME_INCLUDE={deps / 'include'}", f"-DONNXRUNTIME_LIB={library}"]
    for step in ([*configure, *include], ["cmake", "--build", str(build)]):
        subprocess.run(step, check=True, stdout=subprocess.DEVNULL)
    return by_tool([str(build / "edgeqdm-run"), "--package", str(package)], folder)


def by_arm(package: Path, folder: Path) -> Samples:
    deps = native.native_deps(ROOT)
    if deps is None or missing_for_arm():
        raise typer.BadParameter(f"missing: {missing_for_arm() or 'tools/native_deps.sh'}")
    arm = build_for_arm(package / "runtime" / "cpp", "edgeqdm-run", folder / "arm", deps)
    return by_tool([*arm.command(), "--package", str(package)], folder)


def by_browser(package: Path, folder: Path) -> Samples:
    root = folder / "site"
    root.mkdir()
    deps = Path(os.environ.get(web.DEPS_VARIABLE, ROOT / "build/web")).resolve()
    (root / "ort").symlink_to(deps / "ort")
    (root / "package").symlink_to(package)
    site, browser = web.Site(root), web.Browser(folder / "profile")
    try:
        browser.open(site.page("package"))
        return web.draw(browser, label=LABELS, seed=str(SEED)).latents
    finally:
        browser.close()
        site.close()


RUNTIMES: dict[str, Callable[[Path, Path], Samples]] = {
    "C++, x86-64": by_cpp,
    "C++, aarch64 (qemu)": by_arm,
    "browser": by_browser,
}


def compare(package: Path, found: Samples, expected: Samples) -> dict[str, float]:
    """Differences of two draws of one package."""
    off = found.astype(np.float64) - expected
    player = playback.open_player(package)
    pixels = [playback.decode(player, each).astype(int) for each in (found, expected)]
    size = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    return {
        "largest": float(np.abs(off).max()),
        "rms_share": float(np.sqrt(np.mean(off**2))) / size,
        "largest_of_a_pixel": int(np.abs(pixels[0] - pixels[1]).max()),
    }


def host_loop(package: Path, folder: Path) -> dict[str, float]:
    """CPU time of a step without the network, and of the network, in microseconds."""
    cpp = package / "runtime" / "cpp"
    parts = ("files", "network", "philox", "sampler", "sha256", "solver", "table")
    sources = [Path(__file__).with_name("host_loop.cpp")]
    sources += [cpp / "src" / f"{part}.cpp" for part in parts]
    include = (f"-I{cpp}", f"-I{cpp / 'src'}")
    program = native.compile_cpp(folder / "host_loop", sources, "-O3", *include)
    command = [str(program), str(package / "schedule.bin"), "1", "200"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    player, evaluate = playback.open_player(package), OnnxRuntimeBackend().open(package)
    x = np.zeros((1, *player.sample_shape), np.float32)
    label = np.zeros(1, np.int64)
    calls = {"network": lambda: playback.guided(player, evaluate, x, 1, label)}
    found = {"host_us": float(done.stdout)}
    found["network_us"] = round(time_interleaved(calls, rounds=60)["network"].p50_us, 1)
    found["share"] = round(found["host_us"] / (found["host_us"] + found["network_us"]), 5)
    return found


def measure(name: str, work: Path) -> dict[str, Any]:
    """Every runtime against the Python runtime, on one package."""
    package = work / name
    if not package.exists():
        pipeline.emit(load(f"reference:{name}"), package)
    with tempfile.TemporaryDirectory() as folder:
        expected = by_python(package, Path(folder))
    rows: dict[str, Any] = {}
    for runtime, draw in RUNTIMES.items():
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, Any] = compare(package, draw(package, Path(folder)), expected)
        row["bound"] = BOUNDS[runtime]
        row["within"] = bool(row["rms_share"] <= row["bound"])
        rows[runtime] = row
    steps = playback.open_player(package).table.n_steps
    with tempfile.TemporaryDirectory() as folder:
        return {"steps": steps, "runtimes": rows, "host_loop": host_loop(package, Path(folder))}


def main(
    out: Annotated[Path, typer.Option("-o", "--out")] = Path("docs/benchmarks/runtimes.json"),
    work: Annotated[Path, typer.Option()] = Path("build/runtimes"),
    model: Annotated[list[str], typer.Option()] = list(MODELS),  # noqa: B006
) -> None:
    """Emit, draw everywhere and compare."""
    torch.set_num_threads(1)
    # Packages of another commit would be runtimes of another commit.
    shutil.rmtree(work, ignore_errors=True)
    models = {name: measure(name, work.resolve()) for name in model}
    report = {
        **reports.head("runtimes.py"),
        "seed": SEED,
        "labels": LABELS,
        "models": models,
    }
    reports.write(report, out)
    bad = [
        f"{name}: {runtime}"
        for name, each in models.items()
        for runtime, row in each["runtimes"].items()
        if not row["within"]
    ]
    if bad:
        raise SystemExit(f"beyond the bound: {', '.join(bad)}")


if __name__ == "__main__":
    typer.run(main)
