"""Rounding and activation scales learned block by block, so that blocks return what they did.

    loss = error(block output) / its first value
         + inner_weight * sum of error(inner layer outputs) / its first value

An error is the squared difference from the float network relative to its mean square, sample by
sample, so that wide layers, long token sequences and all steps weigh alike: mean squares of a
block's output differ up to 300 times between steps. First values are those of the given
rounding: a residual connection adds to the mean square of a block's output what none of its layers
can change, and next to it the inner errors alone would decide.

Source: EDA-DM, fine-grained block reconstruction, https://arxiv.org/abs/2401.04585, after BRECQ,
https://arxiv.org/abs/2102.05426, and QDrop, https://arxiv.org/abs/2203.05740.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from edgeqdm import __version__
from edgeqdm.calibrate.select import Selection
from edgeqdm.calibrate.trajectories import Progress, checksum, load_tensors, save_tensors
from edgeqdm.errors import InputError, NumericalError, OutputError
from edgeqdm.ir.codec import digest
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.models.denoiser import Denoiser, first_tensor
from edgeqdm.models.layers import get_layer
from edgeqdm.numerics.ranges import ActivationScales
from edgeqdm.numerics.rounding import drop_mix, rounding_regulariser
from edgeqdm.quantize.blocks import Block, find_blocks
from edgeqdm.quantize.capture import (
    CHUNK,
    Arguments,
    Calls,
    Rows,
    as_network,
    call,
    capture,
    is_float,
)
from edgeqdm.quantize.parameters import LayerParameters, Parameters, Variant
from edgeqdm.quantize.settings import ANY, COUNT, POSITIVE, check_fields
from edgeqdm.quantize.soft import (
    SoftLayer,
    SoftNetwork,
    coded_variants,
    harden,
    put_soft_layers,
    soften,
)
from edgeqdm.quantize.soft_activations import TabledQuantizer
from edgeqdm.quantize.soft_temporal import FedNetwork, FedQuantizer
from edgeqdm.quantize.soft_weights import FixedWeight, RoundedWeight
from edgeqdm.quantize.tdq import ScaleGenerator, check_generator

HELD_OUT = 10
"""One sample in so many is not trained on but decides whether the result is better."""
WARM_UP, LOWEST_BETA_AT = 0.1, 0.4
"""Shares of the iterations at which rounding begins to be pushed to a decision, and at which the
push is strongest. AdaRound takes 0.2 and 1 and many thousand iterations; with a few hundred most
weights are then still undecided at the end, and hardening them undoes what was learned."""
FIRST_BETA, LAST_BETA = 20.0, 2.0
MIXED_INPUT = 0.5
"""Probability that an element of a block's input comes from the float network."""
LEAST_ENERGY = 1e-3
"""Of the mean over samples: the error of one with less is relative to this."""
TIMED = 3
"""Iterations after which the time of one is known."""


@dataclass(frozen=True)
class ReconstructionSettings:
    """How blocks are reconstructed.

    Attributes:
        iterations: of every block.
        batch: evaluations per iteration.
        lr_weight: first learning rate of the rounding; Adam, cosine to 0.
        lr_activation: first learning rate of logarithms of activation scales; likewise.
        lr_network: first learning rate of networks of the timestep; likewise.
        inner_weight: weight of the errors of inner layers; 0 for the block's output alone.
        drop: probability that an element of an activation is not quantized while training.
        regulariser: weight of the pressure on rounding to decide; the loss of nearest rounding is
            `1 + inner_weight`. 0 is off, as in EDA-DM.
        minutes: CPU minutes for the whole network; iterations are reduced to fit. None: no limit.

    Raises:
        InputError: if a field is out of range.
    """

    iterations: int = 500
    batch: int = 32
    lr_weight: float = 0.1
    lr_activation: float = 2e-3
    lr_network: float = 5e-4
    inner_weight: float = 0.8
    drop: float = 0.5
    regulariser: float = 50.0
    minutes: float | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "iterations": COUNT,
                "batch": COUNT,
                "lr_weight": ANY,
                "lr_activation": ANY,
                "lr_network": ANY,
                "inner_weight": ANY,
                "drop": (0.0, 1.0),
                "regulariser": ANY,
                "minutes": POSITIVE,
            },
            code="EQ-3251",
            hint="iterations, batch >= 1; drop in [0, 1); minutes > 0; the others >= 0",
        )


