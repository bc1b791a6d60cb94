"""From a diffusers folder, a hub id or a module of your own to a `Denoiser`.

Nothing here unpickles, unpacks or runs code that comes with a model, and nothing is downloaded
unless it is asked for.
"""

from __future__ import annotations

import importlib.resources
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from edgeqdm.errors import InputError, ModelError, ResourceError, UnsupportedError
from edgeqdm.ir.codec import describe, read_record
from edgeqdm.ir.model import Conditioning, Decoder, ModelInfo
from edgeqdm.ir.record import Record
from edgeqdm.models.denoiser import (
    Denoiser,
    EmbeddingAdapter,
    LabelAdapter,
    UnconditionalAdapter,
    assemble,
    check_embeddings,
    check_guidance,
    check_scheduler,
)
from edgeqdm.models.layers import Adapter
from edgeqdm.models.sampler import compile_sampler, scheduler_from_name
from edgeqdm.models.weights import (
    PICKLE_SUFFIXES,
    check_memory,
    check_weights,
    fingerprint,
    load_weights,
    pickle_refused,
    read_headers,
    read_object,
)

SIDECAR = "edgeqdm.json"
FAMILIES: dict[str, Any] = {
    "DiTTransformer2DModel": diffusers.DiTTransformer2DModel,
    "UNet2DConditionModel": diffusers.UNet2DConditionModel,
    "UNet2DModel": diffusers.UNet2DModel,
}

