"""A network split at its skip connections is the same network, with a range for each half."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import diffusers
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.errors import InputError
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.layers import get_layer, network_of
from edgeqdm.models.load import load
from edgeqdm.models.split import SplitConv2d, has_split_skips, split_skips
from edgeqdm.testing import tiny

X = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 3, 1])
EMBEDDINGS = tiny.tiny_embeddings(3)
# A sum over channels in two parts is rounded once more; relative to the largest output.
SPLIT_TOLERANCE = 1e-5
# Channels that come from below and over the skip connection, by the up block of the tiny UNets:
# down blocks of 8 and 16 channels, read back in reverse.
BOUNDARIES = {
    "up_blocks.0.resnets.0": (16, 16),
    "up_blocks.0.resnets.1": (16, 8),
    "up_blocks.1.resnets.0": (16, 8),
    "up_blocks.1.resnets.1": (8, 8),
}


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return load(tiny.write_tiny_unet(tmp_path_factory.mktemp("unet")), steps=4)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    folder = tiny.write_tiny_conditional_unet(tmp_path_factory.mktemp("conditional"))
    return load(folder, steps=4, conditioning=EMBEDDINGS, null_conditioning=EMBEDDINGS[0])


@pytest.fixture(params=["unet", "conditional"])
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    found: Denoiser = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def split(unet: Denoiser) -> Denoiser:
    return split_skips(unet)


def halves(denoiser: Denoiser) -> dict[str, SplitConv2d]:
    modules = network_of(denoiser.module).named_modules()
    return {name: module for name, module in modules if isinstance(module, SplitConv2d)}


def assert_same(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=SPLIT_TOLERANCE * scale, rtol=0)


def test_split_network_gives_the_same_output_at_every_step(denoiser: Denoiser) -> None:
    fed = LABELS if denoiser.info.conditioning.kind == "label" else EMBEDDINGS
    found = split_skips(denoiser)
    for step in range(denoiser.program.n_steps):
        assert_same(found.predict(X, step, fed), denoiser.predict(X, step, fed))


def test_both_convolutions_of_every_up_block_are_split_where_the_skip_begins(
    denoiser: Denoiser,
) -> None:
    found = halves(split_skips(denoiser))
    channels = {n: (c.hidden.in_channels, c.skip.in_channels) for n, c in found.items()}
    assert channels == {
        f"{block}.{leaf}": pair
        for block, pair in BOUNDARIES.items()
        for leaf in ("conv1", "conv_shortcut")
    }


def test_halves_are_the_channels_of_the_concatenated_tensors(
    unet: Denoiser, split: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortcut is fed the concatenation itself, so its halves are fed its two parts."""
    parts: list[tuple[Tensor, ...]] = []
    cat = torch.cat

    def recorded(tensors: tuple[Tensor, ...], dim: int = 0) -> Tensor:
        if tensors[0].dim() == 4:
            parts.append(tuple(tensors))
        return cat(tensors, dim)

    fed: list[Tensor] = []
    convs = [
        half
        for block in BOUNDARIES
        for half in get_layer(split.module, f"{block}.conv_shortcut").children()
    ]
    handles = [c.register_forward_pre_hook(lambda _, args: fed.append(args[0])) for c in convs]
    monkeypatch.setattr(torch, "cat", recorded)
    split.predict(X, 1, LABELS)
    for handle in handles:
        handle.remove()
    expected = [part for pair in parts for part in pair]
    assert len(expected) == len(fed) == 8
    assert all(torch.equal(a, b) for a, b in zip(fed, expected, strict=True))


def test_halves_are_ordinary_body_layers(unet: Denoiser, split: Denoiser) -> None:
    before = {layer.name: layer for layer in unet.info.layers}
    after = {layer.name: layer for layer in split.info.layers}
    names = halves(split)
    new = {f"{name}.{half}" for name in names for half in ("hidden", "skip")}
    assert set(after) == set(before) - set(names) | new
    assert {after[name].role for name in new} == {"body"}
    assert all(after[name] == before[name] for name in set(after) - new)
    for name in names:
        (c_out, c_in, *kernel), (_, hidden, *_) = (
            before[name].weight_shape,
            after[f"{name}.hidden"].weight_shape,
        )
        assert after[f"{name}.skip"].weight_shape == (c_out, c_in - hidden, *kernel)


