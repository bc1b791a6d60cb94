"""The C++ benchmark tool measures as bench.py does, on a device that may stop it at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from diffusers import DDPMScheduler
from typer.testing import CliRunner

from edgeqdm import __version__
from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit.integrity import seal_manifest
from edgeqdm.emit.package import emit_package
from edgeqdm.ir.codec import read_record
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.package import Artifact, Manifest
from edgeqdm.ir.plan import DeploymentPlan, Phase
from edgeqdm.ir.precision import FP32, W8A8
from edgeqdm.ir.profile import BoundaryKind, Flag, LatencyProfile, Timing, is_sealed
from edgeqdm.profile import protocol
from edgeqdm.profile.host import run_kit
from edgeqdm.profile.kit import KitRequest, make_kit, read_results
from edgeqdm.profile.opkeys import network_keys
from edgeqdm.quantize.plans import default_plan
from edgeqdm.quantize.quantizer import quantize
from edgeqdm.testing.arm import build_for_arm, missing_for_arm
from edgeqdm.testing.conformance import STEPS, small_denoiser
from edgeqdm.testing.native import DEPS_VARIABLE, native_deps

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tools" / "bench_native"
TOOLCHAIN = ROOT / "backends/onnxruntime/templates/cpp/toolchains/aarch64-linux.cmake"
SECONDS = "0.02"
LONGER = "0.15"
"""So that a run is still at work when a busy machine comes to stop it."""
GRAPHS = 7
"""Of the kit, the reference with it."""


def build(release: Path, folder: Path, *options: str) -> Path:
    configure = ["cmake", "-S", str(SOURCE), "-B", str(folder), f"-DONNXRUNTIME_ROOT={release}"]
    configure += ["-DEDGEQDM_WERROR=ON", "-DEDGEQDM_PROBE=ON", f"-DEDGEQDM_PYTHON={sys.executable}"]
    for command in ([*configure, *options], ["cmake", "--build", str(folder), "-j1"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def built(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build folder, optimised, by the default compiler, as it goes to a device."""
    return build(release, tmp_path_factory.mktemp("built"), "-DEDGEQDM_STATIC_LIBSTDCXX=ON")


@pytest.fixture(scope="module")
def sanitized(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build folder with sanitizers, by clang if it is there."""
    options = ["-DEDGEQDM_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    if shutil.which("clang++"):
        options.append("-DCMAKE_CXX_COMPILER=clang++")
    return build(release, tmp_path_factory.mktemp("sanitized"), *options)


@dataclass(frozen=True)
class Finished:
    exit_code: int
    output: str
    errors: str


# Leaks are not looked for: ptrace, which that needs, is forbidden in many containers.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}


def call(
    program: Path,
    *arguments: str | Path,
    limits: Callable[[], None] | None = None,
    text: str = "",
) -> Finished:
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        env=ENVIRONMENT,
        preexec_fn=limits,
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def bench_of(folder: Path, kit: Path, *arguments: str | Path, **options: Any) -> Finished:
    return call(folder / "edgeqdm-bench", kit, "--seconds", SECONDS, *arguments, **options)


def refused(found: Finished, exit_code: int, message: str) -> None:
    """One line, the documented code, no signal and no word of a sanitizer."""
    lines = [line for line in found.errors.splitlines() if not line.startswith("warning: ")]
    assert (found.exit_code, len(lines)) == (exit_code, 1), found
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One operation at two precisions, one boundary, the network, and a phase in it and alone."""
    folder = tmp_path_factory.mktemp("kits")
    denoiser = small_denoiser(DDPMScheduler())
    keys = dict.fromkeys(network_keys(denoiser).keys.values())
    linear = next(key for key in keys if key.kind is LayerKind.LINEAR)
    names = [info.name for info in denoiser.info.layers]
    request = KitRequest(
        entries=[(linear, FP32), (linear, W8A8)],
        boundaries=[(BoundaryKind.QUANTIZE, linear.input_shape)],
        pairs=[(dict.fromkeys(names, W8A8), {})],
    )
    made = make_kit(denoiser, OnnxRuntimeBackend(), request, folder / "kit")
    assert len(made.graphs) == GRAPHS
    return folder / "kit"


@pytest.fixture(scope="module")
def finished(built: Path, kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the kit, timed."""
    folder = Path(shutil.copytree(kit, tmp_path_factory.mktemp("finished") / "kit"))
    found = bench_of(built, folder, "--name", "this host")
    assert (found.exit_code, found.output.splitlines()[-1]) == (0, f"{results_of(folder)}: done")
    return folder


@pytest.fixture
def fresh(kit: Path, tmp_path: Path) -> Path:
    """An untimed copy."""
    return Path(shutil.copytree(kit, tmp_path / "kit"))


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A timed copy."""
    return Path(shutil.copytree(finished, tmp_path / "kit"))


def results_of(folder: Path) -> Path:
    return folder / "results-1.jsonl"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results_of(folder).read_text().splitlines()]


# The same figures.


def structure(profile: LatencyProfile) -> Any:
    """A profile without what another run measures anew."""
    timed = {"timing", "alone", "among", "overhead", "created", "payload_sha256", "environment"}

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if k not in timed}
        return [kept(v) for v in value] if isinstance(value, list) else value

    found = kept(profile.model_dump(mode="json"))
    found["protocol"].pop("reference_us")
    found.pop("flags")
    return found