@dataclass(frozen=True)
class BlockReport:
    """What reconstruction did to one block.

    Attributes:
        name: of the block.
        layers: its planned layers.
        iterations: really done.
        seconds: of processor time, for all of it.
        loss_nearest: relative error of the block's output on held-out samples as it was given,
            fed by the quantized network before it.
        loss_soft: with learned rounding that may still be undecided.
        loss_hard: with rounding as stored.
        kept: whether the reconstructed form is used; otherwise the given one.
    """

    name: str
    layers: tuple[str, ...]
    iterations: int
    seconds: float
    loss_nearest: float
    loss_soft: float
    loss_hard: float
    kept: bool

    @property
    def gap(self) -> float:
        """Rise of the error by deciding the rounding, relative."""
        return self.loss_hard / self.loss_soft - 1 if self.loss_soft > 0 else 0.0


@dataclass(frozen=True)
class Reconstruction:
    """What reconstruction came to.

    Attributes:
        parameters: with the learned codes and scales.
        blocks: a report of every block, in the order they run.
        generator: the trained networks behind the temporal scales; None where none were given.
    """

    parameters: Parameters
    blocks: tuple[BlockReport, ...]
    generator: ScaleGenerator | None = None


def reconstruct(
    denoiser: Denoiser,
    plan: DeploymentPlan,
    parameters: Parameters,
    selection: Selection,
    *,
    generator: ScaleGenerator | None = None,
    settings: ReconstructionSettings | None = None,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """Learn rounding and activation scales of all planned layers, block by block.

    Weight scales, group sizes and zero points stay. Inputs of a block are kept on disk, so memory
    is bounded by a few batches of one block beside two copies of the network.

    Args:
        denoiser: the float model.
        plan: precision of every layer.
        parameters: first codes and scales, weights rounded to nearest.
        selection: calibration samples; under guidance each is evaluated with and without its
            conditioning.
        generator: networks of the timestep that made the temporal tables of `parameters`. They are
            trained in the place of the tables (TDQ).
        settings: default `ReconstructionSettings()`.
        seed: of batches, mixing and dropping.
        work: folder for finished blocks and for inputs of the running one; a later call with the
            same arguments goes on after the last finished block. None for a temporary folder.
        progress: called after every block.

    Raises:
        InputError: if there are fewer than 2 samples, the selection does not fit the sampler, or
            the networks do not fit the tables.
        NumericalError: if a block is fed NaN or Inf, or its error becomes so; names it.
        UnsupportedError: see `soften` and `capture`.
        StorageError: if a finished block in `work` is damaged or was edited.
        OutputError: if `work` cannot be written.
    """
    settings = settings or ReconstructionSettings()
    _check_selection(denoiser, selection)
    if generator is not None:
        check_generator(generator, parameters)
    blocks = find_blocks(denoiser, tuple(coded_variants(plan)))
    soft = soften(denoiser, plan, parameters, weight=FixedWeight)
    key = _key(denoiser, plan, parameters, selection, settings, seed, generator)
    clock = _Deadline(settings.minutes, sum(block.macs for block in blocks))
    reports = []
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        context = _Context(
            denoiser, plan, soft, Rows.of(denoiser, selection), settings, folder / f"blocks-{key}"
        )
        for index, block in enumerate(blocks):
            file = folder / f"reconstruct-{key}-{index:04}.st"
            finished = _load(file, block, parameters, plan, generator)
            if finished is None:
                chance = torch.Generator().manual_seed(_block_seed(seed, index))
                mine = None if generator is None else generator.part(_tables_of(plan, block))
                finished = _reconstruct_block(context, block, parameters, mine, chance, clock)
                if work is not None:
                    _save(finished, file)
            else:
                clock.spend(finished.report.seconds)
            parameters = replace(parameters, layers={**parameters.layers, **finished.layers})
            if generator is not None and finished.generator is not None:
                generator = generator.with_part(finished.generator)
            put_soft_layers(soft, denoiser, plan, parameters, block.layers, weight=FixedWeight)
            clock.finish(block.macs)
            reports.append(finished.report)
            if progress is not None:
                progress(index + 1, len(blocks))
    if generator is not None:
        # Networks of one block and of all are not promised to round alike.
        parameters = generator.tabulate(parameters, denoiser.program.timesteps)
    return Reconstruction(parameters, tuple(reports), generator)


@dataclass(frozen=True)
class _Context:
    """What all blocks share."""

    denoiser: Denoiser
    plan: DeploymentPlan
    soft: SoftNetwork
    rows: Rows
    settings: ReconstructionSettings
    folder: Path


@dataclass(frozen=True)
class _Finished:
    layers: dict[Variant, LayerParameters]
    report: BlockReport
    generator: ScaleGenerator | None
    """Of the tables of this block."""


class _Deadline:
    """Shares the remaining time out over the remaining blocks by their multiply-adds."""

    def __init__(self, minutes: float | None, macs: int) -> None:
        self._end = None if minutes is None else time.process_time() + 60 * minutes
        self._macs = macs

    def of_block(self, macs: int) -> float:
        """When a block has to be done."""
        if self._end is None:
            return math.inf
        now = time.process_time()
        return now + max(0.0, self._end - now) * macs / max(self._macs, 1)

    def spend(self, seconds: float) -> None:
        """Counts what an earlier call has spent on a finished block."""
        if self._end is not None:
            self._end -= seconds

    def finish(self, macs: int) -> None:
        self._macs -= macs


def _check_selection(denoiser: Denoiser, selection: Selection) -> None:
    if selection.n_samples < 2:
        raise InputError(
            "EQ-3253",
            f"reconstruction needs at least 2 samples, got {selection.n_samples}",
            path="selection",
            hint="calibrate with more samples",
        )
    last, n_steps = int(selection.steps.max()), denoiser.program.n_steps
    if last >= n_steps or tuple(selection.inputs.shape[1:]) != denoiser.info.sample_shape:
        raise InputError(
            "EQ-3254",
            f"samples of shape {list(selection.inputs.shape[1:])} up to step {last} do not belong "
            f"to {list(denoiser.info.sample_shape)} in {n_steps} steps",
            path="selection",
            hint="calibrate with this model and this sampler",
        )


def _key(
    denoiser: Denoiser,
    plan: DeploymentPlan,
    parameters: Parameters,
    selection: Selection,
    settings: ReconstructionSettings,
    seed: int,
    generator: ScaleGenerator | None,
) -> str:
    # With its budget: a block that was cut short must not stand in for a whole one.
    chosen = sorted(asdict(settings).items())
    whole = (
        __version__,
        digest(plan),
        digest(denoiser.program),
        digest(denoiser.guidance),
        selection.key(),
        checksum(parameters.tensors()),
        None if generator is None else checksum(generator.tensors()),
        chosen,
        seed,
    )
    found = hashlib.sha256(repr(whole).encode())
    if denoiser.null_embedding is not None:
        found.update(denoiser.null_embedding.numpy().tobytes())
    return found.hexdigest()[:24]


def _tables_of(plan: DeploymentPlan, block: Block) -> list[str]:
    """Names of the temporal tables that a block may have, as `ScaleGenerator` spells them."""
    coded = coded_variants(plan)
    variants = [variant for name in block.layers for variant in coded[name]]
    return [f"{side}/{variant}" for variant in variants for side in ("input", "output")]


def _block_seed(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:7], "big")


