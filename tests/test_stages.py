"""Every stage between a float model and a quantized file, alone and in its order."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors import safe_open
from torch import Tensor

from edgeqdm import load, pipeline, stages
from edgeqdm.bench.compare import conditioning_for, draw, float_predictor, player_of
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.correct.corrector import Ptqd
from edgeqdm.correct.steps import activation_bits_by_step, contiguous
from edgeqdm.emit.package import correction_key
from edgeqdm.errors import InputError, OutputError, StorageError
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import ActivationPolicy, Precision
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.levels import noise_levels
from edgeqdm.models.sampler import scheduler_from_name
from edgeqdm.quantize import quantizer
from edgeqdm.quantize.finetune import FinetuneSettings
from edgeqdm.quantize.group_search import GroupSearchSettings
from edgeqdm.quantize.plans import float_plan, with_activation_bits
from edgeqdm.quantize.quantizer import QuantizedDenoiser
from edgeqdm.quantize.reconstruct import ReconstructionSettings
from edgeqdm.quantize.store import load_quantized, save_quantized
from edgeqdm.stages import Calibration, Method, Quantization
from edgeqdm.testing.conformance import small_denoiser
from edgeqdm.testing.tiny import write_tiny_unet

NOISY = {"beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "trailing"}
STEPS, RUNS = 5, 20
"""More runs than one chunk of trajectories holds."""
QUICK = ReconstructionSettings(iterations=6, batch=8)
TRAINING = FinetuneSettings(iterations=6, batch=8)
LEARNED = Method(reconstruction=QUICK, selected=20)


def fresh_denoiser() -> Denoiser:
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    return small_denoiser(scheduler, steps=STEPS)


@cache
def small() -> tuple[Denoiser, Calibration]:
    denoiser = fresh_denoiser()
    return denoiser, stages.calibrate(denoiser, samples=RUNS)


@cache
def plan_of(body: str = "w4a8") -> DeploymentPlan:
    return stages.rule_plan(small()[0], body=Precision(body), embedding=Precision("w8"))


@cache
def quantized(body: str = "w4a8") -> QuantizedDenoiser:
    return stages.quantize(*small(), plan=plan_of(body)).quantized


def snr_db(found: QuantizedDenoiser) -> tuple[float, ...]:
    return stages.measure(found, small()[1].trajectories).snr_db


def same(one: QuantizedDenoiser, other: QuantizedDenoiser) -> bool:
    return (one.plan, one.tables_sha256) == (other.plan, other.tables_sha256)


class Told:
    """A progress callback that remembers, and interrupts where it is told to."""

    def __init__(self, interrupt: str | None = None, *, at: int = 0) -> None:
        self.interrupt, self.at = interrupt, at
        self.stages: list[str] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if stage not in self.stages:
            self.stages.append(stage)
        if stage == self.interrupt and done >= self.at:
            raise KeyboardInterrupt


# Calibrate.


def test_a_calibration_goes_on_from_its_folder(tmp_path: Path) -> None:
    told = Told()
    first = stages.calibrate(fresh_denoiser(), samples=RUNS, work=tmp_path, progress=told)
    assert told.stages == ["trajectories", "observe"]
    second = Told()
    again = stages.calibrate(fresh_denoiser(), samples=RUNS, work=tmp_path, progress=second)
    assert "observe" not in second.stages
    assert again.trajectories.key() == first.trajectories.key() == small()[1].trajectories.key()
    for name, seen in first.observations.items():
        for side in ("input", "output"):
            one, other = getattr(seen, side), getattr(again.observations[name], side)
            assert torch.equal(one.samples, other.samples)
            assert torch.equal(one.low, other.low)


def test_an_edited_observation_is_named_and_made_again_once_deleted(tmp_path: Path) -> None:
    stages.calibrate(fresh_denoiser(), samples=2, work=tmp_path)
    (file,) = tmp_path.glob("observations-*.st")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError) as caught:
        stages.calibrate(fresh_denoiser(), samples=2, work=tmp_path)
    assert (caught.value.code, caught.value.path) == ("EQ-6201", str(file))
    file.unlink()
    told = Told()
    stages.calibrate(fresh_denoiser(), samples=2, work=tmp_path, progress=told)
    assert "observe" in told.stages
    assert file.read_bytes() == whole


# Quantize.


def test_the_default_is_w8a8_by_least_error() -> None:
    found = stages.quantize(*small())
    plan = stages.rule_plan(small()[0])
    assert {a.precision for a in plan.phases[0].layers} == {"w8a8", "fp32"}
    assert same(found.quantized, quantizer.quantize(small()[0], plan, small()[1].observations))
    assert (found.blocks, found.generator) == ((), None)


def test_the_plain_baseline_clips_nothing_and_loses_more() -> None:
    denoiser, calibration = small()
    method = Method(ranges="minmax")
    plain = stages.quantize(denoiser, calibration, plan=plan_of(), method=method).quantized
    direct = quantizer.quantize(denoiser, plan_of(), calibration.observations, ranges="minmax")
    assert same(plain, direct)
    assert not same(plain, quantized())
    for variant, mine in plain.parameters.layers.items():
        other = quantized().parameters.layers[variant]
        assert mine.weight.scale is not None
        assert other.weight.scale is not None
        assert bool((other.weight.scale <= mine.weight.scale).all())
    # On random weights the search gains 1 dB at 4 bits.
    assert sum(snr_db(plain)) < sum(snr_db(quantized()))


@pytest.mark.parametrize("density", [True, False])
def test_samples_are_of_the_trajectories_and_as_many_as_asked(density: bool) -> None:
    denoiser, calibration = small()
    chosen = stages.select_samples(denoiser, calibration, Method(selected=23, density=density))
    counts = torch.bincount(chosen.steps, minlength=STEPS).tolist()
    assert sum(counts) == 23
    if density:
        assert min(counts) >= 2
    else:
        assert counts == [5, 5, 5, 4, 4]
    runs = calibration.trajectories
    for x, step in zip(chosen.inputs, chosen.steps, strict=True):
        assert bool((runs.inputs[step] == x).flatten(1).all(1).any())


def test_no_more_samples_are_asked_than_there_are() -> None:
    chosen = stages.select_samples(*small(), Method())
    assert len(chosen.steps) == STEPS * RUNS


def test_chosen_samples_are_kept(tmp_path: Path) -> None:
    first = stages.select_samples(*small(), Method(selected=23), work=tmp_path)
    told = Told()
    again = stages.select_samples(*small(), Method(selected=23), work=tmp_path, progress=told)
    assert (again.key(), told.stages) == (first.key(), [])
    for other in (Method(selected=22), Method(selected=23, density=False)):
        stages.select_samples(*small(), other, work=tmp_path)
    stages.select_samples(*small(), Method(selected=23), seed=1, work=tmp_path)
    assert len(list(tmp_path.glob("selection-*.st"))) == 4


@pytest.mark.parametrize("density", [True, False])
def test_reconstruction_reports_every_block_and_repeats(density: bool) -> None:
    method = Method(reconstruction=QUICK, selected=20, density=density)
    told = Told()
    found = stages.quantize(*small(), plan=plan_of(), method=method, progress=told)
    assert told.stages == (["features"] if density else []) + ["reconstruct"]
    assert found.blocks
    again = stages.quantize(*small(), plan=plan_of(), method=method)
    assert same(found.quantized, again.quantized)
    if all(not block.kept for block in found.blocks):
        assert same(found.quantized, quantized())


def test_scales_of_a_network_of_the_timestep_come_with_it() -> None:
    denoiser, calibration = small()
    found = stages.quantize(denoiser, calibration, plan=plan_of(), method=Method(mlp=True))
    assert found.generator is not None
    assert len(found.generator.names) == 3
    parameters = quantizer.initialise(denoiser, plan_of(), calibration.observations)
    again = found.generator.tabulate(parameters, denoiser.program.timesteps)
    assert same(found.quantized, quantizer.assemble(denoiser, plan_of(), again))
    assert not same(found.quantized, quantized())
    # The steps are fitted together; each may lose a little.
    assert min(snr_db(found.quantized)) > min(snr_db(quantized())) - 1.0


def test_rounding_is_learned_with_the_networks_of_the_timestep(tmp_path: Path) -> None:
    """Fewer samples than steps leave no scale open (I6); finished work is the same."""
    method = Method(mlp=True, reconstruction=QUICK, selected=STEPS - 2)
    denoiser, calibration = small()
    found = stages.quantize(denoiser, calibration, plan=plan_of(), method=method, work=tmp_path)
    assert found.generator is not None
    parameters = found.quantized.parameters
    again = found.generator.tabulate(parameters, denoiser.program.timesteps)
    assert same(found.quantized, quantizer.assemble(denoiser, plan_of(), again))
    assert all(value > 10.0 for value in snr_db(found.quantized))
    resumed = stages.quantize(denoiser, calibration, plan=plan_of(), method=method, work=tmp_path)
    assert same(found.quantized, resumed.quantized)


def test_the_mlp_of_a_plan_without_temporal_scales_is_refused() -> None:
    denoiser, calibration = small()
    plan = stages.rule_plan(denoiser, body=Precision("w8a8"), activation=ActivationPolicy.STATIC)
    with pytest.raises(InputError, match="temporal") as refused:
        stages.quantize(denoiser, calibration, plan=plan, method=Method(mlp=True))
    assert refused.value.code == "EQ-3263"


# Measure and correct.


@pytest.mark.parametrize("steps", [5, 1000])
def test_embeddings_become_tables_where_these_are_smaller(tmp_path: Path, steps: int) -> None:
    """A table has a row per step, weights have a row per input channel."""
    denoiser = load(write_tiny_unet(tmp_path / "model"), steps=steps)
    precisions = {a.precision for a in stages.rule_plan(denoiser).phases[0].layers}
    assert ("table" in precisions) == (steps == 5)


def test_a_measurement_is_kept_and_named_where_it_was_edited(tmp_path: Path) -> None:
    calibration = small()[1]
    told = Told()
    first = stages.measure(quantized(), calibration.trajectories, work=tmp_path, progress=told)
    assert told.stages == ["correct"]
    (file,) = tmp_path.glob("measured-*.st")
    again = Told()
    assert (
        stages.measure(quantized(), calibration.trajectories, work=tmp_path, progress=again)
        == first
    )
    assert again.stages == []
    stages.measure(quantized("w8a8"), calibration.trajectories, work=tmp_path)
    assert len(list(tmp_path.glob("measured-*.st"))) == 2
    data = file.read_bytes()
    file.write_bytes(data.replace(b"0", b"1", 3))
    with pytest.raises(StorageError) as caught:
        stages.measure(quantized(), calibration.trajectories, work=tmp_path)
    assert (caught.value.code, caught.value.path) == ("EQ-6201", str(file))


def test_the_measured_error_is_that_of_the_two_networks() -> None:
    """Teacher-forced: both are fed the float model's own samples."""
    runs = small()[1].trajectories
    found = stages.measure(quantized(), small()[1].trajectories)
    for step in range(STEPS):
        answer = quantized().predict(runs.inputs[step], step, runs.conditioning)
        mean = (answer - runs.outputs[step]).double().mean((0, 2, 3))
        pairs = zip(found.mu[step], found.output_mean[step], strict=True)
        split = [mu + found.k[step] * output for mu, output in pairs]
        # Means of float32 outputs, summed in another order: 1e-5 of their largest.
        peak = float(runs.outputs[step].abs().max())
        assert split == pytest.approx(mean.tolist(), abs=1e-5 * peak)
        assert found.n[step] == RUNS * runs.outputs[step][0].numel() // len(mean)


