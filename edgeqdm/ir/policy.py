"""Phases of a plan in the form that inference servers read.

A `diffusion_step_policy` names how many first and last steps run with activations in 16 bits
(`a16`); all others run as the checkpoint is (`native`). It belongs into
`quantization_config.runtime` of `transformer/config.json`.

Source: https://github.com/vllm-project/vllm-omni/pull/6560 and
https://github.com/huggingface/diffusers/pull/14664, schema_version 1.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.plan import DeploymentPlan, Phase
from edgeqdm.ir.record import Record

Mode = Literal["native", "a16"]


class EdgeSteps(Record):
    """Steps at one end of the sampler."""

    count: int = Field(ge=0)
    mode: Mode = "a16"


class StepPolicy(Record):
    """`first_last_n`, the one kind of policy that servers know."""

    schema_version: int = 1
    type: Literal["first_last_n"] = "first_last_n"
    index_space: Literal["denoising_loop_iteration"] = "denoising_loop_iteration"
    scope: tuple[str, ...] = ("transformer",)
    default_mode: Mode = "native"
    first_steps: EdgeSteps
    last_steps: EdgeSteps
    overlap: Mode = "a16"


def step_policy_of(plan: DeploymentPlan) -> StepPolicy:
    """The plan's phases as a step policy: which steps run with activations in float.

    Raises:
        UnsupportedError: EQ-4330, if a phase mixes integers and float in the layers that differ
            between phases, or such phases are not the first and last ones.
    """
    modes = [_mode(plan, phase) for phase in plan.phases]
    steps = [
        mode for mode, p in zip(modes, plan.phases, strict=True) for _ in range(p.start, p.stop)
    ]
    if "native" not in steps:
        return StepPolicy(
            default_mode="a16", first_steps=EdgeSteps(count=0), last_steps=EdgeSteps(count=0)
        )
    first = steps.index("native")
    last = steps[::-1].index("native")
    if "a16" in steps[first : len(steps) - last]:
        raise UnsupportedError(
            "EQ-4330",
            "a phase in float lies between phases on integers; a step policy knows first and last "
            "steps only",
            path="plan.phases",
            hint="give the search two phases",
        )
    return StepPolicy(first_steps=EdgeSteps(count=first), last_steps=EdgeSteps(count=last))


def _mode(plan: DeploymentPlan, phase: Phase) -> Mode:
    """`native` where layers run on integers; those that never do say nothing."""
    ever = {a.layer for p in plan.phases for a in p.layers if a.precision.integer}
    mine = {a.layer: a.precision.integer for a in phase.layers if a.layer in ever}
    if len(set(mine.values())) > 1:
        layer = next(name for name, integer in mine.items() if not integer)
        raise UnsupportedError(
            "EQ-4330",
            f"steps {phase.start}..{phase.stop - 1} run some of the plan's integer layers in "
            "float; a step policy switches all of them at once",
            path=layer,
            hint="a package of edgeqdm keeps precisions by layer and phase",
        )
    return "native" if any(mine.values()) else "a16"
