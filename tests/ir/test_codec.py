from __future__ import annotations

import hashlib
import json
import os
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeqdm.errors import EdgeqdmError, InputError, NumericalError, OutputError, VerifyError
from edgeqdm.ir.codec import (
    MAX_BYTES,
    describe,
    digest,
    dump_record,
    parse_json,
    parse_record,
    read_record,
    sha256_file,
)
from edgeqdm.ir.package import Manifest
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP32, W8A8, Precision
from edgeqdm.ir.schedule import ClipStep, CorrectedSchedule, CorrectionKey, SamplerProgram

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(codec="utf-8"), max_size=8)


def example_plan() -> DeploymentPlan:
    layers = (
        LayerAssignment(layer="conv_in", precision=FP32, reason="first layer"),
        LayerAssignment(layer="mid.conv1", precision=W8A8, reason="default"),
    )
    phases = (Phase(start=0, stop=3, layers=layers), Phase(start=3, stop=8, layers=layers))
    return DeploymentPlan(target="onnxruntime", model="0" * 64, n_steps=8, phases=phases)


PLAN = dump_record(example_plan())


def edited(old: bytes, new: bytes) -> bytes:
    assert PLAN.count(old) >= 1
    return PLAN.replace(old, new, 1)


def refusal(data: bytes, record_type: type[Any] = DeploymentPlan) -> EdgeqdmError:
    with pytest.raises(InputError) as caught:
        parse_record(data, record_type, name="plan.json")
    assert caught.value.path == "plan.json"
    assert caught.value.code.startswith("EQ-30")
    assert len(str(caught.value)) < 1000
    return caught.value


@st.composite
def plans(draw: st.DrawFn) -> DeploymentPlan:
    lengths = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=4))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assignments = st.builds(
        LayerAssignment,
        layer=text,
        precision=st.sampled_from([FP32, W8A8, Precision("w4g64a8dyn")]),
        reason=text,
    )
    phases = tuple(
        Phase(start=s, stop=s + n, layers=tuple(draw(st.lists(assignments, max_size=3))))
        for s, n in zip(starts, lengths, strict=True)
    )
    return DeploymentPlan(target=draw(text), model=draw(text), n_steps=sum(lengths), phases=phases)


@st.composite
def programs(draw: st.DrawFn) -> SamplerProgram:
    n_steps = draw(st.integers(1, 4))

    def column() -> tuple[float, ...]:
        return tuple(draw(st.lists(finite, min_size=n_steps, max_size=n_steps)))

    def table() -> tuple[tuple[float, ...], ...]:
        return tuple(zip(*(column() for _ in range(draw(st.integers(1, 3)))), strict=True))

    positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
    clip = ClipStep(
        limit=draw(positive), sample_weight=column(), output_weight=column(), weight=column()
    )
    setting = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | finite | text
    return SamplerProgram(
        sampler=draw(text),
        settings=draw(st.dictionaries(text, setting, max_size=4)),
        prediction_type=draw(text),
        timesteps=column(),
        integer_timesteps=draw(st.booleans()),
        initial_sigma=draw(positive),
        input_scale=column(),
        sample_weights=table(),
        output_weights=table(),
        noise_std=column(),
        clip=draw(st.none() | st.just(clip)),
    )


@st.composite
def corrections(draw: st.DrawFn) -> CorrectedSchedule:
    rows = st.lists(st.tuples(finite, finite), min_size=1, max_size=3).map(tuple)
    return CorrectedSchedule(
        key=CorrectionKey(model=draw(text), sampler="", guidance=draw(finite), precision=""),
        gain=draw(st.lists(finite, max_size=3).map(tuple)),
        bias=draw(rows),
        noise_std=draw(rows),
        clamped=draw(st.lists(st.booleans(), max_size=3).map(tuple)),
        input_weight=draw(st.none() | st.lists(finite, max_size=3).map(tuple)),
    )


@given(plans() | programs() | corrections())
def test_what_is_written_reads_back_equal(
    record: DeploymentPlan | SamplerProgram | CorrectedSchedule,
) -> None:
    data = dump_record(record)
    again = parse_record(data, type(record), name="x")
    assert again == record
    # The bytes as well: == does not tell 1 from 1.0 or True, nor 0.0 from -0.0.
    assert dump_record(again) == data
    assert digest(again) == digest(record)


def test_the_form_on_disk_is_canonical() -> None:
    phase = Phase(start=0, stop=1, layers=())
    record = DeploymentPlan(target="é", model="m", n_steps=1, phases=(phase,))
    assert dump_record(record) == (
        b'{\n "model": "m",\n "n_steps": 1,\n "phases": [\n  {\n   "layers": [],\n'
        b'   "start": 0,\n   "stop": 1\n  }\n ],\n "prediction": null,\n "schema_version": 1,\n'
        b' "target": "\\u00e9"\n}\n'
    )


