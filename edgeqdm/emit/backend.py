"""What a target must be able to do, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeqdm.ir.model import LayerKind, ModelInfo
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import Precision
from edgeqdm.ir.profile import BoundaryKind

Network = TypeVar("Network", bound=nn.Module)
Array = NDArray[np.float32]
Evaluate = Callable[[Array, int, NDArray[Any] | None], Array]
"""(scaled sample [B, C, H, W], step, conditioning [B, ...]) -> network output [B, C, H, W]."""
Menu = Mapping[LayerKind, tuple[Precision, ...]]
"""Precisions each kind of layer may take on a target."""
STANDARD = "standard"
"""The form of a package that every target has."""


@dataclass(frozen=True)
class Exportable:
    """A network to lower, with an example of every graph input.

    Attributes:
        network: called with the inputs in order; returns f [B, C, H, W]. With several phases, a
            layer that differs between them is an `edgeqdm::choose` of its variants.
        inputs: `sample` [2, C, H, W], `step` int64 scalar and, where the model takes it,
            `label` [2] or `embedding` [2, ...].
    """

    network: nn.Module
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class File:
    """Content of one file of a package."""

    data: bytes
    role: str


@dataclass(frozen=True)
class Unsupported:
    """One thing in a plan the target cannot do."""

    layer: str
    reason: str
    instead: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason}, use {self.instead}"


@dataclass(frozen=True)
class KernelCount:
    """Matrix and convolution kernels that really execute.

    Attributes:
        integer: kernels on integers that hold a planned layer.
        floating: convolution and matrix kernels in float, attention products included.
        by_name: number of nodes of every such operator.
        integer_from: integer kernels by the first step that they run at, where phases differ.

    All but the last are of the phase with most of them.
    """

    integer: int
    floating: int
    by_name: Mapping[str, int]
    integer_from: Mapping[int, int] = field(default_factory=dict)

    def integer_at(self, step: int) -> int:
        """Integer kernels that run at a step."""
        started = [start for start in self.integer_from if start <= step]
        return self.integer_from[max(started)] if started else self.integer


class Backend(Protocol):
    """One target. Backends never inherit from each other and see no other floor but `emit`."""

    name: str
    forms: tuple[str, ...]
    """What its packages may look like, `STANDARD` first."""
    form: str
    """Of the packages this one emits, opens and counts the kernels of."""

    def in_form(self, form: str) -> Backend:
        """The same target for packages of another of its `forms`."""

    def menu(self) -> Menu:
        """Precisions every kind of layer may take."""

    def check(self, plan: DeploymentPlan, info: ModelInfo) -> tuple[Unsupported, ...]:
        """Everything in the plan the target cannot do; empty if it can be emitted."""

    def rounded(self, network: Network) -> Network:
        """The network with the numbers that the form keeps of it; itself where it keeps all."""

    def emit(self, model: Exportable) -> Mapping[str, File]:
        """Target-specific files of the package by relative path: the graph and its runtime."""

    def count_kernels(self, package: Path) -> KernelCount:
        """Count the kernels the runtime on this host will execute for the package's graph."""

    def open(self, package: Path, *, threads: int = 1) -> Evaluate:
        """The package's network on this host."""

    def weight_bytes(self, weight_shape: tuple[int, ...], precision: Precision) -> tuple[int, int]:
        """Bytes of a layer's weight, scales included: in the package, and once it is loaded."""

    def bench_tool(self) -> Mapping[str, File]:
        """Program that times the graphs of a kit on a device, by path inside the kit."""

    def emit_boundary(self, kind: BoundaryKind, shape: tuple[int, ...]) -> Mapping[str, File]:
        """A graph that does nothing but convert a tensor `sample` of this shape."""

    def versions(self) -> Mapping[str, str]:
        """Versions of the vendor libraries the package was made with."""
