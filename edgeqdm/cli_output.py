"""How the command line speaks: progress, results, and one line for whatever went wrong."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeqdm.cli_signals import TERMINATED, sent
from edgeqdm.errors import EdgeqdmError, OutputError, ResourceError, UnsupportedError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from edgeqdm.emit.verify import Verification
    from edgeqdm.ir.profile import LatencyProfile
    from edgeqdm.ir.report import BenchReport, BenchRow
    from edgeqdm.ir.search import ParetoReport
    from edgeqdm.pipeline import Finding, QuantizedModel
    from edgeqdm.profile.predict import LatencyModel
    from edgeqdm.quantize.finetune import Finetuned

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

USAGE, INTERRUPTED = 2, 130
AGAIN = "run the same command again to go on"

_PIPED_WIDTH = 200
_ETA_WINDOW_S = 600.0
_LINE_EVERY_S = 30.0
_SHOWN = 3
_LONGEST_TEXT = 300
_UNWRITABLE = frozenset(
    {
        errno.EACCES,
        errno.EBADF,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EFBIG,
        errno.EIO,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EPIPE,
        errno.EROFS,
    }
)


@dataclass(frozen=True)
class Output:
    """What a verb may print, and how.

    Attributes:
        as_json: the result is one JSON object on stdout.
        quiet: neither progress nor a result for people.
        verbose: what libraries print and warn of is shown, on stderr.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    @contextlib.contextmanager
    def working(self) -> Iterator[Progress]:
        """Show progress on stderr, keep libraries from printing, stop where a signal was lost."""
        with self._progress() as progress, _hushed(self.verbose):

            def report(stage: str, done: int, total: int) -> None:
                if (stopped := sent()) is not None:
                    raise stopped
                progress(stage, done, total)

            yield report

    def warn_of_layers(self, refused: Sequence[str], target: str) -> None:
        """Say on stderr what the plan's target has no kernel for."""
        self.note_of_layers(f"{target} has no kernel, and emit will refuse", refused)

    def note_of_layers(self, said: str, layers: Sequence[str]) -> None:
        """Say something on stderr of layers, if there are any."""
        if layers and not self.as_json and not self.quiet:
            more = "" if len(layers) <= _SHOWN else f"; {len(layers) - _SHOWN} more"
            complain(f"note: {said}: {'; '.join(layers[:_SHOWN])}{more}")

    def note(self, said: str) -> None:
        """Say something on stderr that is no error."""
        if not self.as_json and not self.quiet:
            complain(f"note: {said}")

    def result(self, value: Mapping[str, Any], *shown: RenderableType) -> None:
        """Print what a verb has found: `value` as JSON, or `shown` for people."""
        if self.as_json:
            write(json.dumps(value, allow_nan=False))
        elif not self.quiet:
            write("\n\n".join(_rendered(part) for part in shown))

    def _progress(self) -> contextlib.AbstractContextManager[Progress]:
        if self.quiet:
            return contextlib.nullcontext(_no_progress)
        if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            return _bars()
        # With --json whoever reads stderr expects nothing or one object.
        return contextlib.nullcontext(_no_progress if self.as_json else _Lines())


@contextlib.contextmanager
def stage(name: str, progress: Progress) -> Iterator[None]:
    """A stage of one unit of work."""
    progress(name, 0, 1)
    yield
    progress(name, 1, 1)


def _no_progress(stage: str, done: int, total: int) -> None:
    return


class _Lines:
    """For logs: a line when the first unit of a stage is done, and now and then while it lasts.

    So what fails at once, for want of a file, is told in the one line of its error.
    """

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}
        self._latest: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if not done or now - self._latest.get(stage, -math.inf) < _LINE_EVERY_S:
            return
        began, finished = self._first.setdefault(stage, (now, done))
        self._latest[stage] = now
        left = ""
        if done > finished:
            seconds = (now - began) / (done - finished) * (total - done)
            left = f", about {seconds / 60:.0f} min left"
        complain(f"{stage}: {done} of {total}{left}")


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    tasks: dict[str, rich_progress.TaskID] = {}
    with rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("ETA"),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
        speed_estimate_period=_ETA_WINDOW_S,
        redirect_stdout=False,
    ) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


