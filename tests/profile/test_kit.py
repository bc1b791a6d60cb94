"""A kit times what it says, on a device that may be stopped at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeqdm.backends import load_backend
from edgeqdm.emit.writer import check_folder_destination, staged_folder
from edgeqdm.errors import InputError, OutputError, ResourceError, UnsupportedError
from edgeqdm.ir.codec import dump_record, parse_record, read_record
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.ir.profile import (
    BoundaryKind,
    Flag,
    KitGraph,
    KitManifest,
    LatencyProfile,
    is_sealed,
)
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.load import load
from edgeqdm.profile import protocol
from edgeqdm.profile.host import run_kit
from edgeqdm.profile.kit import (
    KIT,
    KitRequest,
    make_kit,
    one_layer,
    plan_of,
    read_results,
    timing_of,
)
from edgeqdm.profile.opkeys import network_keys
from edgeqdm.testing.tiny import write_tiny_unet

LINEAR_PRECISIONS = tuple(map(Precision, ("fp32", "w8a8", "w4a8", "w8", "w8a8dyn")))
CONV_PRECISIONS = LINEAR_PRECISIONS[:-1]
SECONDS = 0.05
SHAPE = (1, 16, 16)


class Kit:
    """Two operations of the tiny UNet at every precision, and the UNet, timed once."""

    def __init__(self, folder: Path) -> None:
        self.denoiser: Denoiser = load(write_tiny_unet(folder / "model"), scheduler="ddim", steps=4)
        self.backend = load_backend("onnxruntime")
        keys = dict.fromkeys(network_keys(self.denoiser).keys.values())
        self.linear = next(k for k in keys if k.kind is LayerKind.LINEAR and k.input_shape == SHAPE)
        self.conv = next(k for k in keys if k.kind is LayerKind.CONV2D and k.stride == (2, 2))
        names = [info.name for info in self.denoiser.info.layers]
        self.request = KitRequest(
            entries=[
                *((self.linear, precision) for precision in LINEAR_PRECISIONS),
                *((self.conv, precision) for precision in CONV_PRECISIONS),
            ],
            boundaries=[(BoundaryKind.QUANTIZE, SHAPE)],
            wholes=[dict.fromkeys(names[::2], W8A8)],
            pairs=[
                (dict.fromkeys(names, W8A8), {}),
                (dict.fromkeys(names, W8A8), dict.fromkeys(names[::2], W8A8)),
            ],
        )
        self.told: list[tuple[int, int]] = []
        self.path = folder / "kit"
        self.manifest = make_kit(
            self.denoiser,
            self.backend,
            self.request,
            self.path,
            progress=lambda done, total: self.told.append((done, total)),
        )
        self.run_told: list[tuple[int, int]] = []
        self.profile = run_kit(
            self.path,
            seconds=SECONDS,
            name="this host",
            progress=lambda done, total: self.run_told.append((done, total)),
        )
        (self.results,) = self.path.glob("results-1*.jsonl")

    def graphs(self, role: str) -> list[KitGraph]:
        return [graph for graph in self.manifest.graphs if graph.role == role]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kits"))


@pytest.fixture(scope="module")
def finished(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of only four of the graphs, timed."""
    path = tmp_path_factory.mktemp("kits") / "finished"
    shutil.copytree(kit.path, path, ignore=shutil.ignore_patterns("results*", "__pycache__"))
    some = [*kit.manifest.graphs[:3], *kit.graphs("boundary")]
    (path / KIT).write_bytes(dump_record(kit.manifest.model_copy(update={"graphs": tuple(some)})))
    run_kit(path, seconds=SECONDS)
    return path


@pytest.fixture
def small(finished: Path, tmp_path: Path) -> Path:
    """A copy of its own for every test."""
    return Path(shutil.copytree(finished, tmp_path / "small"))


def results_of(folder: Path) -> Path:
    return folder / "results-1.jsonl"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results_of(folder).read_text().splitlines()]


def store(folder: Path, lines: list[dict[str, Any]]) -> None:
    results_of(folder).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def refusal(folder: Path, *, code: str) -> InputError:
    with pytest.raises(InputError) as caught:
        read_results(folder, results_of(folder))
    assert caught.value.code == code
    assert str(results_of(folder)) in str(caught.value.path)
    return caught.value


# What is in a kit.


