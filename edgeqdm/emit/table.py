"""`schedule.bin`: the sampler's table as bytes, for runtimes that parse no decimal numbers.

    header   magic, format version u32, CRC-32 u32 of all that follows the header, size u64
    scalars  4 bytes each, in the order of `SCALARS`
    arrays   float32, in the order of `ARRAYS`, row-major, one row per step; those whose flag is not
             set are left out
    names    per label name its length u16, then that many bytes of UTF-8

All of it little-endian and without padding. The numbers are those that `solver.Table` computes
with: rounded to float32 once. `SCALARS`, `ARRAYS` and `FLAGS` are the only description of the
layout; the constants of the C++ loader are rendered from them.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.package import ScheduleFile
from edgeqdm.numerics import solver

TABLE = "schedule.bin"
MAGIC = b"EQDMTAB\n"
"""The line break shows a transfer that took the file for text."""
VERSION = 1
HEADER = struct.Struct("<8sIIQ")
CONDITIONING = ("none", "label", "embedding")
DECODERS = ("identity", "pixel_shuffle")
MAX_RANK = 4
MAX_VALUES = 2**30
"""Of one sample, one conditioning or one image."""
MAX_NAMES = 100_000
_MAX_NAME_BYTES = 0xFFFF
_MAX_INT = 2**31 - 1
_FLOAT32 = float(np.finfo(np.float32).max)

FLAGS = (
    "integer_timesteps",
    "guided",
    "clip",
    "correction",
    "learned_variance",
    "learned_bounds",
    "absorbed",
)
"""Bit k of the scalar `flags` is `FLAGS[k]`."""


@dataclass(frozen=True)
class Scalar:
    """One number.

    Attributes:
        name: field's name.
        kind: `u32`, `i32` or `f32`.
        low, high: inclusive range; a value outside is refused by writer and loader.
    """

    name: str
    kind: Literal["u32", "i32", "f32"]
    low: float
    high: float


@dataclass(frozen=True)
class Rows:
    """One array of float32, a row per step.

    Attributes:
        name: array's name.
        width: columns of a row: a number, or a scalar's name.
        flag: it is there where this flag is set; None: always.
    """

    name: str
    width: int | str = 1
    flag: str | None = None


SCALARS = (
    Scalar("flags", "u32", 0, 2 ** len(FLAGS) - 1),
    Scalar("steps", "u32", 1, 4096),
    Scalar("sample_history", "u32", 1, 64),
    Scalar("output_history", "u32", 1, 64),
    Scalar("channels", "u32", 1, 1024),
    Scalar("height", "u32", 1, 16384),
    Scalar("width", "u32", 1, 16384),
    Scalar("conditioning", "u32", 0, len(CONDITIONING) - 1),
    Scalar("labels", "u32", 0, _MAX_INT),
    Scalar("null_label", "i32", -1, _MAX_INT),
    Scalar("conditioning_rank", "u32", 0, MAX_RANK),
    *(Scalar(f"conditioning_size_{k}", "u32", 1, 2**20) for k in range(MAX_RANK)),
    Scalar("decoder", "u32", 0, len(DECODERS) - 1),
    Scalar("decoder_factor", "u32", 1, 128),
    Scalar("label_names", "u32", 0, MAX_NAMES),
    Scalar("guidance", "f32", 0.0, _FLOAT32),
    Scalar("initial_sigma", "f32", float(np.finfo(np.float32).smallest_subnormal), _FLOAT32),
    Scalar("clip_limit", "f32", 0.0, _FLOAT32),
    Scalar("largest_share", "f32", 0.0, 1.0),
)
ARRAYS = (
    Rows("timesteps"),
    Rows("input_scale"),
    Rows("sample_weights", "sample_history"),
    Rows("output_weights", "output_history"),
    Rows("noise_std", "channels"),
    Rows("clip_sample_weight", 1, "clip"),
    Rows("clip_output_weight", 1, "clip"),
    Rows("clip_weight", 1, "clip"),
    Rows("gain", 1, "correction"),
    Rows("bias", "channels", "correction"),
    Rows("input_weight", 1, "correction"),
    Rows("log_min", 1, "learned_bounds"),
    Rows("log_max", 1, "learned_bounds"),
    Rows("absorbed", "channels", "absorbed"),
    Rows("golden_noise_rms"),
)
SCALARS_BYTES = 4 * len(SCALARS)
_CODES = {"u32": "I", "i32": "i", "f32": "f"}


def pack_table(schedule: ScheduleFile) -> bytes:
    """Content of `schedule.bin`.

    Raises:
        UnsupportedError: if a number is beyond what the loader accepts.
        ValueError: if a table does not fit the others, or holds what is not finite in float32.
    """
    arrays = table_arrays(schedule)
    scalars = _scalars(schedule, arrays)
    _check(schedule, scalars, arrays)
    names = [name.encode() for name in schedule.label_names]
    body = struct.pack(
        "<" + "".join(_CODES[scalar.kind] for scalar in SCALARS),
        *(scalars[scalar.name] for scalar in SCALARS),
    )
    body += b"".join(arrays[rows.name].tobytes() for rows in ARRAYS if rows.name in arrays)
    body += b"".join(struct.pack("<H", len(name)) + name for name in names)
    return HEADER.pack(MAGIC, VERSION, zlib.crc32(body), HEADER.size + len(body)) + body


def table_arrays(schedule: ScheduleFile) -> dict[str, NDArray[np.float32]]:
    """The arrays that `schedule.bin` holds, by name, each [S, width] and little-endian."""
    correction = schedule.correction
    table = solver.Table.from_json(
        schedule.program.model_dump(mode="json"),
        None if correction is None else correction.model_dump(mode="json"),
    )
    channels = schedule.sample_shape[0]
    found: dict[str, NDArray[np.float32] | None] = {
        "timesteps": table.timesteps,
        "input_scale": table.input_scale,
        "sample_weights": table.sample_weights,
        "output_weights": table.output_weights,
        "noise_std": _per_channel(table.noise_std, channels),
        "golden_noise_rms": np.array([_rounded(x) for x in schedule.golden_noise_rms], np.float32),
    }
    if table.clip is not None:
        found["clip_sample_weight"] = table.clip.sample_weight
        found["clip_output_weight"] = table.clip.output_weight
        found["clip_weight"] = table.clip.weight
    if table.correction is not None:
        found["gain"] = table.correction.gain
        found["bias"] = table.correction.bias
        found["input_weight"] = table.correction.input_weight
    if table.learned_variance is not None:
        found["log_min"] = table.learned_variance.log_min
        found["log_max"] = table.learned_variance.log_max
        found["absorbed"] = table.learned_variance.absorbed
    return {
        name: array.reshape(len(array), -1).astype("<f4")
        for name, array in found.items()
        if array is not None
    }


def _per_channel(noise_std: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    return np.repeat(noise_std[:, None], channels, 1) if noise_std.ndim == 1 else noise_std


def _scalars(
    schedule: ScheduleFile, arrays: Mapping[str, NDArray[np.float32]]
) -> dict[str, int | float]:
    program, conditioning, decoder = schedule.program, schedule.conditioning, schedule.decoder
    channels, height, width = schedule.sample_shape
    taken = None if schedule.correction is None else schedule.correction.absorbed
    flags = {
        "integer_timesteps": program.integer_timesteps,
        "guided": schedule.guidance != 1.0,
        "clip": program.clip is not None,
        "correction": schedule.correction is not None,
        "learned_variance": program.learned_variance is not None,
        "learned_bounds": "log_min" in arrays,
        "absorbed": "absorbed" in arrays,
    }
    sizes = (*conditioning.shape, *(1,) * MAX_RANK)[:MAX_RANK]
    return {
        "flags": sum(flags[name] << bit for bit, name in enumerate(FLAGS)),
        "steps": program.n_steps,
        "sample_history": arrays["sample_weights"].shape[1],
        "output_history": arrays["output_weights"].shape[1],
        "channels": channels,
        "height": height,
        "width": width,
        "conditioning": CONDITIONING.index(conditioning.kind),
        "labels": conditioning.n_labels,
        "null_label": -1 if conditioning.null_label is None else conditioning.null_label,
        "conditioning_rank": len(conditioning.shape),
        **{f"conditioning_size_{k}": size for k, size in enumerate(sizes)},
        "decoder": DECODERS.index(decoder.kind),
        "decoder_factor": decoder.factor if decoder.kind == "pixel_shuffle" else 1,
        "label_names": len(schedule.label_names),
        "guidance": _rounded(schedule.guidance),
        "initial_sigma": _rounded(program.initial_sigma),
        "clip_limit": 0.0 if program.clip is None else _rounded(program.clip.limit),
        "largest_share": 0.0 if taken is None else _rounded(taken.largest_share),
    }


def _rounded(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _check(
    schedule: ScheduleFile,
    scalars: Mapping[str, int | float],
    arrays: Mapping[str, NDArray[np.float32]],
) -> None:
    """Raise UnsupportedError for all that the loader would refuse."""
    for scalar in SCALARS:
        value = scalars[scalar.name]
        if not scalar.low <= value <= scalar.high:
            raise _unsupported(f"{scalar.name} is {value}, not {scalar.low:g} to {scalar.high:g}")
    for rows in ARRAYS:
        if rows.name not in arrays:
            continue
        width = rows.width if isinstance(rows.width, int) else int(scalars[rows.width])
        if arrays[rows.name].shape != (scalars["steps"], width):
            raise _unsupported(f"{rows.name} is {arrays[rows.name].shape}, for {width} columns")
        if not np.isfinite(arrays[rows.name]).all():
            raise _unsupported(f"{rows.name} is not finite in float32")
    timesteps = arrays["timesteps"]
    if np.any(timesteps < 0) or np.any(np.diff(timesteps, axis=0) > 0):
        raise _unsupported("timesteps must descend to 0 or more")
    for name in ("sample_weights", "output_weights"):
        if np.any(np.triu(arrays[name], 1)):
            raise _unsupported(f"{name} reach back before the first step")
    if np.any(arrays["golden_noise_rms"] < 0):
        raise _unsupported("golden_noise_rms is negative")
    _check_conditioning(schedule, scalars)
    _check_sizes(schedule, int(scalars["decoder_factor"]))


def _check_conditioning(schedule: ScheduleFile, scalars: Mapping[str, int | float]) -> None:
    kind = schedule.conditioning.kind
    if (kind == "label") != (scalars["labels"] > 0):
        raise _unsupported(f"a conditioning by {kind} with {scalars['labels']} labels")
    if kind != "label" and scalars["null_label"] != -1:
        raise _unsupported(f"a conditioning by {kind} with a null label")
    if scalars["null_label"] > scalars["labels"]:
        raise _unsupported(f"null label {scalars['null_label']} of {scalars['labels']} labels")
    if scalars["label_names"] > scalars["labels"]:
        raise _unsupported(f"{scalars['label_names']} names of {scalars['labels']} labels")
    if (kind == "embedding") != bool(schedule.conditioning.shape):
        raise _unsupported(f"a conditioning by {kind} of shape {schedule.conditioning.shape}")


def _check_sizes(schedule: ScheduleFile, factor: int) -> None:
    for name, shape in (
        ("sample", schedule.sample_shape),
        ("conditioning", schedule.conditioning.shape),
    ):
        if math.prod(shape) > MAX_VALUES:
            raise _unsupported(f"a {name} of {math.prod(shape)} values")
    if schedule.sample_shape[0] % factor**2:
        raise _unsupported(f"{schedule.sample_shape[0]} channels for a factor of {factor}")
    if any(len(name.encode()) > _MAX_NAME_BYTES for name in schedule.label_names):
        raise _unsupported("a label name of more than 65535 bytes")


def _unsupported(reason: str) -> UnsupportedError:
    return UnsupportedError(
        "EQ-4205",
        f"the sampler's table cannot be stored: {reason}",
        path=TABLE,
        hint="change the sampler's settings or the model's",
    )