def test_a_profile_of_its_results_is_made_as_that_of_the_python_tool(
    finished: Path, fresh: Path
) -> None:
    found = read_results(finished, results_of(finished))
    expected = run_kit(fresh, seconds=float(SECONDS), name="this host")
    assert is_sealed(found)
    assert structure(found) == structure(expected)
    assert found.environment is not None
    assert found.environment.tool == f"edgeqdm-bench {__version__}"
    assert set(found.environment.cpus) <= os.sched_getaffinity(0)
    assert len(found.protocol.reference_us) >= 2
    figures = [found.overhead, *(e.timing for e in found.entries)]
    figures += [t for p in found.phase_costs for t in (p.alone, p.among)]
    for timing in figures:
        assert timing.n >= protocol.MIN_RUNS
        assert 0.1 < timing.median_us < 1e6


def test_the_header_has_the_fields_of_the_python_tool_in_its_order(
    finished: Path, fresh: Path
) -> None:
    run_kit(fresh, seconds=float(SECONDS))
    (other,) = fresh.glob("results-1*.jsonl")
    expected = json.loads(other.read_text().splitlines()[0])
    found = lines_of(finished)[0]
    assert list(found) == [*expected, "environment"]
    same = ("kit_sha256", "runtime", "clock", "threads", "seconds", "max_seconds", "ci_target")
    assert {k: found[k] for k in same} == {k: expected[k] for k in same}
    machine = {k: v for k, v in found["device"].items() if k != "name"}
    assert machine == {k: v for k, v in expected["device"].items() if k != "name"}
    # Who went on with the other's file would mix two tools in one figure.
    assert found["device"]["name"] == "this host"


def test_progress_counts_every_graph_in_every_round(built: Path, done: Path) -> None:
    found = bench_of(built, done, "--name", "this host")
    turns = (GRAPHS - 1) * (protocol.ROUNDS + 1)
    expected = [*(f"{k}/{turns}" for k in range(1, turns + 1)), f"{results_of(done)}: done"]
    assert found == Finished(0, "".join(f"{line}\n" for line in expected), found.errors)


