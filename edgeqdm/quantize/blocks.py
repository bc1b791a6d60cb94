"""The parts of a network whose layers are reconstructed together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgeqdm.errors import InputError
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer, network_of

BLOCK_CLASSES = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")
"""Classes of diffusers, or classes derived from them, by name."""


@dataclass(frozen=True)
class Block:
    """A part of the network with one output.

    Attributes:
        name: of the module inside the network; a layer that is in no block is its own.
        layers: names of its planned layers, in the order they run.
        macs: multiply-adds of these layers for one sample.
    """

    name: str
    layers: tuple[str, ...]
    macs: int


def find_blocks(denoiser: Denoiser, layers: Collection[str]) -> tuple[Block, ...]:
    """The blocks that planned layers belong to, in the order they begin to run.

    A block is the outermost `ResnetBlock2D`, `BasicTransformerBlock` or `Attention` around a layer.

    Args:
        denoiser: runs once.
        layers: names of planned layers, each one that runs.

    Raises:
        InputError: if a named layer does not run; names it.

    Source: BRECQ, https://arxiv.org/abs/2102.05426, residual blocks; EDA-DM for their choice in
        diffusion models.
    """
    around = _outermost(network_of(denoiser.module), layers)
    run = _watch(denoiser, {*layers, *around.values()})
    # Some modules are never called themselves, only their parts.
    homes = {layer: home if home in run.order else layer for layer, home in around.items()}
    missing = sorted(set(layers) - run.macs.keys())
    if missing:
        raise InputError(
            "EQ-3252",
            "the layer is planned but does not run",
            path=missing[0],
            hint="plan layers of info.layers only",
        )
    members: dict[str, list[str]] = {name: [] for name in run.order if name in homes.values()}
    for name in run.order:
        if name in homes:
            members[homes[name]].append(name)
    return tuple(
        Block(name, tuple(mine), sum(run.macs[layer] for layer in mine))
        for name, mine in members.items()
    )


def most_reused(denoiser: Denoiser, share: float) -> tuple[str, ...]:
    """Body layers whose weights are used at most positions of a sample, few of all the weights.

    In a UNet these are the layers of its finest resolution. Resolutions are taken whole, the finest
    first, as long as their layers hold no more than `share` of the weights of the body: below 1,
    none in a network of one resolution.

    Args:
        denoiser: runs once.
        share: of the weights of all body layers, 0 to 1.
    """
    sizes = {x.name: math.prod(x.weight_shape) for x in denoiser.info.layers if x.role == "body"}
    macs = _watch(denoiser, sizes).macs
    positions = {name: macs[name] // size for name, size in sizes.items() if name in macs}
    chosen: list[str] = []
    for level in sorted(set(positions.values()), reverse=True):
        chosen += [name for name, mine in positions.items() if mine == level]
        if sum(sizes[name] for name in chosen) > share * sum(sizes.values()):
            return tuple(name for name in chosen if positions[name] != level)
    return tuple(chosen)


def _outermost(network: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """The block around each layer, or the layer itself."""
    names = [name for name, module in network.named_modules() if name and _is_block(module)]

    def home(layer: str) -> str:
        around = [name for name in names if layer.startswith(f"{name}.")]
        return min(around, key=len, default=layer)

    return {layer: home(layer) for layer in layers}


def _is_block(module: nn.Module) -> bool:
    return any(base.__name__ in BLOCK_CLASSES for base in type(module).__mro__)


@dataclass
class _Run:
    """What was seen of one evaluation of one sample."""

    order: dict[str, None] = field(default_factory=dict)
    """Names of modules in the order they begin to run."""
    macs: dict[str, int] = field(default_factory=dict)

    def begin(self, name: str, *_: Any) -> None:
        self.order.setdefault(name)

    def end(self, name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        weight = layer.get_parameter("weight")
        n_outputs = output.numel() // output.shape[0] if output.dim() > 1 else output.numel()
        self.macs[name] = n_outputs * weight[0].numel()


def _watch(denoiser: Denoiser, names: Collection[str]) -> _Run:
    run = _Run()
    modules: Mapping[str, nn.Module] = {name: get_layer(denoiser.module, name) for name in names}
    with ExitStack() as hooks:
        for name, module in modules.items():
            begin = module.register_forward_pre_hook(partial(run.begin, name))
            hooks.callback(begin.remove)
            if isinstance(module, nn.Conv2d | nn.Linear):
                end = module.register_forward_hook(partial(run.end, name))
                hooks.callback(end.remove)
        conditioning = denoiser.draw_conditioning(1, torch.Generator().manual_seed(0))
        denoiser.predict(torch.zeros(1, *denoiser.info.sample_shape), 0, conditioning)
    return run
