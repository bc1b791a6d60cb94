"""The verbs that look for plans: sensitivity, search, worker, pareto."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeqdm.cli_inputs import (
    check_free,
    load_model,
    load_searched,
    parse_latency,
    parse_precision,
    refuse_idle,
)
from edgeqdm.cli_options import (
    Embeddings,
    Eta,
    ForceFile,
    Guidance,
    Json,
    Model,
    Online,
    Precisions,
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
from edgeqdm.cli_output import Output, pareto_table, stage
from edgeqdm.errors import InputError

if TYPE_CHECKING:
    from edgeqdm.profile.adopt import Adopted

Profile = Annotated[
    str,
    typer.Option("--profile", metavar="FILE", help="Latencies: a file, or a name that is shipped."),
]
SearchFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of a search.", show_default=False)
]
AcceptFlags = Annotated[
    list[str] | None,
    typer.Option("--accept-flag", metavar="F", help="Use figures flagged so; repeat it."),
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Database for several workers; default SQLite in the folder."),
]


def sensitivity(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Report, JSON.")],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Heat map to write: .png or .html.")
    ] = None,
    precision: Precisions = None,
    target: Target = "onnxruntime",
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Trajectories measured on.")] = 8,
    ranges: Annotated[
        int, typer.Option(metavar="N", min=1, help="Ranges of steps for the final images.")
    ] = 5,
    scheduler: Scheduler = None,
    steps: Steps = 20,
    eta: Eta = 0.0,
    guidance: Guidance = None,
    samples: Samples = 64,
    seed: Seed = 0,
    conditioning: Embeddings = None,
    split_skips: SplitSkips = False,
    work: Work = None,
    online: Online = False,
    force: ForceFile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure what quantizing each layer costs, at every step and in the final images.

    \b
    edgeqdm sensitivity reference:unet-fmnist -o sens.json --plot sens.png
    edgeqdm sensitivity reference:dit-fmnist -o sens.json --precision w4a8 --plot sens.html
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import searching
            from edgeqdm.bench.heatmap import check_plot, draw_heatmap
            from edgeqdm.emit.writer import check_file_destination, write_file_atomically
            from edgeqdm.ir.codec import dump_record
            from edgeqdm.profile.requests import DEFAULT_PRECISIONS
            from edgeqdm.stages import calibrate, working_folder
            from edgeqdm.tuning import open_space

            for file in (out, plot):
                if file is not None:
                    check_free(file, force=force)
                    check_file_destination(file)
            if plot is not None:
                check_plot(plot.suffix)
            chosen = tuple(map(parse_precision, precision)) if precision else DEFAULT_PRECISIONS
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
            space = open_space(denoiser, target, precisions=chosen)
        with working_folder(out, work) as folder:
            calibration = calibrate(
                denoiser, samples=samples, seed=seed, work=folder, progress=progress
            )
            asked = [
                (layer, p)
                for layer, key in space.network.keys.items()
                if layer not in space.tables
                for p in space.offered[key.kind]
                if p != "fp32" and p in chosen
            ]
            found = searching.sensitivity(
                denoiser,
                calibration.observations,
                asked,
                images=images,
                ranges=ranges,
                seed=seed,
                work=folder,
                progress=progress,
            )
            write_file_atomically(out, dump_record(found))
            if plot is not None:
                write_file_atomically(plot, draw_heatmap(found, plot.suffix))
    value = {"report": str(out), "entries": len(found.entries), "plot": plot and str(plot)}
    shown = f"{out}: {len(found.entries)} layers and precisions, {found.images} trajectories"
    output.result(value, shown, *([] if plot is None else [f"heat map  {plot}"]))


def search(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the search.")],
    profile: Profile,
    trials: Annotated[int, typer.Option(metavar="N", min=1, help="Complete trials in all.")] = 100,
    latency: Annotated[
        str | None,
        typer.Option(metavar="L", help="Of a step at most: 1.5 in ms, or 0.6x of float's."),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of the graph at most.")
    ] = None,
    phases: Annotated[int, typer.Option(metavar="N", min=1, help="At most.")] = 1,
    precision: Precisions = None,
    tie: Annotated[
        str, typer.Option(metavar="T", help="Layers share a precision: layer, siblings, block.")
    ] = "siblings",
    policies: Annotated[
        bool, typer.Option("--policies", help="Choose between temporal and static scales too.")
    ] = False,
    sampler: Annotated[
        str, typer.Option(metavar="NAME", help="TPESampler, NSGAIISampler, GPSampler.")
    ] = "TPESampler",
    images: Annotated[
        int, typer.Option(metavar="N", min=2, help="Images a trial is judged on.")
    ] = 16,
    storage: Storage = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the study; default the model's.")
    ] = None,
    remeasure: Annotated[
        bool | None,
        typer.Option(
            "--remeasure/--no-remeasure",
            help="Time the front here; default whether the profile is of this machine.",
        ),
    ] = None,
    accept_flag: AcceptFlags = None,
    target: Target = "onnxruntime",
    scheduler: Scheduler = None,
    steps: Steps = 20,
    eta: Eta = 0.0,
    guidance: Guidance = None,
    samples: Samples = 64,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=2**31 - 1, help="Of calibration and search.")
    ] = 0,
    conditioning: Embeddings = None,
    split_skips: SplitSkips = False,
    online: Online = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Search a precision for every layer and phase; the same command goes on.

    \b
    edgeqdm profile reference:unet-fmnist -o host.json
    edgeqdm search reference:unet-fmnist -o search --profile host.json --trials 100
    edgeqdm pareto search
    edgeqdm emit reference:unet-fmnist -o build/unet --search search --trial best
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import searching
            from edgeqdm.profile.requests import DEFAULT_PRECISIONS

            adopted = _adopt(profile, target, accept_flag)
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
            chosen = tuple(map(parse_precision, precision)) if precision else DEFAULT_PRECISIONS
            settings = searching.checked_settings(
                target=target,
                precisions=chosen,
                tie=tie,
                phases=phases,
                policies=policies,
                latency_ms=parse_latency(
                    latency,
                    lambda: searching.float_ms(denoiser, adopted.profile, target, chosen),
                ),
                max_bytes=max_bytes,
                sampler=sampler,
                samples=samples,
                images=(4, images) if images > 4 else (images,),
                seed=seed,
                accepted_flags=adopted.accepted,
            )
        for warning in adopted.warnings:
            output.note(warning)
        found = searching.search(
            denoiser,
            out,
            adopted.profile,
            settings=settings,
            trials=trials,
            source=searching.Source(model, scheduler, split_skips),
            storage=storage,
            study=study,
            remeasure=remeasure,
            notice=output.note,
            progress=progress,
        )
    output.result(found.model_dump(mode="json"), pareto_table(found), str(out / searching.PARETO))


def worker(
    storage: Annotated[
        str,
        typer.Option(metavar="URL", help="Database, e.g. postgresql+psycopg://user@host/name."),
    ],
    study: Annotated[str, typer.Option(metavar="NAME", help="Of the study.")],
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Of the search, or a copy of it."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Where it lies here; default as it was named."),
    ] = None,
    conditioning: Embeddings = None,
    online: Online = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Take trials of a search that several processes share, until it is done.

    \b
    edgeqdm worker --storage postgresql+psycopg://me@host/edgeqdm --study unet-fmnist
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import searching

            where = searching.folder_of(storage, study) if folder is None else folder
            record = searching.read_search(where)
            denoiser = load_searched(record, model=model, conditioning=conditioning, online=online)
        done = searching.work(denoiser, where, storage, study, progress=progress)
    output.result({"study": study, "complete": done}, f"{study}: {done} trials complete")


def pareto(
    folder: SearchFolder,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plot of the front: .png, .svg or .pdf.")
    ] = None,
    trial: Annotated[
        str | None, typer.Option(metavar="T", help="Number, or best: for --plan and --step-policy.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the trial's plan, with reasons.")
    ] = None,
    step_policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the trial's phases as servers read them."),
    ] = None,
    conditioning: Embeddings = None,
    online: Online = False,
    force: ForceFile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the plans that no other beats in both latency and image error.

    \b
    edgeqdm pareto search --plot front.png
    edgeqdm pareto search --trial best --plan plan.json
    """
    output = Output(as_json, quiet, verbose)
    written = {"plot": plot, "plan": plan, "step policy": step_policy}
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import searching
            from edgeqdm.bench.heatmap import PICTURES, check_plot, draw_front
            from edgeqdm.emit.writer import check_file_destination, write_file_atomically
            from edgeqdm.ir.codec import dump_record
            from edgeqdm.ir.policy import step_policy_of

            if trial is None:
                asked = {"--plan": plan, "--step-policy": step_policy}
                refuse_idle(asked, "without --trial", hint="name a trial, or best")
            elif plan is None and step_policy is None:
                told = "name --plan or --step-policy"
                refuse_idle({"--trial": trial}, "without a file to write", hint=told)
            for file in written.values():
                if file is not None:
                    check_free(file, force=force)
                    check_file_destination(file)
            if plot is not None:
                check_plot(plot.suffix, PICTURES)
            found = searching.read_pareto(folder)
        if trial is not None:
            record = searching.read_search(folder)
            denoiser = load_searched(record, conditioning=conditioning, online=online)
            chosen = searching.plan_of_trial(denoiser, folder, trial, progress=progress)
            if plan is not None:
                write_file_atomically(plan, dump_record(chosen))
            if step_policy is not None:
                write_file_atomically(step_policy, dump_record(step_policy_of(chosen)))
        if plot is not None:
            write_file_atomically(plot, draw_front(found, plot.suffix))
    shown = [f"{name}  {file}" for name, file in written.items() if file is not None]
    output.result(found.model_dump(mode="json"), pareto_table(found), *shown)


def _adopt(source: str, target: str, accept: list[str] | None) -> Adopted:
    from edgeqdm.ir.profile import REFUSED_FLAGS, Flag
    from edgeqdm.profile.adopt import read_profile

    accepted = []
    for text in accept or []:
        if text not in REFUSED_FLAGS:
            raise InputError(
                "EQ-3809",
                f"{text!r} is no flag that figures are refused for",
                path="--accept-flag",
                hint=f"choose among {', '.join(sorted(REFUSED_FLAGS))}",
            )
        accepted.append(Flag(text))
    return read_profile(source, target=target, accept=accepted)
