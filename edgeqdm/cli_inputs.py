"""What the command line reads before it calls the pipeline: models, plans, embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeqdm.errors import InputError, ModelError, VerifyError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeqdm.ir.plan import DeploymentPlan
    from edgeqdm.ir.precision import Precision
    from edgeqdm.models.denoiser import Denoiser


@dataclass(frozen=True)
class PackageSettings:
    """What a package's model has to be loaded with to be comparable to it.

    Attributes:
        name: of the model.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        eta: DDIM noise.
    """

    name: str
    steps: int
    guidance: float
    eta: float

    def shipped_model(self) -> str:
        """The model as `load` takes it; raises InputError if it does not come with edgeqdm."""
        from edgeqdm.models.load import reference_names

        if self.name not in reference_names():
            raise InputError(
                "EQ-3804",
                "the package's model does not come with edgeqdm",
                path=self.name,
                hint="name its folder with --model",
            )
        return f"reference:{self.name}"


def package_settings(package: Path) -> PackageSettings:
    """Settings out of a package's manifest and schedule.

    Raises:
        InputError: if the folder is no package.
        VerifyError: if its files are damaged.
    """
    from edgeqdm.ir.codec import read_record
    from edgeqdm.ir.package import Manifest, ScheduleFile

    manifest = package / "manifest.json"
    if not manifest.exists():
        raise InputError(
            "EQ-3801", "not a package: no manifest.json", path=package, hint="give a package folder"
        )
    name = read_record(manifest, Manifest, error=VerifyError).model.name
    schedule = read_record(package / "schedule.json", ScheduleFile, error=VerifyError)
    return PackageSettings(
        name=name,
        steps=int(schedule.program.settings["steps"] or 0),
        guidance=schedule.guidance,
        eta=float(schedule.program.settings.get("eta") or 0.0),
    )


def load_model(
    model: str,
    *,
    scheduler: str | None,
    steps: int,
    guidance: float | None,
    eta: float,
    conditioning: Path | None,
    online: bool,
    split_skips: bool = False,
) -> Denoiser:
    """`edgeqdm.models.load.load`, with embeddings out of a file and hints that name options."""
    from edgeqdm.models import split
    from edgeqdm.models.load import load

    embeddings, null = (None, None) if conditioning is None else read_embeddings(conditioning)
    try:
        denoiser = load(
            model,
            scheduler=scheduler,
            steps=steps,
            guidance=guidance,
            eta=eta,
            conditioning=embeddings,
            null_conditioning=null,
            local_files_only=not online,
        )
    except ModelError as error:
        if error.code == "EQ-3139" and not online:
            error.hint = "--online downloads it"
        raise
    return split.split_skips(denoiser) if split_skips else denoiser


def parse_precision(text: str) -> Precision:
    """A precision as it is written in a plan; raises InputError with examples."""
    from edgeqdm.ir.precision import Precision

    try:
        return Precision(text)
    except ValueError as error:
        raise InputError("EQ-3805", str(error), path="precision") from None


def read_plan(file: Path) -> DeploymentPlan:
    """The precision of every layer, from JSON; raises InputError naming the field."""
    from edgeqdm.ir.codec import read_record
    from edgeqdm.ir.plan import DeploymentPlan

    return read_record(file, DeploymentPlan)


def read_embeddings(file: Path) -> tuple[Tensor, Tensor | None]:
    """`conditioning` [N, L, D] and, where there is one, `null` [L, D] of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from edgeqdm.ir.codec import open_regular

    try:
        # Opened first, because a FIFO would be waited for and a missing file is told better.
        with open_regular(file):
            tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError("EQ-3802", f"not a safetensors file: {error}", path=file) from error
    if "conditioning" not in tensors or not tensors.keys() <= {"conditioning", "null"}:
        raise InputError(
            "EQ-3803",
            f"holds {', '.join(sorted(tensors)) or 'no tensors'}",
            path=file,
            hint="name the tensors `conditioning` [N, L, D] and, if there is guidance, `null`",
        )
    return tensors["conditioning"], tensors.get("null")