def test_a_correction_is_keyed_to_its_network() -> None:
    schedule = stages.correct(quantized(), small()[1].trajectories)
    assert schedule.key == correction_key(quantized())
    assert len(schedule.gain) == STEPS
    assert schedule.key != correction_key(quantized("w8a8"))


def test_the_corrector_decides_what_is_corrected() -> None:
    nothing = Ptqd(gain=False, bias=False, variance=False)
    runs = small()[1].trajectories
    schedule = stages.correct(quantized(), runs, corrector=nothing, matched=False)
    assert set(schedule.gain) == {1.0}
    assert {value for row in schedule.bias for value in row} == {0.0}
    pairs = zip(schedule.noise_std, small()[0].program.noise_std, strict=True)
    assert all(row == pytest.approx([plain] * len(row)) for row, plain in pairs)
    assert stages.correct(quantized(), runs, matched=False) != schedule


def test_the_matched_variance_is_kept_and_can_be_left_out(tmp_path: Path) -> None:
    runs, told = small()[1].trajectories, Told()
    found = stages.correct(quantized(), runs, work=tmp_path, progress=told)
    assert found.input_weight is not None
    assert any(found.input_weight)
    assert told.stages == ["correct", "match"]
    again = Told()
    assert stages.correct(quantized(), runs, work=tmp_path, progress=again) == found
    assert again.stages == []
    plain = stages.correct(quantized(), runs, work=tmp_path, matched=False)
    assert plain.input_weight is None
    assert plain.noise_std == found.noise_std


