"""Latencies are sums of entries, and the sum is fitted to networks measured as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeqdm.errors import InputError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, TABLE, W8A8, Precision
from edgeqdm.ir.profile import (
    BoundaryCost,
    BoundaryKind,
    Device,
    LatencyEntry,
    LatencyProfile,
    OpKey,
    PhaseCost,
    Protocol,
    Runtime,
    Timing,
    WholeGraph,
    sealed_profile,
)
from edgeqdm.profile.opkeys import NetworkKeys
from edgeqdm.profile.predict import (
    NOISE,
    SCALE_DEVIATION,
    LatencyModel,
    StorageModel,
    count_forks,
    entries_of,
    fit_latency,
    fitted_base_bytes,
    form_of,
    missing_entries,
    missing_error,
    shared_us,
)

W8, W4A8, DYNAMIC = Precision("w8"), Precision("w4a8"), Precision("w8a8dyn")
CHOICES = (FP32, W8A8, W4A8, W8, DYNAMIC)
FORMS = ("dynamic", "float", "integer", "weights")
OVERHEAD, BASE, QUANTIZE = 3.0, 50.0, 6.0
SHARE_US = {W8A8: 0.25, W4A8: 0.3, W8: 0.875, DYNAMIC: 0.5, FP32: 1.0}
"""Of a layer's time in float32."""
MODEL = "a" * 64


def linear(width: int) -> OpKey:
    shape, weight = (1, 16, width), (width, width)
    return OpKey(kind=LayerKind.LINEAR, input_shape=shape, weight_shape=weight, bias=True)


WIDTHS = {"q": 16, "k": 16, "v": 16, "out": 16, "up": 64, "down": 128}
NETWORK = NetworkKeys(
    MODEL,
    1,
    {name: linear(width) for name, width in WIDTHS.items()},
    (("q", "k", "v"),),
    rest_bytes=1000,
)
ALONE = replace(NETWORK, siblings=())
"""The same network where every layer is fed a tensor of its own."""
FLOAT_US = {16: 20.0, 64: 120.0, 128: 400.0}
NET_US = {
    (linear(width), precision): us * share
    for width, us in FLOAT_US.items()
    for precision, share in SHARE_US.items()
}


def timing(us: float) -> Timing:
    return Timing(median_us=us, p10_us=us, p90_us=us, ci95_us=(us, us), n=30)


def profile_of(
    net_us: Mapping[tuple[OpKey, Precision], float], wholes: Iterable[WholeGraph] = ()
) -> LatencyProfile:
    """A device whose every figure is one overhead above what is given."""
    return sealed_profile(
        LatencyProfile(
            edgeqdm_version="0.1.0",
            created="2026-11-01T12:00:00Z",
            target="onnxruntime",
            device=Device(name="made up", machine="x86_64", system="Linux"),
            runtime=Runtime(name="onnxruntime", version="1"),
            threads=1,
            power_mode="unknown",
            protocol=Protocol(
                clock="thread_cpu",
                rounds=3,
                min_runs=30,
                ci_target=0.01,
                max_seconds=6.0,
                reference_us=(1.0, 1.0),
            ),
            overhead=timing(OVERHEAD),
            entries=tuple(
                LatencyEntry(
                    key=key,
                    precision=precision,
                    provenance="measured",
                    timing=timing(us + OVERHEAD),
                )
                for (key, precision), us in net_us.items()
            ),
            boundaries=(
                BoundaryCost(
                    kind=BoundaryKind.QUANTIZE,
                    shape=(1, 16, 16),
                    provenance="measured",
                    timing=timing(QUANTIZE + OVERHEAD),
                ),
            ),
            wholes=tuple(wholes),
        )
    )


def whole(
    precisions: Mapping[str, Precision],
    us: float,
    *,
    model: str = MODEL,
    batch: int = 1,
    model_bytes: int = 0,
) -> WholeGraph:
    return WholeGraph(
        model=model,
        batch=batch,
        precisions=dict(precisions),
        model_bytes=model_bytes,
        provenance="measured",
        timing=timing(us),
    )


