"""The C++ runtime computes what the Python runtime does, and refuses what is damaged."""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import struct
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save

from edgeqdm.emit import playback
from edgeqdm.emit.integrity import path_faults
from edgeqdm.emit.playback import Player
from edgeqdm.emit.table import pack_table
from edgeqdm.errors import InputError, NumericalError, ResourceError, VerifyError
from edgeqdm.ir.model import Conditioning, Decoder
from edgeqdm.ir.package import ScheduleFile
from edgeqdm.models.sampler import compile_sampler
from edgeqdm.numerics import philox, solver
from edgeqdm.testing.schedules import LABELS, PARTS, random_schedule

EMBEDDING = Conditioning(kind="embedding", shape=(5, 2))
# log, cos, sin and exp of another library: their last bit, through a handful of steps. Without
# them every operation is one rounding in both, and the results are equal.
LIBM = 1e-6
EVALUATE = ctypes.CFUNCTYPE(
    None,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_float),
    ctypes.POINTER(ctypes.c_int64),
    ctypes.POINTER(ctypes.c_float),
    ctypes.POINTER(ctypes.c_float),
)
Network = Callable[[Any, int, Any], Any]


def place(array: NDArray[Any] | None) -> ctypes.c_void_p | None:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def size(n: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(n)


def player_of(schedule: ScheduleFile, null_embedding: Any = None) -> Player:
    correction = schedule.correction
    return Player(
        table=solver.Table.from_json(
            schedule.program.model_dump(mode="json"),
            None if correction is None else correction.model_dump(mode="json"),
        ),
        guidance=schedule.guidance,
        conditioning=schedule.conditioning.model_dump(mode="json"),
        decoder=schedule.decoder.model_dump(mode="json"),
        sample_shape=schedule.sample_shape,
        label_names=schedule.label_names,
        null_embedding=null_embedding,
        golden_noise_rms=schedule.golden_noise_rms,
    )


def test_philox_gives_the_known_answers(probe: ctypes.CDLL) -> None:
    # Salmon et al.'s own vectors, kat_vectors of Random123.
    known = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            2**64 - 1,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in known:
        words = (ctypes.c_uint32 * 4)()
        probe.probe_philox((ctypes.c_uint32 * 4)(*counter), ctypes.c_uint64(key), words)
        assert tuple(words) == expected


@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    image=st.integers(0, 2**32 - 1),
    n=st.integers(1, 50),
)
def test_noise_is_that_of_the_python_runtime(
    probe: ctypes.CDLL, seed: int, stream: int, image: int, n: int
) -> None:
    found = np.zeros(n, np.float32)
    probe.probe_normal(
        ctypes.c_uint64(seed),
        ctypes.c_uint32(stream),
        ctypes.c_uint32(image),
        place(found),
        size(n),
    )
    expected = philox.standard_normal(seed, stream, image, (n,))
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-9)


def replay(probe: ctypes.CDLL, schedule: ScheduleFile, seed: int) -> tuple[Any, Any]:
    """Samples after every step on random outputs, in C++ and in Python."""
    n_steps, n_images = schedule.program.n_steps, 2
    shape = (n_images, *schedule.sample_shape)
    channels = shape[1] * (1 if schedule.program.learned_variance is None else 2)
    outputs = np.random.default_rng(seed).standard_normal(
        (n_steps, n_images, channels, *shape[2:]), np.float32
    )
    found = np.zeros((n_steps, *shape), np.float32)
    data = pack_table(schedule)
    failed = probe.probe_replay(
        data, size(len(data)), ctypes.c_uint64(seed), n_images, place(outputs), place(found)
    )
    assert failed == 0
    expected: list[Any] = []
    images = range(n_images)
    solver.run(
        player_of(schedule).table,
        lambda x, step: outputs[step],
        philox.batch_normal(seed, philox.INITIAL_STREAM, images, schedule.sample_shape),
        lambda step: philox.batch_normal(
            seed, philox.step_stream(step), images, schedule.sample_shape
        ),
        lambda step, x: expected.append(x),
    )
    return found, np.stack(expected)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    parts=st.sets(st.sampled_from(PARTS)),
    steps=st.integers(1, 7),
    history=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_solver_equals_that_of_the_python_runtime(
    probe: ctypes.CDLL, seed: int, parts: set[str], steps: int, history: tuple[int, int]
) -> None:
    schedule = random_schedule(seed, parts, steps=steps, history=history)
    found, expected = replay(probe, schedule, seed)
    assert np.abs(found - expected).max() <= LIBM * max(1.0, np.abs(expected).max())


