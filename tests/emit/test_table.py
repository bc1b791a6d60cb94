"""schedule.bin holds the table's numbers, and its loader takes nothing else."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeqdm.emit import table
from edgeqdm.emit.render import cpp_runtime
from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.model import Conditioning, Decoder
from edgeqdm.ir.package import ScheduleFile
from edgeqdm.numerics.solver import Table
from edgeqdm.testing.native import WARNINGS, compile_cpp
from edgeqdm.testing.schedules import LABELS, PARTS, random_schedule

OK, NULL, SIZE, MAGIC, VERSION, CRC, RANGE, VALUE, STEP = range(9)
NAMES = tuple(scalar.name for scalar in table.SCALARS)
EMBEDDING = Conditioning(kind="embedding", shape=(5, 12))
FULL = random_schedule(
    1, PARTS, guidance=2.5, conditioning=LABELS, label_names=("bag", "Stiefel", "größe")
)


def status(probe: ctypes.CDLL, data: bytes) -> int:
    found: int = probe.probe_open(data, ctypes.c_size_t(len(data)))
    return found


def scalars(probe: ctypes.CDLL, data: bytes) -> dict[str, float]:
    values = (ctypes.c_double * len(NAMES))()
    assert probe.probe_scalars(data, ctypes.c_size_t(len(data)), values) == OK
    return dict(zip(NAMES, values, strict=True))


def row(probe: ctypes.CDLL, data: bytes, name: str, step: int, width: int) -> tuple[int, Any]:
    values = np.full(width, np.nan, np.float32)
    index = [rows.name for rows in table.ARRAYS].index(name)
    found = probe.probe_row(
        data,
        ctypes.c_size_t(len(data)),
        ctypes.c_size_t(index),
        ctypes.c_uint32(step),
        values.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_size_t(width),
    )
    return found, values


def forged(data: bytes, offset: int, new: bytes) -> bytes:
    """The table with other bytes after its header, its CRC and size made to fit."""
    body = bytearray(data[table.HEADER.size :])
    body[offset : offset + len(new)] = new
    size = table.HEADER.size + len(body)
    return table.HEADER.pack(table.MAGIC, table.VERSION, zlib.crc32(body), size) + body


def with_scalar(data: bytes, name: str, value: float) -> bytes:
    kind = table.SCALARS[NAMES.index(name)].kind
    code = {"u32": "<I", "i32": "<i", "f32": "<f"}[kind]
    return forged(data, 4 * NAMES.index(name), struct.pack(code, value))


def with_value(data: bytes, schedule: ScheduleFile, name: str, place: int, value: float) -> bytes:
    arrays = table.table_arrays(schedule)
    before = [rows.name for rows in table.ARRAYS if rows.name in arrays]
    offset = sum(arrays[other].nbytes for other in before[: before.index(name)])
    offset += table.SCALARS_BYTES + 4 * place
    return forged(data, offset, struct.pack("<f", value))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    parts=st.sets(st.sampled_from(PARTS)),
    steps=st.integers(1, 9),
    history=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 4),
    conditioning=st.sampled_from([None, LABELS, EMBEDDING]),
    names=st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=3),
)
def test_loader_reads_every_number_that_was_packed(
    probe: ctypes.CDLL,
    seed: int,
    parts: set[str],
    steps: int,
    history: tuple[int, int],
    channels: int,
    conditioning: Conditioning | None,
    names: list[str],
) -> None:
    if conditioning != LABELS:
        names = []
    schedule = random_schedule(
        seed,
        parts,
        steps=steps,
        history=history,
        sample_shape=(channels, 4, 5),
        guidance=1.0 + seed % 3,
        conditioning=conditioning,
        label_names=tuple(names),
    )
    data = table.pack_table(schedule)
    found = scalars(probe, data)
    shape = (found["channels"], found["height"], found["width"])
    assert (found["steps"], shape) == (steps, (channels, 4, 5))
    assert (found["sample_history"], found["output_history"]) == history
    assert found["guidance"] == schedule.guidance
    assert found["initial_sigma"] == np.float32(1.7)
    sizes = [int(found[f"conditioning_size_{k}"]) for k in range(int(found["conditioning_rank"]))]
    assert tuple(sizes) == schedule.conditioning.shape
    for rows in table.ARRAYS:
        expected = table.table_arrays(schedule).get(rows.name)
        for step in range(steps):
            code, values = row(
                probe, data, rows.name, step, 1 if expected is None else expected.shape[1]
            )
            assert code == (RANGE if expected is None else OK)
            if expected is not None:
                np.testing.assert_array_equal(values, expected[step])
    for label, name in enumerate(names):
        text = ctypes.create_string_buffer(100)
        size = ctypes.c_size_t(len(data))
        assert probe.probe_label(data, size, label, text, ctypes.c_size_t(100)) == OK
        assert text.raw[: len(name.encode()) + 1] == name.encode() + b"\0"


def test_arrays_are_those_the_python_runtime_computes_with() -> None:
    arrays = table.table_arrays(FULL)
    assert FULL.correction is not None
    expected = Table.from_json(
        FULL.program.model_dump(mode="json"), FULL.correction.model_dump(mode="json")
    )
    assert expected.clip is not None
    assert expected.correction is not None
    assert expected.learned_variance is not None
    pairs: list[tuple[str, NDArray[np.float32] | None]] = [
        ("sample_weights", expected.sample_weights),
        ("noise_std", expected.noise_std),
        ("clip_weight", expected.clip.weight[:, None]),
        ("bias", expected.correction.bias),
        ("absorbed", expected.learned_variance.absorbed),
    ]
    assert set(arrays) == {rows.name for rows in table.ARRAYS}
    for name, values in pairs:
        assert values is not None
        np.testing.assert_array_equal(arrays[name], values)
        assert arrays[name].dtype == np.float32


def test_every_changed_byte_is_refused(probe: ctypes.CDLL) -> None:
    data = table.pack_table(FULL)
    allowed = {k: {MAGIC} for k in range(8)}
    allowed |= {k: {VERSION} for k in range(8, 12)} | {k: {SIZE} for k in range(16, 24)}
    for place in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            changed = data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]
            assert status(probe, changed) in allowed.get(place, {CRC}), place


def test_every_truncation_and_every_tail_is_refused(probe: ctypes.CDLL) -> None:
    data = table.pack_table(FULL)
    assert status(probe, data) == OK
    assert {status(probe, data[:n]) for n in range(len(data))} == {SIZE}
    assert status(probe, data + b"\0") == SIZE
    for n in range(table.SCALARS_BYTES, len(data) - table.HEADER.size):
        body = data[table.HEADER.size :][:n]
        head = table.HEADER.pack(
            table.MAGIC, table.VERSION, zlib.crc32(body), table.HEADER.size + n
        )
        assert status(probe, head + body) == SIZE


@pytest.mark.parametrize("shift", range(8))
def test_bytes_may_stand_anywhere(probe: ctypes.CDLL, shift: int) -> None:
    data = table.pack_table(FULL)
    buffer = ctypes.create_string_buffer(b"x" * shift + data, shift + len(data))
    place = ctypes.c_void_p(ctypes.addressof(buffer) + shift)
    assert probe.probe_open(place, ctypes.c_size_t(len(data))) == OK


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("flags", 1 << len(table.FLAGS), RANGE),
        ("flags", 0, SIZE),
        ("flags", 1 << table.FLAGS.index("absorbed"), RANGE),
        ("flags", 1 << table.FLAGS.index("learned_bounds"), RANGE),
        ("steps", 0, RANGE),
        ("steps", 4097, RANGE),
        ("steps", 2**32 - 1, RANGE),
        ("steps", 4096, SIZE),
        ("steps", 4, SIZE),
        ("sample_history", 65, RANGE),
        ("output_history", 0, RANGE),
        ("channels", 1025, RANGE),
        ("channels", 4, SIZE),
        ("height", 0, RANGE),
        ("width", 16385, RANGE),
        ("conditioning", 3, RANGE),
        ("conditioning", 0, RANGE),
        ("conditioning", 2, RANGE),
        ("labels", 0, RANGE),
        ("labels", 2**31, RANGE),
        ("null_label", -2, RANGE),
        ("null_label", 4, RANGE),
        ("conditioning_rank", 5, RANGE),
        ("conditioning_rank", 1, RANGE),
        ("conditioning_size_0", 2, RANGE),
        ("conditioning_size_3", 0, RANGE),
        ("decoder", 2, RANGE),
        ("decoder_factor", 2, RANGE),
        ("decoder_factor", 129, RANGE),
        ("label_names", 100_001, RANGE),
        ("label_names", 2, SIZE),
        ("label_names", 4, RANGE),
        ("guidance", -1.0, VALUE),
        ("guidance", np.nan, VALUE),
        ("initial_sigma", 0.0, VALUE),
        ("initial_sigma", np.inf, VALUE),
        ("clip_limit", -1.0, VALUE),
        ("largest_share", 1.5, VALUE),
        ("largest_share", np.nan, VALUE),
    ],
)
def test_scalars_out_of_range_are_refused_even_with_a_valid_crc(
    probe: ctypes.CDLL, name: str, value: float, expected: int
) -> None:
    data = with_scalar(table.pack_table(FULL), name, value)
    assert status(probe, data) == expected
    assert probe.probe_keeps(data, ctypes.c_size_t(len(data)))


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        *((rows.name, 0, np.nan) for rows in table.ARRAYS),
        *((rows.name, 4, np.inf) for rows in table.ARRAYS),
        ("timesteps", 4, -1.0),
        ("timesteps", 1, 5.5),
        ("sample_weights", 1, 1.0),
        ("output_weights", 5, 1.0),
        ("golden_noise_rms", 0, -0.5),
    ],
)
def test_numbers_that_make_no_sense_are_refused_even_with_a_valid_crc(
    probe: ctypes.CDLL, name: str, place: int, value: float
) -> None:
    assert status(probe, with_value(table.pack_table(FULL), FULL, name, place, value)) == VALUE


def test_repeated_timesteps_are_fine(probe: ctypes.CDLL) -> None:
    program = FULL.program.model_copy(update={"timesteps": (9.0, 7.0, 7.0, 1.0, 0.0)})
    schedule = FULL.model_copy(update={"program": program})
    assert status(probe, table.pack_table(schedule)) == OK


def test_label_that_is_no_utf8_is_refused(probe: ctypes.CDLL) -> None:
    data = table.pack_table(FULL)
    place = data.index("größe".encode()) - table.HEADER.size
    for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"):
        assert status(probe, forged(data, place, bad)) == VALUE


def test_missing_arguments_and_steps_have_their_own_status(probe: ctypes.CDLL) -> None:
    data = table.pack_table(FULL)
    assert probe.probe_open(None, ctypes.c_size_t(100)) == NULL
    assert probe.probe_open_into_null(data, ctypes.c_size_t(len(data))) == NULL
    assert row(probe, data, "gain", 4, 1)[0] == OK
    for step in (5, 2**32 - 1):
        code, values = row(probe, data, "gain", step, 1)
        assert (code, np.isnan(values[0])) == (STEP, True)
    assert row(probe, data, "bias", 0, 2)[0] == SIZE


def test_loader_needs_no_other_object_file(cpp: Path) -> None:
    loader = compile_cpp(cpp / "table.o", [cpp / "src" / "table.cpp"], "-O2", "-c")
    done = subprocess.run(["nm", "-u", str(loader)], capture_output=True, text=True, check=True)
    undefined = {line.split()[-1] for line in done.stdout.splitlines()}
    assert undefined <= {"memcpy", "memset", "memcmp"}


SETTINGS: list[dict[str, Any]] = [
    {"steps": 4097},
    {"history": (65, 1)},
    {"sample_shape": (1025, 1, 1)},
    {"sample_shape": (1024, 16384, 128)},
    {"sample_shape": (3, 4, 5), "decoder": Decoder(kind="pixel_shuffle", factor=2)},
    {"conditioning": Conditioning(kind="label")},
    {"conditioning": Conditioning(kind="embedding", shape=(1,) * 5)},
    {"conditioning": Conditioning(kind="embedding", shape=(2**20, 2**20))},
    {"conditioning": Conditioning(kind="none", null_label=1)},
    {"label_names": ("x" * 65536,), "conditioning": Conditioning(kind="label", n_labels=1)},
    {"label_names": ("x",)},
    {"conditioning": Conditioning(kind="label", n_labels=3, null_label=4)},
    {"guidance": 1e39},
]


@pytest.mark.parametrize("changes", SETTINGS)
def test_what_the_loader_would_refuse_is_not_packed(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="EQ-4205"):
        table.pack_table(random_schedule(0, **changes))


def test_ascending_timesteps_are_not_packed() -> None:
    program = FULL.program.model_copy(update={"timesteps": (1.0, 2.0, 3.0, 4.0, 5.0)})
    with pytest.raises(UnsupportedError, match="descend"):
        table.pack_table(FULL.model_copy(update={"program": program}))


CHECK = """
#include "edgeqdm.h"
#include "edgeqdm_table.h"
#include <stdio.h>
int main(void) {
  fwrite(edgeqdm_table, 1, EDGEQDM_TABLE_SIZE, stdout);
  fprintf(stderr, "%.9g %.9g %d", EDGEQDM_TABLE_BIAS_LEAST, EDGEQDM_TABLE_BIAS_GREATEST,
          EDGEQDM_TABLE_STEPS + EDGEQDM_TABLE_LABELS);
  return 0;
}
"""


@pytest.mark.parametrize(("compiler", "standard"), [("cc", "-std=c11"), ("c++", "-std=c++17")])
def test_header_compiles_as_c_and_holds_the_table(
    cpp: Path, tmp_path: Path, compiler: str, standard: str
) -> None:
    for name, text in cpp_runtime(FULL).items():
        if name.endswith(("edgeqdm.h", "edgeqdm_table.h")):
            (tmp_path / Path(name).name).write_text(text)
    source = tmp_path / ("check.c" if compiler == "cc" else "check.cpp")
    source.write_text(CHECK)
    program = tmp_path / "check"
    options = (standard, "-pedantic", *WARNINGS)
    command = [compiler, *options, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, check=True)
    assert done.stdout == table.pack_table(FULL)
    least, greatest, number = done.stderr.split()
    bias = table.table_arrays(FULL)["bias"]
    assert (np.float32(least), np.float32(greatest)) == (bias.min(), bias.max())
    assert int(number) == 5 + 3
