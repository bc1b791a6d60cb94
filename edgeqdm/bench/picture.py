"""Pictures for people."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray


def side_by_side(rows: dict[str, NDArray[np.uint8]], columns: tuple[str, ...], title: str) -> bytes:
    """A PNG with one captioned row of images per variant.

    Args:
        rows: pixels uint8 [N, H, W, 1 or 3] by caption, the same N for all.
        columns: N captions.
        title: above everything.
    """
    n_images = len(columns)
    figure = Figure(figsize=(1.0 * n_images + 1.4, 1.05 * len(rows) + 0.7), dpi=120)
    axes = figure.subplots(len(rows), n_images, squeeze=False)
    for row, (caption, pixels) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, pixels, strict=True):
            axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(caption, fontsize=9)
    for axis, caption in zip(axes[0], columns, strict=True):
        axis.set_title(caption, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
