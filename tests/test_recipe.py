"""Recipes: what is taken, what is refused and where, and what they make by default."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeqdm import recipe as recipes
from edgeqdm.errors import InputError
from edgeqdm.ir.precision import Precision
from edgeqdm.ir.profile import Flag
from edgeqdm.profile.requests import DEFAULT_PRECISIONS
from edgeqdm.recipe import (
    MAX_BYTES,
    MAX_LEVELS,
    Recipe,
    SamplerPart,
    SearchPart,
    parse_recipe,
    read_recipe,
    recipe_text,
    settings_of,
)

LEAST = "model: m\nout: o\n"
WRITTEN = recipe_text("reference:unet-fmnist").encode()


def parsed(text: str, *overrides: str) -> Recipe:
    return parse_recipe(text, name="recipe.yaml", overrides=overrides)


def refusal(text: str, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        parsed(text, *overrides)
    assert caught.value.hint
    assert caught.value.exit_code == 3
    return caught.value


def written(folder: Path, **texts: str) -> Path:
    """Files of these names; the first is returned."""
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(texts))}.yaml"


def test_model_and_folder_are_enough() -> None:
    assert parsed(LEAST) == Recipe(model="m", out="o")


def test_every_key_is_taken() -> None:
    found = parsed(
        LEAST + "target: onnxruntime\nsplit_skips: true\n"
        "sampler: {scheduler: ddim, steps: 4, eta: 1, guidance: 2.5}\n"
        "profile:\n  source: phone.json\n  threads: 2\n  seconds: 5e-1\n  wholes: 0\n"
        "  accept_flags:\n  - throttled\n"
        "search: {trials: 3, latency: 0.6x, max_bytes: 9, phases: 2, precisions: [w8a8, w4a8],\n"
        "  tie: block, policies: true, sampler: GPSampler, images: 2, samples: 1, seed: 7,\n"
        "  storage: 'postgresql://me@host/db', study: mine}\n"
        "emit: {trial: 3, correct: false}\n"
    )
    assert found.sampler == SamplerPart(scheduler="ddim", steps=4, eta=1.0, guidance=2.5)
    assert found.profile.accept_flags == (Flag.THROTTLED,)
    assert (found.profile.seconds, found.profile.source) == (0.5, "phone.json")
    assert found.search.precisions == (Precision("w8a8"), Precision("w4a8"))
    assert (found.search.latency, found.search.study) == ("0.6x", "mine")
    assert (found.emit.trial, found.emit.correct) == (3, False)
    assert (found.split_skips, found.search.storage) == (True, "postgresql://me@host/db")


def test_scalars_are_those_of_yaml_1_2() -> None:
    """`no` and `1:30` are text, a leading zero is not octal, 1e2 is a number."""
    found = parsed(LEAST + "search: {study: no, trials: 010, latency: 1e2, storage: 1:30}\n")
    assert (found.search.study, found.search.storage) == ("no", "1:30")
    assert (found.search.trials, found.search.latency) == (10, 100.0)
    assert parsed("model: 'null'\nout: \"1.5\"\n") == Recipe(model="null", out="1.5")


@pytest.mark.parametrize(
    ("given_as", "wanted"), [("null", None), ("1.5", 1.5), ("2", 2.0), ("'1.5'", 1.5), ("0.5x", 2)]
)
def test_a_latency_is_in_ms_or_a_share_of_the_float_models(
    given_as: str, wanted: float | None
) -> None:
    found = parsed(f"{LEAST}search: {{latency: {given_as}}}\n")
    assert settings_of(found, float_ms=lambda: 4.0).latency_ms == wanted


def test_settings_of_a_search_are_those_of_its_verb() -> None:
    found = settings_of(Recipe(model="m", out="o"), float_ms=lambda: 1.0)
    assert found.images == (4, 16)
    assert found.precisions == DEFAULT_PRECISIONS
    few = Recipe(model="m", out="o", search=SearchPart(images=3))
    assert settings_of(few, float_ms=lambda: 1.0).images == (3,)


@pytest.mark.parametrize(
    ("text", "code", "line", "told"),
    [
        ("", 2, 1, "empty file"),
        ("# nothing\n", 2, 1, "empty file"),
        ("- model\n", 2, 1, "not keys with values"),
        (LEAST + "search:\n\ttrials: 3\n", 2, 4, "not YAML: found character '\\t'"),
        (LEAST + "search: {trials: 3\n", 2, 4, "not YAML: "),
        (LEAST + "---\nmodel: x\n", 2, 3, "not YAML: but found another document"),
        (LEAST + "study: \x07\n", 2, 3, "not YAML: special characters are not allowed"),
        (LEAST + 'target: "\\UFFFFFFFF"\n', 2, 3, "not YAML: "),
        (LEAST + "[a]: 3\n", 2, 3, "a key has to be a name"),
        (LEAST + "target: &a x\n", 3, 3, "anchors and aliases are not taken"),
        (LEAST + "search: {study: *a}\n", 3, 3, "anchors and aliases are not taken"),
        (LEAST + "target: !!python/name:os.system x\n", 3, 3, "the tag "),
        (LEAST + "target: !!str 5\n", 3, 3, "the tag "),
        (LEAST + "search:\n  precisions: " + "[" * 5000, 3, 4, "nested deeper than 8 levels"),
        (f"{LEAST}search: {{precisions: [{'w8,' * 5000}]}}\n", 3, 3, "nested deeper than 8"),
        (LEAST + "target: x\nmodel: n\n", 4, 4, "model: given before, at recipe.yaml:1"),
        (LEAST + "search:\n  seed: 1\n  seed: 1\n", 4, 5, "search.seed: given before, at"),
        (LEAST + "serch: {trials: 3}\n", 5, 3, 'unknown key "serch"'),
        (LEAST + "search:\n  trails: 3\n", 5, 4, 'unknown key "trails" in search'),
        (LEAST + "<<: {target: x}\n", 5, 3, 'unknown key "<<"'),
        ("out: o\n", 6, 1, "model: missing"),
        (LEAST + "search: 3\n", 6, 3, "search: no keys stand below it"),
        (LEAST + "search:\n", 6, 3, "search: no keys stand below it"),
        (LEAST + "target: {a: b}\n", 6, 3, "target: a value is wanted, not keys"),
        (LEAST + "search: {precisions: [[w8]]}\n", 6, 3, "search.precisions: a list holds plain"),
        (LEAST + "search:\n  trials: many\n", 6, 4, "search.trials: Input should be a valid int"),
        (LEAST + "search:\n  trials: 2.5\n", 6, 4, "search.trials: "),
        (LEAST + "search:\n  trials: true\n", 6, 4, "search.trials: "),
        (LEAST + "search:\n  trials: 0\n", 6, 4, "search.trials: Input should be greater than or"),
        (LEAST + "split_skips: yes\n", 6, 3, "split_skips: Input should be a valid boolean"),
        (LEAST + "sampler: {eta: 1.5}\n", 6, 3, "sampler.eta: Input should be less than"),
        (LEAST + "sampler: {eta: .nan}\n", 6, 3, "sampler.eta: numbers must be finite, found .nan"),
        (LEAST + "sampler: {eta: 1e999}\n", 6, 3, "sampler.eta: numbers must be finite"),
        (f"{LEAST}search: {{seed: {'9' * 5000}}}\n", 6, 3, "search.seed: a number of 5000 char"),
        (LEAST + "profile: {accept_flags: [hot]}\n", 6, 3, "profile.accept_flags: "),
        (LEAST + "search:\n precisions:\n - w8a8\n - w9\n", 6, 6, "search.precisions: 'w9' is no"),
        (LEAST + "search: {precisions: []}\n", 6, 3, "search.precisions: "),
        (LEAST + "emit:\n  trial: worst\n", 6, 4, "emit.trial: "),
        (LEAST + "emit:\n  trial: -1\n", 6, 4, "emit.trial: "),
        (LEAST + "target: |\n  two\n  lines\n", 6, 3, "target: line breaks or control characters"),
        (LEAST + 'target: "a\\0b"\n', 6, 3, "target: line breaks or control characters"),
        ("model: ''\nout: o\n", 6, 1, "model: String should have at least 1 character"),
        # Of what knows them: `parse_latency` and `checked_settings`.
        (LEAST + "search:\n  latency: 0.6y\n", 6, 4, "search.latency: '0.6y' is no latency"),
        (LEAST + "search:\n  latency: -1\n", 6, 4, "search.latency: '-1.0' is no latency"),
        (LEAST + "search:\n  tie: all\n", 6, 4, "search.tie: "),
        (LEAST + "search:\n  sampler: Best\n", 6, 4, "search.sampler: there is no sampler 'Best'"),
        (LEAST + "search:\n  images: 1\n", 6, 4, "search.images: "),
        (LEAST + "search:\n  max_bytes: 0\n", 6, 4, "search.max_bytes: "),
        (LEAST + "search:\n  seed: -1\n", 6, 4, "search.seed: "),
        (LEAST + "search:\n  phases: 0\n", 6, 4, "search.phases: "),
    ],
)
def test_a_refusal_names_file_line_and_key(text: str, code: int, line: int, told: str) -> None:
    found = refusal(text)
    assert found.message.startswith(told)
    assert (found.code, found.path) == (f"EQ-390{code}", f"recipe.yaml:{line}")
    assert str(found).isprintable()
    assert len(str(found)) < 400


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("serch: {trials: 3}\n", "did you mean search?"),
        ("search: {trails: 3}\n", "did you mean trials?"),
        ("trials: 3\n", "did you mean search.trials?"),
        ("search: {correct: true}\n", "did you mean emit.correct?"),
        ("zzz: 3\n", "known keys: model, out, target, "),
    ],
)
def test_the_nearest_known_key_is_the_hint(text: str, hint: str) -> None:
    assert (refusal(LEAST + text).hint or "").startswith(hint)


def test_a_wrong_value_is_told_what_the_key_is_for() -> None:
    found = refusal(LEAST + "search: {latency: fast}\n")
    assert found.hint == "give milliseconds, 1.5, or a share of the float model's, 0.6x"
    assert refusal(LEAST + "emit: {trial: x}\n").hint == "best, or a trial's number."
    assert (refusal(LEAST + "search: 3\n").hint or "").startswith("it has search.trials, ")


def test_tabs_are_told_as_such() -> None:
    found = refusal(LEAST + "search:\n\ttrials: 3\n")
    assert found.hint == "indent with spaces, not with tabs"


# Options.


def test_options_go_before_the_file_and_later_ones_before_earlier() -> None:
    given_as = ("search.trials=200", "search.precisions=[fp32, w8]", "search.trials=300")
    found = parsed(LEAST + "search: {trials: 3, seed: 4}\n", *given_as)
    assert (found.search.trials, found.search.seed) == (300, 4)
    assert found.search.precisions == (Precision("fp32"), Precision("w8"))


@pytest.mark.parametrize(
    ("option", "wanted"),
    [("study=a=b", "a=b"), ("study=null", None), ("study='3'", "3"), ("study=a: b", "refused")],
)
def test_the_value_of_an_option_is_a_yaml_scalar(option: str, wanted: str | None) -> None:
    if wanted == "refused":
        assert refusal(LEAST, f"search.{option}").code == "EQ-3906"
    else:
        assert parsed(LEAST, f"search.{option}").search.study == wanted


def test_options_may_supply_what_the_file_lacks() -> None:
    assert parsed("target: x\n", "model=m", "out=o") == Recipe(model="m", out="o", target="x")


@pytest.mark.parametrize(
    ("option", "code", "path", "told"),
    [
        ("search.trials", 8, "--set search.trials", "no value is given"),
        ("search.trials=", 8, "--set search.trials", "search.trials: no value is given"),
        ("extends=x.yaml", 8, "--set extends", "extends has to stand in a file"),
        ("search.trails=3", 5, "--set search.trails", 'unknown key "search.trails"'),
        ("trials=3", 5, "--set trials", 'unknown key "trials"'),
        ("=3", 5, "--set ", 'unknown key ""'),
        ("search={trials: 3}", 6, "--set search", "search: a part has no value of its own"),
        ("search.trials={a: 3}", 6, "--set search.trials", "search.trials: a value is wanted"),
        ("search.trials=0", 6, "--set search.trials", "search.trials: Input should be greater"),
        ("search.tie=all", 6, "--set search.tie", "search.tie: "),
        ("search.trials=&a 3", 3, "--set search.trials", "anchors and aliases are not taken"),
        ("search.trials=[", 2, "--set search.trials", "not YAML: "),
    ],
)
def test_a_refusal_names_the_option(option: str, code: int, path: str, told: str) -> None:
    found = refusal(LEAST, option)
    assert found.message.startswith(told)
    assert (found.code, found.path) == (f"EQ-390{code}", path)


def test_an_unknown_option_is_told_the_nearest_one() -> None:
    assert refusal(LEAST, "search.trails=3").hint == "did you mean search.trials?"


def test_an_option_does_not_tell_a_password() -> None:
    found = refusal(LEAST, "search.storag=postgresql://me:secret@host/db")
    assert "secret" not in str(found)


# Files.


def test_a_recipe_is_read_from_its_file(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, mine=LEAST)) == parsed(LEAST)


def test_what_a_recipe_extends_is_overridden_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    base = "out: x\nsearch: {trials: 5, precisions: [fp32, w8a8], seed: 3}\n"
    (tmp_path / "shared" / "base.yaml").write_text(f"extends: ../first.yaml\n{base}")
    (tmp_path / "first.yaml").write_text("model: first\nsampler: {steps: 7}\n")
    file = tmp_path / "mine.yaml"
    file.write_text("extends: shared/base.yaml\nout: y\nsearch: {trials: 9, precisions: [w8]}\n")
    found = read_recipe(file, ("search.seed=1",))
    assert (found.model, found.out, found.sampler.steps) == ("first", "y", 7)
    assert (found.search.trials, found.search.seed) == (9, 1)
    assert found.search.precisions == (Precision("w8"),)


def test_a_wrong_value_is_told_where_it_stands(tmp_path: Path) -> None:
    file = written(tmp_path, mine="extends: base.yaml\n" + LEAST, base="# x\nsearch: {tie: all}\n")
    with pytest.raises(InputError) as caught:
        read_recipe(file)
    assert caught.value.path == f"{tmp_path / 'base.yaml'}:2"


@pytest.mark.parametrize(
    ("texts", "line", "told"),
    [
        ({"a": "model: m\nextends: gone.yaml\n"}, 2, "extends: {folder}/gone.yaml: no such file"),
        ({"a": "extends: .\n"}, 1, "extends: {folder}: not a regular file but a folder"),
        ({"a": "extends: a.yaml\n"}, 1, "extends: {folder}/a.yaml leads back to itself"),
    ],
)
def test_a_file_that_cannot_be_extended_is_refused(
    tmp_path: Path, texts: dict[str, str], line: int, told: str
) -> None:
    file = written(tmp_path, **texts)
    with pytest.raises(InputError) as caught:
        read_recipe(file)
    assert caught.value.message == told.format(folder=tmp_path)
    assert (caught.value.code, caught.value.path) == ("EQ-3907", f"{file}:{line}")


@pytest.mark.parametrize("value", ["3", "null", "[a]", "''"])
def test_extends_names_a_file(value: str) -> None:
    assert refusal(f"{LEAST}extends: {value}\n").code == "EQ-3906"


def test_a_cycle_of_files_is_refused_where_it_closes(tmp_path: Path) -> None:
    (tmp_path / "link.yaml").symlink_to("a.yaml")
    file = written(tmp_path, a="extends: b.yaml\n", b="\nextends: link.yaml\n")
    with pytest.raises(InputError, match="leads back to itself") as caught:
        read_recipe(file)
    assert caught.value.path == f"{tmp_path / 'b.yaml'}:2"


def test_eight_levels_are_taken_and_nine_refused(tmp_path: Path) -> None:
    texts = {f"r{k}": f"extends: r{k + 1}.yaml\n" for k in range(MAX_LEVELS + 1)}
    written(tmp_path, **texts, **{f"r{MAX_LEVELS + 1}": LEAST})
    assert read_recipe(tmp_path / "r1.yaml").model == "m"
    with pytest.raises(InputError, match="more than 8 levels") as caught:
        read_recipe(tmp_path / "r0.yaml")
    assert caught.value.path == f"{tmp_path / f'r{MAX_LEVELS}.yaml'}:1"


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, told in {"fifo": "a FIFO", ".": "a folder", "gone": "no such file"}.items():
        with pytest.raises(InputError, match=told) as caught:
            read_recipe(tmp_path / name)
        assert (caught.value.code, caught.value.path) == ("EQ-3901", str(tmp_path / name))
        assert caught.value.hint


def test_a_megabyte_is_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "big.yaml"
    file.write_text(LEAST + "#" * (MAX_BYTES - len(LEAST)))
    assert read_recipe(file).model == "m"
    file.write_text(LEAST + "#" * (MAX_BYTES - len(LEAST) + 1))
    with pytest.raises(InputError, match="larger than 1 MiB: 1048577 bytes"):
        read_recipe(file)


def test_another_encoding_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes(LEAST.encode() + "target: é\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 at byte") as caught:
        read_recipe(file)
    assert caught.value.path == f"{file}:3"


# What init writes.


def test_a_written_recipe_has_every_key_with_its_default_and_a_comment() -> None:
    text = recipe_text("reference:unet-fmnist")
    made = parsed(text)
    assert made == Recipe(model="reference:unet-fmnist", out="build/unet-fmnist")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    names = [line.partition(":")[0] for line in lines]
    assert set(made.model_dump()) <= set(names)
    for part in recipes._PARTS:
        keys = [f"  {name}" for name in getattr(made, part).model_dump()]
        start = names.index(part) + 1
        assert names[start : start + len(keys)] == keys
    assert all("  # " in line and len(line) <= 100 for line in lines)


@pytest.mark.parametrize(
    ("model", "out"),
    [
        ("./my-ddpm", "build/my-ddpm"),
        ("google/ddpm-cifar10-32", "build/ddpm-cifar10-32"),
        ("/models/v1.5/", "build/v1-5"),
        ("a: b # c", "build/b-c"),
        ('"quoted" \\ {x}', "build/x"),
        ("null", "build/null"),
        ("1.5", "build/1-5"),
        (".nan", "build/nan"),
        ("模型", "build/model"),
        ("..", "build/model"),
        ("a:", "build/model"),
    ],
)
def test_any_name_of_a_model_survives_being_written(model: str, out: str) -> None:
    assert parsed(recipe_text(model)) == Recipe(model=model, out=out)


def test_target_and_folder_may_be_given() -> None:
    made = parsed(recipe_text("m", out="x y", target="phone"))
    assert made == Recipe(model="m", out="x y", target="phone")


# Anything at all.

PIECES = (
    *(
        b"\t",
        b"\0",
        b"&a ",
        b"*a",
        b"!!str ",
        b"!<x> ",
        b"%YAML 99999999999999999999.1\n",
        b"---\n",
    ),
    *(b'"\\UFFFFFFFF"', b"[", b"{", b"}", b"]", b": ", b"? ", b"- ", b"|\n", b">-\n", b"'", b'"'),
    *(b"\xff", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b".nan", b"1e999", b"9" * 80, b"-1", b"null"),
    *(
        b"\r",
        b"\n",
        b"#",
        b"%TAG ! x\n",
        b"extends: mine.yaml\n",
        b"<<: ",
        b'"\\ud800"',
        b"@",
        b"=",
    ),
)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), edits=st.integers(1, 4))
def test_a_changed_recipe_is_taken_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, seed: int, edits: int
) -> None:
    generator, data = random.Random(seed), bytearray(WRITTEN)
    for _ in range(edits):
        at = generator.randrange(len(data) + 1)
        if generator.random() < 0.3:
            del data[at : at + generator.randint(1, 20)]
        else:
            data[at:at] = generator.choice(PIECES)
    file = tmp_path_factory.getbasetemp() / "mine.yaml"
    file.write_bytes(data)
    taken_or_refused(file)


@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(data)
    taken_or_refused(file)


def taken_or_refused(file: Path) -> None:
    error = refusal_of(file)
    if error is not None:
        assert error.code.startswith("EQ-39")
        assert error.hint
        name, _, line = (error.path or "").rpartition(":")
        assert (name, line.isdigit()) == (str(file), True)


def refusal_of(file: Path) -> InputError | None:
    try:
        assert isinstance(read_recipe(file), Recipe)
    except InputError as error:
        return error
    return None
