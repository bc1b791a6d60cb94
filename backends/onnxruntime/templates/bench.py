"""Times the graphs of a benchmark kit with ONNX Runtime. Needs numpy and onnxruntime.

    python bench.py                      one thread, results-1.jsonl beside this file
    python bench.py --threads 2 --power-mode performance

Results are one JSON object per line: the device, then one graph in one round. Stopped at any
moment, the same command goes on. With one thread it counts that thread's CPU time, else elapsed
time: leave the device alone, plugged in and cool.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnxruntime as ort
import protocol

HERE = Path(__file__).resolve().parent
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
    "bf16",
)
REFERENCE_EVERY_S = 30.0


def main() -> int:
    arguments = read_arguments()
    text = (HERE / "kit.json").read_bytes()
    kit = json.loads(text)
    out = Path(arguments.out or HERE / f"results-{arguments.threads}.jsonl")
    header = describe(arguments, hashlib.sha256(text).hexdigest())
    resumed = resume(out, header)
    if resumed is None:
        print(f"{out}: results of another kit, device, mode or --seconds; name a file with --out")
        return 3
    begun, done = resumed
    # Unbuffered, so that what a killed run has finished is there.
    with out.open("ab", buffering=0) as file:
        if not begun:
            file.write(line(header))
        Bench(kit, header, file, done).run()
    print(f"{out}: done", flush=True)
    return 0


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
    if found.threads < 1 or found.seconds <= 0 or found.max_seconds < found.seconds:
        parser.error("--threads is 1 or more, --max-seconds at least --seconds")
    return found


def describe(arguments: argparse.Namespace, kit_sha256: str) -> dict[str, Any]:
    name, features = cpu()
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


def cpu() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = [entry.partition(":") for entry in text.splitlines()]
    names = [value.strip() for key, _, value in fields if key.strip() in ("model name", "Hardware")]
    flags = {
        flag
        for key, _, value in fields
        if key.strip() in ("flags", "Features")
        for flag in value.split()
    }
    return names[0] if names else platform.machine(), [f for f in FEATURES if f in flags]


def line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


Samples = dict[tuple[str, int], list[float]]
"""By graph and round, in microseconds."""


def resume(out: Path, header: dict[str, Any]) -> tuple[bool, Samples] | None:
    """Whether the file has its header, and its samples; None if it belongs to something else."""
    if not out.exists():
        return False, {}
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        # The last line of a killed run; what is appended must not stick to it.
        os.truncate(out, len(whole))
    lines = [json.loads(entry) for entry in whole.splitlines()]
    if not lines:
        return False, {}
    told = ("kit_sha256", "device", "runtime", "threads", "power_mode", "seconds")
    if any(lines[0].get(field) != header[field] for field in told):
        return None
    header.update(lines[0])
    return True, {(entry["graph"], entry["round"]): entry["us"] for entry in lines[1:]}


class Bench:
    """Takes samples of every graph, and writes each round of them down."""

    def __init__(
        self,
        kit: dict[str, Any],
        header: dict[str, Any],
        file: BinaryIO,
        done: Samples,
    ) -> None:
        self.graphs: dict[str, Any] = {graph["name"]: graph for graph in kit["graphs"]}
        self.header, self.file, self.done = header, file, done
        self.clock = time.thread_time if header["clock"] == "thread_cpu" else time.perf_counter
        self.reference = next(n for n, g in self.graphs.items() if g["role"] == "reference")
        self.checked = -REFERENCE_EVERY_S
        self.rng = np.random.default_rng(0)
        self.n_checks = sum(name == self.reference for name, _ in done)

    def run(self) -> None:
        names = [name for name in self.graphs if name != self.reference]
        total, finished = len(names) * (protocol.ROUNDS + 1), 0
        checked = self.n_checks
        for turn in range(protocol.ROUNDS + 1):
            random.Random(turn).shuffle(names)
            for name in names:
                if (name, turn) not in self.done and not self.enough(name, turn):
                    self.check_reference()
                    self.keep(name, turn, self.sample(name, turn))
                finished += 1
                print(f"{finished}/{total}", flush=True)
        # Before and after, at least; a finished kit is left as it is.
        if self.n_checks > checked or self.n_checks < 2:
            self.checked = -REFERENCE_EVERY_S
            self.check_reference()

    def samples_of(self, name: str) -> list[float]:
        rounds = sorted(turn for graph, turn in self.done if graph == name)
        return [value for turn in rounds for value in self.done[name, turn]]

    def enough(self, name: str, turn: int) -> bool:
        # The last round is for graphs whose median is not known well enough.
        if turn < protocol.ROUNDS:
            return False
        samples = self.samples_of(name)
        too_long = bool(sum(samples) / 1e6 >= self.header["max_seconds"])
        return too_long or bool(protocol.finished(samples, ci_target=self.header["ci_target"]))

    def keep(self, name: str, turn: int, us: list[float]) -> None:
        self.done[name, turn] = us
        self.file.write(line({"graph": name, "round": turn, "us": us}))

    def check_reference(self) -> None:
        if time.monotonic() - self.checked < REFERENCE_EVERY_S:
            return
        evaluate = self.open(self.reference)
        evaluate()
        self.keep(self.reference, self.n_checks, [self.timed(evaluate) for _ in range(5)])
        self.n_checks += 1
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
