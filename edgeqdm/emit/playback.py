"""Samples from a package: schedule, noise, guidance and pixels, with numpy alone.

The network itself is a callable, so one copy of this file serves every runtime with a Python
interface. It is copied into packages beside `solver.py` and `philox.py`; the two imports below are
the only lines that change on the way.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeqdm.numerics import philox, solver

Array = NDArray[np.float32]
Evaluate = Callable[[Array, int, NDArray[Any] | None], Array]
"""(scaled sample [B, C, H, W], step, conditioning [B, ...]) -> network output [B, C, H, W], or
[B, 2C, H, W] with a learned variance."""
GOLDEN_SHARE = 1.5
"""Largest RMS deviation of the self-test, as a share of the quantization noise itself. Two runtimes
whose every layer agrees bit for bit still differ where float arithmetic between the layers puts an
activation on the other side of a rounding half-tie; each further rounding amplifies that, up to
sqrt(2) of the noise, when the two roundings share nothing but their size."""
FLOAT_NOISE = 1e-5
"""Least noise the self-test assumes, relative to the output: float32 sums in another order differ
by about 1e-6, and a plan may leave every layer in float."""
GOLDEN_SEED = 0x5EED
SAMPLER_TOLERANCE = 1e-4
"""Largest deviation of the replayed sampler: room for float32 rounding, not for a wrong number."""
SAFETENSORS_DTYPES = {"F32": "<f4", "I64": "<i8"}


class PlaybackError(Exception):
    """A package or an argument cannot be used; the message says which and why."""


class NotFiniteError(PlaybackError):
    """The network or the sampler gave NaN or infinity."""


@dataclass(frozen=True)
class Player:
    """A package's schedule, ready to run."""

    table: solver.Table
    guidance: float
    conditioning: Mapping[str, Any]
    decoder: Mapping[str, Any]
    sample_shape: tuple[int, int, int]
    label_names: tuple[str, ...]
    null_embedding: Array | None
    golden_noise_rms: tuple[float, ...]

    def null(self) -> NDArray[Any] | None:
        """Conditioning of one sample that stands for "none"."""
        if self.conditioning["kind"] == "label":
            label = self.conditioning["null_label"]
            return None if label is None else np.array(label, np.int64)
        return self.null_embedding


@dataclass(frozen=True)
class SelfTest:
    """Result of replaying the golden run step by step.

    Attributes:
        deviation: RMS of (output - golden output) over the quantization noise, per step, [S].
        passed: whether every step stays within `GOLDEN_SHARE`.
    """

    deviation: tuple[float, ...]
    passed: bool


def open_player(folder: Path) -> Player:
    """Read `schedule.json` and, where there is one, `conditioning.safetensors`."""
    schedule = json.loads((folder / "schedule.json").read_text("utf-8"))
    extra = folder / "conditioning.safetensors"
    return Player(
        table=solver.Table.from_json(schedule["program"], schedule["correction"]),
        guidance=float(schedule["guidance"]),
        conditioning=schedule["conditioning"],
        decoder=schedule["decoder"],
        sample_shape=tuple(schedule["sample_shape"]),
        label_names=tuple(schedule["label_names"]),
        null_embedding=read_safetensors(extra)["null"] if extra.exists() else None,
        golden_noise_rms=tuple(schedule["golden_noise_rms"]),
    )


def check_conditioning(player: Player, conditioning: NDArray[Any] | None, n_images: int) -> None:
    """Raise PlaybackError unless the conditioning has the kind, shape and range of the model."""
    wanted = player.conditioning
    if wanted["kind"] == "none":
        if conditioning is not None:
            raise PlaybackError("this model takes no label and no embedding")
        return
    named = "a label" if wanted["kind"] == "label" else "an embedding"
    if conditioning is None:
        raise PlaybackError(f"this model needs {named} for every image")
    shape = (n_images, *wanted["shape"])
    if conditioning.shape != shape:
        raise PlaybackError(f"conditioning must be {shape}, got {conditioning.shape}")
    if (conditioning.dtype.kind in "iu") != (wanted["kind"] == "label"):
        raise PlaybackError(f"this model needs {named}, not {conditioning.dtype}")
    if wanted["kind"] == "label":
        outside = conditioning[(conditioning < 0) | (conditioning >= wanted["n_labels"])]
        if outside.size:
            raise PlaybackError(
                f"label {int(outside[0])} is out of range 0..{wanted['n_labels'] - 1}"
            )


def guided(
    player: Player, evaluate: Evaluate, x: Array, step: int, conditioning: NDArray[Any] | None
) -> Array:
    """Network output after classifier-free guidance, in one evaluation of twice the batch.

    A learned variance is no score to be extrapolated: it is that of the conditional half.

    Source: Ho & Salimans 2022, equation 6 with s = 1 + w, https://arxiv.org/abs/2207.12598.
    """
    null = player.null()
    if player.guidance == 1.0 or conditioning is None or null is None:
        return evaluate(x, step, conditioning)
    both = np.concatenate([np.broadcast_to(null, conditioning.shape), conditioning])
    f = evaluate(np.concatenate([x, x]), step, both.astype(conditioning.dtype))
    f_null, f_cond = f[: len(x)], f[len(x) :]
    channels = x.shape[1]
    mean = f_null[:, :channels] + np.float32(player.guidance) * (f_cond - f_null)[:, :channels]
    return mean if f.shape[1] == channels else np.concatenate([mean, f_cond[:, channels:]], 1)


