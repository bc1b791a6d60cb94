"""Image distances against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeqdm.bench.quality import (
    SQNR_CAP_DB,
    check_fid,
    feature_fid,
    frechet_distance,
    garment_features,
    label_accuracy,
    sqnr_db,
)
from edgeqdm.emit.playback import Player
from edgeqdm.errors import InputError


def test_sqnr_of_a_tenth_of_the_amplitude_is_twenty_db() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    # float32 rounding of 1.1 x leaves about 1e-6 relative, far below 1e-3 dB.
    assert sqnr_db(x, x * np.float32(1.1)) == pytest.approx(20.0, abs=1e-3)


def test_sqnr_of_equal_arrays_is_the_cap() -> None:
    x = np.ones(3, np.float32)
    assert sqnr_db(x, x) == SQNR_CAP_DB


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-5, 5))
def test_frechet_distance_of_scalars_is_the_closed_form(a: float, b: float, shift: float) -> None:
    found = frechet_distance(
        np.array([0.0]), np.array([[a * a]]), np.array([shift]), np.array([[b * b]])
    )
    # For scalars: shift^2 + (a - b)^2; float64 with squares up to 100.
    assert found == pytest.approx(shift**2 + (a - b) ** 2, abs=1e-9)


def test_frechet_distance_of_commuting_covariances_is_the_sum_over_axes() -> None:
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    first, second = rng.uniform(0.5, 2, 6), rng.uniform(0.5, 2, 6)
    mean = rng.standard_normal(6)
    found = frechet_distance(
        mean, basis @ np.diag(first**2) @ basis.T, np.zeros(6), basis @ np.diag(second**2) @ basis.T
    )
    assert found == pytest.approx(np.sum(mean**2) + np.sum((first - second) ** 2), abs=1e-9)


def test_frechet_distance_of_a_singular_covariance_is_finite() -> None:
    flat = np.zeros((3, 3))
    assert frechet_distance(np.zeros(3), flat, np.zeros(3), np.eye(3)) == pytest.approx(3.0)


def test_noise_is_far_from_garments_and_constant_images_get_one_label() -> None:
    rng = np.random.default_rng(2)
    noise = rng.integers(0, 256, (80, 32, 32, 1), dtype=np.uint8)
    # Real images score below 1 with as many; noise shares nothing with them.
    assert feature_fid(noise) > 10.0
    black = np.zeros((70, 32, 32, 1), np.uint8)
    features, labels = garment_features(black)
    assert features.shape == (70, 64)
    assert len(set(labels.tolist())) == 1
    assert label_accuracy(black, labels) == 1.0


def test_too_few_images_and_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="at least 65"):
        feature_fid(np.zeros((64, 32, 32, 1), np.uint8))
    with pytest.raises(InputError, match="32 x 32 grey"):
        feature_fid(np.zeros((70, 16, 16, 1), np.uint8))


def player(factor: int) -> Player:
    table: Any = None
    decoder = {"kind": "pixel_shuffle", "factor": factor}
    return Player(table, 1.0, {"kind": "none"}, decoder, (4, 16, 16), (), None, ())


def test_the_same_is_refused_before_any_image_is_drawn() -> None:
    check_fid(65, player(factor=2))
    check_fid(0, player(factor=1))
    with pytest.raises(InputError, match="at least 65"):
        check_fid(64, player(factor=2))
    with pytest.raises(InputError, match=r"32 x 32 grey garments, these images are \(16, 16, 4\)"):
        check_fid(65, player(factor=1))