def test_a_sampler_of_unknown_levels_is_corrected_without_matching(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(_: object) -> None:
        raise InputError("EQ-3432", "the scheduler of this table is not known", path="sampler")

    runs = small()[1].trajectories
    monkeypatch.setattr(stages, "noise_levels", unknown)
    assert stages.correct(quantized(), runs) == stages.correct(quantized(), runs, matched=False)


@pytest.mark.parametrize(
    "name",
    [
        *("ddim", "ddpm", "deis", "dpmsolver++", "dpmsolver++_1s", "dpmsolver++_sde", "euler"),
        *("euler_ancestral", "flow_euler", "lcm", "pndm", "unipc"),
    ],
)
@pytest.mark.parametrize("closed_loop", [False, True])
# diffusers hands tensors to numpy in ways that numpy 2 deprecates.
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:__array_wrap__ must accept:DeprecationWarning",
)
def test_p2_samples_of_a_network_without_errors_stay_the_same(name: str, closed_loop: bool) -> None:
    """P2, with all that corrects by default."""
    config = {"num_train_timesteps": 1000}
    scheduler = scheduler_from_name(name, config if name == "flow_euler" else NOISY | config)
    denoiser = small_denoiser(scheduler, steps=STEPS)
    floats = float_plan(denoiser.info, "onnxruntime", denoiser.program.n_steps)
    exact = quantizer.quantize(denoiser, floats, {})
    runs = collect_trajectories(denoiser, 4, seed=3)
    found = stages.correct(exact, runs, closed_loop=closed_loop)
    fed = conditioning_for(denoiser, 3, 4)
    plain, corrected = (
        draw(player_of(denoiser, each), float_predictor(denoiser), fed, 3, 4)
        for each in (None, found)
    )
    assert np.array_equal(plain, corrected)


