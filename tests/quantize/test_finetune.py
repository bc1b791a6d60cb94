"""Training brings the quantized network closer to the float one, and repeats bit by bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from edgeqdm.calibrate.observe import LayerObservation, observe
from edgeqdm.calibrate.trajectories import Trajectories, collect_trajectories
from edgeqdm.errors import EdgeqdmError, InputError, NumericalError
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, ActivationPolicy, Precision
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.layers import get_layer, network_of
from edgeqdm.quantize import finetune as module
from edgeqdm.quantize import soft_temporal
from edgeqdm.quantize.finetune import CodedWeight, Finetuned, FinetuneSettings, finetune
from edgeqdm.quantize.parameters import LayerParameters, Parameters
from edgeqdm.quantize.plans import default_plan
from edgeqdm.quantize.quantizer import assemble, initialise
from edgeqdm.quantize.soft import soften
from edgeqdm.quantize.soft_weights import RoundedWeight
from edgeqdm.quantize.tdq import fit_generator
from edgeqdm.testing.conformance import STEPS, small_denoiser

RUNS = 40
FAST = FinetuneSettings(iterations=60, batch=16, lr_weight=3e-5, lr_scale=1e-3)
"""Rates for a network of a few thousand weights in a second."""


@cache
def small() -> tuple[Denoiser, Trajectories]:
    denoiser = small_denoiser(DDIMScheduler(clip_sample=False))
    return denoiser, collect_trajectories(denoiser, RUNS, seed=1)


@cache
def observed() -> dict[str, LayerObservation]:
    denoiser, trajectories = small()
    return observe(denoiser, trajectories, tuple(layer.name for layer in denoiser.info.layers))


def plan_of(
    body: str, *, embedding: str = "w8", policy: ActivationPolicy | None = None
) -> DeploymentPlan:
    return default_plan(
        small()[0].info,
        "onnxruntime",
        STEPS,
        body=Precision(body),
        embedding=Precision(embedding),
        activation=policy,
    )


def started(plan: DeploymentPlan) -> Parameters:
    return initialise(small()[0], plan, observed())


def trained(
    body: str, settings: FinetuneSettings = FAST, *, policy: ActivationPolicy | None = None
) -> tuple[DeploymentPlan, Parameters, Finetuned]:
    plan = plan_of(body, policy=policy)
    before = started(plan)
    denoiser, trajectories = small()
    return plan, before, finetune(denoiser, plan, before, trajectories, settings=settings)


def held_out_error(plan: DeploymentPlan, parameters: Parameters, seed: int = 0) -> float:
    """The definition, step by step on the integer network; geometric mean."""
    denoiser, trajectories = small()
    order = torch.randperm(RUNS, generator=torch.Generator().manual_seed(seed))
    runs = order[: RUNS // 10]
    assert trajectories.conditioning is not None
    quantized = assemble(denoiser, plan, parameters)
    errors = []
    for step in range(STEPS):
        wanted = trajectories.outputs[step]
        fed = trajectories.inputs[step, runs]
        found = quantized.predict(fed, step, trajectories.conditioning[runs])
        errors.append(float((found - wanted[runs]).square().mean() / wanted.square().mean()))
    return math.prod(errors) ** (1 / STEPS)


def same(one: Parameters, other: Parameters) -> bool:
    def tensors(mine: LayerParameters) -> list[Tensor | None]:
        scales = [None if x is None else x.scale for x in (mine.activation, mine.output)]
        return [mine.weight.codes, mine.weight.scale, mine.weight.zero_point, *scales]

    pairs = [
        pair
        for variant, mine in one.layers.items()
        for pair in zip(tensors(mine), tensors(other.layers[variant]), strict=True)
    ]
    pairs += [(value, other.floats[name]) for name, value in one.floats.items()]
    return (
        one.layers.keys() == other.layers.keys()
        and one.floats.keys() == other.floats.keys()
        and all(a is b is None or torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("body", "policy"),
    [
        ("w4a4", None),
        ("w4a4", ActivationPolicy.STATIC),
        ("w4g16a8", None),
        ("w4g16a8dyn", None),
        ("w4", None),
    ],
)
def test_training_lowers_the_error_on_runs_it_never_saw(
    body: str, policy: ActivationPolicy | None
) -> None:
    _, _, found = trained(body, policy=policy)
    assert found.improved
    assert found.loss_after < found.loss_before
    assert found.iterations == len(found.history) == FAST.iterations
    assert all(math.isfinite(loss) for loss in found.history)


def test_every_step_gains_from_training() -> None:
    """An error that is small beside the output counts as much as a large one."""
    plan, before, found = trained("w4a4", replace(FAST, iterations=100))
    denoiser, trajectories = small()
    for step in range(STEPS):
        wanted, fed = trajectories.outputs[step], trajectories.inputs[step]
        first, last = (
            assemble(denoiser, plan, parameters).predict(fed, step, trajectories.conditioning)
            for parameters in (before, found.parameters)
        )
        assert (last - wanted).square().mean() < (first - wanted).square().mean()


def test_losses_are_those_of_the_integer_network() -> None:
    """Sums in another order move an activation across a rounding boundary now and then."""
    plan, before, found = trained("w4a4")
    assert found.loss_before == pytest.approx(held_out_error(plan, before), rel=0.02)
    assert found.loss_after == pytest.approx(held_out_error(plan, found.parameters), rel=0.02)


def test_float_model_is_untouched() -> None:
    denoiser, _ = small()
    before = {k: v.clone() for k, v in denoiser.module.state_dict().items()}
    trained("w4a4")
    assert all(torch.equal(v, before[k]) for k, v in denoiser.module.state_dict().items())


def test_floats_hold_only_what_changed() -> None:
    """Layers in fp32 and embeddings keep their values; norms and biases learn."""
    denoiser, _ = small()
    plan, _, found = trained("w4a8")
    state = network_of(denoiser.module).state_dict()
    floats = found.parameters.floats
    assert set(floats) == {"embed.bias", "conv.bias", "mix.bias", "norm.weight", "norm.bias"}
    assert not any(torch.equal(value, state[name]) for name, value in floats.items())
    whole = {a.layer for a in plan.phases[0].layers if a.precision == FP32}
    assert whole == {"conv_in", "conv_out"}


class Timed(nn.Module):
    """Has a norm that only a table depends on, and one that the sample passes."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(2)
        self.embed = nn.Linear(2, 8)
        self.conv_in, self.conv = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        wave = 0.01 * t[:, None]
        fed = self.embed(self.before(torch.cat([wave.sin(), wave.cos()], 1)))
        hidden = self.conv_in(x) + fed[:, :, None, None]
        out: Tensor = self.conv_out(hidden + self.conv(self.norm(hidden)))
        return out


