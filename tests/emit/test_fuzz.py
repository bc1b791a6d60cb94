"""Whatever bytes a package holds, the C++ parsers refuse them or read them: no other end."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from edgeqdm.emit.integrity import seal_manifest
from edgeqdm.emit.table import pack_table
from edgeqdm.testing.manifests import tiny_manifest
from edgeqdm.testing.native import SANITIZERS, WARNINGS, compile_cpp
from edgeqdm.testing.schedules import LABELS, PARTS, random_schedule

NATIVE = Path(__file__).parents[1] / "native"
PARSED = ("files", "json", "manifest", "sha256", "solver", "table", "tensors")
SECONDS = int(os.environ.get("EDGEQDM_FUZZ_SECONDS", "1"))
"""Of each fuzzer; `.ci/slow` asks for more."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    full = random_schedule(1, PARTS, steps=3, conditioning=LABELS, label_names=("a", "ä"))
    (folder / "plain.bin").write_bytes(pack_table(random_schedule(0, steps=2)))
    (folder / "full.bin").write_bytes(pack_table(full))
    (folder / "manifest.json").write_bytes(seal_manifest(tiny_manifest(files={})))
    (folder / "x.safetensors").write_bytes(save({"x": np.zeros(2, np.float32), "n": np.arange(2)}))
    np.save(folder / "e.npy", np.zeros((2, 3), np.float16))
    np.save(folder / "f.npy", np.asfortranarray(np.zeros((2, 3))))
    return folder


def build(cpp: Path, name: str, compiler: str, *options: str) -> Path:
    sources = [NATIVE / "fuzz_package.cpp", *(cpp / "src" / f"{stem}.cpp" for stem in PARSED)]
    include = (f"-I{cpp}", f"-I{cpp / 'src'}")
    flags = ("-O1", "-g1", "-DEDGEQDM_FUZZ_NO_CRC", *WARNINGS, *SANITIZERS, *include)
    return compile_cpp(cpp / name, sources, *flags, *options, compiler=compiler)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # What is freed is kept for a while, to catch late uses: with the default, 256 MB and what that
    # scatters have passed the limit of memory below while 24 MB were in use.
    settings = {"ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16"}
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def test_mutated_files_are_read_or_refused(cpp: Path, corpus: Path) -> None:
    program = build(cpp, "fuzz_driver", "c++")
    done = run(program, str(SECONDS), "1", *sorted(corpus.iterdir()))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


def test_inputs_of_libfuzzer_are_read_or_refused(cpp: Path, corpus: Path, tmp_path: Path) -> None:
    if shutil.which("clang++") is None:
        pytest.skip("no clang++, which brings libFuzzer")
    options = ("-DEDGEQDM_LIBFUZZER", "-fsanitize=fuzzer")
    program = build(cpp, "fuzz_libfuzzer", "clang++", *options)
    limits = (f"-max_total_time={SECONDS}", "-seed=1", "-timeout=5", "-rss_limit_mb=2048")
    done = run(program, *limits, f"-artifact_prefix={tmp_path}/", tmp_path, corpus)
    assert done.returncode == 0, done.stderr[-2000:]
