"""A stored profile is what was measured, or it is refused by name of the field."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgeqdm.errors import EdgeqdmError, InputError
from edgeqdm.ir.codec import dump_record, parse_record
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.ir.profile import (
    REFUSED_FLAGS,
    UNSEALED_PROFILE,
    BoundaryCost,
    BoundaryKind,
    Device,
    Environment,
    Flag,
    KitGraph,
    KitHeader,
    KitManifest,
    KitSamples,
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
from edgeqdm.profile.adopt import read_profile

LINEAR = OpKey(kind=LayerKind.LINEAR, input_shape=(1, 16, 16), weight_shape=(16, 16), bias=True)
CONV = OpKey(
    kind=LayerKind.CONV2D,
    input_shape=(1, 8, 4, 4),
    weight_shape=(16, 8, 3, 3),
    bias=False,
    stride=(2, 2),
    padding=(1, 1),
    dilation=(1, 1),
)


def timing(median: float = 12.5, *flags: Flag) -> Timing:
    return Timing(
        median_us=median,
        p10_us=median - 0.5,
        p90_us=median + 1.25,
        ci95_us=(median - 0.25, median + 0.25),
        n=30,
        flags=flags,
    )


def example_profile() -> LatencyProfile:
    entries = [
        LatencyEntry(key=key, precision=precision, provenance="measured", timing=timing(median))
        for key, precision, median in (
            (LINEAR, FP32, 30.75),
            (LINEAR, W8A8, 12.5),
            (CONV, FP32, 120.5),
            (CONV, Precision("w4a8"), 61.25),
        )
    ]
    quantize = BoundaryCost(
        kind=BoundaryKind.QUANTIZE, shape=(1, 16, 16), provenance="measured", timing=timing(3.5)
    )
    whole = WholeGraph(
        model="0" * 64,
        batch=1,
        precisions={"conv_in": FP32, "mid.to_q": W8A8},
        model_bytes=4096,
        provenance="measured",
        timing=timing(180.5, Flag.NOISY),
    )
    phases = PhaseCost(
        model="0" * 64,
        batch=1,
        precisions={"conv_in": FP32, "mid.to_q": W8A8},
        other={"conv_in": W8A8},
        provenance="measured",
        alone=timing(180.5, Flag.NOISY),
        among=timing(187.5),
    )
    return sealed_profile(
        LatencyProfile(
            edgeqdm_version="0.1.0",
            created="2026-11-01T12:00:00Z",
            target="onnxruntime",
            device=Device(
                name="Test device", machine="x86_64", system="Linux 6", features=("avx2",)
            ),
            runtime=Runtime(name="onnxruntime", version="1.31.1"),
            threads=1,
            power_mode="unknown",
            protocol=Protocol(
                clock="thread_cpu",
                rounds=3,
                min_runs=30,
                ci_target=0.01,
                max_seconds=6.0,
                reference_us=(3827.5, 3815.75),
            ),
            overhead=timing(2.5),
            entries=tuple(entries),
            boundaries=(quantize,),
            wholes=(whole,),
            phase_costs=(phases,),
            environment=Environment(tool="edgeqdm-bench 0.1.0", cpus=(0, 1)),
        )
    )


PROFILE = example_profile()
STORED = dump_record(PROFILE)


def edited(*path: str | int, value: Any) -> bytes:
    """The stored profile with one value exchanged, sealed or not."""
    document = json.loads(STORED)
    place = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return json.dumps(document).encode()


def written(old: bytes, new: bytes) -> bytes:
    assert STORED.count(old) >= 1
    return STORED.replace(old, new, 1)


def refusal(data: bytes, tmp_path: Path) -> EdgeqdmError:
    path = tmp_path / "profile.json"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_profile(path)
    assert caught.value.path == str(path)
    assert caught.value.exit_code == 3
    assert len(str(caught.value)) < 1000
    return caught.value


# What a profile may hold.

medians = st.floats(1.0, 1e8)


@st.composite
def timings(draw: st.DrawFn) -> Timing:
    p10, low, median, high, p90 = sorted(draw(st.lists(medians, min_size=5, max_size=5)))
    flags = draw(st.lists(st.sampled_from(Flag), unique=True).map(tuple))
    n = draw(st.integers(1, 3000))
    interval = (low, high)
    return Timing(median_us=median, p10_us=p10, p90_us=p90, ci95_us=interval, n=n, flags=flags)


@st.composite
def keys(draw: st.DrawFn) -> OpKey:
    sizes = st.integers(1, 4096)
    kind = draw(st.sampled_from(LayerKind))
    pair = st.tuples(sizes, sizes)
    window = {"stride": draw(pair), "padding": draw(pair), "dilation": draw(pair)}
    rank = 4 if kind is LayerKind.CONV2D else 3
    return OpKey(
        kind=kind,
        input_shape=draw(st.tuples(*[sizes] * rank)),
        weight_shape=draw(st.tuples(*[sizes] * (4 if rank == 4 else 2))),
        bias=draw(st.booleans()),
        groups=draw(sizes),
        **(window if kind is LayerKind.CONV2D else {}),
    )


@st.composite
def profiles(draw: st.DrawFn) -> LatencyProfile:
    precisions = st.sampled_from([FP32, W8A8, Precision("w4g32a8dyn")])
    pairs = draw(st.lists(st.tuples(keys(), precisions), unique=True, max_size=4))
    entries = [
        LatencyEntry(key=k, precision=p, provenance="measured", timing=draw(timings()))
        for k, p in pairs
    ]
    return PROFILE.model_copy(
        update={"entries": tuple(entries), "overhead": draw(timings()), "wholes": ()}
    )


@given(profiles())
def test_a_profile_reads_back_equal_and_sealed(profile: LatencyProfile) -> None:
    sealed = sealed_profile(profile)
    again = parse_record(dump_record(sealed), LatencyProfile, name="x")
    assert again == sealed
    assert is_sealed(again)
    assert sealed_profile(again) == again


def test_the_seal_is_the_hash_of_the_canonical_form_with_its_own_field_zeroed() -> None:
    blank = STORED.replace(PROFILE.payload_sha256.encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == PROFILE.payload_sha256


def test_a_profile_that_was_never_sealed_is_not_sealed() -> None:
    assert not is_sealed(PROFILE.model_copy(update={"payload_sha256": UNSEALED_PROFILE}))


def test_the_layout_of_the_file_is_no_part_of_the_seal(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(json.loads(STORED), indent=7))
    assert read_profile(path).profile == PROFILE


def test_changing_any_field_breaks_the_seal() -> None:
    for field in LatencyProfile.model_fields:
        if field == "payload_sha256":
            continue
        changed = PROFILE.model_copy(update={field: None})
        assert not is_sealed(changed), field


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (LINEAR, "linear 1x16x16 * 16x16"),
        (LINEAR.model_copy(update={"bias": False}), "linear 1x16x16 * 16x16 no bias"),
        (CONV, "conv2d 1x8x4x4 * 16x8x3x3 s2 p1 no bias"),
        (
            CONV.model_copy(update={"groups": 4, "padding": (0, 0), "bias": True}),
            "conv2d 1x8x4x4 * 16x8x3x3 s2 g4",
        ),
        (
            CONV.model_copy(update={"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}),
            "conv2d 1x8x4x4 * 16x8x3x3 s2x1 p0x1 d1x2 no bias",
        ),
    ],
)
def test_an_operation_is_shown_on_one_line(key: OpKey, text: str) -> None:
    assert str(key) == text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_shape", (1, 8, 4, 5)),
        ("weight_shape", (16, 8, 3, 1)),
        ("bias", True),
        ("stride", (2, 1)),
        ("padding", (1, 0)),
        ("dilation", (1, 2)),
        ("groups", 2),
    ],
)
def test_operations_that_differ_are_shown_differently_and_are_two_entries(
    field: str, value: Any
) -> None:
    other = CONV.model_copy(update={field: value})
    assert str(other) != str(CONV)
    again = [e.model_copy(update={"key": other}) for e in PROFILE.entries if e.key == CONV]
    fields = dict(PROFILE) | {"entries": (*PROFILE.entries, *again)}
    assert len(LatencyProfile(**fields).entries) == 6


def test_figures_that_nothing_may_be_decided_on_are_not_those_that_are_merely_rough() -> None:
    rough = {Flag.NOISY, Flag.CI_NOT_REACHED, Flag.UNSTABLE}
    assert set(Flag) == REFUSED_FLAGS | rough
    assert not REFUSED_FLAGS & rough


# What is refused: the rows of the fault table that are no other module's.


def test_every_flipped_bit_of_a_stored_profile_is_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    path = tmp_path / "profile.json"
    places = draw.sample(range(8 * len(STORED)), 2000)
    for place in places:
        data = bytearray(STORED)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(InputError):
            read_profile(path)


def test_a_flipped_bit_may_change_how_a_number_is_written_but_never_its_value() -> None:
    """1e-05 may become 1E-05, and a 17th digit another that reads as the same number."""
    odd = Timing(median_us=0.1 + 0.2, p10_us=1e-05, p90_us=3.555, ci95_us=(0.1, 0.5), n=3)
    sealed = sealed_profile(PROFILE.model_copy(update={"overhead": odd}))
    stored = dump_record(sealed)
    unchanged = 0
    for place in range(8 * stored.index(b'"overhead"'), 8 * stored.index(b'"payload_sha256"')):
        data = bytearray(stored)
        data[place // 8] ^= 1 << place % 8
        try:
            found = parse_record(bytes(data), LatencyProfile, name="x")
        except InputError:
            continue
        assert found == sealed or not is_sealed(found)
        unchanged += found == sealed
    assert unchanged > 0


@pytest.mark.parametrize("data", [b"", b" \n"])
def test_an_empty_profile_is_called_empty(data: bytes, tmp_path: Path) -> None:
    assert "empty" in refusal(data, tmp_path).message


def test_no_prefix_of_a_profile_is_accepted_and_the_byte_is_named(tmp_path: Path) -> None:
    whole = STORED.rstrip()
    for percent in range(1, 100):
        assert ", byte " in refusal(whole[: len(whole) * percent // 100], tmp_path).message


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_a_latency_that_is_not_finite_is_named_by_its_entry(literal: bytes, tmp_path: Path) -> None:
    message = refusal(written(b'"median_us": 30.75', b'"median_us": ' + literal), tmp_path).message
    assert "entries[0].timing.median_us" in message
    assert "finite" in message


@pytest.mark.parametrize("value", [-1, 0, -0.0, -1e-300])
@pytest.mark.parametrize("field", ["median_us", "p10_us", "p90_us"])
def test_a_profile_with_a_latency_of_nothing_or_less_names_the_entry(
    field: str, value: float, tmp_path: Path
) -> None:
    message = refusal(edited("entries", 2, "timing", field, value=value), tmp_path).message
    assert f"entries[2].timing.{field}" in message
    assert "greater than 0" in message


def test_a_latency_above_1000_seconds_is_refused(tmp_path: Path) -> None:
    data = edited("entries", 1, "timing", "p90_us", value=1.1e9)
    assert "entries[1].timing.p90_us" in refusal(data, tmp_path).message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("entries", 0, "timing", "median_us"), "30.75"),
        (("entries", 0, "timing", "median_us"), True),
        (("entries", 0, "timing", "n"), 30.5),
        (("entries", 0, "timing", "n"), 0),
        (("entries", 0, "key", "bias"), 1),
        (("entries", 0, "key", "groups"), 0),
        (("entries", 0, "precision"), "w3a3"),
        (("entries", 0, "provenance"), "guessed"),
        (("entries", 0, "timing", "flags"), ["tired"]),
        (("boundaries", 0, "kind"), "magic"),
        (("protocol", "clock"), "sundial"),
        (("protocol", "ci_target"), 1),
        (("threads",), 0),
        (("threads",), "1"),
    ],
)
def test_a_wrong_value_is_named_by_its_field(
    path: tuple[str | int, ...], value: Any, tmp_path: Path
) -> None:
    message = refusal(edited(*path, value=value), tmp_path).message
    name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    assert message.startswith(name.removeprefix("."))


def test_equal_keys_are_refused(tmp_path: Path) -> None:
    twice = written(b'"median_us": 30.75', b'"median_us": 1, "median_us": 30.75')
    assert refusal(twice, tmp_path).message == "entries[0].timing.median_us: duplicate key"


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000])
def test_deep_nesting_is_refused(data: bytes, tmp_path: Path) -> None:
    assert "nesting" in refusal(data, tmp_path).message


def test_an_integer_of_5000_digits_is_refused(tmp_path: Path) -> None:
    data = written(b'"threads": 1', b'"threads": ' + b"9" * 5000)
    assert refusal(data, tmp_path).message == "threads: an integer of 5000 digits"


def test_a_sparse_gigabyte_and_megabytes_of_lists_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(InputError, match="larger than 16 MiB"):
        read_profile(path)
    assert "values" in refusal(b"[" + b"[]," * (5 * 10**6) + b"[]]", tmp_path).message


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xef\xbb\xbf" + STORED, id="byte order mark"),
        pytest.param(STORED.decode().encode("utf-16"), id="utf-16"),
        pytest.param(STORED.replace(b"Test device", b"Test \xffdevice"), id="invalid"),
        pytest.param(STORED.replace(b"Test device", b"\xed\xa0\x80"), id="encoded surrogate"),
    ],
)
def test_what_is_not_plain_utf8_is_refused(data: bytes, tmp_path: Path) -> None:
    assert "UTF-8" in refusal(data, tmp_path).message


def test_a_lone_surrogate_escape_is_refused(tmp_path: Path) -> None:
    refusal(written(b'"Test device"', b'"\\ud800"'), tmp_path)


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_schema_asks_for_an_upgrade(version: int, tmp_path: Path) -> None:
    problem = refusal(edited("schema_version", value=version), tmp_path)
    assert f'made by a newer edgeqdm ("0.1.0"): schema_version {version}' in problem.message
    assert problem.hint == "upgrade edgeqdm"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        (("entires",), "entries"),
        (("entries", 0, "precison"), "precision"),
        (("entries", 0, "timing", "medain_us"), "median_us"),
        (("device", "machnie"), "machine"),
        (("wholes", 0, "precisons"), "precisions"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(
    path: tuple[str | int, ...], hint: str, tmp_path: Path
) -> None:
    problem = refusal(edited(*path, value=1), tmp_path)
    assert f'unknown key "{path[-1]}"' in problem.message
    assert problem.hint == f'did you mean "{hint}"?'


def doubled(field: str) -> bytes:
    """The profile with its first item of a list once more, at another time."""
    items = json.loads(STORED)[field]
    named = "among" if field == "phase_costs" else "timing"
    again = {**items[0], named: PROFILE.overhead.model_dump(mode="json")}
    return edited(field, value=[*items, again])


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("entries", ("linear 1x16x16 * 16x16 at fp32",)),
        ("boundaries", ("quantize", "1x16x16")),
        ("wholes", ("wholes[1]",)),
        ("phase_costs", ("phase_costs[1]",)),
    ],
)
def test_what_has_two_latencies_is_refused_and_named(field: str, told: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        parse_record(doubled(field), LatencyProfile, name="x")
    assert "more than one" in caught.value.message
    assert all(part in caught.value.message for part in told)


def test_a_layer_in_fp32_and_one_left_out_are_the_same_network() -> None:
    (first,) = json.loads(STORED)["wholes"]
    again = {**first, "precisions": {"mid.to_q": "w8a8"}}
    with pytest.raises(InputError, match=r"wholes\[1\] has more than one entry"):
        parse_record(edited("wholes", value=[first, again]), LatencyProfile, name="x")
    for other in ({"model": "1" * 64}, {"batch": 2}, {"precisions": {"mid.to_q": "w4a8"}}):
        data = edited("wholes", value=[first, first | other])
        assert len(parse_record(data, LatencyProfile, name="x").wholes) == 2


@pytest.mark.parametrize("absent", [("phase_costs", "environment"), ("environment",)])
def test_a_profile_from_before_a_field_is_as_it_was_sealed(absent: tuple[str, ...]) -> None:
    document = json.loads(STORED)
    for field in absent:
        del document[field]
    document["payload_sha256"] = "0" * 64
    text = json.dumps(document, sort_keys=True, indent=1, separators=(",", ": ")) + "\n"
    document["payload_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    found = parse_record(json.dumps(document).encode(), LatencyProfile, name="x")
    assert found.environment is None
    assert is_sealed(found)


def test_phases_beside_others_are_other_phases() -> None:
    (first,) = json.loads(STORED)["phase_costs"]
    again = {**first, "other": {"conv_in": "w8a8", "mid.to_q": "fp32"}}
    with pytest.raises(InputError, match=r"phase_costs\[1\] has more than one entry"):
        parse_record(edited("phase_costs", value=[first, again]), LatencyProfile, name="x")
    for other in ({"model": "1" * 64}, {"batch": 2}, {"precisions": {}}, {"other": {}}):
        data = edited("phase_costs", value=[first, first | other])
        assert len(parse_record(data, LatencyProfile, name="x").phase_costs) == 2


def test_one_operation_at_two_precisions_is_two_entries() -> None:
    assert len({(e.key, e.precision) for e in PROFILE.entries}) == 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"median_us": 29.0}, "p10_us, median_us and p90_us must ascend, found 30.25, 29, 32"),
        ({"p90_us": 30.5}, "p10_us, median_us and p90_us must ascend"),
        ({"p10_us": 31.0}, "p10_us, median_us and p90_us must ascend"),
        ({"ci95_us": [30.8, 31.0]}, "median_us 30.75 lies outside ci95_us 30.8 to 31"),
        ({"ci95_us": [30.0, 30.7]}, "median_us 30.75 lies outside ci95_us 30 to 30.7"),
        ({"ci95_us": [31.0, 30.5]}, "median_us 30.75 lies outside ci95_us 31 to 30.5"),
    ],
)
def test_figures_that_contradict_each_other_are_refused(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    stored = json.loads(STORED)["entries"][0]["timing"]
    message = refusal(edited("entries", 0, "timing", value=stored | changes), tmp_path).message
    assert message.startswith("entries[0].timing: ")
    assert told in message


@pytest.mark.parametrize(
    "name", ["../x", '*/ system("")', "\u202egpj", "x" * 10_000, "", ".hidden", "a b", "a\n"]
)
def test_hostile_layer_names_are_refused(name: str, tmp_path: Path) -> None:
    message = refusal(edited("wholes", 0, "precisions", value={name: "fp32"}), tmp_path).message
    assert message.startswith("wholes[0].precisions")
    assert message.isprintable()


@pytest.mark.parametrize("text", ["", "x" * 201, "tab\there", "\u202e", "caf\u00e9"])
@pytest.mark.parametrize("path", [("device", "name"), ("runtime", "version"), ("power_mode",)])
def test_a_text_is_short_printable_ascii(path: tuple[str, ...], text: str, tmp_path: Path) -> None:
    assert refusal(edited(*path, value=text), tmp_path).message.startswith(".".join(path))


NO_TIMES = ["yesterday", "2026-08-01T12:00:00", "2026-13-01T00:00:00Z", "2026-08-01", "", "1"]


@pytest.mark.parametrize("created", NO_TIMES)
def test_a_time_that_is_none_or_has_no_zone_is_named_by_its_field(
    created: str, tmp_path: Path
) -> None:
    message = refusal(edited("created", value=created), tmp_path).message
    assert message.startswith("created: ")
    assert "(and " not in message
    if created:
        assert repr(created) in message
        assert "write it as 2026-11-01T12:00:00Z" in message


@pytest.mark.parametrize("created", ["2026-11-01T12:00:00Z", "2026-11-01T12:00:00.5+05:30"])
def test_a_time_in_any_zone_is_kept_as_it_was_written(created: str) -> None:
    assert LatencyProfile(**(dict(PROFILE) | {"created": created})).created == created


@pytest.mark.parametrize("name", ["1", "00001", "../0", "0000\n", "abcd"])
def test_a_graph_of_a_kit_is_named_by_four_digits(name: str) -> None:
    with pytest.raises(ValidationError):
        KitGraph(name=name, role="overhead", files={}, inputs=())


@pytest.mark.parametrize("us", [(), (0.0,), (1.0, -1.0), (2e9,)])
def test_samples_of_a_kit_are_at_least_one_and_plausible(us: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        KitSamples(graph="0000", round=0, us=us)


def graph(name: str, role: Any, **fields: Any) -> KitGraph:
    return KitGraph(name=name, role=role, files={}, inputs=(), **fields)


KIT_GRAPHS = (
    graph("0000", "reference"),
    graph("0001", "overhead"),
    graph("0002", "entry", key=LINEAR, precision=FP32),
    graph("0003", "boundary", boundary=BoundaryKind.QUANTIZE, shape=(1, 4)),
    graph("0004", "whole", precisions={"conv_in": W8A8}),
)


def manifest_of(graphs: tuple[KitGraph, ...]) -> KitManifest:
    return KitManifest(
        edgeqdm_version="0.1.0",
        target="onnxruntime",
        model="0" * 64,
        model_name="tiny",
        batch=1,
        graphs=graphs,
    )


@pytest.mark.parametrize(
    ("graphs", "told"),
    [
        (KIT_GRAPHS[1:], "no reference graph"),
        ((KIT_GRAPHS[0], *KIT_GRAPHS[2:]), "no overhead graph"),
        ((), "no reference graph"),
        *(
            ((*KIT_GRAPHS, each.model_copy(update={"name": "0005"})), "0005 is there twice")
            for each in KIT_GRAPHS
        ),
        ((*KIT_GRAPHS, graph("0004", "whole")), "0004 is there twice"),
    ],
)
def test_a_kit_that_no_profile_can_be_made_of_is_refused_with_what_to_do(
    graphs: tuple[KitGraph, ...], told: str
) -> None:
    sound = manifest_of(KIT_GRAPHS)
    damaged = dump_record(sound.model_copy(update={"graphs": graphs}))
    with pytest.raises(InputError, match="make the kit again") as caught:
        parse_record(damaged, KitManifest, name="kit.json")
    assert caught.value.message.startswith("graphs: ")
    assert told in caught.value.message
    assert parse_record(dump_record(sound), KitManifest, name="kit.json") == sound


@pytest.mark.parametrize(
    "changes", [{"ci_target": 0.0}, {"seconds": 0.0}, {"threads": 0}, {"created": "now"}]
)
def test_a_header_without_sense_is_refused(changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "kit_sha256": "0" * 64,
        "created": "2026-11-01T12:00:00Z",
        "device": PROFILE.device,
        "runtime": PROFILE.runtime,
        "threads": 1,
        "power_mode": "unknown",
        "clock": "wall",
        "ci_target": 0.01,
        "seconds": 1.0,
        "max_seconds": 6.0,
    }
    KitHeader(**fields)
    with pytest.raises(ValidationError):
        KitHeader(**(fields | changes))


ENVIRONMENT = {
    "tool": "edgeqdm-bench 0.1.0",
    "cpus": [4, 7],
    "max_khz": [2900000, 2400000],
    "governors": ["performance"],
}


def test_a_profile_says_on_which_cpus_it_was_measured_where_the_tool_told() -> None:
    environment = parse_record(json.dumps(ENVIRONMENT).encode(), Environment, name="x")
    told = sealed_profile(PROFILE.model_copy(update={"environment": environment}))
    assert parse_record(dump_record(told), LatencyProfile, name="x") == told


@pytest.mark.parametrize(
    "changes",
    [
        {"cpus": []},
        {"cpus": [-1]},
        {"max_khz": [0]},
        {"governors": ["two\nlines"]},
        {"tool": ""},
        {"celsius": 40.0},
    ],
)
def test_an_environment_without_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        parse_record(json.dumps(ENVIRONMENT | changes).encode(), Environment, name="x")
