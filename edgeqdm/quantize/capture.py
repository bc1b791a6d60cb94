"""What one block is called with for every calibration sample, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeqdm.calibrate.select import Selection
from edgeqdm.errors import NumericalError, OutputError, UnsupportedError
from edgeqdm.models.denoiser import Denoiser

CHUNK = 32
"""Rows evaluated together."""
Network = Callable[..., Tensor]
"""`network(x [B, C, H, W], steps [B], *conditioning)`."""
Arguments = dict[int | str, Any]
"""Of a call: positions and names to values."""


@dataclass(frozen=True)
class Rows:
    """The evaluations of the network that calibrate it.

    Under guidance every sample is evaluated twice, as at run time: rows 0 to N - 1 with the null
    conditioning, rows N to 2N - 1 with their own.
    """

    selection: Selection
    null: Tensor | None
    """Conditioning of the first N rows, of one sample; None without guidance."""

    @staticmethod
    def of(denoiser: Denoiser, selection: Selection) -> Rows:
        return Rows(selection, denoiser.null if denoiser.guidance.active else None)

    @property
    def n_rows(self) -> int:
        return self.selection.n_samples * (1 if self.null is None else 2)

    def sample_of(self, rows: Tensor) -> Tensor:
        return rows % self.selection.n_samples

    def of_samples(self, samples: Tensor) -> Tensor:
        """All rows of some samples."""
        return (
            samples
            if self.null is None
            else torch.cat([samples, samples + len(self.selection.runs)])
        )

    def steps(self, rows: Tensor) -> Tensor:
        return self.selection.steps[self.sample_of(rows)]

    def inputs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """`(x, steps)` or `(x, steps, conditioning)` of some rows."""
        samples = self.sample_of(rows)
        x, steps = self.selection.inputs[samples], self.selection.steps[samples]
        if self.selection.conditioning is None:
            return x, steps
        own = self.selection.conditioning[samples]
        if self.null is None:
            return x, steps, own
        without = (rows < self.selection.n_samples).reshape(-1, *([1] * (own.dim() - 1)))
        return x, steps, torch.where(without, self.null.to(own), own)


@dataclass(frozen=True)
class Calls:
    """Arguments of a block for every row.

    Attributes:
        stored: [rows, k, ...] by argument, in files; k entries of the first axis belong to a row.
        constant: arguments that are the same for all rows.
    """

    stored: dict[int | str, NDArray[Any]]
    constant: Arguments

    def read(self, rows: Tensor) -> Arguments:
        """Arguments of one call for some rows."""
        drawn = {key: torch.from_numpy(values[rows.numpy()]) for key, values in self.stored.items()}
        return {**self.constant, **{key: value.flatten(0, 1) for key, value in drawn.items()}}


def call(module: nn.Module, arguments: Arguments) -> Any:
    """Calls a module with arguments as they were captured."""
    positions = sorted(key for key in arguments if isinstance(key, int))
    named = {key: value for key, value in arguments.items() if isinstance(key, str)}
    return module(*(arguments[position] for position in positions), **named)


@torch.no_grad()
def capture(network: Network, block: nn.Module, name: str, rows: Rows, folder: Path) -> Calls:
    """Runs the network up to a block for all rows and keeps what the block is called with.

    Of a block that runs several times in one evaluation only the first call is seen.

    Args:
        network: called with `Rows.inputs`.
        block: part of the network.
        name: of the block, for errors.
        rows: what to evaluate.
        folder: for the files; made if it is missing.

    Raises:
        NumericalError: if the block is fed NaN or Inf.
        OutputError: if the files cannot be written, a full disk included.
        UnsupportedError: if the block does not run or is fed no batch.
    """
    handle = block.register_forward_pre_hook(_reach, with_kwargs=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        one, two = (_arguments(network, rows.inputs(torch.arange(n)), name) for n in (1, 2))
        varying = [key for key, value in two.items() if _doubles(one[key], value)]
        with ExitStack() as files:
            opened = {k: files.enter_context(_file(folder, k).open("wb")) for k in varying}
            for index in torch.arange(rows.n_rows).split(CHUNK):
                arguments = _arguments(network, rows.inputs(index), name)
                _check(arguments, name)
                for key, file in opened.items():
                    file.write(arguments[key].numpy().tobytes())
        # Written, not mapped: a mapped file on a full disk kills the process.
        stored = {key: _mapped(_file(folder, key), rows.n_rows, one[key]) for key in varying}
    except OSError as problem:
        raise OutputError(
            "EQ-7250",
            f"inputs of the block cannot be kept: {problem}",
            path=folder,
            hint="free some space or name another work folder, then run the same again",
        ) from problem
    finally:
        handle.remove()
    if not stored:
        raise UnsupportedError(
            "EQ-4243",
            "the block is fed no tensor whose first axis is the batch",
            path=name,
            hint="leave its layers at round-to-nearest",
        )
    return Calls(stored, {key: value for key, value in one.items() if key not in stored})


class _Reached(Exception):  # noqa: N818
    """Carries the arguments of the block out of the network."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments


def _reach(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached({**dict(enumerate(args)), **cast(Arguments, kwargs)})


def _arguments(network: Network, inputs: Sequence[Tensor], name: str) -> Arguments:
    try:
        network(*inputs)
    except _Reached as reached:
        return reached.arguments
    raise UnsupportedError(
        "EQ-4242",
        "the block does not run for some sample",
        path=name,
        hint="only networks that run every block at every step can be reconstructed",
    )


def _doubles(one: Any, two: Any) -> bool:
    """Whether the first axis of an argument is the batch: twice as long for twice the rows."""
    return isinstance(one, Tensor) and one.dim() > 0 and two.shape[0] == 2 * one.shape[0] > 0


def _file(folder: Path, key: int | str) -> Path:
    return folder / f"{key}.bin"


def _mapped(file: Path, n_rows: int, one: Tensor) -> NDArray[Any]:
    """The values of all rows, each shaped as the argument of one row."""
    return np.memmap(file, one.numpy().dtype, mode="r", shape=(n_rows, *one.shape))


def _check(arguments: Arguments, name: str) -> None:
    for value in arguments.values():
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise NumericalError(
                "EQ-5250",
                "the block is fed NaN or Inf",
                path=name,
                hint="the network overflows before it; quantize fewer of the layers before it",
            )


def as_network(module: nn.Module, timesteps: Tensor) -> Network:
    """A float network behind the signature of `SoftNetwork`."""

    def evaluate(x: Tensor, steps: Tensor, *conditioning: Tensor) -> Tensor:
        found: Tensor = module(x, timesteps.index_select(0, steps), *conditioning)
        return found

    return evaluate


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
