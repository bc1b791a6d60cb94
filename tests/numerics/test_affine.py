"""The reference of the quantizer is the ONNX operator, computed by onnx itself."""

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

from edgeqdm.numerics.affine import (
    MIN_SCALE,
    activation_max,
    dequantize_activation,
    quantize_activation,
    quantize_weight,
    weight_max,
)

Floats = NDArray[np.float32]

SCALES = st.floats(2.0**-60, 2.0**40, width=32)
ZERO_POINTS = st.integers(0, activation_max(8))
VALUES = hnp.arrays(np.float32, 32, elements=st.floats(-(2.0**100), 2.0**100, width=32))


def _evaluator() -> ReferenceEvaluator:
    floats, codes = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"]),
        onnx.helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["y"]),
    ]
    inputs = [
        onnx.helper.make_tensor_value_info("x", floats, [None]),
        onnx.helper.make_tensor_value_info("scale", floats, []),
        onnx.helper.make_tensor_value_info("zero_point", codes, []),
    ]
    outputs = [
        onnx.helper.make_tensor_value_info("codes", codes, [None]),
        onnx.helper.make_tensor_value_info("y", floats, [None]),
    ]
    graph = onnx.helper.make_graph(nodes, "affine", inputs, outputs)
    opset = [onnx.helper.make_opsetid("", 21)]
    return ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opset))


EVALUATOR = _evaluator()


def onnx_affine(x: Floats, scale: float, zero_point: int) -> tuple[NDArray[np.uint8], Floats]:
    # The reference casts before it clips and warns about values beyond int32.
    with np.errstate(over="ignore", invalid="ignore"):
        codes, y = EVALUATOR.run(
            None, {"x": x, "scale": np.float32(scale), "zero_point": np.uint8(zero_point)}
        )
    return np.asarray(codes), np.asarray(y)


def affine(x: Floats, scale: float, zero_point: int) -> tuple[Floats, Floats]:
    s = torch.tensor(scale)
    codes = quantize_activation(torch.from_numpy(x), s, zero_point)
    return codes.numpy(), dequantize_activation(codes, s, zero_point).numpy()


@given(x=VALUES, scale=SCALES, zero_point=ZERO_POINTS)
def test_codes_and_values_equal_onnx_quantize_and_dequantize_linear(
    x: Floats, scale: float, zero_point: int
) -> None:
    # Beyond int32 the reference's own cast is undefined; the codes there are tested below.
    x = np.clip(x, -(2.0**30) * scale, 2.0**30 * scale).astype(np.float32)
    codes, y = affine(x, scale, zero_point)
    expected_codes, expected_y = onnx_affine(x, scale, zero_point)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(y, expected_y)


@given(exponent=st.integers(-20, 20), zero_point=ZERO_POINTS)
def test_half_ties_go_to_the_even_neighbour_like_onnx(exponent: int, zero_point: int) -> None:
    scale = 2.0**exponent
    ties = ((np.arange(-300, 300) + 0.5) * scale).astype(np.float32)
    codes, _ = affine(ties, scale, zero_point)
    np.testing.assert_array_equal(codes, onnx_affine(ties, scale, zero_point)[0])
    inside = (codes > 0) & (codes < activation_max(8))
    assert np.all((codes[inside] - zero_point) % 2 == 0)


@given(x=VALUES, scale=SCALES, zero_point=ZERO_POINTS)
def test_codes_are_integers_in_range_and_clip_to_the_nearest_end(
    x: Floats, scale: float, zero_point: int
) -> None:
    codes, _ = affine(x, scale, zero_point)
    assert np.all((codes >= 0) & (codes <= activation_max(8)) & (codes == np.rint(codes)))
    quotient = x.astype(np.float64) / scale + zero_point
    assert np.all(codes[quotient < -1] == 0)
    assert np.all(codes[quotient > activation_max(8) + 1] == activation_max(8))


@given(x=VALUES, scale=SCALES, zero_point=ZERO_POINTS)
def test_error_is_at_most_half_a_scale_where_nothing_clips(
    x: Floats, scale: float, zero_point: int
) -> None:
    low, high = -zero_point * scale, (activation_max(8) - zero_point) * scale
    x = np.clip(x, low, high).astype(np.float32)
    _, y = affine(x, scale, zero_point)
    # Half a code, and the float32 rounding of a quotient and a product of at most 255 codes.
    slack = 2 * activation_max(8) * np.finfo(np.float32).eps
    assert np.all(np.abs(y.astype(np.float64) - x) <= (0.5 + slack) * scale)


