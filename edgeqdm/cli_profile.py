"""The verbs that measure a device: profile, profile kit, profile import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from edgeqdm.cli_inputs import check_free, load_model, parse_precision
from edgeqdm.cli_options import (
    Embeddings,
    ForceFile,
    Guidance,
    Json,
    Model,
    Online,
    Precisions,
    Quiet,
    Scheduler,
    SplitSkips,
    Steps,
    Target,
    Verbose,
    Work,
)
from edgeqdm.cli_output import Output, profile_table, profile_value, stage

if TYPE_CHECKING:
    from edgeqdm.ir.precision import Precision

OutProfile = Annotated[
    Path, typer.Option("-o", "--out", metavar="FILE", help="Profile to write, JSON.")
]
Add = Annotated[bool, typer.Option("--add", help="Add to the profile that is there.")]
Wholes = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, help="Mixed networks to time whole, which the sum is fitted to."
    ),
]


class ProfileVerbs(TyperGroup):
    """`profile MODEL` measures this host; `kit` and `import` are for other devices."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["host", *args]
        return super().parse_args(context, args)


app = typer.Typer(
    cls=ProfileVerbs,
    rich_markup_mode=None,
    help="""Measure how long every operation of a model takes.

    `profile MODEL` is short for `profile host MODEL`.

    \b
    edgeqdm profile reference:unet-fmnist -o host.json              this machine
    edgeqdm profile kit reference:unet-fmnist -o kit                a folder for a device
    edgeqdm profile import kit/results-1.jsonl --kit kit -o phone.json
    """,
)


@app.command("host")
def host(
    model: Model,
    out: OutProfile,
    target: Target = "onnxruntime",
    threads: Annotated[int, typer.Option(metavar="N", min=1, max=256, help="Of the runtime.")] = 1,
    precision: Precisions = None,
    wholes: Wholes = 16,
    name: Annotated[
        str, typer.Option(metavar="TEXT", help="Of the device; default its processor.")
    ] = "",
    power_mode: Annotated[
        str, typer.Option(metavar="TEXT", help="As it shall stand in the profile.")
    ] = "unknown",
    seconds: Annotated[
        float, typer.Option(metavar="N", min=0.05, help="Least time per graph.")
    ] = 1.0,
    add: Add = False,
    scheduler: Scheduler = None,
    steps: Steps = 20,
    guidance: Guidance = None,
    conditioning: Embeddings = None,
    split_skips: SplitSkips = False,
    work: Work = None,
    online: Online = False,
    force: ForceFile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure this machine.

    With one thread it counts CPU time, which other programs disturb little; with more it counts
    elapsed time: leave the machine alone.

    \b
    edgeqdm profile reference:unet-fmnist -o host.json
    edgeqdm profile reference:dit-fmnist -o host.json --add
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import tuning

            if not add:
                check_free(out, force=force)
            chosen = _precisions(precision)
            denoiser = load_model(
                model,
                scheduler=scheduler,
                steps=steps,
                guidance=guidance,
                eta=0.0,
                conditioning=conditioning,
                online=online,
                split_skips=split_skips,
            )
        found = tuning.profile_host(
            denoiser,
            out,
            target=target,
            threads=threads,
            precisions=chosen,
            wholes=wholes,
            power_mode=power_mode,
            name=name,
            seconds=seconds,
            add=add,
            work=work,
            progress=progress,
        )
        fitted = tuning.fit_latency(found, tuning.network_keys(denoiser))
    output.result(profile_value(out, found, fitted), profile_table(found, fitted), str(out))


@app.command()
def kit(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to create.")],
    target: Target = "onnxruntime",
    precision: Precisions = None,
    wholes: Wholes = 16,
    missing_from: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Leave out what this profile, or name, has already."),
    ] = None,
    scheduler: Scheduler = None,
    steps: Steps = 20,
    guidance: Guidance = None,
    conditioning: Embeddings = None,
    split_skips: SplitSkips = False,
    online: Online = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a folder of small graphs and the tool that times them on a device.

    \b
    edgeqdm profile kit reference:unet-fmnist -o kit
    python kit/bench.py                              on the device, then copy results-1.jsonl back
    edgeqdm-bench kit                                the same where there is no Python
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import tuning
            from edgeqdm.emit.writer import check_folder_destination
            from edgeqdm.ir.profile import REFUSED_FLAGS
            from edgeqdm.profile.adopt import read_profile

            check_folder_destination(out)
            chosen = _precisions(precision)
            have = None
            if missing_from is not None:
                have = read_profile(missing_from, target=target, accept=REFUSED_FLAGS).profile
            denoiser = load_model(
                model,
                scheduler=scheduler,
                steps=steps,
                guidance=guidance,
                eta=0.0,
                conditioning=conditioning,
                online=online,
                split_skips=split_skips,
            )
        found = tuning.write_kit(
            denoiser,
            out,
            target=target,
            precisions=chosen,
            wholes=wholes,
            missing_from=have,
            progress=progress,
        )
    value = {"kit": str(out), "graphs": len(found.graphs), "target": found.target}
    told = f"{out}: {len(found.graphs)} graphs for {found.target}"
    output.result(value, f"{told}; run {out}/bench.py or edgeqdm-bench there")


@app.command("import")
def import_(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="What bench.py or edgeqdm-bench wrote.")
    ],
    kit: Annotated[Path, typer.Option(metavar="DIR", help="The kit it ran.")],
    out: OutProfile,
    add: Add = False,
    force: ForceFile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check what a device has measured and make a profile of it.

    \b
    edgeqdm profile import results-1.jsonl --kit kit -o phone.json
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress, stage("import", progress):
        from edgeqdm import tuning

        if not add:
            check_free(out, force=force)
        found = tuning.import_results(results, kit, out, add=add)
    output.result(profile_value(out, found, None), profile_table(found, None), str(out))


def _precisions(given: list[str] | None) -> tuple[Precision, ...]:
    from edgeqdm.profile.requests import DEFAULT_PRECISIONS

    return tuple(parse_precision(text) for text in given) if given else DEFAULT_PRECISIONS
