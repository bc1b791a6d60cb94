"""What each method buys: rows of methods added one after the other, for every model and width.

    python tools/benchmarks/ablation.py -o docs/benchmarks/ablation.json --jobs 2

Images are drawn with the exact integer reference of a quantized network, whatever a target can run.
Every row is computed in a process of its own, so that its peak memory is its own; finished rows are
kept in the output file and not computed again. Image SQNR is that of free runs against the float
model from equal noise, over several seeds; a row whose change against the row before lies inside
the spread over seeds is marked. No figure here is a latency. A page of tables and a figure are
written beside the output file.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import reports
import typer

MODELS = ("unet-fmnist", "dit-fmnist")
WIDTHS = ("w8a8", "w4a8", "w4a4")
ETAS = (0.0, 1.0)
STEPS = 20
RUNS = 64
TRAINING_RUNS = 192
SELECTED = 512
IMAGE_SEEDS = (2**48, 2**48 + 1, 2**48 + 2)
PREFACE = """\
Made by `tools/benchmarks/ablation.py` on {cpu}, {system}, one thread per row, at {commits}. DDIM,
{steps} steps.

- Image SQNR: free runs against the float model from equal noise, {images} images for each of
  {seeds} seeds; mean, and largest less smallest.
- Change: seed by seed against the row above or the one named, mean and standard deviation;
  inside the spread where the mean is within twice its standard error of 0.
- Median: SQNR of the median image.
- Step SQNR: of one evaluation, at the worst step.
- FID: {fid} images, features of a garment classifier; its change against float, and the standard
  deviation of that change where images are drawn again with replacement.
- Bytes: weights as stored, as a share of float32.
- Minutes: CPU time of quantizing; {iterations} iterations per block, {minutes:g} minutes of
  training.
