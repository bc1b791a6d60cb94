"""Samples are shared out over the steps as published, and every one is a stored x_t."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeqdm.calibrate import select as module
from edgeqdm.calibrate.select import (
    Selection,
    allocate,
    density,
    diversity,
    feature_layer,
    load_selection,
    record_features,
    relative_radius,
    save_selection,
    select,
)
from edgeqdm.calibrate.trajectories import (
    CHUNK,
    Trajectories,
    collect_trajectories,
)
from edgeqdm.errors import (
    InputError,
    ModelError,
    NumericalError,
    StorageError,
    UnsupportedError,
)
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.layers import get_layer
from edgeqdm.models.load import load
from edgeqdm.testing import tiny
from edgeqdm.testing.conformance import GUIDANCE, STEPS, small_denoiser

TOY = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])[:, None, :, None]
RUNS = CHUNK + 4


def random_features(seed: int, shape: tuple[int, int, int, int]) -> Tensor:
    """Float64 [S, B, C, P] that drifts from step to step, as real features do."""
    generator = torch.Generator().manual_seed(seed)
    first, last = torch.randn((2, *shape[1:]), generator=generator, dtype=torch.float64)
    share = torch.linspace(0, 1, shape[0], dtype=torch.float64)[:, None, None, None]
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    found: Tensor = first + share * (last - first) + 0.3 * noise
    return found


def random_trajectories(n_steps: int, n_runs: int) -> Trajectories:
    generator = torch.Generator().manual_seed(1)
    inputs, outputs = torch.randn((2, n_steps, n_runs, 2, 3, 4), generator=generator)
    return Trajectories(inputs, outputs, torch.randn((n_runs, 5), generator=generator))


shapes = st.tuples(*(st.integers(1, n) for n in (12, 3, 5, 4)))
seeds = st.integers(0, 2**16)


# Density, diversity and radius.


def naive_distance(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()) ** 2).mean())


def naive_density(features: Tensor, radius: float) -> list[int]:
    return [
        sum(naive_distance(f, g) <= radius for j, g in enumerate(features) if j != i)
        for i, f in enumerate(features)
    ]


def naive_diversity(features: Tensor) -> list[float]:
    cosine = nn.CosineSimilarity(dim=1, eps=1e-6)
    return [
        sum(float((1 - cosine(f.double(), g.double())).sum()) for g in features[others != i])
        for others in [torch.arange(len(features))]
        for i, f in enumerate(features)
    ]


@given(seed=seeds, shape=shapes, share=st.floats(0.1, 2.0), values=st.sampled_from([1, 40, 2**21]))
def test_vectorised_terms_are_those_of_naive_loops(
    seed: int, shape: tuple[int, int, int, int], share: float, values: int
) -> None:
    """E4, whole and in chunks of any size."""
    features = random_features(seed, shape).float()
    radius = share * float(features.var(unbiased=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_VALUES", values)
        found_density, found_diversity = density(features, radius), diversity(features)
    assert found_density.tolist() == naive_density(features, radius)
    # Sums of up to 12 * 3 * 4 float64 numbers of size 1 or 2 in another order.
    expected = torch.tensor(naive_diversity(features), dtype=torch.float64)
    torch.testing.assert_close(found_diversity, expected, rtol=1e-12, atol=1e-12)


@given(seed=seeds, shape=shapes, quantile=st.floats(0, 1))
def test_relative_radius_is_a_quantile_of_all_pairs(
    seed: int, shape: tuple[int, int, int, int], quantile: float
) -> None:
    features = random_features(seed, shape)
    pairs = [naive_distance(f, g) for j, g in enumerate(features) for f in features[:j]]
    expected = torch.quantile(torch.tensor(pairs or [0.0], dtype=torch.float64), quantile)
    # Differences of norms: a few float64 units of numbers of size 1.
    assert relative_radius(features, quantile) == pytest.approx(float(expected), abs=1e-13)


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-5])
def test_vectors_shorter_than_1e_6_count_as_less_alike(size: float) -> None:
    features = TOY.double().clone()
    features[:, :, :, 0] *= torch.tensor([1.0, size, 1.0, size])[:, None, None]
    # Sums of three numbers of size 1.
    assert diversity(features).tolist() == pytest.approx(naive_diversity(features), abs=1e-12)


def test_zero_vectors_differ_from_everything_by_one() -> None:
    features = torch.zeros(3, 1, 2, 1)
    features[0, 0, 0] = 5.0
    assert diversity(features).tolist() == [2.0, 2.0, 2.0]


def test_equal_steps_are_within_radius_zero_wherever_they_lie() -> None:
    """Differences of large norms must not hide that two steps are the same."""
    features = random_features(0, (6, 2, 3, 4)) * 1e3 + 1e4
    features[4] = features[1]
    assert density(features, 0.0).tolist() == [0, 1, 0, 0, 1, 0]


def test_a_pair_exactly_at_the_radius_is_within_it() -> None:
    features = random_features(3, (8, 2, 3, 4))
    for j in range(1, 8):
        for i in range(j):
            distance = naive_distance(features[i], features[j])
            expected = naive_density(features, distance * (1 + 1e-9))
            assert density(features, distance).tolist() == expected


def test_what_all_steps_have_in_common_does_not_blur_distances() -> None:
    features = random_features(3, (8, 2, 3, 4))
    radius = float(features.var())
    assert density(features + 1e6, radius).tolist() == naive_density(features, radius)


# Allocation.


def test_toy_allocation_has_the_published_numbers() -> None:
    """E1."""
    assert density(TOY, 0.1).tolist() == [1, 1, 0, 0]
    # Printed to five decimals.
    expected = torch.tensor([3.00496, 2.90050, 2.90050, 4.99504], dtype=torch.float64)
    torch.testing.assert_close(diversity(TOY), expected, rtol=0, atol=6e-6)
    found = allocate(TOY, 32, radius=0.1)
    assert found.counts == (10, 10, 0, 12)
    assert found.radius == 0.1
    # Printed to four decimals.
    assert found.weights == pytest.approx((1.0599, 1.0, 0.0, 1.2), abs=6e-5)
    shares = [weight / sum(found.weights) for weight in found.weights]
    assert shares == pytest.approx((0.3251, 0.3068, 0.0, 0.3681), abs=6e-5)
    assert allocate(TOY, 33, radius=0.1).counts == (11, 10, 0, 12)


@pytest.mark.parametrize(
    ("weights", "n_samples", "expected"),
    [
        ([1, 1, 1, 1], 2, [1, 1, 0, 0]),  # 0.5 each: half to even is 0, the first two get one
        ([1, 1, 1, 1], 6, [2, 2, 1, 1]),  # 1.5 each: half to even is 2, the last two give one
        ([1, 1, 1], 4, [2, 1, 1]),  # 1.33 each
        ([3, 5, 5, 3], 8, [2, 2, 2, 2]),  # 1.5 and 2.5 are both 2: nothing to do
        ([1, 3, 0, 3], 7, [1, 3, 0, 3]),
        ([7, 7, 0], 3, [2, 1, 0]),  # 1.5 is 2; the walk passes the step without samples
    ],
)
def test_rounding_is_half_to_even_then_largest_up_or_last_down(
    weights: list[float], n_samples: int, expected: list[int]
) -> None:
    found = module._round_shares(torch.tensor(weights, dtype=torch.float64), n_samples)
    assert found == expected


def naive_rounding(weights: list[float], n_samples: int) -> list[int]:
    """The published rule written out; Python's round is half to even too."""
    counts = [round(weight / sum(weights) * n_samples) for weight in weights]
    by_size = sorted(range(len(counts)), key=lambda step: -counts[step])
    for step in by_size[: max(0, n_samples - sum(counts))]:
        counts[step] += 1
    excess = sum(counts) - n_samples
    for step in reversed(range(len(counts))):
        if excess > 0 and counts[step] > 0:
            counts[step] -= 1
            excess -= 1
    return counts


