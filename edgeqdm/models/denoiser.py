"""One view of every denoiser: `f = predict(x, step, conditioning)` after guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from edgeqdm.errors import InputError, ModelError, NumericalError, UnsupportedError
from edgeqdm.ir.model import Conditioning, Decoder, Guidance, ModelInfo
from edgeqdm.ir.schedule import SamplerProgram
from edgeqdm.models.layers import Adapter, find_layers
from edgeqdm.models.sampler import compile_sampler
from edgeqdm.models.weights import check_finite, fingerprint

Evaluate = Callable[[Tensor, Tensor | None], Tensor]


class DiffusersAdapter(Adapter):
    """A diffusers network, whose learned variance is dropped unless the sampler reads it."""

    keeps_variance = False
    """Whether f is [B, 2C, H, W], with the learned variance in the second half of its channels."""

    def _kept(self, f: Tensor, x: Tensor) -> Tensor:
        if self.keeps_variance or f.shape[1] == x.shape[1]:
            return f
        return f[:, : x.shape[1]]


class UnconditionalAdapter(DiffusersAdapter):
    """`UNet2DModel` without classes: x [B, C, H, W], t [B] -> f [B, C, H, W]."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self._kept(self.network(x, t, return_dict=False)[0], x)


class LabelAdapter(DiffusersAdapter):
    """`UNet2DModel` and `DiTTransformer2DModel` with classes: labels int64 [B]."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self._kept(self.network(x, t, class_labels=labels, return_dict=False)[0], x)


class EmbeddingAdapter(DiffusersAdapter):
    """`UNet2DConditionModel`: embeddings float32 [B, L, D]."""

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        f = self.network(x, t, encoder_hidden_states=embeddings, return_dict=False)[0]
        return self._kept(f, x)


class PlainAdapter(Adapter):
    """Any module called as `module(x, t, *conditioning)`."""

    def forward(self, x: Tensor, t: Tensor, *conditioning: Tensor) -> Tensor:
        return cast(Tensor, first_tensor(self.network(x, t, *conditioning)))


def first_tensor(output: Any) -> Any:
    """The tensor in what a network returned: itself, its `.sample` or its first item."""
    if hasattr(output, "sample") and not isinstance(output, Tensor):
        return output.sample
    return output[0] if isinstance(output, tuple | list) and output else output


def guided(
    evaluate: Evaluate,
    x: Tensor,
    conditioning: Tensor | None,
    *,
    null: Tensor | None,
    guidance: Guidance,
) -> Tensor:
    """Classifier-free guidance, `f = f_null + s (f_cond - f_null)`, in one evaluation.

    A learned variance is no score to be extrapolated: it is that of f_cond.

    Args:
        evaluate: `(x [2B, ...], conditioning [2B, ...]) -> f [2B, ...]`; the first half is null.
            Where `s` is 1 it is called with `x` and `conditioning` as they are.
        x: [B, C, H, W].
        conditioning: [B, ...].
        null: conditioning of one sample, [...], that stands for "none".
        guidance: s.

    Returns:
        f [B, C, H, W]; [B, 2C, H, W] with a learned variance.

    Raises:
        InputError: if guidance is active and `conditioning` or `null` is missing.

    Source: Ho & Salimans 2022, equation 6 with s = 1 + w, https://arxiv.org/abs/2207.12598.
    """
    if not guidance.active:
        return evaluate(x, conditioning)
    if conditioning is None or null is None:
        missing = "conditioning" if conditioning is None else "null conditioning"
        raise InputError("EQ-3133", f"guidance {guidance.scale:g} needs a {missing}")
    nulls = null.to(conditioning).expand_as(conditioning)
    f = evaluate(torch.cat([x, x]), torch.cat([nulls, conditioning]))
    f_null, f_cond = f.chunk(2)
    channels = x.shape[1]
    mean = f_null[:, :channels] + guidance.scale * (f_cond - f_null)[:, :channels]
    return mean if f.shape[1] == channels else torch.cat([mean, f_cond[:, channels:]], 1)


def check_labels(info: ModelInfo, labels: Tensor) -> None:
    """Raise InputError unless labels are integers [B] the model knows, its null label included."""
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise InputError("EQ-3134", f"labels must be integers of shape [B], found {found}")
    known = info.conditioning
    bad = (labels < 0) | (labels >= known.n_labels)
    null = ""
    if known.null_label is not None:
        bad &= labels != known.null_label
        null = f", and {known.null_label} for no class"
    if bool(bad.any()):
        first = int(labels[bad][0])
        message = f"label {first} is out of range 0..{known.n_labels - 1}{null}"
        raise InputError("EQ-3134", message, path=info.name)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network, what is known of it, its sampler and its guidance."""

    module: nn.Module
    """Eval mode, float32: `(x [B, C, H, W], t [B], *conditioning) -> f [B, C, H, W]`, or
    [B, 2C, H, W] where the program has a learned variance."""
    info: ModelInfo
    program: SamplerProgram
    guidance: Guidance
    conditioning_samples: Tensor | None
    """Embeddings [N, ...] that calibration draws from; None for labels and for no conditioning."""
    null_embedding: Tensor | None
    """One embedding [...]; needed where guidance is active and conditioning is an embedding."""

    @property
    def null(self) -> Tensor | None:
        """Null conditioning of one sample: label [], embedding [...] or None."""
        label = self.info.conditioning.null_label
        return self.null_embedding if label is None else torch.tensor(label)

    def timestep(self, step: int, batch: int) -> Tensor:
        """What the network is fed at a step, int64 or float32 [batch]."""
        if not 0 <= step < self.program.n_steps:
            last = self.program.n_steps - 1
            raise InputError("EQ-3136", f"step {step} is out of range 0..{last}")
        dtype = torch.int64 if self.program.integer_timesteps else torch.float32
        return torch.full((batch,), self.program.timesteps[step], dtype=torch.float64).to(dtype)

    @torch.no_grad()
    def predict(
        self, x: Tensor, step: int, conditioning: Tensor | None, module: nn.Module | None = None
    ) -> Tensor:
        """Network output after guidance.

        Args:
            x: already scaled sample, float32 [B, C, H, W].
            step: index into the program, 0 is the noisiest.
            conditioning: labels int64 [B], embeddings float32 [B, ...], or None.
            module: evaluated instead of the float module, e.g. its quantized copy.

        Returns:
            f, float32 [B, C, H, W], or [B, 2C, H, W] where the program has a learned variance.

        Raises:
            InputError: if a shape, label or step does not belong to this model.
        """
        self._check(x, conditioning)
        network = self.module if module is None else module

        def evaluate(x: Tensor, conditioning: Tensor | None) -> Tensor:
            t = self.timestep(step, x.shape[0])
            return cast(Tensor, network(x, t, *([] if conditioning is None else [conditioning])))

        return guided(evaluate, x, conditioning, null=self.null, guidance=self.guidance)

    def draw_conditioning(self, n: int, generator: torch.Generator) -> Tensor | None:
        """Conditioning for n samples, every label or stored embedding equally often.

        Returns:
            Labels int64 [n], embeddings float32 [n, ...], or None without conditioning.

        Raises:
            InputError: if n is not positive.
        """
        if n < 1:
            raise InputError("EQ-3135", f"cannot draw conditioning for {n} samples")
        kind = self.info.conditioning.kind
        if kind == "none":
            return None
        samples = self.conditioning_samples
        known = self.info.conditioning.n_labels if samples is None else len(samples)
        drawn = torch.randperm(known, generator=generator)[torch.arange(n) % known]
        index = drawn[torch.randperm(n, generator=generator)]
        return index if samples is None else samples[index]

    def _check(self, x: Tensor, conditioning: Tensor | None) -> None:
        if tuple(x.shape[1:]) != self.info.sample_shape:
            expected = ["B", *self.info.sample_shape]
            message = f"the sample has shape {list(x.shape)} instead of {expected}"
            raise InputError("EQ-3135", message)
        known = self.info.conditioning
        if (conditioning is None) != (known.kind == "none"):
            found = "none" if conditioning is None else "a tensor"
            raise InputError("EQ-3135", f"conditioning of kind {known.kind} wanted, found {found}")
        if conditioning is None:
            return
        if tuple(conditioning.shape) != (x.shape[0], *known.shape):
            shapes = f"{list(conditioning.shape)} instead of {[x.shape[0], *known.shape]}"
            raise InputError("EQ-3135", f"conditioning has shape {shapes}")
        if known.kind == "label":
            check_labels(self.info, conditioning)
        elif not conditioning.is_floating_point():
            raise InputError("EQ-3135", f"embeddings must be float32, found {conditioning.dtype}")


