"""What a profile says of a network at given precisions: latency and bytes.

    latency = base + sum of scale[form] * (entries of that form - overhead - what they share)
              + a fork for every layer whose precision differs between phases

Alone, an operation finds its tensors in the cache and pays for a call of its own; beside others it
does not. So the entries of every form of computation get one scale, and everything that is no
entry is one base, fitted to whole networks measured on the same device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeqdm.errors import InputError
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, TABLE, ActivationPolicy, Precision
from edgeqdm.ir.profile import BoundaryKind, LatencyProfile, OpKey, PhaseCost, WholeGraph
from edgeqdm.profile.opkeys import NetworkKeys

Precisions = Mapping[str, Precision]
"""By layer; layers that are absent are in fp32."""
SCALE_DEVIATION = 0.2
"""How far a scale is expected to be from 1, before anything whole was measured."""
NOISE = 0.02
"""Relative error that a sum of entries has however the scales are chosen."""
LEAST_SHARE, MOST_SHARE = 0.05, 5.0
"""Of a network's time that its entries may sum to: beyond, a unit is wrong."""
_LISTED = 10


@dataclass(frozen=True)
class PredictionError:
    """How far predictions were from networks that the fit had not seen.

    Attributes:
        n: networks, each left out of a fit on all others.
        mean: absolute error over the measured latency, the mean of them.
        worst: the largest.
    """

    n: int
    mean: float
    worst: float


@dataclass(frozen=True)
class LatencyModel:
    """Latency of one network on one device.

    Attributes:
        network: its operations.
        net_us: time of an operation at a precision, without the overhead of a graph.
        quantize_us: of a tensor of this shape.
        base_us: of everything that is no entry.
        scales: by form of computation, see `form_of`.
        fork_us: what an evaluation takes longer for every fork, see `count_forks`.
        error: on networks left out of the fit; None where fewer than 3 were measured.
    """

    network: NetworkKeys
    net_us: Mapping[tuple[OpKey, Precision], float]
    quantize_us: Mapping[tuple[int, ...], float]
    base_us: float
    scales: Mapping[str, float]
    error: PredictionError | None
    fork_us: float = 0.0

    def layer_us(self, layer: str, precision: Precision) -> float:
        """What one layer adds to a network, in microseconds.

        Raises:
            InputError: EQ-3510, if the profile has no such entry.
        """
        if precision == TABLE:
            return 0.0
        return self.scales.get(form_of(precision), 1.0) * self._net(layer, precision)

    def predict_us(self, precisions: Precisions) -> float:
        """Time of one evaluation of one image in a graph of its own, in microseconds."""
        layers = sum(
            self.layer_us(layer, precisions.get(layer, FP32)) for layer in self.network.keys
        )
        return self.base_us + layers - self._shared_us(precisions)

    def predict_plan_us(self, plan: DeploymentPlan) -> tuple[float, ...]:
        """Time of one evaluation in every phase, in microseconds, [P]."""
        return self.predict_phases_us(
            [{a.layer: a.precision for a in phase.layers} for phase in plan.phases]
        )

    def predict_phases_us(self, phases: Sequence[Precisions]) -> tuple[float, ...]:
        """Time of one evaluation in every phase of one graph, in microseconds, [P]."""
        more = self.fork_us * count_forks(self.network, phases)
        return tuple(self.predict_us(precisions) + more for precisions in phases)

    def mean_us(self, plan: DeploymentPlan) -> float:
        """Time of one evaluation, the mean over the steps."""
        phases = zip(plan.phases, self.predict_plan_us(plan), strict=True)
        return sum((phase.stop - phase.start) * us for phase, us in phases) / plan.n_steps

    def quantize_once_us(self, names: Sequence[str]) -> float:
        """What a layer saves whose input another one of `names` has quantized, in microseconds."""
        shape = self.network.keys[names[0]].input_shape
        return self.scales.get("integer", 1.0) * self.quantize_us.get(shape, 0.0)

    def fork_once_us(self, layers: Iterable[str]) -> float:
        """What every further variant of some layers costs an evaluation, in microseconds."""
        return self.fork_us * len({self.network.fed_with(layer) for layer in layers})

    def _net(self, layer: str, precision: Precision) -> float:
        found = self.net_us.get((self.network.keys[layer], precision))
        if found is None:
            raise missing_error([(self.network.keys[layer], precision)])
        return found

    def _shared_us(self, precisions: Precisions) -> float:
        shared = shared_us(self.network, self.quantize_us, precisions)
        return self.scales.get("integer", 1.0) * shared


def count_forks(network: NetworkKeys, phases: Sequence[Precisions]) -> int:
    """Variants beyond the first of every layer; layers fed the same tensor fork together."""
    forks = set()
    for layer in network.keys:
        precisions = [phase.get(layer, FP32) for phase in phases]
        variants = list(dict.fromkeys(precisions))
        forks.add((network.fed_with(layer), tuple(map(variants.index, precisions))))
    return sum(max(of_phase) for _, of_phase in forks)


