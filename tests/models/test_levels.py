"""Levels of signal and noise, against what diffusers adds itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from edgeqdm.errors import InputError
from edgeqdm.models.levels import noise_levels
from edgeqdm.models.sampler import compile_sampler, scheduler_from_name

# diffusers hands tensors to numpy in ways that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:__array_wrap__ must accept:DeprecationWarning",
)

DENOISING = {
    "num_train_timesteps": 100,
    "beta_start": 1e-3,
    "beta_end": 0.2,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
}
NAMES = (
    "ddim",
    "ddpm",
    "deis",
    "dpmsolver++",
    "dpmsolver++_1s",
    "dpmsolver++_sde",
    "euler",
    "euler_ancestral",
    "lcm",
    "pndm",
    "unipc",
)


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_what_diffusers_adds(name: str) -> None:
    scheduler = scheduler_from_name(name, DENOISING)
    program = compile_sampler(scheduler, 8)
    levels = noise_levels(program)
    scheduler.set_timesteps(8)
    one, zero = torch.ones(1), torch.zeros(1)
    for step, t in enumerate(scheduler.timesteps):
        scale = program.input_scale[step]
        signal = scale * float(scheduler.add_noise(one, zero, t[None]))
        noise = scale * float(scheduler.add_noise(zero, one, t[None]))
        # diffusers computes both in float32; add_noise looks a multistep sampler's sigma up by
        # timestep, which it has rounded.
        assert levels.signal[step] == pytest.approx(signal, abs=2e-3)
        assert levels.noise[step] == pytest.approx(noise, abs=2e-3)
    # float32 tables of sigma and alpha_bar
    np.testing.assert_allclose(levels.signal**2 + levels.noise**2, 1.0, rtol=1e-6)
    assert np.all(np.diff(levels.noise) <= 0)


def test_ddpm_levels_are_the_roots_of_alpha_bar() -> None:
    scheduler = DDPMScheduler(num_train_timesteps=100)
    program = compile_sampler(scheduler, 10)
    levels = noise_levels(program)
    alpha_bar = scheduler.alphas_cumprod.double().numpy()[np.array(program.timesteps, int)]
    assert np.array_equal(levels.signal, np.sqrt(alpha_bar))
    assert np.array_equal(levels.noise, np.sqrt(1 - alpha_bar))


def test_flow_levels_are_what_diffusers_adds() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0)
    levels = noise_levels(compile_sampler(scheduler, 6))
    scheduler.set_timesteps(6)
    one, zero = torch.ones(6), torch.zeros(6)
    signal = scheduler.scale_noise(one, scheduler.timesteps, zero).numpy()
    noise = scheduler.scale_noise(zero, scheduler.timesteps, one).numpy()
    # float32
    np.testing.assert_allclose(levels.signal, signal, atol=1e-6)
    np.testing.assert_allclose(levels.noise, noise, atol=1e-6)


def test_trained_betas_need_the_scheduler_itself() -> None:
    scheduler = DDIMScheduler(
        num_train_timesteps=4, trained_betas=[0.1, 0.2, 0.3, 0.4], clip_sample=False
    )
    program = compile_sampler(scheduler, 4)
    with pytest.raises(InputError, match="not known") as caught:
        noise_levels(program)
    assert caught.value.code == "EQ-3432"
    levels = noise_levels(program, scheduler)
    # float32
    np.testing.assert_allclose(levels.signal[-1] ** 2, 0.9, rtol=1e-6)


@pytest.mark.parametrize("change", [{"beta_end": 0.1}, {"timestep_spacing": "trailing"}])
def test_another_scheduler_is_refused(change: dict[str, Any]) -> None:
    program = compile_sampler(DDIMScheduler(), 4)
    with pytest.raises(InputError, match="would differ"):
        noise_levels(program, DDIMScheduler(**change))


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler = DDIMScheduler()
    before = scheduler.timesteps.clone()
    noise_levels(compile_sampler(scheduler, 4), scheduler)
    assert torch.equal(scheduler.timesteps, before)