def _learnable(mine: LayerParameters) -> dict[str, Tensor]:
    """Those tensors of a layer that reconstruction can change."""
    found = {"codes": mine.weight.codes}
    if mine.activation is not None:
        found["activation"] = mine.activation.scale
    if mine.output is not None:
        found["output"] = mine.output.scale
    return found


def _save(finished: _Finished, file: Path) -> None:
    tensors = {
        f"{variant} {name}": tensor.contiguous()
        for variant, mine in finished.layers.items()
        for name, tensor in _learnable(mine).items()
    }
    report = finished.report
    numbers = [report.iterations, report.seconds, float(report.kept)]
    numbers += [report.loss_nearest, report.loss_soft, report.loss_hard]
    tensors["report"] = torch.tensor(numbers, dtype=torch.float64)
    if finished.generator is not None:
        tensors |= finished.generator.tensors()
    save_tensors(tensors, file)


def _load(
    file: Path,
    block: Block,
    parameters: Parameters,
    plan: DeploymentPlan,
    generator: ScaleGenerator | None,
) -> _Finished | None:
    tensors = load_tensors(file)
    if tensors is None:
        return None
    coded = coded_variants(plan)
    layers = {}
    for variant in (v for name in block.layers for v in coded[name]):
        before = parameters.layers[variant]
        layers[variant] = LayerParameters(
            replace(before.weight, codes=tensors[f"{variant} codes"]),
            _with_scale(before.activation, tensors.get(f"{variant} activation")),
            _with_scale(before.output, tensors.get(f"{variant} output")),
        )
    iterations, seconds, kept, nearest, soft, hard = tensors["report"].tolist()
    report = BlockReport(
        block.name, block.layers, int(iterations), seconds, nearest, soft, hard, bool(kept)
    )
    mine = None if generator is None else generator.part(_tables_of(plan, block))
    names = () if mine is None else mine.names
    return _Finished(layers, report, ScaleGenerator.of_tensors(names, tensors))