def test_with_two_threads_elapsed_time_is_counted(built: Path, done: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU")
    results_of(done).unlink()
    found = bench_of(built, done, "--threads", "2", "--power-mode", "low", "--emulator")
    assert found.exit_code == 0, found.errors
    profile = read_results(done, done / "results-2.jsonl")
    assert (profile.threads, profile.protocol.clock, profile.power_mode) == (2, "wall", "low")
    assert Flag.EMULATOR in profile.flags
    assert "left" in found.output


def test_what_the_device_said_of_itself_stands_beside_the_results(finished: Path) -> None:
    header, *lines = lines_of(finished)
    told = [json.loads(x) for x in (finished / "environment-1.jsonl").read_text().splitlines()]
    reference = [np.median(line["us"]) for line in lines if line["graph"] == "0000"]
    assert [reading["reference_us"] for reading in told] == reference
    assert all(len(reading["load"]) == 3 for reading in told)
    assert header["environment"]["governors"] == told[0]["governors"]


# The same decisions.


@pytest.fixture(scope="module")
def python_tool() -> ModuleType:
    """bench.py as a module."""
    path = ROOT / "backends" / "onnxruntime" / "templates" / "bench.py"
    spec = importlib.util.spec_from_file_location("bench_of_kit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "protocol", protocol)
        spec.loader.exec_module(module)
    return module


def made_up_kit(folder: Path) -> dict[str, Any]:
    """A kit without graphs, of every role; the last four are two phases, each in two networks."""
    roles = ["reference", "overhead", *["entry"] * 6, "boundary", "whole", *["phase"] * 4]
    layers = [{}] * 10 + [{"a": "w8a8", "b": "fp32"}, {"a": "w4a8"}, {"a": "w8a8"}, {"a": "w4a8"}]
    graphs = [
        {
            "name": f"{k:04d}",
            "role": role,
            "files": {"model.onnx": "0" * 64},
            "inputs": [],
            "precisions": layers[k],
            "other": {} if k >= 12 else None,
        }
        for k, role in enumerate(roles)
    ]
    document = {"schema_version": 1, "graphs": graphs}
    folder.mkdir()
    (folder / "kit.json").write_text(json.dumps(document))
    return document


def measured_by_python(
    tool: ModuleType, document: dict[str, Any], out: Path, seconds: float, max_seconds: float
) -> None:
    """What bench.py writes where tests/native/bench_probe.cpp makes up times and the clock."""
    now, count = 1000.0, dict.fromkeys((graph["name"] for graph in document["graphs"]), 0)

    def evaluate(name: str) -> float:
        nonlocal now
        graph, base = int(name), 100 << int(name)
        word = (graph * 7919 + count[name]) * 2654435761 % 2**32
        percent = (graph * 5 + 3) % 14 * (60 if graph % 3 == 2 else 1)
        us = base + base * percent * (word >> 12) // 100 // 2**20
        count[name] += 1
        now += us / 1e6
        return float(us)

    class MadeUp(tool.Bench):  # type: ignore[misc, name-defined]
        def open(self, name: str) -> Callable[[], float]:
            return lambda: evaluate(name)

        def timed(self, evaluate: Callable[[], float]) -> float:
            return evaluate()

    header = {"clock": "wall", "ci_target": 0.01, "seconds": seconds, "max_seconds": max_seconds}
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=None, thread_time=None)
    with FileIO(out, "a+") as file, pytest.MonkeyPatch.context() as patched:
        patched.setattr(tool, "time", clock)
        MadeUp(document, header, file, {}).run()


@pytest.mark.parametrize(("seconds", "max_seconds"), [(1.0, 6.0), (0.3, 2.0), (4.0, 12.0)])
def test_order_warm_up_rounds_and_stop_rule_are_those_of_the_python_tool(
    built: Path, python_tool: ModuleType, tmp_path: Path, seconds: float, max_seconds: float
) -> None:
    document = made_up_kit(tmp_path / "kit")
    measured_by_python(python_tool, document, tmp_path / "python.jsonl", seconds, max_seconds)
    out = tmp_path / "native.jsonl"
    found = call(
        built / "bench-probe", "measure", tmp_path / "kit", out, "{}", str(seconds), max_seconds
    )
    assert found.exit_code == 0, found.errors
    native = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    python = [json.loads(line) for line in (tmp_path / "python.jsonl").read_text().splitlines()]
    assert [(x["graph"], x["round"], len(x["us"])) for x in native] == [
        (x["graph"], x["round"], len(x["us"])) for x in python
    ]
    assert native == python
    # The rules were all at work: graphs that settled in time, graphs that did not, references.
    last = {x["graph"] for x in python if x["round"] == protocol.ROUNDS and x["graph"] != "0000"}
    assert 0 < len(last) < len(document["graphs"]) - 1
    assert sum(x["graph"] == "0000" for x in python) > 2


def test_intervals_and_the_end_are_those_of_the_protocol(built: Path) -> None:
    drawn = np.random.default_rng(0)
    series = [
        drawn.lognormal(3, sigma, n).round(2)
        for n in (1, 2, 3, 29, 30, 31, 64, 150, 999)
        for sigma in (0.0, 0.01, 0.03, 0.5)
    ]
    text = "".join(" ".join(map(repr, map(float, each))) + "\n" for each in series)
    found = call(built / "bench-probe", "intervals", text=text).output.splitlines()
    for line, samples in zip(found, series, strict=True):
        low, high, median, p25, end = json.loads(line)
        assert (low, high) == protocol.median_interval(samples.tolist())
        assert median == np.median(samples)
        assert p25 == pytest.approx(np.percentile(samples, 25), rel=1e-12)
        assert bool(end) == protocol.finished(samples.tolist())


CPUINFO = [
    "processor : 0\nmodel name\t: AMD EPYC\nflags : sse avx2 avx512_vnni\n\nprocessor : 1\n",
    "".join(
        f"processor : {k}\nFeatures : fp asimddp\nCPU implementer : 0x41\nCPU part : {part}\n\n"
        for k, part in enumerate(("0xd05", "0xd05", "0xd0b"))
    ),
    "processor : 0\nmodel name : ARMv7 Processor rev 4 (v7l)\nHardware : BCM2711\n",
    "model name : \u00e9 " + "x" * 300,
    "",
]


@pytest.mark.parametrize("cpuinfo", CPUINFO)
@pytest.mark.parametrize("board", [None, "Raspberry Pi 5 Model B Rev 1.0\0", "\0"])
def test_a_device_has_the_name_that_the_python_tool_gives_it(
    built: Path, cpuinfo: str, board: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("platform.processor", lambda: "")
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "proc" / "cpuinfo").write_text(cpuinfo, encoding="utf-8")
    if board is not None:
        (tmp_path / "proc" / "device-tree" / "model").write_text(board)
    found = json.loads(call(built / "bench-probe", "processor", tmp_path, "aarch64").output)
    assert found == list(protocol.cpu(tmp_path / "proc"))


# CPUs and the state of the device.


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return folder


def cpu_file(cpu: int, name: str) -> str:
    return f"sys/devices/system/cpu/cpu{cpu}/cpufreq/{name}"


PHONE_KHZ = [1800000] * 4 + [2400000] * 3 + [2900000]


@pytest.mark.parametrize(
    ("threads", "cpus", "khz"),
    [
        (1, [7], [2900000]),
        (2, [4, 5, 6, 7], [2900000, 2400000]),
        (4, [4, 5, 6, 7], [2900000, 2400000]),
        (5, list(range(8)), sorted(set(PHONE_KHZ), reverse=True)),
        (9, list(range(8)), sorted(set(PHONE_KHZ), reverse=True)),
    ],
)
def test_the_fastest_cpus_are_taken_until_there_are_enough_for_the_threads(
    built: Path, tmp_path: Path, threads: int, cpus: list[int], khz: list[int]
) -> None:
    files = {cpu_file(k, "cpuinfo_max_freq"): str(x) for k, x in enumerate(PHONE_KHZ)}
    tree(tmp_path, files)
    found = call(built / "bench-probe", "fastest", tmp_path, "0-7", str(threads)).output
    assert [json.loads(part) for part in found.split()] == [cpus, khz]
    unknown = call(built / "bench-probe", "fastest", tmp_path / "no", "1,3-4", str(threads)).output
    assert [json.loads(part) for part in unknown.split()] == [[1, 3, 4], []]


def test_a_hot_zone_a_slow_governor_and_a_low_battery_are_told(
    sanitized: Path, tmp_path: Path
) -> None:
    thermal, supply = "sys/class/thermal/thermal_zone", "sys/class/power_supply"
    files = {
        f"{thermal}0/type": "cpu-big",
        f"{thermal}0/temp": "81500",
        f"{thermal}1/type": "battery",
        f"{thermal}1/temp": "31",
        f"{thermal}2/type": "off",
        f"{thermal}2/temp": "-274000",
        f"{thermal}3/temp": "not a number",
        f"{supply}/battery/type": "Battery",
        f"{supply}/battery/capacity": "12",
        f"{supply}/battery/status": "Discharging",
        f"{supply}/usb/type": "USB",
        f"{supply}/mouse/type": "Battery",
        f"{supply}/mouse/scope": "Device",
        f"{supply}/mouse/capacity": "3",
        cpu_file(6, "scaling_governor"): "performance",
        cpu_file(7, "scaling_governor"): "schedutil",
        cpu_file(7, "scaling_cur_freq"): "1500000",
        "proc/loadavg": "0.25 0.50 1.75 1/99 1234",
    }
    tree(tmp_path, files)
    found = call(sanitized / "bench-probe", "reading", tmp_path, "6,7")
    text, warnings, low = found.output.splitlines()
    assert json.loads(text) == {
        "at": "now",
        "reference_us": 1.5,
        "load": [0.25, 0.5, 1.75],
        "zones": [{"name": "cpu-big", "celsius": 81.5}, {"name": "battery", "celsius": 31.0}],
        "frequencies": [{"cpu": 7, "khz": 1500000}],
        "governors": ["performance", "schedutil"],
        "batteries": [{"percent": 12.0, "status": "Discharging"}],
    }
    hot, governor, battery = json.loads(warnings)
    assert hot.startswith("zone cpu-big is hot")
    assert governor.startswith("governor schedutil")
    assert battery.startswith("the battery is low")
    assert low == "1"


def test_a_device_that_tells_nothing_is_read_all_the_same(sanitized: Path, tmp_path: Path) -> None:
    found = call(sanitized / "bench-probe", "reading", tmp_path, "0")
    text, warnings, low = found.output.splitlines()
    assert {k: v for k, v in json.loads(text).items() if v} == {"at": "now", "reference_us": 1.5}
    assert (warnings, low) == ("[]", "0")


def test_it_runs_on_the_cpus_that_were_asked_for(built: Path, done: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    results_of(done).unlink()
    command = [built / "edgeqdm-bench", done, "--seconds", "2", "--cpus", str(cpu)]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as tool:
        wait_for_lines(tool, results_of(done), 2)
        pinned = os.sched_getaffinity(tool.pid)
        tool.kill()
    assert pinned == {cpu}
    assert lines_of(done)[0]["environment"]["cpus"] == [cpu]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("--cpus", "4000"), 3, "CPU 4000 is not one of those that this process may use"),
        (("--cpus", "0", "--threads", "2"), 3, "2 threads on CPUs 0; give --cpus at least as many"),
        (("--cpus", "5-4"), 2, "expected a list such as 0,4-7, found '5-4'"),
        (("--cpus", "0,"), 2, "expected a list"),
        (("--cpus", "99999999999999999999"), 2, "expected a list"),
        (("--cpus", "-1"), 2, "expected a list"),
        (("--cpus=",), 2, "expected a list"),
        (("--threads", "0"), 2, "--threads: expected a number from 1 on, found '0'"),
        (("--threads", "-1"), 2, "found '-1'"),
        (("--threads", "x\n"), 2, "found 'x\\x0a'"),
        (("--threads", "257"), 3, "--threads: found 257, at most 256; give fewer"),
        (("--threads", "9" * 40), 3, "at most 256; give fewer"),
        (("--threads",), 2, "argument --threads: expected one argument"),
        (("--seconds", "nan"), 2, "--seconds: expected seconds above 0, found 'nan'"),
        (("--seconds", "0"), 2, "expected seconds above 0"),
        (("--seconds", "1,5"), 2, "expected seconds above 0"),
        (("--max-seconds", "0.001"), 2, "--max-seconds is less than --seconds"),
        (("--name", ""), 2, "--name: give 1 to 200 printable ASCII characters"),
        (("--power-mode", "caf\u00e9"), 2, "--power-mode: give 1 to 200 printable"),
        (("--no-such",), 2, "unrecognized arguments: --no-such"),
        (("--emulator=1",), 2, "unrecognized arguments: --emulator"),
        (("another",), 2, "unrecognized arguments: another"),
        (("--package",), 3, "holds no manifest.json; name a package"),
    ],
)
def test_wrong_options_are_refused_before_the_work(
    sanitized: Path, kit: Path, arguments: tuple[str, ...], exit_code: int, message: str
) -> None:
    refused(bench_of(sanitized, kit, *arguments), exit_code, message)
    assert not results_of(kit).exists()


