"""A folded layer returns what it returned before, and what it made superfluous is gone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from edgeqdm.emit.export import export_onnx
from edgeqdm.errors import InputError
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.models.layers import get_layer, set_layer
from edgeqdm.models.load import load
from edgeqdm.quantize.fold import (
    DeadLayer,
    TableLayer,
    dependence,
    live,
    record_tables,
    table_cost,
)
from edgeqdm.quantize.modules import StepClock, SteppedNetwork
from edgeqdm.testing import tiny

STEPS = 4
BATCH = 5
FLOAT_BYTES = 4
# Rows of one matrix product are summed in another order in a batch of another size: a few float32
# units of outputs of size 1. Measured: 7e-7.
BATCHING = 2e-6
UNET_TIME = ("time_embedding.linear_1", "time_embedding.linear_2")
N_ROWS = tiny.NULL_LABEL + 1


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return load(tiny.write_tiny_unet(tmp_path_factory.mktemp("unet")), steps=STEPS)


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return load(tiny.write_tiny_dit(tmp_path_factory.mktemp("dit")), steps=STEPS)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    folder = tiny.write_tiny_conditional_unet(tmp_path_factory.mktemp("conditional"))
    return load(folder, steps=STEPS, conditioning=tiny.tiny_embeddings(3))


@pytest.fixture(params=["unet", "dit", "conditional"])
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    found: Denoiser = request.getfixturevalue(request.param)
    return found


def stepped(denoiser: Denoiser, tables: Mapping[str, Tensor], dead: Collection[str] = ()) -> Any:
    """The denoiser's network with tables and dead layers in place of layers."""
    clock, module = StepClock(), copy.deepcopy(denoiser.module)
    kinds = dependence(denoiser)
    for name, table in tables.items():
        set_layer(module, name, TableLayer(table, clock, by_label=kinds[name] == "label"))
    for name in dead:
        layer = get_layer(module, name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        set_layer(module, name, DeadLayer(layer))
    return SteppedNetwork(module, torch.tensor(denoiser.program.timesteps), clock).eval()


def every_input(denoiser: Denoiser) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
    """Every step with every label, the null label too, or with some embeddings."""
    x = torch.randn((BATCH, *denoiser.info.sample_shape))
    for step in range(denoiser.program.n_steps):
        if denoiser.info.conditioning.kind == "label":
            yield step, x, (torch.arange(BATCH) % N_ROWS,)
        elif denoiser.info.conditioning.kind == "embedding":
            yield step, x, (tiny.tiny_embeddings(BATCH),)
        else:
            yield step, x, ()


def assert_same_outputs(denoiser: Denoiser, network: nn.Module) -> None:
    with torch.no_grad():
        for step, x, fed in every_input(denoiser):
            expected = denoiser.module(x, denoiser.timestep(step, BATCH), *fed)
            found = network(x, torch.tensor(step), *fed)
            torch.testing.assert_close(found, expected, atol=BATCHING, rtol=0)


def of_kind(denoiser: Denoiser, kind: str) -> list[str]:
    return [name for name, found in dependence(denoiser).items() if found == kind]


def test_all_tables_give_the_unfolded_output_at_every_step_and_label(denoiser: Denoiser) -> None:
    tables = record_tables(denoiser, dependence(denoiser))
    assert_same_outputs(denoiser, stepped(denoiser, tables))


def test_dead_layers_need_no_table(denoiser: Denoiser) -> None:
    names = dependence(denoiser)
    kept = live(denoiser, names)
    assert 0 < len(kept) < len(names)
    dead = set(names) - set(kept)
    assert_same_outputs(denoiser, stepped(denoiser, record_tables(denoiser, kept), dead))


def test_folding_time_only_keeps_label_layers_and_the_output(denoiser: Denoiser) -> None:
    tables = record_tables(denoiser, of_kind(denoiser, "time"))
    network = stepped(denoiser, tables)
    assert_same_outputs(denoiser, network)
    for name in of_kind(denoiser, "label"):
        assert isinstance(get_layer(network.network, name), nn.Linear)


def test_folding_some_label_layers_leaves_the_rest_alive(unet: Denoiser) -> None:
    chosen = [*UNET_TIME, *of_kind(unet, "label")[::2]]
    assert_same_outputs(unet, stepped(unet, record_tables(unet, chosen)))
    # The projections that stay read the second layer of the time MLP.
    assert UNET_TIME[0] not in live(unet, chosen)
    assert UNET_TIME[1] in live(unet, chosen)


def test_table_rows_are_the_outputs_of_the_layer(unet: Denoiser) -> None:
    name = "mid_block.resnets.0.time_emb_proj"
    table = record_tables(unet, [name])[name]
    layer = get_layer(unet.module, name)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda layer, args, output: seen.append(output))
    for step in range(STEPS):
        for label in range(N_ROWS):
            unet.predict(torch.zeros(1, 4, 8, 8), step, torch.tensor([label]))
            torch.testing.assert_close(table[step, label], seen[-1][0], atol=BATCHING, rtol=0)
    handle.remove()


