"""Whole methods on tiny models: each earns its keep, and each comes back from its file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor, nn

from edgeqdm import load, pipeline, verify
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import ActivationPolicy, Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.quantize.finetune import FinetuneSettings
from edgeqdm.quantize.quantizer import QuantizedDenoiser
from edgeqdm.quantize.reconstruct import ReconstructionSettings
from edgeqdm.quantize.store import load_quantized
from edgeqdm.testing.tiny import (
    DIT_CONFIG,
    build_network,
    write_pipeline,
    write_tiny_dit,
    write_tiny_unet,
)

STEPS, RUNS = 3, 8
STATIC, TEMPORAL = ActivationPolicy.STATIC, ActivationPolicy.TEMPORAL


@dataclass(frozen=True)
class Prepared:
    """A float denoiser and its calibration."""

    denoiser: Denoiser
    calibration: pipeline.Calibration

    def plan(self, body: str, activation: ActivationPolicy | None = None) -> DeploymentPlan:
        return pipeline.rule_plan(self.denoiser, body=Precision(body), activation=activation)

    def error(self, body: str, method: pipeline.Method) -> float:
        """Teacher-forced: mean over the steps of error energy over signal energy."""
        plan = self.plan(body)
        found = pipeline.quantize(self.denoiser, self.calibration, plan=plan, method=method)
        return self.error_of(found.quantized)

    def error_of(self, quantized: QuantizedDenoiser) -> float:
        ratios = pipeline.measure(quantized, self.calibration).snr_db
        return sum(10 ** (-ratio / 10) for ratio in ratios) / len(ratios)


@cache
def tiny(kind: str) -> Prepared:
    write = {"unet": write_tiny_unet, "dit": write_tiny_dit}[kind]
    with TemporaryDirectory() as folder:
        denoiser = load(write(Path(folder)), steps=STEPS, scheduler="ddim", guidance=2.0)
    return Prepared(denoiser, pipeline.calibrate(denoiser, samples=RUNS))


@cache
def uneven(seed: int) -> Prepared:
    """A tiny DiT whose input channels differ in size, as those of trained layers do."""
    network = build_network(DIT_CONFIG, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= torch.randn(layer.in_features, generator=generator).mul(0.7).exp()
    with TemporaryDirectory() as folder:
        path = write_pipeline(Path(folder), network, DIT_CONFIG)
        denoiser = load(path, steps=STEPS, scheduler="ddim")
    return Prepared(denoiser, pipeline.calibrate(denoiser, samples=16))


def test_groups_beat_rows_and_learned_rounding_beats_both_at_4_bits() -> None:
    """I2: on the average of 3 seeds, without any image; each step is at least 10 % of the error."""
    plain = pipeline.Method(ranges="minmax")
    settings = ReconstructionSettings(iterations=40, batch=16)
    learned = pipeline.Method(reconstruction=settings, selected=48)
    errors = [
        (
            uneven(seed).error("w4a8", plain),
            uneven(seed).error("w4g16a8", plain),
            uneven(seed).error("w4g16a8", learned),
        )
        for seed in range(3)
    ]
    nearest, grouped, reconstructed = (sum(each) / 3 for each in zip(*errors, strict=True))
    assert nearest > 1.1 * grouped > 1.1 * 1.1 * reconstructed


def test_eight_bits_are_close_to_float() -> None:
    """I2: 30 dB of the output at every step, where 4-bit weights are near 20."""
    for kind in ("unet", "dit"):
        model = tiny(kind)
        found = pipeline.quantize(model.denoiser, model.calibration)
        assert min(pipeline.measure(found.quantized, model.calibration).snr_db) > 30.0


def predictions(quantized: QuantizedDenoiser) -> list[Tensor]:
    x = torch.randn((2, *quantized.info.sample_shape), generator=torch.Generator().manual_seed(5))
    return [quantized.predict(x, step, torch.tensor([0, 2])) for step in range(STEPS)]


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize(
    ("body", "activation"),
    [("w8a8", STATIC), ("w4a8", TEMPORAL), ("w4g32a8dyn", None)],
    ids=["static", "temporal", "dynamic"],
)
def test_every_policy_on_either_network_comes_back_from_its_file(
    kind: str, body: str, activation: ActivationPolicy | None, tmp_path: Path
) -> None:
    """I3: through the whole of `quantize_to_file`, equal to the same stages in memory."""
    model = tiny(kind)
    plan, method = model.plan(body, activation), pipeline.Method(ranges="minmax")
    stored = pipeline.quantize_to_file(
        model.denoiser, tmp_path / "model.safetensors", plan=plan, method=method, samples=RUNS
    )
    direct = pipeline.quantize(model.denoiser, model.calibration, plan=plan, method=method)
    held = load_quantized(stored.file, model.denoiser)
    assert held.quantized.plan == plan
    pairs = zip(predictions(held.quantized), predictions(direct.quantized), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert held.correction == pipeline.correct(direct.quantized, model.calibration)
    assert len(stored.snr_db) == STEPS


def test_a_trained_model_becomes_a_package_that_verifies(tmp_path: Path) -> None:
    """Plan, quantize, finetune, emit, verify: each stage hands its file to the next."""
    model = tiny("dit")
    first = pipeline.quantize_to_file(
        model.denoiser,
        tmp_path / "first.safetensors",
        plan=model.plan("w4g32a8dyn"),
        method=pipeline.Method(),
        samples=RUNS,
    )
    settings = FinetuneSettings(iterations=4, batch=8)
    second = pipeline.finetune_file(
        model.denoiser, first.file, tmp_path / "second.safetensors", settings=settings, samples=RUNS
    )
    assert second.plan == first.plan
    package = tmp_path / "package"
    manifest = pipeline.emit(model.denoiser, package, quantized=second.file)
    held = load_quantized(second.file, model.denoiser)
    assert manifest.integer_layers == second.plan.n_integer_layers == 12
    found = verify(package)
    assert found.kernels.integer == found.planned == 12
    schedule = (package / "schedule.json").read_text()
    assert held.correction is not None
    assert held.correction.key.precision in schedule
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first.safetensors",
        "package",
        "second.safetensors",
    ]


def test_a_package_can_leave_the_stored_correction_out(tmp_path: Path) -> None:
    model = tiny("dit")
    stored = pipeline.quantize_to_file(
        model.denoiser,
        tmp_path / "model.safetensors",
        plan=model.plan("w8a8"),
        method=pipeline.Method(ranges="minmax"),
        samples=RUNS,
    )
    package = tmp_path / "package"
    pipeline.emit(model.denoiser, package, quantized=stored.file, correction=False)
    assert '"correction": null' in (package / "schedule.json").read_text()
