"""Packages and reports appear under their name whole, or not at all.

A package is built in a hidden sibling of its final name, flushed to disk file by file, checked
against its manifest as it lies there, and renamed. A process killed at any point leaves the final
name as it was; what it leaves beside it, the next run of the same name sweeps away.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeqdm.emit.integrity import MANIFEST, check_files, path_faults
from edgeqdm.errors import EdgeqdmError, OutputError, VerifyError
from edgeqdm.ir.codec import describe, file_kind, open_regular, parse_json, read_bytes
from edgeqdm.ir.package import FORMAT, Artifact

_FILE_MODE = 0o644
_FOLDER_MODE = 0o755
_LONGEST_NAME = 200
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP)
_NO_SUCH_RENAME = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2

_IN_USE: set[str] = set()
"""Tokens of this process's temporary names: in a container a later one may have the same id."""


class Staging:
    """A package being written. Every file in `folder` must be written or adopted, then sealed."""

    folder: Path
    """Where a library that insists on writing itself may put a file, to be adopted then."""
    files: dict[str, Artifact]
    """Written or adopted so far, by relative POSIX path: the manifest's `files`."""

    def __init__(self, folder: Path, *, folder_mode: int, need_bytes: int) -> None:
        self.folder = folder
        self.files = {}
        self.sealed = False
        self._folder_mode = folder_mode
        self._need_bytes = need_bytes

    def write(self, relative: str, data: bytes, role: str) -> None:
        """Writes one new file and lists it.

        Args:
            relative: path inside the package, see `edgeqdm.emit.integrity.path_faults`.
            data: the whole content.
            role: see `Artifact.role`.

        Raises:
            OutputError: the path is not allowed or taken, or the file cannot be written.
        """
        self._check_new(relative)
        self._create(relative, data)
        self._list(relative, hashlib.sha256(data).hexdigest(), len(data), role)

    def adopt(self, relative: str, role: str) -> None:
        """Lists a file that something else has written into `folder`."""
        self._check_new(relative)
        path = self.folder / relative
        with (
            _output_errors(path, self._need_bytes),
            open_regular(path, error=OutputError, flags=os.O_NOFOLLOW) as file,
        ):
            # What a library creates can be open to all (umask 0) or to its owner only (mkstemp).
            os.fchmod(file.fileno(), self._folder_mode & _FILE_MODE)
            _sync_file(file.fileno())
            size = os.fstat(file.fileno()).st_size
            self._list(relative, hashlib.file_digest(file, "sha256").hexdigest(), size, role)

    def seal(self, manifest: bytes) -> None:
        """Writes the manifest, which must list exactly `files`; nothing may be written after."""
        self._check_open()
        self._create(MANIFEST, manifest)
        self.sealed = True

    def _check_open(self) -> None:
        if self.sealed:
            raise RuntimeError("the package is sealed: nothing can be added after the manifest")

    def _check_new(self, relative: str) -> None:
        self._check_open()
        if relative in self.files or relative == MANIFEST:
            raise OutputError("EQ-7101", "written twice", path=describe(relative))
        faults = path_faults([*self.files, relative])
        if faults:
            raise OutputError("EQ-7102", f"not a path of a package: {faults[0]}", path=self.folder)

    def _create(self, relative: str, data: bytes) -> None:
        path = self.folder / relative
        with _output_errors(path, max(self._need_bytes, len(data))):
            path.parent.mkdir(parents=True, exist_ok=True)
            _create_file(path, data)

    def _list(self, relative: str, sha256: str, size: int, role: str) -> None:
        self.files[relative] = Artifact(sha256=sha256, size=size, role=role)


def check_destination(out: Path, *, force: bool = False) -> None:
    """Raise the OutputError that `staged_package` would, before hours of work instead of after.

    Missing parents of `out` are created.
    """
    with _output_errors(out, 0):
        parent, name = _resolve(out)
        _sweep(parent, name)
        _check_free_name(parent / name, force=force)