def test_a_kit_holds_every_graph_that_was_asked_for_and_says_what_it_is(kit: Kit) -> None:
    manifest = read_record(kit.path / KIT, KitManifest)
    assert manifest == kit.manifest
    assert (manifest.target, manifest.batch) == ("onnxruntime", 1)
    assert manifest.model == kit.denoiser.info.fingerprint
    assert [(g.key, g.precision) for g in kit.graphs("entry")] == list(kit.request.entries)
    assert [(g.boundary, g.shape) for g in kit.graphs("boundary")] == list(kit.request.boundaries)
    assert [g.precisions for g in kit.graphs("whole")] == list(kit.request.wholes)
    assert len(kit.graphs("reference")) == len(kit.graphs("overhead")) == 1
    assert len({graph.name for graph in manifest.graphs}) == len(manifest.graphs)


def test_every_file_of_a_graph_is_there_and_hashed(kit: Kit) -> None:
    for graph in kit.manifest.graphs:
        folder = kit.path / "graphs" / graph.name
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")}
        hashes = {path: hashlib.sha256(data).hexdigest() for path, data in found.items()}
        assert hashes == graph.files
        assert graph.model_bytes == sum(map(len, found.values()))


def test_progress_is_told_of_every_graph_and_every_round(kit: Kit) -> None:
    n = len(kit.manifest.graphs)
    assert kit.told == [(done, n) for done in range(1, n + 1)]
    # The reference is timed in between; the last round is for those that are not settled.
    turns = (n - 1) * (protocol.ROUNDS + 1)
    assert kit.run_told == [(done, turns) for done in range(1, turns + 1)]


def test_the_tool_travels_with_the_protocol_it_follows(kit: Kit) -> None:
    assert (kit.path / "protocol.py").read_bytes() == Path(protocol.__file__).read_bytes()
    assert (kit.path / "bench.py").is_file()


def test_the_tool_needs_only_numpy_and_the_runtime(small: Path) -> None:
    """It goes on from finished results, so nothing is timed but the reference."""
    blocked = ("torch", "edgeqdm", "onnx", "pydantic", "diffusers")
    start = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r})); "
        "sys.path.insert(0, sys.argv[1]); sys.argv = [sys.argv[1] + '/bench.py', *sys.argv[2:]]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = ["--seconds", str(SECONDS), "--max-seconds", "6.0"]
    command = [sys.executable, "-I", "-c", start, str(small), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=small.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("results-1.jsonl: done\n")


@pytest.fixture(scope="module")
def bench(kit: Kit) -> ModuleType:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("bench", kit.path / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "protocol", protocol)
        spec.loader.exec_module(module)
    return module


X86 = "processor : 0\nmodel name\t: AMD EPYC\nflags : sse avx2 avx512_vnni\n\nprocessor : 1\n"
BOARD = "".join(
    f"processor : {k}\nFeatures : fp asimddp\nCPU implementer : 0x41\nCPU part : {part}\n\n"
    for k, part in enumerate(("0xd05", "0xd05", "0xd0b"))
)
ARM32 = "processor : 0\nmodel name : ARMv7 Processor rev 4 (v7l)\nHardware : BCM2711\n"


@pytest.mark.parametrize(
    ("cpuinfo", "board", "name", "features"),
    [
        (X86, None, "AMD EPYC", ["avx2", "avx512_vnni"]),
        (BOARD, "Raspberry Pi 5 Model B Rev 1.0\0", "Raspberry Pi 5 Model B Rev 1.0", ["asimddp"]),
        (BOARD, None, "aarch64 0x41/0xd05 0x41/0xd0b", ["asimddp"]),
        (BOARD, "\0", "aarch64 0x41/0xd05 0x41/0xd0b", ["asimddp"]),
        (ARM32, None, "BCM2711", []),
        (ARM32, "Raspberry Pi 4\0", "Raspberry Pi 4", []),
        (None, "caf\u00e9 " + "x" * 300, ("caf " + "x" * 300)[:200], []),
        ("", None, "aarch64", []),
        (None, None, "aarch64", []),
    ],
)
def test_a_device_is_named_by_its_board_or_its_cores(
    cpuinfo: str | None,
    board: str | None,
    name: str,
    features: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("platform.processor", lambda: "")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    if board is not None:
        (tmp_path / "device-tree").mkdir()
        (tmp_path / "device-tree" / "model").write_text(board, encoding="utf-8")
    assert protocol.cpu(tmp_path) == (name, features)


def is_exact(profile: LatencyProfile) -> bool:
    """Without VNNI, x86 adds uint8 x int8 in saturating 16 bits."""
    vnni = {"avx512_vnni", "avx_vnni", "amx_int8"} & set(profile.device.features)
    return profile.device.machine not in ("x86_64", "AMD64") or bool(vnni)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *((LayerKind.LINEAR, precision) for precision in LINEAR_PRECISIONS),
        *((LayerKind.CONV2D, precision) for precision in CONV_PRECISIONS),
    ],
)
def test_the_graph_of_a_layer_computes_what_the_eager_layer_does(
    kit: Kit, kind: LayerKind, precision: Precision
) -> None:
    if precision.integer and not is_exact(kit.profile):
        pytest.skip("this CPU has no exact uint8 x int8 kernel (x86 without VNNI)")
    key = kit.linear if kind is LayerKind.LINEAR else kit.conv
    (graph,) = [g for g in kit.graphs("entry") if (g.key, g.precision) == (key, precision)]
    evaluate = kit.backend.open(kit.path / "graphs" / graph.name)
    eager = one_layer(key, precision)
    for n, step in ((1, 0), (1, 3), (5, 2)):
        x = torch.randn(n, *key.input_shape[1:])
        with torch.no_grad():
            expected = eager(x, torch.tensor(step)).numpy()
        found = evaluate(x.numpy(), step, None)
        # Float32 sums of at most 72 products in another order; a code that differed would be 1e-2.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", LINEAR_PRECISIONS[1:])
