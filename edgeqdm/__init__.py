"""Edge deployment of diffusion models with measured mixed precision.

    from edgeqdm import load, pipeline, verify

    denoiser = load("reference:unet-fmnist", steps=20)
    pipeline.emit(denoiser, "build/unet")
    verify("build/unet")

Names are loaded when they are first used: importing the package loads no torch and no runtime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeqdm import pipeline
    from edgeqdm.errors import EdgeqdmError
    from edgeqdm.models.denoiser import wrap
    from edgeqdm.models.load import load
    from edgeqdm.pipeline import demo, doctor, run, verify

__version__ = "0.1.0"
__all__ = ["EdgeqdmError", "demo", "doctor", "load", "pipeline", "run", "verify", "wrap"]

_HOMES = {
    "EdgeqdmError": "edgeqdm.errors",
    "load": "edgeqdm.models.load",
    "wrap": "edgeqdm.models.denoiser",
    "demo": "edgeqdm.pipeline",
    "doctor": "edgeqdm.pipeline",
    "run": "edgeqdm.pipeline",
    "verify": "edgeqdm.pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "pipeline":
        return import_module("edgeqdm.pipeline")
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeqdm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
