"""The eager ops are the reference of every backend, so they are held to exact integers here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeqdm.quantize import ops
from edgeqdm.quantize.ops import (
    FLOAT32_EXACT,
    at_step,
    dequantize,
    qconv2d,
    qlinear,
    qlinear_dynamic,
    qlinear_grouped,
)

Int64 = NDArray[np.int64]
STEP = torch.tensor(1)
ONE = torch.ones(1)
TABLE = torch.tensor([0.5, 0.0312, 0.007])


@dataclass(frozen=True)
class Geometry:
    """A convolution's free choices."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


GEOMETRIES = [
    Geometry(),
    Geometry(padding=(1, 1)),
    Geometry(stride=(2, 2), padding=(1, 1)),
    Geometry(stride=(1, 2), padding=(0, 2)),
    Geometry(padding=(2, 2), dilation=(2, 2)),
    Geometry(stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
    Geometry(padding=(1, 1), groups=4),
]


def codes_of(x: Tensor, scale: float, zero_point: int) -> Int64:
    """Independent of the product: NumPy, integers, zero_point already subtracted."""
    quotient = np.rint(x.numpy() / np.float32(scale)).astype(np.int64) + zero_point
    return np.clip(quotient, 0, 255) - zero_point


def random_weight(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def reference_convolution(codes: Int64, weight: Int64, geometry: Geometry) -> Int64:
    """Sum over the kernel, one tap at a time, in int64."""
    (sh, sw), (ph, pw), (dh, dw) = geometry.stride, geometry.padding, geometry.dilation
    padded = np.pad(codes, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    kh, kw = weight.shape[2:]
    height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    per_group, out_per_group = weight.shape[1], weight.shape[0] // geometry.groups
    found = np.zeros((codes.shape[0], weight.shape[0], height, width), np.int64)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + (height - 1) * sh + 1, sh)
            columns = slice(j * dw, j * dw + (width - 1) * sw + 1, sw)
            tap = padded[:, :, rows, columns]
            for group in range(geometry.groups):
                fed = tap[:, group * per_group : (group + 1) * per_group]
                mine = slice(group * out_per_group, (group + 1) * out_per_group)
                found[:, mine] += np.einsum("bchw,oc->bohw", fed, weight[mine, :, i, j])
    return found


def convolve(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    *,
    weight_scale: Tensor,
    zero_point: int,
    out_scale: Tensor,
    out_zero_point: int = 128,
    bias: Tensor | None = None,
    table: Tensor = TABLE,
    activation_bits: int = 8,
) -> Tensor:
    found: Tensor = qconv2d(
        x,
        weight,
        weight_scale,
        bias,
        table,
        zero_point,
        activation_bits,
        out_scale,
        out_zero_point,
        STEP,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
    )
    return found


@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
@pytest.mark.parametrize("n_inputs", [5, 64, 4096])
def test_linear_accumulates_exactly(zero_point: int, n_inputs: int) -> None:
    x, weight = 3 * torch.randn(2, 3, n_inputs), random_weight(6, n_inputs)
    unit = 1 / float(TABLE[1])
    # The scales cancel to 1, so the output is the accumulator itself, rounded once to float32.
    found = qlinear(x, weight, torch.full((6,), unit), None, TABLE, zero_point, 8, STEP)
    expected = codes_of(x, float(TABLE[1]), zero_point) @ weight.numpy().astype(np.int64).T
    product = np.float32(TABLE[1].numpy() * np.float32(unit))
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32) * product)


