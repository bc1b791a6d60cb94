"""Strict reading of safetensors: nothing is repaired, nothing is guessed.

Diffusers only warns about a missing tensor and leaves it on the meta device, and loads NaN weights
without a word. Here names, shapes and dtypes are compared from the headers alone, before any memory
is taken, and every value is tested once it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from edgeqdm.errors import ModelError, NumericalError, ResourceError
from edgeqdm.ir.codec import describe, parse_json, read_bytes

STANDARD_NAME = "diffusion_pytorch_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Attention of checkpoints older than diffusers 0.16, e.g. google/ddpm-cifar10-32.
_OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_SHOWN = 10


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of one tensor in a safetensors file."""

    file: Path
    key: str
    dtype: str
    """As safetensors spells it, e.g. `F32`."""
    shape: tuple[int, ...]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        ModelError: if it is missing, no regular file, no strict JSON, or holds something else.
    """
    value = parse_json(read_bytes(path, error=ModelError), name=str(path), error=ModelError)
    if not isinstance(value, dict):
        message = f"{path.name} must hold one object, found {describe(value)}"
        raise ModelError("EQ-3124", message, path=path)
    return value


def load_weights(module: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Copy every stored tensor into the module; float16 and bfloat16 become float32.

    Args:
        module: float32, with exactly the tensors of `stored`, as `check_weights` has made sure.
        stored: header entries by the module's state-dict names.

    Raises:
        ModelError: if a file cannot be read.
        NumericalError: if a weight is NaN or infinite.
    """
    state = module.state_dict()
    by_file: dict[Path, list[str]] = {}
    for name, entry in stored.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as tensors, torch.no_grad():
                for name in names:
                    state[name].copy_(tensors.get_tensor(stored[name].key))
        except Exception as error:
            raise _corrupt(file, error) from error
    check_finite(state)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise NumericalError if any tensor holds NaN or Inf."""
    bad = {
        name: int((~torch.isfinite(tensor)).sum())
        for name, tensor in tensors.items()
        if not bool(torch.isfinite(tensor).all())
    }
    if bad:
        found = _listed(f"{name} ({count} values)" for name, count in bad.items())
        raise NumericalError(
            "EQ-5121",
            f"weights hold NaN or Inf: {found}",
            path=next(iter(bad)),
            hint="the checkpoint is broken or overflowed in float16; export it again",
        )


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Header entries of all tensors in the safetensors files of a model folder.

    Raises:
        ModelError: if there is no such file, only pickles, or a file is corrupt.
    """
    index = folder / f"{STANDARD_NAME}.index.json"
    if index.exists():
        return _read_shards(folder, index)
    return _read_header(_single_file(folder))


def _single_file(folder: Path) -> Path:
    standard = folder / STANDARD_NAME
    if standard.is_file():
        return standard
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(
            "EQ-3126",
            f"several weight files and none is {STANDARD_NAME}: {_listed(f.name for f in found)}",
            path=folder,
            hint=f"keep one variant, or rename the one to use to {STANDARD_NAME}",
        )
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise pickle_refused(folder, _listed(pickles))
    raise ModelError("EQ-3126", "the model folder holds no safetensors file", path=folder)


def pickle_refused(path: Path, found: str) -> ModelError:
    """The error for weights that only a pickle loader could read."""
    return ModelError(
        "EQ-3126",
        f"pickle refused: the weights are stored as {found}, which can run code when loaded",
        path=path,
        hint="convert them where you trust them: model.save_pretrained(folder) of diffusers",
    )


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelError("EQ-3126", "the index has no weight_map of file names", path=index)
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            message = f"the index points outside its folder: {name!r}"
            raise ModelError("EQ-3126", message, path=index)
        stored |= _read_header(folder / name)
    misplaced = sorted(
        {k for k, f in weight_map.items() if k not in stored or stored[k].file.name != f}
        | (stored.keys() - weight_map.keys())
    )
    if misplaced:
        message = f"the index and its files disagree about {_listed(misplaced)}"
        raise ModelError("EQ-3128", message, path=index)
    return stored


