"""What is known of a model without holding its weights."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from edgeqdm.ir.record import Record


class LayerKind(StrEnum):
    """Kinds of layer that can be quantized."""

    CONV2D = "conv2d"
    LINEAR = "linear"


class LayerInfo(Record):
    """One layer that can be quantized."""

    name: str
    """Module path inside the denoiser, e.g. `down_blocks.0.resnets.0.conv1`."""
    kind: LayerKind
    weight_shape: tuple[int, ...]
    """[C_out, C_in / groups, KH, KW] of a convolution, [C_out, C_in] of a linear layer."""
    role: Literal["body", "input", "output", "embedding"]
    """`input` and `output` are the first and last layer; `embedding` depends on timestep and
    conditioning only, never on the sample."""


class Conditioning(Record):
    """What the denoiser is fed beside the sample and the timestep."""

    kind: Literal["none", "label", "embedding"]
    shape: tuple[int, ...] = ()
    """Per sample: `()` for a label, e.g. `[L, D]` for an embedding."""
    n_labels: int = 0
    """Labels run from 0 to n_labels - 1; 0 where kind is not `label`."""
    null_label: int | None = None
    """Label that stands for "no class" under guidance."""


class Guidance(Record):
    """Classifier-free guidance: `f = f_null + scale * (f_cond - f_null)`; 1 means off."""

    scale: float = Field(default=1.0, ge=0.0)

    @property
    def active(self) -> bool:
        return self.scale != 1.0


class Decoder(Record):
    """How a final sample becomes pixels in [-1, 1], without a network."""

    kind: Literal["identity", "pixel_shuffle"] = "identity"
    factor: int = Field(default=1, ge=1)
    """Upscale factor of `pixel_shuffle`: [C f^2, H, W] -> [C, H f, W f]."""


class ModelInfo(Record):
    """A denoiser as the rest of the product sees it."""

    name: str
    family: str
    """Class name of the network, e.g. `UNet2DModel`."""
    sample_shape: tuple[int, int, int]
    """[C, H, W] of one sample."""
    conditioning: Conditioning
    decoder: Decoder
    layers: tuple[LayerInfo, ...]
    """In the order of the module tree."""
    fingerprint: str
    """SHA-256 over names, shapes, dtypes and bytes of all weights, and the configuration."""
    label_names: tuple[str, ...] = ()
    licence: str = "unknown"
