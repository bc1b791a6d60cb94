"""Bytes that a layer's weight takes, in the file and in the runtime."""

from __future__ import annotations

import math

from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import FP32, Precision

SCALE_BYTES = 4


def weight_bytes(
    kind: LayerKind, weight_shape: tuple[int, ...], precision: Precision
) -> tuple[int, int]:
    """On disk and resident, as `lowering` stores it.

    Without the bias. Codes of 4 bits are stored in 4, those of 6 in 8. Resident is what a session
    keeps beside its first run's buffers: the file's tensors, and the copies that the runtime makes
    of them for its kernels. Of x86-64 and ONNX Runtime 1.31.1, anonymous memory of one more layer
    in a chain of equal ones, 4 to 9 million weights, is within a fifth of this.
    """
    disk = _disk_bytes(weight_shape, precision)
    values = math.prod(weight_shape)
    if precision == FP32:
        # A convolution is kept a second time in blocks of channels, and packed.
        return disk, disk + (8 if kind is LayerKind.CONV2D else 4) * values
    if precision.group_size and precision.dynamic:
        return disk, 2 * disk
    widened = values if precision.weight_bits == 4 else 0
    # Without integer kernels the float32 weight is made of the codes once and kept.
    return disk, disk + widened + (values if precision.integer else 4 * values)


def _disk_bytes(weight_shape: tuple[int, ...], precision: Precision) -> int:
    outputs, width = weight_shape[0], math.prod(weight_shape[1:])
    values = outputs * width
    if precision == FP32:
        return 4 * values
    narrow = precision.weight_bits == 4
    if not precision.group_size:
        return (-(-values // 2) if narrow else values) + SCALE_BYTES * outputs
    groups = -(-width // precision.group_size)
    scales = SCALE_BYTES * outputs * groups
    if precision.dynamic:
        share = 2 if narrow else 1
        filled = outputs * groups * precision.group_size
        return filled // share + outputs * -(-groups // share) + scales
    return (-(-values // 2) if narrow else values) + outputs * groups + scales