@given(
    weights=st.lists(st.integers(0, 16), min_size=1, max_size=40).filter(any),
    n_samples=st.integers(1, 300),
)
def test_rounding_is_that_of_a_naive_loop(weights: list[int], n_samples: int) -> None:
    found = module._round_shares(torch.tensor(weights, dtype=torch.float64), n_samples)
    assert found == naive_rounding([float(w) for w in weights], n_samples)
    assert sum(found) == n_samples


@given(seed=seeds, shape=shapes, n_samples=st.integers(1, 500), weight=st.floats(0, 50))
def test_counts_add_up_for_any_number_of_samples(
    seed: int, shape: tuple[int, int, int, int], n_samples: int, weight: float
) -> None:
    """E2: fewer samples than steps and many more."""
    found = allocate(random_features(seed, shape), n_samples, diversity_weight=weight)
    assert len(found.counts) == len(found.weights) == shape[0]
    assert sum(found.counts) == n_samples
    assert min(found.counts) >= 0
    assert min(found.weights) >= 0


@given(seed=seeds, shape=shapes)
def test_turning_the_channels_changes_nothing(seed: int, shape: tuple[int, int, int, int]) -> None:
    """E2: distances and cosines do not know the axes of the channels."""
    features = random_features(seed, shape)
    square = random_features(seed + 1, (1, 1, shape[2], shape[2]))[0, 0]
    turned = torch.einsum("cd,sbdp->sbcp", torch.linalg.qr(square).Q, features)
    found, expected = allocate(turned, 64), allocate(features, 64)
    assert found.counts == expected.counts
    # Products of five channels, and quotients of differences of sums of up to 24 cosines.
    assert found.weights == pytest.approx(expected.weights, abs=1e-6)
    assert found.radius == pytest.approx(expected.radius, abs=1e-12)


