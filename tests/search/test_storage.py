"""A study has one owner, survives what happens to its file, and says what is wrong."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState

from edgeqdm.errors import EdgeqdmError, NumericalError, StorageError, UnsupportedError
from edgeqdm.search.storage import (
    DATABASE,
    DIRECTIONS,
    LEDGER,
    LOCK,
    append_to_ledger,
    hidden,
    locked,
    open_database,
    open_sqlite,
    read_ledger,
    sqlite_url,
    study_of_ledger,
)
from edgeqdm.search.study import MAX_ATTEMPTS, NumberedSampler, Owner

NAME, TRIALS = "study", 8
ODD_NAMES = ("a b", "100%", "100%20off", "what?x=1", "#1", "é", "mode=ro&a", "é" * 100, "'\"")


def objective(trial: optuna.Trial) -> tuple[float, float]:
    """A trial of each kind: complete, pruned, failed."""
    x = trial.suggest_int("x", 0, 1000)
    choice = trial.suggest_categorical("choice", ["fp32", "w8a8"])
    trial.set_user_attr("image_db", [0.1 * x, float(len(choice))])
    if trial.number % 4 == 2:
        raise optuna.TrialPruned
    if trial.number % 4 == 3:
        raise NumericalError("EQ-5602", "images [0] hold NaN or Inf")
    return x / 7, float(x % 13)


def go_on(
    folder: Path,
    target: int,
    judged: Callable[[optuna.Trial], tuple[float, float]] = objective,
) -> tuple[optuna.Study, tuple[str, ...]]:
    """Open the study of a folder as a new process would, and run it."""
    study, told = open_sqlite(folder, NAME)
    study.sampler = NumberedSampler("RandomSampler", 1)
    Owner(study, judged, folder / LEDGER).run(target)
    return study, told


def told_of(trial: FrozenTrial) -> tuple[object, ...]:
    """Everything but when it was."""
    return (
        trial.number,
        trial.state,
        trial.values,
        trial.params,
        trial.distributions,
        trial.user_attrs,
        trial.system_attrs,
    )


def trials_of(study: optuna.Study) -> list[tuple[object, ...]]:
    return [told_of(trial) for trial in study.get_trials()]


def quick_folder() -> tempfile.TemporaryDirectory[str]:
    """In memory where it can be: SQLite waits for a disk several times per trial."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def finished() -> Iterator[Path]:
    """A folder of 8 complete trials, and 7 that are pruned or failed."""
    with quick_folder() as folder:
        go_on(Path(folder), TRIALS)
        yield Path(folder)


@pytest.fixture(scope="module")
def expected(finished: Path) -> list[tuple[object, ...]]:
    found = trials_of(open_sqlite(finished, NAME)[0])
    states = [each[1] for each in found]
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    return found


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished one, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "search"))


def check(error: EdgeqdmError, code: str, *texts: str) -> None:
    assert error.code == code
    for text in texts:
        assert text in str(error)


# The lock.

HOLD = (
    "import sys, pathlib; from edgeqdm.search.storage import locked\n"
    "with locked(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_owner_is_refused_with_the_number_of_the_first(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(StorageError) as caught, locked(tmp_path):
        raise AssertionError("two owners")
    check(caught.value, "EQ-6301", f"process {holder.pid}", str(tmp_path))


def test_a_lock_goes_with_its_owner_and_its_file_is_no_obstacle(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK).read_text() == str(holder.pid)
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())


def test_a_folder_can_be_owned_again_after_its_owner_let_go(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "folder"):
        pass
    with locked(tmp_path / "new" / "folder"), pytest.raises(StorageError) as caught:  # noqa: SIM117
        with locked(tmp_path / "new" / "folder"):
            raise AssertionError("two owners")
    check(caught.value, "EQ-6301", str(os.getpid()))


