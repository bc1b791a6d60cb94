"""The scripts of `tools/benchmarks` as modules; they are no part of the package."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgeqdm import load, tuning
from edgeqdm.ir.precision import Precision
from edgeqdm.ir.profile import (
    BoundaryCost,
    BoundaryKind,
    Device,
    LatencyEntry,
    LatencyProfile,
    OpKey,
    Protocol,
    Runtime,
    Timing,
    WholeGraph,
    sealed_profile,
)
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.profile.predict import LatencyModel
from edgeqdm.profile.requests import mixed_precisions, uniform_precisions
from edgeqdm.testing.tiny import DIT_CONFIG, build_network, write_pipeline

BENCHMARKS = Path(__file__).parents[2] / "tools" / "benchmarks"


@pytest.fixture(scope="session", autouse=True)
def _importable() -> None:
    """Scripts import each other, as where one is run: its folder stands first."""
    sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return import_module("ablation")


@pytest.fixture(scope="module")
def noise() -> ModuleType:
    return import_module("noise")


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return import_module("peers")


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    return import_module("scale")


@pytest.fixture(scope="module")
def native_agreement() -> ModuleType:
    return import_module("native_agreement")


@pytest.fixture(scope="module")
def searches() -> ModuleType:
    return import_module("search")


@pytest.fixture(scope="module")
def prediction() -> ModuleType:
    return import_module("prediction")


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    """A DiT of one block and four steps."""
    config = DIT_CONFIG | {"num_layers": 1}
    folder = write_pipeline(tmp_path_factory.mktemp("model"), build_network(config), config)
    return load(folder, steps=4)


OVERHEAD, BASE, QUANTIZE = 3.0, 40.0, 0.5
US = {"fp32": 100.0, "w8a8": 30.0, "w4a8": 35.0, "w8": 80.0, "w8a8dyn": 45.0, "w4g32a8dyn": 50.0}
"""Of a layer of 16 x 16 weights."""


def timing(us: float) -> Timing:
    return Timing(median_us=us, p10_us=us, p90_us=us, ci95_us=(us, us), n=30)


def layer_us(key: OpKey, precision: Precision) -> float:
    return US[precision] * (np.prod(key.weight_shape) / 256) ** 0.5


def exact_profile(denoiser: Denoiser, *, n_mixed: int = 4) -> LatencyProfile:
    """A device on which whole networks cost exactly `BASE` more than their layers."""
    space = tuning.open_space(denoiser)
    net_us = {each: layer_us(*each) for each in space.entries()}
    shapes = {space.network.keys[names[0]].input_shape for names in space.network.siblings}
    sums = LatencyModel(
        space.network, net_us, dict.fromkeys(shapes, QUANTIZE), BASE, scales={}, error=None
    )
    generator = np.random.default_rng(7)
    plans = [
        *uniform_precisions(space.network, space.offered, tables=space.tables),
        *mixed_precisions(
            space.network, space.offered, n_mixed, tables=space.tables, generator=generator
        ),
    ]
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
            boundaries=tuple(
                BoundaryCost(
                    kind=BoundaryKind.QUANTIZE,
                    shape=shape,
                    provenance="measured",
                    timing=timing(QUANTIZE + OVERHEAD),
                )
                for shape in shapes
            ),
            wholes=tuple(
                WholeGraph(
                    model=space.network.model,
                    batch=space.network.batch,
                    precisions=precisions,
                    model_bytes=0,
                    provenance="measured",
                    timing=timing(sums.predict_us(precisions)),
                )
                for precisions in plans
            ),
        )
    )


@pytest.fixture(scope="module")
def profile(denoiser: Denoiser) -> LatencyProfile:
    return exact_profile(denoiser)


@pytest.fixture(scope="module")
def forms() -> ModuleType:
    return import_module("ort_forms")


@pytest.fixture(scope="module")
def phases() -> ModuleType:
    return import_module("phases")
