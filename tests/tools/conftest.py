"""The scripts of `tools/benchmarks` as modules; they are no part of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "tools" / "benchmarks"


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return load_tool("ablation")


@pytest.fixture(scope="module")
def noise(ablation: ModuleType) -> ModuleType:
    """After `ablation`, which it imports."""
    return load_tool("noise")


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return load_tool("peers")


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    return load_tool("scale")
