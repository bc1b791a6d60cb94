"""A graph in ONNX Runtime's own format, optimized ahead, and the operators it needs."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from pathlib import Path

from edgeqdm.backends.onnxruntime.forms import GRAPH, ORT_GRAPH
from edgeqdm.errors import UnsupportedError

OPERATORS = "required_operators_and_types.config"
"""What `--include_ops_by_config` of a reduced build of the runtime takes."""


def require_converter() -> None:
    """Raise UnsupportedError EQ-4435 unless the runtime's converter can be imported."""
    try:
        import onnxruntime.tools.convert_onnx_models_to_ort  # noqa: F401
    except ImportError as problem:
        raise UnsupportedError(
            "EQ-4435",
            f"the converter to model.ort cannot be loaded: {problem}",
            hint="pip install flatbuffers",
        ) from problem


def to_ort(graph: bytes) -> tuple[bytes, bytes]:
    """`model.ort` and the list of its operators.

    For Arm: what is left out are float convolutions in blocks of channels, whose size is that of
    the converting CPU's registers. The file runs on x86 too.

    The bytes differ from one conversion to the next, even in one process: the runtime writes its
    tables in no fixed order (1.31.1). What the graph computes is the same.
    """
    require_converter()
    from onnxruntime.tools.convert_onnx_models_to_ort import (
        OptimizationStyle,
        convert_onnx_models_to_ort,
    )

    before = logging.root.manager.disable
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / GRAPH).write_bytes(graph)
        logging.disable(logging.WARNING)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                # Of files that the converter opens and does not close.
                warnings.simplefilter("ignore", ResourceWarning)
                convert_onnx_models_to_ort(
                    folder / GRAPH,
                    optimization_styles=[OptimizationStyle.Fixed],
                    target_platform="arm",
                    enable_type_reduction=True,
                )
        finally:
            logging.disable(before)
        lines = (folder / f"model.{OPERATORS}").read_text("utf-8").splitlines()
        # The comments hold the path of a folder that is gone.
        listed = "\n".join(line for line in lines if not line.startswith("#")) + "\n"
        return (folder / ORT_GRAPH).read_bytes(), listed.encode()