SCHEDULERS: list[tuple[type[Any], dict[str, Any], dict[str, Any]]] = [
    (diffusers.DDIMScheduler, {"clip_sample": False}, {}),
    (diffusers.DDIMScheduler, {"clip_sample": False}, {"eta": 1.0}),
    (diffusers.DDIMScheduler, {"clip_sample": True}, {}),
    (diffusers.DDPMScheduler, {"clip_sample": True}, {}),
    (diffusers.DDPMScheduler, {"variance_type": "learned_range"}, {}),
    (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2}, {}),
    (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    (diffusers.PNDMScheduler, {"skip_prk_steps": True}, {}),
    (diffusers.PNDMScheduler, {"skip_prk_steps": False}, {}),
    (diffusers.UniPCMultistepScheduler, {}, {}),
    (diffusers.EulerDiscreteScheduler, {}, {}),
    (diffusers.EulerAncestralDiscreteScheduler, {}, {}),
    (diffusers.FlowMatchEulerDiscreteScheduler, {}, {}),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "config", "options"),
    SCHEDULERS,
    ids=[f"{s[0].__name__}-{s[1]}-{s[2]}" for s in SCHEDULERS],
)
def test_samplers_of_diffusers_run_as_in_the_python_runtime(
    probe: ctypes.CDLL, scheduler: type[Any], config: dict[str, Any], options: dict[str, float]
) -> None:
    program = compile_sampler(scheduler(**config), 10, **options)
    noise = (0.1,) * program.n_steps
    schedule = random_schedule(0).model_copy(update={"program": program, "golden_noise_rms": noise})
    found, expected = replay(probe, schedule, 3)
    assert np.abs(found - expected).max() <= LIBM * max(1.0, np.abs(expected).max())


def network(x: Any, step: int, conditioning: Any) -> Any:
    """Sums and products only: the same in any language."""
    fed = 0 if conditioning is None else conditioning.reshape(len(x), -1).sum(1, np.float64)
    shift = np.reshape(np.float32(0.25) * np.asarray(fed, np.float32), (-1, 1, 1, 1))
    return (np.float32(0.5) * x + np.float32(0.125 * step) + shift).astype(np.float32)


def doubled(x: Any, step: int, conditioning: Any) -> Any:
    f = network(x, step, conditioning)
    return np.concatenate([f, np.float32(0.25) * f], 1)


def draw(
    probe: ctypes.CDLL,
    schedule: ScheduleFile,
    evaluate: Network,
    *,
    labels: Any = None,
    embeddings: Any = None,
    null: Any = None,
    images: range = range(2),
) -> tuple[int, str, Any]:
    """Status, message and samples of C++ with a network in Python."""
    shape = schedule.sample_shape
    learned = schedule.program.learned_variance is not None
    out_channels = shape[0] * (2 if learned else 1)

    def called(step: int, batch: int, x: Any, labels: Any, embeddings: Any, output: Any) -> None:
        fed = None
        if labels:
            fed = np.ctypeslib.as_array(labels, (batch,))
        if embeddings:
            fed = np.ctypeslib.as_array(embeddings, (batch, *schedule.conditioning.shape))
        sample = np.ctypeslib.as_array(x, (batch, *shape))
        out = np.ctypeslib.as_array(output, (batch, out_channels, *shape[1:]))
        out[:] = evaluate(sample.copy(), step, fed)

    data = pack_table(schedule)
    samples = np.zeros((len(images), *shape), np.float32)
    message = ctypes.create_string_buffer(300)
    status = probe.probe_sample(
        data,
        size(len(data)),
        place(null),
        size(0 if null is None else null.size),
        ctypes.c_uint64(7),
        ctypes.c_uint32(images.start),
        len(images),
        place(labels),
        place(embeddings),
        EVALUATE(called),
        place(samples),
        message,
        size(300),
    )
    return status, message.value.decode(), samples


