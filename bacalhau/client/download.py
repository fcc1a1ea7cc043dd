"""Downloads accepted results: resumable, verified, and there all at once or not at all.

Everything is first fetched into a hidden directory beside the target. A download that was
interrupted goes on from there; when all is complete and its digest right, the files are put in
their places and the whole is renamed to the target.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bacalhau.client.layout import Layout, Placement, Source, check_parts, place
from bacalhau.replies import ResultItem
from bacalhau_api.errors import (
    InvalidError,
    NotFoundError,
    Problem,
    TerminalError,
    UnavailableError,
)
from bacalhau_api.v1.execution import Execution, OutputFile

if TYPE_CHECKING:
    from bacalhau.client.sync import Client

THREADS: Final = 4
_COPY_BYTES: Final = 1024 * 1024
_TRIES_MAX: Final = 5
_PAUSE_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is. `resumed_bytes` were there from an earlier try."""

    done_bytes: int
    total_bytes: int
    done_files: int
    total_files: int
    resumed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What was downloaded, and what the user should know about it."""

    path: Path
    files: int
    size_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """One execution's outputs."""

    slot: str
    execution: str
    uid: str
    digest: str
    files: tuple[OutputFile, ...]


def result_of(execution: Execution) -> ResultItem:
    """An execution as if it were an accepted result, to download what a failed attempt left."""
    report = execution.status.report
    return ResultItem(
        slot=str(execution.spec.slot),
        execution=execution.name,
        execution_uid=execution.metadata.uid,
        node=execution.spec.node,
        outputs=report.outputs if report else None,
    )


