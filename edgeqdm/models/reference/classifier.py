"""The garment classifier whose penultimate features define feature-FID."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

FEATURES = 64


class GarmentClassifier(nn.Module):
    """Five 3x3 convolutions and one linear layer on 1 x 32 x 32 images in [-1, 1]."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        widths = (1, 32, 32, 64, 64, FEATURES)
        strides = (1, 2, 1, 2, 1)
        layers: list[nn.Module] = []
        for fan_in, fan_out, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [
                nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(fan_out),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, n_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, float32 [B, 64], of images [B, 1, 32, 32] in [-1, 1]."""
        return cast(Tensor, self.trunk(images).mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [B, n_classes] of images [B, 1, 32, 32] in [-1, 1]."""
        return cast(Tensor, self.head(torch.dropout(self.features(images), 0.2, self.training)))