- Peak: resident MB of the whole row.
- A commit that is -dirty had changes that were not committed."""
FID_SEED = 2**48 + 10
CALIBRATION_SEED = 0
RESAMPLED = 100


@dataclass(frozen=True)
class Row:
    """One set of methods.

    Attributes:
        name: for the table.
        ranges: `minmax` or `search`.
        groups: group linear weights by 64 input channels.
        fine: 8-bit weights at the finest resolution of a UNet.
        policy: of activations: `static`, `temporal`, or `dynamic` in linear layers.
        reconstruct: None, or which samples: `even` or `density`.
        correct: parts of PTQD.
        matched: keep the variance of the float model's samples.
        step_aware: 4-bit activations only where the rule allows them.
        tuned: trained on the float model's trajectories.
        after: row it is compared with; default the one before.
    """

    name: str
    ranges: str = "search"
    groups: bool = True
    fine: bool = True
    policy: str = "temporal"
    reconstruct: str | None = None
    correct: tuple[str, ...] = ()
    matched: bool = False
    step_aware: bool = False
    tuned: bool = False
    after: str | None = None


def rows_of(model: str, width: str) -> tuple[Row, ...]:
    """The ladder of one model and width."""
    # Group scales pay for run-time activation scales in transformers; convolutions have neither.
    policy = "dynamic" if model.startswith("dit") else "temporal"
    parts = ("gain", "bias", "variance")
    # Transformers have one resolution, and 8 bits are wide already.
    fine = model.startswith("unet") and width != "w8a8"
    static = "+ 8 bits at the finest resolution" if fine else "+ groups"
    ladder = [
        Row(
            "round to nearest, min-max",
            ranges="minmax",
            groups=False,
            fine=False,
            policy="static",
        ),
        Row("+ range search", groups=False, fine=False, policy="static"),
        Row("+ groups", fine=False, policy="static"),
        *([Row(static, policy="static")] if fine else []),
        Row("+ temporal scales", policy="temporal"),
        Row("+ dynamic activations", policy="dynamic", after=static),
        Row(
            "+ reconstruction, even samples",
            policy=policy,
            reconstruct="even",
            after="+ dynamic activations" if policy == "dynamic" else "+ temporal scales",
        ),
        Row("+ samples by density and diversity", policy=policy, reconstruct="density"),
        *(
            Row(f"+ PTQD {part}", policy=policy, reconstruct="density", correct=parts[: k + 1])
            for k, part in enumerate(parts)
        ),
    ]
    last = replace(ladder[-1], name="+ matched variance", matched=True)
    ladder += [last, replace(last, name="+ training", tuned=True)]
    if width == "w4a4":
        by_step = replace(last, name="+ bits by step", step_aware=True, after=last.name)
        trained = replace(by_step, name="+ bits by step, training", tuned=True, after=None)
        ladder += [by_step, trained]
    return tuple(ladder)


def key_of(model: str, width: str, eta: float, row: Row) -> str:
    return f"{model}/{width}/eta {eta:g}/{row.name}"


def compute(
    model: str, width: str, eta: float, row: Row, work: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Quantize as the row says and measure; runs in a process of its own."""
    import torch

    from edgeqdm import load, pipeline
    from edgeqdm.calibrate.trajectories import collect_trajectories
    from edgeqdm.correct.corrector import Ptqd
    from edgeqdm.quantize.finetune import FinetuneSettings
    from edgeqdm.quantize.store import save_quantized

    torch.set_num_threads(1)
    denoiser = load(f"reference:{model}", steps=STEPS, eta=eta)
    work = work / f"{model}-{eta:g}"
    calibration = pipeline.calibrate(denoiser, samples=RUNS, seed=CALIBRATION_SEED, work=work)
    found, minutes = quantize_timed(denoiser, calibration, width, row, work, options)
    if row.tuned:
        seen = collect_trajectories(denoiser, TRAINING_RUNS, seed=CALIBRATION_SEED + 1, work=work)
        settings = FinetuneSettings(minutes=options["minutes"])
        found = pipeline.finetune(found, seen, settings=settings, work=work)
        assert found.training is not None
        minutes += found.training.seconds / 60
    quantized, trajectories = found.quantized, calibration.trajectories
    statistics = pipeline.measure(quantized, trajectories, work=work)
    correction = None
    if row.correct:
        corrector = Ptqd(**{part: part in row.correct for part in ("gain", "bias", "variance")})
        correction = pipeline.correct(
            quantized, trajectories, corrector=corrector, matched=row.matched, work=work
        )
    file = work / f"row-{os.getpid()}.safetensors"
    stored = save_quantized(quantized, file)
    file.unlink()
    whole = sum(p.numel() * p.element_size() for p in denoiser.module.state_dict().values())
    result = {
        "output_sqnr_db": min(statistics.snr_db),
        "weight_bytes": stored,
        "weight_share": stored / whole,
        "quantization_cpu_minutes": minutes,
        "phases": [[p.start, p.stop] for p in quantized.plan.phases],
        "blocks": [asdict(block) for block in found.blocks],
        **measure_images(quantized, correction, work, options),
    }
    if fid_wanted(model, width, eta, row):
        result |= measure_fid(denoiser, quantized, correction, work, options["fid"])
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def quantize_timed(
    denoiser: Any, calibration: Any, width: str, row: Row, work: Path, options: dict[str, Any]
) -> tuple[Any, float]:
    """The network before training, and the CPU minutes it takes.

    Blocks and samples that another row or an earlier run has finished are reused, and count as if
    they had been made here.
    """
    from edgeqdm import pipeline
    from edgeqdm.quantize.reconstruct import ReconstructionSettings

    settings = ReconstructionSettings(iterations=options["iterations"], batch=options["batch"])
    method = pipeline.Method(
        ranges=row.ranges,  # type: ignore[arg-type]
        reconstruction=settings if row.reconstruct else None,
        selected=SELECTED,
        density=row.reconstruct == "density",
    )
    start = time.process_time()
    plan = plan_of(denoiser, width, row)
    if row.step_aware:
        plan = pipeline.step_aware_plan(denoiser, calibration, plan)
    planned = time.process_time() - start
    if row.reconstruct:
        planned += select_timed(denoiser, calibration, method, work)
        pipeline.quantize(denoiser, calibration, plan=plan, method=method, work=work)
    start = time.process_time()
    # Blocks are all finished now, and tell their own time, whichever row paid it.
    found = pipeline.quantize(denoiser, calibration, plan=plan, method=method, work=work)
    rest = time.process_time() - start
    return found, (planned + rest + sum(block.seconds for block in found.blocks)) / 60


def select_timed(denoiser: Any, calibration: Any, method: Any, work: Path) -> float:
    """CPU seconds of choosing samples, which is done once and kept with its time."""
    from edgeqdm import pipeline

    told = work / f"selection-{'density' if method.density else 'even'}.seconds"
    if not told.exists():
        start = time.process_time()
        pipeline.select_samples(denoiser, calibration, method)
        told.write_text(str(time.process_time() - start))
    return float(told.read_text())


