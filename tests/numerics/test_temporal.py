"""T-numbers name the properties of temporal scales that each test holds down."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeqdm.errors import EdgeqdmError, InputError, NumericalError
from edgeqdm.numerics.affine import MIN_SCALE, dequantize_activation, quantize_activation
from edgeqdm.numerics.ranges import LOSS_POWER, StepRanges, full_scale, search_with_zero_point
from edgeqdm.numerics.temporal import (
    SMALLEST_RATIO,
    TemporalScales,
    encode_timestep,
    fake_quantize,
    fit_temporal,
    inverse_softplus,
)

ZERO_POINT = 128
STEPS = torch.arange(975, -1, -50)
"""20 timesteps, noisiest first."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively(
    n_layers: int = 3, *, seed: int = 0, dim: int = 128, gain: float = 1.0
) -> TemporalScales:
    """Networks whose outputs depend on the timestep, as fitted ones do."""
    generator = seeded(seed)
    model = TemporalScales(0.1 + torch.rand(n_layers), dim=dim, generator=generator)
    with torch.no_grad():
        model.weights[-1].copy_(gain * torch.randn(n_layers, 64, 1, generator=generator) / 8)
    return model


def sigma(timesteps: Tensor) -> Tensor:
    """Spread of a layer's values: 0.2 at the clean end, 3 at the noisy one."""
    return 0.2 * 15.0 ** (timesteps / 999.0)


def seen(spread: Tensor, *, n_values: int = 4096, seed: int = 0) -> StepRanges:
    samples = spread[:, None] * torch.randn(len(spread), n_values, generator=seeded(seed))
    return StepRanges(samples, samples.amin(1), samples.amax(1))


def errors(samples: Tensor, scale: Tensor, bits: int = 8, zero_point: int = ZERO_POINT) -> Tensor:
    """Quantization error of every step relative to its energy, [S]."""
    codes = quantize_activation(samples, scale[:, None], zero_point, bits)
    error = (dequantize_activation(codes, scale[:, None], zero_point) - samples).abs()
    return error.pow(LOSS_POWER).mean(1) / samples.abs().pow(LOSS_POWER).mean(1)


def best_scales(ranges: StepRanges) -> Tensor:
    """Best scale of every step out of a fine grid."""
    grid = torch.linspace(0.7, 1.1, 161)[:, None] * full_scale(ranges.low, ranges.high, ZERO_POINT)
    found = torch.stack([errors(ranges.samples, scale) for scale in grid])
    best: Tensor = grid.gather(0, found.argmin(0)[None])[0]
    return best


def best_static_scale(ranges: StepRanges) -> Tensor:
    widest = full_scale(ranges.low, ranges.high, ZERO_POINT).max()
    grid = widest * torch.linspace(0.3, 1.1, 161)
    total = torch.stack([errors(ranges.samples, scale[None]).sum() for scale in grid])
    return grid[total.argmin()][None]


def fitted(ranges: StepRanges, timesteps: Tensor) -> TemporalScales:
    start, _ = search_with_zero_point(ranges, ZERO_POINT)
    return fit_temporal(
        [ranges],
        timesteps,
        [ZERO_POINT],
        start.expand(1, len(timesteps)),
        generator=seeded(),
    )


@pytest.fixture(scope="module")
def growing() -> tuple[StepRanges, TemporalScales]:
    """A layer whose spread grows by 15, and its networks."""
    ranges = seen(sigma(STEPS))
    return ranges, fitted(ranges, STEPS)


@pytest.mark.parametrize("dim", [2, 64, 128, 192])
def test_embedding_equals_that_of_diffusers(dim: int) -> None:
    t = torch.arange(1000)
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    # Theirs multiplies t f in float32: 999 times 2^-24 of an angle.
    torch.testing.assert_close(encode_timestep(t, dim), expected, rtol=0, atol=2e-4)


