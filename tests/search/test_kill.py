"""Killed at any moment, a search loses no trial and ends where it would have ended.

Set EDGEQDM_KILLS for more kills than on every commit.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from edgeqdm.search.storage import LEDGER, open_sqlite, read_ledger
from edgeqdm.search.study import ORIGIN

KILLS = int(os.environ.get("EDGEQDM_KILLS", "20"))
KILLS_ON_DISK = max(3, KILLS // 4)
"""A disk takes its time for every transaction."""
TARGET = max(60, 5 * KILLS)
N_STARTS = 27
TRIALS_PER_KILL = (0, 1, 2, 3, 4)
LONGEST_WAIT_S = 0.03
"""Of a kill after the trial it waited for: as long as a trial or two."""
STARTS_PER_DEATH = (0, 1, 2, 1, 0, 2)
"""Starts that are written down before a process dies over one of the next."""
LONGEST_START_S = 0.02
"""Of a death after the start it waited for: as long as a start or two."""
PATIENCE_S = 60.0
SEED = 5

DRIVER = '''
"""Loads the search once and runs it in children, as many as asked for on standard input."""

import itertools
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import optuna
from sqlalchemy import event
from sqlalchemy.engine import Engine

from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.ir.profile import OpKey
from edgeqdm.profile.opkeys import NetworkKeys
from edgeqdm.profile.predict import LatencyModel, StorageModel
from edgeqdm.search import study as search
from edgeqdm.search.space import Candidate, make_space
from edgeqdm.search.storage import LEDGER, locked, open_sqlite

optuna.logging.set_verbosity(optuna.logging.ERROR)
STEPS, NAMES = 8, ("q", "up", "down")
SHARE = {FP32: 1.0, W8A8: 0.3, Precision("w4a8"): 0.4}


def make_pricing():
    key = OpKey(kind=LayerKind.LINEAR, input_shape=(1, 8), weight_shape=(8, 8), bias=True)
    network = NetworkKeys("a" * 64, 1, dict.fromkeys(NAMES, key), ())
    layers = tuple(LayerAssignment(layer=n, precision=W8A8, reason="by rule") for n in NAMES)
    phase = Phase(start=0, stop=STEPS, layers=layers)
    base = DeploymentPlan(target="none", model="a" * 64, n_steps=STEPS, phases=(phase,))
    space = make_space(base, network, {LayerKind.LINEAR: tuple(SHARE)}, max_phases=2)
    net_us = {(key, precision): 100 * share for precision, share in SHARE.items()}
    storage = StorageModel(network, lambda *_: (64, 64), 1000, {})
    return search.Pricing(space, LatencyModel(network, net_us, {}, 10.0, {}, None), storage)


class Judge:
    """So even that nothing is pruned: then every trial is complete."""

    def quantized(self, plan):
        return plan

    def image_sqnr_db(self, plan, images):
        time.sleep(0.002)
        lost = sum(SHARE[a.precision] * (p.stop - p.start) for p in plan.phases for a in p.layers)
        return np.array([20 + 0.001 * lost + 0.0001 * k for k in images])


def write_down(oracle):
    """Note every trial that the study was told of, before the ledger is."""
    real = search.append_to_ledger

    def noted(ledger, trial):
        file = os.open(oracle, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, f"{trial.number} {trial.state.name}\\n".encode())
        os.fsync(file)
        os.close(file)
        real(ledger, trial)

    search.append_to_ledger = noted


def every_start():
    rows = itertools.product(SHARE, repeat=len(NAMES))
    return [(" ".join(row), PRICING.space.params(Candidate((0,), (row,)))) for row in rows]


def run(folder, oracle, target):
    write_down(oracle)
    with locked(folder):
        study, told = open_sqlite(folder, "study")
        assert told == (), told
        study.sampler = search.NumberedSampler(sys.argv[1], 7)
        search.prepare(study, {"model": "a"}, every_start()[:target])
        objective = search.Objective(PRICING, Judge(), search.Limits())
        search.Owner(study, objective, folder / LEDGER).run(target)


def die_at_statement(number):
    """The process is gone after so many statements of SQL."""
    left = [number]

    def count(*_):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)

    event.listen(Engine, "before_cursor_execute", count)


def die_among_starts(number, wait_s):
    """The process is gone a moment after so many starts were written down."""
    left = [number]
    real = optuna.Study.enqueue_trial

    def counted(*args, **options):
        if left[0] == 0:
            # Nothing handles the alarm, so it ends the process wherever that is.
            signal.setitimer(signal.ITIMER_REAL, wait_s)
        if left[0] < -1:
            # A quick disk must not be done with all of them before the alarm is there.
            signal.pause()
        left[0] -= 1
        real(*args, **options)

    optuna.Study.enqueue_trial = counted


PRICING = make_pricing()
print("ready 0", flush=True)
for line in sys.stdin:
    target, statements, starts, wait_s, folder, oracle = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        status = 1
        try:
            if int(statements):
                die_at_statement(int(statements))
            if float(wait_s):
                die_among_starts(int(starts), float(wait_s))
            run(Path(folder), oracle, int(target))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(f"started {child}", flush=True)
    _, status = os.waitpid(child, 0)
    print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)
'''


class Supervisor:
    """Runs searches in children of one process that has everything loaded."""

    def __init__(self, script: Path, sampler: str, errors: Path) -> None:
        self._errors = errors.open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(script), sampler],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._number("ready")

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-2000:]

    def _number(self, said: str) -> int:
        """What stands beside a word; answers that a failed test did not read are skipped."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, _, number = line.partition(" ")
            if word == said:
                return int(number)
        raise AssertionError(self.errors())

    def start(
        self,
        folder: Path,
        target: int,
        *,
        statements: int = 0,
        starts: int = 0,
        wait_s: float = 0.0,
    ) -> int:
        """Begin or go on with a search; the number of its process.

        Args:
            folder: of the search.
            target: complete trials.
            statements: of SQL, after which it dies; 0 for none.
            starts: written down, after which it dies.
            wait_s: how long after; 0 if it shall not.
        """
        assert self._process.stdin is not None
        oracle = folder.with_suffix(".oracle")
        told = map(str, (target, statements, starts, wait_s, folder, oracle))
        self._process.stdin.write("\t".join(told) + "\n")
        self._process.stdin.flush()
        child = self._number("started")
        assert child > 1, "0 and below are more than one process"
        return child

    def wait(self) -> int:
        """Exit code of what was started, negative after a signal."""
        return self._number("ended")

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()


