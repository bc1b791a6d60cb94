"""A denoiser gives what the network's own library gives, with guidance added in one place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeqdm.errors import EdgeqdmError, InputError, ModelError, NumericalError, UnsupportedError
from edgeqdm.ir.model import Decoder, Guidance
from edgeqdm.models.denoiser import Denoiser, check_labels, guided, wrap
from edgeqdm.models.layers import network_of
from edgeqdm.models.load import load
from edgeqdm.numerics import philox, solver
from edgeqdm.testing import tiny

SCHEDULER = diffusers.DDIMScheduler(clip_sample=False)
X = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 2, 1])
EMBEDDINGS = tiny.tiny_embeddings(3)
NULL_EMBEDDING = tiny.tiny_embeddings(1, seed=9)[0]
# One batch of 2B against two of B: other kernels, other order of sums; values are of order 1.
BATCHING_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return load(tiny.write_tiny_unet(tmp_path_factory.mktemp("unet")), steps=4)


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return load(tiny.write_tiny_dit(tmp_path_factory.mktemp("dit")), steps=4)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    folder = tiny.write_tiny_conditional_unet(tmp_path_factory.mktemp("conditional"))
    return load(folder, steps=4, conditioning=EMBEDDINGS, null_conditioning=NULL_EMBEDDING)


class Toy(nn.Module):
    """A network of one's own, labels or embeddings added at will."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form = form
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.labels = nn.Embedding(4, 4)
        self.prompt = nn.Linear(6, 4)

    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor | None = None) -> Any:
        f = self.conv(x) + t[:, None, None, None] / 1000
        if conditioning is not None:
            embed = self.prompt if conditioning.is_floating_point() else self.labels
            f = f + embed(conditioning)[:, :, None, None]
        return {"tensor": f, "tuple": (f, None), "sample": SimpleNamespace(sample=f)}[self.form]


@torch.no_grad()
def test_unet_matches_diffusers(unet: Denoiser) -> None:
    t = unet.timestep(1, 3)
    expected = network_of(unet.module)(X, t, class_labels=LABELS).sample
    assert torch.equal(unet.predict(X, 1, LABELS), expected)


@torch.no_grad()
def test_dit_matches_diffusers(dit: Denoiser) -> None:
    t = dit.timestep(1, 3)
    expected = network_of(dit.module)(X, t, class_labels=LABELS).sample
    assert torch.equal(dit.predict(X, 1, LABELS), expected)


@torch.no_grad()
def test_conditional_unet_matches_diffusers(conditional: Denoiser) -> None:
    t = conditional.timestep(1, 3)
    expected = network_of(conditional.module)(X, t, encoder_hidden_states=EMBEDDINGS).sample
    assert torch.equal(conditional.predict(X, 1, EMBEDDINGS), expected)


@torch.no_grad()
def test_unconditional_unet_matches_diffusers(tmp_path: Path) -> None:
    config = {**tiny.UNET_CONFIG, "num_class_embeds": None}
    network = tiny.build_network(config)
    denoiser = load(tiny.write_pipeline(tmp_path, network, config), steps=4)
    assert denoiser.info.conditioning.kind == "none"
    assert denoiser.draw_conditioning(3, torch.Generator()) is None
    expected = network(X, denoiser.timestep(0, 3)).sample
    assert torch.equal(denoiser.predict(X, 0, None), expected)


@torch.no_grad()
@pytest.mark.parametrize("config", [tiny.UNET_CONFIG, tiny.DIT_CONFIG])
def test_learned_variance_is_cut_off(tmp_path: Path, config: dict[str, Any]) -> None:
    config = {**config, "out_channels": 8}
    network = tiny.build_network(config)
    denoiser = load(tiny.write_pipeline(tmp_path, network, config), steps=4)
    expected = network(X, denoiser.timestep(0, 3), class_labels=LABELS).sample[:, :4]
    assert torch.equal(denoiser.predict(X, 0, LABELS), expected)


