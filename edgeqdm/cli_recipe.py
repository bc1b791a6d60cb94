"""The verbs of a recipe: optimize, init."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeqdm.cli_inputs import check_free
from edgeqdm.cli_options import (
    Embeddings,
    ForceFile,
    Json,
    Model,
    Online,
    Quiet,
    Target,
    Verbose,
)
from edgeqdm.cli_output import Output, pareto_table, stage, verification_value

if TYPE_CHECKING:
    from edgeqdm.optimize import Optimized


def optimize(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="File, YAML.", show_default=False)
    ],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Instead of the file's; repeat it."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make the package again, even of the same plan.")
    ] = False,
    conditioning: Embeddings = None,
    online: Online = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Profile, search, emit and verify as a recipe says; the same command goes on.

    \b
    edgeqdm init reference:unet-fmnist -o recipe.yaml
    edgeqdm optimize recipe.yaml
    edgeqdm optimize recipe.yaml --set search.trials=200 --set search.latency=0.6x
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        progress("load", 0, 1)
        from edgeqdm.optimize import optimize as run
        from edgeqdm.recipe import read_recipe

        found = run(
            read_recipe(recipe, override or ()),
            conditioning=conditioning,
            online=online,
            force=force,
            notice=output.note,
            progress=progress,
        )
    value = {
        "profile": found.profile,
        "search": str(found.search),
        "pareto": found.report.model_dump(mode="json"),
        "package": str(found.package),
        "kept": found.kept,
        "manifest": found.verification.manifest.model_dump(mode="json"),
        "verification": verification_value(found.verification),
    }
    output.result(value, pareto_table(found.report), _package_line(found))


def _package_line(found: Optimized) -> str:
    manifest, expected = found.verification.manifest, found.plan.prediction
    megabytes = sum(file.size for file in manifest.files.values()) / 1e6
    told = f"{manifest.integer_layers} integer layers, {manifest.n_steps} steps, {megabytes:.2f} MB"
    if expected is not None:
        told += f", {expected.latency_ms:.3f} ms and {expected.image_sqnr_db:.1f} dB predicted"
    kept = ", as it was" if found.kept else ""
    return f"{found.package}: {manifest.target}, {told}, verified{kept}"


def init(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Recipe to write.")],
    target: Target = "onnxruntime",
    force: ForceFile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a recipe with every key, its default and what it means.

    \b
    edgeqdm init reference:unet-fmnist -o recipe.yaml
    edgeqdm init ./my-ddpm -o recipe.yaml
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress, stage("init", progress):
        from edgeqdm.backends import check_backend_name
        from edgeqdm.emit.writer import write_file_atomically
        from edgeqdm.recipe import parse_recipe, recipe_text

        check_free(out, force=force)
        check_backend_name(target)
        text = recipe_text(model, target=target)
        made = parse_recipe(text, name=str(out))
        write_file_atomically(out, text.encode())
    output.result(
        {"recipe": str(out), "out": made.out},
        f"{out}: edgeqdm optimize {out} makes {made.out}",
    )
