"""The reference of the layout is one long integer, written by Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeqdm.errors import InputError
from edgeqdm.numerics.grouping import GroupedWeight, dequantize_grouped, search_grouped
from edgeqdm.numerics.packing import pack, packed_bytes, unpack, weight_bytes

BITS = st.sampled_from([4, 6, 8])


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, bool, list[int]]:
    bits, signed = draw(BITS), draw(st.booleans())
    low = -(2 ** (bits - 1)) if signed else 0
    return bits, signed, draw(st.lists(st.integers(low, low + 2**bits - 1), max_size=70))


@given(coded())
def test_bytes_are_one_little_endian_number(case: tuple[int, bool, list[int]]) -> None:
    bits, signed, codes = case
    offset = 2 ** (bits - 1) if signed else 0
    number = sum((code + offset) << (bits * i) for i, code in enumerate(codes))
    expected = number.to_bytes(packed_bytes(len(codes), bits), "little")
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits, signed=signed)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == expected


@given(coded())
def test_round_trip_is_exact_for_any_length(case: tuple[int, bool, list[int]]) -> None:
    """I8, Q8."""
    bits, signed, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits, signed=signed)
    found = unpack(packed, bits, (len(codes),), signed=signed)
    assert found.dtype == (torch.int8 if signed else torch.uint8)
    assert found.tolist() == codes


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_every_code_survives_in_its_shape(bits: int) -> None:
    unsigned = torch.arange(2**bits).reshape(2, 2, -1).to(torch.uint8)
    signed = (unsigned.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    for codes in (unsigned, signed):
        flag = codes.dtype == torch.int8
        found = unpack(pack(codes, bits, signed=flag), bits, codes.shape, signed=flag)
        assert found.dtype == codes.dtype
        torch.testing.assert_close(found, codes, rtol=0, atol=0)


def test_golden_bytes() -> None:
    assert pack(torch.tensor([1, 2, 15]), 4, signed=False).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([-8, 7, -1]), 4, signed=True).tolist() == [0xF0, 0x07]
    # 63, 0, 63, 0 of six bits each: 111111 000000 111111 000000, lowest bit first.
    assert pack(torch.tensor([63, 0, 63, 0]), 6, signed=False).tolist() == [0x3F, 0xF0, 0x03]
    assert pack(torch.tensor([-128, 0, 127]), 8, signed=True).tolist() == [0, 128, 255]


def test_non_contiguous_codes_are_packed_in_reading_order() -> None:
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    packed = pack(codes.T, 4, signed=False)
    torch.testing.assert_close(packed, pack(codes.T.contiguous(), 4, signed=False))


def stored(weight: GroupedWeight) -> list[bytes]:
    """The three arrays of a weight as they lie in a file."""
    return [
        bytes(pack(weight.codes, weight.bits, signed=False).numpy()),
        weight.scale.numpy().astype(np.float16).tobytes(),
        bytes(pack(weight.zero_point, weight.bits, signed=False).numpy()),
    ]


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 288])
def test_stored_groups_take_what_the_formula_says(bits: int, group_size: int) -> None:
    """I8: DiT-XL/2's width, which all four sizes divide."""
    n_outputs, n_inputs = 48, 1152
    weight = search_grouped(torch.randn(n_outputs, n_inputs), bits, group_size)
    real = sum(map(len, stored(weight)))
    formula = n_outputs * n_inputs * (bits + (16 + bits) / group_size) / 8
    assert real == pytest.approx(formula, rel=0.02)
    assert weight_bytes(n_outputs, n_inputs, bits, group_size) == real


@given(bits=BITS, group_size=st.integers(1, 40), rows=st.integers(1, 9), width=st.integers(1, 70))
def test_counted_bytes_are_stored_bytes(bits: int, group_size: int, rows: int, width: int) -> None:
    """I8: ragged groups and half-filled bytes included."""
    weight = search_grouped(torch.ones(rows, width), bits, group_size)
    assert weight_bytes(rows, width, bits, group_size) == sum(map(len, stored(weight)))


@pytest.mark.parametrize(
    ("bits", "group_size", "bits_per_weight"),
    [(4, 32, 4.625), (4, 64, 4.3125), (4, 128, 4.15625), (4, 288, 4.069)],
)
def test_golden_bits_per_weight(bits: int, group_size: int, bits_per_weight: float) -> None:
    """I8: hand-counted sizes of four-bit groups."""
    found = weight_bytes(4608, 1152, bits, group_size) * 8 / (4608 * 1152)
    assert found == pytest.approx(bits_per_weight, abs=5e-4)


def test_rows_and_floats_have_their_plain_sizes() -> None:
    assert weight_bytes(10, 96, 8, 0) == 960 + 40
    assert weight_bytes(10, 96, 4, 0) == 480 + 40
    assert weight_bytes(10, 96, 6, 0) == 720 + 40
    assert weight_bytes(10, 96, 16, 0) == 1920
    assert weight_bytes(10, 96, 32, 0) == 3840


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_stored_weight_is_the_weight(bits: int) -> None:
    """Q8: codes, scales and zero points of 16 and `bits` bits return the same values."""
    weight = search_grouped(torch.randn(7, 50) * 0.02, bits, 16)
    codes, scale, zero_point = stored(weight)

    def unpacked(raw: bytes, shape: torch.Size) -> torch.Tensor:
        array = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
        return unpack(array, bits, shape, signed=False)

    read = GroupedWeight(
        unpacked(codes, weight.codes.shape),
        torch.from_numpy(np.frombuffer(scale, np.float16).astype(np.float32)).reshape(7, 4),
        unpacked(zero_point, weight.zero_point.shape),
        bits,
        16,
    )
    torch.testing.assert_close(dequantize_grouped(read), dequantize_grouped(weight), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("EQ-3231", lambda: pack(torch.tensor([0]), 5, signed=False)),
        ("EQ-3231", lambda: unpack(torch.zeros(1, dtype=torch.uint8), 3, (1,), signed=False)),
        ("EQ-3231", lambda: weight_bytes(4, 4, 5, 2)),
        ("EQ-3225", lambda: weight_bytes(4, 4, 4, -1)),
        ("EQ-3232", lambda: pack(torch.tensor([16]), 4, signed=False)),
        ("EQ-3232", lambda: pack(torch.tensor([-1]), 4, signed=False)),
        ("EQ-3232", lambda: pack(torch.tensor([8]), 4, signed=True)),
        ("EQ-3232", lambda: pack(torch.tensor([1.0]), 4, signed=True)),
        ("EQ-3233", lambda: unpack(torch.zeros(2, dtype=torch.uint8), 4, (5,), signed=False)),
        ("EQ-3233", lambda: unpack(torch.zeros(2), 8, (2,), signed=False)),
    ],
)
def test_what_cannot_be_stored_is_refused(code: str, call: object) -> None:
    assert callable(call)
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code