def mixes(n: int, *, choices: Sequence[Precision] = CHOICES) -> list[dict[str, Precision]]:
    """Networks of which no two are the same."""
    generator = np.random.default_rng(n)
    found: dict[tuple[Precision, ...], dict[str, Precision]] = {}
    while len(found) < n:
        mix = {name: choices[int(generator.integers(len(choices)))] for name in WIDTHS}
        found[tuple(mix.values())] = mix
    return list(found.values())


def by_form(precisions: Mapping[str, Precision]) -> NDArray[np.float64]:
    """Time in every form of `FORMS`, nothing shared."""
    found = dict.fromkeys(FORMS, 0.0)
    for name, width in WIDTHS.items():
        found[form_of(precisions[name])] += NET_US[linear(width), precisions[name]]
    return np.array([found[form] for form in FORMS])


def measured(
    networks: Sequence[Mapping[str, Precision]], scales: Mapping[str, float], base: float = BASE
) -> list[WholeGraph]:
    """Networks that cost exactly base + scale * time; nothing is shared."""
    factors = np.array([scales[form] for form in FORMS])
    return [whole(each, base + float(by_form(each) @ factors)) for each in networks]


ONES = dict.fromkeys(FORMS, 1.0)
SCALES = {"dynamic": 0.9, "float": 0.8, "integer": 1.15, "weights": 0.95}


def shared(precisions: Mapping[str, Precision]) -> float:
    return shared_us(NETWORK, {(1, 16, 16): QUANTIZE}, precisions)


# The fit.


def test_base_and_scales_of_1_are_fitted_back_exactly() -> None:
    profile = profile_of(NET_US, measured(mixes(8), ONES))
    model = fit_latency(profile, ALONE)
    assert model.base_us == pytest.approx(BASE, rel=1e-9)
    assert model.scales == pytest.approx(ONES, rel=1e-9)


def test_the_fit_is_the_ridge_regression_of_relative_errors() -> None:
    """Against the normal equations."""
    networks = mixes(12)
    wholes = measured(networks, SCALES)
    model = fit_latency(profile_of(NET_US, wholes), ALONE)
    us = np.array([each.timing.median_us for each in wholes])
    design = np.array([[1.0, *by_form(each)] for each in networks]) / us[:, None]
    penalty = np.diag([0.0] + [(NOISE / SCALE_DEVIATION) ** 2] * len(FORMS))
    wanted = design.T @ np.ones(len(us)) + penalty @ np.array([0.0, 1.0, 1.0, 1.0, 1.0])
    base, *scales = np.linalg.solve(design.T @ design + penalty, wanted)
    # The same equations by another factorization.
    assert model.base_us == pytest.approx(base, rel=1e-9)
    assert [model.scales[form] for form in FORMS] == pytest.approx(scales, rel=1e-9)


def test_base_and_scales_are_found_where_many_networks_were_measured() -> None:
    """What is left of the expectation that scales are 1 falls with the number of networks."""
    model = fit_latency(profile_of(NET_US, measured(mixes(300), SCALES)), ALONE)
    assert model.scales == pytest.approx(SCALES, abs=0.01)
    assert model.base_us == pytest.approx(BASE, rel=0.1)


def test_a_base_below_0_is_none() -> None:
    networks = mixes(40)
    model = fit_latency(profile_of(NET_US, measured(networks, ONES, base=-30.0)), ALONE)
    assert model.base_us == 0.0
    us = np.array([each.timing.median_us for each in measured(networks, ONES, base=-30.0)])
    design = np.array([by_form(each) for each in networks]) / us[:, None]
    strength = (NOISE / SCALE_DEVIATION) ** 2
    equations = design.T @ design + strength * np.eye(len(FORMS))
    wanted = design.T @ np.ones(len(us)) + strength
    expected = dict(zip(FORMS, np.linalg.solve(equations, wanted), strict=True))
    assert model.scales == pytest.approx(expected, rel=1e-9)


def objective(model: LatencyModel, wholes: Sequence[WholeGraph]) -> float:
    """What a fit is to minimise, of what `predict_us` says."""
    us = np.array([each.timing.median_us for each in wholes])
    errors = np.array([model.predict_us(each.precisions) for each in wholes]) / us - 1
    strength = NOISE / SCALE_DEVIATION
    away = np.array([strength * (scale - 1) for scale in model.scales.values()])
    return float(errors @ errors + away @ away)


