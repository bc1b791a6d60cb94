"""A package samples in a real browser, as its Python runtime does, and refuses in one line."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeqdm import load, pipeline
from edgeqdm.backends.onnxruntime.backend import OnnxRuntimeBackend
from edgeqdm.backends.onnxruntime.forms import ORT, SMALL
from edgeqdm.emit import playback
from edgeqdm.emit.integrity import seal_manifest
from edgeqdm.emit.package import emit_package
from edgeqdm.ir.package import Manifest
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.stages import rule_plan
from edgeqdm.testing import tiny
from edgeqdm.testing.browser import (
    DEPS_VARIABLE,
    DRAW,
    PLAIN_HOST,
    START_SECONDS,
    Browser,
    Site,
    draw,
)
from edgeqdm.testing.conformance import GUIDANCE, quantize_tiny, tiny_quantized

ROOT = Path(__file__).parents[3]
DEPENDENCIES = Path(os.environ.get(DEPS_VARIABLE, ROOT / "build/web")).resolve()
LABELS, SEED = (0, 2), 7
# Of the RMS of the samples. Codes that fall on the other side of a rounding half-tie are all that
# differs; measured 0.015 at most.
SHARE = 0.03
# The key, as WebDriver names it.
ENTER = "\ue007"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def in_two_phases(denoiser: Denoiser, later: str) -> DeploymentPlan:
    """The rule's plan for the first step, its integer layers at another precision after that."""
    rule = rule_plan(denoiser)
    (only,) = rule.phases
    layers = tuple(
        a.model_copy(update={"precision": Precision(later)}) if a.precision.integer else a
        for a in only.layers
    )
    changes: tuple[dict[str, Any], ...] = ({"stop": 1}, {"start": 1, "layers": layers})
    return rule.model_copy(
        update={"phases": tuple(only.model_copy(update=change) for change in changes)}
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Packages and onnxruntime-web, served."""
    if not (DEPENDENCIES / "ort/ort.wasm.min.mjs").exists():
        pytest.skip(f"no onnxruntime-web in {DEPENDENCIES}: tools/web_deps.sh")
    root = tmp_path_factory.mktemp("site")
    (root / "ort").symlink_to(DEPENDENCIES / "ort")
    backend = OnnxRuntimeBackend()
    emit_package(tiny_quantized("unet"), backend, root / "unet")
    for form in (SMALL, ORT):
        emit_package(tiny_quantized("dit"), OnnxRuntimeBackend(form), root / f"dit-{form}")
    folder = tiny.write_tiny_conditional_unet(tmp_path_factory.mktemp("model"))
    conditional = load(
        folder,
        steps=3,
        guidance=GUIDANCE,
        conditioning=tiny.tiny_embeddings(8),
        null_conditioning=tiny.tiny_embeddings(1, seed=1)[0],
    )
    emit_package(quantize_tiny(conditional), backend, root / "conditional")
    unet = load("reference:unet-fmnist", steps=6, guidance=GUIDANCE)
    pipeline.emit(unet, root / "unet-fmnist", samples=2, correction=False)
    dit = tiny_quantized("dit").denoiser
    plan = in_two_phases(dit, "w4g16a8dyn")
    pipeline.emit(dit, root / "phases", samples=2, plan=plan)
    found = Site(root)
    yield found
    found.close()


@pytest.fixture
def quiet(browser: Browser) -> Iterator[None]:
    """Neither an error nor a rejection that nobody handled has reached the console."""
    browser.log()
    yield
    assert browser.log() == []


def drawn_by_python(package: Path, conditioning: NDArray[Any]) -> NDArray[np.float32]:
    player, evaluate = playback.open_player(package), OnnxRuntimeBackend().open(package)
    images = range(len(conditioning))
    return playback.sample(player, evaluate, conditioning, seed=SEED, images=images)


def rgba(package: Path, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The sheet of samples as a canvas holds it."""
    image = playback.sheet(playback.decode(playback.open_player(package), latents), 10)
    colours = image if image.shape[2] == 3 else image[:, :, [0, 0, 0]]
    return np.concatenate([colours, np.full_like(colours[:, :, :1], 255)], 2)


def assert_near(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    rms = np.sqrt(np.mean(np.square(found - expected)))
    assert rms <= SHARE * np.sqrt(np.mean(np.square(expected)))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("package", ["unet", "phases", "unet-fmnist"])
def test_browser_draws_what_the_python_runtime_draws(
    browser: Browser, site: Site, package: str
) -> None:
    browser.open(site.page(package))
    found = draw(browser, label=",".join(map(str, LABELS)), seed=str(SEED))
    assert_near(found.latents, drawn_by_python(site.root / package, np.array(LABELS)))
    expected = rgba(site.root / package, found.latents)
    np.testing.assert_array_equal(found.picture, expected.reshape(-1))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "package", ["unet", "conditional", "phases", "unet-fmnist", "dit-small", "dit-ort"]
)
def test_network_in_the_browser_passes_the_self_test(
    browser: Browser, site: Site, package: str
) -> None:
    browser.open(site.page(package))
    found = browser.run("return await edgeqdm.selfTest();")
    assert found["passed"], found
    assert max(found["deviation"]) <= playback.GOLDEN_SHARE
    # Noise, schedule and correction are exact: only the network's float sums differ.
    assert found["sampler"] == 0


@pytest.mark.usefixtures("quiet")
def test_page_shows_picture_and_progress(browser: Browser, site: Site) -> None:
    browser.open(site.page("unet-fmnist"))
    browser.wait_for("about", "files checked")
    browser.run("""
        const bar = document.getElementById("progress");
        window.seen = [];
        new MutationObserver(() => seen.push(bar.value)).observe(bar, { attributes: true });""")
    browser.type("label", "Bag, 3")
    browser.click("sample")
    assert browser.wait_for("status", "images in").startswith("2 images in")
    assert browser.text("error") == ""
    np.testing.assert_allclose(browser.run("return seen;"), np.arange(7) / 6)
    found = browser.run("""
        const canvas = document.getElementById("picture");
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [canvas.height, canvas.width, Array.from(pixels.data)];""")
    expected = rgba(site.root / "unet-fmnist", draw(browser, label="8,3").latents)
    np.testing.assert_array_equal(np.array(found[2]).reshape(*found[:2], 4), expected)
    assert browser.screenshot().startswith(b"\x89PNG")
    browser.run("HTMLAnchorElement.prototype.click = function () { window.link = this; };")
    browser.click("download")
    name, content = browser.run("return [link.download, link.href];")
    assert name == "samples.png"
    assert content.startswith("data:image/png;base64,")
    browser.click("test")
    browser.wait_for("status", "Self-test passed")


@pytest.mark.usefixtures("quiet")
def test_page_draws_at_once_when_the_address_says_so(browser: Browser, site: Site) -> None:
    browser.open(site.page("phases", "ort=/ort&auto=1&seed=5&label=1&count=3"))
    assert browser.wait_for("status", "images in").startswith("3 images in")


@pytest.mark.usefixtures("quiet")
def test_page_reads_embeddings(browser: Browser, site: Site, tmp_path: Path) -> None:
    embeddings = tiny.tiny_embeddings(2, seed=3).numpy()
    np.save(tmp_path / "e.npy", embeddings)
    browser.open(site.page("conditional"))
    browser.wait_for("about", "files checked")
    browser.type("embedding", str(tmp_path / "e.npy"))
    browser.click("sample")
    browser.wait_for("status", "2 images in")
    data = {"embedding": list((tmp_path / "e.npy").read_bytes())}
    script = DRAW.replace("given[0]", "{ seed: 7, embedding: Uint8Array.from(given[0].embedding) }")
    found = browser.run(script, data)
    latents = np.frombuffer(base64.b64decode(found["latents"]), "<f4").reshape(found["shape"])
    assert_near(latents, drawn_by_python(site.root / "conditional", embeddings))


@pytest.mark.usefixtures("quiet")
def test_cancel_ends_at_once_and_the_page_goes_on(browser: Browser, site: Site) -> None:
    browser.open(site.page("unet-fmnist", "ort=/ort&count=100"))
    browser.wait_for("about", "files checked")
    browser.click("sample")
    browser.wait_for("status", "Step 1/6")
    browser.click("cancel")
    browser.wait_for("status", "Cancelled")
    assert browser.text("error") == ""
    assert draw(browser, label="1").latents.shape[0] == 1


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("button", ["sample", "test"])
def test_cancel_while_the_package_opens_again_leaves_nothing_to_do(
    browser: Browser, site: Site, monkeypatch: pytest.MonkeyPatch, button: str
) -> None:
    browser.open(site.page("unet-fmnist", "ort=/ort&count=100"))
    browser.wait_for("about", "files checked")
    held = threading.Event()
    send = SimpleHTTPRequestHandler.do_GET

    def send_late(handler: SimpleHTTPRequestHandler) -> None:
        if "schedule.json" in handler.path:
            held.wait(START_SECONDS)
        send(handler)

    monkeypatch.setattr(SimpleHTTPRequestHandler, "do_GET", send_late)
    browser.click("sample")
    browser.wait_for("status", "Step 1/6")
    browser.click("cancel")
    browser.wait_for("status", "Cancelled")
    browser.click(button)
    browser.wait_for("status", "Loading the network")
    browser.click("cancel")
    browser.wait_for("status", "Cancelled")
    held.set()
    # Answered after all that the page has asked for before.
    assert draw(browser, label="1").latents.shape[0] == 1
    assert browser.text("status") == "Cancelled"
    assert browser.text("error") == ""


@pytest.mark.usefixtures("quiet")
def test_cancel_while_embeddings_are_read_leaves_nothing_to_do(
    browser: Browser, site: Site, tmp_path: Path
) -> None:
    np.save(tmp_path / "e.npy", tiny.tiny_embeddings(2, seed=3).numpy())
    browser.open(site.page("conditional"))
    browser.wait_for("about", "files checked")
    browser.run("""
        const read = File.prototype.arrayBuffer;
        const held = new Promise((resolve) => { window.release = resolve; });
        File.prototype.arrayBuffer = async function () { await held; return read.call(this); };""")
    browser.type("embedding", str(tmp_path / "e.npy"))
    browser.click("sample")
    browser.click("cancel")
    browser.wait_for("status", "Cancelled")
    browser.run("window.release();")
    # Longer than the samples would take.
    found = browser.run("return (await edgeqdm.selfTest()).passed;")
    assert found is True
    assert browser.text("status") == "Cancelled"
    assert browser.text("error") == ""


@pytest.mark.usefixtures("quiet")
def test_focus_is_on_cancel_while_sampling_and_back_afterwards(
    browser: Browser, site: Site
) -> None:
    browser.open(site.page("unet-fmnist", "ort=/ort&count=100"))
    browser.wait_for("about", "files checked")
    press: dict[str, Callable[[], None]] = {
        "sample": lambda: browser.click("sample"),
        "count": lambda: browser.type("count", ENTER),
    }
    for element, start in press.items():
        start()
        browser.wait_for("status", "Step 1/6")
        assert browser.run("return document.activeElement.id;") == "cancel"
        browser.click("cancel")
        browser.wait_for("status", "Cancelled")
        assert browser.run("return document.activeElement.id;") == element


@pytest.mark.usefixtures("quiet")
def test_groups_of_controls_have_names(browser: Browser, site: Site) -> None:
    browser.open(site.page("unet"))
    browser.wait_for("about", "files checked")
    chips = browser.run("""
        const { role, ariaLabel, hidden } = document.getElementById("chips");
        return [role, ariaLabel, hidden];""")
    legend = browser.run("return document.querySelector('#fields > legend').innerText;")
    assert chips == ["group", "Labels by name", False]
    assert legend == "What to draw"


@pytest.mark.usefixtures("quiet")
def test_isolated_page_uses_threads_and_draws_the_same(browser: Browser, site: Site) -> None:
    browser.open(site.page("unet-fmnist"))
    alone = draw(browser, label="0,2", seed="7").latents
    # A server of its own: what the browser has kept of the other lacks the headers.
    isolated = Site(site.root, isolated=True)
    try:
        browser.open(isolated.page("unet-fmnist"))
        assert browser.run("return crossOriginIsolated;") is True
        assert_near(draw(browser, label="0,2", seed="7").latents, alone)
    finally:
        isolated.close()


def test_insecure_page_says_that_it_checked_no_hashes(browser: Browser, site: Site) -> None:
    plain = f"http://{PLAIN_HOST}:{site.port}/phases/runtime/web/"
    browser.open(f"{plain}?ort=/ort")
    browser.wait_for("about", "not checked")
    assert draw(browser, label="1").latents.shape[0] == 1
    browser.open(f"{plain}?ort={site.origin}/ort")
    assert "only a page on localhost" in browser.wait_for("error", "another server")


@pytest.mark.usefixtures("quiet")
def test_onnxruntime_of_another_server_is_taken_on_localhost(browser: Browser, site: Site) -> None:
    browser.open(site.page("phases", f"ort=http://localhost:{site.port}/ort"))
    assert draw(browser, label="1").latents.shape[0] == 1


def refusal(browser: Browser, url: str, options: Mapping[str, str] | None = None) -> str:
    """The error line after opening the page and pressing the button, if that can be pressed."""
    browser.open(url)
    ready = "return !document.getElementById('sample').disabled;"
    give_up = time.monotonic() + START_SECONDS
    while not browser.text("error") and time.monotonic() < give_up:
        if browser.run(ready):
            for element, text in (options or {}).items():
                browser.type(element, text)
            browser.click("sample")
            browser.wait_for("error", " ")
    assert [e for e in browser.log() if e["source"] == "javascript"] == []
    return browser.text("error")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"label": "3"}, "label 3 is out of range 0..2"),
        ({"label": "hat"}, 'unknown label in "hat"; known: bag, boot, coat'),
        ({"label": "1", "count": "0"}, "the number of images must be a whole number in 1..1000"),
        ({"seed": "x"}, "seed must be an integer in 0..2**64 - 1"),
    ],
)
def test_choice_that_does_not_fit_is_refused(
    browser: Browser, site: Site, options: Mapping[str, str], reason: str
) -> None:
    assert refusal(browser, site.page("unet"), options).startswith(reason)


