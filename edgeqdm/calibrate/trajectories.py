"""Full-precision sampling runs, stored so that an interrupted calibration goes on."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeqdm import __version__
from edgeqdm.errors import InputError, NumericalError, OutputError, StorageError
from edgeqdm.ir.codec import digest
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.weights import tensor_bytes
from edgeqdm.numerics import philox, solver

CHUNK = 16
"""Trajectories that run together; fixed, because the result depends on it in the last bits."""
_SEAL = "sealed"
Progress = Callable[[int, int], None]
"""Called with (done, total) after every finished unit of work."""


@dataclass(frozen=True)
class Trajectories:
    """N sampling runs of the float model.

    Attributes:
        inputs: what the network was fed, float32 [S, N, C, H, W].
        outputs: network output after guidance, float32 [S, N, C, H, W].
        conditioning: one label [N] or embedding [N, ...] per run, or None.
    """

    inputs: Tensor
    outputs: Tensor
    conditioning: Tensor | None

    @property
    def n_steps(self) -> int:
        return self.inputs.shape[0]

    @property
    def n_runs(self) -> int:
        return self.inputs.shape[1]

    def key(self) -> str:
        """SHA-256 of everything in it."""
        found = hashlib.sha256()
        for tensor in (self.inputs, self.outputs, self.conditioning):
            if tensor is not None:
                found.update(tensor.numpy().tobytes())
        return found.hexdigest()


def collect_trajectories(
    denoiser: Denoiser,
    n_runs: int,
    *,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Trajectories:
    """Sample with the float model and keep what its network saw and said at every step.

    Args:
        denoiser: the float model.
        n_runs: number of trajectories, at least 1.
        seed: of the initial samples, the step noise and the conditioning.
        work: folder for finished chunks; a later call with the same arguments goes on from them.
        progress: called after every chunk.

    Raises:
        InputError: if n_runs < 1 or the seed is out of range.
        NumericalError: if the model returns NaN or Inf; names the step.
        StorageError: if a file of `work` is damaged or was edited.
    """
    if n_runs < 1:
        raise InputError(
            "EQ-3201", f"calibration needs at least 1 trajectory, got {n_runs}", path="samples"
        )
    if not 0 <= seed < 2**64:
        raise InputError("EQ-3201", f"a seed is 0 or more and below 2^64, got {seed}", path="seed")
    conditioning = denoiser.draw_conditioning(n_runs, torch.Generator().manual_seed(seed))
    starts = range(0, n_runs, CHUNK)
    chunks = []
    for done, start in enumerate(starts, start=1):
        images = range(start, min(start + CHUNK, n_runs))
        mine = None if conditioning is None else conditioning[images.start : images.stop]
        file = None if work is None else work / f"{_chunk_key(denoiser, seed, images, mine)}.st"
        chunks.append(_load_chunk(file) or _run_chunk(denoiser, seed, images, mine, file))
        if progress is not None:
            progress(done, len(starts))
    return Trajectories(
        torch.cat([chunk[0] for chunk in chunks], 1),
        torch.cat([chunk[1] for chunk in chunks], 1),
        conditioning,
    )


def _chunk_key(denoiser: Denoiser, seed: int, images: range, conditioning: Tensor | None) -> str:
    found = hashlib.sha256(f"{__version__} {digest(denoiser.info)}".encode())
    found.update(digest(denoiser.program).encode())
    found.update(digest(denoiser.guidance).encode())
    found.update(f"{seed} {images.start} {images.stop}".encode())
    if conditioning is not None:
        found.update(conditioning.numpy().tobytes())
    if denoiser.null_embedding is not None:
        found.update(denoiser.null_embedding.numpy().tobytes())
    return f"trajectories-{found.hexdigest()[:24]}"


def _load_chunk(file: Path | None) -> tuple[Tensor, Tensor] | None:
    tensors = None if file is None else load_tensors(file)
    return None if tensors is None else (tensors["inputs"], tensors["outputs"])


def _run_chunk(
    denoiser: Denoiser, seed: int, images: range, conditioning: Tensor | None, file: Path | None
) -> tuple[Tensor, Tensor]:
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def predict(x: NDArray[np.float32], step: int) -> NDArray[np.float32]:
        sample = torch.from_numpy(x)
        f = denoiser.predict(sample, step, conditioning)
        if not bool(torch.isfinite(f).all()):
            raise NumericalError(
                "EQ-5201",
                f"the float model returned NaN or Inf at step {step}",
                path=denoiser.info.name,
                hint="check the weights and the scheduler with diffusers before quantizing",
            )
        inputs.append(sample.clone())
        outputs.append(f)
        return f.numpy()

    shape = denoiser.info.sample_shape
    solver.run(
        solver.Table.from_json(denoiser.program.model_dump(mode="json")),
        predict,
        philox.batch_normal(seed, philox.INITIAL_STREAM, images, shape),
        lambda step: philox.batch_normal(seed, philox.step_stream(step), images, shape),
    )
    found = torch.stack(inputs), torch.stack(outputs)
    if file is not None:
        save_tensors({"inputs": found[0], "outputs": found[1]}, file)
    return found


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write finished work to a safetensors file, whole or not at all, with a checksum.

    Raises:
        OutputError: if it cannot be written, a full disk included.
    """
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(_apart(tensors), partial, _seal(file, tensors))
        os.replace(partial, file)
    except (OSError, SafetensorError) as problem:
        raise OutputError(
            "EQ-7201",
            f"finished work cannot be kept: {problem}",
            path=file.parent,
            hint="free some space or name another work folder, then run the same again",
        ) from problem
    finally:
        # Its folder may be no folder: that is told by the error above.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values; safetensors refuses tensors that share memory, as phases share weights."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def load_tensors(file: Path) -> dict[str, Tensor] | None:
    """Read what `save_tensors` wrote; None if it is missing.

    Raises:
        StorageError: if it is damaged or was edited. An interruption cannot leave such a file.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as problem:
        raise _damaged(file) from problem
    if metadata != _seal(file, tensors):
        raise _damaged(file)
    return tensors


def _seal(file: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """What is stored beside the tensors: the name says what the work is part of."""
    # One entry: safetensors writes several in any order, and equal work would differ in bytes.
    return {_SEAL: f"{checksum(tensors)} {file.name}"}


def _damaged(file: Path) -> StorageError:
    return StorageError(
        "EQ-6201",
        "kept work is damaged, was edited or renamed",
        path=file,
        hint="delete this file, then run the same again: only this part is made again",
    )


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    # A safetensors header says how long the data is, not what it is.
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor_bytes(tensor))
    return found.hexdigest()
