"""Times the graphs of a benchmark kit with ONNX Runtime. Needs numpy and onnxruntime.

    python bench.py                      one thread, results-1.jsonl beside this file
    python bench.py --threads 2 --power-mode performance

Results are one JSON object per line: the device, then one graph in one round. Stopped at any
moment, the same command goes on; two at once on one file are refused. With one thread it counts
that thread's CPU time, else elapsed time: leave the device alone, plugged in and cool.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import threading
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import protocol

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HERE = Path(__file__).resolve().parent
REFERENCE_EVERY_S = 30.0
LOCK_SECONDS = 5.0
"""Longer than a run takes to end whose owner was killed."""
REFUSED = 3
MAX_THREADS = 256
TIME_MARK = b'"created":"'
"""Behind it stands when the results were begun, which a torn header tells differently."""


class RefusedError(Exception):
    """The results file cannot be gone on with; says why and what to do."""


def main() -> int:
    arguments = read_arguments()
    if os.environ.get("EDGEQDM_BENCH_OWNED"):
        end_with_stdin()
    text = (HERE / "kit.json").read_bytes()
    kit = json.loads(text)
    out = Path(arguments.out or HERE / f"results-{arguments.threads}.jsonl")
    header = describe(arguments, hashlib.sha256(text).hexdigest())
    # Unbuffered, so that what a killed run has finished is there.
    with out.open("a+b", buffering=0) as file:
        try:
            lock(file, out)
            done = resume(file, out, header, [graph["name"] for graph in kit["graphs"]])
        except RefusedError as problem:
            print(problem, flush=True)
            return REFUSED
        Bench(kit, header, file, done).run()
    print(f"{out}: done", flush=True)
    return 0


def end_with_stdin() -> None:
    """Ends the process when its input does: whoever held the other end is gone."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="", help="of the device; default its processor")
    parser.add_argument("--power-mode", default="unknown")
    parser.add_argument("--seconds", type=float, default=1.0, help="least per graph")
    parser.add_argument("--max-seconds", type=float, default=6.0, help="most per graph")
    parser.add_argument("--emulator", action="store_true", help="say that this is no real device")
    parser.add_argument("--out", default="")
    found = parser.parse_args()
    if not 1 <= found.threads <= MAX_THREADS:
        parser.error(f"--threads is 1 to {MAX_THREADS}, found {found.threads}")
    if found.seconds <= 0 or found.max_seconds < found.seconds:
        parser.error("--seconds is above 0, --max-seconds at least --seconds")
    return found


def describe(arguments: argparse.Namespace, kit_sha256: str) -> dict[str, Any]:
    name, features = protocol.cpu()
    return {
        "schema_version": 1,
        "kit_sha256": kit_sha256,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": {
            "name": arguments.name or name,
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release().partition('-')[0]}",
            "features": features,
        },
        "runtime": {"name": "onnxruntime", "version": ort.__version__},
        "threads": arguments.threads,
        "power_mode": arguments.power_mode,
        "clock": "thread_cpu" if arguments.threads == 1 else "wall",
        "ci_target": protocol.CI_TARGET,
        "max_seconds": arguments.max_seconds,
        "flags": ["emulator"] if arguments.emulator else [],
        "seconds": arguments.seconds,
    }


def line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


Samples = dict[tuple[str, int], list[float]]
"""By graph and round, in microseconds."""


def lock(file: FileIO, out: Path) -> None:
    """Keeps other runs off the file until this one ends; waits a moment for one that is ending."""
    tries_until = time.monotonic() + LOCK_SECONDS
    while not locked(file):
        if time.monotonic() > tries_until:
            raise RefusedError(
                f"{out}: {holder(file)} is writing to it; wait for it to end, or name another "
                "file with --out"
            )
        time.sleep(0.05)


def locked(file: FileIO) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks, as that of an SD card may be.
        return True
    return True


def holder(file: FileIO) -> str:
    """Whoever holds the lock, by number where Linux tells it."""
    inode = f":{os.fstat(file.fileno()).st_ino}"
    for entry in protocol.text_of(Path("/proc/locks")).splitlines():
        fields = entry.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(inode):
            return f"process {fields[4]}"
    return "another process"


