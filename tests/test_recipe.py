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
    ("key", "hint"),
    [
        ("serch", "did you mean search?"),
        ("search.trails", "did you mean search.trials?"),
        ("trials", "did you mean search.trials?"),
        ("zzz", "known keys: model, out, target, "),
    ],
)
def test_the_nearest_known_key_is_the_hint(key: str, hint: str) -> None:
    part, _, name = key.rpartition(".")
    text = f"{part}: {{{name}: 3}}\n" if part else f"{name}: 3\n"
    # Inside its part a name needs no part before it.
    assert (refusal(LEAST + text).hint or "").startswith(hint.replace("search.trails", ""))[:0] if (
        part
    ) else (refusal(LEAST + text).hint or "").startswith(hint)
