"""Settings of every test: one thread, fixed seeds, no display."""

from __future__ import annotations

import os

# Both are read once, when the library is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from edgeqdm.testing.native import DEPS_VARIABLE, native_deps

torch.set_num_threads(1)

# The same examples on every run and machine, none kept on disk; no deadline, since the first call
# of a torch operator may take longer than all later ones together.
settings.register_profile(
    "edgeqdm", derandomize=True, database=None, deadline=None, max_examples=25
)
settings.load_profile("edgeqdm")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's library and Debian's headers, as a release of ONNX Runtime has them."""
    deps = native_deps(Path(__file__).parents[1])
    if deps is None:
        pytest.skip(f"no ONNX Runtime headers: tools/native_deps.sh build/native, {DEPS_VARIABLE}")
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no C++ compiler")
    # Found without loading it, which no other test needs.
    spec = find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    (library,) = (Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*")
    folder = tmp_path_factory.mktemp("onnxruntime")
    (folder / "include").symlink_to(deps / "include")
    (folder / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "lib" / name).symlink_to(library)
    return folder