def test_time_tables_have_a_row_per_step_and_label_tables_one_per_label(unet: Denoiser) -> None:
    tables = record_tables(unet, dependence(unet))
    assert tables[UNET_TIME[1]].shape == (STEPS, 32)
    assert tables["down_blocks.1.resnets.0.time_emb_proj"].shape == (STEPS, N_ROWS, 16)
    assert all(table.dtype == torch.float32 for table in tables.values())


def test_dependence_of_unet_is_time_before_the_label_is_added(unet: Denoiser) -> None:
    found = dependence(unet)
    assert {name for name in found if found[name] == "time"} == set(UNET_TIME)
    assert all(n.endswith("time_emb_proj") for n in found if found[n] == "label")
    assert len(found) == 10


def test_dependence_of_dit_is_time_inside_its_timestep_embedders(dit: Denoiser) -> None:
    # The embedder of block 0 runs twice, for the block and for the output, on the same input.
    for name, kind in dependence(dit).items():
        assert kind == ("time" if "timestep_embedder" in name else "label"), name
    assert "proj_out_1" in dependence(dit)


def test_prompt_projections_are_not_foldable(conditional: Denoiser) -> None:
    found = dependence(conditional)
    assert set(found.values()) == {"time"}
    assert not [name for name in found if "attn" in name]
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    with pytest.raises(InputError, match="depends on the embedding") as caught:
        record_tables(conditional, [name])
    assert (caught.value.code, caught.value.path) == ("EQ-3240", name)


def test_layer_fed_the_sample_is_refused(unet: Denoiser) -> None:
    for use in (record_tables, live, table_cost):
        with pytest.raises(InputError, match="depends on the sample") as caught:
            use(unet, ["conv_in"])
        assert (caught.value.code, caught.value.path) == ("EQ-3240", "conv_in")


def test_unknown_layer_is_refused(unet: Denoiser) -> None:
    with pytest.raises(InputError, match="no layer of this name") as caught:
        record_tables(unet, ["time_embedding"])
    assert (caught.value.code, caught.value.path) == ("EQ-3241", "time_embedding")


def test_no_names_make_no_tables(unet: Denoiser) -> None:
    assert record_tables(unet, []) == {}
    assert live(unet, []) == ()
    cost = table_cost(unet, [])
    assert (cost.table_bytes, cost.removed_bytes) == (0, 0)


def test_cost_of_time_tables_is_one_table_against_the_time_mlp(unet: Denoiser) -> None:
    cost = table_cost(unet, UNET_TIME)
    assert (cost.live, cost.dead) == ((UNET_TIME[1],), (UNET_TIME[0],))
    assert cost.table_bytes == STEPS * 32 * FLOAT_BYTES
    assert cost.removed_bytes == (8 * 32 + 32 + 32 * 32 + 32) * FLOAT_BYTES


def test_cost_counts_superfluous_weights_that_no_one_named(unet: Denoiser) -> None:
    projections = of_kind(unet, "label")
    alone, with_time = table_cost(unet, projections), table_cost(unet, dependence(unet))
    assert alone.live == with_time.live == tuple(projections)
    assert with_time.dead == UNET_TIME
    assert alone.table_bytes == with_time.table_bytes
    # The time MLP and the class table go too, for both.
    removed = (*UNET_TIME, *projections, "class_embedding")
    parameters = [p for n in removed for p in get_layer(unet.module, n).parameters()]
    assert alone.removed_bytes == with_time.removed_bytes == sum(p.nbytes for p in parameters)


