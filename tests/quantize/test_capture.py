"""A block's arguments come back as it was called with them, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from edgeqdm.calibrate.select import Selection, select
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.errors import NumericalError, OutputError, UnsupportedError
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.quantize.capture import Rows, call, capture
from edgeqdm.testing import tiny
from edgeqdm.testing.conformance import STEPS, small_denoiser


def selection_of(denoiser: Denoiser, per_step: int = 2) -> Selection:
    trajectories = collect_trajectories(denoiser, 4, seed=3)
    return select(trajectories, [per_step] * STEPS, seed=1)


def small(guidance: float) -> Denoiser:
    return small_denoiser(DDPMScheduler(clip_sample=False), guidance=guidance)


def test_guidance_adds_a_row_without_conditioning_for_every_sample() -> None:
    denoiser = small(2.0)
    selection = selection_of(denoiser)
    rows = Rows.of(denoiser, selection)
    n = selection.n_samples
    assert rows.n_rows == 2 * n
    x, steps, labels = rows.inputs(torch.arange(2 * n))
    assert selection.conditioning is not None
    assert torch.equal(x, torch.cat([selection.inputs, selection.inputs]))
    assert torch.equal(steps, torch.cat([selection.steps, selection.steps]))
    assert labels[:n].tolist() == [tiny.NULL_LABEL] * n
    assert torch.equal(labels[n:], selection.conditioning)
    assert rows.of_samples(torch.tensor([1])).tolist() == [1, n + 1]


def test_without_guidance_every_sample_is_one_row() -> None:
    denoiser = small(1.0)
    rows = Rows.of(denoiser, selection_of(denoiser))
    assert rows.n_rows == rows.selection.n_samples
    assert torch.equal(rows.inputs(torch.tensor([3]))[2], rows.selection.conditioning[3:4])  # type: ignore[index]


class Inner(nn.Module):
    def forward(
        self, x: Tensor, scale: float, *, bias: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return x * scale + bias


class Outer(nn.Module):
    """Calls a block with tokens folded into the batch and all kinds of arguments."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.block, self.after, self.mask = Inner(), 0, mask

    def forward(self, x: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).flatten(0, 1)
        y: Tensor = self.block(
            tokens, 2.0, bias=labels.float()[:, None].repeat_interleave(64, 0), mask=self.mask
        )
        self.after += 1
        return y


def test_captured_arguments_repeat_the_call(tmp_path: Path) -> None:
    denoiser = small(2.0)
    rows = Rows.of(denoiser, selection_of(denoiser, per_step=4))
    network = Outer(torch.ones(rows.n_rows))
    calls = capture(network, network.block, "block", rows, tmp_path / "made")
    assert network.after == 0, "the network is left as soon as the block is reached"
    chosen = torch.tensor([5, 0, 20])
    seen: dict[str, Any] = {}
    handle = network.block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update({"x": args[0], **kwargs}), with_kwargs=True
    )
    expected = network(*rows.inputs(chosen))
    handle.remove()
    arguments = calls.read(chosen)
    assert torch.equal(arguments[0], seen["x"])
    assert torch.equal(arguments["bias"], seen["bias"])
    assert calls.constant == {1: 2.0, "mask": network.mask}, "the batch is what grows with it"
    assert torch.equal(call(network.block, arguments), expected)


class Broken(Outer):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "nan":
            return self.block(x * torch.nan, 1.0, bias=x)  # type: ignore[no-any-return]
        if self.kind == "no batch":
            return self.block(torch.zeros(5), 1.0, bias=None)  # type: ignore[no-any-return]
        return x


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [
        ("nan", NumericalError, "EQ-5250"),
        ("no batch", UnsupportedError, "EQ-4243"),
        ("never", UnsupportedError, "EQ-4242"),
    ],
)
def test_block_that_cannot_be_captured_is_named(
    kind: str, error: type[UnsupportedError | NumericalError], code: str, tmp_path: Path
) -> None:
    denoiser = small(2.0)
    network = Broken(kind)
    rows = Rows.of(denoiser, selection_of(denoiser))
    with pytest.raises(error) as caught:
        capture(network, network.block, "mid.block", rows, tmp_path)
    assert (caught.value.code, caught.value.path) == (code, "mid.block")


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    denoiser = small(2.0)
    network, rows = Outer(), Rows.of(denoiser, selection_of(denoiser))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError) as caught:
            capture(network, network.block, "block", rows, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.code, caught.value.path) == ("EQ-7250", str(tmp_path))