def test_a_quantized_layer_of_a_kit_is_near_the_float_one(kit: Kit, precision: Precision) -> None:
    x = torch.randn(4, *kit.linear.input_shape[1:])
    with torch.no_grad():
        expected = one_layer(kit.linear, FP32)(x, torch.tensor(0))
        found = one_layer(kit.linear, precision)(x, torch.tensor(0))
    error = float((found - expected).square().mean() / expected.square().mean())
    # 4 bits of normal weights leave 1 to 2 % of the power, 8 bits a hundredth of that.
    assert error <= (0.03 if precision.weight_bits == 4 else 0.001)


def test_a_plan_to_be_timed_leaves_absent_layers_in_float(kit: Kit) -> None:
    plan = plan_of(kit.denoiser, "onnxruntime", [kit.request.wholes[0]])
    (phase,) = plan.phases
    assert (phase.start, phase.stop) == (0, kit.denoiser.program.n_steps)
    for assignment in phase.layers:
        wanted = kit.request.wholes[0].get(assignment.layer, FP32)
        assert assignment.precision == wanted


def test_phases_to_be_timed_share_the_steps(kit: Kit) -> None:
    names = [info.name for info in kit.denoiser.info.layers]
    plan = plan_of(kit.denoiser, "onnxruntime", [{}, dict.fromkeys(names, W8A8), {}])
    assert [(p.start, p.stop) for p in plan.phases] == [(0, 1), (1, 2), (2, 4)]
    assert [{a.precision for a in p.layers} for p in plan.phases] == [{FP32}, {W8A8}, {FP32}]


def test_a_phase_among_others_is_timed_beside_the_same_network_alone(kit: Kit) -> None:
    alone, *among = kit.graphs("phase")
    assert (alone.other, alone.precisions) == (None, kit.request.pairs[0][0])
    assert [(g.precisions, g.other) for g in among] == list(kit.request.pairs)
    for graph in (alone, *among):
        model = onnx.load(kit.path / "graphs" / graph.name / "model.onnx")
        assert ("If" in {node.op_type for node in model.graph.node}) == (graph.other is not None)
    profile = kit.profile
    assert [(p.precisions, p.other) for p in profile.phase_costs] == list(kit.request.pairs)
    samples = [json.loads(line) for line in kit.results.read_text().splitlines()[1:]]

    def median(graph: KitGraph) -> float:
        return float(np.median([us for s in samples if s["graph"] == graph.name for us in s["us"]]))

    for graph, cost in zip(among, profile.phase_costs, strict=True):
        assert cost.alone.median_us == pytest.approx(median(alone), rel=1e-12)
        assert cost.among.median_us == pytest.approx(median(graph), rel=1e-12)
        assert cost.model == kit.denoiser.info.fingerprint


def test_a_kit_without_the_network_alone_is_refused(kit: Kit) -> None:
    alone = kit.graphs("phase")[0]
    left = [graph for graph in kit.manifest.graphs if graph != alone]
    told = dump_record(kit.manifest.model_copy(update={"graphs": tuple(left)}))
    with pytest.raises(InputError, match="alone"):
        parse_record(told, KitManifest, name="kit.json")