LEARNED: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "variance_type": "learned_range",
}


def _load_learned(folder: Path, config: dict[str, Any], guidance: float) -> Denoiser:
    config = {**config, "out_channels": 8}
    network = tiny.build_network(config)
    sidecar = (
        {"n_labels": 3, "null_label": tiny.NULL_LABEL} if "num_class_embeds" in config else None
    )
    tiny.write_pipeline(folder, network, config, scheduler=LEARNED, sidecar=sidecar)
    return load(folder, steps=6, guidance=guidance)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("config", [tiny.UNET_CONFIG, tiny.DIT_CONFIG], ids=["unet", "dit"])
def test_sampling_with_a_learned_variance_equals_the_loop_of_diffusers(
    tmp_path: Path, config: dict[str, Any], guidance: float
) -> None:
    denoiser = _load_learned(tmp_path, config, guidance)
    scheduler = diffusers.DDPMScheduler.from_config(LEARNED)
    scheduler.set_timesteps(6)
    network, shape = network_of(denoiser.module), denoiser.info.sample_shape

    def noise(stream: int) -> Tensor:
        return torch.from_numpy(philox.batch_normal(3, stream, range(3), shape))

    sample = noise(philox.INITIAL_STREAM)
    nulls = torch.full((3,), tiny.NULL_LABEL)
    for step, t in enumerate(scheduler.timesteps):
        f = network(sample, t.expand(3), class_labels=LABELS).sample
        f_null = network(sample, t.expand(3), class_labels=nulls).sample
        eps = f_null[:, :4] + guidance * (f - f_null)[:, :4]
        with mock.patch.object(scheduling_ddpm, "randn_tensor", return_value=noise(1 + step)):
            both = torch.cat([eps, f[:, 4:]], 1)
            sample = scheduler.step(both, t, sample).prev_sample
    found = solver.run(
        solver.Table.from_json(denoiser.program.model_dump(mode="json")),
        lambda x, step: denoiser.predict(torch.from_numpy(x), step, LABELS).numpy(),
        noise(philox.INITIAL_STREAM).numpy(),
        lambda step: noise(philox.step_stream(step)).numpy(),
    )
    # Float32 on both sides, batches of 3 against 6; samples reach a few units.
    scale = max(1.0, float(sample.abs().max()))
    assert float((torch.from_numpy(found) - sample).abs().max()) <= 1e-5 * scale


@torch.no_grad()
def test_guidance_takes_the_variance_of_the_condition(tmp_path: Path) -> None:
    denoiser = _load_learned(tmp_path, tiny.DIT_CONFIG, 3.0)
    network, t = network_of(denoiser.module), denoiser.timestep(1, 3)
    expected = network(X, t, class_labels=LABELS).sample[:, 4:]
    f = denoiser.predict(X, 1, LABELS)
    assert f.shape == (3, 8, 8, 8)
    torch.testing.assert_close(f[:, 4:], expected, rtol=0, atol=BATCHING_TOLERANCE)


def test_a_learned_variance_must_come_from_the_network(tmp_path: Path) -> None:
    tiny.write_pipeline(
        tmp_path, tiny.build_network(tiny.DIT_CONFIG), tiny.DIT_CONFIG, scheduler=LEARNED
    )
    with pytest.raises(InputError, match=r"\[2, 4, 8, 8\] instead of \[2, 8, 8, 8\]") as caught:
        load(tmp_path, steps=4)
    assert "variance" in str(caught.value.hint)


def test_a_wrapped_module_may_learn_its_variance() -> None:
    module = nn.Conv2d(4, 8, 1)

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = module

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return cast(Tensor, self.conv(x))

    scheduler = diffusers.DDPMScheduler.from_config(LEARNED)
    denoiser = wrap(Timed(), scheduler, (X, torch.zeros(3)), steps=4)
    assert torch.equal(denoiser.predict(X, 0, None), module(X))


