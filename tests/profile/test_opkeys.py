"""The operations of a network, as a profile names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.profile import OpKey
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.layers import get_layer
from edgeqdm.models.load import load
from edgeqdm.profile.opkeys import NetworkKeys, evaluation_batch, layer_of, network_keys
from edgeqdm.testing import tiny

WRITE = {"unet": tiny.write_tiny_unet, "dit": tiny.write_tiny_dit}
CASES = [("unet", 1.0), ("unet", 2.0), ("dit", 1.0), ("dit", 3.0)]


class Seen:
    """What hooks of this file see at every layer of one evaluation."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.fed: dict[str, Tensor] = {}
        self.returned: dict[str, tuple[int, ...]] = {}
        hooks = [
            get_layer(denoiser.module, info.name).register_forward_hook(self.hook(info.name))
            for info in denoiser.info.layers
        ]
        x = torch.randn(1, *denoiser.info.sample_shape)
        conditioning = denoiser.draw_conditioning(1, torch.Generator().manual_seed(1))
        denoiser.predict(x, 0, conditioning)
        for hook in hooks:
            hook.remove()

    def hook(self, name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.fed[name], self.returned[name] = args[0], tuple(output.shape)

        return keep


class Case:
    def __init__(self, folder: Path, kind: str, guidance: float) -> None:
        self.denoiser = load(WRITE[kind](folder), scheduler="ddim", steps=2, guidance=guidance)
        self.network: NetworkKeys = network_keys(self.denoiser)
        self.seen = Seen(self.denoiser)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} at {case[1]:g}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("model"), *request.param)


def test_keys_have_the_shapes_that_hooks_see(case: Case) -> None:
    assert tuple(case.network.keys) == tuple(info.name for info in case.denoiser.info.layers)
    for info in case.denoiser.info.layers:
        key = case.network.keys[info.name]
        layer = get_layer(case.denoiser.module, info.name)
        assert key.kind == info.kind
        assert key.input_shape == tuple(case.seen.fed[info.name].shape)
        assert key.weight_shape == info.weight_shape
        assert key.bias == (layer.bias is not None)
    assert case.network.model == case.denoiser.info.fingerprint


def test_guidance_evaluates_two_samples_for_one_image(case: Case) -> None:
    batch = 2 if case.denoiser.guidance.active else 1
    assert case.network.batch == evaluation_batch(case.denoiser) == batch
    sampled = [k for k in case.network.keys.values() if k.kind is LayerKind.CONV2D]
    assert sampled
    assert {key.input_shape[0] for key in sampled} == {batch}


def test_siblings_are_the_layers_that_hooks_see_fed_the_same_memory(case: Case) -> None:
    by_place: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, x in case.seen.fed.items():
        by_place.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(name)
    expected = {frozenset(names) for names in by_place.values() if len(names) > 1}
    assert {frozenset(names) for names in case.network.siblings} == expected


def test_query_key_and_value_of_self_attention_are_siblings(case: Case) -> None:
    queries = [name for name in case.network.keys if name.endswith("to_q")]
    assert queries
    groups = [set(names) for names in case.network.siblings]
    for query in queries:
        stem = query.removesuffix("to_q")
        assert {stem + part for part in ("to_q", "to_k", "to_v")} in groups
    assert all(len(names) > 1 for names in case.network.siblings)


def test_a_layer_of_a_key_is_the_same_operation(case: Case) -> None:
    """Its output has the shape, and its own key is the key it was made of."""
    for name, key in case.network.keys.items():
        made, original = layer_of(key), get_layer(case.denoiser.module, name)
        assert isinstance(made, nn.Linear | nn.Conv2d)
        assert tuple(made(torch.zeros(key.input_shape)).shape) == case.seen.returned[name]
        for field in ("stride", "padding", "dilation", "groups"):
            assert getattr(made, field, None) == getattr(original, field, None)
        assert tuple(made.weight.shape) == key.weight_shape
        assert not made.training


def test_cross_attention_shares_the_embedding_and_not_the_query(tmp_path: Path) -> None:
    denoiser = load(
        tiny.write_tiny_conditional_unet(tmp_path),
        scheduler="ddim",
        steps=2,
        conditioning=tiny.tiny_embeddings(2),
    )
    network = network_keys(denoiser)
    crossed = [name.removesuffix("to_q") for name in network.keys if name.endswith("attn2.to_q")]
    assert crossed
    for stem in crossed:
        (group,) = [names for names in network.siblings if stem + "to_k" in names]
        assert stem + "to_v" in group
        assert stem + "to_q" not in group
        assert network.keys[stem + "to_k"].input_shape[-1] == tiny.EMBEDDING_SHAPE[1]


class Padded(nn.Module):
    """Convolutions padded by name."""

    def __init__(self, **last: Any) -> None:
        super().__init__()
        self.even = nn.Conv2d(4, 8, 3, padding="same")
        self.wide = nn.Conv2d(8, 8, (3, 5), padding="same", dilation=(2, 1))
        self.bare = nn.Conv2d(8, 8, 1, padding="valid")
        self.last = nn.Conv2d(8, 4, **(last or {"kernel_size": 1}), padding="same")

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        found: Tensor = self.last(self.bare(self.wide(self.even(x))))
        return found


def wrapped(module: nn.Module) -> Denoiser:
    inputs = (torch.zeros(1, 4, 8, 6), torch.zeros(1))
    return wrap(module, DDIMScheduler(), inputs, steps=2)


def test_padding_given_by_name_is_told_in_numbers() -> None:
    keys = network_keys(wrapped(Padded())).keys
    found = {name: key.padding for name, key in keys.items()}
    assert found == {"even": (1, 1), "wide": (2, 2), "bare": (0, 0), "last": (0, 0)}
    for key in keys.values():
        assert layer_of(key)(torch.zeros(key.input_shape)).shape[2:] == key.input_shape[2:]


# PyTorch warns that it copies the input.
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("last", [{"kernel_size": 2}, {"kernel_size": (3, 4)}])
def test_a_layer_padded_unequally_is_refused_by_name(last: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="EQ-4312") as caught:
        network_keys(wrapped(Padded(**last)))
    assert caught.value.path == "last"


def test_the_denoiser_is_left_without_hooks(case: Case) -> None:
    assert not any(module._forward_pre_hooks for module in case.denoiser.module.modules())


def test_equal_keys_give_equal_weights() -> None:
    key = OpKey(
        kind=LayerKind.CONV2D,
        input_shape=(1, 8, 6, 5),
        weight_shape=(12, 2, 3, 1),
        bias=True,
        stride=(2, 1),
        padding=(1, 0),
        dilation=(1, 2),
        groups=4,
    )
    one, other = layer_of(key), layer_of(key)
    assert isinstance(one, nn.Conv2d)
    assert torch.equal(one.weight, other.weight)
    assert (one.in_channels, one.groups) == (8, 4)
    reference = nn.functional.conv2d(
        x := torch.randn(key.input_shape), one.weight, one.bias, (2, 1), (1, 0), (1, 2), 4
    )
    assert torch.equal(one(x), reference)
    other = layer_of(key.model_copy(update={"bias": False}))
    assert other.bias is None
