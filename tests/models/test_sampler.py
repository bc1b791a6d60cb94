"""The table runs like diffusers' own loop, and what cannot be a table is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeqdm.errors import EdgeqdmError, InputError, ModelError, UnsupportedError
from edgeqdm.ir.schedule import SamplerProgram
from edgeqdm.models.sampler import compile_sampler, scheduler_from_name
from edgeqdm.numerics import philox, solver

# diffusers 0.42 hands torch tensors to numpy functions, in EulerDiscreteScheduler.set_timesteps
# and DEISMultistepScheduler.step.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

SHAPE = (3, 4, 4)
BATCH = range(2)
Predict = Callable[[np.ndarray, float], np.ndarray]


def toy_denoiser(scheduler: Any) -> Predict:
    """A network of fixed, nonlinear, bounded clean predictions, in the scheduler's own terms."""
    kind = scheduler.config.get("prediction_type", "flow_prediction")

    def predict(sample: np.ndarray, timestep: float) -> np.ndarray:
        x = sample.astype(np.float64)
        mixed = 0.9 * x - 0.6 * np.roll(x, 1, axis=-1) + 0.4 * np.roll(x, 1, axis=1)
        clean = 1.3 * np.tanh(mixed + np.sin(timestep / 150.0))
        if kind == "flow_prediction":
            return ((x - clean) * 1000.0 / max(timestep, 1.0)).astype(np.float32)
        alpha_bar = np.interp(timestep, np.arange(1000), scheduler.alphas_cumprod.numpy())
        alpha, sigma = alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
        noise = (x - alpha * clean) / sigma
        predictions = {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": alpha * noise - sigma * clean,
        }
        return predictions[kind].astype(np.float32)

    learned = scheduler.config.get("variance_type")
    if learned not in ("learned", "learned_range"):
        return predict

    def predict_both(sample: np.ndarray, timestep: float) -> np.ndarray:
        mixed = np.sin(3.0 * sample.astype(np.float64) + timestep)
        variance = mixed if learned == "learned_range" else 0.01 + 0.005 * mixed
        return np.concatenate([predict(sample, timestep), variance.astype(np.float32)], axis=1)

    return predict_both


def step_noise(step: int) -> np.ndarray:
    return philox.batch_normal(7, philox.step_stream(step), BATCH, SHAPE)


def initial_noise() -> np.ndarray:
    return philox.batch_normal(7, philox.INITIAL_STREAM, BATCH, SHAPE)


def draws(scheduler: Any, step: int) -> AbstractContextManager[Any]:
    module = sys.modules[type(scheduler).__module__]
    if not hasattr(module, "randn_tensor"):
        return nullcontext()
    noise = torch.from_numpy(step_noise(step))
    return mock.patch.object(module, "randn_tensor", return_value=noise)


def run_diffusers(scheduler: Any, n_steps: int, **options: float) -> list[np.ndarray]:
    """diffusers' own float32 loop, as its pipelines write it."""
    predict, own = toy_denoiser(scheduler), copy.deepcopy(scheduler)
    own.set_timesteps(n_steps)
    sample = torch.from_numpy(initial_noise()) * getattr(own, "init_noise_sigma", 1.0)
    samples = []
    for step, timestep in enumerate(own.timesteps):
        scaled = sample
        if hasattr(own, "scale_model_input"):
            scaled = own.scale_model_input(sample, timestep)
        output = torch.from_numpy(predict(scaled.numpy(), float(timestep)))
        with draws(own, step):
            sample = own.step(output, timestep, sample, return_dict=False, **options)[0]
        samples.append(sample.numpy())
    return samples


def run_table(scheduler: Any, program: SamplerProgram) -> list[np.ndarray]:
    predict = toy_denoiser(scheduler)
    samples: list[np.ndarray] = []
    solver.run(
        solver.Table.from_json(program.model_dump(mode="json"), None),
        lambda sample, step: predict(sample, program.timesteps[step]),
        initial_noise(),
        step_noise,
        lambda step, sample: samples.append(sample),
    )
    return samples


def worst_difference(scheduler: Any, n_steps: int, **options: float) -> tuple[float, float]:
    """Largest difference over all steps, relative where samples exceed 1, and at the end."""
    program = compile_sampler(scheduler, n_steps, **options)
    expected = run_diffusers(scheduler, n_steps, **options)
    found = run_table(scheduler, program)
    assert len(expected) == len(found) == program.n_steps
    relative = [
        float(np.abs(a - b).max() / max(1.0, np.abs(a).max()))
        for a, b in zip(expected, found, strict=True)
    ]
    return max(relative), float(np.abs(expected[-1] - found[-1]).max())