@given(seed=seeds, shape=shapes, factor=st.floats(0.1, 50), share=st.floats(0.1, 2.0))
def test_scaling_the_features_scales_the_radius_only(
    seed: int, shape: tuple[int, int, int, int], factor: float, share: float
) -> None:
    """E2: V stays, D is that of radius / factor^2, and a relative radius hides the factor."""
    features = random_features(seed, shape)
    radius = share * float(features.var(unbiased=False))
    scaled = density(factor * features, radius)
    assert scaled.tolist() == density(features, radius / factor**2).tolist()
    torch.testing.assert_close(diversity(factor * features), diversity(features))
    assert allocate(factor * features, 64).counts == allocate(features, 64).counts


@pytest.mark.parametrize("radius", [None, 0.0, 3.0])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e20])
def test_equal_features_share_samples_evenly(value: float, radius: float | None) -> None:
    """E3: 0 / 0 in the original."""
    found = allocate(torch.full((7, 2, 3, 5), value), 21, radius=radius)
    assert found.counts == (3,) * 7
    assert found.weights == (1.0,) * 7


@given(seed=seeds, factors=st.lists(st.floats(0.5, 2), min_size=2, max_size=9))
def test_rounding_errors_are_not_taken_for_diversity(seed: int, factors: list[float]) -> None:
    """E3: features of one direction and different length, apart from the last bit."""
    one = random_features(seed, (1, 2, 6, 3))
    features = one * torch.tensor(factors, dtype=torch.float64)[:, None, None, None]
    found = allocate(features, 5 * len(factors), radius=1e9)
    assert found.counts == (5,) * len(factors)


def test_a_term_that_is_the_same_everywhere_is_left_out() -> None:
    for radius in (0.0, 1e9):
        found = allocate(TOY, 32, radius=radius, diversity_weight=1.0)
        spread = diversity(TOY)
        expected = (spread - spread.min()) / (spread.max() - spread.min())
        assert found.weights == pytest.approx(expected.tolist())
    only_density = allocate(TOY, 32, radius=0.1, diversity_weight=0.0)
    assert only_density.weights == (1.0, 1.0, 0.0, 0.0)


def test_a_single_step_gets_all_samples() -> None:
    found = allocate(random_features(0, (1, 2, 3, 4)), 9, minimum=9)
    assert (found.counts, found.radius, found.weights) == ((9,), 0.0, (1.0,))


def test_relative_radius_is_the_default() -> None:
    features = random_features(0, (9, 2, 3, 4))
    expected = allocate(features, 50, radius=relative_radius(features))
    assert allocate(features, 50) == expected


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    minimum=st.integers(0, 5),
)
def test_minimum_is_taken_from_the_largest_counts(counts: list[int], minimum: int) -> None:
    """C4: one at a time from the largest, of equal ones the cleanest."""
    counts[0] += max(0, minimum * len(counts) - sum(counts))
    expected = [max(minimum, count) for count in counts]
    while sum(expected) > sum(counts):
        last = max(step for step, count in enumerate(expected) if count == max(expected))
        expected[last] -= 1
    found = module._raise_to(minimum, counts)
    assert found == expected
    assert sum(found) == sum(counts)
    assert min(found) >= minimum