def test_help_and_version_are_answered(built: Path) -> None:
    tool = built / "edgeqdm-bench"
    assert call(tool, "--version") == Finished(0, f"{__version__}\n", "")
    assert "--power-mode" in call(tool, "-h").output
    refused(call(tool), 2, "give the folder of a kit")


# Going on.


def wait_for_lines(tool: subprocess.Popen[Any], file: Path, n: int) -> None:
    while tool.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < n):
        time.sleep(0.001)


def stopped(built: Path, kit: Path, lines: int, sent: signal.Signals) -> Finished:
    """A run that gets a signal once its results have so many lines."""
    command = [str(built / "edgeqdm-bench"), str(kit), "--seconds", LONGER]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as tool:
        wait_for_lines(tool, results_of(kit), lines)
        tool.send_signal(sent)
        _, errors = tool.communicate()
    return Finished(tool.returncode, "", errors)


def test_it_goes_on_after_it_was_killed_again_and_again(built: Path, fresh: Path) -> None:
    before = b""
    for lines in (1, 2, 4, 9):
        assert stopped(built, fresh, lines, signal.SIGKILL).exit_code == -9
        after = results_of(fresh).read_bytes()
        assert after.startswith(before[: before.rfind(b"\n") + 1])
        before = after
    assert bench_of(built, fresh, "--seconds", LONGER).exit_code == 0
    assert is_sealed(read_results(fresh, results_of(fresh)))


def test_an_interrupt_leaves_results_that_are_gone_on_with(built: Path, fresh: Path) -> None:
    refused(stopped(built, fresh, 3, signal.SIGINT), 130, "interrupted; the same command goes on")
    data = results_of(fresh).read_bytes()
    assert data.endswith(b"]}\n")
    assert bench_of(built, fresh, "--seconds", LONGER).exit_code == 0
    assert results_of(fresh).read_bytes().startswith(data)


