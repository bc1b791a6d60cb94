"""A profile is read for its own target and device, or refused; what is doubtful is told."""

from __future__ import annotations

import os
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from edgeqdm.errors import InputError
from edgeqdm.ir.codec import dump_record
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.ir.profile import (
    REFUSED_FLAGS,
    BoundaryCost,
    BoundaryKind,
    Device,
    Environment,
    Flag,
    LatencyEntry,
    LatencyProfile,
    OpKey,
    PhaseCost,
    Protocol,
    Runtime,
    Timing,
    WholeGraph,
    is_sealed,
    sealed_profile,
)
from edgeqdm.models.load import load
from edgeqdm.profile import adopt
from edgeqdm.profile.adopt import PROFILE, merged, read_profile, refused_flags, shipped_profiles
from edgeqdm.profile.opkeys import network_keys
from edgeqdm.testing.tiny import tiny_embeddings, write_tiny_conditional_unet

CREATED = datetime(2026, 8, 1, 12, tzinfo=UTC)
W4A8 = Precision("w4a8")


def linear(width: int) -> OpKey:
    shape, weight = (1, 16, width), (width, width)
    return OpKey(kind=LayerKind.LINEAR, input_shape=shape, weight_shape=weight, bias=True)


def timing(us: float, *flags: Flag) -> Timing:
    return Timing(median_us=us, p10_us=us, p90_us=us, ci95_us=(us, us), n=30, flags=flags)


def entry(width: int, precision: Precision, us: float, *flags: Flag) -> LatencyEntry:
    return LatencyEntry(
        key=linear(width), precision=precision, provenance="measured", timing=timing(us, *flags)
    )


def boundary(us: float, *flags: Flag) -> BoundaryCost:
    return BoundaryCost(
        kind=BoundaryKind.QUANTIZE,
        shape=(1, 16, 16),
        provenance="measured",
        timing=timing(us, *flags),
    )


def whole(precision: Precision, us: float, *flags: Flag) -> WholeGraph:
    return WholeGraph(
        model="0" * 64,
        batch=1,
        precisions={"conv_in": precision},
        model_bytes=1,
        provenance="measured",
        timing=timing(us, *flags),
    )


def phases(alone: Timing, among: Timing) -> PhaseCost:
    return PhaseCost(
        model="0" * 64,
        batch=1,
        precisions={"conv_in": W8A8},
        other={},
        provenance="measured",
        alone=alone,
        among=among,
    )


def profile_of(**changes: Any) -> LatencyProfile:
    fields: dict[str, Any] = {
        "edgeqdm_version": "0.1.0",
        "created": "2026-08-01T12:00:00Z",
        "target": "onnxruntime",
        "device": Device(name="phone", machine="aarch64", system="Linux 6"),
        "runtime": Runtime(name="onnxruntime", version="1.31.1"),
        "threads": 1,
        "power_mode": "unknown",
        "protocol": Protocol(
            clock="thread_cpu",
            rounds=3,
            min_runs=30,
            ci_target=0.01,
            max_seconds=6.0,
            reference_us=(1.0, 1.0),
        ),
        "overhead": timing(2.5),
        "entries": (entry(16, FP32, 30.0), entry(16, W8A8, 12.0)),
        "boundaries": (boundary(4.0),),
        "wholes": (whole(FP32, 200.0),),
        "phase_costs": (phases(timing(100.0), timing(104.0)),),
    }
    return sealed_profile(LatencyProfile(**(fields | changes)))


def stored(folder: Path, profile: LatencyProfile) -> Path:
    path = folder / "mine.json"
    path.write_bytes(dump_record(profile))
    return path


