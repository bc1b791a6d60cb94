"""A stored model is the model: same bits out, the bytes it should take, no silent damage."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgeqdm.calibrate.observe import LayerObservation, observe
from edgeqdm.calibrate.trajectories import collect_trajectories
from edgeqdm.emit.package import correction_key
from edgeqdm.errors import InputError, OutputError, StorageError
from edgeqdm.ir.plan import DeploymentPlan
from edgeqdm.ir.precision import FP32, ActivationPolicy, Precision
from edgeqdm.ir.schedule import CorrectedSchedule
from edgeqdm.models.denoiser import Denoiser, wrap
from edgeqdm.numerics.packing import weight_bytes
from edgeqdm.quantize import store
from edgeqdm.quantize.fold import dependence
from edgeqdm.quantize.group_plan import with_group_sizes
from edgeqdm.quantize.plans import default_plan, float_plan, with_activation_bits
from edgeqdm.quantize.quantizer import QuantizedDenoiser, assemble, quantize
from edgeqdm.quantize.store import load_quantized, save_quantized
from edgeqdm.testing.conformance import STEPS, small_denoiser, tiny_quantized

STATIC, TEMPORAL = ActivationPolicy.STATIC, ActivationPolicy.TEMPORAL


@dataclass(frozen=True)
class Seen:
    """A float denoiser and what calibration saw of it."""

    denoiser: Denoiser
    observations: Mapping[str, LayerObservation]

    def plan(self, body: str, activation: ActivationPolicy | None = None) -> DeploymentPlan:
        return default_plan(
            self.denoiser.info,
            "onnxruntime",
            STEPS,
            body=Precision(body),
            activation=activation,
        )

    def quantize(self, plan: DeploymentPlan) -> QuantizedDenoiser:
        return quantize(self.denoiser, plan, self.observations)


@cache
def seen(kind: str) -> Seen:
    denoiser = (
        small_denoiser(DDPMScheduler(clip_sample=False))
        if kind == "small"
        else tiny_quantized(kind).denoiser
    )
    body = tuple(layer.name for layer in denoiser.info.layers if layer.role == "body")
    return Seen(denoiser, observe(denoiser, collect_trajectories(denoiser, 2, seed=1), body))


def predictions(quantized: QuantizedDenoiser) -> list[Tensor]:
    x = torch.randn((2, *quantized.info.sample_shape), generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([0, 2])
    return [quantized.predict(x, step, labels) for step in range(STEPS)]


def content(file: Path) -> tuple[dict[str, str], bytes]:
    """Words and tensors; safetensors writes the words in any order."""
    data = file.read_bytes()
    length = header_length(data)
    return json.loads(data[8 : 8 + length])["__metadata__"], data[8 + length :]


def header_length(data: bytes) -> int:
    return int(struct.unpack("<Q", data[:8])[0])


def assert_same_after_loading(quantized: QuantizedDenoiser, folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_quantized(quantized, file)
    loaded = load_quantized(file, quantized.denoiser)
    found = loaded.quantized
    assert loaded.correction is None
    assert found.plan == quantized.plan
    assert found.tables_sha256 == quantized.tables_sha256
    assert found.parameters.layers.keys() == quantized.parameters.layers.keys()
    for one, other in zip(predictions(found), predictions(quantized), strict=True):
        assert torch.equal(one, other)
    save_quantized(found, folder / "again.safetensors")
    assert content(folder / "again.safetensors") == content(file)
    assert sorted(path.name for path in folder.iterdir()) == [
        "again.safetensors",
        "model.safetensors",
    ]
    return file


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize(
    ("body", "activation"),
    [("w8a8", STATIC), ("w4a8", TEMPORAL), ("w4g32a8dyn", None)],
    ids=["static", "temporal", "dynamic"],
)
def test_every_policy_on_either_network_loads_bit_for_bit(
    kind: str, body: str, activation: ActivationPolicy | None, tmp_path: Path
) -> None:
    """I3: every pair of {static, temporal, dynamic} and {UNet, DiT}."""
    model = seen(kind)
    assert_same_after_loading(model.quantize(model.plan(body, activation)), tmp_path)


@pytest.mark.parametrize(
    "body",
    ["w8a8", "w6a8", "w4a4", "w8a8dyn", "w4a4dyn", "w4g16a8", "w6g16a8dyn", "w8", "w4g32", "fp16"],
)
def test_every_kind_of_precision_loads_bit_for_bit(body: str, tmp_path: Path) -> None:
    """Q8: plan, codes, scales and group sizes."""
    model = seen("small")
    assert_same_after_loading(model.quantize(model.plan(body)), tmp_path)


def test_group_sizes_that_differ_load_bit_for_bit(tmp_path: Path) -> None:
    """Q8: as a search leaves them."""
    model = seen("dit")
    plan = model.plan("w4g64a8dyn")
    grouped = [a.layer for a in plan.phases[0].layers if a.precision.group_size]
    sizes = dict(zip(grouped, cycle((16, 32, 64)), strict=False))
    assert_same_after_loading(model.quantize(with_group_sizes(plan, sizes)), tmp_path)


def test_float_plan_loads_bit_for_bit(tmp_path: Path) -> None:
    model = seen("small")
    plan = float_plan(model.denoiser.info, "onnxruntime", STEPS)
    assert_same_after_loading(model.quantize(plan), tmp_path)


@pytest.mark.parametrize("body", ["w4a8", "w4g16a8dyn"])
def test_phases_load_bit_for_bit_and_share_their_weight_codes(body: str, tmp_path: Path) -> None:
    model = seen("small")
    plan = with_activation_bits(model.plan(body), [4, 4, 8])
    file = assert_same_after_loading(model.quantize(plan), tmp_path)
    stored = {name for name in load_file(file) if name.startswith("codes/")}
    assert len(stored) == 2


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_tables_load_bit_for_bit_and_take_the_place_of_the_weights(
    kind: str, tmp_path: Path
) -> None:
    denoiser = seen(kind).denoiser
    names = dependence(denoiser)
    plan = default_plan(denoiser.info, "onnxruntime", STEPS, body=FP32, tables=names)
    quantized = quantize(denoiser, plan, {})
    held = load_file(assert_same_after_loading(quantized, tmp_path))
    tables = {k.removeprefix("table/") for k in held if k.startswith("table/")}
    assert tables == set(quantized.parameters.tables)
    assert not [k for k in held if k.startswith(tuple(f"float/{name}." for name in names))]


def test_trained_floats_load_bit_for_bit(tmp_path: Path) -> None:
    denoiser = small_denoiser(DDPMScheduler(clip_sample=False))
    model = seen("small")
    parameters = model.quantize(model.plan("w4a8")).parameters
    floats = {
        "norm.weight": torch.full((8,), 1.5),
        "conv.bias": torch.linspace(-1, 1, 8),
        "conv_in.weight": torch.randn(8, 4, 3, 3),
    }
    trained = assemble(denoiser, model.plan("w4a8"), replace(parameters, floats=floats))
    save_quantized(trained, tmp_path / "model.safetensors")
    found = load_quantized(tmp_path / "model.safetensors", model.denoiser).quantized
    assert found.tables_sha256 == trained.tables_sha256
    assert found.parameters.floats.keys() == floats.keys()
    for one, other in zip(predictions(found), predictions(trained), strict=True):
        assert torch.equal(one, other)


def test_a_correction_travels_with_the_model(tmp_path: Path) -> None:
    model = seen("small")
    quantized = model.quantize(model.plan("w8a8"))
    channels = quantized.info.sample_shape[0]
    correction = CorrectedSchedule(
        key=correction_key(quantized),
        gain=(0.9,) * STEPS,
        bias=((0.01,) * channels,) * STEPS,
        noise_std=((0.0,) * channels,) * STEPS,
        clamped=(False,) * STEPS,
    )
    save_quantized(quantized, tmp_path / "model.safetensors", correction=correction)
    found = load_quantized(tmp_path / "model.safetensors", model.denoiser)
    assert found.correction == correction
    assert found.correction.key == correction_key(found.quantized)


WIDTH = 768


class OneLinear(nn.Module):
    """Two float convolutions around one matrix that is nearly all of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, WIDTH, 1, bias=False), nn.Conv2d(WIDTH, 4, 1)
        self.middle = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.first(x).permute(0, 2, 3, 1)
        out: Tensor = self.last(self.middle(hidden).permute(0, 3, 1, 2))
        return out


