"""Train the reference models on Fashion-MNIST and write them as diffusers folders.

    python tools/train_reference.py classifier --data fashion_mnist.npz --work build/reference
    python tools/train_reference.py unet --data fashion_mnist.npz --work build/reference
    python tools/train_reference.py dit --data fashion_mnist.npz --work build/reference
    python tools/train_reference.py export --data fashion_mnist.npz --work build/reference

The last one writes what is shipped, `edgeqdm/models/reference/`: diffusers folders with fp16
weights, the classifier with its feature statistics, sample sheets and model cards with measured
figures. Each training command uses one thread, logs one line a minute, writes a checkpoint every
five minutes and continues from it when it is run again. The number of images alone fixes the
learning-rate schedule, so an interrupted run sees the same schedule as an uninterrupted one.

The data is `fashion_mnist.npz` (x_train, y_train, x_test, y_test) or the folder that holds the four
original `*-ubyte.gz` files (Zalando Research, MIT licence). Images are padded to 32 x 32, scaled to
[-1, 1] and folded by a lossless 2 x 2 pixel-unshuffle to 4 x 16 x 16, which costs about a third of
the full-size image.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgeqdm import load
from edgeqdm.bench.compare import conditioning_for, draw, float_predictor
from edgeqdm.bench.quality import feature_fid, label_accuracy
from edgeqdm.emit import playback
from edgeqdm.models.denoiser import Denoiser
from edgeqdm.models.reference.classifier import GarmentClassifier
from edgeqdm.numerics import solver

N_CLASSES = 10
NULL_LABEL = 10
TRAIN_TIMESTEPS = 1000
BATCH = 64
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.999
PEAK_LEARNING_RATE = {"unet": 1.5e-3, "dit": 1.2e-3, "classifier": 3e-3}
GUIDANCE = {"unet": 2.0, "dit": 1.5}
IMAGES = {"unet": 420_000, "dit": 330_000, "classifier": 480_000}
LOG_SECONDS = 60.0
CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True)
class GarmentData:
    """Fashion-MNIST; images float32 [N, 1, 32, 32] in [-1, 1], labels int64 [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(path: Path) -> GarmentData:
    """Read `fashion_mnist.npz` or a folder with the four original idx `.gz` files."""
    if path.is_dir():
        arrays = {
            "x_train": _read_idx(path / "train-images-idx3-ubyte.gz"),
            "y_train": _read_idx(path / "train-labels-idx1-ubyte.gz"),
            "x_test": _read_idx(path / "t10k-images-idx3-ubyte.gz"),
            "y_test": _read_idx(path / "t10k-labels-idx1-ubyte.gz"),
        }
    else:
        arrays = dict(np.load(path))
    return GarmentData(
        _to_images(arrays["x_train"]),
        torch.from_numpy(arrays["y_train"].astype(np.int64)),
        _to_images(arrays["x_test"]),
        torch.from_numpy(arrays["y_test"].astype(np.int64)),
    )


def _read_idx(path: Path) -> np.ndarray:
    data = gzip.decompress(path.read_bytes())
    n_dims = data[3]
    shape = np.frombuffer(data, ">u4", count=n_dims, offset=4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * n_dims).reshape(shape)


def _to_images(pixels: np.ndarray) -> Tensor:
    images = torch.from_numpy(pixels.copy()).float().div(127.5).sub(1.0)
    return F.pad(images[:, None], (2, 2, 2, 2), value=-1.0)


def build_denoiser(name: str) -> UNet2DModel | DiTTransformer2DModel:
    """The untrained reference denoiser on 4 x 16 x 16, with one extra label for "no class"."""
    if name == "unet":
        return UNet2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=32,
            num_class_embeds=N_CLASSES + 1,
        )
    model = DiTTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=4,
        num_attention_heads=6,
        attention_head_dim=32,
        num_embeds_ada_norm=N_CLASSES,
        norm_eps=1e-6,
    )
    _zero_adaptive_norms(model)
    return model