_ADAPTERS: dict[str, type[Adapter]] = {
    "none": UnconditionalAdapter,
    "label": LabelAdapter,
    "embedding": EmbeddingAdapter,
}
_REFERENCE = "reference:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z")
_MAX_BLOCKS = 1000
_COUNTS = ("num_layers", "layers_per_block", "transformer_layers_per_block")
# What a network was trained with; a sampler that assumes something else samples noise.
_TRAINED_WITH = (
    "prediction_type",
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
)
# Inputs beside sample, timestep and one conditioning tensor that these options switch on.
_EXTRA_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "quantization_config",
)
# Not fetched from the hub: a denoiser needs none of them, and text encoders are large.
_UNUSED_COMPONENTS = (
    "vae",
    "vqvae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)


class ReferenceSidecar(Record):
    """`edgeqdm.json` beside `model_index.json`: what diffusers has no field for."""

    name: str = ""
    """Empty for the name of the folder."""
    n_labels: int | None = None
    """Labels a user may ask for; the network's class table may have more rows."""
    labels: tuple[str, ...] = ()
    """Their names; none or `n_labels`."""
    null_label: int | None = None
    decoder: Decoder = Decoder()
    guidance: float = 1.0
    """Used where no guidance is asked for."""
    licence: str = "unknown"


@dataclass(frozen=True)
class _Source:
    """Where the parts of a model lie."""

    root: Path
    network: Path
    scheduler: Path | None
    name: str


@dataclass(frozen=True)
class _Architecture:
    """`config.json` of a network of a known family, every key known."""

    family: str
    given: Mapping[str, Any]
    """Constructor arguments that the file sets."""
    path: Path

    def get(self, key: str) -> Any:
        """The argument, its default where the file does not set it, None where there is none."""
        if key in self.given:
            return self.given[key]
        parameter = inspect.signature(FAMILIES[self.family]).parameters.get(key)
        return None if parameter is None else parameter.default


def load(
    source: str | Path,
    *,
    scheduler: str | SchedulerMixin | None = None,
    steps: int = 20,
    guidance: float | None = None,
    eta: float = 0.0,
    conditioning: Tensor | None = None,
    null_conditioning: Tensor | None = None,
    revision: str | None = None,
    local_files_only: bool = True,
) -> Denoiser:
    """Load a denoiser and compile its sampler.

    Args:
        source: `reference:NAME`, a diffusers pipeline folder, a folder with `config.json` and
            safetensors, or a hub id `org/name`.
        scheduler: None for the one in the folder, the name of another one with the same noise
            schedule, or a diffusers scheduler.
        steps: denoising steps S.
        guidance: scale of classifier-free guidance; None for the model's own, else 1 (off).
        eta: DDIM noise, 0 is deterministic and 1 is DDPM.
        conditioning: embeddings float [N, L, D] of a `UNet2DConditionModel`; calibration draws
            from them.
        null_conditioning: embedding [L, D] of "no prompt", needed with guidance.
        revision: hub commit to use, best as a full hash.
        local_files_only: with False, a hub id that is not cached is downloaded.

    Raises:
        ModelError: if files are missing, corrupt, of an unknown kind, pickled, or hold code.
        InputError: if guidance is asked for and there is nothing to guide away from.
        UnsupportedError: if the network needs inputs that are not supplied here.
        NumericalError: if weights or outputs are not finite.
        ResourceError: if the model does not fit into memory.
    """
    found = _find(_resolve(source, revision, local_files_only), str(source))
    sidecar = _read_sidecar(found)
    architecture = _read_architecture(found.network)
    network = _read_network(architecture)
    known = _conditioning(architecture, sidecar, conditioning)
    info = ModelInfo(
        name=sidecar.name or found.name,
        family=architecture.family,
        sample_shape=_sample_shape(architecture),
        conditioning=known,
        decoder=sidecar.decoder,
        layers=(),
        fingerprint=fingerprint(network, architecture.given),
        label_names=sidecar.labels,
        licence=sidecar.licence,
    )
    return assemble(
        _ADAPTERS[known.kind](network),
        info,
        compile_sampler(_scheduler(scheduler, found), steps, eta=eta),
        check_guidance(sidecar.guidance if guidance is None else guidance),
        check_embeddings(conditioning, "conditioning"),
        check_embeddings(null_conditioning, "null_conditioning"),
    )


def reference_names() -> tuple[str, ...]:
    """Names of the models that ship with this package."""
    folder = _reference_folder()
    return tuple(sorted(p.parent.name for p in folder.glob("*/model_index.json")))


def _reference_folder() -> Path:
    return Path(str(importlib.resources.files("edgeqdm.models.reference")))


def _resolve(source: str | Path, revision: str | None, local_files_only: bool) -> Path:
    text = str(source)
    if text.startswith(_REFERENCE):
        name = text.removeprefix(_REFERENCE)
        if name not in reference_names():
            known = ", ".join(reference_names()) or "none"
            message = f"no reference model is called {describe(name)}"
            raise ModelError("EQ-3121", message, path=text, hint=f"there are: {known}")
        return _reference_folder() / name
    path = Path(source)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise ModelError("EQ-3121", f"not a usable path: {error}", path=text) from error
    if exists:
        return path
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and not path.is_symlink():
        return _fetch(source, revision, local_files_only)
    raise ModelError(
        "EQ-3121",
        "no such model folder",
        path=text,
        hint="give a diffusers folder, a hub id org/name, or reference:NAME",
    )


def _fetch(hub_id: str, revision: str | None, local_files_only: bool) -> Path:
    attempts = (True,) if local_files_only else (True, False)
    problem: Exception | None = None
    for local in attempts:
        try:
            folder = diffusers.DiffusionPipeline.download(
                hub_id,
                revision=revision,
                use_safetensors=True,
                local_files_only=local,
                **dict.fromkeys(_UNUSED_COMPONENTS),
            )
            return Path(folder)
        except Exception as error:
            problem = error
    where = "in the local hub cache" if local_files_only else "in the hub cache nor on the hub"
    download = "load(..., local_files_only=False) downloads it"
    raise ModelError(
        "EQ-3139",
        f"{hub_id} is neither a folder nor {where} ({type(problem).__name__})",
        path=hub_id,
        hint=download if local_files_only else "check the name and the network",
    ) from problem


def _find(folder: Path, source: str) -> _Source:
    if not folder.is_dir():
        raise _not_a_folder(folder)
    if (folder / "model_index.json").exists():
        network = _network_folder(folder)
        root, scheduler = folder, folder / "scheduler"
        _refuse_code(network)
    elif (folder / "config.json").exists():
        network, scheduler = folder, folder.resolve().parent / "scheduler"
        root = scheduler.parent if scheduler.is_dir() else folder
    else:
        _refuse_code(folder)
        raise ModelError(
            "EQ-3121", "the folder has neither model_index.json nor config.json", path=folder
        )
    _refuse_code(folder)
    name = source if _HUB_ID.fullmatch(source) else root.resolve().name
    return _Source(root, network, scheduler if scheduler.is_dir() else None, name)


def _not_a_folder(path: Path) -> ModelError:
    suffix = path.suffix.lower()
    if suffix in _ARCHIVES:
        message, hint = "a model is a folder, this is an archive", "unpack it yourself"
        return ModelError("EQ-3122", message, path=path, hint=hint)
    if suffix in PICKLE_SUFFIXES:
        return pickle_refused(path, path.name)
    hint = "give the folder that holds config.json or model_index.json"
    return ModelError("EQ-3122", "a model is a folder, this is a file", path=path, hint=hint)


def _refuse_code(folder: Path) -> None:
    code = sorted(p.name for pattern in ("*.py", "*/*.py") for p in folder.glob(pattern))
    if code:
        raise ModelError(
            "EQ-3123",
            f"custom code refused: {', '.join(code[:10])}",
            path=folder,
            hint="build the module in your own program and pass it to edgeqdm.wrap",
        )


def _network_folder(root: Path) -> Path:
    index = read_object(root / "model_index.json")
    parts = [part for part in ("unet", "transformer") if part in index]
    if len(parts) != 1:
        components = ", ".join(sorted(k for k in index if not k.startswith("_")))
        message = f"model_index.json must name one unet or transformer, it names: {components}"
        raise ModelError("EQ-3125", message, path=root)
    folder = root / parts[0]
    found = read_object(folder / "config.json").get("_class_name")
    entry = index[parts[0]]
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] != found:
        message = f"model_index.json says {describe(entry)}, config.json says {describe(found)}"
        raise ModelError("EQ-3125", message, path=folder)
    if entry[0] != "diffusers":
        message = f"custom code refused: {parts[0]} comes from {describe(entry[0])}"
        raise ModelError("EQ-3123", message, path=root)
    return folder


