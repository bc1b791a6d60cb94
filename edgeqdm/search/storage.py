"""Where a study is kept: one SQLite file with one owner, or a database for several hosts.

A search folder holds `study.db`, `ledger.jsonl` with a line for every finished trial, and `LOCK`,
which the kernel frees when its owner dies. The database can be made again of the ledger, and who
only wants to know what was found reads the ledger, whoever may be writing it.

Source: https://github.com/optuna/optuna, storages of 5.0; a killed process leaves its trial
RUNNING for ever, and SQLite has no checksum of its pages.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import sqlite3
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from edgeqdm.emit.writer import write_file_atomically
from edgeqdm.errors import StorageError, UnsupportedError

DATABASE, LEDGER, LOCK = "study.db", "ledger.jsonl", "LOCK"
HEARTBEAT_S, GRACE_S, RETRIES = 60, 180, 2
DIRECTIONS = (StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE)
"""Of latency and of image SQNR."""
BUSY_S = 60
_UNUSABLE = ("SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_PERM", "SQLITE_READONLY")
"""Errors that say nothing of what is in a file."""
_BESIDE = ("-journal", "-wal", "-shm")
_SECRET = re.compile(r"([?&](?:ssl)?passw(?:or)?d=)[^&#]*", re.IGNORECASE)
_USER = re.compile(r"(?P<before>.*?//)?(?P<user>[^:]*)")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own a search folder as long as the block lasts.

    Raises:
        StorageError: EQ-6301, if another process owns it, with its number; EQ-6302, if the folder
            cannot be written or its file system has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as problem:
        raise _unusable(folder, problem) from problem
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            owner = os.pread(file, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise StorageError(
                "EQ-6301",
                f"the search is locked by process {owner}",
                path=folder,
                hint="wait for it, or name another folder; several processes need PostgreSQL",
            ) from problem
        except OSError as problem:
            raise _unusable(folder, problem) from problem
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        # The lock goes with the descriptor; the file stays, or two could lock two files.
        os.close(file)


def _unusable(folder: Path, problem: OSError) -> StorageError:
    return StorageError(
        "EQ-6302",
        f"the search folder cannot be used: {problem.strerror}",
        path=folder,
        hint="name a folder on a local disk that you may write to",
    )


def sqlite_url(file: Path) -> str:
    """The URL of a database file, whatever characters its path has."""
    return f"sqlite:///{quote(str(file.resolve()), safe='/')}"


def open_sqlite(folder: Path, name: str) -> tuple[optuna.Study, tuple[str, ...]]:
    """The study of a folder that this process owns, made if there is none.

    A database that is damaged, missing or behind its ledger is kept under another name and made
    again of the ledger.

    Args:
        folder: locked by the caller.
        name: of the study.

    Returns:
        The study, and what had to be done to it, one sentence each.

    Raises:
        StorageError: EQ-6303, the ledger is damaged too; EQ-6304, the disk is full or another
            Optuna wrote the file.
    """
    file, ledger = folder / DATABASE, folder / LEDGER
    _cut_torn_line(ledger)
    kept = read_ledger(ledger)
    if not kept and not file.exists():
        return _make(file, name, {}), ()
    damage = _damage_of(file) or _difference(_load(file, name), kept)
    if damage is None:
        return _load(file, name), ()
    aside = _set_aside(file)
    what = f"{DATABASE}: {damage}"
    if not kept:
        raise StorageError(
            "EQ-6303",
            f"{what}; there is no ledger to make it again of",
            path=aside or file,
            hint="run the same again to begin anew; the file was kept",
        )
    told = f"{what}; made again of {len(kept)} trials" + (f", {aside.name} kept" if aside else "")
    return _make(file, name, kept), (told,)


def _make(file: Path, name: str, kept: Mapping[int, FrozenTrial]) -> optuna.Study:
    """A new database, whole or not there at all."""
    fresh = file.with_name(f"{file.name}.new")
    for end in ("", *_BESIDE):
        fresh.with_name(fresh.name + end).unlink(missing_ok=True)
    # Without a pool nothing holds the file under its first name.
    study = _load(fresh, name, poolclass=NullPool)
    with storage_errors(file):
        _replay(study, kept)
    os.replace(fresh, file)
    return _load(file, name)


def _difference(study: optuna.Study, kept: Mapping[int, FrozenTrial]) -> str | None:
    """What of the ledger a database does not tell; it has no checksums of its own."""
    try:
        with storage_errors(study.study_name):
            stored = {t.number: _text_of(t, t.number) for t in _finished(study)}
    except (StorageError, ValueError, LookupError, TypeError) as problem:
        return f"damaged ({problem})"
    if any(number not in stored for number in kept):
        return "it lacks trials of the ledger"
    differing = [number for number, t in kept.items() if stored[number] != _text_of(t, number)]
    return f"trial {differing[0]} differs from the ledger" if differing else None


def _load(file: Path, name: str, **engine: Any) -> optuna.Study:
    with storage_errors(file):
        options = {"connect_args": {"timeout": BUSY_S}, **engine}
        storage = RDBStorage(sqlite_url(file), engine_kwargs=options)
        return optuna.create_study(
            storage=storage, study_name=name, directions=DIRECTIONS, load_if_exists=True
        )


def _damage_of(file: Path) -> str | None:
    """What is wrong with a database file; None if nothing was found."""
    if not file.exists():
        return "missing"
    if file.stat().st_size == 0:
        return "empty"
    try:
        # Writable: a commit that a kill cut short is rolled back by who opens the file next.
        with contextlib.closing(sqlite3.connect(file, timeout=BUSY_S)) as db:
            (found,) = db.execute("PRAGMA quick_check").fetchone()
            db.execute("SELECT count(*) FROM trials").fetchone()
    except (sqlite3.DatabaseError, ValueError) as problem:
        if getattr(problem, "sqlite_errorname", "").startswith(_UNUSABLE):
            raise _translated(problem, file) from problem
        return f"damaged ({problem})"
    return None if found == "ok" else f"damaged ({str(found).splitlines()[0][:100]})"


def _set_aside(file: Path) -> Path | None:
    if not file.exists():
        return None
    number = 1
    while (aside := file.with_name(f"{file.name}.corrupt-{number}")).exists():
        number += 1
    os.rename(file, aside)
    for end in _BESIDE:
        leftover = file.with_name(file.name + end)
        if leftover.exists():
            shutil.move(leftover, aside.with_name(aside.name + end))
    return aside


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]


def _replay(study: optuna.Study, kept: Mapping[int, FrozenTrial]) -> None:
    """Add the ledger's trials under their old numbers."""
    for number in range(max(kept, default=-1) + 1):
        # A trial that was running or waiting leaves a gap; its number must not be given again.
        study.add_trial(kept.get(number) or optuna.create_trial(state=TrialState.FAIL))


