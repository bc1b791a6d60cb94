"""Activation scales as functions of the timestep, learned by one tiny network per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeqdm.errors import InputError, NumericalError
from edgeqdm.numerics.affine import ACTIVATION_BITS, MIN_SCALE, activation_max
from edgeqdm.numerics.ranges import (
    LOSS_POWER,
    SMALLEST_SHRINK,
    SMALLEST_SHRINK_4_BITS,
    StepRanges,
    full_scale,
)

EMBEDDING_DIM = 128
HIDDEN_DIM = 64
N_LINEAR = 4
LONGEST_PERIOD = 10000.0
REGRESSION_RATE, REFINEMENT_RATE = 5e-3, 3e-4
"""Learning rates of Adam, falling to 0 along a cosine."""
TAIL_SAMPLES, INNER_SAMPLES = 64, 384
SHORTFALL_PRICE = 100.0
"""Of a scale below the smallest allowed, against a layer's error of 1: holds it to about 1 %."""
SMALLEST_RATIO = 2.0**-10
"""Floor of scale / reference_scale: softplus underflows, and a scale of 0 cannot be divided by."""
IDENTITY_BITS = 16
"""Codes this wide are as good as float: nothing is rounded."""


def encode_timestep(timesteps: Tensor, dim: int = EMBEDDING_DIM) -> Tensor:
    """Sinusoidal embedding `[cos(t f), sin(t f)]` with `f_j = 10000^(-j / half)`.

    Args:
        timesteps: [N], integers or fractions.
        dim: even, >= 2; half of it are cosines.

    Returns:
        float32 [N, dim], computed in float64: t f of late timesteps has few digits in float32.

    Raises:
        InputError: dim is odd or below 2, the timesteps are no vector, empty or not finite.

    Source: TDQ (arXiv 2306.02316) section 3; the embedding of DDPM with cosines first.
    """
    _check_dim(dim)
    _check_timesteps(timesteps)
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.to(torch.float64)[:, None] * LONGEST_PERIOD**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(torch.float32)


def _check_dim(dim: int) -> None:
    if dim < 2 or dim % 2:
        raise InputError(
            "EQ-3220", f"an embedding of {dim} values", path="dim", hint="give an even number >= 2"
        )


def _check_timesteps(timesteps: Tensor) -> None:
    vector = timesteps.dim() == 1 and timesteps.numel() > 0
    if not vector or not bool(torch.isfinite(timesteps).all()):
        found = "NaN or Inf" if vector else f"shape {list(timesteps.shape)}"
        raise InputError(
            "EQ-3220",
            f"timesteps are a vector of finite numbers, found {found}",
            path="timesteps",
            hint="pass the timesteps of the sampler's schedule",
        )


def inverse_softplus(x: Tensor) -> Tensor:
    """`y` with `log(1 + exp(y)) = x`, for x > 0.

    `log(exp(x) - 1)` overflows above 88 in float32 and loses digits for small x; this does neither.
    """
    return x + torch.log(-torch.expm1(-x))