@contextlib.contextmanager
def _hushed(verbose: bool) -> Iterator[None]:
    """Keep stdout for results; drop what libraries print, warn and log unless `verbose`."""
    if verbose:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def write(text: str) -> None:
    """Print to stdout, now; raises OutputError unless it is only that the reader has gone."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            "EQ-7801", f"cannot be written: {error.strerror}", path="standard output"
        ) from error


def complain(line: str) -> None:
    """Print one line to stderr; where that is closed or full there is nobody to tell."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _rendered(part: RenderableType) -> str:
    from rich.console import Console

    # Not printed by rich: it ends the program with exit code 1 where a pipe is broken.
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


@dataclass(frozen=True)
class Failure:
    """How a verb ended that did not succeed; the fields of `EdgeqdmError`, for any exception."""

    code: str
    message: str
    path: str | None
    hint: str | None
    exit_code: int


def guarded(work: Callable[[], None], *, as_json: bool, verbose: bool) -> int:
    """Run `work`, tell in one line what went wrong and return the exit code it stands for."""
    try:
        if sys.stdout is None:
            raise OutputError("EQ-7802", "is closed", path="standard output")
        work()
        sys.stdout.flush()
    # Whatever a verb raises, Ctrl-C and the SystemExit of SIGTERM included, ends here.
    except BaseException as error:
        _settle_stdout()
        failure = failure_of(error)
        if not isinstance(error, BrokenPipeError):
            _report(failure, error, as_json=as_json, verbose=verbose)
        return failure.exit_code
    return 0


def _report(failure: Failure, error: BaseException, *, as_json: bool, verbose: bool) -> None:
    trace = "".join(traceback.format_exception(error)) if verbose else ""
    if as_json:
        # ASCII only, so that no name out of a file can reach a terminal unescaped.
        complain(json.dumps({"error": asdict(failure), **({"traceback": trace} if trace else {})}))
        return
    if trace:
        complain(trace.rstrip())
    if failure.exit_code in (INTERRUPTED, TERMINATED):
        complain(f"{failure.message}: {failure.hint}")
    else:
        complain(
            str(EdgeqdmError(failure.code, failure.message, path=failure.path, hint=failure.hint))
        )


