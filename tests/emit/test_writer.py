from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeqdm.emit import writer
from edgeqdm.emit.integrity import check_files, seal_manifest
from edgeqdm.emit.writer import (
    Staging,
    check_file_destination,
    staged_package,
    write_file_atomically,
)
from edgeqdm.errors import OutputError
from edgeqdm.ir.codec import dump_record
from edgeqdm.testing.manifests import tiny_manifest

EMPTY_MANIFEST = tiny_manifest()


def seal(staging: Staging) -> None:
    staging.seal(seal_manifest(EMPTY_MANIFEST.model_copy(update={"files": staging.files})))


def emit(out: Path, content: bytes = b"new", **options: Any) -> None:
    with staged_package(out, **options) as staging:
        staging.write("plan.json", content, "plan")
        staging.write("runtime/run.py", b"pass\n", "runtime")
        seal(staging)


def build(out: Path, *actions: Callable[[Staging], object], **options: Any) -> None:
    with staged_package(out, **options) as staging:
        for action in actions:
            action(staging)


def write_plan(staging: Staging) -> None:
    staging.write("plan.json", b"{}", "plan")


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_a_package_appears_whole_and_alone(tmp_path: Path) -> None:
    emit(tmp_path / "p")
    assert names(tmp_path) == {"p"}
    assert set(check_files(tmp_path / "p").files) == {"plan.json", "runtime/run.py"}


def test_missing_parents_are_created(tmp_path: Path) -> None:
    emit(tmp_path / "a/b/p")
    check_files(tmp_path / "a/b/p")


def test_nothing_is_at_the_final_name_before_the_end(tmp_path: Path) -> None:
    with staged_package(tmp_path / "p") as staging:
        staging.write("plan.json", b"{}", "plan")
        seal(staging)
        assert not (tmp_path / "p").exists()
        assert staging.folder.parent == tmp_path
        assert staging.folder.name.startswith(f".p.tmp-{os.getpid()}-")
        assert stat.S_IMODE(staging.folder.stat().st_mode) == 0o700
    assert (tmp_path / "p").is_dir()


@pytest.mark.parametrize("problem", [KeyboardInterrupt, SystemExit, ValueError, GeneratorExit])
@pytest.mark.parametrize("sealed", [False, True])
def test_whatever_stops_the_block_leaves_nothing(
    problem: type[BaseException], sealed: bool, tmp_path: Path
) -> None:
    def stop(_: Staging) -> None:
        raise problem

    with pytest.raises(problem):
        build(tmp_path / "p", write_plan, *([seal] if sealed else []), stop)
    assert names(tmp_path) == set()