@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.0])
@pytest.mark.parametrize("kind", ["none", "label", "embedding", "no null"])
@pytest.mark.parametrize("learned", [False, True])
def test_guided_samples_are_those_of_the_python_runtime(
    probe: ctypes.CDLL, guidance: float, kind: str, learned: bool
) -> None:
    conditioning = {"none": Conditioning(kind="none"), "label": LABELS}.get(kind, EMBEDDING)
    parts = PARTS if learned else ("clip",)
    schedule = random_schedule(3, parts, guidance=guidance, conditioning=conditioning)
    evaluate, rng = doubled if learned else network, np.random.default_rng(0)
    labels = np.array([0, 2]) if kind == "label" else None
    embeddings = null = None
    if conditioning is EMBEDDING:
        embeddings = rng.standard_normal((2, 5, 2)).astype(np.float32)
    if kind == "embedding":
        null = rng.standard_normal((5, 2)).astype(np.float32)
    status, message, found = draw(
        probe, schedule, evaluate, labels=labels, embeddings=embeddings, null=null
    )
    assert (status, message) == (0, "")
    expected = playback.sample(
        player_of(schedule, null),
        evaluate,
        labels if embeddings is None else embeddings,
        seed=7,
        images=range(2),
    )
    assert np.abs(found - expected).max() <= LIBM * max(1.0, np.abs(expected).max())


def test_an_image_depends_on_its_number_only(probe: ctypes.CDLL) -> None:
    schedule = random_schedule(3)
    _, _, all_images = draw(probe, schedule, network, images=range(5))
    _, _, last = draw(probe, schedule, network, images=range(3, 5))
    np.testing.assert_array_equal(all_images[3:], last)


@pytest.mark.parametrize(
    ("conditioning", "changes", "message"),
    [
        (LABELS, {}, "this model needs a label for every image"),
        (LABELS, {"labels": np.array([0, 3])}, "label 3 is out of range 0..2"),
        (LABELS, {"labels": np.array([-1, 0])}, "label -1 is out of range 0..2"),
        (LABELS, {"embeddings": np.zeros(20, np.float32)}, "this model needs a label for every"),
        (EMBEDDING, {}, "this model needs an embedding for every image"),
        (EMBEDDING, {"embeddings": np.full(20, np.nan, np.float32)}, "NaN or infinity"),
        (Conditioning(kind="none"), {"labels": np.array([0, 1])}, "takes no label"),
        (Conditioning(kind="none"), {"images": range(0)}, "at least 1"),
        (Conditioning(kind="none"), {"images": range(2**32 - 1, 2**32 + 1)}, "2^32 - 1"),
    ],
)
def test_wrong_conditioning_is_refused(
    probe: ctypes.CDLL, conditioning: Conditioning, changes: dict[str, Any], message: str
) -> None:
    schedule = random_schedule(0, conditioning=conditioning)
    status, found, _ = draw(probe, schedule, network, **changes)
    assert status == InputError.exit_code
    assert message in found


