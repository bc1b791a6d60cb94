"""What every backend must do, as tests to inherit, and the quantized models they run on.

class TestMyTarget(BackendConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return MyTarget()
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeqdm.calibrate.observe import observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit import playback
from edgeqdm.emit.backend import (
    STANDARD,
    Array,
    Backend,
    Evaluate,
    Exportable,
    File,
    KernelCount,
    Menu,
    Network,
    Unsupported,
)
from edgeqdm.emit.integrity import check_files
from edgeqdm.emit.package import emit_package
from edgeqdm.emit.verify import verify_package
from edgeqdm.errors import UnsupportedError, VerifyError
from edgeqdm.ir.model import Decoder, LayerKind, ModelInfo
from edgeqdm.ir.package import Manifest
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import FP16, FP32, TABLE, W8A8, ActivationPolicy, Precision
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.load import load
from edgeqdm.quantize.plans import default_plan
from edgeqdm.quantize.quantizer import QuantizedDenoiser, quantize
from edgeqdm.testing import tiny

STEPS = 3
GUIDANCE = 2.0
CALIBRATION_RUNS = 8
RUNTIME = "runtime/python/run.py"
BLOCKED = ("torch", "edgeqdm", "diffusers", "onnx", "safetensors")
"""Modules a package's runtime must do without."""
_CODED = ("w8a8", "w6a8", "w4a8", "w4a4", "w8a8dyn", "w4g32a8", "w4g32a8dyn", "w4g64")
PRECISIONS = (*map(Precision, _CODED), FP16, FP32, TABLE)
"""One or more of every kind."""


class SmallNetwork(nn.Module):
    """A denoiser of one block with every kind of layer: x [B, 4, 8, 8], t [B], labels [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(tiny.N_LABELS + 1, 8)
        self.embed = nn.Linear(8, 8)
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.mix = nn.Linear(8, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        fed = self.embed(torch.sin(self.labels(labels) + 0.01 * t[:, None]))
        hidden = self.conv_in(x) + fed[:, :, None, None]
        hidden = hidden + self.conv(nn.functional.silu(self.norm(hidden)))
        mixed = self.mix(hidden.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(hidden.shape)
        out: Tensor = self.conv_out(hidden + mixed)
        return out


def small_denoiser(scheduler: Any, *, steps: int = STEPS, guidance: float = GUIDANCE) -> Denoiser:
    """`SmallNetwork` with random weights behind a diffusers scheduler; DDPM noise if it can."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallNetwork()
    example = (torch.zeros(2, 4, 8, 8), torch.tensor([9, 9]), torch.tensor([0, 1]))
    return wrap(
        network,
        scheduler,
        example,
        steps=steps,
        guidance=guidance,
        name="small",
        n_labels=tiny.N_LABELS,
        null_label=tiny.NULL_LABEL,
        decoder=Decoder(kind="pixel_shuffle", factor=2),
    )


def quantize_tiny(
    denoiser: Denoiser,
    target: str = "onnxruntime",
    activation: ActivationPolicy | None = None,
) -> QuantizedDenoiser:
    """The default plan of a tiny denoiser, calibrated on a few runs."""
    trajectories = collect_trajectories(denoiser, CALIBRATION_RUNS, seed=1)
    n_steps = denoiser.program.n_steps
    plan = default_plan(denoiser.info, target, n_steps, activation=activation)
    seen = observe(denoiser, trajectories, plan.phases[0].integer_layers())
    return quantize(denoiser, plan, seen)


@cache
def tiny_quantized(
    kind: str, target: str = "onnxruntime", activation: ActivationPolicy | None = None
) -> QuantizedDenoiser:
    """The tiny `unet` or `dit`, quantized once per process; DDPM noise and guidance are on."""
    write = {"unet": tiny.write_tiny_unet, "dit": tiny.write_tiny_dit}[kind]
    with tempfile.TemporaryDirectory() as folder:
        denoiser = load(write(Path(folder)), steps=STEPS, guidance=GUIDANCE, eta=1.0)
    return quantize_tiny(denoiser, target, activation)