def test_embedding_keeps_fractions_of_a_timestep() -> None:
    found = encode_timestep(torch.tensor([10.25]), 4)
    expected = np.array([np.cos(10.25), np.cos(0.1025), np.sin(10.25), np.sin(0.1025)])
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("value", [1e-20, 1e-4, 0.6931472, 1.0, 20.0, 200.0, 1e30])
def test_inverse_softplus_neither_overflows_nor_loses_digits(value: float) -> None:
    """Section 3.2, case 1: `log(exp(x) - 1)` is infinite for 200 and 1.2e-4 off for 1e-4."""
    y = inverse_softplus(torch.tensor(value)).to(torch.float64)
    back = torch.logaddexp(y, torch.zeros((), dtype=torch.float64))
    # y is stored in float32; its last digit, relative to |y| <= 46 below 1, is 46 * 2^-24.
    assert float(back) == pytest.approx(value, rel=3e-6)


def naive_scale(model: TemporalScales, layer: int, timestep: float) -> float:
    """One MLP at one timestep in float64 numpy."""
    hidden = encode_timestep(torch.tensor([timestep]), model.dim)[0].double().numpy()
    pairs = [
        (w[layer].detach().double().numpy(), b[layer, 0].detach().double().numpy())
        for w, b in zip(model.weights, model.biases, strict=True)
    ]
    for weight, bias in pairs[:-1]:
        hidden = np.maximum(hidden @ weight + bias, 0.0)
    raw = hidden @ pairs[-1][0] + pairs[-1][1]
    return float(model.reference_scale[layer]) * float(np.logaddexp(0.0, raw[0]))


def test_t1_table_equals_one_network_per_layer() -> None:
    """T1."""
    model = lively()
    table = model.tabulate(STEPS)
    assert (table.dtype, table.shape) == (torch.float32, (3, 20))
    naive = [[naive_scale(model, layer, float(t)) for t in STEPS] for layer in range(3)]
    # Sums of 128 products in float32.
    np.testing.assert_allclose(table.numpy(), naive, rtol=1e-5)


def test_t1_every_entry_of_the_table_is_bitwise_what_its_timestep_gives_alone() -> None:
    """T1."""
    model = lively()
    table = model.tabulate(STEPS)
    for step, t in enumerate(STEPS):
        assert torch.equal(table[:, step], model.tabulate(t[None])[:, 0])
        assert torch.equal(table[:, step], model(t[None])[0])
    assert torch.equal(model.tabulate(STEPS.flip(0)), table.flip(1))


def test_t1_training_mode_changes_no_table() -> None:
    """T1."""
    model = lively()
    assert torch.equal(model.train().tabulate(STEPS), model.eval().tabulate(STEPS))


def test_t1_quantizing_by_table_equals_quantizing_by_network() -> None:
    """T1."""
    model = lively()
    x = torch.randn(64, generator=seeded())
    for step, t in enumerate(STEPS):
        by_table = fake_quantize(x, model.tabulate(STEPS)[1, step], 100, 8)
        assert torch.equal(by_table, fake_quantize(x, model(t[None])[0, 1], 100, 8))


def test_forward_and_table_agree_to_float_precision() -> None:
    model = lively()
    torch.testing.assert_close(model(STEPS).T, model.tabulate(STEPS), rtol=1e-5, atol=0)


@given(
    gain=st.floats(-1e4, 1e4),
    exponent=st.integers(-70, 100),
    t=st.one_of(st.integers(0, 999), st.floats(-1e6, 1e6), st.just(1e9)),
)
def test_t2_scales_are_finite_and_positive_whatever_the_weights(
    gain: float, exponent: int, t: float
) -> None:
    """T2."""
    model = lively(gain=gain)
    model.reference_scale.fill_(max(2.0**exponent, MIN_SCALE))
    table = model.tabulate(torch.tensor([t], dtype=torch.float64))
    assert bool((torch.isfinite(table) & (table >= MIN_SCALE)).all())