def test_a_package_without_a_manifest_is_never_published(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not sealed"):
        build(tmp_path / "p", write_plan)
    assert names(tmp_path) == set()


def test_nothing_can_be_added_after_the_manifest(tmp_path: Path) -> None:
    with staged_package(tmp_path / "p") as staging:
        seal(staging)
        for add in (staging.write, lambda *a: staging.adopt(a[0], a[2])):
            with pytest.raises(RuntimeError, match="sealed"):
                add("plan.json", b"", "plan")


@pytest.mark.parametrize(
    "path", ["../x", "/x", "a\\b", "", ".", "a//b", "é", "PLAN.json", "plan.json", "manifest.json"]
)
def test_a_bad_or_taken_path_is_refused_before_anything_is_written(
    path: str, tmp_path: Path
) -> None:
    with staged_package(tmp_path / "p") as staging:
        staging.write("plan.json", b"{}", "plan")
        before = snapshot(tmp_path)
        with pytest.raises(OutputError):
            staging.write(path, b"", "plan")
        with pytest.raises(OutputError):
            staging.adopt(path, "plan")
        assert snapshot(tmp_path) == before
        seal(staging)


def test_a_file_written_by_a_library_is_adopted(tmp_path: Path) -> None:
    with staged_package(tmp_path / "p") as staging:
        (staging.folder / "model.bin").write_bytes(b"weights")
        staging.adopt("model.bin", "model")
        seal(staging)
    assert check_files(tmp_path / "p").files["model.bin"].size == 7


def adopt_missing(folder: Path) -> None:
    (folder / "model.bin").unlink(missing_ok=True)


def adopt_link(folder: Path) -> None:
    (folder / "model.bin").symlink_to("/etc/hostname")


def adopt_folder(folder: Path) -> None:
    (folder / "model.bin").mkdir()


@pytest.mark.parametrize("make", [adopt_missing, adopt_link, adopt_folder])
def test_only_a_regular_file_is_adopted(make: Callable[[Path], None], tmp_path: Path) -> None:
    def adopt(staging: Staging) -> None:
        make(staging.folder)
        staging.adopt("model.bin", "model")

    with pytest.raises(OutputError) as caught:
        build(tmp_path / "p", adopt)
    assert "model.bin" in str(caught.value.path)
    assert names(tmp_path) == set()


def leave_file(staging: Staging) -> None:
    (staging.folder / "forgotten.bin").touch()


def leave_folder(staging: Staging) -> None:
    (staging.folder / "forgotten").mkdir()


def change_file(staging: Staging) -> None:
    (staging.folder / "plan.json").write_bytes(b"[]")


def drop_file(staging: Staging) -> None:
    (staging.folder / "plan.json").unlink()


@pytest.mark.parametrize("damage", [leave_file, leave_folder, change_file, drop_file])
def test_what_does_not_read_back_is_never_published(
    damage: Callable[[Staging], None], tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="read back"):
        build(tmp_path / "p", write_plan, seal, damage)
    assert names(tmp_path) == set()


def a_file(out: Path) -> None:
    out.write_text("mine")


def an_empty_folder(out: Path) -> None:
    out.mkdir()


def a_folder_of_something_else(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("mine")


def a_folder_with_another_manifest(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text('{"format": "other"}')


def a_folder_with_a_broken_manifest(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text("{")


def a_link_to_a_package(out: Path) -> None:
    emit(out.parent / "target")
    out.symlink_to("target")


def a_dangling_link(out: Path) -> None:
    out.symlink_to("nowhere")


def a_package_with_a_file_of_the_user(out: Path) -> None:
    emit(out)
    (out / "notes.txt").write_text("mine")


def a_package_with_a_link_of_the_user(out: Path) -> None:
    emit(out)
    (out / "data").symlink_to("/")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "occupy",
    [
        a_file,
        an_empty_folder,
        a_folder_of_something_else,
        a_folder_with_another_manifest,
        a_folder_with_a_broken_manifest,
        a_link_to_a_package,
        a_dangling_link,
        a_package_with_a_file_of_the_user,
        a_package_with_a_link_of_the_user,
    ],
)
def test_what_is_not_ours_is_never_replaced(
    occupy: Callable[[Path], None], force: bool, tmp_path: Path
) -> None:
    occupy(tmp_path / "p")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"EQ-710[678]"):
        emit(tmp_path / "p", force=force)
    assert snapshot(tmp_path) == before


def test_a_package_is_replaced_only_by_force(tmp_path: Path) -> None:
    emit(tmp_path / "p", b"old")
    with pytest.raises(OutputError, match="--force"):
        emit(tmp_path / "p", b"new")
    assert (tmp_path / "p/plan.json").read_bytes() == b"old"
    emit(tmp_path / "p", b"new", force=True)
    assert (tmp_path / "p/plan.json").read_bytes() == b"new"
    assert names(tmp_path) == {"p"}


def test_a_damaged_package_of_ours_can_be_replaced(tmp_path: Path) -> None:
    emit(tmp_path / "p", b"old")
    (tmp_path / "p/plan.json").write_bytes(b"damaged")
    emit(tmp_path / "p", b"new", force=True)
    check_files(tmp_path / "p")


def test_a_failed_replacement_leaves_the_old_package(tmp_path: Path) -> None:
    emit(tmp_path / "p", b"old")
    before = snapshot(tmp_path)

    def interrupt(_: Staging) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "p", write_plan, seal, interrupt, force=True)
    assert snapshot(tmp_path) == before


@pytest.fixture
def no_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_rename", lambda *_: False)


@pytest.mark.usefixtures("no_renameat2")
def test_without_an_exchange_the_old_package_is_moved_aside_first(tmp_path: Path) -> None:
    emit(tmp_path / "p", b"old")
    emit(tmp_path / "p", b"new", force=True)
    assert (tmp_path / "p/plan.json").read_bytes() == b"new"
    assert names(tmp_path) == {"p"}


@pytest.mark.usefixtures("no_renameat2")
def test_a_failure_between_the_two_renames_puts_the_old_package_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit(tmp_path / "p", b"old")
    before = snapshot(tmp_path)
    rename = os.rename

    def fails_for_the_new_one(source: str, target: str, **where: int) -> None:
        if ".tmp-" in source:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target, **where)

    monkeypatch.setattr(os, "rename", fails_for_the_new_one)
    with pytest.raises(OutputError, match="Input/output error"):
        emit(tmp_path / "p", b"new", force=True)
    assert snapshot(tmp_path) == before