def plan_of(denoiser: Any, width: str, row: Row) -> Any:
    """The plan of a row: one body width, float ends, coded embeddings."""
    from edgeqdm import pipeline
    from edgeqdm.ir.precision import ActivationPolicy, Precision

    bits, activation = width[1], width[3]
    group = "g64" if row.groups else ""
    body = Precision(f"w{bits}{group}a{activation}{'dyn' if row.policy == 'dynamic' else ''}")
    policy = ActivationPolicy.STATIC if row.policy == "static" else None
    embedding = "w8" if width == "w8a8" or "unet" in denoiser.info.name else "w4g64"
    return pipeline.rule_plan(
        denoiser, body=body, embedding=Precision(embedding), fine=row.fine, activation=policy
    )


def fid_wanted(model: str, width: str, eta: float, row: Row) -> bool:
    """The first row and the last one.

    Without step noise also the other finished ones, and every baseline of 4-bit activations.
    """
    ladder = rows_of(model, width)
    if row in (ladder[0], ladder[-1]):
        return True
    baseline = width == "w4a4" and row.reconstruct is None
    # A transformer with 4-bit activations everywhere is a step of the ladder.
    finished = row.matched and (width != "w4a4" or row.step_aware or model.startswith("unet"))
    return eta == 0 and (baseline or finished)