@pytest.fixture(scope="module", params=["TPESampler"])
def supervisor(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Supervisor]:
    folder = tmp_path_factory.mktemp("driver")
    script = folder / "driver.py"
    script.write_text(DRIVER, encoding="utf-8")
    found = Supervisor(script, request.param, folder / "errors.txt")
    yield found
    found.close()


def oracle_of(folder: Path) -> list[tuple[int, str]]:
    """(number, state) of every trial that was finished, in that order."""
    file = folder.with_suffix(".oracle")
    # The last line may be half written.
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [(int(number), state) for number, state in map(str.split, lines)]


def trials_in(folder: Path) -> list[FrozenTrial]:
    study, told = open_sqlite(folder, "study")
    assert told == ()
    found: list[FrozenTrial] = study.get_trials()
    return found


def params_of(trials: list[FrozenTrial]) -> list[dict[str, Any]]:
    return [trial.params for trial in trials]


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """In memory where it can be: a kill loses nothing that the kernel has, and it is quick."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def uninterrupted(supervisor: Supervisor, memory: Path) -> list[FrozenTrial]:
    folder = memory / "whole"
    supervisor.start(folder, TARGET)
    assert supervisor.wait() == 0, supervisor.errors()
    return trials_in(folder)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a kill can leave a transaction half written."""
    return tmp_path_factory.mktemp("disk")