def test_a_package_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    emit(tmp_path / "p", b"old")
    (tmp_path / "p").rename(tmp_path / f".p.old-{dead_pid()}-01234567")
    with pytest.raises(OutputError, match="--force"):
        emit(tmp_path / "p", b"new")
    assert (tmp_path / "p/plan.json").read_bytes() == b"old"
    assert names(tmp_path) == {"p"}


def test_a_kill_between_the_two_renames_loses_neither_name_nor_package(tmp_path: Path) -> None:
    pid = dead_pid()
    emit(tmp_path / "p", b"old")
    (tmp_path / "p").rename(tmp_path / f".p.old-{pid}-01234567")
    emit(tmp_path / "q", b"new")
    (tmp_path / "q").rename(tmp_path / f".p.tmp-{pid}-01234567")
    with pytest.raises(OutputError, match="--force"):
        emit(tmp_path / "p")
    assert (tmp_path / "p/plan.json").read_bytes() == b"old"
    assert names(tmp_path) == {"p"}


@pytest.mark.usefixtures("no_renameat2")
def test_a_name_that_looks_like_a_temporary_one_is_replaced_as_well(tmp_path: Path) -> None:
    out = tmp_path / f"p.tmp-{dead_pid()}-01234567.old-x"
    emit(out, b"old")
    emit(out, b"new", force=True)
    assert (out / "plan.json").read_bytes() == b"new"
    assert names(tmp_path) == {out.name}


def test_what_killed_runs_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    dead, alive, own = dead_pid(), os.getppid(), os.getpid()
    stale = [f".p.tmp-{dead}-01234567", f".p.old-{dead}-01234567", f".p.tmp-{own}-01234567"]
    kept = [
        f".p.tmp-{alive}-01234567",
        f".q.tmp-{dead}-01234567",
        f".p.tmp-{dead}-0123",
        f".p.tmp-x{dead}-01234567",
        f"p.tmp-{dead}-01234567",
    ]
    emit(tmp_path / "p")
    for name in stale + kept:
        (tmp_path / name / "sub").mkdir(parents=True)
    emit(tmp_path / "p", force=True)
    assert names(tmp_path) == {"p", *kept}


def test_of_two_writers_of_one_name_the_first_to_finish_wins(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a package exists there"):
        build(tmp_path / "p", write_plan, lambda _: emit(tmp_path / "p", b"first"), seal)
    assert (tmp_path / "p/plan.json").read_bytes() == b"first"
    check_files(tmp_path / "p")
    assert names(tmp_path) == {"p"}


@pytest.mark.parametrize("occupy", [a_file, an_empty_folder, a_folder_of_something_else])
def test_a_name_taken_at_the_last_moment_is_not_overwritten(
    occupy: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: object, force: bool) -> None:
        if not os.path.lexists(tmp_path / "p") and list(tmp_path.glob(".p.tmp-*")):
            occupy(tmp_path / "p")

    monkeypatch.setattr(writer, "_check_free_name", taken)
    with pytest.raises(OutputError, match="meanwhile"):
        emit(tmp_path / "p")
    assert names(tmp_path) == {"p"}


def test_a_parent_swapped_for_a_link_does_not_redirect_the_package(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "parent").symlink_to("real")
    with staged_package(tmp_path / "parent/p") as staging:
        (tmp_path / "parent").unlink()
        (tmp_path / "parent").symlink_to("elsewhere")
        seal(staging)
    assert names(tmp_path / "real") == {"p"}
    assert names(tmp_path / "elsewhere") == set()


@pytest.mark.parametrize(("mask", "file_mode"), [(0, 0o644), (0o022, 0o644), (0o077, 0o600)])
def test_modes_follow_the_umask_and_nothing_is_writable_by_others(
    mask: int, file_mode: int, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    with staged_package(tmp_path / "a/p") as staging:
        staging.write("runtime/run.py", b"", "runtime")
        for name, mode in (("open.bin", 0o777), ("closed.bin", 0o400)):
            (staging.folder / name).touch()
            (staging.folder / name).chmod(mode)
            staging.adopt(name, "model")
        seal(staging)
    write_file_atomically(tmp_path / "report.json", b"{}")
    for path in tmp_path.rglob("*"):
        expected = (0o755 & ~mask) if path.is_dir() else file_mode
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a b%?#'\"", "-rf", "p.old-1-01234567"])
def test_every_name_the_file_system_takes_is_taken(name: str, tmp_path: Path) -> None:
    emit(tmp_path / name)
    emit(tmp_path / name, force=True)
    write_file_atomically(tmp_path / "reports" / name, b"{}")
    assert names(tmp_path) == {name, "reports"}


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "nul\0", "..", "a/" * 2100 + "p"])
def test_an_impossible_name_is_refused_before_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        emit(tmp_path / name)
    with pytest.raises(OutputError):
        write_file_atomically(tmp_path / name, b"")
    assert names(tmp_path) == set()