def _read_sidecar(source: _Source) -> ReferenceSidecar:
    path = source.root / SIDECAR
    if not path.exists():
        return ReferenceSidecar()
    return read_record(path, ReferenceSidecar, error=ModelError)


def _read_architecture(folder: Path) -> _Architecture:
    path = folder / "config.json"
    config = read_object(path)
    family = config.get("_class_name")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(
            "EQ-3125",
            f"unknown class {describe(family)}",
            path=path,
            hint=f"known: {', '.join(FAMILIES)}; pass other modules to edgeqdm.wrap",
        )
    for key in _EXTRA_INPUTS:
        if config.get(key) is not None:
            message = f"{key} = {describe(config[key])} is not supported"
            raise UnsupportedError("EQ-4121", message, path=path)
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    _refuse_unknown_keys(given, _parameters(FAMILIES[family]), path)
    return _Architecture(family, given, path)


def _parameters(owner: type) -> set[str]:
    return set(inspect.signature(owner).parameters)


def _refuse_unknown_keys(config: Mapping[str, Any], known: set[str], path: Path) -> None:
    unknown = sorted(k for k in config if not k.startswith("_") and k not in known)
    if unknown:
        raise ModelError(
            "EQ-3125",
            f"unknown key {', '.join(unknown[:10])} in {path.name}",
            path=path,
            hint="diffusers would ignore it; remove it or correct its name",
        )


def _read_network(architecture: _Architecture) -> nn.Module:
    folder = architecture.path.parent
    height, width = _sample_shape(architecture)[1:]
    _check_depth(architecture)
    outline = _build(architecture, "meta")
    parts = [*outline.parameters(), *outline.buffers()]
    first_width = max(_integers(architecture.get("block_out_channels"))[:1], default=1)
    # At least the weights and the first activation of two samples.
    n_values = sum(p.numel() for p in parts) + 2 * first_width * height * width
    check_memory(4 * n_values, architecture.path)
    stored = check_weights(outline, read_headers(folder), folder)
    network = _build(architecture, "cpu")
    load_weights(network, stored)
    return network


def _check_depth(architecture: _Architecture) -> None:
    for key in _COUNTS:
        blocks = sum(_integers(architecture.get(key)))
        if blocks > _MAX_BLOCKS:
            message = f"{key} asks for {blocks} blocks, more than {_MAX_BLOCKS}"
            raise ResourceError("EQ-9121", message, path=architecture.path)


def _integers(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return [n for item in value for n in _integers(item)]
    return [value] if isinstance(value, int) else []


def _build(architecture: _Architecture, device: str) -> nn.Module:
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            network: nn.Module = FAMILIES[architecture.family](**architecture.given)
            return network.eval().requires_grad_(False)
    except Exception as error:
        # Torch has no error of its own for either: the text is all there is.
        if isinstance(error, MemoryError) or re.search("overflow|allocat", str(error).lower()):
            message = "the sizes in config.json do not fit into memory"
            raise ResourceError("EQ-9121", message, path=architecture.path) from error
        message = f"the network cannot be built from config.json: {error}"
        raise ModelError("EQ-3125", message, path=architecture.path) from error


def _sample_shape(architecture: _Architecture) -> tuple[int, int, int]:
    size, channels = architecture.get("sample_size"), architecture.get("in_channels")
    sizes = size if isinstance(size, list) else [size, size]
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in [channels, *sizes]):
        found = f"sample_size {describe(size)}, in_channels {describe(channels)}"
        raise ModelError("EQ-3125", f"{found} must be positive integers", path=architecture.path)
    outputs = architecture.get("out_channels")
    if outputs not in (None, channels, 2 * channels):
        message = f"{channels} channels in and {outputs} out: neither a mean nor mean and variance"
        raise UnsupportedError("EQ-4121", message, path=architecture.path)
    factor = _size_factor(architecture)
    if any(n % factor for n in sizes):
        message = f"sample size {sizes[0]} x {sizes[1]} is not divisible by {factor}"
        raise ModelError("EQ-3125", message, path=architecture.path)
    return channels, sizes[0], sizes[1]