def sample(
    player: Player,
    evaluate: Evaluate,
    conditioning: NDArray[Any] | None,
    *,
    seed: int,
    images: Sequence[int],
    on_step: Callable[[int, Array], None] | None = None,
) -> Array:
    """Draw samples, float32 [B, C, H, W]; image k depends on (seed, k) only, not on the batch.

    Raises:
        PlaybackError: where the conditioning does not fit.
        NotFiniteError: naming the step whose output or samples are NaN or infinite.
    """
    check_conditioning(player, conditioning, len(images))
    shape = player.sample_shape

    def predict(x: Array, step: int) -> Array:
        output = guided(player, evaluate, x, step, conditioning)
        if not np.isfinite(output).all():
            raise NotFiniteError(f"the network gave NaN or infinity at step {step}")
        return output

    def stepped(step: int, x: Array) -> None:
        if not np.isfinite(x).all():
            raise NotFiniteError(f"the samples are NaN or infinite after step {step}")
        if on_step is not None:
            on_step(step, x)

    def noise(step: int) -> Array:
        return philox.batch_normal(seed, philox.step_stream(step), images, shape)

    initial = philox.batch_normal(seed, philox.INITIAL_STREAM, images, shape)
    # Of what overflows the step is named, which a warning does not.
    with np.errstate(over="ignore", invalid="ignore"):
        return solver.run(player.table, predict, initial, noise, stepped)


def decode(player: Player, samples: Array) -> NDArray[np.uint8]:
    """Pixels uint8 [B, H, W, channels] of final samples [B, C, H, W] in [-1, 1]."""
    pixels = samples
    if player.decoder["kind"] == "pixel_shuffle":
        factor = int(player.decoder["factor"])
        batch, channels, height, width = samples.shape
        pixels = samples.reshape(batch, channels // factor**2, factor, factor, height, width)
        pixels = pixels.transpose(0, 1, 4, 2, 5, 3)
        pixels = pixels.reshape(batch, -1, height * factor, width * factor)
    levels: NDArray[np.uint8] = np.rint((np.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1)


def sheet(pixels: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Images [B, H, W, channels] side by side, `columns` to a row, 1 pixel apart."""
    batch, height, width, channels = pixels.shape
    columns = max(1, min(columns, batch))
    rows = -(-batch // columns)
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 128, np.uint8)
    for k, image in enumerate(pixels):
        top, left = (k // columns) * (height + 1), (k % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = image
    return canvas


def png(image: NDArray[np.uint8]) -> bytes:
    """An image [H, W, 1 or 3] as a PNG file; more channels show the first as grey."""
    height, width, channels = image.shape
    if channels not in (1, 3):
        image, channels = image[:, :, :1], 1
    rows = np.ascontiguousarray(image).reshape(height, width * channels)
    raw = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """Tensors of a small safetensors file; raises PlaybackError where it is not one."""
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            values = np.frombuffer(
                data[8 + size + start : 8 + size + stop], SAFETENSORS_DTYPES[entry["dtype"]]
            )
            found[name] = values.reshape(entry["shape"])
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlaybackError(f"{path.name} is not a readable safetensors file: {error}") from error


def replay_sampler(player: Player, golden: Mapping[str, NDArray[Any]]) -> float:
    """Run the sampler on the golden outputs: noise, schedule and correction, without the network.

    Args:
        player: the package's schedule.
        golden: `initial` [B, C, H, W], `outputs` and `samples` [S, B, C, H, W].

    Returns:
        Largest deviation of the initial noise and of any sample, over the largest golden sample.
        A runtime with numpy's float32 arithmetic gets 0; another libm a few 1e-7.
    """
    images, shape = range(len(golden["initial"])), player.sample_shape
    initial = philox.batch_normal(GOLDEN_SEED, philox.INITIAL_STREAM, images, shape)
    off = [float(np.max(np.abs(initial - golden["initial"])))]
    solver.run(
        player.table,
        lambda x, step: golden["outputs"][step],
        initial,
        lambda step: philox.batch_normal(GOLDEN_SEED, philox.step_stream(step), images, shape),
        lambda step, x: off.append(float(np.max(np.abs(x - golden["samples"][step])))),
    )
    largest = max(off) if all(np.isfinite(off)) else float("inf")
    return largest / max(1.0, float(np.max(np.abs(golden["samples"]))))


def self_test(player: Player, evaluate: Evaluate, golden: Mapping[str, NDArray[Any]]) -> SelfTest:
    """Feed every golden network input and compare the outputs with the golden ones.

    Args:
        player: the package's schedule.
        evaluate: the network under test.
        golden: `inputs` and `outputs`, [S, B, C, H, W], and `conditioning`, [B, ...], if any.
    """
    deviations = []
    for step in range(player.table.n_steps):
        # NaN and Inf are a result here, not an accident worth a warning.
        with np.errstate(invalid="ignore", over="ignore"):
            f = guided(player, evaluate, golden["inputs"][step], step, golden.get("conditioning"))
            error = np.sqrt(np.mean(np.square(f.astype(np.float64) - golden["outputs"][step])))
        floor = FLOAT_NOISE * float(np.sqrt(np.mean(np.square(golden["outputs"][step]))))
        deviations.append(float(error / max(player.golden_noise_rms[step], floor, 1e-30)))
    # Not the maximum: that of a list with a NaN depends on where the NaN stands.
    return SelfTest(tuple(deviations), all(d <= GOLDEN_SHARE for d in deviations))
