"""The references are plain loops, exact integers and ONNX's own blocked quantization."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch.nn import functional as F

from edgeqdm.errors import InputError
from edgeqdm.numerics.dynamic import quantize_per_token, quantize_per_token_group
from edgeqdm.numerics.grouping import (
    LOSS_POWER,
    MIN_GROUP_SCALE,
    GroupedWeight,
    dequantize_grouped,
    grouped_matmul,
    grouped_minmax,
    grouped_view,
    n_groups,
    round_grouped,
    search_grouped,
)

BITS = st.sampled_from([4, 6, 8])
GROUP_SIZES = st.integers(1, 12)
WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=10),
    elements=st.floats(-100, 100, width=32),
)
# Codes are taken from float32 quotients of up to 255: one unit in the last place of them.
HALF_A_SCALE = 0.5 + 255 * 2.0**-23


def spread(group_size: int, scale: Tensor, width: int) -> Tensor:
    """[N, G] as [N, K], one entry per weight."""
    return scale.repeat_interleave(group_size, dim=1)[:, :width]


def errors_in_scales(weight: Tensor, grouped: GroupedWeight) -> Tensor:
    scale = spread(grouped.group_size, grouped.scale, weight.shape[1])
    return (dequantize_grouped(grouped) - weight).abs() / scale


def group_losses(weight: Tensor, grouped: GroupedWeight) -> Tensor:
    error = dequantize_grouped(grouped) - weight
    return grouped_view(error, grouped.group_size).abs().pow(LOSS_POWER).sum(-1)


def random_grouped(bits: int, shape: tuple[int, int], group_size: int) -> GroupedWeight:
    groups = n_groups(shape[1], group_size)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    zero_point = torch.randint(0, 2**bits, (shape[0], groups), dtype=torch.uint8)
    scale = torch.rand(shape[0], groups) + 0.01
    return GroupedWeight(codes, scale, zero_point, bits, group_size)


def onnx_blocked(operator: str, inputs: dict[str, NDArray[np.generic]], g: int) -> Tensor:
    node = onnx.helper.make_node(operator, list(inputs), ["y"], axis=1, block_size=g)
    types = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.uint8): 2}
    fed = [
        onnx.helper.make_tensor_value_info(name, types[array.dtype], array.shape)
        for name, array in inputs.items()
    ]
    returned = onnx.TensorProto.UINT8 if operator == "QuantizeLinear" else onnx.TensorProto.FLOAT
    out = onnx.helper.make_tensor_value_info("y", returned, None)
    graph = onnx.helper.make_graph([node], "blocked", fed, [out])
    opset = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opset)
    return torch.from_numpy(np.asarray(ReferenceEvaluator(model).run(None, inputs)[0]))


def test_codes_and_values_are_those_of_onnx_blocked_quantization() -> None:
    weight = torch.randn(6, 96)
    found = search_grouped(weight, 8, 32)
    tables = {"scale": found.scale.numpy(), "zero_point": found.zero_point.numpy()}
    codes = onnx_blocked("QuantizeLinear", {"x": weight.numpy(), **tables}, 32)
    torch.testing.assert_close(found.codes, codes, rtol=0, atol=0)
    real = onnx_blocked("DequantizeLinear", {"x": found.codes.numpy(), **tables}, 32)
    torch.testing.assert_close(dequantize_grouped(found), real, rtol=0, atol=0)


@given(weight=WEIGHTS, bits=BITS, group_size=GROUP_SIZES)
def test_min_max_is_a_loop_over_rows_and_groups(
    weight: NDArray[np.float32], bits: int, group_size: int
) -> None:
    """Q1: the ragged last group is one like all others."""
    found = grouped_minmax(torch.from_numpy(weight), bits, group_size)
    top = 2**bits - 1
    for row in range(weight.shape[0]):
        for group, start in enumerate(range(0, weight.shape[1], group_size)):
            w = weight[row, start : start + group_size]
            low, high = min(w.min(), np.float32(0)), max(w.max(), np.float32(0))
            needed = np.float32(high - low) / np.float32(top)
            scale = np.float16(max(needed, np.float32(MIN_GROUP_SCALE)))
            if scale < needed:
                scale = np.nextafter(scale, np.float16(np.inf))
            wide = np.float32(scale)
            zero_point = np.clip(np.rint(-low / wide), 0, top)
            codes = np.clip(np.rint(w / wide) + zero_point, 0, top)
            assert float(found.scale[row, group]) == wide
            assert int(found.zero_point[row, group]) == zero_point
            assert found.codes[row, start : start + group_size].tolist() == codes.tolist()


@given(weight=WEIGHTS, bits=BITS, group_size=GROUP_SIZES)
def test_no_min_max_error_exceeds_half_a_scale(
    weight: NDArray[np.float32], bits: int, group_size: int
) -> None:
    """Q1, Q2: elementwise, for every width and group size."""
    w = torch.from_numpy(weight)
    assert float(errors_in_scales(w, grouped_minmax(w, bits, group_size)).max()) <= HALF_A_SCALE


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group_size", [1, 3, 8])
@pytest.mark.parametrize(
    "weight",
    [
        torch.linspace(10, 11, 16)[None],
        -torch.linspace(10, 11, 16)[None],
        torch.full((2, 16), 3.0),
        torch.full((2, 16), -3.0),
        torch.zeros(2, 16),
        torch.tensor([[0.0] * 15 + [1e4]]),
    ],
    ids=["positive", "negative", "constant", "negative constant", "zeros", "outlier"],
)
def test_one_sided_and_constant_groups_are_reconstructed(
    weight: Tensor, group_size: int, bits: int
) -> None:
    """Q1: in groups of one, too."""
    plain = grouped_minmax(weight, bits, group_size)
    assert float(errors_in_scales(weight, plain).max()) <= HALF_A_SCALE
    for found in (plain, search_grouped(weight, bits, group_size)):
        # Half a scale is 3.4 % of a range of 15 scales; the search may give up a little more.
        torch.testing.assert_close(dequantize_grouped(found), weight, rtol=0.05, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_range_without_zero_would_lose_one_sided_groups(bits: int) -> None:
    """Q1: the published formula leaves 0 outside the range and returns about 1 for 10."""
    weight, top = torch.linspace(10, 11, 16)[None], 2**bits - 1
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / top
    zero_point = torch.round(-low / scale).clamp(0, top)
    codes = (torch.round(weight / scale) + zero_point).clamp(0, top)
    published = (codes - zero_point) * scale
    assert float(published.max()) < 1.1
    # Half of a scale that is a fifteenth of 11, at most.
    ours = dequantize_grouped(grouped_minmax(weight, bits, 16))
    assert float((ours - weight).abs().max()) < 0.4 < float((published - weight).abs().min())


@given(weight=WEIGHTS, bits=BITS, group_size=GROUP_SIZES)
def test_zero_is_exact_in_every_group(
    weight: NDArray[np.float32], bits: int, group_size: int
) -> None:
    """Q1: 0 lies inside every range, so its code needs no clamp."""
    w = torch.from_numpy(weight)
    w[:, ::2] = 0
    for found in (grouped_minmax(w, bits, group_size), search_grouped(w, bits, group_size)):
        assert bool((dequantize_grouped(found)[:, ::2] == 0).all())
        assert int(found.codes.max()) < 2**bits


@given(weight=WEIGHTS, bits=BITS, group_size=GROUP_SIZES)
def test_search_loses_no_more_than_min_max_in_any_group(
    weight: NDArray[np.float32], bits: int, group_size: int
) -> None:
    w = torch.from_numpy(weight)
    searched = group_losses(w, search_grouped(w, bits, group_size))
    plain = group_losses(w, grouped_minmax(w, bits, group_size))
    # Padded and unpadded sums of up to 12 powers may differ in their last bits.
    assert bool((searched <= plain * (1 + 1e-5)).all())


@pytest.mark.parametrize(("bits", "ratio"), [(4, 0.93), (6, 0.98), (8, 0.99)])
def test_search_lowers_the_squared_error_of_normal_weights(bits: int, ratio: float) -> None:
    w = torch.randn(64, 512)
    searched = (dequantize_grouped(search_grouped(w, bits, 64)) - w).square().mean()
    plain = (dequantize_grouped(grouped_minmax(w, bits, 64)) - w).square().mean()
    assert float(searched) < ratio * float(plain)


@given(weight=WEIGHTS, bits=BITS, group_size=GROUP_SIZES)
def test_scales_are_float16_numbers(
    weight: NDArray[np.float32], bits: int, group_size: int
) -> None:
    """Q8: stored in 16 bits they are the scales the codes were taken with."""
    found = search_grouped(torch.from_numpy(weight), bits, group_size)
    assert found.scale.dtype == torch.float32
    stored = found.scale.to(torch.float16)
    torch.testing.assert_close(stored.to(torch.float32), found.scale, rtol=0, atol=0)
    assert float(found.scale.min()) >= MIN_GROUP_SCALE


@given(weight=WEIGHTS, bits=BITS, group_size=st.sampled_from([1, 2, 3, 4]))
def test_halving_the_group_never_raises_the_error_bound(
    weight: NDArray[np.float32], bits: int, group_size: int
) -> None:
    """Q2: of nested groups; the squared error may rise."""
    w = torch.from_numpy(weight)
    fine, coarse = (grouped_minmax(w, bits, g).scale for g in (group_size, 2 * group_size))
    assert bool((fine <= spread(2, coarse, fine.shape[1])).all())


@given(weight=WEIGHTS, bits=BITS, extra=st.integers(0, 5))
def test_one_group_per_row_is_a_group_as_wide_as_the_row(
    weight: NDArray[np.float32], bits: int, extra: int
) -> None:
    """Q1: g = K, and every g beyond it."""
    w = torch.from_numpy(weight)
    row, wider = (search_grouped(w, bits, w.shape[1] + more) for more in (0, extra))
    assert row.scale.shape == (w.shape[0], 1)
    torch.testing.assert_close(row.codes, wider.codes, rtol=0, atol=0)
    torch.testing.assert_close(row.scale, wider.scale, rtol=0, atol=0)


@given(bits=BITS, group_size=st.sampled_from([3, 4, 16]))
def test_permuted_rows_are_coded_alike(bits: int, group_size: int) -> None:
    """Q3."""
    w, order = torch.randn(9, 16), torch.randperm(9)
    there, back = search_grouped(w, bits, group_size), search_grouped(w[order], bits, group_size)
    torch.testing.assert_close(there.codes[order], back.codes, rtol=0, atol=0)
    torch.testing.assert_close(there.scale[order], back.scale, rtol=0, atol=0)
    torch.testing.assert_close(there.zero_point[order], back.zero_point, rtol=0, atol=0)


@given(bits=BITS, group=st.integers(0, 3), factor=st.floats(0.1, 10))
def test_scaling_a_group_leaves_the_codes_of_the_others(
    bits: int, group: int, factor: float
) -> None:
    """Q3."""
    w = torch.randn(5, 30)
    scaled, inside = w.clone(), slice(8 * group, 8 * group + 8)
    scaled[:, inside] *= factor
    one, other = search_grouped(w, bits, 8), search_grouped(scaled, bits, 8)
    outside = torch.ones(30, dtype=torch.bool)
    outside[inside] = False
    torch.testing.assert_close(one.codes[:, outside], other.codes[:, outside], rtol=0, atol=0)


def test_rows_searched_apart_are_searched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(7, 20)
    whole = search_grouped(w, 4, 8)
    monkeypatch.setattr("edgeqdm.numerics.grouping.SEARCH_ELEMENTS", 50)
    parts = search_grouped(w, 4, 8)
    torch.testing.assert_close(whole.codes, parts.codes, rtol=0, atol=0)


def test_weights_below_the_smallest_scale_become_zero() -> None:
    found = search_grouped(torch.full((2, 8), 1e-9), 4, 8)
    assert bool((dequantize_grouped(found) == 0).all())


def test_rounding_its_own_values_returns_the_codes() -> None:
    found = random_grouped(6, (5, 21), 8)
    args = (found.scale, found.zero_point, 6, 8)
    torch.testing.assert_close(
        round_grouped(dequantize_grouped(found), *args), found.codes, rtol=0, atol=0
    )


def test_grouped_view_fills_the_last_group_with_zeros() -> None:
    assert grouped_view(torch.arange(1, 6), 3).tolist() == [[1, 2, 3], [4, 5, 0]]
    assert grouped_view(torch.ones(2, 3, 8), 4).shape == (2, 3, 2, 4)
    assert [n_groups(width, 4) for width in (1, 4, 5, 8)] == [1, 1, 2, 2]


def exact_product(codes: Tensor, scale: Tensor, weight: GroupedWeight) -> Tensor:
    """Integer sums in int64, scales in float64."""
    g, width = weight.group_size, weight.codes.shape[1]
    y = torch.zeros(codes.shape[0], weight.codes.shape[0], dtype=torch.float64)
    for k, start in enumerate(range(0, width, g)):
        part = slice(start, start + g)
        centred = weight.codes[:, part].long() - weight.zero_point[:, k, None].long()
        sums = codes[:, part].long() @ centred.T
        of_tokens = scale.expand(codes.shape[0], weight.scale.shape[1])[:, k, None].double()
        y += sums.double() * of_tokens * weight.scale[:, k].double()
    return y


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group_size", [7, 64, 256, 300, 2000])
@pytest.mark.parametrize("columns", ["scalar", "token", "group"])
def test_product_equals_exact_integer_sums(bits: int, group_size: int, columns: str) -> None:
    """Q8: groups up to 256 wide in float32, wider ones in float64."""
    weight = random_grouped(bits, (9, 1000), group_size)
    codes = torch.randint(-255, 256, (5, 1000)).float()
    shape = {"scalar": (), "token": (5, 1), "group": (5, weight.scale.shape[1])}[columns]
    scale = torch.rand(shape) + 0.1
    found, exact = grouped_matmul(codes, scale, weight), exact_product(codes, scale, weight)
    assert found.dtype == torch.float32
    # 143 terms added in float32, which cancel: relative to the largest, not to each.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


def test_largest_codes_of_a_group_in_float32_are_summed_exactly() -> None:
    """Q8: the far corner of the bound, 256 x 255 x 255 < 2^24."""
    codes, zeros = torch.full((1, 256), 255, dtype=torch.uint8), torch.zeros(1, 1).byte()
    weight = GroupedWeight(codes, torch.ones(1, 1), zeros, 8, 256)
    assert int(grouped_matmul(codes.float(), torch.tensor(1.0), weight)) == 256 * 255 * 255


def test_wide_groups_are_summed_exactly_beyond_float32() -> None:
    """Q8: sums near 1e8, where float32 knows only multiples of 8, are rounded once."""
    codes = torch.randint(200, 256, (32, 2000)).float()
    stored, zeros = torch.randint(200, 256, (32, 2000)).byte(), torch.zeros(32, 1).byte()
    weight = GroupedWeight(stored, torch.ones(32, 1), zeros, 8, 2000)
    found = grouped_matmul(codes, torch.tensor(1.0), weight)
    assert torch.equal(found, (codes.long() @ stored.long().T).float())


@pytest.mark.parametrize("group_size", [32, 64, 100])
def test_integer_product_equals_the_product_of_dequantized_values(group_size: int) -> None:
    """Q8: W4A8 and W8A8, per token and per token and group; leading axes are kept."""
    x, w = torch.randn(2, 3, 200), torch.randn(11, 200)
    for bits in (4, 8):
        weight = search_grouped(w, bits, group_size)
        codes, scale = quantize_per_token_group(x, group_size, 8)
        spread_scale = scale.repeat_interleave(group_size, -1)[..., :200]
        faked = F.linear(codes * spread_scale, dequantize_grouped(weight))
        # Both sides carry the same rounded values; only float32 arithmetic differs.
        scaled = {"rtol": 0.0, "atol": 1e-5 * float(faked.abs().max())}
        torch.testing.assert_close(grouped_matmul(codes, scale, weight), faked, **scaled)
        codes, scale = quantize_per_token(x, 8)
        faked = F.linear(codes * scale, dequantize_grouped(weight))
        torch.testing.assert_close(grouped_matmul(codes, scale, weight), faked, **scaled)


def test_result_of_a_token_does_not_depend_on_the_others() -> None:
    """Q4: nor does its product."""
    weight = random_grouped(4, (16, 100), 32)
    codes = torch.randint(-127, 128, (33, 100)).float()
    scale = torch.rand(33, 4)
    together = grouped_matmul(codes, scale, weight)
    alone = torch.cat([grouped_matmul(codes[i, None], scale[i, None], weight) for i in range(33)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("EQ-3225", lambda: n_groups(0, 4)),
        ("EQ-3225", lambda: grouped_minmax(torch.ones(2, 4), 4, 0)),
        ("EQ-3226", lambda: search_grouped(torch.ones(2, 4, 3, 3), 4, 4)),
        ("EQ-3226", lambda: search_grouped(torch.ones(0, 4), 4, 4)),
        (
            "EQ-3226",
            lambda: round_grouped(
                torch.ones(2, 4), torch.ones(2, 1), torch.ones(2, 1, dtype=torch.uint8), 4, 2
            ),
        ),
        (
            "EQ-3226",
            lambda: GroupedWeight(
                torch.ones(2, 4, dtype=torch.uint8), torch.ones(2, 2), torch.ones(2, 1), 4, 2
            ),
        ),
        ("EQ-3227", lambda: search_grouped(torch.ones(2, 4), 5, 4)),
        ("EQ-3227", lambda: grouped_minmax(torch.ones(2, 4), 16, 4)),
        ("EQ-3228", lambda: search_grouped(torch.full((2, 4), torch.nan), 4, 4)),
        ("EQ-3228", lambda: grouped_minmax(torch.full((2, 4), torch.inf), 4, 4)),
        ("EQ-3228", lambda: search_grouped(torch.full((2, 4), 1e9), 4, 4)),
        (
            "EQ-3229",
            lambda: grouped_matmul(
                torch.ones(3, 5), torch.tensor(1.0), random_grouped(4, (2, 4), 2)
            ),
        ),
        (
            "EQ-3229",
            lambda: grouped_matmul(
                torch.ones(3, 4), torch.ones(3, 4), random_grouped(4, (2, 4), 2)
            ),
        ),
    ],
)
def test_what_cannot_be_grouped_is_refused(code: str, call: object) -> None:
    assert callable(call)
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code