@pytest.fixture(scope="module")
def one_linear() -> Denoiser:
    example = (torch.zeros(2, 4, 4, 4), torch.tensor([1, 1]))
    return wrap(OneLinear(), DDPMScheduler(clip_sample=False), example, steps=STEPS)


@pytest.mark.parametrize(
    ("text", "bits_per_weight"),
    [
        ("w4", 4 + 32 / WIDTH),
        ("w4g64", 4 + 20 / 64),
        ("w6", 6 + 32 / WIDTH),
        ("w8", 8 + 32 / WIDTH),
        ("fp16", 16),
    ],
)
def test_file_takes_the_bytes_of_the_formula(
    one_linear: Denoiser, text: str, bits_per_weight: float, tmp_path: Path
) -> None:
    """I8: measured on the file, not computed from the precision."""
    precision = Precision(text)
    plan = default_plan(one_linear.info, "eager", STEPS, body=precision)
    file = tmp_path / "model.safetensors"
    returned = save_quantized(quantize(one_linear, plan, {}, ranges="minmax"), file)
    held = load_file(file)
    coded = {k: v for k, v in held.items() if k.split("/")[0] in ("codes", "scale", "zero_point")}
    expected = weight_bytes(WIDTH, WIDTH, precision.weight_bits, precision.group_size)
    assert store.stored_bytes(coded) == expected
    assert expected == pytest.approx(WIDTH * WIDTH * bits_per_weight / 8, rel=0.02)
    rest = store.stored_bytes({k: v for k, v in held.items() if k not in coded})
    assert rest == 4 * (4 * WIDTH + WIDTH + 4 * WIDTH + 4)
    assert returned == expected + rest
    # What is left is the header.
    assert file.stat().st_size == pytest.approx(returned, rel=0.02)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with codes, tables of scales and floats."""
    file = tmp_path_factory.mktemp("store") / "model.safetensors"
    save_quantized(seen("small").quantize(seen("small").plan("w4g16a8")), file)
    return file.read_bytes()


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    file, other = tmp_path / "model.safetensors", tmp_path / "other"
    save_quantized(seen("small").quantize(seen("small").plan("w8a8")), file)
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


def with_metadata(data: bytes, change: Callable[[dict[str, str]], Any]) -> bytes:
    """The file with other words in it and all tensors as they were."""
    length = header_length(data)
    header = json.loads(data[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_unchanged_words_written_again_are_read(saved: bytes, tmp_path: Path) -> None:
    """What the edits below are made with changes nothing by itself."""
    (tmp_path / "model.safetensors").write_bytes(with_metadata(saved, dict))
    load_quantized(tmp_path / "model.safetensors", seen("small").denoiser)


def damaged(data: bytes, tmp_path: Path) -> StorageError:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(StorageError) as caught:
        load_quantized(file, seen("small").denoiser)
    assert caught.value.code == "EQ-6260"
    assert caught.value.path == str(file)
    return caught.value


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_an_edited_tensor_byte_is_found(saved: bytes, place: float, tmp_path: Path) -> None:
    start = 8 + header_length(saved)
    at = start + round(place * (len(saved) - start - 1))
    edited = saved[:at] + bytes([saved[at] ^ 1]) + saved[at + 1 :]
    assert "its content is not what was written" in damaged(edited, tmp_path).message


@pytest.mark.parametrize(
    ("word", "other"),
    [("w4g16a8", "w4g32a8"), ('"guidance": 2.0', '"guidance": 3.0'), ("embed", "embad")],
)
def test_an_edited_header_is_found(saved: bytes, word: str, other: str, tmp_path: Path) -> None:
    def change(metadata: dict[str, str]) -> None:
        assert word in metadata["edgeqdm"]
        metadata["edgeqdm"] = metadata["edgeqdm"].replace(word, other)

    assert "not what was written" in damaged(with_metadata(saved, change), tmp_path).message


@pytest.mark.parametrize("start", ["", "0" * 64, "0" * 64 + " "])
def test_a_changed_checksum_is_found(saved: bytes, start: str, tmp_path: Path) -> None:
    def change(metadata: dict[str, str]) -> None:
        metadata["edgeqdm"] = start + metadata["edgeqdm"].partition(" ")[2]

    damaged(with_metadata(saved, change), tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_found(saved: bytes, kept: float, tmp_path: Path) -> None:
    damaged(saved[: kept if isinstance(kept, int) else round(kept * len(saved))], tmp_path)


def test_a_renamed_tensor_is_found(saved: bytes, tmp_path: Path) -> None:
    damaged(saved.replace(b'"codes/conv/', b'"cades/conv/', 1), tmp_path)


def other_weights() -> Denoiser:
    denoiser = small_denoiser(DDPMScheduler(clip_sample=False))
    return replace(denoiser, info=denoiser.info.model_copy(update={"fingerprint": "f" * 64}))


def test_another_sampler_is_told_by_what_differs(saved: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(saved)
    others = {
        "DDPMScheduler, steps 3 is not DDPMScheduler, steps 4": small_denoiser(
            DDPMScheduler(clip_sample=False), steps=4
        ),
        "DDPMScheduler is not DDIMScheduler": small_denoiser(DDIMScheduler(clip_sample=False)),
    }
    for told, other in others.items():
        with pytest.raises(InputError, match=rf"sampler {told} \("):
            load_quantized(file, other)


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (other_weights, ["model"]),
        (lambda: small_denoiser(DDIMScheduler(clip_sample=False)), ["sampler"]),
        (lambda: small_denoiser(DDPMScheduler(clip_sample=False), steps=4), ["sampler"]),
        (lambda: small_denoiser(DDPMScheduler(clip_sample=False), guidance=3.5), ["guidance"]),
        (
            lambda: small_denoiser(DDIMScheduler(clip_sample=False), guidance=3.5),
            ["sampler", "guidance"],
        ),
    ],
    ids=["model", "sampler", "steps", "guidance", "both"],
)
def test_a_file_made_from_something_else_is_refused_naming_what_differs(
    saved: bytes, made: Callable[[], Denoiser], named: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(saved)
    with pytest.raises(InputError) as caught:
        load_quantized(file, made())
    assert caught.value.code == "EQ-3262"
    for word in ("model", "sampler", "guidance"):
        assert (f"{word} " in caught.value.message) == (word in named)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_quantized(tmp_path / "no.safetensors", seen("small").denoiser)
    assert caught.value.code == "EQ-3260"


def test_another_safetensors_file_is_an_input_error(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError) as caught:
        load_quantized(tmp_path / "other.safetensors", seen("small").denoiser)
    assert caught.value.code == "EQ-3261"


@pytest.fixture
def small() -> QuantizedDenoiser:
    return seen("small").quantize(seen("small").plan("w8"))


def test_a_failed_write_leaves_the_file_that_was_there(
    small: QuantizedDenoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left")

    file = tmp_path / "model.safetensors"
    file.write_bytes(b"before")
    monkeypatch.setattr(store, "save_file", fail)
    with pytest.raises(OutputError, match="no space left") as caught:
        save_quantized(small, file)
    assert caught.value.code == "EQ-7202"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == b"before"


def test_a_folder_in_the_way_leaves_nothing_behind(
    small: QuantizedDenoiser, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OutputError):
        save_quantized(small, tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_in_place_of_the_folder_is_an_output_error(
    small: QuantizedDenoiser, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(OutputError):
        save_quantized(small, tmp_path / "taken" / "model.safetensors")


def test_folders_above_the_file_are_made_and_the_file_is_replaced(
    small: QuantizedDenoiser, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "folder" / "model.safetensors"
    for _ in range(2):
        save_quantized(small, file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    load_quantized(file, seen("small").denoiser)


def test_the_float_model_is_left_as_it_was(small: QuantizedDenoiser, tmp_path: Path) -> None:
    before = copy.deepcopy(small.denoiser.module.state_dict())
    save_quantized(small, tmp_path / "model.safetensors")
    load_quantized(tmp_path / "model.safetensors", small.denoiser)
    after = small.denoiser.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
