"""The stages between a device and a plan: profile -> sensitivity -> search -> plan."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeqdm import __version__
from edgeqdm.backends import load_backend
from edgeqdm.emit.backend import Backend
from edgeqdm.emit.writer import check_file_destination, write_file_atomically
from edgeqdm.ir.codec import dump_record
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import TABLE, Precision
from edgeqdm.ir.profile import REFUSED_FLAGS, KitManifest, LatencyProfile, OpKey
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.profile.adopt import merged, read_profile
from edgeqdm.profile.host import SECONDS, check_text, run_kit
from edgeqdm.profile.kit import KIT, KitRequest, make_kit, read_results
from edgeqdm.profile.opkeys import NetworkKeys, network_keys
from edgeqdm.profile.predict import (
    LatencyModel,
    StorageModel,
    costs_of_phases,
    entries_of,
    fit_latency,
    fitted_base_bytes,
    form_of,
    missing_entries,
    missing_error,
)
from edgeqdm.profile.requests import (
    DEFAULT_PRECISIONS,
    DEFAULT_WHOLES,
    Candidates,
    candidates,
    full_request,
)
from edgeqdm.stages import DEFAULT_TARGET, Progress, rule_plan, stage, working_folder

SCALE_BYTES = 4

__all__ = [
    "CostModel",
    "Space",
    "cost_model",
    "fit_latency",
    "import_results",
    "network_keys",
    "open_space",
    "profile_host",
    "write_kit",
]


@dataclass(frozen=True)
class Space:
    """What a network may be made of on a target.

    Attributes:
        base: the plan by rule; its tables are kept.
        network: its operations.
        offered: precisions by kind of layer.
    """

    base: DeploymentPlan
    network: NetworkKeys
    offered: Candidates

    @property
    def tables(self) -> tuple[str, ...]:
        """Layers that are looked up in every plan of the space."""
        return tuple(a.layer for a in self.base.phases[0].layers if a.precision == TABLE)

    def entries(self) -> tuple[tuple[OpKey, Precision], ...]:
        """Everything that plans of the space are sums of."""
        return tuple(
            (key, precision)
            for layer, key in self.network.keys.items()
            if layer not in self.tables
            for precision in self.offered[key.kind]
        )


def open_space(
    denoiser: Denoiser,
    target: str = DEFAULT_TARGET,
    *,
    precisions: Sequence[Precision] = DEFAULT_PRECISIONS,
) -> Space:
    """The precisions that every layer can be given on a target."""
    offered = candidates(load_backend(target).menu(), precisions)
    return Space(rule_plan(denoiser, target), network_keys(denoiser), offered)


def profile_host(
    denoiser: Denoiser,
    out: str | Path,
    *,
    target: str = DEFAULT_TARGET,
    threads: int = 1,
    precisions: Sequence[Precision] = DEFAULT_PRECISIONS,
    wholes: int = DEFAULT_WHOLES,
    power_mode: str = "unknown",
    name: str = "",
    seconds: float = SECONDS,
    add: bool = False,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> LatencyProfile:
    """Measure every operation of a model, at every precision, on this host.

    Args:
        denoiser: the model.
        out: file of the profile.
        target: name of a backend.
        threads: of the runtime.
        precisions: to measure.
        wholes: mixed networks to measure as a whole, beside one for every precision.
        power_mode: as it shall stand in the profile.
        name: of the device; default its processor.
        seconds: least per graph.
        add: to the profile at `out`, which is of the same device.
        work: folder for finished parts; default a hidden sibling of `out`, removed at the end.
        progress: told of finished work.
    """
    out = Path(out)
    check_file_destination(out)
    check_text("name", name)
    check_text("power mode", power_mode)
    old = read_profile(out, target=target, accept=REFUSED_FLAGS).profile if add else None
    backend, space = load_backend(target), open_space(denoiser, target, precisions=precisions)
    request = _request(denoiser, space, wholes)
    with working_folder(out, work) as folder:
        kit = folder / f"kit-{_request_key(space.network, backend, request)}"
        if not (kit / KIT).is_file():
            make_kit(denoiser, backend, request, kit, progress=stage("kit", progress))
        found = run_kit(
            kit,
            threads=threads,
            power_mode=power_mode,
            name=name,
            seconds=seconds,
            progress=stage("measure", progress),
        )
        whole = found if old is None else merged(old, found)
        write_file_atomically(out, dump_record(whole))
    return whole


def _request(denoiser: Denoiser, space: Space, wholes: int) -> KitRequest:
    return full_request(
        space.network,
        space.offered,
        tables=space.tables,
        n_wholes=wholes,
        phased=denoiser.program.n_steps > 1,
    )


def _request_key(network: NetworkKeys, backend: Backend, request: KitRequest) -> str:
    versions = sorted(backend.versions().items())
    text = f"{__version__} {network.model} {network.batch} {versions} {request}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_kit(
    denoiser: Denoiser,
    out: str | Path,
    *,
    target: str = DEFAULT_TARGET,
    precisions: Sequence[Precision] = DEFAULT_PRECISIONS,
    wholes: int = DEFAULT_WHOLES,
    missing_from: LatencyProfile | None = None,
    progress: Progress | None = None,
) -> KitManifest:
    """A folder for a device to time: small graphs and the tool that times them.

    Args:
        denoiser: the model.
        out: folder to create.
        target: name of a backend.
        precisions: to measure.
        wholes: mixed networks to measure as a whole.
        missing_from: leave out what this profile has already.
        progress: told of every graph.

    Raises:
        InputError: EQ-3501, if the profile lacks nothing.
    """
    backend, space = load_backend(target), open_space(denoiser, target, precisions=precisions)
    request = _request(denoiser, space, wholes)
    if missing_from is not None:
        request = _missing(request, missing_from, space.network)
    return make_kit(denoiser, backend, request, Path(out), progress=stage("kit", progress))


def _missing(request: KitRequest, profile: LatencyProfile, network: NetworkKeys) -> KitRequest:
    entries = {(entry.key, entry.precision) for entry in profile.entries}
    boundaries = {(cost.kind, cost.shape) for cost in profile.boundaries}
    of_model = [w for w in profile.wholes if (w.model, w.batch) == (network.model, network.batch)]
    return KitRequest(
        entries=[each for each in request.entries if each not in entries],
        boundaries=[each for each in request.boundaries if each not in boundaries],
        wholes=[] if of_model else request.wholes,
        pairs=[] if costs_of_phases(profile, network) else request.pairs,
    )


def import_results(
    results: str | Path, kit: str | Path, out: str | Path, *, add: bool = False
) -> LatencyProfile:
    """The profile of a device, of what its benchmark tool wrote.

    Args:
        results: file of the tool.
        kit: folder it was measured with.
        out: file of the profile.
        add: to the profile at `out`, which is of the same device.
    """
    out = Path(out)
    check_file_destination(out)
    old = read_profile(out, accept=REFUSED_FLAGS).profile if add else None
    found = read_results(Path(kit), Path(results))
    whole = found if old is None else merged(old, found)
    write_file_atomically(out, dump_record(whole))
    return whole


@dataclass(frozen=True)
class CostModel:
    """What a plan of a space costs on one device.

    Attributes:
        latency: of one evaluation of one image.
        storage: of the package's graph.
        warnings: what a user should know of it, one sentence each.
    """

    latency: LatencyModel
    storage: StorageModel
    warnings: tuple[str, ...] = ()


def cost_model(profile: LatencyProfile, space: Space) -> CostModel:
    """Latency and bytes of plans, from a profile.

    Raises:
        InputError: EQ-3510, if the profile lacks operations of the space; names them.
    """
    missing = missing_entries(profile, space.entries())
    if missing:
        raise missing_error(missing)
    backend = load_backend(profile.target)
    rows = space.base.n_steps * SCALE_BYTES
    tables = {name: rows * key.weight_shape[0] for name, key in space.network.keys.items()}
    bare = StorageModel(space.network, backend.weight_bytes, 0, tables)
    base = fitted_base_bytes(profile, space.network, bare)
    storage = replace(bare, base_bytes=base or 0)
    return CostModel(fit_latency(profile, space.network), storage, _unfitted(profile, space))


def _unfitted(profile: LatencyProfile, space: Space) -> tuple[str, ...]:
    """Says which latencies of a space are sums of entries alone."""
    network = space.network
    wholes = [
        entries_of(network, whole.precisions)
        for whole in profile.wholes
        if (whole.model, whole.batch) == (network.model, network.batch)
    ]
    known = [entries for entries in wholes if not missing_entries(profile, entries)]
    if not known:
        return ("the profile has no whole network of this model: latencies only rank its plans",)
    # A table takes no time, so its form is not fitted by it.
    fitted = {form_of(p) for entries in known for _, p in entries if p != TABLE}
    others = sorted({p for _, p in space.entries() if form_of(p) not in fitted})
    if not others:
        return ()
    told = ", ".join(others)
    return (f"latencies of {told} are not fitted: no whole network of the profile is made of such",)
