"""What of the node's disk a guest sees, and where its modules lie.

WASI grants whole directories. A mounted directory is granted as it is; a mounted file gets a
directory of its own with nothing but that file, because its real one holds other files too.
"""

import errno
import os
import posixpath
import shutil
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bacalhau.engines.wasm.protocol import Preopen
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_controllers.runner.ports import Mount


def failed(message: str) -> TerminalError:
    """A workload that cannot be started as it is."""
    return TerminalError(message, reason="StartFailed")


@dataclass(frozen=True, slots=True)
class FoundModule:
    """A module file on the node. `target` is set if a mount is this very file."""

    path: Path
    name: str
    target: str = ""


def clean_target(target: str) -> str:
    """A guest path in normal form. Raises TerminalError unless it is absolute and goes down."""
    if not target.startswith("/") or "\0" in target or ".." in target.split("/"):
        raise failed(f"target {target!r} must be an absolute path without '..'")
    return posixpath.normpath("/" + target.lstrip("/"))


def find_module(mounts: Sequence[Mount], name: str, parameter: str) -> FoundModule:
    """The file that a parameter names: the target of an input, or a path beneath one.

    A directory that is the target stands for the one file in it, as an unpacked archive has it.
    """
    wanted = clean_target(name)
    for mount in mounts:
        if clean_target(mount.target) == wanted:
            if _kind(mount.source, wanted) == "file":
                return FoundModule(mount.source, posixpath.basename(wanted), wanted)
            return FoundModule(_only_file(mount.source, wanted), posixpath.basename(wanted))
    over = [m for m in mounts if wanted.startswith(clean_target(m.target).rstrip("/") + "/")]
    for mount in sorted(over, key=lambda m: len(clean_target(m.target)), reverse=True):
        relative = posixpath.relpath(wanted, clean_target(mount.target))
        found = _beneath(mount.source, relative)
        if found is not None:
            return FoundModule(found, posixpath.basename(wanted))
    targets = ", ".join(sorted(m.target for m in mounts)) or "none"
    raise failed(
        f"{parameter} {name!r} is neither the target of an input nor a file in one; "
        f"targets: {targets}"
    )


def grant(mounts: Sequence[Mount], hidden: Iterable[str], staging: Path) -> list[Preopen]:
    """Directories to preopen. Files are gathered in directories made below `staging`.

    Targets in `hidden` (module files, which the guest has no use for) are left out. Raises
    TerminalError for mounts that cannot be granted.
    """
    left_out = set(hidden)
    preopens: list[Preopen] = []
    files: dict[str, list[Mount]] = {}
    seen: set[str] = set()
    for mount in mounts:
        target = clean_target(mount.target)
        if target in seen:
            raise failed(f"two mounts have the target {target}")
        seen.add(target)
        if target in left_out:
            continue
        if _kind(mount.source, target) == "directory":
            preopens.append(
                {"host": str(mount.source), "guest": target, "writable": not mount.read_only}
            )
        elif target == "/":
            raise failed("a file cannot be mounted at /")
        else:
            files.setdefault(posixpath.dirname(target), []).append(mount)
    for number, (parent, group) in enumerate(files.items()):
        if parent in seen:
            raise failed(
                f"file {group[0].target} cannot be mounted into {parent}, which is a mount "
                "itself; choose another directory for one of them"
            )
        if len({mount.read_only for mount in group}) > 1:
            raise failed(f"files in {parent} must be all read-only or all writable")
        directory = staging / str(number)
        directory.mkdir(parents=True)
        for mount in group:
            _stage(mount, directory / posixpath.basename(clean_target(mount.target)))
        writable = not group[0].read_only
        preopens.append({"host": str(directory), "guest": parent, "writable": writable})
    return preopens


def _kind(source: Path, target: str) -> str:
    try:
        mode = os.lstat(source).st_mode
    except OSError as error:
        raise TransientError(
            f"the source of {target} is gone: {error.strerror}: {source}"
        ) from error
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISREG(mode):
        return "file"
    raise failed(f"the source of {target} is neither a file nor a directory: {source}")


def _only_file(directory: Path, target: str) -> Path:
    with os.scandir(directory) as entries:
        files = [e.name for e in entries if e.is_file(follow_symlinks=False)]
    modules = [name for name in files if name.endswith(".wasm")] or files
    if len(modules) != 1:
        raise failed(
            f"{target} is a directory with {len(modules)} files that could be the module; "
            f"name one, as {target}/FILE"
        )
    return directory / modules[0]


def _beneath(root: Path, relative: str) -> Path | None:
    """A regular file below a directory, reached without following any link; None if there is
    none."""
    parts = relative.split("/")
    try:
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for number, part in enumerate(parts):
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            if number < len(parts) - 1:
                flags |= os.O_DIRECTORY
            try:
                below = os.open(part, flags, dir_fd=fd)
            except OSError:
                return None
            os.close(fd)
            fd = below
        return root / relative if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


def _stage(mount: Mount, name: Path) -> None:
    """Put one file under `name`: a hard link, so that a writable one is the file itself."""
    fd = os.open(mount.source, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        itself = f"/proc/self/fd/{fd}"
        found = os.readlink(itself)
        if found != str(mount.source) or not stat.S_ISREG(os.fstat(fd).st_mode):
            raise failed(
                f"the source of {mount.target} is {mount.source}, but that leads to {found}; "
                "a mount may not go through a symbolic link"
            )
        try:
            _link(fd, name)
        except OSError as error:
            # Another file system, or a file of another user where the kernel guards those.
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                raise
            if not mount.read_only:
                raise failed(
                    f"{mount.target} cannot be mounted writable by itself "
                    f"({error.strerror}); mount its directory instead"
                ) from error
            shutil.copyfile(itself, name)
    finally:
        os.close(fd)


def _link(fd: int, name: Path) -> None:
    """Give the open file one more name."""
    # With a directory's descriptor, because only then does Python let the kernel follow the link.
    own = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(str(fd), name, src_dir_fd=own, follow_symlinks=True)
    finally:
        os.close(own)
