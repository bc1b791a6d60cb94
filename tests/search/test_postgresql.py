"""Several workers on one study, in a PostgreSQL of the tests' own."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy.pool import NullPool

from edgeqdm import searching
from edgeqdm.errors import StorageError
from edgeqdm.ir.codec import dump_record, read_record
from edgeqdm.ir.search import SearchRecord
from edgeqdm.search.storage import DATABASE, open_database
from edgeqdm.testing.tiny import write_tiny_unet

HOMES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def _program(name: str) -> str | None:
    """Path of one of the server's programs; Debian keeps them out of PATH."""
    found = shutil.which(name)
    return found or next((str(h / name) for h in reversed(HOMES) if (h / name).exists()), None)


def _why_absent() -> str | None:
    """Why no server can be started here; None if one can."""
    if _program("initdb") is None or _program("pg_ctl") is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and _owner() is None:
        return "PostgreSQL does not run as root, and there is no user postgres"
    return None


def _owner() -> str | None:
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return None


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """URL of an empty database."""
    owner = _owner()
    assert owner is not None
    folder = Path(tempfile.mkdtemp(prefix="edgeqdm-pg-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, owner)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        data, log = folder / "data", folder / "log"
        _run(owner, "initdb", "-D", data, "-A", "trust", "-U", owner, "--no-sync")
        settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        _run(owner, "pg_ctl", "-D", data, "-l", log, "-o", settings, "-w", "start")
        try:
            yield f"postgresql+psycopg://{owner}@127.0.0.1:{port}/postgres"
        finally:
            _run(owner, "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(owner: str, name: str, *arguments: str | Path) -> None:
    found = _program(name)
    assert found is not None
    as_owner = {"user": owner, "group": pwd.getpwnam(owner).pw_gid} if os.geteuid() == 0 else {}
    # The server inherits its starter's output: a pipe would be waited on for ever.
    subprocess.run(
        [found, *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        **as_owner,
    )


ABSENT = _why_absent()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
STUDY, TRIALS, STEPS = "shared", 40, 4
# The product's own heart beats once a minute; a dead worker is found after three beats.
DRIVER = """
import sys, time
from edgeqdm.search import storage, study
storage.HEARTBEAT_S, storage.GRACE_S = 1, 3
draw = study.Objective.__call__
def slow(self, trial):
    time.sleep(0.25)
    return draw(self, trial)
study.Objective.__call__ = slow
from edgeqdm.cli import main
sys.argv[0] = "edgeqdm"
main()
"""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with _server() as url:
        yield url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model and a profile of it."""
    found = tmp_path_factory.mktemp("search")
    write_tiny_unet(found / "model")
    arguments = ["profile", "model", "-o", "host.json", "--steps", str(STEPS), "--wholes", "0"]
    arguments += ["--seconds", "0.05", "--precision", "w8a8", "--quiet"]
    code, said = _start(found, arguments).end()
    assert code == 0, said
    yield found
    for process in _Process.started:
        process.kill()
        process.wait()


class _Process:
    """The command line, its stderr in a file."""

    started: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        descriptor, name = tempfile.mkstemp(dir=folder, suffix=".log")
        self._log = Path(name)
        command = [sys.executable, "-c", DRIVER, *arguments]
        self._process = subprocess.Popen(command, cwd=folder, stderr=descriptor)
        self.started.append(self._process)
        os.close(descriptor)

    def end(self) -> tuple[int, str]:
        """Exit code and what was said, when it ends."""
        return self._process.wait(timeout=240), self._log.read_text()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def _start(folder: Path, arguments: list[str]) -> _Process:
    return _Process(folder, arguments)


def _search(folder: Path, url: str, trials: int = TRIALS) -> _Process:
    arguments = ["search", "model", "-o", "out", "--profile", "host.json", "--steps", str(STEPS)]
    arguments += ["--storage", url, "--study", STUDY, "--trials", str(trials), "--samples", "2"]
    arguments += ["--precision", "w8a8", "--images", "2", "--no-remeasure", "--quiet"]
    return _start(folder, [*arguments, "--accept-flag", "throttled"])


def _worker(folder: Path, url: str) -> _Process:
    return _start(folder, ["worker", "--storage", url, "--study", STUDY, "--quiet"])


def _trials(url: str) -> list[optuna.trial.FrozenTrial]:
    with contextlib.suppress(StorageError), _study(url) as study:
        return study.get_trials(deepcopy=False)
    return []


@contextlib.contextmanager
def _study(url: str) -> Iterator[optuna.Study]:
    """The study, and no connection left open afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": NullPool})
    try:
        yield optuna.load_study(study_name=STUDY, storage=storage)
    except KeyError as problem:
        raise StorageError("EQ-6306", "not made yet") from problem
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _until(there: object, seconds: float = 120) -> None:
    assert callable(there)
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_study_of_three_workers_completes_though_one_is_killed(
    database: str, folder: Path
) -> None:
    first = _search(folder, database)
    _until(lambda: any(t.state is TrialState.COMPLETE for t in _trials(database)))
    others = [_worker(folder, database) for _ in range(2)]
    seen = len(_trials(database))
    _until(lambda: len(_trials(database)) > seen + 6)
    others[0].kill()
    for process in (first, others[1]):
        code, said = process.end()
        assert code == 0, said
    trials = _trials(database)
    assert [t.state for t in trials].count(TrialState.COMPLETE) >= TRIALS
    assert not [t.number for t in trials if t.state is TrialState.RUNNING]
    numbers = [t.number for t in trials]
    assert numbers == sorted(set(numbers))


@pytest.mark.slow
def test_a_worker_refuses_a_study_that_was_made_for_something_else(
    database: str, folder: Path
) -> None:
    assert _search(folder, database, trials=1).end()[0] == 0
    with _study(database) as study:
        stored = study.user_attrs["fingerprint"]
        study.set_user_attr("fingerprint", {**stored, "model": "another"})
        try:
            code, said = _worker(folder, database).end()
        finally:
            study.set_user_attr("fingerprint", stored)
    assert code == 6
    assert "EQ-6310" in said
    assert "model another" in said


def test_a_worker_names_the_studies_there_are(database: str) -> None:
    with pytest.raises(StorageError, match="there is no study 'none of these'") as caught:
        open_database(database, "none of these", create=False)
    assert caught.value.code == "EQ-6306"


def test_an_unreachable_database_is_named_without_its_password() -> None:
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/none"
    with pytest.raises(StorageError) as caught:
        open_database(url, STUDY, create=False)
    assert caught.value.code == "EQ-6304"
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_front_and_a_package_come_of_the_folder_alone(database: str, folder: Path) -> None:
    assert _search(folder, database, trials=1).end()[0] == 0
    shown = ["pareto", "out", "--trial", "best", "--plan", "best.json", "--force", "--quiet"]
    assert _start(folder, shown).end() == (0, "")
    emitted = ["emit", "model", "--steps", str(STEPS), "-o", "package", "--search", "out"]
    assert _start(folder, [*emitted, "--force", "--quiet"]).end() == (0, "")
    assert _start(folder, ["verify", "package", "--quiet"]).end() == (0, "")
    assert not (folder / "out" / DATABASE).exists()


@pytest.mark.slow
def test_a_worker_does_not_begin_before_the_search(database: str, folder: Path) -> None:
    assert _search(folder, database, trials=1).end()[0] == 0
    with _study(database) as study:
        stored = study.user_attrs["fingerprint"]
        study._storage.set_study_user_attr(study._study_id, "fingerprint", None)
        try:
            code, said = _worker(folder, database).end()
        finally:
            study.set_user_attr("fingerprint", stored)
    assert (code, "EQ-6308" in said) == (6, True), said


@pytest.mark.slow
def test_a_worker_without_the_folder_is_told_to_bring_it(database: str, folder: Path) -> None:
    assert _search(folder, database, trials=1).end()[0] == 0
    with _study(database) as study:
        where = study.user_attrs["folder"]
        study.set_user_attr("folder", str(folder / "nowhere"))
        try:
            with pytest.raises(StorageError, match="not on this host"):
                searching.folder_of(database, STUDY)
        finally:
            study.set_user_attr("folder", where)


def test_a_search_written_for_workers_says_how_to_load_its_model(folder: Path) -> None:
    record = read_record(folder / "out" / searching.SEARCH, SearchRecord)
    assert record.source == "model"
    assert dump_record(record) == (folder / "out" / searching.SEARCH).read_bytes()