def wrap(
    module: nn.Module,
    scheduler: SchedulerMixin,
    example_inputs: tuple[Tensor, ...],
    *,
    steps: int = 20,
    guidance: float = 1.0,
    eta: float = 0.0,
    name: str = "custom",
    n_labels: int | None = None,
    null_label: int | None = None,
    null_conditioning: Tensor | None = None,
    decoder: Decoder | None = None,
) -> Denoiser:
    """A denoiser from any module, which is kept and put into eval mode.

    Args:
        module: called as `module(x, t, *conditioning)`; returns f [B, C, H, W], alone, as the
            first item of a tuple or as `.sample`; [B, 2C, H, W] where the scheduler takes its
            variance from the network.
        scheduler: the diffusers scheduler whose noise the module was trained on.
        example_inputs: x float32 [B, C, H, W], t [B] and at most one conditioning tensor: labels
            int64 [B] or embeddings float32 [B, ...], which calibration then draws from.
        steps: denoising steps S.
        guidance: scale of classifier-free guidance, 1 is off.
        eta: DDIM noise, 0 is deterministic and 1 is DDPM.
        name: for reports.
        n_labels: number of labels; required with labels.
        null_label: label that stands for "no class".
        null_conditioning: embedding [...] that stands for "no prompt".
        decoder: how a final sample becomes pixels; None for identity.

    Raises:
        InputError: if the module cannot be called so, or returns another shape.
        UnsupportedError: if there is more than one conditioning tensor.
        NumericalError: if weights or outputs are not finite.
    """
    x, samples = _check_example(example_inputs)
    state = module.state_dict()
    _check_float32(state)
    check_finite(state)
    known = _wrapped_conditioning(samples, n_labels, null_label)
    shape = (x.shape[1], x.shape[2], x.shape[3])
    # repr holds what weights do not: slopes, strides, numbers of heads.
    structure = {path: repr(part) for path, part in module.named_modules()}
    info = ModelInfo(
        name=name,
        family=type(module).__name__,
        sample_shape=shape,
        conditioning=known,
        decoder=decoder or Decoder(),
        layers=(),
        fingerprint=fingerprint(module, {"sample_shape": shape, "modules": structure}),
    )
    return assemble(
        PlainAdapter(module),
        info,
        compile_sampler(check_scheduler(scheduler), steps, eta=eta),
        check_guidance(guidance),
        None if known.kind == "label" else check_embeddings(samples, "conditioning"),
        check_embeddings(null_conditioning, "null_conditioning"),
    )