def test_minimum_gives_every_step_samples() -> None:
    """C4: step tables need every step."""
    assert allocate(TOY, 32, radius=0.1, minimum=2).counts == (10, 10, 2, 10)
    assert allocate(TOY, 32, radius=0.1, minimum=8).counts == (8, 8, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "code", "path"),
    [
        ({"n_samples": 0}, "EQ-3214", "n_samples"),
        ({"minimum": -1}, "EQ-3214", "minimum"),
        ({"minimum": 9}, "EQ-3214", "minimum"),
        ({"diversity_weight": -0.1}, "EQ-3213", "diversity_weight"),
        ({"diversity_weight": float("inf")}, "EQ-3213", "diversity_weight"),
        ({"radius": -1.0}, "EQ-3213", "radius"),
        ({"radius": float("nan")}, "EQ-3213", "radius"),
        ({"features": TOY.long()}, "EQ-3212", "features"),
        ({"features": TOY[0]}, "EQ-3212", "features"),
        ({"features": TOY[:0]}, "EQ-3212", "features"),
        ({"features": TOY / 0}, "EQ-3212", "features"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], code: str, path: str) -> None:
    with pytest.raises(InputError) as caught:
        allocate(**{"features": TOY, "n_samples": 32, **arguments})
    assert (caught.value.code, caught.value.path) == (code, path)


def test_quantile_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"within 0 to 1, got 1\.5"):
        relative_radius(TOY, 1.5)


def test_too_small_a_number_of_samples_says_how_many_are_needed() -> None:
    with pytest.raises(InputError, match="9 at each of 4 steps") as caught:
        allocate(TOY, 32, minimum=9)
    assert caught.value.hint == "take at least 36 samples"


