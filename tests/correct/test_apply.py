"""P-numbers name the properties of a PTQD correction that each test holds down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeqdm.correct.apply import correct_schedule, require_key
from edgeqdm.correct.corrector import Ptqd
from edgeqdm.correct.measure import NoiseStatistics, measure_noise
from edgeqdm.errors import InputError
from edgeqdm.ir.codec import digest
from edgeqdm.ir.schedule import CorrectedSchedule, CorrectionKey, SamplerProgram
from edgeqdm.models.sampler import compile_sampler, scheduler_from_name
from edgeqdm.numerics.solver import Table, run

# diffusers hands tensors to numpy in ways that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:__array_wrap__ must accept:DeprecationWarning",
)

Floats = NDArray[np.float64]
Sample = NDArray[np.float32]
Predict = Callable[[Sample, int], Sample]

KEY = CorrectionKey(model="m" * 64, sampler="s" * 64, guidance=3.0, precision="p" * 64)
DENOISING = {
    "num_train_timesteps": 100,
    "beta_start": 1e-3,
    "beta_end": 0.2,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}
FLOW = {"num_train_timesteps": 100, "shift": 1.0}
ONE_STEP = ("ddim", "ddpm", "euler", "euler_ancestral", "flow_euler", "lcm")
MULTISTEP = ("deis", "dpmsolver++", "dpmsolver++_1s", "dpmsolver++_sde", "pndm", "unipc")


@cache
def _program(name: str, n_steps: int = 6, *, eta: float = 0.0, **options: Any) -> SamplerProgram:
    config = FLOW if name == "flow_euler" else DENOISING | options
    return compile_sampler(scheduler_from_name(name, config), n_steps, eta=eta)


def _statistics(
    n_steps: int, *, k: float = 0.0, mu: float = 0.0, variance: float = 0.0, channels: int = 2
) -> NoiseStatistics:
    return NoiseStatistics(
        k=(k,) * n_steps,
        mu=((mu,) * channels,) * n_steps,
        variance=((variance,) * channels,) * n_steps,
        correlation=(0.0,) * n_steps,
        n=(1024,) * n_steps,
        clamped_gain=(False,) * n_steps,
        snr_db=(20.0,) * n_steps,
        output_mean=((0.0,) * channels,) * n_steps,
        output_variance=((1.0,) * channels,) * n_steps,
        covariance=((k,) * channels,) * n_steps,
        input_power=(1.0,) * n_steps,
        input_output=(0.0,) * n_steps,
    )


def _corrected(
    program: SamplerProgram, *, k: float = 0.0, mu: float = 0.0, variance: float = 0.0
) -> CorrectedSchedule:
    statistics = _statistics(program.n_steps, k=k, mu=mu, variance=variance)
    return correct_schedule(program, statistics, KEY)


def _original_noise(program: SamplerProgram) -> tuple[tuple[float, ...], ...]:
    return tuple((std, std) for std in program.noise_std)


def _table(program: SamplerProgram, correction: CorrectedSchedule | None = None) -> Table:
    return Table.from_json(
        program.model_dump(mode="json"),
        None if correction is None else correction.model_dump(mode="json"),
    )


def _sample(table: Table, predict: Predict, *, batch: int = 2, size: int = 4) -> Sample:
    def noise(index: int) -> Sample:
        rng = np.random.default_rng(index)
        return rng.standard_normal((batch, 2, size, size), dtype=np.float32)

    return run(table, predict, noise(1000), noise)


def _network(x: Sample, step: int) -> Sample:
    return np.tanh(x) + np.float32(0.1 * step)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in (*ONE_STEP, *MULTISTEP)),
        ("ddim", {"eta": 1.0}),
        ("ddim", {"clip_sample": True}),
        ("ddpm", {"clip_sample": True}),
    ],
)
def test_p2_a_network_that_is_not_quantized_samples_bit_for_bit_under_its_correction(
    name: str, options: dict[str, Any]
) -> None:
    """P2: from statistics measured on the sampler's own trajectory."""
    program = _program(name, **options)
    fed: list[tuple[int, Sample, None]] = []

    def listening(x: Sample, step: int) -> Sample:
        fed.append((step, x.copy(), None))
        return _network(x, step)

    def network(x: Sample, step: int, _: None) -> Sample:
        return _network(x, step)

    plain = _sample(_table(program), listening)
    statistics = measure_noise(network, network, fed, n_steps=program.n_steps)
    correction = correct_schedule(program, statistics, KEY)
    assert correction.gain == (1.0,) * program.n_steps
    assert np.array_equal(plain, _sample(_table(program, correction), _network))