def test_a_folder_that_is_there_is_refused_before_the_work(kit: Kit, tmp_path: Path) -> None:
    for occupy in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        out = tmp_path / f"kit{len(list(tmp_path.iterdir()))}"
        occupy(out)
        with pytest.raises(OutputError, match="EQ-7112"):
            make_kit(kit.denoiser, kit.backend, kit.request, out)
        with pytest.raises(OutputError, match="EQ-7112"):
            check_folder_destination(out)
    assert len(list(tmp_path.iterdir())) == 3


def test_nothing_to_time_is_refused(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="EQ-3501"):
        make_kit(kit.denoiser, kit.backend, KitRequest(entries=[]), tmp_path / "kit")
    assert list(tmp_path.iterdir()) == []


def test_the_same_thing_twice_is_refused_before_the_work(kit: Kit, tmp_path: Path) -> None:
    entry, shape = (kit.conv, FP32), (BoundaryKind.QUANTIZE, SHAPE)
    names = [info.name for info in kit.denoiser.info.layers]
    for request in (
        KitRequest(entries=[entry, entry]),
        KitRequest(entries=[entry], boundaries=[shape, shape]),
        KitRequest(entries=[], wholes=[{}, dict.fromkeys(names, FP32)]),
        KitRequest(entries=[], pairs=[({}, {names[0]: W8A8}), ({}, {names[0]: W8A8})]),
    ):
        with pytest.raises(InputError, match="EQ-3508"):
            make_kit(kit.denoiser, kit.backend, request, tmp_path / "kit")
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_does_not_fit_its_layer_is_refused_and_leaves_nothing(
    kit: Kit, tmp_path: Path
) -> None:
    request = KitRequest(entries=[(kit.conv, Precision("w8a8dyn"))])
    with pytest.raises(UnsupportedError):
        make_kit(kit.denoiser, kit.backend, request, tmp_path / "kit")
    assert list(tmp_path.iterdir()) == []


def fill(out: Path, *actions: Callable[[Path], object]) -> None:
    with staged_folder(out) as folder:
        for action in actions:
            action(folder)


@pytest.mark.parametrize(
    ("problem", "error"),
    [(KeyboardInterrupt, KeyboardInterrupt), (ValueError, ValueError), (OSError, OutputError)],
)
def test_a_folder_appears_whole_or_not_at_all(
    problem: type[BaseException], error: type[BaseException], tmp_path: Path
) -> None:
    def stop(_: Path) -> None:
        raise problem

    def touch(folder: Path) -> None:
        (folder / "file").touch()
        assert not (tmp_path / "a" / "kit").exists()

    fill(tmp_path / "a" / "kit", touch)
    assert [path.name for path in (tmp_path / "a" / "kit").iterdir()] == ["file"]
    with pytest.raises(error):
        fill(tmp_path / "b", lambda folder: (folder / "file").touch(), stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="meanwhile"):
        fill(tmp_path / "kit", lambda _: (tmp_path / "kit").mkdir())
    assert list((tmp_path / "kit").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]


# What comes back.


def test_a_timed_kit_is_a_sealed_profile_with_every_figure(kit: Kit) -> None:
    profile = kit.profile
    assert is_sealed(profile)
    assert [(e.key, e.precision) for e in profile.entries] == list(kit.request.entries)
    assert [(b.kind, b.shape) for b in profile.boundaries] == list(kit.request.boundaries)
    (whole,) = profile.wholes
    assert whole.precisions == kit.request.wholes[0]
    assert (whole.model, whole.batch) == (kit.denoiser.info.fingerprint, 1)
    assert whole.model_bytes == kit.graphs("whole")[0].model_bytes
    assert (profile.target, profile.device.name) == ("onnxruntime", "this host")
    assert (profile.threads, profile.protocol.clock) == (1, "thread_cpu")
    assert len(profile.protocol.reference_us) >= 2
    assert all(entry.provenance == "measured" for entry in profile.entries)
    assert read_results(kit.path, kit.results) == profile


def test_every_figure_is_of_all_samples_of_its_graph(kit: Kit) -> None:
    """Against numpy."""
    first, *samples = [json.loads(line) for line in kit.results.read_text().splitlines()]
    assert first["seconds"] == SECONDS
    for graph, entry in zip(kit.graphs("entry"), kit.profile.entries, strict=True):
        turns = sorted(s["round"] for s in samples if s["graph"] == graph.name)
        assert turns[: protocol.ROUNDS] == list(range(protocol.ROUNDS))
        us = [value for s in samples if s["graph"] == graph.name for value in s["us"]]
        assert entry.timing.n == len(us) >= protocol.MIN_RUNS
        assert entry.timing.median_us == np.median(us)


