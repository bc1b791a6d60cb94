"""The error of a plan: images of a free run against the float model's, from equal noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgeqdm.bench.compare import (
    conditioning_for,
    draw,
    float_predictor,
    player_of,
    reference_predictor,
)
from edgeqdm.calibrate.observe import LayerObservation
from edgeqdm.calibrate.trajectories import load_tensors, save_tensors
from edgeqdm.emit import playback
from edgeqdm.errors import NumericalError
from edgeqdm.ir.codec import digest
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, TABLE
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer
from edgeqdm.quantize import quantizer
from edgeqdm.quantize.fold import live, record_tables
from edgeqdm.quantize.parameters import LayerParameters, Parameters, Variant, steps_of_variants
from edgeqdm.quantize.quantizer import QuantizedDenoiser

CAP_DB = 120.0
"""Of the error of one image: a plan without any error would weigh on the mean without end."""
Decibels = NDArray[np.float64]


class Evaluator:
    """Quantizes plans and draws images with them; codes and scales are made once and kept.

    Args:
        denoiser: the float model.
        observations: of its layers, from a calibration.
        seed: of the noise; must not be the calibration's.
        n_images: most images that an error is asked for.
        work: folder for the float model's images; a later call takes them from there.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        observations: Mapping[str, LayerObservation],
        *,
        seed: int,
        n_images: int,
        work: Path | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.n_images = n_images
        self._observations = observations
        self._seed = seed
        self._layers: dict[tuple[Variant, tuple[int, ...]], LayerParameters] = {}
        self._tables: dict[tuple[str, ...], Mapping[str, torch.Tensor]] = {}
        self._player = player_of(denoiser)
        self._fed = conditioning_for(denoiser, n_images, seed)
        self._float = self._float_images(work)

    def quantized(self, plan: DeploymentPlan) -> QuantizedDenoiser:
        """The plan's denoiser; equal to what `quantizer.quantize` makes of it, bit for bit."""
        quantizer.check_plan(self.denoiser, plan)
        steps = steps_of_variants(plan)
        layers = {
            variant: self._layer(variant, tuple(mine))
            for variant, mine in steps.items()
            if variant.precision not in (FP32, TABLE)
        }
        folded = tuple(sorted(v.layer for v in steps if v.precision == TABLE))
        if folded not in self._tables:
            self._tables[folded] = record_tables(self.denoiser, live(self.denoiser, folded))
        parameters = Parameters(layers, self._tables[folded])
        return quantizer.assemble(self.denoiser, plan, parameters)

    def image_sqnr_db(self, quantized: QuantizedDenoiser, images: range) -> Decibels:
        """SQNR of every image of the range, in dB, at most `CAP_DB`.

        Raises:
            NumericalError: EQ-5602, if an image holds NaN or Inf.
        """
        mine = None if self._fed is None else self._fed[images.start : images.stop]
        found = playback.sample(
            self._player, reference_predictor(quantized), mine, seed=self._seed, images=images
        )
        return sqnr_by_image(self._float[images.start : images.stop], found)

    def _layer(self, variant: Variant, steps: tuple[int, ...]) -> LayerParameters:
        key = (variant, steps)
        if key not in self._layers:
            layer = get_layer(self.denoiser.module, variant.layer)
            seen = self._observations.get(variant.layer)
            n_steps = self.denoiser.program.n_steps
            self._layers[key] = quantizer.code_layer(layer, variant, seen, steps, n_steps)
        return self._layers[key]

    def _float_images(self, work: Path | None) -> NDArray[np.float32]:
        info, program = self.denoiser.info, self.denoiser.program
        name = f"float-{info.fingerprint[:12]}-{digest(program)[:12]}-{self._seed}-{self.n_images}"
        name += f"-{digest(self.denoiser.guidance)[:8]}"
        file = None if work is None else work / f"{name}.st"
        kept = None if file is None else load_tensors(file)
        if kept is not None:
            return kept["images"].numpy()
        found = draw(
            self._player, float_predictor(self.denoiser), self._fed, self.n_images, self._seed
        )
        if file is not None:
            save_tensors({"images": torch.from_numpy(found)}, file)
        return found


def sqnr_by_image(reference: NDArray[np.float32], found: NDArray[np.float32]) -> Decibels:
    """SQNR in dB of each image [N, C, H, W], within +-`CAP_DB`; [N].

    Raises:
        NumericalError: EQ-5602, if an image holds NaN or Inf.
    """
    axes = tuple(range(1, reference.ndim))
    signal = np.square(reference, dtype=np.float64).sum(axes)
    error = np.square(reference.astype(np.float64) - found).sum(axes)
    if not np.all(np.isfinite(error)):
        bad = np.flatnonzero(~np.isfinite(error)).tolist()
        raise NumericalError(
            "EQ-5602", f"images {bad[:5]} hold NaN or Inf", hint="verify the plan's precisions"
        )
    # An image that is black has no signal: whatever is drawn in its place is as wrong as can be.
    least = np.finfo(np.float64).tiny
    ratio = np.log10(np.maximum(signal, least)) - np.log10(np.maximum(error, least))
    decibels: Decibels = np.where(error == 0, CAP_DB, np.clip(10 * ratio, -CAP_DB, CAP_DB))
    return decibels


def pooled_db(by_image: Sequence[float]) -> float:
    """SQNR of images taken together, where all are equally bright: the bad ones decide."""
    noise = np.mean(np.power(10.0, -np.asarray(by_image) / 10))
    return float(-10 * np.log10(noise))
