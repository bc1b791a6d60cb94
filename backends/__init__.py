"""Targets a quantized model can be emitted for, by name.

A backend is imported when it is asked for, so that a vendor library is needed only by those who
emit for it. Other distributions add targets through the entry-point group `edgeqdm.backends`; each
entry point is a callable without arguments that returns a `Backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from edgeqdm.errors import UnsupportedError

if TYPE_CHECKING:
    from edgeqdm.emit.backend import Backend

ENTRY_POINT_GROUP = "edgeqdm.backends"


def _onnxruntime() -> Backend:
    from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend()


BACKENDS: dict[str, Callable[[], Backend]] = {"onnxruntime": _onnxruntime}
"""The targets this distribution brings, each with the function that imports and makes it."""


def backend_names() -> tuple[str, ...]:
    """Names of all targets, in alphabetical order; nothing is imported."""
    return tuple(sorted({*BACKENDS, *entry_points(group=ENTRY_POINT_GROUP).names}))


def check_backend_name(name: str) -> None:
    """Raise UnsupportedError EQ-4301 if no target has this name; nothing is imported."""
    if name not in backend_names():
        known = ", ".join(backend_names())
        raise UnsupportedError("EQ-4301", f"there is no target {name!r}", hint=f"known: {known}")


def load_backend(name: str, form: str | None = None) -> Backend:
    """The target of this name; a built-in one goes before an entry point of the same name.

    Args:
        name: of the target.
        form: of its packages; default the standard one.

    Raises:
        UnsupportedError: EQ-4301 if no target has this name, EQ-4302 if the library it stands on
            cannot be imported, EQ-4303 if it has no such form.
    """
    backend = _load(name)
    if form is None:
        return backend
    if form not in backend.forms:
        known = ", ".join(backend.forms)
        raise UnsupportedError(
            "EQ-4303", f"target {name!r} has no form {form!r}", hint=f"known: {known}"
        )
    return backend.in_form(form)


def _load(name: str) -> Backend:
    check_backend_name(name)
    try:
        if name in BACKENDS:
            return BACKENDS[name]()
        return _from_entry_point(name)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] == "edgeqdm":
            raise
        extra = f'pip install "edgeqdm[{name}]"' if name in BACKENDS else "install what it needs"
        raise UnsupportedError(
            "EQ-4302", f"target {name!r} cannot be loaded: {error}", hint=extra
        ) from error


def _from_entry_point(name: str) -> Backend:
    (found, *_) = entry_points(group=ENTRY_POINT_GROUP, name=name)
    make: Any = found.load()
    backend: Backend = make()
    return backend