def cut_points(data: bytes) -> list[int]:
    header = data.index(b"\n") + 1
    anywhere = random.Random(5).sample(range(header, len(data)), 3)
    return [0, 9, header // 2, header - 1, header, header + 10, *anywhere, len(data) - 1]


@pytest.mark.parametrize("place", range(10))
def test_it_goes_on_from_results_cut_off_anywhere(built: Path, done: Path, place: int) -> None:
    data = results_of(done).read_bytes()
    cut = cut_points(data)[place]
    results_of(done).write_bytes(data[:cut])
    (done / "environment-1.jsonl").write_bytes(b'{"at":')
    assert bench_of(built, done, "--name", "this host").exit_code == 0
    assert results_of(done).read_bytes().startswith(data[: data.rfind(b"\n", 0, cut) + 1])
    assert is_sealed(read_results(done, results_of(done)))
    assert (done / "environment-1.jsonl").read_bytes().startswith(b'{"at":\n{"at":"2')


def test_finished_results_are_only_read(built: Path, done: Path) -> None:
    before = results_of(done).read_bytes()
    assert bench_of(built, done, "--name", "this host").exit_code == 0
    assert results_of(done).read_bytes() == before


def test_a_second_run_is_refused_and_told_who_has_the_file(sanitized: Path, done: Path) -> None:
    before = results_of(done).read_bytes()
    with results_of(done).open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        found = bench_of(sanitized, done, "--name", "this host")
    refused(found, 3, f"results-1.jsonl: process {os.getpid()} is writing to it; wait for it to")
    assert results_of(done).read_bytes() == before


def test_results_go_on_once_the_reference_that_was_named_is_deleted(
    built: Path, done: Path
) -> None:
    lines = results_of(done).read_bytes().splitlines(keepends=True)
    references = [line for line in lines[1:] if json.loads(line)["graph"] == "0000"]
    kept = [line for line in lines if line not in references[:-1]]
    results_of(done).write_bytes(b"".join(kept))
    for _ in range(2):
        found = bench_of(built, done, "--name", "this host")
        assert found.exit_code == 0, found.errors
    assert results_of(done).read_bytes().startswith(b"".join(kept))
    assert is_sealed(read_results(done, results_of(done)))


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_nothing_that_is_printed_goes_into_the_results(
    built: Path, done: Path, closed: tuple[int, ...]
) -> None:
    def close() -> None:
        for stream in closed:
            os.close(stream)

    before = results_of(done).read_bytes()
    found = bench_of(built, done, "--name", "this host", limits=close)
    assert found.exit_code == 0, found.errors
    assert results_of(done).read_bytes() == before


Lines = list[bytes]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda x: [*x[:4], x[4][:9] + x[5], *x[6:]], "line 5: damaged; delete the line"),
        (lambda x: [*x[:4], b"", *x[4:]], "line 5: damaged; delete the line and run again"),
        (lambda x: [*x[:4], b"\xff\x00", *x[4:]], "line 5: damaged; delete the line"),
        (lambda x: [*x[:4], b"[" * 99_999, *x[4:]], "line 5: damaged; delete the line"),
        (lambda x: [*x[:4], b'{"graph":"0001","round":9,"us":[1e999]}'], "line 5: damaged"),
        (lambda x: [*x[:4], b'{"graph":"9999","round":9,"us":[1.0]}'], "line 5: damaged"),
        (lambda x: [*x, x[3]], ", is there twice; delete the line and run again"),
        (lambda x: [*x[:4], x[0], *x[4:]], "line 5: a second header; delete the file"),
        (lambda x: [x[0][:-9], *x[1:]], "line 1: damaged, or of another tool; delete the file"),
        (lambda x: x[1:], "line 1: damaged, or of another tool; delete the file"),
        (lambda x: [b"", *x], "line 1: damaged, or of another tool; delete the file"),
        (lambda x: [b""], "line 1: damaged, or of another tool; delete the file"),
        (lambda x: [b"my notes"], "line 1: damaged, or of another tool"),
        (lambda x: [x[0].replace(b"thread_cpu", b"wall"), *x[1:]], "line 1: another clock"),
        (lambda x: [x[0].replace(b":0.01,", b":-1,"), *x[1:]], "line 1: ci_target is out of range"),
        (lambda x: [x[0].replace(b'"this', b'"that'), *x[1:]], "results of another kit, device"),
        (lambda x: [x[0].replace(b'"cpus":[', b'"cpus":[7,'), *x[1:]], "results of another kit"),
        (lambda x: [x[0].partition(b',"environment"')[0] + b"}"], "results of bench.py"),
    ],
)
def test_damaged_or_foreign_results_are_told_with_what_to_do(
    sanitized: Path, done: Path, damage: Callable[[Lines], Lines], told: str
) -> None:
    before = b"\n".join(damage(results_of(done).read_bytes().splitlines())) + b"\n"
    results_of(done).write_bytes(before)
    refused(bench_of(sanitized, done, "--name", "this host"), 3, told)
    assert results_of(done).read_bytes() == before


def test_a_file_of_something_else_is_left_as_it_was(
    sanitized: Path, kit: Path, tmp_path: Path
) -> None:
    torn = '{"schema_version":1,"kit_sha256":"x'
    for text in ("my notes", '{"schema_version":1,"precious":true}', torn, "{ "):
        (tmp_path / "notes").write_text(text)
        found = bench_of(sanitized, kit, "--out", tmp_path / "notes")
        refused(found, 3, "notes: holds no results to go on with; name another file with --out")
        assert (tmp_path / "notes").read_text() == text
    os.mkfifo(tmp_path / "fifo")
    refused(bench_of(sanitized, kit, "--out", tmp_path / "fifo"), 3, "not a regular file")
    refused(bench_of(sanitized, kit, "--out", tmp_path / "no" / "x"), 7, "cannot be written")
    refused(bench_of(sanitized, kit, "--out", tmp_path), 7, "cannot be written")