def test_halves_are_calibrated_with_ranges_of_their_own(split: Denoiser) -> None:
    names = ("up_blocks.1.resnets.0.conv1.hidden", "up_blocks.1.resnets.0.conv1.skip")
    seen = observe(split, collect_trajectories(split, 4, seed=1), names)
    highs = [seen[name].input.high for name in names]
    assert highs[0].shape == highs[1].shape == (split.program.n_steps,)
    assert not torch.equal(*highs)


def test_only_layers_and_fingerprint_of_the_description_change(
    unet: Denoiser, split: Denoiser
) -> None:
    known = {"layers": split.info.layers, "fingerprint": split.info.fingerprint}
    assert unet.info.model_copy(update=known) == split.info
    assert split.info.fingerprint != unet.info.fingerprint
    assert split_skips(unet).info == split.info
    assert (split.program, split.guidance) == (unet.program, unet.guidance)


def test_fingerprint_tells_models_apart_that_only_their_configuration_does(
    unet: Denoiser, split: Denoiser
) -> None:
    info = unet.info.model_copy(update={"fingerprint": "0" * 64})
    other = Denoiser(unet.module, info, unet.program, unet.guidance, None, None)
    assert split_skips(other).info.fingerprint != split.info.fingerprint


def test_embeddings_of_a_conditional_model_are_kept(conditional: Denoiser) -> None:
    found = split_skips(conditional)
    assert found.conditioning_samples is conditional.conditioning_samples
    assert found.null_embedding is conditional.null_embedding


def test_original_is_left_as_it_is(unet: Denoiser) -> None:
    before, random = copy.deepcopy(unet.module.state_dict()), torch.get_rng_state()
    split_skips(unet)
    after = unet.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(m._forward_pre_hooks for m in unet.module.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_split_model_shares_no_weight_with_the_original(unet: Denoiser, split: Denoiser) -> None:
    own = {p.data_ptr() for p in unet.module.parameters()}
    assert not own & {p.data_ptr() for p in split.module.parameters()}


def test_splitting_twice_splits_once(split: Denoiser) -> None:
    assert split_skips(split) is split


def test_split_model_is_told_from_a_whole_one(unet: Denoiser, split: Denoiser) -> None:
    assert has_split_skips(split)
    assert not has_split_skips(unet)


def test_transformer_has_nothing_to_split(tmp_path_factory: pytest.TempPathFactory) -> None:
    dit = load(tiny.write_tiny_dit(tmp_path_factory.mktemp("dit")), steps=4)
    assert split_skips(dit) is dit


def test_wrapped_unet_is_split_too() -> None:
    network = tiny.build_network(tiny.UNET_CONFIG)
    example = (X, torch.tensor([500, 500, 500]), LABELS)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    wrapped = wrap(network, scheduler, example, steps=2, n_labels=4)
    found = split_skips(wrapped)
    assert len(halves(found)) == 2 * len(BOUNDARIES)
    assert_same(found.predict(X, 1, LABELS), wrapped.predict(X, 1, LABELS))


Join = Callable[[Tensor, Tensor], Tensor]


class Toy(nn.Module):
    """One residual block fed a concatenation of 8 and 4 channels, formed at will."""

    def __init__(self, join: Join, *, calls: tuple[bool, ...] = (True,)) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 1)
        self.block = ResnetBlock2D(in_channels=12, out_channels=4, temb_channels=None, groups=4)
        self.last = nn.Conv2d(4, 4, 1)
        self.join, self.calls = join, calls

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        fed = self.join(self.first(x), x)
        found = sum(self.block(fed if joined else fed + 0.0, None) for joined in self.calls)
        return cast(Tensor, self.last(found))


