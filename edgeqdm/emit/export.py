"""A quantized denoiser as an ONNX graph, through `torch.export`."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from edgeqdm.errors import EdgeqdmError, UnsupportedError
from edgeqdm.quantize.ops import (
    CHOOSE,
    DEQUANTIZE,
    QCONV2D,
    QLINEAR,
    QLINEAR_DYNAMIC,
    QLINEAR_GROUPED,
)

__all__ = [
    "CHOOSE",
    "DEQUANTIZE",
    "OPSET",
    "QCONV2D",
    "QLINEAR",
    "QLINEAR_DYNAMIC",
    "QLINEAR_GROUPED",
    "OpTranslation",
    "export_onnx",
]

OPSET = 21
OpTranslation = Mapping[Callable[..., Any], Callable[..., Any]]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The exporter reports on stdout and through several loggers; none of it is for our user.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except torch.onnx.OnnxExporterError as problem:
        causes: list[BaseException] = [problem]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        for cause in causes:
            if isinstance(cause, EdgeqdmError):
                raise cause from problem
        reason = (str(causes[-1]).strip().splitlines() or [""])[0][:200]
        raise UnsupportedError(
            "EQ-4436",
            f"the network cannot be exported: {type(causes[-1]).__name__}: {reason}",
            hint="`torch.export.export` of the network says where",
        ) from problem


def export_onnx(
    network: nn.Module, inputs: Mapping[str, Tensor], translation: OpTranslation
) -> onnx.ModelProto:
    """Export `network(*inputs)` with a free batch dimension.

    Args:
        network: module whose forward takes the inputs in order and returns one tensor `output`.
        inputs: example of every graph input by name; tensors of rank 0 keep their shape, the first
            dimension of all others is the batch, which must be at least 2 here.
        translation: ONNX form of every custom op that occurs, by op.

    Returns:
        ONNX model, opset 21, weights inside.

    Raises:
        UnsupportedError: EQ-4436, for what torch cannot export; what a form of `translation` raises
            comes through as it is.
    """
    batch = torch.export.Dim("batch")
    dynamic = tuple({0: batch} if tensor.dim() else None for tensor in inputs.values())
    with _quiet(), _told_in_one_line(), torch.no_grad():
        program = torch.onnx.export(
            network,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["output"],
            dynamic_shapes=_nest(dynamic),
            custom_translation_table=dict(translation),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _nest(dynamic: tuple[Any, ...]) -> tuple[Any, ...]:
    # forward(sample, step, *conditioning): the starred part, unless empty, is one argument to
    # torch.export.
    return (*dynamic[:2], tuple(dynamic[2:])) if dynamic[2:] else dynamic
