"""Temporal scales that come from small networks of the timestep, and tables for any steps.

Source: TDQ, https://arxiv.org/abs/2306.02316, section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgeqdm.calibrate.observe import LayerObservation
from edgeqdm.errors import InputError
from edgeqdm.ir.plan import DeploymentPlan, Phase
from edgeqdm.ir.precision import ActivationPolicy
from edgeqdm.ir.schedule import SamplerProgram
from edgeqdm.numerics.ranges import ActivationScales, StepRanges
from edgeqdm.numerics.temporal import TemporalScales, fit_temporal
from edgeqdm.quantize.parameters import (
    LayerParameters,
    Parameters,
    Variant,
    steps_of_variants,
)

_PREFIX = "generator/"


@dataclass(frozen=True)
class ScaleGenerator:
    """Networks of the timestep behind the temporal scales of a quantized denoiser.

    Attributes:
        names: of the tables, `input/VARIANT` or `output/VARIANT`, in the order of the outputs.
        scales: the networks.
    """

    names: tuple[str, ...]
    scales: TemporalScales

    def tabulate(self, parameters: Parameters, timesteps: Sequence[float]) -> Parameters:
        """The parameters with every generated table made for these timesteps, [S] descending."""
        rows = self.scales.tabulate(torch.tensor(timesteps, dtype=torch.float64))
        tables = dict(zip(self.names, rows, strict=True))

        def side(name: str, variant: Variant, found: ActivationScales | None) -> Any:
            table = tables.get(f"{name}/{variant}")
            return found if found is None or table is None else replace(found, scale=table)

        layers = {
            variant: LayerParameters(
                mine.weight,
                side("input", variant, mine.activation),
                side("output", variant, mine.output),
            )
            for variant, mine in parameters.layers.items()
        }
        return replace(parameters, layers=layers)

    def part(self, names: Collection[str]) -> ScaleGenerator | None:
        """Copies of the networks of some tables; None where there are none of these names."""
        kept = [index for index, name in enumerate(self.names) if name in names]
        if not kept:
            return None
        # Every tensor of the state has one row per network.
        state = {key: value[kept] for key, value in self.scales.state_dict().items()}
        return ScaleGenerator(
            tuple(self.names[index] for index in kept), TemporalScales.of_state(state)
        )

    def with_part(self, part: ScaleGenerator) -> ScaleGenerator:
        """A copy with the networks of some of its tables exchanged."""
        rows = [self.names.index(name) for name in part.names]
        state = {key: value.clone() for key, value in self.scales.state_dict().items()}
        for key, value in part.scales.state_dict().items():
            state[key][rows] = value
        return ScaleGenerator(self.names, TemporalScales.of_state(state))

    def tensors(self) -> dict[str, Tensor]:
        """State to store."""
        return {f"{_PREFIX}{name}": value for name, value in self.scales.state_dict().items()}

    @staticmethod
    def of_tensors(names: Sequence[str], tensors: Mapping[str, Tensor]) -> ScaleGenerator | None:
        """What `tensors` stored; None where there are no names."""
        if not names:
            return None
        state = {k.removeprefix(_PREFIX): v for k, v in tensors.items() if k.startswith(_PREFIX)}
        return ScaleGenerator(tuple(names), TemporalScales.of_state(state))


def fit_generator(
    plan: DeploymentPlan,
    timesteps: Sequence[float],
    parameters: Parameters,
    observations: Mapping[str, LayerObservation],
    *,
    seed: int = 0,
) -> ScaleGenerator:
    """Fit one network per temporal table, on the steps at which the plan uses the table.

    Args:
        plan: precision of every layer.
        timesteps: of the sampler that was observed, [S].
        parameters: tables to start from.
        observations: by layer.
        seed: of the networks' first weights.

    Raises:
        InputError: if no activation is temporal.
    """
    steps = steps_of_variants(plan)
    found = {
        f"{side}/{variant}": (
            scales,
            _at_steps(getattr(observations[variant.layer], side), steps[variant]),
        )
        for side, variant, scales in _temporal_tables(parameters)
    }
    if not found:
        raise InputError(
            "EQ-3263",
            "no activation of the plan has temporal scales",
            path="plan",
            hint="give layers the activation policy `temporal`",
        )
    scales, ranges = zip(*found.values(), strict=True)
    fitted = fit_temporal(
        ranges,
        torch.tensor(timesteps, dtype=torch.float64),
        [each.zero_point for each in scales],
        torch.stack([each.scale for each in scales]),
        bits=[each.bits for each in scales],
        generator=torch.Generator().manual_seed(seed),
    )
    return ScaleGenerator(tuple(found), fitted)


def _at_steps(ranges: StepRanges, steps: Sequence[int]) -> StepRanges:
    """The ranges with zeros at all other steps, which a fit leaves out."""
    used = torch.zeros_like(ranges.low)
    used[list(steps)] = 1.0
    return StepRanges(ranges.samples * used[:, None], ranges.low * used, ranges.high * used)


def check_generator(generator: ScaleGenerator, parameters: Parameters) -> None:
    """Raise unless the networks are those of all temporal tables, no more and no less.

    Raises:
        InputError: names a table that is too many or missing.
    """
    tables = {f"{side}/{variant}" for side, variant, _ in _temporal_tables(parameters)}
    differing = sorted(tables ^ set(generator.names))
    if differing:
        found = "has no network" if differing[0] in tables else "is no temporal table of the plan"
        raise InputError(
            "EQ-3271",
            f"{differing[0]} {found}",
            path="generator",
            hint="use the networks that were made with these codes and scales",
        )


def _temporal_tables(
    parameters: Parameters,
) -> Iterator[tuple[str, Variant, ActivationScales]]:
    for variant, mine in parameters.layers.items():
        if variant.policy is ActivationPolicy.TEMPORAL:
            for side, scales in (("input", mine.activation), ("output", mine.output)):
                if scales is not None:
                    yield side, variant, scales


def move_plan(plan: DeploymentPlan, old: SamplerProgram, new: SamplerProgram) -> DeploymentPlan:
    """The plan for other steps of the same model: a phase keeps its span of timesteps.

    Raises:
        InputError: if a phase would be left without a step.
    """
    phase_of = [
        next(
            (p for p, phase in enumerate(plan.phases) if t > _next_start(plan, p, old)),
            len(plan.phases) - 1,
        )
        for t in new.timesteps
    ]
    phases = []
    for index, phase in enumerate(plan.phases):
        steps = [step for step, mine in enumerate(phase_of) if mine == index]
        if not steps:
            raise InputError(
                "EQ-3264",
                f"phase {index} spans timesteps {old.timesteps[phase.start]:g} to "
                f"{old.timesteps[phase.stop - 1]:g}, where the new sampler has no step",
                path="steps",
                hint="use more steps, or a plan with fewer phases",
            )
        phases.append(Phase(start=steps[0], stop=steps[-1] + 1, layers=phase.layers))
    return plan.model_copy(update={"n_steps": new.n_steps, "phases": tuple(phases)})


def _next_start(plan: DeploymentPlan, index: int, program: SamplerProgram) -> float:
    """Timestep at which the phase after this one begins; below every timestep for the last."""
    stop = plan.phases[index].stop
    return program.timesteps[stop] if stop < plan.n_steps else float("-inf")