def await_trials(folder: Path, number: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(oracle_of(folder)) < number and time.monotonic() < deadline:
        time.sleep(0.001)


def kill_among_trials(supervisor: Supervisor, folder: Path, n: int, seed: int) -> int:
    """Kill a search again and again, when it has finished a few more trials; how often it was."""
    generator = random.Random(seed)
    last = 1
    for done in range(n):
        # A trial is given up after three deaths: never two kills in a row without one finished.
        number = generator.choice(TRIALS_PER_KILL if last else TRIALS_PER_KILL[1:])
        before = len(oracle_of(folder))
        child = supervisor.start(folder, TARGET)
        await_trials(folder, before + number)
        time.sleep(generator.uniform(0, LONGEST_WAIT_S))
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            # A quick machine: it was finished before its last kills.
            assert supervisor.wait() == 0, supervisor.errors()
            return done
        assert supervisor.wait() == -signal.SIGKILL, supervisor.errors()
        last = number
    return n


def end(supervisor: Supervisor, folder: Path) -> None:
    supervisor.start(folder, TARGET)
    assert supervisor.wait() == 0, supervisor.errors()


@dataclass(frozen=True)
class Begun:
    """A search on a disk, killed while it wrote down what to begin with.

    Attributes:
        folder: of the search, which has finished no trial.
        there: starts that were written down at each kill.
    """

    folder: Path
    there: tuple[int, ...]


@pytest.fixture(scope="module")
def begun(supervisor: Supervisor, disk: Path) -> Begun:
    folder, there = disk / "killed", []
    generator = random.Random(SEED)
    for starts in STARTS_PER_DEATH:
        wait_s = generator.uniform(0.001, LONGEST_START_S)
        supervisor.start(folder, TARGET, starts=starts, wait_s=wait_s)
        assert supervisor.wait() == -signal.SIGALRM, supervisor.errors()
        there.append(len(trials_in(folder)))
    assert not oracle_of(folder)
    return Begun(folder, tuple(there))


@pytest.fixture(scope="module", params=["memory", "disk"])
def killed(
    request: pytest.FixtureRequest, supervisor: Supervisor, memory: Path, begun: Begun
) -> Path:
    """A search that was killed again and again and then run to its end."""
    on_disk = request.param == "disk"
    folder = begun.folder if on_disk else memory / "killed"
    wanted = KILLS_ON_DISK if on_disk else KILLS
    assert kill_among_trials(supervisor, folder, wanted, SEED) > wanted // 2
    end(supervisor, folder)
    return folder


@pytest.mark.slow
def test_no_finished_trial_is_lost_and_none_is_told_twice(killed: Path) -> None:
    noted = oracle_of(killed)
    trials = trials_in(killed)
    # A kill between the oracle and the ledger notes a trial twice, with one state.
    assert len(set(noted)) == len({number for number, _ in noted})
    assert {(t.number, t.state.name) for t in trials} == set(noted)
    assert sorted(read_ledger(killed / LEDGER)) == [t.number for t in trials]
    lines = (killed / LEDGER).read_text().splitlines()
    assert len(lines) == len(trials)


@pytest.mark.slow
def test_none_is_left_running_and_the_target_is_met_exactly(killed: Path) -> None:
    states = [t.state for t in trials_in(killed)]
    assert set(states) == {TrialState.COMPLETE}
    assert len(states) == TARGET


@pytest.mark.slow
def test_a_killed_search_proposes_what_one_that_was_not_killed_proposes(
    killed: Path, uninterrupted: list[FrozenTrial]
) -> None:
    found = trials_in(killed)
    assert params_of(found) == params_of(uninterrupted)
    assert [t.values for t in found] == [t.values for t in uninterrupted]


@pytest.mark.slow
def test_a_kill_has_at_most_one_trial_run_again(killed: Path) -> None:
    """None where it fell between two of them, as all of a few may."""
    again = [t.user_attrs["attempts"] - 1 for t in trials_in(killed)]
    assert min(again) >= 0
    assert sum(again) <= KILLS


@pytest.mark.slow
def test_a_process_that_dies_over_the_starts_loses_none_of_those_before(begun: Begun) -> None:
    assert begun.there == tuple(sorted(begun.there))
    assert begun.there[0] < begun.there[-1] <= N_STARTS


@pytest.mark.slow
def test_no_start_is_lost_and_none_is_written_down_twice(killed: Path) -> None:
    origins = [t.user_attrs[ORIGIN] for t in trials_in(killed) if ORIGIN in t.user_attrs]
    assert len(origins) == len(set(origins)) == N_STARTS


@pytest.mark.slow
def test_nothing_that_a_kill_leaves_is_taken_for_damage(killed: Path) -> None:
    assert not list(killed.glob("*.corrupt-*"))


@pytest.mark.slow
@pytest.mark.parametrize("statements", [1, 2, 3, 5, 8, 13, 21, 34, 55, 89])
def test_a_process_that_dies_while_the_study_is_made_is_no_obstacle(
    supervisor: Supervisor, memory: Path, statements: int
) -> None:
    folder = memory / f"made {statements}"
    supervisor.start(folder, 4, statements=statements)
    assert supervisor.wait() == 9, supervisor.errors()
    supervisor.start(folder, 4)
    assert supervisor.wait() == 0, supervisor.errors()
    assert [t.state for t in trials_in(folder)] == [TrialState.COMPLETE] * 4
    assert not list(folder.glob("*.corrupt-*"))
