"""The runtime's block-wise kernel computes what the grouped reference computes.

The kernel's activation codes, found by probing it with weights that pick single channels: per row
and block `round(x * (127 / peak))`, half to even, scale `peak / 127`; the same for one row and
many, for 4 and 8 bits, and for every block size.
"""

from __future__ import annotations

import platform
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import Tensor

from edgeqdm.backends.onnxruntime.blockwise import BLOCK_SIZES, to_matmulnbits
from edgeqdm.errors import InputError
from edgeqdm.numerics.dynamic import quantize_per_token_group
from edgeqdm.numerics.grouping import GroupedWeight, grouped_matmul, search_grouped

# Codes and integer sums are equal. The kernel adds the blocks in another order, and the zero points
# in a product of their own: measured at most 1e-6 of the largest output. One code that differed
# would be 5e-4 and more.
SUMMATION = 4e-6

pytestmark = [
    pytest.mark.usefixtures("exact_kernels"),
    pytest.mark.skipif(
        platform.machine().lower() not in ("x86_64", "amd64"),
        reason="kernels for Arm quantize the activation in another way",
    ),
]


def session(weight: GroupedWeight, bias: Tensor | None = None) -> ort.InferenceSession:
    rows, width = weight.codes.shape
    blocks, zero_points = to_matmulnbits(
        weight.codes.numpy(), weight.zero_point.numpy(), weight.bits, weight.group_size
    )
    held = {"B": blocks, "scales": weight.scale.numpy().reshape(-1), "zero_points": zero_points}
    inputs = ["x", *held]
    if bias is not None:
        held["bias"] = bias.numpy()
        inputs += ["", "bias"]
    node = helper.make_node(
        "MatMulNBits",
        inputs,
        ["y"],
        domain="com.microsoft",
        K=width,
        N=rows,
        bits=weight.bits,
        block_size=weight.group_size,
        accuracy_level=4,
    )
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "matmulnbits",
        [helper.make_tensor_value_info("x", floats, ["M", width])],
        [helper.make_tensor_value_info("y", floats, ["M", rows])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers)


def run(kernel: ort.InferenceSession, x: Tensor) -> Tensor:
    return torch.from_numpy(kernel.run(None, {"x": x.numpy()})[0])


def reference(x: Tensor, weight: GroupedWeight) -> Tensor:
    codes, scale = quantize_per_token_group(x, weight.group_size, 8)
    return grouped_matmul(codes, scale, weight)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found, expected, rtol=0, atol=SUMMATION * float(expected.abs().max())
    )


@pytest.mark.parametrize("n_rows", [1, 33])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_kernel_equals_the_grouped_reference(bits: int, block_size: int, n_rows: int) -> None:
    """Q8: the exported layer against the reference, up to the order of float32 sums."""
    weight = search_grouped(torch.randn(48, 512) * 0.05, bits, block_size)
    x = torch.randn(n_rows, 512)
    assert_same(run(session(weight), x), reference(x, weight))


@pytest.mark.parametrize("n_rows", [1, 33])
@pytest.mark.parametrize("width", [500, 130, 40])
@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (4, 128), (8, 32), (8, 64)])
def test_last_block_may_be_narrower(bits: int, block_size: int, width: int, n_rows: int) -> None:
    """Q1, Q8: the kernel fills the activation up with zeros."""
    weight = search_grouped(torch.randn(17, width) * 0.05, bits, block_size)
    x = torch.randn(n_rows, width)
    assert_same(run(session(weight), x), reference(x, weight))