@given(st.lists(st.lists(st.floats(0.01, 1e6), min_size=3, max_size=60), min_size=1, max_size=4))
def test_a_distribution_has_the_percentiles_of_numpy(rounds: list[list[float]]) -> None:
    found = timing_of(rounds, ci_target=0.01)
    samples = [value for each in rounds for value in each]
    assert found.n == len(samples)
    assert found.median_us == np.median(samples)
    assert found.p10_us == np.percentile(samples, 10, method="lower")
    assert found.p90_us == np.percentile(samples, 90, method="higher")
    assert found.ci95_us == protocol.median_interval(samples)
    expected = protocol.flags_of(rounds, ci_target=0.01)
    assert [str(flag) for flag in found.flags] == list(expected)


def test_a_reference_that_grew_slower_flags_the_whole_profile(small: Path) -> None:
    lines = lines_of(small)
    for line in lines[1:]:
        # What was really measured may have grown slower as well.
        line["us"] = [5.0] * len(line["us"])
    reference = [line for line in lines[1:] if line["graph"] == "0000"]
    reference[0]["us"] = [1000.0] * 5
    for line in reference[1:]:
        line["us"] = [1090.0] * 5
    store(small, lines)
    assert Flag.THROTTLED not in read_results(small, results_of(small)).flags
    reference[-1]["us"] = [1110.0] * 5
    store(small, lines)
    assert read_results(small, results_of(small)).flags == (Flag.THROTTLED,)


def test_flags_of_the_device_reach_the_profile(small: Path) -> None:
    header, *lines = lines_of(small)
    store(small, [header | {"flags": ["emulator"]}, *lines])
    assert Flag.EMULATOR in read_results(small, results_of(small)).flags


def test_the_order_of_the_lines_does_not_matter(small: Path) -> None:
    expected = read_results(small, results_of(small))
    header, *lines = lines_of(small)
    random.shuffle(lines)
    store(small, [header, *lines])
    assert read_results(small, results_of(small)) == expected


# Going on.


def cut_points(data: bytes) -> dict[str, int]:
    header = data.index(b"\n") + 1
    return {
        "nothing": 0,
        "in the header": header // 2,
        "at the end of the header": header - 1,
        "after the header": header,
        "in the first samples": header + 10,
        "anywhere": random.Random(5).randrange(header, len(data)),
        "in the last line": len(data) - 10,
        "before the last byte": len(data) - 1,
    }


@pytest.mark.parametrize("place", list(cut_points(b"{}\n" + b"x" * 100)))
def test_the_tool_goes_on_from_results_cut_off_anywhere(place: str, small: Path) -> None:
    data = results_of(small).read_bytes()
    results_of(small).write_bytes(data[: cut_points(data)[place]])
    kept = data[: data.rfind(b"\n", 0, cut_points(data)[place]) + 1]
    profile = run_kit(small, seconds=SECONDS)
    assert is_sealed(profile)
    assert len(profile.entries) == len(profile.boundaries) == 1
    assert results_of(small).read_bytes().startswith(kept)


def n_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_the_tool_goes_on_after_it_was_killed(kit: Kit, tmp_path: Path) -> None:
    path = Path(
        shutil.copytree(kit.path, tmp_path / "kit", ignore=shutil.ignore_patterns("results*"))
    )
    # As `run_kit` calls it, so that it finds its own results again.
    command = [sys.executable, str(path / "bench.py"), "--seconds", str(SECONDS)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as tool:
        while tool.poll() is None and n_lines(results_of(path)) < 5:
            time.sleep(0.002)
        tool.kill()
    assert tool.returncode == -9
    before = results_of(path).read_bytes()
    whole_lines = before[: before.rfind(b"\n") + 1]
    profile = run_kit(path, seconds=SECONDS)
    assert len(profile.entries) == len(kit.request.entries)
    assert results_of(path).read_bytes().startswith(whole_lines)


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def is_free(file: Path) -> bool:
    """Whether nobody holds the lock of a results file."""
    with file.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


OWNER = """
import sys
from pathlib import Path
from edgeqdm.profile.host import run_kit
run_kit(Path(sys.argv[1]), seconds=900.0)
"""


def test_the_tool_ends_with_whoever_started_it(small: Path) -> None:
    results_of(small).unlink()
    text = (small / "protocol.py").read_text()
    assert "MAX_RUNS = 1000\n" in text
    # Behind its header and the reference the tool is busy with one graph for five minutes, and says
    # nothing that a broken pipe would stop.
    (small / "protocol.py").write_text(text.replace("MAX_RUNS = 1000\n", "MAX_RUNS = 10**12\n"))
    with subprocess.Popen([sys.executable, "-c", OWNER, str(small)]) as owner:
        begun = eventually(lambda: n_lines(results_of(small)) >= 2 or owner.poll() is not None)
        held = begun and not is_free(results_of(small))
        owner.kill()
    assert held
    assert eventually(lambda: is_free(results_of(small)), seconds=5.0)


def test_the_tool_run_by_hand_needs_no_input(small: Path) -> None:
    command = [sys.executable, str(small / "bench.py"), "--seconds", str(SECONDS)]
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)


