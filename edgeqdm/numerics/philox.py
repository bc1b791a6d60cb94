"""Counter-based normal noise that every runtime can reproduce.

Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
https://doi.org/10.1145/2063384.2063405, followed by Box-Muller. A value depends on the seed, the
stream, the image and its place in that image only, never on the batch it was drawn in.

One image of one stream is drawn in blocks of four values, block 0, 1, ... in row-major order:

    (w0, w1, w2, w3) = philox4x32(counter=(block, 0, stream, image), key=(seed low, seed high))
    u1 = (w0 + 1) / 2**32    in (0, 1]
    u2 = w1 / 2**32          in [0, 1)
    radius = sqrt(-2 ln u1), angle = 2 pi u2
    value[4 block] = radius cos(angle), value[4 block + 1] = radius sin(angle)

and (w2, w3) give the other two values alike. All of it is float64; each value is rounded to
float32 at the end. Values beyond the end of the image are dropped.

Stream 0 is the initial sample, stream 1 + i is the noise of step i.

This module imports nothing but numpy: it is copied as it is into every package.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

INITIAL_STREAM = 0

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def step_stream(step: int) -> int:
    """Stream of the noise that step `step` adds."""
    return 1 + step


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32.

    Args:
        counter: uint32 [..., 4].
        key: two 32-bit words, low word first.

    Returns:
        uint32 [..., 4].

    Source: Salmon et al. 2011, section 3.3; constants of Random123.
    """
    words = [counter[..., lane].astype(np.uint64) for lane in range(4)]
    low, high = key
    for _ in range(_ROUNDS):
        left = words[0] * np.uint64(_MULTIPLIERS[0])
        right = words[2] * np.uint64(_MULTIPLIERS[1])
        words = [
            (right >> np.uint64(32)) ^ words[1] ^ np.uint64(low),
            right & np.uint64(_MASK),
            (left >> np.uint64(32)) ^ words[3] ^ np.uint64(high),
            left & np.uint64(_MASK),
        ]
        low, high = (low + _WEYL[0]) & _MASK, (high + _WEYL[1]) & _MASK
    return np.stack(words, axis=-1).astype(np.uint32)


def standard_normal(
    seed: int, stream: int, image: int, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Unit-normal noise of one image.

    Args:
        seed: 0 <= seed < 2**64.
        stream: 0 for the initial sample, 1 + i for step i; below 2**32.
        image: number of the image in the whole run; below 2**32.
        shape: shape of one image, e.g. (C, H, W).

    Returns:
        float32 of that shape.

    Raises:
        ValueError: if a number is out of its range.
    """
    return batch_normal(seed, stream, (image,), shape).reshape(shape)


def batch_normal(
    seed: int, stream: int, images: Sequence[int], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Unit-normal noise of several images, each equal to its own `standard_normal`.

    Args:
        seed: 0 <= seed < 2**64.
        stream: 0 for the initial sample, 1 + i for step i; below 2**32.
        images: B image numbers, each below 2**32.
        shape: shape of one image, e.g. (C, H, W).

    Returns:
        float32 [B, *shape].

    Raises:
        ValueError: if a number is out of its range.
    """
    _check_range("seed", seed, 64)
    _check_range("stream", stream, 32)
    for image in images:
        _check_range("image", image, 32)
    size = int(np.prod(shape, dtype=np.int64))
    n_blocks = -(-size // 4)
    _check_range("number of values / 4", n_blocks, 32)
    counter = np.zeros((len(images), n_blocks, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(n_blocks, dtype=np.uint32)
    counter[..., 2] = stream
    counter[..., 3] = np.array(images, dtype=np.uint32).reshape(-1, 1)
    words = philox4x32(counter, (seed & _MASK, seed >> 32))
    values = _box_muller(words[..., 0::2], words[..., 1::2])
    return values.reshape(len(images), 4 * n_blocks)[:, :size].reshape(len(images), *shape)


def _box_muller(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.float32]:
    u1 = (first.astype(np.float64) + 1.0) / 2.0**32
    u2 = second.astype(np.float64) / 2.0**32
    radius = np.sqrt(-2.0 * np.log(u1))
    angle = 2.0 * np.pi * u2
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).astype(np.float32)


def _check_range(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} must be in 0..2**{bits} - 1, but it is {value}")
