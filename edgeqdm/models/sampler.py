"""Compiles a diffusers scheduler to a table of numbers, by probing it.

A linear sampler computes every next sample as a weighted sum of what it was given: samples, network
outputs and noises. So the scheduler is run once on a sample whose elements are not pixels but
directions, one per input: the element that belongs to an input is 1 in that input and 0 in all
others, and what the scheduler returns in it is that input's weight. Clipping of the predicted clean
sample is lifted out the same way, its result being one more input. Further elements hold random
mixtures of all inputs; a step that is not linear and element-wise cannot get them right.

The probe runs in float64 on the scheduler's own float32 tables.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from edgeqdm.errors import InputError, ModelError, UnsupportedError
from edgeqdm.ir.schedule import ClipStep, LearnedVariance, SamplerProgram

Weights = NDArray[np.float64]

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
_MAX_HISTORY = 16
_TOLERANCE = 1e-12
_N_CHECKS = 4

_LEARNED = ("learned", "learned_range")

# The kinds of input of a step; the rows of a weight matrix [4, S].
_SAMPLE, _OUTPUT, _NOISE, _CLIPPED = range(4)


@dataclass(frozen=True)
class _Named:
    scheduler: str
    options: Mapping[str, Any]


_DPMSOLVER = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_NAMES = {
    "ddim": _Named("DDIMScheduler", {}),
    "ddpm": _Named("DDPMScheduler", {}),
    "deis": _Named("DEISMultistepScheduler", {}),
    "dpmsolver++": _Named("DPMSolverMultistepScheduler", _DPMSOLVER),
    "dpmsolver++_1s": _Named("DPMSolverSinglestepScheduler", _DPMSOLVER),
    "dpmsolver++_sde": _Named(
        "DPMSolverMultistepScheduler", {**_DPMSOLVER, "algorithm_type": "sde-dpmsolver++"}
    ),
    "euler": _Named("EulerDiscreteScheduler", {}),
    "euler_ancestral": _Named("EulerAncestralDiscreteScheduler", {}),
    "flow_euler": _Named("FlowMatchEulerDiscreteScheduler", {}),
    "lcm": _Named("LCMScheduler", {}),
    "pndm": _Named("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": _Named("UniPCMultistepScheduler", {}),
}

# What the network was trained with. diffusers would replace a value that the other class had by
# default with the new class's own default.
_TRAINING_OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def scheduler_from_name(name: str, config: Mapping[str, Any]) -> Any:
    """Builds another scheduler for the network that `config` belongs to.

    Args:
        name: one of ddim, ddpm, deis, dpmsolver++ (multistep, order 2), dpmsolver++_1s (singlestep,
            order 2), dpmsolver++_sde (multistep, order 2), euler, euler_ancestral, flow_euler, lcm,
            pndm (without Runge-Kutta warm-up), unipc.
        config: configuration of a diffusers scheduler; betas and prediction type are kept.

    Returns:
        A diffusers scheduler.

    Raises:
        InputError: if the name or a key of the configuration is not known.
        ModelError: if diffusers rejects the configuration.
        UnsupportedError: if only one of sampler and network is for flow matching.
    """
    if name not in _NAMES:
        raise InputError(
            "EQ-3106", f"unknown sampler {name!r}", hint=f"known samplers: {', '.join(_NAMES)}"
        )
    _check_keys(config)
    _check_flow(name, config)
    named = _NAMES[name]
    scheduler_class = getattr(diffusers, named.scheduler)
    accepted = _parameters(scheduler_class.__init__)
    pinned = {k: config[k] for k in _TRAINING_OPTIONS if k in config and k in accepted}
    try:
        return scheduler_class.from_config(dict(config), **pinned, **named.options)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise ModelError("EQ-3107", f"{named.scheduler} rejects the configuration: {error}") from (
            error
        )


def _check_keys(config: Mapping[str, Any]) -> None:
    classes = {named.scheduler for named in _NAMES.values()} | {str(config.get("_class_name"))}
    known = {refusal.option for refusal in _REFUSALS}
    for scheduler in classes:
        known |= _parameters(getattr(getattr(diffusers, scheduler, object), "__init__", object))
    for key in config:
        if key not in known and not key.startswith("_"):
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it"
            raise InputError("EQ-3108", f"unknown scheduler option {key!r}", path=key, hint=hint)


def _check_flow(name: str, config: Mapping[str, Any]) -> None:
    flow_only = "shift" in config and "prediction_type" not in config
    trained_for_flow = flow_only or config.get("prediction_type") == "flow_prediction"
    denoises = "prediction_type" in config and not trained_for_flow
    if name == "flow_euler" and denoises:
        raise UnsupportedError(
            "EQ-4107",
            f"flow_euler needs a network that predicts a velocity, this one predicts "
            f"{config['prediction_type']!r}",
            path="prediction_type",
            hint="use euler",
        )
    if name != "flow_euler" and flow_only:
        raise UnsupportedError(
            "EQ-4107",
            f"{name} needs betas, but the network was trained for flow matching",
            path="shift",
            hint="use flow_euler",
        )


def compile_sampler(scheduler: Any, n_steps: int, *, eta: float = 0.0) -> SamplerProgram:
    """Compiles a scheduler to the table of a run of `n_steps` steps.

    The variance of the noise may come from the network: variance_type "learned" and "learned_range"
    of DDPM make a program with `learned_variance`.

    Args:
        scheduler: any diffusers scheduler that is linear in samples, outputs and noise; it is not
            changed.
        n_steps: number of inference steps asked of the scheduler. PNDM evaluates the network more
            often than that, and its table has one row per evaluation.
        eta: share of the DDPM noise that DDIM adds, 0..1.

    Returns:
        The table, in float64.

    Raises:
        InputError: if `n_steps` or `eta` is out of range.
        ModelError: if betas, timesteps, prediction type or a resulting coefficient cannot be right.
        UnsupportedError: if the scheduler is not linear, naming the option at fault where known.

    Source: linear multistep form of the samplers of Song et al. 2021 (DDIM,
    https://arxiv.org/abs/2010.02502), Lu et al. 2022 (DPM-Solver++,
    https://arxiv.org/abs/2211.01095) and Zhao et al. 2023 (UniPC, https://arxiv.org/abs/2302.04867).
    """
    _check_is_scheduler(scheduler)
    _check_steps(n_steps, scheduler.config.get("num_train_timesteps"))
    _check_options(scheduler)
    _check_prediction_type(scheduler)
    _check_betas(scheduler)
    options = _step_options(scheduler, eta)
    own = copy.deepcopy(scheduler)
    _set_timesteps(own, n_steps)
    _check_timesteps(own)
    _lift_to_float64(own)
    asked = {"eta": float(eta), "steps": n_steps}
    if not _learns_variance(own):
        return _program(own, _probe(own, options), asked)
    bounds = [_probe(_with_variance(own, kind), options) for kind in ("fixed_small", "fixed_large")]
    own = _with_variance(own, scheduler.config.variance_type)
    return _with_learned_variance(_program(own, bounds[1], asked), *bounds)


def _learns_variance(scheduler: Any) -> bool:
    kind = scheduler.config.get("variance_type")
    return type(scheduler) is diffusers.DDPMScheduler and kind in _LEARNED


def _with_variance(scheduler: Any, kind: str) -> Any:
    own = copy.deepcopy(scheduler)
    own.register_to_config(variance_type=kind)
    own.variance_type = kind
    return own


def _with_learned_variance(program: SamplerProgram, lower: _Trace, upper: _Trace) -> SamplerProgram:
    """The program with the bounds, `fixed_small` and `fixed_large`, in place of its own noise."""
    noisy = [std != 0.0 for std in program.noise_std]
    learned = LearnedVariance()
    if program.settings["variance_type"] == "learned_range":
        log_min, log_max = (
            tuple(
                2.0 * math.log(row[_NOISE, i]) if noisy[i] else 0.0
                for i, row in enumerate(trace.steps)
            )
            for trace in (lower, upper)
        )
        learned = LearnedVariance(log_min=log_min, log_max=log_max)
    noise_std = tuple(float(adds) for adds in noisy)
    return program.model_copy(update={"noise_std": noise_std, "learned_variance": learned})


def _program(scheduler: Any, trace: _Trace, asked: dict[str, float]) -> SamplerProgram:
    name = type(scheduler).__name__
    rows = _shortened(trace.steps)
    _check_only_current(name, rows, _NOISE, "noise")
    _check_only_current(name, rows, _CLIPPED, "the clipped prediction")
    return SamplerProgram(
        sampler=name,
        settings={**_scalars(scheduler), **asked},
        prediction_type=_prediction_type(scheduler),
        timesteps=tuple(float(t) for t in scheduler.timesteps),
        integer_timesteps=not scheduler.timesteps.is_floating_point(),
        initial_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        input_scale=tuple(trace.input_scale),
        sample_weights=_columns(name, rows, _SAMPLE),
        output_weights=_columns(name, rows, _OUTPUT),
        noise_std=tuple(float(row[_NOISE, i]) for i, row in enumerate(rows)),
        clip=_clip_step(name, trace, rows),
    )


def _columns(name: str, rows: Sequence[Weights], kind: int) -> tuple[tuple[float, ...], ...]:
    width = _width(rows, kind)
    if width > _MAX_HISTORY:
        raise UnsupportedError(
            "EQ-4105", f"{name} depends on more than {_MAX_HISTORY} earlier steps"
        )
    return tuple(
        tuple(float(row[kind, i - k]) if i >= k else 0.0 for k in range(width))
        for i, row in enumerate(rows)
    )


def _clip_step(name: str, trace: _Trace, rows: Sequence[Weights]) -> ClipStep | None:
    if not any(clipped is not None for clipped in trace.clipped):
        return None
    clipped = [c if c is not None else np.zeros_like(rows[0]) for c in trace.clipped]
    for i, row in enumerate(clipped):
        current = np.zeros_like(row)
        current[[_SAMPLE, _OUTPUT], i] = row[[_SAMPLE, _OUTPUT], i]
        if not np.array_equal(row, current):
            raise UnsupportedError("EQ-4103", f"{name} clips more than the prediction of a step")
    if len(trace.limits) != 1:
        raise UnsupportedError("EQ-4103", f"{name} clips to limits that differ between steps")
    return ClipStep(
        limit=next(iter(trace.limits)),
        sample_weight=tuple(float(row[_SAMPLE, i]) for i, row in enumerate(clipped)),
        output_weight=tuple(float(row[_OUTPUT, i]) for i, row in enumerate(clipped)),
        weight=tuple(float(row[_CLIPPED, i]) for i, row in enumerate(rows)),
    )


def _scalars(scheduler: Any) -> dict[str, str | int | float | bool | None]:
    accepted = _parameters(type(scheduler).__init__)
    return {
        key: value
        for key, value in scheduler.config.items()
        if key in accepted
        and (value is None or isinstance(value, str | int | float))
        and not (isinstance(value, float) and not math.isfinite(value))
    }


def _check_only_current(name: str, rows: Sequence[Weights], kind: int, what: str) -> None:
    for i, row in enumerate(rows):
        if np.delete(row[kind], i).any():
            raise UnsupportedError("EQ-4103", f"{name} reuses {what} of an earlier step")


def _span(row: Weights, kind: int, step: int) -> int:
    """How many steps back a row reaches, 1 being the current step only."""
    significant = np.flatnonzero(np.abs(row[kind]) > _TOLERANCE * np.abs(row).max())
    return 0 if len(significant) == 0 else step + 1 - int(significant[0])


def _history(row: Weights, step: int) -> int:
    return max(_span(row, _SAMPLE, step), _span(row, _OUTPUT, step))


def _shortened(rows: Sequence[Weights]) -> list[Weights]:
    """Rewrites rows that carry the whole past so that they reach back a few steps only.

    UniPC keeps its corrected sample to itself, so that a row on its own depends on every earlier
    input. The previous sample was computed from that same corrected sample: `mu` times that
    equation, 0 = row[i-1] - x[i], takes the old inputs out.
    """
    pairs = zip([rows[0], *rows[:-1]], rows, strict=True)
    shorter = [_shortest(row, previous, i) for i, (previous, row) in enumerate(pairs)]
    return min([list(rows), shorter], key=lambda t: _width(t, _SAMPLE) + _width(t, _OUTPUT))


def _width(rows: Sequence[Weights], kind: int) -> int:
    return max(1, *(_span(row, kind, i) for i, row in enumerate(rows)))


def _shortest(row: Weights, previous: Weights, step: int) -> Weights:
    if step == 0 or previous[_NOISE].any() or previous[_CLIPPED].any():
        return row
    for length in range(1, min(_history(row, step), _MAX_HISTORY)):
        old = np.s_[[_SAMPLE, _OUTPUT], : step + 1 - length]
        if not previous[old].any():
            break
        mu = np.vdot(row[old], previous[old]) / np.vdot(previous[old], previous[old])
        left = np.abs(row[old] - mu * previous[old]).max()
        if left <= _TOLERANCE * np.abs(row).max():
            shorter: Weights = row - mu * previous
            shorter[_SAMPLE, step] += mu
            shorter[old] = 0.0
            return shorter
    return row


@dataclass(frozen=True)
class _Trace:
    """What a probe found; a weight matrix is [4, S], one row per kind of input."""

    steps: list[Weights]
    """Weights of each next sample, S of them."""
    input_scale: list[float]
    clipped: list[Weights | None]
    """Weights of each prediction that was clipped."""
    limits: set[float]


class _Basis:
    """Samples whose elements are the directions of all inputs, and a few mixtures of them."""

    def __init__(self, name: str, n_steps: int) -> None:
        self.name = name
        self.n_steps = n_steps
        self.size = 4 * n_steps
        self.shape = (1, 1, 1, self.size + _N_CHECKS)
        generator = np.random.default_rng(0)
        self._mixtures = generator.standard_normal((self.size, _N_CHECKS))

    def direction(self, kind: int, step: int) -> torch.Tensor:
        column = kind * self.n_steps + step
        elements = np.zeros(self.size + _N_CHECKS)
        elements[column] = 1.0
        elements[self.size :] = self._mixtures[column]
        return torch.from_numpy(elements).reshape(self.shape)

    def weights(self, value: torch.Tensor, step: int) -> Weights:
        """Weights [4, S] of the inputs in a value that the scheduler computed."""
        elements = value.detach().numpy().reshape(-1)
        if value.dtype != torch.float64 or tuple(value.shape) != self.shape:
            raise _not_linear(self.name, step, f"it returns {value.dtype} {tuple(value.shape)}")
        if not np.isfinite(elements).all():
            raise ModelError(
                "EQ-3109",
                f"{self.name} computes a coefficient that is not finite at step {step}",
                path="timesteps",
                hint="take fewer steps, or check timestep_spacing and final_sigmas_type",
            )
        flat = elements[: self.size]
        error = np.abs(flat @ self._mixtures - elements[self.size :])
        if (error > 1e-9 * (np.abs(flat) @ np.abs(self._mixtures))).any():
            raise _not_linear(self.name, step, "a mixture of inputs is not mixed in the result")
        return flat.reshape(4, self.n_steps).copy()


class _Probe(TorchFunctionMode):
    """Stands in for noise and clipping while a scheduler steps, and keeps its floats wide."""

    _CASTS = frozenset(
        {torch.Tensor.to, torch.Tensor.float, torch.Tensor.half, torch.Tensor.type}
        | {torch.Tensor.bfloat16, torch.Tensor.type_as}
    )
    _CLAMPS = frozenset({torch.clamp, torch.clip, torch.Tensor.clamp, torch.Tensor.clip})
    _NORMALS = frozenset({torch.randn, torch.randn_like})

    def __init__(self, basis: _Basis) -> None:
        super().__init__()
        self._basis = basis
        self._step = 0
        self._drawn = False
        self.clipped: list[Weights | None] = []
        self.limits: set[float] = set()

    def begin(self, step: int) -> None:
        self._step = step
        self._drawn = False
        self.clipped.append(None)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._NORMALS:
            return self._noise()
        if func in self._CLAMPS and tuple(args[0].shape) == self._basis.shape:
            return self._clip(args[0], *_bounds(*args[1:], **kwargs))
        result = func(*args, **kwargs)
        narrowed = isinstance(result, torch.Tensor) and result.is_floating_point()
        if func in self._CASTS and narrowed and args[0].dtype == torch.float64:
            return args[0]
        return result

    def _noise(self) -> torch.Tensor:
        if self._drawn:
            raise _not_linear(self._basis.name, self._step, "it draws noise more than once")
        self._drawn = True
        return self._basis.direction(_NOISE, self._step)

    def _clip(self, clean: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
        limited = isinstance(low, int | float) and isinstance(high, int | float) and low == -high
        if not limited or self.clipped[self._step] is not None:
            raise _not_linear(
                self._basis.name, self._step, "it clips other than once, to one symmetric limit"
            )
        self.clipped[self._step] = self._basis.weights(clean, self._step)
        self.limits.add(float(high))
        return self._basis.direction(_CLIPPED, self._step)


def _bounds(min: Any = None, max: Any = None) -> tuple[Any, Any]:
    return min, max


def _probe(scheduler: Any, options: Mapping[str, Any]) -> _Trace:
    name = type(scheduler).__name__
    basis = _Basis(name, len(scheduler.timesteps))
    probe = _Probe(basis)
    steps: list[Weights] = []
    scales: list[float] = []
    scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        for i, timestep in enumerate(scheduler.timesteps):
            probe.begin(i)
            sample, output = basis.direction(_SAMPLE, i), basis.direction(_OUTPUT, i)
            try:
                with probe:
                    scaled = scale_model_input(sample, timestep)
                    stepped = scheduler.step(
                        output, timestep, sample, return_dict=False, **options
                    )[0]
            except (ValueError, TypeError, NotImplementedError, IndexError, RuntimeError) as error:
                raise _rejected(name, error) from error
            scales.append(_input_scale(basis, scaled, i))
            steps.append(basis.weights(stepped, i))
        if not torch.equal(state, torch.get_rng_state()):
            raise _not_linear(name, 0, "it draws random numbers other than normal noise")
    return _Trace(steps, scales, probe.clipped, probe.limits)


def _input_scale(basis: _Basis, scaled: torch.Tensor, step: int) -> float:
    weights = basis.weights(scaled, step)
    scale = float(weights[_SAMPLE, step])
    weights[_SAMPLE, step] = 0.0
    if weights.any():
        raise _not_linear(basis.name, step, "it feeds the network more than the scaled sample")
    return scale


def _not_linear(name: str, step: int, reason: str) -> UnsupportedError:
    return UnsupportedError(
        "EQ-4103",
        f"{name} is not linear in sample, output and noise at step {step}: {reason}",
        hint=f"choose another sampler: {', '.join(_NAMES)}",
    )


def _rejected(name: str, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        "EQ-4104",
        f"{name} rejects this combination of options: {error}",
        hint="change its options or the number of steps, or choose another sampler",
    )


def _set_timesteps(scheduler: Any, n_steps: int) -> None:
    try:
        scheduler.set_timesteps(n_steps)
    except (ValueError, TypeError, NotImplementedError, IndexError, AssertionError) as error:
        raise _rejected(type(scheduler).__name__, error) from error
    if hasattr(scheduler, "set_begin_index"):
        # Without it a scheduler looks its first step up by timestep, and takes the second of two
        # equal ones.
        scheduler.set_begin_index(0)


def _lift_to_float64(scheduler: Any) -> None:
    """Widens every table of a scheduler; the values stay those that float32 left."""
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(scheduler, name, value.double())


def _step_options(scheduler: Any, eta: float) -> dict[str, float]:
    if not 0.0 <= eta <= 1.0:
        raise InputError("EQ-3105", f"eta must be in 0..1, but it is {eta}", path="eta")
    if "eta" in _parameters(scheduler.step):
        return {"eta": float(eta)}
    if eta != 0.0:
        raise InputError(
            "EQ-3105",
            f"{type(scheduler).__name__} has no eta, but it is {eta}",
            path="eta",
            hint="leave eta at 0, or use ddim",
        )
    return {}


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "args", "kwargs"}


@dataclass(frozen=True)
class _Refusal:
    option: str
    values: tuple[Any, ...]
    reason: str
    hint: str


_REFUSALS = (
    _Refusal(
        "thresholding",
        (True,),
        "the threshold is a quantile of the whole image",
        "set thresholding=False; clip_sample=True is supported",
    ),
    _Refusal(
        "variance_type",
        _LEARNED,
        "the variance would come from the network",
        'use ddpm, or set variance_type="fixed_small" to drop the variance channels',
    ),
    _Refusal(
        "variance_type",
        ("fixed_large_log",),
        "its variance is the root of a negative number",
        'set variance_type="fixed_large"',
    ),
    _Refusal(
        "use_clipped_model_output",
        (True,),
        "the output would be derived again from the clipped prediction",
        "set use_clipped_model_output=False",
    ),
    _Refusal(
        "use_dynamic_shifting",
        (True,),
        "the timesteps would depend on the size of the image",
        "set use_dynamic_shifting=False and give shift",
    ),
    _Refusal("invert_sigmas", (True,), "the timesteps would ascend", "set invert_sigmas=False"),
    _Refusal(
        "timestep_type",
        ("continuous",),
        "the network would be fed logarithms of sigma",
        'set timestep_type="discrete"',
    ),
)


def _check_is_scheduler(scheduler: Any) -> None:
    if not all(hasattr(scheduler, name) for name in ("config", "set_timesteps", "step")):
        raise ModelError(
            "EQ-3107",
            f"{type(scheduler).__name__} is not a diffusers scheduler",
            hint="pass the scheduler of a diffusers pipeline",
        )


def _check_options(scheduler: Any) -> None:
    accepted = _parameters(type(scheduler).__init__) | _parameters(scheduler.step)
    for refusal in _REFUSALS:
        value = scheduler.config.get(refusal.option)
        read = refusal.values is _LEARNED and _learns_variance(scheduler)
        if refusal.option in accepted and value in refusal.values and not read:
            raise UnsupportedError(
                "EQ-4101",
                f"{type(scheduler).__name__} with {refusal.option}={value!r} is no table: "
                f"{refusal.reason}",
                path=refusal.option,
                hint=refusal.hint,
            )
    if scheduler.config.get("solver_p") is not None:
        raise UnsupportedError(
            "EQ-4101",
            f"{type(scheduler).__name__} with solver_p={type(scheduler.solver_p).__name__} runs a "
            "second scheduler",
            path="solver_p",
            hint="set solver_p=None",
        )


def _check_steps(n_steps: int, num_train_timesteps: Any) -> None:
    if not isinstance(num_train_timesteps, int) or num_train_timesteps < 1:
        raise ModelError(
            "EQ-3102",
            f"num_train_timesteps must be 1 or more, but it is {num_train_timesteps!r}",
            path="num_train_timesteps",
        )
    if not isinstance(n_steps, int) or isinstance(n_steps, bool):
        raise InputError("EQ-3101", f"steps must be a whole number, not {n_steps!r}", path="steps")
    if not 1 <= n_steps <= num_train_timesteps:
        raise InputError(
            "EQ-3101",
            f"steps must be in 1..{num_train_timesteps}, but it is {n_steps}",
            path="steps",
        )


def _prediction_type(scheduler: Any) -> str:
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    return "sample" if kind == "original_sample" else str(kind)


def _check_prediction_type(scheduler: Any) -> None:
    kind = _prediction_type(scheduler)
    if kind not in _PREDICTION_TYPES:
        raise ModelError(
            "EQ-3104",
            f"unknown prediction_type {kind!r}",
            path="prediction_type",
            hint=f"known: {', '.join(_PREDICTION_TYPES)}",
        )


def _check_betas(scheduler: Any) -> None:
    betas, alpha_bar = (
        None if table is None else np.atleast_1d(np.asarray(table, dtype=np.float64))
        for table in (getattr(scheduler, name, None) for name in ("betas", "alphas_cumprod"))
    )
    if betas is not None and not ((betas > 0) & (betas <= 1)).all():
        raise _bad_table("betas", "in 0..1", betas, ~((betas > 0) & (betas <= 1)))
    if alpha_bar is None:
        return
    inside = (alpha_bar > 0) & (alpha_bar < 1)
    if scheduler.config.get("rescale_betas_zero_snr"):
        inside[-1] = alpha_bar[-1] >= 0
    if not inside.all():
        raise _bad_table("alpha_bar", "between 0 and 1", alpha_bar, ~inside)
    rising = np.append(False, np.diff(alpha_bar) >= 0)
    if rising.any():
        raise _bad_table("alpha_bar", "decreasing", alpha_bar, rising)


def _bad_table(name: str, must: str, table: Weights, bad: NDArray[np.bool_]) -> ModelError:
    t = int(np.flatnonzero(bad)[0])
    return ModelError(
        "EQ-3103",
        f"{name} must be {must}, but at timestep {t} it is {table[t]}",
        path="betas",
        hint="check beta_schedule, beta_start, beta_end and trained_betas",
    )


def _check_timesteps(scheduler: Any) -> None:
    timesteps = np.asarray(scheduler.timesteps, dtype=np.float64)
    limit = scheduler.config.num_train_timesteps
    floating = scheduler.timesteps.is_floating_point()
    inside = (timesteps >= 0) & (timesteps < limit)
    if _prediction_type(scheduler) == "flow_prediction" and floating:
        inside = (timesteps > 0) & (timesteps <= limit)
    if len(timesteps) == 0 or not inside.all() or (np.diff(timesteps) > 0).any():
        raise ModelError(
            "EQ-3102",
            f"timesteps must descend within 0..{limit - 1}, but they are {_listing(timesteps)}",
            path="timesteps",
            hint="check timestep_spacing, steps_offset and the number of steps",
        )


def _listing(timesteps: Weights) -> str:
    shown = [f"{t:g}" for t in timesteps]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-4:]])
