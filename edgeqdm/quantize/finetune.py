"""Quantization-aware training by distillation: the float model on its own trajectories teaches.

    loss = mean over the batch of |f_quantized - f_float|^2 / its mean at that step before training

so that every step counts by what it gains: an error at the noisiest steps is small beside the
output but is in the image to the end. No data set is needed. Weights, scales, biases and norms
learn together; rounding is straight through.

Source: TDQ, https://arxiv.org/abs/2306.02316, section 3, with the float model's output in the
place of the noise; LSQ, https://arxiv.org/abs/1902.08153, for the scales.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from edgeqdm import __version__
from edgeqdm.calibrate.trajectories import (
    Progress,
    Trajectories,
    checksum,
    load_tensors,
    save_tensors,
)
from edgeqdm.errors import InputError, NumericalError
from edgeqdm.ir.codec import digest
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import TABLE
from edgeqdm.models.denoiser import Denoiser, guided
from edgeqdm.models.layers import get_layer, network_of
from edgeqdm.quantize.parameters import Parameters, WeightCodes
from edgeqdm.quantize.quantizer import check_plan
from edgeqdm.quantize.settings import ANY, COUNT, POSITIVE, check_fields
from edgeqdm.quantize.soft import SoftNetwork, harden, soften
from edgeqdm.quantize.soft_activations import TabledQuantizer
from edgeqdm.quantize.soft_temporal import FedNetwork, FedQuantizer, generator_of
from edgeqdm.quantize.soft_weights import FixedWeight, LearnedWeight
from edgeqdm.quantize.tdq import ScaleGenerator, check_generator

HELD_OUT = 10
"""One run in so many is not trained on but decides whether the result is better."""
WARM_UP = 0.05
"""Share of the training in which the learning rates rise to their full value."""
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0
"""Norm of the whole gradient above which it is scaled down."""
SAVE_SECONDS = 60.0
"""Time between two states kept on disk."""
CHUNK = 32
"""Samples evaluated together."""
INSIDE = 0.49
"""How far a weight may start from the whole number of its code; rounding moves at 0.5."""
LEAST_ERROR = 1e-4
"""Of the largest error of a step: smaller ones count as this, so that steps without any can be."""
_FROZEN = (nn.Linear, nn.Conv2d, nn.Embedding, FedQuantizer)
"""Layers of the float remainder, which keep their values, and scales that come from a network."""


@dataclass(frozen=True)
class FinetuneSettings:
    """How a quantized network is trained.

    Attributes:
        iterations: at most.
        minutes: of processor time, at most; None for no limit. The learning rates follow whichever
            of the two is nearer to its end.
        batch: samples per iteration; under guidance the network sees each twice.
        lr_weight: learning rate of weights, biases, norms and networks of the timestep. Three times
            the default is faster where the start is poor (4-bit activations); five times is too
            much where it is good: then codes walk at random.
        lr_scale: learning rate of logarithms of scales.
        temporal: temporal scales come from one network of the timestep per table (TDQ).

    Raises:
        InputError: if a field is out of range.
    """

    iterations: int = 2000
    minutes: float | None = None
    batch: int = 16
    lr_weight: float = 1e-4
    lr_scale: float = 1e-3
    temporal: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "iterations": COUNT,
                "minutes": POSITIVE,
                "batch": COUNT,
                "lr_weight": ANY,
                "lr_scale": ANY,
            },
            code="EQ-3265",
            hint="iterations, batch >= 1; minutes > 0; learning rates >= 0",
        )


@dataclass(frozen=True)
class Finetuned:
    """What training came to.

    Attributes:
        parameters: trained; the given ones where training did not help.
        generator: networks behind the temporal scales of `parameters`, or None.
        iterations: done in all.
        seconds: of processor time spent in them.
        loss_before: error of the given codes and scales, relative to the output, on the held-out
            runs: geometric mean over the steps.
        loss_after: the same of `parameters`; never more than `loss_before`.
        history: loss of every iteration.
    """

    parameters: Parameters
    generator: ScaleGenerator | None
    iterations: int
    seconds: float
    loss_before: float
    loss_after: float
    history: tuple[float, ...]

    @property
    def improved(self) -> bool:
        """Whether `parameters` are the trained ones."""
        return self.loss_after < self.loss_before


def finetune(
    denoiser: Denoiser,
    plan: DeploymentPlan,
    parameters: Parameters,
    trajectories: Trajectories,
    *,
    settings: FinetuneSettings,
    generator: ScaleGenerator | None = None,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Train codes, scales, biases and norms so that the output is that of the float model.

    Layers in fp32, embeddings and tables keep their values, and so does what feeds a table.

    Args:
        denoiser: the float model, untouched.
        plan: precision of every layer.
        parameters: codes and scales to start from.
        trajectories: of the float model with this sampler and guidance; at least 2 runs.
        settings: how to train.
        generator: networks that made the temporal tables of `parameters`; they are trained in the
            place of the tables, as with `settings.temporal`.
        seed: of batches and of the networks of the timestep.
        work: folder for the state of the training, from which a later call with the same arguments
            goes on; `minutes` may differ. None to keep nothing.
        progress: called after every iteration with (iterations done, iterations expected).

    Raises:
        InputError: if the plan, the trajectories or the networks belong to another model or
            sampler, no activation is temporal where `settings.temporal`, or there is no error to
            learn from.
        NumericalError: if the loss is NaN or Inf; names the iteration.
        UnsupportedError: see `soften`.
        StorageError: if the state in `work` is damaged or was edited.
        OutputError: if `work` cannot be written.
    """
    check_plan(denoiser, plan)
    _check_trajectories(denoiser, trajectories)
    if generator is not None:
        check_generator(generator, parameters)
    chance = torch.Generator().manual_seed(seed)
    held_out, trained = _split(trajectories.n_runs, chance)
    lesson = _Lesson.of(denoiser, trajectories)
    first = _errors_of(lesson, plan, parameters, held_out)
    if not bool(torch.isfinite(first).all()):
        raise NumericalError(
            "EQ-5261",
            "the given codes and scales return NaN or Inf",
            path=denoiser.info.name,
            hint="quantize again, or leave more layers in fp32",
        )
    least = LEAST_ERROR * float(first.max())
    if least == 0:
        raise InputError(
            "EQ-3272",
            "the quantized network already returns what the float one does",
            path="plan",
            hint="training is for plans with fewer bits",
        )
    first = first.clamp(min=least)
    lesson = replace(lesson, first=first)
    training = _Training(lesson, plan, parameters, settings, chance, generator)
    file = None
    if work is not None:
        file = work / f"finetune-{_key(training, plan, trajectories, seed)}.st"
    training.run(trained, file, progress)
    found, scales = training.result()
    after_steps = _errors_of(lesson, plan, found, held_out).clamp(min=least)
    before, after = _mean(first), _mean(after_steps)
    if not after < before:
        found, scales, after = parameters, generator, before
    history = tuple(training.history)
    return Finetuned(found, scales, len(history), training.used, before, after, history)


