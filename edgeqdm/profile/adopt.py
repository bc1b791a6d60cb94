"""Profiles read, checked and put together."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from statistics import median_high, median_low

from edgeqdm.errors import InputError
from edgeqdm.ir.codec import parse_record, read_bytes
from edgeqdm.ir.profile import (
    REFUSED_FLAGS,
    Flag,
    LatencyProfile,
    OpKey,
    Timing,
    is_sealed,
    sealed_profile,
)

PROFILE = "profile.json"
STALE = timedelta(days=90)
CLOCK_ERROR = timedelta(days=1)
"""By which the clocks of a device and of this host may differ and both be called right."""
OUTLIER = 30.0
LEAST_US = 5.0
"""Below it a ratio says nothing: the overhead of a graph has been taken off."""
_LISTED = 10


@dataclass(frozen=True)
class Adopted:
    """A profile that may be used.

    Attributes:
        profile: as it was stored.
        accepted: flags that would be refused and were accepted by name.
        warnings: what a user should know of it, one sentence each.
    """

    profile: LatencyProfile
    accepted: tuple[Flag, ...]
    warnings: tuple[str, ...]


def shipped_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with edgeqdm."""
    folder = files("edgeqdm.profiles")
    return tuple(sorted(f.name for f in folder.iterdir() if f.joinpath(PROFILE).is_file()))


def read_profile(
    source: str | Path,
    *,
    target: str | None = None,
    accept: Collection[Flag] = (),
    now: datetime | None = None,
) -> Adopted:
    """A profile out of its file, or one that comes with edgeqdm, by name.

    Args:
        source: file, folder that holds `profile.json`, or name.
        target: what it must be for.
        accept: flags of figures that are used all the same.
        now: what its age is counted to; default today.

    Raises:
        InputError: it is damaged, was edited, is for another target, or was measured under
            conditions that nothing may be decided on; names field and flag.
    """
    name, data = _read(source)
    profile = parse_record(data, LatencyProfile, name=name)
    if not is_sealed(profile):
        raise InputError(
            "EQ-3520",
            "payload_sha256 does not fit: the profile is damaged or was edited",
            path=name,
            hint="import the device's results again",
        )
    if target is not None and profile.target != target:
        raise InputError(
            "EQ-3521",
            f"the profile is for target {profile.target!r}, not {target!r}",
            path=name,
            hint=f"measure one for {target}: `edgeqdm profile`",
        )
    bad = sorted(refused_flags(profile) - set(accept))
    if bad:
        raise InputError(
            "EQ-3522",
            f"figures are flagged {', '.join(bad)}",
            path=name,
            hint=f"measure again, or --accept-flag {bad[0]}",
        )
    accepted = tuple(sorted(refused_flags(profile) & set(accept)))
    return Adopted(profile, accepted, _warnings(profile, now or datetime.now(UTC)))


def _read(source: str | Path) -> tuple[str, bytes]:
    if isinstance(source, str) and source in shipped_profiles():
        return source, files("edgeqdm.profiles").joinpath(source, PROFILE).read_bytes()
    path = Path(source)
    # A name can be too long or hold a NUL byte for the system to look it up.
    with contextlib.suppress(OSError, ValueError):
        if path.is_dir():
            path /= PROFILE
    try:
        there = path.exists()
    except (OSError, ValueError):
        there = False
    if not there:
        known = ", ".join(shipped_profiles()) or "none"
        raise InputError(
            "EQ-3523",
            "no such profile",
            path=path,
            hint=f"give a file, or one of those that come with edgeqdm: {known}",
        )
    return str(path), read_bytes(path)


def refused_flags(profile: LatencyProfile) -> set[Flag]:
    """Flags, of the device or of a figure, that a profile is refused for."""
    found = set(profile.flags)
    for timing in _timings(profile):
        found |= set(timing.flags)
    return found & REFUSED_FLAGS


def _timings(profile: LatencyProfile) -> list[Timing]:
    parts = (profile.entries, profile.boundaries, profile.wholes)
    phases = [timing for each in profile.phase_costs for timing in (each.alone, each.among)]
    return [profile.overhead, *(each.timing for part in parts for each in part), *phases]


def _warnings(profile: LatencyProfile, now: datetime) -> tuple[str, ...]:
    found = []
    age = now - datetime.fromisoformat(profile.created)
    if age < -CLOCK_ERROR:
        found.append(f"created in the future, {profile.created}: a clock was wrong")
    if age > STALE:
        found.append(f"stale: measured {age.days} days ago")
    weak = sum(bool(timing.flags) for timing in _timings(profile))
    if weak:
        found.append(f"{weak} of {len(_timings(profile))} figures are noisy or not settled")
    guessed = sum(entry.provenance == "estimated" for entry in profile.entries)
    if guessed:
        found.append(f"{guessed} of {len(profile.entries)} entries are estimated, not measured")
    found += [f"outlier: {name}" for name in _outliers(profile)]
    return tuple(found)


def _outliers(profile: LatencyProfile) -> list[str]:
    """Entries far above or below the same operation at most other precisions: a slip of the unit.

    Of two that are far apart both are named: nothing says which one is wrong.
    """
    by_key: dict[OpKey, dict[str, float]] = {}
    for entry in profile.entries:
        net = entry.timing.median_us - profile.overhead.median_us
        by_key.setdefault(entry.key, {})[str(entry.precision)] = net
    found = [
        f"{key} at {precision}"
        for key, times in by_key.items()
        for precision, us in times.items()
        if _far(us, [other for name, other in times.items() if name != precision])
    ]
    return found[:_LISTED]


def _far(us: float, others: list[float]) -> bool:
    """Whether it is far above at least half of the others, or far below."""
    if not others:
        return False
    above = us > OUTLIER * max(median_high(others), LEAST_US)
    return above or median_low(others) > OUTLIER * max(us, LEAST_US)


def merged(old: LatencyProfile, new: LatencyProfile) -> LatencyProfile:
    """One profile of what two hold; where both hold the same, the figure that was made later.

    It is as old as the older of the two.

    Raises:
        InputError: EQ-3525, if they are of different devices, runtimes, threads, modes or CPUs;
            names what differs.
    """
    same = ("target", "device", "runtime", "threads", "power_mode")
    for field in same:
        _check_same(field, getattr(old, field), getattr(new, field))
    if old.environment is not None and new.environment is not None:
        _check_same("cpus", old.environment.cpus, new.environment.cpus)
    if datetime.fromisoformat(new.created) < datetime.fromisoformat(old.created):
        old, new = new, old
    entries = {(e.key, e.precision): e for e in (*old.entries, *new.entries)}
    boundaries = {(b.kind, b.shape): b for b in (*old.boundaries, *new.boundaries)}
    wholes = {w.identity(): w for w in (*old.wholes, *new.wholes)}
    phases = {p.identity(): p for p in (*old.phase_costs, *new.phase_costs)}
    return sealed_profile(
        new.model_copy(
            update={
                "created": old.created,
                "flags": tuple(dict.fromkeys((*old.flags, *new.flags))),
                "entries": tuple(entries.values()),
                "boundaries": tuple(boundaries.values()),
                "wholes": tuple(wholes.values()),
                "phase_costs": tuple(phases.values()),
            }
        )
    )


def _check_same(field: str, old: object, new: object) -> None:
    if old != new:
        raise InputError(
            "EQ-3525",
            f"two profiles of different {field}: {old!r} and {new!r}",
            path=field,
            hint="keep them apart",
        )