LINEAR = {"beta_schedule": "linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
EPS, V, X0 = ({"prediction_type": kind} for kind in ("epsilon", "v_prediction", "sample"))
LEADING, TRAILING, LINSPACE = (
    {"timestep_spacing": kind} for kind in ("leading", "trailing", "linspace")
)
NO_CLIP, CLIP = {"clip_sample": False}, {"clip_sample": True}

DDIM, DDPM = diffusers.DDIMScheduler, diffusers.DDPMScheduler
MULTISTEP = diffusers.DPMSolverMultistepScheduler
SINGLESTEP = diffusers.DPMSolverSinglestepScheduler
UNIPC, DEIS = diffusers.UniPCMultistepScheduler, diffusers.DEISMultistepScheduler
EULER, ANCESTRAL = diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler
PNDM, LCM = diffusers.PNDMScheduler, diffusers.LCMScheduler
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
SDE = {"algorithm_type": "sde-dpmsolver++"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
SINGLE = {"lower_order_final": True}

CASES = [
    (DDPM, {**LINEAR, **EPS, **NO_CLIP}, 20),
    (DDPM, {**COSINE, **V, **NO_CLIP, **TRAILING}, 20),
    (DDPM, {**LINEAR, **X0, **NO_CLIP, **LINSPACE}, 50),
    (DDPM, {**LINEAR, **EPS, **NO_CLIP, "variance_type": "fixed_large"}, 7),
    (DDPM, {**LINEAR, **EPS, **NO_CLIP, "variance_type": "fixed_small_log"}, 7),
    (DDPM, {**LINEAR, **EPS, **CLIP}, 20),
    (DDPM, {**COSINE, **V, **CLIP, **TRAILING, "clip_sample_range": 0.7}, 20),
    (DDPM, {**LINEAR, **EPS, **NO_CLIP, "variance_type": "learned_range"}, 20),
    (DDPM, {**LINEAR, **EPS, **CLIP, "variance_type": "learned_range"}, 50),
    (DDPM, {**COSINE, **V, **NO_CLIP, **TRAILING, "variance_type": "learned_range"}, 7),
    (DDPM, {**LINEAR, **X0, **NO_CLIP, **LINSPACE, "variance_type": "learned"}, 20),
    (DDIM, {**LINEAR, **EPS, **CLIP}, 20),
    (DDIM, {**COSINE, **X0, **CLIP, **LINSPACE}, 20),
    (DDIM, {**COSINE, **V, **NO_CLIP, **TRAILING, "rescale_betas_zero_snr": True}, 20),
    (PNDM, {**LINEAR, **EPS, "skip_prk_steps": True}, 20),
    (PNDM, {**COSINE, **V, **LEADING, "skip_prk_steps": True}, 7),
    (PNDM, {**LATENT, **EPS, "steps_offset": 1, "skip_prk_steps": True}, 50),
    (PNDM, {**LATENT, **EPS}, 20),
    (EULER, {**LATENT, **EPS}, 20),
    (EULER, {**LATENT, **V, **LEADING, "steps_offset": 1}, 50),
    (EULER, {**LATENT, **X0, **TRAILING}, 7),
    (EULER, {**LINEAR, **EPS, **LEADING}, 20),
    (EULER, {**COSINE, **V, **LEADING}, 20),
    (EULER, {**LATENT, **EPS, "use_karras_sigmas": True}, 20),
    (ANCESTRAL, {**LATENT, **EPS}, 20),
    (ANCESTRAL, {**LINEAR, **V, **TRAILING}, 20),
    (ANCESTRAL, {**COSINE, **EPS, **LEADING}, 50),
    (MULTISTEP, {**LINEAR, **EPS}, 20),
    (MULTISTEP, {**COSINE, **V, **TRAILING}, 20),
    (MULTISTEP, {**LINEAR, **X0, **LEADING}, 7),
    (MULTISTEP, {**LATENT, **EPS, "solver_order": 3, "solver_type": "heun"}, 50),
    (MULTISTEP, {**LATENT, **EPS, "solver_order": 3, "use_karras_sigmas": True}, 20),
    (MULTISTEP, {**LINEAR, **EPS, **SDE}, 20),
    (MULTISTEP, {**COSINE, **V, **LEADING, **SDE}, 20),
    (MULTISTEP, {**LATENT, **X0, **SDE, "solver_type": "heun"}, 50),
    (SINGLESTEP, {**LINEAR, **EPS, **SINGLE}, 20),
    (SINGLESTEP, {**COSINE, **V, **SINGLE}, 7),
    (SINGLESTEP, {**LATENT, **EPS, **SINGLE, "solver_order": 3}, 20),
    (SINGLESTEP, {**LATENT, **EPS, **SINGLE, **SDE}, 20),
    (UNIPC, {**LINEAR, **EPS}, 20),
    (UNIPC, {**COSINE, **V, **TRAILING}, 20),
    (UNIPC, {**LATENT, **X0, **LEADING, "solver_order": 3}, 50),
    (UNIPC, {**LATENT, **EPS, "solver_type": "bh1", **SIGMA_MIN}, 7),
    (UNIPC, {**LATENT, **EPS, "disable_corrector": [0, 1]}, 7),
    (UNIPC, {**LATENT, **EPS, "predict_x0": False, **SIGMA_MIN}, 20),
    (DEIS, {**LINEAR, **EPS}, 20),
    (DEIS, {**COSINE, **V, **LEADING}, 20),
    (DEIS, {**LATENT, **EPS, "solver_order": 3}, 7),
    (LCM, {**LATENT, **EPS, **NO_CLIP}, 20),
    (LCM, {**LATENT, **V, **CLIP}, 7),
    (LCM, {**COSINE, **X0, **NO_CLIP}, 50),
    (FLOW, {}, 20),
    (FLOW, {"shift": 3.0}, 7),
    (FLOW, {"stochastic_sampling": True}, 50),
]
CASES += [(DDIM, {**LINEAR, **kind, **NO_CLIP}, n) for kind in (EPS, V, X0) for n in (7, 20, 50)]


def case_name(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(str(v) for v in value.values())
    return getattr(value, "__name__", str(value)).removesuffix("Scheduler")


@pytest.mark.parametrize(("scheduler_class", "config", "n_steps"), CASES, ids=case_name)
def test_table_equals_the_loop_of_diffusers(
    scheduler_class: Any, config: dict[str, Any], n_steps: int
) -> None:
    worst, last = worst_difference(scheduler_class(**config), n_steps)
    # Both sides are float32 and round differently: a few units in the last place (1.2e-7) per step.
    assert worst <= 1e-5
    assert last <= 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", [EPS, V, X0], ids=case_name)
@pytest.mark.parametrize("betas", [LINEAR, COSINE], ids=case_name)
def test_ddim_with_noise_equals_the_loop_of_diffusers(
    betas: dict[str, Any], kind: dict[str, Any], eta: float
) -> None:
    scheduler = DDIM(**betas, **kind, **NO_CLIP, **LEADING, steps_offset=1)
    assert max(worst_difference(scheduler, 20, eta=eta)) <= 1e-5


def run_in_float64(scheduler: Any, program: SamplerProgram) -> np.ndarray:
    """The table in float64; only what the network sees and says is float32."""
    predict = toy_denoiser(scheduler)
    samples, outputs = [initial_noise().astype(np.float64) * program.initial_sigma], []
    for i, timestep in enumerate(program.timesteps):
        scaled = program.input_scale[i] * samples[-1]
        outputs.append(predict(scaled.astype(np.float32), timestep).astype(np.float64))
        history = [
            *zip(program.sample_weights[i], samples[::-1], strict=False),
            *zip(program.output_weights[i], outputs[::-1], strict=False),
        ]
        samples.append(sum(weight * value for weight, value in history))
    return samples[-1]


@pytest.mark.parametrize(
    ("make", "n_steps"),
    [
        (lambda: PNDM(**COSINE, **V, **TRAILING, skip_prk_steps=True), 7),
        (lambda: DEIS(**COSINE, **V, **TRAILING), 20),
        (lambda: MULTISTEP(**COSINE, **EPS), 20),
    ],
    ids=["PNDM", "DEIS", "DPMSolverMultistep"],
)
def test_table_is_no_less_exact_than_diffusers_where_alpha_bar_is_nearly_zero(
    make: Callable[[], Any], n_steps: int
) -> None:
    scheduler = make()
    # alpha_bar is 2.4e-9 at the first timestep; these samplers divide by its root, 5e-5, and a
    # float32 rounding of 6e-8 becomes 1e-3 of a unit sample in either loop, more or less of it by
    # how the processor rounds: diffusers' own was 1.7e-3 off on one, less than 1e-3 on others.
    program = compile_sampler(scheduler, n_steps)
    exact = run_in_float64(scheduler, program)
    error = np.abs(run_table(scheduler, program)[-1] - exact).max()
    own_error = np.abs(run_diffusers(scheduler, n_steps)[-1] - exact).max()
    assert error <= 1e-3
    assert own_error <= 5e-3


@settings(max_examples=15, deadline=None)
@given(
    beta_end=st.floats(0.005, 0.02),
    n_steps=st.integers(2, 30),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    kind=st.sampled_from(["epsilon", "v_prediction"]),
    scheduler_class=st.sampled_from([DDPM, DDIM, PNDM, MULTISTEP, UNIPC, ANCESTRAL]),
)
def test_table_equals_the_loop_of_diffusers_for_any_schedule(
    beta_end: float, n_steps: int, spacing: str, kind: str, scheduler_class: Any
) -> None:
    only_plms = {"skip_prk_steps": True} if scheduler_class is PNDM else {}
    scheduler = scheduler_class(
        beta_end=beta_end, timestep_spacing=spacing, prediction_type=kind, **only_plms
    )
    # Twice the bound of the fixed cases: 1 / sqrt(alpha_bar) reaches 160 in the first steps. Only
    # relative to the samples: two steps may leave them at such sizes.
    relative, _ = worst_difference(scheduler, n_steps)
    assert relative <= 2e-5


@pytest.mark.parametrize(
    ("make", "history"),
    [
        (lambda: DDIM(**NO_CLIP), (1, 1)),
        (lambda: ANCESTRAL(), (1, 1)),
        (lambda: PNDM(skip_prk_steps=True), (2, 4)),
        (lambda: MULTISTEP(), (2, 2)),
        (lambda: MULTISTEP(**X0), (1, 2)),
        (lambda: UNIPC(), (3, 3)),
        (lambda: UNIPC(solver_order=3), (4, 4)),
        (lambda: DEIS(**EPS), (1, 2)),
    ],
)
def test_history_is_as_short_as_the_sampler_allows(
    make: Callable[[], Any], history: tuple[int, int]
) -> None:
    program = compile_sampler(make(), 20)
    assert (len(program.sample_weights[0]), len(program.output_weights[0])) == history


def test_ddim_weights_are_those_of_the_paper() -> None:
    scheduler = DDIM(**LINEAR, **NO_CLIP)
    program = compile_sampler(scheduler, 20)
    alpha_bar = scheduler.alphas_cumprod.double().numpy()
    now, then = alpha_bar[950], alpha_bar[900]
    expected = (1 - then) ** 0.5 - (then / now * (1 - now)) ** 0.5
    assert program.timesteps[0] == 950.0
    assert program.sample_weights[0][0] == pytest.approx((then / now) ** 0.5, rel=1e-12)
    assert program.output_weights[0][0] == pytest.approx(expected, rel=1e-12)
    assert program.noise_std == (0.0,) * 20


def test_eta_1_adds_the_posterior_deviation() -> None:
    scheduler = DDIM(**LINEAR, **NO_CLIP)
    program = compile_sampler(scheduler, 20, eta=1.0)
    alpha_bar = scheduler.alphas_cumprod.double().numpy()
    now, then = alpha_bar[950], alpha_bar[900]
    variance = (1 - then) / (1 - now) * (1 - now / then)
    assert program.noise_std[0] == pytest.approx(variance**0.5, rel=1e-12)
    assert program.settings["eta"] == 1.0


def test_clipping_is_a_declared_step_with_its_own_weights() -> None:
    scheduler = DDPM(**LINEAR, **CLIP, clip_sample_range=2.0)
    clip = compile_sampler(scheduler, 20).clip
    assert clip is not None
    now = scheduler.alphas_cumprod.double().numpy()[950]
    assert clip.limit == 2.0
    assert clip.sample_weight[0] == pytest.approx(now**-0.5, rel=1e-12)
    assert clip.output_weight[0] == pytest.approx(-((1 / now - 1) ** 0.5), rel=1e-12)


def test_pndm_has_one_row_per_evaluation() -> None:
    program = compile_sampler(PNDM(skip_prk_steps=True), 20)
    assert program.n_steps == 21
    assert program.timesteps[1] == program.timesteps[2]


def test_euler_scales_its_input_and_starts_from_its_largest_sigma() -> None:
    scheduler = EULER(**LATENT)
    program = compile_sampler(scheduler, 20)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.double().numpy()
    assert program.initial_sigma == pytest.approx(sigmas[0], rel=1e-12)
    np.testing.assert_allclose(program.input_scale, (sigmas[:-1] ** 2 + 1) ** -0.5, rtol=1e-12)
    assert not program.integer_timesteps


def test_flow_matching_is_fed_float_timesteps_without_scaling() -> None:
    program = compile_sampler(FLOW(), 20)
    assert not program.integer_timesteps
    assert program.prediction_type == "flow_prediction"
    assert program.initial_sigma == 1.0
    assert set(program.input_scale) == {1.0}


def test_settings_hold_scalars_and_no_private_keys() -> None:
    config = dict(DDPM(**LINEAR).config)
    settings = compile_sampler(MULTISTEP.from_config(config), 20).settings
    assert settings["solver_order"] == 2
    assert "lambda_min_clipped" not in settings
    assert "variance_type" in settings
    assert "clip_sample" not in settings
    assert not any(key.startswith("_") for key in settings)


def test_scheduler_of_the_caller_is_not_changed() -> None:
    scheduler = SINGLESTEP(lower_order_final=False)
    before, config = dict(vars(scheduler)), dict(scheduler.config)
    compile_sampler(scheduler, 20)
    assert dict(scheduler.config) == config
    assert vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[key] is before[key] for key in before)


def test_random_state_of_the_caller_is_not_changed() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    compile_sampler(DDPM(), 20)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: DDIM(thresholding=True), "thresholding=True"),
        (lambda: DDPM(thresholding=True), "thresholding=True"),
        (lambda: MULTISTEP(thresholding=True), "thresholding=True"),
        (lambda: UNIPC(thresholding=True), "thresholding=True"),
        (
            lambda: diffusers.DDPMParallelScheduler(variance_type="learned"),
            "variance_type='learned'",
        ),
        (lambda: DDPM(variance_type="fixed_large_log"), "variance_type='fixed_large_log'"),
        (lambda: MULTISTEP(variance_type="learned_range"), "variance_type='learned_range'"),
        (lambda: FLOW(use_dynamic_shifting=True), "use_dynamic_shifting=True"),
        (lambda: FLOW(invert_sigmas=True), "invert_sigmas=True"),
        (lambda: EULER(**V, timestep_type="continuous"), "timestep_type='continuous'"),
        (lambda: UNIPC(solver_p=DDIM()), "solver_p=DDIMScheduler"),
    ],
)
def test_option_that_is_no_table_is_refused_by_name(make: Callable[[], Any], option: str) -> None:
    with pytest.raises(UnsupportedError, match=option) as caught:
        compile_sampler(make(), 20)
    assert caught.value.code == "EQ-4101"
    assert caught.value.hint