def resume(file: FileIO, out: Path, header: dict[str, Any], graphs: list[str]) -> Samples:
    """The samples that are there; the header becomes that of the file, or is written to it."""
    file.seek(0)
    whole, newline, torn = file.readall().rpartition(b"\n")
    lines = whole.split(b"\n") if newline else []
    if lines:
        check_header(parsed(lines[0]), out, header)
    elif not is_torn_header(torn, header):
        raise RefusedError(f"{out}: holds no results to go on with; name another file with --out")
    done: Samples = {}
    for number, entry in enumerate(lines[1:], start=2):
        graph, turn, us = checked_samples(parsed(entry), f"{out}, line {number}", graphs)
        if (graph, turn) in done:
            raise RefusedError(
                f"{out}, line {number}: graph {graph}, round {turn}, is there twice; "
                "delete the line and run again"
            )
        done[graph, turn] = us
    if torn:
        # The last line of a killed run; what is appended must not stick to it.
        file.truncate(len(whole) + bool(lines))
    if not lines:
        append(file, line(header))
    return done


def is_torn_header(torn: bytes, header: dict[str, Any]) -> bool:
    """Whether a killed run may have left this of the header, written at another time."""
    own = line(header)
    start = own.index(TIME_MARK) + len(TIME_MARK)
    time_told = slice(start, start + len(header["created"]))
    digits = bytes.maketrans(b"123456789", b"000000000")

    def shape(data: bytes) -> bytes:
        return data[:start] + data[time_told].translate(digits) + data[time_told.stop :]

    return shape(own).startswith(shape(torn))


def parsed(entry: bytes) -> Any:
    try:
        return json.loads(entry)
    except (ValueError, RecursionError):
        return None


def check_header(found: Any, out: Path, header: dict[str, Any]) -> None:
    if not isinstance(found, dict) or types_of(found) != types_of(header):
        raise RefusedError(
            f"{out}, line 1: damaged, or of another tool; delete the file and run again, or name "
            "another one with --out"
        )
    told = ("kit_sha256", "device", "runtime", "threads", "power_mode", "seconds")
    if any(found[field] != header[field] for field in told):
        raise RefusedError(
            f"{out}: results of another kit, device, mode or --seconds; name a file with --out"
        )
    header.update(found)


def types_of(header: dict[str, Any]) -> dict[str, type]:
    return {field: type(value) for field, value in header.items()}


def checked_samples(found: Any, where: str, graphs: list[str]) -> tuple[str, int, list[float]]:
    if isinstance(found, dict) and "kit_sha256" in found:
        raise RefusedError(f"{where}: a second header; delete the file and run again")
    if not isinstance(found, dict) or not is_samples(found, graphs):
        raise RefusedError(f"{where}: damaged; delete the line and run again")
    return found["graph"], found["round"], found["us"]


def is_samples(found: dict[str, Any], graphs: list[str]) -> bool:
    if set(found) != {"graph", "round", "us"} or type(found["us"]) is not list:
        return False
    plausible = all(type(us) in (int, float) and 0 < us <= 1e9 for us in found["us"])
    counted = type(found["round"]) is int and found["round"] >= 0
    return bool(found["us"]) and plausible and counted and found["graph"] in graphs


def append(file: FileIO, data: bytes) -> None:
    """Writes all of it or raises: a full disk takes a part and says so only next time."""
    while data:
        data = data[file.write(data) :]


