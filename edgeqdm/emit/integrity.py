"""Whether the files of a package are exactly those its manifest lists.

Nothing is trusted before it is checked: a path of the manifest is never opened, only compared with
the names found by walking the package; links are not followed; what an ONNX model says about
external data is held against the listed files. The checkers of `onnx` and ONNX Runtime accept
negative dimensions, ranges past the end of a file or hard links, each of them some.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from edgeqdm.errors import InputError, UnsupportedError, VerifyError
from edgeqdm.ir.codec import (
    describe,
    dump_record,
    file_kind,
    open_regular,
    parse_json,
    parse_record,
    read_bytes,
)
from edgeqdm.ir.package import FORMAT, UNSEALED, Artifact, Manifest

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

MANIFEST = "manifest.json"
_MAX_PATH_BYTES = 200
_MAX_LISTED = 10
_MAX_RANK = 32
_CHARACTERS = re.compile(r"[A-Za-z0-9._/-]+")
_OFFSET = re.compile(r"[0-9]{1,18}")

_BITS = {
    "FLOAT": 32,
    "UINT8": 8,
    "INT8": 8,
    "UINT16": 16,
    "INT16": 16,
    "INT32": 32,
    "INT64": 64,
    "BOOL": 8,
    "FLOAT16": 16,
    "DOUBLE": 64,
    "UINT32": 32,
    "UINT64": 64,
    "COMPLEX64": 64,
    "COMPLEX128": 128,
    "BFLOAT16": 16,
    "FLOAT8E4M3FN": 8,
    "FLOAT8E4M3FNUZ": 8,
    "FLOAT8E5M2": 8,
    "FLOAT8E5M2FNUZ": 8,
    "FLOAT8E8M0": 8,
    "FLOAT6E2M3": 6,
    "FLOAT6E3M2": 6,
    "UINT4": 4,
    "INT4": 4,
    "FLOAT4E2M1": 4,
    "UINT2": 2,
    "INT2": 2,
}


def manifest_of(package: Path) -> Path:
    """The manifest's file; raises InputError, EQ-3703, where there is none."""
    manifest = package / MANIFEST
    if not manifest.exists():
        found = f"not a package: no {MANIFEST}" if package.is_dir() else "no such package"
        raise InputError("EQ-3703", found, path=package, hint="give a folder that emit made")
    return manifest


def check_files(package: Path) -> Manifest:
    """Holds every file of a package against its manifest; reads only.

    Returns:
        The manifest, once its bytes are those it was sealed with, everything it lists is there
        with the right size and SHA-256, nothing else is, and every external tensor of an ONNX
        model lies inside a listed file.

    Raises:
        VerifyError: naming every fault (the first 10 and their count).
        UnsupportedError: the package holds an ONNX model and `onnx` is not installed.
    """
    tree = _scan(package)
    data, manifest = _read_manifest(package, tree)
    faults = [] if _is_sealed(data, manifest) else [f"{MANIFEST} has been changed"]
    faults += tree.faults
    faults += path_faults(manifest.files)
    if MANIFEST in manifest.files:
        faults.append(f"{MANIFEST}: lists itself")
    faults += [f"{describe(p)}: missing" for p in sorted(manifest.files.keys() - tree.seen)]
    extra = tree.regular - manifest.files.keys() - {MANIFEST}
    faults += [f"{describe(p)}: not in the manifest" for p in sorted(extra)]
    for relative in sorted(tree.regular & manifest.files.keys()):
        content = _content_faults(package / relative, manifest.files[relative])
        if not content and relative.lower().endswith(".onnx"):
            content = _onnx_faults(package / relative, relative, manifest.files)
        faults += [f"{describe(relative)}: {fault}" for fault in content]
    if faults:
        raise _verify_error(package, faults)
    return manifest


def seal_manifest(manifest: Manifest) -> bytes:
    """Content of `manifest.json`: the manifest with its own SHA-256 as `manifest_sha256`.

    Whatever `manifest_sha256` it carries is replaced.
    """
    blank = dump_record(manifest.model_copy(update={"manifest_sha256": UNSEALED}))
    # A string holds no raw line break, so one followed by a single space is a key of the top level.
    key = b'\n "manifest_sha256": "'
    before, after = blank.split(key + UNSEALED.encode())
    return before + key + hashlib.sha256(blank).hexdigest().encode() + after