def test_t2_scales_are_positive_at_every_timestep_of_training_and_far_from_them() -> None:
    """T2: where softplus underflows, too."""
    model = lively(gain=1e4)
    far = torch.tensor([-1e9, -1.0, 0.5, 999.5, 1e9], dtype=torch.float64)
    table = model.tabulate(torch.cat([torch.arange(1000, dtype=torch.float64), far]))
    floor = model.reference_scale[:, None] * SMALLEST_RATIO
    assert bool((torch.isfinite(table) & (table >= floor)).all())
    assert bool((table == floor).any())


def test_t2_new_networks_return_exactly_the_reference_scale_at_every_timestep() -> None:
    """T2."""
    reference = torch.tensor([1e-12, 0.37, 5e4])
    model = TemporalScales(reference, generator=seeded())
    assert torch.equal(model.tabulate(torch.arange(1000)), reference[:, None].expand(3, 1000))


def test_new_networks_have_the_spread_of_he() -> None:
    model = TemporalScales(torch.ones(8), dim=192, generator=seeded())
    # 8 * 64 * 64 values and more: the standard error of a spread is 0.4 %.
    for weight in model.weights[:-1]:
        expected = (2 / weight.shape[1]) ** 0.5
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.02)


def test_one_network_has_as_many_parameters_as_published() -> None:
    count = sum(p.numel() for p in TemporalScales(torch.ones(1), generator=seeded()).parameters())
    assert count == 16641


@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (6, 10)])
def test_t3_rows_of_mixed_timesteps_equal_single_rows(shape: tuple[int, ...]) -> None:
    """T3."""
    timesteps = torch.tensor([999, 0, 500, 500, 1, 37])
    scale = lively().tabulate(timesteps)[2].reshape(-1, *([1] * (len(shape) - 1)))
    x = torch.randn(shape, generator=seeded())
    together = fake_quantize(x, scale, 90, 8)
    alone = [fake_quantize(x[i : i + 1], scale[i : i + 1], 90, 8) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


@given(
    bits=st.sampled_from([2, 3, 4, 8, 12]),
    part=st.floats(0, 1),
    exponent=st.integers(-40, 40),
    seed=st.integers(0, 99),
)
def test_fake_quantization_is_bitwise_that_of_the_affine_quantizer(
    bits: int, part: float, exponent: int, seed: int
) -> None:
    zero_point = round(part * (2**bits - 1))
    scale = torch.tensor(1.1 * 2.0**exponent)
    x = torch.randn(256, generator=seeded(seed)) * scale * 2**bits / 4
    codes = quantize_activation(x, scale, zero_point, bits)
    expected = dequantize_activation(codes, scale, zero_point)
    found = fake_quantize(x, scale, zero_point, bits)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("zero_point", [0, 5, 15])
def test_t4_gradients_are_the_closed_form_of_lsq(zero_point: int) -> None:
    """T4."""
    bits, s = 4, 0.3
    x = torch.linspace(-7, 7, 301).requires_grad_(True)
    scale = torch.tensor(s, requires_grad=True)
    incoming = torch.randn(301, generator=seeded())
    fake_quantize(x, scale, zero_point, bits).backward(incoming)
    lowest, highest = -zero_point, 2**bits - 1 - zero_point
    by_scale, by_x = 0.0, []
    for value, g in zip(x.tolist(), incoming.tolist(), strict=True):
        u = value / s
        slope = lowest if u < lowest else highest if u > highest else round(u) - u
        by_scale += g * slope
        by_x.append(g if lowest <= u <= highest else 0.0)
    assert x.grad is not None
    assert scale.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), by_x, rtol=1e-6)
    # 301 terms of up to 15 in float32.
    assert float(scale.grad) == pytest.approx(by_scale, rel=1e-5, abs=1e-4)


