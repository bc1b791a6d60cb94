"""One group size per layer, for its weights and activations alike, found by evolution.

A genome is a tuple of group sizes in the order of the layers. Genomes are proposed by pure
functions of the scores so far and a generator; scores are measured by the caller or come out of a
file. A search that was interrupted therefore proposes the same genomes again, takes the scores it
has, and ends as if it had never stopped.

Source: Chen et al. 2025, "Q-DiT", https://arxiv.org/abs/2406.17343, algorithm 1. The published code
lacks its selection step; here the best genomes of all generations are the parents of the next. It
bounds the mean group size; here the caller gives the cost.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeqdm.errors import InputError, NumericalError, StorageError
from edgeqdm.ir.codec import describe, digest, dump_record, read_record
from edgeqdm.ir.record import Record

Genome = tuple[int, ...]
"""One group size per layer, 0 for one group per row."""
Progress = Callable[[int, int], None]
"""Called with (done, total) after every score; a generation short of new genomes skips ahead."""

MAX_ENUMERATED = 4096
"""Spaces up to this size are listed, so that not one feasible genome is missed."""


@dataclass(frozen=True)
class GroupSearchSettings:
    """How a search proposes genomes.

    Attributes:
        choices: group sizes to choose from.
        population: genomes of a generation, at least one per choice.
        elite: genomes that have children.
        mutations: children of one parent in a generation.
        crossovers: children of two parents in a generation.
        gene_probability: that a mutation draws a layer's size anew.
        generations: after the first, which is drawn at random.
        tries: proposals that may be known already or too expensive: per child that is wanted, and
            of all random genomes of a generation.

    Raises:
        InputError: EQ-3235, names the field.
    """

    choices: tuple[int, ...] = (16, 32, 64, 128, 256)
    population: int = 50
    elite: int = 10
    mutations: int = 25
    crossovers: int = 25
    gene_probability: float = 0.1
    generations: int = 10
    tries: int = 10

    def __post_init__(self) -> None:
        choices, children = self.choices, self.mutations + self.crossovers
        _require("choices", len(choices) > 0, "at least one group size is needed")
        _require("choices", min(choices) >= 0, f"a group size is 0 or more, got {choices}")
        _require("choices", len(set(choices)) == len(choices), f"one is listed twice: {choices}")
        _require(
            "population",
            self.population >= len(choices),
            f"must hold one genome per choice, {len(choices)}, got {self.population}",
        )
        _require(
            "elite",
            1 <= self.elite <= self.population,
            f"must be 1..population={self.population}, got {self.elite}",
        )
        _require("mutations", self.mutations >= 0, f"must be 0 or more, got {self.mutations}")
        _require("crossovers", self.crossovers >= 0, f"must be 0 or more, got {self.crossovers}")
        _require(
            "population",
            children <= self.population,
            f"must hold all {children} mutations and crossovers, got {self.population}",
        )
        _require(
            "gene_probability",
            0.0 < self.gene_probability <= 1.0,
            f"must be above 0 and at most 1, got {self.gene_probability}",
        )
        _require("generations", self.generations >= 0, f"must be 0 or more, got {self.generations}")
        _require("tries", self.tries >= 1, f"must be at least 1, got {self.tries}")


@dataclass(frozen=True)
class GroupSearchResult:
    """The best genome of a search.

    Attributes:
        layers: names, in the order of the genome.
        genome: group size of every layer.
        fitness: its score, the smallest seen.
        cost: what it costs, within the budget.
        history: smallest fitness up to and including each generation; never increases.
        n_evaluations: genomes scored, stored scores included.
    """

    layers: tuple[str, ...]
    genome: Genome
    fitness: float
    cost: float
    history: tuple[float, ...]
    n_evaluations: int


def by_layer(result: GroupSearchResult) -> dict[str, int]:
    """Group size of every layer, by name."""
    return dict(zip(result.layers, result.genome, strict=True))


def search_group_sizes(
    layers: Sequence[str],
    cost: Callable[[Genome], float],
    budget: float,
    fitness: Callable[[Genome], float],
    *,
    key: str = "",
    settings: GroupSearchSettings | None = None,
    seed: int = 0,
    file: Path | None = None,
    progress: Progress | None = None,
) -> GroupSearchResult:
    """Minimise `fitness` over one group size per layer, subject to `cost` <= `budget`.

    The first generation holds every choice as the size of all layers, where feasible, and random
    genomes. Among equally fit genomes the cheaper is the better. No genome is scored twice.

    Args:
        layers: names, each once.
        cost: of a genome; cheap to call and deterministic. See `numerics.cost.bit_operations`.
        budget: highest cost allowed.
        fitness: error of a genome, smaller is better; deterministic. Called for feasible genomes.
        key: names all that `fitness` and `cost` depend on, e.g. digests of model and samples; a
            file is used for the same key only.
        settings: of the evolution; default `GroupSearchSettings()`.
        seed: of the proposals, 0..2^63 - 1.
        file: where every score is kept; a later call with the same arguments goes on from it.
        progress: called after every score.

    Raises:
        InputError: EQ-3236, if layers, budget or seed cannot be used; EQ-3237, if no genome found
            is within the budget: names the cheapest.
        NumericalError: EQ-5235, if a fitness or cost is not finite; names the genome.
        StorageError: if the file is of another search (EQ-6235), damaged (EQ-6236, or a code of
            `ir.codec`) or cannot be written (EQ-6237).
    """
    settings = settings or GroupSearchSettings()
    layers = tuple(layers)
    _check_search(layers, budget, seed)
    space = _Space(len(layers), settings.choices, cost, budget)
    of = _Search(layers=layers, budget=budget, seed=seed, key=key, **asdict(settings))
    scores = _Scores(fitness, None if file is None else _ScoreFile.open(file, of))
    rng = random.Random(seed)
    generation = _first_generation(space, settings, rng)
    history: list[float] = []
    total = settings.population * (settings.generations + 1)
    for done in range(0, total, settings.population):
        for number, genome in enumerate(generation, start=1):
            scores.measure(genome)
            if progress is not None and number < settings.population:
                progress(done + number, total)
        if progress is not None:
            progress(done + settings.population, total)
        ranked = _rank(scores.known, space)
        history.append(scores.known[ranked[0]])
        if len(history) <= settings.generations:
            generation = _next_generation(ranked, space, settings, rng)
    best = ranked[0]
    return GroupSearchResult(
        layers, best, scores.known[best], space.price(best), tuple(history), len(scores.known)
    )


def _check_search(layers: tuple[str, ...], budget: float, seed: int) -> None:
    if not layers:
        raise InputError("EQ-3236", "there is no layer to search a group size for", path="layers")
    if len(set(layers)) < len(layers):
        twice = next(name for name in layers if layers.count(name) > 1)
        raise InputError("EQ-3236", f"{describe(twice)} is listed twice", path="layers")
    if not math.isfinite(budget):
        raise InputError("EQ-3236", f"must be a finite number, got {budget}", path="budget")
    if not 0 <= seed < 2**63:
        message = f"a seed is 0 or more and below 2^63, got {seed}"
        raise InputError("EQ-3236", message, path="seed")


# Proposals: pure functions of the space, the ranking and the generator.


@dataclass(frozen=True)
class _Space:
    """The genomes there are, and which of them can be afforded."""

    n_layers: int
    choices: tuple[int, ...]
    cost: Callable[[Genome], float]
    budget: float

    def price(self, genome: Genome) -> float:
        found = float(self.cost(genome))
        if not math.isfinite(found):
            raise _not_finite("cost", found, genome)
        return found

    def allows(self, genome: Genome) -> bool:
        return self.price(genome) <= self.budget

    @cached_property
    def is_listed(self) -> bool:
        size: int = len(self.choices) ** self.n_layers
        return size <= MAX_ENUMERATED

    @cached_property
    def listed(self) -> tuple[Genome, ...]:
        """Every feasible genome, of a space small enough."""
        everything = itertools.product(self.choices, repeat=self.n_layers)
        return tuple(genome for genome in everything if self.allows(genome))


def _rank(scores: Mapping[Genome, float], space: _Space) -> list[Genome]:
    return sorted(scores, key=lambda genome: (scores[genome], space.price(genome), genome))


def _first_generation(
    space: _Space, settings: GroupSearchSettings, rng: random.Random
) -> list[Genome]:
    uniform = [(size,) * space.n_layers for size in space.choices]
    found = [genome for genome in uniform if space.allows(genome)]
    if not found:
        # Where the cost adds up over the layers, this decides whether there is any at all.
        cheapest = min((_cheapen(genome, space, rng) for genome in uniform), key=space.price)
        found = [cheapest] if space.allows(cheapest) else []
    found += _draw(space, set(found), settings.population - len(found), settings.tries, rng)
    if not found:
        raise _nothing_feasible(space, cheapest)
    return found


def _next_generation(
    ranked: Sequence[Genome], space: _Space, settings: GroupSearchSettings, rng: random.Random
) -> list[Genome]:
    """Children of the best, and random genomes for the children that could not be had."""
    elite = ranked[: settings.elite]
    known = set(ranked)

    def mutation() -> Genome:
        return _mutate(rng.choice(elite), space.choices, settings.gene_probability, rng)

    def crossover() -> Genome:
        one, other = rng.sample(elite, 2)
        return _cross(one, other, rng)

    wanted = settings.mutations
    found = _collect(mutation, space, known, wanted, misses=settings.tries * wanted)
    if len(elite) > 1:
        wanted = settings.crossovers
        found += _collect(crossover, space, known, wanted, misses=settings.tries * wanted)
    return found + _draw(space, known, settings.population - len(found), settings.tries, rng)


def _collect(
    propose: Callable[[], Genome], space: _Space, known: set[Genome], count: int, misses: int
) -> list[Genome]:
    """Up to `count` feasible genomes that were not known, and now are; fewer after `misses`."""
    found: list[Genome] = []
    while len(found) < count and misses > 0:
        genome = propose()
        if genome in known or not space.allows(genome):
            misses -= 1
            continue
        known.add(genome)
        found.append(genome)
    return found


def _draw(
    space: _Space, known: set[Genome], count: int, misses: int, rng: random.Random
) -> list[Genome]:
    """Up to `count` feasible genomes at random that are not known."""
    if space.is_listed:
        new = [genome for genome in space.listed if genome not in known]
        return rng.sample(new, min(count, len(new)))

    def propose() -> Genome:
        genome = tuple(rng.choice(space.choices) for _ in range(space.n_layers))
        return _cheapen(genome, space, rng)

    # Where feasible genomes are scarce, one proposal takes thousands of calls of the cost.
    return _collect(propose, space, known, count, misses)


def _mutate(
    parent: Genome, choices: tuple[int, ...], probability: float, rng: random.Random
) -> Genome:
    return tuple(rng.choice(choices) if rng.random() < probability else size for size in parent)


def _cross(one: Genome, other: Genome, rng: random.Random) -> Genome:
    return tuple(rng.choice(pair) for pair in zip(one, other, strict=True))


def _cheapen(genome: Genome, space: _Space, rng: random.Random) -> Genome:
    """The genome with sizes moved to cheaper ones at random, until it is within the budget.

    Where no single move lowers the cost any more, the result is still too expensive. Every move
    lowers it, so this ends.
    """
    price, moved = space.price(genome), True
    while price > space.budget and moved:
        moved = False
        for layer in rng.sample(range(space.n_layers), space.n_layers):
            if price <= space.budget:
                break
            others = (_replace(genome, layer, size) for size in space.choices)
            cheaper = [(cost, other) for other in others if (cost := space.price(other)) < price]
            if cheaper:
                (price, genome), moved = rng.choice(cheaper), True
    return genome


def _replace(genome: Genome, layer: int, size: int) -> Genome:
    return (*genome[:layer], size, *genome[layer + 1 :])


def _nothing_feasible(space: _Space, cheapest: Genome) -> InputError:
    everything = itertools.product(space.choices, repeat=space.n_layers)
    if space.is_listed:
        cheapest = min(everything, key=space.price)
    return InputError(
        "EQ-3237",
        f"no group sizes are within the budget of {space.budget:.15g}: the cheapest found, "
        f"{_name(cheapest)}, cost {space.price(cheapest):.15g}",
        path="budget",
        hint="raise the budget, or allow larger groups",
    )


def _not_finite(what: str, found: float, genome: Genome) -> NumericalError:
    return NumericalError("EQ-5235", f"the {what} of group sizes {_name(genome)} is {found}")


def _require(field: str, holds: bool, message: str) -> None:
    if not holds:
        raise InputError("EQ-3235", message, path=field)


# Scores: measured once, kept in a file.


class _Search(Record):
    """What makes two searches the same."""

    layers: tuple[str, ...]
    budget: float
    seed: int
    key: str
    choices: tuple[int, ...]
    population: int
    elite: int
    mutations: int
    crossovers: int
    gene_probability: float
    generations: int
    tries: int


class _State(Record):
    """The file of a search.

    Attributes:
        search: whose scores these are.
        scores: fitness by genome, its sizes with blanks between: a list per genome would reach the
            limit on values in a file.
        sha256: digest of this record with an empty one here.
    """

    schema_version: int = 1
    search: _Search
    scores: dict[str, float]
    sha256: str


class _Scores:
    """Fitness of every genome proposed so far."""

    def __init__(self, fitness: Callable[[Genome], float], file: _ScoreFile | None) -> None:
        self.known: dict[Genome, float] = {}
        self._fitness = fitness
        self._file = file

    def measure(self, genome: Genome) -> None:
        stored = None if self._file is None else self._file.get(genome)
        if stored is not None:
            self.known[genome] = stored
            return
        found = float(self._fitness(genome))
        if not math.isfinite(found):
            raise _not_finite("fitness", found, genome)
        self.known[genome] = found
        if self._file is not None:
            self._file.put(genome, found)


class _ScoreFile:
    """Scores on disk, written whole after each one."""

    def __init__(self, path: Path, search: _Search, scores: dict[str, float]) -> None:
        self._path = path
        self._search = search
        self._scores = scores

    @classmethod
    def open(cls, path: Path, search: _Search) -> _ScoreFile:
        if not os.path.exists(path):
            file = cls(path, search, {})
            # An unwritable place is found before the first score, which may take an hour.
            file._write()
            return file
        state = read_record(path, _State, error=StorageError)
        if state.sha256 != _digest(state):
            raise StorageError(
                "EQ-6236",
                "the scores in this file are not those written to it",
                path=path,
                hint="delete it and search again",
            )
        differences = _differences(state.search, search)
        if differences:
            raise StorageError(
                "EQ-6235",
                f"holds the scores of another search: {differences}",
                path=path,
                hint="name another file, or search with the arguments of the first call",
            )
        return cls(path, search, dict(state.scores))

    def get(self, genome: Genome) -> float | None:
        return self._scores.get(_spell(genome))

    def put(self, genome: Genome, fitness: float) -> None:
        self._scores[_spell(genome)] = fitness
        self._write()

    def _write(self) -> None:
        state = _State(search=self._search, scores=self._scores, sha256="")
        data = dump_record(state.model_copy(update={"sha256": _digest(state)}))
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._path)
        except OSError as problem:
            raise StorageError(
                "EQ-6237",
                f"the scores cannot be kept: {problem}",
                path=self._path,
                hint="free some space or name another file, then run the same again",
            ) from problem
        finally:
            # Where the folder itself could not be made, there is nothing to remove either.
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _digest(state: _State) -> str:
    return digest(state.model_copy(update={"sha256": ""}))


def _differences(stored: _Search, wanted: _Search) -> str:
    """`field was A, now B` for every field that differs."""
    pairs = (
        (name, getattr(stored, name), getattr(wanted, name)) for name in type(stored).model_fields
    )
    return "; ".join(
        f"{name} was {_show(was)}, now {_show(now)}" for name, was, now in pairs if was != now
    )


def _show(value: Any) -> str:
    return describe(" ".join(map(str, value)) if isinstance(value, tuple) else value)


def _name(genome: Genome) -> str:
    if len(set(genome)) == 1:
        return f"{genome[0]} in every layer"
    return _spell(genome)


def _spell(genome: Genome) -> str:
    return " ".join(map(str, genome))