def _check_trajectories(denoiser: Denoiser, trajectories: Trajectories) -> None:
    if trajectories.n_runs < 2:
        raise InputError(
            "EQ-3267",
            f"training needs at least 2 trajectories, got {trajectories.n_runs}",
            path="samples",
            hint="calibrate with more samples",
        )
    shape, n_steps = tuple(trajectories.inputs.shape[2:]), denoiser.program.n_steps
    if shape != denoiser.info.sample_shape or trajectories.n_steps != n_steps:
        raise InputError(
            "EQ-3268",
            f"trajectories of {list(shape)} in {trajectories.n_steps} steps do not belong to "
            f"{list(denoiser.info.sample_shape)} in {n_steps} steps",
            path="trajectories",
            hint="collect them from this model with this sampler",
        )


def _split(n_runs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Runs held out and runs to train on."""
    order = torch.randperm(n_runs, generator=generator)
    held_out = max(1, n_runs // HELD_OUT)
    return order[:held_out], order[held_out:]


@dataclass(frozen=True)
class _Lesson:
    """What is to be learned.

    Attributes:
        denoiser: the float model.
        trajectories: its inputs and outputs.
        energy: mean square of the outputs at every step, float32 [S].
        first: relative error at every step before training, float32 [S], above 0.
    """

    denoiser: Denoiser
    trajectories: Trajectories
    energy: Tensor
    first: Tensor

    @staticmethod
    def of(denoiser: Denoiser, trajectories: Trajectories) -> _Lesson:
        energy = trajectories.outputs.square().mean((1, 2, 3, 4))
        energy = energy.clamp(min=torch.finfo(energy.dtype).tiny)
        return _Lesson(denoiser, trajectories, energy, torch.ones_like(energy))

    def errors(self, soft: SoftNetwork, runs: Tensor, steps: Tensor) -> Tensor:
        """Relative error of the guided output for every (run, step), [B]."""
        fed, denoiser = self.trajectories.conditioning, self.denoiser

        def evaluate(x: Tensor, conditioning: Tensor | None) -> Tensor:
            rows = steps.repeat(len(x) // len(steps))
            return cast(Tensor, soft(x, rows, *([] if conditioning is None else [conditioning])))

        found = guided(
            evaluate,
            self.trajectories.inputs[steps, runs],
            None if fed is None else fed[runs],
            null=denoiser.null,
            guidance=denoiser.guidance,
        )
        wanted = self.trajectories.outputs[steps, runs]
        return (found - wanted).square().mean((1, 2, 3)) / self.energy[steps]


@torch.no_grad()
def _errors_of(
    lesson: _Lesson, plan: DeploymentPlan, parameters: Parameters, runs: Tensor
) -> Tensor:
    """Mean relative error of stored codes and scales on some runs at every step, float32 [S]."""
    soft = soften(lesson.denoiser, plan, parameters, weight=FixedWeight)
    n_steps = lesson.trajectories.n_steps
    pairs = torch.cartesian_prod(torch.arange(n_steps), runs).reshape(-1, 2)
    errors = [lesson.errors(soft, part[:, 1], part[:, 0]) for part in pairs.split(CHUNK)]
    return torch.cat(errors).reshape(n_steps, -1).mean(1)


def _mean(errors: Tensor) -> float:
    """Geometric mean."""
    return float(errors.double().log().mean().exp())


class CodedWeight(LearnedWeight):
    """A learned weight that starts where it rounds to given codes.

    A weight whose nearest code is another one, as learned rounding has it, starts at the nearest
    end of its code's cell.
    """

    def __init__(self, weight: Tensor, coded: WeightCodes) -> None:
        super().__init__(weight, coded)
        with torch.no_grad():
            rounded, reach = coded.dequantized(), INSIDE * self._spread(self._scale())
            self.weight.clamp_(rounded - reach, rounded + reach)


class _Training:
    """A network in training, and all that has to be kept to go on with it.

    Attributes:
        soft: the network.
        history: loss of every iteration done.
        used: seconds of processor time spent on them.
    """

    def __init__(
        self,
        lesson: _Lesson,
        plan: DeploymentPlan,
        parameters: Parameters,
        settings: FinetuneSettings,
        chance: torch.Generator,
        generator: ScaleGenerator | None,
    ) -> None:
        self._lesson, self.settings, self._generator = lesson, settings, chance
        self.soft = soften(lesson.denoiser, plan, parameters, weight=CodedWeight)
        self._fed: FedNetwork | None = None
        timesteps = lesson.denoiser.program.timesteps
        if generator is None and settings.temporal:
            generator = generator_of(self.soft, timesteps, chance)
        if generator is not None:
            self._fed = FedNetwork(self.soft, timesteps, generator)
        self._learnable = self._choose(plan)
        scales = {k: v for k, v in self._learnable.items() if k.endswith(".log_ratio")}
        weights = [v for k, v in self._learnable.items() if k not in scales]
        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": settings.lr_weight, "weight_decay": WEIGHT_DECAY},
            {"params": [*scales.values()], "lr": settings.lr_scale, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, fused=True)
        self.history: list[float] = []
        self.used = 0.0

    def run(self, runs: Tensor, file: Path | None, progress: Progress | None) -> None:
        """Trains on some runs, from the state in `file` if there is one, to the end."""
        self._restore(file)
        last, saved = time.process_time(), time.monotonic()
        while self._share() < 1:
            self._iterate(runs)
            now = time.process_time()
            self.used, last = self.used + now - last, now
            done, finished = len(self.history), self._share() >= 1
            if finished or time.monotonic() - saved >= SAVE_SECONDS:
                self._save(file)
                saved = time.monotonic()
            if progress is not None:
                progress(done, done if finished else max(done + 1, round(done / self._share())))

    def result(self) -> tuple[Parameters, ScaleGenerator | None]:
        """What is stored of the network as it is now."""
        generator = None if self._fed is None else self._fed.settle()
        return harden(self.soft), generator

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes, and its first values before the first iteration."""
        state = self._optimizer.state_dict()["state"]
        found: dict[str, Tensor] = {f"parameter {k}": v for k, v in self._learnable.items()}
        found |= {f"optimizer {k} {n}": v for k, mine in state.items() for n, v in mine.items()}
        found["generator"] = self._generator.get_state()
        found["history"] = torch.tensor(self.history, dtype=torch.float64)
        found["used"] = torch.tensor(self.used, dtype=torch.float64)
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}

    def _choose(self, plan: DeploymentPlan) -> dict[str, nn.Parameter]:
        """Parameters that learn, by name; the gradients of all others are switched off."""
        named = dict(_learnable(self.soft))
        # A network made for inference may have been given to us with its gradients switched off.
        for parameter in named.values():
            parameter.requires_grad_(True)
        fixed = self._before_tables(plan, named)
        named = {name: value for name, value in named.items() if name not in fixed}
        self.soft.requires_grad_(False)
        if self._fed is not None:
            named |= {f"temporal.{k}": v for k, v in self._fed.scales.named_parameters()}
        for parameter in named.values():
            parameter.requires_grad_(True)
        return named

    def _before_tables(self, plan: DeploymentPlan, named: dict[str, nn.Parameter]) -> set[str]:
        """Names of parameters that a table's content depends on."""
        layers = {a.layer for p in plan.phases for a in p.layers if a.precision == TABLE}
        outputs: list[Tensor] = []

        def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs.append(output.sum())

        hooks = [get_layer(self.soft.module, x).register_forward_hook(keep) for x in layers]
        if hooks:
            self._lesson.errors(self.soft, torch.tensor([0]), torch.tensor([0]))
        for hook in hooks:
            hook.remove()
        if not any(output.requires_grad for output in outputs):
            return set()
        found = torch.autograd.grad(
            torch.stack(outputs).sum(), [*named.values()], allow_unused=True
        )
        return {name for name, slope in zip(named, found, strict=True) if slope is not None}

    def _share(self) -> float:
        """How much of the training is done, 0 to 1 or a little more."""
        settings = self.settings
        share = len(self.history) / settings.iterations
        return share if settings.minutes is None else max(share, self.used / 60 / settings.minutes)

    def _iterate(self, runs: Tensor) -> None:
        settings, n_steps = self.settings, self._lesson.trajectories.n_steps
        self._set_rates()
        drawn = torch.randint(len(runs), (settings.batch,), generator=self._generator)
        steps = torch.randint(n_steps, (settings.batch,), generator=self._generator)
        if self._fed is not None:
            self._fed.feed()
        errors = self._lesson.errors(self.soft, runs[drawn], steps)
        loss = (errors / self._lesson.first[steps]).mean()
        self._optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._learnable.values(), LARGEST_GRADIENT)
        if not math.isfinite(float(loss.detach())) or not bool(torch.isfinite(norm)):
            raise NumericalError(
                "EQ-5260",
                f"the loss or its gradient is NaN or Inf at iteration {len(self.history)}",
                path=self._lesson.denoiser.info.name,
                hint="lower lr_weight and lr_scale",
            )
        self._optimizer.step()
        self.history.append(float(loss.detach()))

    def _set_rates(self) -> None:
        share, settings = self._share(), self.settings
        rise = min(1.0, (share + 1 / settings.iterations) / WARM_UP)
        factor = rise * (1 + math.cos(math.pi * min(share, 1.0))) / 2
        rates = (settings.lr_weight, settings.lr_scale)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor

    def _save(self, file: Path | None) -> None:
        if file is not None:
            save_tensors(self.tensors(), file)

    @torch.no_grad()
    def _restore(self, file: Path | None) -> None:
        tensors = None if file is None else load_tensors(file)
        if tensors is None:
            return
        for name, parameter in self._learnable.items():
            parameter.copy_(tensors[f"parameter {name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer "):
                _, index, key = name.split()
                state.setdefault(int(index), {})[key] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        self._generator.set_state(tensors["generator"])
        self.history, self.used = tensors["history"].tolist(), float(tensors["used"])


def _learnable(soft: SoftNetwork) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in network_of(soft.module).named_modules():
        if not isinstance(module, _FROZEN):
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{prefix}.{name}", parameter


def _key(training: _Training, plan: DeploymentPlan, trajectories: Trajectories, seed: int) -> str:
    denoiser, settings = training._lesson.denoiser, replace(training.settings, minutes=None)
    codes = [
        (part.zero_point, part.bits)
        for part in training.soft.modules()
        if isinstance(part, TabledQuantizer)
    ]
    whole = (
        __version__,
        digest(plan),
        digest(denoiser.program),
        digest(denoiser.guidance),
        trajectories.key(),
        checksum({**training.soft.state_dict(), **training.tensors()}),
        codes,
        sorted(asdict(settings).items()),
        seed,
    )
    found = hashlib.sha256(repr(whole).encode())
    if denoiser.null_embedding is not None:
        found.update(denoiser.null_embedding.numpy().tobytes())
    return found.hexdigest()[:24]