class _RoundTrip(torch.autograd.Function):
    """Quantize and dequantize; zero_point and top are tensors so that layers can differ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point, top)
        codes = torch.clamp(torch.round(x / scale) + zero_point, torch.zeros_like(top), top)
        return (codes - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, zero_point, top = ctx.saved_tensors
        ratio = x / scale
        clipped = torch.clamp(ratio, -zero_point, top - zero_point)
        inside = clipped == ratio
        by_x = by_scale = None
        if ctx.needs_input_grad[0]:
            by_x = (gradient * inside).sum_to_size(x.shape)
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, torch.round(ratio) - ratio, clipped)
            by_scale = (gradient * slope).sum_to_size(scale.shape)
        return by_x, by_scale, None, None


_round_trip: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _RoundTrip.apply


def fake_quantize(x: Tensor, scale: Tensor, zero_point: int, bits: int) -> Tensor:
    """Rounds x to codes of 0..2^bits - 1 and back, differentiable in x and scale.

    Forward equals `quantize_activation` then `dequantize_activation`, bit by bit. Backward rounds
    straight through: with u = x / scale, d/dx is 1 where u is within the codes and 0 where it is
    clipped; d/dscale is `round(u) - u` within, `-zero_point` below and `2^bits - 1 - zero_point`
    above.

    Args:
        x: float32, any shape.
        scale: float32, broadcastable to x; [N, 1, 1, 1] where each row has its own timestep.
        zero_point: code of 0, 0..2^bits - 1.
        bits: width of the codes; 16 and more return x itself.

    Raises:
        InputError: bits below 2, or a zero_point that is no code.

    Source: LSQ (arXiv 1902.08153) equations 1 to 3, with a zero_point.
    """
    _check_codes(zero_point, bits, "zero_point")
    if bits >= IDENTITY_BITS:
        return x
    constants = (
        torch.tensor(float(v), device=x.device) for v in (zero_point, activation_max(bits))
    )
    return _round_trip(x, scale, *constants)


def _check_codes(zero_point: int, bits: int, path: str) -> None:
    if bits < 2:
        raise InputError("EQ-3221", f"codes of {bits} bits", path=path, hint="give 2 bits or more")
    if not 0 <= zero_point <= activation_max(bits):
        raise InputError(
            "EQ-3221",
            f"zero_point {zero_point} is no code of {bits} bits",
            path=path,
            hint=f"give 0 to {activation_max(bits)}",
        )


class TemporalScales(nn.Module):
    """Scales of L layers at any timestep: `scale_l(t) = reference_l softplus(MLP_l(encode(t)))`.

    One MLP of dim, 64, 64, 64 and 1 units per layer, ReLU between them; weights of all layers are
    stacked, so that they are evaluated and fitted together. A new module returns reference_scale
    at every timestep. All state is in `state_dict`.

    Args:
        reference_scale: float32 [L], positive.
        dim: width of the timestep embedding.
        generator: draws the initial weights.

    Raises:
        InputError: dim is odd or below 2.
        NumericalError: a reference_scale is not finite and positive.

    Source: TDQ (arXiv 2306.02316) section 3.
    """

    reference_scale: Tensor

    def __init__(
        self, reference_scale: Tensor, *, dim: int = EMBEDDING_DIM, generator: torch.Generator
    ) -> None:
        super().__init__()
        _check_dim(dim)
        _check_positive(reference_scale[:, None], "reference_scale")
        n_layers = reference_scale.shape[0]
        self.register_buffer("reference_scale", reference_scale.to(torch.float32).clone())
        # No dropout: a table must not depend on chance, and every step has its own target here.
        widths = [dim] + [HIDDEN_DIM] * (N_LINEAR - 1)
        weights = [
            torch.randn(n_layers, w, HIDDEN_DIM, generator=generator) * (2 / w) ** 0.5
            for w in widths[:-1]
        ]
        biases = [torch.zeros(n_layers, 1, HIDDEN_DIM) for _ in weights]
        one = torch.ones(n_layers, 1, 1)
        self.weights = nn.ParameterList([*weights, torch.zeros(n_layers, HIDDEN_DIM, 1)])
        self.biases = nn.ParameterList([*biases, inverse_softplus(one)])

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> TemporalScales:
        """The module that `state_dict` came from.

        Raises:
            InputError: tensors are missing, or their shapes belong to no such module.
            NumericalError: a stored reference_scale is not finite and positive.
        """
        try:
            dim = state["weights.0"].shape[1]
            model = cls(state["reference_scale"], dim=dim, generator=torch.Generator())
            model.load_state_dict(dict(state))
        except (KeyError, IndexError, RuntimeError) as error:
            raise InputError(
                "EQ-3224",
                f"the stored temporal scales cannot be read: {error}",
                path="temporal scales",
                hint="store all that state_dict returns",
            ) from error
        return model

    @property
    def dim(self) -> int:
        """Width of the timestep embedding."""
        return int(self.weights[0].shape[1])

    def forward(self, timesteps: Tensor) -> Tensor:
        """Scales of every layer at timesteps [N], float32 [N, L], differentiable."""
        hidden = encode_timestep(timesteps, self.dim).expand(len(self.reference_scale), -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = F.relu(torch.baddbmm(bias, hidden, weight))
        ratio = F.softplus(torch.baddbmm(self.biases[-1], hidden, self.weights[-1]))
        floor = (self.reference_scale * SMALLEST_RATIO).clamp(min=MIN_SCALE)
        return torch.maximum(self.reference_scale * ratio[..., 0].T, floor)

    @torch.no_grad()
    def tabulate(self, timesteps: Tensor) -> Tensor:
        """The table that is stored: scales of every layer at timesteps [S], float32 [L, S].

        A column depends on its own timestep alone: matrix products round differently for another
        number of rows, so timesteps are evaluated one by one.

        Raises:
            InputError: the timesteps are no vector, empty or not finite.
            NumericalError: a scale is not finite; names the layer and the step.
        """
        _check_timesteps(timesteps)
        columns = [self(timestep[None])[0] for timestep in timesteps]
        table = torch.stack(columns, dim=1)
        _check_positive(table, "tabulated scale")
        return table


def _check_positive(scale: Tensor, what: str) -> None:
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bool(bad.any()):
        layer, step = (int(i) for i in bad.nonzero()[0])
        raise NumericalError(
            "EQ-5220",
            f"{what} is {float(scale[layer, step])} at step {step}",
            path=f"layer {layer}",
            hint="scales are finite and above 0; check the activations of this layer",
        )


def fit_temporal(
    ranges: Sequence[StepRanges],
    timesteps: Tensor,
    zero_points: Sequence[int],
    start: Tensor,
    *,
    bits: Sequence[int] | int = ACTIVATION_BITS,
    generator: torch.Generator,
    iterations: int = 400,
    refinements: int = 100,
    power: float = LOSS_POWER,
) -> TemporalScales:
    """Scales of L layers as functions of the timestep, fitted to what the layers saw at S steps.

    First the logarithms of the scales are regressed on those of `start`; then the quantization
    error `mean |x - x_q|^p`, relative to the step's energy, is lowered with straight-through
    gradients. A layer keeps the second result only where its error is lower.

    Three choices of ours; the first two were measured on activations of the reference models:

    - Waves of the embedding that turn by more than 1 rad between timesteps are left out. The
      timesteps do not determine them; with them the error between fitted timesteps was 1.5 times
      as large.
    - The largest and smallest values of every step are always part of the error. Where they are
      only drawn now and then, the scale shrinks between two draws.
    - No scale is pushed below its start, or what `search_activation` allows, whichever is smaller.

    Args:
        ranges: per layer, samples [S, R] and extremes [S]; one row serves all steps.
        timesteps: [S], of the steps in `ranges` and `start`.
        zero_points: per layer, code of 0.
        start: scales found step by step, e.g. by `search_activation`; float32 [L, S].
        bits: width of the codes, of every layer or of all.
        generator: draws the initial weights.
        iterations: of the regression.
        refinements: of the second part; 0 leaves it out.
        power: p of the error.

    Raises:
        InputError: the arguments do not fit each other, or a zero_point is no code.
        NumericalError: a start scale is not finite and positive, or a sample is not finite.

    Source: TDQ (arXiv 2306.02316) section 3; objective and schedule of its post-training variant
    are not published.
    """
    widths = [bits] * len(ranges) if isinstance(bits, int) else list(bits)
    _check_timesteps(timesteps)
    _check_fit(ranges, timesteps, zero_points, start, widths)
    start = start.to(torch.float32)
    live = torch.stack([_live_steps(r, len(timesteps), i) for i, r in enumerate(ranges)])
    reference = ((start.log() * live).sum(1) / live.sum(1)).exp()
    with torch.enable_grad():
        model = TemporalScales(reference, generator=generator)
        slow = _slow_features(timesteps, model.dim)
        with torch.no_grad():
            model.weights[0].mul_(slow * (model.dim / slow.sum()).sqrt())
        _regress(model, timesteps, start, live, slow, iterations)
        if refinements:
            errors = _errors(ranges, zero_points, widths, start, live, reference, power)
            _refine(model, timesteps, errors, slow, refinements)
    return model


def _check_fit(
    ranges: Sequence[StepRanges],
    timesteps: Tensor,
    zero_points: Sequence[int],
    start: Tensor,
    bits: Sequence[int],
) -> None:
    n_layers, n_steps = len(ranges), len(timesteps)
    if (
        not n_layers
        or len(zero_points) != n_layers
        or len(bits) != n_layers
        or tuple(start.shape) != (n_layers, n_steps)
    ):
        raise InputError(
            "EQ-3222",
            f"{n_layers} ranges, {len(zero_points)} zero_points, {len(bits)} bits and "
            f"{n_steps} timesteps do not fit start scales {list(start.shape)}",
            hint="give one of each per layer, and start [layers, steps]",
        )
    for layer, (zero_point, width) in enumerate(zip(zero_points, bits, strict=True)):
        _check_codes(zero_point, width, f"layer {layer}")
    _check_positive(start, "start scale")


def _live_steps(ranges: StepRanges, n_steps: int, layer: int) -> Tensor:
    """1 where the layer saw anything but zeros, float32 [S]; all 1 where it never did."""
    rows = ranges.samples.shape[0]
    if rows not in (1, n_steps) or ranges.low.shape != (rows,) or ranges.high.shape != (rows,):
        raise InputError(
            "EQ-3223",
            f"ranges of {rows} steps for {n_steps} timesteps",
            path=f"layer {layer}",
            hint="give the ranges of the same steps, or one row for all",
        )
    peak = ranges.samples.abs().amax(1)
    if not bool(torch.isfinite(peak).all()):
        step = int((~torch.isfinite(peak)).nonzero()[0])
        raise NumericalError(
            "EQ-5221",
            f"a sample is NaN or Inf at step {step}",
            path=f"layer {layer}",
            hint="check the float model; calibrate again",
        )
    live = (peak > 0).to(torch.float32).expand(n_steps)
    return live if bool(live.any()) else torch.ones(n_steps)


def _slow_features(timesteps: Tensor, dim: int) -> Tensor:
    """1 where a feature turns by less than 1 rad between timesteps, float32 [dim, 1]."""
    half = dim // 2
    frequencies = LONGEST_PERIOD ** -(torch.arange(half, dtype=torch.float64) / half)
    spacings = timesteps.to(torch.float64).unique().diff()
    fastest = 1 / spacings.median() if len(spacings) else frequencies[0]
    kept = frequencies <= torch.maximum(fastest, frequencies[-1])
    return kept.to(torch.float32).repeat(2)[:, None]


def _descend(
    model: TemporalScales,
    objective: Callable[[], Tensor],
    slow: Tensor,
    *,
    iterations: int,
    learning_rate: float,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, iterations))
    # A weight that starts at 0 and has no gradient stays at 0: fast features remain left out.
    mask = model.weights[0].register_hook(lambda gradient: gradient * slow)
    for _ in range(iterations):
        optimizer.zero_grad()
        objective().backward()
        optimizer.step()
        schedule.step()
    mask.remove()


def _regress(
    model: TemporalScales,
    timesteps: Tensor,
    start: Tensor,
    live: Tensor,
    slow: Tensor,
    iterations: int,
) -> None:
    target = start.log()

    def objective() -> Tensor:
        scale: Tensor = model(timesteps)
        return ((scale.T.log() - target).square() * live).sum()

    _descend(model, objective, slow, iterations=iterations, learning_rate=REGRESSION_RATE)


@dataclass(frozen=True)
class _Errors:
    """Quantization errors of all layers, in units of their reference_scale.

    Attributes:
        samples: float32 [L, S, N].
        share: what a sample stands for, float32 [L, 1, N]; sums to 1.
        weight: what the error of a step counts, float32 [L, S].
        smallest: scales are held above this, float32 [L, S].
        zero_point: float32 [L, 1, 1].
        top: largest code, float32 [L, 1, 1].
        power: p of the error.
    """

    samples: Tensor
    share: Tensor
    weight: Tensor
    smallest: Tensor
    zero_point: Tensor
    top: Tensor
    power: float

    def of(self, ratio: Tensor) -> Tensor:
        """Errors [L] of scales `ratio` [L, S]; those below the smallest count as the smallest."""
        scale = torch.maximum(ratio, self.smallest)[..., None]
        rounded = _round_trip(self.samples, scale, self.zero_point, self.top)
        error = (rounded - self.samples).abs().pow(self.power)
        return ((error * self.share).sum(-1) * self.weight).sum(-1)

    def shortfall(self, ratio: Tensor) -> Tensor:
        """What scales below the smallest cost, [L]."""
        below = (self.smallest / ratio).clamp(min=1).log()
        return SHORTFALL_PRICE * below.square().sum(-1)


def _errors(
    ranges: Sequence[StepRanges],
    zero_points: Sequence[int],
    bits: Sequence[int],
    start: Tensor,
    live: Tensor,
    reference: Tensor,
    power: float,
) -> _Errors:
    n_steps = live.shape[1]
    drawn = [_spread_samples(r.samples) for r in ranges]
    samples = torch.stack([x.expand(n_steps, -1) for x, _ in drawn]) / reference[:, None, None]
    share = torch.stack([s for _, s in drawn])[:, None]
    energy = (samples.abs().pow(power) * share).sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    allowed = [
        _deepest_clip(w) * full_scale(r.low, r.high, z, w).expand(n_steps)
        for r, z, w in zip(ranges, zero_points, bits, strict=True)
    ]
    return _Errors(
        samples=samples,
        share=share,
        weight=torch.where(energy > tiny, live / energy.clamp(min=tiny), 0.0),
        smallest=torch.minimum(torch.stack(allowed), start) * live / reference[:, None],
        zero_point=torch.tensor(zero_points, dtype=torch.float32)[:, None, None],
        top=torch.tensor([activation_max(b) for b in bits], dtype=torch.float32)[:, None, None],
        power=power,
    )


def _deepest_clip(bits: int) -> float:
    return SMALLEST_SHRINK if bits >= ACTIVATION_BITS else SMALLEST_SHRINK_4_BITS


def _spread_samples(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Both tails and an even part of the rest, [S, N], with the share each stands for, [N]."""
    n_values, n_kept = samples.shape[1], 2 * TAIL_SAMPLES + INNER_SAMPLES
    ordered = samples.sort(1).values
    if n_values <= n_kept:
        place = torch.arange(n_kept)
        return ordered[:, place.clamp(max=n_values - 1)], (place < n_values) / n_values
    n_inner = n_values - 2 * TAIL_SAMPLES
    inner = ((torch.arange(INNER_SAMPLES) + 0.5) * n_inner / INNER_SAMPLES).to(torch.int64)
    tail = torch.arange(TAIL_SAMPLES)
    kept = torch.cat([tail, TAIL_SAMPLES + inner, n_values - TAIL_SAMPLES + tail])
    each = torch.ones(n_kept) / n_values
    each[TAIL_SAMPLES:-TAIL_SAMPLES] *= n_inner / INNER_SAMPLES
    return ordered[:, kept], each


def _refine(
    model: TemporalScales, timesteps: Tensor, errors: _Errors, slow: Tensor, iterations: int
) -> None:
    """Lowers the errors of `model` in place."""
    before = [p.detach().clone() for p in model.parameters()]

    def ratio() -> Tensor:
        scale: Tensor = model(timesteps)
        return (scale / model.reference_scale).T

    with torch.no_grad():
        unit = errors.of(ratio()).clamp(min=torch.finfo(torch.float32).tiny)

    def objective() -> Tensor:
        now = ratio()
        return errors.of(now) / unit + errors.shortfall(now)

    with torch.no_grad():
        first = objective()
    _descend(
        model,
        lambda: objective().sum(),
        slow,
        iterations=iterations,
        learning_rate=REFINEMENT_RATE,
    )
    with torch.no_grad():
        worse = ~(objective() < first)
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter[worse] = old[worse]
