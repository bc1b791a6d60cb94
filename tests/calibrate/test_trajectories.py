"""Calibration runs are the float model's own sampling, bit for bit, however often interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeqdm.calibrate import trajectories
from edgeqdm.calibrate.trajectories import (
    CHUNK,
    Trajectories,
    collect_trajectories,
    load_tensors,
    save_tensors,
)
from edgeqdm.errors import InputError, NumericalError, OutputError, StorageError
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.numerics import philox
from edgeqdm.testing.conformance import STEPS, small_denoiser
from edgeqdm.testing.tiny import N_LABELS

RUNS = CHUNK + 4


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return small_denoiser(DDPMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def collected(denoiser: Denoiser) -> Trajectories:
    return collect_trajectories(denoiser, RUNS, seed=5)


def same(a: Trajectories, b: Trajectories) -> bool:
    return a.key() == b.key() and torch.equal(a.inputs, b.inputs)


def test_a_run_is_the_solver_recurrence_written_out(
    denoiser: Denoiser, collected: Trajectories
) -> None:
    """x[i+1] = a x[i] + b f[i] + c z[i] in float32, without diffusers and without the solver."""
    program, shape = denoiser.program, denoiser.info.sample_shape
    assert len(program.sample_weights[0]) == len(program.output_weights[0]) == 1
    assert program.clip is None
    assert any(program.noise_std)
    images = range(CHUNK)
    x = np.float32(program.initial_sigma) * philox.batch_normal(5, 0, images, shape)
    assert collected.conditioning is not None
    for step in range(STEPS):
        scaled = np.float32(program.input_scale[step]) * x
        np.testing.assert_array_equal(collected.inputs[step, :CHUNK].numpy(), scaled)
        f = denoiser.predict(torch.from_numpy(scaled), step, collected.conditioning[:CHUNK]).numpy()
        np.testing.assert_array_equal(collected.outputs[step, :CHUNK].numpy(), f)
        a, b = program.sample_weights[step][0], program.output_weights[step][0]
        x = np.float32(a) * x + np.float32(b) * f
        if program.noise_std[step]:
            z = philox.batch_normal(5, 1 + step, images, shape)
            x = x + np.float32(program.noise_std[step]) * z


def test_shapes_are_steps_by_runs(denoiser: Denoiser, collected: Trajectories) -> None:
    shape = (STEPS, RUNS, *denoiser.info.sample_shape)
    assert collected.inputs.shape == collected.outputs.shape == shape
    assert collected.inputs.dtype == collected.outputs.dtype == torch.float32
    assert (collected.n_steps, collected.n_runs) == (STEPS, RUNS)


@pytest.mark.parametrize("n_runs", [1, N_LABELS, 20])
def test_labels_are_balanced(denoiser: Denoiser, n_runs: int) -> None:
    found = collect_trajectories(denoiser, n_runs, seed=0).conditioning
    assert found is not None
    counts = torch.bincount(found, minlength=N_LABELS)
    assert int(counts.sum()) == n_runs
    assert int(counts.max() - counts.min()) <= 1


def test_seed_decides_everything(denoiser: Denoiser, collected: Trajectories) -> None:
    assert same(collect_trajectories(denoiser, RUNS, seed=5), collected)
    assert not same(collect_trajectories(denoiser, RUNS, seed=6), collected)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """Which chunks were really sampled."""
    seen: list[range] = []
    real = trajectories._run_chunk

    def run_chunk(denoiser: Denoiser, seed: int, images: range, *rest: Any) -> Any:
        seen.append(images)
        return real(denoiser, seed, images, *rest)

    monkeypatch.setattr(trajectories, "_run_chunk", run_chunk)
    return seen


def test_interrupted_run_goes_on_with_the_same_bits(
    denoiser: Denoiser, collected: Trajectories, tmp_path: Path, evaluated: list[range]
) -> None:
    def stop(done: int, total: int) -> None:
        assert (done, total) == (1, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_trajectories(denoiser, RUNS, seed=5, work=tmp_path, progress=stop)
    assert evaluated == [range(CHUNK)]
    found = collect_trajectories(denoiser, RUNS, seed=5, work=tmp_path)
    assert evaluated == [range(CHUNK), range(CHUNK, RUNS)]
    assert same(found, collected)
    assert same(collect_trajectories(denoiser, RUNS, seed=5, work=tmp_path), collected)
    assert len(evaluated) == 2


def _truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def _empty(data: bytes) -> bytes:
    return b""


def _zeros(data: bytes) -> bytes:
    return bytes(len(data))


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _zeros])
def test_a_damaged_chunk_is_named_and_made_again_once_deleted(
    denoiser: Denoiser,
    collected: Trajectories,
    tmp_path: Path,
    evaluated: list[range],
    damage: Callable[[bytes], bytes],
) -> None:
    collect_trajectories(denoiser, RUNS, seed=5, work=tmp_path)
    chunk = min(tmp_path.iterdir())
    chunk.write_bytes(damage(chunk.read_bytes()))
    with pytest.raises(StorageError, match="delete this file") as caught:
        collect_trajectories(denoiser, RUNS, seed=5, work=tmp_path)
    assert (caught.value.code, caught.value.path) == ("EQ-6201", str(chunk))
    chunk.unlink()
    evaluated.clear()
    assert same(collect_trajectories(denoiser, RUNS, seed=5, work=tmp_path), collected)
    assert len(evaluated) == 1


def test_chunks_of_another_model_sampler_or_seed_are_not_taken(
    denoiser: Denoiser, tmp_path: Path, evaluated: list[range]
) -> None:
    others = [
        small_denoiser(DDIMScheduler(clip_sample=False)),
        small_denoiser(DDPMScheduler(clip_sample=False), guidance=3.0),
        replace(denoiser, info=denoiser.info.model_copy(update={"fingerprint": "0" * 64})),
    ]
    for one in (denoiser, *others):
        collect_trajectories(one, 2, seed=5, work=tmp_path)
    collect_trajectories(denoiser, 2, seed=6, work=tmp_path)
    assert len(evaluated) == 5


def test_finished_work_leaves_no_partial_file(denoiser: Denoiser, tmp_path: Path) -> None:
    collect_trajectories(denoiser, 2, seed=5, work=tmp_path / "made")
    assert [p.suffix for p in (tmp_path / "made").iterdir()] == [".st"]


def test_work_under_the_name_of_other_work_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one.st", tmp_path / "other.st"
    save_tensors({"x": torch.ones(2)}, one)
    one.rename(other)
    with pytest.raises(StorageError) as caught:
        load_tensors(other)
    assert (caught.value.code, caught.value.path) == ("EQ-6201", str(other))


def test_equal_work_is_equal_files(tmp_path: Path) -> None:
    file = tmp_path / "kept.st"
    tensors = {"y": torch.ones(2), "x": torch.zeros(3)}
    written = set()
    # safetensors orders several entries of metadata anew at every call.
    for _ in range(20):
        save_tensors(tensors, file)
        written.add(file.read_bytes())
    assert len(written) == 1


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kept.st"
    save_tensors({"x": torch.ones(2)}, file)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trajectories, "save_file", full)
    with pytest.raises(OutputError, match="space") as caught:
        save_tensors({"x": torch.zeros(2)}, file)
    assert caught.value.code == "EQ-7201"
    found = load_tensors(file)
    assert found is not None
    assert torch.equal(found["x"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [file]


class Breaking(nn.Module):
    """The float module up to a step, then NaN or Inf."""

    def __init__(self, module: nn.Module, timestep: float, value: float) -> None:
        super().__init__()
        self.module = module
        self.timestep, self.value = timestep, value

    def forward(self, x: Tensor, t: Tensor, *conditioning: Tensor) -> Tensor:
        f: Tensor = self.module(x, t, *conditioning)
        return f + self.value if float(t[0]) == self.timestep else f


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_of_the_float_model_names_model_and_step(denoiser: Denoiser, value: float) -> None:
    module = Breaking(denoiser.module, denoiser.program.timesteps[1], value)
    with pytest.raises(NumericalError, match="at step 1") as caught:
        collect_trajectories(replace(denoiser, module=module), 2)
    assert caught.value.code == "EQ-5201"
    assert caught.value.path == "small"


@pytest.mark.parametrize(("n_runs", "seed"), [(0, 0), (-3, 0), (1, -1), (1, 2**64)])
def test_impossible_arguments_are_refused(denoiser: Denoiser, n_runs: int, seed: int) -> None:
    with pytest.raises(InputError) as caught:
        collect_trajectories(denoiser, n_runs, seed=seed)
    assert caught.value.code == "EQ-3201"


def test_progress_counts_chunks(denoiser: Denoiser) -> None:
    seen: list[tuple[int, int]] = []
    collect_trajectories(denoiser, RUNS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_key_covers_every_tensor(collected: Trajectories) -> None:
    def changed(values: Tensor) -> Tensor:
        found: NDArray[Any] = values.numpy().copy()
        found.reshape(-1)[0] += 1
        return torch.from_numpy(found)

    assert collected.conditioning is not None
    others = [
        replace(collected, inputs=changed(collected.inputs)),
        replace(collected, outputs=changed(collected.outputs)),
        replace(collected, conditioning=changed(collected.conditioning)),
    ]
    assert len({collected.key(), *(t.key() for t in others)}) == 4
