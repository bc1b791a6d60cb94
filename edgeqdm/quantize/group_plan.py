"""Group sizes of a plan, found by the evolutionary search under a real cost.

Source: Q-DiT, https://arxiv.org/abs/2406.17343, algorithm 1; the published stand-in for the cost,
the mean group size, is replaced by bit operations or bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from edgeqdm import __version__
from edgeqdm.calibrate.observe import LayerObservation
from edgeqdm.calibrate.select import Selection
from edgeqdm.calibrate.trajectories import Progress, checksum
from edgeqdm.errors import InputError
from edgeqdm.ir.codec import digest
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment
from edgeqdm.ir.precision import GROUP_SIZES, Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer
from edgeqdm.numerics.cost import RESCALE_COST, bit_operations
from edgeqdm.numerics.packing import weight_bytes
from edgeqdm.quantize.group_search import (
    Genome,
    GroupSearchResult,
    GroupSearchSettings,
    by_layer,
    search_group_sizes,
)
from edgeqdm.quantize.parameters import Parameters
from edgeqdm.quantize.quantizer import assemble, initialise

Cost = Callable[[LayerAssignment, int, int], float]
"""(assignment of a layer, its tokens, group size) -> what the layer costs."""
BATCH = 32


@dataclass(frozen=True)
class GroupPlan:
    """A plan with searched group sizes, and the search."""

    plan: DeploymentPlan
    search: GroupSearchResult


def plan_groups(
    denoiser: Denoiser,
    plan: DeploymentPlan,
    observations: Mapping[str, LayerObservation],
    selection: Selection,
    *,
    cost: str = "bit_operations",
    uniform: int = 128,
    fitness: Callable[[DeploymentPlan], float] | None = None,
    settings: GroupSearchSettings | None = None,
    seed: int = 0,
    file: Path | None = None,
    progress: Progress | None = None,
) -> GroupPlan:
    """Search a group size for every layer that a plan quantizes in groups.

    The size holds for the weight and, where the plan says so, for the activation. Search with
    nearest rounding, then reconstruct with the sizes fixed.

    Args:
        denoiser: the float model.
        plan: of one phase.
        observations: by layer.
        selection: samples that fitness is measured on.
        cost: `bit_operations` or `bytes` of all layers in groups together.
        uniform: the budget is what this size costs in every layer.
        fitness: of a plan, smaller is better; default `output_error` on the selection. Its file is
            valid for the default only where it is not given.
        settings: of the evolution.
        seed: of the evolution.
        file: scores so far; the same call goes on from it.
        progress: called after every score.

    Raises:
        InputError: if no layer is quantized in groups, or the cost is unknown.
    """
    grouped = [a for a in plan.phases[0].layers if a.precision.group_size]
    if not grouped or len(plan.phases) > 1:
        raise InputError(
            "EQ-3245",
            f"{len(grouped)} layers in groups in a plan of {len(plan.phases)} phases",
            path="plan",
            hint="give linear layers a precision such as w4g128a8dyn, in one phase",
        )
    settings = settings or GroupSearchSettings()
    wrong = [size for size in settings.choices if size not in GROUP_SIZES]
    if wrong:
        raise InputError(
            "EQ-3247",
            f"a group of {wrong[0]} input channels",
            path="choices",
            hint="groups have 16 to 256 input channels",
        )
    price = _prices(denoiser, grouped, cost)
    names = [assignment.layer for assignment in grouped]
    score, asked = fitness, ""
    if score is None:
        parameters = _all_sizes(denoiser, plan, observations, names, settings.choices)
        score = partial(output_error, denoiser, parameters, selection)
        asked = f"{__version__} {digest(denoiser.program)} {checksum(parameters.tensors())}"
    key = hashlib.sha256(f"{asked} {digest(plan)} {selection.key()} {cost}".encode()).hexdigest()
    result = search_group_sizes(
        names,
        price,
        price((uniform,) * len(grouped)),
        lambda genome: score(with_group_sizes(plan, dict(zip(names, genome, strict=True)))),
        key=key,
        settings=settings,
        seed=seed,
        file=file,
        progress=progress,
    )
    return GroupPlan(with_group_sizes(plan, by_layer(result)), result)


def with_group_sizes(plan: DeploymentPlan, sizes: Mapping[str, int]) -> DeploymentPlan:
    """The plan with other group sizes for the named layers."""

    def changed(assignment: LayerAssignment) -> LayerAssignment:
        if assignment.layer not in sizes:
            return assignment
        before = assignment.precision
        size = sizes[assignment.layer]
        text = str(before).replace(f"g{before.group_size}", f"g{size}")
        reason = f"{text}: group size searched"
        return assignment.model_copy(update={"precision": Precision(text), "reason": reason})

    phases = tuple(
        phase.model_copy(update={"layers": tuple(map(changed, phase.layers))})
        for phase in plan.phases
    )
    return plan.model_copy(update={"phases": phases})


def _all_sizes(
    denoiser: Denoiser,
    plan: DeploymentPlan,
    observations: Mapping[str, LayerObservation],
    names: Sequence[str],
    choices: Sequence[int],
) -> Parameters:
    """Parameters of every layer at every size, so that no weight is coded twice."""
    uniform = [with_group_sizes(plan, dict.fromkeys(names, size)) for size in choices]
    found = [initialise(denoiser, each, observations) for each in uniform]
    layers = {variant: mine for each in found for variant, mine in each.layers.items()}
    return replace(found[0], layers=layers)


def output_error(
    denoiser: Denoiser, parameters: Parameters, selection: Selection, plan: DeploymentPlan
) -> float:
    """Mean over the samples' steps of error energy over signal energy of the network output."""
    quantized = assemble(denoiser, plan, parameters)
    errors = []
    for step in selection.steps.unique().tolist():
        rows = (selection.steps == step).nonzero()[:, 0]
        wanted = selection.outputs[rows]
        fed = selection.conditioning
        found = torch.cat(
            [
                quantized.predict(selection.inputs[part], step, None if fed is None else fed[part])
                for part in rows.split(BATCH)
            ]
        )
        errors.append(float((found - wanted).square().mean() / wanted.square().mean()))
    return sum(errors) / len(errors)