def _text_of(trial: FrozenTrial, number: int) -> str:
    """A finished trial as one line of text, equal for equal trials."""
    entry = {
        "number": number,
        "state": trial.state.name,
        "values": trial.values,
        "params": trial.params,
        "distributions": {
            name: distribution_to_json(each) for name, each in trial.distributions.items()
        },
        "user_attrs": trial.user_attrs,
        "system_attrs": trial.system_attrs,
    }
    return json.dumps(entry, separators=(",", ":"), sort_keys=True)


def _line_of(trial: FrozenTrial) -> bytes:
    text = _text_of(trial, trial.number)
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def append_to_ledger(ledger: Path, trial: FrozenTrial) -> None:
    """Write a finished trial down, on the disk when this returns.

    Raises:
        StorageError: EQ-6304, if there is no space.
    """
    line = _line_of(trial)
    try:
        with ledger.open("ab", buffering=0) as file:
            before, rest = file.tell(), memoryview(line)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                # Half a line would damage the next one.
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), before)
                raise
    except OSError as problem:
        raise _no_space(ledger, problem) from problem


def read_ledger(ledger: Path) -> dict[int, FrozenTrial]:
    """Finished trials by number; a last line that was not written to its end is left out.

    Raises:
        StorageError: EQ-6305, if another line is damaged; names it.
    """
    if not ledger.exists():
        return {}
    found = {}
    for number, line in enumerate(_whole_lines(ledger).splitlines(), start=1):
        checksum, _, text = line.partition(b" ")
        if f"{zlib.crc32(text):08x}".encode() != checksum:
            raise StorageError(
                "EQ-6305",
                f"line {number} of the ledger is damaged",
                path=ledger,
                hint="delete this line, then run the same again: its trial is taken from study.db, "
                "or run again",
            )
        trial = _trial_of(json.loads(text))
        found[trial[0]] = trial[1]
    return found


def _whole_lines(ledger: Path) -> bytes:
    data = ledger.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def _cut_torn_line(ledger: Path) -> None:
    if ledger.exists():
        os.truncate(ledger, len(_whole_lines(ledger)))


def study_of_ledger(folder: Path, name: str) -> optuna.Study:
    """What the ledger of a folder tells, in memory; nothing is locked, written or mended.

    Raises:
        StorageError: EQ-6305, if the ledger is damaged.
    """
    with storage_errors(folder):
        study = optuna.create_study(study_name=name, directions=DIRECTIONS)
        _replay(study, read_ledger(folder / LEDGER))
    return study