@contextlib.contextmanager
def staged_package(out: Path, *, force: bool = False, need_bytes: int = 0) -> Iterator[Staging]:
    """A package that appears at `out` when the block ends, and only if it ends well.

    The block must call `Staging.seal`. On any exception, an interrupt included, the temporary
    folder is removed and `out` stays as it was.

    Args:
        out: folder to create; missing parents are created too.
        force: replace a package of edgeqdm at `out`, in one step where the system can. Anything
            else at `out`, or a file there that is not part of the package, is never deleted.
        need_bytes: estimate of the package's size, checked against the free space first.

    Raises:
        OutputError: `out` is taken, not writable or too small, or what was written does not read
            back as the manifest says.
    """
    with _output_errors(out, need_bytes):
        parent, name = _resolve(out)
        _sweep(parent, name)
        _check_free_name(parent / name, force=force)
        _check_space(parent, need_bytes)
    with _temporary_name(name) as temporary:
        folder = parent / temporary
        try:
            with _output_errors(out, need_bytes):
                folder_mode = _make_private_folder(folder)
            staging = Staging(folder, folder_mode=folder_mode, need_bytes=need_bytes)
            with _space_errors(out, need_bytes):
                yield staging
            if not staging.sealed:
                raise RuntimeError("the package was not sealed: it has no manifest")
            with _output_errors(out, need_bytes):
                _settle(folder, folder_mode)
                _check_free_name(parent / name, force=force)
                _publish(parent, temporary, name, replace=force)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which appears at `out` when the block ends, and only if it ends well.

    Raises:
        OutputError: something is at `out` already, or it cannot be written.
    """
    with _output_errors(out, 0):
        parent, name = _resolve(out)
        _sweep(parent, name)
        check_folder_destination(parent / name)
    with _temporary_name(name) as temporary:
        folder = parent / temporary
        try:
            with _output_errors(out, 0):
                folder_mode = _make_private_folder(folder)
                yield folder
                os.chmod(folder, folder_mode)
                _publish(parent, temporary, name, replace=False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def check_folder_destination(out: Path) -> None:
    """Raise OutputError if anything is at `out`; nothing of the user's is ever replaced."""
    kind = _kind(out)
    if kind is not None:
        hint = "choose another name, or move it away"
        raise OutputError("EQ-7112", f"{file_kind(kind)} is there already", path=out, hint=hint)


def check_file_destination(path: Path) -> None:
    """Raise the OutputError that `write_file_atomically` would, before hours of work.

    Missing parents of `path` are created.
    """
    with _output_errors(path, 0):
        _resolve_file(path)


def write_file_atomically(path: Path, data: bytes) -> None:
    """Writes one file, a report or picture; a file of that name is replaced in one step.

    Raises:
        OutputError: the file cannot be written, or `path` is a link, folder or device.
    """
    with _output_errors(path, len(data)):
        parent, name = _resolve_file(path)
        _check_space(parent, len(data))
        with _temporary_name(name) as temporary:
            try:
                _create_file(parent / temporary, data)
                os.replace(parent / temporary, parent / name)
            finally:
                (parent / temporary).unlink(missing_ok=True)
        _sync_folder(parent)


def _resolve(out: Path) -> tuple[Path, str]:
    """Folder with all links resolved, created if missing, and the name to write in it."""
    if out.name in ("", "..") or "\0" in str(out):
        raise OutputError("EQ-7104", "not a name that can be written", path=describe(str(out)))
    try:
        parent = out.parent.resolve()
    except RuntimeError as problem:  # Python 3.11 and 3.12 raise it for a loop of links
        raise OutputError("EQ-7105", "links that lead in a circle", path=out) from problem
    _make_folders(parent)
    _kind(parent / out.name)  # raises now, not after hours of work, where the name is too long
    return parent, out.name


def _resolve_file(path: Path) -> tuple[Path, str]:
    """The same for one file, which may replace a file and nothing else."""
    parent, name = _resolve(path)
    _sweep(parent, name)
    kind = _kind(parent / name)
    if kind not in (None, stat.S_IFREG):
        raise OutputError("EQ-7103", f"exists and is {file_kind(kind)}", path=path)
    return parent, name