# The feature.


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return small_denoiser(DDPMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def trajectories(denoiser: Denoiser) -> Trajectories:
    return collect_trajectories(denoiser, RUNS, seed=5)


def tiny_denoiser(kind: str, folder: Path, *, guidance: float = GUIDANCE) -> Denoiser:
    if kind == "unet":
        return load(tiny.write_tiny_unet(folder), steps=STEPS, guidance=guidance)
    if kind == "dit":
        return load(tiny.write_tiny_dit(folder), steps=STEPS, guidance=guidance)
    return load(
        tiny.write_tiny_conditional_unet(folder),
        steps=STEPS,
        guidance=guidance,
        conditioning=tiny.tiny_embeddings(4),
        null_conditioning=torch.zeros(tiny.EMBEDDING_SHAPE),
    )


@pytest.mark.parametrize(
    ("kind", "layer", "channels", "positions"),
    [
        ("unet", "mid_block.attentions.0", 16, 16),
        ("conditional-unet", "mid_block.attentions.0", 16, 16),
        ("dit", "transformer_blocks.1", 16, 16),
    ],
)
@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_features_are_what_the_middle_of_a_network_is_fed(
    tmp_path: Path, kind: str, layer: str, channels: int, positions: int, guidance: float
) -> None:
    """C6: bottleneck of a UNet, block in the middle of a DiT with tokens as positions."""
    denoiser = tiny_denoiser(kind, tmp_path, guidance=guidance)
    trajectories = collect_trajectories(denoiser, 3, seed=2)
    assert feature_layer(denoiser) == layer
    found = record_features(denoiser, trajectories)
    assert found.dtype == torch.float32
    batch = 3 if guidance == 1.0 else 6
    assert found.shape == (STEPS, batch, channels, positions)
    fed: list[Tensor] = []
    handle = get_layer(denoiser.module, layer).register_forward_pre_hook(
        lambda _, inputs: fed.append(inputs[0])
    )
    for step in range(STEPS):
        denoiser.predict(trajectories.inputs[step], step, trajectories.conditioning)
    handle.remove()
    assert len(fed) == STEPS
    for feature, raw in zip(found, fed, strict=True):
        for position in range(positions):
            expected = raw.flatten(2)[..., position] if raw.ndim == 4 else raw[:, position]
            assert torch.equal(feature[..., position], expected)


def test_bottleneck_without_attention_is_looked_at_whole(tmp_path: Path) -> None:
    config = {
        **tiny.UNET_CONFIG,
        "add_attention": False,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    }
    tiny.write_pipeline(tmp_path, tiny.build_network(config), config)
    denoiser = load(tmp_path, steps=STEPS)
    assert feature_layer(denoiser) == "mid_block"
    trajectories = collect_trajectories(denoiser, 2)
    assert record_features(denoiser, trajectories).shape == (STEPS, 2, 16, 16)


class Backwards(nn.Module):
    """Layers that run in the opposite order of their definition, fed by keyword."""

    def __init__(self, n_body: int) -> None:
        super().__init__()
        layers = [nn.Linear(4, 4) for _ in range(n_body)]
        self.last = nn.Conv2d(4, 4, 1)
        self.body = nn.ModuleList(layers)
        self.first = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.first(x).movedim(1, 3)
        for layer in reversed(self.body):
            hidden = layer(input=hidden)
        out: Tensor = self.last(hidden.movedim(3, 1))
        return out


def backwards(n_body: int) -> Denoiser:
    example = (torch.zeros(2, 4, 3, 2), torch.tensor([1, 1]))
    return wrap(Backwards(n_body), DDIMScheduler(clip_sample=False), example, steps=STEPS)


def test_feature_of_other_networks_is_the_middle_in_execution_order(denoiser: Denoiser) -> None:
    assert feature_layer(backwards(4)) == "body.1"
    assert feature_layer(backwards(1)) == "body.0"
    assert feature_layer(denoiser) == "mix"


def test_channels_of_a_linear_layer_come_last_whatever_its_shape() -> None:
    denoiser = backwards(1)
    trajectories = collect_trajectories(denoiser, 2)
    found = record_features(denoiser, trajectories)
    network: Any = denoiser.module.network
    with torch.no_grad():
        expected = network.first(trajectories.inputs.flatten(0, 1)).flatten(2)
    assert torch.equal(found.flatten(0, 1), expected)


def test_network_without_a_middle_is_refused() -> None:
    with pytest.raises(ModelError, match="between its first and its last") as caught:
        feature_layer(backwards(0))
    assert caught.value.code == "EQ-3210"


class Recycling(nn.Module):
    """Overwrites the input of its middle layer, which runs twice, after use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.middle = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.first(x)
        again = self.middle(hidden)
        hidden.zero_()
        out: Tensor = self.last(self.middle(again))
        return out


def test_features_are_the_first_input_as_it_was() -> None:
    example = (torch.zeros(2, 4, 3, 2), torch.tensor([1, 1]))
    denoiser = wrap(Recycling(), DDIMScheduler(clip_sample=False), example, steps=STEPS)
    trajectories = collect_trajectories(denoiser, 2)
    network: Any = denoiser.module.network
    with torch.no_grad():
        expected = network.first(trajectories.inputs.flatten(0, 1)).flatten(2)
    assert torch.equal(record_features(denoiser, trajectories).flatten(0, 1), expected)


def test_first_runs_are_replayed_in_chunks_and_no_hook_stays(
    denoiser: Denoiser, trajectories: Trajectories
) -> None:
    seen: list[tuple[int, int]] = []
    found = record_features(
        denoiser, trajectories, n_runs=99, progress=lambda done, total: seen.append((done, total))
    )
    assert found.shape == (STEPS, 2 * RUNS, 8, 64)
    assert seen == [(k + 1, 2 * STEPS) for k in range(2 * STEPS)]
    assert torch.equal(record_features(denoiser, trajectories), found[:, : 2 * CHUNK])
    few = record_features(denoiser, trajectories, n_runs=3)
    assert few.shape == (STEPS, 6, 8, 64)
    # Other batch sizes may add up in another order.
    torch.testing.assert_close(few[:, :3], found[:, :3], rtol=1e-5, atol=1e-5)
    assert not get_layer(denoiser.module, "mix")._forward_pre_hooks


def test_overflow_names_layer_and_step(denoiser: Denoiser, trajectories: Trajectories) -> None:
    inputs = trajectories.inputs.clone()
    inputs[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match="at step 1") as caught:
        record_features(denoiser, replace(trajectories, inputs=inputs))
    assert (caught.value.code, caught.value.path) == ("EQ-5202", "mix")
    assert not get_layer(denoiser.module, "mix")._forward_pre_hooks


class Skipping(Backwards):
    """Leaves its body out at the cleanest step."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = super().forward(x, t) if float(t[0]) > 0 else self.last(self.first(x))
        return out


def test_layer_that_does_not_run_at_a_step_is_refused() -> None:
    example = (torch.zeros(2, 4, 3, 2), torch.tensor([1, 1]))
    denoiser = wrap(Skipping(1), DDIMScheduler(clip_sample=False), example, steps=STEPS)
    assert denoiser.program.timesteps[-1] == 0
    trajectories = collect_trajectories(denoiser, 2)
    with pytest.raises(UnsupportedError, match=f"at step {STEPS - 1}") as caught:
        record_features(denoiser, trajectories)
    assert (caught.value.code, caught.value.path) == ("EQ-4203", "body.0")


def test_trajectories_of_another_sampler_and_no_runs_are_refused(
    denoiser: Denoiser, trajectories: Trajectories
) -> None:
    short = replace(trajectories, inputs=trajectories.inputs[1:])
    with pytest.raises(InputError, match=f"{STEPS - 1} steps, the sampler has {STEPS}"):
        record_features(denoiser, short)
    with pytest.raises(InputError, match="at least 1 run"):
        record_features(denoiser, trajectories, n_runs=0)


# Selection.


def same(a: Selection, b: Selection) -> bool:
    return a.key() == b.key() and torch.equal(a.inputs, b.inputs)


@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any),
    extra_runs=st.integers(0, 40),
    seed=seeds,
)
def test_every_sample_is_the_stored_one_and_no_run_gives_a_step_twice(
    counts: list[int], extra_runs: int, seed: int
) -> None:
    """E5."""
    trajectories = random_trajectories(len(counts), max(counts) + extra_runs)
    found = select(trajectories, counts, seed=seed)
    assert found.n_samples == sum(counts)
    pairs = list(zip(found.runs.tolist(), found.steps.tolist(), strict=True))
    assert trajectories.conditioning is not None
    assert found.conditioning is not None
    for k, (run, step) in enumerate(pairs):
        assert torch.equal(found.inputs[k], trajectories.inputs[step, run])
        assert torch.equal(found.outputs[k], trajectories.outputs[step, run])
        assert torch.equal(found.conditioning[k], trajectories.conditioning[run])
    assert torch.bincount(found.steps, minlength=len(counts)).tolist() == counts
    assert len(set(pairs)) == len(pairs)
    uses = Counter(run for run, _ in pairs)
    fewest = sum(counts) // trajectories.n_runs
    assert all(uses[run] - fewest in (0, 1) for run in range(trajectories.n_runs))