def write_ledger(folder: Path, study: optuna.Study) -> None:
    """Copy the finished trials of a shared study to the folder, where readers look for them."""
    lines = [_line_of(trial) for trial in _finished(study)]
    write_file_atomically(folder / LEDGER, b"".join(lines))


def _trial_of(entry: Mapping[str, Any]) -> tuple[int, FrozenTrial]:
    distributions: dict[str, BaseDistribution] = {
        name: json_to_distribution(text) for name, text in entry["distributions"].items()
    }
    trial = optuna.create_trial(
        state=TrialState[entry["state"]],
        values=entry["values"],
        params=entry["params"],
        distributions=distributions,
        user_attrs=entry["user_attrs"],
        system_attrs=entry["system_attrs"],
    )
    return entry["number"], trial


def check_shared(url: str) -> None:
    """Raise UnsupportedError EQ-4320 if a database cannot be shared by several processes."""
    if url.startswith("sqlite"):
        raise UnsupportedError(
            "EQ-4320",
            "one SQLite file cannot be shared by several processes",
            path=hidden(url),
            hint="give a PostgreSQL URL, or leave the storage out for one process",
        )


def open_database(url: str, name: str, *, create: bool) -> optuna.Study:
    """A study in a database that several processes share, with heartbeats.

    Args:
        url: of SQLAlchemy, e.g. `postgresql+psycopg://user@host/database`.
        name: of the study.
        create: make it if it is not there; one process alone may do that.

    Raises:
        UnsupportedError: EQ-4320, if it is SQLite or the driver is not installed.
        StorageError: EQ-6306, if there is no such study; EQ-6304, if the database cannot be used.
    """
    check_shared(url)
    with storage_errors(hidden(url)), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = RDBStorage(
            url,
            heartbeat_interval=HEARTBEAT_S,
            grace_period=GRACE_S,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            # Nothing is left open between transactions, whatever becomes of the process.
            engine_kwargs={"poolclass": NullPool},
        )
        try:
            return optuna.load_study(study_name=name, storage=storage)
        except KeyError:
            if create:
                return optuna.create_study(
                    storage=storage,
                    study_name=name,
                    directions=DIRECTIONS,
                    load_if_exists=True,
                )
            known = ", ".join(study.study_name for study in storage.get_all_studies()) or "none"
            raise StorageError(
                "EQ-6306",
                f"there is no study {name!r}; there are: {known}",
                path=hidden(url),
                hint="`edgeqdm search --storage` makes one",
            ) from None


def hidden(url: str) -> str:
    """A URL without its password."""
    head, at, tail = _SECRET.sub(r"\1***", url).rpartition("@")
    if not at:
        return tail
    found = _USER.match(head)
    assert found is not None, "both parts may be empty"
    return f"{found['before'] or ''}{found['user']}@{tail}"


@contextlib.contextmanager
def storage_errors(where: str | Path) -> Iterator[None]:
    """Turn what Optuna and SQLAlchemy raise into a StorageError that names the cause."""
    try:
        yield
    except (NoSuchModuleError, ModuleNotFoundError) as problem:
        raise UnsupportedError(
            "EQ-4320",
            f"the database driver cannot be loaded: {problem}",
            path=where,
            hint='pip install "edgeqdm[postgresql]", and write postgresql+psycopg://...',
        ) from problem
    except ArgumentError as problem:
        raise StorageError(
            "EQ-6304",
            "no URL of a database",
            path=where,
            hint="e.g. postgresql+psycopg://user@host/database",
        ) from problem
    except (
        SQLAlchemyError,
        StorageInternalError,
        AssertionError,
        RuntimeError,
        sqlite3.DatabaseError,
    ) as problem:
        raise _translated(problem, where) from problem


def _translated(problem: BaseException, where: str | Path) -> StorageError:
    # Optuna hides a full disk behind an AssertionError; the cause is further down the chain.
    chain: list[BaseException] = []
    step: BaseException | None = problem
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or step.__context__
    reason = " ".join(str(chain[-1]).split())[:200] or type(chain[-1]).__name__
    full = any("disk is full" in str(each) or "No space left" in str(each) for each in chain)
    hint = "check that the database runs and may be written"
    if full:
        hint = "free some space, then run the same again: finished trials are kept"
    elif "upgrade" in reason or "newer optuna" in reason:
        hint = "the study was written by another Optuna; see its message"
    return StorageError("EQ-6304", f"the study cannot be used: {reason}", path=where, hint=hint)


def _no_space(path: Path, problem: OSError) -> StorageError:
    return StorageError(
        "EQ-6304",
        f"the ledger cannot be written: {problem.strerror}",
        path=path,
        hint="free some space, then run the same again: finished trials are kept",
    )
