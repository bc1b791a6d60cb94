"""Bytes that a layer's weight takes, in the file and in the runtime."""

from __future__ import annotations

import math

from edgeqdm.ir.precision import FP32, Precision

SCALE_BYTES = 4


def weight_bytes(weight_shape: tuple[int, ...], precision: Precision) -> tuple[int, int]:
    """On disk and resident, as `lowering` stores it.

    Codes of 4 bits are stored in 4; the runtime widens them to 8 where it loads the graph, but for
    those in the blocks of `MatMulNBits`. Codes of 6 bits are stored in 8.
    """
    outputs, width = weight_shape[0], math.prod(weight_shape[1:])
    values = outputs * width
    if precision == FP32:
        return 4 * values, 4 * values
    narrow = precision.weight_bits == 4
    if not precision.group_size:
        scales = SCALE_BYTES * outputs
        codes = -(-values // 2) if narrow else values
        return codes + scales, values + scales
    groups = -(-width // precision.group_size)
    scales = SCALE_BYTES * outputs * groups
    if precision.dynamic:
        share = 2 if narrow else 1
        filled = outputs * groups * precision.group_size
        blocks = filled // share + outputs * -(-groups // share) + scales
        return blocks, blocks
    zero_points = outputs * groups
    return (-(-values // 2) if narrow else values) + zero_points + scales, (
        values + zero_points + scales
    )
