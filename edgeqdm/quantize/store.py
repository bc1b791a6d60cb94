"""A quantized model as one file: packed codes, scales, tables and the float remainder."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeqdm import __version__
from edgeqdm.calibrate.trajectories import checksum
from edgeqdm.errors import InputError, OutputError, StorageError
from edgeqdm.ir.codec import digest, dump_record, parse_record
from edgeqdm.ir.precision import FP32, TABLE, ActivationPolicy
from edgeqdm.ir.quantized import QuantizedFile, StoredScales, StoredVariant, StoredWeight
from edgeqdm.ir.schedule import CorrectedSchedule, SamplerProgram
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import network_of
from edgeqdm.models.split import has_split_skips
from edgeqdm.numerics.packing import pack, unpack
from edgeqdm.numerics.ranges import ActivationScales
from edgeqdm.quantize.fold import record_tables
from edgeqdm.quantize.parameters import LayerParameters, Parameters, Variant, WeightCodes
from edgeqdm.quantize.quantizer import QuantizedDenoiser, assemble
from edgeqdm.quantize.tdq import ScaleGenerator, move_plan

_HEADER = "edgeqdm"


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        quantized: the denoiser.
        correction: of its sampler, or None.
        generator: of its temporal scales, or None.
    """

    quantized: QuantizedDenoiser
    correction: CorrectedSchedule | None
    generator: ScaleGenerator | None


def save_quantized(
    quantized: QuantizedDenoiser,
    file: Path,
    *,
    correction: CorrectedSchedule | None = None,
    generator: ScaleGenerator | None = None,
) -> int:
    """Write a quantized denoiser, whole or not at all.

    Args:
        quantized: what to store.
        file: a `.safetensors` file; replaced if it is one.
        correction: measured on this very denoiser.
        generator: of its temporal scales, for other steps; not counted among the bytes.

    Returns:
        Bytes of all tensors a device needs: codes, scales, tables and the float remainder.

    Raises:
        OutputError: if the file cannot be written.
    """
    weights, tensors = _packed_weights(quantized.parameters)
    tensors |= {f"table/{name}": table for name, table in quantized.parameters.tables.items()}
    tensors |= {f"float/{name}": tensor for name, tensor in _remainder(quantized).items()}
    variants = []
    for variant, parameters in quantized.parameters.layers.items():
        for side, scales in (("input", parameters.activation), ("output", parameters.output)):
            if scales is not None:
                tensors[f"{side}/{variant}"] = scales.scale
        variants.append(_stored_variant(variant, parameters))
    size = stored_bytes(tensors)
    tensors |= {} if generator is None else generator.tensors()
    header = QuantizedFile(
        edgeqdm_version=__version__,
        program=quantized.denoiser.program,
        guidance=quantized.denoiser.guidance.scale,
        plan=quantized.plan,
        weights=weights,
        variants=tuple(variants),
        correction=correction,
        generated=() if generator is None else generator.names,
        split_skips=has_split_skips(quantized.denoiser),
    )
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = dump_record(header).decode()
    # One entry, because several are written in random order.
    metadata = {_HEADER: f"{_sum(text, tensors)} {text}"}
    partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata)
        # The library makes files that only their owner can read.
        partial.chmod(mode)
        os.replace(partial, file)
    except (OSError, SafetensorError) as problem:
        raise OutputError(
            "EQ-7202",
            f"cannot be written: {problem}",
            path=file,
            hint="free some space or name another file",
        ) from problem
    finally:
        # A file in place of the folder makes `unlink` raise whatever it is told of missing ones.
        if partial.exists():
            partial.unlink()
    return size


def stored_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def load_quantized(file: Path, denoiser: Denoiser) -> Stored:
    """Read what `save_quantized` wrote.

    Args:
        file: the file.
        denoiser: the float model it was made from, with the same sampler and guidance.

    Raises:
        InputError: if there is no such file, or it is of another model, sampler or guidance.
        StorageError: if it is damaged or was edited.
    """
    header, tensors = _read(file)
    _require_same(header, denoiser, file)
    try:
        parameters = _parameters(header, tensors, denoiser)
        quantized = assemble(denoiser, header.plan, parameters)
        generator = ScaleGenerator.of_tensors(header.generated, tensors)
    except (KeyError, RuntimeError, ValueError) as problem:
        raise _damaged(file, f"its tensors do not fit its header: {problem}") from problem
    return Stored(quantized, header.correction, generator)


