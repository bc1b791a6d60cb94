"""What trials are judged by equals what the pipeline makes, and images are compared one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeqdm.bench.compare import (
    conditioning_for,
    draw,
    float_predictor,
    player_of,
    reference_predictor,
)
from edgeqdm.bench.quality import sqnr_db
from edgeqdm.errors import InputError, NumericalError, StorageError
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, TABLE, W8A8, ActivationPolicy, Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.load import load
from edgeqdm.quantize import quantizer
from edgeqdm.quantize.parameters import Parameters
from edgeqdm.quantize.plans import float_plan
from edgeqdm.search import evaluate
from edgeqdm.search.evaluate import CAP_DB, Evaluator, pooled_db, sqnr_by_image
from edgeqdm.stages import Calibration, calibrate, rule_plan
from edgeqdm.testing.tiny import write_tiny_unet

STEPS, IMAGES, SEED = 4, 4, 2**41
W4A8, W8, DYNAMIC = Precision("w4a8"), Precision("w8"), Precision("w8a8dyn")


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    folder = write_tiny_unet(tmp_path_factory.mktemp("model"))
    return load(folder, steps=STEPS, guidance=2.0, eta=1.0)


@pytest.fixture(scope="module")
def calibration(denoiser: Denoiser) -> Calibration:
    return calibrate(denoiser, samples=4)


@pytest.fixture(scope="module")
def evaluator(denoiser: Denoiser, calibration: Calibration) -> Evaluator:
    return Evaluator(denoiser, calibration.observations, seed=SEED, n_images=IMAGES)


def in_phases(plan: DeploymentPlan, *phases: tuple[int, Mapping[str, Any]]) -> DeploymentPlan:
    """The plan with its integer layers changed, in phases of so many steps."""
    (only,) = plan.phases
    made, start = [], 0
    for n_steps, change in phases:
        layers = tuple(
            a.model_copy(update=change) if a.precision.integer else a for a in only.layers
        )
        whole = {"start": start, "stop": start + n_steps, "layers": layers}
        made.append(only.model_copy(update=whole))
        start += n_steps
    return plan.model_copy(update={"phases": tuple(made)})


def plans(denoiser: Denoiser) -> dict[str, DeploymentPlan]:
    rule = rule_plan(denoiser)
    static = {"activation": ActivationPolicy.STATIC}
    return {
        "rule": rule,
        "float": float_plan(denoiser.info, "onnxruntime", STEPS),
        "weights": in_phases(rule, (STEPS, {"precision": W8})),
        "static": in_phases(rule, (STEPS, static)),
        "two": in_phases(rule, (1, {"precision": W8A8}), (3, {"precision": W4A8})),
        "two static": in_phases(rule, (2, {"precision": W8A8}), (2, static)),
        "back again": in_phases(
            rule, (1, {"precision": W8A8}), (2, {"precision": FP32}), (1, {"precision": W8A8})
        ),
    }


KINDS = ("rule", "float", "weights", "static", "two", "two static", "back again")


def assert_equal(one: Parameters, other: Parameters) -> None:
    assert one.layers.keys() == other.layers.keys()
    found, expected = one.tensors(), other.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert one.tables.keys() == other.tables.keys()
    for name, table in other.tables.items():
        assert torch.equal(one.tables[name], table), name


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_those_of_quantize_bit_for_bit(
    denoiser: Denoiser, calibration: Calibration, evaluator: Evaluator, kind: str
) -> None:
    plan = plans(denoiser)[kind]
    expected = quantizer.quantize(denoiser, plan, calibration.observations)
    found = evaluator.quantized(plan)
    assert found.plan == plan
    assert found.tables_sha256 == expected.tables_sha256
    assert_equal(found.parameters, expected.parameters)
    x = torch.randn(2, *denoiser.info.sample_shape)
    labels = torch.tensor([0, 2])
    for step in range(STEPS):
        ours, theirs = (model.predict(x, step, labels) for model in (found, expected))
        assert torch.equal(ours, theirs)


def test_some_plan_has_tables(denoiser: Denoiser) -> None:
    """Or the tests above would not see them."""
    assert any(a.precision == TABLE for a in rule_plan(denoiser).phases[0].layers)


def test_layers_are_coded_once_however_many_plans_have_them(
    denoiser: Denoiser, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = Evaluator(denoiser, calibration.observations, seed=SEED, n_images=2)
    coded: list[str] = []
    real = quantizer.code_layer

    def counted(layer: Any, variant: Any, *rest: Any, **options: Any) -> Any:
        coded.append(str(variant))
        return real(layer, variant, *rest, **options)

    monkeypatch.setattr(quantizer, "code_layer", counted)
    rule = rule_plan(denoiser)
    evaluator.quantized(rule)
    assert len(coded) == len(set(coded)) == len(rule.phases[0].integer_layers())
    evaluator.quantized(rule)
    evaluator.quantized(in_phases(rule, (STEPS, {"precision": FP32})))
    assert len(coded) == len(rule.phases[0].integer_layers())


def test_a_plan_of_another_model_is_refused(denoiser: Denoiser, evaluator: Evaluator) -> None:
    other = rule_plan(denoiser).model_copy(update={"model": "f" * 64})
    with pytest.raises(InputError) as caught:
        evaluator.quantized(other)
    assert caught.value.code == "EQ-3202"


def test_images_are_judged_as_a_free_run_beside_the_float_model(
    denoiser: Denoiser, evaluator: Evaluator
) -> None:
    quantized = evaluator.quantized(rule_plan(denoiser))
    player, fed = player_of(denoiser), conditioning_for(denoiser, IMAGES, SEED)
    reference = draw(player, float_predictor(denoiser), fed, IMAGES, SEED)
    drawn = draw(player, reference_predictor(quantized), fed, IMAGES, SEED)
    found = evaluator.image_sqnr_db(quantized, range(IMAGES))
    for k in range(IMAGES):
        # Sums of squares in float64, taken in another order.
        assert found[k] == pytest.approx(sqnr_db(reference[k], drawn[k]), rel=1e-9)


def test_images_do_not_depend_on_those_beside_them(
    denoiser: Denoiser, evaluator: Evaluator
) -> None:
    quantized = evaluator.quantized(rule_plan(denoiser))
    together = evaluator.image_sqnr_db(quantized, range(IMAGES))
    parts = [evaluator.image_sqnr_db(quantized, images) for images in (range(1), range(1, IMAGES))]
    # Another batch sums in another order; a code that differs for that moves an image by far less.
    np.testing.assert_allclose(np.concatenate(parts), together, atol=0.5)


def test_float_images_are_taken_from_the_folder(
    denoiser: Denoiser,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(seed: int = SEED) -> Evaluator:
        return Evaluator(denoiser, calibration.observations, seed=seed, n_images=2, work=tmp_path)

    def never(*arguments: Any) -> Any:
        raise AssertionError("drawn again")

    first = made()
    monkeypatch.setattr(evaluate, "draw", never)
    again = made()
    model = first.quantized(rule_plan(denoiser))
    np.testing.assert_array_equal(
        first.image_sqnr_db(model, range(2)), again.image_sqnr_db(model, range(2))
    )
    with pytest.raises(AssertionError, match="drawn again"):
        made(seed=SEED + 1)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError) as caught:
        made()
    assert (caught.value.code, caught.value.path) == ("EQ-6201", str(file))


# Errors of images.

amplitudes = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=5)


@given(amplitudes)
def test_sqnr_of_an_image_is_the_closed_form(errors: Sequence[float]) -> None:
    """An error of e on a signal of 1 is -20 log10 e, whatever the other images are."""
    reference = np.ones((len(errors), 3, 4, 4), np.float32)
    found = reference + np.array(errors, np.float32)[:, None, None, None]
    expected = -20 * np.log10((found - reference)[:, 0, 0, 0].astype(np.float64))
    np.testing.assert_allclose(sqnr_by_image(reference, found), expected, rtol=1e-9)


def test_an_image_without_error_has_the_cap() -> None:
    reference = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    found = reference.copy()
    found[1] *= np.float32(1.1)
    one, other = sqnr_by_image(reference, found)
    assert one == pytest.approx(CAP_DB)
    assert other == pytest.approx(20.0, abs=1e-3)


def test_an_error_below_the_cap_is_the_cap() -> None:
    reference = np.ones((1, 1, 1, 1), np.float32)
    assert sqnr_by_image(reference, reference + 1e-7)[0] == pytest.approx(CAP_DB)


def test_an_error_as_large_as_the_image_is_0_db_and_a_larger_one_negative() -> None:
    reference = np.ones((2, 1, 2, 2), np.float32)
    found = np.stack([np.zeros((1, 2, 2)), np.full((1, 2, 2), -9.0)]).astype(np.float32)
    np.testing.assert_allclose(sqnr_by_image(reference, found), [0.0, -20.0], atol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_is_an_error_that_names_it(value: float) -> None:
    reference = np.ones((3, 1, 2, 2), np.float32)
    found = reference.copy()
    found[1, 0, 1, 1] = value
    with pytest.raises(NumericalError, match=r"\[1\]") as caught:
        sqnr_by_image(reference, found)
    assert caught.value.code == "EQ-5602"


@given(st.floats(-20, 100), st.integers(1, 8))
def test_equal_images_pool_to_themselves(db: float, n: int) -> None:
    assert pooled_db([db] * n) == pytest.approx(db, abs=1e-9)


@given(st.lists(st.floats(0.0, 60.0), min_size=2, max_size=6))
def test_pooled_images_are_no_better_than_their_mean_and_no_worse_than_the_worst(
    by_image: list[float],
) -> None:
    """Jensen: the mean of the noise weighs bad images more."""
    assert min(by_image) - 1e-9 <= pooled_db(by_image) <= float(np.mean(by_image)) + 1e-9


@given(st.integers(0, 2**32 - 1))
def test_images_of_equal_power_pool_to_their_sqnr_taken_together(seed: int) -> None:
    generator = np.random.default_rng(seed)
    reference = np.sign(generator.standard_normal((4, 2, 3, 3))).astype(np.float32)
    noise = generator.standard_normal(reference.shape) * 10 ** generator.uniform(
        -3, 0, (4, 1, 1, 1)
    )
    found = (reference + noise).astype(np.float32)
    pooled = pooled_db(sqnr_by_image(reference, found))
    assert pooled == pytest.approx(sqnr_db(reference, found), abs=1e-6)