def toy(join: Join, **options: Any) -> Denoiser:
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    example = (X, torch.tensor([500, 500, 500]))
    return wrap(Toy(join, **options), scheduler, example, steps=2)


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.cat([a, b], dim=1),
        lambda a, b: torch.cat((a, b), -3),
        lambda a, b: torch.cat(tensors=[a, b], dim=1),
        lambda a, b: torch.concat([a, b], dim=1),
        lambda a, b: torch.concatenate([a, b], axis=1),  # type: ignore[call-arg]
    ],
)
def test_every_spelling_of_concatenation_is_seen(join: Join) -> None:
    whole = toy(join)
    found = split_skips(whole)
    assert {name: conv.boundary for name, conv in halves(found).items()} == {
        "block.conv1": 8,
        "block.conv_shortcut": 8,
    }
    assert_same(found.predict(X, 0, None), whole.predict(X, 0, None))


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.cat([a, b[:, :2], b[:, 2:]], dim=1),
        lambda a, b: torch.cat([x := torch.cat([a, b], 1), x], dim=2),
        lambda a, b: torch.cat([a, b], dim=1) * 2,
    ],
    ids=["three parts", "stacked rows", "changed afterwards"],
)
def test_what_is_not_two_halves_side_by_side_is_left_whole(join: Join) -> None:
    class Cropped(Toy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            f: Tensor = super().forward(x, t)
            return f[:, :, :8]

    whole = wrap(
        Cropped(join),
        diffusers.DDIMScheduler(clip_sample=False),
        (X, torch.tensor([500, 500, 500])),
        steps=2,
    )
    assert split_skips(whole) is whole


def test_block_fed_in_different_ways_is_left_whole() -> None:
    def side_by_side(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)

    assert split_skips(whole := toy(side_by_side, calls=(True, False))) is whole
    assert len(halves(split_skips(toy(side_by_side, calls=(True, True))))) == 2


@given(
    c_in=st.integers(2, 9),
    c_out=st.integers(1, 4),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "circular", "replicate"]),
    data=st.data(),
)
def test_sum_of_halves_equals_the_whole_convolution(
    c_in: int, c_out: int, kernel: int, stride: int, bias: bool, mode: Any, data: st.DataObject
) -> None:
    boundary = data.draw(st.integers(1, c_in - 1))
    conv = nn.Conv2d(
        c_in, c_out, kernel, stride=stride, padding=1, bias=bias, padding_mode=mode
    ).requires_grad_(False)
    x = torch.randn(2, c_in, 6, 5)
    found = SplitConv2d(conv, boundary)
    assert_same(found(x), conv(x))
    whole = torch.cat([found.hidden.weight, found.skip.weight], dim=1)
    assert torch.equal(whole, conv.weight)
    assert found.skip.bias is None
    assert (found.hidden.bias is not None) == bias


@pytest.mark.parametrize("boundary", [-1, 0, 8, 9])
def test_boundary_outside_the_channels_is_refused(boundary: int) -> None:
    with pytest.raises(InputError, match=f"boundary {boundary}") as caught:
        SplitConv2d(nn.Conv2d(8, 4, 3), boundary)
    assert caught.value.code == "EQ-3243"


def test_convolution_with_groups_is_refused() -> None:
    with pytest.raises(InputError, match="2 groups") as caught:
        SplitConv2d(nn.Conv2d(8, 4, 3, groups=2), 4)
    assert caught.value.code == "EQ-3242"


def rounded(x: Tensor, bits: int = 8) -> Tensor:
    scale = x.abs().max() / (2 ** (bits - 1) - 1)
    return cast(Tensor, torch.round(x / scale) * scale)


@given(ratio=st.floats(4.0, 100.0), seed=st.integers(0, 100))
def test_own_scales_round_the_narrow_half_more_finely(ratio: float, seed: int) -> None:
    """Q-Diffusion, section 4.2: one scale for both halves costs the narrow one its codes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((2, 8, 8, 8), generator=generator)
    x[:, :4] *= ratio
    conv = nn.Conv2d(8, 4, 3, bias=False).requires_grad_(False)
    conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
    # Weights even out the ranges, as training does where both halves matter.
    conv.weight[:, :4] /= ratio
    split, exact = SplitConv2d(conv, 4), conv(x)
    apart = split(torch.cat([rounded(x[:, :4]), rounded(x[:, 4:])], dim=1))
    error_apart, error_whole = (
        (apart - exact).pow(2).mean(),
        (conv(rounded(x)) - exact).pow(2).mean(),
    )
    # At a ratio of 4 the narrow half has errors of 16 times the power: at least (16 + 1) / 2 less,
    # with room for chance.
    assert error_apart < error_whole / 4