def _zero_adaptive_norms(model: DiTTransformer2DModel) -> None:
    # adaLN-Zero (Peebles & Xie 2023, section 3.2): every block starts as the identity.
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        # diffusers drops labels in every block independently; one draw per sample is wanted.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)


def build_scheduler() -> DDIMScheduler:
    """v-prediction on the cosine schedule, the pair that samples well in 20 DDIM steps."""
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def denoising_loss(
    model: nn.Module, clean: Tensor, labels: Tensor, alpha_bar: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted velocity (Salimans & Ho 2022, appendix D)."""
    batch = clean.shape[0]
    t = torch.randint(0, TRAIN_TIMESTEPS, (batch,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    signal = alpha_bar[t].sqrt()[:, None, None, None]
    sigma = (1 - alpha_bar[t]).sqrt()[:, None, None, None]
    dropped = torch.rand(batch, generator=generator) < LABEL_DROPOUT
    predicted = model(
        signal * clean + sigma * noise,
        t,
        class_labels=torch.where(dropped, NULL_LABEL, labels),
        return_dict=False,
    )[0]
    return F.mse_loss(predicted, signal * noise - sigma * clean)


def classifier_loss(
    model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Cross-entropy on images shifted by up to two pixels and mirrored."""
    dy, dx = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    images = torch.roll(images, (dy, dx), dims=(2, 3))
    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(3)
    return F.cross_entropy(model(images), labels, label_smoothing=0.05)


class ExponentialAverage:
    """Exponential moving average of a model's state, with the usual warm-up of the decay."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - decay)
            else:
                self.state[key].copy_(value)


def _epochs(n_images: int, skip: int, seed: int) -> Iterator[Tensor]:
    # Batch k of epoch e is a function of (seed, e, k) alone, so a resumed run sees the same order.
    per_epoch = n_images // BATCH
    epoch, start = divmod(skip, per_epoch)
    while True:
        order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed + epoch))
        for k in range(start, per_epoch):
            yield order[k * BATCH : (k + 1) * BATCH]
        epoch, start = epoch + 1, 0


def train(name: str, data: GarmentData, work: Path, n_images: int, seed: int) -> Path:
    """Train one model; returns the file of its averaged float32 weights."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, final = work / f"{name}.ckpt", work / f"{name}.final.pt"
    model = GarmentClassifier() if name == "classifier" else build_denoiser(name)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=PEAK_LEARNING_RATE[name],
        weight_decay=5e-4 if name == "classifier" else 0.0,
    )
    average = ExponentialAverage(model)
    n_steps, step, seconds = n_images // BATCH, 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.state = saved["average"]
        step, seconds = saved["step"], saved["seconds"]
        print(f"{name}: resumed at step {step}/{n_steps}", flush=True)
    inputs = data.train_images if name == "classifier" else F.pixel_unshuffle(data.train_images, 2)
    alpha_bar = build_scheduler().alphas_cumprod
    model.train()
    started = logged = saved_at = time.monotonic()
    losses: list[float] = []
    first_step = step
    for index in _epochs(len(inputs), step, seed):
        if step >= n_steps:
            break
        warm_up = min(1.0, (step + 1) / 300)
        for group in optimizer.param_groups:
            anneal = 0.5 * (1 + math.cos(math.pi * step / n_steps))
            group["lr"] = PEAK_LEARNING_RATE[name] * warm_up * anneal
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        torch.manual_seed(seed * 1_000_003 + step)
        if name == "classifier":
            loss = classifier_loss(model, inputs[index], data.train_labels[index], generator)
        else:
            labels = data.train_labels[index]
            loss = denoising_loss(model, inputs[index], labels, alpha_bar, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        average.update(model, step)
        losses.append(float(loss.detach()))
        now = time.monotonic()
        if now - logged > LOG_SECONDS:
            rate = (step - first_step) * BATCH / (now - started)
            eta = (n_steps - step) * BATCH / rate
            print(
                f"{name}: step {step}/{n_steps} loss {np.mean(losses):.4f} "
                f"{rate:.0f} images/s ETA {eta / 60:.0f} min",
                flush=True,
            )
            logged, losses = now, []
        if now - saved_at > CHECKPOINT_SECONDS or step == n_steps:
            _save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.state,
                    "step": step,
                    "seconds": seconds + now - started,
                },
                checkpoint,
            )
            saved_at = now
    spent = seconds + time.monotonic() - started
    record = {"state": average.state, "images": step * BATCH, "seconds": spent, "seed": seed}
    _save(record, final)
    print(f"{name}: done, {spent / 60:.0f} min, {final}", flush=True)
    return final


