"""The browser's noise, sampler and pixels are those of the Python runtime, number for number."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeqdm.backends.onnxruntime.backend import WEB_FILES
from edgeqdm.emit import playback
from edgeqdm.numerics import philox, solver

STEPS, SHAPE = 5, (2, 3, 4, 6)
# numpy's exp in float32 is off by up to 3 units in the last place; twice that after the products.
EXP = 6 * 2.0**-23
Program = dict[str, Any]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's modules where Node takes them for modules."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    folder = tmp_path_factory.mktemp("web") / "web"
    with as_file(files("edgeqdm.backends.onnxruntime") / "templates/web") as source:
        shutil.copytree(source, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


def node(modules: Path, script: str, **given: Any) -> Any:
    """What an async function with this body returns; it sees `given` and the three modules."""
    start = (
        'import * as philox from "./philox.js"; import * as solver from "./solver.js";'
        'import * as playback from "./playback.js"; import { readFileSync } from "node:fs";'
        "const given = JSON.parse(readFileSync(0));"
        f"const found = await (async () => {{ {script} }})();"
        "console.log(JSON.stringify(found, (_, v) => ArrayBuffer.isView(v) ? Array.from(v) : v));"
    )
    command = ["node", "--input-type=module", "--eval", start]
    done = subprocess.run(
        command, cwd=modules, input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def failure(modules: Path, call: str, **given: Any) -> str:
    """Message of the error that a call ends with."""
    script = f"try {{ {call}; }} catch (error) {{ return error.message; }} return null;"
    message: str = node(modules, script, **given)
    assert message is not None
    return message


def float32(values: Any) -> NDArray[np.float32]:
    found = np.array(values, np.float64)
    assert np.array_equal(found, found.astype(np.float32))
    return found.astype(np.float32)


def test_every_file_of_the_page_is_emitted() -> None:
    folder = files("edgeqdm.backends.onnxruntime") / "templates/web"
    assert sorted(file.name for file in folder.iterdir()) == sorted(WEB_FILES)


def test_words_equal_the_known_answers_of_random123(modules: Path) -> None:
    script = """
    const words = Uint32Array.of(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344);
    philox.philox4x32(words, 0xa4093822, 0x299f31d0);
    return words;"""
    assert node(modules, script) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("seed", [0, 7, 2**32, 0x0123456789ABCDEF, 2**64 - 1])
def test_noise_has_the_same_bits(modules: Path, seed: int) -> None:
    script = "return philox.batchNormal(given.seed, given.stream, 3, 1001);"
    found = float32(node(modules, script, seed=str(seed), stream=4))
    expected = philox.batch_normal(seed, 4, range(3), (1001,))
    # Both round float64 results that differ by a unit or two in the last place of 53 bits.
    np.testing.assert_array_equal(found.reshape(3, 1001), expected)


@pytest.mark.parametrize("seed", ["-1", "1.5", "x", "", str(2**64)])
def test_seed_that_is_none_is_refused(modules: Path, seed: str) -> None:
    assert "2**64" in failure(modules, "philox.parseSeed(given.seed)", seed=seed)


def random_program(seed: int, **changes: Any) -> Program:
    """A sampler with random weights and two samples and three outputs of history."""
    rng = np.random.default_rng(seed)
    age, step = np.arange(3), np.arange(STEPS)[:, None]
    history = np.where(age <= step, rng.uniform(-1, 1, (STEPS, 3)), 0)
    return {
        "timesteps": list(range(STEPS, 0, -1)),
        "integer_timesteps": True,
        "initial_sigma": 1.7,
        "input_scale": rng.uniform(0.1, 1, STEPS).tolist(),
        "sample_weights": history[:, :2].tolist(),
        "output_weights": history[:, ::-1][:, :1].tolist() if seed % 2 else history.tolist(),
        "noise_std": [*rng.uniform(0.1, 1, STEPS - 1).tolist(), 0.0],
    } | changes


def random_clip(seed: int) -> Program:
    p, q, d = np.random.default_rng(seed).uniform(0.1, 1, (3, STEPS)).tolist()
    return {"limit": 0.3, "sample_weight": p, "output_weight": q, "weight": [*d[1:], 0.0]}


def random_correction(seed: int, **changes: Any) -> Program:
    rng = np.random.default_rng(seed)
    return {
        "gain": rng.uniform(0.9, 1.1, STEPS).tolist(),
        "bias": rng.uniform(-0.1, 0.1, (STEPS, SHAPE[1])).tolist(),
        "noise_std": np.vstack([rng.uniform(0, 1, (STEPS - 1, SHAPE[1])), np.zeros(3)]).tolist(),
    } | changes


ABSORBED = {
    "variance": np.random.default_rng(3).uniform(0, 0.5, (STEPS, SHAPE[1])).tolist(),
    "largest_share": 0.9,
}
INPUT_WEIGHT = [0.0, 0.1, -0.2, 0.3, 0.05]
BOUNDS = {"log_min": [-3.0, -2.5, -2.0, -1.5, 0.0], "log_max": [-1.0, -0.7, -0.5, -0.2, 0.0]}


def both_runs(
    modules: Path, program: Program, correction: Program | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Every sample of a run in Node and in Python, [S, B, C, H, W], of the same outputs."""
    rng = np.random.default_rng(9)
    size = SHAPE[1] * (2 if "learned_variance" in program else 1)
    shape = (STEPS, SHAPE[0], size, *SHAPE[2:])
    outputs = rng.standard_normal(shape).astype(np.float32)
    initial, noise = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    script = """
    const table = solver.readTable(given.program, given.correction), seen = [];
    const outputs = given.outputs.map((each) => Float32Array.from(each.flat(4)));
    const [initial, noise] = [given.initial, given.noise].map((x) => Float32Array.from(x.flat(4)));
    const predict = async (fed, step) => outputs[step].map((f, k) => f + fed[k % fed.length]);
    const keep = (step, x) => { seen.push(x); };
    await solver.run(table, predict, initial, () => noise, given.shape, keep);
    return seen;"""
    found = node(
        modules,
        script,
        program=program,
        correction=correction,
        outputs=outputs.tolist(),
        initial=initial.tolist(),
        noise=noise.tolist(),
        shape=SHAPE,
    )
    seen: list[NDArray[np.float32]] = []

    def predict(fed: NDArray[np.float32], step: int) -> NDArray[np.float32]:
        return outputs[step] + np.resize(fed, outputs[step].shape)

    solver.run(
        solver.Table.from_json(program, correction),
        predict,
        initial,
        lambda step: noise,
        lambda step, x: seen.append(x),
    )
    return float32(found).reshape(STEPS, *SHAPE), np.stack(seen)