def _with_scale(scales: ActivationScales | None, table: Tensor | None) -> ActivationScales | None:
    return None if scales is None or table is None else replace(scales, scale=table)


def _reconstruct_block(
    context: _Context,
    block: Block,
    parameters: Parameters,
    generator: ScaleGenerator | None,
    chance: torch.Generator,
    clock: _Deadline,
) -> _Finished:
    started, deadline = time.process_time(), clock.of_block(block.macs)
    soft, rows = context.soft, context.rows
    soft.clock.drop = 0.0
    with _captured(context, block) as (float_calls, soft_calls):
        task = _Task(context, block, float_calls, soft_calls, chance)
        held_out, trained = _split(rows, chance)
        loss_nearest = task.evaluate(held_out)
        first = task.first_errors(trained)
        put_soft_layers(
            soft, context.denoiser, context.plan, parameters, block.layers, weight=RoundedWeight
        )
        fed = None
        if generator is not None:
            fed = FedNetwork(soft, context.denoiser.program.timesteps, generator)
        iterations = task.train(trained, deadline, first, fed)
        learned = generator if fed is None else fed.settle()
        loss_soft = task.evaluate(held_out)
        task.decide()
        loss_hard = task.evaluate(held_out)
    kept = loss_hard < loss_nearest
    variants = [v for name in block.layers for v in soft.variants[name]]
    chosen = harden(soft) if kept else parameters
    report = BlockReport(
        block.name,
        block.layers,
        iterations,
        time.process_time() - started,
        loss_nearest,
        loss_soft,
        loss_hard,
        kept,
    )
    layers = {variant: chosen.layers[variant] for variant in variants}
    return _Finished(layers, report, learned if kept else generator)


