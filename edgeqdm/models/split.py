"""Convolutions fed hidden states beside a skip connection, split into one for each.

The two halves of such a concatenation come from far apart in the network and differ in range;
with one scale for both, the narrower half is left with a few codes. Split, each half has a layer,
and so a scale, of its own.

Source: Li et al. 2023, "Q-Diffusion", shortcut-splitting quantization,
https://arxiv.org/abs/2302.04304.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgeqdm.errors import InputError
from edgeqdm.models.denoiser import Denoiser, assemble
from edgeqdm.models.layers import Adapter, get_layer, network_of, set_layer
from edgeqdm.models.weights import fingerprint

_CAT = (torch.cat, torch.concat, torch.concatenate)
_FED_BY_CAT = ("conv1", "conv_shortcut")


class SplitConv2d(nn.Module):
    """A convolution as the sum of two, over the channels before and after a boundary.

    Equal to the whole convolution but for the order of the sum; only `hidden` has the bias.

    Raises:
        InputError: if the convolution has groups, or the boundary leaves a half without channels.
    """

    def __init__(self, conv: nn.Conv2d, boundary: int) -> None:
        super().__init__()
        if conv.groups != 1:
            message = f"a convolution with {conv.groups} groups cannot be split"
            raise InputError("EQ-3242", message, hint="leave it whole")
        if not 0 < boundary < conv.in_channels:
            message = f"boundary {boundary} is not inside {conv.in_channels} input channels"
            raise InputError("EQ-3243", message)
        self.boundary = boundary
        self.hidden = _part(conv, slice(0, boundary), conv.bias)
        self.skip = _part(conv, slice(boundary, conv.in_channels), None)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C_hidden + C_skip, H, W] -> [B, C_out, H', W']."""
        hidden, skip = input[:, : self.boundary], input[:, self.boundary :]
        return cast(Tensor, self.hidden(hidden) + self.skip(skip))


def split_skips(denoiser: Denoiser) -> Denoiser:
    """A denoiser whose convolutions over a skip connection are split where the halves meet.

    The network runs once. Where a `ResnetBlock2D` is fed two tensors concatenated along channels,
    its `conv1` and `conv_shortcut` become `SplitConv2d`; normalisation and activation before them
    keep the order of channels. The halves are layers `NAME.hidden` and `NAME.skip`, with a
    fingerprint of their own: calibration and plans of the unsplit model do not fit.

    Args:
        denoiser: left as it is.

    Returns:
        A split copy; where nothing is concatenated so, as in a transformer, `denoiser` itself.
    """
    boundaries = _boundaries(denoiser)
    if not boundaries:
        return denoiser
    module = copy.deepcopy(denoiser.module)
    for name, boundary in boundaries.items():
        conv = cast(nn.Conv2d, get_layer(module, name))
        set_layer(module, name, SplitConv2d(conv, boundary))
    origin = {"fingerprint": denoiser.info.fingerprint, "split": boundaries}
    update = {"layers": (), "fingerprint": fingerprint(network_of(module), origin)}
    return assemble(
        cast(Adapter, module),
        denoiser.info.model_copy(update=update),
        denoiser.program,
        denoiser.guidance,
        denoiser.conditioning_samples,
        denoiser.null_embedding,
    )


def has_split_skips(denoiser: Denoiser) -> bool:
    """Whether `split_skips` has made this denoiser and found something to split."""
    return any(isinstance(module, SplitConv2d) for module in denoiser.module.modules())


def _part(conv: nn.Conv2d, channels: slice, bias: Tensor | None) -> nn.Conv2d:
    part = copy.deepcopy(conv)
    part.in_channels = len(range(*channels.indices(conv.in_channels)))
    weight = conv.weight.detach()[:, channels].clone(memory_format=torch.contiguous_format)
    part.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    if bias is None:
        part.register_parameter("bias", None)
    return part


def _boundaries(denoiser: Denoiser) -> dict[str, int]:
    """Channels of the first half of every layer to split."""
    body = {layer.name for layer in denoiser.info.layers if layer.role == "body"}
    blocks = {
        name: block
        for name, block in network_of(denoiser.module).named_modules()
        if isinstance(block, ResnetBlock2D)
    }
    return {
        f"{name}.{leaf}": boundary
        for name, boundary in _concatenated(denoiser, blocks).items()
        for leaf in _FED_BY_CAT
        if f"{name}.{leaf}" in body and _splittable(getattr(blocks[name], leaf))
    }


def _splittable(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == 1


@torch.no_grad()
def _concatenated(denoiser: Denoiser, blocks: Mapping[str, nn.Module]) -> dict[str, int]:
    """Where the two halves of its input meet, for every block that is always fed two."""
    cats = _Concatenations()
    seen: dict[str, set[int | None]] = {}

    def see(name: str, value: Tensor) -> None:
        seen.setdefault(name, set()).add(cats.boundary(value))

    with _fed(blocks, see), cats:
        denoiser.module(*_inputs(denoiser))
    # Fed in different ways, a block has no boundary that fits all of them.
    single = {name: found.pop() for name, found in seen.items() if len(found) == 1}
    return {name: boundary for name, boundary in single.items() if boundary is not None}


class _Concatenations(TorchFunctionMode):
    """Keeps every result of two images concatenated along channels, and where they meet."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if func in _CAT:
            parts = args[0] if args else named["tensors"]
            dim = args[1] if len(args) > 1 else named.get("dim", named.get("axis", 0))
            if result.dim() == 4 and dim in (1, -3) and len(parts) == 2:
                self._found.append((result, parts[0].shape[1]))
        return result

    def boundary(self, value: Tensor) -> int | None:
        return next((channels for result, channels in self._found if result is value), None)


@contextmanager
def _fed(blocks: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else kwargs["input_tensor"])

        return look

    handles = [
        block.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, block in blocks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(denoiser: Denoiser) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, *denoiser.info.sample_shape), generator=generator)
    conditioning = denoiser.draw_conditioning(1, generator)
    fed = () if conditioning is None else (conditioning,)
    return (x, denoiser.timestep(0, 1), *fed)
