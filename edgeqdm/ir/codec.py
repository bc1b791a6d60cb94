"""JSON to frozen types and back: bounded and strict on the way in, canonical on the way out.

The text is checked before a validator sees it: `json` and pydantic both keep the last of two equal
keys, `json` takes NaN and reads 1e999 as infinity, and deep nesting or a few megabytes of `[]` cost
either of them the stack or hundreds of megabytes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from edgeqdm.errors import EdgeqdmError, InputError, NumericalError
from edgeqdm.ir.record import Record

R = TypeVar("R", bound=Record)

MAX_BYTES = 16 * 2**20
_MAX_DEPTH = 32
_MAX_VALUES = 200_000
_MAX_NUMBER_LENGTH = 64
_MAX_FAULTS = 1000
_INT64 = range(-(2**63), 2**63)

# A string without its closing quote runs to the end: the scan stays linear on any input.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_./-]{1,80}")


def read_record(path: Path, record_type: type[R], *, error: type[EdgeqdmError] = InputError) -> R:
    """Reads one stored value.

    Args:
        path: a regular file; a folder, FIFO or device is refused without waiting for it.
        record_type: what the file must hold.
        error: class of the error raised; its exit code is the first digit of the error code.

    Raises:
        EdgeqdmError: of class `error`, naming the file, the field and what was found there.
    """
    return parse_record(read_bytes(path, error=error), record_type, name=str(path), error=error)


def parse_record(
    data: bytes, record_type: type[R], *, name: str, error: type[EdgeqdmError] = InputError
) -> R:
    """Like `read_record`, for bytes already read; `name` stands for the file in errors."""
    document = parse_json(data, name=name, error=error)
    _check_version(document, record_type, name=name, error=error)
    try:
        # JSON mode again: only there does strict validation take lists as tuples, text as enums.
        return record_type.model_validate_json(data)
    except ValidationError as problem:
        raise _field_error(problem, record_type, name=name, error=error) from None


def parse_json(data: bytes, *, name: str, error: type[EdgeqdmError] = InputError) -> Any:
    """JSON of finite numbers and unique keys, at most 16 MiB and 32 levels deep."""
    text = _decode(data, name=name, error=error)
    _check_size_of_tree(data, text, name=name, error=error)
    refusals = _Refusals()
    try:
        document = json.loads(
            text,
            object_pairs_hook=refusals.unique_keys,
            parse_constant=refusals.constant,
            parse_float=refusals.finite,
            parse_int=refusals.int64,
        )
    except json.JSONDecodeError as problem:
        offset = len(text[: problem.pos].encode())
        where = f"line {problem.lineno} column {problem.colno}, byte {offset}"
        message = f"not valid JSON: {problem.msg} at {where}"
        raise _error(error, 6, message, name, "the file may be cut off or damaged") from None
    if refusals.any:
        field, reason = next(_refused_fields(document))
        raise _error(error, 8, f"{field}: {reason}", name)
    return document


def read_bytes(path: Path, *, error: type[EdgeqdmError] = InputError) -> bytes:
    """Content of a regular file of at most 16 MiB."""
    with open_regular(path, error=error) as file:
        try:
            # The size cap is applied before reading, and again because a file can grow meanwhile.
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > MAX_BYTES else file.read(MAX_BYTES + 1)
        except OSError as problem:
            raise _error(error, 1, f"cannot be read: {problem.strerror}", path) from problem
    if max(size, len(data)) > MAX_BYTES:
        raise _error(error, 3, f"larger than 16 MiB: {max(size, len(data))} bytes", path)
    return data


def open_regular(
    path: Path, *, error: type[EdgeqdmError] = InputError, flags: int = 0
) -> BufferedReader:
    """Opens a regular file for reading and refuses everything else without blocking.

    Args:
        path: the file.
        error: class of the error raised.
        flags: added to those of `os.open`, e.g. `os.O_NOFOLLOW`.
    """
    try:
        # Without O_NONBLOCK opening a FIFO waits for a writer that may never come.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except FileNotFoundError:
        raise _error(error, 1, "no such file", path) from None
    except OSError as problem:
        raise _error(error, 1, f"cannot be opened: {problem.strerror}", path) from problem
    except ValueError as problem:
        raise _error(error, 1, f"cannot be opened: {problem}", path) from problem
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _error(error, 2, f"not a regular file but {file_kind(mode)}", path)
    return os.fdopen(descriptor, "rb")


def file_kind(mode: int) -> str:
    """What `st_mode` says the thing is, in words."""
    kinds = {
        stat.S_IFREG: "a regular file",
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def dump_record(record: Record) -> bytes:
    """Canonical JSON: sorted keys, ASCII, one value per line; equal records give equal bytes.

    Floats are printed with the fewest digits that read back to the same float64.

    Raises:
        NumericalError: a number is not finite.
    """
    return (_dump(record, indent=1) + "\n").encode("ascii")


def digest(record: Record) -> str:
    """SHA-256 of the record's value, hexadecimal; it does not depend on the layout of a file."""
    return hashlib.sha256(_dump(record, indent=None).encode("ascii")).hexdigest()


def sha256_file(path: Path, *, error: type[EdgeqdmError] = InputError) -> str:
    """SHA-256 of a regular file, hexadecimal."""
    with open_regular(path, error=error) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as problem:
            raise _error(error, 1, f"cannot be read: {problem.strerror}", path) from problem