def test_cost_is_that_of_the_recorded_tables(denoiser: Denoiser) -> None:
    cost = table_cost(denoiser, dependence(denoiser))
    tables = record_tables(denoiser, cost.live)
    assert cost.table_bytes == sum(table.nbytes for table in tables.values())


def test_nothing_is_left_behind(unet: Denoiser) -> None:
    random, before = torch.get_rng_state(), copy.deepcopy(unet.module.state_dict())
    table_cost(unet, record_tables(unet, dependence(unet)))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks for m in unet.module.modules())
    assert not any(p.requires_grad for p in unet.module.parameters())
    for name, value in unet.module.state_dict().items():
        assert torch.equal(value, before[name])


# Without attention, so that every product of matrices in it is an embedding layer.
PLAIN_CONFIG = tiny.UNET_CONFIG | {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "add_attention": False,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    network = tiny.build_network(PLAIN_CONFIG)
    return load(tiny.write_pipeline(tmp_path_factory.mktemp("p"), network, PLAIN_CONFIG), steps=2)


@pytest.fixture(scope="module")
def exported(plain: Denoiser) -> onnx.ModelProto:
    """A UNet with its embeddings folded and nothing else changed."""
    names = dependence(plain)
    kept = live(plain, names)
    folded = stepped(plain, record_tables(plain, kept), set(names) - set(kept))
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "step": torch.tensor(1),
        "labels": torch.tensor([0, 1]),
    }
    return export_onnx(folded, inputs, {})


def test_exported_graph_has_no_layer_that_was_folded(
    plain: Denoiser, exported: onnx.ModelProto
) -> None:
    assert len(dependence(plain)) == 7
    operators = {node.op_type for node in exported.graph.node}
    assert not operators & {"Gemm", "MatMul"}
    # The sinusoids of the timestep feed nothing any more.
    assert not operators & {"Sin", "Cos"}


def test_exported_graph_stores_live_tables_and_no_superfluous_weight(
    plain: Denoiser, exported: onnx.ModelProto
) -> None:
    stored = {x.name for x in exported.graph.initializer}
    names = live(plain, dependence(plain))
    assert {n for n in stored if n.endswith(".table")} == {
        f"network.network.{n}.table" for n in names
    }
    gone = ("time_emb", "class_embedding", "timesteps")
    assert not [n for n in stored if not n.endswith(".table") and any(g in n for g in gone)]


def test_exported_graph_gives_the_float_output_at_every_step_and_label(
    plain: Denoiser, exported: onnx.ModelProto
) -> None:
    """The reference is the evaluator that ONNX defines its operators by."""
    evaluator = ReferenceEvaluator(exported)
    x, labels = torch.randn(4, 4, 8, 8), torch.arange(4)
    for step in range(plain.program.n_steps):
        fed = {"sample": x.numpy(), "step": np.array(step), "labels": labels.numpy()}
        (output,) = cast(list[Any], evaluator.run(None, fed))
        found = torch.from_numpy(np.asarray(output))
        # numpy's convolutions and normalisations against torch's.
        torch.testing.assert_close(found, plain.predict(x, step, labels), atol=1e-5, rtol=0)


