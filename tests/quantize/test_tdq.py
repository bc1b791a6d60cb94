"""Scales that come from networks of the timestep, and what else moves to other steps with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from edgeqdm import stages
from edgeqdm.calibrate.observe import LayerObservation
from edgeqdm.errors import InputError
from edgeqdm.ir.plan import DeploymentPlan, LayerAssignment, Phase
from edgeqdm.ir.precision import ActivationPolicy, Precision
from edgeqdm.ir.schedule import SamplerProgram
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.load import load
from edgeqdm.models.sampler import compile_sampler
from edgeqdm.numerics.ranges import StepRanges
from edgeqdm.numerics.temporal import encode_timestep
from edgeqdm.quantize.fold import record_tables
from edgeqdm.quantize.parameters import Parameters, Variant
from edgeqdm.quantize.plans import with_activation_bits
from edgeqdm.quantize.quantizer import QuantizedDenoiser, assemble, initialise
from edgeqdm.quantize.store import load_quantized, retabulate, save_quantized
from edgeqdm.quantize.tdq import ScaleGenerator, fit_generator, move_plan
from edgeqdm.testing.conformance import small_denoiser
from edgeqdm.testing.tiny import write_tiny_dit

STEPS = 6
TRAILING = "trailing"


def denoiser_of(steps: int, *, spacing: str = TRAILING, guidance: float = 2.0) -> Denoiser:
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    return small_denoiser(scheduler, steps=steps, guidance=guidance)


@cache
def small() -> tuple[Denoiser, stages.Calibration]:
    denoiser = denoiser_of(STEPS)
    return denoiser, stages.calibrate(denoiser, samples=8)


@cache
def temporal_plan() -> DeploymentPlan:
    return stages.rule_plan(small()[0], body=Precision("w4a8"))


@cache
def searched() -> Parameters:
    return initialise(small()[0], temporal_plan(), small()[1].observations)


@cache
def fitted() -> ScaleGenerator:
    denoiser, calibration = small()
    return fit_generator(
        temporal_plan(), denoiser.program.timesteps, searched(), calibration.observations
    )


@cache
def generated() -> QuantizedDenoiser:
    denoiser = small()[0]
    tabulated = fitted().tabulate(searched(), denoiser.program.timesteps)
    return assemble(denoiser, temporal_plan(), tabulated)


def scales_of(parameters: Parameters) -> dict[str, Tensor]:
    """Every activation scale, by the name the generator gives it."""
    return {
        f"{side}/{variant}": scales.scale
        for variant, mine in parameters.layers.items()
        for side, scales in (("input", mine.activation), ("output", mine.output))
        if scales is not None
    }


def predictions(quantized: QuantizedDenoiser) -> list[Tensor]:
    x = torch.randn((2, *quantized.info.sample_shape), generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([0, 2])
    steps = range(quantized.denoiser.program.n_steps)
    return [quantized.predict(x, step, labels) for step in steps]


def mean_snr(quantized: QuantizedDenoiser, calibration: stages.Calibration) -> float:
    found = stages.measure(quantized, calibration.trajectories).snr_db
    return sum(found) / len(found)


def test_generated_tables_stay_close_to_the_searched_ones() -> None:
    """A scale 30 % off costs a few tenths of a dB of an 8-bit code; the network as a whole is
    within 1 dB."""
    before, after = scales_of(searched()), scales_of(generated().parameters)
    assert set(fitted().names) == set(before) == set(after)
    for name, scale in before.items():
        ratio = after[name] / scale
        assert 0.7 < float(ratio.min()) <= float(ratio.max()) < 1.4, name
    denoiser, calibration = small()
    plain = assemble(denoiser, temporal_plan(), searched())
    assert mean_snr(generated(), calibration) > mean_snr(plain, calibration) - 1.0


def by_hand(generator: ScaleGenerator, layer: int, timestep: float) -> Tensor:
    """The definition, one layer and one timestep at a time."""
    scales = generator.scales
    hidden = encode_timestep(torch.tensor([timestep], dtype=torch.float64), scales.dim)
    pairs = list(zip(scales.weights, scales.biases, strict=True))
    for weight, bias in pairs[:-1]:
        hidden = F.relu(hidden @ weight[layer] + bias[layer])
    last, offset = pairs[-1]
    ratio = F.softplus(hidden @ last[layer] + offset[layer])
    return scales.reference_scale[layer] * ratio[0, 0]


@torch.no_grad()
def test_a_table_is_its_network_at_every_timestep() -> None:
    """T1: bitwise the network's own answer, and the definition to float rounding."""
    tables = scales_of(generated().parameters)
    for layer, name in enumerate(fitted().names):
        for step, timestep in enumerate(small()[0].program.timesteps):
            alone = fitted().scales(torch.tensor([timestep], dtype=torch.float64))[0, layer]
            assert torch.equal(tables[name][step], alone)
            torch.testing.assert_close(alone, by_hand(fitted(), layer, timestep), rtol=1e-5, atol=0)