@given(scale=st.floats(0.0, 20.0))
def test_guided_equals_the_formula(scale: float) -> None:
    conditioning, null = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(7.0)

    def evaluate(x: Tensor, c: Tensor | None) -> Tensor:
        assert c is not None
        return x.sin() + c[:, None, None, None]

    f = guided(evaluate, X, conditioning, null=null, guidance=Guidance(scale=scale))
    f_cond, f_null = evaluate(X, conditioning), evaluate(X, null.expand(3))
    # Elementwise, so only s = 1, where no sum is taken, rounds differently.
    torch.testing.assert_close(f, f_null + scale * (f_cond - f_null), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "batch", "conditioning"), [(1.0, 3, [1, 2, 3]), (2.0, 6, [0, 0, 0, 1, 2, 3])]
)
def test_guidance_takes_one_evaluation_with_null_first(
    scale: float, batch: int, conditioning: list[int]
) -> None:
    seen: list[tuple[int, list[int]]] = []

    def evaluate(x: Tensor, c: Tensor | None) -> Tensor:
        assert c is not None
        seen.append((x.shape[0], c.tolist()))
        return x

    labels = torch.tensor([1, 2, 3])
    guided(evaluate, X, labels, null=torch.tensor(0), guidance=Guidance(scale=scale))
    assert seen == [(batch, conditioning)]


@pytest.mark.parametrize(("conditioning", "null"), [(None, torch.tensor(0)), (LABELS, None)])
def test_guidance_without_both_conditionings_is_refused(
    conditioning: Tensor | None, null: Tensor | None
) -> None:
    with pytest.raises(InputError, match=r"needs a .*conditioning"):
        guided(lambda x, c: x, X, conditioning, null=null, guidance=Guidance(scale=2.0))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_predict_with_guidance_equals_two_calls(kind: str, request: Any) -> None:
    denoiser: Denoiser = request.getfixturevalue(kind)
    network, t = network_of(denoiser.module), denoiser.timestep(2, 3)
    f_cond = network(X, t, class_labels=LABELS).sample
    f_null = network(X, t, class_labels=torch.full((3,), tiny.NULL_LABEL)).sample
    f = replace(denoiser, guidance=Guidance(scale=3.0)).predict(X, 2, LABELS)
    torch.testing.assert_close(f, f_null + 3 * (f_cond - f_null), rtol=0, atol=BATCHING_TOLERANCE)


@torch.no_grad()
def test_predict_with_guidance_uses_the_null_embedding(conditional: Denoiser) -> None:
    network, t = network_of(conditional.module), conditional.timestep(2, 3)
    f_cond = network(X, t, encoder_hidden_states=EMBEDDINGS).sample
    f_null = network(X, t, encoder_hidden_states=NULL_EMBEDDING.expand(3, -1, -1)).sample
    f = replace(conditional, guidance=Guidance(scale=3.0)).predict(X, 2, EMBEDDINGS)
    torch.testing.assert_close(f, f_null + 3 * (f_cond - f_null), rtol=0, atol=BATCHING_TOLERANCE)


def test_predict_evaluates_the_module_it_is_given(unet: Denoiser) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return 2 * x

    assert torch.equal(unet.predict(X, 0, LABELS, module=Doubled()), 2 * X)