class Toy(nn.Module):
    """Embedding layers of unusual kinds; `prompt` names the ones that have no table."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(1, 4)
        self.image = nn.Conv2d(1, 4, 3, padding=1)
        self.labels = nn.Embedding(10, 3)
        self.late = nn.Linear(3, 4)
        self.twice = nn.Linear(1, 4)
        self.mixed = nn.Linear(3, 4)
        self.rows = nn.Linear(2, 4)
        self.lost = nn.Linear(1, 4)
        self.body = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        time = t[:, None].float() / 1000
        label = self.labels(labels)
        image = self.image(time[:, :, None, None].expand(-1, 1, 8, 8))
        # The label counts only late in the trajectory.
        late = self.late(label * (time < 0.5))
        channels = self.gate(time) + late + self.twice(time) + self.twice(2 * time)
        channels = channels + self.mixed(label.cumsum(0))
        channels = channels + self.rows(torch.eye(2)).sum(0) + self.lost(time).detach() * 0
        return cast(Tensor, self.body(x) + image + channels[:, :, None, None])


@pytest.fixture(scope="module")
def toy() -> Denoiser:
    torch.manual_seed(0)
    example = (torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.tensor([0, 1]))
    scheduler = DDIMScheduler(clip_sample=False)
    return wrap(Toy(), scheduler, example, steps=STEPS, n_labels=3, null_label=9)


def test_label_that_counts_only_at_late_steps_is_found(toy: Denoiser) -> None:
    assert dependence(toy) == {
        "gate": "time",
        "image": "time",
        "late": "label",
        "lost": "time",
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("twice", "runs 2 times in one evaluation"),
        ("mixed", "not one row per sample"),
        ("rows", "not one row per sample"),
    ],
)
def test_layer_without_one_row_per_sample_is_refused(toy: Denoiser, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        record_tables(toy, [name])
    assert (caught.value.code, caught.value.path) == ("EQ-3240", name)


def test_rows_of_unknown_labels_are_zero_and_the_null_label_has_its_own(toy: Denoiser) -> None:
    table = record_tables(toy, ["late"])["late"]
    assert table.shape == (STEPS, 10, 4)
    assert torch.equal(table[:, 3:9], torch.zeros(STEPS, 6, 4))
    assert not torch.equal(table[-1, 9], table[-1, 0])


def test_convolution_over_a_time_image_becomes_a_table(toy: Denoiser) -> None:
    tables = record_tables(toy, ["image", "late", "gate"])
    assert tables["image"].shape == (STEPS, 4, 8, 8)
    network = stepped(toy, tables)
    x, labels = torch.randn(4, 4, 8, 8), torch.tensor([9, 0, 2, 1])
    for i in range(STEPS):
        found = network(x, torch.tensor(i), labels)
        torch.testing.assert_close(found, toy.predict(x, i, labels), atol=BATCHING, rtol=0)


def test_layer_behind_a_switched_off_derivative_counts_as_dead_only_if_others_do_not(
    toy: Denoiser,
) -> None:
    assert live(toy, ["gate", "lost"]) == ("gate",)

    class Silent(Toy):
        @torch.no_grad()
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return super().forward(x, t, labels)

    example = (torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.tensor([0, 1]))
    silent = wrap(Silent(), DDIMScheduler(clip_sample=False), example, steps=2, n_labels=3)
    assert live(silent, ["gate", "lost"]) == ("gate", "lost")
    assert table_cost(silent, ["gate"]).removed_bytes == 0


def test_one_label_is_no_dependence() -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.tensor([0, 0]))
    only = wrap(Toy(), DDIMScheduler(clip_sample=False), example, steps=2, n_labels=1)
    assert dependence(only)["late"] == "time"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 5), (2, 3)),
        (nn.Linear(3, 5), (2, 7, 3)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 9, 8)),
    ],
)
def test_dead_layer_returns_zeros_of_the_shape_of_the_layer(
    layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    assert torch.equal(DeadLayer(layer)(x), torch.zeros_like(layer(x)))
    assert not DeadLayer(layer).state_dict()


@given(
    step=st.integers(0, 4),
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=9),
    by_label=st.booleans(),
    trailing=st.sampled_from([(3,), (2, 3), (3, 2, 2)]),
)
def test_lookup_equals_plain_indexing(
    step: int, labels: list[int], by_label: bool, trailing: tuple[int, ...]
) -> None:
    rows = (7,) if by_label else ()
    table = torch.randn((5, *rows, *trailing))
    clock = StepClock()
    clock.step, clock.conditioning = torch.tensor(step), (torch.tensor(labels),)
    found = TableLayer(table, clock, by_label=by_label)(torch.full((len(labels), 2), torch.nan))
    expected = [table[step, label] if by_label else table[step] for label in labels]
    assert torch.equal(found, torch.stack(expected))