def test_step_zero_is_the_noisiest(denoiser: Denoiser, trajectories: Trajectories) -> None:
    """E5: the only step whose samples are the initial noise."""
    assert denoiser.program.timesteps[0] == max(denoiser.program.timesteps)
    found = select(trajectories, (5, 0, 0))
    for x, run in zip(found.inputs, found.runs, strict=True):
        assert torch.equal(x, trajectories.inputs[0, run])
    again = denoiser.predict(found.inputs, 0, found.conditioning)
    # Another batch may add up in another order; the outputs are of size 1.
    torch.testing.assert_close(again, found.outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("counts", "n_runs"), [((4, 1, 7), 12), ((9, 12, 8), 12)])
def test_runs_and_order_are_drawn_evenly(counts: tuple[int, ...], n_runs: int) -> None:
    trajectories, n_draws = random_trajectories(len(counts), n_runs), 400
    hits = torch.zeros(len(counts), n_runs)
    first = torch.zeros(len(counts))
    for seed in range(n_draws):
        found = select(trajectories, counts, seed=seed)
        hits[found.steps, found.runs] += 1
        first[found.steps[0]] += 1
    # Of all runs, which ones give a step's samples; of all samples, which step comes first.
    for found_hits, n_of in ((hits, n_runs), (first[:, None], sum(counts))):
        chance = torch.tensor(counts)[:, None] / n_of
        # Chance 1 leaves no deviation at all.
        deviation = (n_draws * chance * (1 - chance)).sqrt().clamp_min(1e-9)
        # Five standard deviations of a binomial count.
        assert bool((((found_hits - n_draws * chance) / deviation).abs() < 5).all())


def test_seed_decides_everything() -> None:
    trajectories = random_trajectories(4, 8)
    counts = (3, 1, 0, 2)
    found = select(trajectories, counts, seed=7)
    assert same(found, select(trajectories, list(counts), seed=7))
    assert not same(found, select(trajectories, counts, seed=8))