def test_no_other_scale_or_base_predicts_the_measured_networks_better() -> None:
    """Layers that share a quantization among them."""
    factors = np.array([SCALES[form] for form in FORMS])
    wholes = [
        whole(each, BASE + float(by_form(each) @ factors) - shared(each)) for each in mixes(40)
    ]
    model = fit_latency(profile_of(NET_US, wholes), NETWORK)
    best = objective(model, wholes)
    for step in (-0.01, 0.01):
        others = [replace(model, base_us=model.base_us * (1 + step))]
        others += [
            replace(model, scales={**model.scales, form: scale + step})
            for form, scale in model.scales.items()
        ]
        for other in others:
            assert objective(other, wholes) > best


def test_exact_data_with_shared_quantizations_is_predicted_exactly() -> None:
    wholes = [
        whole(each, BASE + float(by_form(each).sum()) - shared(each))
        for each in (*mixes(8), dict.fromkeys(WIDTHS, W8A8))
    ]
    model = fit_latency(profile_of(NET_US, wholes), NETWORK)
    assert model.base_us == pytest.approx(BASE, rel=1e-9)
    for each in wholes:
        assert model.predict_us(each.precisions) == pytest.approx(each.timing.median_us, rel=1e-9)


def test_networks_left_out_of_the_fit_are_predicted_exactly_from_exact_data() -> None:
    found = fit_latency(profile_of(NET_US, measured(mixes(8), ONES)), ALONE).error
    assert found is not None
    assert found.n == 8
    assert found.mean == pytest.approx(0.0, abs=1e-9)
    assert found.worst == pytest.approx(0.0, abs=1e-9)


def test_one_wrong_measurement_is_the_worst_error_and_not_the_mean() -> None:
    wholes = measured(mixes(20), ONES)
    wrong = whole(wholes[0].precisions, 1.2 * wholes[0].timing.median_us)
    found = fit_latency(profile_of(NET_US, [wrong, *wholes[1:]]), ALONE).error
    assert found is not None
    # Left out, it is missed by all that it is wrong: 0.2 / 1.2.
    assert found.worst == pytest.approx(0.2 / 1.2, rel=1e-6)
    assert found.mean < found.worst / 4


def test_networks_of_one_precision_are_fitted_to_and_not_counted_as_predictions() -> None:
    uniform = [dict.fromkeys(WIDTHS, precision) for precision in CHOICES]
    two = fit_latency(profile_of(NET_US, measured([*uniform, *mixes(2)], ONES)), ALONE)
    assert two.error is None
    assert two.base_us == pytest.approx(BASE, rel=1e-9)
    three = fit_latency(profile_of(NET_US, measured([*uniform, *mixes(3)], ONES)), ALONE).error
    assert three is not None
    assert three.n == 3


def test_without_whole_networks_scales_are_1_and_the_base_is_the_overhead() -> None:
    model = fit_latency(profile_of(NET_US), ALONE)
    assert model.error is None
    assert model.base_us == OVERHEAD
    for precisions in mixes(5):
        expected = OVERHEAD + by_form(precisions).sum()
        assert model.predict_us(precisions) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("other", [{"model": "b" * 64}, {"batch": 2}])
def test_whole_networks_of_another_model_or_batch_are_not_fitted_to(
    other: dict[str, object],
) -> None:
    strange = [each.model_copy(update=other) for each in measured(mixes(8), SCALES, base=900.0)]
    alone = fit_latency(profile_of(NET_US, strange), ALONE)
    assert alone == fit_latency(profile_of(NET_US), ALONE)
    beside = fit_latency(profile_of(NET_US, [*strange, *measured(mixes(9), ONES)]), ALONE)
    assert beside.base_us == pytest.approx(BASE, rel=1e-9)