def test_p2_no_sampler_is_left_out_here() -> None:
    """P2, P3."""
    with pytest.raises(InputError, match="unknown sampler") as caught:
        scheduler_from_name("no such sampler", DENOISING)
    assert caught.value.hint is not None
    names = caught.value.hint.removeprefix("known samplers: ").split(", ")
    assert sorted(names) == sorted((*ONE_STEP, *MULTISTEP))


@pytest.mark.parametrize("name", [*ONE_STEP, *MULTISTEP])
def test_p3_gain_and_bias_errors_are_undone_before_the_history(name: str) -> None:
    """P3."""

    def quantized(x: Sample, step: int) -> Sample:
        return np.float32(1.1) * _network(x, step) + np.float32(0.2)

    program = _program(name)
    plain = _sample(_table(program), _network)
    corrected = _sample(_table(program, _corrected(program, k=0.1, mu=0.2)), quantized)
    # Float32 rounding of the outputs, 1e-7, which a step near the end weighs by up to 1e2.
    np.testing.assert_allclose(corrected, plain, atol=1e-4 * float(np.abs(plain).max()))


def test_p4_a_gain_of_one_corrects_the_bias_only() -> None:
    """P4."""
    program = _program("ddpm")
    correction = _corrected(program, k=0.0, mu=0.3)
    assert correction.gain == (1.0,) * program.n_steps
    assert correction.bias == ((0.3, 0.3),) * program.n_steps
    assert correction.noise_std == _original_noise(program)


def test_p5_statistics_of_another_number_of_steps_are_refused() -> None:
    """P5."""
    with pytest.raises(InputError, match="statistics of 5 steps, the sampler has 6") as caught:
        correct_schedule(_program("ddim"), _statistics(5), KEY)
    assert caught.value.code == "EQ-3421"


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "lcm"])
def test_p6_every_step_keeps_its_variance_or_draws_nothing(name: str) -> None:
    """P6."""
    program = _program(name, 20)
    correction = _corrected(program, k=0.1, variance=0.6)
    noise = np.array(correction.noise_std)[:, 0] ** 2
    arriving = np.array(program.output_weights)[:, 0] ** 2 * 0.6 / 1.1**2
    budget = np.array(program.noise_std) ** 2
    noisy = budget > 0
    affordable = noisy & (arriving <= budget)
    assert affordable.any()
    assert (noisy & ~affordable).any()
    np.testing.assert_allclose((noise + arriving)[affordable], budget[affordable], rtol=1e-12)
    assert not noise[~affordable].any()
    assert correction.clamped == tuple((noisy & ~affordable).tolist())


def test_p6_ddim_without_noise_stays_plain_ddim() -> None:
    """P6."""
    program = _program("ddim")
    correction = _corrected(program, k=0.1, variance=10.0)
    assert correction.noise_std == ((0.0, 0.0),) * 6
    assert correction.clamped == (False,) * 6
    noise_alone = _table(program, _corrected(program, variance=10.0))
    plain = _sample(_table(program), _network)
    assert np.array_equal(_sample(noise_alone, _network), plain)


def test_variance_may_be_left_to_the_sampler() -> None:
    program = _program("ddpm")
    statistics = _statistics(6, k=0.1, variance=0.1)
    correction = correct_schedule(program, statistics, KEY, corrector=Ptqd(variance=False))
    assert correction.noise_std == _original_noise(program)
    assert correction.gain == (1 / 1.1,) * 6


def test_a_history_leaves_the_noise_of_the_sampler_alone() -> None:
    program = _program("dpmsolver++_sde")
    assert max(program.noise_std) > 0
    correction = _corrected(program, k=0.1, variance=0.1)
    assert correction.noise_std == _original_noise(program)
    assert correction.gain == (1 / 1.1,) * 6


