"""Integer codes as they are stored: dense, without a padding bit between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeqdm.errors import InputError
from edgeqdm.numerics.grouping import n_groups

PACKED_BITS = (4, 6, 8)
GROUP_SCALE_BYTES = 2
CHANNEL_SCALE_BYTES = 4


def pack(codes: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Codes as one little-endian stream of bits.

    Code i occupies bits `i * bits` up to `(i + 1) * bits`, counted from the lowest bit of the first
    byte; 4-bit codes lie low nibble first. Unused bits of the last byte are 0. Signed codes are
    stored with 2^(bits-1) added.

    Args:
        codes: integers of any shape, 0..2^bits - 1, or -2^(bits-1)..2^(bits-1) - 1 if signed.
        bits: 4, 6 or 8.
        signed: whether codes can be negative.

    Returns:
        uint8 [ceil(numel * bits / 8)].

    Raises:
        InputError: EQ-3231, for another width; EQ-3232, for a code that is outside its range or no
            integer.
    """
    _check_bits(bits)
    if codes.is_floating_point():
        raise InputError("EQ-3232", f"codes to store are {codes.dtype}, no integers")
    stored = codes.reshape(-1).to(torch.int32) + _offset(bits, signed)
    if stored.numel() and not 0 <= int(stored.min()) <= int(stored.max()) < 2**bits:
        raise InputError(
            "EQ-3232",
            f"codes {int(codes.min())}..{int(codes.max())} do not fit {bits} "
            f"{'signed' if signed else 'unsigned'} bits",
        )
    n_codes, n_bytes = _period(bits)
    padded = F.pad(stored, (0, -stored.numel() % n_codes))
    words = (padded.reshape(-1, n_codes) << _shifts(n_codes, bits, stored)).sum(1, keepdim=True)
    stream = (words >> _shifts(n_bytes, 8, stored)) & 0xFF
    return stream.reshape(-1)[: packed_bytes(codes.numel(), bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: Sequence[int], *, signed: bool) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 [ceil(numel * bits / 8)].
        bits: 4, 6 or 8.
        shape: shape of the codes.
        signed: as given to `pack`.

    Returns:
        int8 if signed, else uint8, of `shape`.

    Raises:
        InputError: EQ-3231, for another width; EQ-3233, if so many bytes hold another number of
            codes.
    """
    _check_bits(bits)
    n, expected = math.prod(shape), packed_bytes(math.prod(shape), bits)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise InputError(
            "EQ-3233",
            f"{packed.numel()} elements of {packed.dtype} are not the {expected} bytes of codes "
            f"{list(shape)} of {bits} bits",
            hint="shape and bits are those the codes were packed with",
        )
    n_codes, n_bytes = _period(bits)
    padded = F.pad(packed.reshape(-1).to(torch.int32), (0, -expected % n_bytes))
    words = (padded.reshape(-1, n_bytes) << _shifts(n_bytes, 8, padded)).sum(1, keepdim=True)
    stored = (words >> _shifts(n_codes, bits, padded)) & (2**bits - 1)
    codes: Tensor = stored.reshape(-1)[:n] - _offset(bits, signed)
    return codes.to(torch.int8 if signed else torch.uint8).reshape(tuple(shape))


def packed_bytes(n_codes: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return -(-n_codes * bits // 8)


def weight_bytes(n_outputs: int, n_inputs: int, bits: int, group_size: int) -> int:
    """Stored size of one weight matrix with its scales and zero points.

    Per weight this is `bits + (16 + bits) / group_size` bits in groups (float16 scales, zero points
    packed like the codes) and `bits + 32 / n_inputs` per output channel (float32 scales, no zero
    point), up to the last byte of each array.

    Args:
        n_outputs: rows.
        n_inputs: weights of a row; of a convolution C_in x kernel height x kernel width.
        bits: 4, 6 or 8; 16 or 32 for a weight that is stored in float, without scales.
        group_size: weights that share a scale; 0 is the whole row.

    Raises:
        InputError: EQ-3231, for another width.

    Source: Q-DiT, https://arxiv.org/abs/2406.17343, groups with a scale and a zero point each.
    """
    n_weights = n_outputs * n_inputs
    if bits in (16, 32):
        return n_weights * bits // 8
    _check_bits(bits)
    if not group_size:
        return packed_bytes(n_weights, bits) + CHANNEL_SCALE_BYTES * n_outputs
    scales = n_outputs * n_groups(n_inputs, group_size)
    return packed_bytes(n_weights, bits) + GROUP_SCALE_BYTES * scales + packed_bytes(scales, bits)


def _period(bits: int) -> tuple[int, int]:
    """Smallest number of codes that fill whole bytes, and of these bytes."""
    n_codes = math.lcm(bits, 8) // bits
    return n_codes, n_codes * bits // 8


def _shifts(n: int, bits: int, like: Tensor) -> Tensor:
    return bits * torch.arange(n, dtype=torch.int32, device=like.device)


def _offset(bits: int, signed: bool) -> int:
    return 2 ** (bits - 1) if signed else 0


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise InputError(
            "EQ-3231",
            f"codes of {bits} bits are not stored",
            hint=f"widths are {', '.join(map(str, PACKED_BITS))}",
        )
