"""The numpy-only runtime computes what torch, Pillow and safetensors compute."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from edgeqdm.emit import playback
from edgeqdm.emit.playback import PlaybackError, Player
from edgeqdm.emit.render import RUNTIME_FOLDER, python_runtime
from edgeqdm.ir.model import Guidance
from edgeqdm.models import denoiser
from edgeqdm.numerics import philox
from edgeqdm.numerics.solver import Table

STEPS = 3
SHAPE = (4, 2, 3)


def program(noise: float = 0.1) -> dict[str, Any]:
    return {
        "timesteps": [900.0, 500.0, 100.0],
        "integer_timesteps": True,
        "initial_sigma": 1.0,
        "input_scale": [1.0, 0.9, 0.8],
        "sample_weights": [[0.9], [0.8], [0.7]],
        "output_weights": [[0.1], [0.2], [0.3]],
        "noise_std": [noise, noise, 0.0],
        "clip": None,
    }


LABELS = {"kind": "label", "shape": [], "n_labels": 3, "null_label": 3}


def player(**changes: Any) -> Player:
    made = Player(
        table=Table.from_json(program()),
        guidance=1.0,
        conditioning=LABELS,
        decoder={"kind": "identity", "factor": 1},
        sample_shape=SHAPE,
        label_names=("bag", "boot", "coat"),
        null_embedding=None,
        golden_noise_rms=(0.1,) * STEPS,
    )
    return replace(made, **changes)


def network(x: Any, step: int, conditioning: Any) -> Any:
    fed = 0 if conditioning is None else conditioning.reshape(len(x), -1).sum(1)
    return (np.sin(x) + 0.1 * step + np.reshape(fed, (-1, 1, 1, 1))).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
@given(data=st.data())
def test_png_decodes_to_the_same_pixels(channels: int, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), channels)
    image = data.draw(hnp.arrays(np.uint8, shape))
    decoded = np.asarray(Image.open(io.BytesIO(playback.png(image))))
    np.testing.assert_array_equal(decoded.reshape(shape), image)


@pytest.mark.parametrize("channels", [2, 4])
def test_png_of_other_channels_shows_the_first(channels: int) -> None:
    image = np.arange(6 * channels, dtype=np.uint8).reshape(2, 3, channels)
    decoded = np.asarray(Image.open(io.BytesIO(playback.png(image))))
    np.testing.assert_array_equal(decoded, image[:, :, 0])


def test_png_of_a_strided_view_is_right() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)[:, ::2].transpose(1, 0, 2)
    decoded = np.asarray(Image.open(io.BytesIO(playback.png(image))))
    np.testing.assert_array_equal(decoded, image)


@pytest.mark.parametrize("factor", [1, 2])
def test_pixel_shuffle_equals_torch(factor: int) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (2, 4, 3, 5)).astype(np.float32)
    shown = playback.decode(player(decoder={"kind": "pixel_shuffle", "factor": factor}), x)
    expected = torch.nn.functional.pixel_shuffle(torch.from_numpy(x), factor)
    levels = ((expected + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(shown, levels.numpy())


def test_pixels_clip_to_0_and_255() -> None:
    x = np.array([-5.0, -1.0, 0.0, 1.0, 5.0], np.float32).reshape(1, 1, 1, 5)
    assert playback.decode(player(), x).ravel().tolist() == [0, 0, 128, 255, 255]


def test_sheet_places_every_image_with_a_line_between() -> None:
    pixels = np.arange(1, 4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    sheet = playback.sheet(pixels, columns=2)[:, :, 0]
    expected = [
        [1, 1, 128, 2, 2],
        [1, 1, 128, 2, 2],
        [128] * 5,
        [3, 3, 128, 128, 128],
        [3, 3, 128, 128, 128],
    ]
    assert sheet.tolist() == expected
    assert playback.sheet(pixels, columns=0).shape == (8, 2, 1)


def test_read_safetensors_equals_safetensors(tmp_path: Path) -> None:
    tensors: dict[str, NDArray[Any]] = {
        "floats": np.random.default_rng(0).standard_normal((2, 3, 1)).astype(np.float32),
        "labels": np.array([3, -1, 2**40], np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(1.5, np.float32),
    }
    save_file(tensors, tmp_path / "t.safetensors", {"note": "metadata is skipped"})
    found = playback.read_safetensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


def _framed(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + b"\0" * 8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 40,
        _framed("[]"),
        _framed("7"),
        _framed('"text"'),
        _framed('{"x": 1}'),
        _framed('{"x": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}'),
        _framed('{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'),
        _framed("[" * 100_000),
    ],
)
def test_damaged_safetensors_file_is_one_clear_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with pytest.raises(PlaybackError, match=r"t\.safetensors"):
        playback.read_safetensors(path)


def test_missing_safetensors_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PlaybackError, match=r"none\.safetensors"):
        playback.read_safetensors(tmp_path / "none.safetensors")


EMBEDDING = {"kind": "embedding", "shape": [2], "n_labels": 0, "null_label": None}
NO_CONDITIONING = {"kind": "none", "shape": [], "n_labels": 0, "null_label": None}


@pytest.mark.parametrize(
    ("known", "conditioning", "message"),
    [
        (LABELS, None, "needs a label"),
        (LABELS, np.array([0]), r"must be \(2,\), got \(1,\)"),
        (LABELS, np.array([0, 3]), r"label 3 is out of range 0\.\.2"),
        (LABELS, np.array([-1, 0]), "label -1 is out of range"),
        (EMBEDDING, None, "needs an embedding"),
        (EMBEDDING, np.zeros((2, 3), np.float32), r"must be \(2, 2\)"),
        (NO_CONDITIONING, np.array([0, 1]), "takes no label"),
    ],
)
def test_wrong_conditioning_is_refused(
    known: dict[str, Any], conditioning: NDArray[Any] | None, message: str
) -> None:
    with pytest.raises(PlaybackError, match=message):
        playback.check_conditioning(player(conditioning=known), conditioning, 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "the network gave NaN or infinity at step 1"),
        (-np.inf, "the network gave NaN or infinity at step 1"),
        (3e38, "the samples are NaN or infinite after step 1"),
    ],
)
def test_what_is_not_finite_names_its_step(value: float, message: str) -> None:
    def broken(x: Any, step: int, conditioning: Any) -> Any:
        return np.full_like(x, value if step == 1 else 0.0)

    table = Table.from_json(program())
    loud = replace(table, output_weights=100 * table.output_weights)
    unconditional = player(conditioning=NO_CONDITIONING, table=loud)
    told: list[int] = []
    with pytest.raises(playback.NotFiniteError, match=message):
        playback.sample(
            unconditional,
            broken,
            None,
            seed=0,
            images=[0, 1],
            on_step=lambda step, _: told.append(step),
        )
    assert told == [0]


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("kind", ["label", "embedding"])
def test_guidance_equals_that_of_the_float_model(guidance: float, kind: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    if kind == "label":
        mine = player(guidance=guidance)
        conditioning: NDArray[Any] = np.array([0, 2])
        null = torch.tensor(3)
    else:
        null_embedding = rng.standard_normal(2).astype(np.float32)
        mine = player(guidance=guidance, conditioning=EMBEDDING, null_embedding=null_embedding)
        conditioning = rng.standard_normal((2, 2)).astype(np.float32)
        null = torch.from_numpy(null_embedding)

    def evaluate(x: torch.Tensor, fed: torch.Tensor | None) -> torch.Tensor:
        assert fed is not None
        return torch.from_numpy(network(x.numpy(), 1, fed.numpy()))

    expected = denoiser.guided(
        evaluate,
        torch.from_numpy(x),
        torch.from_numpy(conditioning),
        null=null,
        guidance=Guidance(scale=guidance),
    )
    found = playback.guided(mine, network, x, 1, conditioning)
    np.testing.assert_array_equal(found, expected.numpy())


def test_guidance_of_a_learned_variance_equals_that_of_the_float_model() -> None:
    x = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    labels = np.array([0, 2])

    def both(x: Any, step: int, conditioning: Any) -> Any:
        f = network(x, step, conditioning)
        return np.concatenate([f, np.cos(f)], 1)

    expected = denoiser.guided(
        lambda x, fed: torch.from_numpy(both(x.numpy(), 1, None if fed is None else fed.numpy())),
        torch.from_numpy(x),
        torch.from_numpy(labels),
        null=torch.tensor(3),
        guidance=Guidance(scale=2.5),
    )
    found = playback.guided(player(guidance=2.5), both, x, 1, labels)
    np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_array_equal(found[:, SHAPE[0] :], both(x, 1, labels)[:, SHAPE[0] :])


def test_a_learned_variance_is_replayed_exactly() -> None:
    learned = {
        **program(1.0),
        "learned_variance": {"log_min": [-9.0] * STEPS, "log_max": [-2.0] * STEPS},
    }
    mine = player(table=Table.from_json(learned))
    recorded: list[Any] = []
    samples: list[Any] = []

    def both(x: Any, step: int, conditioning: Any) -> Any:
        f = network(x, step, conditioning)
        recorded.append(np.concatenate([f, np.sin(f)], 1))
        return recorded[-1]

    images = range(2)
    seed = playback.GOLDEN_SEED
    playback.sample(
        mine,
        both,
        np.array([0, 2]),
        seed=seed,
        images=images,
        on_step=lambda step, x: samples.append(x),
    )
    golden = {
        "initial": philox.batch_normal(seed, philox.INITIAL_STREAM, images, SHAPE),
        "outputs": np.stack(recorded),
        "samples": np.stack(samples),
    }
    assert playback.replay_sampler(mine, golden) == 0.0
    changed = {**golden, "outputs": golden["outputs"] + np.float32(0.1)}
    assert playback.replay_sampler(mine, changed) > playback.SAMPLER_TOLERANCE


def test_image_depends_on_seed_and_number_only_never_on_its_batch() -> None:
    together = playback.sample(player(), network, np.array([0, 1, 2]), seed=5, images=range(3))
    alone = playback.sample(player(), network, np.array([2]), seed=5, images=[2])
    np.testing.assert_array_equal(together[2:], alone)
    other = playback.sample(player(), network, np.array([2]), seed=6, images=[2])
    assert not np.array_equal(alone, other)


def test_sampling_reports_every_step() -> None:
    seen: list[int] = []
    playback.sample(
        player(),
        network,
        np.array([0]),
        seed=0,
        images=[0],
        on_step=lambda step, _: seen.append(step),
    )
    assert seen == list(range(STEPS))


def golden() -> dict[str, NDArray[Any]]:
    inputs = np.random.default_rng(0).standard_normal((STEPS, 2, *SHAPE)).astype(np.float32)
    labels = np.array([0, 2])
    outputs = np.stack([network(x, step, labels) for step, x in enumerate(inputs)])
    return {"inputs": inputs, "outputs": outputs, "conditioning": labels}


def test_self_test_passes_on_the_network_it_was_made_with() -> None:
    result = playback.self_test(player(), network, golden())
    assert result.passed
    assert result.deviation == (0.0,) * STEPS


def test_self_test_measures_in_units_of_the_quantization_noise() -> None:
    def off(x: Any, step: int, conditioning: Any) -> Any:
        return network(x, step, conditioning) + np.float32(0.2 if step == 1 else 0.0)

    result = playback.self_test(player(), off, golden())
    # float32 rounding of values of size 3 against an offset of 0.2.
    assert result.deviation == pytest.approx((0.0, 2.0, 0.0), abs=1e-5)
    assert not result.passed


@pytest.mark.parametrize("bad_step", range(STEPS))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_self_test_fails_on_nan_and_inf_at_any_step(bad_step: int, value: float) -> None:
    def broken(x: Any, step: int, conditioning: Any) -> Any:
        f = network(x, step, conditioning)
        return np.full_like(f, value) if step == bad_step else f

    assert not playback.self_test(player(), broken, golden()).passed


def test_runtime_files_import_nothing_of_this_library() -> None:
    sources = python_runtime()
    assert set(sources) == {f"{RUNTIME_FOLDER}/{n}.py" for n in ("philox", "solver", "playback")}
    assert not any("edgeqdm" in source for source in sources.values())


def test_copied_runtime_samples_without_this_library(tmp_path: Path) -> None:
    for path, source in python_runtime().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source, "utf-8")
    script = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "edgeqdm", "safetensors", "onnx", "PIL"]))
sys.path.insert(0, {str(tmp_path / RUNTIME_FOLDER)!r})
import numpy as np, playback, solver
from numpy import sin
table = solver.Table.from_json({program()!r})
player = playback.Player(table, 1.0, {LABELS!r}, {{"kind": "identity", "factor": 1}}, {SHAPE!r},
                         (), None, (0.1,) * {STEPS})
def network(x, step, labels):
    return (sin(x) + 0.1 * step + labels.reshape(-1, 1, 1, 1)).astype(np.float32)
found = playback.sample(player, network, np.array([0, 2]), seed=3, images=range(2))
sys.stdout.buffer.write(found.tobytes())
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, check=True)
    expected = playback.sample(player(), network, np.array([0, 2]), seed=3, images=range(2))
    found = np.frombuffer(done.stdout, np.float32).reshape(expected.shape)
    np.testing.assert_array_equal(found, expected)


def test_png_holds_no_more_than_its_three_chunks() -> None:
    data = playback.png(np.zeros((2, 2, 1), np.uint8))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND" + zlib.crc32(b"IEND").to_bytes(4, "big"))
