"""Layers that depend on timestep and label only, replaced by tables of their exact outputs.

A sampler has S steps and a model K labels, so such a layer has at most S * K different outputs.
Looked up, it needs no weights, no arithmetic and no quantization, and what feeds nothing but such
layers leaves the device with them.

Source: Huang et al. 2024, "Temporal Feature Matters", cached temporal features,
https://arxiv.org/abs/2407.19547.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeqdm.errors import InputError
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer
from edgeqdm.quantize.modules import StepClock

Dependence = Literal["time", "label"]

_PROBED_LABELS = 8
_CHUNK = 64
# Rows of one matrix product may be summed in different orders; a layer that tells samples apart
# differs by far more.
_SAME = 1e-4
# A layer that computes anything else may return another shape.
_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward)


class TableLayer(nn.Module):
    """Returns what the replaced layer would return, looked up by step and label.

    Attributes:
        table: float32 [S, ...C], or [S, K, ...C] by label, the row of a label being the label.
    """

    table: Tensor

    def __init__(self, table: Tensor, clock: StepClock, *, by_label: bool) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.by_label = by_label
        self._clock = clock

    def forward(self, input: Tensor) -> Tensor:
        """Rows [B, ...C] for the running step and labels; of `input` only the batch size counts."""
        row = torch.index_select(self.table, 0, self._clock.step.reshape(1))
        if self.by_label:
            return torch.index_select(row.squeeze(0), 0, self._clock.conditioning[0])
        return row.expand(input.shape[0], *row.shape[1:])


class DeadLayer(nn.Module):
    """Stands for a layer whose output feeds nothing but tables: zeros of the right shape.

    What lies between it and those tables still runs in eager mode and must fit together; export
    drops all of it.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self._weight_shape = tuple(layer.weight.shape)
        self._geometry: tuple[Any, ...] = ()
        if isinstance(layer, nn.Conv2d):
            self._geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, input: Tensor) -> Tensor:
        if not self._geometry:
            return input.new_zeros((*input.shape[:-1], self._weight_shape[0]))
        # One stored zero; torch works the shape out.
        weight = input.new_zeros(()).expand(self._weight_shape)
        return F.conv2d(input, weight, None, *self._geometry)


@dataclass(frozen=True)
class TableCost:
    """What a choice of tables costs and saves on the device."""

    live: tuple[str, ...]
    """Folded layers that the network still reads; only their tables are stored."""
    dead: tuple[str, ...]
    """Folded layers that feed nothing but other folded layers."""
    table_bytes: int
    """Of the tables of live layers, float32."""
    removed_bytes: int
    """Of all float32 weights that no longer reach the output, named layers or not."""


def dependence(denoiser: Denoiser) -> dict[str, Dependence]:
    """What every layer that can be folded depends on, in the order of `info.layers`.

    The network runs twice at the first and twice at the last step, with a different label for
    every sample in the second run. A layer that returns the same bit for bit is `time`; one whose
    rows move with the labels is `label`. At most 8 labels are tried, evenly spread, the first and
    the last (the null label, where there is one) among them.

    Layers that depend on the sample or on an embedding have no finite table and are left out, and
    so are layers whose output is not one row per sample.
    """
    return _examine(denoiser)[0]


def record_tables(denoiser: Denoiser, names: Collection[str]) -> dict[str, Tensor]:
    """The exact outputs of layers at every step, and for every label where they depend on it.

    Args:
        denoiser: the float model; runs once per step and 64 labels.
        names: layers of `info.layers`.

    Returns:
        By name: float32 [S, ...C], or [S, K, ...C] for layers that depend on the label, where
        K = max(n_labels, null_label + 1). Rows of labels that the model does not know are zero.

    Raises:
        InputError: if a layer cannot be folded; says why.
    """
    kinds = _foldable(denoiser, names)
    if not kinds:
        return {}
    by_step = [_record_step(denoiser, kinds, step) for step in range(denoiser.program.n_steps)]
    return {name: torch.stack([found[name] for found in by_step]) for name in kinds}


def live(denoiser: Denoiser, names: Collection[str]) -> tuple[str, ...]:
    """Those of `names` whose output still reaches f once all of them are tables.

    The others feed nothing but folded layers: they need no table, see `DeadLayer`. Found by
    following the automatic derivative of f, so a network that detaches tensors on the way shows
    too few; of one that switches derivatives off altogether, all names are live.

    Returns:
        Names in the order of `info.layers`.

    Raises:
        InputError: if a layer cannot be folded; says why.
    """
    return tuple(_reach(denoiser, _foldable(denoiser, names))[0])