def refusal(source: str | Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read_profile(source, **options)
    assert caught.value.hint is not None
    return caught.value


def warnings_of(
    folder: Path,
    *,
    age: timedelta = timedelta(0),
    accept: Collection[Flag] = (),
    **changes: Any,
) -> tuple[str, ...]:
    path = stored(folder, profile_of(**changes))
    return read_profile(path, now=CREATED + age, accept=accept).warnings


# Reading.


def test_a_profile_is_read_as_it_was_stored(tmp_path: Path) -> None:
    profile = profile_of()
    found = read_profile(stored(tmp_path, profile), target="onnxruntime", now=CREATED)
    assert (found.profile, found.accepted, found.warnings) == (profile, (), ())


def test_a_folder_is_read_by_the_file_it_holds(tmp_path: Path) -> None:
    profile = profile_of()
    (tmp_path / PROFILE).write_bytes(dump_record(profile))
    assert read_profile(tmp_path).profile == profile
    assert read_profile(str(tmp_path)).profile == profile


def test_a_profile_that_comes_with_edgeqdm_is_read_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = profile_of()
    (tmp_path / "some-phone").mkdir()
    (tmp_path / "some-phone" / PROFILE).write_bytes(dump_record(profile))
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").touch()
    monkeypatch.setattr(adopt, "files", lambda _: tmp_path)
    assert shipped_profiles() == ("some-phone",)
    assert read_profile("some-phone").profile == profile
    assert "some-phone" in str(refusal("some-fone").hint)


def test_every_profile_that_comes_with_edgeqdm_can_be_used() -> None:
    for name in shipped_profiles():
        found = read_profile(name)
        assert found.accepted == ()
        assert found.profile.entries
        assert not any("outlier" in warning for warning in found.warnings)


@pytest.mark.parametrize("name", ["pixel-99", "../elsewhere", "nul\0byte", "x" * 300, ""])
def test_an_unknown_name_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The second where the system does not even look for such a name.
    with pytest.raises(InputError, match=r"EQ-3523|EQ-3001"):
        read_profile(name)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_not_a_file_is_refused_without_waiting(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "p.json")
    with pytest.raises(InputError, match="EQ-3002"):
        read_profile(tmp_path / "p.json")


def test_an_edited_profile_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path, profile_of())
    path.write_text(path.read_text().replace("30.0", "20.0"))
    problem = refusal(path)
    assert problem.code == "EQ-3520"
    assert problem.path == str(path)


def test_a_profile_of_another_target_is_refused_with_both_names(tmp_path: Path) -> None:
    problem = refusal(stored(tmp_path, profile_of()), target="tensorrt")
    assert problem.code == "EQ-3521"
    assert "'onnxruntime'" in problem.message
    assert "'tensorrt'" in problem.message


def test_damage_is_told_before_the_target_and_that_before_flags(tmp_path: Path) -> None:
    path = stored(tmp_path, profile_of(flags=(Flag.EMULATOR,)))
    assert refusal(path, target="tensorrt").code == "EQ-3521"
    path.write_text(path.read_text().replace("30.0", "20.0"))
    assert refusal(path, target="tensorrt").code == "EQ-3520"


PLACES = ("flags", "overhead", "entries", "boundaries", "wholes")


@pytest.mark.parametrize("flag", sorted(REFUSED_FLAGS))
@pytest.mark.parametrize("place", [*PLACES, "alone", "among"])
def test_figures_nothing_may_be_decided_on_are_refused_wherever_they_are(
    place: str, flag: Flag, tmp_path: Path
) -> None:
    flagged = {
        "flags": (flag,),
        "overhead": timing(2.5, flag),
        "entries": (entry(16, FP32, 30.0), entry(16, W8A8, 12.0, Flag.NOISY, flag)),
        "boundaries": (boundary(4.0, flag),),
        "wholes": (whole(FP32, 200.0, flag),),
        "alone": (phases(timing(100.0, flag), timing(104.0)),),
        "among": (phases(timing(100.0), timing(104.0, flag)),),
    }
    field = place if place in PLACES else "phase_costs"
    path = stored(tmp_path, profile_of(**{field: flagged[place]}))
    problem = refusal(path)
    assert problem.code == "EQ-3522"
    assert problem.message == f"figures are flagged {flag}"
    assert f"--accept-flag {flag}" in str(problem.hint)
    found = read_profile(path, accept={flag}, now=CREATED)
    assert found.accepted == (flag,)


def test_only_the_flags_named_are_accepted_and_only_those_found_are_told(tmp_path: Path) -> None:
    profile = profile_of(flags=(Flag.EMULATOR,), overhead=timing(2.5, Flag.THROTTLED))
    path = stored(tmp_path, profile)
    assert refused_flags(profile) == {Flag.EMULATOR, Flag.THROTTLED}
    assert refusal(path).message == "figures are flagged emulator, throttled"
    assert refusal(path, accept={Flag.EMULATOR}).message == "figures are flagged throttled"
    found = read_profile(path, accept=REFUSED_FLAGS, now=CREATED)
    assert found.accepted == (Flag.EMULATOR, Flag.THROTTLED)


def test_rough_figures_are_taken_and_counted(tmp_path: Path) -> None:
    rough = (entry(16, FP32, 30.0, Flag.NOISY, Flag.UNSTABLE), entry(16, W8A8, 12.0))
    told = warnings_of(tmp_path, entries=rough, wholes=(whole(FP32, 9.0, Flag.CI_NOT_REACHED),))
    assert told == ("2 of 7 figures are noisy or not settled",)


