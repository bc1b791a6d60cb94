"""The command line: every verb is one call of `edgeqdm.pipeline`.

torch and diffusers are imported inside the verbs, so that help and errors of usage come at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import edgeqdm
from edgeqdm import cli_profile, cli_quantize, cli_recipe, cli_search, cli_signals
from edgeqdm.cli_inputs import load_model, package_settings, read_plan, refuse_idle
from edgeqdm.cli_options import (
    MAX_SEED,
    AskedSamples,
    AskedSeed,
    Embeddings,
    Eta,
    Fid,
    Force,
    Guidance,
    Json,
    Model,
    NoCorrect,
    Online,
    Package,
    Plan,
    Quiet,
    Scheduler,
    SplitSkips,
    Steps,
    Target,
    Verbose,
    Work,
)
from edgeqdm.cli_output import (
    Output,
    bench_table,
    findings_table,
    guarded,
    stage,
    verification_table,
    verification_value,
    write,
)


class Verbs(TyperGroup):
    """All verbs; each ends with an exit code of edgeqdm/errors.py and at most one line."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> NoReturn:
        given = list(sys.argv[1:] if args is None else args) or ["--help"]
        # Read here too, because an error of usage comes before any option has been parsed.
        as_json = "--json" in given
        verbose = any(text == "--verbose" or text.startswith("-v") for text in given)
        sys.exit(guarded(lambda: self._run(given), as_json=as_json, verbose=verbose))

    def _run(self, given: list[str]) -> None:
        cli_signals.forget()
        try:
            # typer.Exit is how --help and --version end.
            with contextlib.suppress(typer.Exit), self.make_context("edgeqdm", given) as context:
                self.invoke(context)
        except Exception as error:
            if (stopped := cli_signals.sent()) is not None:
                raise stopped from error
            raise


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Console entry point."""
    cli_signals.listen()
    _yield_soon()
    # A name that the terminal's encoding lacks is no reason to fail at the very end.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


def _yield_soon() -> None:
    """Let torch's waiting threads give way to others after microseconds, unless the user set it.

    A thread that spins holds the core that the one it waits for needs. On an x86-64 machine with
    one of its two cores taken by another program, 500 small convolutions in torch took 13 s with
    GNU OpenMP's own count and 1.2 s with this one; with both cores free, 0.7 s each. Machines with
    more cores were not measured; another OpenMP does not read it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _version(wanted: bool) -> None:
    if wanted:
        write(f"edgeqdm {edgeqdm.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Put diffusion models on edge devices as real integer packages.

    \b
    edgeqdm demo                                      the whole chain on a small model
    edgeqdm emit reference:unet-fmnist -o build/unet  make a package
    edgeqdm verify build/unet                         check it
    edgeqdm run build/unet -o sheet.png               sample from it, without torch

    Exit codes: 0 ok, 2 usage, 3 input, 4 unsupported, 5 numerical, 6 saved state, 7 output,
    8 verification, 9 memory or time, 10 internal error, 130 Ctrl-C, 143 SIGTERM.
    """


@app.command()
def doctor(as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """What this machine can build, verify and run.

    \b
    edgeqdm doctor
    edgeqdm doctor --json
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress, stage("doctor", progress):
        from edgeqdm import pipeline

        found = pipeline.doctor()
    entries = [{"what": f.what, "found": f.found, "ok": f.ok, "hint": f.hint} for f in found]
    output.result({"ok": all(f.ok for f in found), "findings": entries}, findings_table(found))


app.command()(cli_quantize.plan)
app.command()(cli_quantize.quantize)
app.command()(cli_quantize.finetune)
app.command()(cli_quantize.retabulate)
app.add_typer(cli_profile.app, name="profile")
app.command()(cli_search.sensitivity)
app.command()(cli_search.search)
app.command()(cli_search.pareto)
app.command()(cli_search.worker)
app.command()(cli_recipe.init)
app.command()(cli_recipe.optimize)


@app.command()
def emit(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to create.")],
    quantized: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What quantize or finetune wrote; default quantize now."),
    ] = None,
    target: Target = "onnxruntime",
    form: Annotated[str, typer.Option(metavar="F", help="standard, small, ort, npu.")] = "standard",
    scheduler: Scheduler = None,
    steps: Steps = 20,
    eta: Eta = 0.0,
    guidance: Guidance = None,
    samples: AskedSamples = None,
    seed: AskedSeed = None,
    plan: Plan = None,
    search: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take the plan of a search.")
    ] = None,
    trial: Annotated[
        str | None, typer.Option(metavar="T", help="Of the search: best (default) or a number.")
    ] = None,
    split_skips: SplitSkips = False,
    no_correct: NoCorrect = False,
    conditioning: Embeddings = None,
    work: Work = None,
    force: Force = False,
    online: Online = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a model, correct its sampler, write a package.

    \b
    edgeqdm emit reference:unet-fmnist -o build/unet
    edgeqdm emit reference:unet-fmnist -o build/fast --search search --form small
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import pipeline
            from edgeqdm.quantize.store import skips_are_split

            if quantized is not None:
                asked = {"--split-skips": split_skips or None}
                refuse_idle(asked, "beside --quantized", hint="leave it out: the file remembers")
            if search is None:
                refuse_idle({"--trial": trial}, "without --search", hint="name the search")
            else:
                others = {"--plan": plan, "--quantized": quantized}
                refuse_idle(others, "beside --search", hint="a search's trial is a plan")
                given = {"--samples": samples, "--seed": seed, "--work": work}
                refuse_idle(given, "beside --search", hint="those of the search are taken")
            chosen = None if plan is None else read_plan(plan)
            denoiser = load_model(
                model,
                scheduler=scheduler,
                steps=steps,
                guidance=guidance,
                eta=eta,
                conditioning=conditioning,
                online=online,
                split_skips=split_skips if quantized is None else skips_are_split(quantized),
            )
        if search is not None:
            from edgeqdm import searching

            record = searching.read_search(search)
            chosen = searching.plan_of_trial(denoiser, search, trial or "best", progress=progress)
            samples, seed = record.settings.samples, record.settings.seed
            work = search / searching.KEPT
        manifest = pipeline.emit(
            denoiser,
            out,
            quantized=quantized,
            target=target,
            form=form,
            samples=samples,
            seed=seed,
            plan=chosen,
            correction=not no_correct,
            work=work,
            force=force,
            progress=progress,
        )
    megabytes = sum(file.size for file in manifest.files.values()) / 1e6
    output.result(
        {"package": str(out), "manifest": manifest.model_dump(mode="json")},
        f"{out}: {manifest.target}, {manifest.integer_layers} integer layers, "
        f"{manifest.n_steps} steps, {megabytes:.2f} MB",
    )


