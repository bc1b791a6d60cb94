"""A quantized denoiser in, one deployable package out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.numpy import save

from edgeqdm import __version__
from edgeqdm.correct.apply import require_key
from edgeqdm.emit.backend import Backend, Exportable, File
from edgeqdm.emit.golden import Golden, make_golden
from edgeqdm.emit.integrity import MANIFEST, seal_manifest
from edgeqdm.emit.render import CPP_FOLDER, cpp_runtime, environment, python_runtime
from edgeqdm.emit.table import TABLE, pack_table
from edgeqdm.emit.writer import staged_package
from edgeqdm.errors import InputError, UnsupportedError
from edgeqdm.ir.codec import digest, dump_record, parse_record
from edgeqdm.ir.model import ModelInfo
from edgeqdm.ir.package import UNSEALED, Manifest, ScheduleFile
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.schedule import CorrectedSchedule, CorrectionKey
from edgeqdm.quantize.quantizer import QuantizedDenoiser, precision_digest

LIBRARIES = ("diffusers", "numpy", "torch")
_LISTED = 10


def correction_key(quantized: QuantizedDenoiser) -> CorrectionKey:
    """What a correction measured on this quantized denoiser is valid for."""
    denoiser = quantized.denoiser
    null = denoiser.null
    model = hashlib.sha256(digest(denoiser.info).encode())
    model.update(b"" if null is None else null.numpy().tobytes())
    return CorrectionKey(
        model=model.hexdigest(),
        sampler=digest(denoiser.program),
        guidance=denoiser.guidance.scale,
        precision=precision_digest(quantized),
    )


def check_plan(plan: DeploymentPlan, info: ModelInfo, backend: Backend) -> None:
    """Refuse a plan for another target, and what the target cannot do, layer by layer.

    Raises:
        InputError: if the plan is for another target.
        UnsupportedError: listing layer, reason and the next best.
    """
    if plan.target != backend.name:
        raise InputError(
            "EQ-3303",
            f"the plan is for target {plan.target!r}, not {backend.name!r}",
            path="plan.target",
            hint="make a plan for this target, or name the plan's",
        )
    refused = backend.check(plan, info)
    if refused:
        listed = "; ".join(str(each) for each in refused[:_LISTED])
        more = "" if len(refused) <= _LISTED else f"; {len(refused) - _LISTED} more"
        raise UnsupportedError(
            "EQ-4201",
            f"{backend.name} cannot run the plan: {listed}{more}",
            path="plan",
            hint="change these in the plan, then quantize again",
        )


def exportable(quantized: QuantizedDenoiser) -> Exportable:
    """The quantized network with an example of every graph input."""
    info = quantized.info
    inputs = {"sample": torch.zeros(2, *info.sample_shape), "step": torch.tensor(0)}
    if info.conditioning.kind == "label":
        inputs["label"] = torch.zeros(2, dtype=torch.int64)
    elif info.conditioning.kind == "embedding":
        inputs["embedding"] = torch.zeros(2, *info.conditioning.shape)
    return Exportable(quantized.network, inputs)


def emit_package(
    quantized: QuantizedDenoiser,
    backend: Backend,
    out: Path,
    *,
    correction: CorrectedSchedule | None = None,
    force: bool = False,
) -> Manifest:
    """Lower, render and write a package; it appears at `out` whole or not at all.

    Args:
        quantized: the integer denoiser.
        backend: the target, in the form that is wanted.
        out: folder to create.
        correction: of the sampler, measured on this very denoiser.
        force: replace a package that is there already.

    Raises:
        UnsupportedError: the target cannot do what the plan asks; lists layer and reason.
        InputError: the correction was measured on something else.
        OutputError: the package cannot be written.
    """
    check_plan(quantized.plan, quantized.info, backend)
    if correction is not None:
        # Valid for the network as it was measured; what a form rounds is far below its noise.
        require_key(correction, correction_key(quantized))
    quantized = replace(quantized, network=backend.rounded(quantized.network))
    golden = make_golden(quantized, correction)
    contents = _contents(quantized, backend, correction, golden)
    with staged_package(
        out, force=force, need_bytes=sum(len(file.data) for file in contents.values())
    ) as staging:
        for path, file in contents.items():
            staging.write(path, file.data, file.role)
        unsealed = Manifest(
            edgeqdm_version=__version__,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            target=backend.name,
            form=backend.form,
            model=quantized.info,
            guidance=quantized.denoiser.guidance.scale,
            n_steps=quantized.denoiser.program.n_steps,
            program_sha256=digest(quantized.denoiser.program),
            plan_sha256=hashlib.sha256(contents["plan.json"].data).hexdigest(),
            integer_layers=quantized.plan.n_integer_layers,
            library_versions={**{k: version(k) for k in LIBRARIES}, **backend.versions()},
            files=dict(staging.files),
            manifest_sha256=UNSEALED,
        )
        sealed = seal_manifest(unsealed)
        staging.seal(sealed)
    return parse_record(sealed, Manifest, name=MANIFEST)


def _contents(
    quantized: QuantizedDenoiser,
    backend: Backend,
    correction: CorrectedSchedule | None,
    golden: Golden,
) -> Mapping[str, File]:
    denoiser, info = quantized.denoiser, quantized.info
    schedule = ScheduleFile(
        program=denoiser.program,
        correction=correction,
        guidance=denoiser.guidance.scale,
        conditioning=info.conditioning,
        decoder=info.decoder,
        sample_shape=info.sample_shape,
        label_names=info.label_names,
        golden_noise_rms=golden.noise_rms,
    )
    contents = {
        "plan.json": File(dump_record(quantized.plan), "plan"),
        "schedule.json": File(dump_record(schedule), "schedule"),
        TABLE: File(pack_table(schedule), "schedule"),
        "golden.safetensors": File(save(golden.tensors), "golden"),
        "MODEL_CARD.md": File(_model_card(quantized, backend, correction).encode(), "card"),
        **{k: File(source.encode(), "runtime") for k, source in python_runtime().items()},
        **backend.emit(exportable(quantized)),
    }
    # The target's own part decides: without a network there is nothing to build.
    if any(path.startswith(f"{CPP_FOLDER}/") for path in contents):
        shared = cpp_runtime(schedule)
        contents |= {path: File(text.encode(), "runtime") for path, text in shared.items()}
    if denoiser.null_embedding is not None:
        null = {"null": denoiser.null_embedding.numpy()}
        contents["conditioning.safetensors"] = File(save(null), "schedule")
    return contents


def _model_card(
    quantized: QuantizedDenoiser, backend: Backend, correction: CorrectedSchedule | None
) -> str:
    return (
        environment()
        .get_template("MODEL_CARD.md.j2")
        .render(
            info=quantized.info,
            plan=quantized.plan,
            program=quantized.denoiser.program,
            guidance=quantized.denoiser.guidance.scale,
            correction=correction,
            target=backend.name,
            edgeqdm_version=__version__,
        )
    )