# Warnings.


@pytest.mark.parametrize(
    ("age", "told"),
    [
        (timedelta(days=90), ()),
        (timedelta(days=91), ("stale: measured 91 days ago",)),
        (timedelta(days=1000), ("stale: measured 1000 days ago",)),
        (timedelta(days=-1), ()),
    ],
)
def test_a_profile_older_than_90_days_is_called_stale(
    age: timedelta, told: tuple[str, ...], tmp_path: Path
) -> None:
    assert warnings_of(tmp_path, age=age) == told


def test_an_age_is_counted_across_time_zones(tmp_path: Path) -> None:
    midnight = "2026-08-02T00:00:00+12:00"
    assert warnings_of(tmp_path, age=timedelta(days=90), created=midnight) == ()


@pytest.mark.parametrize("created", ["yesterday", "2026-08-01T12:00:00", "2026-13-01T00:00:00Z"])
def test_a_time_that_is_none_or_has_no_zone_is_refused_by_file_and_field(
    created: str, tmp_path: Path
) -> None:
    path = stored(tmp_path, profile_of())
    path.write_text(path.read_text().replace("2026-08-01T12:00:00Z", created))
    with pytest.raises(InputError) as caught:
        read_profile(path)
    assert caught.value.path == str(path)
    assert caught.value.message.startswith(f"created: {created!r} is no time with a zone; write")


def test_a_profile_of_the_future_is_told_as_a_wrong_clock(tmp_path: Path) -> None:
    (told,) = warnings_of(tmp_path, age=timedelta(days=-2))
    assert told == "created in the future, 2026-08-01T12:00:00Z: a clock was wrong"


def test_estimated_entries_are_counted(tmp_path: Path) -> None:
    guess = entry(64, W8A8, 12.0).model_copy(update={"provenance": "estimated"})
    told = warnings_of(tmp_path, entries=(entry(16, FP32, 30.0), guess))
    assert told == ("1 of 2 entries are estimated, not measured",)


def test_an_entry_given_in_another_unit_is_called_an_outlier(tmp_path: Path) -> None:
    others = (entry(64, FP32, 120.0), entry(64, W8A8, 40.0), entry(16, FP32, 30.0))
    told = warnings_of(tmp_path, entries=(*others, entry(64, W4A8, 42_000.0)))
    assert told == ("outlier: linear 1x16x64 * 64x64 at w4a8",)
    assert warnings_of(tmp_path, entries=others) == ()


@pytest.mark.parametrize("us", [(100.0, 100_000.0), (100_000.0, 100.0)])
def test_of_two_entries_far_apart_both_are_called_outliers(
    us: tuple[float, float], tmp_path: Path
) -> None:
    entries = tuple(entry(64, p, each) for p, each in zip((FP32, W8A8), us, strict=True))
    assert warnings_of(tmp_path, entries=entries) == (
        "outlier: linear 1x16x64 * 64x64 at fp32",
        "outlier: linear 1x16x64 * 64x64 at w8a8",
    )


@pytest.mark.parametrize(
    ("us", "outliers"),
    [
        ((120_000.0, 40_000.0, 90.0), ["w4a8"]),
        ((120_000.0, 40.0, 90.0), ["fp32"]),
        ((120.0, 40.0, 90.0), []),
        # Below 5 us nothing is a slip of the unit: what is left is the noise of the overhead.
        ((120.0, 40.0, 2.6), []),
        ((120_000.0,), []),
    ],
)
def test_an_entry_far_above_or_below_most_others_is_an_outlier(
    us: tuple[float, ...], outliers: list[str], tmp_path: Path
) -> None:
    entries = tuple(entry(64, p, each) for p, each in zip((FP32, W8A8, W4A8), us, strict=False))
    told = warnings_of(tmp_path, entries=entries)
    assert told == tuple(f"outlier: linear 1x16x64 * 64x64 at {p}" for p in outliers)


def test_operations_that_differ_in_their_bias_are_not_compared(tmp_path: Path) -> None:
    plain = linear(64).model_copy(update={"bias": False})
    slow = entry(64, FP32, 90_000.0).model_copy(update={"key": plain})
    assert warnings_of(tmp_path, entries=(entry(64, FP32, 90.0), slow)) == ()


