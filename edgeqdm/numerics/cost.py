"""What a quantized layer costs when it runs, in bit operations."""

from __future__ import annotations

from edgeqdm.errors import InputError

SCALE_BITS = 16
"""A group's scale is stored as float16."""
RESCALE_COST = 32 * SCALE_BITS
"""Bit operations of adding one int32 group sum to the output: its product with a float16 scale."""
MINMAX_COST = 32
"""Bit operations of comparing one float32 value with a running minimum and maximum."""


def bit_operations(
    *,
    tokens: int,
    outputs: int,
    inputs: int,
    weight_bits: int,
    activation_bits: int,
    group_size: int = 0,
    dynamic: bool = False,
    rescale_cost: int = RESCALE_COST,
    minmax_cost: int = MINMAX_COST,
) -> int:
    """Bit operations of one layer for one sample.

        M N K b_w b_a  +  M N G c_scale  +  M K c_minmax      G = ceil(K / group_size)

    with M tokens, N outputs and K inputs; the last term is there for dynamic activations only. The
    sum over a network's layers is what a group size search keeps within its budget.

    Args:
        tokens: rows of the matrix product; output positions of a convolution.
        outputs: output features or channels.
        inputs: products summed per output; C_in / groups * KH * KW of a convolution.
        weight_bits: width of a weight's code.
        activation_bits: width of an activation's code.
        group_size: inputs that share a scale, the last group may be narrower; 0 is one group.
        dynamic: the range of the activation is measured at run time. A convolution is counted as
            if every output position measured its own patch.
        rescale_cost: of one group's sum; twice as much where a zero_point's correction is
            multiplied and added per group too.
        minmax_cost: of measuring one value.

    Raises:
        InputError: EQ-3238, if a count or width is below 1, or group_size or a cost is negative.

    Source: the cost of Chen et al. 2025, "Q-DiT", https://arxiv.org/abs/2406.17343 is not given;
    this one counts the rescaling per group that makes small groups expensive.
    """
    for name, value in (
        ("tokens", tokens),
        ("outputs", outputs),
        ("inputs", inputs),
        ("weight_bits", weight_bits),
        ("activation_bits", activation_bits),
    ):
        _require(name, value, at_least=1)
    _require("group_size", group_size, at_least=0)
    _require("rescale_cost", rescale_cost, at_least=0)
    _require("minmax_cost", minmax_cost, at_least=0)
    groups = -(-inputs // group_size) if group_size else 1
    products = tokens * outputs * inputs * weight_bits * activation_bits
    rescaling = tokens * outputs * groups * rescale_cost
    statistics = tokens * inputs * minmax_cost if dynamic else 0
    return products + rescaling + statistics


def _require(name: str, value: int, *, at_least: int) -> None:
    if value < at_least:
        raise InputError("EQ-3238", f"must be at least {at_least}, got {value}", path=name)
