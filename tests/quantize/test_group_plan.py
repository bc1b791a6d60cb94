"""Group sizes of a plan: what a genome changes, what it costs, and that the search repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from edgeqdm import stages
from edgeqdm.calibrate.select import Selection
from edgeqdm.errors import InputError, StorageError
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment
from edgeqdm.ir.precision import FP32, Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import get_layer
from edgeqdm.models.load import load
from edgeqdm.numerics.grouping import search_grouped
from edgeqdm.numerics.ranges import StepRanges
from edgeqdm.quantize.group_plan import (
    GroupPlan,
    layer_tokens,
    output_error,
    plan_groups,
    with_group_sizes,
)
from edgeqdm.quantize.group_search import GroupSearchSettings
from edgeqdm.quantize.modules import DynamicLinear, GroupedLinear
from edgeqdm.quantize.parameters import Parameters
from edgeqdm.quantize.plans import with_activation_bits
from edgeqdm.quantize.quantizer import assemble, initialise
from edgeqdm.testing.conformance import small_denoiser
from edgeqdm.testing.tiny import write_tiny_dit, write_tiny_unet

STEPS = 3
WIDE, NARROW = "transformer_blocks.0.ff.net.2", "transformer_blocks.1.attn1.to_q"
"""Linear layers of the tiny DiT, [16, 64] and [16, 16]."""
TOKENS = 16
"""4 x 4 patches of a sample of 8 x 8."""
SETTINGS = GroupSearchSettings(
    (16, 32, 64), population=4, elite=2, mutations=2, crossovers=1, generations=2
)


@cache
def tiny(kind: str) -> Denoiser:
    write = {"unet": write_tiny_unet, "dit": write_tiny_dit}[kind]
    with TemporaryDirectory() as folder:
        return load(write(Path(folder)), steps=STEPS, scheduler="ddim", guidance=2.0)


@cache
def calibration() -> stages.Calibration:
    return stages.calibrate(tiny("dit"), samples=4)


@cache
def selection() -> Selection:
    method = stages.Method(selected=6, density=False)
    return stages.select_samples(tiny("dit"), calibration(), method)


@cache
def plan_of(precision: str, layers: tuple[str, ...] = (WIDE, NARROW)) -> DeploymentPlan:
    """One precision for a few layers, float for the rest."""
    plan = stages.rule_plan(tiny("dit"), body=FP32)

    def edit(assignment: LayerAssignment) -> LayerAssignment:
        wanted = Precision(precision) if assignment.layer in layers else FP32
        return assignment.model_copy(update={"precision": wanted})

    phase = plan.phases[0]
    edited = phase.model_copy(update={"layers": tuple(map(edit, phase.layers))})
    return plan.model_copy(update={"phases": (edited,)})


def parameters_of(plan: DeploymentPlan) -> Parameters:
    return initialise(tiny("dit"), plan, calibration().observations)


def search(precision: str = "w4g64a8dyn", **options: object) -> GroupPlan:
    known: dict[str, object] = {"settings": SETTINGS, "uniform": 32, "fitness": sum_of_sizes}
    return plan_groups(
        tiny("dit"),
        plan_of(precision),
        calibration().observations,
        selection(),
        **(known | options),  # type: ignore[arg-type]
    )


def sizes_of(plan: DeploymentPlan) -> dict[str, int]:
    return {
        assignment.layer: assignment.precision.group_size
        for assignment in plan.phases[0].layers
        if assignment.precision.group_size
    }


def sum_of_sizes(plan: DeploymentPlan) -> float:
    return float(sum(sizes_of(plan).values()))


def naive_dynamic(x: Tensor, layer: DynamicLinear, weight_size: int, token_size: int) -> Tensor:
    """The definition, element by element: every product of two codes times both their scales."""
    assert layer.weight_scale is not None
    assert layer.weight_zero_point is not None
    outputs, inputs = layer.weight_q.shape
    found = torch.zeros(len(x), outputs, dtype=torch.float64)
    for k in range(inputs):
        group = x[:, k // token_size * token_size : (k // token_size + 1) * token_size]
        scale = group.abs().amax(1) / 127
        codes = torch.round(x[:, k] / scale) * scale
        g = k // weight_size
        weight = layer.weight_q[:, k].double() - layer.weight_zero_point[:, g].double()
        found += codes.double()[:, None] * (weight * layer.weight_scale[:, g].double())
    return found if layer.bias is None else found + layer.bias


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_size_changes_the_weight_and_the_activation_of_its_layer(size: int) -> None:
    """Q7: looked up in the built module, and in what it computes."""
    plan = with_group_sizes(plan_of("w4g48a8dyn"), {WIDE: size})
    module = assemble(tiny("dit"), plan, parameters_of(plan)).network.network
    wide, narrow = get_layer(module, WIDE), get_layer(module, NARROW)
    assert isinstance(wide, DynamicLinear)
    assert isinstance(narrow, DynamicLinear)
    assert (wide.group_size, narrow.group_size) == (size, 48)
    whole = get_layer(tiny("dit").module, WIDE).weight
    assert isinstance(whole, Tensor)
    wanted = search_grouped(whole.detach(), 4, size)
    assert torch.equal(wide.weight_q, wanted.codes)
    assert wide.weight_scale is not None
    assert wide.weight_scale.shape == (16, 64 // size)
    assert torch.equal(wide.weight_scale, wanted.scale)
    # Channels that differ in size, so that the group size of the activation shows.
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 64)
    found = wide(x).double()
    # Integer sums times float32 scales against float64: rounding of 2^-24 over 64 products, and
    # now and then a code next to a half-tie.
    torch.testing.assert_close(found, naive_dynamic(x, wide, size, size), rtol=0, atol=1e-4)
    for other in {16, 32, 64} - {size}:
        far = naive_dynamic(x, wide, size, other) - found
        assert float(far.abs().max()) > 1e-2


def test_a_size_changes_the_weight_where_the_activation_is_tabulated() -> None:
    """Q7: activations from a table have no groups; the scales of the step stay."""
    one, other = (with_group_sizes(plan_of("w4g48a8"), {WIDE: size}) for size in (16, 64))
    built = [
        get_layer(assemble(tiny("dit"), plan, parameters_of(plan)).network.network, WIDE)
        for plan in (one, other)
    ]
    for layer, groups in zip(built, (4, 1), strict=True):
        assert isinstance(layer, GroupedLinear)
        assert layer.weight_scale is not None
        assert layer.weight_scale.shape == (16, groups)
    assert isinstance(built[0], GroupedLinear)
    assert isinstance(built[1], GroupedLinear)
    assert torch.equal(built[0].act_scale_table, built[1].act_scale_table)


@pytest.mark.parametrize("precision", ["w4g64a8dyn", "w6g16a4dyn", "w8g128a8", "w4g256"])
def test_a_plan_with_other_sizes_differs_in_nothing_else(precision: str) -> None:
    plan = plan_of(precision)
    found = with_group_sizes(plan, {WIDE: 48})
    size = plan_of(precision).phases[0].layers
    for before, after in zip(size, found.phases[0].layers, strict=True):
        if before.layer != WIDE:
            assert after == before
            continue
        assert after.precision.group_size == 48
        assert after.precision.weight_bits == before.precision.weight_bits
        assert after.precision.activation_bits == before.precision.activation_bits
        assert after.policy == before.policy
        assert after.reason.startswith(str(after.precision))


def test_the_plan_that_is_found_has_the_sizes_of_the_genome() -> None:
    found = search()
    assert sizes_of(found.plan) == dict(zip(found.search.layers, found.search.genome, strict=True))
    assert set(found.search.layers) == {WIDE, NARROW}
    others = [a for a in found.plan.phases[0].layers if a.layer not in (WIDE, NARROW)]
    assert all(a.precision == FP32 for a in others)


def bit_operations_by_hand(wide: int, narrow: int) -> int:
    """16 outputs of 64 and of 16 inputs: products, a rescaling of 512 for the sum and as much for
    the zero_point of every output and group, and 32 per input value whose range is measured."""
    per_token = 16 * 64 * 4 * 8 + 16 * -(-64 // wide) * 1024 + 64 * 32
    per_token += 16 * 16 * 4 * 8 + 16 * -(-16 // narrow) * 1024 + 16 * 32
    return TOKENS * per_token


def bytes_by_hand(wide: int, narrow: int) -> int:
    """Two codes a byte; a group's scale takes 2 bytes and its zero_point half of one."""
    groups = 16 * -(-64 // wide), 16 * -(-16 // narrow)
    return (16 * 64 + 16 * 16) // 2 + sum(2 * n + n // 2 for n in groups)


@pytest.mark.parametrize(
    ("cost", "by_hand"), [("bit_operations", bit_operations_by_hand), ("bytes", bytes_by_hand)]
)
def test_the_cost_of_a_genome_is_counted_by_hand(
    cost: str, by_hand: Callable[[int, int], int]
) -> None:
    """I9: what is reported of a search on the tiny DiT."""
    found = search(cost=cost, uniform=16)
    sizes = sizes_of(found.plan)
    assert found.search.cost == by_hand(sizes[WIDE], sizes[NARROW])
    # Nothing is dearer than 16 everywhere, so that nothing is left out.
    assert found.search.cost <= by_hand(16, 16)


def test_static_activations_cost_no_ranges() -> None:
    dynamic, tabulated = (search(x).search.cost for x in ("w4g64a8dyn", "w4g64a8"))
    assert dynamic - tabulated == TOKENS * (64 + 16) * 32


@pytest.mark.parametrize("cost", ["bit_operations", "bytes"])
def test_the_budget_is_what_the_uniform_size_costs(cost: str) -> None:
    """The finest groups are the fittest here, and too dear for the wide layer alone."""
    by_hand = {"bit_operations": bit_operations_by_hand, "bytes": bytes_by_hand}[cost]
    found = search(cost=cost, uniform=32)
    sizes = sizes_of(found.plan)
    assert (sizes[WIDE], sizes[NARROW]) == (32, 16)
    assert found.search.cost <= by_hand(32, 32)
    assert by_hand(16, 16) > by_hand(32, 32)


def test_an_interrupted_search_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """I10: at any score; no score is measured again."""
    seen: list[DeploymentPlan] = []

    def score(plan: DeploymentPlan) -> float:
        seen.append(plan)
        return sum_of_sizes(plan)

    whole = search(fitness=score)
    total = len(seen)
    assert total == whole.search.n_evaluations > 2
    for stop_after in (1, total - 1):
        file = tmp_path / f"{stop_after}.json"

        def interrupted(plan: DeploymentPlan, last: int = stop_after) -> float:
            if len(seen) == last:
                raise KeyboardInterrupt
            return score(plan)

        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            search(fitness=interrupted, file=file)
        found = search(fitness=score, file=file)
        assert found == whole
        assert len(seen) == total


def test_the_same_call_searches_the_same_on_the_network_itself(tmp_path: Path) -> None:
    """I10, with the default fitness; the second call scores nothing anew."""
    told: list[tuple[int, int]] = []
    file = tmp_path / "groups.json"
    found = search(fitness=None, file=file, progress=lambda *done: told.append(done))
    assert told[-1] == (12, 12)
    data = file.read_bytes()
    assert search(fitness=None, file=file) == found
    assert file.read_bytes() == data
    assert found.search.fitness == pytest.approx(
        output_error(tiny("dit"), parameters_of(found.plan), selection(), found.plan), rel=1e-6
    )


def test_the_default_fitness_is_the_relative_error_of_the_output() -> None:
    plan = plan_of("w4g32a8dyn")
    chosen = selection()
    quantized = assemble(tiny("dit"), plan, parameters_of(plan))
    assert chosen.conditioning is not None
    errors = []
    for step in range(STEPS):
        rows = [i for i, s in enumerate(chosen.steps.tolist()) if s == step]
        wanted = chosen.outputs[rows].double()
        found = torch.cat(
            [quantized.predict(chosen.inputs[[i]], step, chosen.conditioning[[i]]) for i in rows]
        ).double()
        errors.append(float(((found - wanted) ** 2).sum() / (wanted**2).sum()))
    # Batches of other sizes round differently in float32.
    assert output_error(tiny("dit"), parameters_of(plan), chosen, plan) == pytest.approx(
        sum(errors) / STEPS, rel=1e-2
    )


@pytest.mark.parametrize("precision", ["w4a8", "w8a8dyn", "w4", "fp32"])
def test_a_plan_without_groups_is_refused(precision: str) -> None:
    with pytest.raises(InputError, match="0 layers in groups in a plan of 1 phases") as refused:
        search(precision)
    assert (refused.value.code, refused.value.path) == ("EQ-3245", "plan")


def test_a_plan_of_several_phases_is_refused() -> None:
    plan = with_activation_bits(plan_of("w4g32a8dyn"), [4, 8, 8])
    with pytest.raises(InputError, match="2 layers in groups in a plan of 2 phases"):
        plan_groups(tiny("dit"), plan, calibration().observations, selection())


def test_an_unknown_cost_is_named() -> None:
    with pytest.raises(InputError, match="no cost 'flops'") as refused:
        search(cost="flops")
    assert refused.value.code == "EQ-3246"
    assert refused.value.hint == "use bit_operations or bytes"


@pytest.mark.parametrize("choices", [(8, 32), (32, 0), (257,)])
def test_sizes_no_precision_has_are_refused(choices: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="16 to 256") as refused:
        search(settings=replace(SETTINGS, choices=choices))
    assert refused.value.code == "EQ-3247"


def test_tokens_of_a_transformer_are_its_patches_once_per_call() -> None:
    names = {layer.name for layer in tiny("dit").info.layers if layer.role == "body"}
    found = layer_tokens(tiny("dit"), sorted(names))
    assert set(found.values()) == {TOKENS}


def test_tokens_of_a_unet_are_the_positions_of_its_resolution() -> None:
    """Attention runs at 4 x 4; embeddings are one row each."""
    denoiser = tiny("unet")
    attention = "down_blocks.1.attentions.0.to_q"
    embedding = "time_embedding.linear_1"
    assert layer_tokens(denoiser, [attention, embedding]) == {attention: 16, embedding: 1}


def test_counting_tokens_leaves_no_hook_behind() -> None:
    denoiser = small_denoiser(DDIMScheduler(clip_sample=False))
    assert layer_tokens(denoiser, ["mix"]) == {"mix": 64}
    assert not get_layer(denoiser.module, "mix")._forward_hooks


def test_scores_of_other_scales_are_not_taken_over(tmp_path: Path) -> None:
    """The default fitness depends on what the layers saw."""
    file = tmp_path / "scores.json"
    options: dict[str, object] = {"fitness": None, "settings": SETTINGS, "file": file}
    search("w4g64a4", **options)
    wide = {
        name: replace(seen, input=widened(seen.input))
        for name, seen in calibration().observations.items()
    }
    with pytest.raises(StorageError) as caught:
        plan_groups(
            tiny("dit"),
            plan_of("w4g64a4"),
            wide,
            selection(),
            uniform=32,
            settings=SETTINGS,
            file=file,
        )
    assert caught.value.code == "EQ-6235"


def widened(ranges: StepRanges) -> StepRanges:
    return StepRanges(ranges.samples * 50, ranges.low * 50, ranges.high * 50)