def _make_folders(folder: Path) -> None:
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    for one in reversed(missing):
        one.mkdir(mode=_FOLDER_MODE, exist_ok=True)


def _kind(path: Path) -> int | None:
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except FileNotFoundError:
        return None


def _check_free_name(out: Path, *, force: bool) -> None:
    kind = _kind(out)
    if kind is None:
        return
    listed = _listed_files(out) if kind == stat.S_IFDIR else None
    if listed is None:
        hint = "choose another name; only packages of edgeqdm are ever replaced"
        message = f"exists and is not a package but {file_kind(kind)}"
        raise OutputError("EQ-7106", message, path=out, hint=hint)
    if not force:
        raise OutputError("EQ-7107", "a package exists there", path=out, hint="--force replaces it")
    foreign = sorted(_files_below(out) - listed)
    if foreign:
        names = ", ".join(describe(f) for f in foreign[:5])
        message = f"the package there holds {len(foreign)} files that are not part of it: {names}"
        raise OutputError("EQ-7108", message, path=out, hint="move them away first")


def _listed_files(folder: Path) -> set[str] | None:
    """Files that belong to the package in `folder`, damaged or not; None if it is no package."""
    path = folder / MANIFEST
    if _kind(path) != stat.S_IFREG:
        return None
    try:
        document = parse_json(read_bytes(path, error=OutputError), name=str(path))
    except EdgeqdmError:
        return None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return None
    files = document.get("files")
    return {MANIFEST, *(files if isinstance(files, dict) else ())}


def _files_below(folder: Path) -> set[str]:
    return {
        (Path(where) / name).relative_to(folder).as_posix()
        for where, folders, names in os.walk(folder)
        for name in [*names, *(f for f in folders if (Path(where) / f).is_symlink())]
    }


def _check_space(parent: Path, need_bytes: int) -> None:
    free = _free_bytes(parent)
    if need_bytes > free:
        raise _no_space(parent, need_bytes, free)


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _no_space(path: Path, need_bytes: int, free: int, reason: str = "") -> OutputError:
    message = f"not enough space{reason}: needs {need_bytes} bytes or more, {free} are free"
    return OutputError("EQ-7110", message, path=path, hint="free some space or write elsewhere")


def _temporary_prefix(name: str) -> str:
    # A legal name of 255 bytes leaves no room for a suffix.
    too_long = len(os.fsencode(name)) > _LONGEST_NAME
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32] if too_long else name


@contextlib.contextmanager
def _temporary_name(name: str) -> Iterator[str]:
    token = secrets.token_hex(4)
    _IN_USE.add(token)
    try:
        yield f".{_temporary_prefix(name)}.tmp-{os.getpid()}-{token}"
    finally:
        _IN_USE.discard(token)


def _sweep(parent: Path, name: str) -> None:
    """Removes what killed runs left beside `name`; a package moved aside by one comes back."""
    pattern = re.compile(
        re.escape(f".{_temporary_prefix(name)}.") + r"(tmp|old)-([0-9]{1,10})-([0-9a-f]{8})"
    )
    for entry in sorted(os.listdir(parent)):
        match = pattern.fullmatch(entry)
        if match is None or _alive(int(match[2]), token=match[3]):
            continue
        # What another run sweeps at the same time, or another user owns, is no reason to fail.
        with contextlib.suppress(OSError):
            if match[1] == "old" and _kind(parent / name) is None:
                os.rename(parent / entry, parent / name)
            else:
                _remove(parent, entry, name)


def _remove(parent: Path, entry: str, name: str) -> None:
    # Renamed first: a package deleted only in part must not be one that could come back.
    with _temporary_name(name) as doomed:
        os.rename(parent / entry, parent / doomed)
        if _kind(parent / doomed) == stat.S_IFDIR:
            shutil.rmtree(parent / doomed, ignore_errors=True)
        else:
            (parent / doomed).unlink()


def _alive(pid: int, token: str) -> bool:
    if pid == os.getpid():
        return token in _IN_USE
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _make_private_folder(folder: Path) -> int:
    """Creates it for this user only; returns the mode the umask gives a folder."""
    folder.mkdir(mode=0o700)
    probe = folder / ".probe"
    probe.mkdir(mode=_FOLDER_MODE)
    mode = stat.S_IMODE(probe.stat().st_mode) & _FOLDER_MODE
    probe.rmdir()
    return mode