def test_more_images_than_can_be_counted_are_refused(probe: ctypes.CDLL) -> None:
    data = pack_table(random_schedule(0, sample_shape=(1024, 1024, 1024)))
    message = ctypes.create_string_buffer(300)
    table, seed, first = (data, size(len(data))), ctypes.c_uint64(0), ctypes.c_uint32(0)
    places = (None, None, EVALUATE(), None, message, size(300))
    n_images = ctypes.c_uint32(2**32 - 1)
    status = probe.probe_sample(*table, None, size(0), seed, first, n_images, *places)
    assert status == ResourceError.exit_code
    assert message.value == b"out of memory - draw fewer images at once"


def test_samples_that_overflow_name_their_step(probe: ctypes.CDLL) -> None:
    def large(x: Any, step: int, conditioning: Any) -> Any:
        return np.full_like(network(x, step, conditioning), 3e38)

    schedule = random_schedule(0)
    weights = tuple(
        tuple(10.0 * (k == 0) for k in range(len(row))) for row in schedule.program.output_weights
    )
    program = schedule.program.model_copy(update={"output_weights": weights})
    status, message, _ = draw(probe, schedule.model_copy(update={"program": program}), large)
    assert status == NumericalError.exit_code
    assert message.startswith("the samples are NaN or infinite after step 0")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_output_that_is_not_finite_names_its_step(probe: ctypes.CDLL, value: float) -> None:
    def broken(x: Any, step: int, conditioning: Any) -> Any:
        found = network(x, step, conditioning)
        found[-1, -1, -1, -1] = value if step == 2 else 0
        return found

    status, message, _ = draw(probe, random_schedule(0), broken)
    assert status == NumericalError.exit_code
    assert message == "the network gave NaN or infinity at step 2"


@given(data=st.binary(max_size=300))
def test_sha256_is_that_of_python(probe: ctypes.CDLL, data: bytes) -> None:
    digits = ctypes.create_string_buffer(65)
    probe.probe_sha256(data, size(len(data)), digits)
    assert digits.value.decode() == hashlib.sha256(data).hexdigest()


def json_status(probe: ctypes.CDLL, text: bytes) -> tuple[int, str]:
    message = ctypes.create_string_buffer(300)
    return probe.probe_json(text, size(len(text)), message, size(300)), message.value.decode()


TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(value=JSON, ascii_only=st.booleans())
def test_json_of_python_is_read(probe: ctypes.CDLL, value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, allow_nan=False).encode()
    assert json_status(probe, text) == (0, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid"),
        (b"{", "not valid"),
        (b'{"a": 1,}', "not valid"),
        (b"[1, 2", "not valid"),
        (b"01", "not valid"),
        (b"1.", "not valid"),
        (b"NaN", "not valid"),
        (b"nul", "not valid"),
        (b"[] []", "more than one value"),
        (b'{"a": 1, "a": 2}', "duplicate key"),
        (b'"\\ud800"', "surrogate"),
        (b'"\\udc00x"', "surrogate"),
        (b'"\\x"', "not valid"),
        (b'"a\nb"', "control character"),
        (b'"abc', "without its end"),
        (b'"\xff"', "UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1," * 250_000 + b"1]", "too many values"),
        (b" " * (2**24 + 1), "larger than 16 MiB"),
    ],
)
def test_damaged_json_is_refused(probe: ctypes.CDLL, text: bytes, message: str) -> None:
    status, found = json_status(probe, text)
    assert status == VerifyError.exit_code
    assert message in found


@pytest.mark.parametrize(
    "path",
    ["a", "a/b.c", "", "/a", "a//b", "../a", "a/..", "./a", "a\\b", "a b", "ä", "a\n", "x" * 201],
)
def test_paths_are_judged_as_by_verify(probe: ctypes.CDLL, path: str) -> None:
    assert bool(probe.probe_path(path.encode())) == bool(path_faults([path]))


def npy(value: NDArray[Any], version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, value, version=version)
    return file.getvalue()