def _read_header(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise ModelError("EQ-3126", f"{file.name} is missing or not a regular file", path=file)
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            return {
                key: StoredTensor(file, key, part.get_dtype(), tuple(part.get_shape()))
                for key, part in slices.items()
            }
    except Exception as error:
        raise _corrupt(file, error) from error


def _corrupt(file: Path, error: Exception) -> ModelError:
    return ModelError(
        "EQ-3127",
        f"{file.name} cannot be read, corrupt or partial download: {error}",
        path=file,
        hint="fetch or export the file again",
    )


def check_weights(
    module: nn.Module, stored: Mapping[str, StoredTensor], folder: Path
) -> dict[str, StoredTensor]:
    """Compare header entries with a module that may lie on the meta device.

    Returns:
        The entries by the module's state-dict names.

    Raises:
        ModelError: naming missing, unexpected, misshapen or mistyped tensors.
    """
    expected = module.state_dict()
    renamed = {_current_name(key, expected): entry for key, entry in stored.items()}
    _refuse(folder, "EQ-3128", "tensors are missing", expected.keys() - renamed.keys())
    _refuse(folder, "EQ-3128", "unexpected tensors", renamed.keys() - expected.keys())
    _refuse(
        folder,
        "EQ-3129",
        "tensors have the wrong shape",
        (
            f"{name} {list(renamed[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if renamed[name].shape != tuple(tensor.shape)
        ),
    )
    _check_dtypes(renamed, folder)
    return renamed


def _current_name(key: str, expected: Mapping[str, Tensor]) -> str:
    owner, _, leaf = key.rpartition(".")
    path, _, layer = owner.rpartition(".")
    current = f"{path}.{_OLD_ATTENTION.get(layer, layer)}.{leaf}"
    return current if key not in expected and current in expected else key


def _check_dtypes(stored: Mapping[str, StoredTensor], folder: Path) -> None:
    wrong = (f"{k} {e.dtype}" for k, e in stored.items() if e.dtype not in FLOAT_DTYPES)
    _refuse(folder, "EQ-3130", "tensors are neither float32, float16 nor bfloat16", wrong)
    counts: dict[str, int] = {}
    for entry in stored.values():
        counts[entry.dtype] = counts.get(entry.dtype, 0) + 1
    usual = max(counts, key=lambda dtype: counts[dtype], default="")
    odd = (f"{k} {e.dtype}" for k, e in stored.items() if e.dtype != usual)
    _refuse(folder, "EQ-3130", f"mixed dtypes, most tensors are {usual}", odd)


def _refuse(folder: Path, code: str, problem: str, found: Iterable[str]) -> None:
    found = sorted(found)
    if found:
        raise ModelError(code, f"{problem}: {_listed(found)}", path=folder)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def fingerprint(module: nn.Module, config: Mapping[str, Any]) -> str:
    """SHA-256 over sorted tensor names, dtypes, shapes and bytes, and the configuration."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, allow_nan=False).encode())
    for name, tensor in sorted(module.state_dict().items()):
        header = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(header).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor in row-major order as bytes."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def check_memory(need_bytes: int, path: Path) -> None:
    """Raise ResourceError if the process cannot be given `need_bytes` more."""
    available = available_memory_bytes()
    if available is not None and need_bytes > available:
        raise ResourceError(
            "EQ-9121",
            f"the model needs {need_bytes / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free",
            path=path,
            hint="check the sizes in config.json, or use a machine with more memory",
        )


def available_memory_bytes() -> int | None:
    """Memory this process may still take: machine, control group and RLIMIT_AS; None if unknown."""
    limits = [
        limit
        for limit in (_machine_bytes(), _cgroup_bytes(), _address_space_bytes())
        if limit is not None
    ]
    return min(limits, default=None)


def _machine_bytes() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _cgroup_bytes() -> int | None:
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if not limit or not used or not limit[0].isdigit():
        return None
    return max(0, int(limit[0]) - int(used[0]))


def _address_space_bytes() -> int | None:
    for line in _lines("/proc/self/limits"):
        if line.startswith("Max address space") and line.split()[3].isdigit():
            used = int(_lines("/proc/self/statm")[0].split()[0]) * os.sysconf("SC_PAGE_SIZE")
            return max(0, int(line.split()[3]) - used)
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
