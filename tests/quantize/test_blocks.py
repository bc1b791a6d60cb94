"""Blocks are found by class, in the order they run, and every planned layer is in exactly one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from edgeqdm.errors import InputError
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.load import load
from edgeqdm.quantize.blocks import Block, find_blocks, most_reused
from edgeqdm.testing import tiny
from edgeqdm.testing.conformance import small_denoiser


def body(denoiser: Denoiser) -> tuple[str, ...]:
    return tuple(layer.name for layer in denoiser.info.layers if layer.role == "body")


def loaded(write: Callable[[Path], Path], folder: Path) -> Denoiser:
    if write is tiny.write_tiny_conditional_unet:
        return load(write(folder), steps=2, conditioning=tiny.tiny_embeddings(2))
    return load(write(folder), steps=2)


def test_unet_blocks_are_residual_blocks_and_attention_in_order(tmp_path: Path) -> None:
    denoiser = loaded(tiny.write_tiny_unet, tmp_path)
    blocks = find_blocks(denoiser, body(denoiser))
    assert [block.name for block in blocks] == [
        "down_blocks.0.resnets.0",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.resnets.0",
        "down_blocks.1.attentions.0",
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
        "up_blocks.0.resnets.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.resnets.1",
        "up_blocks.0.attentions.1",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
    ]
    (downsampler,) = (b for b in blocks if b.name == "down_blocks.0.downsamplers.0.conv")
    assert downsampler.layers == (downsampler.name,)


def test_layers_of_a_residual_block_are_in_the_order_they_run(tmp_path: Path) -> None:
    denoiser = loaded(tiny.write_tiny_unet, tmp_path)
    (block,) = (
        b for b in find_blocks(denoiser, body(denoiser)) if b.name == "down_blocks.1.resnets.0"
    )
    assert block.layers == (
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.1.resnets.0.conv2",
        "down_blocks.1.resnets.0.conv_shortcut",
    )


def test_transformer_blocks_hold_their_attention(tmp_path: Path) -> None:
    """C6."""
    denoiser = loaded(tiny.write_tiny_dit, tmp_path)
    blocks = find_blocks(denoiser, body(denoiser))
    assert [block.name for block in blocks] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert [name.removeprefix("transformer_blocks.0.") for name in blocks[0].layers] == [
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    ]


def test_conditional_unet_has_transformer_blocks_and_single_projections(tmp_path: Path) -> None:
    denoiser = loaded(tiny.write_tiny_conditional_unet, tmp_path)
    names = [block.name for block in find_blocks(denoiser, body(denoiser))]
    inside = "down_blocks.1.attentions.0"
    start = names.index(f"{inside}.proj_in")
    assert names[start : start + 3] == [
        f"{inside}.proj_in",
        f"{inside}.transformer_blocks.0",
        f"{inside}.proj_out",
    ]


@pytest.mark.parametrize(
    "write", [tiny.write_tiny_unet, tiny.write_tiny_dit, tiny.write_tiny_conditional_unet]
)
def test_every_layer_is_in_exactly_one_block(write: Callable[[Path], Path], tmp_path: Path) -> None:
    denoiser = loaded(write, tmp_path)
    names = tuple(layer.name for layer in denoiser.info.layers)
    blocks = find_blocks(denoiser, names)
    assert sorted(name for block in blocks for name in block.layers) == sorted(names)
    assert all(block.layers for block in blocks)


def test_unknown_modules_are_single_layers_with_their_multiply_adds() -> None:
    denoiser = small_denoiser(DDPMScheduler(clip_sample=False))
    assert find_blocks(denoiser, ("mix", "conv")) == (
        Block("conv", ("conv",), 64 * 8 * 8 * 9),
        Block("mix", ("mix",), 64 * 8 * 8),
    )


def test_no_layers_have_no_blocks() -> None:
    assert find_blocks(small_denoiser(DDPMScheduler(clip_sample=False)), ()) == ()


class Lazy(nn.Module):
    """Has a layer it never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.spare = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.conv(x)
        return found


def test_layer_that_does_not_run_is_named() -> None:
    example = (torch.zeros(2, 4, 8, 8), torch.tensor([9, 9]))
    denoiser = wrap(Lazy(), DDPMScheduler(clip_sample=False), example, steps=2)
    with pytest.raises(InputError) as caught:
        find_blocks(denoiser, ("conv", "spare"))
    assert (caught.value.code, caught.value.path) == ("EQ-3252", "spare")


def test_layers_of_the_finest_resolution_are_most_reused(tmp_path: Path) -> None:
    """Whole resolutions, finest first, within a share of the weights of the body."""
    denoiser = loaded(tiny.write_tiny_unet, tmp_path)
    sizes = {x.name: math.prod(x.weight_shape) for x in denoiser.info.layers if x.role == "body"}
    fine = most_reused(denoiser, 0.9)
    assert {"down_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv1"} <= set(fine)
    assert "down_blocks.0.downsamplers.0.conv" not in fine
    assert not any("mid_block" in name for name in fine)
    share = sum(sizes[name] for name in fine) / sum(sizes.values())
    assert most_reused(denoiser, share) == fine
    assert most_reused(denoiser, share - 1e-6) == ()
    assert set(most_reused(denoiser, 1.0)) == {*sizes}


def test_a_transformer_has_one_resolution(tmp_path: Path) -> None:
    assert most_reused(loaded(tiny.write_tiny_dit, tmp_path), 0.9) == ()


class Attention(nn.Module):
    """Named like a block, and never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Conv2d(4, 4, 1)


class CallsParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.last = Attention(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y: Tensor = self.last(self.attn.to_q(x))
        return y


def test_a_block_that_is_never_called_is_none() -> None:
    example = (torch.zeros(1, 4, 8, 8), torch.zeros(1))
    denoiser = wrap(CallsParts(), DDPMScheduler(clip_sample=False), example, steps=2)
    found = find_blocks(denoiser, ("attn.to_q", "last"))
    assert [(block.name, block.layers) for block in found] == [
        ("attn.to_q", ("attn.to_q",)),
        ("last", ("last",)),
    ]