def read_npy(probe: ctypes.CDLL, data: bytes) -> tuple[int, str, Any]:
    values, count = np.zeros(1000, np.float32), ctypes.c_size_t()
    message = ctypes.create_string_buffer(300)
    status = probe.probe_npy(
        data, size(len(data)), place(values), size(1000), ctypes.byref(count), message, size(300)
    )
    return status, message.value.decode(), values[: count.value]


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_numpy_is_read(
    probe: ctypes.CDLL, version: tuple[int, int], dtype: str, order: Any
) -> None:
    value = np.random.default_rng(0).standard_normal((3, 4, 5))
    value.flat[:4] = (0.0, -0.0, 6e-8, 65504.0)
    stored = np.asarray(value.astype(dtype), order=order)
    status, message, found = read_npy(probe, npy(stored, version))
    assert (status, message) == (0, "")
    np.testing.assert_array_equal(found.reshape(3, 4, 5), stored.astype(np.float32))


def test_every_float16_is_read(probe: ctypes.CDLL) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    for chunk in np.array_split(halves, 70):
        np.testing.assert_array_equal(read_npy(probe, npy(chunk))[2], chunk.astype(np.float32))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a .npy file"),
        (b"PK\x03\x04truncated", "is not a .npy file"),
        (b"\x93NUMPY\x01\x00", "is not a .npy file"),
        (b"\x93NUMPY\x04\x00\x00\x00\x00\x00\x00", "is not a .npy file: an unknown version"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "is not a .npy file: cut off"),
        (b"\x93NUMPY\x01\x00\x02\x00{}", "is not a .npy file: a wrong header"),
        (npy(np.zeros((3, 2), np.float32))[:-1], "is not a .npy file: cut off"),
        (npy(np.zeros((3, 2), np.float32)) + b"x", "is not a .npy file"),
        (npy(np.zeros(())), "does not hold one embedding per image"),
        (npy(np.zeros((0, 2))), "does not hold one embedding per image"),
        (npy(np.zeros((1, 2), np.int64)), "holds <i8, embeddings are floats"),
        (npy(np.full((1, 2), 1e300)), "holds NaN or a value beyond float32"),
        (npy(np.full((1, 2), np.nan)), "holds NaN or a value beyond float32"),
        (npy(np.full((1, 2), np.inf, np.float16)), "holds NaN or a value beyond float32"),
    ],
)
def test_damaged_npy_is_refused(probe: ctypes.CDLL, data: bytes, message: str) -> None:
    status, found, _ = read_npy(probe, data)
    assert status == InputError.exit_code
    assert found.startswith(f"e.npy {message}")


def read_tensor(probe: ctypes.CDLL, data: bytes, name: str, n_bytes: int) -> tuple[int, bytes]:
    values = ctypes.create_string_buffer(n_bytes)
    message = ctypes.create_string_buffer(300)
    status = probe.probe_safetensors(
        data, size(len(data)), name.encode(), values, size(n_bytes), message, size(300)
    )
    return status, values.raw


def test_safetensors_is_read(probe: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    tensors = {"odd": np.arange(-2, 3), "x": rng.standard_normal((2, 3)).astype(np.float32)}
    data = save(tensors, metadata={"made": "by hand"})
    for name, value in tensors.items():
        assert read_tensor(probe, data, name, value.nbytes) == (0, value.tobytes())


def test_safetensors_with_an_empty_tensor_is_read(probe: ctypes.CDLL) -> None:
    tensors = {"a": np.ones(3, np.float32), "b": np.zeros((0, 2), np.float32), "c": np.arange(2)}
    for name, value in tensors.items():
        assert read_tensor(probe, save(tensors), name, value.nbytes) == (0, value.tobytes())


def framed(header: Any, n_bytes: int = 8) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


def placed(*offsets: tuple[int, int], n_bytes: int) -> bytes:
    """A file of tensors at these bytes of its data."""
    header = {
        f"x{k}": {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]}
        for k, (start, stop) in enumerate(offsets)
    }
    return framed(header, n_bytes)