@pytest.mark.parametrize(
    ("program", "correction"),
    [
        (random_program(0), None),
        (random_program(1), None),
        (random_program(2, clip=random_clip(2)), None),
        (random_program(4), random_correction(4)),
        (random_program(6, clip=random_clip(6)), random_correction(6, input_weight=INPUT_WEIGHT)),
        (random_program(8, learned_variance={}), None),
        (random_program(8, learned_variance={}), random_correction(8, absorbed=ABSORBED)),
    ],
    ids=["plain", "one-output", "clip", "corrected", "input", "variance", "absorbed"],
)
def test_sampler_has_the_same_bits(
    modules: Path, program: Program, correction: Program | None
) -> None:
    np.testing.assert_array_equal(*both_runs(modules, program, correction))


@pytest.mark.parametrize("absorbed", [None, ABSORBED], ids=["plain", "absorbed"])
def test_learned_log_variance_differs_by_the_exp_alone(
    modules: Path, absorbed: Program | None
) -> None:
    program = random_program(8, learned_variance=BOUNDS)
    correction = random_correction(8, absorbed=absorbed) if absorbed else None
    found, expected = both_runs(modules, program, correction)
    assert np.max(np.abs(found - expected)) <= EXP * STEPS * np.max(np.abs(expected))


@pytest.mark.parametrize(
    "change", [{"noise_std": [1.0]}, {"input_scale": [1e39] * STEPS}, {"sample_weights": [[1.0]]}]
)
def test_table_that_does_not_fit_is_refused(modules: Path, change: Program) -> None:
    program = random_program(0, **change)
    message = failure(modules, "solver.readTable(given.program, null)", program=program)
    assert next(iter(change)) in message