def describe(value: object) -> str:
    """A value out of a file, on one line, in ASCII, at most 80 characters."""
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        value = value[:81]
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Refused:
    """Stands in the parsed tree where a value is refused, so that its field can be named."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class _Refusals:
    """The hooks of `json.loads`."""

    def __init__(self) -> None:
        self.any = False

    def refuse(self, reason: str) -> _Refused:
        self.any = True
        return _Refused(reason)

    def unique_keys(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                found[key] = self.refuse("duplicate key")
            seen.add(key)
        return found

    def constant(self, text: str) -> _Refused:
        return self.refuse(f"numbers must be finite, found {text}")

    def finite(self, text: str) -> float | _Refused:
        if len(text) > _MAX_NUMBER_LENGTH:
            return self.refuse(f"a number of {len(text)} characters")
        value = float(text)
        return value if math.isfinite(value) else self.constant(text)

    def int64(self, text: str) -> int | _Refused:
        if len(text) > _MAX_NUMBER_LENGTH:
            return self.refuse(f"an integer of {len(text)} digits")
        value = int(text)
        return value if value in _INT64 else self.refuse(f"{text} does not fit into 64 bits")


def _refused_fields(node: object, parts: tuple[str | int, ...] = ()) -> Iterator[tuple[str, str]]:
    if isinstance(node, _Refused):
        yield _field_name(parts), node.reason
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _refused_fields(value, (*parts, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _refused_fields(value, (*parts, index))


def _decode(data: bytes, *, name: str, error: type[EdgeqdmError]) -> str:
    if len(data) > MAX_BYTES:
        raise _error(error, 3, f"larger than 16 MiB: {len(data)} bytes", name)
    if not data.strip():
        raise _error(error, 4, "empty file", name)
    hint = "save the file as UTF-8 without a byte order mark"
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise _error(error, 5, "not plain UTF-8: starts with a byte order mark", name, hint)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise _error(error, 5, f"not UTF-8 at byte {problem.start}", name, hint) from None


def _check_size_of_tree(data: bytes, text: str, *, name: str, error: type[EdgeqdmError]) -> None:
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > _MAX_VALUES:
        raise _error(error, 7, f"more than {_MAX_VALUES} values", name)
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        token = match[0]
        depth += (token in "[{") - (token in "]}")
        if depth > _MAX_DEPTH:
            message = f"nesting deeper than {_MAX_DEPTH} levels at character {match.start()}"
            raise _error(error, 7, message, name)


def _check_version(
    document: object, record_type: type[Record], *, name: str, error: type[EdgeqdmError]
) -> None:
    field = record_type.model_fields.get("schema_version")
    if field is None or not isinstance(document, dict):
        return
    found, known = document.get("schema_version", field.default), field.default
    if type(found) is not int or found == known:
        return
    maker = document.get("edgeqdm_version")
    by = f" ({describe(maker)})" if isinstance(maker, str) else ""
    age, hint = ("newer", "upgrade edgeqdm") if found > known else ("older", "write it again")
    message = f"made by a {age} edgeqdm{by}: schema_version {found}, this one reads {known}"
    raise _error(error, 9, message, name, hint)


def _field_error(
    problem: ValidationError, record_type: type[Record], *, name: str, error: type[EdgeqdmError]
) -> EdgeqdmError:
    if problem.error_count() > _MAX_FAULTS:
        message = f"{problem.error_count()} fields do not fit a {record_type.__name__}"
        return _error(error, 11, message, name)
    details = problem.errors(include_url=False)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    for detail in details:
        # A mistyped key is also a missing one; the unknown key is the one worth reporting.
        if detail["type"] == "extra_forbidden":
            *parents, key = detail["loc"]
            place = f" in {_field_name(tuple(parents))}" if parents else ""
            hint = _nearest_key(str(key), _known_keys(record_type, tuple(parents)))
            return _error(error, 10, f"unknown key {describe(key)}{place}{more}", name, hint)
    detail = details[0]
    text = " ".join(detail["msg"].removeprefix("Value error, ").split())
    text = text if len(text) <= 300 else text[:297] + "..."
    own_check = detail["type"] in ("missing", "value_error", "json_invalid")
    found = "" if own_check else f", found {describe(detail['input'])}"
    return _error(error, 11, f"{_field_name(detail['loc'])}: {text}{found}{more}", name)


def _known_keys(record_type: type[Record], parents: tuple[str | int, ...]) -> list[str]:
    """Keys of the records that can stand at `parents`; indices and free keys pass through."""
    owners: list[type[BaseModel]] = [record_type]
    for part in parents:
        inner = [o.model_fields[part] for o in owners if part in o.model_fields]
        if inner:
            owners = [r for field in inner for r in _records_in(field.annotation)]
    return sorted({key for owner in owners for key in owner.model_fields})


def _records_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for inner in get_args(annotation) for record in _records_in(inner)]


def _nearest_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key[:80], known, n=1)
    return f"did you mean {describe(near[0])}?" if near else f"known keys: {', '.join(known)}"


def _field_name(parts: tuple[str | int, ...]) -> str:
    name = ""
    for part in parts:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            plain = part if _PLAIN_NAME.fullmatch(part) else describe(part)
            name += f".{plain}" if name else plain
    return name or "the document"


def _dump(record: Record, *, indent: int | None) -> str:
    separators = (",", ":") if indent is None else (",", ": ")
    tree = record.model_dump(mode="json")
    try:
        return json.dumps(
            tree, sort_keys=True, allow_nan=False, indent=indent, separators=separators
        )
    except ValueError as problem:
        message = f"a number of this {type(record).__name__} is not finite"
        raise NumericalError("EQ-5001", message) from problem


def _error(
    error: type[EdgeqdmError],
    number: int,
    message: str,
    name: str | Path,
    hint: str | None = None,
) -> EdgeqdmError:
    return error(f"EQ-{error.exit_code}0{number:02d}", message, path=name, hint=hint)
