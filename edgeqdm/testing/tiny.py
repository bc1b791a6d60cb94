"""Tiny denoisers with random weights, written as diffusers folders.

Each has every kind of layer that its big relative has and runs in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeqdm.models.load import FAMILIES, SIDECAR
from edgeqdm.models.weights import STANDARD_NAME

N_LABELS = 3
NULL_LABEL = 3
"""The fourth row of the class table of the tiny UNet and DiT."""
EMBEDDING_SHAPE = (5, 12)
"""[L, D] of the tiny conditional UNet."""

UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "num_class_embeds": N_LABELS + 1,
}
DIT_CONFIG: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_embeds_ada_norm": N_LABELS,
}
CONDITIONAL_UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": EMBEDDING_SHAPE[1],
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
_LABEL_SIDECAR = {
    "name": "tiny-unet",
    "n_labels": N_LABELS,
    "labels": ["bag", "boot", "coat"],
    "null_label": NULL_LABEL,
    "licence": "Apache-2.0",
}


def write_tiny_unet(folder: Path, *, seed: int = 0) -> Path:
    """A class-conditional `UNet2DModel` on 4 x 8 x 8 with attention; returns `folder`."""
    network = build_network(UNET_CONFIG, seed=seed)
    return write_pipeline(folder, network, UNET_CONFIG, sidecar=_LABEL_SIDECAR)


def write_tiny_dit(folder: Path, *, seed: int = 0) -> Path:
    """A class-conditional `DiTTransformer2DModel` on 4 x 8 x 8; returns `folder`."""
    return write_pipeline(folder, build_network(DIT_CONFIG, seed=seed), DIT_CONFIG)


def write_tiny_conditional_unet(folder: Path, *, seed: int = 0) -> Path:
    """A `UNet2DConditionModel` on 4 x 8 x 8 and embeddings [5, 12]; returns `folder`."""
    network = build_network(CONDITIONAL_UNET_CONFIG, seed=seed)
    return write_pipeline(folder, network, CONDITIONAL_UNET_CONFIG)


def tiny_embeddings(n: int, *, seed: int = 0) -> Tensor:
    """Random embeddings for the tiny conditional UNet, float32 [n, 5, 12]."""
    return torch.randn((n, *EMBEDDING_SHAPE), generator=torch.Generator().manual_seed(seed))


def build_network(config: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """The diffusers module of a configuration with the library's own random weights."""
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = FAMILIES[config["_class_name"]](**arguments)
    return network.eval()


def write_pipeline(
    folder: Path,
    network: nn.Module,
    config: Mapping[str, Any],
    *,
    scheduler: Mapping[str, Any] = SCHEDULER_CONFIG,
    sidecar: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network and a scheduler configuration as a diffusers pipeline; returns `folder`."""
    part = "transformer" if config["_class_name"] == "DiTTransformer2DModel" else "unet"
    index = {
        "_class_name": "DiffusionPipeline",
        part: ["diffusers", config["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    write_json(folder / "model_index.json", index)
    write_json(folder / part / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if sidecar is not None:
        write_json(folder / SIDECAR, sidecar)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / part / STANDARD_NAME)
    return folder


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