def test_whole_networks_with_operations_the_profile_lacks_are_not_fitted_to() -> None:
    lacking = {each: us for each, us in NET_US.items() if each[1] != W8}
    wholes = measured([*mixes(6, choices=(FP32, W8A8)), dict.fromkeys(WIDTHS, W8)], ONES)
    model = fit_latency(profile_of(lacking, wholes), ALONE)
    assert "weights" not in model.scales
    assert model.base_us == pytest.approx(BASE, rel=1e-9)


# The prediction.

MODEL_OF_3 = LatencyModel(
    network=NETWORK,
    net_us=NET_US,
    quantize_us={(1, 16, 16): QUANTIZE},
    base_us=BASE,
    scales=SCALES,
    error=None,
)


def test_a_prediction_is_the_sum_by_hand() -> None:
    precisions = {"q": FP32, "k": W8, "v": DYNAMIC, "out": W8A8, "up": W4A8, "down": TABLE}
    # base + float 20 + weights 17.5 + dynamic 10 + integer 5 and 36, each with its scale.
    expected = 50.0 + 0.8 * 20 + 0.95 * 17.5 + 0.9 * 10 + 1.15 * 5 + 1.15 * 36
    assert MODEL_OF_3.predict_us(precisions) == pytest.approx(expected, rel=1e-12)


def test_layers_that_are_not_named_are_in_fp32() -> None:
    named = dict.fromkeys(WIDTHS, FP32)
    assert MODEL_OF_3.predict_us({}) == MODEL_OF_3.predict_us(named)


@pytest.mark.parametrize(
    ("precisions", "saved"),
    [
        ({"q": W8A8, "k": W8A8, "v": W8A8}, 2),
        ({"q": W8A8, "k": W8A8}, 1),
        ({"q": W8A8, "k": W4A8, "v": W8A8}, 2),
        ({"q": W8A8, "k": Precision("w4a4"), "v": W8A8}, 1),
        ({"q": W8A8, "k": DYNAMIC, "v": DYNAMIC}, 0),
        ({"q": W8A8, "k": W8, "v": FP32}, 0),
        ({"q": W8A8, "out": W8A8, "up": W8A8}, 0),
        ({"q": W8A8, "k": TABLE, "v": TABLE}, 0),
        ({}, 0),
    ],
)
def test_a_tensor_that_siblings_quantize_alike_is_quantized_once(
    precisions: dict[str, Precision], saved: int
) -> None:
    assert shared(precisions) == saved * QUANTIZE


def test_what_is_shared_is_taken_off_the_sum() -> None:
    plain = replace(MODEL_OF_3, scales=ONES)
    apart = replace(plain, network=ALONE)
    every = dict.fromkeys(WIDTHS, W8A8)
    assert apart.predict_us(every) - plain.predict_us(every) == pytest.approx(2 * QUANTIZE)


def test_a_shape_whose_quantization_was_not_measured_saves_nothing() -> None:
    assert shared_us(NETWORK, {}, dict.fromkeys(WIDTHS, W8A8)) == 0.0


def plan_of(*phases: tuple[int, Precision]) -> DeploymentPlan:
    made, start = [], 0
    for n_steps, precision in phases:
        layers = tuple(LayerAssignment(layer=n, precision=precision, reason="test") for n in WIDTHS)
        made.append(Phase(start=start, stop=start + n_steps, layers=layers))
        start += n_steps
    return DeploymentPlan(target="onnxruntime", model=MODEL, n_steps=start, phases=tuple(made))


def test_a_plan_costs_the_mean_over_its_steps() -> None:
    plan = plan_of((3, FP32), (1, W8A8))
    slow, fast = (MODEL_OF_3.predict_us(dict.fromkeys(WIDTHS, p)) for p in (FP32, W8A8))
    assert MODEL_OF_3.predict_plan_us(plan) == (slow, fast)
    assert MODEL_OF_3.mean_us(plan) == pytest.approx((3 * slow + fast) / 4)