def test_readings_are_not_added_to_a_file_of_something_else(
    sanitized: Path, fresh: Path, tmp_path: Path
) -> None:
    readings, notes = fresh / "environment-1.jsonl", tmp_path / "notes"
    notes.write_text("{}\n")
    readings.symlink_to(notes)
    refused(bench_of(sanitized, fresh), 3, "environment-1.jsonl: a symbolic link; delete it or")
    assert notes.read_text() == "{}\n"
    readings.unlink()
    readings.write_text("my notes\n")
    refused(bench_of(sanitized, fresh), 3, "environment-1.jsonl: holds no readings of this tool")
    assert readings.read_text() == "my notes\n"


def test_readings_are_added_to_without_reading_what_is_there(built: Path, fresh: Path) -> None:
    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))

    readings = fresh / "environment-1.jsonl"
    with readings.open("wb") as file:
        file.write(b"{")
        file.truncate(2**33)
    found = bench_of(built, fresh, limits=little_memory)
    assert found.exit_code == 0, found.errors
    with readings.open("rb") as file:
        file.seek(2**33)
        assert file.read().startswith(b'\n{"at":')


def test_a_full_disk_is_told_and_what_was_written_is_gone_on_with(built: Path, fresh: Path) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    refused(bench_of(built, fresh, limits=little_room), 7, "cannot be written (File too large)")
    assert results_of(fresh).stat().st_size == 3000
    assert bench_of(built, fresh).exit_code == 0
    assert is_sealed(read_results(fresh, results_of(fresh)))


# Damage.


def test_a_folder_that_is_no_kit_is_refused(sanitized: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "no"):
        refused(bench_of(sanitized, folder), 3, "holds no kit.json; make a kit with")
    assert list(tmp_path.iterdir()) == []


def test_a_kit_cut_off_anywhere_is_refused(sanitized: Path, fresh: Path) -> None:
    data = (fresh / "kit.json").read_bytes().rstrip()
    for cut in [0, 1, *random.Random(0).sample(range(2, len(data)), 20), len(data) - 1]:
        (fresh / "kit.json").write_bytes(data[:cut])
        refused(bench_of(sanitized, fresh), 8, "kit.json: ")
    assert not results_of(fresh).exists()


def test_a_kit_with_changed_bytes_is_read_or_refused(sanitized: Path, done: Path) -> None:
    """What reads as another kit is no longer that of the results."""
    data = (done / "kit.json").read_bytes()
    drawn = random.Random(0)
    for _ in range(30):
        changed = bytearray(data)
        changed[drawn.randrange(len(data))] = drawn.choice(b'0 9z"]},:-\x00\xff')
        if changed == data:
            continue
        (done / "kit.json").write_bytes(changed)
        found = bench_of(sanitized, done, "--name", "this host")
        refused(found, 8 if found.exit_code == 8 else 3, "")


Document = dict[str, Any]


def with_graph(**changes: Any) -> Callable[[Document], Document]:
    """The kit with another third graph."""

    def edit(document: Document) -> Document:
        document["graphs"][2] |= changes
        return document

    return edit


def given(shape: list[Any], dtype: str = "float32") -> list[dict[str, Any]]:
    return [{"name": "sample", "dtype": dtype, "shape": shape}]


HASH = "0" * 64


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_graph(name="../x"), "graph name ../x is not four digits"),
        (with_graph(name="0001"), "graph 0001 is there twice"),
        (with_graph(name=2), "name is not a string"),
        (with_graph(role="spy"), "role spy"),
        (with_graph(files={"../model.onnx": HASH}), "file ../model.onnx: an empty, `.` or `..`"),
        (with_graph(files={"/etc/passwd": HASH}), "file /etc/passwd: an empty"),
        (with_graph(files={"a\nb": HASH}), "file a\\x0ab: a path may hold"),
        (with_graph(files={"model.onnx": "x"}), "a wrong SHA-256"),
        (with_graph(files={}), "a graph without model.onnx"),
        (with_graph(files=[]), "files is not an object"),
        (with_graph(inputs={}), "inputs is not a list"),
        (with_graph(inputs=given([1], "float16")), "an input of float16"),
        (with_graph(inputs=given([0])), "an input of a wrong shape"),
        (with_graph(inputs=given([-1])), "shape is not a whole number"),
        (with_graph(inputs=given([2**31, 2])), "an input of a wrong shape"),
        (with_graph(inputs=given([1] * 33)), "an input of too many dimensions"),
        (with_graph(precisions=3), "precisions is not an object"),
        (with_graph(precisions={"a": 3}), "precision is not a string"),
        (with_graph(role="phase", precisions={"b": "w8"}, other={}), "no graph of 0002 alone"),
        (lambda x: x | {"schema_version": 2}, "schema_version is not 1"),
        (lambda x: x | {"graphs": x["graphs"][1:]}, "there is no reference graph"),
        (lambda x: x | {"graphs": x["graphs"][:1]}, "there is no overhead graph"),
        (lambda x: x["graphs"], "no field schema_version"),
        (lambda x: 1, "no field schema_version"),
    ],
)
def test_a_kit_that_makes_no_sense_is_refused_by_name(
    sanitized: Path, fresh: Path, edit: Callable[[Document], Document], message: str
) -> None:
    document = edit(json.loads((fresh / "kit.json").read_text()))
    (fresh / "kit.json").write_text(json.dumps(document))
    found = bench_of(sanitized, fresh)
    refused(found, 8, message)
    assert "kit.json: " in found.errors
    assert not results_of(fresh).exists()


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_damaged_graph_is_found_before_anything_is_timed(sanitized: Path, fresh: Path) -> None:
    graph = fresh / "graphs" / "0003" / "model.onnx"
    flip(graph, 100)
    refused(bench_of(sanitized, fresh), 8, "0003/model.onnx: damaged; copy the kit again")
    graph.unlink()
    refused(bench_of(sanitized, fresh), 8, "0003/model.onnx: missing; copy the kit again")
    graph.symlink_to("../0002/model.onnx")
    refused(bench_of(sanitized, fresh), 8, "0003/model.onnx: not a regular file of its own")
    assert results_of(fresh).read_bytes().count(b"\n") == 1