def test_a_loop_of_links_on_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError):
        emit(tmp_path / "loop/p")


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        emit(tmp_path / "file/p")


def test_too_little_space_is_told_before_work_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs 1152921504606846976 bytes or more, \d+ are free"):
        emit(tmp_path / "p", need_bytes=2**60)
    assert names(tmp_path) == set()


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("file_size_limit")
def test_a_file_the_process_may_not_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="size limit") as caught:
        emit(tmp_path / "p", bytes(2**17))
    assert "plan.json" in str(caught.value.path)
    with pytest.raises(OutputError, match="size limit"):
        write_file_atomically(tmp_path / "report.json", bytes(2**17))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("call", ["mkdir", "fsync", "fchmod", "chmod"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_system_call_that_fails_is_an_output_error_and_leaves_nothing(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(os, call)

    def fails_inside_the_package(target: Any, *args: Any, **options: Any) -> Any:
        where = Path(f"/proc/self/fd/{target}").resolve() if isinstance(target, int) else target
        if ".p.tmp-" in str(where):
            raise OSError(code, os.strerror(code))
        return original(target, *args, **options)

    def adopt(staging: Staging) -> None:
        (staging.folder / "copy.bin").touch()
        staging.adopt("copy.bin", "model")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails_inside_the_package)
        with pytest.raises(OutputError) as caught:
            build(tmp_path / "p", write_plan, adopt, seal)
    assert os.strerror(code) in caught.value.message
    assert names(tmp_path) == set()


def test_a_full_disk_met_by_a_library_is_an_output_error(tmp_path: Path) -> None:
    def saves() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("could not save the model")  # noqa: B904  as libraries do

    with pytest.raises(OutputError, match="No space left"), staged_package(tmp_path / "p"):
        saves()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("problem", [FileNotFoundError(2, "template"), RuntimeError("bug")])
def test_other_problems_of_the_block_keep_their_class(problem: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(problem)) as caught, staged_package(tmp_path / "p"):
        raise problem
    assert caught.value is problem


def run_script(script: str, *args: object, prefix: tuple[str, ...] = ()) -> list[Any]:
    root = Path(writer.__file__).parents[2]
    done = subprocess.run(
        [*prefix, sys.executable, "-c", script, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


EMIT = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from edgeqdm.emit import writer
from edgeqdm.emit.integrity import check_files, seal_manifest
from edgeqdm.emit.writer import staged_package
from edgeqdm.errors import OutputError
from edgeqdm.ir.codec import parse_record
from edgeqdm.ir.package import Manifest

manifest = parse_record(sys.argv[1].encode(), Manifest, name="argument")
parent = Path(sys.argv[2])
out = parent / "p"

def emit():
    with staged_package(out, force=True) as staging:
        for index in range(6):
            staging.write(f"part{index}/data.bin", os.urandom(16 * 1024), "model")
        staging.seal(seal_manifest(manifest.model_copy(update={"files": staging.files})))
"""

KILLED = """
pause = random.Random(int(sys.argv[3]))
start = time.monotonic()
emit()
duration = time.monotonic() - start
for kill in range(12):
    if kill % 3 == 0:
        shutil.rmtree(out, ignore_errors=True)
    child = os.fork()
    if child == 0:
        try:
            while True:
                emit()
        finally:
            os._exit(1)
    time.sleep(pause.uniform(0.0, 3 * duration))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    if out.exists():
        check_files(out)
    print(json.dumps({"whole": out.exists(), "left": len(list(parent.glob(".p.*")))}))
emit()
"""

FULL = """
for free in range(0, 160, 16):
    filler = parent / "filler"
    filler.write_bytes(b"")
    status = os.statvfs(parent)
    filler.write_bytes(bytes(status.f_bavail * status.f_frsize - free * 1024))
    try:
        emit()
        print(json.dumps(["whole", len(check_files(out).files)]))
        shutil.rmtree(out)
    except OutputError as problem:
        print(json.dumps([problem.code, problem.message]))
    assert [p.name for p in parent.iterdir()] == ["filler"], list(parent.iterdir())
    filler.unlink()
"""

READ_ONLY = """
try:
    emit()
except OutputError as problem:
    print(json.dumps([problem.code, problem.message]))
"""


@pytest.mark.parametrize("setup", ["", "writer._rename = lambda *_: False"])
def test_a_kill_at_any_point_leaves_a_whole_package_or_none(setup: str, tmp_path: Path) -> None:
    manifest = dump_record(EMPTY_MANIFEST).decode()
    kills = run_script(EMIT + setup + KILLED, manifest, tmp_path, random.randrange(2**32))
    assert len(kills) == 12
    # Otherwise no kill hit a package in the making, and nothing was shown.
    assert any(kill["left"] for kill in kills)
    assert names(tmp_path) == {"p"}
    check_files(tmp_path / "p")


def in_own_mounts(command: str) -> tuple[str, ...]:
    prefix = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    script = f'{command} && exec "$@"'
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    probe = subprocess.run([*prefix, script, "sh", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    return (*prefix, script, "sh")


def test_a_full_disk_leaves_nothing_wherever_it_fills_up(tmp_path: Path) -> None:
    prefix = in_own_mounts(f"mount -t tmpfs -o size=1m none '{tmp_path}'")
    manifest = dump_record(EMPTY_MANIFEST).decode()
    results = run_script(EMIT + FULL, manifest, tmp_path, prefix=prefix)
    codes = [code for code, _ in results]
    # 6 files of 16 KiB and a manifest of one page: 100 KiB on a disk of 4 KiB blocks.
    assert codes == ["EQ-7110"] * 7 + ["whole"] * 3
    assert all("free" in message for code, message in results if code == "EQ-7110")


def test_a_read_only_folder_is_told_before_work(tmp_path: Path) -> None:
    prefix = in_own_mounts(f"mount -t tmpfs -o ro none '{tmp_path}'")
    manifest = dump_record(EMPTY_MANIFEST).decode()
    [[code, message]] = run_script(EMIT + READ_ONLY, manifest, tmp_path, prefix=prefix)
    assert code == "EQ-7111"
    assert "Read-only file system" in message


def test_a_report_is_written_and_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "reports/report.json"
    for content in (b"old", b"new"):
        write_file_atomically(path, content)
        assert path.read_bytes() == content
        assert names(path.parent) == {"report.json"}


@pytest.mark.parametrize("occupy", [an_empty_folder, a_dangling_link, os.mkfifo])
def test_a_report_replaces_nothing_but_a_file(
    occupy: Callable[[Path], None], tmp_path: Path
) -> None:
    occupy(tmp_path / "report")
    with pytest.raises(OutputError, match="EQ-7103"):
        write_file_atomically(tmp_path / "report", b"")
    with pytest.raises(OutputError, match="EQ-7103"):
        check_file_destination(tmp_path / "report")
    assert names(tmp_path) == {"report"}


@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_a_report_never_replaces_a_device(device: str) -> None:
    with pytest.raises(OutputError, match="a device"):
        write_file_atomically(Path(device), b"")


def test_a_failed_report_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_file_atomically(path, b"old")

    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match="Input/output error"):
        write_file_atomically(path, b"new")
    assert snapshot(tmp_path) == {"report.json": b"old"}
