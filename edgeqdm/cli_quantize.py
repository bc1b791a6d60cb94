"""The verbs between a model and its package: plan, quantize, finetune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeqdm.cli_inputs import (
    check_free,
    check_target,
    load_model,
    parse_activation,
    read_plan,
    refuse_idle,
    rule_precisions,
)
from edgeqdm.cli_options import (
    AskedSamples,
    AskedSeed,
    AskedTarget,
    BodyPrecision,
    EmbeddingPrecision,
    Embeddings,
    Eta,
    ForceFile,
    Guidance,
    Json,
    Model,
    NoCorrect,
    Online,
    Plan,
    Quiet,
    Samples,
    Scheduler,
    Seed,
    SplitSkips,
    Steps,
    Target,
    Verbose,
    Work,
)
from edgeqdm.cli_output import Output, quantization_table, quantization_value, stage
from edgeqdm.errors import UnsupportedError

if TYPE_CHECKING:
    from edgeqdm.ir.plan import DeploymentPlan
    from edgeqdm.models.denoiser import Denoiser
    from edgeqdm.quantize.finetune import FinetuneSettings
    from edgeqdm.quantize.reconstruct import ReconstructionSettings

OutFile = Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="File to write.")]
Minutes = Annotated[
    float | None,
    typer.Option(metavar="N", min=0.01, help="CPU minutes it may take; fewer rounds then."),
]


def plan(
    model: Model,
    out: OutFile,
    target: Target = "onnxruntime",
    precision: BodyPrecision = None,
    embedding: EmbeddingPrecision = None,
    activation: Annotated[
        str | None,
        typer.Option(metavar="A", help="Scales of activations: static, or temporal (default)."),
    ] = None,
    step_aware: Annotated[
        bool,
        typer.Option("--step-aware", help="4-bit activations where diffusion noise hides it."),
    ] = False,
    search_groups: Annotated[
        bool,
        typer.Option("--search-groups", help="A group size per layer, at the cost of 128 for all."),
    ] = False,
    split_skips: SplitSkips = False,
    scheduler: Scheduler = None,
    steps: Steps = 20,
    eta: Eta = 0.0,
    guidance: Guidance = None,
    samples: AskedSamples = None,
    seed: AskedSeed = None,
    conditioning: Embeddings = None,
    work: Work = None,
    online: Online = False,
    force: ForceFile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the precision of every layer, by rule; edit it and hand it to quantize.

    Only --step-aware and --search-groups calibrate: --samples, --seed and --work go with them.

    \b
    edgeqdm plan reference:unet-fmnist -o plan.json --precision w4a8 --embedding w8
    edgeqdm plan reference:unet-fmnist -o plan.json --activation static
    edgeqdm plan reference:dit-fmnist -o plan.json --precision w4g64a8dyn --embedding w4g64
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import pipeline
            from edgeqdm.emit.writer import check_file_destination, write_file_atomically
            from edgeqdm.ir.codec import dump_record
            from edgeqdm.stages import working_folder

            if not step_aware and not search_groups:
                refuse_idle(
                    {"--samples": samples, "--seed": seed, "--work": work},
                    "without --step-aware or --search-groups",
                    hint="a plan by rule takes no calibration",
                )
            check_target(target)
            check_free(out, force=force)
            check_file_destination(out)
            body, embedded = rule_precisions(precision, embedding)
            policy = None if activation is None else parse_activation(activation, body)
            denoiser = load_model(
                model,
                scheduler=scheduler,
                steps=steps,
                guidance=guidance,
                eta=eta,
                conditioning=conditioning,
                online=online,
                split_skips=split_skips,
            )
        found = pipeline.rule_plan(
            denoiser, target, body=body, embedding=embedded, activation=policy
        )
        runs = pipeline.DEFAULT_SAMPLES if samples is None else samples
        with working_folder(out, work) as folder:
            if step_aware or search_groups:
                calibration = pipeline.calibrate(
                    denoiser, samples=runs, seed=seed or 0, work=folder, progress=progress
                )
            if search_groups:
                found = pipeline.search_groups(
                    denoiser, calibration, found, seed=seed or 0, work=folder, progress=progress
                ).plan
            if step_aware:
                found = pipeline.step_aware_plan(
                    denoiser, calibration, found, work=folder, progress=progress
                )
            write_file_atomically(out, dump_record(found))
        refused = _refused(denoiser, found)
    output.warn_of_layers(refused, target)
    phases = [f"{p.start}..{p.stop - 1}" for p in found.phases]
    output.result(
        {
            "plan": str(out),
            "phases": phases,
            "integer_layers": found.n_integer_layers,
            "unsupported": refused,
        },
        f"{out}: {found.n_integer_layers} integer layers, phases {', '.join(phases)}",
    )


def quantize(
    model: Model,
    out: OutFile,
    plan: Plan = None,
    target: AskedTarget = None,
    precision: BodyPrecision = None,
    embedding: EmbeddingPrecision = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Learn the rounding block by block.")
    ] = False,
    iterations: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of reconstruction, per block.")
    ] = None,
    minutes: Minutes = None,
    mlp: Annotated[
        bool, typer.Option("--mlp", help="Scales from a network of the timestep (TDQ).")
    ] = False,
    split_skips: SplitSkips = False,
    scheduler: Scheduler = None,
    steps: Steps = 20,
    eta: Eta = 0.0,
    guidance: Guidance = None,
    samples: Samples = 64,
    seed: Seed = 0,
    no_correct: NoCorrect = False,
    conditioning: Embeddings = None,
    work: Work = None,
    online: Online = False,
    force: ForceFile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a model to one file of packed codes, scales and tables.

    \b
    edgeqdm quantize reference:unet-fmnist -o unet.safetensors --plan plan.json
    edgeqdm quantize reference:unet-fmnist -o unet.safetensors --precision w4a8 --reconstruct
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import pipeline

            if plan is not None:
                refuse_idle(
                    {"--precision": precision, "--embedding": embedding, "--target": target},
                    "beside --plan",
                    hint="leave the plan or the option out",
                )
            if not reconstruct:
                refuse_idle(
                    {"--iterations": iterations, "--minutes": minutes},
                    "without --reconstruct",
                    hint="add --reconstruct or leave the option out",
                )
            check_free(out, force=force)
            chosen_target = pipeline.DEFAULT_TARGET if target is None else target
            check_target(chosen_target)
            body, embedded = rule_precisions(precision, embedding)
            asked = None if plan is None else read_plan(plan)
            denoiser = load_model(
                model,
                scheduler=scheduler,
                steps=steps,
                guidance=guidance,
                eta=eta,
                conditioning=conditioning,
                online=online,
                split_skips=split_skips,
            )
            chosen = asked or pipeline.rule_plan(
                denoiser, chosen_target, body=body, embedding=embedded
            )
            check_target(chosen.target)
            refused = _refused(denoiser, chosen)
            unnamed = sorted({x.name for x in denoiser.info.layers} - _named(chosen))
        output.warn_of_layers(refused, chosen.target)
        output.note_of_layers("the plan names no precision and they stay in fp32", unnamed)
        learned = _reconstruction(iterations, minutes) if reconstruct else None
        found = pipeline.quantize_to_file(
            denoiser,
            out,
            plan=chosen,
            method=pipeline.Method(mlp=mlp, reconstruction=learned),
            samples=samples,
            seed=seed,
            correction=not no_correct,
            work=work,
            progress=progress,
        )
    output.result(quantization_value(found) | {"unsupported": refused}, quantization_table(found))


def finetune(
    model: Model,
    quantized: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What quantize wrote.", show_default=False),
    ],
    out: OutFile,
    iterations: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Rounds of training.")
    ] = None,
    minutes: Minutes = None,
    mlp: Annotated[
        bool, typer.Option("--mlp", help="Scales from a network of the timestep (TDQ).")
    ] = False,
    scheduler: Scheduler = None,
    steps: Steps = 20,
    eta: Eta = 0.0,
    guidance: Guidance = None,
    samples: Samples = 128,
    seed: Seed = 0,
    no_correct: NoCorrect = False,
    conditioning: Embeddings = None,
    work: Work = None,
    online: Online = False,
    force: ForceFile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a quantized model to do on its trajectories what the float model does; no data needed.

    \b
    edgeqdm finetune reference:dit-fmnist dit.safetensors -o tuned.safetensors --minutes 20
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import pipeline
            from edgeqdm.quantize.store import skips_are_split

            check_free(out, force=force)
            denoiser = load_model(
                model,
                scheduler=scheduler,
                steps=steps,
                guidance=guidance,
                eta=eta,
                conditioning=conditioning,
                online=online,
                split_skips=skips_are_split(quantized),
            )
        found = pipeline.finetune_file(
            denoiser,
            quantized,
            out,
            settings=_training(iterations, minutes, mlp),
            samples=samples,
            seed=seed,
            correction=not no_correct,
            work=work,
            progress=progress,
        )
    refused = _refused(denoiser, found.plan)
    output.result(quantization_value(found) | {"unsupported": refused}, quantization_table(found))


def retabulate(
    model: Model,
    quantized: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What quantize wrote.", show_default=False),
    ],
    out: OutFile,
    scheduler: Scheduler = None,
    steps: Steps = 20,
    eta: Eta = 0.0,
    guidance: Guidance = None,
    conditioning: Embeddings = None,
    online: Online = False,
    force: ForceFile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a quantized model fit other steps or another sampler, without calibrating again.

    Its scales must come from networks of the timestep (quantize --mlp). The correction of the
    sampler belongs to the old steps and is left out; emit measures one for the new steps.

    \b
    edgeqdm retabulate reference:unet-fmnist unet.safetensors -o unet50.safetensors --steps 50
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress, stage("retabulate", progress):
        from edgeqdm.quantize import store

        check_free(out, force=force)
        denoiser = load_model(
            model,
            scheduler=scheduler,
            steps=steps,
            guidance=guidance,
            eta=eta,
            conditioning=conditioning,
            online=online,
            split_skips=store.skips_are_split(quantized),
        )
        found = store.retabulate(quantized, denoiser)
        size = store.save_quantized(found.quantized, out, generator=found.generator)
    output.result(
        {"file": str(out), "steps": denoiser.program.n_steps, "stored_bytes": size},
        f"{out}: {denoiser.program.n_steps} steps, {size / 1e6:.2f} MB",
    )


def _named(plan: DeploymentPlan) -> set[str]:
    return {assignment.layer for phase in plan.phases for assignment in phase.layers}


def _refused(denoiser: Denoiser, plan: DeploymentPlan) -> list[str]:
    """Layers that emit will refuse; research needs no kernel, but should know before hours."""
    from edgeqdm import pipeline

    try:
        found = pipeline.unsupported(denoiser, plan)
    except UnsupportedError as error:
        if error.code not in ("EQ-4301", "EQ-4302"):
            raise
        return []
    return [str(each) for each in found]


def _reconstruction(iterations: int | None, minutes: float | None) -> ReconstructionSettings:
    from edgeqdm.quantize.reconstruct import ReconstructionSettings

    given = {} if iterations is None else {"iterations": iterations}
    return ReconstructionSettings(minutes=minutes, **given)


def _training(iterations: int | None, minutes: float | None, mlp: bool) -> FinetuneSettings:
    from edgeqdm.quantize.finetune import FinetuneSettings

    given = {} if iterations is None else {"iterations": iterations}
    return FinetuneSettings(minutes=minutes, temporal=mlp, **given)