def test_bounds_of_a_learned_variance_are_the_fixed_variances() -> None:
    learned, small, large = (
        compile_sampler(DDPM(variance_type=kind), 20)
        for kind in ("learned_range", "fixed_small", "fixed_large")
    )
    assert learned.learned_variance is not None
    assert learned.noise_std == (1.0,) * 19 + (0.0,)
    for bound, fixed in (
        (learned.learned_variance.log_min, small),
        (learned.learned_variance.log_max, large),
    ):
        assert bound is not None
        expected = 2.0 * np.log(fixed.noise_std[:-1])
        np.testing.assert_allclose(bound[:-1], expected, rtol=1e-12)
        assert bound[-1] == 0.0
    assert learned.settings["variance_type"] == "learned_range"
    assert learned.output_weights == small.output_weights


def test_a_variance_that_is_the_output_itself_has_no_bounds() -> None:
    program = compile_sampler(DDPM(variance_type="learned"), 4)
    assert program.learned_variance is not None
    assert program.learned_variance.log_min is None
    assert program.learned_variance.log_max is None


def test_the_learned_variance_of_the_callers_scheduler_is_not_changed() -> None:
    scheduler = DDPM(variance_type="learned_range")
    compile_sampler(scheduler, 4)
    assert scheduler.variance_type == scheduler.config.variance_type == "learned_range"