def test_tables_of_embeddings_and_what_feeds_them_stay() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Timed()
    example = (torch.zeros(2, 4, 8, 8), torch.tensor([9, 9]))
    denoiser = wrap(network, DDIMScheduler(clip_sample=False), example, steps=STEPS)
    plan = default_plan(
        denoiser.info, "onnxruntime", STEPS, body=Precision("w4a8"), tables=("embed",)
    )
    trajectories = collect_trajectories(denoiser, RUNS, seed=1)
    seen = observe(denoiser, trajectories, plan.phases[0].integer_layers())
    before = initialise(denoiser, plan, seen)
    found = finetune(denoiser, plan, before, trajectories, settings=FAST)
    assert found.improved
    assert torch.equal(found.parameters.tables["embed"], before.tables["embed"])
    assert set(found.parameters.floats) == {"conv.bias", "norm.weight", "norm.bias"}


class Stop:
    """Presses Ctrl-C after some iterations."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, done: int, total: int) -> None:
        if done == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("temporal", [False, True])
def test_resumed_training_ends_as_if_it_had_never_stopped(
    temporal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I10."""
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(soft_temporal, "START_ITERATIONS", 10)
    denoiser, trajectories = small()
    settings = replace(FAST, iterations=8, temporal=temporal)
    plan = plan_of("w4a4")
    before = started(plan)
    whole = finetune(denoiser, plan, before, trajectories, settings=settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(
            denoiser,
            plan,
            before,
            trajectories,
            settings=settings,
            work=tmp_path,
            progress=Stop(5),
        )
    seen: list[tuple[int, int]] = []
    again = finetune(
        denoiser,
        plan,
        before,
        trajectories,
        settings=settings,
        work=tmp_path,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(6, 8), (7, 8), (8, 8)]
    assert again.history == whole.history
    assert same(again.parameters, whole.parameters)
    assert (again.loss_before, again.loss_after) == (whole.loss_before, whole.loss_after)


@pytest.mark.parametrize("change", ["seed", "settings", "parameters", "trajectories", "plan"])
def test_other_arguments_begin_anew(change: str, tmp_path: Path) -> None:
    denoiser, trajectories = small()
    settings, plan, seed = replace(FAST, iterations=2), plan_of("w4a4"), 0
    before = started(plan)
    finetune(denoiser, plan, before, trajectories, settings=settings, work=tmp_path)
    if change == "seed":
        seed = 1
    elif change == "settings":
        settings = replace(settings, batch=7)
    elif change == "parameters":
        variant, mine = next((v, m) for v, m in before.layers.items() if m.activation is not None)
        assert mine.activation is not None
        moved = replace(mine.activation, zero_point=mine.activation.zero_point - 1)
        layers = {**before.layers, variant: replace(mine, activation=moved)}
        before = replace(before, layers=layers)
    elif change == "trajectories":
        trajectories = replace(trajectories, inputs=trajectories.inputs + 1e-3)
    else:
        plan = plan_of("w4a4", policy=ActivationPolicy.STATIC)
        before = started(plan)
    seen: list[int] = []
    finetune(
        denoiser,
        plan,
        before,
        trajectories,
        settings=settings,
        seed=seed,
        work=tmp_path,
        progress=lambda done, total: seen.append(done),
    )
    assert seen == [1, 2]


def test_finished_training_is_not_done_again(tmp_path: Path) -> None:
    denoiser, trajectories = small()
    plan, settings = plan_of("w4a4"), replace(FAST, iterations=3)
    before = started(plan)
    first = finetune(denoiser, plan, before, trajectories, settings=settings, work=tmp_path)
    settings = replace(settings, minutes=1e6)
    seen: list[int] = []
    again = finetune(
        denoiser,
        plan,
        before,
        trajectories,
        settings=settings,
        work=tmp_path,
        progress=lambda done, total: seen.append(done),
    )
    assert not seen
    assert again.history == first.history
    assert again.seconds == first.seconds
    assert same(again.parameters, first.parameters)


def test_budget_of_minutes_ends_training_early_and_anneals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    denoiser, trajectories = small()
    rates: list[float] = []
    set_rates = module._Training._set_rates

    def record(training: module._Training) -> None:
        set_rates(training)
        rates.append(training._optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(module._Training, "_set_rates", record)
    plan = plan_of("w4a4")
    settings = replace(FAST, iterations=10**6, minutes=0.005)
    seen: list[tuple[int, int]] = []
    found = finetune(
        denoiser,
        plan,
        started(plan),
        trajectories,
        settings=settings,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert 1 <= found.iterations < 10**6
    assert found.seconds >= 60 * 0.005
    assert seen[-1] == (found.iterations, found.iterations)
    assert all(done <= total for done, total in seen)
    assert rates[-1] < max(rates) / 2


@pytest.mark.parametrize("policy", [ActivationPolicy.TEMPORAL, ActivationPolicy.STATIC])
@pytest.mark.parametrize("body", ["w4a4", "w4g16a8", "w8a8"])
def test_learned_rounding_survives_the_start(body: str, policy: ActivationPolicy) -> None:
    """Codes that are floor or ceil of the weight, not its nearest, are where training begins."""
    denoiser, _ = small()
    plan = plan_of(body, policy=policy)
    nearest = started(plan)
    soft = soften(denoiser, plan, nearest, weight=RoundedWeight)
    for layer in soft.layers.values():
        assert isinstance(layer.weight, RoundedWeight)
        shape = layer.weight.alpha.shape
        with torch.no_grad():
            layer.weight.alpha.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    rounded = {
        variant: replace(mine, weight=soft.layers[variant.layer].weight.codes())
        for variant, mine in nearest.layers.items()
    }
    moved = 0
    for variant, mine in rounded.items():
        weight = get_layer(denoiser.module, variant.layer).get_parameter("weight")
        learned = CodedWeight(weight, mine.weight)
        assert torch.equal(learned.codes().codes, mine.weight.codes)
        assert torch.equal(learned(), mine.weight.dequantized())
        moved += int((learned.weight != weight).sum())
    assert moved > 0


def test_tables_are_the_networks_of_the_timestep() -> None:
    """T1: bitwise, every step and every layer."""
    denoiser, _ = small()
    plan, before, found = trained("w4a4", replace(FAST, temporal=True))
    assert found.improved
    assert found.generator is not None
    timesteps = denoiser.program.timesteps
    names = set(found.generator.names)
    assert names == {
        f"{side}/{variant}"
        for variant, mine in before.layers.items()
        for side, scales in (("input", mine.activation), ("output", mine.output))
        if scales is not None
    }
    assert same(found.generator.tabulate(found.parameters, timesteps), found.parameters)
    for step, timestep in enumerate(timesteps):
        alone = found.generator.tabulate(found.parameters, [timestep])
        for variant, mine in found.parameters.layers.items():
            other = alone.layers[variant]
            for a, b in ((mine.activation, other.activation), (mine.output, other.output)):
                if a is not None and b is not None:
                    assert torch.equal(a.scale[step], b.scale[0])
    assert found.loss_after == pytest.approx(held_out_error(plan, found.parameters), rel=0.02)


def test_training_that_does_not_help_gives_back_what_it_got(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(soft_temporal, "START_ITERATIONS", 1)
    _, before, found = trained("w8a8", replace(FAST, iterations=3, lr_weight=0.3, temporal=True))
    assert not found.improved
    assert found.parameters is before
    assert found.generator is None
    assert found.loss_after == found.loss_before


def test_rates_of_zero_change_nothing() -> None:
    settings = replace(FAST, iterations=3, lr_weight=0.0, lr_scale=0.0)
    _, before, found = trained("w4a4", settings)
    assert found.parameters is before


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"batch": 0},
        {"batch": 2.5},
        {"minutes": 0.0},
        {"minutes": math.inf},
        {"minutes": math.nan},
        {"lr_weight": -1.0},
        {"lr_scale": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError) as caught:
        FinetuneSettings(**wrong)  # type: ignore[arg-type]
    assert caught.value.code == "EQ-3265"
    assert caught.value.path == next(iter(wrong))


def refused(
    error: type[EdgeqdmError],
    trajectories: Trajectories,
    *,
    body: str = "w4a4",
    settings: FinetuneSettings = FAST,
) -> EdgeqdmError:
    plan = plan_of(body)
    with pytest.raises(error) as caught:
        finetune(small()[0], plan, started(plan), trajectories, settings=settings)
    return caught.value


def test_one_trajectory_is_refused() -> None:
    _, trajectories = small()
    assert trajectories.conditioning is not None
    one = Trajectories(
        trajectories.inputs[:, :1], trajectories.outputs[:, :1], trajectories.conditioning[:1]
    )
    assert refused(InputError, one).code == "EQ-3267"


def test_trajectories_of_another_sampler_are_refused() -> None:
    _, trajectories = small()
    other = replace(trajectories, inputs=trajectories.inputs[1:], outputs=trajectories.outputs[1:])
    assert refused(InputError, other).code == "EQ-3268"


@pytest.mark.parametrize(
    ("body", "policy"), [("w8", None), ("w4", None), ("w4a8", ActivationPolicy.STATIC)]
)
def test_networks_of_the_timestep_need_a_temporal_activation(
    body: str, policy: ActivationPolicy | None
) -> None:
    plan = plan_of(body, policy=policy)
    denoiser, trajectories = small()
    with pytest.raises(InputError) as caught:
        finetune(
            denoiser,
            plan,
            started(plan),
            trajectories,
            settings=replace(FAST, temporal=True),
        )
    assert caught.value.code == "EQ-3269"


def test_loss_that_is_no_number_names_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = module._Lesson.errors, [0]

    def broken(*arguments: object) -> Tensor:
        calls[0] += torch.is_grad_enabled()
        found: Tensor = plain(*arguments)  # type: ignore[arg-type]
        return found * (math.nan if calls[0] == 3 else 1.0)

    monkeypatch.setattr(module._Lesson, "errors", broken)
    error = refused(NumericalError, small()[1])
    assert error.code == "EQ-5260"
    assert "iteration 2" in error.message


def test_parameters_that_return_nan_are_refused() -> None:
    denoiser, trajectories = small()
    plan = plan_of("w4a4")
    before = started(plan)
    bias = torch.full_like(get_layer(denoiser.module, "conv").get_parameter("bias"), math.nan)
    with pytest.raises(NumericalError) as caught:
        finetune(
            denoiser,
            plan,
            replace(before, floats={"conv.bias": bias}),
            trajectories,
            settings=FAST,
        )
    assert caught.value.code == "EQ-5261"


def test_what_is_reported_is_the_error_of_what_is_returned() -> None:
    """On integers, trained fp16 weights included."""
    plan = plan_of("w4a4", embedding="fp16")
    denoiser, trajectories = small()
    found = finetune(denoiser, plan, started(plan), trajectories, settings=FAST)
    assert found.improved
    assert found.loss_after == pytest.approx(held_out_error(plan, found.parameters), rel=1e-3)


def test_norms_of_a_network_without_gradients_learn_too() -> None:
    denoiser, trajectories = small()
    frozen = copy.deepcopy(denoiser.module).requires_grad_(False)
    plan = plan_of("w4a4")
    found, same_one = (
        finetune(each, plan, started(plan), trajectories, settings=FAST).parameters
        for each in (replace(denoiser, module=frozen), denoiser)
    )
    assert "norm.weight" in found.floats
    assert same(found, same_one)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_steps_without_any_error_can_be_part_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to an error of 0 every other one would be infinite."""
    errors_of = module._errors_of

    def none_at_first(*arguments: Any) -> Tensor:
        found = errors_of(*arguments)
        found[0] = 0.0
        return found

    monkeypatch.setattr(module, "_errors_of", none_at_first)
    _, _, found = trained("w4a4")
    assert all(math.isfinite(loss) for loss in found.history)
    assert found.improved


def test_a_network_without_error_has_nothing_to_learn() -> None:
    plan = plan_of("fp32", embedding="fp32")
    denoiser, trajectories = small()
    with pytest.raises(InputError) as caught:
        finetune(denoiser, plan, started(plan), trajectories, settings=FAST)
    assert caught.value.code == "EQ-3272"


def test_networks_of_another_plan_are_refused() -> None:
    denoiser, trajectories = small()
    timesteps = denoiser.program.timesteps
    other, plan = plan_of("w8a8"), plan_of("w4a8")
    generator = fit_generator(other, timesteps, started(other), observed())
    with pytest.raises(InputError, match=r"is no temporal table|has no network") as caught:
        finetune(denoiser, plan, started(plan), trajectories, settings=FAST, generator=generator)
    assert caught.value.code == "EQ-3271"