def test_a_layer_that_differs_between_phases_costs_what_was_measured() -> None:
    model, plan = replace(MODEL_OF_3, fork_us=7.0), plan_of((3, FP32), (1, W8A8))
    forks = count_forks(model.network, [dict.fromkeys(WIDTHS, p) for p in (FP32, W8A8)])
    slow, fast = MODEL_OF_3.predict_plan_us(plan)
    assert forks > 0
    assert model.predict_plan_us(plan) == (slow + 7.0 * forks, fast + 7.0 * forks)
    assert model.mean_us(plan) == pytest.approx(MODEL_OF_3.mean_us(plan) + 7.0 * forks)
    alone = plan_of((4, W8A8))
    assert model.predict_plan_us(alone) == MODEL_OF_3.predict_plan_us(alone) == (fast,)


def phases(alone: float, among: float, first: Precision, *, batch: int = 1) -> PhaseCost:
    return PhaseCost(
        model=MODEL,
        batch=batch,
        precisions=dict.fromkeys(WIDTHS, first),
        other={},
        provenance="measured",
        alone=timing(alone),
        among=timing(among),
    )


def test_layers_that_are_fed_alike_fork_together() -> None:
    """Unless they change at other steps; every variant beyond the first is a fork."""
    network = NetworkKeys(MODEL, 1, NETWORK.keys, (tuple(WIDTHS)[:2],))
    q, k, *_, up = WIDTHS
    base = dict.fromkeys(WIDTHS, W8A8)
    assert count_forks(network, [base]) == count_forks(network, [base, base]) == 0
    assert count_forks(network, [base, base | {up: W4A8}]) == 1
    assert count_forks(network, [base, base | {q: W4A8}, base | {q: FP32}]) == 2
    assert count_forks(network, [base, base | {q: W4A8, k: FP32}]) == 1
    assert count_forks(network, [base, base | {q: W4A8}, base | {k: FP32}]) == 2


@pytest.mark.parametrize("wholes", [0, 6])
def test_what_a_fork_costs_is_the_median_of_the_pairs_of_this_network(wholes: int) -> None:
    pairs = [
        phases(100.0, 103.0, W8A8),
        phases(300.0, 309.0, W8),
        phases(200.0, 999.0, W4A8),
        phases(100.0, 500.0, W8A8, batch=2),
        # The same network twice: no fork.
        phases(100.0, 900.0, FP32),
    ]
    forks = count_forks(ALONE, [dict.fromkeys(WIDTHS, W8), {}])
    profile = profile_of(NET_US, measured(mixes(wholes), ONES))
    found = fit_latency(profile.model_copy(update={"phase_costs": tuple(pairs)}), ALONE)
    assert found.fork_us == 9.0 / forks
    assert fit_latency(profile, ALONE).fork_us == 0.0
    assert found == replace(fit_latency(profile, ALONE), fork_us=9.0 / forks)


def test_forks_that_were_faster_by_chance_save_nothing() -> None:
    profile = profile_of(NET_US).model_copy(update={"phase_costs": (phases(100.0, 98.0, W8A8),)})
    assert fit_latency(profile, ALONE).fork_us == 0.0


def test_an_entry_quicker_than_an_empty_graph_costs_nothing() -> None:
    profile = profile_of({**NET_US, (linear(16), W8A8): -2.0})
    assert fit_latency(profile, ALONE).layer_us("q", W8A8) == 0.0


used = st.tuples(st.sampled_from(sorted(WIDTHS)), st.sampled_from(CHOICES))


@given(used, st.floats(0.0, 1e4), st.lists(st.sampled_from(CHOICES), min_size=6, max_size=6))
def test_a_slower_entry_never_makes_a_network_quicker(
    entry: tuple[str, Precision], more: float, precisions: list[Precision]
) -> None:
    layer, precision = entry
    chosen = dict(zip(WIDTHS, precisions, strict=True)) | {layer: precision}
    key = NETWORK.keys[layer], precision
    before = fit_latency(profile_of(NET_US), NETWORK)
    after = fit_latency(profile_of({**NET_US, key: NET_US[key] + more}), NETWORK)
    slower = after.predict_us(chosen) - before.predict_us(chosen)
    n = sum((NETWORK.keys[name], chosen[name]) == key for name in WIDTHS)
    assert slower == pytest.approx(n * more, rel=1e-9, abs=1e-9)
    fitted = replace(MODEL_OF_3, net_us={**NET_US, key: NET_US[key] + more})
    assert fitted.predict_us(chosen) >= MODEL_OF_3.predict_us(chosen)


