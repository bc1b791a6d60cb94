"""Floats that need no more than 16 bits, stored in them.

What is rounded is rounded before the golden run; the graph only stores in 16 bits what survives the
way there and back, so that the package computes the very numbers of its reference.
"""

from __future__ import annotations

import copy

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from edgeqdm.emit.backend import Network

SCALES = ("weight_scale", "act_scale_table", "out_scale_table")
"""Tensors of coded layers that decide what a code means."""
TIMESTEPS = "timesteps"
_EXACT = 2.0**-11
"""Half the distance of two normal float16 numbers, relative: what rounding them loses at most."""


def round_to_half(network: Network) -> Network:
    """A copy in which floats that fit are those of float16; scales and timesteps stay.

    A tensor fits if nothing in it overflows and its RMS error is no larger than that of normal
    numbers: one whose values are all subnormal does not.
    """
    shared = {id(t): t for t in network.buffers() if not t.is_floating_point()}
    rounded = copy.deepcopy(network, shared)
    with torch.no_grad():
        for name, tensor in [*rounded.named_parameters(), *rounded.named_buffers()]:
            kept = name.rpartition(".")[2] in (*SCALES, TIMESTEPS)
            if not kept and tensor.dtype == torch.float32:
                half = tensor.to(torch.float16).to(torch.float32)
                if _fits(tensor, half):
                    tensor.copy_(half)
    return rounded


def _fits(tensor: Tensor, half: Tensor) -> bool:
    # Of an overflow the error is infinite.
    error, size = (half - tensor).double().norm(), tensor.double().norm()
    return bool(error <= _EXACT * size)


def store_in_16_bits(graph: onnx.GraphProto) -> None:
    """Floats that float16 holds exactly, with a cast back that the runtime folds at load."""
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        wide, narrow = tensor.name, f"{tensor.name}/16 bits"
        cast = onnx.helper.make_node("Cast", [narrow], [wide], narrow, to=onnx.TensorProto.FLOAT)
        saved = values.nbytes - half.nbytes - cast.ByteSize()
        if saved > 0 and np.array_equal(half.astype(np.float32), values):
            tensor.CopyFrom(numpy_helper.from_array(half, narrow))
            casts.append(cast)
    for cast in reversed(casts):
        graph.node.insert(0, cast)