def _is_sealed(data: bytes, manifest: Manifest) -> bool:
    seal = manifest.manifest_sha256
    blank = data.replace(seal.encode(), UNSEALED.encode())
    return data.count(seal.encode()) == 1 and hashlib.sha256(blank).hexdigest() == seal


def path_faults(paths: Collection[str]) -> list[str]:
    """What is wrong with relative paths that are to be files of one package.

    A good path is relative POSIX of `[A-Za-z0-9._/-]` (ASCII, hence NFC), at most 200 bytes, no
    part of it empty, `.` or `..`. No two may differ in letter case only, folders included: a
    case-insensitive file system would merge them.
    """
    faults = []
    spelling: dict[str, str] = {}
    for path in sorted(paths):
        fault = _path_fault(path)
        if fault:
            faults.append(f"{describe(path)}: {fault}")
            continue
        for part in (path, *(str(p) for p in PurePosixPath(path).parents)):
            other = spelling.setdefault(part.casefold(), part)
            if other != part:
                faults.append(f"{describe(path)}: differs from {describe(other)} in case only")
                break
    return faults


def _path_fault(path: str) -> str | None:
    if not _CHARACTERS.fullmatch(path):
        return "a path may hold A-Z a-z 0-9 . _ / - only"
    if len(path) > _MAX_PATH_BYTES:
        return f"a path of {len(path)} bytes, at most {_MAX_PATH_BYTES} are allowed"
    if path.startswith("/"):
        return "an absolute path"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "a path with an empty, `.` or `..` part"
    return None


@dataclass
class _Tree:
    """What a walk through a package found, by relative POSIX path."""

    regular: set[str] = field(default_factory=set)
    """Regular files with one name."""
    seen: set[str] = field(default_factory=set)
    """Everything that is not a folder."""
    faults: list[str] = field(default_factory=list)


def _scan(package: Path) -> _Tree:
    tree = _Tree()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(package / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem)
            raise VerifyError(
                "EQ-8101", f"cannot be read as a package folder: {reason}", path=package / folder
            ) from problem
        if folder and not entries:
            tree.faults.append(f"{describe(folder)}: empty folder")
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(relative)
            else:
                _note_file(tree, relative, entry.stat(follow_symlinks=False))
    return tree


def _note_file(tree: _Tree, relative: str, status: os.stat_result) -> None:
    tree.seen.add(relative)
    if not stat.S_ISREG(status.st_mode):
        tree.faults.append(f"{describe(relative)}: {file_kind(status.st_mode)}")
    elif status.st_nlink > 1:
        tree.faults.append(f"{describe(relative)}: hard link, {status.st_nlink} names")
    else:
        tree.regular.add(relative)


def _read_manifest(package: Path, tree: _Tree) -> tuple[bytes, Manifest]:
    path = package / MANIFEST
    if MANIFEST not in tree.seen:
        hint = "give the folder that an emit wrote"
        raise VerifyError("EQ-8102", f"not a package: no {MANIFEST}", path=package, hint=hint)
    if MANIFEST not in tree.regular:
        raise _verify_error(package, tree.faults)
    data = read_bytes(path, error=VerifyError)
    document = parse_json(data, name=str(path), error=VerifyError)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else document
        maker = document.get("edgeqdm_version") if isinstance(document, dict) else None
        by = f", made by edgeqdm {describe(maker)}" if isinstance(maker, str) else ""
        raise VerifyError(
            "EQ-8103",
            f"not a package this edgeqdm reads: format {describe(found)}{by}",
            path=path,
            hint=f"expected format {FORMAT}; a package of a newer edgeqdm needs that edgeqdm",
        )
    return data, parse_record(data, Manifest, name=str(path), error=VerifyError)


def _content_faults(path: Path, artifact: Artifact) -> list[str]:
    with open_regular(path, error=VerifyError, flags=os.O_NOFOLLOW) as file:
        size = os.fstat(file.fileno()).st_size
        if size != artifact.size:
            return [f"{size} bytes, the manifest says {artifact.size}"]
        try:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as problem:
            return [f"cannot be read: {problem.strerror}"]
    return [] if sha256 == artifact.sha256 else ["content differs from the manifest (SHA-256)"]


