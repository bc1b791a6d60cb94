"""Checks of the settings that learning takes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

from edgeqdm.errors import InputError

ANY = (0.0, math.inf)
"""[low, high) of a field: 0 or more."""
COUNT = (1.0, math.inf)
"""A whole number of at least 1."""
POSITIVE = (sys.float_info.min, math.inf)


def _fits(value: float, bounds: tuple[float, float]) -> bool:
    whole = bounds is not COUNT or isinstance(value, int)
    return whole and bounds[0] <= value < bounds[1]


def check_fields(
    settings: object, bounds: Mapping[str, tuple[float, float]], *, code: str, hint: str
) -> None:
    """Raise unless every named field that is not None lies in its [low, high).

    Raises:
        InputError: with `code`; names all fields that do not, and their values.
    """
    found = {name: getattr(settings, name) for name in bounds}
    wrong = [
        f"{name} {value}"
        for name, value in found.items()
        if value is not None and not _fits(value, bounds[name])
    ]
    if wrong:
        message = f"out of range: {', '.join(wrong)}"
        raise InputError(code, message, path=wrong[0].split()[0], hint=hint)
