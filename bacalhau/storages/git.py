"""Inputs that are a commit of a git repository, by HTTP(S): its files, without `.git`.

A branch or tag is looked up once, and all partitions of the job get the commit that it meant then.
The program `git` does the talking, through a proxy of ours that vets each address; nothing of the
node's own configuration, credentials or hooks takes part. Submodules are empty directories, and files
in git LFS are their pointers.
"""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bacalhau.archive import ArchiveError, ArchiveLimits, extract
from bacalhau.params import read_params
from bacalhau.storages.cache import Fetch, InputCache, use_key
from bacalhau.storages.disk import disk
from bacalhau.storages.objects import Entry
from bacalhau.storages.pins import Pinned, Pins
from bacalhau.storages.trees import obtain_tree
from bacalhau.transfer import http
from bacalhau.transfer.addresses import AddressPolicy
from bacalhau.transfer.progress import Transfer
from bacalhau.transfer.proxy import VettingProxy
from bacalhau_api.errors import TerminalError, UnavailableError
from bacalhau_api.params import GitSource
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_controllers.runner.ports import Fetched, Health, Progress, Use

LOOKUP_SECONDS = 120.0
FETCH_SECONDS = 3600.0
STALL_SECONDS = 60
ENTRIES_MAX = 1_000_000

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NOT_THERE = re.compile(
    r"not found|does not exist|returned error: 40[134]|could not read (username|password)|"
    r"authentication failed|not our ref|couldn't find remote ref|not a git repository|"
    r"no path specified|unable to parse|not a valid object name",
    re.IGNORECASE,
)


class GitStorage:
    """Fetches commits. `policy` says where it may connect."""

    def __init__(
        self, cache: InputCache, policy: AddressPolicy, pins: Pins, *, size_bytes_max: int
    ) -> None:
        self._cache = cache
        self._policy = policy
        self._pins = pins
        self._size_bytes_max = size_bytes_max
        self._git = shutil.which("git") or ""

    async def health(self) -> Health:
        """Needs the program `git`."""
        if not self._git:
            return Health(is_available=False, reason="the program git is not installed here")
        return Health(is_available=True)

    async def admit(self, source: SpecConfig) -> str:
        """Empty if the URL is one that may be fetched."""
        try:
            params = _params(source)
            parts = http.check_url(params.url)
            with contextlib.suppress(ValueError):
                host = parts.hostname or ""
                self._policy.check(host, host, parts.port or 0)
        except TerminalError as error:
            return error.message
        return ""

    async def fetch(self, item: InputSource, into: Path, use: Use) -> Fetched:
        """A directory with the files of the commit."""
        params = _params(item.source)
        commit = await self._commit(params, use)

        async def fill(fetch: Fetch, staging: Path) -> None:
            await fetch.in_thread(self._check_out, fetch, params.url, commit, staging)

        async with self._cache.hold(into, use_key(item, use)) as hold:
            tree = await obtain_tree(
                hold, f"git:{params.url}#{commit}", fill, size_bytes_max=self._size_bytes_max
            )
            place = await hold.place(tree.files, tree.links)
        return Fetched(place, read_only=True, size_bytes=tree.size_bytes)

    def progress(self, into: Path) -> Progress | None:
        """See Storage."""
        return self._cache.progress(into)

    async def _commit(self, params: GitSource, use: Use) -> str:
        """The commit that this use gets."""
        if _COMMIT.fullmatch(params.ref):
            return params.ref

        async def look_up() -> str:
            transfer = Transfer()
            return await self._cache.threads.run(transfer, self._look_up, params, transfer)

        async def propose() -> Pinned:
            return Pinned.of([Entry(await look_up(), 0, "")], [None], use.partitions)

        if use.partitions <= 1:
            return await look_up()
        (entry,) = await self._pins.share(use, propose)
        return entry.key

    # -- in a thread -----------------------------------------------------------------------------

    def _look_up(self, params: GitSource, transfer: Transfer) -> str:
        """What a branch or tag means now."""
        ref = params.ref or "HEAD"
        names = [ref, f"refs/heads/{ref}", f"refs/tags/{ref}^{{}}", f"refs/tags/{ref}"]
        with tempfile.TemporaryDirectory() as home, self._proxied(transfer) as options:
            run = _Git(self._git, Path(home), options, transfer, self._size_bytes_max)
            out = run("ls-remote", "--", params.url, *names, seconds=LOOKUP_SECONDS)
        lines = [line.split("\t", 1) for line in out.splitlines() if "\t" in line]
        found = {name: commit for commit, name in lines}
        for name in names:
            if _COMMIT.fullmatch(found.get(name, "")):
                return found[name]
        raise TerminalError(
            f"{http.shown(params.url)} has no branch, tag or commit {ref[:200]!r}",
            reason="InputFailed",
        )

    def _check_out(self, fetch: Fetch, url: str, commit: str, staging: Path) -> None:
        home = staging.with_name(f"{staging.name}g")
        limits = ArchiveLimits(
            entries_max=ENTRIES_MAX, size_bytes_max=self._size_bytes_max, may_differ_in_case=True
        )
        try:
            with disk("the input cache cannot be written"):
                shutil.rmtree(home, ignore_errors=True)
                home.mkdir(mode=0o700)
            with self._proxied(fetch.transfer) as options:
                run = _Git(self._git, home, options, fetch.transfer, self._size_bytes_max)
                run("init", "--quiet", "--bare", "--template=", "repo", seconds=LOOKUP_SECONDS)
                self._fetch(run, url, commit)
            with disk("the input cache cannot be written"):
                # Attributes in the repository could leave files out, or write into them.
                (home / "repo" / "info").mkdir(exist_ok=True)
                (home / "repo" / "info" / "attributes").write_text(
                    "* -export-ignore -export-subst\n"
                )
            with run.stream("--git-dir=repo", "archive", "--format=tar", commit) as tar:
                extract(tar, staging, limits)  # type: ignore[arg-type]
        except ArchiveError as error:
            raise TerminalError(
                f"commit {commit} of {http.shown(url)} cannot be used: {error.message}",
                reason="InputFailed",
            ) from error
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def _fetch(self, run: "_Git", url: str, commit: str) -> None:
        """The commit alone; from servers that do not give single commits, everything."""
        args = ("--git-dir=repo", "fetch", "--quiet", "--no-tags", "--depth=1", "--", url, commit)
        try:
            run(*args, seconds=FETCH_SECONDS)
        except TerminalError as error:
            if "our ref" not in error.message and "unadvertised" not in error.message:
                raise
            refs = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
            run("--git-dir=repo", "fetch", "--quiet", "--", url, *refs, seconds=FETCH_SECONDS)
            run("--git-dir=repo", "cat-file", "-e", f"{commit}^{{commit}}", seconds=LOOKUP_SECONDS)

    @contextlib.contextmanager
    def _proxied(self, transfer: Transfer) -> Iterator[list[str]]:
        """Options for git; a refusal of an address is raised in place of git's own error."""
        proxy = VettingProxy(self._policy, transfer)
        with proxy.running() as address:
            try:
                yield ["-c", f"http.proxy={address}"]
            except (TerminalError, UnavailableError):
                if proxy.refusals:
                    raise proxy.refusals[0] from None
                raise