def test_the_digest_is_the_hash_of_the_compact_form() -> None:
    phase = Phase(start=0, stop=1, layers=())
    compact = b'{"layers":[],"start":0,"stop":1}'
    assert digest(phase) == hashlib.sha256(compact).hexdigest()


def test_a_number_that_is_not_finite_is_never_written() -> None:
    broken = ClipStep.model_construct(limit=float("nan"))
    with pytest.raises(NumericalError, match="ClipStep"):
        dump_record(broken)


def test_read_record_reads_what_dump_record_wrote(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(PLAN)
    assert read_record(path, DeploymentPlan) == example_plan()
    assert sha256_file(path) == hashlib.sha256(PLAN).hexdigest()


@pytest.mark.parametrize("data", [b"", b" \n"])
def test_an_empty_file_is_called_empty(data: bytes) -> None:
    assert "empty" in refusal(data).message


def test_no_prefix_of_a_file_is_accepted_and_the_byte_is_named() -> None:
    whole = PLAN.rstrip()
    for percent in range(1, 100):
        message = refusal(whole[: len(whole) * percent // 100]).message
        assert "not valid JSON" in message
        assert ", byte " in message


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"])
def test_a_number_that_is_not_finite_is_named_by_its_field(literal: bytes) -> None:
    message = refusal(edited(b'"stop": 3', b'"stop": ' + literal)).message
    assert "phases[0].stop" in message
    assert "finite" in message


@pytest.mark.parametrize(
    ("literal", "found"), [(b"-1", "-1"), (b'"1"', '"1"'), (b"true", "true"), (b"null", "null")]
)
def test_a_wrong_value_is_named_by_field_and_shown(literal: bytes, found: str) -> None:
    message = refusal(edited(b'"start": 3', b'"start": ' + literal)).message
    assert message.startswith("phases[1].start: ")
    assert message.endswith(f"found {found}")


def test_an_unknown_precision_is_answered_with_examples() -> None:
    message = refusal(edited(b'"w8a8"', b'"w3a3"')).message
    assert "phases[0].layers[1].precision" in message
    assert "'w3a3' is no precision; examples: w8a8, w4g64a8, w8a8dyn, w4g128, fp32" in message


def test_a_missing_field_is_named() -> None:
    assert "n_steps: Field required" in refusal(edited(b'"n_steps": 8,', b"")).message


def test_a_check_across_fields_says_what_it_found() -> None:
    message = refusal(edited(b'"n_steps": 8', b'"n_steps": 9')).message
    assert "phases end at step 8, the sampler has 9" in message


@pytest.mark.parametrize("document", [b"[]", b"3", b'"x"', b"null"])
def test_a_document_that_is_not_an_object_is_refused(document: bytes) -> None:
    assert "the document" in refusal(document).message


def test_equal_keys_are_refused_although_both_parsers_take_the_last() -> None:
    message = refusal(edited(b'"start": 0', b'"start": 0, "start": 0')).message
    assert message == "phases[0].start: duplicate key"


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_refused_before_the_parser_recurses(opening: bytes) -> None:
    assert "nesting" in refusal(opening * 100_000).message


def test_brackets_inside_text_are_not_nesting() -> None:
    data = json.dumps({"a": "[" * 1000 + '\\"' + "{" * 1000}).encode()
    assert parse_json(data, name="x") == json.loads(data)


def test_an_endless_string_of_escaped_quotes_takes_linear_time() -> None:
    assert "not valid JSON" in refusal(b'"' + b'\\"' * 500_000).message


@pytest.mark.parametrize("digits", [20, 5000])
def test_a_huge_integer_is_refused(digits: int) -> None:
    message = refusal(edited(b'"stop": 3', b'"stop": ' + b"9" * digits)).message
    assert message.startswith("phases[0].stop: ")


@pytest.mark.parametrize("edge", [-(2**63), 2**63 - 1])
def test_every_64_bit_integer_is_taken(edge: int) -> None:
    assert parse_json(str(edge).encode(), name="x") == edge


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b'{"target": "\xff"}', id="invalid"),
        pytest.param(b"\xef\xbb\xbf" + PLAN, id="byte order mark"),
        pytest.param(PLAN.decode().encode("utf-16"), id="utf-16"),
        pytest.param(PLAN.decode().encode("utf-32"), id="utf-32"),
        pytest.param(b'{"target": "\xed\xa0\x80"}', id="encoded surrogate"),
    ],
)
def test_what_is_not_plain_utf8_is_refused(data: bytes) -> None:
    assert "UTF-8" in refusal(data).message