def test_the_closed_loop_measures_again_along_other_samples() -> None:
    one = stages.correct(quantized(), small()[1].trajectories)
    other = stages.correct(quantized(), small()[1].trajectories, closed_loop=True)
    assert other.key == one.key
    assert other.gain != one.gain
    # The same network and nearly the same samples.
    assert other.gain == pytest.approx(one.gain, abs=0.05)
    assert stages.correct(quantized(), small()[1].trajectories, closed_loop=True) == other


# Plans that are measured or searched.


def rule(denoiser: Denoiser, calibration: Calibration, plan: DeploymentPlan) -> tuple[int, ...]:
    """PTQD's rule, from its own parts."""
    statistics = {}
    for bits in (4, 8):
        flat = with_activation_bits(plan, [bits] * plan.n_steps)
        mine = quantizer.quantize(denoiser, flat, calibration.observations)
        statistics[bits] = stages.measure(mine, calibration.trajectories)
    levels = noise_levels(denoiser.program)
    found = activation_bits_by_step(denoiser.program, levels, statistics)
    return contiguous(found, min_run=stages.SHORTEST_PHASE)


@cache
def noisy_at_first() -> tuple[Denoiser, Calibration]:
    """A cosine schedule: at its noisy end there is next to no signal to lose."""
    denoiser = small_denoiser(
        DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing"
        ),
        steps=20,
    )
    return denoiser, stages.calibrate(denoiser, samples=8)