def schedule(**changes: Any) -> Program:
    return {
        "program": random_program(0),
        "correction": None,
        "guidance": 2.5,
        "conditioning": {"kind": "label", "shape": [], "n_labels": 3, "null_label": 3},
        "decoder": {"kind": "identity", "factor": 1},
        "sample_shape": list(SHAPE[1:]),
        "label_names": ["bag", "boot", "coat"],
        "golden_noise_rms": [1.0] * STEPS,
    } | changes


def write_player(folder: Path, changes: Mapping[str, Any]) -> tuple[Program, playback.Player]:
    found = schedule(**changes)
    (folder / "schedule.json").write_text(json.dumps(found))
    return found, playback.open_player(folder)


@pytest.mark.parametrize("learned", [False, True], ids=["plain", "learned"])
def test_guided_samples_have_the_same_bits(modules: Path, tmp_path: Path, learned: bool) -> None:
    program = random_program(0, learned_variance={}) if learned else random_program(0)
    stored, player = write_player(tmp_path, {"program": program})
    script = """
    const player = playback.openPlayer(given.schedule, null);
    const half = given.learned ? 2 : 1, size = 72;
    const evaluate = async (x, count, step, { data }) => Float32Array.from(
      { length: half * x.length },
      (_, k) => {
        const b = Math.floor(k / (half * size));
        return Math.fround(x[b * size + (k % size)] * 0.5) + Number(data[b]);
      },
    );
    const wanted = playback.choose(player, { label: "2,Bag" });
    return playback.sample(player, evaluate, wanted, 5);"""

    def evaluate(x: Any, step: int, labels: Any) -> Any:
        f = x * np.float32(0.5) + labels.astype(np.float32)[:, None, None, None]
        return np.concatenate([f, f], 1) if learned else f

    found = node(modules, script, schedule=stored, learned=learned)
    expected = playback.sample(player, evaluate, np.array([2, 0]), seed=5, images=range(2))
    np.testing.assert_array_equal(float32(found).reshape(expected.shape), expected)


def test_output_that_is_not_finite_is_refused_with_its_step(modules: Path) -> None:
    call = """
    const player = playback.openPlayer(given.schedule, null);
    const evaluate = async (x, _, step) => x.map(() => (step === 3 ? NaN : 0));
    await playback.sample(player, evaluate, playback.choose(player, {}), 0)"""
    assert "step 3: the network's output holds NaN" in failure(modules, call, schedule=schedule())