def test_every_operation_of_a_network_with_cross_attention_can_stand_in_one_profile(
    tmp_path: Path,
) -> None:
    """Its queries have no bias and its outputs have one, of the same shapes."""
    denoiser = load(
        write_tiny_conditional_unet(tmp_path / "model"),
        scheduler="ddim",
        steps=2,
        conditioning=tiny_embeddings(2),
    )
    keys = set(network_keys(denoiser).keys.values())
    assert {k for k in keys if k.model_copy(update={"bias": not k.bias}) in keys}
    entries = tuple(
        entry(16, precision, 30.0).model_copy(update={"key": key})
        for key in keys
        for precision in (FP32, W8A8)
    )
    profile = profile_of(entries=entries)
    assert read_profile(stored(tmp_path, profile)).profile == profile


def test_no_more_than_ten_outliers_are_listed(tmp_path: Path) -> None:
    entries = [
        entry(width, precision, us)
        for width in range(1, 14)
        for precision, us in ((FP32, 120.0), (W8A8, 42_000.0), (W4A8, 40.0))
    ]
    assert len(warnings_of(tmp_path, entries=tuple(entries))) == 10


# Putting together.

OLD = profile_of()
NEW = profile_of(
    created="2026-08-09T12:00:00Z",
    overhead=timing(2.25),
    flags=(Flag.EMULATOR,),
    entries=(entry(16, W8A8, 11.0), entry(64, W8A8, 50.0)),
    boundaries=(boundary(3.0),),
    wholes=(whole(FP32, 190.0), whole(W8A8, 90.0)),
    phase_costs=(phases(timing(90.0), timing(95.0)),),
)


def test_of_two_profiles_the_newer_figure_wins_and_nothing_is_lost() -> None:
    found = merged(OLD, NEW)
    assert is_sealed(found)
    medians = {(e.key, e.precision): e.timing.median_us for e in found.entries}
    assert medians == {
        (linear(16), FP32): 30.0,
        (linear(16), W8A8): 11.0,
        (linear(64), W8A8): 50.0,
    }
    assert found.boundaries == NEW.boundaries
    assert [w.timing.median_us for w in found.wholes] == [190.0, 90.0]
    assert found.phase_costs == NEW.phase_costs
    kept = merged(OLD, NEW.model_copy(update={"phase_costs": ()}))
    assert kept.phase_costs == OLD.phase_costs
    # As old as its oldest figure: so it is told when that goes stale.
    assert (found.created, found.overhead) == (OLD.created, NEW.overhead)


def test_flags_of_either_device_run_are_kept() -> None:
    assert merged(OLD, NEW).flags == (Flag.EMULATOR,)
    assert merged(NEW, OLD).flags == (Flag.EMULATOR,)
    both = merged(profile_of(flags=(Flag.LOW_BATTERY,)), NEW)
    assert set(both.flags) == {Flag.LOW_BATTERY, Flag.EMULATOR}


def test_a_network_is_the_same_with_its_layers_in_fp32_left_out(tmp_path: Path) -> None:
    shorter = whole(FP32, 150.0).model_copy(update={"precisions": {}})
    found = merged(OLD, profile_of(created=NEW.created, wholes=(shorter,)))
    assert found.wholes == (shorter,)
    assert read_profile(stored(tmp_path, found)).profile == found


def test_what_was_merged_reads_back(tmp_path: Path) -> None:
    found = merged(OLD, NEW)
    assert read_profile(stored(tmp_path, found), accept=REFUSED_FLAGS).profile == found


def test_a_profile_merged_with_itself_is_itself() -> None:
    assert merged(OLD, OLD) == OLD


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", "tensorrt"),
        ("device", Device(name="other", machine="aarch64", system="Linux 6")),
        ("runtime", Runtime(name="onnxruntime", version="1.32.0")),
        ("threads", 2),
        ("power_mode", "performance"),
    ],
)
def test_profiles_of_different_devices_are_kept_apart(field: str, value: Any) -> None:
    other = profile_of(**{field: value})
    with pytest.raises(InputError, match="EQ-3525") as caught:
        merged(OLD, other)
    assert caught.value.path == field
    assert caught.value.message.startswith(f"two profiles of different {field}: ")
    assert str(caught.value).isprintable()


def test_profiles_of_different_cpus_of_a_device_are_kept_apart() -> None:
    big, little = (Environment(tool="edgeqdm-bench 0.1.0", cpus=cpus) for cpus in ((6, 7), (0, 1)))
    with pytest.raises(InputError, match="EQ-3525") as caught:
        merged(profile_of(environment=big), profile_of(environment=little))
    assert caught.value.path == "cpus"
    newer = profile_of(environment=big, created="2026-08-02T12:00:00Z")
    # A tool that does not tell its CPUs may have used these.
    assert merged(profile_of(), newer).environment == big