@pytest.mark.parametrize(
    ("x", "conditioning", "message"),
    [
        (X[:, :3], LABELS, "shape"),
        (X, None, "conditioning of kind label wanted"),
        (X, LABELS[:2], "conditioning has shape"),
        (X, LABELS.float(), "labels must be integers"),
        (X, torch.tensor([0, 1, 12]), r"label 12 is out of range 0\.\.2, and 3 for no class"),
        (X, torch.tensor([0, -1, 1]), r"label -1 is out of range 0\.\.2"),
    ],
)
def test_predict_refuses_what_the_model_does_not_take(
    unet: Denoiser, x: Tensor, conditioning: Tensor | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        unet.predict(x, 0, conditioning)


def test_predict_refuses_integer_embeddings(conditional: Denoiser) -> None:
    with pytest.raises(InputError, match="embeddings must be float32"):
        conditional.predict(X, 0, EMBEDDINGS.long())


def test_null_label_is_a_known_label(unet: Denoiser) -> None:
    check_labels(unet.info, torch.tensor([0, tiny.NULL_LABEL]))


@pytest.mark.parametrize("step", [-1, 4])
def test_step_out_of_range_is_refused(unet: Denoiser, step: int) -> None:
    with pytest.raises(InputError, match=r"out of range 0\.\.3"):
        unet.timestep(step, 2)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning")
def test_timesteps_have_the_type_of_the_program(tmp_path: Path) -> None:
    folder = tiny.write_tiny_unet(tmp_path)
    integer, floating = load(folder, steps=3), load(folder, steps=3, scheduler="euler")
    assert integer.timestep(0, 2).dtype == torch.int64
    assert integer.timestep(1, 2).tolist() == [integer.program.timesteps[1]] * 2
    assert floating.timestep(0, 2).dtype == torch.float32


@given(n=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_drawn_labels_are_balanced_and_seeded(unet: Denoiser, n: int, seed: int) -> None:
    labels, again = (
        unet.draw_conditioning(n, torch.Generator().manual_seed(seed)) for _ in range(2)
    )
    assert labels is not None
    assert again is not None
    counts = torch.bincount(labels, minlength=tiny.N_LABELS)
    assert len(counts) == tiny.N_LABELS
    assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(labels, again)


def test_drawn_embeddings_are_rows_of_the_samples(conditional: Denoiser) -> None:
    drawn = conditional.draw_conditioning(6, torch.Generator().manual_seed(0))
    assert drawn is not None
    matches = (drawn[:, None] == EMBEDDINGS[None]).all(dim=(2, 3))
    assert matches.sum(dim=0).tolist() == [2, 2, 2]


def test_drawing_nothing_is_refused(unet: Denoiser) -> None:
    with pytest.raises(InputError, match="0 samples"):
        unet.draw_conditioning(0, torch.Generator())


@torch.no_grad()
@pytest.mark.parametrize("form", ["tensor", "tuple", "sample"])
def test_wrapped_module_matches_its_own_call(form: str) -> None:
    network = Toy(form)
    denoiser = wrap(network, SCHEDULER, (X, torch.zeros(3)), steps=4)
    t = denoiser.timestep(2, 3)
    network.form = "tensor"
    assert torch.equal(denoiser.predict(X, 2, None), network(X, t))
    assert [layer.name for layer in denoiser.info.layers] == ["conv"]
    assert not network.training


@torch.no_grad()
def test_wrapped_labels_are_guided() -> None:
    network = Toy()
    inputs = (X, torch.zeros(3), LABELS)
    denoiser = wrap(network, SCHEDULER, inputs, guidance=2.0, n_labels=3, null_label=3)
    t = denoiser.timestep(0, 3)
    f_cond, f_null = network(X, t, LABELS), network(X, t, torch.full((3,), 3))
    torch.testing.assert_close(
        denoiser.predict(X, 0, LABELS), 2 * f_cond - f_null, rtol=0, atol=BATCHING_TOLERANCE
    )


def test_wrapped_embeddings_are_the_calibration_samples() -> None:
    prompts = torch.randn(3, 6)
    inputs = (X, torch.zeros(3), prompts)
    denoiser = wrap(Toy(), SCHEDULER, inputs, guidance=2.0, null_conditioning=torch.zeros(6))
    assert denoiser.info.conditioning.kind == "embedding"
    assert denoiser.conditioning_samples is not None
    assert torch.equal(denoiser.conditioning_samples, prompts)


def test_wrapped_fingerprint_follows_weights() -> None:
    inputs, network = (X, torch.zeros(3)), Toy()
    before, same = (wrap(network, SCHEDULER, inputs).info.fingerprint for _ in range(2))
    with torch.no_grad():
        network.conv.weight[0, 0, 0, 0] += 1
    assert before == same != wrap(network, SCHEDULER, inputs).info.fingerprint


class Broken(Toy):
    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor | None = None) -> Any:
        raise ValueError("no such thing")


class Shrunk(Toy):
    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor | None = None) -> Any:
        return self.conv(x)[:, :2]