def test_missing_onnxruntime_is_named_with_what_to_do(browser: Browser, site: Site) -> None:
    message = refusal(browser, site.page("unet", ""))
    assert message.startswith("onnxruntime-web is missing: no ort.wasm.min.mjs, ort-wasm-simd")
    assert "copy node_modules/onnxruntime-web/dist to runtime/web/ort" in message


def test_old_onnxruntime_is_refused(browser: Browser, site: Site) -> None:
    old = site.root / "old"
    old.mkdir()
    for name in ("ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        (old / name).touch()
    (old / "ort.wasm.min.mjs").write_text("export const env = { versions: { web: '1.9.0' } };")
    assert "onnxruntime-web 1.9.0 is too old" in refusal(browser, site.page("unet", "ort=/old"))


def reseal(package: Path, **changes: Any) -> None:
    """Write the manifest again, so that it fits files which were changed on purpose."""
    manifest = Manifest.model_validate_json((package / "manifest.json").read_bytes())
    entries = {
        name: entry.model_copy(
            update={
                "sha256": hashlib.sha256((package / name).read_bytes()).hexdigest(),
                "size": (package / name).stat().st_size,
            }
        )
        for name, entry in manifest.files.items()
    }
    changed = manifest.model_copy(update={"files": entries, **changes})
    (package / "manifest.json").write_bytes(seal_manifest(changed))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_garbage(package: Path) -> None:
    (package / "model.onnx").write_bytes(b"no graph")
    reseal(package)


def divide_by_zero(package: Path) -> None:
    model = onnx.load(package / "model.onnx")
    (output,) = model.graph.output
    zero = numpy_helper.from_array(np.zeros((), np.float32), "zero")
    model.graph.initializer.append(zero)
    model.graph.node.append(onnx.helper.make_node("Div", [output.name, "zero"], ["infinite"]))
    output.name = "infinite"
    onnx.save(model, package / "model.onnx")
    reseal(package)


def change_year(package: Path) -> None:
    path = package / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"created": "2', b'"created": "3'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: flip(p / "model.onnx"), "package is damaged: model.onnx (changed)"),
        (lambda p: flip(p / "schedule.json"), "package is damaged: schedule.json (changed)"),
        (lambda p: (p / "model.onnx").write_bytes(b""), "package is damaged: model.onnx (size)"),
        (change_year, "package is damaged: manifest.json (changed)"),
        (lambda p: reseal(p, schema_version=2), "manifest.json has schema_version 2, this page"),
        (
            lambda p: (p / "manifest.json").write_text("{}"),
            "manifest.json is not that of",
        ),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is not JSON"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read: HTTP 404"),
        (lambda p: (p / "runtime/web/page.js").unlink(), "page.js cannot be read"),
        (lambda p: (p / "runtime/web/worker.js").unlink(), "worker.js does not run"),
        (write_garbage, "refuses the graph"),
        (divide_by_zero, "step 0: the network's output holds NaN or Inf"),
    ],
)
def test_package_that_cannot_be_used_is_refused(
    browser: Browser, site: Site, damage: Callable[[Path], None], reason: str
) -> None:
    # A name of its own: the browser would keep files of one and the same.
    with tempfile.TemporaryDirectory(dir=site.root) as folder:
        package = Path(folder) / "package"
        shutil.copytree(site.root / "unet", package)
        damage(package)
        assert reason in refusal(browser, site.page(f"{Path(folder).name}/package"))


def test_page_opened_as_a_file_says_how_to_open_it(browser: Browser, site: Site) -> None:
    browser.open((site.root / "unet/runtime/web/index.html").as_uri())
    assert "python -m http.server" in browser.wait_for("error", "cannot be opened as a file")