@pytest.mark.parametrize(
    "data",
    [
        placed((0, 8), (0, 8), n_bytes=8),
        placed((0, 8), (4, 12), n_bytes=12),
        placed((0, 8), (4, 4), n_bytes=8),
        placed((0, 8), (12, 16), n_bytes=16),
        placed((4, 12), n_bytes=12),
        placed((0, 8), n_bytes=12),
    ],
    ids=["twice", "overlap", "empty inside", "hole", "hole at the start", "rest"],
)
def test_safetensors_holds_every_byte_once(probe: ctypes.CDLL, data: bytes) -> None:
    assert read_tensor(probe, data, "x0", 8)[0] == VerifyError.exit_code


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        framed([]),
        framed({"x": 3}),
        framed({"x": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}),
        framed({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        framed({"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}),
        framed({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
        framed({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        framed({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}),
        framed({"x": {"dtype": "F32", "shape": [1] * 40 + [2], "data_offsets": [0, 8]}}),
        framed({"x": {"dtype": "F32", "shape": [2]}}),
    ],
)
def test_damaged_safetensors_is_refused(probe: ctypes.CDLL, data: bytes) -> None:
    assert read_tensor(probe, data, "x", 8)[0] == VerifyError.exit_code


@pytest.mark.parametrize("columns", [1, 2, 3, 10])
@pytest.mark.parametrize(
    ("channels", "factor"), [(1, 1), (2, 1), (3, 1), (4, 2), (12, 2), (9, 3), (27, 3)]
)
def test_images_are_those_of_the_python_runtime(
    probe: ctypes.CDLL, channels: int, factor: int, columns: int
) -> None:
    decoder = Decoder(kind="pixel_shuffle", factor=factor) if factor > 1 else Decoder()
    schedule = random_schedule(0, sample_shape=(channels, 3, 4), decoder=decoder)
    samples = np.random.default_rng(0).uniform(-1.2, 1.2, (5, channels, 3, 4)).astype(np.float32)
    # Ends and half-ties: k / 127.5 - 1 and half-way between.
    ties = np.float32(np.arange(6) + 0.5) / np.float32(127.5) - np.float32(1)
    samples.flat[:8] = (-1.0, 1.0, *ties)
    pixels = playback.decode(player_of(schedule), samples)
    expected = playback.sheet(pixels, columns)
    shown = expected if expected.shape[2] in (1, 3) else expected[:, :, :1]
    netpbm = ".pgm" if shown.shape[2] == 1 else ".ppm"
    for ending in (".png", netpbm, ""):
        found, file = np.zeros(pixels.shape, np.uint8), np.zeros(100_000, np.uint8)
        data = pack_table(schedule)
        n = probe.probe_image(
            data,
            size(len(data)),
            place(samples),
            size(5),
            columns,
            f"x{ending}".encode(),
            place(found),
            place(file),
            size(file.size),
        )
        np.testing.assert_array_equal(found, pixels)
        image = Image.open(io.BytesIO(file[:n].tobytes()))
        assert image.format == ("PNG" if ending != netpbm else "PPM")
        np.testing.assert_array_equal(np.asarray(image).reshape(shown.shape), shown)


def test_a_large_png_is_in_several_blocks(probe: ctypes.CDLL) -> None:
    schedule = random_schedule(0, sample_shape=(1, 400, 500))
    samples = np.random.default_rng(0).uniform(-1, 1, (1, 1, 400, 500)).astype(np.float32)
    found, file = np.zeros((1, 400, 500, 1), np.uint8), np.zeros(300_000, np.uint8)
    data = pack_table(schedule)
    arguments = (place(samples), size(1), 1, b"x.png", place(found), place(file), size(file.size))
    n = probe.probe_image(data, size(len(data)), *arguments)
    image = np.asarray(Image.open(io.BytesIO(file[:n].tobytes())))
    np.testing.assert_array_equal(image, found[0, :, :, 0])
