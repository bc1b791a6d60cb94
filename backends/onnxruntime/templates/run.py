"""Sample from this package. Needs Python >= 3.11, numpy and onnxruntime; nothing else.

python runtime/python/run.py --seed 0 --label 3 --out sheet.png
python runtime/python/run.py --self-test
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

try:
    import numpy as np
    import onnxruntime as ort
except ImportError as missing:
    print(f"error: {missing.name} is missing - pip install numpy onnxruntime", file=sys.stderr)
    sys.exit(4)

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))

import playback  # noqa: E402

PACKAGE = Path(__file__).resolve().parents[2]
SCHEMA_VERSION = 1
EXIT_INPUT, EXIT_UNSUPPORTED, EXIT_NUMERICAL, EXIT_OUTPUT = 3, 4, 5, 7
EXIT_VERIFY, EXIT_RESOURCE, EXIT_INTERNAL = 8, 9, 10
MAX_THREADS = 256
"""Where more cannot be started, ONNX Runtime waits for them for ever."""
OLDEST_RUNTIME = (1, 23)
"""Of onnxruntime. 1.22 lacks a cast of 4-bit integers."""
STEP_GRAPH = re.compile(r"model\.step([0-9]{1,9})\.onnx")


class RunError(Exception):
    """An error with the exit code it ends the program with."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def check_hashes(package: Path) -> list[str]:
    """Names of all files; RunError unless the manifest and each of them are there and unchanged."""
    try:
        if (package / "manifest.json").is_symlink():
            raise ValueError("not a path inside the package")
        data = (package / "manifest.json").read_bytes()
        manifest = json.loads(data.decode("utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("not a JSON object")
        check_version(manifest["schema_version"])
        sealed = is_sealed(data, manifest["manifest_sha256"])
        files = manifest["files"]
        listed = {name: (entry["sha256"], entry["size"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = f"no field {reason}" if isinstance(error, KeyError) else reason
        raise RunError(
            EXIT_VERIFY,
            f"manifest.json cannot be read: {reason}, in {package} - copy the package again",
        ) from error
    bad = [] if sealed else ["manifest.json (changed)"]
    for name, (sha256, size) in sorted(listed.items()):
        path = package / name
        if ".." in Path(name).parts or Path(name).is_absolute() or path.is_symlink():
            bad.append(f"{name} (not a path inside the package)")
        elif not path.is_file():
            bad.append(f"{name} (missing)")
        elif path.stat().st_size != size:
            bad.append(f"{name} (size)")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            bad.append(f"{name} (changed)")
    if bad:
        raise RunError(EXIT_VERIFY, f"package is damaged: {', '.join(bad)} - copy it again")
    return list(listed)


def check_version(found: object) -> None:
    """Raise RunError unless this is the version of the manifest that this runtime reads."""
    if found != SCHEMA_VERSION:
        reason = f"manifest.json has schema_version {found!r}, this runtime reads {SCHEMA_VERSION}"
        raise RunError(EXIT_VERIFY, f"{reason} - use the runtime that came with the package")


def is_sealed(data: bytes, seal: str) -> bool:
    """Whether `seal` is the SHA-256 of the manifest's bytes with its own digits made zeros."""
    digits = seal.encode()
    if len(digits) != 64 or data.count(digits) != 1:
        return False
    return hashlib.sha256(data.replace(digits, b"0" * 64)).hexdigest() == seal


def find_graphs(names: list[str]) -> dict[int, str]:
    """The graphs among a package's files, by the first step that each serves."""
    for name in ("model.onnx", "model.ort"):
        if name in names:
            return {0: name}
    found = {int(k[1]): k[0] for k in map(STEP_GRAPH.fullmatch, names) if k is not None}
    if 0 not in found:
        raise RunError(EXIT_VERIFY, "package is damaged: no graph (not in the manifest)")
    return found


def check_runtime() -> None:
    """Raise RunError where onnxruntime is too old for these graphs."""
    if tuple(map(int, ort.__version__.split(".")[:2])) < OLDEST_RUNTIME:
        oldest = ".".join(map(str, OLDEST_RUNTIME))
        reason = f"onnxruntime {ort.__version__} is too old, this package needs {oldest} or newer"
        raise RunError(EXIT_UNSUPPORTED, f"{reason} - pip install --upgrade onnxruntime")


def open_network(package: Path, graphs: dict[int, str], threads: int) -> playback.Evaluate:
    """The graphs as a function of (scaled sample, step, conditioning)."""
    check_runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    cpu = ["CPUExecutionProvider"]
    try:
        sessions = {
            start: ort.InferenceSession(str(package / name), options, providers=cpu)
            for start, name in graphs.items()
        }
    # ONNX Runtime raises its own classes, and not one of them for all reasons.
    except Exception as error:
        reason = f"onnxruntime {ort.__version__} refuses the graph: {error}"
        raise RunError(EXIT_VERIFY, reason) from error
    names = [i.name for i in sessions[0].get_inputs()]

    def evaluate(x: Any, step: int, conditioning: Any) -> Any:
        session = sessions[max(start for start in sessions if start <= step)]
        values = [x, np.array(step, np.int64)] + ([] if conditioning is None else [conditioning])
        return session.run(None, dict(zip(names, values, strict=True)))[0]

    return evaluate


def parse_labels(player: playback.Player, text: str | None, count: int | None) -> Any:
    """Labels int64 [B] by number or name; all labels once where none is asked for."""
    if player.conditioning["kind"] != "label":
        if text is not None:
            raise playback.PlaybackError("this model takes no label")
        return None
    n_labels = player.conditioning["n_labels"]
    if text is None:
        return np.arange(count or n_labels, dtype=np.int64) % n_labels
    by_name = {name.lower(): k for k, name in enumerate(player.label_names)}
    given = [each.strip().lower() for each in text.split(",")]
    try:
        labels = [by_name[each] if each in by_name else int(each) for each in given]
    except ValueError:
        known = ", ".join(player.label_names) or f"0..{n_labels - 1}"
        raise playback.PlaybackError(f"unknown label in {text!r}; known: {known}") from None
    if len(labels) > 1 and count not in (None, len(labels)):
        raise playback.PlaybackError(f"--count {count} contradicts {len(labels)} labels")
    outside = [label for label in labels if not 0 <= label < n_labels]
    if outside:
        raise playback.PlaybackError(f"label {outside[0]} is out of range 0..{n_labels - 1}")
    return np.array(labels * (count or 1) if len(labels) == 1 else labels, np.int64)


def read_embeddings(path: Path) -> Any:
    """Embeddings float32 [B, ...] of a .npy file."""
    try:
        # Not np.load: it also opens archives, and leaves a damaged one open.
        with path.open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise playback.PlaybackError(f"{path} is not a .npy file: {error}") from error
    if found.dtype.kind != "f":
        raise playback.PlaybackError(f"{path} holds {found.dtype}, embeddings are floats")
    if found.ndim == 0 or len(found) == 0:
        raise playback.PlaybackError(f"{path} does not hold one embedding per image")
    with np.errstate(over="ignore"):
        embeddings = found.astype(np.float32)
    if not np.isfinite(embeddings).all():
        raise playback.PlaybackError(f"{path} holds NaN or a value beyond float32")
    return embeddings


def writable_target(path: Path) -> Path:
    """The file that writing to `path` replaces or makes: links followed, to a file or to none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise cannot_write(path, "not a regular file; name another")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise cannot_write(path, error.strerror) from error
    target = Path(os.path.realpath(path))
    try:
        target.parent.stat()
    except OSError as error:
        raise cannot_write(path, error.strerror) from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise cannot_write(path, os.strerror(errno.EACCES))
    return target


def cannot_write(path: Path, reason: str | None) -> RunError:
    return RunError(EXIT_OUTPUT, f"cannot write {path}: {reason}")


def create_partial(folder: Path) -> BinaryIO:
    """A new file of a short name: the longest legal name leaves no room for more."""
    for k in range(1000):
        with contextlib.suppress(FileExistsError):
            return (folder / f".edgeqdm-{os.getpid()}-{k}").open("xb")
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    target = writable_target(path)
    try:
        with create_partial(target.parent) as file:
            try:
                file.write(data)
                file.close()
                os.replace(file.name, target)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise cannot_write(path, error.strerror) from error


def check_outputs(out: Path, latents: Path | None) -> None:
    """Raise RunError where there could be no result, before there is any work to lose."""
    target = writable_target(out)
    if latents is not None and writable_target(latents) == target:
        raise RunError(EXIT_INPUT, f"--out and --latents are the same file: {out}")


def report_self_test(player: playback.Player, evaluate: playback.Evaluate) -> None:
    """Print the deviation per step; raise RunError where the golden run is not met."""
    golden = playback.read_safetensors(PACKAGE / "golden.safetensors")
    result = playback.self_test(player, evaluate, golden)
    sampler = playback.replay_sampler(player, golden)
    passed = result.passed and sampler <= playback.SAMPLER_TOLERANCE
    print(json.dumps({"passed": passed, "deviation": result.deviation, "sampler": sampler}))
    if not passed:
        raise RunError(EXIT_VERIFY, "self-test failed: outputs differ from the golden run")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample from this package.")
    parser.add_argument("--out", type=Path, help="PNG file to write")
    parser.add_argument("--latents", type=Path, help="also write the raw samples as .npy")
    parser.add_argument("--label", help="label or labels, by number or name: 3 or 3,5 or Bag")
    parser.add_argument("--count", type=int, help="number of images")
    parser.add_argument("--embedding", type=Path, help=".npy file with one embedding per image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--self-test", action="store_true", help="replay the golden run and exit")
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    graphs = find_graphs(check_hashes(PACKAGE))
    player = playback.open_player(PACKAGE)
    if arguments.threads < 1:
        raise RunError(EXIT_INPUT, f"--threads must be at least 1, got {arguments.threads}")
    if arguments.threads > MAX_THREADS:
        reason = f"--threads must be at most {MAX_THREADS}, got {arguments.threads}"
        raise RunError(EXIT_INPUT, reason)
    if arguments.columns < 1:
        raise RunError(EXIT_INPUT, f"--columns must be at least 1, got {arguments.columns}")
    if arguments.count is not None and arguments.count < 1:
        raise RunError(EXIT_INPUT, f"--count must be at least 1, got {arguments.count}")
    if arguments.self_test:
        report_self_test(player, open_network(PACKAGE, graphs, arguments.threads))
        return
    if arguments.out is None:
        raise RunError(2, "nothing to do: give --out FILE.png or --self-test")
    if arguments.embedding is not None and (arguments.label or arguments.count):
        raise RunError(EXIT_INPUT, "--embedding decides alone: leave --label and --count out")
    if arguments.embedding is not None:
        conditioning = read_embeddings(arguments.embedding)
    else:
        conditioning = parse_labels(player, arguments.label, arguments.count)
    n_images = (arguments.count or 1) if conditioning is None else len(conditioning)
    playback.check_conditioning(player, conditioning, n_images)
    check_outputs(arguments.out, arguments.latents)
    started = time.perf_counter()

    def on_step(step: int, _: Any) -> None:
        if not arguments.quiet and sys.stderr.isatty():
            print(f"\rstep {step + 1}/{player.table.n_steps}", end="", file=sys.stderr)

    samples = playback.sample(
        player,
        open_network(PACKAGE, graphs, arguments.threads),
        conditioning,
        seed=arguments.seed,
        images=range(n_images),
        on_step=on_step,
    )
    seconds = time.perf_counter() - started
    image = playback.sheet(playback.decode(player, samples), arguments.columns)
    write_atomically(arguments.out, playback.png(image))
    if arguments.latents is not None:
        buffer = io.BytesIO()
        np.save(buffer, samples)
        write_atomically(arguments.latents, buffer.getvalue())
    if not arguments.quiet:
        print(f"{arguments.out}: {n_images} images, seed {arguments.seed}, {seconds:.2f} s")


def main() -> int:
    arguments = parse_arguments()
    try:
        run(arguments)
    except RunError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except playback.NotFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NUMERICAL
    except (playback.PlaybackError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        return EXIT_INPUT
    except MemoryError:
        print("error: out of memory - draw fewer images at once", file=sys.stderr)
        return EXIT_RESOURCE
    except KeyboardInterrupt:
        return 130
    # The runtime raises classes of its own; whatever it is, the user gets one line.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        print(f"error: internal: {type(error).__name__}: {reason}", file=sys.stderr)
        return EXIT_INTERNAL
    return 0


if __name__ == "__main__":
    sys.exit(main())
