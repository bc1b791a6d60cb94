"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MAX_SEED = 2**64 - 1

Json = Annotated[bool, typer.Option("--json", help="Result and errors as one JSON object each.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Show warnings of libraries, tracebacks of errors.")
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="reference:NAME, a diffusers folder or a hub id.",
        show_default=False,
    ),
]
Package = Annotated[
    Path, typer.Argument(metavar="PACKAGE", help="Folder of a package.", show_default=False)
]
Target = Annotated[str, typer.Option(metavar="NAME", help="Runtime to make it for.")]
# Of the verbs that have to know whether an option was given at all.
AskedTarget = Annotated[
    str | None,
    typer.Option("--target", metavar="NAME", help="Runtime to make it for; default onnxruntime."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a package that is there already.")]
ForceFile = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]
Fid = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="Images for feature-FID, 65 or more; 0 leaves it out."),
]
Scheduler = Annotated[
    str | None, typer.Option(metavar="NAME", help="Sampler; default the model's own.")
]
Steps = Annotated[int, typer.Option(metavar="N", min=1, help="Denoising steps.")]
Eta = Annotated[float, typer.Option(metavar="N", min=0, max=1, help="DDIM noise; 1 is DDPM.")]
Guidance = Annotated[
    float | None,
    typer.Option(metavar="N", min=0, help="Guidance scale; default the model's own."),
]
Samples = Annotated[int, typer.Option(metavar="N", min=1, help="Calibration trajectories.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Of the calibration.")]
AskedSamples = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", min=1, help="Calibration trajectories; default 64."),
]
AskedSeed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, max=MAX_SEED, help="Of the calibration; default 0."),
]
Plan = Annotated[Path | None, typer.Option(metavar="FILE", help="Precision of every layer.")]
Embeddings = Annotated[
    Path | None,
    typer.Option(
        "--conditioning",
        metavar="FILE",
        help="safetensors: `conditioning` [N, L, D], with guidance also `null` [L, D].",
    ),
]
Online = Annotated[bool, typer.Option("--online", help="Download the model from the hub.")]
Work = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep finished parts here.")]
NoCorrect = Annotated[
    bool, typer.Option("--no-correct", help="Leave the sampler's schedule as it is.")
]
BodyPrecision = Annotated[
    str | None,
    typer.Option(
        "--precision", metavar="P", help="Of the body: w4a8, w4g64a8dyn, ...; default w8a8."
    ),
]
EmbeddingPrecision = Annotated[
    str | None,
    typer.Option("--embedding", metavar="P", help="Of timestep and label layers; default fp32."),
]
SplitSkips = Annotated[
    bool, typer.Option("--split-skips", help="Give both halves of a UNet's skips their own scale.")
]
Precisions = Annotated[
    list[str] | None,
    typer.Option("--precision", metavar="P", help="That layers may take; repeat it. Default six."),
]