class EagerBackend:
    """Runs the eager reference in this process: for tests of everything around a backend."""

    name = "eager"
    forms = (STANDARD,)
    form = STANDARD

    def __init__(self, quantized: QuantizedDenoiser) -> None:
        self.quantized = quantized

    def in_form(self, form: str) -> EagerBackend:
        return self

    def menu(self) -> Menu:
        return dict.fromkeys(LayerKind, PRECISIONS)

    def check(self, plan: DeploymentPlan, info: ModelInfo) -> tuple[Unsupported, ...]:
        known = {layer.name for layer in info.layers}
        asked = [a.layer for phase in plan.phases for a in phase.layers]
        return tuple(Unsupported(x, "no such layer", "another") for x in asked if x not in known)

    def rounded(self, network: Network) -> Network:
        return network

    def emit(self, model: Exportable) -> Mapping[str, File]:
        return {"model.txt": File(self.quantized.tables_sha256.encode(), "model")}

    def count_kernels(self, package: Path) -> KernelCount:
        planned = self.quantized.plan.n_integer_layers
        return KernelCount(planned, 0, {"eager": planned})

    def open(self, package: Path, *, threads: int = 1) -> Evaluate:
        network = self.quantized.network

        @torch.no_grad()
        def evaluate(x: Array, step: int, conditioning: NDArray[Any] | None) -> Array:
            fed = () if conditioning is None else (torch.from_numpy(conditioning.copy()),)
            found: Array = network(torch.from_numpy(x.copy()), torch.tensor(step), *fed).numpy()
            return found

        return evaluate

    def versions(self) -> Mapping[str, str]:
        return {"eager": "1"}


@dataclass(frozen=True)
class Emitted:
    """A package and what it was made of."""

    quantized: QuantizedDenoiser
    package: Path
    manifest: Manifest


@dataclass(frozen=True)
class Finished:
    """A run of a package's own runtime."""

    exit_code: int
    output: str
    errors: str


def run_blocked(package: Path, arguments: list[str], cwd: Path) -> Finished:
    """Run a package's `run.py` where nothing but its own imports can be found."""
    start = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-I", "-c", start, str(package / RUNTIME), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


def _plan_of(quantized: QuantizedDenoiser, assignment: LayerAssignment) -> DeploymentPlan:
    plan = quantized.plan
    phase = Phase(start=0, stop=plan.n_steps, layers=(assignment,))
    return plan.model_copy(update={"phases": (phase,)})


def _labels(emitted: Emitted, n_images: int) -> NDArray[np.int64]:
    return np.arange(n_images, dtype=np.int64) % emitted.manifest.model.conditioning.n_labels


