"""Runs a sampler that has been compiled to a table.

    x[i+1] = sum_k a[i, k] x[i-k] + sum_j b[i, j] f[i-j] + c[i] z + d[i] clip(p[i] x[i] + q[i] f[i])

with f[i] the network output at `input_scale[i] * x[i]` after correction. Everything is float32:
coefficients are rounded once from the stored float64, every product and every sum is rounded, terms
are added in the order in which they are written above, and a term whose weight a, b, c or d is 0
is left out (under a correction, c where it is 0 for every channel). A runtime in another language
that keeps to this gets the same bits.

Where the network says the variance of the noise, in a second half of its channels, c z becomes
c s z with s its standard deviation, see `LearnedVariance`; s is as exact as the library's exp.

This module imports nothing but numpy: it is copied as it is into every package.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_SMALLEST_VARIANCE = np.float32(1e-20)


@dataclass(frozen=True)
class Clip:
    """Clipping of the predicted clean sample `p x[i] + q f[i]` to +-limit."""

    limit: np.float32
    sample_weight: Array
    """p, [S]"""
    output_weight: Array
    """q, [S]"""
    weight: Array
    """d, [S]"""


@dataclass(frozen=True)
class Correction:
    """`f <- gain[i] * (f - bias[i, c]) + input_weight[i] * x`, x being what the network was fed."""

    gain: Array
    """[S]"""
    bias: Array
    """[S, C]"""
    input_weight: Array
    """[S]; the term is left out where it is 0."""


@dataclass(frozen=True)
class LearnedVariance:
    """Standard deviation s of the noise out of v, the second half of the output's channels.

        s = exp(0.5 (r log_max[i] + (1 - r) log_min[i])), r = 0.5 (v + 1)
        s = sqrt(max(v, 1e-20))    without bounds

    and, under a correction, with q = max(s s, 1e-20),

        s <- s sqrt(max(1 - min(absorbed[i, c] / q, largest_share), 1e-20 / q))
    """

    log_min: Array | None
    """[S]"""
    log_max: Array | None
    """[S]"""
    absorbed: Array | None
    """[S, C]"""
    largest_share: np.float32


@dataclass(frozen=True)
class Table:
    """A compiled sampler, its coefficients rounded to float32."""

    timesteps: Array
    """What the network is fed at each step, [S]."""
    integer_timesteps: bool
    """Whether the network is fed int64 (True) or float32 timesteps."""
    initial_sigma: np.float32
    """Standard deviation of the initial sample."""
    input_scale: Array
    """[S]"""
    sample_weights: Array
    """a, [S, K]"""
    output_weights: Array
    """b, [S, H]"""
    noise_std: Array
    """c, [S]; [S, C] where there is a correction."""
    clip: Clip | None = None
    correction: Correction | None = None
    learned_variance: LearnedVariance | None = None

    @property
    def n_steps(self) -> int:
        return len(self.timesteps)

    @classmethod
    def from_json(
        cls, program: Mapping[str, Any], correction: Mapping[str, Any] | None = None
    ) -> Table:
        """Reads a stored sampler program and, where there is one, its correction.

        Args:
            program: a `SamplerProgram` as plain JSON values.
            correction: a `CorrectedSchedule` as plain JSON values.

        Raises:
            KeyError: if a field is missing.
            ValueError: if a table does not have one row per timestep or a number is not finite.
        """
        n_steps = len(program["timesteps"])
        if n_steps == 0:
            raise ValueError("timesteps must not be empty")
        source = program if correction is None else correction
        return cls(
            timesteps=_table("timesteps", program["timesteps"], (n_steps,)),
            integer_timesteps=bool(program["integer_timesteps"]),
            initial_sigma=np.float32(_table("initial_sigma", program["initial_sigma"], ())),
            input_scale=_table("input_scale", program["input_scale"], (n_steps,)),
            sample_weights=_table("sample_weights", program["sample_weights"], (n_steps, None)),
            output_weights=_table("output_weights", program["output_weights"], (n_steps, None)),
            noise_std=_table(
                "noise_std",
                source["noise_std"],
                (n_steps,) if correction is None else (n_steps, None),
            ),
            clip=_clip(program.get("clip"), n_steps),
            correction=_correction(correction, n_steps),
            learned_variance=_learned(program.get("learned_variance"), correction, n_steps),
        )

    def adds_noise(self, step: int) -> bool:
        """Whether step `step` needs noise."""
        return bool(np.any(self.noise_std[_checked_step(self, step)]))


def correct(table: Table, step: int, output: Array, fed: Array) -> Array:
    """Takes the systematic part of the quantization error out of a network output.

    Args:
        table: the sampler, with or without a correction.
        step: 0 <= step < S.
        output: float32 [B, C, H, W].
        fed: what the network was fed, float32 [B, C, H, W].

    Returns:
        float32 [B, C, H, W]; `output` itself where the table has no correction.

    Raises:
        IndexError: if `step` is out of range.
        ValueError: if the correction is for another number of channels.

    Source: He et al. 2023, "PTQD", https://arxiv.org/abs/2305.10657, section 4.
    """
    step = _checked_step(table, step)
    if table.correction is None:
        return output
    bias = _per_channel("bias", table.correction.bias[step], output)
    corrected: Array = table.correction.gain[step] * (output - bias)
    weight = table.correction.input_weight[step]
    return corrected if weight == 0 else corrected + weight * fed


def advance(
    table: Table,
    step: int,
    samples: Sequence[Array],
    outputs: Sequence[Array],
    noise: Array | None,
    variance: Array | None = None,
) -> Array:
    """The sample after step `step`.

    Args:
        table: the sampler.
        step: 0 <= step < S.
        samples: (x[i], x[i-1], ...), newest first, each float32 [B, C, H, W]; K of them, or as
            many as there are yet.
        outputs: (f[i], f[i-1], ...), newest first and corrected, alike; H of them.
        noise: z, float32 [B, C, H, W]; not looked at where the step adds none.
        variance: v, float32 [B, C, H, W], where the table has a learned variance.

    Returns:
        x[i+1], float32 [B, C, H, W].

    Raises:
        IndexError: if `step` is out of range.
        ValueError: if a sample, an output or the noise that the step needs is missing.
    """
    step = _checked_step(table, step)
    terms = [
        *_weighted("samples", table.sample_weights[step], samples),
        *_weighted("outputs", table.output_weights[step], outputs),
    ]
    if table.adds_noise(step):
        if noise is None:
            raise ValueError(f"step {step} adds noise, but none was given")
        std = _noise_std(table, step, noise, variance)
        terms.append(std * np.asarray(noise, dtype=np.float32))
    if table.clip is not None and table.clip.weight[step] != 0:
        terms.append(table.clip.weight[step] * _clipped(table.clip, step, samples[0], outputs[0]))
    total = terms[0] if terms else np.zeros_like(samples[0])
    for term in terms[1:]:
        total = total + term
    return total


def run(
    table: Table,
    predict: Callable[[Array, int], Array],
    initial: Array,
    noise: Callable[[int], Array],
    on_step: Callable[[int, Array], None] | None = None,
) -> Array:
    """Draws samples.

    Args:
        table: the sampler.
        predict: the network: (`input_scale[i] * x[i]` float32 [B, C, H, W], step) -> f[i], same
            shape, guidance included; [B, 2C, H, W] where the table has a learned variance.
        initial: unit-normal noise, float32 [B, C, H, W]; `initial_sigma` is applied here.
        noise: step -> z float32 [B, C, H, W]; called once per step that adds noise.
        on_step: is told (step, x[i+1]) after each step.

    Returns:
        x[S], float32 [B, C, H, W].

    Raises:
        ValueError: if an output has another shape than the sample.
    """
    samples: deque[Array] = deque(maxlen=table.sample_weights.shape[1])
    outputs: deque[Array] = deque(maxlen=table.output_weights.shape[1])
    sample = table.initial_sigma * np.asarray(initial, dtype=np.float32)
    for step in range(table.n_steps):
        fed = table.input_scale[step] * sample
        output = np.asarray(predict(fed, step), dtype=np.float32)
        output, variance = _split(table, step, output, sample.shape)
        samples.appendleft(sample)
        outputs.appendleft(correct(table, step, output, fed))
        drawn = noise(step) if table.adds_noise(step) else None
        sample = advance(table, step, tuple(samples), tuple(outputs), drawn, variance)
        if on_step is not None:
            on_step(step, sample)
    return sample


def _checked_step(table: Table, step: int) -> int:
    index = operator.index(step)
    if not 0 <= index < table.n_steps:
        raise IndexError(f"step {index} is outside 0..{table.n_steps - 1}")
    return index


def _split(
    table: Table, step: int, output: Array, shape: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """The prediction and, where the table has a learned variance, what says it."""
    learned = table.learned_variance is not None
    batch, channels, *size = shape
    if output.shape != (batch, 2 * channels if learned else channels, *size):
        raise ValueError(
            f"step {step}: output is {output.shape}, the sample {shape}"
            + (", with twice its channels expected" if learned else "")
        )
    return (output[:, :channels], output[:, channels:]) if learned else (output, None)


def _weighted(name: str, weights: Array, values: Sequence[Array]) -> Iterator[Array]:
    for age, weight in enumerate(weights):
        if weight == 0:
            continue
        if age >= len(values):
            raise ValueError(f"{name} must reach {age} steps back, but only {len(values)} given")
        yield weight * np.asarray(values[age], dtype=np.float32)


def _clipped(clip: Clip, step: int, sample: Array, output: Array) -> Array:
    clean = clip.sample_weight[step] * sample + clip.output_weight[step] * output
    clipped: Array = np.clip(clean, -clip.limit, clip.limit)
    return clipped


def _noise_std(table: Table, step: int, noise: Array, variance: Array | None) -> Array | np.float32:
    factor = _noise_factor(table, step, noise)
    if table.learned_variance is None:
        return factor
    if variance is None:
        raise ValueError(f"step {step} takes its variance from the network, but none was given")
    std: Array = factor * _learned_std(table.learned_variance, step, variance)
    return std


def _noise_factor(table: Table, step: int, noise: Array) -> Array | np.float32:
    std = table.noise_std[step]
    if table.correction is None:
        return np.float32(std)
    return _per_channel("noise_std", std, noise)


def _learned_std(learned: LearnedVariance, step: int, variance: Array) -> Array:
    if learned.log_min is None or learned.log_max is None:
        std = np.sqrt(np.maximum(variance, _SMALLEST_VARIANCE))
    else:
        share = np.float32(0.5) * (variance + np.float32(1))
        upper, lower = share * learned.log_max[step], (1 - share) * learned.log_min[step]
        std = np.exp(np.float32(0.5) * (upper + lower))
    if learned.absorbed is None:
        return std
    budget = np.maximum(std * std, _SMALLEST_VARIANCE)
    absorbed = _per_channel("absorbed", learned.absorbed[step], variance) / budget
    left = np.float32(1) - np.minimum(absorbed, learned.largest_share)
    reduced: Array = std * np.sqrt(np.maximum(left, _SMALLEST_VARIANCE / budget))
    return reduced


def _per_channel(name: str, values: Array, like: Array) -> Array:
    if len(values) != like.shape[1]:
        raise ValueError(f"{name} has {len(values)} channels, the sample {like.shape[1]}")
    return values.reshape(1, -1, 1, 1)


def _table(name: str, values: Any, shape: tuple[int | None, ...]) -> Array:
    with np.errstate(over="ignore"):
        table = np.array(values, dtype=np.float64).astype(np.float32)
    fits = table.ndim == len(shape) and table.size > 0
    if not fits or any(n is not None and n != m for n, m in zip(shape, table.shape, strict=True)):
        wanted = " x ".join("n" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must be a table of {wanted} numbers, but it is {table.shape}")
    if not np.all(np.isfinite(table)):
        raise ValueError(f"{name} must be finite in float32")
    table.flags.writeable = False
    return table


def _clip(clip: Mapping[str, Any] | None, n_steps: int) -> Clip | None:
    if clip is None:
        return None
    return Clip(
        limit=np.float32(_table("clip.limit", clip["limit"], ())),
        sample_weight=_table("clip.sample_weight", clip["sample_weight"], (n_steps,)),
        output_weight=_table("clip.output_weight", clip["output_weight"], (n_steps,)),
        weight=_table("clip.weight", clip["weight"], (n_steps,)),
    )


def _correction(correction: Mapping[str, Any] | None, n_steps: int) -> Correction | None:
    if correction is None:
        return None
    weight = correction.get("input_weight")
    return Correction(
        gain=_table("gain", correction["gain"], (n_steps,)),
        bias=_table("bias", correction["bias"], (n_steps, None)),
        input_weight=np.zeros(n_steps, np.float32)
        if weight is None
        else _table("input_weight", weight, (n_steps,)),
    )


def _learned(
    learned: Mapping[str, Any] | None, correction: Mapping[str, Any] | None, n_steps: int
) -> LearnedVariance | None:
    if learned is None:
        return None
    bounds = [
        None if (row := learned.get(name)) is None else _table(name, row, (n_steps,))
        for name in ("log_min", "log_max")
    ]
    taken = None if correction is None else correction.get("absorbed")
    return LearnedVariance(
        log_min=bounds[0],
        log_max=bounds[1],
        absorbed=None
        if taken is None
        else _table("absorbed.variance", taken["variance"], (n_steps, None)),
        largest_share=np.float32(0.0 if taken is None else taken["largest_share"]),
    )
