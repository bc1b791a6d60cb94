"""The parts of the runtime that every package shares, as files."""

from __future__ import annotations

from importlib.resources import files

RUNTIME_FOLDER = "runtime/python"
WEB_FOLDER = "runtime/web"
_SHARED = {
    "philox.py": ("edgeqdm.numerics", "philox.py"),
    "solver.py": ("edgeqdm.numerics", "solver.py"),
    "playback.py": ("edgeqdm.emit", "playback.py"),
}
_INSTALLED_IMPORT = "from edgeqdm.numerics import philox, solver\n"
_PACKAGED_IMPORT = "import philox\nimport solver\n"


def python_runtime() -> dict[str, str]:
    """Sources of the numpy-only sampling runtime by path inside the package."""
    found = {}
    for name, (package, resource) in _SHARED.items():
        source = files(package).joinpath(resource).read_text("utf-8")
        found[f"{RUNTIME_FOLDER}/{name}"] = source.replace(_INSTALLED_IMPORT, _PACKAGED_IMPORT)
    return found
