"""`Tree`: a directory at one moment, by git's HEAD or by the files themselves, parsed once.

Nothing is parsed again that was parsed before: not a file with the same stamp, not a blob with the
same id.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Final

from bacalhau.gitops import git
from bacalhau.gitops.files import AbsentError, Scan, Stamp, read_files, scan
from bacalhau.gitops.ignore import IGNORE_FILE, Selection, ignore_lines
from bacalhau.gitops.parse import FILE_BYTES_MAX, Parsed, digest_of, parse_file, wrong
from bacalhau.gitops.wake import watch
from bacalhau_api.errors import InvalidError
from bacalhau_api.v1.source import SourceProblem, SourceSpec
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.gitops import TreeView

logger = logging.getLogger(__name__)

REST_SECONDS_MAX: Final = 10.0
"""Longest wait for a directory to come to rest, beside its settle time."""

_LINK: Final = "120000"
_SUBMODULE: Final = "160000"
_LINKS_MAX: Final = 8


class DirectoryTree:
    """One directory. See `bacalhau_controllers.gitops.Tree`."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self._root = root
        self._clock = clock
        self._parsed: dict[tuple[str, str], Parsed] = {}
        self._stamps: dict[str, Stamp] = {}
        self._digests: dict[str, str] = {}
        self._key: object = None
        self._scanned: Scan | None = None
        self._view = TreeView()
        self._reading: asyncio.Task[TreeView] | None = None
        self._is_git: bool | None = None
        self._kind_changed = asyncio.Event()

    @property
    def path(self) -> str:
        """See Tree."""
        return str(self._root)

    async def read(self, spec: SourceSpec) -> TreeView:
        """See Tree. A reader that is cancelled leaves its work to the next one: the first look at a
        large directory may take longer than anybody waits."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(spec), name=f"read {self._root}")
        return await asyncio.shield(self._reading)

    async def _read(self, spec: SourceSpec) -> TreeView:
        try:
            if spec.view != "files":
                try:
                    clone = await git.find(self._root)
                except git.NotAClone as error:
                    if spec.view == "git":
                        return _absent(f"{self._root} is not a git clone: {error}")
                else:
                    self._note_kind(is_git=True)
                    return await self._read_commit(clone, spec)
            self._note_kind(is_git=False)
            return await self._read_files(spec)
        except git.GitError as error:
            if not self._root.is_dir():
                return _absent(f"{self._root} is not there, or not a directory", "Missing")
            return _absent(str(error))
        except AbsentError as error:
            return _absent(str(error), "Missing")
        except InvalidError as error:
            return _absent(error.message)

    # -- git -------------------------------------------------------------------------------------

    async def _read_commit(self, clone: git.Clone, spec: SourceSpec) -> TreeView:
        commit = await git.head(clone)
        if not commit:
            return _absent(f"{self._root} has no commit yet: commit something")
        key = ("git", commit, clone.prefix, spec.namespace, spec.ignore)
        if key == self._key:
            return self._view
        entries = await git.files(clone, commit) or ()
        by_path = {entry.path: entry for entry in entries}
        patterns = list[str]()
        if (listed := by_path.get(IGNORE_FILE)) is not None:
            found = await git.contents(clone, [listed.blob])
            patterns = ignore_lines(found[listed.blob][:FILE_BYTES_MAX])
        selection = Selection([*patterns, *spec.ignore])
        problems: list[SourceProblem] = []
        blobs: dict[str, str] = {}
        links = {e.blob for e in entries if e.mode == _LINK and selection.takes(e.path)}
        targets = await git.contents(clone, sorted(links))
        for entry in entries:
            if entry.mode == _SUBMODULE or not selection.takes(entry.path):
                continue
            real = _follow(entry, by_path, targets)
            if real is None:
                message = "is a link to something that is not in the directory"
                hint = f"put the file itself there, or name the link in {IGNORE_FILE}"
                problems.append(wrong(entry.path, "Link", message, hint))
            elif real.size > FILE_BYTES_MAX:
                problems.append(wrong(entry.path, "TooLarge", f"has {real.size} bytes"))
            else:
                blobs[entry.path] = real.blob
        need = {blob for path, blob in blobs.items() if not self._has(path, blob, spec)}
        texts = await git.contents(clone, sorted(need))
        await asyncio.to_thread(
            self._parse, {p: (b, texts[b]) for p, b in blobs.items() if b in texts}, spec
        )
        return self._finish(key, commit, commit, blobs, problems, (), spec)

    # -- files -----------------------------------------------------------------------------------

    async def _read_files(self, spec: SourceSpec) -> TreeView:
        selection = await asyncio.to_thread(self._selection, spec)
        key = ("files", spec.namespace, spec.ignore)
        found = await asyncio.to_thread(scan, self._root, selection)
        if self._key == key and self._scanned == found and not found.busy:
            return self._view
        deadline = self._clock.monotonic() + REST_SECONDS_MAX + 2 * spec.settle_seconds
        while True:
            await self._clock.sleep(spec.settle_seconds)
            selection = await asyncio.to_thread(self._selection, spec)
            again = await asyncio.to_thread(scan, self._root, selection)
            if again == found and not again.busy:
                contents = await asyncio.to_thread(read_files, self._root, again, self._stamps)
                after = await asyncio.to_thread(scan, self._root, selection)
                if after == found:
                    break
                again = after
            found = again
            if self._clock.monotonic() > deadline:
                why = found.busy or "it keeps changing"
                return _absent(f"{self._root} is not at rest: {why}", "Unsettled")
        return await self._take(key, found, again, contents, spec)

    async def _take(
        self,
        key: object,
        found: Scan,
        read: Scan,
        contents: Mapping[str, bytes],
        spec: SourceSpec,
    ) -> TreeView:
        unread = {problem.file for problem in read.problems}
        digests = {p: self._digests[p] for p in found.stamps if p in self._digests}
        digests |= {p: hashlib.sha256(data).hexdigest() for p, data in contents.items()}
        digests = {p: d for p, d in digests.items() if p not in unread}
        missing = [p for p, d in digests.items() if p not in contents and not self._has(p, d, spec)]
        if missing:  # the namespace was changed: everything is read anew
            contents = {**contents, **await asyncio.to_thread(self._reread, missing)}
        await asyncio.to_thread(
            self._parse, {p: (digests[p], data) for p, data in contents.items()}, spec
        )
        view = self._finish(
            None, digest_of(digests), "", digests, read.problems, tuple(found.mounts), spec
        )
        self._stamps = {p: s for p, s in found.stamps.items() if p in digests}
        self._digests = digests
        self._key, self._scanned = (key, found) if not unread else (None, None)
        return view

    def _reread(self, paths: list[str]) -> dict[str, bytes]:
        found = {}
        for path in paths:
            with suppress(OSError), (self._root / path).open("rb") as file:
                found[path] = file.read(FILE_BYTES_MAX + 1)
        return found

    def _selection(self, spec: SourceSpec) -> Selection:
        patterns: list[str] = []
        with suppress(OSError), (self._root / IGNORE_FILE).open("rb") as file:
            patterns = ignore_lines(file.read(FILE_BYTES_MAX))
        return Selection([*patterns, *spec.ignore])

    # -- both ------------------------------------------------------------------------------------

    def _has(self, path: str, digest: str, spec: SourceSpec) -> bool:
        return (_name(path, spec), digest) in self._parsed

    def _parse(self, texts: Mapping[str, tuple[str, bytes]], spec: SourceSpec) -> None:
        """In a thread; nobody else touches what it writes while a read is under way."""
        for path, (digest, data) in texts.items():
            place = (_name(path, spec), digest)
            if place not in self._parsed:
                self._parsed[place] = parse_file(path, data, spec.namespace)

    def _finish(
        self,
        key: object,
        revision: str,
        commit: str,
        digests: Mapping[str, str],
        problems: list[SourceProblem],
        mounts: tuple[str, ...],
        spec: SourceSpec,
    ) -> TreeView:
        places = [(_name(path, spec), digests[path]) for path in sorted(digests)]
        parsed = [self._parsed[place] for place in places]
        self._parsed = dict(zip(places, parsed, strict=True))
        self._view = TreeView(
            revision=revision,
            commit=commit,
            files=len(digests) + len(problems),
            declared=tuple(item for one in parsed for item in one.declared),
            problems=(*problems, *(p for one in parsed for p in one.problems)),
            mounts=mounts,
        )
        self._key = key
        return self._view

    # -- waking ----------------------------------------------------------------------------------

    def _note_kind(self, *, is_git: bool) -> None:
        if is_git != self._is_git:
            self._is_git = is_git
            self._kind_changed.set()

    @asynccontextmanager
    async def watching(self, wake: Callable[[], None]) -> AsyncIterator[None]:
        """See Tree."""
        stop = asyncio.Event()
        task = asyncio.create_task(self._watch(wake, stop), name=f"watch {self._root}")
        try:
            yield
        finally:
            stop.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self._reading is not None:
                await asyncio.gather(self._reading, return_exceptions=True)

    async def _watch(self, wake: Callable[[], None], stop: asyncio.Event) -> None:
        """Watch what matters for the kind of directory it is, and anew once that changes."""
        while not stop.is_set():
            self._kind_changed.clear()
            ended = asyncio.Event()
            try:
                async with asyncio.TaskGroup() as tasks:
                    for paths, recursive in await self._places():
                        tasks.create_task(
                            watch(paths, wake, self._clock, recursive=recursive, stop=ended)
                        )
                    await self._kind_changed.wait()
                    ended.set()
            finally:
                ended.set()

    async def _places(self) -> list[tuple[list[Path], bool]]:
        """What to watch. Of a clone: HEAD and what it may name, not the files."""
        if self._is_git is not False:
            with suppress(git.GitError):
                clone = await git.find(self._root)
                tops = [clone.git_dir, clone.common_dir]
                return [(list(dict.fromkeys(tops)), False), ([clone.common_dir / "refs"], True)]
        return [([self._root], True)]


def _name(path: str, spec: SourceSpec) -> str:
    """What a parsed file depends on, beside its content."""
    return f"{spec.namespace}\0{path}"


def _follow(
    entry: git.Entry, by_path: Mapping[str, git.Entry], targets: Mapping[str, bytes]
) -> git.Entry | None:
    """The file that a link stands for; the entry itself if it is none."""
    for _ in range(_LINKS_MAX):
        if entry.mode != _LINK:
            return entry
        text = targets.get(entry.blob, b"").decode("utf-8", "surrogateescape")
        parts: list[str] = []
        for part in (*PurePosixPath(entry.path).parent.parts, *text.split("/")):
            if part == "..":
                if not parts:
                    return None
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        found = by_path.get("/".join(parts)) if not text.startswith("/") else None
        if found is None:
            return None
        entry = found
    return None


def _absent(why: str, reason: str = "Unreadable") -> TreeView:
    return TreeView(absent=why[:500], absent_reason=reason)  # type: ignore[arg-type]