def download(
    client: "Client",
    items: Sequence[ResultItem],
    namespace: str,
    into: Path,
    *,
    layout: Layout = "auto",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Downloaded:
    """Download results to the directory `into`, which must not exist or be empty.

    Raises InvalidError (the target), UnavailableError (a node or the server is away: call again to
    go on), TerminalError (contents are not what the node recorded).
    """
    if not items:
        raise NotFoundError("there are no results to download")
    into = Path(os.path.abspath(into))
    _check_target(into)
    parts = [_list(client, item, namespace) for item in items]
    placement = place([(p.slot, [f.path for f in p.files]) for p in parts], layout)
    staging = into.parent / f".{into.name}.download"
    _prepare(staging, parts)
    _Fetch(client, namespace, staging, parts, on_progress).run()
    for part in parts:
        _verify(staging, part)
    _assemble(staging, placement)
    with contextlib.suppress(FileNotFoundError):
        into.rmdir()
    os.rename(staging / "tree", into)
    shutil.rmtree(staging)
    files = [file for part in parts for file in part.files]
    return Downloaded(into, len(files), sum(f.size_bytes for f in files), placement.notes)


def _check_target(into: Path) -> None:
    if not into.parent.is_dir():
        hint = "make it, or choose another with -o"
        raise InvalidError([Problem(str(into.parent), "is not a directory", hint=hint)])
    is_taken = into.is_symlink() or into.exists()
    if is_taken and (into.is_symlink() or not into.is_dir() or any(into.iterdir())):
        hint = "choose another directory with -o, or move this one away"
        raise InvalidError([Problem(str(into), "exists and is not an empty directory", hint=hint)])


def _list(client: "Client", item: ResultItem, namespace: str) -> _Part:
    files = tuple(client.outputs(item.execution, namespace))
    digest = item.outputs.digest if item.outputs else ""
    return _Part(item.slot, item.execution, item.execution_uid, digest, files)


def _prepare(staging: Path, parts: Sequence[_Part]) -> None:
    """Make the staging directory, or keep it if it is one of this very download."""
    wanted = json.dumps([[p.slot, p.execution, p.uid, p.digest] for p in parts])
    state = staging / "state.json"
    if staging.is_dir() and not staging.is_symlink():
        with contextlib.suppress(OSError):
            if state.read_text() == wanted:
                shutil.rmtree(staging / "tree", ignore_errors=True)
                return
        shutil.rmtree(staging)
    (staging / "files").mkdir(parents=True, mode=0o700)
    state.write_text(wanted)


def _staged(staging: Path, source: Source) -> Path:
    return staging.joinpath("files", source.slot, *check_parts(source.path))


class _Fetch:
    """Brings all files of all parts to the staging directory, a few at a time."""

    def __init__(
        self,
        client: "Client",
        namespace: str,
        staging: Path,
        parts: Sequence[_Part],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._staging = staging
        self._files = [(part, file) for part in parts for file in part.files]
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._done_bytes = self._resumed_bytes = self._done_files = 0
        self._total_bytes = sum(file.size_bytes for _, file in self._files)

    def run(self) -> None:
        """Return once everything is there. The first error stops the rest."""
        self._tell()
        with ThreadPoolExecutor(THREADS, "download") as pool:
            futures = [pool.submit(self._fetch, part, file) for part, file in self._files]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _fetch(self, part: _Part, file: OutputFile) -> None:
        path = _staged(self._staging, Source(part.slot, file.path))
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "ab") as target:
            at = target.tell()
            if at > file.size_bytes:
                target.truncate(0)
                at = 0
            with self._lock:
                self._done_bytes += at
                self._resumed_bytes += at
            tries = 0
            while True:
                before = at
                try:
                    at = self._copy(part, file, target.write, at)
                    break
                except UnavailableError:
                    at = target.tell()
                    # What brings something is worth going on with, however often it breaks off.
                    tries = 1 if at > before else tries + 1
                    if tries == _TRIES_MAX or self._stop.wait(_PAUSE_SECONDS * 2**tries):
                        raise
        if self._stop.is_set():
            return
        if at != file.size_bytes:
            raise TerminalError(
                f"{file.path} of {part.execution} has {at} bytes, not {file.size_bytes}",
                reason="ContentsChanged",
            )
        os.chmod(path, 0o644)
        with self._lock:
            self._done_files += 1
        self._tell()

    def _copy(
        self, part: _Part, file: OutputFile, write: Callable[[bytes], object], at: int
    ) -> int:
        if at == file.size_bytes:
            return at
        with self._client.open_output(
            part.execution, file.path, self._namespace, offset=at
        ) as pieces:
            for piece in pieces:
                if self._stop.is_set():
                    return at
                write(piece)
                at += len(piece)
                with self._lock:
                    self._done_bytes += len(piece)
                self._tell()
        return at

    def _tell(self) -> None:
        with self._lock:
            progress = Progress(
                self._done_bytes,
                self._total_bytes,
                self._done_files,
                len(self._files),
                self._resumed_bytes,
            )
            self._on_progress(progress)


def _verify(staging: Path, part: _Part) -> None:
    """Compare with the digest that the node recorded when the execution ended."""
    if not part.digest:
        return
    found = digest_of(
        [(file.path, _staged(staging, Source(part.slot, file.path))) for file in part.files]
    )
    if found != part.digest:
        shutil.rmtree(staging / "files" / part.slot, ignore_errors=True)
        raise TerminalError(
            f"the outputs of {part.execution} are not those that its node recorded",
            hint="they were changed on the node, or damaged on the way; the download was dropped",
            reason="DigestMismatch",
        )


def digest_of(files: Sequence[tuple[str, Path]]) -> str:
    """The digest of outputs: `sha256:` over the lines `<sha256 hex>  <path>`, sorted by path."""
    whole = hashlib.sha256()
    for name, path in sorted(files):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{digest}  {name}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def _assemble(staging: Path, placement: Placement) -> None:
    """Put the files in their places, as links: what was fetched stays until all is done."""
    tree = staging / "tree"
    tree.mkdir(mode=0o755)
    for target, source in placement.files.items():
        path = tree.joinpath(*check_parts(target))
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = _staged(staging, source)
        try:
            os.link(staged, path, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copyfile(staged, path)
    for target, sources in placement.joined.items():
        with tree.joinpath(*check_parts(target)).open("wb") as joined:
            for source in sources:
                _append(joined.write, _staged(staging, source), is_line=target == "exitCode")


def _append(write: Callable[[bytes], object], path: Path, *, is_line: bool) -> None:
    if is_line:
        write(path.read_bytes().strip() + b"\n")
        return
    with path.open("rb") as file:
        while data := file.read(_COPY_BYTES):
            write(data)