def replace_graph(folder: Path, data: bytes) -> None:
    """Another third graph, with the hash that fits it."""
    (folder / "graphs" / "0002" / "model.onnx").write_bytes(data)
    files = {"model.onnx": hashlib.sha256(data).hexdigest()}
    change(folder, with_graph(files=files))


def change(folder: Path, edit: Callable[[Document], Document]) -> None:
    document = edit(json.loads((folder / "kit.json").read_text()))
    (folder / "kit.json").write_text(json.dumps(document))


def test_a_graph_the_library_refuses_is_told_with_its_words(sanitized: Path, fresh: Path) -> None:
    replace_graph(fresh, b"no model")
    refused(bench_of(sanitized, fresh), 4, "0002/model.onnx: onnxruntime says: ")


def test_a_graph_that_does_not_fit_the_kit_is_told(sanitized: Path, fresh: Path) -> None:
    change(fresh, with_graph(inputs=[]))
    refused(bench_of(sanitized, fresh), 8, "its input sample is not in kit.json; copy the kit")
    results_of(fresh).unlink()
    step = {"name": "step", "dtype": "int64", "shape": []}
    change(fresh, with_graph(inputs=[*given([3], "int64"), step]))
    refused(bench_of(sanitized, fresh), 4, "0002/model.onnx: onnxruntime says: ")


def test_too_little_memory_is_told(built: Path, fresh: Path) -> None:
    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))

    change(fresh, with_graph(inputs=given([2**31])))
    refused(bench_of(built, fresh, limits=little_memory), 9, "out of memory")