def impatient(folder: Path) -> None:
    """The kit's tool waits a moment only for another one."""
    text = (folder / "bench.py").read_text()
    assert "LOCK_SECONDS = 5.0" in text
    (folder / "bench.py").write_text(text.replace("LOCK_SECONDS = 5.0", "LOCK_SECONDS = 0.1"))


def test_a_second_run_on_the_same_results_is_refused_and_told_who_has_them(small: Path) -> None:
    impatient(small)
    before = results_of(small).read_bytes()
    with results_of(small).open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="EQ-9501") as caught:
            run_kit(small, seconds=SECONDS)
    told = f"{results_of(small)}: process {os.getpid()} is writing to it; wait for it to end"
    assert "ended with 3: " + told in caught.value.message
    assert caught.value.hint is None
    assert results_of(small).read_bytes() == before
    run_kit(small, seconds=SECONDS)


def test_a_run_waits_for_one_that_is_ending(bench: ModuleType, small: Path) -> None:
    with results_of(small).open("rb") as other, results_of(small).open("a+b", buffering=0) as mine:
        fcntl.flock(other, fcntl.LOCK_EX)
        ending = threading.Timer(0.2, fcntl.flock, (other, fcntl.LOCK_UN))
        ending.start()
        bench.lock(mine, results_of(small))
        ending.join()
        assert not is_free(results_of(small))


