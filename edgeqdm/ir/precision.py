"""The precisions a layer can be given."""

from __future__ import annotations

from enum import StrEnum


class Precision(StrEnum):
    """How one layer is stored and computed.

    `w8a8`: int8 weights per output channel, 8-bit activations per tensor, integer kernel.
    `fp32`: left as it is.
    """

    W8A8 = "w8a8"
    FP32 = "fp32"