def table_cost(denoiser: Denoiser, names: Collection[str]) -> TableCost:
    """Bytes of the tables of `names` against bytes of the weights that they make superfluous.

    Raises:
        InputError: if a layer cannot be folded; says why.
    """
    kinds = _foldable(denoiser, names)
    reached, remaining = _reach(denoiser, kinds)
    _, before = _reach(denoiser, ())
    outputs = _outputs(denoiser, kinds, 0, _first_conditioning(denoiser))
    table_values = sum(
        denoiser.program.n_steps
        * (_n_rows(denoiser) if kinds[name] == "label" else 1)
        * outputs[name][0][0].numel()
        for name in reached
    )
    removed = (value for name, value in before.items() if name not in remaining)
    return TableCost(
        live=tuple(reached),
        dead=tuple(name for name in kinds if name not in reached),
        table_bytes=table_values * torch.float32.itemsize,
        removed_bytes=sum(value.nbytes for value in removed),
    )


def _foldable(denoiser: Denoiser, names: Collection[str]) -> dict[str, Dependence]:
    kinds, reasons = _examine(denoiser) if names else ({}, {})
    known = {layer.name for layer in denoiser.info.layers}
    for name in names:
        if name not in known:
            message = "no layer of this name runs in the network"
            raise InputError("EQ-3241", message, path=name, hint="see info.layers for the names")
        if name not in kinds:
            raise InputError(
                "EQ-3240",
                f"the layer cannot become a table: {reasons[name]}",
                path=name,
                hint="fold only layers that depend on timestep and label, see fold.dependence",
            )
    return {name: kind for name, kind in kinds.items() if name in names}


def _examine(denoiser: Denoiser) -> tuple[dict[str, Dependence], dict[str, str]]:
    """What can be folded, and why the rest cannot."""
    reasons = {
        layer.name: "it depends on the sample"
        for layer in denoiser.info.layers
        if layer.role != "embedding"
    }
    names = [layer.name for layer in denoiser.info.layers if layer.role == "embedding"]
    found: dict[str, list[str]] = {name: [] for name in names}
    for step in sorted({0, denoiser.program.n_steps - 1}):
        runs = [_outputs(denoiser, names, step, each) for each in _two_conditionings(denoiser)]
        for name in names:
            verdict = _judge(runs[0][name], runs[1][name], denoiser.info.conditioning.kind)
            found[name].append(verdict)
    kinds: dict[str, Dependence] = {}
    for name, verdicts in found.items():
        refused = [verdict for verdict in verdicts if verdict not in get_args(Dependence)]
        if refused:
            reasons[name] = refused[0]
        else:
            kinds[name] = "label" if "label" in verdicts else "time"
    return kinds, reasons


def _judge(one: list[Tensor], other: list[Tensor], conditioning: str) -> str:
    if not all(torch.equal(one[0], again) for again in one[1:]):
        return f"it runs {len(one)} times in one evaluation, on different inputs"
    first, second = one[0], other[0]
    if torch.equal(first, second):
        alike = first.dim() > 1 and _close(first, first[:1].expand_as(first))
        return "time" if alike else "its output is not one row per sample"
    if conditioning == "embedding":
        return "it depends on the embedding, whose values cannot be listed"
    # The second run has every label one sample further.
    return "label" if _close(first.roll(1, 0), second) else "its output is not one row per sample"


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _SAME * a.abs().max())


def _two_conditionings(denoiser: Denoiser) -> tuple[Tensor | None, Tensor | None]:
    known = denoiser.info.conditioning
    if known.kind == "none":
        return None, None
    if known.kind == "embedding":
        generator = torch.Generator().manual_seed(0)
        first, second = torch.randn((2, 2, *known.shape), generator=generator)
        return first, second
    labels = _labels(denoiser)
    spread = torch.linspace(0, len(labels) - 1, min(len(labels), _PROBED_LABELS)).round().long()
    probed = labels[spread] if len(labels) > 1 else labels.repeat(2)
    return probed, probed.roll(1, 0)


def _labels(denoiser: Denoiser) -> Tensor:
    """Every label the model knows, ascending but for a null label, which comes last."""
    known = denoiser.info.conditioning
    labels = list(range(known.n_labels))
    if known.null_label is not None and known.null_label not in labels:
        labels.append(known.null_label)
    return torch.tensor(labels)


def _n_rows(denoiser: Denoiser) -> int:
    return int(_labels(denoiser).max()) + 1


def _first_conditioning(denoiser: Denoiser) -> Tensor | None:
    first, _ = _two_conditionings(denoiser)
    return None if first is None else first[:1]