def test_where_there_are_no_locks_a_run_goes_on(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    with (tmp_path / "results").open("a+b", buffering=0) as file:
        with monkeypatch.context() as patched:
            patched.setattr(bench.fcntl, "flock", unknown)
            bench.lock(file, tmp_path / "results")
        monkeypatch.setattr(bench, "fcntl", None)
        bench.lock(file, tmp_path / "results")


Lines = list[bytes]


@pytest.mark.parametrize(
    ("damage", "line", "told"),
    [
        (lambda x: [*x[:4], x[4][:9] + x[5], *x[6:]], 5, "damaged; delete the line and run again"),
        (lambda x: [*x[:4], b"", *x[4:]], 5, "damaged; delete the line and run again"),
        (lambda x: [*x[:4], b"\xff\x00", *x[4:]], 5, "damaged; delete the line and run again"),
        (lambda x: [*x[:4], b"[" * 99_999, *x[4:]], 5, "damaged; delete the line and run again"),
        (lambda x: [*x, b"{}"], -1, "damaged; delete the line and run again"),
        (lambda x: [*x, x[3]], -1, "is there twice; delete the line and run again"),
        (lambda x: [*x[:4], x[0], *x[4:]], 5, "a second header; delete the file and run again"),
        (lambda x: [x[0][:-9], *x[1:]], 1, "damaged, or of another tool; delete the file and run"),
        (lambda x: x[1:], 1, "damaged, or of another tool; delete the file and run again"),
        (lambda x: [b""], 1, "damaged, or of another tool; delete the file and run again"),
    ],
)
def test_damaged_results_are_told_by_line_with_what_to_do(
    damage: Callable[[Lines], Lines], line: int, told: str, small: Path
) -> None:
    lines = damage(results_of(small).read_bytes().splitlines())
    before = b"\n".join(lines) + b"\n"
    results_of(small).write_bytes(before)
    with pytest.raises(ResourceError, match="EQ-9501") as caught:
        run_kit(small, seconds=SECONDS)
    number = len(lines) if line < 0 else line
    assert f"ended with 3: {results_of(small)}, line {number}: " in caught.value.message
    assert told in caught.value.message
    assert results_of(small).read_bytes() == before


def test_results_go_on_once_the_line_that_was_named_is_deleted(small: Path) -> None:
    lines = results_of(small).read_bytes().splitlines()
    results_of(small).write_bytes(b"\n".join([*lines[:4], *lines[5:], b""]))
    assert len(run_kit(small, seconds=SECONDS).entries) == 1


def test_results_go_on_once_the_reference_that_was_named_is_deleted(small: Path) -> None:
    header, *lines = lines_of(small)
    references = [line for line in lines if line["graph"] == "0000"]
    store(small, [header, *(line for line in lines if line not in references[:-1])])
    for _ in range(2):
        assert len(run_kit(small, seconds=SECONDS).entries) == 1


OWN_HEADER = {
    "schema_version": 1,
    "kit_sha256": "0" * 64,
    "created": "2026-11-01T12:00:00Z",
    "threads": 1,
}


@pytest.mark.parametrize("cut", [0, 1, 20, 110, 121, 130, 140])
def test_a_torn_header_of_another_time_is_written_anew(
    bench: ModuleType, cut: int, tmp_path: Path
) -> None:
    earlier = bench.line(OWN_HEADER | {"created": "2025-12-31T23:59:59Z"})
    out = tmp_path / "results"
    out.write_bytes(earlier[:cut].rstrip())
    with out.open("a+b", buffering=0) as file:
        assert bench.resume(file, out, OWN_HEADER, []) == {}
    assert out.read_bytes() == bench.line(OWN_HEADER)


@pytest.mark.parametrize(
    "text",
    [
        b"my notes",
        b"my notes\nof a day\n",
        b"{}\n{",
        b'{"schema_version":1,"precious":true}',
        b'{"schema_version":1,"kit_sha256":"00x',
        b'{"schema_version":2',
    ],
)
def test_a_file_of_something_else_is_left_as_it_was(
    bench: ModuleType, text: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "notes.txt"
    out.write_bytes(text)
    with (
        out.open("a+b", buffering=0) as file,
        pytest.raises(bench.RefusedError, match=r"notes\.txt.*another"),
    ):
        bench.resume(file, out, OWN_HEADER, [])
    assert out.read_bytes() == text


def test_more_threads_than_any_device_has_are_refused(small: Path) -> None:
    command = [sys.executable, str(small / "bench.py"), "--threads", "257"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("error: --threads is 1 to 256, found 257\n")


class Full:
    """A file that takes a few bytes at a time, and no more than fit."""

    def __init__(self, room: int) -> None:
        self.data, self.room = b"", room

    def write(self, data: bytes) -> int:
        taken = data[: min(3, self.room - len(self.data))]
        if not taken:
            raise OSError(28, "No space left on device")
        self.data += taken
        return len(taken)


def test_a_line_is_written_whole_or_an_error_is_raised(bench: ModuleType) -> None:
    enough, full = Full(100), Full(8)
    bench.append(enough, b"ten bytes\n")
    assert enough.data == b"ten bytes\n"
    with pytest.raises(OSError, match="No space left"):
        bench.append(full, b"ten bytes\n")


def test_finished_results_are_only_read(small: Path) -> None:
    before = lines_of(small)
    run_kit(small, seconds=SECONDS)
    after = lines_of(small)
    assert after == before


# What is refused.


def test_results_of_another_kit_are_refused(kit: Kit, small: Path) -> None:
    with pytest.raises(InputError, match="EQ-3502") as caught:
        read_results(kit.path, results_of(small))
    assert caught.value.path == str(results_of(small))
    with pytest.raises(InputError, match="EQ-3502"):
        read_results(small, kit.results)


@pytest.mark.parametrize("cut", [1, 5])
def test_results_with_a_cut_last_line_are_refused_by_line_and_byte(cut: int, small: Path) -> None:
    data = results_of(small).read_bytes()[:-cut]
    results_of(small).write_bytes(data)
    n = data.count(b"\n") + 1
    message = refusal(small, code="EQ-3503").message
    assert message == f"line {n} is cut off, at byte {len(data)}"


def test_empty_results_are_refused(small: Path) -> None:
    results_of(small).write_bytes(b"")
    assert "empty" in refusal(small, code="EQ-3503").message


@pytest.mark.parametrize("role", ["reference", "overhead"])
def test_a_kit_without_what_all_figures_are_relative_to_is_refused(role: str, small: Path) -> None:
    manifest = read_record(small / KIT, KitManifest)
    others = tuple(graph for graph in manifest.graphs if graph.role != role)
    (small / KIT).write_bytes(dump_record(manifest.model_copy(update={"graphs": others})))
    with pytest.raises(InputError, match=f"there is no {role} graph; make the kit again") as caught:
        read_results(small, results_of(small))
    assert caught.value.path == str(small / KIT)


def test_results_of_a_device_without_a_clock_are_refused_by_field(small: Path) -> None:
    header, *lines = lines_of(small)
    store(small, [header | {"created": "some day"}, *lines])
    with pytest.raises(InputError, match="created: 'some day' is no time with a zone") as caught:
        read_results(small, results_of(small))
    assert caught.value.path == f"{results_of(small)}, line 1"


def test_a_round_that_is_there_twice_is_refused(small: Path) -> None:
    lines = lines_of(small)
    store(small, [*lines, lines[3]])
    graph, turn = lines[3]["graph"], lines[3]["round"]
    message = refusal(small, code="EQ-3504").message
    assert message == f"line {len(lines) + 1}: graph {graph}, round {turn}, is there twice"


def test_a_graph_the_kit_does_not_have_is_refused(small: Path) -> None:
    lines = lines_of(small)
    store(small, [*lines, {"graph": "9999", "round": 0, "us": [1.0]}])
    assert "graph 9999, round 0, is not in the kit" in refusal(small, code="EQ-3504").message


@pytest.mark.parametrize("graph", ["0000", "0001", "0002"])
def test_unfinished_results_are_refused_with_what_is_missing(graph: str, small: Path) -> None:
    lines = lines_of(small)
    last = [k for k, line in enumerate(lines) if line.get("graph") == graph]
    needed = 2 if graph == "0000" else protocol.ROUNDS
    store(small, [line for k, line in enumerate(lines) if k not in last[needed - 1 :]])
    problem = refusal(small, code="EQ-3505")
    assert problem.message == f"1 of 4 graphs are not finished, {graph} first"
    assert "goes on" in str(problem.hint)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda line: line | {"us": [1.0, -1.0]}, "us[1]"),
        (lambda line: line | {"us": [0]}, "us[0]"),
        (lambda line: line | {"us": []}, "us"),
        (lambda line: line | {"us": ["1"]}, "us[0]"),
        (lambda line: line | {"us": [float("nan")]}, "us[0]"),
        (lambda line: line | {"us": [2e9]}, "us[0]"),
        (lambda line: line | {"round": -1}, "round"),
        (lambda line: {k: v for k, v in line.items() if k != "round"}, "round"),
        (lambda line: line | {"ms": 1}, '"ms"'),
    ],
)
def test_a_line_that_is_no_measurement_is_named(
    edit: Callable[[dict[str, Any]], dict[str, Any]], told: str, small: Path
) -> None:
    lines = lines_of(small)
    store(small, [*lines[:4], edit(lines[4]), *lines[5:]])
    with pytest.raises(InputError) as caught:
        read_results(small, results_of(small))
    assert told in caught.value.message
    assert caught.value.path == f"{results_of(small)}, line 5"


