"""Weights in groups, laid out for the runtime's `MatMulNBits` kernel.

At accuracy level 4 the kernel quantizes the activation itself. On x86 it does so per token and
group, to `round(x * (127 / peak))`, half to even, for every number of rows and for 4 and 8 bits
alike. On Arm the 4-bit kernel of KleidiAI takes one asymmetric scale per token instead, which is
another result: https://github.com/microsoft/onnxruntime/pull/27751.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeqdm.errors import InputError

Codes = NDArray[np.uint8]
KERNEL_BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)


def to_matmulnbits(
    codes: Codes, zero_point: Codes, bits: int, group_size: int
) -> tuple[Codes, Codes]:
    """Inputs `B` and `zero_points` of `com.microsoft.MatMulNBits`; its `scales` are [N * G] as is.

    Args:
        codes: uint8 [N, K], 0..2^bits - 1.
        zero_point: uint8 [N, G].
        bits: 4 or 8.
        group_size: `block_size` of the operator; where it does not divide K, the last block is
            filled up with weights of 0.

    Returns:
        `(B, zero_points)`: uint8 [N, G, group_size * bits / 8] and [N * ceil(G * bits / 8)]; two
        4-bit codes share a byte, the first in its low half. A row of zero points starts a new byte.

    Raises:
        InputError: EQ-3234, if the kernel has no such width or block, or the shapes differ.
    """
    if bits not in KERNEL_BITS or group_size not in BLOCK_SIZES:
        raise InputError(
            "EQ-3234",
            f"MatMulNBits has no kernel for {bits} bits in groups of {group_size}",
            hint=f"bits are {_listed(KERNEL_BITS)}, group sizes {_listed(BLOCK_SIZES)}",
        )
    rows, width = codes.shape
    groups = -(-width // group_size)
    if zero_point.shape != (rows, groups):
        raise InputError(
            "EQ-3234",
            f"codes {codes.shape} in groups of {group_size} have zero points {zero_point.shape}, "
            f"not {(rows, groups)}",
            hint="there is one zero_point per row and group",
        )
    filled = np.repeat(zero_point, group_size, axis=1)
    filled[:, :width] = codes
    blocks = _packed(filled, bits).reshape(rows, groups, group_size * bits // 8)
    return blocks, _packed(zero_point, bits).reshape(-1)


def _packed(codes: Codes, bits: int) -> Codes:
    if bits == 8:
        return codes.astype(np.uint8)
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return (even[:, ::2] | (even[:, 1::2] << 4)).astype(np.uint8)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