def test_a_lone_surrogate_escape_is_refused() -> None:
    refusal(edited(b'"onnxruntime"', b'"\\ud800"'))


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_schema_asks_for_an_upgrade(version: int) -> None:
    problem = refusal(edited(b'"schema_version": 1', f'"schema_version": {version}'.encode()))
    assert "made by a newer edgeqdm" in problem.message
    assert problem.hint == "upgrade edgeqdm"


def test_a_newer_schema_is_told_before_its_unknown_fields_and_names_its_maker() -> None:
    data = b'{"schema_version": 2, "edgeqdm_version": "9.1.0", "novel": 1}'
    assert 'newer edgeqdm ("9.1.0")' in refusal(data, Manifest).message


def test_an_older_schema_is_refused() -> None:
    assert "older" in refusal(edited(b'"schema_version": 1', b'"schema_version": 0')).message


def test_an_unknown_key_is_answered_with_the_nearest_known_one() -> None:
    problem = refusal(edited(b'"precision"', b'"precison"'))
    assert 'unknown key "precison" in phases[0].layers[0]' in problem.message
    assert problem.hint == 'did you mean "precision"?'


def test_an_unknown_key_like_nothing_is_answered_with_all_known_ones() -> None:
    problem = refusal(edited(b'"n_steps": 8', b'"n_steps": 8, "zzz": 1'))
    assert problem.hint == (
        "known keys: model, n_steps, phases, prediction, schema_version, target"
    )


def test_an_unknown_key_below_a_free_key_is_found() -> None:
    data = b'{"files": {"a.onnx": {"sha265": ""}}}'
    assert refusal(data, Manifest).hint == 'did you mean "sha256"?'


@pytest.mark.parametrize("key", ['\\u202ex"', "a\\nb", "x" * 100_000, "*/ system()"])
def test_hostile_keys_are_shown_escaped_and_short(key: str) -> None:
    data = b'{"' + key.replace('"', '\\"').encode() + b'": 1}'
    assert str(refusal(data)).isprintable()


def test_thousands_of_wrong_fields_are_counted_not_listed() -> None:
    keys = ",".join(f'"k{index}":1' for index in range(2000))
    message = refusal(f"{{{keys}}}".encode()).message
    assert message == "2004 fields do not fit a DeploymentPlan"


def test_a_sparse_gigabyte_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    assert peak_bytes_of_refusal(path, "larger than 16 MiB") < 2**20


def test_megabytes_of_empty_lists_are_refused_before_they_are_built(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"[" + b"[]," * (5 * 10**6) + b"[]]")
    assert path.stat().st_size < MAX_BYTES
    # The text twice (bytes and str) and little else; built, it would be 324 MB.
    assert peak_bytes_of_refusal(path, "values") < 50 * 2**20


def peak_bytes_of_refusal(path: Path, message: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            read_record(path, DeploymentPlan)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [Path.mkdir, make_fifo, make_socket, make_loop, lambda _: None])
def test_what_is_not_a_file_is_refused_without_waiting(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is limited to about 100 bytes
    path = Path("p.json")
    make(path)
    with pytest.raises(InputError) as caught:
        read_record(path, DeploymentPlan)
    assert caught.value.path == "p.json"


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "nul\0byte", "x" * 300])
def test_devices_and_impossible_names_are_refused(path: str) -> None:
    with pytest.raises(InputError, match=r"EQ-300[12]"):
        read_record(Path(path), DeploymentPlan)


@pytest.mark.parametrize(("error", "digit"), [(InputError, 3), (OutputError, 7), (VerifyError, 8)])
def test_the_code_starts_with_the_exit_code_of_the_class_asked_for(
    error: type[EdgeqdmError], digit: int, tmp_path: Path
) -> None:
    for read in (read_record, lambda path, _, error: sha256_file(path, error=error)):
        with pytest.raises(error) as caught:
            read(tmp_path, DeploymentPlan, error=error)
        assert caught.value.code == f"EQ-{digit}002"
    with pytest.raises(error) as caught:
        parse_record(b"{", DeploymentPlan, name="x", error=error)
    assert caught.value.code == f"EQ-{digit}006"


@given(st.binary(max_size=64) | st.text(max_size=64).map(lambda t: t.encode(errors="replace")))
def test_arbitrary_bytes_raise_input_errors_only(data: bytes) -> None:
    with pytest.raises(InputError):
        parse_record(data, DeploymentPlan, name="x")


@given(st.integers(0, len(PLAN) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_read_as_a_valid_plan(position: int, bit: int) -> None:
    data = bytearray(PLAN)
    data[position] ^= 1 << bit
    try:
        record = parse_record(bytes(data), DeploymentPlan, name="x")
    except InputError:
        return
    assert isinstance(record, DeploymentPlan)


@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists))
def test_describe_is_short_printable_ascii(value: object) -> None:
    shown = describe(value)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= 80
