"""What to time: the operations of a network, and mixed networks to fit their sum to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from edgeqdm.emit.backend import Menu
from edgeqdm.errors import UnsupportedError
from edgeqdm.ir.model import LayerKind
from edgeqdm.ir.precision import FP32, TABLE, Precision
from edgeqdm.ir.profile import BoundaryKind, beyond_fp32
from edgeqdm.profile.kit import KitRequest
from edgeqdm.profile.opkeys import NetworkKeys

DEFAULT_PRECISIONS = tuple(
    Precision(text) for text in ("fp32", "w8a8", "w4a8", "w8", "w8a8dyn", "w4g32a8dyn")
)
"""Timed and searched unless others are named; each where the target has a kernel for it."""
DEFAULT_WHOLES = 16
"""Mixed networks timed as a whole, beside one for every precision alone."""
CONCENTRATION = 0.5
"""Of the Dirichlet distribution that shares of precisions are drawn from: mixes of one, two or all
are about as frequent."""

DRAWS = 20
"""Per mixed network that is asked for: small networks have few, and they come up again."""

Candidates = Mapping[LayerKind, tuple[Precision, ...]]


def candidates(menu: Menu, precisions: Sequence[Precision] = DEFAULT_PRECISIONS) -> Candidates:
    """The precisions each kind of layer may take, fp32 first.

    Raises:
        UnsupportedError: EQ-4310, if the target has no kernel at all for one of them.
    """
    for precision in precisions:
        if precision == TABLE or not any(precision in offered for offered in menu.values()):
            known = sorted({p for offered in menu.values() for p in offered if p != TABLE})
            raise UnsupportedError(
                "EQ-4310",
                f"the target has no kernel for {precision}",
                path="precision",
                hint=f"choose among {', '.join(known)}",
            )
    wanted = dict.fromkeys((FP32, *precisions))
    return {kind: tuple(p for p in wanted if p in offered) for kind, offered in menu.items()}


def mixed_precisions(
    network: NetworkKeys,
    offered: Candidates,
    n: int,
    *,
    tables: Collection[str] = (),
    generator: np.random.Generator,
) -> list[dict[str, Precision]]:
    """Networks with random precisions, in shares that are random themselves."""
    found = []
    for _ in range(n):
        shares = {
            kind: generator.dirichlet([CONCENTRATION] * len(choices))
            for kind, choices in offered.items()
        }
        found.append(
            {
                layer: TABLE
                if layer in tables
                else offered[key.kind][generator.choice(len(offered[key.kind]), p=shares[key.kind])]
                for layer, key in network.keys.items()
            }
        )
    return found


def uniform_precisions(
    network: NetworkKeys, offered: Candidates, *, tables: Collection[str] = ()
) -> list[dict[str, Precision]]:
    """One network per precision; where a kind has no such kernel it gets what it has nearest."""
    everything = dict.fromkeys(p for choices in offered.values() for p in choices)
    return [
        {
            layer: TABLE if layer in tables else nearest(precision, offered[key.kind])
            for layer, key in network.keys.items()
        }
        for precision in everything
    ]


def nearest(precision: Precision, choices: Sequence[Precision]) -> Precision:
    """The choice that differs least: in whether it is on integers, then in bits."""

    def distance(other: Precision) -> tuple[bool, int, int, int, bool]:
        return (
            other.integer != precision.integer,
            abs(other.weight_bits - precision.weight_bits),
            abs(other.activation_bits - precision.activation_bits),
            abs(other.group_size - precision.group_size),
            other.dynamic != precision.dynamic,
        )

    return min(choices, key=distance)


def full_request(
    network: NetworkKeys,
    offered: Candidates,
    *,
    tables: Collection[str] = (),
    n_wholes: int = DEFAULT_WHOLES,
    phased: bool = True,
    seed: int = 0,
) -> KitRequest:
    """Everything that `fit_latency` can use of a network.

    Args:
        network: its operations.
        offered: precisions by kind of layer.
        tables: layers that are looked up in all of it.
        n_wholes: mixed networks, beside one for every precision.
        phased: whether plans may have several phases.
        seed: of the mixed networks.
    """
    keys = dict.fromkeys(key for layer, key in network.keys.items() if layer not in tables)
    shapes = dict.fromkeys(network.keys[names[0]].input_shape for names in network.siblings)
    return KitRequest(
        entries=[(key, p) for key in keys for p in offered[key.kind]],
        boundaries=[(BoundaryKind.QUANTIZE, shape) for shape in shapes],
        wholes=_different_wholes(network, offered, n_wholes, tables=tables, seed=seed),
        pairs=_different_pairs(network, offered, tables=tables) if phased else (),
    )


def _different_pairs(
    network: NetworkKeys, offered: Candidates, *, tables: Collection[str]
) -> list[tuple[dict[str, Precision], dict[str, Precision]]]:
    """Every precision alone beside the one before it, the first beside the last."""
    uniform = uniform_precisions(network, offered, tables=tables)
    found = list({beyond_fp32(precisions): precisions for precisions in uniform}.values())
    return [(each, found[k - 1]) for k, each in enumerate(found)] if len(found) > 1 else []


def _different_wholes(
    network: NetworkKeys, offered: Candidates, n_mixed: int, *, tables: Collection[str], seed: int
) -> list[dict[str, Precision]]:
    """One network per precision and `n_mixed` others, fewer only where there are no more."""
    uniform = uniform_precisions(network, offered, tables=tables)
    found = {beyond_fp32(precisions): precisions for precisions in uniform}
    wanted = len(found) + n_mixed
    generator = np.random.default_rng(seed)
    for _ in range(DRAWS * n_mixed):
        if len(found) == wanted:
            break
        (mixed,) = mixed_precisions(network, offered, 1, tables=tables, generator=generator)
        found.setdefault(beyond_fp32(mixed), mixed)
    return list(found.values())