def test_a_whole_trajectory_set_can_be_selected() -> None:
    trajectories = random_trajectories(4, 8)
    found = select(trajectories, [8] * 4)
    restored = torch.empty_like(trajectories.inputs)
    restored[found.steps, found.runs] = found.inputs
    assert torch.equal(restored, trajectories.inputs)


def test_too_few_trajectories_name_the_step_and_the_number_needed() -> None:
    with pytest.raises(InputError, match="step 2 is to give 9 samples") as caught:
        select(random_trajectories(4, 8), (8, 1, 9, 0))
    assert caught.value.code == "EQ-3216"
    assert "8 trajectories" in caught.value.message
    assert caught.value.hint is not None
    assert "at least 9 trajectories" in caught.value.hint


@pytest.mark.parametrize("counts", [(1, 2), (0, 0, 0, 0), (2, -1, 1, 1), ()])
def test_counts_that_do_not_fit_the_steps_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        select(random_trajectories(4, 8), counts)
    assert (caught.value.code, caught.value.path) == ("EQ-3215", "counts")


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(InputError) as caught:
        select(random_trajectories(2, 2), (1, 1), seed=seed)
    assert caught.value.code == "EQ-3217"


def test_features_to_samples_end_to_end(denoiser: Denoiser, trajectories: Trajectories) -> None:
    allocation = allocate(record_features(denoiser, trajectories), 24, minimum=2)
    found = select(trajectories, allocation.counts, seed=3)
    assert torch.bincount(found.steps).tolist() == list(allocation.counts)
    assert found.conditioning is not None
    assert found.conditioning.dtype == torch.int64


# The file.


@pytest.fixture
def selection() -> Selection:
    return select(random_trajectories(3, 6), (2, 3, 1))


@pytest.mark.parametrize("conditioned", [True, False])
def test_saved_selection_reads_back(
    selection: Selection, tmp_path: Path, conditioned: bool
) -> None:
    kept = selection if conditioned else replace(selection, conditioning=None)
    file = tmp_path / "made" / "selection.st"
    save_selection(kept, file)
    found = load_selection(file)
    assert same(found, kept)
    assert (found.conditioning is None) != conditioned


def test_key_covers_every_tensor(selection: Selection) -> None:
    keys = {selection.key(), replace(selection, conditioning=None).key()}
    for name in ("runs", "steps", "inputs", "outputs", "conditioning"):
        changed = getattr(selection, name).clone()
        changed.reshape(-1)[0] += 1
        keys.add(replace(selection, **{name: changed}).key())
    assert len(keys) == 7


def test_a_missing_selection_is_none(tmp_path: Path) -> None:
    assert load_selection(tmp_path / "selection.st") is None


def test_damaged_selection_is_named(selection: Selection, tmp_path: Path) -> None:
    file = tmp_path / "selection.st"
    save_selection(selection, file)
    data = file.read_bytes()
    header = int.from_bytes(data[:8], "little")
    flipped = [
        data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        for place in (3, 9, header // 2, header + 9, len(data) - 1)
    ]
    cut = [b"", data[:-1], data[: header + 8], data + b"\0", bytes(len(data))]
    for damaged in (*flipped, *cut):
        file.write_bytes(damaged)
        with pytest.raises(StorageError) as caught:
            load_selection(file)
        assert (caught.value.code, caught.value.path) == ("EQ-6201", str(file))


@given(seed=st.integers(0, 99), maximum=st.integers(1, 12), share=st.floats(0.1, 1.0))
def test_no_step_gets_more_than_the_maximum(seed: int, maximum: int, share: float) -> None:
    features = random_features(seed, (6, 2, 3, 4))
    n_samples = max(1, int(share * 6 * maximum))
    counts = allocate(features, n_samples, maximum=maximum).counts
    assert sum(counts) == n_samples
    assert 0 <= min(counts) <= max(counts) <= maximum
    free = allocate(features, n_samples).counts
    assert max(free) > maximum or counts == free


def test_a_maximum_that_cannot_hold_all_samples_is_refused() -> None:
    with pytest.raises(InputError, match="at most 2 at each") as caught:
        allocate(random_features(0, (3, 2, 2, 2)), 7, maximum=2)
    assert caught.value.path == "maximum"