def test_use_clipped_model_output_is_refused_by_name() -> None:
    scheduler = DDIM.from_config({**DDIM().config, "use_clipped_model_output": True})
    with pytest.raises(UnsupportedError, match="use_clipped_model_output=True"):
        compile_sampler(scheduler, 20)


class SquaringScheduler(DDIM):
    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> tuple[Any]:
        return (sample + model_output * model_output,)


class MeanScheduler(DDIM):
    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> tuple[Any]:
        return (sample - model_output.mean(),)


class OffsetScheduler(DDIM):
    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> tuple[Any]:
        return (sample - model_output + 0.1,)


class UniformNoiseScheduler(DDIM):
    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> tuple[Any]:
        return (sample * torch.rand(()),)


class TwoNoisesScheduler(DDIM):
    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> tuple[Any]:
        return (sample + torch.randn(sample.shape) - torch.randn(sample.shape),)


class RunningMeanScheduler(DDIM):
    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> tuple[Any]:
        self.total = getattr(self, "total", 0.0) + model_output * float(timestep)
        return (sample + self.total * float(timestep) ** 2,)


@pytest.mark.parametrize(
    "scheduler_class",
    [
        SquaringScheduler,
        MeanScheduler,
        OffsetScheduler,
        UniformNoiseScheduler,
        TwoNoisesScheduler,
        diffusers.SASolverScheduler,
    ],
)
def test_scheduler_that_is_not_linear_is_refused(scheduler_class: Any) -> None:
    with pytest.raises(UnsupportedError, match=scheduler_class.__name__) as caught:
        compile_sampler(scheduler_class(), 20)
    assert caught.value.code == "EQ-4103"


