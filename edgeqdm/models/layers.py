"""The layers of a network that can be quantized, and the part each one plays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgeqdm.errors import ModelError
from edgeqdm.ir.model import LayerInfo, LayerKind
from edgeqdm.models.weights import tensor_bytes

Role = Literal["body", "input", "output", "embedding"]


class Adapter(nn.Module):
    """Calls a network as `f = adapter(x, t, *conditioning)`.

    The network is kept as `network`; layer names are names inside it, without that prefix.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def network_of(module: nn.Module) -> nn.Module:
    """The network that layer names refer to, without the adapter around it."""
    return module.network if isinstance(module, Adapter) else module


def get_layer(module: nn.Module, name: str) -> nn.Module:
    """The layer called `name` in `ModelInfo.layers`."""
    return network_of(module).get_submodule(name)


def set_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another module in the place of the layer called `name`."""
    network_of(module).set_submodule(name, layer)


def find_layers(
    module: nn.Module, x: Tensor, t: Tensor, *conditioning: Tensor
) -> tuple[LayerInfo, ...]:
    """Every convolution and linear layer that runs, with its role.

    Roles follow from what a layer is fed, never from its name. The module runs twice, on two
    different samples with the same timestep and conditioning. A layer whose input stays the same
    bit for bit is an `embedding`; of the others, the ones fed the sample itself are `input` (the
    first to run where the sample is scaled before), and the last to run is `output`.

    Args:
        module: an adapter or any module called as `module(x, t, *conditioning)`, in eval mode.
        x: sample [B, C, H, W].
        t: timestep [B].
        conditioning: as the module takes it.

    Returns:
        Layers in the order of the module tree.

    Raises:
        ModelError: if no such layer depends on the sample.
    """
    layers = {
        name: layer
        for name, layer in network_of(module).named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    first, second = _Trace(x), _Trace(x + noise)
    for trace in (first, second):
        with _recorded(layers, trace), torch.no_grad():
            module(trace.sample, t, *conditioning)
    roles = _roles(first, second)
    return tuple(_describe(name, layers[name], roles[name]) for name in layers if name in roles)


@dataclass
class _Trace:
    """What the layers were fed in one run."""

    sample: Tensor
    order: list[str] = field(default_factory=list)
    """Layer names in the order of execution, one per call."""
    digests: dict[str, list[bytes]] = field(default_factory=dict)
    fed_sample: set[str] = field(default_factory=set)

    def record(self, name: str, value: Tensor) -> None:
        self.order.append(name)
        digest = hashlib.blake2b(tensor_bytes(value)).digest()
        self.digests.setdefault(name, []).append(digest)
        if _same_values(value, self.sample):
            self.fed_sample.add(name)


def _same_values(value: Tensor, sample: Tensor) -> bool:
    # Sorted, so that a sample cut into patches is still recognised.
    if value.numel() != sample.numel():
        return False
    return torch.equal(value.flatten().sort().values, sample.flatten().sort().values)


@contextmanager
def _recorded(layers: Mapping[str, nn.Module], trace: _Trace) -> Iterator[None]:
    handles = [
        layer.register_forward_pre_hook(_recorder(name, trace), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(name: str, trace: _Trace) -> Any:
    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.record(name, args[0] if args else kwargs["input"])

    return record


def _roles(first: _Trace, second: _Trace) -> dict[str, Role]:
    roles: dict[str, Role] = {
        name: "embedding" if digests == second.digests.get(name) else "body"
        for name, digests in first.digests.items()
    }
    body = [name for name in first.order if roles[name] == "body"]
    if not body:
        raise ModelError(
            "EQ-3138",
            "no convolution or linear layer depends on the sample",
            hint="there is nothing to quantize in this network",
        )
    roles[body[-1]] = "output"
    for name in (first.fed_sample & set(body)) or {body[0]}:
        roles[name] = "input"
    return roles


def _describe(name: str, layer: nn.Conv2d | nn.Linear, role: Role) -> LayerInfo:
    kind = LayerKind.CONV2D if isinstance(layer, nn.Conv2d) else LayerKind.LINEAR
    return LayerInfo(name=name, kind=kind, weight_shape=tuple(layer.weight.shape), role=role)