@app.command()
def verify(
    package: Package, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Check a package: files, integer kernels, golden run.

    Exit code 0, or 8 if anything is not as the package says.

    \b
    edgeqdm verify build/unet
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress, stage("verify", progress):
        from edgeqdm import pipeline

        found = pipeline.verify(package)
    value = {"package": str(package), **verification_value(found)}
    output.result(value, verification_table(found))


@app.command()
def run(
    package: Package,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="PNG to write.")],
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Of the noise.")] = 0,
    label: Annotated[
        str | None, typer.Option(help="Label or labels, by number or name: 3 or 3,5 or Bag.")
    ] = None,
    count: Annotated[int | None, typer.Option(metavar="N", min=1, help="Number of images.")] = None,
    embedding: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One embedding per image, .npy.")
    ] = None,
    threads: Annotated[
        int, typer.Option(metavar="N", min=1, max=256, help="Threads of the runtime.")
    ] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Sample with a package's own runtime, without torch.

    \b
    edgeqdm run build/unet -o sheet.png
    edgeqdm run build/unet -o bags.png --label Bag --count 8 --seed 3
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress, stage("run", progress):
        # pipeline imports torch, which takes longer than the sampling.
        from edgeqdm.emit import launch

        report = launch.run(
            package,
            out,
            seed=seed,
            label=label,
            count=count,
            embedding=embedding,
            threads=threads,
        )
    output.result({"picture": str(out), "report": report}, report)


@app.command()
def bench(
    package: Package,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What it was made from; default by name.")
    ] = None,
    scheduler: Scheduler = None,
    conditioning: Embeddings = None,
    online: Online = False,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Timed steps.")] = 60,
    images: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images compared with the float model.")
    ] = 16,
    fid: Fid = 0,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Report to write, JSON.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a package beside its float model.

    Steps, guidance and eta are the package's; a sampler that is not the model's own has to be
    named again.

    \b
    edgeqdm bench build/unet -o bench.json
    edgeqdm bench build/ddpm --model ./my-ddpm --scheduler ddim
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import pipeline
            from edgeqdm.emit.writer import check_file_destination, write_file_atomically
            from edgeqdm.ir.codec import dump_record

            if out is not None:
                check_file_destination(out)
            settings = package_settings(package)
            denoiser = load_model(
                model or settings.shipped_model(),
                scheduler=scheduler,
                steps=settings.steps,
                guidance=settings.guidance,
                eta=settings.eta,
                conditioning=conditioning,
                online=online,
                split_skips=settings.split_skips,
            )
        report = pipeline.bench(
            package, model=denoiser, rounds=rounds, images=images, fid=fid, progress=progress
        )
        if out is not None:
            write_file_atomically(out, dump_record(report))
    output.result(report.model_dump(mode="json"), bench_table(report))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for results.")] = (
        Path("build/demo")
    ),
    fid: Fid = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Emit, verify, run and measure the model that is shipped.

    \b
    edgeqdm demo
    edgeqdm demo -o build/demo --fid 1000 --force
    """
    output = Output(as_json, quiet, verbose)
    with output.working() as progress:
        with stage("load", progress):
            from edgeqdm import pipeline
        found = pipeline.demo(out, fid=fid, force=force, progress=progress)
    value = {
        "package": str(found.package),
        "picture": str(found.picture),
        "verification": verification_value(found.verification),
        "report": found.report.model_dump(mode="json"),
    }
    output.result(
        value, bench_table(found.report), f"package  {found.package}\npicture  {found.picture}"
    )