def test_t4_every_row_of_scales_gets_the_gradient_of_its_own_row() -> None:
    """T4."""
    x = torch.randn(3, 2, 4, 4, generator=seeded())
    scale = torch.tensor([0.01, 0.02, 0.05])[:, None, None, None].requires_grad_(True)
    fake_quantize(x, scale, 128, 8).square().sum().backward()
    assert scale.grad is not None
    for row in range(3):
        alone = scale[row].detach().reshape(()).requires_grad_(True)
        fake_quantize(x[row], alone, 128, 8).square().sum().backward()
        assert alone.grad is not None
        # The same 32 terms, summed in another order.
        torch.testing.assert_close(scale.grad[row].reshape(()), alone.grad, rtol=1e-5, atol=1e-5)


def test_t4_gradients_reach_the_weights_of_the_networks_through_the_rounding() -> None:
    """T4."""
    model = lively()
    x = torch.randn(20, 32, generator=seeded())
    fake_quantize(x, model(STEPS)[:, :1] / 50, 128, 8).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad[0].any())
        # The scales of the other layers were not used.
        assert not bool(parameter.grad[1:].any())


def test_t5_fitted_scales_track_the_best_scale_of_every_step(
    growing: tuple[StepRanges, TemporalScales],
) -> None:
    """T5."""
    ranges, model = growing
    table = model.tabulate(STEPS)[0]
    assert float((table / best_scales(ranges) - 1).abs().max()) < 0.1
    static = errors(ranges.samples, best_static_scale(ranges)).sum()
    found = errors(ranges.samples, table).sum()
    per_step = errors(ranges.samples, best_scales(ranges)).sum()
    # Over a range of 15 one scale wastes most codes of the quiet steps.
    assert float(found) < 0.1 * float(static)
    assert float(found) < 1.05 * float(per_step)


def test_t5_constant_spread_costs_nothing_against_one_static_scale() -> None:
    """T5."""
    ranges = seen(torch.ones(20))
    table = fitted(ranges, STEPS).tabulate(STEPS)[0]
    static = float(errors(ranges.samples, best_static_scale(ranges)).sum())
    assert float(errors(ranges.samples, table).sum()) < 1.02 * static
    # Largest of 4096 normal values: 3.6 with a spread of 8 % between steps.
    assert float(table.log().std()) < 0.1


def squared_errors(ranges: StepRanges, scale: Tensor, bits: int, zero_point: int) -> Tensor:
    """Mean squared quantization error of every step, [S], of a scale per step or of one."""
    column = scale.reshape(-1, 1)
    codes = quantize_activation(ranges.samples, column, zero_point, bits)
    error: Tensor = dequantize_activation(codes, column, zero_point) - ranges.samples
    return error.square().mean(1)


def test_t5_scales_fitted_to_squared_errors_track_the_least_squares_scales() -> None:
    """T5, in mean squares. With the default power of 2.4 four bits end up 10.7 % wider."""
    growing, constant = (seen(spread, n_values=2048) for spread in (sigma(STEPS), torch.ones(20)))
    # At 4 bits 0.39 of the static error remains, at 8 bits 0.22: quiet steps add little to the sum.
    # With equal spreads the best scales differ by what 2048 samples leave open.
    layers = [(growing, 128, 8, 0.5), (growing, 8, 4, 0.5), (constant, 128, 8, 1.02)]
    layers += [(constant, 8, 4, 1.02)]
    start = [search_with_zero_point(r, z, bits=b, power=2.0)[0] for r, z, b, _ in layers]
    tables = fit_temporal(
        [ranges for ranges, _, _, _ in layers],
        STEPS,
        [zero_point for _, zero_point, _, _ in layers],
        torch.stack(start),
        bits=[bits for _, _, bits, _ in layers],
        generator=seeded(),
        power=2.0,
    ).tabulate(STEPS)
    shrinks = torch.linspace(0.3, 1.1, 161)
    for table, (ranges, zero_point, bits, share) in zip(tables, layers, strict=True):
        full = full_scale(ranges.low, ranges.high, zero_point, bits)
        each = [squared_errors(ranges, s * full, bits, zero_point) for s in shrinks]
        best = shrinks[torch.stack(each).argmin(0)] * full
        one = [squared_errors(ranges, s * full.max(), bits, zero_point).sum() for s in shrinks]
        assert float((table / best - 1).abs().max()) < 0.1
        found = squared_errors(ranges, table, bits, zero_point).sum()
        assert float(found) < share * float(min(one))


