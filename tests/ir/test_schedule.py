"""Stored samplers and corrections; what is new is not written where it is not used."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from edgeqdm.ir.codec import digest, dump_record, parse_record
from edgeqdm.ir.schedule import (
    AbsorbedVariance,
    CorrectedSchedule,
    CorrectionKey,
    LearnedVariance,
    SamplerProgram,
)

KEY = CorrectionKey(model="m", sampler="s", guidance=1.0, precision="p")


def _program(**changes: Any) -> SamplerProgram:
    fields: dict[str, Any] = {
        "sampler": "DDPMScheduler",
        "settings": {"eta": 0.0},
        "prediction_type": "epsilon",
        "timesteps": (9.0, 1.0),
        "integer_timesteps": True,
        "initial_sigma": 1.0,
        "input_scale": (1.0, 1.0),
        "sample_weights": ((1.0,), (1.0,)),
        "output_weights": ((-0.5,), (-0.5,)),
        "noise_std": (1.0, 0.0),
    }
    return SamplerProgram(**fields | changes)


def _correction(**changes: Any) -> CorrectedSchedule:
    fields: dict[str, Any] = {
        "key": KEY,
        "gain": (1.0, 0.9),
        "bias": ((0.0,), (0.1,)),
        "noise_std": ((1.0,), (0.0,)),
        "clamped": (False, False),
    }
    return CorrectedSchedule(**fields | changes)


def test_a_fixed_variance_has_the_digest_it_always_had() -> None:
    assert digest(_program()) == "34d659fc5382fc191e31b29ec91164a237b3e63b47c312477249fe6de5925d14"
    assert (
        digest(_correction()) == "ba83851572c5597ae75f8d4962575031394d1dda87475d6051c65e35da5327f3"
    )
    assert b"learned_variance" not in dump_record(_program())
    assert b"absorbed" not in dump_record(_correction())
    assert b"input_weight" not in dump_record(_correction())
    assert "learned_variance" not in _program().model_dump_json()


def test_a_learned_variance_is_written_and_read_back() -> None:
    learned = LearnedVariance(log_min=(-9.0, 0.0), log_max=(-2.0, 0.0))
    for program in (
        _program(learned_variance=learned),
        _program(learned_variance=LearnedVariance()),
    ):
        data = dump_record(program)
        assert parse_record(data, SamplerProgram, name="x") == program
        assert digest(program) != digest(_program())
    absorbed = AbsorbedVariance(variance=((0.1,), (0.0,)), largest_share=0.9)
    correction = _correction(absorbed=absorbed)
    assert parse_record(dump_record(correction), CorrectedSchedule, name="x") == correction


@pytest.mark.parametrize(
    "learned",
    [{"log_min": (0.0, 0.0)}, {"log_max": (0.0, 0.0)}, {"log_min": (0.0,), "log_max": (0.0,)}],
)
def test_bounds_of_other_steps_or_without_the_other_are_refused(learned: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"both be given|one row per timestep"):
        _program(learned_variance=LearnedVariance(**learned))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValidationError, match="largest_share"):
        AbsorbedVariance(variance=((0.0,),), largest_share=share)