def test_the_network_with_tables_is_the_network_with_scales_computed_at_the_step() -> None:
    """T1: every row of the second one is the scale at the timestep that is run."""
    denoiser = small()[0]
    for step, found in enumerate(predictions(generated())):
        rows = [denoiser.program.timesteps[step]] * STEPS
        alone = assemble(denoiser, temporal_plan(), fitted().tabulate(searched(), rows))
        assert torch.equal(found, predictions(alone)[step])


def test_tabulating_changes_nothing_but_the_named_tables() -> None:
    before, after = searched(), generated().parameters
    for variant, mine in before.layers.items():
        other = after.layers[variant]
        assert torch.equal(mine.weight.codes, other.weight.codes)
        for one, two in ((mine.activation, other.activation), (mine.output, other.output)):
            assert (one is None) == (two is None)
            if one is not None and two is not None:
                assert (one.zero_point, one.bits) == (two.zero_point, two.bits)


def test_a_static_table_is_left_alone() -> None:
    denoiser, calibration = small()
    plan = with_policy(temporal_plan(), "mix", ActivationPolicy.STATIC)
    parameters = initialise(denoiser, plan, calibration.observations)
    found = fit_generator(plan, denoiser.program.timesteps, parameters, calibration.observations)
    assert {name.split("/")[1] for name in found.names} == {"conv"}
    again = found.tabulate(parameters, (900.0, 10.0))
    shapes = {name.split("/")[1]: table.shape for name, table in scales_of(again).items()}
    assert shapes == {"conv": (2,), "mix": (1,)}


def with_policy(plan: DeploymentPlan, layer: str, policy: ActivationPolicy) -> DeploymentPlan:
    return changed(plan, layer, activation=policy)


def changed(plan: DeploymentPlan, layer: str, **fields: object) -> DeploymentPlan:
    def edit(assignment: LayerAssignment) -> LayerAssignment:
        return assignment.model_copy(update=fields if assignment.layer == layer else {})

    phases = tuple(
        phase.model_copy(update={"layers": tuple(map(edit, phase.layers))}) for phase in plan.phases
    )
    return plan.model_copy(update={"phases": phases})


def test_other_timesteps_need_no_observation() -> None:
    """T8: names and tensors, as a file holds them, are enough; shared timesteps agree bitwise."""
    restored = ScaleGenerator.of_tensors(fitted().names, fitted().tensors())
    assert restored is not None
    old = small()[0].program.timesteps
    between = [t for pair in pairwise(old) for t in (pair[0], sum(pair) / 2)]
    tables = scales_of(restored.tabulate(searched(), [*between, old[-1]]))
    for name, known in scales_of(generated().parameters).items():
        table = tables[name]
        assert torch.equal(table[::2], known)
        # A smooth function: between two timesteps it is not far outside what it is at them.
        low, high = torch.minimum(known[:-1], known[1:]), torch.maximum(known[:-1], known[1:])
        assert bool((table[1::2] > 0.7 * low).all())
        assert bool((table[1::2] < 1.4 * high).all())


def blinded(seen: LayerObservation, step: int) -> LayerObservation:
    """An observation in which one step got no sample."""

    def without(ranges: StepRanges) -> StepRanges:
        kept = torch.arange(len(ranges.low)) != step
        return StepRanges(ranges.samples * kept[:, None], ranges.low * kept, ranges.high * kept)

    return LayerObservation(without(seen.input), without(seen.output))