def form_of(precision: Precision) -> str:
    """How a precision is computed, as far as the fit tells forms apart."""
    if not precision.integer:
        return "float" if precision == FP32 else "weights"
    return "dynamic" if precision.dynamic else "integer"


def input_form(precision: Precision) -> tuple[int, ActivationPolicy] | None:
    """What layers fed the same tensor must have alike to share its quantization; None: nothing."""
    if not precision.integer or ActivationPolicy.TEMPORAL not in precision.policies:
        return None
    return precision.activation_bits, precision.policies[0]


def shared_us(
    network: NetworkKeys, quantize_us: Mapping[tuple[int, ...], float], precisions: Precisions
) -> float:
    """Quantizations that entries count and a graph does once, for layers fed the same tensor."""
    saved = 0.0
    for names in network.siblings:
        forms = [input_form(precisions.get(name, FP32)) for name in names]
        tabled = [form for form in forms if form is not None]
        twice = len(tabled) - len(set(tabled))
        saved += twice * quantize_us.get(network.keys[names[0]].input_shape, 0.0)
    return saved


def fit_latency(profile: LatencyProfile, network: NetworkKeys) -> LatencyModel:
    """Scales and base of a network, from the profile's measurements of it as a whole.

    Relative errors are fitted; every scale is expected at 1 with a deviation of `SCALE_DEVIATION`,
    the base is free. Where the profile has no whole network of this model, all scales are 1 and the
    base is the overhead of a graph: sums rank plans then, and are no latency.

    Raises:
        InputError: EQ-3511, if entries and whole networks cannot be in the same unit.
    """
    overhead = profile.overhead.median_us
    net_us = {
        (entry.key, entry.precision): max(entry.timing.median_us - overhead, 0.0)
        for entry in profile.entries
    }
    quantize_us = {
        cost.shape: max(cost.timing.median_us - overhead, 0.0)
        for cost in profile.boundaries
        if cost.kind is BoundaryKind.QUANTIZE
    }
    fork_us = _fork_us(profile, network)
    plain = LatencyModel(network, net_us, quantize_us, overhead, {}, None, fork_us)
    wholes = [w for w in profile.wholes if (w.model, w.batch) == (network.model, network.batch)]
    known = [w for w in wholes if not missing_entries(profile, entries_of(network, w.precisions))]
    if not known:
        return plain
    forms, rows = _features(plain, known)
    measured = np.array([whole.timing.median_us for whole in known])
    _check_units(rows, measured)
    base, *scales = _fit(rows, measured)
    return LatencyModel(
        network,
        net_us,
        quantize_us,
        float(base),
        {form: float(scale) for form, scale in zip(forms, scales, strict=True)},
        _left_out(rows, measured, [_mixed(whole) for whole in known]),
        fork_us,
    )


def _fork_us(profile: LatencyProfile, network: NetworkKeys) -> float:
    """What an evaluation takes longer for every fork, in microseconds.

    The median of the profile's pairs of this network, at least 0; 0 if it has none.
    """
    more = [
        (cost.among.median_us - cost.alone.median_us) / forks
        for cost in costs_of_phases(profile, network)
        if (forks := count_forks(network, [cost.precisions, cost.other]))
    ]
    return max(0.0, float(np.median(more))) if more else 0.0


def costs_of_phases(profile: LatencyProfile, network: NetworkKeys) -> list[PhaseCost]:
    """The profile's pairs of this network."""
    mine = (network.model, network.batch)
    return [cost for cost in profile.phase_costs if (cost.model, cost.batch) == mine]


def _check_units(rows: Rows, measured: Rows) -> None:
    share = float(np.median(rows.sum(1) / measured))
    if not LEAST_SHARE <= share <= MOST_SHARE:
        raise InputError(
            "EQ-3511",
            f"the entries of a network sum to {share:.3g} of its time as a whole",
            path="entries",
            hint="one of the two was not given in microseconds: import the results again",
        )


def _mixed(whole: WholeGraph) -> bool:
    return len(set(whole.precisions.values())) > 1


Rows = NDArray[np.float64]


def _features(plain: LatencyModel, wholes: Sequence[WholeGraph]) -> tuple[list[str], Rows]:
    """Unscaled time by form, [N, F]; what is shared is taken off integers, which share it."""
    found: list[dict[str, float]] = []
    for whole in wholes:
        times: dict[str, float] = {}
        for layer in plain.network.keys:
            precision = whole.precisions.get(layer, FP32)
            form = form_of(precision)
            times[form] = times.get(form, 0.0) + plain.layer_us(layer, precision)
        if "integer" in times:
            times["integer"] -= shared_us(plain.network, plain.quantize_us, whole.precisions)
        found.append(times)
    forms = sorted({form for times in found for form in times})
    return forms, np.array([[times.get(form, 0.0) for form in forms] for times in found])


