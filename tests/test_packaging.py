"""What is installed, and what an import loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from edgeqdm import backends
from edgeqdm.errors import UnsupportedError

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
LINKED = ("backends", "profiles")
FOLDERS = ("edgeqdm", *LINKED)
BUILD = """
import sys
from setuptools import build_meta
dist = sys.argv[1]  # setuptools replaces sys.argv
build_meta.build_sdist(dist)
build_meta.build_wheel(dist)
"""


def _package_folders() -> dict[str, Path]:
    """Every folder with an `__init__.py`, by the name it is imported under."""
    # `rglob` does not follow the symlinks, so that no folder is met twice.
    inits = [init for name in FOLDERS for init in (ROOT / name).rglob("__init__.py")]
    names = [".".join(init.parent.relative_to(ROOT).parts) for init in inits]
    return {
        name if name.partition(".")[0] == "edgeqdm" else f"edgeqdm.{name}": init.parent
        for name, init in zip(names, inits, strict=True)
    }


def _declared_data() -> set[Path]:
    folders = _package_folders()
    return {
        file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in folders[package].glob(pattern)
        if file.is_file()
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel, built offline from a copy so that the tree stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    dist = tmp_path_factory.mktemp("dist")
    run = subprocess.run(
        [sys.executable, "-c", BUILD, str(dist)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


def test_every_package_folder_is_listed() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(_package_folders())


def test_every_file_is_a_module_of_a_package_or_declared_data() -> None:
    files = {file for name in FOLDERS for file in (ROOT / name).rglob("*") if file.is_file()}
    modules = {file for folder in _package_folders().values() for file in folder.glob("*.py")}
    data = {file for file in files - modules if file.suffix != ".pyc"}
    assert sorted(data) == sorted(_declared_data() - modules)


def test_every_data_pattern_matches_a_file() -> None:
    folders = _package_folders()
    idle = [
        f"{package}: {pattern}"
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        if not any(folders[package].glob(pattern))
    ]
    assert idle == []


@pytest.mark.parametrize("name", LINKED)
def test_linked_folder_is_a_relative_symlink(name: str) -> None:
    link = ROOT / "edgeqdm" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_wheel_holds_every_module_and_data_file_once(distributions: tuple[Path, Path]) -> None:
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    expected = [
        f"{package.replace('.', '/')}/{module.name}"
        for package, folder in _package_folders().items()
        for module in folder.glob("*.py")
    ]
    for file in _declared_data():
        path = file.relative_to(ROOT).as_posix()
        expected.append(path if path.startswith("edgeqdm/") else f"edgeqdm/{path}")
    assert sorted(names) == sorted(expected)


def test_sdist_holds_what_the_wheel_is_built_from(distributions: tuple[Path, Path]) -> None:
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        f.relative_to(ROOT).as_posix() for d in _package_folders().values() for f in d.glob("*.py")
    }
    data = {f.relative_to(ROOT).as_posix() for f in _declared_data()}
    assert sources | data | {"pyproject.toml", "README.md", "LICENSE"} <= names


def _python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_loads_no_heavy_library() -> None:
    code = """
import sys
import edgeqdm
heavy = {"torch", "diffusers", "onnx", "onnxruntime", "onnxscript", "matplotlib"}
print(sorted(heavy & set(sys.modules)), edgeqdm.__version__)
"""
    assert _python(code) == "[] 0.1.0"


def test_backend_loads_in_a_fresh_process() -> None:
    code = "from edgeqdm.backends import load_backend; print(load_backend('onnxruntime').name)"
    assert _python(code) == "onnxruntime"


def test_backends_are_found_without_their_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime" in backends.backend_names()


def test_backend_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.startswith("edgeqdm.backends.onnxruntime")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match=r"EQ-4302.*edgeqdm\[onnxruntime\]"):
        backends.load_backend("onnxruntime")


def test_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"EQ-4301.*'tpu'.*onnxruntime"):
        backends.load_backend("tpu")


def test_backend_of_another_distribution_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    group = backends.ENTRY_POINT_GROUP
    points = EntryPoints(
        [
            EntryPoint("other", "collections:OrderedDict", group),
            EntryPoint("onnxruntime", "collections:OrderedDict", group),
        ]
    )
    monkeypatch.setattr(backends, "entry_points", lambda **wanted: points.select(**wanted))
    assert backends.backend_names() == ("onnxruntime", "other")
    assert type(backends.load_backend("other")).__name__ == "OrderedDict"
    assert backends.load_backend("onnxruntime").name == "onnxruntime"
