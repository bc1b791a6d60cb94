"""What a layer costs, counted operation by operation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgeqdm.errors import InputError
from edgeqdm.numerics.cost import (
    MINMAX_COST,
    RESCALE_COST,
    bit_operations,
)

SIZES = st.integers(1, 12)
BITS = st.integers(1, 8)


def counted(m: int, n: int, k: int, product: int, group: int, dynamic: bool) -> int:
    """The loops of an integer matrix product with group scales, each operation at its price."""
    total = 0
    for _ in range(m):
        if dynamic:
            total += sum(MINMAX_COST for _ in range(k))
        for _ in range(n):
            for start in range(0, k, group):
                total += sum(product for _ in range(start, min(start + group, k)))
                total += RESCALE_COST
    return total


@given(m=SIZES, n=SIZES, k=SIZES, weight=BITS, activation=BITS, group=SIZES, dynamic=st.booleans())
def test_bit_operations_equal_those_of_the_loops(
    m: int, n: int, k: int, weight: int, activation: int, group: int, dynamic: bool
) -> None:
    """I9: for any shape, ragged last groups included."""
    found = bit_operations(
        tokens=m,
        outputs=n,
        inputs=k,
        weight_bits=weight,
        activation_bits=activation,
        group_size=group,
        dynamic=dynamic,
    )
    assert found == counted(m, n, k, weight * activation, group, dynamic)


def test_bit_operations_equal_a_hand_count() -> None:
    """I9: 2 tokens, 3 outputs, 8 inputs at W4A8 in groups of 4, with run-time ranges."""
    layer = {"tokens": 2, "outputs": 3, "inputs": 8, "weight_bits": 4, "activation_bits": 8}
    products, rescaling, statistics = 48 * 32, 12 * 512, 16 * 32
    assert bit_operations(**layer, group_size=4, dynamic=True) == products + rescaling + statistics
    assert bit_operations(**layer, group_size=4) == products + rescaling
    assert bit_operations(**layer) == products + rescaling // 2
    assert bit_operations(**layer, rescale_cost=0) == products


def test_bit_operations_of_a_toy_network_equal_a_hand_count() -> None:
    """I9: Linear(32, 128) on 64 tokens, then a grouped 3x3 Conv2d(8, 4) on 8x8 positions."""
    linear = nn.Linear(32, 128)
    conv = nn.Conv2d(8, 4, 3, padding=1, groups=2)
    positions = conv(torch.zeros(1, 8, 8, 8))[0, 0].numel()
    found = bit_operations(
        tokens=64,
        outputs=linear.out_features,
        inputs=linear.in_features,
        weight_bits=4,
        activation_bits=8,
        group_size=16,
    ) + bit_operations(
        tokens=positions,
        outputs=conv.out_channels,
        inputs=conv.weight[0].numel(),
        weight_bits=8,
        activation_bits=8,
    )
    of_linear = 64 * 128 * 32 * 32 + 64 * 128 * 2 * 512
    of_conv = 64 * 4 * (4 * 9) * 64 + 64 * 4 * 512
    assert found == of_linear + of_conv


@given(inputs=st.integers(1, 4608), group=st.integers(1, 512))
def test_larger_groups_never_cost_more(inputs: int, group: int) -> None:
    costs = [
        bit_operations(
            tokens=2,
            outputs=2,
            inputs=inputs,
            weight_bits=4,
            activation_bits=8,
            group_size=size,
        )
        for size in (group, group + 1, 2 * group, 0)
    ]
    assert costs == sorted(costs, reverse=True)


def test_one_group_of_the_whole_width_is_group_size_zero() -> None:
    layer = {"tokens": 5, "outputs": 7, "inputs": 40, "weight_bits": 8, "activation_bits": 8}
    assert bit_operations(**layer, group_size=40) == bit_operations(**layer)
    assert bit_operations(**layer, group_size=64) == bit_operations(**layer)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 0),
        ("outputs", 0),
        ("inputs", -1),
        ("weight_bits", 0),
        ("activation_bits", 0),
        ("group_size", -1),
        ("rescale_cost", -1),
        ("minmax_cost", -1),
    ],
)
def test_an_impossible_layer_is_refused_by_field(field: str, value: int) -> None:
    layer = {"tokens": 1, "outputs": 1, "inputs": 1, "weight_bits": 4, "activation_bits": 8}
    with pytest.raises(InputError, match=f"got {value}") as caught:
        bit_operations(**(layer | {field: value}))
    assert (caught.value.code, caught.value.path) == ("EQ-3238", field)
