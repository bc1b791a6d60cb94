"""Distances between images of the float model and images of a package."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from edgeqdm.emit import playback
from edgeqdm.errors import InputError, NumericalError
from edgeqdm.models.reference.classifier import FEATURES, GarmentClassifier

SQNR_CAP_DB = 300.0
FEATURE_BATCH = 250
GARMENT_SHAPE = (32, 32, 1)
"""[H, W, channels] of the only images that feature-FID is defined on."""


def sqnr_db(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Signal to error ratio in dB, `10 log10(sum ref^2 / sum (ref - found)^2)`, within +-300.

    Raises:
        NumericalError: if either holds NaN or Inf.
    """
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    error = float(np.sum(np.square(reference.astype(np.float64) - found)))
    if not np.isfinite(signal) or not np.isfinite(error):
        raise NumericalError("EQ-5601", "samples hold NaN or Inf", hint="verify the package")
    if error == 0.0 or signal == 0.0:
        return SQNR_CAP_DB if error == 0.0 else -SQNR_CAP_DB
    return max(-SQNR_CAP_DB, min(SQNR_CAP_DB, 10.0 * float(np.log10(signal / error))))


def frechet_distance(
    mean_a: NDArray[np.float64],
    covariance_a: NDArray[np.float64],
    mean_b: NDArray[np.float64],
    covariance_b: NDArray[np.float64],
) -> float:
    """Squared Frechet distance of two Gaussians, means [D] and covariances [D, D].

    `|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)`.

    Source: Heusel et al. 2017, equation 6, https://arxiv.org/abs/1706.08500; the symmetric form of
    the root keeps the eigenvalues real.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    middle = np.linalg.eigvalsh(root_a @ covariance_b @ root_a)
    trace = np.trace(covariance_a) + np.trace(covariance_b)
    trace -= 2.0 * np.sum(np.sqrt(np.clip(middle, 0, None)))
    return float(np.sum(np.square(mean_a - mean_b)) + trace)


@cache
def _classifier() -> tuple[GarmentClassifier, NDArray[np.float64], NDArray[np.float64]]:
    tensors = load(files("edgeqdm.models.reference").joinpath("garments.safetensors").read_bytes())
    mean = tensors.pop("test_features.mean").double().numpy()
    covariance = tensors.pop("test_features.covariance").double().numpy()
    network = GarmentClassifier()
    network.load_state_dict(
        {k: v if v.dtype == torch.int64 else v.float() for k, v in tensors.items()}
    )
    return network.eval(), mean, covariance


def _as_images(pixels: NDArray[np.uint8]) -> Tensor:
    _check_shape(pixels.shape[1:])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def garment_features(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Penultimate features float64 [N, 64] and predicted labels [N] of pixels [N, 32, 32, 1]."""
    network = _classifier()[0]
    features, labels = [], []
    for batch in _as_images(pixels).split(FEATURE_BATCH):
        found = network.features(batch)
        features.append(found.double().numpy())
        labels.append(network.head(found).argmax(1).numpy())
    return np.concatenate(features), np.concatenate(labels)


def _check_shape(shape: tuple[int, ...]) -> None:
    if shape != GARMENT_SHAPE:
        raise InputError(
            "EQ-3601",
            f"feature-FID is defined on 32 x 32 grey garments, these images are {shape}",
            path="fid",
            hint="leave the option out for this model",
        )


def check_fid(n_images: int, player: playback.Player) -> None:
    """Raise the InputError that `feature_fid` would of these many images, before any is drawn."""
    check_fid_images(n_images)
    if n_images:
        blank = np.zeros((1, *player.sample_shape), np.float32)
        _check_shape(playback.decode(player, blank).shape[1:])


def check_fid_images(n_images: int) -> None:
    """Raise InputError unless there are none, or enough for a covariance of full rank."""
    if 0 < n_images <= FEATURES:
        found = f"feature-FID needs at least {FEATURES + 1} images, got {n_images}"
        raise InputError("EQ-3602", found, path="fid")


def feature_fid(pixels: NDArray[np.uint8]) -> float:
    """Frechet distance of the classifier's features to those of the 10,000 test images.

    Not comparable with Inception-FID. It falls with the number of images, so compare equal numbers.

    Args:
        pixels: uint8 [N, 32, 32, 1], N >= 65 for a covariance of full rank.
    """
    check_fid_images(len(pixels))
    return fid_of_features(garment_features(pixels)[0])


def fid_of_features(features: NDArray[np.float64]) -> float:
    """`feature_fid` of images whose features [N, 64] are known."""
    _, mean, covariance = _classifier()
    return frechet_distance(features.mean(0), np.cov(features, rowvar=False), mean, covariance)


def label_accuracy(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Share of images [N, 32, 32, 1] the classifier gives the label [N] they were asked for."""
    return float((garment_features(pixels)[1] == labels).mean())