def test_t5_refinement_lowers_the_error_of_rough_start_scales() -> None:
    """T5."""
    ranges = seen(sigma(STEPS))
    rough = 1.2 * best_scales(ranges)[None]
    model = fit_temporal([ranges], STEPS, [ZERO_POINT], rough, generator=seeded(), iterations=100)
    found = errors(ranges.samples, model.tabulate(STEPS)[0]).sum()
    assert float(found) < 0.8 * float(errors(ranges.samples, rough[0]).sum())


def test_t5_refinement_clips_no_deeper_than_the_search_for_start_scales() -> None:
    """T5."""
    ranges = seen(torch.ones(20))
    ranges.samples[:, 0] = 9.0
    wide = StepRanges(ranges.samples, -9 * torch.ones(20), 9 * torch.ones(20))
    table = fitted(wide, STEPS).tabulate(STEPS)[0]
    # The step below the floor on which a gradient last acted: about one learning rate.
    assert bool((table > 0.98 * 0.8 * 9 / 127).all())


def test_t6_scales_between_the_fitted_steps_stay_near_the_truth() -> None:
    """T6."""
    all_steps = torch.arange(990, -1, -10)
    ranges = seen(sigma(all_steps))
    fitted_rows = torch.arange(0, 100, 5)
    known = StepRanges(*(v[fitted_rows] for v in (ranges.samples, ranges.low, ranges.high)))
    table = fitted(known, all_steps[fitted_rows]).tabulate(all_steps)[0]
    # What a static fit of the smooth truth leaves is the noise of 20 largest values, 8 % each.
    truth = sigma(all_steps) * (best_scales(known) / sigma(all_steps[fitted_rows])).mean()
    inner = slice(0, int(fitted_rows[-1]) + 1)
    off = (table / truth).log().abs()[inner]
    assert float(off.mean()) < 0.1
    assert float(off.max()) < 0.25


def test_t6_smooth_scales_are_interpolated_as_well_as_by_straight_lines() -> None:
    """T6."""
    grid = torch.arange(975, 24, -1)
    start = (sigma(STEPS) * (1 + 0.3 * torch.sin(STEPS / 100)))[None] / 30
    truth = sigma(grid) * (1 + 0.3 * torch.sin(grid / 100)) / 30
    model = fit_temporal(
        [seen(sigma(STEPS), n_values=64)], STEPS, [128], start, generator=seeded(), refinements=0
    )
    off = (model.tabulate(grid)[0] / truth).log().abs()
    assert float(off.max()) < 0.05


@pytest.mark.parametrize("bits", [16, 32])
def test_t7_wide_codes_change_nothing(bits: int) -> None:
    """T7."""
    x = torch.randn(4, 8, generator=seeded()).requires_grad_(True)
    found = fake_quantize(x, torch.tensor(0.5), 7, bits)
    assert torch.equal(found, x)
    found.sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())


