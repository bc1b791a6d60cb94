"""What cannot be exported is told in one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgeqdm.emit.export import export_onnx
from edgeqdm.errors import UnsupportedError


class Branching(nn.Module):
    """Goes where its input says, which no graph of one trace can."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_torch_cannot_export_is_one_line() -> None:
    with pytest.raises(UnsupportedError) as caught:
        export_onnx(Branching(), {"x": torch.zeros(2, 3)}, {})
    assert caught.value.code == "EQ-4436"
    assert "the network cannot be exported: " in caught.value.message
    assert "\n" not in caught.value.message
