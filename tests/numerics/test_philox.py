"""Philox words are the published ones and normals are the same in every batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeqdm.numerics.philox import batch_normal, philox4x32, standard_normal, step_stream

SHAPE = (3, 5, 7)

# (seed, stream, image): the first six values, shortest decimals that give the float32 back.
GOLDEN = {
    (0, 0, 0): (0.9911377, -0.9246626, -0.61760896, -0.4820686, -0.15363823, 0.1808259),
    (0x0123456789ABCDEF, 3, 42): (
        0.52264816,
        2.5783234,
        0.50592804,
        1.2529821,
        0.23272525,
        0.29092285,
    ),
    (2**64 - 1, 2**32 - 1, 2**32 - 1): (
        -1.5841738,
        0.59274393,
        0.28890508,
        1.2526941,
        -0.49353752,
        0.928986,
    ),
}


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_words_equal_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    found = philox4x32(np.array(counter, dtype=np.uint32), key)
    assert found.dtype == np.uint32
    assert tuple(int(word) for word in found) == words


def scalar_normals(seed: int, stream: int, image: int, size: int) -> list[float]:
    """The mapping of the module's docstring, one value at a time."""
    values: list[float] = []
    for block in range(-(-size // 4)):
        counter = np.array([block, 0, stream, image], dtype=np.uint32)
        words = [int(w) for w in philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))]
        for first, second in (words[:2], words[2:]):
            radius = math.sqrt(-2.0 * math.log((first + 1) / 2.0**32))
            angle = 2.0 * math.pi * (second / 2.0**32)
            values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values[:size]


def test_normals_equal_the_documented_mapping() -> None:
    expected = np.array(scalar_normals(2**40 + 3, 5, 9, 105), dtype=np.float32)
    found = standard_normal(2**40 + 3, 5, 9, SHAPE)
    assert found.dtype == np.float32
    # Logarithm and cosine of two libraries may differ in the last bit of a float64, which can tip
    # the rounding to float32 by one unit.
    np.testing.assert_array_max_ulp(found.ravel(), expected, maxulp=1)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    images=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
)
def test_noise_of_an_image_does_not_depend_on_its_batch(
    seed: int, stream: int, images: list[int]
) -> None:
    batch = batch_normal(seed, stream, images, SHAPE)
    assert batch.shape == (len(images), *SHAPE)
    for row, image in zip(batch, images, strict=True):
        assert row.tobytes() == standard_normal(seed, stream, image, SHAPE).tobytes()


def test_a_smaller_image_is_the_beginning_of_a_larger_one() -> None:
    larger = standard_normal(1, 0, 0, (8, 4)).ravel()
    assert np.array_equal(standard_normal(1, 0, 0, (5,)), larger[:5])


def test_streams_images_and_seeds_differ() -> None:
    draws = [
        standard_normal(seed, stream, image, (64,))
        for seed, stream, image in [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    # The deviation of a correlation of 64 independent pairs is 1/8.
    assert np.abs(correlation).max() < 0.5


def test_normals_have_the_moments_of_a_unit_normal() -> None:
    values = batch_normal(0, 0, range(4), (250_000,)).astype(np.float64)
    # Five deviations of the estimates of 10^6 values.
    assert abs(values.mean()) < 5e-3
    assert abs(values.var() - 1.0) < 5 * 2**0.5 * 1e-3
    assert abs((values**4).mean() - 3.0) < 5 * 96**0.5 * 1e-3
    assert np.isfinite(values).all()


def test_stream_of_a_step_follows_that_of_the_initial_sample() -> None:
    assert [step_stream(step) for step in range(3)] == [1, 2, 3]


def test_normals_stay_what_they_are() -> None:
    for (seed, stream, image), values in GOLDEN.items():
        found = standard_normal(seed, stream, image, (6,))
        np.testing.assert_array_max_ulp(found, np.array(values, dtype=np.float32), maxulp=1)


def test_an_empty_batch_and_an_empty_image_are_empty() -> None:
    assert batch_normal(0, 0, range(0), SHAPE).shape == (0, *SHAPE)
    assert standard_normal(0, 0, 0, (0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("seed", (-1, 0, 0)),
        ("seed", (2**64, 0, 0)),
        ("stream", (0, -1, 0)),
        ("stream", (0, 2**32, 0)),
        ("image", (0, 0, -1)),
        ("image", (0, 0, 2**32)),
    ],
)
def test_number_out_of_range_is_refused(name: str, arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{name} must be in 0"):
        standard_normal(*arguments, SHAPE)