def test_t8_new_steps_need_no_new_fit(growing: tuple[StepRanges, TemporalScales]) -> None:
    """T8."""
    ranges, model = growing
    before = {name: value.clone() for name, value in model.state_dict().items()}
    covered = (best_scales(ranges) / sigma(STEPS)).mean()
    for n_steps in (7, 20, 33, 951):
        grid = torch.linspace(975, 25, n_steps, dtype=torch.float64)
        table = model.tabulate(grid)[0]
        # Scales follow the largest of 4096 values, which differs by 8 % from step to step.
        assert float((table / (sigma(grid) * covered)).log().abs().max()) < 0.3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_t8_stored_networks_give_the_same_table_for_any_steps() -> None:
    """T8."""
    model = lively(dim=32)
    loaded = TemporalScales.of_state(model.state_dict())
    assert loaded.dim == 32
    grid = torch.linspace(0, 999, 17)
    assert torch.equal(loaded.tabulate(grid), model.tabulate(grid))


def test_the_same_seed_gives_the_same_networks() -> None:
    ranges = seen(sigma(STEPS), n_values=256)

    def table(seed: int) -> Tensor:
        start = best_scales(ranges)[None]
        return fit_temporal(
            [ranges],
            STEPS,
            [ZERO_POINT],
            start,
            generator=seeded(seed),
            iterations=20,
            refinements=10,
        ).tabulate(STEPS)

    assert torch.equal(table(0), table(0))
    assert not torch.equal(table(0), table(1))


def test_loud_and_quiet_layers_are_fitted_together() -> None:
    layers = [seen(1e8 * sigma(STEPS)), seen(1e-8 * sigma(STEPS), seed=1)]
    start = torch.stack([best_scales(ranges) for ranges in layers])
    model = fit_temporal(layers, STEPS, [ZERO_POINT] * 2, start, generator=seeded())
    # As far as the fit of one layer with the same spreads is off.
    assert float((model.tabulate(STEPS) / start).log().abs().max()) < 0.1


def test_layers_may_differ_in_bits_zero_point_and_number_of_samples() -> None:
    full, short = seen(sigma(STEPS)), seen(sigma(STEPS), n_values=40)
    one_row = StepRanges(torch.rand(1, 700), torch.zeros(1), torch.ones(1))
    layers = [(full, 8, 8), (short, 128, 8), (one_row, 0, 4)]
    start = torch.stack([search_with_zero_point(r, z, bits=b)[0].expand(20) for r, z, b in layers])
    model = fit_temporal(
        [r for r, _, _ in layers],
        STEPS,
        [z for _, z, _ in layers],
        start,
        bits=[b for _, _, b in layers],
        generator=seeded(),
    )
    off = (model.tabulate(STEPS) / start).log().abs()
    # 40 or 700 values leave the best scale open to a few percent.
    assert float(off.mean()) < 0.05


def test_steps_that_saw_only_zeros_do_not_disturb_the_others() -> None:
    spread = sigma(STEPS)
    spread[7] = 0.0
    ranges = seen(spread)
    start, _ = search_with_zero_point(ranges, ZERO_POINT)
    assert float(start[7]) == 1.0
    table = fitted(ranges, STEPS).tabulate(STEPS)[0]
    off = (table / start).log().abs()
    assert float(off[torch.arange(20) != 7].max()) < 0.1
    assert 0.01 < float(table[7]) < 0.1