def test_clipping_leaves_the_noise_of_the_sampler_alone() -> None:
    program = _program("ddpm", clip_sample=True)
    assert program.clip is not None
    correction = _corrected(program, k=0.1, variance=0.1)
    assert correction.noise_std == _original_noise(program)
    assert not any(correction.clamped)
    assert correction.gain == (1 / 1.1,) * 6


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_p7_a_ddim_step_keeps_the_marginal_variance(eta: float) -> None:
    """P7."""
    scheduler = DDIMScheduler(num_train_timesteps=100, beta_end=0.2, clip_sample=False)
    program = compile_sampler(scheduler, 10, eta=eta)
    correction = _corrected(program, k=0.05, variance=0.09)
    alpha_bar = scheduler.alphas_cumprod.double().numpy()
    timesteps = np.array(program.timesteps, dtype=int)
    checked = 0
    for step, (t, previous) in enumerate(pairwise(timesteps)):
        a, b = program.sample_weights[step][0], program.output_weights[step][0]
        eps = (a * np.sqrt(1 - alpha_bar[t]) + b) ** 2
        arriving = b**2 * 0.09 / 1.05**2
        total = eps + arriving + correction.noise_std[step][0] ** 2
        if not correction.clamped[step]:
            assert total == pytest.approx(1 - alpha_bar[previous], abs=1e-6)
            checked += 1
    assert checked >= 5


def test_p7_the_direction_of_ddim_keeps_the_original_noise() -> None:
    """P7."""
    scheduler = DDIMScheduler(num_train_timesteps=2, trained_betas=[0.3, 2 / 7], clip_sample=False)
    program = compile_sampler(scheduler, 2, eta=1.0)
    correction = _corrected(program, variance=0.09)
    a, b, std = program.sample_weights[0][0], program.output_weights[0][0], correction.noise_std[0]
    # alpha_bar goes from 0.5 to 0.7.
    total = (a * np.sqrt(0.5) + b) ** 2 + b**2 * 0.09 + std[0] ** 2
    assert total == pytest.approx(0.3, abs=1e-6)
    direction = np.sqrt(0.3 - std[0] ** 2)
    as_published = direction**2 + (direction - a * np.sqrt(0.5)) ** 2 * 0.09 + std[0] ** 2
    # 6 % too much; betas are float32.
    assert as_published == pytest.approx(0.3183, abs=1e-4)


def test_p8_ddim_with_full_noise_on_adjacent_steps_is_ddpm_with_the_small_variance() -> None:
    """P8."""
    options = {"num_train_timesteps": 20, "beta_end": 0.2, "clip_sample": False}
    ddim = compile_sampler(DDIMScheduler(**options), 20, eta=1.0)
    ddpm = compile_sampler(DDPMScheduler(**options, variance_type="fixed_small"), 20)
    assert ddim.timesteps == ddpm.timesteps
    noise = [_corrected(program, k=0.08, variance=0.04).noise_std for program in (ddim, ddpm)]
    # Both come from betas in float32.
    np.testing.assert_allclose(noise[0], noise[1], rtol=1e-5)
    assert np.array(noise[0]).max() < max(ddim.noise_std)
    # Equal because they are the same, not because the error left neither any noise.
    assert np.count_nonzero(noise[0]) > 10


@pytest.mark.parametrize(
    "change",
    [{"model": "x" * 64}, {"sampler": "x" * 64}, {"guidance": 1.0}, {"precision": "x" * 64}],
)
def test_p10_a_correction_of_something_else_is_refused(change: dict[str, Any]) -> None:
    """P10: guidance, sampler, bits and model, one by one."""
    correction = _corrected(_program("ddim"))
    require_key(correction, KEY)
    with pytest.raises(InputError, match=next(iter(change))) as caught:
        require_key(correction, KEY.model_copy(update=change))
    assert caught.value.code == "EQ-3422"
    unchanged = set(CorrectionKey.model_fields) - set(change)
    assert not any(f"{field} (" in str(caught.value) for field in unchanged)