@pytest.mark.parametrize(
    ("decoder", "shape"),
    [
        ({"kind": "identity", "factor": 1}, (1, 5, 3)),
        ({"kind": "identity", "factor": 1}, (3, 5, 4)),
        ({"kind": "identity", "factor": 1}, (4, 2, 2)),
        ({"kind": "pixel_shuffle", "factor": 2}, (4, 3, 5)),
        ({"kind": "pixel_shuffle", "factor": 2}, (12, 3, 2)),
    ],
)
def test_pixels_and_sheet_are_equal(
    modules: Path, tmp_path: Path, decoder: Program, shape: tuple[int, int, int]
) -> None:
    stored, player = write_player(tmp_path, {"decoder": decoder, "sample_shape": list(shape)})
    samples = np.random.default_rng(1).uniform(-1.2, 1.2, (5, *shape)).astype(np.float32)
    # Levels that lie halfway: rounded to the even one.
    samples.reshape(-1)[:8] = [-1, 1, 0, 0.5 / 127.5 - 1, 1.5 / 127.5 - 1, -3, 3, 2.5 / 127.5 - 1]
    script = """
    const player = playback.openPlayer(given.schedule, null);
    const { data, shape } = playback.decode(player, Float32Array.from(given.samples));
    return { data, shape, sheet: playback.sheet({ data, shape }, 3) };"""
    found = node(modules, script, schedule=stored, samples=samples.reshape(-1).tolist())
    pixels = playback.decode(player, samples)
    assert found["shape"] == list(pixels.shape)
    np.testing.assert_array_equal(np.array(found["data"]).reshape(pixels.shape), pixels)
    expected = playback.sheet(pixels, 3)
    expected = expected if expected.shape[2] == 3 else expected[:, :, [0, 0, 0]]
    rgba = np.array(found["sheet"]["data"]).reshape(*expected.shape[:2], 4)
    np.testing.assert_array_equal(rgba[:, :, :3], expected)
    assert np.all(rgba[:, :, 3] == 255)


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, [0, 1, 2, 3]),
        ({"count": "6"}, [0, 1, 2, 3, 0, 1]),
        ({"label": "Boot"}, [1]),
        ({"label": "1", "count": "2"}, [1, 1]),
        ({"label": "coat, 0"}, [2, 0]),
        ({"label": " Coat ,boot, +1"}, [2, 1, 1]),
        # Of equal names the last.
        ({"label": "bag, boot"}, [3, 1]),
        ({"label": "0"}, [0]),
    ],
)
def test_labels_are_chosen_as_run_py_does(
    modules: Path, runtime: ModuleType, tmp_path: Path, options: Program, labels: list[int]
) -> None:
    stored, player = write_player(
        tmp_path,
        {
            "conditioning": {"kind": "label", "shape": [], "n_labels": 4, "null_label": 4},
            "label_names": ["bag", "boot", "coat", "Bag"],
        },
    )
    script = """
    const player = playback.openPlayer(given.schedule, null);
    return Array.from(playback.choose(player, given.options).conditioning.data, Number);"""
    assert node(modules, script, schedule=stored, options=options) == labels
    count = int(options["count"]) if "count" in options else None
    assert runtime.parse_labels(player, options.get("label"), count).tolist() == labels


@pytest.mark.parametrize("label", ["hat", "1,,2", "bag boot", "1.0", ","])
def test_unknown_label_is_refused_by_both(
    modules: Path, runtime: ModuleType, tmp_path: Path, label: str
) -> None:
    stored, player = write_player(tmp_path, {})
    call = "playback.choose(playback.openPlayer(given.schedule, null), { label: given.label })"
    assert "unknown label" in failure(modules, call, schedule=stored, label=label)
    with pytest.raises(playback.PlaybackError, match="unknown label"):
        runtime.parse_labels(player, label, None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"label": "3"}, "label 3 is out of range 0..2"),
        ({"label": "-1"}, "label -1 is out of range 0..2"),
        ({"label": "hat"}, 'unknown label in "hat"; known: bag, boot, coat'),
        ({"label": "1,,2"}, "unknown label"),
        ({"label": "0,1", "count": "3"}, "3 images contradict 2 labels"),
        *(
            ({"count": count}, f"must be a whole number in 1..1000, got {count}")
            for count in ("0", "-1", "1.5", "1e3", "0x10", "1001", "1000000000", "many")
        ),
        ({"embedding": {"data": [1.0], "shape": [1]}}, "takes no embedding"),
    ],
)
def test_choice_that_does_not_fit_is_refused(modules: Path, options: Program, reason: str) -> None:
    call = "playback.choose(playback.openPlayer(given.schedule, null), given.options)"
    assert reason in failure(modules, call, schedule=schedule(), options=options)


EMBEDDING = {"kind": "embedding", "shape": [2, 3], "n_labels": 0, "null_label": None}
NONE = {"kind": "none", "shape": [], "n_labels": 0, "null_label": None}


