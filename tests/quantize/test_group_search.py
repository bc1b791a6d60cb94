"""A group size search on toys whose best genome is known."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeqdm.errors import InputError, NumericalError, StorageError
from edgeqdm.numerics.cost import bit_operations
from edgeqdm.quantize import group_search
from edgeqdm.quantize.group_search import (
    MAX_ENUMERATED,
    Genome,
    GroupSearchResult,
    GroupSearchSettings,
    by_layer,
    search_group_sizes,
)

CHOICES = (16, 32, 64, 128, 256)
SMALL = GroupSearchSettings(
    CHOICES, population=10, elite=4, mutations=4, crossovers=4, generations=3
)


def names(n_layers: int) -> tuple[str, ...]:
    return tuple(f"block.{number}.proj" for number in range(n_layers))


@dataclasses.dataclass
class Toy:
    """Layers whose errors add up and whose costs are those of real matrix products.

    Attributes:
        errors: per layer, by group size; not monotone, as in practice.
        costs: per layer, by group size.
        seen: genomes scored, in order.
        stop_after: scores until the run is interrupted, or None.
    """

    errors: list[dict[int, float]]
    costs: list[dict[int, int]]
    seen: list[Genome] = dataclasses.field(default_factory=list)
    stop_after: int | None = None

    @classmethod
    def drawn(cls, seed: int, n_layers: int = 6, choices: tuple[int, ...] = CHOICES) -> Toy:
        rng = random.Random(seed)
        errors = [{size: rng.random() for size in choices} for _ in range(n_layers)]
        shapes = [(rng.choice((64, 256)), rng.choice((256, 512))) for _ in range(n_layers)]
        return cls(errors, [{size: w4a8(n, k, size) for size in choices} for n, k in shapes])

    def error(self, genome: Genome) -> float:
        return sum(error[size] for error, size in zip(self.errors, genome, strict=True))

    def cost(self, genome: Genome) -> int:
        return sum(cost[size] for cost, size in zip(self.costs, genome, strict=True))

    def fitness(self, genome: Genome) -> float:
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(genome)
        return self.error(genome)

    def every_genome(self) -> list[Genome]:
        return list(itertools.product(*self.errors))

    def budget(self, share: float) -> int:
        """What the cheapest `share` of all genomes costs at most."""
        costs = sorted(map(self.cost, self.every_genome()))
        return costs[int(share * (len(costs) - 1))]

    def best(self, budget: float) -> Genome:
        allowed = (genome for genome in self.every_genome() if self.cost(genome) <= budget)
        return min(allowed, key=self.error)

    def search(self, budget: float, **options: Any) -> GroupSearchResult:
        options = {"settings": SMALL} | options
        layers = names(len(self.errors))
        return search_group_sizes(layers, self.cost, budget, self.fitness, **options)


def w4a8(outputs: int, inputs: int, group_size: int) -> int:
    return bit_operations(
        tokens=64,
        outputs=outputs,
        inputs=inputs,
        weight_bits=4,
        activation_bits=8,
        group_size=group_size,
    )


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_search_reaches_the_optimum_found_by_brute_force(seed: int, share: float) -> None:
    """Q6: 5^6 genomes, of which at most 50 + 10 x 50 are scored. Of 160 such searches none missed,
    and 550 genomes drawn at random hold the optimum of 15625 with a chance of 3.5 %."""
    toy = Toy.drawn(seed)
    budget = toy.budget(share)
    found = toy.search(budget, settings=GroupSearchSettings(CHOICES), seed=seed)
    assert found.genome == toy.best(budget)
    assert found.fitness == toy.error(found.genome)
    assert found.cost == toy.cost(found.genome) <= budget
    assert found.n_evaluations == len(toy.seen) <= 550


def test_a_binding_budget_changes_the_optimum() -> None:
    """Q6: the toy above is no free minimum in disguise."""
    toy = Toy.drawn(0)
    assert toy.best(toy.budget(0.02)) != toy.best(toy.budget(1.0))
    assert toy.error(toy.best(toy.budget(0.02))) > toy.error(toy.best(toy.budget(1.0)))


@given(
    n_layers=st.integers(1, 7),
    choices=st.lists(st.sampled_from((0, *CHOICES)), min_size=1, max_size=5, unique=True),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_search_keeps_its_promises(
    n_layers: int, choices: list[int], share: float, seed: int
) -> None:
    """Q5: budget, no genome twice, a history that never rises; in listed spaces and larger ones."""
    toy = Toy.drawn(seed, n_layers, tuple(choices))
    dearest, cheapest = (sum(end(costs.values()) for costs in toy.costs) for end in (max, min))
    budget = cheapest + share * (dearest - cheapest)
    settings = dataclasses.replace(SMALL, choices=tuple(choices))
    found = toy.search(budget, settings=settings, seed=seed)
    assert all(toy.cost(genome) <= budget for genome in (*toy.seen, found.genome))
    assert len(set(toy.seen)) == len(toy.seen) == found.n_evaluations
    assert len(found.history) == settings.generations + 1
    assert list(found.history) == sorted(found.history, reverse=True)
    assert found.history[-1] == found.fitness == min(map(toy.error, toy.seen))


def test_equal_seeds_give_equal_searches_and_others_do_not() -> None:
    """Q5."""
    runs = [Toy.drawn(0) for _ in range(3)]
    budget = runs[0].budget(0.5)
    results = [toy.search(budget, seed=seed) for toy, seed in zip(runs, (5, 5, 6), strict=True)]
    assert results[0] == results[1]
    assert runs[0].seen == runs[1].seen != runs[2].seen


def test_feasible_uniform_genomes_are_scored_first() -> None:
    toy = Toy.drawn(0)
    toy.search(toy.cost((64,) * 6))
    assert toy.seen[:3] == [(size,) * 6 for size in (64, 128, 256)]
    assert not {(16,) * 6, (32,) * 6} & set(toy.seen)


def test_a_small_space_is_scored_completely() -> None:
    """Q5: 81 genomes, 30 of them affordable or a few more where costs are equal."""
    toy = Toy.drawn(3, n_layers=4, choices=(16, 64, 256))
    budget = toy.budget(30 / 81)
    found = toy.search(budget, settings=dataclasses.replace(SMALL, choices=(16, 64, 256)))
    allowed = {genome for genome in toy.every_genome() if toy.cost(genome) <= budget}
    assert len(allowed) < SMALL.population * (SMALL.generations + 1)
    assert set(toy.seen) == allowed
    assert found.genome == toy.best(budget)


def test_the_only_feasible_genome_of_a_large_space_is_found() -> None:
    """Q5: one genome of 5^12, and not a uniform one."""
    rng = random.Random(1)
    cheapest = tuple(rng.choice(CHOICES) for _ in range(12))

    def cost(genome: Genome) -> float:
        return sum(abs(math.log2(g / c)) for g, c in zip(genome, cheapest, strict=True))

    found = search_group_sizes(names(12), cost, 0.0, lambda _: 1.0, settings=SMALL)
    assert found.genome == cheapest
    assert found.n_evaluations == 1


def test_a_few_feasible_genomes_of_a_large_space_are_all_found() -> None:
    """Q5: the cheapest genome and the 12 that differ from it in one layer by one size."""

    def cost(genome: Genome) -> int:
        return sum(CHOICES[::-1].index(size) for size in genome)

    found = search_group_sizes(names(12), cost, 1, lambda g: sum(g), settings=SMALL)
    assert found.genome.count(128) == 1
    assert found.n_evaluations == 13


@pytest.mark.parametrize("n_layers", [3, 6])
def test_an_empty_feasible_set_is_refused_with_the_cheapest_cost(n_layers: int) -> None:
    """Q5: in a listed space and in a larger one."""
    assert (len(CHOICES) ** n_layers <= MAX_ENUMERATED) == (n_layers == 3)
    toy = Toy.drawn(0, n_layers)
    cheapest = toy.cost((256,) * n_layers)
    with pytest.raises(InputError) as caught:
        toy.search(cheapest - 1)
    assert caught.value.code == "EQ-3237"
    assert f"budget of {cheapest - 1}:" in caught.value.message
    assert f"256 in every layer, cost {cheapest}" in caught.value.message
    assert toy.seen == []


def test_an_empty_feasible_set_names_a_cheapest_genome_that_is_not_uniform() -> None:
    with pytest.raises(InputError, match="256 256 16, cost 0 ") as caught:
        search_group_sizes(
            names(3),
            lambda genome: sum(a != b for a, b in zip(genome, (256, 256, 16), strict=True)),
            -1.0,
            lambda _: 0.0,
            settings=SMALL,
        )
    assert caught.value.code == "EQ-3237"


def test_among_equally_fit_genomes_the_cheapest_wins() -> None:
    toy = Toy.drawn(0, n_layers=3)
    found = search_group_sizes(
        names(3), toy.cost, toy.budget(1.0), lambda _: 0.5, settings=GroupSearchSettings(CHOICES)
    )
    assert found.genome == (256, 256, 256)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_fitness_that_is_no_number_is_refused_by_genome(value: float, tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    toy = Toy.drawn(0)
    with pytest.raises(NumericalError, match=rf"fitness of group sizes .* is {value}") as caught:
        search_group_sizes(
            names(6),
            toy.cost,
            toy.budget(1.0),
            lambda genome: value if len(set(genome)) > 1 else 1.0,
            settings=SMALL,
            file=file,
        )
    assert caught.value.code == "EQ-5235"
    assert "256 256" in file.read_text()
    assert str(value) not in file.read_text()


def test_a_cost_that_is_no_number_is_refused_by_genome() -> None:
    with pytest.raises(NumericalError, match="cost of group sizes 16 in every layer is nan"):
        search_group_sizes(names(2), lambda _: math.nan, 1.0, lambda _: 0.0)


def test_no_generations_leave_the_best_of_the_first() -> None:
    toy = Toy.drawn(0)
    found = toy.search(toy.budget(0.5), settings=dataclasses.replace(SMALL, generations=0))
    assert found.history == (found.fitness,)
    assert found.n_evaluations == SMALL.population


def test_a_single_parent_has_mutations_only() -> None:
    toy = Toy.drawn(0)
    found = toy.search(toy.budget(0.5), settings=dataclasses.replace(SMALL, elite=1))
    assert found.n_evaluations == SMALL.population * (SMALL.generations + 1)


def test_by_layer_names_every_size() -> None:
    toy = Toy.drawn(0, n_layers=3)
    found = toy.search(toy.budget(1.0))
    assert by_layer(found) == dict(zip(names(3), found.genome, strict=True))


@pytest.mark.parametrize("n_layers", [1, 6])
def test_progress_rises_to_its_total_however_few_genomes_there_are(n_layers: int) -> None:
    toy = Toy.drawn(0, n_layers)
    calls: list[tuple[int, int]] = []
    toy.search(toy.budget(1.0), progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert {call[1] for call in calls} == {40}
    assert done == sorted(set(done))
    assert done[-1] == 40


@pytest.mark.parametrize("stop_after", [0, 1, 9, 10, 25, 39])
def test_an_interrupted_search_ends_as_if_it_had_not_been(stop_after: int, tmp_path: Path) -> None:
    """I10: the same result, and no genome scored by both runs."""
    whole, first, second = (Toy.drawn(0) for _ in range(3))
    budget = whole.budget(0.4)
    expected = whole.search(budget, seed=7)
    file = tmp_path / "work" / "search.json"
    first.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        first.search(budget, seed=7, file=file)
    assert second.search(budget, seed=7, file=file) == expected
    assert first.seen + second.seen == whole.seen
    assert [path.name for path in file.parent.iterdir()] == ["search.json"]


def test_a_finished_search_is_read_without_scoring(tmp_path: Path) -> None:
    """I10."""
    first, second = Toy.drawn(0), Toy.drawn(0)
    budget, file = first.budget(0.4), tmp_path / "search.json"
    expected = first.search(budget, file=file)
    content = file.read_bytes()
    assert second.search(budget, file=file) == expected
    assert second.seen == []
    assert file.read_bytes() == content


def test_scores_are_stored_to_the_last_bit(tmp_path: Path) -> None:
    """I10."""

    def search(fitness: Callable[[Genome], float]) -> GroupSearchResult:
        file = tmp_path / "search.json"
        return search_group_sizes(names(1), lambda _: 0, 0, fitness, settings=SMALL, file=file)

    def third(genome: Genome) -> float:
        return genome[0] / 3e7

    assert search(third).fitness == search(lambda _: math.nan).fitness == third((16,))


@pytest.mark.parametrize(
    ("field", "change", "now"),
    [
        ("key", {"key": "latent mse, 16 runs"}, '"latent mse, 16 runs"'),
        ("seed", {"seed": 1}, "1"),
        ("budget", {"budget": 2e6}, "2000000.0"),
        ("layers", {"layers": ("b", "a")}, '"b a"'),
        ("generations", {"settings": dataclasses.replace(SMALL, generations=4)}, "4"),
        ("choices", {"settings": dataclasses.replace(SMALL, choices=(16, 64))}, '"16 64"'),
    ],
)
def test_scores_of_another_search_are_refused_by_what_differs(
    field: str, change: dict[str, Any], now: str, tmp_path: Path
) -> None:
    """I10."""
    file = tmp_path / "search.json"
    arguments = {"layers": ("a", "b"), "budget": 1e6, "key": "latent mse", "seed": 0}
    arguments |= {"cost": sum, "fitness": sum, "settings": SMALL, "file": file}
    search_group_sizes(**arguments)
    with pytest.raises(StorageError) as caught:
        search_group_sizes(**(arguments | change))
    assert f"another search: {field} was " in caught.value.message
    assert caught.value.message.endswith(f", now {now}")
    assert (caught.value.code, caught.value.path) == ("EQ-6235", str(file))


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("0.25", "0.75", "EQ-6236"),
        ('"16 16"', '"16 61"', "EQ-6236"),
        ("}\n", "", "EQ-6006"),
        ("0.25", "NaN", "EQ-6008"),
        ('"schema_version": 1', '"schema_version": 2', "EQ-6009"),
    ],
)
def test_damaged_scores_are_refused(old: str, new: str, code: str, tmp_path: Path) -> None:
    """I10: another digit or genome, a file cut off, no number, a file of a later version."""
    file = tmp_path / "search.json"

    def search() -> GroupSearchResult:
        return search_group_sizes(names(2), sum, 1e6, lambda _: 0.25, settings=SMALL, file=file)

    search()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(StorageError) as caught:
        search()
    assert (caught.value.code, caught.value.path) == (code, str(file))


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    toy = Toy.drawn(0, n_layers=2)
    with pytest.raises(StorageError, match="a folder"):
        toy.search(toy.budget(1.0), file=tmp_path)


def test_a_place_that_cannot_be_written_is_refused_before_the_first_score(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    toy = Toy.drawn(0, n_layers=2)
    with pytest.raises(StorageError, match="cannot be kept") as caught:
        toy.search(toy.budget(1.0), file=tmp_path / "taken" / "search.json")
    assert caught.value.code == "EQ-6237"
    assert toy.seen == []


def test_a_write_cut_off_keeps_the_scores_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I10: the interrupt arrives between the new content and its name."""
    toy, file = Toy.drawn(0), tmp_path / "search.json"
    toy.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        toy.search(toy.budget(0.4), file=file)
    content = file.read_bytes()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    toy.stop_after = None
    with monkeypatch.context() as patch:
        patch.setattr(group_search.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy.search(toy.budget(0.4), file=file)
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("choices", {"choices": ()}),
        ("choices", {"choices": (16, 16)}),
        ("choices", {"choices": (-1, 16)}),
        ("population", {"population": 4}),
        ("population", {"mutations": 7}),
        ("elite", {"elite": 0}),
        ("elite", {"elite": 11}),
        ("mutations", {"mutations": -1}),
        ("crossovers", {"crossovers": -1}),
        ("gene_probability", {"gene_probability": 0.0}),
        ("gene_probability", {"gene_probability": math.nan}),
        ("generations", {"generations": -1}),
        ("tries", {"tries": 0}),
    ],
)
def test_impossible_settings_are_refused_by_field(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(SMALL, **change)
    assert (caught.value.code, caught.value.path) == ("EQ-3235", field)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("layers", {"layers": ()}),
        ("layers", {"layers": ("a", "b", "a")}),
        ("budget", {"budget": math.nan}),
        ("budget", {"budget": math.inf}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**63}),
    ],
)
def test_an_impossible_search_is_refused_by_field(field: str, change: dict[str, Any]) -> None:
    arguments = {"layers": ("a",), "cost": sum, "budget": 1e9, "fitness": sum}
    with pytest.raises(InputError) as caught:
        search_group_sizes(**(arguments | change))
    assert (caught.value.code, caught.value.path) == ("EQ-3236", field)