# What a profile lacks.


def test_an_operation_the_profile_lacks_is_named() -> None:
    lacking = {each: us for each, us in NET_US.items() if each != (linear(64), W4A8)}
    model = fit_latency(profile_of(lacking), NETWORK)
    assert model.predict_us({"up": W8A8}) > 0
    with pytest.raises(InputError, match="EQ-3510") as caught:
        model.predict_us({"up": W4A8})
    assert "lacks 1 operations: linear 1x16x64 * 64x64 at w4a8" in caught.value.message
    assert caught.value.hint is not None
    assert "--missing-from" in caught.value.hint


def test_everything_a_profile_lacks_is_listed_once_and_tables_need_no_entry() -> None:
    profile = profile_of({(linear(16), FP32): 20.0})
    needed = entries_of(NETWORK, {"q": W8A8, "k": W8A8, "up": TABLE})
    assert missing_entries(profile, needed) == ((linear(16), W8A8), (linear(128), FP32))
    assert missing_entries(profile_of(NET_US), entries_of(NETWORK, {})) == ()


def test_of_many_missing_operations_ten_are_listed_and_the_rest_counted() -> None:
    missing = [(linear(width), W8A8) for width in range(1, 14)]
    message = missing_error(missing).message
    assert "lacks 13 operations: " in message
    assert message.count(" at w8a8") == 10
    assert message.endswith("; 3 more")


# Bytes.


def bytes_of(weight_shape: tuple[int, ...], precision: Precision) -> tuple[int, int]:
    values = weight_shape[0] * weight_shape[1]
    return values * precision.weight_bits // 8, values


STORAGE = StorageModel(NETWORK, bytes_of, base_bytes=1000, tables={"up": 77})


def test_a_layer_is_stored_once_for_every_precision_it_has() -> None:
    values = sum(width * width for width in WIDTHS.values())
    one, other = dict.fromkeys(WIDTHS, W8A8), dict.fromkeys(WIDTHS, W4A8)
    assert STORAGE.predict_bytes([one]) == (1000 + values, 1000 + values)
    assert STORAGE.predict_bytes([one, one]) == STORAGE.predict_bytes([one])
    assert STORAGE.predict_bytes([one, other]) == (1000 + values + values // 2, 1000 + 2 * values)
    assert STORAGE.predict_bytes([{}]) == (1000 + 4 * values, 1000 + values)
    mixed = STORAGE.predict_bytes([{}, one, {}])
    assert mixed == (1000 + (4 + 1) * values, 1000 + 2 * values)


def test_every_further_variant_has_nodes_of_its_own() -> None:
    """Those of 300 bytes are the nodes of three layers."""
    storage = replace(STORAGE, base_bytes=1300)
    one = dict.fromkeys(WIDTHS, W8A8)
    other = one | {"up": FP32}
    weight = storage.layer_bytes("up", FP32)[0]
    first, same, second = (storage.predict_bytes([one, *more])[0] for more in ([], [one], [other]))
    assert first == same
    assert second - first == weight + 300 // len(WIDTHS)


def test_a_table_weighs_what_it_holds_instead_of_its_weights() -> None:
    without = STORAGE.predict_bytes([dict.fromkeys(WIDTHS, W8A8)])[0]
    tabled = STORAGE.predict_bytes([dict.fromkeys(WIDTHS, W8A8) | {"up": TABLE}])[0]
    assert without - tabled == 64 * 64 - 77


def test_what_networks_weigh_beyond_their_layers_is_the_median() -> None:
    bare = replace(STORAGE, base_bytes=0)
    networks = mixes(3)
    wholes = [
        whole(each, 1.0, model_bytes=bare.predict_bytes([each])[0] + rest)
        for each, rest in zip(networks, (500, 700, 9000), strict=True)
    ]
    assert fitted_base_bytes(profile_of({}, wholes), NETWORK, bare) == 700
    assert fitted_base_bytes(profile_of({}), NETWORK, bare) is None
    other = [each.model_copy(update={"batch": 2}) for each in wholes]
    assert fitted_base_bytes(profile_of({}, other), NETWORK, bare) is None
