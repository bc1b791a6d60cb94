"""What the command line reads before it calls the pipeline: models, plans, embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeqdm.errors import InputError, ModelError, OutputError, VerifyError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeqdm.ir.model import ModelInfo
    from edgeqdm.ir.package import ScheduleFile
    from edgeqdm.ir.plan import DeploymentPlan
    from edgeqdm.ir.precision import ActivationPolicy, Precision
    from edgeqdm.ir.search import SearchRecord
    from edgeqdm.models.denoiser import Denoiser


@dataclass(frozen=True)
class PackageSettings:
    """What a package's model has to be loaded with to be comparable to it.

    Attributes:
        name: of the model.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        eta: DDIM noise.
        split_skips: a UNet's skips have layers of their own.
    """

    name: str
    steps: int
    guidance: float
    eta: float
    split_skips: bool

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
        VerifyError: if its files are damaged or were changed.
    """
    from edgeqdm.emit.integrity import check_files, manifest_of
    from edgeqdm.ir.codec import read_record
    from edgeqdm.ir.package import ScheduleFile

    manifest_of(package)
    model, file = check_files(package).model, package / "schedule.json"
    schedule = read_record(file, ScheduleFile, error=VerifyError)
    return PackageSettings(
        name=model.name,
        steps=int(_setting(schedule, "steps", file, least=1)),
        guidance=schedule.guidance,
        eta=_setting(schedule, "eta", file, least=0),
        split_skips=_skips_are_split(model),
    )


def _setting(schedule: ScheduleFile, name: str, file: Path, *, least: int) -> float:
    """A number among the sampler's settings, which may hold anything in a changed package."""
    from edgeqdm.ir.codec import describe

    found = schedule.program.settings.get(name)
    kinds = int if name == "steps" else (int, float)
    if isinstance(found, bool) or not isinstance(found, kinds) or not found >= least:
        raise VerifyError(
            "EQ-8801",
            f"program.settings.{name} is {describe(found)}, not a number from {least} up",
            path=file,
            hint="the package was changed by hand: emit it again",
        )
    return found


def _skips_are_split(model: ModelInfo) -> bool:
    """Whether the layers are those that `edgeqdm.models.split` makes, in pairs."""
    names = {layer.name for layer in model.layers}
    ends = (".hidden", ".skip")
    halves = [{x.removesuffix(end) for x in names if x.endswith(end)} for end in ends]
    return bool(halves[0] & halves[1])


def refuse_idle(options: Mapping[str, object], where: str, *, hint: str) -> None:
    """Raise InputError if one of these options is given, because it would do nothing there.

    Args:
        options: value by name; None where it is not given.
        where: what makes them idle: `beside --plan`, `without --reconstruct`.
        hint: what to do instead.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        message = f"{' and '.join(given)} would do nothing {where}"
        raise InputError("EQ-3806", message, path=given[0], hint=hint)


def check_free(out: Path, *, force: bool) -> None:
    """Raise OutputError if there is a file already, which took work to make, unless `force`."""
    if out.is_file() and not force:
        raise OutputError(
            "EQ-7804", "a file is there already", path=out, hint="--force replaces it"
        )


def check_target(name: str) -> None:
    """Raise UnsupportedError unless there is such a target, whether it can be loaded or not."""
    from edgeqdm.backends import check_backend_name

    check_backend_name(name)


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


def load_searched(
    record: SearchRecord,
    *,
    model: str | None = None,
    conditioning: Path | None = None,
    online: bool = False,
) -> Denoiser:
    """The model of a search, as it was named or where it lies here.

    Raises:
        InputError: EQ-3808, if the search does not say where its model lies.
    """
    if not model and not record.source:
        raise InputError(
            "EQ-3808",
            "the search does not say where its model lies",
            path=record.study,
            hint="name it",
        )
    return load_model(
        model or record.source,
        scheduler=record.scheduler,
        steps=record.steps,
        guidance=record.guidance,
        eta=record.eta,
        conditioning=conditioning,
        online=online,
        split_skips=record.split_skips,
    )


def rule_precisions(body: str | None, embedding: str | None) -> tuple[Precision, Precision]:
    """Precisions of a plan by rule, as they were asked for or by default."""
    return (
        parse_precision("w8a8" if body is None else body),
        parse_precision("fp32" if embedding is None else embedding),
    )


def parse_precision(text: str) -> Precision:
    """A precision as it is written in a plan; raises InputError with examples."""
    from edgeqdm.ir.precision import Precision

    try:
        return Precision(text)
    except ValueError as error:
        raise InputError("EQ-3805", str(error), path="precision") from None


def parse_activation(text: str, body: Precision) -> ActivationPolicy:
    """Where the scales of a plan's body come from; raises InputError for what it cannot have."""
    from edgeqdm.ir.precision import ActivationPolicy

    allowed = [str(policy) for policy in body.policies]
    if text not in allowed:
        raise InputError(
            "EQ-3830",
            f"{body} takes no activation {text!r}",
            path="--activation",
            hint=f"{body} takes {' or '.join(allowed)}",
        )
    return ActivationPolicy(text)


def parse_latency(text: str | None, float_ms: Callable[[], float]) -> float | None:
    """A latency in ms, of `1.5` or of `0.6x` of the float model's.

    Args:
        text: as it was given; None for no limit.
        float_ms: asked for the float model's latency where it is needed.
    """
    if text is None:
        return None
    try:
        value = float(text.removesuffix("x"))
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise InputError(
            "EQ-3807",
            f"{text!r} is no latency",
            path="--latency",
            hint="give milliseconds, 1.5, or a share of the float model's, 0.6x",
        )
    return value * float_ms() if text.endswith("x") else value


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
