"""Targets are found by name, loaded when asked for, and missing ones say how to get them."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from edgeqdm import backends
from edgeqdm.backends import ENTRY_POINT_GROUP, backend_names, check_backend_name, load_backend
from edgeqdm.errors import UnsupportedError


class EntryPoints(list[Any]):
    """What `importlib.metadata.entry_points(group=...)` returns, for one planted target."""

    @property
    def names(self) -> set[str]:
        return {entry.name for entry in self}


class EntryPoint:
    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self._make = make

    def load(self) -> Callable[[], Any]:
        return self._make


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def plant(*found: EntryPoint) -> None:
        def entry_points(*, group: str, name: str | None = None) -> EntryPoints:
            assert group == ENTRY_POINT_GROUP
            return EntryPoints(e for e in found if name is None or e.name == name)

        monkeypatch.setattr(backends, "entry_points", entry_points)

    return plant


def test_built_in_target_is_loaded_by_its_own_name() -> None:
    for name in backend_names():
        assert load_backend(name).name == name


def test_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError) as caught:
        load_backend("abacus")
    with pytest.raises(UnsupportedError, match="EQ-4301"):
        check_backend_name("abacus")
    assert caught.value.code == "EQ-4301"
    assert "abacus" in caught.value.message
    assert "onnxruntime" in (caught.value.hint or "")


def test_missing_vendor_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.startswith("edgeqdm.backends.onnxruntime")]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError) as caught:
        load_backend("onnxruntime")
    assert caught.value.code == "EQ-4302"
    assert caught.value.hint == 'pip install "edgeqdm[onnxruntime]"'


def test_defect_of_our_own_is_not_reported_as_a_missing_library(plant: Callable[..., None]) -> None:
    def broken() -> Any:
        raise ModuleNotFoundError("No module named 'edgeqdm.gone'", name="edgeqdm.gone")

    plant(EntryPoint("theirs", broken))
    with pytest.raises(ModuleNotFoundError, match="gone"):
        load_backend("theirs")


def test_entry_point_adds_a_target_but_never_replaces_a_built_in_one(
    plant: Callable[..., None],
) -> None:
    plant(EntryPoint("theirs", lambda: "made"), EntryPoint("onnxruntime", lambda: "impostor"))
    assert backend_names() == tuple(sorted({*backends.BACKENDS, "theirs"}))
    made: Any = load_backend("theirs")
    assert made == "made"
    assert load_backend("onnxruntime").name == "onnxruntime"


def test_every_target_can_be_loaded_before_anything_else() -> None:
    # In this process other tests have imported what a target may forget to import itself.
    script = (
        "from edgeqdm.backends import backend_names, load_backend\n"
        "for name in backend_names(): load_backend(name).versions()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_listing_targets_imports_no_vendor_library() -> None:
    script = (
        "import sys\n"
        "from edgeqdm.backends import backend_names\n"
        "backend_names()\n"
        "print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