def _prices(
    denoiser: Denoiser, grouped: Sequence[LayerAssignment], cost: str
) -> Callable[[Genome], float]:
    known: dict[str, Cost] = {
        "bit_operations": partial(_bit_operations, denoiser),
        "bytes": partial(_bytes, denoiser),
    }
    if cost not in known:
        raise InputError(
            "EQ-3246", f"no cost {cost!r}", path="cost", hint=f"use {' or '.join(known)}"
        )
    tokens = layer_tokens(denoiser, [assignment.layer for assignment in grouped])

    @cache
    def price(index: int, size: int) -> float:
        assignment = grouped[index]
        return known[cost](assignment, tokens[assignment.layer], size)

    return lambda genome: sum(price(index, size) for index, size in enumerate(genome))


def _bit_operations(
    denoiser: Denoiser, assignment: LayerAssignment, tokens: int, size: int
) -> float:
    weight = get_layer(denoiser.module, assignment.layer).weight
    precision = assignment.precision
    assert isinstance(weight, Tensor)
    return bit_operations(
        tokens=tokens,
        outputs=weight.shape[0],
        inputs=weight.shape[1],
        weight_bits=precision.weight_bits,
        activation_bits=precision.activation_bits,
        group_size=size,
        dynamic=precision.dynamic,
        # Every group has a zero_point, whose part of the sum is taken out again.
        rescale_cost=2 * RESCALE_COST,
    )


def _bytes(denoiser: Denoiser, assignment: LayerAssignment, tokens: int, size: int) -> float:
    weight = get_layer(denoiser.module, assignment.layer).weight
    assert isinstance(weight, Tensor)
    return weight_bytes(weight.shape[0], weight.shape[1], assignment.precision.weight_bits, size)


@torch.no_grad()
def layer_tokens(denoiser: Denoiser, names: Sequence[str]) -> dict[str, int]:
    """Rows that each linear layer multiplies for one sample, in one evaluation."""
    found = dict.fromkeys(names, 0)

    def count(name: str, layer: nn.Module, fed: tuple[Tensor, ...], output: Tensor) -> None:
        found[name] += prod(output.shape[:-1])

    with ExitStack() as hooks:
        for name in names:
            layer = get_layer(denoiser.module, name)
            hooks.callback(layer.register_forward_hook(partial(count, name)).remove)
        drawn = denoiser.draw_conditioning(1, torch.Generator().manual_seed(0))
        fed = () if drawn is None else (drawn,)
        denoiser.module(torch.zeros(1, *denoiser.info.sample_shape), denoiser.timestep(0, 1), *fed)
    return found
