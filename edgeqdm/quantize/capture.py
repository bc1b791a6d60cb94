"""What one block is called with for every calibration sample, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from numpy.lib.format import open_memmap
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


@dataclass
class Calls:
    """Arguments of a block for every row.

    Tensors whose first axis is the batch are files below `folder`; anything else is the same for
    all rows and kept as it is.
    """

    folder: Path
    n_rows: int
    stored: dict[int | str, NDArray[Any]] = field(default_factory=dict)
    constant: Arguments = field(default_factory=dict)

    def read(self, rows: Tensor) -> Arguments:
        """Arguments of one call for some rows."""
        found = dict(self.constant)
        for key, array in self.stored.items():
            # [rows, k, ...]: k entries of the batch axis belong to one row.
            found[key] = torch.from_numpy(array[rows.numpy()]).flatten(0, 1)
        return found

    def write(self, start: int, n_rows: int, arguments: Arguments) -> None:
        for key, value in arguments.items():
            if start == 0 and not _per_row(value, n_rows):
                self.constant[key] = value
            elif key not in self.constant:
                self._write(key, start, value.reshape(n_rows, -1, *value.shape[1:]))

    def _write(self, key: int | str, start: int, value: Tensor) -> None:
        values = value.detach().numpy()
        if key not in self.stored:
            file = self.folder / f"{key}.npy"
            shape = (self.n_rows, *values.shape[1:])
            self.stored[key] = open_memmap(file, mode="w+", dtype=values.dtype, shape=shape)
        self.stored[key][start : start + len(values)] = values


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
    calls = Calls(folder, rows.n_rows)
    handle = block.register_forward_pre_hook(_reach, with_kwargs=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, rows.n_rows, CHUNK):
            index = torch.arange(start, min(start + CHUNK, rows.n_rows))
            arguments = _arguments(network, rows.inputs(index), name)
            _check(arguments, name)
            calls.write(start, len(index), arguments)
    except OSError as problem:
        raise OutputError(
            "EQ-7250",
            f"inputs of the block cannot be kept: {problem}",
            path=folder,
            hint="free some space or name another work folder, then run the same again",
        ) from problem
    finally:
        handle.remove()
    if not calls.stored:
        raise UnsupportedError(
            "EQ-4243",
            "the block is fed no tensor whose first axis is the batch",
            path=name,
            hint="leave its layers at round-to-nearest",
        )
    return calls


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


def _per_row(value: Any, n_rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] % n_rows == 0


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