def layers(graph: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """Layers and precisions, less those in fp32, which may as well be absent."""
    return frozenset(each for each in graph["precisions"].items() if each[1] != "fp32")


class Bench:
    """Takes samples of every graph, and writes each round of them down."""

    def __init__(
        self,
        kit: dict[str, Any],
        header: dict[str, Any],
        file: FileIO,
        done: Samples,
    ) -> None:
        self.graphs: dict[str, Any] = {graph["name"]: graph for graph in kit["graphs"]}
        self.header, self.file, self.done = header, file, done
        self.clock = time.thread_time if header["clock"] == "thread_cpu" else time.perf_counter
        phases = {n: layers(g) for n, g in self.graphs.items() if g["role"] == "phase"}
        alone = {phases[n]: n for n in phases if self.graphs[n]["other"] is None}
        # Next to each other: what tells them apart is little beside what minutes change.
        self.beside = {n: alone[phases[n]] if n in phases else n for n in self.graphs}
        self.reference = next(n for n, g in self.graphs.items() if g["role"] == "reference")
        self.checked = -REFERENCE_EVERY_S
        self.rng = np.random.default_rng(0)

    def run(self) -> None:
        names = [name for name in self.graphs if name != self.reference]
        total, finished = len(names) * (protocol.ROUNDS + 1), 0
        checked = len(self.rounds(self.reference))
        for turn in range(protocol.ROUNDS + 1):
            random.Random(turn).shuffle(names)
            place = {name: k for k, name in enumerate(names)}
            names.sort(key=lambda name: (place[self.beside[name]], place[name]))
            for name in names:
                if (name, turn) not in self.done and not self.enough(name, turn):
                    self.check_reference()
                    self.keep(name, turn, self.sample(name, turn))
                finished += 1
                print(f"{finished}/{total}", flush=True)
        # Before and after, at least; a finished kit is left as it is.
        n_checks = len(self.rounds(self.reference))
        if n_checks > checked or n_checks < 2:
            self.checked = -REFERENCE_EVERY_S
            self.check_reference()

    def rounds(self, name: str) -> list[int]:
        return sorted(turn for graph, turn in self.done if graph == name)

    def samples_of(self, name: str) -> list[float]:
        return [value for turn in self.rounds(name) for value in self.done[name, turn]]

    def enough(self, name: str, turn: int) -> bool:
        # The last round is for graphs whose median is not known well enough.
        if turn < protocol.ROUNDS:
            return False
        samples = self.samples_of(name)
        too_long = bool(sum(samples) / 1e6 >= self.header["max_seconds"])
        return too_long or bool(protocol.finished(samples, ci_target=self.header["ci_target"]))

    def keep(self, name: str, turn: int, us: list[float]) -> None:
        self.done[name, turn] = us
        append(self.file, line({"graph": name, "round": turn, "us": us}))

    def check_reference(self) -> None:
        if time.monotonic() - self.checked < REFERENCE_EVERY_S:
            return
        evaluate = self.open(self.reference)
        evaluate()
        # Behind the highest: a line may have been deleted.
        turn = max(self.rounds(self.reference), default=-1) + 1
        self.keep(self.reference, turn, [self.timed(evaluate) for _ in range(5)])
        self.checked = time.monotonic()

    def sample(self, name: str, turn: int) -> list[float]:
        evaluate = self.open(name)
        self.warm_up(evaluate)
        found: list[float] = []
        earlier = self.samples_of(name)
        last = turn == protocol.ROUNDS
        least_runs = protocol.MIN_RUNS // protocol.ROUNDS
        least_seconds = self.header["seconds"] / protocol.ROUNDS
        while len(found) < protocol.MAX_RUNS:
            found += [self.timed(evaluate) for _ in range(protocol.BLOCK)]
            spent = sum(found) / 1e6
            if last:
                known = protocol.finished(earlier + found, ci_target=self.header["ci_target"])
                if known or spent + sum(earlier) / 1e6 >= self.header["max_seconds"]:
                    break
            elif len(found) >= least_runs and spent >= least_seconds:
                break
        return found

    def warm_up(self, evaluate: Callable[[], object]) -> None:
        began, previous = time.monotonic(), None
        for _ in range(20):
            median = float(np.median([self.timed(evaluate) for _ in range(protocol.BLOCK)]))
            steady = previous is not None and abs(median - previous) <= 0.02 * previous
            previous = median
            if steady and time.monotonic() - began >= protocol.WARM_UP_SECONDS:
                return
            if time.monotonic() - began >= 10 * protocol.WARM_UP_SECONDS:
                return

    def timed(self, evaluate: Callable[[], object]) -> float:
        started = self.clock()
        evaluate()
        return max(round((self.clock() - started) * 1e6, 2), 0.01)

    def open(self, name: str) -> Callable[[], object]:
        graph = self.graphs[name]
        folder = HERE / "graphs" / name
        for path, sha256 in graph["files"].items():
            if hashlib.sha256((folder / path).read_bytes()).hexdigest() != sha256:
                sys.exit(f"{folder / path}: damaged; copy the kit again")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.header["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = ort.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        wanted = {value.name for value in session.get_inputs()}
        for given in graph["inputs"]:
            if given["name"] in wanted:
                binding.bind_cpu_input(given["name"], self.values(given))
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        return lambda: session.run_with_iobinding(binding)

    def values(self, given: dict[str, Any]) -> Any:
        if given["dtype"] == "float32":
            return self.rng.standard_normal(given["shape"], dtype=np.float32)
        return np.zeros(given["shape"], np.int64)


if __name__ == "__main__":
    sys.exit(main())
