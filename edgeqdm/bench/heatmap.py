"""Pictures of a search: damage by layer and step, and its front."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray

from edgeqdm.errors import InputError
from edgeqdm.ir.search import FoundPlan, ParetoReport
from edgeqdm.ir.sensitivity import LayerSensitivity, SensitivityReport

PICTURES = (".png", ".svg", ".pdf")
PLOTS = (*PICTURES, ".html")
COLOURS = "magma"
FLOOR_DB = -120.0
ROW_INCHES = 0.16
KINDS = {"uniform": "^", "additive optimum": "s", "search": "o"}
"""What a plan's origin begins with, and its marker."""


def check_plot(suffix: str, known: tuple[str, ...] = PLOTS) -> None:
    """Raise InputError unless this ending is a kind of plot."""
    if suffix.lower() not in known:
        raise InputError(
            "EQ-3650",
            f"a plot cannot be written as {suffix or 'a file without an ending'}",
            path="plot",
            hint=f"end its name in {', '.join(known)}",
        )


def draw_heatmap(report: SensitivityReport, suffix: str) -> bytes:
    """Damage of every layer at every step, in dB, one panel per precision.

    Left the network's output, fed the float model's samples; right the final samples, the layer
    quantized in one range of steps only.
    """
    check_plot(suffix)
    return _html(report) if suffix.lower() == ".html" else _picture(report, suffix.lower())


def decibels(values: tuple[float, ...]) -> NDArray[np.float64]:
    """10 log10 of damages, no less than `FLOOR_DB`."""
    floor = 10 ** (FLOOR_DB / 10)
    found: NDArray[np.float64] = 10 * np.log10(np.maximum(np.asarray(values), floor))
    return found


def _by_precision(report: SensitivityReport) -> dict[str, list[LayerSensitivity]]:
    found: dict[str, list[LayerSensitivity]] = {}
    for entry in report.entries:
        found.setdefault(str(entry.precision), []).append(entry)
    return found


Side = Callable[[LayerSensitivity], tuple[float, ...]]
SIDES: tuple[tuple[str, Side], ...] = (
    ("output of the network at each step", lambda entry: entry.forced),
    ("final samples, quantized in one range of steps", lambda entry: entry.propagated),
)


def _picture(report: SensitivityReport, suffix: str) -> bytes:
    panels = _by_precision(report)
    heights = [len(entries) for entries in panels.values()]
    figure = Figure(
        figsize=(13, 1.2 * len(panels) + ROW_INCHES * sum(heights)), layout="constrained"
    )
    axes = figure.subplots(
        len(panels), 2, squeeze=False, height_ratios=heights, width_ratios=(2, 1)
    )
    for row, (precision, entries) in enumerate(panels.items()):
        for column, (title, side) in enumerate(SIDES):
            values = np.stack([decibels(side(entry)) for entry in entries])
            axis = axes[row, column]
            image = axis.imshow(values, aspect="auto", cmap=COLOURS, interpolation="nearest")
            axis.set_title(f"{precision}: {title}", fontsize=8)
            names = [entry.layer for entry in entries] if column == 0 else []
            axis.set_yticks(range(len(names)), names, fontsize=5)
            axis.set_xlabel("step, 0 is the noisiest" if column == 0 else "range", fontsize=7)
            axis.tick_params(axis="x", labelsize=6)
            if column:
                labels = [f"{r.start}-{r.stop - 1}" for r in report.ranges]
                axis.set_xticks(range(len(labels)), labels, fontsize=6)
            bar = figure.colorbar(image, ax=axis)
            bar.set_label("error over signal, dB", fontsize=6)
            bar.ax.tick_params(labelsize=6)
    return _bytes(figure, suffix)


def _bytes(figure: Figure, suffix: str) -> bytes:
    buffer = io.BytesIO()
    # Dates and versions in the file would make equal pictures differ.
    metadata = {"Software": None} if suffix == ".png" else {"Date": None, "Creator": None}
    if suffix == ".pdf":
        metadata = {"CreationDate": None, "Creator": None, "Producer": None}
    with mpl.rc_context({"svg.hashsalt": "edgeqdm"}):
        figure.savefig(buffer, format=suffix.removeprefix("."), dpi=130, metadata=metadata)
    return buffer.getvalue()


def _html(report: SensitivityReport) -> bytes:
    environment = Environment(
        loader=PackageLoader("edgeqdm.bench"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    panels = []
    for precision, entries in _by_precision(report).items():
        tables = []
        for title, side in SIDES:
            rows = [(entry.layer, decibels(side(entry))) for entry in entries]
            tables.append((title, _cells(rows)))
        panels.append((precision, tables))
    text = environment.get_template("heatmap.html.j2").render(
        report=report,
        panels=panels,
        labels=[f"{r.start}-{r.stop - 1}" for r in report.ranges],
    )
    return text.encode()


def _cells(
    rows: list[tuple[str, NDArray[np.float64]]],
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Layer, then (colour, text) of every cell."""
    values = np.concatenate([row for _, row in rows])
    low, span = float(values.min()), max(float(np.ptp(values)), 1e-9)
    colours = colormaps[COLOURS]
    return [
        (layer, [(to_hex(colours((v - low) / span)), f"{v:.1f}") for v in row])
        for layer, row in rows
    ]


def draw_front(report: ParetoReport, suffix: str) -> bytes:
    """Image SQNR over predicted latency; measured points beside it where there are any."""
    check_plot(suffix.lower(), PICTURES)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.step(
        [p.latency_ms for p in report.plans],
        [p.image_sqnr_db for p in report.plans],
        where="post",
        color="0.7",
        linewidth=1,
    )
    for kind, marker in KINDS.items():
        if plans := [p for p in report.plans if _kind(p) == kind]:
            x, y = [p.latency_ms for p in plans], [p.image_sqnr_db for p in plans]
            axis.plot(x, y, marker, markersize=5, label=kind)
    timed = [
        (p.measured_ms, p.measured_sqnr_db)
        for p in report.plans
        if p.measured_ms is not None and p.measured_sqnr_db is not None
    ]
    if timed:
        axis.plot(*zip(*timed, strict=True), "x", color="k", label="measured, unseen images")
    axis.axvline(report.float_ms, color="0.5", linestyle=":", linewidth=1)
    axis.annotate("float", (report.float_ms, axis.get_ylim()[0]), fontsize=7, rotation=90)
    axis.set_xlabel(f"ms per step and image, predicted ({report.provenance} entries)")
    axis.set_ylabel("image SQNR, dB")
    axis.set_title(f"{report.study}: front of {report.complete} plans", fontsize=9)
    if report.plans:
        axis.legend(fontsize=8)
    return _bytes(figure, suffix.lower())


def _kind(plan: FoundPlan) -> str:
    """Of where a plan comes from, whatever precision or budget is told with it."""
    return next((kind for kind in KINDS if plan.origin.startswith(kind)), "search")
