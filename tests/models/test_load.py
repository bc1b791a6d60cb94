"""Loading is exact where the files are right, and one clear error where they are not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeqdm.errors import (
    EdgeqdmError,
    InputError,
    ModelError,
    NumericalError,
    ResourceError,
    UnsupportedError,
)
from edgeqdm.models import load as load_module
from edgeqdm.models import weights
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.layers import network_of
from edgeqdm.models.load import load, reference_names
from edgeqdm.testing import tiny
from edgeqdm.testing.tiny import write_json

WEIGHTS = f"unet/{weights.STANDARD_NAME}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_tiny_unet(tmp_path / "tiny")


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS)


def weights_of(denoiser: Denoiser) -> dict[str, Tensor]:
    return network_of(denoiser.module).state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_unet_is_loaded_as_written(folder: Path) -> None:
    denoiser = load(folder, steps=4)
    expected = tiny.build_network(tiny.UNET_CONFIG).state_dict()
    assert equal(weights_of(denoiser), expected)
    assert not any(p.requires_grad or p.is_meta for p in denoiser.module.parameters())
    assert not denoiser.module.training
    assert denoiser.program.n_steps == 4
    assert denoiser.program.sampler == "DDIMScheduler"


def test_sidecar_tells_labels_licence_and_guidance(folder: Path) -> None:
    edit_json(folder / "edgeqdm.json", guidance=2.5, decoder={"kind": "pixel_shuffle", "factor": 2})
    info = load(folder).info
    assert (info.name, info.family, info.licence) == ("tiny-unet", "UNet2DModel", "Apache-2.0")
    assert info.label_names == ("bag", "boot", "coat")
    assert (info.conditioning.n_labels, info.conditioning.null_label) == (3, 3)
    assert info.decoder.factor == 2
    assert load(folder).guidance.scale == 2.5
    assert load(folder, guidance=1.0).guidance.scale == 1.0


def test_without_sidecar_every_class_is_a_label(folder: Path) -> None:
    (folder / "edgeqdm.json").unlink()
    info = load(folder).info
    assert info.name == "tiny"
    assert (info.conditioning.n_labels, info.conditioning.null_label) == (4, None)


def test_dit_keeps_its_last_class_row_for_no_class(tmp_path: Path) -> None:
    info = load(tiny.write_tiny_dit(tmp_path), guidance=2.0).info
    assert info.family == "DiTTransformer2DModel"
    assert (info.conditioning.n_labels, info.conditioning.null_label) == (3, 3)


def test_conditional_unet_takes_its_embeddings_from_the_caller(tmp_path: Path) -> None:
    folder = tiny.write_tiny_conditional_unet(tmp_path)
    embeddings = tiny.tiny_embeddings(4)
    denoiser = load(folder, conditioning=embeddings.half(), null_conditioning=embeddings[0])
    assert denoiser.info.conditioning.shape == tiny.EMBEDDING_SHAPE
    assert denoiser.conditioning_samples is not None
    assert denoiser.conditioning_samples.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_half_weights_become_float32(folder: Path, dtype: torch.dtype) -> None:
    expected = {k: v.to(dtype).float() for k, v in load_file(folder / WEIGHTS).items()}
    edit_weights(folder, lambda state: state.update({k: v.to(dtype) for k, v in state.items()}))
    assert equal(weights_of(load(folder)), expected)


def split_weights(folder: Path) -> dict[str, str]:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, folder / "unet" / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {}, "weight_map": weight_map})
    return weight_map


def test_sharded_weights_load(folder: Path) -> None:
    expected = weights_of(load(folder))
    split_weights(folder)
    assert equal(weights_of(load(folder)), expected)


def test_old_attention_names_load(folder: Path) -> None:
    expected = weights_of(load(folder))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(state: dict[str, Tensor]) -> None:
        for name in list(state):
            for current, before in old.items():
                if f".{current}." in name:
                    state[name.replace(current, before)] = state.pop(name)

    edit_weights(folder, rename)
    assert any("proj_attn" in name for name in load_file(folder / WEIGHTS))
    assert equal(weights_of(load(folder)), expected)


def test_only_other_weight_name_is_taken(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    load(folder)


def test_network_folder_uses_the_scheduler_beside_it(folder: Path) -> None:
    whole, bare = load(folder), load(folder / "unet")
    assert bare.info == whole.info
    assert bare.program == whole.program


def test_lone_network_folder_takes_a_scheduler(folder: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone" / "net"
    lone.parent.mkdir()
    (folder / "unet").rename(lone)
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    denoiser = load(lone, scheduler=scheduler)
    assert denoiser.info.name == "net"
    assert denoiser.program.sampler == "DDPMScheduler"
    for unknown in (None, "ddim"):
        with pytest.raises(ModelError, match="noise schedule is unknown"):
            load(lone, scheduler=unknown)


def test_scheduler_by_name_keeps_the_training_schedule(folder: Path) -> None:
    program = load(folder, scheduler="ddpm").program
    assert program.sampler == "DDPMScheduler"
    assert program.prediction_type == "v_prediction"
    assert program.settings["beta_schedule"] == "squaredcos_cap_v2"


def test_scheduler_keys_of_a_converted_scheduler_are_known(folder: Path) -> None:
    # Stable Diffusion 1.x ships a PNDM configuration with DDIM's clip_sample in it.
    edit_json(folder / "scheduler/scheduler_config.json", skip_prk_steps=True)
    load(folder)


def test_loading_leaves_files_and_random_state_alone(folder: Path) -> None:
    def digest() -> dict[Path, str]:
        files = (p for p in sorted(folder.rglob("*")) if p.is_file())
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    files, state = digest(), torch.get_rng_state()
    load(folder)
    assert digest() == files
    assert torch.equal(torch.get_rng_state(), state)


def test_fingerprint_follows_weights_and_configuration_only(folder: Path, tmp_path: Path) -> None:
    first = load(folder).info.fingerprint
    assert load(folder, steps=3, guidance=2.0).info.fingerprint == first
    edit_json(folder / "unet/config.json", _diffusers_version="0.0")
    assert load(folder).info.fingerprint == first
    other = load(tiny.write_tiny_unet(tmp_path / "other", seed=1)).info.fingerprint
    edit_json(folder / "unet/config.json", norm_eps=1e-4)
    assert len({first, other, load(folder).info.fingerprint}) == 3


def test_looped_folder_is_not_walked(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    (folder / "unet" / "loop").symlink_to(folder / "unet")
    load(folder / "loop" / "loop")


def test_reference_models_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_tiny_unet(tmp_path / "garments")
    monkeypatch.setattr(load_module, "_reference_folder", lambda: tmp_path)
    assert reference_names() == ("garments",)
    assert load("reference:garments").info.name == "tiny-unet"
    for unknown in ("nothing", "../garments", ""):
        with pytest.raises(ModelError, match="no reference model") as caught:
            load(f"reference:{unknown}")
        assert "garments" in str(caught.value.hint)


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def cast_one(dtype: torch.dtype) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        edit_weights(folder, lambda s: s.update({"conv_in.bias": s["conv_in.bias"].to(dtype)}))

    return spoil


def cast_all(dtype: torch.dtype) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        edit_weights(folder, lambda s: s.update({k: v.to(dtype) for k, v in s.items()}))

    return spoil


def poison(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        edit_weights(folder, lambda state: state["conv_in.weight"][0, 0, 0, :2].fill_(value))

    return spoil


def reshape(folder: Path) -> None:
    edit_weights(folder, lambda s: s.update({"conv_in.weight": s["conv_in.weight"].flatten(1)}))


class Gadget:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    gadget = pickle.dumps(Gadget(folder / "marker"))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(gadget)


def add_code(place: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        marker = str(folder / "marker")
        (folder / place).write_text(f"import os\nos.mkdir({marker!r})\n")

    return spoil


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "unet/config.json", **changes)


def scheduler(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "scheduler/scheduler_config.json", **changes)


def sidecar(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "edgeqdm.json", **changes)


def write(place: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / place).write_text(text)


def remove(place: str) -> Callable[[Path], None]:
    return lambda folder: (folder / place).unlink()


def two_unnamed_files(folder: Path) -> None:
    split_weights(folder)
    (folder / f"{WEIGHTS}.index.json").unlink()


def fifo_for_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def misleading_index(folder: Path) -> None:
    weight_map = split_weights(folder)
    weight_map["conv_in.weight"] = "a.safetensors"
    weight_map["conv_in.bias"] = "a.safetensors"
    write_json(folder / f"{WEIGHTS}.index.json", {"weight_map": weight_map})


def outward_index(folder: Path) -> None:
    split_weights(folder)
    (folder / "unet" / "a.safetensors").rename(folder / "a.safetensors")
    write_json(folder / f"{WEIGHTS}.index.json", {"weight_map": {"x": "../a.safetensors"}})


def index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "model_index.json", **changes)


FAULTS: dict[str, tuple[Callable[[Path], Any], type[EdgeqdmError], str]] = {
    "B1 truncated": (truncate, ModelError, "corrupt or partial download"),
    "B1 empty": (write(WEIGHTS, ""), ModelError, "corrupt or partial download"),
    "B1 no file": (remove(WEIGHTS), ModelError, "no safetensors file"),
    "B1 FIFO": (fifo_for_weights, ModelError, "no safetensors file"),
    "B1 several files": (two_unnamed_files, ModelError, "several weight files"),
    "B1 wrong index": (misleading_index, ModelError, "disagree about conv_in"),
    "B1 index leads out": (outward_index, ModelError, "outside its folder"),
    "B1 index without map": (
        write(f"{WEIGHTS}.index.json", '{"weight_map": 3}'),
        ModelError,
        "no weight_map",
    ),
    "B2 missing": (
        lambda f: edit_weights(f, lambda s: s.pop("conv_in.weight")),
        ModelError,
        r"missing: conv_in\.weight",
    ),
    "B2 missing many": (
        lambda f: edit_weights(f, lambda s: [s.pop(k) for k in sorted(s)[:12]]),
        ModelError,
        "and 2 more",
    ),
    "B3 unexpected": (
        lambda f: edit_weights(f, lambda s: s.update(extra=torch.zeros(1))),
        ModelError,
        "unexpected tensors: extra",
    ),
    "B4 NaN": (poison(float("nan")), NumericalError, r"conv_in\.weight \(2 values\)"),
    "B4 Inf": (poison(float("inf")), NumericalError, r"conv_in\.weight \(2 values\)"),
    "B5 one half": (cast_one(torch.float16), ModelError, r"conv_in\.bias F16"),
    "B5 one int8": (cast_one(torch.int8), ModelError, r"conv_in\.bias I8"),
    "B5 one fp8": (cast_one(torch.float8_e4m3fn), ModelError, r"conv_in\.bias F8_E4M3"),
    "B5 all double": (cast_all(torch.float64), ModelError, "neither float32"),
    "B6 wrong shape": (reshape, ModelError, r"conv_in\.weight \[8, 36\] instead of \[8, 4, 3, 3\]"),
    "B7 B8 pickle": (only_pickle, ModelError, "pickle refused"),
    "B9 pipeline code": (add_code("pipeline.py"), ModelError, "custom code refused: pipeline.py"),
    "B9 network code": (add_code("unet/my_unet.py"), ModelError, "custom code refused"),
    "B9 custom library": (index(unet=["mine", "UNet2DModel"]), ModelError, "custom code refused"),
    "B10 no config": (remove("unet/config.json"), ModelError, "no such file"),
    "B10 bad JSON": (write("unet/config.json", "{"), ModelError, "not valid JSON"),
    "B10 list": (write("unet/config.json", "[]"), ModelError, "must hold one object"),
    "B10 bad index": (write("model_index.json", "{]"), ModelError, "not valid JSON"),
    "B10 no network": (write("model_index.json", '{"vae": 1}'), ModelError, "it names: vae"),
    "B10 other class": (config(_class_name="UNet3D"), ModelError, "UNet3D"),
    "B10 unknown class": (
        lambda f: (config(_class_name="Nope")(f), index(unet=["diffusers", "Nope"])(f)),
        ModelError,
        "unknown class",
    ),
    "B10 unknown key": (config(blok_size=3), ModelError, "unknown key blok_size"),
    "B10 wrong type": (config(block_out_channels="wide"), ModelError, "cannot be built"),
    "B10 no size": (config(sample_size=None), ModelError, "must be positive integers"),
    "B10 negative size": (config(sample_size=-8), ModelError, "must be positive integers"),
    "B11 wide": (config(block_out_channels=[10**9, 10**9]), ResourceError, "memory"),
    "B11 wider": (config(block_out_channels=[2**20, 2**20]), ResourceError, "GiB are free"),
    "B11 deep": (config(layers_per_block=10**9), ResourceError, "1000000000 blocks"),
    "B11 big sample": (config(sample_size=10**8), ResourceError, "GiB are free"),
    "B12 no blocks": (
        config(block_out_channels=[], down_block_types=[], up_block_types=[]),
        ModelError,
        "cannot be built",
    ),
    "B15 odd size": (config(sample_size=7), ModelError, "7 x 7 is not divisible by 2"),
    "B17 beta NaN": (
        write("scheduler/scheduler_config.json", '{"beta_start": NaN}'),
        ModelError,
        "finite",
    ),
    "B17 beta over 1": (scheduler(beta_end=1.5, beta_schedule="linear"), ModelError, "betas"),
    "B17 no training steps": (scheduler(num_train_timesteps=0), ModelError, "timesteps"),
    "B17 prediction type": (scheduler(prediction_type="vv"), ModelError, "vv"),
    "B17 beta schedule": (scheduler(beta_schedule="round"), ModelError, "cannot be built"),
    "B18 unknown key": (scheduler(beta_begin=0.1), ModelError, "unknown key beta_begin"),
    "B18 unknown class": (scheduler(_class_name="Path"), ModelError, "unknown scheduler class"),
    "B18 no file": (remove("scheduler/scheduler_config.json"), ModelError, "no such file"),
    "sidecar key": (sidecar(colour="red"), ModelError, "unknown key"),
    "sidecar label count": (sidecar(n_labels=9), ModelError, "class table of 4 rows"),
    "sidecar null label": (sidecar(null_label=4), ModelError, "class table of 4 rows"),
    "sidecar names": (sidecar(labels=["bag"]), ModelError, "1 label names for 3 labels"),
    "extra input": (config(class_embed_type="timestep"), UnsupportedError, "class_embed_type"),
    "five channels out": (config(out_channels=5), UnsupportedError, "neither a mean nor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_clear_error(folder: Path, fault: str) -> None:
    spoil, error, message = FAULTS[fault]
    spoil(folder)
    started = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        load(folder)
    assert time.monotonic() - started < 10
    assert not (folder / "marker").exists()
    assert caught.value.path
    assert caught.value.code.startswith(f"EQ-{error.exit_code}")


def test_b12_single_block_loads(tmp_path: Path) -> None:
    config = {
        **tiny.UNET_CONFIG,
        "block_out_channels": [8],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "mid_block_type": None,
    }
    denoiser = load(tiny.write_pipeline(tmp_path, tiny.build_network(config), config))
    assert denoiser.info.layers


@pytest.mark.parametrize(
    ("wanted", "found", "trained"),
    [
        (diffusers.DDIMScheduler(prediction_type="epsilon"), '"epsilon"', '"v_prediction"'),
        (
            diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
            '"linear"',
            '"squaredcos_cap_v2"',
        ),
    ],
)
def test_b16_scheduler_of_another_training_is_refused(
    folder: Path, wanted: Any, found: str, trained: str
) -> None:
    with pytest.raises(ModelError) as caught:
        load(folder, scheduler=wanted)
    assert found in caught.value.message
    assert trained in caught.value.message


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_b17_steps_out_of_range_are_refused(folder: Path, steps: int) -> None:
    with pytest.raises(InputError, match=str(steps)):
        load(folder, steps=steps)


def test_unknown_scheduler_name_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="unknown sampler"):
        load(folder, scheduler="fastest")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.zip", "this is an archive"),
        ("model.tar.gz", "this is an archive"),
        ("model.ckpt", "pickle refused"),
        ("model.safetensors", "this is a file"),
    ],
)
def test_file_in_place_of_a_folder_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ModelError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["absent", "a\0b", "n" * 300])
def test_path_that_leads_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError):
        load(tmp_path / name)


def test_b27_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to(tmp_path / "self")
    with pytest.raises(ModelError, match="no such model folder"):
        load(tmp_path / "self")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither model_index"):
        load(tmp_path)


@pytest.mark.parametrize("local_files_only", [True, False])
def test_b29_uncached_hub_model_fails_fast_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_files_only: bool
) -> None:
    # HF_HUB_OFFLINE=1 and HF_HOME are read into these when huggingface_hub is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(ModelError, match="org/name is neither a folder nor in the") as caught:
        load("org/name", local_files_only=local_files_only)
    assert time.monotonic() - started < 10
    assert caught.value.hint


def test_hub_model_is_loaded_from_its_snapshot_without_pickle_or_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append({"id": hub_id, **options})
        if options["local_files_only"]:
            raise OSError("not cached")
        return str(folder)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    (folder / "edgeqdm.json").unlink()
    denoiser = load("org/name", revision="abc", local_files_only=False)
    assert denoiser.info.name == "org/name"
    assert [call["local_files_only"] for call in asked] == [True, False]
    assert all(call["use_safetensors"] is True for call in asked)
    assert all(call["revision"] == "abc" for call in asked)
    assert not any("trust_remote_code" in call for call in asked)


def test_b30_model_beyond_the_free_memory_is_refused_before_it_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "available_memory_bytes", lambda: 100_000)
    with pytest.raises(ResourceError, match=r"0\.0 GiB are free"):
        load(folder)


def test_free_memory_is_plausible() -> None:
    available = weights.available_memory_bytes()
    assert available is None or 2**20 < available < 2**50


def test_guidance_without_null_label_says_what_is_missing(folder: Path) -> None:
    (folder / "edgeqdm.json").unlink()
    with pytest.raises(InputError, match="no label stands for no class"):
        load(folder, guidance=2.0)


def test_embeddings_for_a_label_model_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="takes no embeddings"):
        load(folder, conditioning=tiny.tiny_embeddings(2))


CONDITIONING_FAULTS: dict[str, tuple[dict[str, Any], type[EdgeqdmError], str]] = {
    "none": ({}, InputError, "needs embeddings"),
    "other width": ({"conditioning": torch.zeros(2, 5, 7)}, InputError, r"\[N, L, 12\]"),
    "flat": ({"conditioning": torch.zeros(5, 12)}, InputError, r"\[N, L, 12\]"),
    "empty": ({"conditioning": torch.zeros(0, 5, 12)}, InputError, "not empty"),
    "integers": ({"conditioning": torch.zeros(2, 5, 12).int()}, InputError, "must be float"),
    "no null": (
        {"conditioning": torch.zeros(2, 5, 12), "guidance": 3.0},
        InputError,
        "null_conditioning is missing",
    ),
    "NaN": (
        {"conditioning": torch.full((2, 5, 12), float("nan"))},
        NumericalError,
        "conditioning holds NaN",
    ),
}


@pytest.mark.parametrize("fault", CONDITIONING_FAULTS)
def test_conditioning_fault_is_one_clear_error(tmp_path: Path, fault: str) -> None:
    options, error, message = CONDITIONING_FAULTS[fault]
    folder = tiny.write_tiny_conditional_unet(tmp_path)
    with pytest.raises(error, match=message):
        load(folder, **options)


@pytest.mark.parametrize("key", ["addition_embed_type", "time_cond_proj_dim"])
def test_further_inputs_of_a_conditional_unet_are_unsupported(tmp_path: Path, key: str) -> None:
    folder = tiny.write_tiny_conditional_unet(tmp_path)
    edit_json(folder / "unet/config.json", **{key: "text"})
    with pytest.raises(UnsupportedError, match=key):
        load(folder, conditioning=tiny.tiny_embeddings(2))
