"""What a cost model tells of the profile it was made of."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from edgeqdm import load, tuning
from edgeqdm.errors import InputError
from edgeqdm.ir.precision import FP32, TABLE, W8A8, Precision
from edgeqdm.ir.profile import (
    Device,
    LatencyEntry,
    LatencyProfile,
    Protocol,
    Runtime,
    Timing,
    WholeGraph,
)
from edgeqdm.testing.tiny import DIT_CONFIG, build_network, write_pipeline

W8, DYNAMIC = Precision("w8"), Precision("w8a8dyn")
SEARCHED = (FP32, W8A8, W8, DYNAMIC)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> tuning.Space:
    config = DIT_CONFIG | {"num_layers": 1}
    folder = write_pipeline(tmp_path_factory.mktemp("model"), build_network(config), config)
    found = tuning.open_space(load(folder, steps=4), precisions=SEARCHED)
    assert found.tables
    return found


def timing(us: float) -> Timing:
    return Timing(median_us=us, p10_us=us, p90_us=us, ci95_us=(us, us), n=30)


def profile_of(
    space: tuning.Space, *wholes: Mapping[str, Precision], model: str | None = None
) -> LatencyProfile:
    """Every operation of the space takes as long, and whole networks their sum."""
    network = space.network
    us = 10.0 * len(network.keys)
    return LatencyProfile(
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
            reference_us=(1.0,),
        ),
        overhead=timing(1.0),
        entries=tuple(
            LatencyEntry(key=key, precision=precision, provenance="measured", timing=timing(10.0))
            for key, precision in dict.fromkeys(space.entries())
        ),
        wholes=tuple(
            WholeGraph(
                model=model or network.model,
                batch=network.batch,
                precisions=dict(precisions),
                model_bytes=1000,
                provenance="measured",
                timing=timing(us),
            )
            for precisions in wholes
        ),
    )


def uniform(space: tuning.Space, precision: Precision) -> dict[str, Precision]:
    """One precision for all layers that may have it; tables are kept."""
    offered = {
        layer: precision if precision in space.offered[key.kind] else FP32
        for layer, key in space.network.keys.items()
    }
    return offered | dict.fromkeys(space.tables, TABLE)


def test_a_profile_with_every_form_in_whole_networks_is_not_warned_of(space: tuning.Space) -> None:
    wholes = [uniform(space, precision) for precision in SEARCHED]
    assert tuning.cost_model(profile_of(space, *wholes), space).warnings == ()


def test_precisions_that_no_whole_network_has_are_named(space: tuning.Space) -> None:
    """Tables are computed like coded weights, but their time is none: they fit nothing."""
    wholes = [uniform(space, FP32), uniform(space, W8A8)]
    (line,) = tuning.cost_model(profile_of(space, *wholes), space).warnings
    assert line == (
        "latencies of w8, w8a8dyn are not fitted: no whole network of the profile is made of such"
    )


def test_one_layer_in_one_whole_network_is_enough(space: tuning.Space) -> None:
    body = [name for name in space.network.keys if name not in space.tables]
    mixed = uniform(space, FP32) | dict(zip(body, (W8A8, W8, DYNAMIC), strict=False))
    assert tuning.cost_model(profile_of(space, mixed), space).warnings == ()


def test_a_whole_network_of_another_model_fits_nothing(space: tuning.Space) -> None:
    wholes = [uniform(space, precision) for precision in SEARCHED]
    for profile in (profile_of(space), profile_of(space, *wholes, model="b" * 64)):
        (line,) = tuning.cost_model(profile, space).warnings
        assert line.startswith("the profile has no whole network of this model")


def test_a_whole_network_whose_operations_the_profile_lacks_fits_nothing(
    space: tuning.Space,
) -> None:
    unknown = uniform(space, Precision("w4a8"))
    unknown = {n: Precision("w4a8") if p != TABLE else p for n, p in unknown.items()}
    (line,) = tuning.cost_model(profile_of(space, unknown), space).warnings
    assert line.startswith("the profile has no whole network of this model")


def test_operations_that_a_profile_lacks_are_an_error(space: tuning.Space) -> None:
    profile = profile_of(space)
    short = profile.model_copy(update={"entries": profile.entries[1:]})
    with pytest.raises(InputError) as caught:
        tuning.cost_model(short, space)
    assert caught.value.code == "EQ-3510"
