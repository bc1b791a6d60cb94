"""The golden run: what a correct runtime must reproduce."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgeqdm.emit.playback import GOLDEN_SEED
from edgeqdm.ir.schedule import CorrectedSchedule
from edgeqdm.numerics import philox, solver
from edgeqdm.quantize.quantizer import QuantizedDenoiser

GOLDEN_IMAGES = 2


@dataclass(frozen=True)
class Golden:
    """A free run of the exact integer reference.

    Attributes:
        tensors: `initial` [B, C, H, W], `inputs`, `outputs` (after guidance, before correction)
            and `samples` (after each step), all [S, B, C, H, W], and `conditioning` [B, ...].
        noise_rms: RMS of (integer reference - float model) at the same inputs, [S].
    """

    tensors: dict[str, NDArray[np.float32] | NDArray[np.int64]]
    noise_rms: tuple[float, ...]


def make_golden(quantized: QuantizedDenoiser, correction: CorrectedSchedule | None) -> Golden:
    """Sample `GOLDEN_IMAGES` images with the integer reference and record every step."""
    denoiser = quantized.denoiser
    generator = torch.Generator().manual_seed(GOLDEN_SEED)
    conditioning = denoiser.draw_conditioning(GOLDEN_IMAGES, generator)
    shape, images = denoiser.info.sample_shape, range(GOLDEN_IMAGES)
    inputs, outputs, samples, noise_rms = [], [], [], []

    def predict(x: NDArray[np.float32], step: int) -> NDArray[np.float32]:
        scaled = torch.from_numpy(x)
        f = quantized.predict(scaled, step, conditioning)
        error = f - denoiser.predict(scaled, step, conditioning)
        inputs.append(x.copy())
        outputs.append(f.numpy())
        noise_rms.append(float(error.double().square().mean().sqrt()))
        return outputs[-1]

    initial = philox.batch_normal(GOLDEN_SEED, philox.INITIAL_STREAM, images, shape)
    solver.run(
        solver.Table.from_json(
            denoiser.program.model_dump(mode="json"),
            None if correction is None else correction.model_dump(mode="json"),
        ),
        predict,
        initial,
        lambda step: philox.batch_normal(GOLDEN_SEED, philox.step_stream(step), images, shape),
        lambda step, x: samples.append(x.copy()),
    )
    tensors: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {
        "initial": initial,
        "inputs": np.stack(inputs),
        "outputs": np.stack(outputs),
        "samples": np.stack(samples),
    }
    if conditioning is not None:
        tensors["conditioning"] = conditioning.numpy()
    return Golden(tensors, tuple(noise_rms))
