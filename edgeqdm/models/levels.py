"""How much of a network's input is signal and how much is noise, at every step of a sampler."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
from numpy.typing import NDArray

from edgeqdm.errors import EdgeqdmError, InputError, UnsupportedError
from edgeqdm.ir.schedule import SamplerProgram
from edgeqdm.models.sampler import compile_sampler

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """What a network is fed is `signal[i] x0 + noise[i] eps`.

    Attributes:
        signal: sqrt(alpha_bar), or 1 - sigma of a flow, [S].
        noise: sqrt(1 - alpha_bar), or sigma of a flow, [S].
    """

    signal: Floats
    noise: Floats


def noise_levels(program: SamplerProgram, scheduler: Any | None = None) -> NoiseLevels:
    """Levels at the steps of a compiled sampler.

    Args:
        program: the compiled sampler.
        scheduler: what it was compiled from. By default it is built again from the program's
            settings, which hold all of it but lists such as `trained_betas`.

    Returns:
        The levels, float64 [S] each; where the scheduler adds noise in other units (x0 + sigma
        eps), those after its input scaling.

    Raises:
        InputError: the scheduler does not compile to this program.
        UnsupportedError: it has neither alphas_cumprod nor sigmas.
    """
    own = copy.deepcopy(_rebuilt(program) if scheduler is None else scheduler)
    steps = int(program.settings["steps"] or 0)
    _require_same(program, own, steps)
    own.set_timesteps(steps)
    sigmas = _array(getattr(own, "sigmas", None))[: program.n_steps]
    if _is_flow(program):
        return NoiseLevels(1.0 - sigmas, sigmas)
    if len(sigmas) == program.n_steps:
        return NoiseLevels(1.0 / np.sqrt(1.0 + sigmas**2), sigmas / np.sqrt(1.0 + sigmas**2))
    alpha_bar = _array(getattr(own, "alphas_cumprod", None))
    if alpha_bar.size == 0:
        raise UnsupportedError(
            "EQ-4430",
            f"{program.sampler} has no alphas_cumprod and no sigmas",
            path="sampler",
            hint="choose bits by step with another sampler",
        )
    at_steps = alpha_bar[np.array(program.timesteps).astype(np.int64)]
    return NoiseLevels(np.sqrt(at_steps), np.sqrt(1.0 - at_steps))


def _is_flow(program: SamplerProgram) -> bool:
    return program.prediction_type == "flow_prediction" or bool(
        program.settings.get("use_flow_sigmas")
    )


def _rebuilt(program: SamplerProgram) -> Any:
    settings: Mapping[str, Any] = {
        key: value for key, value in program.settings.items() if key not in ("eta", "steps")
    }
    try:
        return getattr(diffusers, program.sampler)(**settings)
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
        raise _other_scheduler(program, f"{error}") from error


def _require_same(program: SamplerProgram, scheduler: Any, steps: int) -> None:
    eta = float(program.settings.get("eta") or 0.0)
    try:
        found = compile_sampler(scheduler, steps, eta=eta)
    except EdgeqdmError as error:
        raise _other_scheduler(program, f"{error}") from error
    differing = [
        field
        for field in SamplerProgram.model_fields
        if getattr(found, field) != getattr(program, field)
    ]
    if differing:
        raise _other_scheduler(program, f"{', '.join(differing)} would differ")


def _other_scheduler(program: SamplerProgram, reason: str) -> InputError:
    return InputError(
        "EQ-3432",
        f"the scheduler of this {program.sampler} table is not known: {reason}",
        path="sampler",
        hint="pass the scheduler that the table was compiled from",
    )


def _array(table: Any) -> Floats:
    return np.asarray([] if table is None else table, dtype=np.float64).reshape(-1)
