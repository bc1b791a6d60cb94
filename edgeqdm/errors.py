"""Every error edgeqdm raises on purpose, and the exit code each one maps to.

    EdgeqdmError                10  internal: never raised itself
    |- InputError                3  a file, option or argument is wrong
    |  |- ModelError             3  model, scheduler or conditioning
    |- UnsupportedError          4  understood, but no target or method can do it
    |- NumericalError            5  NaN, Inf or an overflow where a number was needed
    |- StorageError              6  saved state of a long run cannot be used
    |- OutputError               7  the result cannot be written
    |- VerifyError               8  a package is not what it claims to be
    |- ResourceError             9  memory or time would not suffice

Exit code 2 is a usage error of the command line, 130 and 143 follow SIGINT and SIGTERM.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class EdgeqdmError(Exception):
    """An error with a stable code, the thing it is about and what to do next.

    Attributes:
        code: stable identifier, `EQ-` and four digits; the first digit is the exit code.
        message: one sentence that says what was found.
        path: file, folder, layer or field the error is about.
        hint: what to do next.
    """

    exit_code: ClassVar[int] = 10

    def __init__(
        self, code: str, message: str, *, path: str | Path | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.path = None if path is None else str(path)
        self.hint = hint

    def __str__(self) -> str:
        where = f" ({self.path})" if self.path else ""
        then = f" - {self.hint}" if self.hint else ""
        return _printable(f"error[{self.code}]: {self.message}{where}{then}")


def _printable(text: str) -> str:
    """One line: names out of files can hold line breaks, escape sequences or lone surrogates."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InputError(EdgeqdmError):
    """A file, option or argument is wrong."""

    exit_code = 3


class ModelError(InputError):
    """A model, scheduler or conditioning cannot be used as given."""


class UnsupportedError(EdgeqdmError):
    """The request is understood, but no target or method here can do it."""

    exit_code = 4


class NumericalError(EdgeqdmError):
    """NaN, Inf or an overflow where a finite number is needed."""

    exit_code = 5


class StorageError(EdgeqdmError):
    """Saved state of a long run cannot be used."""

    exit_code = 6


class OutputError(EdgeqdmError):
    """The result cannot be written where it was asked for."""

    exit_code = 7


class VerifyError(EdgeqdmError):
    """A package is not what its manifest, plan or golden run says."""

    exit_code = 8


class ResourceError(EdgeqdmError):
    """Memory or time would not suffice."""

    exit_code = 9