def assemble(
    module: Adapter,
    info: ModelInfo,
    program: SamplerProgram,
    guidance: Guidance,
    conditioning_samples: Tensor | None,
    null_embedding: Tensor | None,
) -> Denoiser:
    """A denoiser whose parts fit each other, shown by one run; fills in `info.layers`."""
    known = info.conditioning
    if null_embedding is not None and known.kind != "embedding":
        message = f"null_conditioning is of no use with conditioning of kind {known.kind}"
        raise InputError("EQ-3135", message, path=info.name)
    if null_embedding is not None and tuple(null_embedding.shape) != known.shape:
        found, expected = list(null_embedding.shape), list(known.shape)
        message = f"null_conditioning has shape {found} instead of {expected}"
        raise InputError("EQ-3135", message, path=info.name)
    _check_can_guide(guidance, known, null_embedding)
    if info.decoder.kind == "pixel_shuffle" and info.sample_shape[0] % info.decoder.factor**2:
        factor, channels = info.decoder.factor, info.sample_shape[0]
        message = f"pixel_shuffle by {factor} does not fit {channels} channels"
        raise ModelError("EQ-3140", message, path=info.name)
    module.eval()
    learned = program.learned_variance is not None
    if isinstance(module, DiffusersAdapter):
        module.keeps_variance = learned
    bare = Denoiser(module, info, program, guidance, conditioning_samples, null_embedding)
    inputs = _trial_inputs(bare)
    _check_trial(module, inputs, info.name, learned=learned)
    complete = info.model_copy(update={"layers": find_layers(module, *inputs)})
    return replace(bare, info=complete)


