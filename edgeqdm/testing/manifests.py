"""A small manifest for tests of everything that reads or writes one."""

from __future__ import annotations

from typing import Any

from edgeqdm.ir.model import Conditioning, Decoder, ModelInfo
from edgeqdm.ir.package import UNSEALED, Manifest


def tiny_manifest(**changes: Any) -> Manifest:
    """An unsealed manifest without files; `changes` replace fields."""
    model = ModelInfo(
        name="tiny",
        family="UNet2DModel",
        sample_shape=(1, 8, 8),
        conditioning=Conditioning(kind="none"),
        decoder=Decoder(),
        layers=(),
        fingerprint="0" * 64,
    )
    manifest = Manifest(
        edgeqdm_version="0.1.0",
        created="2026-01-01T00:00:00Z",
        target="onnxruntime",
        model=model,
        guidance=1.0,
        n_steps=2,
        program_sha256="0" * 64,
        plan_sha256="0" * 64,
        integer_layers=0,
        library_versions={},
        files={},
        manifest_sha256=UNSEALED,
    )
    return manifest.model_copy(update=changes)