@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_a_step_without_samples_has_a_finite_scale_like_its_neighbours(step: int) -> None:
    """I6: the step takes no part in the fit, the network still answers there."""
    denoiser, calibration = small()
    observations = {k: blinded(v, step) for k, v in calibration.observations.items()}
    found = fit_generator(temporal_plan(), denoiser.program.timesteps, searched(), observations)
    tabulated = found.tabulate(searched(), denoiser.program.timesteps)
    for name, table in scales_of(tabulated).items():
        assert bool(torch.isfinite(table).all()), name
        # Scales of this model differ by up to 4 between neighbouring steps.
        known = scales_of(searched())[name]
        assert float(known.min()) / 8 < float(table[step]) < 8 * float(known.max())


def test_fitting_is_repeatable_and_its_seed_counts() -> None:
    denoiser, calibration = small()
    plan = with_policy(temporal_plan(), "conv", ActivationPolicy.STATIC)
    parameters = initialise(denoiser, plan, calibration.observations)
    first, again, other = (
        fit_generator(
            plan, denoiser.program.timesteps, parameters, calibration.observations, seed=seed
        ).tensors()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("body", ["w8", "w4a8dyn", "fp32"])
def test_a_plan_without_temporal_activations_is_refused(body: str) -> None:
    denoiser, calibration = small()
    plan = changed(temporal_plan(), "mix", precision=Precision(body))
    plan = with_policy(plan, "conv", ActivationPolicy.STATIC)
    parameters = initialise(denoiser, plan, calibration.observations)
    with pytest.raises(InputError, match="no activation of the plan") as refused:
        fit_generator(plan, denoiser.program.timesteps, parameters, calibration.observations)
    assert (refused.value.code, refused.value.path) == ("EQ-3263", "plan")


def test_tensors_that_are_not_there_are_named() -> None:
    tensors = fitted().tensors()
    del tensors["generator/weights.1"]
    with pytest.raises(InputError, match=r"weights\.1") as refused:
        ScaleGenerator.of_tensors(fitted().names, tensors)
    assert refused.value.code == "EQ-3224"


def test_no_names_are_no_generator() -> None:
    assert ScaleGenerator.of_tensors((), fitted().tensors()) is None


# Plans for other steps.


@cache
def program_of(steps: int, spacing: str = TRAILING) -> SamplerProgram:
    return compile_sampler(DDIMScheduler(clip_sample=False, timestep_spacing=spacing), steps)


def plan_with_phases(starts: list[int], n_steps: int) -> DeploymentPlan:
    """A phase per start, the first at 0; every second one has other bits."""
    bounds = zip(starts, [*starts[1:], n_steps], strict=True)
    phases = tuple(
        Phase(
            start=start,
            stop=stop,
            layers=(
                LayerAssignment(
                    layer="mix", precision=Precision(("w8a4", "w8a8")[i % 2]), reason="test"
                ),
            ),
        )
        for i, (start, stop) in enumerate(bounds)
    )
    return DeploymentPlan(target="onnxruntime", model="m", n_steps=n_steps, phases=phases)


@given(st.data())
def test_a_phase_keeps_its_span_of_timesteps(data: st.DataObject) -> None:
    n_old, n_new = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
    inner = data.draw(st.sets(st.integers(1, max(n_old - 1, 1)), max_size=3))
    starts = [0, *sorted(start for start in inner if start < n_old)]
    old, new = (
        program_of(n_old),
        program_of(n_new, data.draw(st.sampled_from([TRAILING, "leading"]))),
    )
    plan = plan_with_phases(starts, n_old)
    begins = [old.timesteps[start] for start in starts[1:]]
    wanted = [sum(t <= begin for begin in begins) for t in new.timesteps]
    if set(wanted) != set(range(len(starts))):
        with pytest.raises(InputError, match="where the new sampler has no step"):
            move_plan(plan, old, new)
        return
    moved = move_plan(plan, old, new)
    assert moved.n_steps == n_new
    found = [p for p, phase in enumerate(moved.phases) for _ in range(phase.start, phase.stop)]
    assert found == wanted
    assert [phase.layers for phase in moved.phases] == [phase.layers for phase in plan.phases]
    # What it returns is a plan like any other: read back, it is checked.
    assert DeploymentPlan.model_validate_json(moved.model_dump_json()) == moved


def test_a_plan_moved_to_its_own_steps_is_itself() -> None:
    plan = plan_with_phases([0, 2, 5], 8)
    assert move_plan(plan, program_of(8), program_of(8)) == plan


def test_a_phase_left_without_steps_is_named() -> None:
    plan = plan_with_phases([0, 4, 5], 10)
    with pytest.raises(InputError) as refused:
        move_plan(plan, program_of(10), program_of(2))
    assert (refused.value.code, refused.value.path) == ("EQ-3264", "steps")
    assert refused.value.message.startswith("phase 1 spans timesteps 599 to 599, where")


# The file.


def stored(folder: Path, quantized: QuantizedDenoiser, **options: object) -> Path:
    file = folder / "model.safetensors"
    save_quantized(quantized, file, **options)  # type: ignore[arg-type]
    return file


def test_a_file_keeps_its_generator(tmp_path: Path) -> None:
    file = stored(tmp_path, generated(), generator=fitted())
    found = load_quantized(file, small()[0])
    assert found.generator is not None
    assert found.generator.names == fitted().names
    for name, tensor in fitted().tensors().items():
        assert torch.equal(tensor, found.generator.tensors()[name])
    pairs = zip(predictions(found.quantized), predictions(generated()), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_generator_is_no_byte_on_the_device(tmp_path: Path) -> None:
    with_it = save_quantized(generated(), tmp_path / "a.safetensors", generator=fitted())
    without = save_quantized(generated(), tmp_path / "b.safetensors")
    assert with_it == without
    assert load_quantized(tmp_path / "b.safetensors", small()[0]).generator is None


@pytest.mark.parametrize(("steps", "spacing"), [(10, TRAILING), (8, "leading"), (5, "linspace")])
def test_a_model_at_other_steps_is_nearly_as_good_as_one_calibrated_there(
    steps: int, spacing: str, tmp_path: Path
) -> None:
    """T8: in the range of timesteps that was fitted, 5 dB on average; it measures 0.2 to 3 dB."""
    file = stored(tmp_path, generated(), generator=fitted())
    other = denoiser_of(steps, spacing=spacing)
    found = retabulate(file, other)
    assert found.quantized.plan.n_steps == steps
    calibration = stages.calibrate(other, samples=8)
    fresh = stages.quantize(other, calibration, plan=found.quantized.plan).quantized
    assert mean_snr(found.quantized, calibration) > mean_snr(fresh, calibration) - 5.0


def test_a_model_at_other_steps_is_stored_and_moved_again(tmp_path: Path) -> None:
    first = stored(tmp_path, generated(), generator=fitted())
    there = retabulate(first, denoiser_of(10))
    second = tmp_path / "second.safetensors"
    save_quantized(there.quantized, second, generator=there.generator)
    back = retabulate(second, small()[0])
    pairs = zip(predictions(back.quantized), predictions(generated()), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_correction_stays_behind(tmp_path: Path) -> None:
    schedule = stages.correct(generated(), small()[1].trajectories)
    file = stored(tmp_path, generated(), generator=fitted(), correction=schedule)
    assert load_quantized(file, small()[0]).correction == schedule
    assert retabulate(file, denoiser_of(9)).correction is None
    # Not even at its own steps: whoever wants it loads the file as it is.
    assert retabulate(file, small()[0]).correction is None


def test_scales_bound_to_their_steps_are_refused_naming_a_layer(tmp_path: Path) -> None:
    file = stored(tmp_path, assemble(small()[0], temporal_plan(), searched()))
    with pytest.raises(InputError, match="of conv for one") as refused:
        retabulate(file, denoiser_of(10))
    assert (refused.value.code, refused.value.path) == ("EQ-3266", str(file))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_scales_bound_to_no_step_need_no_generator(kind: str, tmp_path: Path) -> None:
    denoiser, calibration = small()
    plan = with_policy(temporal_plan(), "conv", ActivationPolicy.STATIC)
    edit: Mapping[str, object] = (
        {"precision": Precision("w4g16a8dyn")}
        if kind == "dynamic"
        else {"activation": ActivationPolicy.STATIC}
    )
    plan = changed(plan, "mix", **edit)
    quantized = stages.quantize(denoiser, calibration, plan=plan).quantized
    found = retabulate(stored(tmp_path, quantized), denoiser_of(10)).quantized
    assert found.denoiser.program.n_steps == len(predictions(found)) == 10
    # At one timestep both are the same network.
    one, other = predictions(found)[0], predictions(quantized)[0]
    assert small()[0].program.timesteps[0] == found.denoiser.program.timesteps[0]
    assert torch.equal(one, other)


def test_phases_move_with_their_tables(tmp_path: Path) -> None:
    denoiser, calibration = small()
    plan = with_activation_bits(temporal_plan(), [4, 4, 8, 8, 8, 8])
    found = stages.quantize(denoiser, calibration, plan=plan, method=stages.Method(mlp=True))
    file = stored(tmp_path, found.quantized, generator=found.generator)
    moved = retabulate(file, denoiser_of(12)).quantized
    assert [(phase.start, phase.stop) for phase in moved.plan.phases] == [(0, 4), (4, 12)]
    variants = [Variant.of(a) for phase in moved.plan.phases for a in phase.layers]
    assert set(moved.parameters.layers) == {v for v in variants if v.precision.coded}
    # Of the 6 old timesteps, 5 are new ones too; every second new step is one.
    old, new = denoiser.program.timesteps, moved.denoiser.program.timesteps
    shared = [(i, new.index(t)) for i, t in enumerate(old) if t in new]
    assert len(shared) >= 3
    before, after = predictions(found.quantized), predictions(moved)
    assert all(torch.equal(before[i], after[j]) for i, j in shared)


def test_tables_of_the_timestep_are_recorded_again(tmp_path: Path) -> None:
    folder = write_tiny_dit(tmp_path / "dit")
    denoiser, other = (load(folder, steps=n, scheduler="ddim") for n in (3, 5))
    quantized = stages.quantize(
        denoiser,
        stages.calibrate(denoiser, samples=1),
        plan=stages.rule_plan(denoiser, body=Precision("w8"), embedding=Precision("w8")),
    ).quantized
    names = tuple(quantized.parameters.tables)
    assert names
    moved = retabulate(stored(tmp_path, quantized), other).quantized
    wanted = record_tables(other, names)
    assert set(moved.parameters.tables) == set(wanted)
    for name, table in wanted.items():
        assert table.shape[0] == 5
        assert torch.equal(moved.parameters.tables[name], table)


def test_another_model_or_guidance_is_refused(tmp_path: Path) -> None:
    file = stored(tmp_path, generated(), generator=fitted())
    stranger = denoiser_of(10)
    info = stranger.info.model_copy(update={"fingerprint": "f" * 64})
    for other, named in (
        (denoiser_of(10, guidance=3.5), "guidance 2 is not 3.5"),
        (replace(stranger, info=info), "model "),
    ):
        with pytest.raises(InputError, match=named) as refused:
            retabulate(file, other)
        assert refused.value.code == "EQ-3262"
        assert "sampler" not in refused.value.message


def test_networks_of_a_width_are_fitted_on_its_steps() -> None:
    """C9: what a layer saw at steps of other bits says nothing about these."""
    denoiser, calibration = small()
    plan = with_activation_bits(temporal_plan(), [4] * 2 + [8] * (STEPS - 2))
    parameters = initialise(denoiser, plan, calibration.observations)
    timesteps = denoiser.program.timesteps
    found = fit_generator(plan, timesteps, parameters, calibration.observations)
    # Noise in place of what was seen at steps where 4 bits are not used.
    spoiled = {
        name: LayerObservation(spoil(seen.input), spoil(seen.output))
        for name, seen in calibration.observations.items()
    }
    again = fit_generator(plan, timesteps, parameters, spoiled)
    early = [name for name in found.names if "a4" in name]
    assert early
    assert len(early) < len(found.names)
    one, other = found.part(early), again.part(early)
    assert one is not None
    assert other is not None
    changed = {k: v for k, v in one.tensors().items() if not torch.equal(v, other.tensors()[k])}
    assert not changed


def spoil(ranges: StepRanges) -> StepRanges:
    scale = torch.ones_like(ranges.low)
    scale[2:] = 30.0
    return StepRanges(ranges.samples * scale[:, None], ranges.low * scale, ranges.high * scale)