def _create_file(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, _FILE_MODE), "wb") as file:
        file.write(data)
        file.flush()
        _sync_file(file.fileno())


def _sync_file(descriptor: int) -> None:
    os.fsync(descriptor)
    if sys.platform == "linux":
        # So that reading it back asks the disk, not the memory it was just copied from.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync_open_folder(descriptor)
    finally:
        os.close(descriptor)


def _sync_open_folder(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in _NO_DIRECTORY_SYNC:
            raise


def _settle(folder: Path, folder_mode: int) -> None:
    """Final modes, folders flushed bottom-up, and everything read back once."""
    for where, _, _ in os.walk(folder, topdown=False):
        os.chmod(where, folder_mode)
        _sync_folder(Path(where))
    try:
        check_files(folder)
    except VerifyError as problem:
        message = f"the package does not read back as its manifest says: {problem.message}"
        raise OutputError("EQ-7109", message, path=problem.path) from problem


def _publish(parent: Path, temporary: str, name: str, *, replace: bool) -> None:
    # By descriptor: a parent that is swapped for a link meanwhile does not redirect the package.
    parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not replace or _kind(parent / name) is None:
            _rename_to_free_name(parent_fd, temporary, name)
        elif not _rename(parent_fd, temporary, name, _RENAME_EXCHANGE):
            _swap_in_two_steps(parent_fd, temporary, name)
        _sync_open_folder(parent_fd)
    finally:
        os.close(parent_fd)


def _rename_to_free_name(parent_fd: int, temporary: str, name: str) -> None:
    if not _rename(parent_fd, temporary, name, _RENAME_NOREPLACE):
        os.rename(temporary, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)


def _swap_in_two_steps(parent_fd: int, temporary: str, name: str) -> None:
    """Killed between the two renames, the next run finds the old package and puts it back."""
    prefix, _, token = temporary.rpartition(".tmp-")
    old = f"{prefix}.old-{token}"
    os.rename(name, old, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
    try:
        os.rename(temporary, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
    except BaseException:
        os.rename(old, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
        raise
    # Under its temporary name again it is deleted, and never taken for the one to put back.
    os.rename(old, temporary, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)


def _rename(parent_fd: int, source: str, target: str, flag: int) -> bool:
    """`renameat2` with one flag; False where system or file system do not know it."""
    function: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(parent_fd, os.fsencode(source), parent_fd, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_RENAME:
        return False
    raise OSError(code, os.strerror(code), target)


@contextlib.contextmanager
def _output_errors(path: Path, need_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise _output_error(problem, path, need_bytes) from problem


@contextlib.contextmanager
def _space_errors(path: Path, need_bytes: int) -> Iterator[None]:
    """For the caller's block: only a full disk is the output's fault, even inside a library."""
    try:
        yield
    except EdgeqdmError:
        raise
    except Exception as problem:
        full = _full_disk(problem)
        if full is None:
            raise
        raise _output_error(full, path, need_bytes) from problem


def _full_disk(problem: BaseException | None) -> OSError | None:
    while problem is not None:
        if isinstance(problem, OSError) and problem.errno in (*_NO_SPACE, errno.EFBIG):
            return problem
        problem = problem.__cause__ or problem.__context__
    return None


def _output_error(problem: OSError, path: Path, need_bytes: int) -> OutputError:
    reason = problem.strerror or str(problem)
    if problem.errno in _NO_SPACE:
        existing = next((p for p in path.absolute().parents if p.exists()), Path("/"))
        with contextlib.suppress(OSError):
            return _no_space(path, need_bytes, _free_bytes(existing), f" ({reason})")
    if problem.errno == errno.EFBIG:
        reason = "the file would exceed the size limit of this process"
    if problem.errno in (errno.EEXIST, errno.ENOTEMPTY):
        reason = "something else was written there meanwhile"
    return OutputError("EQ-7111", f"cannot be written: {reason}", path=path)