LIBRARY = """
#include <stddef.h>
#include <stdint.h>
typedef struct { const void* (*get)(uint32_t); const char* (*version)(void); } Base;
static const void* get(uint32_t version) { (void)version; return NULL; }
static const char* version(void) { return "%s"; }
static const Base base = {get, version};
const Base* OrtGetApiBase(void) { return &base; }
"""


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.22.9", "ONNX Runtime 1.22.9 is too old, this package needs 1.23.0 or newer"),
        ("0.9", "ONNX Runtime 0.9 is too old"),
        ("none", "ONNX Runtime none is too old"),
        ("1.27.0", "ONNX Runtime 1.27.0 does not have the interface 1."),
    ],
)
def test_a_library_that_is_too_old_is_told(
    built: Path, fresh: Path, tmp_path: Path, version: str, message: str
) -> None:
    (tmp_path / "old.c").write_text(LIBRARY % version)
    command = ["cc", "-shared", "-fPIC", "-o", "old.so", "old.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    refused(bench_of(built, fresh, "--library", str(tmp_path / "old.so")), 4, message)


def test_a_library_that_is_missing_is_told(built: Path, fresh: Path) -> None:
    refused(bench_of(built, fresh, "--library", "/no/such.so"), 4, "/no/such.so: cannot open")


# Packages.


def in_two_phases(plan: DeploymentPlan) -> DeploymentPlan:
    """Integers in the first step, floats in the rest."""
    (only,) = plan.phases
    floats = tuple(a.model_copy(update={"precision": FP32}) for a in only.layers)
    first = only.model_copy(update={"stop": 1})
    return plan.model_copy(update={"phases": (first, Phase(start=1, stop=STEPS, layers=floats))})


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of two phases, with labels and guidance."""
    denoiser = small_denoiser(DDPMScheduler())
    plan = in_two_phases(default_plan(denoiser.info, "onnxruntime", STEPS))
    trajectories = collect_trajectories(denoiser, 4, seed=1)
    seen = observe(denoiser, trajectories, plan.phases[0].integer_layers())
    folder = tmp_path_factory.mktemp("package") / "package"
    emit_package(quantize(denoiser, plan, seen), OnnxRuntimeBackend(), folder)
    return folder


def test_a_package_is_timed_by_phase_and_weighted_by_its_steps(
    built: Path, package: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    found = bench_of(built, package, "--package", "--max-seconds", "0.1", "--out", out)
    assert (found.exit_code, found.output) == (0, ""), found.errors
    told = json.loads(out.read_text())
    first, second = told["phases"]
    assert (first["start"], first["stop"], second["start"], second["stop"]) == (0, 1, 1, STEPS)
    for share in ("p25_us", "median_us"):
        expected = (first[share] + (STEPS - 1) * second[share]) / STEPS
        assert told[f"{share}_per_step"] == pytest.approx(expected, rel=1e-12)
    assert first["n"] == second["n"] >= protocol.BLOCK
    assert (told["clock"], told["threads"], told["steps"]) == ("thread_cpu", 1, STEPS)
    printed = bench_of(built, package, "--package", "--max-seconds", "0.1")
    assert list(json.loads(printed.output)) == list(told)


def test_a_damaged_package_is_not_timed(sanitized: Path, package: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(package, tmp_path / "package"))
    flip(damaged / "model.onnx", 100)
    found = bench_of(sanitized, damaged, "--package")
    refused(found, 8, f"{damaged}: package is damaged: model.onnx (changed) - copy it again")


def replace_file(package: Path, name: str, data: bytes) -> None:
    """Another content, with a manifest that fits it."""
    (package / name).write_bytes(data)
    manifest = read_record(package / "manifest.json", Manifest)
    artifact = Artifact(sha256=hashlib.sha256(data).hexdigest(), size=len(data), role="model")
    files = {**manifest.files, name: artifact}
    sealed = seal_manifest(manifest.model_copy(update={"files": files}))
    (package / "manifest.json").write_bytes(sealed)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("conditioning.safetensors", b"no", "/conditioning.safetensors: cut off"),
        ("plan.json", b"{", "/plan.json: "),
        ("schedule.bin", b"no", "/schedule.bin: "),
        ("model.onnx", b"no", ": onnxruntime "),
    ],
)
def test_a_file_of_a_package_that_makes_no_sense_is_named(
    sanitized: Path, package: Path, tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    changed = Path(shutil.copytree(package, tmp_path / "package"))
    replace_file(changed, name, data)
    refused(bench_of(sanitized, changed, "--package"), 8, f"{changed}{message}")


def test_a_package_that_is_not_there_is_named(sanitized: Path, tmp_path: Path) -> None:
    found = bench_of(sanitized, tmp_path / "no", "--package")
    refused(found, 3, f"{tmp_path}/no: No such file or directory; name the folder of a package")


@pytest.mark.parametrize("place", ["no/x.json", "folder", "x" * 300])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_timed(
    sanitized: Path, package: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "folder").mkdir()
    limits = ("--seconds", "900", "--max-seconds", "900")
    out = tmp_path / place
    found = bench_of(sanitized, package, "--package", *limits, "--out", out)
    refused(found, 7, f"{out}: cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# Against bench.py.


def test_agreement_is_told_by_figure_and_gone_on_with(
    built: Path, fresh: Path, native_agreement: ModuleType, tmp_path: Path
) -> None:
    tool, out = str(built / "edgeqdm-bench"), tmp_path / "out.json"
    app = typer.Typer()
    app.command()(native_agreement.main)
    options = ["--kit", str(fresh), "--work", str(tmp_path / "work"), "--seconds", SECONDS]
    for _ in range(2):
        done = CliRunner().invoke(app, [tool, "-o", str(out), *options, "--pairs", "1"])
        assert done.exit_code == 0, done.output
        runs = {p.name: p.read_bytes() for p in (tmp_path / "work").glob("*-1-*.jsonl")}
    assert len([name for name in runs if not name.startswith("environment")]) == 2
    told = json.loads(out.read_text())
    assert [row["what"] for row in told["rows"]][-2:] == ["phase 0 alone", "phase 0 among"]
    assert told["summary"]["ratio"]["n"] == len(told["rows"]) == 5
    assert told["commit"]
    assert told["machine"]["cores"] == os.cpu_count()


def test_agreement_is_the_ratio_of_medians_and_of_them_less_an_empty_graph(
    native_agreement: ModuleType, finished: Path
) -> None:
    profile = read_results(finished, results_of(finished))

    def times(factor: float, overhead: float) -> LatencyProfile:
        """Every operation takes as long, an empty graph `overhead`."""

        def us(value: float) -> Timing:
            return Timing(median_us=value, p10_us=value, p90_us=value, ci95_us=(value, value), n=30)

        entries = tuple(e.model_copy(update={"timing": us(factor)}) for e in profile.entries)
        update = {"entries": entries, "overhead": us(overhead), "boundaries": (), "phase_costs": ()}
        return profile.model_copy(update=update)

    python, native = [times(104.0, 4.0), times(108.0, 4.0)], [times(81.0, 1.0), times(81.0, 1.0)]
    found = native_agreement.agreement({"python": python, "native": native})
    assert found["overhead_us"] == {"python": 4.0, "native": 1.0}
    assert found["summary"]["ratio"]["median"] == pytest.approx(81 / 106)
    assert found["summary"]["net"]["median"] == pytest.approx(80 / 102)
    assert found["summary"]["python"]["median"] == pytest.approx(108 / 104)
    assert found["summary"]["native"] == {"n": 2, "p10": 1.0, "median": 1.0, "p90": 1.0}


# The build.


def test_the_program_needs_no_library_of_the_compiler(built: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    command = ["readelf", "-d", str(built / "edgeqdm-bench")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # It is loaded, also from beside the program.
    assert "libonnxruntime.so" not in found
    assert "$ORIGIN" in found
    assert "libstdc++" not in found
    assert "libgcc_s" not in found


def test_the_tool_runs_on_emulated_arm(release: Path, fresh: Path, tmp_path: Path) -> None:
    """Its figures are none of a device, which the results say."""
    deps, missing = native_deps(ROOT), missing_for_arm()
    if deps is None or not (deps / "lib-aarch64").is_dir() or missing:
        pytest.skip(f"missing for Arm: {', '.join(missing) or DEPS_VARIABLE}")
    options = (f"-DEDGEQDM_PYTHON={sys.executable}", "-DEDGEQDM_STATIC_LIBSTDCXX=ON")
    arm = build_for_arm(SOURCE, "edgeqdm-bench", tmp_path, deps, *options, toolchain=TOOLCHAIN)
    found = arm.run(fresh, "--seconds", SECONDS, "--max-seconds", SECONDS, "--emulator")
    assert found.returncode == 0, found.stderr
    profile = read_results(fresh, results_of(fresh))
    assert profile.device.machine == "aarch64"
    assert "emulator" in profile.flags
    assert len(profile.entries) == 2


def test_a_build_without_onnx_runtime_says_what_to_give(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no C++ compiler")
    command = ["cmake", "-S", str(SOURCE), "-B", str(tmp_path), "-DONNXRUNTIME_ROOT=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "onnxruntime_c_api.h is not in '/nowhere/include'" in " ".join(done.stderr.split())