def _fit(rows: Rows, measured: Rows) -> Rows:
    """Base and scales, [1 + F]: ridge regression of relative errors towards scales of 1."""
    n_forms = rows.shape[1]
    strength = NOISE / SCALE_DEVIATION
    design = np.concatenate([np.ones((len(measured), 1)), rows], 1) / measured[:, None]
    prior = np.concatenate([np.zeros((n_forms, 1)), np.eye(n_forms) * strength], 1)
    # A base below 0 would be a network that takes time back: then there is none.
    wanted = np.concatenate([np.ones(len(measured)), np.full(n_forms, strength)])
    found: Rows = np.linalg.lstsq(np.concatenate([design, prior]), wanted, rcond=None)[0]
    if found[0] < 0:
        rest = np.concatenate([design, prior])[:, 1:]
        found = np.concatenate([[0.0], np.linalg.lstsq(rest, wanted, rcond=None)[0]])
    return found


def _left_out(rows: Rows, measured: Rows, counted: Sequence[bool]) -> PredictionError | None:
    errors = []
    for k in np.flatnonzero(counted):
        others = np.arange(len(measured)) != k
        base, *scales = _fit(rows[others], measured[others])
        errors.append(abs(base + rows[k] @ np.array(scales) - measured[k]) / measured[k])
    if len(errors) < 3:
        return None
    return PredictionError(len(errors), float(np.mean(errors)), float(np.max(errors)))


def missing_entries(
    profile: LatencyProfile, needed: Iterable[tuple[OpKey, Precision]]
) -> tuple[tuple[OpKey, Precision], ...]:
    """What the profile lacks of what is needed, each once; tables need no entry."""
    there = {(entry.key, entry.precision) for entry in profile.entries}
    return tuple(each for each in dict.fromkeys(needed) if each not in there and each[1] != TABLE)


def entries_of(network: NetworkKeys, precisions: Precisions) -> tuple[tuple[OpKey, Precision], ...]:
    """What a network at these precisions is the sum of."""
    return tuple((key, precisions.get(layer, FP32)) for layer, key in network.keys.items())


def missing_error(missing: Sequence[tuple[OpKey, Precision]]) -> InputError:
    """The error that names operations a profile lacks."""
    listed = "; ".join(f"{key} at {precision}" for key, precision in missing[:_LISTED])
    more = "" if len(missing) <= _LISTED else f"; {len(missing) - _LISTED} more"
    return InputError(
        "EQ-3510",
        f"the profile lacks {len(missing)} operations: {listed}{more}",
        path="profile",
        hint="`edgeqdm profile kit --missing-from` makes a kit for just those",
    )


@dataclass(frozen=True)
class StorageModel:
    """Bytes of one network on one target.

    Attributes:
        network: its operations.
        weight_bytes: (shape of the weight, precision) -> bytes on disk and resident.
        base_bytes: of everything that is no weight of a layer, on disk; all but the network's other
            tensors is the graph's nodes, and a further variant of a layer has its share of those.
        tables: bytes of a layer's table, for layers that may become one.
    """

    network: NetworkKeys
    weight_bytes: Callable[[tuple[int, ...], Precision], tuple[int, int]]
    base_bytes: int
    tables: Mapping[str, int]

    def layer_bytes(self, layer: str, precision: Precision) -> tuple[int, int]:
        """Bytes on disk and resident of a layer."""
        if precision == TABLE:
            return self.tables[layer], self.tables[layer]
        key = self.network.keys[layer]
        return self.weight_bytes(key.weight_shape, precision)

    @property
    def variant_bytes(self) -> int:
        """Of the nodes of one more variant of a layer, on disk."""
        nodes = max(0, self.base_bytes - self.network.rest_bytes)
        return nodes // max(1, len(self.network.keys))

    def predict_bytes(self, phases: Sequence[Precisions]) -> tuple[int, int]:
        """Bytes on disk and resident of a graph of these phases."""
        disk = resident = self.base_bytes
        for layer in self.network.keys:
            variants = {phase.get(layer, FP32) for phase in phases}
            more = (len(variants) - 1) * self.variant_bytes
            disk, resident = disk + more, resident + more
            for precision in variants:
                mine = self.layer_bytes(layer, precision)
                disk, resident = disk + mine[0], resident + mine[1]
        return disk, resident


def fitted_base_bytes(
    profile: LatencyProfile, network: NetworkKeys, storage: StorageModel
) -> int | None:
    """What whole networks weigh beyond their layers, the median; None if none was measured."""
    rests = [
        whole.model_bytes - storage.predict_bytes([whole.precisions])[0]
        for whole in profile.wholes
        if (whole.model, whole.batch) == (network.model, network.batch) and whole.model_bytes
    ]
    return max(0, math.floor(np.median(rests))) if rests else None