def _record_step(denoiser: Denoiser, kinds: dict[str, Dependence], step: int) -> dict[str, Tensor]:
    timed = [name for name, kind in kinds.items() if kind == "time"]
    labelled = [name for name, kind in kinds.items() if kind == "label"]
    found: dict[str, Tensor] = {}
    if timed:
        outputs = _outputs(denoiser, timed, step, _first_conditioning(denoiser))
        found |= {name: outputs[name][0][0] for name in timed}
    if labelled:
        found |= _record_labels(denoiser, labelled, step)
    return {name: found[name] for name in kinds}


def _record_labels(denoiser: Denoiser, names: Sequence[str], step: int) -> dict[str, Tensor]:
    tables: dict[str, Tensor] = {}
    for labels in _labels(denoiser).split(_CHUNK):
        for name, outputs in _outputs(denoiser, names, step, labels).items():
            rows = outputs[0]
            empty = rows.new_zeros((_n_rows(denoiser), *rows.shape[1:]))
            tables.setdefault(name, empty)[labels] = rows
    return tables


@torch.no_grad()
def _outputs(
    denoiser: Denoiser, names: Collection[str], step: int, conditioning: Tensor | None
) -> dict[str, list[Tensor]]:
    """What each layer returned, call by call, in one evaluation."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, output: Tensor) -> None:
        seen[name].append(output.clone())

    with _hooked(denoiser, names, keep), _body_skipped(denoiser):
        denoiser.module(*_inputs(denoiser, step, conditioning))
    return seen


@contextmanager
def _body_skipped(denoiser: Denoiser) -> Iterator[None]:
    """Layers that depend on the sample return zeros of their shape instead of computing.

    What is examined here does not depend on them, and they are nearly all of the arithmetic.
    """
    body = [
        layer
        for info in denoiser.info.layers
        if info.role != "embedding"
        if type(layer := get_layer(denoiser.module, info.name)).forward in _PLAIN_FORWARDS
        if "forward" not in vars(layer)
    ]
    for layer in body:
        vars(layer)["forward"] = _zeros_of_shape(layer)
    try:
        yield
    finally:
        for layer in body:
            del vars(layer)["forward"]


def _zeros_of_shape(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    outline = copy.copy(layer)
    outline._parameters = {
        name: None if value is None else nn.Parameter(value.detach().to("meta"))
        for name, value in layer._parameters.items()
    }

    def forward(input: Tensor) -> Tensor:
        shape = type(layer).forward(outline, input.detach().to("meta")).shape
        return input.new_zeros(shape)

    return forward


def _inputs(denoiser: Denoiser, step: int, conditioning: Tensor | None) -> tuple[Tensor, ...]:
    batch = 1 if conditioning is None else len(conditioning)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, *denoiser.info.sample_shape), generator=generator)
    fed = () if conditioning is None else (conditioning,)
    return (x, denoiser.timestep(step, batch), *fed)


@contextmanager
def _hooked(
    denoiser: Denoiser, names: Iterable[str], use: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda layer, args, output: use(name, output)

    handles = [get_layer(denoiser.module, name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reach(denoiser: Denoiser, folded: Collection[str]) -> tuple[list[str], dict[str, Tensor]]:
    """Folded layers and parameters that f is computed from, where folded outputs are constants."""
    constants: list[tuple[str, Tensor]] = []

    def cut(name: str, output: Tensor) -> Tensor:
        constants.append((name, output.detach().clone().requires_grad_()))
        # A copy, since the network may go on in place.
        return constants[-1][1].clone()

    parameters = {
        name: value.detach().requires_grad_()
        for name, value in denoiser.module.named_parameters()
        if value.is_floating_point()
    }
    inputs = _inputs(denoiser, 0, _first_conditioning(denoiser))
    with _hooked(denoiser, folded, cut), torch.enable_grad():
        f = torch.func.functional_call(denoiser.module, parameters, inputs)
    if f.grad_fn is None:
        # Nothing is known to be dead.
        return list(folded), parameters
    reached = _leaves(f)
    names = {name for name, value in constants if id(value) in reached}
    return (
        [name for name in folded if name in names],
        {name: value for name, value in parameters.items() if id(value) in reached},
    )


def _leaves(f: Tensor) -> dict[int, Tensor]:
    """Tensors that need a gradient and that f was computed from, by identity."""
    found: dict[int, Tensor] = {}
    waiting: list[Any] = [f.grad_fn]
    visited: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting.extend(parent for parent, _ in node.next_functions)
    return found