def test_bits_fall_only_where_the_rule_lets_them() -> None:
    denoiser, calibration = noisy_at_first()
    plan = stages.rule_plan(denoiser, body=Precision("w8a8"))
    found = stages.step_aware_plan(denoiser, calibration, plan)
    wanted = rule(denoiser, calibration, plan)
    assert set(wanted) == {4, 8}
    for phase in found.phases:
        for step in range(phase.start, phase.stop):
            for mine, old in zip(phase.layers, plan.phases[0].layers, strict=True):
                bits = wanted[step] if old.precision.integer else 32
                assert mine.precision.activation_bits == bits
                assert mine.precision.weight_bits == old.precision.weight_bits
                assert mine.layer == old.layer
    assert len(found.phases) > 1
    assert wanted[0] == 4
    again = stages.quantize(denoiser, calibration, plan=found).quantized
    assert torch.isfinite(again.predict(torch.zeros(1, 4, 8, 8), 0, torch.tensor([0]))).all()


def test_a_single_step_is_no_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, calibration = noisy_at_first()
    plan = stages.rule_plan(denoiser, body=Precision("w8a8"))
    chosen = (4, 8, 4, 4, *[8] * (plan.n_steps - 4))
    monkeypatch.setattr(stages, "activation_bits_by_step", lambda *_: chosen)
    found = stages.step_aware_plan(denoiser, calibration, plan)
    assert [(phase.start, phase.stop) for phase in found.phases] == [
        (0, 2),
        (2, 4),
        (4, plan.n_steps),
    ]


def test_one_width_leaves_nothing_to_choose() -> None:
    denoiser, calibration = noisy_at_first()
    plan = stages.rule_plan(denoiser, body=Precision("w8a8"))
    assert stages.step_aware_plan(denoiser, calibration, plan, bits=(8,)) == plan


def test_a_plan_with_phases_is_not_split_again() -> None:
    plan = with_activation_bits(plan_of(), [4, 4, 8, 8, 8])
    with pytest.raises(InputError) as refused:
        stages.step_aware_plan(*small(), plan)
    assert refused.value.code == "EQ-3209"


def test_group_sizes_are_searched_and_go_on_from_their_folder(tmp_path: Path) -> None:
    """I10: the search too."""
    settings = GroupSearchSettings(
        (16, 32), population=2, elite=1, mutations=1, crossovers=0, generations=1
    )
    plan = plan_of("w4g32a8dyn")

    def search(progress: Told) -> tuple[DeploymentPlan, int]:
        found = stages.search_groups(
            *small(), plan, samples=10, settings=settings, work=tmp_path, progress=progress
        )
        return found.plan, found.search.n_evaluations

    with pytest.raises(KeyboardInterrupt):
        search(Told("groups", at=1))
    (file,) = tmp_path.glob("groups-*.json")
    found, scored = search(told := Told())
    assert told.stages == ["groups"]
    sizes = {a.layer: a.precision.group_size for a in found.phases[0].layers}
    assert sizes["mix"] in settings.choices
    data = file.read_bytes()
    assert len(json.loads(data)["scores"]) == scored
    assert search(Told())[0] == found
    assert file.read_bytes() == data
    longer = replace(settings, generations=2)
    stages.search_groups(*small(), plan, samples=10, settings=longer, work=tmp_path)
    assert file.read_bytes() == data, "another search is another file"