def test_a_number_longer_than_the_owners_is_not_left_in_the_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("123456789012345")
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "search").write_text("")
    with pytest.raises(StorageError) as caught, locked(tmp_path / "search"):
        pass
    check(caught.value, "EQ-6302", str(tmp_path / "search"))


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageError) as caught, locked(tmp_path):
        pass
    check(caught.value, "EQ-6302", "No locks available", "local disk")


# The ledger.


def test_trials_come_back_from_the_ledger(
    finished: Path, expected: list[tuple[object, ...]]
) -> None:
    kept = read_ledger(finished / LEDGER)
    # Only the number is not the trial's own: it gets one when it is added to a study.
    found = [(number, *told_of(trial)[1:]) for number, trial in kept.items()]
    assert found == expected


@given(
    st.text(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.floats(), max_size=3),
    st.sampled_from([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]),
)
def test_any_trial_comes_back_from_the_ledger(
    text: str, value: float, image_db: list[float], state: TrialState
) -> None:
    trial = optuna.create_trial(
        state=state,
        values=[value, 1.0] if state is TrialState.COMPLETE else None,
        params={"choice": text},
        distributions={"choice": optuna.distributions.CategoricalDistribution([text, 1, None])},
        user_attrs={"reason": text, "image_db": image_db},
    )
    trial.number = 5
    with quick_folder() as folder:
        append_to_ledger(Path(folder) / LEDGER, trial)
        (found,) = read_ledger(Path(folder) / LEDGER).items()
    assert found[0] == 5
    # NaN differs from itself, but not as text.
    for name in ("state", "values", "params", "distributions", "system_attrs"):
        assert getattr(found[1], name) == getattr(trial, name)
    assert found[1].user_attrs["reason"] == text
    assert str(found[1].user_attrs["image_db"]) == str(image_db)


def test_a_ledger_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / LEDGER) == {}
    (tmp_path / LEDGER).touch()
    assert read_ledger(tmp_path / LEDGER) == {}


def test_a_torn_last_line_is_left_out_wherever_it_was_torn(finished: Path, tmp_path: Path) -> None:
    """And left where it is: it may be that of a search that is writing it."""
    data = (finished / LEDGER).read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    n_lines = data.count(b"\n")
    ledger = tmp_path / LEDGER
    for stop in (*range(start, len(data), 7), len(data) - 1):
        ledger.write_bytes(data[:stop])
        assert len(read_ledger(ledger)) == n_lines - 1
        assert ledger.read_bytes() == data[:stop]


def test_the_trial_of_a_torn_line_is_written_again(
    folder: Path, expected: list[tuple[object, ...]]
) -> None:
    whole = (folder / LEDGER).read_bytes()
    (folder / LEDGER).write_bytes(whole[:-20])
    study, told = go_on(folder, TRIALS)
    assert told == ()
    assert trials_of(study) == expected
    assert (folder / LEDGER).read_bytes() == whole


def test_a_flipped_byte_before_the_last_line_is_refused_with_its_line(
    finished: Path, tmp_path: Path
) -> None:
    data = (finished / LEDGER).read_bytes()
    lines = data.splitlines(keepends=True)
    generator, ledger, start = random.Random(0), tmp_path / LEDGER, 0
    for number, line in enumerate(lines[:-1], start=1):
        for place in (0, 8, len(line) - 1, *generator.sample(range(len(line)), 5)):
            at, bit = start + place, 1 << generator.randrange(8)
            damaged = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            ledger.write_bytes(damaged)
            with pytest.raises(StorageError) as caught:
                read_ledger(ledger)
            check(caught.value, "EQ-6305", f"line {number} ", str(ledger))
            assert ledger.read_bytes() == damaged
        start += len(line)


def test_deleting_the_damaged_line_mends_the_ledger(
    folder: Path, expected: list[tuple[object, ...]]
) -> None:
    """As the message says; the database still knows the trial."""
    lines = (folder / LEDGER).read_bytes().splitlines(keepends=True)
    (folder / LEDGER).write_bytes(b"".join(lines[:3] + lines[4:]))
    study, _ = go_on(folder, TRIALS)
    assert trials_of(study) == expected
    assert sorted(read_ledger(folder / LEDGER)) == list(range(len(expected)))