class BackendConformance:
    """Inherit this and supply `backend`; packages of a tiny UNet and DiT are built once each.

    Attributes:
        activation: policy of the activations that have scales; default what their precision
            implies.
    """

    activation: ClassVar[ActivationPolicy | None] = None

    @classmethod
    def quantized(cls, kind: str, backend: Backend) -> QuantizedDenoiser:
        return tiny_quantized(kind, backend.name, cls.activation)

    @classmethod
    def assignment(cls, layer: str, precision: Precision) -> LayerAssignment:
        policy = cls.activation if cls.activation in precision.policies else None
        return LayerAssignment(layer=layer, precision=precision, activation=policy, reason="test")

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        raise NotImplementedError("supply the backend under test")

    @pytest.fixture(scope="class", params=["unet", "dit"])
    @classmethod
    def emitted(
        cls,
        request: pytest.FixtureRequest,
        backend: Backend,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Emitted:
        quantized = cls.quantized(request.param, backend)
        # A name with a space: paths are quoted wherever they are handed on.
        package = tmp_path_factory.mktemp("packages") / f"tiny {request.param}"
        return Emitted(quantized, package, emit_package(quantized, backend, package))

    def test_default_plan_is_accepted(self, backend: Backend) -> None:
        for kind in ("unet", "dit"):
            quantized = self.quantized(kind, backend)
            assert backend.check(quantized.plan, quantized.info) == ()

    def test_unknown_layer_is_refused_by_name(self, backend: Backend, tmp_path: Path) -> None:
        quantized = self.quantized("dit", backend)
        unknown = self.assignment("no.such", W8A8)
        (refused,) = backend.check(_plan_of(quantized, unknown), quantized.info)
        assert refused.layer == "no.such"
        assert refused.reason
        assert refused.instead

    def test_precisions_are_accepted_exactly_where_the_menu_has_them(
        self, backend: Backend
    ) -> None:
        quantized = self.quantized("unet", backend)
        menu = backend.menu()
        for layer in quantized.info.layers:
            for precision in PRECISIONS:
                asked = self.assignment(layer.name, precision)
                refused = backend.check(_plan_of(quantized, asked), quantized.info)
                assert bool(refused) == (precision not in menu[layer.kind])
                assert all(u.layer == layer.name and u.reason and u.instead for u in refused)

    def test_refused_plan_leaves_nothing_behind(
        self, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quantized = self.quantized("dit", backend)
        monkeypatch.setattr(type(backend), "menu", lambda _: dict.fromkeys(LayerKind, (FP32,)))
        with pytest.raises(UnsupportedError) as caught:
            emit_package(quantized, backend, tmp_path / "package")
        assert quantized.plan.phases[0].integer_layers()[0] in caught.value.message
        assert list(tmp_path.iterdir()) == []

    def test_package_verifies_and_every_planned_layer_is_an_integer_kernel(
        self, backend: Backend, emitted: Emitted
    ) -> None:
        found = verify_package(emitted.package, backend)
        planned = emitted.quantized.plan.phases[0].integer_layers()
        assert found.planned == found.kernels.integer == len(planned)
        assert found.manifest == emitted.manifest
        assert len(found.deviation) == STEPS
        assert max(found.deviation) <= playback.GOLDEN_SHARE

    def test_batches_of_other_sizes_follow_the_integer_reference(
        self, backend: Backend, emitted: Emitted
    ) -> None:
        player = playback.open_player(emitted.package)
        evaluate = backend.open(emitted.package)
        rng = np.random.default_rng(0)
        for n_images in (1, 5):
            x = rng.standard_normal((n_images, *player.sample_shape)).astype(np.float32)
            labels = _labels(emitted, n_images)
            found = playback.guided(player, evaluate, x, 0, labels)
            expected = emitted.quantized.predict(
                torch.from_numpy(x), 0, torch.from_numpy(labels)
            ).numpy()
            error = float(np.sqrt(np.mean(np.square(found - expected))))
            assert error <= playback.GOLDEN_SHARE * player.golden_noise_rms[0]

    def test_runtime_without_torch_draws_the_same_samples(
        self, backend: Backend, emitted: Emitted, tmp_path: Path
    ) -> None:
        arguments = ["--seed", "7", "--label", "0,2", "--out", "sheet.png", "--latents", "x.npy"]
        done = run_blocked(emitted.package, arguments, tmp_path)
        assert done.exit_code == 0, done.errors
        found = np.load(tmp_path / "x.npy", allow_pickle=False)
        expected = playback.sample(
            playback.open_player(emitted.package),
            backend.open(emitted.package),
            np.array([0, 2], np.int64),
            seed=7,
            images=range(2),
        )
        np.testing.assert_array_equal(found, expected)
        assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")

    def test_runtime_passes_its_own_self_test(self, emitted: Emitted, tmp_path: Path) -> None:
        done = run_blocked(emitted.package, ["--self-test"], tmp_path)
        assert done.exit_code == 0, done.errors
        assert json.loads(done.output)["passed"] is True

    def test_changed_byte_in_any_file_is_found(self, emitted: Emitted, tmp_path: Path) -> None:
        for relative in emitted.manifest.files:
            path = emitted.package / relative
            data = path.read_bytes()
            middle = len(data) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
            try:
                with pytest.raises(VerifyError, match="1 fault"):
                    check_files(emitted.package)
            finally:
                path.write_bytes(data)
        check_files(emitted.package)

    def test_runtime_refuses_a_changed_file(self, emitted: Emitted, tmp_path: Path) -> None:
        path = emitted.package / "golden.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        try:
            done = run_blocked(emitted.package, ["--self-test"], tmp_path)
        finally:
            path.write_bytes(data)
        assert done.exit_code == VerifyError.exit_code
        assert "golden.safetensors" in done.errors

    # The cheaper model only: the second emission costs as much as the first.
    @pytest.mark.parametrize("emitted", ["dit"], indirect=True)
    def test_emitting_twice_gives_the_same_files(
        self, backend: Backend, emitted: Emitted, tmp_path: Path
    ) -> None:
        again = emit_package(emitted.quantized, backend, tmp_path / "again")
        same = {name: getattr(emitted.manifest, name) for name in ("created", "manifest_sha256")}
        assert again.model_copy(update=same) == emitted.manifest
        for relative in emitted.manifest.files:
            one, other = emitted.package / relative, tmp_path / "again" / relative
            assert one.read_bytes() == other.read_bytes(), relative