# Finetune.


def test_finetuning_keeps_plan_and_blocks_and_loses_nothing() -> None:
    before = Quantization(quantized(), blocks=())
    found = stages.finetune(before, small()[1].trajectories, settings=TRAINING)
    assert found.quantized.plan == quantized().plan
    assert not same(found.quantized, quantized())
    again = stages.finetune(before, small()[1].trajectories, settings=TRAINING)
    assert same(found.quantized, again.quantized)


def test_finetuning_with_temporal_networks_gives_a_generator() -> None:
    settings = FinetuneSettings(iterations=200, batch=16, temporal=True, lr_weight=1e-4)
    found = stages.finetune(
        Quantization(quantized("w4a4")), small()[1].trajectories, settings=settings
    )
    assert found.generator is not None
    tables = found.generator.tabulate(found.quantized.parameters, small()[0].program.timesteps)
    again = quantizer.assemble(small()[0], plan_of("w4a4"), tables)
    assert same(found.quantized, again)


# To a file.


def to_file(out: Path, method: Method = LEARNED, **options: object) -> stages.QuantizedModel:
    known: dict[str, object] = {"plan": plan_of(), "method": method, "samples": RUNS}
    return stages.quantize_to_file(fresh_denoiser(), out, **(known | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> stages.QuantizedModel:
    return to_file(tmp_path_factory.mktemp("whole") / "small.safetensors")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> stages.QuantizedModel:
    out = tmp_path_factory.mktemp("generated") / "mlp.safetensors"
    return to_file(out, Method(mlp=True), correction=False)


@pytest.fixture(scope="module")
def tuned(
    whole: stages.QuantizedModel, tmp_path_factory: pytest.TempPathFactory
) -> stages.QuantizedModel:
    out = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    return tune(whole.file, out)


def tune(file: Path, out: Path, **options: object) -> stages.QuantizedModel:
    known: dict[str, object] = {"settings": TRAINING, "samples": RUNS}
    return stages.finetune_file(fresh_denoiser(), file, out, **(known | options))  # type: ignore[arg-type]


def test_a_file_is_what_the_stages_make_one_by_one(whole: stages.QuantizedModel) -> None:
    direct = stages.quantize(*small(), plan=plan_of(), method=LEARNED)
    held = load_quantized(whole.file, small()[0])
    assert same(held.quantized, direct.quantized)
    assert held.correction == stages.correct(direct.quantized, small()[1].trajectories)
    assert held.generator is None
    assert whole.snr_db == snr_db(direct.quantized)
    names = [block.name for block in whole.blocks]
    assert names == [block.name for block in direct.blocks]
    assert [path.name for path in whole.file.parent.iterdir()] == [whole.file.name]


def test_bytes_are_those_of_the_tensors_in_the_file(whole: stages.QuantizedModel) -> None:
    with safe_open(whole.file, framework="pt") as opened:
        tensors: list[Tensor] = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
    assert whole.stored_bytes == sum(t.numel() * t.element_size() for t in tensors)
    state = small()[0].module.state_dict().values()
    assert whole.float_bytes == sum(t.numel() * t.element_size() for t in state)
    assert whole.stored_bytes < whole.float_bytes


def test_without_a_correction_none_is_stored(tmp_path: Path) -> None:
    model = to_file(tmp_path / "plain.safetensors", Method(), correction=False)
    assert load_quantized(model.file, small()[0]).correction is None
    # What it measured is told all the same.
    assert model.snr_db == snr_db(quantized())


def test_a_generator_is_stored(generated: stages.QuantizedModel) -> None:
    found = load_quantized(generated.file, small()[0]).generator
    assert found is not None
    assert len(found.names) == 3


INTERRUPTIONS = [
    ("trajectories", 1),
    ("observe", 1),
    ("features", 1),
    ("reconstruct", 1),
    ("correct", 1),
    ("correct", STEPS),
    ("match", 1),
    ("match", STEPS),
]


@pytest.mark.parametrize(("name", "at"), INTERRUPTIONS)
def test_an_interrupted_quantization_leaves_nothing_and_ends_identical(
    whole: stages.QuantizedModel, tmp_path: Path, name: str, at: int
) -> None:
    """I10: finished work stays beside the output until the same call has ended."""
    out = tmp_path / "small.safetensors"
    with pytest.raises(KeyboardInterrupt):
        to_file(out, progress=Told(name, at=at))
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {".small.safetensors.work"}
    told = Told()
    to_file(out, progress=told)
    assert out.read_bytes() == whole.file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    if name in ("features", "reconstruct", "correct", "match"):
        assert "observe" not in told.stages


def test_work_that_is_named_is_kept_and_used_again(
    whole: stages.QuantizedModel, tmp_path: Path
) -> None:
    out, work = tmp_path / "a" / "small.safetensors", tmp_path / "work"
    to_file(out, work=work)
    assert any(work.iterdir())
    told = Told()
    to_file(tmp_path / "b.safetensors", work=work, progress=told)
    assert not {"observe", "correct", "match"} & set(told.stages)
    assert (tmp_path / "b.safetensors").read_bytes() == out.read_bytes()
    assert out.read_bytes() == whole.file.read_bytes()


def test_bits_by_step_are_learned_stored_and_trained(tmp_path: Path) -> None:
    """Phases share their weights: in finished work, in the file, in training."""
    steps = small()[0].program.n_steps
    plan = with_activation_bits(plan_of("w4a8"), [4] * 2 + [8] * (steps - 2))
    out = tmp_path / "phases.safetensors"
    with pytest.raises(KeyboardInterrupt):
        to_file(out, plan=plan, progress=Told("correct", at=1))
    model = to_file(out, plan=plan)
    assert model.blocks
    assert load_quantized(out, small()[0]).quantized.plan == plan
    again = tune(out, tmp_path / "tuned.safetensors")
    assert again.plan == plan


def test_a_failing_plan_is_refused_before_any_work(tmp_path: Path) -> None:
    plan = plan_of().model_copy(update={"model": "f" * 64})
    told = Told()
    with pytest.raises(InputError) as refused:
        to_file(tmp_path / "small.safetensors", plan=plan, progress=told)
    assert refused.value.code == "EQ-3202"
    assert told.stages == []
    assert list(tmp_path.iterdir()) == []


def test_a_finetuned_file_has_a_correction_of_its_own(
    whole: stages.QuantizedModel, tuned: stages.QuantizedModel
) -> None:
    before, after = (load_quantized(model.file, small()[0]) for model in (whole, tuned))
    assert after.quantized.plan == before.quantized.plan
    assert not same(before.quantized, after.quantized)
    assert after.correction is not None
    assert after.correction.key == correction_key(after.quantized)
    assert after.correction != before.correction
    assert [path.name for path in tuned.file.parent.iterdir()] == [tuned.file.name]


def test_a_finetuned_file_is_measured_on_trajectories_it_was_not_trained_on(
    tuned: stages.QuantizedModel,
) -> None:
    denoiser = small()[0]
    quantized = load_quantized(tuned.file, denoiser).quantized
    seen, unseen = (
        stages.collect_trajectories(denoiser, stages.DEFAULT_SAMPLES, seed=seed)
        for seed in (0, stages.UNSEEN_SEED)
    )
    assert tuned.snr_db == stages.measure(quantized, unseen).snr_db
    assert tuned.snr_db != stages.measure(quantized, seen).snr_db


@pytest.mark.parametrize(("name", "at"), [("trajectories", 1), ("finetune", 3), ("correct", 3)])
def test_an_interrupted_training_leaves_nothing_and_ends_identical(
    whole: stages.QuantizedModel, tuned: stages.QuantizedModel, tmp_path: Path, name: str, at: int
) -> None:
    """I10."""
    out = tmp_path / "tuned.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tune(whole.file, out, progress=Told(name, at=at))
    assert not out.exists()
    tune(whole.file, out)
    assert out.read_bytes() == tuned.file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_generator_is_trained_on(generated: stages.QuantizedModel, tmp_path: Path) -> None:
    """Whether or not the training asks for one: its tables can still be made for other steps."""
    settings = FinetuneSettings(iterations=40, batch=16)
    tuned = tune(generated.file, tmp_path / "tuned.safetensors", settings=settings)
    before, after = (load_quantized(file, small()[0]) for file in (generated.file, tuned.file))
    assert not same(before.quantized, after.quantized)
    assert before.generator is not None
    assert after.generator is not None
    tables = after.generator.tabulate(after.quantized.parameters, small()[0].program.timesteps)
    assert same(after.quantized, quantizer.assemble(small()[0], after.quantized.plan, tables))
    state, first = after.generator.tensors(), before.generator.tensors()
    assert any(not torch.equal(value, first[name]) for name, value in state.items())


def test_a_generator_outlives_a_training_that_did_not_help(
    generated: stages.QuantizedModel, tmp_path: Path
) -> None:
    """The codes and scales stay as they were, and so does what generates them."""
    settings = FinetuneSettings(iterations=1, batch=1, lr_weight=0.0, lr_scale=0.0)
    kept = tune(generated.file, tmp_path / "kept.safetensors", settings=settings, correction=False)
    before, after = (load_quantized(file, small()[0]) for file in (generated.file, kept.file))
    assert same(before.quantized, after.quantized)
    assert before.generator is not None
    assert after.generator is not None


# Emit from a file.


def test_a_correction_of_another_plan_is_refused(tmp_path: Path) -> None:
    """P10, I5: written into a file by hand, the correction at 8 bits does not pass for 4."""
    schedule = stages.correct(quantized("w8a8"), small()[1].trajectories)
    file = tmp_path / "mixed.safetensors"
    save_quantized(quantized(), file, correction=schedule)
    with pytest.raises(InputError) as refused:
        pipeline.emit(small()[0], tmp_path / "package", quantized=file)
    assert "precision" in str(refused.value)
    assert not (tmp_path / "package").exists()


def test_a_plan_for_another_target_is_refused(tmp_path: Path) -> None:
    plan = plan_of().model_copy(update={"target": "elsewhere"})
    file = tmp_path / "other.safetensors"
    save_quantized(stages.quantize(*small(), plan=plan).quantized, file)
    with pytest.raises(InputError) as refused:
        pipeline.emit(small()[0], tmp_path / "package", quantized=file)
    assert refused.value.code == "EQ-3303"


def test_a_plan_beside_a_quantized_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    save_quantized(quantized(), file)
    with pytest.raises(InputError) as refused:
        pipeline.emit(small()[0], tmp_path / "package", quantized=file, plan=plan_of())
    assert refused.value.code == "EQ-3705"


def test_a_folder_in_the_way_of_a_package_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    save_quantized(quantized(), file)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    told = Told()
    with pytest.raises(OutputError, match="not a package"):
        pipeline.emit(small()[0], tmp_path / "mine", quantized=file, force=True, progress=told)
    assert told.stages == []
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_folder_in_the_way_of_a_file_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.mkdir()
    with pytest.raises(OutputError) as refused:
        to_file(out, Method(), samples=1, correction=False)
    assert refused.value.code == "EQ-7103"
    assert list(tmp_path.iterdir()) == [out]