def retabulate(file: Path, denoiser: Denoiser) -> Stored:
    """A stored model for other steps of its sampler, without calibrating again.

    Generated scales are tabulated at the new timesteps, tables of embeddings recorded again, phases
    keep their spans of timesteps. A correction belongs to its steps and is left out.

    Args:
        file: what `save_quantized` wrote, with a generator if any activation is temporal.
        denoiser: the same float model and guidance with the new sampler.

    Raises:
        InputError: if the file is of another model or guidance, or its temporal scales are bound to
            their steps.
        StorageError: if it is damaged or was edited.
    """
    header, tensors = _read(file)
    _require_same(header, denoiser, file, sampler=False)
    generator = ScaleGenerator.of_tensors(header.generated, tensors)
    parameters = _parameters(header, tensors, denoiser)
    bound = [v for v in parameters.layers if v.policy is ActivationPolicy.TEMPORAL]
    if bound and generator is None:
        raise InputError(
            "EQ-3266",
            f"its temporal scales, of {bound[0].layer} for one, exist for its own steps only",
            path=file,
            hint="quantize with --mlp, or again for these steps",
        )
    if generator is not None:
        parameters = generator.tabulate(parameters, denoiser.program.timesteps)
    plan = move_plan(header.plan, header.program, denoiser.program)
    tables = record_tables(denoiser, tuple(parameters.tables))
    parameters = replace(parameters, tables=tables)
    return Stored(assemble(denoiser, plan, parameters), None, generator)


def skips_are_split(file: Path) -> bool:
    """Whether the model was quantized with split skips, see `edgeqdm.models.split`."""
    return _read(file)[0].split_skips


