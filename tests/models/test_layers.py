"""Roles of layers follow from what they are fed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgeqdm.errors import ModelError
from edgeqdm.ir.model import LayerInfo, LayerKind
from edgeqdm.models.layers import Adapter, find_layers, get_layer, network_of, set_layer
from edgeqdm.models.load import load
from edgeqdm.testing import tiny

X = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
T = torch.tensor([500, 500])


def names_of(layers: Iterable[LayerInfo], role: str) -> set[str]:
    return {layer.name for layer in layers if layer.role == role}


class Toy(nn.Module):
    """Every role once, a layer that never runs, and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(3, 3)
        self.last = nn.Conv2d(8, 4, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.time = nn.Linear(1, 8)
        self.first = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedded = self.time(t[:, None].float() / 1000)
        hidden = self.first(x) + embedded[:, :, None, None]
        return self.last(self.grouped(hidden))


def test_roles_of_unet(tmp_path: Path) -> None:
    layers = load(tiny.write_tiny_unet(tmp_path)).info.layers
    time_projections = {n for n in (layer.name for layer in layers) if n.endswith("time_emb_proj")}
    assert len(time_projections) == 8
    assert names_of(layers, "input") == {"conv_in"}
    assert names_of(layers, "output") == {"conv_out"}
    assert names_of(layers, "embedding") == time_projections | {
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    }


def test_roles_of_dit(tmp_path: Path) -> None:
    layers = load(tiny.write_tiny_dit(tmp_path)).info.layers
    assert names_of(layers, "input") == {"pos_embed.proj"}
    assert names_of(layers, "output") == {"proj_out_2"}
    assert names_of(layers, "embedding") == {"proj_out_1"} | {
        f"transformer_blocks.{block}.norm1.{name}"
        for block in (0, 1)
        for name in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
    }


def test_roles_of_conditional_unet_count_prompt_projections_as_embedding(tmp_path: Path) -> None:
    folder = tiny.write_tiny_conditional_unet(tmp_path)
    layers = load(folder, conditioning=tiny.tiny_embeddings(2)).info.layers
    cross = {
        n for n in (layer.name for layer in layers) if n.endswith(("attn2.to_k", "attn2.to_v"))
    }
    assert len(cross) == 8
    assert names_of(layers, "input") == {"conv_in"}
    assert names_of(layers, "output") == {"conv_out"}
    assert cross <= names_of(layers, "embedding")
    assert not {n for n in names_of(layers, "embedding") if "attn1" in n or n.endswith("to_q")}


def test_zero_initialised_output_keeps_its_role() -> None:
    network = Toy()
    nn.init.zeros_(network.last.weight)
    assert names_of(find_layers(network, X, T), "output") == {"last"}


def test_layers_are_listed_in_module_order_and_only_if_they_run() -> None:
    layers = find_layers(Toy(), X, T)
    assert [layer.name for layer in layers] == ["last", "grouped", "time", "first"]
    assert [layer.role for layer in layers] == ["output", "body", "embedding", "input"]


def test_layer_shapes_are_those_of_the_weight() -> None:
    shapes = {layer.name: (layer.kind, layer.weight_shape) for layer in find_layers(Toy(), X, T)}
    assert shapes["grouped"] == (LayerKind.CONV2D, (8, 2, 3, 3))
    assert shapes["time"] == (LayerKind.LINEAR, (8, 1))


def test_first_layer_of_a_scaled_sample_is_the_input() -> None:
    class Scaled(Toy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(2 * x - 1, t)

    assert names_of(find_layers(Scaled(), X, T), "input") == {"first"}


def test_sample_cut_into_patches_is_still_the_sample() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Linear(1, 16)
            self.patches = nn.Linear(16, 16)
            self.out = nn.Linear(16, 16)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            patches = nn.functional.pixel_unshuffle(x, 2).permute(0, 2, 3, 1)
            hidden = self.patches(patches) + self.time(t[:, None, None, None].float())
            return nn.functional.pixel_shuffle(self.out(hidden).permute(0, 3, 1, 2), 2)

    assert names_of(find_layers(Patches(), X, T), "input") == {"patches"}


def test_every_layer_fed_the_sample_is_an_input() -> None:
    class TwoEntries(Toy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t) + self.last(self.first(x))

    assert names_of(find_layers(TwoEntries(), X, T), "input") == {"first"}


def test_layer_called_with_and_without_the_sample_is_no_embedding() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Conv2d(4, 4, 1)
            self.out = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.out(self.shared(torch.ones_like(x)) + self.shared(x / 2))

    assert not names_of(find_layers(Shared(), X, T), "embedding")


def test_one_layer_is_the_input() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.only(x)

    assert [layer.role for layer in find_layers(Single(), X, T)] == ["input"]


def test_network_without_layers_is_refused() -> None:
    class Empty(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    with pytest.raises(ModelError, match="depends on the sample"):
        find_layers(Empty(), X, T)


def test_finding_layers_leaves_no_hooks_and_no_random_state() -> None:
    network, before = Toy(), torch.get_rng_state()
    find_layers(network, X, T)
    assert not any(layer._forward_pre_hooks for layer in network.modules())
    assert torch.equal(before, torch.get_rng_state())


def test_layer_names_skip_the_adapter() -> None:
    network = Toy()
    adapter = Adapter(network)
    assert network_of(adapter) is network
    assert get_layer(adapter, "grouped") is get_layer(network, "grouped") is network.grouped
    replacement = nn.Conv2d(8, 8, 1)
    set_layer(adapter, "grouped", replacement)
    assert network.grouped is replacement
