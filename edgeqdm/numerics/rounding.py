"""Rounding that can be learned: up or down for every weight, on or off for every activation."""

from __future__ import annotations

import torch
from torch import Tensor

STRETCH = 1.2
"""The sigmoid is stretched to (-0.1, 1.1) and clipped, so that 0 and 1 are reached."""
_LOW = (1 - STRETCH) / 2


def soft_rounding(alpha: Tensor) -> Tensor:
    """How far each weight is rounded up, 0 (floor) to 1 (ceil), of alpha's shape.

    Source: AdaRound, equation 23, https://arxiv.org/abs/2004.10568, with zeta 1.1 and gamma -0.1.
    """
    return (torch.sigmoid(alpha) * STRETCH + _LOW).clamp(0, 1)


def initial_alpha(fraction: Tensor) -> Tensor:
    """The alpha at which `soft_rounding` is `fraction`, so that nothing is rounded yet.

    Args:
        fraction: of a weight over its scale, in [0, 1].
    """
    return -torch.log(STRETCH / (fraction - _LOW) - 1)


def rounding_regulariser(alpha: Tensor, beta: float) -> Tensor:
    """How undecided the rounding is, float32 []: 0 where every weight is at floor or ceil, 1 at
    most.

    The mean and not the sum over weights, since it is added to an error relative to its target.

    Args:
        alpha: any shape, not empty.
        beta: large values press only on weights that are nearly decided; annealed from 20 to 2.

    Source: AdaRound, equation 24, https://arxiv.org/abs/2004.10568.
    """
    return (1 - (2 * soft_rounding(alpha) - 1).abs().pow(beta)).mean()


def straight_through_round(x: Tensor) -> Tensor:
    """Rounds half to even; its gradient is that of the identity."""
    return straight_through(torch.round(x), x)


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """Exactly `value`, with the gradient of `x`, which has the same shape and is finite."""
    return value.detach() + (x - x.detach())


def drop_mix(
    quantized: Tensor, original: Tensor, probability: float, generator: torch.Generator
) -> Tensor:
    """Takes each element from `original` with a probability, else from `quantized`.

    Args:
        quantized: any shape.
        original: of the same shape.
        probability: 0 returns `quantized` itself and draws nothing.
        generator: drawn from once per element.

    Source: QDrop, https://arxiv.org/abs/2203.05740.
    """
    if probability == 0:
        return quantized
    drawn = torch.rand(quantized.shape, generator=generator, device=generator.device)
    return torch.where((drawn < probability).to(quantized.device), original, quantized)