@contextmanager
def _captured(context: _Context, block: Block) -> Iterator[tuple[Calls, Calls]]:
    """Calls of the block in the float network and in the quantized one; removed at the end."""
    soft, module = context.soft, context.denoiser.module
    with _scratch(context.folder) as here:
        yield (
            capture(
                as_network(module, soft.timesteps),
                get_layer(module, block.name),
                block.name,
                context.rows,
                Path(here, "float"),
            ),
            capture(
                soft,
                get_layer(soft.module, block.name),
                block.name,
                context.rows,
                Path(here, "quantized"),
            ),
        )


@contextmanager
def _scratch(folder: Path) -> Iterator[str]:
    """A folder beside finished blocks whose name begins like this one's; removed at the end."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent)
    except OSError as problem:
        raise OutputError(
            "EQ-7252",
            f"no folder for the inputs of the block can be made: {problem}",
            path=folder.parent,
            hint="name another work folder",
        ) from problem
    with scratch as here:
        yield here


def _split(rows: Rows, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows held out and rows to train on; both evaluations of a sample are on one side."""
    n = rows.selection.n_samples
    order = torch.randperm(n, generator=generator)
    held_out = max(1, n // HELD_OUT)
    return rows.of_samples(order[:held_out]), rows.of_samples(order[held_out:])


class _Task:
    """One block, its inputs, and what it should return."""

    def __init__(
        self,
        context: _Context,
        block: Block,
        float_calls: Calls,
        soft_calls: Calls,
        generator: torch.Generator,
    ) -> None:
        self._context, self._block = context, block
        self._float_calls, self._soft_calls = float_calls, soft_calls
        self._generator = generator

    @torch.no_grad()
    def evaluate(self, rows: Tensor) -> float:
        """Relative error of the block's output, fed by the quantized network before it."""
        errors = []
        for part in rows.split(CHUNK):
            target = self._float_block(self._float_calls.read(part))
            found = self._soft_block(part, self._soft_calls.read(part))
            errors.append(_relative_errors(found, target))
        return float(torch.cat(errors).double().mean())

    @torch.no_grad()
    def first_errors(self, rows: Tensor) -> tuple[float, float]:
        """Errors of the block's output and of its inner layers, nothing dropped."""
        block, inner = self._errors(rows)
        tiny = torch.finfo(torch.float32).tiny
        return max(float(block), tiny), max(float(inner), tiny)

    def train(
        self,
        rows: Tensor,
        deadline: float,
        first: tuple[float, float],
        fed: FedNetwork | None,
    ) -> int:
        """Learns until the deadline or the last iteration; returns the iterations done."""
        settings, clock = self._context.settings, self._context.soft.clock
        alphas, scales = self._alphas(), self._log_ratios()
        networks = [] if fed is None else [*fed.scales.parameters()]
        self._context.soft.requires_grad_(False)
        for parameter in (*alphas, *scales):
            parameter.requires_grad_(True)
        rates = [
            (alphas, settings.lr_weight),
            (scales, settings.lr_activation),
            (networks, settings.lr_network),
        ]
        groups = [{"params": params, "lr": rate} for params, rate in rates if params and rate]
        if not groups:
            return 0
        optimizer = torch.optim.Adam(groups)
        first_rates = [cast(float, group["lr"]) for group in groups]
        clock.drop, clock.generator = settings.drop, self._generator
        total, done, started = settings.iterations, 0, time.process_time()
        while done < total:
            for group, rate in zip(optimizer.param_groups, first_rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * done / total)) / 2
            if fed is not None:
                fed.feed()
            block, inner = self._errors(rows)
            loss = block / first[0] + settings.inner_weight * inner / first[1]
            loss = loss + settings.regulariser * _indecision(alphas, done / total)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if done == TIMED or (done > TIMED and time.process_time() > deadline):
                each = (time.process_time() - started) / done
                left = max(0.0, deadline - time.process_time())
                total = int(min(total, done + left / each))
        clock.drop = 0.0
        return done

    def decide(self) -> None:
        """Rounds every weight of the block up or down."""
        for layer in self._layers():
            if isinstance(layer.weight, RoundedWeight):
                layer.weight.hard = True

    def _errors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of a random batch: error of the block's output, and sum of those of inner layers."""
        settings, generator = self._context.settings, self._generator
        drawn = rows[torch.randint(len(rows), (settings.batch,), generator=generator)]
        original, quantized = self._float_calls.read(drawn), self._soft_calls.read(drawn)
        inner = self._block.layers[:-1] if settings.inner_weight else ()
        module = self._context.denoiser.module
        with torch.no_grad(), _outputs(module, inner) as targets:
            target = self._float_block(original)
        with _outputs(self._context.soft.module, inner) as found:
            output = self._soft_block(drawn, self._mixed(quantized, original))
        of_block = _relative_errors(output, target).mean()
        of_layers = [_relative_errors(found[name], targets[name]).mean() for name in inner]
        of_inner = torch.stack([torch.zeros(()), *of_layers]).sum()
        if not bool(torch.isfinite((of_block + of_inner).detach())):
            raise NumericalError(
                "EQ-5251",
                "the error of the block is NaN or Inf",
                path=self._block.name,
                hint="lower lr_weight and lr_activation, or leave its layers in fp32",
            )
        return of_block, of_inner

    def _mixed(self, quantized: Arguments, original: Arguments) -> Arguments:
        return {
            key: drop_mix(value, original[key], MIXED_INPUT, self._generator)
            if is_float(value) and key in self._soft_calls.stored
            else value
            for key, value in quantized.items()
        }

    def _float_block(self, arguments: Arguments) -> Tensor:
        block = get_layer(self._context.denoiser.module, self._block.name)
        return cast(Tensor, first_tensor(call(block, arguments)))

    def _soft_block(self, rows: Tensor, arguments: Arguments) -> Tensor:
        soft = self._context.soft
        soft.clock.steps = self._context.rows.steps(rows)
        return cast(Tensor, first_tensor(call(get_layer(soft.module, self._block.name), arguments)))

    def _layers(self) -> list[SoftLayer]:
        module = self._context.soft.module
        return [cast(SoftLayer, get_layer(module, name)) for name in self._block.layers]

    def _alphas(self) -> list[Tensor]:
        weights = [layer.weight for layer in self._layers()]
        return [weight.alpha for weight in weights if isinstance(weight, RoundedWeight)]

    def _log_ratios(self) -> list[Tensor]:
        parts = [part for layer in self._layers() for part in layer.modules()]
        tabled = [part for part in parts if isinstance(part, TabledQuantizer)]
        return [part.log_ratio for part in tabled if not isinstance(part, FedQuantizer)]


def _relative_errors(found: Tensor, target: Tensor) -> Tensor:
    """Squared error of every sample relative to the target's mean square, [B]."""
    energy = target.square().flatten(1).mean(1)
    least = torch.finfo(target.dtype).tiny + LEAST_ENERGY * energy.mean()
    return (found - target).square().flatten(1).mean(1) / energy.clamp(min=least)


def _indecision(alphas: Sequence[Tensor], progress: float) -> Tensor:
    """The rounding regulariser over all weights of a block; 0 during the warm-up."""
    if not alphas or progress < WARM_UP:
        return torch.zeros(())
    decided = min(1.0, (progress - WARM_UP) / (LOWEST_BETA_AT - WARM_UP))
    beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * decided
    total = sum(alpha.numel() for alpha in alphas)
    parts = [rounding_regulariser(alpha, beta) * (alpha.numel() / total) for alpha in alphas]
    return torch.stack(parts).sum()


@contextmanager
def _outputs(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What layers return while this is open, the last call of each."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    with ExitStack() as hooks:
        for name in names:
            handle = get_layer(module, name).register_forward_hook(keep(name))
            hooks.callback(handle.remove)
        yield found