@pytest.mark.parametrize("n_rows", [1, 33])
@pytest.mark.parametrize("bits", [4, 8])
def test_bias_is_added_last(bits: int, n_rows: int) -> None:
    weight = search_grouped(torch.randn(48, 256) * 0.05, bits, 64)
    x, bias = torch.randn(n_rows, 256), torch.randn(48)
    assert_same(run(session(weight, bias), x), reference(x, weight) + bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_one_sided_groups_are_used(bits: int) -> None:
    """Q1: zero points at both ends of the codes, in an odd number of blocks."""
    w = torch.rand(32, 96) + 0.1
    w[1::2] *= -1
    weight = search_grouped(w, bits, 32)
    assert set(weight.zero_point.unique().tolist()) == {0, 2**bits - 1}
    x = torch.randn(5, 96)
    assert_same(run(session(weight), x), reference(x, weight))


@cache
def picker(bits: int, block_size: int) -> ort.InferenceSession:
    """Output i is the code of input i times the scale of its block."""
    middle = 2 ** (bits - 1)
    codes = (torch.eye(block_size) + middle).to(torch.uint8)
    zero_point = torch.full((block_size, 1), middle, dtype=torch.uint8)
    return session(GroupedWeight(codes, torch.ones(block_size, 1), zero_point, bits, block_size))


@pytest.mark.parametrize("n_rows", [1, 2, 33])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_kernel_rounds_half_to_even(bits: int, block_size: int, n_rows: int) -> None:
    x = torch.zeros(n_rows, block_size)
    x[:, :9] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5])
    found = run(picker(bits, block_size), x)
    assert found[-1, :9].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126]


@given(
    peak=st.floats(2.0**-60, 2.0**60, width=32),
    bits=st.sampled_from([4, 8]),
    n_rows=st.sampled_from([1, 33]),
)
def test_codes_next_to_a_rounding_boundary_are_the_kernels(
    peak: float, bits: int, n_rows: int
) -> None:
    """There `x / (peak / 127)`, or a reciprocal rounded before it is multiplied, fall elsewhere."""
    x = (torch.randint(-127, 127, (n_rows, 32)) + 0.5) * (torch.tensor(peak) / 127)
    x = torch.nextafter(x, x * torch.randn_like(x))
    x[:, 0] = peak
    codes, scale = quantize_per_token_group(x, 32, 8)
    # The kernel subtracts its zero_point in float32, which leaves up to 0.03 of a scale.
    found = torch.round(run(picker(bits, 32), x) / scale)
    torch.testing.assert_close(found, codes, rtol=0, atol=0)


def test_rows_of_zeros_give_zeros() -> None:
    """Q4: where the kernel's scale is 0 and the reference's is tiny."""
    weight = search_grouped(torch.randn(16, 64), 4, 32)
    x = torch.zeros(2, 64)
    assert bool((run(session(weight), x) == 0).all())
    assert bool((reference(x, weight) == 0).all())


def test_low_half_of_a_byte_holds_the_first_code() -> None:
    codes = np.arange(36, dtype=np.uint8).reshape(2, 18) % 16
    blocks, zero_points = to_matmulnbits(codes, np.array([[1, 2], [3, 4]], np.uint8), 4, 16)
    assert blocks.shape == (2, 2, 8)
    assert blocks[0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    # The rest of the last block is zero_point: weights of 0.
    assert blocks[0, 1].tolist() == [0x10] + [0x22] * 7
    assert zero_points.tolist() == [0x21, 0x43]


def test_zero_points_of_every_row_start_a_new_byte() -> None:
    codes, zero_point = np.zeros((2, 48), np.uint8), np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    assert to_matmulnbits(codes, zero_point, 4, 16)[1].tolist() == [0x21, 0x03, 0x54, 0x06]
    blocks, zero_points = to_matmulnbits(codes, zero_point, 8, 16)
    assert blocks.shape == (2, 3, 16)
    assert zero_points.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("bits", "group_size", "groups"), [(6, 32, 2), (4, 48, 2), (4, 512, 1), (4, 0, 1), (4, 32, 3)]
)
def test_layouts_without_a_kernel_are_refused(bits: int, group_size: int, groups: int) -> None:
    codes, zero_point = np.zeros((2, 64), np.uint8), np.zeros((2, groups), np.uint8)
    with pytest.raises(InputError) as caught:
        to_matmulnbits(codes, zero_point, bits, group_size)
    assert caught.value.code == "EQ-3234"