@pytest.mark.parametrize(
    ("name", "n_steps", "eta"), [("ddim", 7, 0.0), ("ddim", 6, 0.5), ("ddpm", 6, 0.0)]
)
def test_i5_another_sampler_number_of_steps_or_eta_is_refused(
    name: str, n_steps: int, eta: float
) -> None:
    """P10, I5: steps and eta are part of the sampler's hash."""
    measured_on = KEY.model_copy(update={"sampler": digest(_program("ddim"))})
    correction = correct_schedule(_program("ddim"), _statistics(6), measured_on)
    require_key(correction, measured_on)
    other = {"sampler": digest(_program(name, n_steps, eta=eta))}
    with pytest.raises(InputError, match=r"sampler \(measured on") as caught:
        require_key(correction, KEY.model_copy(update=other))
    assert all(value in str(caught.value) for value in (measured_on.sampler, other["sampler"]))


def test_p10_every_difference_is_listed() -> None:
    """P10."""
    other = CorrectionKey(model="a", sampler="b", guidance=7.5, precision="c")
    with pytest.raises(InputError) as caught:
        require_key(_corrected(_program("ddim")), other)
    message = str(caught.value)
    assert all(f"{field} (" in message for field in CorrectionKey.model_fields)
    assert "3.0" in message
    assert "7.5" in message


def test_p11_row_zero_corrects_the_noisiest_step() -> None:
    """P11."""
    program = _program("ddpm")
    statistics = _statistics(6).model_copy(update={"k": (0.5, 0.4, 0.3, 0.2, 0.1, 0.0)})
    correction = correct_schedule(program, statistics, KEY)
    assert list(program.timesteps) == sorted(program.timesteps, reverse=True)
    assert correction.gain[0] == 1 / 1.5
    assert list(correction.gain) == sorted(correction.gain)


@given(
    name=st.sampled_from(ONE_STEP),
    k=st.floats(-0.5, 2.0),
    variance=st.floats(0.0, 1e6),
    mu=st.floats(-10.0, 10.0),
)
def test_p6_a_correction_never_adds_noise(name: str, k: float, variance: float, mu: float) -> None:
    """P6."""
    program = _program(name)
    correction = _corrected(program, k=k, mu=mu, variance=variance)
    noise, original = np.array(correction.noise_std), np.array(_original_noise(program))
    assert np.all((noise >= 0.0) & (noise <= original))
    assert CorrectedSchedule.model_validate_json(correction.model_dump_json()) == correction


MEAN = np.array([0.5, -1.0])
STD = np.array([0.7, 0.4])
"""Of the data in each channel; all pixels are independent."""
GAIN_ERROR = 0.05
BIAS = np.array([0.03, -0.02])
NOISE = 0.35
"""Of the quantized network, at every step."""