def measure_images(
    quantized: Any, correction: Any, work: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Image SQNR of every seed, of all images together and of the median image.

    The first is decided by the few images that end somewhere else altogether.
    """
    from edgeqdm.bench.compare import (
        conditioning_for,
        draw,
        float_predictor,
        player_of,
        reference_predictor,
    )
    from edgeqdm.bench.quality import sqnr_db

    denoiser, images = quantized.denoiser, options["images"]
    found, medians = [], []
    for seed in IMAGE_SEEDS:
        fed = conditioning_for(denoiser, images, seed)
        file = work / f"images-{named_after(denoiser)}-{images}-{seed}.npy"
        if not file.exists():
            reference = draw(player_of(denoiser), float_predictor(denoiser), fed, images, seed)
            partial = work / f"images-{os.getpid()}.npy"
            np.save(partial, reference)
            partial.replace(file)
        drawn = draw(
            player_of(denoiser, correction), reference_predictor(quantized), fed, images, seed
        )
        wanted = np.load(file)
        found.append(sqnr_db(wanted, drawn))
        medians.append(
            float(np.median([sqnr_db(*pair) for pair in zip(wanted, drawn, strict=True)]))
        )
    return {
        "image_sqnr_db": found,
        "image_sqnr_mean_db": float(np.mean(found)),
        "image_sqnr_spread_db": float(np.max(found) - np.min(found)),
        "median_image_sqnr_db": medians,
    }


def measure_fid(
    denoiser: Any, quantized: Any | None, correction: Any, work: Path, images: int
) -> dict[str, float]:
    """Feature-FID of the quantized model, or of the float one where there is none.

    With the features of the float model's images at hand, also the relative change, and what it
    varies by where images are drawn again with replacement, the same ones for both models.
    """
    from edgeqdm.bench.compare import (
        conditioning_for,
        draw,
        float_predictor,
        player_of,
        reference_predictor,
    )
    from edgeqdm.bench.quality import fid_of_features, garment_features
    from edgeqdm.emit import playback

    player = player_of(denoiser, correction)
    evaluate = float_predictor(denoiser) if quantized is None else reference_predictor(quantized)
    fed = conditioning_for(denoiser, images, FID_SEED)
    drawn = draw(player, evaluate, fed, images, FID_SEED)
    features, _ = garment_features(playback.decode(player, drawn))
    found = {"feature_fid": fid_of_features(features)}
    kept = work / f"features-{named_after(denoiser)}-{images}.npy"
    if quantized is None:
        work.mkdir(parents=True, exist_ok=True)
        np.save(kept, features)
    elif kept.exists():
        reference, chance = np.load(kept), np.random.default_rng(0)
        found["feature_fid_change"] = found["feature_fid"] / fid_of_features(reference) - 1
        again = [chance.integers(0, images, images) for _ in range(RESAMPLED)]
        changes = [fid_of_features(features[k]) / fid_of_features(reference[k]) for k in again]
        found["feature_fid_change_spread"] = float(np.std(changes))
    return found


def named_after(denoiser: Any) -> str:
    """Tells models and samplers apart in names of files."""
    from edgeqdm.ir.codec import digest

    return f"{digest(denoiser.info)[:12]}-{digest(denoiser.program)[:12]}"


def compute_float(model: str, eta: float, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The float model's own feature-FID, and its weights."""
    import torch

    from edgeqdm import load

    torch.set_num_threads(1)
    denoiser = load(f"reference:{model}", steps=STEPS, eta=eta)
    state = denoiser.module.state_dict().values()
    return {
        **measure_fid(denoiser, None, None, work / f"{model}-{eta:g}", options["fid"]),
        "weight_bytes": sum(p.numel() * p.element_size() for p in state),
    }


@dataclass(frozen=True)
class Task:
    """One row of the whole table; `row` is None for the float model."""

    model: str
    width: str
    eta: float
    row: Row | None

    @property
    def key(self) -> str:
        if self.row is None:
            return f"{self.model}/float/eta {self.eta:g}/float"
        return key_of(self.model, self.width, self.eta, self.row)

    @property
    def methods(self) -> dict[str, Any] | None:
        """What the row is made with, as it is read back from a file."""
        found: dict[str, Any] | None = json.loads(json.dumps(self.row and asdict(self.row)))
        return found

    def named(self, names: Sequence[str] | None) -> bool:
        return not names or self.row is None or self.row.name in names


def lanes(
    models: Sequence[str], widths: Sequence[str], etas: Sequence[float]
) -> Iterator[list[Task]]:
    """Tasks that share finished work, in an order in which it is not done twice."""
    for eta in etas:
        for model in models:
            every = [(width, row) for width in widths for row in rows_of(model, width)]
            # Training takes longest and is the last thing added.
            every.sort(key=lambda pair: pair[1].tuned)
            yield [
                Task(model, "float", eta, None),
                *(Task(model, width, eta, row) for width, row in every),
            ]


def run_task(task: Task, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The row, computed by this script in another process."""
    name = "" if task.row is None else task.row.name
    request = [task.model, task.width, str(task.eta), name, str(work), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, __file__, "row", *request],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": reason}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


app = typer.Typer(add_completion=False)


@app.command()
def row(model: str, width: str, eta: float, name: str, work: Path, options: str) -> None:
    """Compute one row and print it as JSON; used by `table`."""
    asked = json.loads(options)
    if not name:
        print(json.dumps(compute_float(model, eta, work, asked)))
        return
    chosen = next(each for each in rows_of(model, width) if each.name == name)
    print(json.dumps(compute(model, width, eta, chosen, work, asked)))


@app.command()
def table(
    out: Annotated[Path, typer.Option("-o", "--out")] = Path("docs/benchmarks/ablation.json"),
    work: Annotated[Path, typer.Option()] = Path("build/ablation"),
    model: Annotated[list[str], typer.Option()] = list(MODELS),  # noqa: B006
    width: Annotated[list[str], typer.Option()] = list(WIDTHS),  # noqa: B006
    eta: Annotated[list[float], typer.Option()] = list(ETAS),  # noqa: B006
    name: Annotated[
        list[str] | None, typer.Option("--row", help="Only rows of this name, repeatable.")
    ] = None,
    images: Annotated[int, typer.Option(help="Per seed.")] = 64,
    fid: Annotated[int, typer.Option(help="Images of feature-FID.")] = 2000,
    iterations: Annotated[int, typer.Option(help="Of reconstruction, per block.")] = 250,
    batch: Annotated[int, typer.Option(help="Of reconstruction.")] = 16,
    minutes: Annotated[float, typer.Option(help="CPU minutes of training.")] = 6.0,
    jobs: Annotated[int, typer.Option(help="Rows computed at once, one thread each.")] = 2,
) -> None:
    """Compute all rows that the output file lacks, then draw the figure beside it."""
    options = {
        "images": images,
        "fid": fid,
        "iterations": iterations,
        "batch": batch,
        "minutes": minutes,
    }
    check_names(name or (), model, width)
    report = read_report(out, options)
    wanted = [
        [task for task in lane if task.key not in report["rows"] and task.named(name)]
        for lane in lanes(model, width, eta)
    ]
    work.mkdir(parents=True, exist_ok=True)
    progress = Progress(report, out, sum(len(lane) for lane in wanted))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run_lane, lane, work, options, progress) for lane in wanted]
        try:
            for lane_done in running:
                lane_done.result()
        except KeyboardInterrupt:
            progress.stopped = True
            pool.shutdown(cancel_futures=True)
            raise
    draw_figure(report, out.with_suffix(".png"))
    write_page(report, out.with_suffix(".md"))
    if any("error" in each for each in report["rows"].values()):
        raise typer.Exit(1)


def check_names(names: Sequence[str], models: Sequence[str], widths: Sequence[str]) -> None:
    """Raise BadParameter unless every name is that of a row of these models and widths."""
    rows = (row for model in models for width in widths for row in rows_of(model, width))
    known = dict.fromkeys(row.name for row in rows)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"no row is named {unknown[0]!r}; known: {'; '.join(known)}")


class Progress:
    """Keeps every finished row in the output file and tells how long the rest will take."""

    def __init__(self, report: dict[str, Any], out: Path, total: int) -> None:
        self._report, self._out, self._total = report, out, total
        self._done, self._started, self._lock = 0, time.monotonic(), threading.Lock()
        self.stopped = False

    def finish(self, task: Task, result: dict[str, Any]) -> None:
        with self._lock:
            self._report["rows"][task.key] = {
                **result,
                "methods": task.methods,
                "commit": reports.commit(),
            }
            write_report(self._report, self._out)
            self._done += 1
            spent = (time.monotonic() - self._started) / 60
            left = spent / self._done * (self._total - self._done)
            shown = result.get("error") or f"{result.get('image_sqnr_mean_db', 0.0):.1f} dB"
            print(
                f"{self._done}/{self._total} {task.key}: {shown}; about {left:.0f} min left",
                flush=True,
            )


def run_lane(lane: Sequence[Task], work: Path, options: dict[str, Any], progress: Progress) -> None:
    for task in lane:
        result = run_task(task, work, options)
        if progress.stopped:
            return
        progress.finish(task, result)


def read_report(file: Path, options: dict[str, Any]) -> dict[str, Any]:
    if file.exists():
        report: dict[str, Any] = json.loads(file.read_text())
        if report["options"] != options:
            raise typer.BadParameter(f"{file} has rows made with {report['options']}")
        report["rows"] = {k: v for k, v in report["rows"].items() if is_current(k, v)}
        return report
    return {
        "command": "python tools/benchmarks/ablation.py " + " ".join(sys.argv[1:]),
        "machine": {**reports.machine(), "threads_per_row": 1},
        "options": options,
        "provenance": "measured with the integer reference in torch; minutes are CPU minutes",
        "rows": {},
    }


def is_current(key: str, found: dict[str, Any]) -> bool:
    """Whether a row is finished and made with the methods that its name stands for today."""
    model, width, eta, name = key.split("/", 3)
    known = {each.name: each for each in rows_of(model, width)}
    if "error" in found or (width != "float" and name not in known):
        return False
    task = Task(model, width, float(eta.removeprefix("eta ")), known.get(name))
    wanted = task.row is not None and fid_wanted(model, width, task.eta, task.row)
    if wanted and "feature_fid" not in found:
        return False
    return bool(task.methods == found.get("methods"))


def write_report(report: dict[str, Any], file: Path) -> None:
    changes = verdicts(report)
    for name, row in report["rows"].items():
        # The row it was compared with may have gone.
        for change in ("against_before", "median_against_before"):
            row.pop(change, None)
        row |= changes.get(name, {})
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(file)


def verdicts(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """For every row with a predecessor: how image SQNR changed, seed by seed, and its spread."""
    found = {}
    rows = report["rows"]
    for name, mine in rows.items():
        model, width, eta, own = name.split("/", 3)
        if width == "float":
            continue
        other = rows.get(f"{model}/{width}/{eta}/{before(rows_of(model, width), own)}")
        if other is None or "error" in other or "error" in mine:
            continue
        found[name] = {
            "against_before": verdict(mine["image_sqnr_db"], other["image_sqnr_db"]),
            "median_against_before": verdict(
                mine["median_image_sqnr_db"], other["median_image_sqnr_db"]
            ),
        }
    return found


def before(ladder: Sequence[Row], name: str) -> str | None:
    """Name of the row that this one is compared with."""
    index = [each.name for each in ladder].index(name)
    return ladder[index].after or (ladder[index - 1].name if index else None)


def verdict(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean change over seeds and its standard deviation, in words."""
    change = np.subtract(mine, theirs)
    inside = abs(change.mean()) <= 2 * change.std(ddof=1) / len(change) ** 0.5
    note = " (inside the spread)" if inside else ""
    return f"{change.mean():+.2f} +- {change.std(ddof=1):.2f} dB{note}"


def write_page(report: dict[str, Any], file: Path) -> None:
    """The rows as tables for reading, in the order of their ladders."""
    machine, options = report["machine"], report["options"]
    rows = {name: row for name, row in report["rows"].items() if "error" not in row}
    commits = sorted({shortened(row["commit"]) for row in rows.values()})
    preface = PREFACE.format(
        **machine,
        **options,
        commits=", ".join(commits),
        steps=STEPS,
        seeds=len(IMAGE_SEEDS),
    )
    lines = ["# What each method buys", "", preface]
    columns = "image SQNR dB|change|median dB|step SQNR dB|FID|bytes|minutes|peak"
    for model, width, eta in panels_of(rows):
        ladder = rows_of(model, width)
        shown = [(each, rows.get(f"{model}/{width}/{eta}/{each.name}")) for each in ladder]
        lines += [
            "",
            f"## {model}, {width}, {eta}",
            "",
            f"| | {columns.replace('|', ' | ')} |",
            "|---" * (2 + columns.count("|")) + "|",
            *(told(each, found) for each, found in shown if found),
        ]
    file.write_text("\n".join(lines) + "\n")


def shortened(commit: str) -> str:
    name, dash, dirty = commit.partition("-")
    return name[:7] + dash + dirty


def panels_of(rows: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Every (model, width, eta) that has rows, in the order of the ladders."""
    found = {tuple(key.split("/")[:3]) for key in rows}
    return [
        (model, width, f"eta {eta:g}")
        for eta in ETAS
        for model in MODELS
        for width in WIDTHS
        if (model, width, f"eta {eta:g}") in found
    ]


def told(row: Row, found: dict[str, Any]) -> str:
    """One line of a table."""
    fid = f"{found['feature_fid']:.3f}" if "feature_fid" in found else "-"
    if "feature_fid_change" in found:
        change, spread = found["feature_fid_change"], found["feature_fid_change_spread"]
        fid += f" ({100 * change:+.1f} +- {100 * spread:.1f} %)"
    against = found.get("against_before", "-")
    if row.after and against != "-":
        against += f", against {row.after}"
    cells = [
        row.name,
        f"{found['image_sqnr_mean_db']:.1f} ({found['image_sqnr_spread_db']:.1f})",
        against,
        f"{np.mean(found['median_image_sqnr_db']):.1f}",
        f"{found['output_sqnr_db']:.1f}",
        fid,
        f"{found['weight_share']:.3f}",
        f"{found['quantization_cpu_minutes']:.1f}",
        f"{found['peak_rss_mb']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def draw_figure(report: dict[str, Any], file: Path) -> None:
    """Image SQNR of every row, one panel per model and eta, one line per width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(k.split("/")[0], k.split("/")[2]) for k in report["rows"]})
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 4.2 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, (model, eta) in zip(axes[:, 0], panels, strict=True):
        draw_panel(axis, report, model, eta)
    figure.savefig(file, dpi=110)


def draw_panel(axis: Any, report: dict[str, Any], model: str, eta: str) -> None:
    # The longest ladder holds the rows of all, in their order.
    every = max(([row.name for row in rows_of(model, width)] for width in WIDTHS), key=len)
    axis.set_xticks(range(len(every)), every)
    for colour, width in enumerate(WIDTHS):
        found = [report["rows"].get(f"{model}/{width}/{eta}/{name}", {}) for name in every]
        shown = [(x, row) for x, row in enumerate(found) if "image_sqnr_db" in row]
        if shown:
            means = [row["image_sqnr_mean_db"] for _, row in shown]
            spread = [row["image_sqnr_spread_db"] / 2 for _, row in shown]
            axis.errorbar(
                [x for x, _ in shown],
                means,
                spread,
                marker="o",
                capsize=3,
                label=width,
                color=f"C{colour}",
            )
    axis.set_title(f"{model}, DDIM-{STEPS}, {eta}")
    axis.set_ylabel("image SQNR, dB")
    axis.tick_params(axis="x", rotation=30)
    for label in axis.get_xticklabels():
        label.set_horizontalalignment("right")
    axis.grid(alpha=0.3)
    axis.legend()


if __name__ == "__main__":
    app()