@given(codes=hnp.arrays(np.uint8, 16), scale=SCALES, zero_point=ZERO_POINTS)
def test_every_code_survives_a_round_trip(
    codes: NDArray[np.uint8], scale: float, zero_point: int
) -> None:
    s = torch.tensor(scale)
    given_codes = torch.from_numpy(codes.astype(np.float32))
    values = dequantize_activation(given_codes, s, zero_point)
    assert torch.equal(quantize_activation(values, s, zero_point), given_codes)


@given(zero_point=ZERO_POINTS, scale=SCALES)
def test_zero_is_exact_for_every_zero_point(zero_point: int, scale: float) -> None:
    codes, y = affine(np.zeros(3, np.float32), scale, zero_point)
    assert np.all(codes == zero_point)
    assert np.all(y == 0)


def test_smallest_scale_keeps_every_code_finite() -> None:
    x = np.array([0.0, 1e-45, -1e-45, 1e-20, 3e38, -3e38], np.float32)
    codes, y = affine(x, MIN_SCALE, 128)
    np.testing.assert_array_equal(codes, [128, 128, 128, 128, 255, 0])
    assert np.all(np.isfinite(y))
    assert np.isfinite(np.float32(1) / np.float32(MIN_SCALE))


@given(
    weight=hnp.arrays(np.float32, (4, 6), elements=st.floats(-1e6, 1e6, width=32)),
    scale=hnp.arrays(np.float32, 4, elements=st.floats(2.0**-20, 2.0**20, width=32)),
)
def test_weight_codes_equal_an_integer_reference_per_output_channel(
    weight: Floats, scale: Floats
) -> None:
    found = quantize_weight(torch.from_numpy(weight), torch.from_numpy(scale))
    assert found.dtype == torch.int8
    expected = np.clip(np.rint(weight / scale[:, None]), -weight_max(8), weight_max(8)).astype(
        np.int8
    )
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 1, 4), (3, 1, 3, 3)])
def test_weight_scale_is_taken_along_the_first_axis_of_any_shape(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape) * torch.tensor([1.0, 2.0, 4.0]).reshape(-1, *[1] * (len(shape) - 1))
    codes = quantize_weight(weight, torch.tensor([1.0, 2.0, 4.0]))
    assert codes.shape == shape
    assert bool((codes == 1).all())


def onnx_codes_of_4_bits(x: Floats, scale: float, zero_point: int) -> Floats:
    """`QuantizeLinear` to uint4, by onnx itself."""
    kinds = onnx.TensorProto
    held = [
        onnx.helper.make_tensor("scale", kinds.FLOAT, [], [scale]),
        onnx.helper.make_tensor("zero_point", kinds.UINT4, [], [zero_point]),
    ]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"]),
        onnx.helper.make_node("Cast", ["codes"], ["wide"], to=kinds.FLOAT),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "affine4",
        [onnx.helper.make_tensor_value_info("x", kinds.FLOAT, [None])],
        [onnx.helper.make_tensor_value_info("wide", kinds.FLOAT, [None])],
        held,
    )
    opset = [onnx.helper.make_opsetid("", 21)]
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opset))
    return np.asarray(evaluator.run(None, {"x": x})[0])


@pytest.mark.parametrize("zero_point", [0, 5, 8, 15])
def test_codes_of_4_bits_equal_onnx_quantize_linear(zero_point: int) -> None:
    x = np.concatenate([np.linspace(-9, 9, 301), np.arange(-20, 20) + 0.5]).astype(np.float32)
    codes = quantize_activation(torch.from_numpy(x), torch.tensor(0.5), zero_point, 4)
    np.testing.assert_array_equal(codes.numpy(), onnx_codes_of_4_bits(x, 0.5, zero_point))
    assert set(codes.tolist()) == set(range(16))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_weight_codes_are_symmetric_and_leave_out_the_lowest(bits: int) -> None:
    weight = torch.tensor([[-1e6, -3.4, -0.5, 0.5, 1.5, 2.4, 1e6]])
    codes = quantize_weight(weight, torch.ones(1), bits)
    limit = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[-limit, -3, 0, 0, 2, 2, limit]]


@pytest.mark.parametrize(("bits", "activation", "weight"), [(4, 15, 7), (6, 63, 31), (8, 255, 127)])
def test_largest_codes_of_a_width(bits: int, activation: int, weight: int) -> None:
    assert (activation_max(bits), weight_max(bits)) == (activation, weight)