@pytest.mark.parametrize(
    ("conditioning", "options", "reason"),
    [
        (EMBEDDING, {}, "choose a .npy file"),
        (EMBEDDING, {"label": "1"}, "takes no label"),
        (EMBEDDING, {"embedding": {"data": [], "shape": [4, 6]}}, "(images, 2, 3), got (4, 6)"),
        (EMBEDDING, {"embedding": {"data": [], "shape": [0, 2, 3]}}, "got (0, 2, 3)"),
        (NONE, {"label": "1"}, "takes no label"),
        (NONE, {"embedding": {"data": [1.0], "shape": [1]}}, "takes no embedding"),
    ],
)
def test_conditioning_of_another_kind_is_refused(
    modules: Path, conditioning: Program, options: Program, reason: str
) -> None:
    call = "playback.choose(playback.openPlayer(given.schedule, null), given.options)"
    stored = schedule(conditioning=conditioning)
    assert reason in failure(modules, call, schedule=stored, options=options)


def test_model_without_conditioning_takes_a_number_of_images(modules: Path) -> None:
    script = """
    const player = playback.openPlayer(given.schedule, null);
    return [playback.choose(player, {}), playback.choose(player, { count: "3" })];"""
    found = node(modules, script, schedule=schedule(conditioning=NONE))
    assert found == [{"count": n, "conditioning": None} for n in (1, 3)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ([], None),
        (["outputs"], "the network's outputs and the sampler's steps differ from the golden run"),
        (["network"], "the network's outputs differ from the golden run"),
        (["samples"], "the sampler's steps differ from the golden run"),
    ],
)
def test_self_test_names_what_differs(
    modules: Path, changed: list[str], reason: str | None
) -> None:
    script = """
    const player = playback.openPlayer(given.schedule, null), [count, size] = [2, 72];
    const normal = (stream) => philox.batchNormal(0x5eed, stream, count, size);
    const evaluate = async (x) => x.map((value) => Math.fround(value * 0.5));
    const inputs = [], outputs = [], samples = [], initial = normal(philox.INITIAL_STREAM);
    const predict = async (x, step) => {
      inputs.push(...x);
      const f = await evaluate(x);
      outputs.push(...f);
      return f;
    };
    const noise = (step) => normal(philox.stepStream(step));
    const shape = [count, ...player.sampleShape];
    await solver.run(player.table, predict, initial, noise, shape, (_, x) => samples.push(...x));
    const golden = Object.fromEntries(
      Object.entries({ inputs, outputs, samples }).map(([name, values]) => [
        name,
        { data: Float32Array.from(values, (x) => x + 9 * given.changed.includes(name)) },
      ]),
    );
    golden.initial = { data: initial, shape };
    const wrong = 9 * given.changed.includes("network");
    const network = async (x) => (await evaluate(x)).map((value) => value + wrong);
    return playback.selfTest(player, network, golden);"""
    stored = schedule(conditioning=NONE, guidance=1.0)
    found = node(modules, script, schedule=stored, changed=changed)
    assert (found["passed"], found["reason"]) == (reason is None, reason)


def npy(array: NDArray[Any]) -> list[int]:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return list(buffer.getvalue())


READ_NPY = 'return playback.readNpy(Uint8Array.from(given.data), "x.npy");'


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3,), ()])
def test_npy_is_read(modules: Path, dtype: type, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    found = node(modules, READ_NPY, data=npy(np.asarray(array)))
    assert found["shape"] == list(shape)
    np.testing.assert_array_equal(
        float32(found["data"]).reshape(shape), np.asarray(array, np.float32)
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (list(b"PK\x03\x04 an archive"), "not a .npy file"),
        ([], "not a .npy file"),
        (npy(np.zeros((2, 2), np.int64)), "holds <i8"),
        (npy(np.zeros((2, 2), np.float32, order="F")), "in C order"),
        (npy(np.zeros((2, 2), np.float32))[:-1], "is damaged"),
        (npy(np.array([np.nan])), "holds NaN"),
        (npy(np.array([1e300])), "beyond float32"),
    ],
)
def test_npy_that_cannot_be_used_is_refused(modules: Path, data: list[int], reason: str) -> None:
    assert reason in failure(modules, READ_NPY.removeprefix("return "), data=data)