class _Git:
    """Runs git with a configuration of ours and no other."""

    def __init__(
        self, program: str, home: Path, options: list[str], transfer: Transfer, bytes_max: int
    ) -> None:
        self._home = home
        self._transfer = transfer
        self._bytes_max = bytes_max
        self._command = [
            program, *options,
            "-c", "protocol.allow=never", "-c", "protocol.http.allow=always",
            "-c", "protocol.https.allow=always", "-c", "core.hooksPath=/dev/null",
            "-c", "http.lowSpeedLimit=1", "-c", f"http.lowSpeedTime={STALL_SECONDS}",
            "-c", "http.followRedirects=initial", "-c", "credential.helper=",
            "-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "fetch.fsckObjects=true",
        ]  # fmt: skip

    def __call__(self, *args: str, seconds: float) -> str:
        """Its standard output. Raises TerminalError or UnavailableError."""
        with self._started(args) as process:
            try:
                out, words = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired as error:
                raise UnavailableError(f"git took more than {seconds:.0f} s") from error
            self._check(process.returncode, words)
            return out.decode("utf-8", "replace")

    @contextlib.contextmanager
    def stream(self, *args: str) -> "Iterator[object]":
        """Its standard output as a file."""
        with self._started(args) as process:
            assert process.stdout is not None
            yield process.stdout
            assert process.stderr is not None
            words = process.stderr.read()
            self._check(process.wait(LOOKUP_SECONDS), words)

    @contextlib.contextmanager
    def _started(self, args: tuple[str, ...]) -> Iterator[subprocess.Popen[bytes]]:
        self._transfer.check()
        process = subprocess.Popen(
            [*self._command, *args],
            cwd=self._home,
            env={
                "PATH": os.defpath, "HOME": str(self._home), "LC_ALL": "C",
                "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull,
                "GIT_ATTR_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        # A pack is one file: this is what bounds a repository that never ends.
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (self._bytes_max,) * 2)
        forget = self._transfer.on_cancel(lambda: _kill(process))
        try:
            with process:
                try:
                    yield process
                except BaseException:
                    _kill(process)
                    raise
        finally:
            forget()

    def _check(self, code: int, words: bytes) -> None:
        if code == 0:
            return
        self._transfer.check()
        lines = words.decode("utf-8", "replace").split("\n")
        text = " ".join(" ".join(lines).split())[-400:]
        text = re.sub(r"//[^/@\s]*@", "//", text)
        too_large = (f"signal {signal.SIGXFSZ.value}", "File too large", "write error")
        if code == -signal.SIGXFSZ or any(one in text for one in too_large):
            raise TerminalError(
                f"the repository has more than {self._bytes_max} bytes (--input-max-size)",
                reason="InputTooLarge",
            )
        if _NOT_THERE.search(text):
            raise TerminalError(f"git: {text}", reason="InputFailed")
        raise UnavailableError(f"git: {text}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _params(source: SpecConfig) -> GitSource:
    params = read_params(GitSource, source.params, what="source git", reason="InvalidInput")
    if not params.url.lower().startswith(("http://", "https://")):
        raise TerminalError(
            "source git: params.url must begin with https:// or http://: nodes fetch by HTTP, where "
            "they can vet addresses",
            reason="InvalidInput",
        )
    if params.ref.startswith("-") or re.search(r"[\s~^:?*\[\\\x00-\x1f]|\.\.|@\{", params.ref):
        raise TerminalError(
            f"source git: params.ref {params.ref[:100]!r} is no name of a branch or tag",
            reason="InvalidInput",
        )
    return params