@dataclass(frozen=True)
class _Gaussian:
    """The exact noise prediction for Gaussian data, and a quantized network's answer.

    The prediction is affine in the sample, so that samples stay Gaussian and the moments of every
    sampler, corrected or not, are known in closed form.
    """

    program: SamplerProgram
    alpha_bar: Floats
    """At every step, [S]."""

    def affine(self, step: int) -> tuple[Floats, Floats]:
        """Slope and intercept of the prediction, [C] each."""
        a = self.alpha_bar[step]
        slope = np.sqrt(1 - a) / (a * STD**2 + 1 - a)
        return slope, -slope * np.sqrt(a) * MEAN

    def exact(self, x: Sample, step: int, _: None = None) -> Sample:
        slope, intercept = self.affine(step)
        f = slope[:, None, None] * x + intercept[:, None, None]
        return np.asarray(f, dtype=np.float32)

    def quantized(self, x: Sample, step: int, _: None = None) -> Sample:
        rng = np.random.default_rng([step, int(abs(float(x[0, 0, 0, 0])) * 2**20)])
        noise = np.float32(NOISE) * rng.standard_normal(x.shape, dtype=np.float32)
        systematic = (1 + GAIN_ERROR) * self.exact(x, step) + BIAS[:, None, None]
        return np.asarray(systematic + noise, dtype=np.float32)

    def moments(
        self, correction: CorrectedSchedule | None, *, quantized: bool
    ) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the final samples, [C] each."""
        k, mu, s = (GAIN_ERROR, BIAS, NOISE) if quantized else (0.0, np.zeros(2), 0.0)
        mean, variance = np.zeros(2), np.full(2, self.program.initial_sigma**2)
        for step in range(self.program.n_steps):
            gain = 1.0 if correction is None else correction.gain[step]
            bias = np.zeros(2) if correction is None else np.array(correction.bias[step])
            rows = self.program if correction is None else correction
            slope, intercept = self.affine(step)
            a, b = self.program.sample_weights[step][0], self.program.output_weights[step][0]
            mean, slope = (
                a * mean + b * gain * ((1 + k) * (slope * mean + intercept) + mu - bias),
                a + b * gain * (1 + k) * slope,
            )
            noise = (b * gain * s) ** 2 + np.square(rows.noise_std[step])
            variance = slope**2 * variance + noise
        return mean, np.sqrt(variance)

    def statistics(self) -> NoiseStatistics:
        """Measured on one batch of float trajectories."""
        fed: list[tuple[int, Sample, None]] = []

        def recorded(x: Sample, step: int) -> Sample:
            fed.append((step, x, None))
            return self.exact(x, step)

        _sample(_table(self.program), recorded, batch=16, size=16)
        return measure_noise(self.exact, self.quantized, fed, n_steps=self.program.n_steps)


def _gaussian(name: str, eta: float) -> _Gaussian:
    scheduler = scheduler_from_name(name, DENOISING)
    program = compile_sampler(scheduler, 100, eta=eta)
    timesteps = np.array(program.timesteps, dtype=int)
    return _Gaussian(program, scheduler.alphas_cumprod.double().numpy()[timesteps])


def _errors(moments: tuple[Floats, Floats], truth: tuple[Floats, Floats]) -> Floats:
    """Of mean and standard deviation, [2, C]."""
    return np.abs(np.array(moments) - np.array(truth))


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_p12_corrected_samples_have_nearly_the_moments_of_the_float_sampler(
    name: str, eta: float
) -> None:
    """P12, I7: the truth is known in closed form, nothing is drawn but the statistics."""
    model = _gaussian(name, eta)
    statistics = model.statistics()
    full = correct_schedule(model.program, statistics, KEY)
    without_variance = correct_schedule(
        model.program, statistics, KEY, corrector=Ptqd(variance=False)
    )
    truth = model.moments(None, quantized=False)
    raw = _errors(model.moments(None, quantized=True), truth)
    partly = _errors(model.moments(without_variance, quantized=True), truth)
    corrected = _errors(model.moments(full, quantized=True), truth)
    # What is left comes from the errors of k and mu, fitted on 4096 elements per channel and step.
    assert np.all(corrected < 0.1 * raw)
    assert np.all(corrected[1] < 0.25 * partly[1])
    data = (MEAN, STD)
    assert np.all(
        _errors(model.moments(full, quantized=True), data)
        < _errors(model.moments(None, quantized=True), data)
    )


def test_p12_without_sampler_noise_gain_and_bias_still_pay() -> None:
    """P12."""
    model = _gaussian("ddim", 0.0)
    correction = correct_schedule(model.program, model.statistics(), KEY)
    truth = model.moments(None, quantized=False)
    raw = _errors(model.moments(None, quantized=True), truth)
    corrected = _errors(model.moments(correction, quantized=True), truth)
    assert np.all(corrected[0] < 0.1 * raw[0])
    # The residual noise has nowhere to go: it stays as added variance.
    assert np.all(corrected[1] < 0.25 * raw[1])


@pytest.mark.parametrize("corrected", [False, True])
def test_p12_drawn_samples_have_the_moments_in_closed_form(corrected: bool) -> None:
    """P12: by Monte Carlo."""
    model = _gaussian("ddpm", 0.0)
    correction = correct_schedule(model.program, model.statistics(), KEY) if corrected else None
    mean, std = model.moments(correction, quantized=True)
    drawn = _sample(_table(model.program, correction), model.quantized, batch=32, size=16)
    pixels = drawn.astype(np.float64)
    n = 32 * 16 * 16
    # Four standard errors.
    assert np.all(np.abs(pixels.mean((0, 2, 3)) - mean) < 4 * std / np.sqrt(n))
    assert np.all(np.abs(pixels.std((0, 2, 3)) - std) < 4 * std / np.sqrt(2 * n))
