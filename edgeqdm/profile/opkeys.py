"""The operations of a network, as a latency profile names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.profile import OpKey
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer, network_of


@dataclass(frozen=True)
class NetworkKeys:
    """The operations of one evaluation of one image.

    Attributes:
        model: fingerprint.
        batch: samples of the evaluation, 2 under guidance.
        keys: of every layer, in the order of `info.layers`.
        siblings: layers that are fed the very same tensor, at least two in each.
        rest_bytes: of all tensors that are no weight of a layer, float32.
    """

    model: str
    batch: int
    keys: Mapping[str, OpKey]
    siblings: tuple[tuple[str, ...], ...]
    rest_bytes: int = 0

    def fed_with(self, layer: str) -> tuple[str, ...]:
        """The layers that are fed the tensor this one is fed, itself among them."""
        return next((names for names in self.siblings if layer in names), (layer,))


def network_keys(denoiser: Denoiser) -> NetworkKeys:
    """The key of every layer; the denoiser runs once.

    Raises:
        UnsupportedError: EQ-4312, if a layer pads its sides unequally; names it.
    """
    keys: dict[str, OpKey] = {}
    fed: dict[str, Tensor] = {}
    hooks = []

    def recorder(name: str) -> Any:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            keys.setdefault(name, _key(name, layer, tuple(x.shape)))
            # Held until the end: freed memory would be given to another tensor.
            fed.setdefault(name, x)

        return record

    try:
        for info in denoiser.info.layers:
            layer = get_layer(denoiser.module, info.name)
            hooks.append(layer.register_forward_pre_hook(recorder(info.name), with_kwargs=True))
        conditioning = denoiser.draw_conditioning(1, torch.Generator().manual_seed(0))
        denoiser.predict(torch.zeros(1, *denoiser.info.sample_shape), 0, conditioning)
    finally:
        for hook in hooks:
            hook.remove()
    by_tensor: dict[int, list[str]] = {}
    for name, x in fed.items():
        by_tensor.setdefault(id(x), []).append(name)
    weights = {f"{info.name}.weight" for info in denoiser.info.layers}
    tensors = network_of(denoiser.module).state_dict()
    return NetworkKeys(
        model=denoiser.info.fingerprint,
        batch=evaluation_batch(denoiser),
        keys={info.name: keys[info.name] for info in denoiser.info.layers},
        siblings=tuple(tuple(names) for names in by_tensor.values() if len(names) > 1),
        rest_bytes=sum(x.nbytes for name, x in tensors.items() if name not in weights),
    )


def evaluation_batch(denoiser: Denoiser) -> int:
    """Samples the network is fed for one image at one step."""
    return 2 if denoiser.guidance.active else 1


def layer_of(key: OpKey) -> nn.Linear | nn.Conv2d:
    """A layer of this key, with random weights.

    The same key gives the same weights.
    """
    outputs, inputs = key.weight_shape[0], key.weight_shape[1]
    fan_in = math.prod(key.weight_shape[1:])
    layer: nn.Linear | nn.Conv2d
    if key.kind is LayerKind.LINEAR:
        layer = nn.Linear(inputs, outputs, bias=key.bias)
    else:
        layer = nn.Conv2d(
            inputs * key.groups,
            outputs,
            _pair(key.weight_shape[2:]),
            _pair(key.stride),
            _pair(key.padding),
            _pair(key.dilation),
            key.groups,
            bias=key.bias,
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return layer.eval()


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def _key(name: str, layer: nn.Module, input_shape: tuple[int, ...]) -> OpKey:
    weight = layer.get_parameter("weight")
    common: dict[str, Any] = {
        "input_shape": input_shape,
        "weight_shape": tuple(weight.shape),
        "bias": getattr(layer, "bias", None) is not None,
    }
    if isinstance(layer, nn.Conv2d):
        return OpKey(
            kind=LayerKind.CONV2D,
            stride=tuple(layer.stride),
            padding=_padding(name, layer),
            dilation=tuple(layer.dilation),
            groups=layer.groups,
            **common,
        )
    return OpKey(kind=LayerKind.LINEAR, **common)


def _padding(name: str, layer: nn.Conv2d) -> tuple[int, ...]:
    """Zeros on either side, by axis."""
    if layer.padding == "valid":
        return (0, 0)
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    sizes = zip(layer.kernel_size, layer.dilation, strict=True)
    both_sides = [dilation * (size - 1) for size, dilation in sizes]
    if any(total % 2 for total in both_sides):
        raise UnsupportedError(
            "EQ-4312",
            f'padding="same" of a kernel {"x".join(map(str, layer.kernel_size))} is unequal: '
            "a profile has no key for it",
            path=name,
            hint="pad the input in the module, and the layer not at all",
        )
    return tuple(total // 2 for total in both_sides)
