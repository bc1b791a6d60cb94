"""Pictures of a search are files of their kind, the same for the same numbers."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from edgeqdm.bench.heatmap import (
    FLOOR_DB,
    KINDS,
    PICTURES,
    PLOTS,
    check_plot,
    decibels,
    draw_front,
    draw_heatmap,
)
from edgeqdm.errors import InputError
from edgeqdm.ir.precision import W8A8, Precision
from edgeqdm.ir.search import FoundPlan, ParetoReport
from edgeqdm.ir.sensitivity import LayerSensitivity, SensitivityReport, StepRange

HOSTILE = "</th><script src='http://evil.example/x.js'>alert(1)</script>\"'&"
MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-", ".html": b"<!doctype"}
STEPS = 4


def report_of(*layers: str) -> SensitivityReport:
    """Damages between 1e-6 and 1, at two precisions."""
    generator = np.random.default_rng(0)
    return SensitivityReport(
        model="a" * 64,
        sampler="b" * 64,
        n_steps=STEPS,
        images=2,
        seed=0,
        ranges=(StepRange(start=0, stop=2), StepRange(start=2, stop=STEPS)),
        entries=tuple(
            LayerSensitivity(
                layer=layer,
                precision=precision,
                forced=tuple(10 ** generator.uniform(-6, 0, STEPS)),
                propagated=tuple(10 ** generator.uniform(-6, 0, 2)),
            )
            for precision in (W8A8, Precision("w4a8"))
            for layer in layers
        ),
    )


def pareto(
    *, measured: bool, origins: tuple[str, ...] = ("search", "uniform w8a8", "search")
) -> ParetoReport:
    plans = tuple(
        FoundPlan(
            trial=k,
            latency_ms=1.0 + k,
            image_sqnr_db=10.0 * k,
            disk_bytes=1000,
            resident_bytes=1000,
            phases=1,
            origin=origin,
            measured_ms=1.1 + k if measured else None,
            measured_sqnr_db=9.0 * k if measured else None,
        )
        for k, origin in enumerate(origins)
    )
    return ParetoReport(
        study="tiny",
        model="a" * 64,
        profile_sha256="c" * 64,
        complete=3,
        pruned=0,
        failed=0,
        float_ms=4.0,
        provenance="measured",
        plans=plans,
    )


@pytest.fixture(scope="module")
def pages() -> dict[str, bytes]:
    return {suffix: draw_heatmap(report_of("conv", "mix.0"), suffix) for suffix in PLOTS}


@pytest.mark.parametrize("suffix", PLOTS)
def test_every_kind_of_plot_is_a_file_of_its_kind(pages: dict[str, bytes], suffix: str) -> None:
    assert pages[suffix].startswith(MAGIC[suffix])
    assert len(pages[suffix]) > 1000


def test_the_png_can_be_read_and_is_not_blank(pages: dict[str, bytes]) -> None:
    with Image.open(io.BytesIO(pages[".png"])) as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10


@pytest.mark.parametrize("suffix", PLOTS)
def test_equal_reports_give_equal_bytes(pages: dict[str, bytes], suffix: str) -> None:
    assert draw_heatmap(report_of("conv", "mix.0"), suffix) == pages[suffix]


def test_upper_case_endings_are_the_same_kind(pages: dict[str, bytes]) -> None:
    assert draw_heatmap(report_of("conv", "mix.0"), ".HTML") == pages[".html"]


@pytest.mark.parametrize("suffix", [".jpg", ".gif", "", "png", ".htm"])
def test_other_endings_are_refused_with_those_that_are_known(suffix: str) -> None:
    with pytest.raises(InputError) as caught:
        draw_heatmap(report_of("conv"), suffix)
    assert caught.value.code == "EQ-3650"
    assert all(known in (caught.value.hint or "") for known in PLOTS)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_page_has_a_cell_for_every_number(pages: dict[str, bytes]) -> None:
    cells = [value for name, value in Page(pages[".html"]).attributes if name == "title"]
    report = report_of("conv", "mix.0")
    for entry in report.entries:
        for value in (*decibels(entry.forced), *decibels(entry.propagated)):
            assert f"{entry.layer}: {value:.1f} dB" in cells
    assert len(cells) == 2 * 2 * (STEPS + 2)


def test_a_page_escapes_the_names_of_layers() -> None:
    page = Page(draw_heatmap(report_of(HOSTILE, "conv"), ".html"))
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert any(value.startswith(HOSTILE) for _, value in page.attributes)


def test_a_page_loads_nothing(pages: dict[str, bytes]) -> None:
    page = Page(pages[".html"])
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not {"src", "href", "srcset", "data"} & {name for name, _ in page.attributes}
    assert not re.search(rb"https?:|url\(|@import|//", pages[".html"])


@pytest.mark.parametrize("suffix", PICTURES)
@pytest.mark.parametrize("measured", [False, True])
def test_a_front_is_drawn_the_same_every_time(suffix: str, measured: bool) -> None:
    one, other = (draw_front(pareto(measured=measured), suffix) for _ in range(2))
    assert one == other
    assert one.startswith(MAGIC[suffix])


ADDITIVE = "additive optimum, 2 phases, 1.250 ms"


@pytest.mark.parametrize(
    ("origins", "kinds"),
    [
        (("uniform w8a8",), {"uniform"}),
        ((ADDITIVE, "uniform fp32"), {"additive optimum", "uniform"}),
        (("search", ADDITIVE, "uniform w8"), {"additive optimum", "search", "uniform"}),
    ],
)
def test_a_front_tells_where_its_plans_come_from(origins: tuple[str, ...], kinds: set[str]) -> None:
    drawn = draw_front(pareto(measured=False, origins=origins), ".svg").decode()
    # Text is drawn as paths; what it says stands before it in a comment.
    assert {kind for kind in KINDS if f"<!-- {kind} -->" in drawn} == kinds


def test_a_front_without_plans_is_drawn() -> None:
    empty = pareto(measured=False).model_copy(update={"plans": ()})
    assert draw_front(empty, ".png").startswith(MAGIC[".png"])


def test_a_front_is_no_page() -> None:
    with pytest.raises(InputError) as caught:
        draw_front(pareto(measured=False), ".html")
    assert caught.value.code == "EQ-3650"


@pytest.mark.parametrize("suffix", PLOTS)
def test_known_endings_are_accepted(suffix: str) -> None:
    check_plot(suffix)


def test_damage_of_a_tenth_is_minus_10_db_and_none_is_the_floor() -> None:
    assert decibels((1.0, 0.1, 0.0, 1e-30)).tolist() == [0.0, -10.0, FLOOR_DB, FLOOR_DB]