class Diverging(Toy):
    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor | None = None) -> Any:
        return self.conv(x) / 0


def nan_weights() -> Toy:
    network = Toy()
    with torch.no_grad():
        network.conv.weight[0, 0, 0, :2] = float("nan")
    return network


T = torch.zeros(3)
FAULTS: dict[str, tuple[Any, tuple[Tensor, ...], dict[str, Any], type[EdgeqdmError], str]] = {
    "call fails": (Broken, (X, T), {}, InputError, "no such thing"),
    "other shape": (Shrunk, (X, T), {}, InputError, r"returned \[2, 2, 8, 8\]"),
    "NaN output": (Diverging, (X, T), {}, NumericalError, "returns NaN or Inf"),
    "NaN weight": (nan_weights, (X, T), {}, NumericalError, r"conv\.weight \(2 values\)"),
    "half": (lambda: Toy().half(), (X, T), {}, ModelError, "must be float32 in memory"),
    "meta": (lambda: Toy().to("meta"), (X, T), {}, ModelError, "conv.weight meta"),
    "no timestep": (Toy, (X,), {}, InputError, "must be tensors"),
    "flat sample": (Toy, (X[0], T), {}, InputError, r"x must be float32 \[B, C, H, W\]"),
    "double sample": (Toy, (X.double(), T), {}, InputError, "x must be float32"),
    "scalar timestep": (Toy, (X, torch.tensor(0)), {}, InputError, r"t must be \[B\]"),
    "two conditionings": (Toy, (X, T, LABELS, T), {}, UnsupportedError, "at most one"),
    "label matrix": (Toy, (X, T, LABELS[:, None]), {}, UnsupportedError, r"labels \[B\]"),
    "null label beyond the table": (
        Toy,
        (X, T, LABELS),
        {"n_labels": 3, "null_label": 4},
        InputError,
        "cannot be run",
    ),
    "labels uncounted": (Toy, (X, T, LABELS), {}, InputError, "need n_labels"),
    "unguidable": (Toy, (X, T), {"guidance": 2.0}, InputError, "has no conditioning"),
    "no null label": (
        Toy,
        (X, T, LABELS),
        {"guidance": 2.0, "n_labels": 3},
        InputError,
        "no label stands for no class",
    ),
    "no null embedding": (
        Toy,
        (X, T, torch.zeros(3, 6)),
        {"guidance": 2.0},
        InputError,
        "null_conditioning is missing",
    ),
    "null shape": (
        Toy,
        (X, T, torch.zeros(3, 6)),
        {"null_conditioning": torch.zeros(5)},
        InputError,
        r"null_conditioning has shape \[5\]",
    ),
    "idle null": (Toy, (X, T), {"null_conditioning": torch.zeros(6)}, InputError, "of no use"),
    "NaN embedding": (
        Toy,
        (X, T, torch.full((3, 6), float("nan"))),
        {},
        NumericalError,
        "conditioning holds NaN",
    ),
    "negative guidance": (Toy, (X, T), {"guidance": -1.0}, InputError, ">= 0"),
    "NaN guidance": (Toy, (X, T), {"guidance": float("nan")}, InputError, ">= 0"),
    "decoder": (
        Toy,
        (X, T),
        {"decoder": Decoder(kind="pixel_shuffle", factor=3)},
        ModelError,
        "does not fit 4 channels",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrap_refuses(fault: str) -> None:
    build, inputs, options, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        wrap(build(), SCHEDULER, inputs, **options)


def test_wrap_refuses_what_is_no_scheduler() -> None:
    with pytest.raises(InputError, match="expected a diffusers scheduler, found str"):
        wrap(Toy(), "ddim", (X, T))
