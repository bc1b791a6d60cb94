"""What is timed: every operation at every precision once, and networks that mix them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeqdm.backends import load_backend
from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import FP16, FP32, TABLE, W8A8, Precision
from edgeqdm.ir.profile import BoundaryKind, OpKey
from edgeqdm.profile.opkeys import NetworkKeys
from edgeqdm.profile.requests import (
    DEFAULT_PRECISIONS,
    candidates,
    full_request,
    mixed_precisions,
    nearest,
    uniform_precisions,
)

MENU = load_backend("onnxruntime").menu()
OFFERED = candidates(MENU)


def linear(*input_shape: int) -> OpKey:
    weight = (32, input_shape[-1])
    return OpKey(kind=LayerKind.LINEAR, input_shape=input_shape, weight_shape=weight, bias=True)


CONV = OpKey(
    kind=LayerKind.CONV2D,
    input_shape=(1, 8, 8, 8),
    weight_shape=(8, 8, 3, 3),
    bias=True,
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
)
NETWORK = NetworkKeys(
    "0" * 64,
    1,
    {
        "embed": linear(1, 32),
        "conv1": CONV,
        "conv2": CONV,
        "to_q": linear(1, 64, 32),
        "to_k": linear(1, 64, 32),
        "cross_k": linear(1, 5, 12),
        "cross_v": linear(1, 5, 12),
    },
    (("to_q", "to_k"), ("cross_k", "cross_v")),
)


def test_every_kind_is_offered_fp32_first_and_only_what_has_a_kernel() -> None:
    for kind, offered in OFFERED.items():
        assert offered[0] == FP32
        assert len(set(offered)) == len(offered)
        assert set(offered) == {p for p in DEFAULT_PRECISIONS if p in MENU[kind]}
    assert set(OFFERED[LayerKind.LINEAR]) - set(OFFERED[LayerKind.CONV2D]) == {
        "w8a8dyn",
        "w4g32a8dyn",
    }


def test_fp32_is_offered_unasked_and_order_and_repeats_are_kept_out() -> None:
    found = candidates(MENU, (W8A8, FP32, W8A8))
    assert found == dict.fromkeys(LayerKind, (FP32, W8A8))


@pytest.mark.parametrize("precision", ["table", "fp16", "w4a4", "w4g32a8", "w8g48a8dyn"])
def test_a_precision_without_any_kernel_is_refused_with_those_that_have_one(
    precision: str,
) -> None:
    with pytest.raises(UnsupportedError, match="EQ-4310") as caught:
        candidates(MENU, (W8A8, Precision(precision)))
    assert f"no kernel for {precision}" in caught.value.message
    hint = caught.value.hint
    assert hint is not None
    named = hint.removeprefix("choose among ").split(", ")
    assert set(named) == {p for offered in MENU.values() for p in offered} - {TABLE}


@pytest.mark.parametrize(
    ("precision", "choice"),
    [
        ("w8a8", "w8a8"),
        ("w8a8dyn", "w8a8"),
        ("w4g32a8dyn", "w4a8"),
        ("w4", "w8"),
        ("w6a8", "w8a8"),
        ("fp16", "w8"),
        ("fp32", "fp32"),
    ],
)
def test_the_nearest_choice_computes_alike_first_and_is_as_wide_second(
    precision: str, choice: str
) -> None:
    assert nearest(Precision(precision), OFFERED[LayerKind.CONV2D]) == choice


@pytest.mark.parametrize("kind", list(LayerKind))
def test_a_precision_that_is_offered_is_its_own_nearest(kind: LayerKind) -> None:
    for offered in (OFFERED[kind], MENU[kind]):
        choices = [precision for precision in offered if precision != TABLE]
        assert [nearest(precision, choices) for precision in choices] == choices


@given(st.sampled_from([p for p in (*MENU[LayerKind.LINEAR], FP16) if p != TABLE]))
def test_the_nearest_choice_stays_on_integers_where_it_can(precision: Precision) -> None:
    found = nearest(precision, OFFERED[LayerKind.CONV2D])
    assert found in OFFERED[LayerKind.CONV2D]
    assert found.integer == precision.integer


def test_one_network_per_precision_with_the_nearest_where_there_is_no_kernel() -> None:
    found = uniform_precisions(NETWORK, OFFERED, tables=("embed",))
    assert len(found) == len(DEFAULT_PRECISIONS)
    for precision, network in zip(DEFAULT_PRECISIONS, found, strict=True):
        assert network["embed"] == TABLE
        assert network["to_q"] == precision
        assert network["conv1"] == nearest(precision, OFFERED[LayerKind.CONV2D])


@given(st.integers(0, 2**32), st.integers(0, 5), st.sets(st.sampled_from(sorted(NETWORK.keys))))
def test_mixed_networks_give_every_layer_what_its_kind_is_offered(
    seed: int, n: int, tables: set[str]
) -> None:
    def drawn() -> list[dict[str, Precision]]:
        generator = np.random.default_rng(seed)
        return mixed_precisions(NETWORK, OFFERED, n, tables=tables, generator=generator)

    found = drawn()
    assert len(found) == n
    assert drawn() == found
    for network in found:
        assert tuple(network) == tuple(NETWORK.keys)
        for layer, precision in network.items():
            if layer in tables:
                assert precision == TABLE
            else:
                assert precision in OFFERED[NETWORK.keys[layer].kind]


def test_mixes_are_of_one_two_and_many_precisions() -> None:
    keys = {f"layer{k}": linear(1, 64, 32) for k in range(30)}
    network = NetworkKeys("0" * 64, 1, keys, ())
    generator = np.random.default_rng(0)
    found = mixed_precisions(network, OFFERED, 300, generator=generator)
    largest = [max(Counter(each.values()).values()) / len(keys) for each in found]
    # Shares of a flat mix of six would all be near 1/6, of single precisions 1.
    assert np.mean(np.array(largest) > 0.8) > 0.05
    assert np.mean(np.array(largest) < 0.4) > 0.05
    everywhere = Counter(p for each in found for p in each.values())
    for precision in OFFERED[LayerKind.LINEAR]:
        # Equal on average: 1/6 of 9000 layers, with shares that deviate by 0.19 per network.
        assert everywhere[precision] / 9000 == pytest.approx(1 / 6, abs=4 * 0.19 / 300**0.5)


def test_every_operation_is_asked_for_at_every_precision_once() -> None:
    request = full_request(NETWORK, OFFERED)
    assert len(set(request.entries)) == len(request.entries)
    assert set(request.entries) == {
        (key, precision) for key in NETWORK.keys.values() for precision in OFFERED[key.kind]
    }


def test_layers_that_are_looked_up_are_not_timed_and_stay_tables_in_whole_networks() -> None:
    request = full_request(NETWORK, OFFERED, tables=("embed", "conv1"))
    keys = {key for key, _ in request.entries}
    assert NETWORK.keys["embed"] not in keys
    # The other layer of the same key is computed.
    assert CONV in keys
    for network in request.wholes:
        assert {layer for layer, p in network.items() if p == TABLE} == {"embed", "conv1"}


def test_a_quantization_is_asked_for_every_shape_that_siblings_are_fed() -> None:
    assert list(full_request(NETWORK, OFFERED).boundaries) == [
        (BoundaryKind.QUANTIZE, (1, 64, 32)),
        (BoundaryKind.QUANTIZE, (1, 5, 12)),
    ]


def test_whole_networks_are_one_per_precision_and_as_many_mixed_ones_as_asked() -> None:
    uniform = uniform_precisions(NETWORK, OFFERED)
    for n in (0, 3):
        request = full_request(NETWORK, OFFERED, n_wholes=n)
        assert list(request.wholes[: len(uniform)]) == uniform
        assert len(request.wholes) == len(uniform) + n


def test_every_precision_alone_is_a_phase_beside_another_one() -> None:
    uniform = uniform_precisions(NETWORK, OFFERED)
    pairs = full_request(NETWORK, OFFERED).pairs
    assert [first for first, _ in pairs] == uniform
    assert sorted(map(str, uniform)) == sorted(str(other) for _, other in pairs)
    assert all(first != other for first, other in pairs)
    assert not full_request(NETWORK, OFFERED, phased=False).pairs


def test_a_network_of_one_precision_has_no_phases_to_time() -> None:
    offered = {kind: (FP32,) for kind in LayerKind}
    assert not full_request(NETWORK, offered).pairs


def test_no_network_is_asked_for_twice_and_the_mixed_ones_are_as_many() -> None:
    few = NetworkKeys("0" * 64, 1, {"a": CONV, "b": CONV}, ())
    offered = {kind: (FP32, W8A8) for kind in LayerKind}
    for seed in range(5):
        wholes = full_request(few, offered, n_wholes=2, seed=seed).wholes
        assert len({tuple(network.values()) for network in wholes}) == len(wholes) == 4


def test_a_network_of_few_mixes_is_asked_for_in_all_of_them_and_no_more() -> None:
    single = NetworkKeys("0" * 64, 1, {"a": CONV}, ())
    wholes = full_request(single, OFFERED).wholes
    assert {network["a"] for network in wholes} == set(OFFERED[LayerKind.CONV2D])
    assert len(wholes) == len(OFFERED[LayerKind.CONV2D])


def test_a_request_is_the_same_for_the_same_seed_only() -> None:
    assert full_request(NETWORK, OFFERED) == full_request(NETWORK, OFFERED)
    assert full_request(NETWORK, OFFERED, seed=1) != full_request(NETWORK, OFFERED)
    assert len(full_request(NETWORK, OFFERED, n_wholes=2).wholes) == 8