def test_half_a_line_is_taken_back(folder: Path, expected: list[tuple[object, ...]]) -> None:
    """What the kernel wrote of it before the file could grow no further."""
    ledger = folder / LEDGER
    before = ledger.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.raises(StorageError) as caught:
            append_to_ledger(ledger, optuna.create_trial(state=TrialState.FAIL))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    check(caught.value, "EQ-6304", str(ledger))
    assert ledger.read_bytes() == before


def test_a_commit_that_a_kill_cut_short_is_no_damage(
    folder: Path, expected: list[tuple[object, ...]]
) -> None:
    """SQLite leaves its journal; who opens the file next rolls back."""
    script = (
        "import os, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1])\n"
        "db.execute('PRAGMA cache_size = 1')\n"
        "db.execute('BEGIN')\n"
        "db.execute('DELETE FROM trial_params')\n"
        "db.execute('DELETE FROM trials')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder / DATABASE)], check=False)
    assert (folder / f"{DATABASE}-journal").stat().st_size
    study, told = open_sqlite(folder, NAME)
    assert told == ()
    assert trials_of(study) == expected


def test_a_reader_sees_what_was_found_and_touches_nothing(
    folder: Path, expected: list[tuple[object, ...]]
) -> None:
    with (folder / LEDGER).open("ab") as file:
        file.write(b"12345678 {half")
    (folder / DATABASE).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    study = study_of_ledger(folder, NAME)
    assert trials_of(study) == expected
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    trial = optuna.create_trial(state=TrialState.FAIL)
    with pytest.raises(StorageError) as caught:
        append_to_ledger(Path("/dev/full"), trial)
    check(caught.value, "EQ-6304", "No space left", "free some space")


# A damaged database.


def overwrite(file: Path, offset: int, seed: int = 0) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(random.Random(seed).randbytes(64))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda file: file.write_bytes(b"") and None,
    "noise at 0": lambda file: overwrite(file, 0),
    "noise at 100": lambda file: overwrite(file, 100),
    "noise at 16 KiB": lambda file: overwrite(file, 16 * 1024),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "truncated to 100": lambda file: os.truncate(file, 100),
    "text": lambda file: file.write_text("no database") and None,
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@damages
def test_a_damaged_database_is_made_again_of_the_ledger_and_kept(
    folder: Path, expected: list[tuple[object, ...]], damage: Callable[[Path], None]
) -> None:
    damage(folder / DATABASE)
    damaged = (folder / DATABASE).read_bytes()
    study, told = open_sqlite(folder, NAME)
    assert trials_of(study) == expected
    assert (folder / f"{DATABASE}.corrupt-1").read_bytes() == damaged
    (line,) = told
    assert f"{len(expected)} trials" in line
    assert f"{DATABASE}.corrupt-1 kept" in line
    assert study.directions == list(DIRECTIONS)


@pytest.mark.parametrize("page", range(0, 24, 4))
def test_noise_in_any_page_changes_no_trial(
    folder: Path, expected: list[tuple[object, ...]], page: int
) -> None:
    """SQLite has no checksums: what it loads without a word may still be damaged."""
    offsets = range(page * 4096, (page + 4) * 4096, 4096)
    whole = (folder / DATABASE).read_bytes()
    for offset in (each + 3000 for each in offsets if each + 4096 <= len(whole)):
        (folder / DATABASE).write_bytes(whole)
        overwrite(folder / DATABASE, offset, seed=offset)
        study, _ = open_sqlite(folder, NAME)
        assert trials_of(study) == expected, offset


def test_a_deleted_database_is_made_again(folder: Path, expected: list[tuple[object, ...]]) -> None:
    (folder / DATABASE).unlink()
    study, told = open_sqlite(folder, NAME)
    assert trials_of(study) == expected
    assert told == (f"{DATABASE}: missing; made again of {len(expected)} trials",)
    assert sorted(path.name for path in folder.iterdir()) == [LEDGER, DATABASE]


def test_a_database_older_than_its_ledger_is_made_again(
    folder: Path, expected: list[tuple[object, ...]]
) -> None:
    older = (folder / DATABASE).read_bytes()
    go_on(folder, TRIALS + 2)
    newer = trials_of(open_sqlite(folder, NAME)[0])
    (folder / DATABASE).write_bytes(older)
    study, told = open_sqlite(folder, NAME)
    assert trials_of(study) == newer
    assert len(newer) > len(expected)
    assert "lacks trials" in told[0]


def test_files_kept_from_earlier_damages_are_not_overwritten(folder: Path) -> None:
    for number in (1, 2):
        (folder / DATABASE).write_bytes(b"damage %d" % number)
        open_sqlite(folder, NAME)
    kept = [(folder / f"{DATABASE}.corrupt-{n}").read_bytes() for n in (1, 2)]
    assert kept == [b"damage 1", b"damage 2"]


def test_a_database_made_again_goes_on_as_the_old_one_would(folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    (folder / DATABASE).unlink()
    mended, _ = go_on(folder, TRIALS + 4)
    untouched, _ = go_on(whole, TRIALS + 4)
    assert trials_of(mended) == trials_of(untouched)


def test_numbers_of_trials_that_were_running_are_not_given_again(folder: Path) -> None:
    study, _ = open_sqlite(folder, NAME)
    study.sampler = NumberedSampler("RandomSampler", 1)
    lost = study.ask().number
    judged = study.ask()
    append_to_ledger(folder / LEDGER, study.tell(judged, (1.0, 2.0)))
    del study
    (folder / DATABASE).unlink()
    mended, _ = open_sqlite(folder, NAME)
    trials = mended.get_trials()
    assert (lost, judged.number) == (len(trials) - 2, len(trials) - 1)
    assert trials[lost].state is TrialState.FAIL
    assert trials[judged.number].values == [1.0, 2.0]


@damages
def test_without_a_ledger_damage_is_refused_and_the_file_kept(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    (folder / LEDGER).unlink()
    damage(folder / DATABASE)
    damaged = (folder / DATABASE).read_bytes()
    kept = folder / f"{DATABASE}.corrupt-1"
    with pytest.raises(StorageError) as caught:
        open_sqlite(folder, NAME)
    check(caught.value, "EQ-6303", str(kept))
    assert kept.read_bytes() == damaged


def test_where_both_are_damaged_nothing_is_overwritten(folder: Path) -> None:
    lines = (folder / LEDGER).read_bytes()
    (folder / LEDGER).write_bytes(b"0" + lines[1:] if lines[:1] != b"0" else b"1" + lines[1:])
    overwrite(folder / DATABASE, 0)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StorageError) as caught:
        open_sqlite(folder, NAME)
    check(caught.value, "EQ-6305", "line 1 ")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_empty_folder_is_a_new_study(tmp_path: Path) -> None:
    study, told = open_sqlite(tmp_path, NAME)
    assert (study.get_trials(), told) == ([], ())
    assert study.directions == list(DIRECTIONS)


# Trials whose process died.


class Died(BaseException):
    """The process is gone."""


def test_a_trial_that_was_running_is_run_again_under_its_number(tmp_path: Path) -> None:
    whole, _ = go_on(tmp_path, 2)
    asked = whole.ask().number
    del whole
    study, _ = go_on(tmp_path, 3)
    assert not study.get_trials(states=(TrialState.RUNNING,))
    assert study.get_trials()[asked].state.is_finished()
    assert study.get_trials()[asked].params
    assert [t.number for t in study.get_trials()] == list(range(len(study.get_trials())))


def test_a_trial_over_which_the_process_died_three_times_fails(tmp_path: Path) -> None:
    ran: list[int] = []

    def deadly(trial: optuna.Trial) -> tuple[float, float]:
        ran.append(trial.number)
        if trial.number == 1:
            raise Died
        return objective(trial)

    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(Died):
            go_on(tmp_path, 4, deadly)
    study, _ = go_on(tmp_path, 4, deadly)
    failed = study.get_trials()[1]
    assert failed.state is TrialState.FAIL
    assert "died 3 times" in failed.user_attrs["reason"]
    assert ran.count(1) == MAX_ATTEMPTS
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 4


def test_a_trial_that_finished_just_before_the_process_died_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the database and the ledger."""

    def die(ledger: Path, trial: FrozenTrial) -> None:
        raise Died

    monkeypatch.setattr("edgeqdm.search.study.append_to_ledger", die)
    with pytest.raises(Died):
        go_on(tmp_path, 1)
    monkeypatch.undo()
    assert read_ledger(tmp_path / LEDGER) == {}
    study, told = go_on(tmp_path, 1)
    assert told == ()
    assert len(study.get_trials()) == 1
    assert list(read_ledger(tmp_path / LEDGER)) == [0]


# Paths and URLs.


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    with locked(folder):
        go_on(folder, 2)
        study, told = go_on(folder, 3)
    assert told == ()
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 3
    assert sorted(path.name for path in folder.iterdir()) == [LOCK, LEDGER, DATABASE]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("in here#")
    folder.mkdir()
    go_on(folder, 1)
    study, told = go_on(folder, 2)
    assert (told, len(study.get_trials())) == ((), 2)
    assert sqlite_url(folder / DATABASE).startswith("sqlite:////")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:secret@host/db", "postgresql://u@host/db"),
        ("postgresql+psycopg://u:secret@host:5432/db", "postgresql+psycopg://u@host:5432/db"),
        ("postgresql://u:se@cr:et@host/db", "postgresql://u@host/db"),
        ("postgresql://u@host/db", "postgresql://u@host/db"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_a_password_is_hidden_and_nothing_else(url: str, expected: str) -> None:
    assert hidden(url) == expected


SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(f"postgresql+psycopg://u:{SECRET}@127.0.0.1:1/db", id="user"),
        pytest.param(f"postgresql+psycopg://127.0.0.1:1/db?user=u&password={SECRET}", id="query"),
        pytest.param(f"postgresql+nosuch://u:{SECRET}@127.0.0.1:1/db", id="driver"),
        pytest.param(f"postgresql//u:{SECRET}@127.0.0.1:1/db", id="typo"),
        pytest.param(f"sqlite://u:{SECRET}@host/db", id="sqlite"),
    ],
)
def test_no_message_holds_a_password(url: str) -> None:
    with pytest.raises(EdgeqdmError) as caught:
        open_database(url, NAME, create=False)
    assert SECRET not in str(caught.value)
    assert SECRET not in f"{caught.value.path} {caught.value.hint}"


@pytest.mark.parametrize("url", ["sqlite:///study.db", "sqlite+pysqlite:///x", "sqlite://"])
@pytest.mark.parametrize("create", [False, True])
def test_sqlite_is_not_shared(
    url: str, create: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        open_database(url, NAME, create=create)
    check(caught.value, "EQ-4320", "PostgreSQL")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["postgresql+nosuch://u@h/db", "nosuch://u@h/db"])
def test_an_unknown_driver_is_refused(url: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        open_database(url, NAME, create=True)
    check(caught.value, "EQ-4320", "driver", "edgeqdm[postgresql]")


@pytest.mark.parametrize("url", ["", "no url", "postgresql"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_database(url, NAME, create=True)
    check(caught.value, "EQ-6304", "no URL")


def test_a_database_that_does_not_answer_is_an_error_that_says_so() -> None:
    with pytest.raises(StorageError) as caught:
        open_database("postgresql+psycopg://u@127.0.0.1:1/db", NAME, create=True)
    check(caught.value, "EQ-6304", "127.0.0.1", "runs")