class LongMemoryScheduler(DDIM):
    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> tuple[Any]:
        self.past = [*getattr(self, "past", []), (float(timestep), model_output)]
        return (sample + sum(o / (1.0 + t + float(timestep)) for t, o in self.past),)


def test_memory_without_end_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="more than 16 earlier steps") as caught:
        compile_sampler(LongMemoryScheduler(), 20)
    assert caught.value.code == "EQ-4105"


def test_running_total_is_rewritten_with_the_previous_sample() -> None:
    program = compile_sampler(RunningMeanScheduler(), 20)
    assert (len(program.sample_weights[0]), len(program.output_weights[0])) == (2, 2)


@pytest.mark.parametrize("scheduler_class", [PNDM, ANCESTRAL])
def test_prediction_type_that_the_scheduler_lacks_is_refused(scheduler_class: Any) -> None:
    with pytest.raises(UnsupportedError, match="prediction_type"):
        compile_sampler(scheduler_class(**X0), 20)


@pytest.mark.parametrize("n_steps", [0, -1, 1001, True, 20.0])
def test_number_of_steps_out_of_range_is_refused(n_steps: Any) -> None:
    with pytest.raises(InputError, match="steps") as caught:
        compile_sampler(DDIM(), n_steps)
    assert caught.value.code == "EQ-3101"


