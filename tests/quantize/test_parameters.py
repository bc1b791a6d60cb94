"""What quantization decided about a layer, and how it is named."""

from __future__ import annotations

import pytest
import torch

from edgeqdm.ir.plan import LayerAssignment
from edgeqdm.ir.precision import ActivationPolicy, Precision
from edgeqdm.numerics.affine import quantize_weight
from edgeqdm.numerics.grouping import dequantize_grouped, search_grouped
from edgeqdm.numerics.ranges import search_weight
from edgeqdm.quantize.parameters import Variant, WeightCodes


@pytest.mark.parametrize("shape", [(5, 40), (5, 4, 3, 3)])
def test_codes_per_channel_dequantize_to_their_scaled_selves(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    scale = search_weight(weight, 6)
    codes = quantize_weight(weight, scale, 6)
    found = WeightCodes(codes, scale, None, 6).dequantized()
    assert found.shape == shape
    for channel in range(5):
        assert torch.equal(found[channel], codes[channel].float() * scale[channel])
    # Codes are rounded to the nearest, and the search clips at most what its deepest shrink does.
    inside = codes.abs() < 31
    width = scale.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    assert bool(((found - weight).abs() <= 0.501 * width)[inside].all())


def test_codes_of_groups_keep_all_that_dequantizes_them() -> None:
    weight = search_grouped(torch.randn(5, 40), 4, 16)
    found = WeightCodes.of_groups(weight)
    assert (found.bits, found.group_size) == (4, 16)
    assert found.zero_point is weight.zero_point
    assert torch.equal(found.dequantized(), dequantize_grouped(weight))


def test_half_weights_have_no_scale_and_widen_exactly() -> None:
    half = torch.randn(3, 4).half()
    found = WeightCodes(half, None, None, 16).dequantized()
    assert found.dtype == torch.float32
    assert torch.equal(found.half(), half)


def test_variants_are_told_apart_by_layer_precision_and_policy() -> None:
    def variant(text: str, policy: ActivationPolicy | None = None) -> Variant:
        return Variant.of(
            LayerAssignment(
                layer="mid.to_q", precision=Precision(text), activation=policy, reason="test"
            )
        )

    default = variant("w8a8")
    assert default == variant("w8a8", ActivationPolicy.TEMPORAL)
    others = [variant("w8a8", ActivationPolicy.STATIC), variant("w4a8"), variant("w8a8dyn")]
    assert len({default, *others}) == 4
    assert str(default) == "mid.to_q/w8a8/temporal"
    assert str(others[2]) == "mid.to_q/w8a8dyn/dynamic_token"