def _trial_inputs(denoiser: Denoiser) -> tuple[Tensor, ...]:
    shape = (2, *denoiser.info.sample_shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    conditioning = denoiser.draw_conditioning(2, torch.Generator().manual_seed(1))
    inputs = (x, denoiser.timestep(0, 2))
    if conditioning is None:
        return inputs
    if denoiser.null is not None:
        conditioning[1] = denoiser.null
    return (*inputs, conditioning)


def _check_trial(module: Adapter, inputs: tuple[Tensor, ...], name: str, *, learned: bool) -> None:
    batch, channels, *size = inputs[0].shape
    expected = [batch, 2 * channels if learned else channels, *size]
    try:
        with torch.no_grad():
            f = module(*inputs)
    except Exception as error:
        shapes = ", ".join(f"{v.dtype} {list(v.shape)}" for v in inputs)
        message = f"the network cannot be run on ({shapes}): {error}"
        raise InputError("EQ-3137", message, path=name) from error
    if not isinstance(f, Tensor) or list(f.shape) != expected:
        found = list(f.shape) if isinstance(f, Tensor) else type(f).__name__
        message = f"the network returned {found} instead of {expected}"
        hint = "this scheduler takes its variance from the network" if learned else None
        raise InputError("EQ-3137", message, path=name, hint=hint)
    if not bool(torch.isfinite(f).all()):
        raise NumericalError("EQ-5122", "the network returns NaN or Inf on noise", path=name)


def _check_example(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    if len(inputs) < 2 or not all(isinstance(value, Tensor) for value in inputs):
        raise InputError("EQ-3137", "example_inputs must be tensors (x, t, conditioning)")
    if len(inputs) > 3:
        message = f"{len(inputs) - 2} conditioning tensors, at most one is supported"
        raise UnsupportedError("EQ-4122", message)
    x, t = inputs[:2]
    if x.ndim != 4 or x.dtype != torch.float32 or x.numel() == 0:
        found = f"{x.dtype} {list(x.shape)}"
        raise InputError("EQ-3137", f"x must be float32 [B, C, H, W], found {found}")
    bad = [list(v.shape) for v in inputs[1:] if v.ndim == 0 or v.shape[0] != x.shape[0]]
    if bad or t.ndim != 1:
        message = f"t must be [B] and conditioning [B, ...] with B = {x.shape[0]}"
        raise InputError("EQ-3137", f"{message}, found {[list(v.shape) for v in inputs[1:]]}")
    return x, inputs[2] if len(inputs) == 3 else None


def _check_float32(state: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{key} {'meta' if value.is_meta else value.dtype}"
        for key, value in state.items()
        if value.is_meta or (value.is_floating_point() and value.dtype != torch.float32)
    ]
    if wrong:
        message = f"weights must be float32 in memory: {', '.join(wrong[:10])}"
        raise ModelError("EQ-3130", message, hint="call module.float() first")


def _wrapped_conditioning(
    samples: Tensor | None, n_labels: int | None, null_label: int | None
) -> Conditioning:
    if samples is None:
        return Conditioning(kind="none")
    if samples.is_floating_point():
        return Conditioning(kind="embedding", shape=tuple(samples.shape[1:]))
    if samples.ndim != 1 or samples.dtype == torch.bool:
        found = f"{samples.dtype} {list(samples.shape)}"
        raise UnsupportedError("EQ-4122", f"integer conditioning must be labels [B], found {found}")
    if n_labels is None or n_labels < 1:
        raise InputError("EQ-3137", f"labels need n_labels >= 1, found {n_labels}")
    return Conditioning(kind="label", n_labels=n_labels, null_label=null_label)


def _check_can_guide(guidance: Guidance, known: Conditioning, null: Tensor | None) -> None:
    if not guidance.active:
        return
    reason = {
        "none": "the model has no conditioning",
        "label": None if known.null_label is not None else "no label stands for no class",
        "embedding": None if null is not None else "null_conditioning is missing",
    }[known.kind]
    if reason is not None:
        raise InputError(
            "EQ-3133",
            f"guidance {guidance.scale:g} is not possible: {reason}",
            hint="use guidance=1, or say which label or embedding stands for none",
        )


def check_embeddings(value: Tensor | None, name: str) -> Tensor | None:
    """Embeddings as float32, finite and not empty; InputError or NumericalError otherwise."""
    if value is None:
        return None
    if not value.is_floating_point() or len(value) == 0:
        found = f"{value.dtype} {list(value.shape)}"
        raise InputError("EQ-3135", f"{name} must be float and not empty, found {found}")
    if not bool(torch.isfinite(value).all()):
        raise NumericalError("EQ-5123", f"{name} holds NaN or Inf")
    return value.detach().float()


def check_scheduler(scheduler: Any) -> SchedulerMixin:
    """The scheduler itself; InputError if it is none of diffusers."""
    if not isinstance(scheduler, SchedulerMixin):
        message = f"expected a diffusers scheduler, found {type(scheduler).__name__}"
        raise InputError("EQ-3131", message)
    return scheduler


def check_guidance(scale: float) -> Guidance:
    """Guidance of a scale that is finite and not negative; InputError otherwise."""
    if isinstance(scale, bool) or not math.isfinite(scale) or scale < 0:
        raise InputError("EQ-3133", f"guidance must be a number >= 0, found {scale}")
    return Guidance(scale=float(scale))
