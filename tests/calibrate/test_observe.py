"""Ranges are those of what every layer is really fed and returns, at every step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from edgeqdm.calibrate.observe import (
    SAMPLES_PER_STEP,
    LayerObservation,
    load_observations,
    observe,
    save_observations,
)
from edgeqdm.calibrate.trajectories import CHUNK, Trajectories, collect_trajectories
from edgeqdm.errors import NumericalError, StorageError
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.layers import get_layer
from edgeqdm.testing.conformance import STEPS, small_denoiser

RUNS = CHUNK + 4
LAYERS = ("conv", "mix")


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return small_denoiser(DDPMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def trajectories(denoiser: Denoiser) -> Trajectories:
    return collect_trajectories(denoiser, RUNS, seed=5)


@pytest.fixture(scope="module")
def observed(denoiser: Denoiser, trajectories: Trajectories) -> dict[str, LayerObservation]:
    return observe(denoiser, trajectories, LAYERS)


def replayed(
    denoiser: Denoiser, trajectories: Trajectories, name: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and bias-free outputs of one layer at every step, from its own two-line forward."""
    layer = get_layer(denoiser.module, name)
    fed: list[list[Tensor]] = [[] for _ in range(STEPS)]
    step = 0
    handle = layer.register_forward_pre_hook(lambda _, inputs: fed[step].append(inputs[0]))
    for start in range(0, RUNS, CHUNK):
        runs = slice(start, start + CHUNK)
        assert trajectories.conditioning is not None
        for step in range(STEPS):
            denoiser.predict(trajectories.inputs[step, runs], step, trajectories.conditioning[runs])
    handle.remove()
    inputs = [torch.cat([x.reshape(-1) for x in xs]) for xs in fed]
    bare = nn.Conv2d(8, 8, 3, padding=1) if isinstance(layer, nn.Conv2d) else nn.Linear(8, 8)
    bare.load_state_dict({**layer.state_dict(), "bias": torch.zeros(8)})
    with torch.no_grad():
        outputs = [torch.cat([bare(x).reshape(-1) for x in xs]) for xs in fed]
    return inputs, outputs


@pytest.mark.parametrize("name", LAYERS)
def test_extremes_are_exact_and_outputs_are_taken_before_the_bias(
    denoiser: Denoiser,
    trajectories: Trajectories,
    observed: dict[str, LayerObservation],
    name: str,
) -> None:
    inputs, outputs = replayed(denoiser, trajectories, name)
    found = observed[name]
    assert torch.equal(found.input.low, torch.stack([x.min() for x in inputs]))
    assert torch.equal(found.input.high, torch.stack([x.max() for x in inputs]))
    # (y + b) - b is rounded twice: two float32 units of outputs of size 1.
    for side, extreme in ((found.output.low, torch.min), (found.output.high, torch.max)):
        expected = torch.stack([extreme(y) for y in outputs])
        torch.testing.assert_close(side, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_samples_are_values_of_the_tensor_at_their_own_step(
    denoiser: Denoiser,
    trajectories: Trajectories,
    observed: dict[str, LayerObservation],
    name: str,
) -> None:
    inputs, _ = replayed(denoiser, trajectories, name)
    samples = observed[name].input.samples
    assert samples.shape[0] == STEPS
    assert 0.9 * SAMPLES_PER_STEP < samples.shape[1] <= SAMPLES_PER_STEP
    for step in range(STEPS):
        assert bool(torch.isin(samples[step], inputs[step]).all())


def test_samples_are_drawn_evenly(
    denoiser: Denoiser, trajectories: Trajectories, observed: dict[str, LayerObservation]
) -> None:
    inputs, _ = replayed(denoiser, trajectories, "mix")
    samples = observed["mix"].input.samples
    for step in range(STEPS):
        deviation = (samples[step].mean() - inputs[step].mean()) / inputs[step].std()
        # Five standard errors of 4096 draws.
        assert abs(float(deviation)) < 5 / SAMPLES_PER_STEP**0.5


def test_observing_twice_gives_the_same_bits_and_leaves_no_hook(
    denoiser: Denoiser, trajectories: Trajectories, observed: dict[str, LayerObservation]
) -> None:
    again = observe(denoiser, trajectories, LAYERS)
    assert same(again, observed)
    assert not any(get_layer(denoiser.module, name)._forward_hooks for name in LAYERS)


def same(a: dict[str, LayerObservation], b: dict[str, LayerObservation]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(getattr(getattr(a[k], side), field), getattr(getattr(b[k], side), field))
        for k in a
        for side in ("input", "output")
        for field in ("samples", "low", "high")
    )


def test_guidance_is_observed_on_both_halves(
    denoiser: Denoiser, trajectories: Trajectories
) -> None:
    shapes: list[int] = []
    layer = get_layer(denoiser.module, "conv")
    handle = layer.register_forward_pre_hook(lambda _, inputs: shapes.append(len(inputs[0])))
    observe(denoiser, trajectories, ("conv",))
    handle.remove()
    assert shapes == [2 * CHUNK] * STEPS + [2 * (RUNS - CHUNK)] * STEPS


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_overflow_names_layer_and_step(
    denoiser: Denoiser, trajectories: Trajectories, value: float
) -> None:
    inputs = trajectories.inputs.clone()
    inputs[1, 0, 0, 0, 0] = value
    broken = replace(trajectories, inputs=inputs)
    with pytest.raises(NumericalError, match="at step 1") as caught:
        observe(denoiser, broken, ("conv_in", *LAYERS))
    assert caught.value.code == "EQ-5202"
    assert caught.value.path in ("conv_in", *LAYERS)
    assert not any(get_layer(denoiser.module, name)._forward_hooks for name in LAYERS)


class KeywordNetwork(nn.Module):
    """Calls its layers by keyword and one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.middle = nn.Conv2d(4, 4, 1, bias=False)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.last(input=self.middle(input=self.first(input=x)))
        return out


def test_layers_called_by_keyword_are_observed() -> None:
    example = (torch.zeros(2, 4, 3, 3), torch.tensor([1, 1]))
    denoiser = wrap(KeywordNetwork(), DDPMScheduler(clip_sample=False), example, steps=STEPS)
    trajectories = collect_trajectories(denoiser, 2)
    found = observe(denoiser, trajectories, ("first", "middle"))
    assert torch.equal(found["first"].input.high, trajectories.inputs.amax((1, 2, 3, 4)))
    assert bool((found["middle"].output.high > found["middle"].output.low).all())


def test_saved_observations_read_back_and_damaged_ones_do_not(
    observed: dict[str, LayerObservation], tmp_path: Path
) -> None:
    file = tmp_path / "made" / "observations.st"
    assert load_observations(file) is None
    save_observations(observed, file)
    found = load_observations(file)
    assert found is not None
    assert same(found, observed)
    data = file.read_bytes()
    for damaged in (data[:-1], data[:-2] + bytes([data[-2] ^ 1]) + data[-1:], b"{}"):
        file.write_bytes(damaged)
        with pytest.raises(StorageError) as caught:
            load_observations(file)
        assert (caught.value.code, caught.value.path) == ("EQ-6201", str(file))


def test_progress_counts_steps_of_chunks(denoiser: Denoiser, trajectories: Trajectories) -> None:
    seen: list[tuple[int, int]] = []
    observe(denoiser, trajectories, ("mix",), progress=lambda a, b: seen.append((a, b)))
    assert seen == [(k + 1, 2 * STEPS) for k in range(2 * STEPS)]