@given(
    zero_point=st.integers(0, 255),
    n_inputs=st.integers(1, 40),
    n_outputs=st.integers(1, 9),
    step=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_linear_equals_scaled_integers_plus_bias(
    zero_point: int, n_inputs: int, n_outputs: int, step: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight = 3 * torch.randn(4, n_inputs), random_weight(n_outputs, n_inputs)
    weight_scale, bias = torch.rand(n_outputs) + 1e-3, torch.randn(n_outputs)
    found = qlinear(x, weight, weight_scale, bias, TABLE, zero_point, 8, torch.tensor(step))
    codes = codes_of(x, float(TABLE[step]), zero_point)
    accumulator = (codes @ weight.numpy().astype(np.int64).T).astype(np.float32)
    expected = accumulator * (TABLE[step] * weight_scale).numpy() + bias.numpy()
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("zero_point", [0, 3, 128, 255])
def test_convolution_accumulates_exactly(geometry: Geometry, zero_point: int) -> None:
    x = 3 * torch.randn(2, 4, 9, 8)
    weight = random_weight(8, 4 // geometry.groups, 3, 3)
    accumulator = reference_convolution(
        codes_of(x, float(TABLE[1]), zero_point), weight.numpy().astype(np.int64), geometry
    )
    weight_scale, out_scale = torch.rand(8) * 0.01 + 1e-3, torch.tensor([1.0, 0.3, 1.0])
    found = convolve(
        x,
        weight,
        geometry,
        weight_scale=weight_scale,
        zero_point=zero_point,
        out_scale=out_scale,
        out_zero_point=100,
    )
    multiplier = (TABLE[1] * weight_scale / out_scale[1]).numpy()[:, None, None]
    rounded = np.clip(np.rint(accumulator.astype(np.float32) * multiplier), -100, 155)
    np.testing.assert_array_equal(found.numpy(), rounded * out_scale[1].numpy())


def test_convolution_bias_is_added_after_the_output_is_rounded() -> None:
    x, weight, bias = torch.randn(1, 4, 5, 5), random_weight(3, 4, 1, 1), torch.randn(3)
    run = partial(
        convolve,
        x,
        weight,
        Geometry(),
        weight_scale=torch.full((3,), 0.01),
        zero_point=128,
        out_scale=torch.full((3,), 0.25),
    )
    plain, biased = run(), run(bias=bias)
    assert torch.equal(biased, plain + bias[:, None, None])
    assert bool((plain / 0.25 == (plain / 0.25).round()).all())


@pytest.mark.parametrize("out_zero_point", [0, 128, 255])
def test_convolution_output_clips_to_256_codes(out_zero_point: int) -> None:
    x, weight = 100 * torch.randn(1, 4, 8, 8), random_weight(3, 4, 3, 3)
    found = convolve(
        x,
        weight,
        Geometry(),
        weight_scale=torch.ones(3),
        zero_point=128,
        out_scale=torch.ones(3),
        out_zero_point=out_zero_point,
    )
    assert float(found.min()) == -out_zero_point
    assert float(found.max()) == 255 - out_zero_point


def test_both_carriers_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 64), random_weight(8, 64)
    image, kernel = torch.randn(2, 4, 6, 6), random_weight(8, 4, 3, 3)
    image_scale, out_scale = torch.rand(8), torch.full((3,), 0.5)

    def outputs() -> tuple[Tensor, Tensor]:
        linear = qlinear(x, weight, torch.full((8,), 0.01), None, TABLE, 9, 8, STEP)
        convolved = convolve(
            image,
            kernel,
            Geometry(),
            weight_scale=image_scale,
            zero_point=9,
            out_scale=out_scale,
        )
        return linear, convolved

    in_float32 = outputs()
    monkeypatch.setattr(ops, "FLOAT32_EXACT", 0)
    in_float64 = outputs()
    assert torch.equal(in_float32[0], in_float64[0])
    assert torch.equal(in_float32[1], in_float64[1])


def test_sums_beyond_float32_are_carried_exactly() -> None:
    n_inputs = 4 * FLOAT32_EXACT // (255 * 127)
    weight = torch.full((1, n_inputs), 127, dtype=torch.int8)
    x = torch.full((1, n_inputs), 255.0)
    x[0, -1] = 254.0
    found = qlinear(x, weight, ONE, None, ONE, 0, 8, torch.tensor(0))
    exact = 127 * (255 * n_inputs - 1)
    assert exact > FLOAT32_EXACT
    assert float(found) == float(np.float32(exact))


def test_every_step_reads_its_own_row() -> None:
    x, weight, unit = torch.randn(2, 4), random_weight(3, 4), torch.ones(3)
    found = [qlinear(x, weight, unit, None, TABLE, 128, 8, torch.tensor(i)) for i in range(3)]
    alone = [qlinear(x, weight, unit, None, TABLE[i : i + 1], 128, 8, STEP) for i in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert not torch.equal(found[0], found[1])


def test_table_of_one_row_serves_every_step() -> None:
    assert all(float(at_step(ONE, torch.tensor(i))) == 1.0 for i in (0, 1, 7))
    x, weight = torch.randn(1, 2, 4, 4), random_weight(3, 2, 3, 3)
    found = convolve(
        x,
        weight,
        Geometry(),
        weight_scale=torch.rand(3),
        zero_point=128,
        out_scale=ONE,
        table=ONE,
    )
    assert found.shape == (1, 3, 2, 2)


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, -2.0, 3.0])], ids=["plain", "bias"])
def test_linear_passes_the_checks_of_custom_ops(bias: Tensor | None) -> None:
    arguments = (torch.randn(2, 5, 4), random_weight(3, 4), torch.rand(3), bias, TABLE, 12, 8, STEP)
    assert set(torch.library.opcheck(qlinear, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("geometry", GEOMETRIES[2:6:3], ids=str)
def test_convolution_passes_the_checks_of_custom_ops(geometry: Geometry) -> None:
    arguments = (
        torch.randn(2, 4, 9, 8),
        random_weight(8, 4 // geometry.groups, 3, 3),
        torch.rand(8),
        torch.randn(8),
        TABLE,
        12,
        8,
        TABLE,
        100,
        STEP,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        geometry.groups,
    )
    assert set(torch.library.opcheck(qconv2d, arguments).values()) == {"SUCCESS"}


def codes_of_4_bits(x: Tensor, scale: float, zero_point: int) -> Int64:
    quotient = np.rint(x.numpy() / np.float32(scale)).astype(np.int64) + zero_point
    return np.clip(quotient, 0, 15) - zero_point


@pytest.mark.parametrize("zero_point", [0, 6, 15])
def test_linear_on_4_bit_activations_is_exact(zero_point: int) -> None:
    x, weight = 0.2 * torch.randn(3, 5, 70), random_weight(6, 70)
    weight_scale, bias = torch.rand(6) + 1e-3, torch.randn(6)
    found = qlinear(x, weight, weight_scale, bias, TABLE, zero_point, 4, STEP)
    accumulator = codes_of_4_bits(x, float(TABLE[1]), zero_point) @ int64(weight).T
    expected = accumulator.astype(np.float32) * (TABLE[1] * weight_scale).numpy() + bias.numpy()
    np.testing.assert_array_equal(found.numpy(), expected)


def test_convolution_on_4_bit_activations_is_exact_and_still_returns_8_bits() -> None:
    x, weight, geometry = 0.2 * torch.randn(2, 4, 7, 6), random_weight(5, 4, 3, 3), GEOMETRIES[2]
    accumulator = reference_convolution(
        codes_of_4_bits(x, float(TABLE[1]), 9), int64(weight), geometry
    )
    weight_scale, out_scale = torch.rand(5) * 0.1 + 1e-3, torch.tensor([1.0, 0.3, 1.0])
    found = convolve(
        x,
        weight,
        geometry,
        weight_scale=weight_scale,
        zero_point=9,
        out_scale=out_scale,
        out_zero_point=100,
        activation_bits=4,
    )
    multiplier = (TABLE[1] * weight_scale / out_scale[1]).numpy()[:, None, None]
    rounded = np.clip(np.rint(accumulator.astype(np.float32) * multiplier), -100, 155)
    np.testing.assert_array_equal(found.numpy(), rounded * out_scale[1].numpy())
    assert len(np.unique(rounded)) > 16


def int64(codes: Tensor) -> Int64:
    return codes.numpy().astype(np.int64)


def random_groups(rows: int, width: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes [N, K], scales exact in float16 [N, G] and zero points [N, G]."""
    groups = -(-width // group_size)
    codes = torch.randint(0, 256, (rows, width), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) * 0.01 + 1e-3).to(torch.float16).to(torch.float32)
    return codes, scale, torch.randint(0, 256, (rows, groups), dtype=torch.uint8)


def reference_grouped(
    codes: Int64,
    activation_scale: NDArray[np.float32],
    weight: tuple[Tensor, Tensor, Tensor],
    n: int,
) -> NDArray[np.float32]:
    """Group after group: int64 inside, float32 between them, in the order of the channels."""
    weight_q, weight_scale, zero_point = weight
    width, y = weight_q.shape[1], np.zeros((*codes.shape[:-1], len(weight_q)), np.float32)
    for g, start in enumerate(range(0, width, n)):
        part = slice(start, start + n)
        centred = int64(weight_q)[:, part] - int64(zero_point)[:, g : g + 1]
        accumulator = (codes[..., part] @ centred.T).astype(np.float32)
        of_group = activation_scale[..., g : g + 1] if activation_scale.ndim else activation_scale
        y += accumulator * (of_group * weight_scale.numpy()[:, g])
    return y


@pytest.mark.parametrize(("activation_bits", "zero_point"), [(8, 0), (8, 131), (8, 255), (4, 7)])
@pytest.mark.parametrize(("width", "group_size"), [(64, 32), (70, 16), (40, 128)])
def test_grouped_linear_equals_integers_rescaled_group_by_group(
    activation_bits: int, zero_point: int, width: int, group_size: int
) -> None:
    x, weight, bias = torch.randn(2, 3, width), random_groups(5, width, group_size), torch.randn(5)
    found = qlinear_grouped(x, *weight, bias, group_size, TABLE, zero_point, activation_bits, STEP)
    coded = codes_of if activation_bits == 8 else codes_of_4_bits
    codes = coded(x, float(TABLE[1]), zero_point)
    expected = reference_grouped(codes, TABLE[1].numpy(), weight, group_size) + bias.numpy()
    # Sums inside a group are exact; the two scales of a group may be multiplied in either order.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def symmetric_codes(x: Tensor, bits: int) -> tuple[Int64, NDArray[np.float32]]:
    """Of every row of the last axis: `round(x * (limit / peak))`, and `peak / limit` [..., 1]."""
    values, limit = x.numpy(), np.float32(2 ** (bits - 1) - 1)
    peak = np.abs(values).max(-1, keepdims=True)
    return np.rint(values * (limit / peak)).astype(np.int64), peak / limit


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_with_scales_per_token_equals_its_integers(bits: int, with_bias: bool) -> None:
    x = torch.randn(2, 7, 300) * torch.logspace(-4, 4, 7)[:, None]
    weight, weight_scale = random_weight(6, 300), torch.rand(6) + 1e-3
    bias = torch.randn(6) if with_bias else None
    found = qlinear_dynamic(x, weight, weight_scale, None, bias, 0, bits)
    codes, scale = symmetric_codes(x, bits)
    expected = (codes @ int64(weight).T).astype(np.float32) * weight_scale.numpy() * scale
    expected = expected if bias is None else expected + bias.numpy()
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "group_size"), [(96, 32), (70, 16)])
def test_linear_with_scales_per_token_and_group_equals_its_integers(
    bits: int, width: int, group_size: int
) -> None:
    x, weight, bias = torch.randn(2, 5, width), random_groups(6, width, group_size), torch.randn(6)
    found = qlinear_dynamic(x, *weight, bias, group_size, bits)
    parts = [symmetric_codes(part, bits) for part in x.split(group_size, -1)]
    codes = np.concatenate([c for c, _ in parts], -1)
    scale = np.concatenate([s for _, s in parts], -1)
    expected = reference_grouped(codes, scale, weight, group_size) + bias.numpy()
    # As above: the order of two float32 products is free.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_scales_of_a_token_do_not_depend_on_other_tokens() -> None:
    x, weight = torch.randn(4, 64), random_weight(6, 64)
    louder = torch.cat([x[:2], 1e3 * x[2:]])
    unit = torch.ones(6)
    found = qlinear_dynamic(louder, weight, unit, None, None, 0, 8)
    assert torch.equal(found[:2], qlinear_dynamic(x, weight, unit, None, None, 0, 8)[:2])


def test_tokens_of_zeros_give_the_bias() -> None:
    bias, zeros = torch.randn(6), torch.zeros(2, 64)
    plain = qlinear_dynamic(zeros, random_weight(6, 64), torch.ones(6), None, bias, 0, 8)
    grouped = qlinear_dynamic(zeros, *random_groups(6, 64, 16), bias, 16, 8)
    assert torch.equal(plain, bias.expand(2, 6))
    assert torch.equal(grouped, bias.expand(2, 6))


@pytest.mark.parametrize("shape", [(6, 20), (6, 4, 3, 3), (6, 1, 3, 1)])
def test_dequantized_weight_is_codes_times_the_scale_of_its_channel(shape: tuple[int, ...]) -> None:
    codes, scale = random_weight(*shape), torch.rand(6)
    found = dequantize(codes, scale, None, 0)
    for channel in range(6):
        assert torch.equal(found[channel], codes[channel].float() * scale[channel])


def test_dequantized_groups_are_shifted_by_their_zero_point_and_scaled() -> None:
    codes, scale, zero_point = random_groups(5, 70, 16)
    found = dequantize(codes, scale, zero_point, 16).numpy()
    for k in range(70):
        shifted = int64(codes)[:, k] - int64(zero_point)[:, k // 16]
        np.testing.assert_array_equal(
            found[:, k], shifted.astype(np.float32) * scale[:, k // 16].numpy()
        )


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every further op with arguments it takes."""
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(2, 3, 40, generator=generator), torch.ones(5)
    codes = torch.randint(0, 16, (5, 40), dtype=torch.uint8, generator=generator)
    groups = (codes, torch.ones(5, 3), torch.full((5, 3), 8, dtype=torch.uint8))
    plain = (codes.to(torch.int8), torch.ones(5), None)
    return {
        "grouped": (qlinear_grouped, (x, *groups, bias, 16, TABLE, 12, 8, STEP)),
        "per token": (qlinear_dynamic, (x, *plain, bias, 0, 8)),
        "per token and group": (qlinear_dynamic, (x, *groups, None, 16, 8)),
        "dequantize": (dequantize, (*plain, 0)),
        "dequantize groups": (dequantize, (*groups, 16)),
    }


@pytest.mark.parametrize("name", cases())
def test_further_ops_pass_the_checks_of_custom_ops(name: str) -> None:
    op, arguments = cases()[name]
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("step", [0, 1, 2])
def test_requantization_reproduces_fake_quantization_within_one_code(step: int) -> None:
    """T9: one multiplier per step and channel stands for the scales of input, weight and output."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, 4, 6, 6, generator=generator)
    weight = torch.randint(-127, 128, (5, 4, 3, 3), generator=generator).to(torch.int8)
    weight_scale = torch.rand(5, generator=generator) * 0.01 + 1e-3
    scale, out_scale = torch.tensor([0.05, 0.03, 0.02]), torch.tensor([0.2, 0.1, 0.05])
    found = qconv2d(
        x,
        weight,
        weight_scale,
        None,
        scale,
        128,
        8,
        out_scale,
        128,
        torch.tensor(step),
        (1, 1),
        (1, 1),
        (1, 1),
        1,
    )
    codes = torch.clamp(torch.round(x / scale[step]), -128, 127)
    real = weight.double() * weight_scale.double()[:, None, None, None]
    fake = nn.functional.conv2d(codes.double() * scale[step].double(), real, padding=1)
    expected = torch.clamp(torch.round(fake / out_scale[step].double()), -128, 127)
    difference = (found.double() / out_scale[step].double()).round() - expected
    assert float(difference.abs().max()) <= 1
    # Only sums that lie on a half differ at all.
    assert float((difference != 0).double().mean()) < 0.01
