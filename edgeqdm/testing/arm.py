"""Cross-compiles C++ for 64-bit Arm Linux and runs it here, by emulation.

That shows whether numbers are right, and nothing of speed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
SYSROOT = Path("/usr/aarch64-linux-gnu")
CPU = "cortex-a76"
# Dot products and half precision, as CPU has them: what is claimed here is executed there.
FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp"


def missing_for_arm() -> list[str]:
    """What is not installed."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return missing if SYSROOT.is_dir() else [*missing, str(SYSROOT)]


@dataclass(frozen=True)
class Arm:
    """A built tool, and how it is run here."""

    tool: Path
    prefix: Path
    library: Path

    def command(self) -> list[str]:
        """Runs the tool here; its arguments follow."""
        paths = f"LD_LIBRARY_PATH=/lib,EDGEQDM_ONNXRUNTIME={self.library}"
        emulator = ["qemu-aarch64-static", "-cpu", CPU, "-L", str(self.prefix), "-E", paths]
        return [*emulator, str(self.tool)]

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*self.command(), *map(str, arguments)]
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


def build_for_arm(
    source: Path,
    target: str,
    folder: Path,
    deps: Path,
    *options: str,
    toolchain: Path | None = None,
) -> Arm:
    """Build a CMake project with the toolchain of a package.

    Args:
        source: folder of `CMakeLists.txt`.
        target: name of the program.
        folder: to build in.
        deps: made by tools/native_deps.sh.
        options: of cmake.
        toolchain: default that in `source`.
    """
    toolchain = toolchain or source / "toolchains" / "aarch64-linux.cmake"
    configure = ["cmake", "-S", str(source), "-B", str(folder / "build"), "-DEDGEQDM_WERROR=ON"]
    configure += [
        f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",
        f"-DONNXRUNTIME_INCLUDE={deps / 'include'}",
        *options,
    ]
    for command in (configure, ["cmake", "--build", str(folder / "build"), "-j1"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
    library = deps / "lib-aarch64" / "libonnxruntime.so"
    return Arm(folder / "build" / target, write_prefix(folder / "root"), library)