class FixedTimestepsScheduler(DDIM):
    fixed: tuple[float, ...] = ()

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = torch.tensor(self.fixed)


@pytest.mark.parametrize(
    "timesteps", [(500, -1), (1000, 500), (400, 500), (), (500.0, float("nan")), (1000.0, 500.0)]
)
def test_timesteps_that_cannot_be_right_are_refused(timesteps: tuple[float, ...]) -> None:
    scheduler = FixedTimestepsScheduler(**LINEAR)
    scheduler.fixed = timesteps
    with pytest.raises(ModelError, match="timesteps must descend") as caught:
        compile_sampler(scheduler, 2)
    assert caught.value.code == "EQ-3102"


def test_repeated_timesteps_are_allowed() -> None:
    scheduler = FixedTimestepsScheduler(**LINEAR)
    scheduler.fixed = (500, 500, 0)
    assert compile_sampler(scheduler, 2).timesteps == (500.0, 500.0, 0.0)


def test_steps_that_reach_the_number_of_training_steps_are_refused() -> None:
    with pytest.raises(ModelError, match="1000, 999"):
        compile_sampler(DDIM(steps_offset=1), 1000)


def test_no_training_steps_are_refused() -> None:
    scheduler = DDIM(**LINEAR)
    scheduler.register_to_config(num_train_timesteps=0)
    with pytest.raises(ModelError, match="num_train_timesteps"):
        compile_sampler(scheduler, 20)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, float("nan"), 0.1, 0.1], "betas must be in 0..1, but at timestep 1 it is nan"),
        ([0.1, 0.1, 1.5, 0.1], "betas must be in 0..1, but at timestep 2 it is 1.5"),
        ([0.1, 0.0, 0.1, 0.1], "betas must be in 0..1, but at timestep 1 it is 0.0"),
        ([0.1, 0.1, 0.1, 1.0], "alpha_bar must be between 0 and 1, but at timestep 3"),
        ([0.1, 1e-9, 0.1, 0.1], "alpha_bar must be decreasing, but at timestep 1"),
    ],
)
def test_betas_that_cannot_be_right_are_refused(betas: list[float], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        compile_sampler(DDIM(num_train_timesteps=4, trained_betas=betas), 2)
    assert caught.value.code == "EQ-3103"


def test_coefficient_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ModelError, match="not finite at step 6") as caught:
        compile_sampler(UNIPC(solver_type="bh1"), 7)
    assert caught.value.code == "EQ-3109"


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ModelError, match="unknown prediction_type 'velocity'") as caught:
        compile_sampler(DDIM(prediction_type="velocity"), 20)
    assert caught.value.code == "EQ-3104"


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(InputError, match="eta must be in"):
        compile_sampler(DDIM(), 20, eta=eta)