def test_results_without_their_header_are_refused(small: Path) -> None:
    store(small, lines_of(small)[1:])
    with pytest.raises(InputError) as caught:
        read_results(small, results_of(small))
    assert caught.value.path == f"{results_of(small)}, line 1"


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_damaged_graph_is_not_timed(place: int, small: Path) -> None:
    results_of(small).unlink()
    graph = small / "graphs" / "0002" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[place] ^= 1
    graph.write_bytes(data)
    with pytest.raises(ResourceError, match="EQ-9501") as caught:
        run_kit(small, seconds=SECONDS)
    assert "model.onnx: damaged; copy the kit again" in caught.value.message
    assert caught.value.path == str(small)


def test_a_graph_that_is_gone_is_told(small: Path) -> None:
    results_of(small).unlink()
    (small / "graphs" / "0002" / "model.onnx").unlink()
    with pytest.raises(ResourceError, match="EQ-9501") as caught:
        run_kit(small, seconds=SECONDS)
    assert "model.onnx" in caught.value.message


def test_another_power_mode_has_results_of_its_own(small: Path) -> None:
    before = results_of(small).read_bytes()
    profile = run_kit(small, seconds=SECONDS, power_mode="performance")
    assert profile.power_mode == "performance"
    assert results_of(small).read_bytes() == before


def test_results_of_another_length_of_time_are_not_gone_on_with(small: Path) -> None:
    before = results_of(small).read_bytes()
    with pytest.raises(ResourceError, match="another kit, device, mode or --seconds"):
        run_kit(small, seconds=2 * SECONDS)
    assert results_of(small).read_bytes() == before


def test_a_folder_that_is_no_kit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="EQ-3506"):
        run_kit(tmp_path)
    assert os.listdir(tmp_path) == []
