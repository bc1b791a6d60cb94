"""The parts of the runtime that every package shares, as files."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from edgeqdm import __version__
from edgeqdm.emit import table
from edgeqdm.ir.package import SCHEMA_VERSION, ScheduleFile

RUNTIME_FOLDER = "runtime/python"
WEB_FOLDER = "runtime/web"
CPP_FOLDER = "runtime/cpp"
_SHARED = {
    "philox.py": ("edgeqdm.numerics", "philox.py"),
    "solver.py": ("edgeqdm.numerics", "solver.py"),
    "playback.py": ("edgeqdm.emit", "playback.py"),
}
_INSTALLED_IMPORT = "from edgeqdm.numerics import philox, solver\n"
_PACKAGED_IMPORT = "import philox\nimport solver\n"
_BYTES_PER_LINE = 24
_TEMPLATE = ".j2"


def environment() -> Environment:
    """Templates of this package; a variable that is missing is an error."""
    return Environment(
        loader=PackageLoader("edgeqdm.emit"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


def python_runtime() -> dict[str, str]:
    """Sources of the numpy-only sampling runtime by path inside the package."""
    found = {}
    for name, (package, resource) in _SHARED.items():
        source = files(package).joinpath(resource).read_text("utf-8")
        found[f"{RUNTIME_FOLDER}/{name}"] = source.replace(_INSTALLED_IMPORT, _PACKAGED_IMPORT)
    return found


def cpp_runtime(schedule: ScheduleFile) -> dict[str, str]:
    """Sources of the C++ runtime but for those of a target, by path inside the package.

    A target adds what runs its network, and the build file.
    """
    found = dict(cpp_sources(files("edgeqdm.emit").joinpath("templates/cpp")))
    rendered = {**cpp_headers(), "edgeqdm_table.h": _table_header(schedule)}
    kept = {name: text for name, text in found.items() if not name.endswith(_TEMPLATE)}
    return {f"{CPP_FOLDER}/{name}": text for name, text in sorted({**kept, **rendered}.items())}


def cpp_headers() -> dict[str, str]:
    """Headers that are rendered and the same in every package, by path below `runtime/cpp`."""
    return {"edgeqdm.h": _header(), "src/table_layout.h": _layout()}


def cpp_sources(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every file under a folder of templates, as (path below it, text)."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from cpp_sources(entry, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry.read_text("utf-8")


def _header() -> str:
    return (
        environment()
        .get_template("cpp/edgeqdm.h.j2")
        .render(version=__version__, schema_version=SCHEMA_VERSION)
    )


def _layout() -> str:
    return (
        environment()
        .get_template("cpp/src/table_layout.h.j2")
        .render(
            magic=", ".join(f"0x{byte:02X}" for byte in table.MAGIC),
            version=table.VERSION,
            header_bytes=table.HEADER.size,
            scalars_bytes=table.SCALARS_BYTES,
            max_values=table.MAX_VALUES,
            max_rank=table.MAX_RANK,
            scalars=table.SCALARS,
            arrays=table.ARRAYS,
            flags=table.FLAGS,
            conditioning=table.CONDITIONING,
            decoders=table.DECODERS,
        )
    )


def _table_header(schedule: ScheduleFile) -> str:
    data = table.pack_table(schedule)
    channels, height, width = schedule.sample_shape
    starts = range(0, len(data), _BYTES_PER_LINE)
    return (
        environment()
        .get_template("cpp/edgeqdm_table.h.j2")
        .render(
            size=len(data),
            steps=schedule.program.n_steps,
            channels=channels,
            height=height,
            width=width,
            labels=schedule.conditioning.n_labels,
            ranges=[
                (name, _literal(array.min()), _literal(array.max()))
                for name, array in table.table_arrays(schedule).items()
            ],
            lines=["".join(f"{b}," for b in data[k : k + _BYTES_PER_LINE]) for k in starts],
        )
    )


def _literal(value: np.float32) -> str:
    """A float literal of C that reads back to the same float32."""
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"