def test_eta_is_refused_where_the_sampler_has_none() -> None:
    with pytest.raises(InputError, match="DDPMScheduler has no eta"):
        compile_sampler(DDPM(), 20, eta=0.5)


def test_lcm_with_more_steps_than_it_was_distilled_for_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="original"):
        compile_sampler(LCM(), 51)


def test_other_objects_are_refused() -> None:
    with pytest.raises(ModelError, match="dict is not a diffusers scheduler"):
        compile_sampler({}, 20)


NAMED = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "pndm": PNDM,
    "euler": EULER,
    "euler_ancestral": ANCESTRAL,
    "dpmsolver++": MULTISTEP,
    "dpmsolver++_1s": SINGLESTEP,
    "dpmsolver++_sde": MULTISTEP,
    "unipc": UNIPC,
    "deis": DEIS,
    "lcm": LCM,
}


@pytest.mark.parametrize("name", NAMED)
def test_named_scheduler_keeps_betas_and_prediction_type(name: str) -> None:
    trained = DDPM(**COSINE, **V, num_train_timesteps=500)
    scheduler = scheduler_from_name(name, trained.config)
    assert type(scheduler) is NAMED[name]
    assert torch.equal(scheduler.betas, trained.betas)
    assert scheduler.config.prediction_type == "v_prediction"
    assert compile_sampler(scheduler, 20).sampler == NAMED[name].__name__


def test_named_scheduler_keeps_default_betas_of_the_trained_one() -> None:
    trained = DDPM()
    assert torch.equal(scheduler_from_name("lcm", trained.config).betas, trained.betas)


def test_dpmsolver_names_differ_in_their_algorithm() -> None:
    config = DDPM().config
    sde = scheduler_from_name("dpmsolver++_sde", config)
    assert sde.config.algorithm_type == "sde-dpmsolver++"
    assert any(compile_sampler(sde, 20).noise_std)
    assert not any(compile_sampler(scheduler_from_name("dpmsolver++", sde.config), 20).noise_std)


def test_flow_euler_is_built_from_a_flow_configuration() -> None:
    scheduler = scheduler_from_name("flow_euler", FLOW(shift=3.0).config)
    assert type(scheduler) is FLOW
    assert scheduler.shift == 3.0


@pytest.mark.parametrize(
    ("name", "config"), [("flow_euler", DDPM().config), ("ddim", FLOW().config)]
)
def test_flow_and_noise_samplers_are_not_exchanged(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        scheduler_from_name(name, config)
    assert caught.value.code == "EQ-4107"


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="'ddjm'") as caught:
        scheduler_from_name("ddjm", DDPM().config)
    assert all(name in str(caught.value) for name in [*NAMED, "flow_euler"])


def test_unknown_option_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match="'beta_strat'") as caught:
        scheduler_from_name("ddim", {**DDPM().config, "beta_strat": 0.1})
    assert caught.value.hint == "did you mean 'beta_start'?"


@pytest.mark.parametrize("config", [{"beta_schedule": "cubic"}, {"beta_start": "low"}])
def test_configuration_that_diffusers_rejects_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(EdgeqdmError, match="rejects the configuration"):
        scheduler_from_name("ddim", config)