def _settle_stdout() -> None:
    """The interpreter flushes stdout once more at its end; let that not fail, in its own words."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def failure_of(error: BaseException) -> Failure:
    """What to tell of an exception, and the exit code edgeqdm/errors.py documents for it."""
    if isinstance(error, KeyboardInterrupt):
        return Failure("EQ-0130", "interrupted", None, AGAIN, INTERRUPTED)
    if isinstance(error, SystemExit) and error.code == TERMINATED:
        return Failure("EQ-0143", "terminated", None, AGAIN, TERMINATED)
    if hasattr(error, "format_message"):
        return _usage_failure(error)
    known = error if isinstance(error, EdgeqdmError) else _translated(error)
    return Failure(known.code, known.message, known.path, known.hint, known.exit_code)


def _usage_failure(error: Any) -> Failure:
    # The class is click's own or, in a private module, typer's, depending on typer's version.
    context = getattr(error, "ctx", None)
    command = "edgeqdm" if context is None else context.command_path
    message = " ".join(error.format_message().split())
    return Failure("EQ-2001", message, None, f"try: {command} --help", USAGE)


def _translated(error: BaseException) -> EdgeqdmError:
    text = next(iter(str(error).splitlines()), "")[:_LONGEST_TEXT]
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        hint = "close other programs, or use fewer --samples"
        return ResourceError("EQ-9801", "out of memory", hint=hint)
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        root = error.name.partition(".")[0]
        if root != "edgeqdm":
            hint = f"pip install {root}"
            return UnsupportedError("EQ-4801", f"{root} is not installed", hint=hint)
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = error.filename if isinstance(error.filename, str) else None
        return OutputError("EQ-7803", f"cannot be written: {error.strerror}", path=where)
    kind = type(error).__name__
    message = f"internal error: {kind}: {text}" if text else f"internal error: {kind}"
    return EdgeqdmError("EQ-0000", message, hint="report it with -v")


def findings_table(findings: Sequence[Finding]) -> Table:
    """What `doctor` found, one line each."""
    table = _table("", "", "")
    for finding in findings:
        note = finding.found if finding.ok else f"{finding.found} - {finding.hint}".rstrip(" -")
        table.add_row("ok" if finding.ok else "!!", finding.what, note)
    return table


def verification_table(found: Verification) -> Table:
    """What `verify` found in a package that passed."""
    from edgeqdm.emit.playback import GOLDEN_SHARE

    step = worst_step(found)
    kernels = ", ".join(f"{count} {name}" for name, count in found.kernels.by_name.items())
    table = _table("", "")
    table.add_row("target", found.manifest.target)
    table.add_row("files", f"{len(found.manifest.files)} ok")
    table.add_row("integer kernels", f"{found.kernels.integer} of {found.planned}")
    table.add_row("all kernels", kernels)
    table.add_row(
        "golden run",
        f"deviates by {found.deviation[step]:.2g} of the quantization noise at worst, step {step}; "
        f"{GOLDEN_SHARE} is allowed",
    )
    return table


def verification_value(found: Verification) -> dict[str, Any]:
    """The same for a program."""
    step = worst_step(found)
    return {
        "target": found.manifest.target,
        "files": len(found.manifest.files),
        "integer_kernels": found.kernels.integer,
        "planned_layers": found.planned,
        "float_kernels": found.kernels.floating,
        "kernels": dict(found.kernels.by_name),
        "worst_step": step,
        "worst_deviation": found.deviation[step],
        "deviation": list(found.deviation),
    }


def worst_step(found: Verification) -> int:
    """The step at which the golden run deviates most."""
    return max(range(len(found.deviation)), key=found.deviation.__getitem__)


def quantization_table(found: QuantizedModel) -> Table:
    """What `quantize` and `finetune` made."""
    table = _table("", "")
    share = found.stored_bytes / found.float_bytes
    phases = ", ".join(f"{p.start}..{p.stop - 1}" for p in found.plan.phases)
    worst = min(range(len(found.snr_db)), key=found.snr_db.__getitem__)
    table.add_row("file", str(found.file))
    table.add_row("tensors", f"{found.stored_bytes / 1e6:.2f} MB, {share:.3f} of float32")
    table.add_row("integer layers", str(found.plan.n_integer_layers))
    table.add_row("phases", phases)
    unseen = "" if found.training is None else ", on runs it was not trained on"
    table.add_row("output SQNR", f"{found.snr_db[worst]:.1f} dB at worst, step {worst}{unseen}")
    if found.blocks:
        kept = sum(block.kept for block in found.blocks)
        minutes = sum(block.seconds for block in found.blocks) / 60
        done = f"{kept} of {len(found.blocks)} blocks improved"
        table.add_row("reconstruction", f"{done}, {minutes:.1f} CPU min")
    if found.training is not None:
        table.add_row("training", _training_text(found.training))
    return table


def _training_text(found: Finetuned) -> str:
    done = f"{found.iterations} iterations, {found.seconds / 60:.1f} CPU min"
    if not found.improved:
        return f"no better on held-out runs, the given network is kept; {done}"
    before, after = (-10 * math.log10(loss) for loss in (found.loss_before, found.loss_after))
    return f"mean over the steps {before:.1f} -> {after:.1f} dB on held-out runs; {done}"


def quantization_value(found: QuantizedModel) -> dict[str, Any]:
    """The same for a program."""
    return {
        "file": str(found.file),
        "stored_bytes": found.stored_bytes,
        "float_bytes": found.float_bytes,
        "integer_layers": found.plan.n_integer_layers,
        "phases": [[p.start, p.stop] for p in found.plan.phases],
        "snr_db": list(found.snr_db),
        "blocks": [asdict(block) for block in found.blocks],
        "training": None if found.training is None else _training_value(found.training),
    }


def _training_value(found: Finetuned) -> dict[str, Any]:
    return {
        "improved": found.improved,
        "loss_before": found.loss_before,
        "loss_after": found.loss_after,
        "iterations": found.iterations,
        "seconds": found.seconds,
    }


def bench_table(report: BenchReport) -> Table:
    """One row per variant; a figure that was not measured is a dash."""
    table = _table(
        "",
        "CPU ms/step",
        "ratio",
        "image SQNR dB",
        "MB",
        "integer kernels",
        "float kernels",
        *(["feature-FID"] if report.fid_images else []),
    )
    for row in report.rows:
        table.add_row(*_bench_cells(row)[: len(table.columns)])
    table.title = (
        f"{report.model}, {report.sampler}, {report.n_steps} steps, guidance {report.guidance:g}"
    )
    table.caption = f"{report.provenance} on {report.host.cpu}, {report.images} images"
    return table


def _bench_cells(row: BenchRow) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.cpu_ms_per_step:.2f}",
        _figure(row.cpu_ratio, 2),
        _figure(row.image_sqnr_db, 1),
        f"{row.bytes_on_disk / 1e6:.2f}",
        f"{row.integer_kernels} of {row.planned_layers}",
        str(row.float_kernels),
        _figure(row.feature_fid, 2),
    )


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def pareto_table(report: ParetoReport) -> Table:
    """A front, fastest first."""
    table = _table("trial", "ms", "of float", "dB", "MB", "phases", "measured", "dB there", "from")
    for plan in report.plans:
        table.add_row(
            str(plan.trial),
            f"{plan.latency_ms:.3f}",
            f"{plan.latency_ms / report.float_ms:.2f}",
            f"{plan.image_sqnr_db:.1f}",
            f"{plan.disk_bytes / 1e6:.3f}",
            str(plan.phases),
            "-" if plan.measured_ratio is None else f"{plan.measured_ratio:.2f}",
            _figure(plan.measured_sqnr_db, 1),
            plan.origin,
        )
    return table


def profile_table(profile: LatencyProfile, fitted: LatencyModel | None) -> Table:
    """What was measured where, and how well sums of it predict whole networks."""
    from edgeqdm.profile.predict import costs_of_phases

    table = _table("profile", "")
    clock = {"thread_cpu": "CPU time", "wall": "elapsed time"}[profile.protocol.clock]
    table.add_row("device", f"{profile.device.name}, {profile.device.machine}")
    table.add_row("runtime", f"{profile.runtime.name} {profile.runtime.version}")
    table.add_row("threads", f"{profile.threads}, {clock}, power mode {profile.power_mode}")
    measured = sum(entry.provenance == "measured" for entry in profile.entries)
    table.add_row("entries", f"{len(profile.entries)}, {measured} measured")
    table.add_row("whole networks", str(len(profile.wholes)))
    flags = sorted({flag for entry in profile.entries for flag in entry.timing.flags})
    weak = sum(bool(entry.timing.flags) for entry in profile.entries)
    table.add_row("flagged entries", f"{weak} ({', '.join(flags)})" if weak else "0")
    if profile.flags:
        table.add_row("flags", ", ".join(profile.flags))
    if fitted is not None and fitted.error is not None:
        error = fitted.error
        told = f"mean {error.mean:.1%}, worst {error.worst:.1%}, {error.n} networks left out"
        table.add_row("error of sums", told)
    if fitted is not None and costs_of_phases(profile, fitted.network):
        told = f"{fitted.fork_us:+.1f} us per layer that differs"
        table.add_row("several phases", told)
    return table


def profile_value(
    file: Path, profile: LatencyProfile, fitted: LatencyModel | None
) -> dict[str, Any]:
    """The same for `--json`."""
    from edgeqdm.profile.predict import costs_of_phases

    error = None if fitted is None else fitted.error
    phased = None
    if fitted is not None and costs_of_phases(profile, fitted.network):
        phased = fitted.fork_us
    return {
        "profile": str(file),
        "device": profile.device.model_dump(mode="json"),
        "runtime": profile.runtime.model_dump(mode="json"),
        "threads": profile.threads,
        "entries": len(profile.entries),
        "wholes": len(profile.wholes),
        "phase_costs": len(profile.phase_costs),
        "flags": list(profile.flags),
        "prediction_error": None if error is None else asdict(error),
        "fork_us": phased,
    }


def _table(*headers: str) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(
        box=SIMPLE,
        show_edge=False,
        show_header=any(headers),
        title_justify="left",
        title_style="bold",
        caption_justify="left",
    )
    for k, header in enumerate(headers):
        numeric = k > 0 and any(headers)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    return table