def test_a_layer_that_saw_only_zeros_keeps_its_start_scale() -> None:
    table = fitted(seen(torch.zeros(20)), STEPS).tabulate(STEPS)
    torch.testing.assert_close(table, torch.ones(1, 20), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n_steps", [1, 2])
def test_few_steps_are_fitted_too(n_steps: int) -> None:
    steps = STEPS[:n_steps]
    ranges = seen(torch.tensor([1.0, 5.0])[:n_steps])
    table = fitted(ranges, steps).tabulate(steps)[0]
    assert float((table / best_scales(ranges)).log().abs().max()) < 0.05


def test_fitting_works_where_gradients_are_off() -> None:
    steps = STEPS[:2]
    with torch.no_grad():
        table = fitted(seen(torch.tensor([1.0, 5.0])), steps).tabulate(steps)[0]
    assert float(table[1] / table[0]) > 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_impossible_start_scale_is_named(value: float) -> None:
    start = torch.ones(2, 20)
    start[1, 13] = value
    with pytest.raises(NumericalError, match=r"at step 13 \(layer 1\)") as caught:
        fit_temporal([seen(sigma(STEPS))] * 2, STEPS, [0, 0], start, generator=seeded())
    assert caught.value.code == "EQ-5220"


def test_a_sample_that_is_no_number_is_named() -> None:
    ranges = seen(sigma(STEPS))
    ranges.samples[4, 9] = torch.nan
    with pytest.raises(NumericalError, match=r"at step 4 \(layer 1\)") as caught:
        fit_temporal(
            [seen(sigma(STEPS)), ranges], STEPS, [0, 0], torch.ones(2, 20), generator=seeded()
        )
    assert caught.value.code == "EQ-5221"


def test_a_table_of_broken_networks_is_refused() -> None:
    model = lively()
    with torch.no_grad():
        model.biases[0][2] = torch.nan
    with pytest.raises(NumericalError, match="layer 2"):
        model.tabulate(STEPS)


@pytest.mark.parametrize(
    ("n_ranges", "n_zero_points", "shape", "n_bits"),
    [
        (0, 0, (0, 20), 0),
        (2, 1, (2, 20), 2),
        (2, 2, (20, 2), 2),
        (2, 2, (2, 20), 3),
        (1, 1, (20,), 1),
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(
    n_ranges: int, n_zero_points: int, shape: tuple[int, ...], n_bits: int
) -> None:
    with pytest.raises(InputError) as caught:
        fit_temporal(
            [seen(sigma(STEPS), n_values=8)] * n_ranges,
            STEPS,
            [0] * n_zero_points,
            torch.ones(shape),
            bits=[8] * n_bits,
            generator=seeded(),
        )
    assert caught.value.code == "EQ-3222"


def test_ranges_of_other_steps_are_refused() -> None:
    with pytest.raises(InputError, match="ranges of 5 steps for 20 timesteps") as caught:
        fit_temporal([seen(torch.ones(5))], STEPS, [0], torch.ones(1, 20), generator=seeded())
    assert caught.value.code == "EQ-3223"


@pytest.mark.parametrize(("zero_point", "bits"), [(-1, 8), (256, 8), (16, 4), (0, 1)])
def test_a_zero_point_that_is_no_code_is_refused(zero_point: int, bits: int) -> None:
    with pytest.raises(InputError) as caught:
        fake_quantize(torch.ones(2), torch.ones(()), zero_point, bits)
    assert caught.value.code == "EQ-3221"


@pytest.mark.parametrize("dim", [-2, 0, 7])
def test_an_impossible_width_of_the_embedding_is_refused(dim: int) -> None:
    with pytest.raises(InputError) as caught:
        encode_timestep(STEPS, dim)
    assert caught.value.code == "EQ-3220"
    with pytest.raises(InputError):
        TemporalScales(torch.ones(1), dim=dim, generator=seeded())


@pytest.mark.parametrize("timesteps", [[], [[1.0]], [float("nan")], [1.0, float("inf")]])
def test_timesteps_that_are_no_finite_vector_are_refused(timesteps: list[float]) -> None:
    with pytest.raises(InputError) as caught:
        lively().tabulate(torch.tensor(timesteps))
    assert caught.value.code == "EQ-3220"


@pytest.mark.parametrize("damage", ["weights.0", "biases.3", "reference_scale"])
def test_damaged_state_is_refused(damage: str) -> None:
    state = dict(lively().state_dict())
    missing = {name: value for name, value in state.items() if name != damage}
    for broken in (missing, state | {damage: torch.ones(())}, state | {damage: torch.ones(2, 2)}):
        with pytest.raises(EdgeqdmError) as caught:
            TemporalScales.of_state(broken)
        assert caught.value.code == "EQ-3224"