def _onnx_faults(path: Path, relative: str, files: Mapping[str, Artifact]) -> list[str]:
    try:
        import onnx
    except ImportError as problem:
        hint = "pip install 'edgeqdm[onnxruntime]'"
        message = "checking an ONNX model needs the package onnx"
        raise UnsupportedError("EQ-4304", message, path=path, hint=hint) from problem
    model = onnx.ModelProto()
    try:
        with open_regular(path, error=VerifyError, flags=os.O_NOFOLLOW) as file:
            model.ParseFromString(file.read())
    except Exception:  # the parser's own class differs between protobuf implementations
        return ["not a readable ONNX model"]
    folder = PurePosixPath(relative).parent
    return [
        f"tensor {describe(tensor.name)}: {fault}"
        for tensor in _tensors(model)
        for fault in _tensor_faults(tensor, folder, files)
    ]


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor wherever it hides: subgraphs, functions, attributes, sparse values."""
    import onnx

    pending: list[Any] = [model]
    while pending:
        message = pending.pop()
        if isinstance(message, onnx.TensorProto):
            yield message
            continue
        for descriptor, value in message.ListFields():
            if descriptor.message_type is not None:
                pending.extend([value] if hasattr(value, "ListFields") else value)


def _tensor_faults(
    tensor: TensorProto, folder: PurePosixPath, files: Mapping[str, Artifact]
) -> list[str]:
    if len(tensor.dims) > _MAX_RANK:  # their product alone could take hours
        return [f"{len(tensor.dims)} dimensions"]
    if any(size < 0 for size in tensor.dims):
        return [f"negative dimension in {_dims(tensor)}"]
    external = tensor.data_location == tensor.EXTERNAL or len(tensor.external_data) > 0
    if not external and not tensor.HasField("raw_data"):
        return []
    needed = _n_bytes(tensor)
    if needed is None:
        return [f"data type {tensor.data_type} has no fixed size"]
    if external:
        return _external_faults(tensor, needed, folder, files)
    if len(tensor.raw_data) != needed:
        return [f"{len(tensor.raw_data)} bytes of data, {_dims(tensor)} needs {describe(needed)}"]
    return []


def _n_bytes(tensor: TensorProto) -> int | None:
    names = {number: name for name, number in tensor.DataType.items()}
    bits = _BITS.get(names.get(tensor.data_type, ""))
    return None if bits is None else (math.prod(tensor.dims) * bits + 7) // 8


def _dims(tensor: TensorProto) -> str:
    return describe(json.dumps(list(tensor.dims))).strip('"')


def _external_faults(
    tensor: TensorProto, needed: int, folder: PurePosixPath, files: Mapping[str, Artifact]
) -> list[str]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data):
        return ["external data with a duplicate key"]
    if any(isinstance(text, bytes) for pair in entries.items() for text in pair):
        return ["external data described in something else than UTF-8"]
    location = entries.get("location", "")
    fault = _path_fault(location)
    if fault:
        return [f"external data in {describe(location)}: {fault}"]
    target = str(folder / location)
    if target not in files:
        return [f"external data in {describe(target)}, which the manifest does not list"]
    offset, length = entries.get("offset", "0"), entries.get("length", str(needed))
    if not _OFFSET.fullmatch(offset) or not _OFFSET.fullmatch(length):
        place = f"offset {describe(offset)}, length {describe(length)}"
        return [f"external data at an impossible {place}"]
    if int(length) != needed:
        return [f"external data of {length} bytes, {_dims(tensor)} needs {describe(needed)}"]
    end = int(offset) + needed
    if end > files[target].size:
        return [f"external data up to byte {end} of {files[target].size}"]
    return []


def _verify_error(package: Path, faults: list[str]) -> VerifyError:
    listed = "; ".join(faults[:_MAX_LISTED])
    more = len(faults) - _MAX_LISTED
    tail = f"; and {more} more" if more > 0 else ""
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    hint = "the package is damaged or was changed: emit or copy it again"
    return VerifyError("EQ-8110", f"{count}: {listed}{tail}", path=package, hint=hint)