def _read(file: Path) -> tuple[QuantizedFile, dict[str, Tensor]]:
    if not file.is_file():
        raise InputError(
            "EQ-3260", "no such file", path=file, hint="name what `edgeqdm quantize` wrote"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise _damaged(file, "it cannot be read as what quantize writes") from problem
    if _HEADER not in metadata:
        raise InputError(
            "EQ-3261", "not a quantized model", path=file, hint="make one with `edgeqdm quantize`"
        )
    found, _, text = metadata[_HEADER].partition(" ")
    if found != _sum(text, tensors):
        raise _damaged(file, "its content is not what was written")
    name = f"{file} header"
    return parse_record(text.encode(), QuantizedFile, name=name, error=StorageError), tensors


def _sum(header: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(f"{header} {checksum(tensors)}".encode()).hexdigest()


def _damaged(file: Path, reason: str) -> StorageError:
    return StorageError(
        "EQ-6260", f"damaged: {reason}", path=file, hint="name another file, or quantize again"
    )


def _require_same(
    header: QuantizedFile, denoiser: Denoiser, file: Path, *, sampler: bool = True
) -> None:
    found = {
        "model": (header.plan.model[:12], denoiser.info.fingerprint[:12]),
        "sampler": _told_apart(header.program, denoiser.program),
        "guidance": (f"{header.guidance:g}", f"{denoiser.guidance.scale:g}"),
    }
    if not sampler:
        del found["sampler"]
    differ = [f"{k} {mine} is not {yours}" for k, (mine, yours) in found.items() if mine != yours]
    if differ:
        raise InputError(
            "EQ-3262",
            f"made from something else: {', '.join(differ)}",
            path=file,
            hint="use the model, sampler, steps, eta and guidance it was quantized for",
        )


def _told_apart(one: SamplerProgram, other: SamplerProgram) -> tuple[str, str]:
    """Both by name and by the settings in which they differ; equal if they are."""
    changed = [k for k, v in one.settings.items() if other.settings.get(k, v) != v]
    told = [
        ", ".join([program.sampler, *(f"{k} {program.settings.get(k)}" for k in changed)])
        for program in (one, other)
    ]
    if told[0] == told[1]:
        told = [digest(program)[:12] for program in (one, other)]
    return told[0], told[1]


def _packed_weights(
    parameters: Parameters,
) -> tuple[tuple[StoredWeight, ...], dict[str, Tensor]]:
    weights, tensors = {}, {}
    for variant, found in parameters.layers.items():
        weight, key = found.weight, _weight_key(variant, found.weight)
        if key in weights:
            continue
        weights[key] = StoredWeight(
            key=key,
            shape=tuple(weight.codes.shape),
            bits=weight.bits,
            group_size=weight.group_size,
        )
        if weight.scale is None:
            tensors[f"codes/{key}"] = weight.codes
            continue
        signed = weight.zero_point is None
        tensors[f"codes/{key}"] = pack(weight.codes, weight.bits, signed=signed)
        tensors[f"scale/{key}"] = weight.scale if signed else weight.scale.to(torch.float16)
        if weight.zero_point is not None:
            tensors[f"zero_point/{key}"] = pack(weight.zero_point, weight.bits, signed=False)
    return tuple(weights.values()), tensors


def _weight_key(variant: Variant, weight: WeightCodes) -> str:
    return f"{variant.layer}/w{weight.bits}g{weight.group_size}"


def _stored_variant(variant: Variant, parameters: LayerParameters) -> StoredVariant:
    def scales(found: ActivationScales | None) -> StoredScales | None:
        return None if found is None else StoredScales(zero_point=found.zero_point, bits=found.bits)

    return StoredVariant(
        layer=variant.layer,
        precision=variant.precision,
        activation=variant.policy,
        weight=_weight_key(variant, parameters.weight),
        input=scales(parameters.activation),
        output=scales(parameters.output),
    )


def _remainder(quantized: QuantizedDenoiser) -> dict[str, Tensor]:
    """Every tensor of the float network that no coded layer or table replaces."""
    assigned = [a for phase in quantized.plan.phases for a in phase.layers]
    needed = {a.layer for a in assigned if a.precision == FP32}
    coded = {f"{a.layer}.weight" for a in assigned if a.layer not in needed}
    folded = tuple(f"{a.layer}." for a in assigned if a.precision == TABLE)
    state = network_of(quantized.denoiser.module).state_dict() | dict(quantized.parameters.floats)
    return {k: v for k, v in state.items() if k not in coded and not k.startswith(folded)}


def _parameters(
    header: QuantizedFile, tensors: dict[str, Tensor], denoiser: Denoiser
) -> Parameters:
    weights = {stored.key: _unpacked(stored, tensors) for stored in header.weights}
    layers = {}
    for stored in header.variants:
        variant = Variant(stored.layer, stored.precision, stored.activation)
        input, output = (
            None
            if scales is None
            else ActivationScales(tensors[f"{side}/{variant}"], scales.zero_point, scales.bits)
            for side, scales in (("input", stored.input), ("output", stored.output))
        )
        layers[variant] = LayerParameters(weights[stored.weight], input, output)
    state = network_of(denoiser.module).state_dict()
    named = {k.removeprefix("float/"): v for k, v in tensors.items() if k.startswith("float/")}
    return Parameters(
        layers,
        {k.removeprefix("table/"): v for k, v in tensors.items() if k.startswith("table/")},
        {k: v for k, v in named.items() if not torch.equal(v, state[k])},
    )


def _unpacked(stored: StoredWeight, tensors: dict[str, Tensor]) -> WeightCodes:
    codes = tensors[f"codes/{stored.key}"]
    if stored.bits == 16:
        return WeightCodes(codes, None, None, 16)
    grouped = stored.group_size > 0
    scale = tensors[f"scale/{stored.key}"].to(torch.float32)
    zero_point = None
    if grouped:
        packed = tensors[f"zero_point/{stored.key}"]
        zero_point = unpack(packed, stored.bits, tuple(scale.shape), signed=False)
    return WeightCodes(
        unpack(codes, stored.bits, stored.shape, signed=not grouped),
        scale,
        zero_point,
        stored.bits,
        stored.group_size,
    )
