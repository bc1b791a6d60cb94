"""The C++ runtime as a library that Python calls."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from edgeqdm.testing.native import WARNINGS, compile_cpp, write_cpp
from edgeqdm.testing.schedules import random_schedule

NATIVE = Path(__file__).parents[1] / "native"
NOT_PROBED = ("edgeqdm.cpp", "main.cpp", "self_test.cpp")
"""They need a target, or nothing here calls them."""


@pytest.fixture(scope="session")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the sources that every target shares."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    return write_cpp(tmp_path_factory.mktemp("cpp"), random_schedule(0))


@pytest.fixture(scope="session")
def probe(cpp: Path) -> ctypes.CDLL:
    """tests/native/probe.cpp and what it calls."""
    sources = [p for p in sorted((cpp / "src").glob("*.cpp")) if p.name not in NOT_PROBED]
    include = (f"-I{cpp}", f"-I{cpp / 'src'}")
    library = compile_cpp(
        cpp / "libprobe.so",
        [NATIVE / "probe.cpp", *sources],
        *("-O1", "-shared", "-fPIC", *WARNINGS, *include),
    )
    found = ctypes.CDLL(str(library))
    found.probe_image.restype = ctypes.c_size_t
    return found
