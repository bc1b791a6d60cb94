"""A recipe: one YAML file that says how a model becomes a package.

A text is composed to nodes and no further: a recipe needs neither tags nor anchors, and only a node
knows its line.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from edgeqdm import searching
from edgeqdm.cli_inputs import parse_latency
from edgeqdm.emit.backend import STANDARD
from edgeqdm.errors import InputError
from edgeqdm.ir.codec import describe, open_regular
from edgeqdm.ir.precision import Precision
from edgeqdm.ir.profile import Flag
from edgeqdm.ir.record import Record
from edgeqdm.ir.search import SearchSettings
from edgeqdm.profile.host import SECONDS
from edgeqdm.profile.requests import DEFAULT_PRECISIONS, DEFAULT_WHOLES
from edgeqdm.search.study import DEFAULT_SAMPLER
from edgeqdm.stages import DEFAULT_SAMPLES, DEFAULT_TARGET

HOST, EXTENDS = "host", "extends"
MAX_BYTES = 2**20
MAX_LEVELS = 8
"""Files below the first that extend one another."""
_MAX_DEPTH = 8
_MAX_NODES = 2000
_LONGEST_NUMBER = 64
_COMMENT_COLUMN = 34

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(
    ("false", "False", "FALSE"), False
)
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PLAIN = re.compile(r"[A-Za-z0-9./](:?[A-Za-z0-9._/+-])*")

Count = Annotated[int, Field(ge=1, lt=2**31)]


class SamplerPart(Record):
    """How the model is sampled."""

    scheduler: str | None = Field(default=None, description="null is the model's own.")
    steps: Count = Field(default=20, description="Denoising steps.")
    eta: float = Field(default=0.0, ge=0, le=1, description="DDIM noise; 1 is DDPM.")
    guidance: float | None = Field(
        default=None, ge=0, description="Scale; null is the model's own."
    )


class ProfilePart(Record):
    """Where latencies come from."""

    source: str = Field(
        default=HOST, min_length=1, description="host measures here; or a file, or a shipped name."
    )
    threads: Count = Field(default=1, description="Of the runtime, on this host.")
    seconds: float = Field(default=SECONDS, ge=0.05, le=3600, description="Least time per graph.")
    wholes: int = Field(
        default=DEFAULT_WHOLES, ge=0, lt=2**31, description="Mixed networks to time as a whole."
    )
    accept_flags: tuple[Flag, ...] = Field(
        default=(), description="Use figures flagged so, e.g. [throttled]."
    )


class SearchPart(Record):
    """What is searched; `searching.checked_settings` knows what is allowed."""

    trials: Count = Field(default=100, description="Complete trials in all.")
    latency: float | str | None = Field(
        default=None, description="Of a step at most: 1.5 in ms, or 0.6x of float's."
    )
    max_bytes: int | None = Field(default=None, description="Of the graph at most.")
    phases: int = Field(default=1, description="Of a plan, at most.")
    precisions: tuple[Precision, ...] = Field(
        default=DEFAULT_PRECISIONS, min_length=1, description="That layers may take."
    )
    tie: str = Field(default="siblings", description="Share a precision: layer, siblings, block.")
    policies: bool = Field(
        default=False, description="Choose between temporal and static scales too."
    )
    sampler: str = Field(
        default=DEFAULT_SAMPLER, description="TPESampler, NSGAIISampler, GPSampler."
    )
    images: int = Field(default=16, description="That a trial is judged on.")
    samples: int = Field(default=DEFAULT_SAMPLES, description="Calibration trajectories.")
    seed: int = Field(default=0, description="Of calibration and search.")
    storage: str | None = Field(
        default=None, description="URL of a database for several workers; null is a file."
    )
    study: str | None = Field(default=None, description="Its name; null is the model's.")


class EmitPart(Record):
    """What becomes a package."""

    trial: Literal["best"] | Annotated[int, Field(ge=0)] = Field(
        default="best", description="best, or a trial's number."
    )
    correct: bool = Field(default=True, description="Correct the sampler for quantization noise.")
    form: str = Field(default=STANDARD, min_length=1, description="Of the package: small, ort.")


class Recipe(Record):
    """Everything that a package is made from."""

    model: str = Field(min_length=1, description="reference:NAME, a diffusers folder or a hub id.")
    out: str = Field(min_length=1, description="Folder for profile.json, search/ and package/.")
    target: str = Field(default=DEFAULT_TARGET, min_length=1, description="Runtime to make it for.")
    split_skips: bool = Field(default=False, description="Two scales for a UNet's skips.")
    sampler: SamplerPart = Field(default=SamplerPart(), description="How the model is sampled.")
    profile: ProfilePart = Field(default=ProfilePart(), description="Where latencies come from.")
    search: SearchPart = Field(default=SearchPart(), description="Of a precision for every layer.")
    emit: EmitPart = Field(default=EmitPart(), description="What becomes a package.")


def _parts() -> dict[str, type[Record]]:
    kinds = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {k: t for k, t in kinds.items() if isinstance(t, type) and issubclass(t, Record)}


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for name, field in Recipe.model_fields.items():
        if name in _PARTS:
            inner = _PARTS[name].model_fields
            yield from ((f"{name}.{key}", each) for key, each in inner.items())
        else:
            yield name, field


_PARTS = _parts()
_KEYS = dict(_fields())
"""Every key that has a value, with its part before a dot."""


@dataclass(frozen=True)
class _Entry:
    """One value and where it stands.

    Attributes:
        value: text, number, boolean, None, or a list of these.
        place: file and line, or option.
        items: places of a list's items.
    """

    value: Any
    place: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """A text that values come from: of a file, or of an option, which has no lines."""

    name: str
    is_file: bool = True

    def at(self, line: int) -> str:
        """The place of a line, counted from 0."""
        return f"{self.name}:{line + 1}" if self.is_file else self.name


class _Composer(yaml.SafeLoader):
    """Nodes of a text; what a recipe has no use for is refused before it costs anything."""

    def __init__(self, text: str, source: _Source) -> None:
        super().__init__(text)
        self._source = source
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._nodes += 1
        place = self._source.at(event.start_mark.line)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise InputError(
                "EQ-3903",
                "anchors and aliases are not taken",
                path=place,
                hint="write the value out; `extends: other.yaml` shares keys",
            )
        if event.tag is not None:
            message = f"the tag {describe(event.tag)} is not taken"
            raise InputError("EQ-3903", message, path=place, hint="leave it out")
        if self._depth >= _MAX_DEPTH or self._nodes > _MAX_NODES:
            limits = f"nested deeper than {_MAX_DEPTH} levels, or more than {_MAX_NODES} values"
            raise InputError(
                "EQ-3903", limits, path=place, hint="`edgeqdm init` shows what a recipe holds"
            )
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


def read_recipe(file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe out of its file and those it extends.

    Args:
        file: a regular file of at most 1 MiB.
        overrides: `search.trials=200`, each a dotted key and a YAML scalar or list; later ones
            go before earlier ones and before the file.

    Raises:
        InputError: EQ-39.., naming file and line, or the option.
    """
    path = Path(file)
    return parse_recipe(_read_text(path), name=str(path), overrides=overrides)


