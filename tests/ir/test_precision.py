"""A precision is a word with a grammar: all it means can be read off it, nothing else parses."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from edgeqdm.ir.precision import (
    FP16,
    FP32,
    GROUP_SIZES,
    TABLE,
    W8A8,
    ActivationPolicy,
    Precision,
)


def spelled(weight_bits: int, group_size: int, activation_bits: int, dynamic: bool) -> str:
    group = f"g{group_size}" if group_size else ""
    activation = f"a{activation_bits}" if activation_bits < 32 else ""
    return f"w{weight_bits}{group}{activation}{'dyn' if dynamic else ''}"


@given(
    weight_bits=st.sampled_from([4, 6, 8]),
    group_size=st.one_of(st.just(0), st.integers(16, 256)),
    activation_bits=st.sampled_from([4, 8, 32]),
    dynamic=st.booleans(),
)
def test_fields_of_a_coded_precision_survive_the_round_trip_through_its_name(
    weight_bits: int, group_size: int, activation_bits: int, dynamic: bool
) -> None:
    dynamic = dynamic and activation_bits < 32
    found = Precision(spelled(weight_bits, group_size, activation_bits, dynamic))
    fields = (found.weight_bits, found.group_size, found.activation_bits, found.dynamic)
    assert fields == (weight_bits, group_size, activation_bits, dynamic)
    assert spelled(*fields) == found
    assert found.coded
    assert found.integer == (activation_bits < 32)


@pytest.mark.parametrize(("precision", "bits"), [(FP32, 32), (FP16, 16), (TABLE, 0)])
def test_precisions_without_codes_have_no_groups_and_float_activations(
    precision: Precision, bits: int
) -> None:
    assert precision.weight_bits == bits
    assert (precision.group_size, precision.activation_bits) == (0, 32)
    assert not precision.coded
    assert not precision.integer
    assert not precision.dynamic
    assert precision.policies == (ActivationPolicy.FLOAT,)


@pytest.mark.parametrize(
    ("text", "policies"),
    [
        ("w8a8", (ActivationPolicy.TEMPORAL, ActivationPolicy.STATIC)),
        ("w4a4", (ActivationPolicy.TEMPORAL, ActivationPolicy.STATIC)),
        ("w4g64a8", (ActivationPolicy.TEMPORAL, ActivationPolicy.STATIC)),
        ("w8a8dyn", (ActivationPolicy.DYNAMIC_TOKEN,)),
        ("w4g64a8dyn", (ActivationPolicy.DYNAMIC_TOKEN_GROUP,)),
        ("w8", (ActivationPolicy.FLOAT,)),
        ("w4g128", (ActivationPolicy.FLOAT,)),
    ],
)
def test_policies_follow_from_the_name(text: str, policies: tuple[ActivationPolicy, ...]) -> None:
    assert Precision(text).policies == policies


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w3a8",
        "w5",
        "w8a6",
        "w8a16",
        "a8",
        "w4g",
        "w4g0",
        "w4g064",
        "w4ga8",
        "w4g64dyn",
        "w8dyn",
        "w8a8dynamic",
        "w8a8 ",
        " w8a8",
        "w8a8\n",
        "W8A8",
        "int8",
        "fp8",
        "fp16a8",
        "table8",
        "w\u0664a8",
    ],
)
def test_any_other_word_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="is no precision; examples: w8a8, w4g64a8") as caught:
        Precision(text)
    assert repr(text) in str(caught.value)


@given(group_size=st.integers(1, 2000))
def test_groups_have_16_to_256_input_channels(group_size: int) -> None:
    text = f"w4g{group_size}"
    if group_size in GROUP_SIZES:
        assert Precision(text).group_size == group_size
        return
    with pytest.raises(ValueError, match=f"'{text}': a group has 16 to 256 input channels"):
        Precision(text)


def test_a_precision_is_its_name_to_everything_that_reads_text() -> None:
    assert W8A8 == "w8a8"
    assert f"{Precision('w4g64a8')}" == "w4g64a8"
    assert {Precision("w8a8"): 1}["w8a8"] == 1
    assert sorted([Precision("w8a8"), Precision("w4a8")]) == ["w4a8", "w8a8"]
    assert Precision(W8A8) == W8A8


def test_copies_keep_the_type() -> None:
    for made in (copy.deepcopy(W8A8), pickle.loads(pickle.dumps(W8A8))):
        assert type(made) is Precision
        assert made == W8A8


def test_fields_of_records_parse_and_dump_it_as_text() -> None:
    adapter = TypeAdapter(Precision)
    found = adapter.validate_json('"w4g64a8dyn"')
    assert type(found) is Precision
    assert adapter.dump_json(found) == b'"w4g64a8dyn"'
    for wrong in ('"w4g64a8dynamic"', "8", "null"):
        with pytest.raises(ValidationError):
            adapter.validate_json(wrong)