def _save(value: dict[str, object], path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)


REFERENCE = Path(__file__).resolve().parents[1] / "edgeqdm" / "models" / "reference"
LABELS = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SAMPLE_SEED = 2024
SHEET_ROWS = 6


def export_classifier(data: GarmentData, work: Path) -> float:
    """Write the classifier with the feature statistics of the test images; returns its accuracy."""
    state = torch.load(work / "classifier.final.pt", weights_only=True)["state"]
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    network = GarmentClassifier()
    # The statistics belong to the weights as shipped, so they are rounded first.
    rounded = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    network.load_state_dict(rounded)
    network.eval()
    with torch.no_grad():
        parts = [network.features(batch) for batch in data.test_images.split(500)]
        features = torch.cat(parts)
        accuracy = (network.head(features).argmax(1) == data.test_labels).float().mean()
    tensors["test_features.mean"] = features.double().mean(0).float()
    tensors["test_features.covariance"] = torch.cov(features.double().T).float()
    save_file(tensors, REFERENCE / "garments.safetensors")
    return float(accuracy)


def export_denoiser(name: str, work: Path) -> Path:
    """Write one denoiser as a diffusers folder with fp16 weights."""
    folder = REFERENCE / f"{name}-fmnist"
    part = "unet" if name == "unet" else "transformer"
    model = build_denoiser(name)
    model.load_state_dict(torch.load(work / f"{name}.final.pt", weights_only=True)["state"])
    model.half().save_pretrained(folder / part)
    build_scheduler().save_pretrained(folder / "scheduler")
    index: dict[str, object] = {
        "_class_name": "DDIMPipeline" if name == "unet" else "DiTPipeline",
        part: ["diffusers", type(model).__name__],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    _write_json(folder / "model_index.json", index)
    sidecar = {
        "name": f"{name}-fmnist",
        "n_labels": N_CLASSES,
        "labels": list(LABELS),
        "null_label": NULL_LABEL,
        "decoder": {"kind": "pixel_shuffle", "factor": 2},
        "guidance": GUIDANCE[name],
        "licence": "Apache-2.0",
    }
    _write_json(folder / "edgeqdm.json", sidecar)
    return folder


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def sample_pixels(denoiser: Denoiser, n_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 32, 32, 1] and labels [N] of the float model's own sampler."""
    info = denoiser.info
    player = playback.Player(
        table=solver.Table.from_json(denoiser.program.model_dump(mode="json")),
        guidance=denoiser.guidance.scale,
        conditioning=info.conditioning.model_dump(mode="json"),
        decoder=info.decoder.model_dump(mode="json"),
        sample_shape=info.sample_shape,
        label_names=info.label_names,
        null_embedding=None,
        golden_noise_rms=(),
    )
    labels = conditioning_for(denoiser, n_images, SAMPLE_SEED)
    assert labels is not None
    samples = draw(player, float_predictor(denoiser), labels, n_images, SAMPLE_SEED)
    return playback.decode(player, samples), labels


def write_card(name: str, work: Path, n_images: int, real: dict[str, float]) -> None:
    """Sample, measure and write the model card with its sample sheet."""
    folder = REFERENCE / f"{name}-fmnist"
    record = torch.load(work / f"{name}.final.pt", weights_only=True)
    rows = []
    for steps in (20, 50):
        denoiser = load(f"reference:{name}-fmnist", steps=steps)
        pixels, labels = sample_pixels(denoiser, n_images)
        accuracy, fid = label_accuracy(pixels, labels), feature_fid(pixels)
        rows.append(f"| DDIM {steps} | {accuracy:.3f} | {fid:.2f} |")
        print(f"{name}: DDIM {steps}, accuracy {accuracy:.3f}, feature-FID {fid:.2f}", flush=True)
        if steps == 20:
            order = np.argsort(labels, kind="stable").reshape(N_CLASSES, -1)[:, :SHEET_ROWS].T
            sheet = playback.sheet(pixels[order.ravel()].repeat(2, 1).repeat(2, 2), N_CLASSES)
            (folder / "samples.png").write_bytes(playback.png(sheet))
    model = build_denoiser(name)
    card = CARD.format(
        name=f"{name}-fmnist",
        family=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        guidance=GUIDANCE[name],
        n_images=n_images,
        rows="\n".join(rows),
        real_accuracy=real["accuracy"],
        real_fid=real["fid"],
        what=name,
        images=record["images"],
        minutes=record["seconds"] / 60,
        commit=record.get("commit", _commit_of_training()),
        machine=f"{platform.machine()}, one core of two",
        torch=torch.__version__,
        labels=", ".join(LABELS),
    )
    (folder / "README.md").write_text(card)


def _commit_of_training() -> str:
    found = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--diff-filter=A", "--", __file__],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip()


CARD = """---
license: apache-2.0
library_name: diffusers
---
# {name}

A small class-conditional `{family}` ({parameters:.2f} M parameters) that draws Fashion-MNIST
garments: the embedded reference model of edgeqdm, for demonstrations, tests and benchmarks. It is
not meant for anything else.

It denoises 4 x 16 x 16, the lossless 2 x 2 pixel-unshuffle of the 32 x 32 padded grey image, with
v-prediction on the cosine schedule (1000 training timesteps, trailing spacing). Labels 0..9 are
{labels}; label 10 means "no class" and was shown for 10 % of the training images. The shipped
guidance is {guidance}. Weights are the exponential moving average, stored as fp16.

![samples, one column per label](samples.png)

## Figures

{n_images} images each, guidance {guidance}; accuracy is that of the shipped classifier
on the label asked for, feature-FID the Frechet distance in its 64 features to the 10,000 test
images (not comparable with Inception-FID).

| sampler | class accuracy | feature-FID |
|---|---|---|
{rows}
| real test images | {real_accuracy:.3f} | {real_fid:.2f} |

## Training

    python tools/train_reference.py {what} --data fashion_mnist.npz

{images} images, batch 64, AdamW with cosine annealing, EMA 0.999, seed 0; {minutes:.0f} minutes of
wall time on {machine}, shared with other work; torch {torch}, commit {commit}.

## Data

Fashion-MNIST, Zalando Research, MIT licence, https://github.com/zalandoresearch/fashion-mnist.
The data set itself is not part of this package.
"""


def export(data: GarmentData, work: Path, n_images: int) -> None:
    """Write everything that is shipped."""
    accuracy = export_classifier(data, work)
    pixels = ((data.test_images[:n_images] + 1) * 127.5).round().to(torch.uint8)
    real = {"accuracy": accuracy, "fid": feature_fid(pixels.permute(0, 2, 3, 1).numpy())}
    print(f"classifier: accuracy {accuracy:.3f}, feature-FID of real images {real['fid']:.2f}")
    for name in ("unet", "dit"):
        export_denoiser(name, work)
        write_card(name, work, n_images, real)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["unet", "dit", "classifier", "export"])
    parser.add_argument("--data", type=Path, required=True, help="npz file or folder of .gz files")
    parser.add_argument("--work", type=Path, default=Path("build/reference"))
    parser.add_argument("--images", type=int, help="images to train on (default: as shipped)")
    parser.add_argument("--samples", type=int, default=500, help="images behind the card's figures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    data = load_data(arguments.data)
    if arguments.what == "export":
        export(data, arguments.work, arguments.samples)
        return
    n_images = arguments.images or IMAGES[arguments.what]
    train(arguments.what, data, arguments.work, n_images, arguments.seed)


if __name__ == "__main__":
    main()