def parse_recipe(text: str, *, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Like `read_recipe`, for a text already read; `name` stands for its file."""
    path = Path(name)
    entries = _extended(text, path, (_resolved(path),))
    for override in overrides:
        entries |= _override(override)
    return _checked(entries, _Source(name).at(0))


def _read_text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            # Read past the limit all the same, because a file can grow meanwhile.
            data = b"" if size > MAX_BYTES else file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise _unreadable(f"cannot be read: {problem.strerror}", path) from problem
    except InputError as problem:
        raise _unreadable(problem.message, path) from None
    if max(size, len(data)) > MAX_BYTES:
        raise _unreadable(f"larger than 1 MiB: {max(size, len(data))} bytes", path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        place = _Source(str(path)).at(data[: problem.start].count(b"\n"))
        message = f"not UTF-8 at byte {problem.start}"
        raise InputError("EQ-3901", message, path=place, hint="save it as UTF-8") from None


def _unreadable(message: str, path: Path) -> InputError:
    return InputError("EQ-3901", message, path=path, hint="`edgeqdm init` writes a recipe")


def _extended(text: str, path: Path, chain: tuple[Path, ...]) -> dict[str, _Entry]:
    """Entries of a file and of what it extends, whose own go before."""
    own = _entries(text, _Source(str(path)))
    asked = own.pop(EXTENDS, None)
    if asked is None:
        return own
    if not isinstance(asked.value, str) or not asked.value:
        raise _wrong(EXTENDS, f"no name of a file, found {describe(asked.value)}", asked.place)
    base = path.parent / asked.value
    try:
        below = _read_text(base)
    except InputError as problem:
        # What cannot be opened is told where it is named; a line of its own is told there.
        if problem.path == str(base):
            message = f"{EXTENDS}: {base}: {problem.message}"
            hint = "the path starts at the folder of the file that names it"
            raise InputError("EQ-3907", message, path=asked.place, hint=hint) from None
        raise
    resolved = _resolved(base)
    if resolved in chain:
        message = f"{EXTENDS}: {base} leads back to itself"
        raise InputError("EQ-3907", message, path=asked.place, hint="leave one of them out")
    if len(chain) > MAX_LEVELS:
        message = f"{EXTENDS}: more than {MAX_LEVELS} levels"
        raise InputError("EQ-3907", message, path=asked.place, hint="put some of them together")
    return _extended(below, base, (*chain, resolved)) | own


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path.absolute()


def _override(text: str) -> dict[str, _Entry]:
    key, equals, given = text.partition("=")
    source = _Source(f"--set {key}", is_file=False)
    if not equals:
        message, hint = "no value is given", "write --set search.trials=200"
        raise InputError("EQ-3908", message, path=source.name, hint=hint)
    if key in _PARTS:
        raise _wrong(key, "a part has no value of its own", source.name)
    if key == EXTENDS:
        message = f"{EXTENDS} has to stand in a file"
        raise InputError("EQ-3908", message, path=source.name, hint="set the keys themselves")
    _check_known(key, list(_KEYS), source.name)
    node = _compose(given, source)
    if node is None:
        message, hint = f"{key}: no value is given", "write null for none"
        raise InputError("EQ-3908", message, path=source.name, hint=hint)
    return {key: _entry(key, node, source)}


def _entries(text: str, source: _Source) -> dict[str, _Entry]:
    """Values by dotted key."""
    root = _compose(text, source)
    if root is None:
        message, hint = "empty file", "`edgeqdm init` writes a recipe"
        raise InputError("EQ-3902", message, path=source.at(0), hint=hint)
    if not isinstance(root, yaml.MappingNode):
        place = source.at(root.start_mark.line)
        message, hint = "not keys with values", "write `model: reference:unet-fmnist`, say"
        raise InputError("EQ-3902", message, path=place, hint=hint)
    found: dict[str, _Entry] = {}
    for key, node in _pairs(root, "", source):
        if key not in _PARTS:
            found[key] = _entry(key, node, source)
        elif isinstance(node, yaml.MappingNode):
            inner = _pairs(node, key, source)
            found |= {name: _entry(name, each, source) for name, each in inner}
        else:
            raise _wrong(key, "no keys stand below it", source.at(node.start_mark.line))
    return found


def _compose(text: str, source: _Source) -> yaml.Node | None:
    """The one document of a text, or None where it holds nothing.

    Raises:
        InputError: EQ-3902, not YAML; EQ-3903, more of YAML than a recipe needs.
    """
    composer = None
    try:
        composer = _Composer(text, source)
        return composer.get_single_node()
    except yaml.reader.ReaderError as problem:
        line = text.count("\n", 0, problem.position)
        message = f"not YAML: {problem.reason}"
        raise _no_yaml(message, text, source, line) from None
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line = 0 if mark is None else mark.line
        message = f"not YAML: {problem.problem or problem.context}"
        raise _no_yaml(message, text, source, line) from None
    except (ValueError, OverflowError) as problem:
        # Of a code point or a version that no integer or character holds.
        line = 0 if composer is None else composer.line
        raise _no_yaml(f"not YAML: {problem}", text, source, line) from None
    finally:
        if composer is not None:
            composer.dispose()


def _no_yaml(message: str, text: str, source: _Source, line: int) -> InputError:
    lines = text.splitlines()
    has_tab = line < len(lines) and "\t" in lines[line]
    hint = "indent with spaces, not with tabs" if has_tab else "`edgeqdm init` shows the form"
    told = " ".join(message.split())[:200]
    return InputError("EQ-3902", told, path=source.at(line), hint=hint)


def _pairs(node: yaml.MappingNode, part: str, source: _Source) -> Iterator[tuple[str, yaml.Node]]:
    """Known keys of a part, or of the recipe itself, each once, with what stands there."""
    known = [*_PARTS[part].model_fields] if part else [*Recipe.model_fields, EXTENDS]
    seen: dict[str, str] = {}
    for key, value in node.value:
        place = source.at(key.start_mark.line)
        if not isinstance(key, yaml.ScalarNode):
            message, hint = "a key has to be a name", "write `name: value`"
            raise InputError("EQ-3902", message, path=place, hint=hint)
        _check_known(key.value, known, place, part)
        name = f"{part}.{key.value}" if part else key.value
        if name in seen:
            message = f"{name}: given before, at {seen[name]}"
            raise InputError("EQ-3904", message, path=place, hint="leave one of them out")
        seen[name] = place
        yield name, value


def _check_known(key: str, known: Sequence[str], place: str, where: str = "") -> None:
    """Raise InputError unless a key is known; `where` is the part it would be of."""
    if key not in known:
        message = f"unknown key {describe(key)}" + (f" in {where}" if where else "")
        raise InputError("EQ-3905", message, path=place, hint=_nearest(key, known))


def _nearest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key[:80], known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    tail = key[:80].rpartition(".")[2]
    elsewhere = {name.rpartition(".")[2]: name for name in _KEYS}
    near = difflib.get_close_matches(tail, list(elsewhere), n=1, cutoff=0.8)
    return f"did you mean {elsewhere[near[0]]}?" if near else f"known keys: {', '.join(known)}"


def _entry(key: str, node: yaml.Node, source: _Source) -> _Entry:
    place = source.at(node.start_mark.line)
    if isinstance(node, yaml.ScalarNode):
        return _Entry(_scalar(key, node, place), place)
    if not isinstance(node, yaml.SequenceNode):
        raise _wrong(key, "a value is wanted, not keys", place)
    places = tuple(source.at(each.start_mark.line) for each in node.value)
    for each, where in zip(node.value, places, strict=True):
        if not isinstance(each, yaml.ScalarNode):
            raise _wrong(key, "a list holds plain values", where)
    values = [_scalar(key, each, at) for each, at in zip(node.value, places, strict=True)]
    return _Entry(values, place, places)


def _scalar(key: str, node: yaml.ScalarNode, place: str) -> str | float | bool | None:
    """The value of a scalar as YAML 1.2 has it: `no` is text, and 1:30 is no number of minutes."""
    text: str = node.value
    if not text.isprintable():
        raise _wrong(key, f"line breaks or control characters in {describe(text)}", place)
    if node.style is not None:
        return text
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text) or _FLOAT.fullmatch(text):
        return _number(key, text, place)
    if _NOT_FINITE.fullmatch(text):
        raise _wrong(key, f"numbers must be finite, found {text}", place)
    return text


def _number(key: str, text: str, place: str) -> float:
    if len(text) > _LONGEST_NUMBER:
        raise _wrong(key, f"a number of {len(text)} characters", place)
    value = int(text) if _INTEGER.fullmatch(text) else float(text)
    if not math.isfinite(value):
        raise _wrong(key, f"numbers must be finite, found {text}", place)
    return value


def _wrong(key: str, message: str, place: str, hint: str | None = None) -> InputError:
    return InputError("EQ-3906", f"{key}: {message}", path=place, hint=hint or _about(key))


def _about(key: str) -> str:
    if key in _KEYS:
        return _KEYS[key].description or ""
    if key == EXTENDS:
        return "name a file, from the folder of this one"
    return f"it has {', '.join(f'{key}.{name}' for name in _PARTS[key].model_fields)}"


def _checked(entries: Mapping[str, _Entry], start: str) -> Recipe:
    """The recipe of these values; `start` is the place of what is missing."""
    tree: dict[str, Any] = {}
    for key, entry in entries.items():
        part, _, name = key.rpartition(".")
        (tree.setdefault(part, {}) if part else tree)[name] = entry.value
    try:
        # JSON mode: only there does strict validation take lists as tuples, text as enums.
        recipe = Recipe.model_validate_json(json.dumps(tree))
    except ValidationError as problem:
        _raise_first(problem, entries, start)
    try:
        settings_of(recipe, float_ms=lambda: 1.0)
    except InputError as problem:
        key = _key_of_setting(problem.path or "")
        place = entries[key].place if key in entries else start
        raise _wrong(key, problem.message, place, problem.hint) from None
    return recipe


def _raise_first(problem: ValidationError, entries: Mapping[str, _Entry], start: str) -> NoReturn:
    detail = problem.errors(include_url=False)[0]
    parts = [part for part in detail["loc"] if isinstance(part, str)]
    key = ".".join(parts[: 2 if parts[0] in _PARTS else 1])
    if key not in entries:
        raise _wrong(key, "missing", start) from None
    indices = [part for part in detail["loc"] if isinstance(part, int)]
    entry = entries[key]
    place = entry.items[indices[0]] if indices else entry.place
    text = " ".join(detail["msg"].removeprefix("Value error, ").split())
    found = "" if detail["type"] == "value_error" else f", found {describe(detail['input'])}"
    raise _wrong(key, f"{text}{found}", place) from None


def _key_of_setting(path: str) -> str:
    """The recipe's key of what `checked_settings` or `parse_latency` names."""
    field = path.partition(".")[0]
    return {"--latency": "search.latency", "target": "target"}.get(field, f"search.{field}")


def settings_of(
    recipe: Recipe, *, float_ms: Callable[[], float], accepted: tuple[Flag, ...] = ()
) -> SearchSettings:
    """What the recipe's search depends on.

    Args:
        recipe: the recipe.
        float_ms: asked for the float model's latency where the limit is a share of it.
        accepted: flags of the profile that were accepted.

    Raises:
        InputError: naming what is wrong.
    """
    asked = recipe.search
    latency = None if asked.latency is None else str(asked.latency)
    return searching.checked_settings(
        target=recipe.target,
        precisions=asked.precisions,
        tie=asked.tie,
        phases=asked.phases,
        policies=asked.policies,
        latency_ms=parse_latency(latency, float_ms),
        max_bytes=asked.max_bytes,
        sampler=asked.sampler,
        samples=asked.samples,
        images=(4, asked.images) if asked.images > 4 else (asked.images,),
        seed=asked.seed,
        accepted_flags=accepted,
    )


def recipe_text(model: str, *, out: str | None = None, target: str = DEFAULT_TARGET) -> str:
    """A recipe with every key, its default and what it means.

    Args:
        model: as `load` takes it.
        out: folder of what is made; default one below `build`, of the model's name.
        target: name of a backend.

    Raises:
        InputError: EQ-3906, if one of them is empty.
    """
    values = {"model": model, "out": out or _default_out(model), "target": target}
    recipe = _checked({key: _Entry(value, key) for key, value in values.items()}, "recipe")
    lines = [
        "# A recipe of edgeqdm: `edgeqdm optimize` runs it, --set search.trials=200 overrides it.",
        f"# {EXTENDS}: other.yaml would take from there what is not said here.",
    ]
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if name not in _PARTS:
            lines.append(_line(f"{name}: {_written(value)}", field))
            continue
        lines += ["", _line(f"{name}:", field)]
        for key, inner in _PARTS[name].model_fields.items():
            lines.append(_line(f"  {key}: {_written(getattr(value, key))}", inner))
    return "\n".join(lines) + "\n"


def _line(text: str, field: FieldInfo) -> str:
    return f"{text:<{_COMMENT_COLUMN}}  # {field.description}"


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    bare = value not in (*_NULL, *_BOOLEANS) and not _FLOAT.fullmatch(value)
    plain = bare and _PLAIN.fullmatch(value) and not _NOT_FINITE.fullmatch(value)
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


def _default_out(model: str) -> str:
    name = re.split(r"[:/\\]", model.rstrip("/\\"))[-1]
    return f"build/{re.sub(r'[^A-Za-z0-9_-]+', '-', name).strip('-') or 'model'}"