def _size_factor(architecture: _Architecture) -> int:
    if architecture.family == "UNet2DModel":
        return int(2 ** max(0, len(_integers(architecture.get("block_out_channels"))) - 1))
    patch = architecture.get("patch_size")
    return patch if isinstance(patch, int) and patch > 0 else 1


def _conditioning(
    architecture: _Architecture, sidecar: ReferenceSidecar, embeddings: Tensor | None
) -> Conditioning:
    path = architecture.path
    if architecture.family == "UNet2DConditionModel":
        return _embedding_conditioning(architecture, embeddings)
    if embeddings is not None:
        message = f"{architecture.family} takes no embeddings as conditioning"
        raise InputError("EQ-3135", message, path=path)
    if architecture.family == "DiTTransformer2DModel":
        n_labels = null_label = architecture.get("num_embeds_ada_norm")
        rows = n_labels + 1
    else:
        rows = n_labels = architecture.get("num_class_embeds")
        null_label = None
    if rows is None:
        return Conditioning(kind="none")
    n_labels = n_labels if sidecar.n_labels is None else sidecar.n_labels
    null_label = null_label if sidecar.null_label is None else sidecar.null_label
    _check_labels(sidecar.labels, rows, n_labels, null_label, path)
    return Conditioning(kind="label", n_labels=n_labels, null_label=null_label)


def _check_labels(
    names: tuple[str, ...], rows: int, n_labels: int, null_label: int | None, path: Path
) -> None:
    if not 0 < n_labels <= rows or not (null_label is None or 0 <= null_label < rows):
        found = f"n_labels {n_labels} and null_label {null_label}"
        message = f"{found} do not fit a class table of {rows} rows"
        raise ModelError("EQ-3140", message, path=path)
    if names and len(names) != n_labels:
        message = f"{len(names)} label names for {n_labels} labels"
        raise ModelError("EQ-3140", message, path=path)


def _embedding_conditioning(architecture: _Architecture, embeddings: Tensor | None) -> Conditioning:
    path = architecture.path
    if architecture.get("num_class_embeds") is not None:
        message = "labels beside embeddings (num_class_embeds) are not supported"
        raise UnsupportedError("EQ-4122", message, path=path)
    width = architecture.get("cross_attention_dim")
    if embeddings is None:
        raise InputError(
            "EQ-3135",
            "UNet2DConditionModel needs embeddings as conditioning",
            path=path,
            hint=f"load(..., conditioning=tensor [N, L, {width}]), e.g. encoded prompts",
        )
    if embeddings.ndim != 3 or (isinstance(width, int) and embeddings.shape[2] != width):
        message = f"conditioning has shape {list(embeddings.shape)} instead of [N, L, {width}]"
        raise InputError("EQ-3135", message, path=path)
    return Conditioning(kind="embedding", shape=tuple(embeddings.shape[1:]))


def _scheduler(wanted: Any, source: _Source) -> Any:
    if source.scheduler is None:
        if wanted is None or isinstance(wanted, str):
            raise ModelError(
                "EQ-3131",
                "there is no scheduler folder, so the noise schedule is unknown",
                path=source.network,
                hint="pass a diffusers scheduler: load(..., scheduler=DDIMScheduler(...))",
            )
        return check_scheduler(wanted)
    own = _read_scheduler(source.scheduler)
    if wanted is None:
        return own
    if isinstance(wanted, str):
        return scheduler_from_name(wanted, own.config)
    _check_same_training(check_scheduler(wanted), own, source.root)
    return wanted


def _check_same_training(wanted: Any, own: Any, root: Path) -> None:
    differing = [
        f"{key} of the scheduler is {describe(wanted.config[key])}, the model was trained with "
        f"{describe(own.config[key])}"
        for key in _TRAINED_WITH
        if key in wanted.config and key in own.config and wanted.config[key] != own.config[key]
    ]
    if differing:
        raise ModelError(
            "EQ-3132",
            "; ".join(differing),
            path=root,
            hint="make it with from_config of the model's own scheduler, or give it by name",
        )


def _read_scheduler(folder: Path) -> Any:
    path = folder / "scheduler_config.json"
    config = read_object(path)
    name = config.get("_class_name")
    owner = _scheduler_class(name)
    if owner is None:
        raise ModelError("EQ-3131", f"unknown scheduler class {describe(name)}", path=path)
    # Diffusers keeps the keys of the scheduler a configuration was converted from.
    relatives = (_scheduler_class(relative) for relative in owner._compatibles)
    known = _parameters(owner).union(*(_parameters(r) for r in relatives if r is not None))
    _refuse_unknown_keys(config, known, path)
    try:
        return owner.from_config(config)
    except Exception as error:
        message = f"{name} cannot be built from its configuration: {error}"
        raise ModelError("EQ-3131", message, path=path) from error


def _scheduler_class(name: Any) -> Any:
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, SchedulerMixin) else None
