"""Inputs that are fetched by HTTP: one file, which appears in the target directory by its own name.

With a checksum the bytes are what was asked for, wherever they come from, and nothing is fetched
that is here. Without one the server is asked each time whether what is here is still what it has.
"""

import posixpath
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import unquote

from pydantic import Field

from bacalhau.params import read_params
from bacalhau.storages.cache import Fetch, InputCache, use_key
from bacalhau.storages.checksums import read_sha256
from bacalhau.storages.disk import check_tree_path
from bacalhau.storages.draft import Blob
from bacalhau.transfer import http
from bacalhau.transfer.addresses import AddressPolicy
from bacalhau_api.base import Model
from bacalhau_api.errors import TerminalError, UnavailableError
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_controllers.runner.ports import Fetched, Health, Progress, Use

CHUNK_BYTES = 256 * 1024
RESUMES_MAX = 20
"""Within one fetch, each after at least one byte more than before."""

SETTLED_SECONDS = 60
"""How long after a change, by the server's own clock, its date stands for what is there now: dates
tell seconds, and the clock that stamps a file may be another than the one that answers."""


class UrlParams(Model):
    """Parameters of the source type `urlDownload`."""

    url: str = Field(min_length=1)
    checksum_sha256: str = ""


class UrlStorage:
    """Downloads files. `policy` says where it may connect; `size_bytes_max` bounds one file."""

    def __init__(self, cache: InputCache, policy: AddressPolicy, *, size_bytes_max: int) -> None:
        self._cache = cache
        self._policy = policy
        self._size_bytes_max = size_bytes_max

    async def health(self) -> Health:
        """Needs nothing but the network, which is asked only for jobs."""
        return Health(is_available=True)

    async def admit(self, source: SpecConfig) -> str:
        """Empty if the URL is one that may be fetched. Names are looked up by `fetch`."""
        try:
            params = _params(source)
            parts = http.check_url(params.url)
            _name(params.url)
            self._check_literal(parts.hostname or "", parts.port or 0)
        except TerminalError as error:
            return error.message
        return ""

    async def fetch(self, item: InputSource, into: Path, use: Use) -> Fetched:
        """A directory with the file in it."""
        params = _params(item.source)
        http.check_url(params.url)
        name = _name(params.url)
        wanted = read_sha256(params.checksum_sha256, "checksumSha256")
        identity = f"sha256:{wanted}" if wanted else f"url:{params.url}"
        async with self._cache.hold(into, use_key(item, use)) as hold:
            blob = await hold.blob(wanted) if wanted else None
            if blob is None:

                async def bring(fetch: Fetch) -> Blob:
                    return await fetch.in_thread(self._download, fetch, params.url, wanted)

                blob = await hold.obtain(identity, bring, is_fixed=bool(wanted))
            source = await hold.place({name: blob})
        return Fetched(source=source, read_only=True, size_bytes=blob.size_bytes)

    def progress(self, into: Path) -> Progress | None:
        """See Storage."""
        return self._cache.progress(into)

    def _check_literal(self, host: str, port: int) -> None:
        """A URL with a number for a name needs no looking up to be refused."""
        try:
            self._policy.check(host, host, port)
        except ValueError:
            return

    # -- in a thread -----------------------------------------------------------------------------

    def _download(self, fetch: Fetch, url: str, wanted: str) -> Blob:
        for _ in range(RESUMES_MAX):
            before = fetch.transfer.done
            try:
                return self._attempt(fetch, url, wanted)
            except UnavailableError:
                # A line that breaks again and again still gets there, as long as it moves on.
                if fetch.transfer.done <= before:
                    raise
        raise UnavailableError(f"{http.shown(url)} broke off {RESUMES_MAX} times")

    def _attempt(self, fetch: Fetch, url: str, wanted: str) -> Blob:
        draft, transfer = fetch.draft, fetch.transfer
        validator = draft.validator
        left = draft.left(validator)
        headers: dict[str, str] = {}
        if left:
            headers = {"Range": f"bytes={left}-", "If-Range": validator}
        elif fetch.known is not None and fetch.known.note and not wanted:
            is_tag = _header_of(fetch.known.note) == "ETag"
            headers = {"If-None-Match" if is_tag else "If-Modified-Since": fetch.known.note}
        with http.get(url, self._policy, headers=headers, transfer=transfer) as answer:
            if answer.status == 304 and fetch.known is not None:
                return draft.keep(fetch.known)
            if answer.status == 416 and left:
                draft.discard()
                raise UnavailableError(f"{http.shown(url)} has changed meanwhile")
            http.check_status(answer, 200, 206)
            strong = _resumable(answer)
            is_rest = answer.status == 206
            if is_rest and answer.header(_header_of(validator)) not in (validator, ""):
                # Not every server, nor every cache in between, heeds If-Range.
                draft.discard()
                raise UnavailableError(f"{http.shown(url)} has changed meanwhile")
            if is_rest and (not left or _first_byte(answer) != left):
                draft.discard()
                raise UnavailableError(f"{http.shown(url)} sent another part than was asked for")
            total = None
            if answer.length is not None:
                total = answer.length + (left if is_rest else 0)
                self._check_size(url, total)
            begun = draft.begin(validator if is_rest else strong, total)
            if is_rest and begun != left:
                draft.discard()
                raise UnavailableError("what was here of it is gone")
            if not is_rest and begun:
                # The whole comes anew, though there was a part of it: the server cannot resume.
                draft.discard()
                draft.begin(strong, total)
            transfer.done, transfer.total = draft.size_bytes, total
            self._copy(fetch, answer, url, total)
            return draft.finish(note=_note(answer), sha256=wanted)

    def _copy(self, fetch: Fetch, answer: http.Answer, url: str, total: int | None) -> None:
        draft, transfer = fetch.draft, fetch.transfer
        # What the line has now, not a full buffer: nothing that came is lost when it breaks.
        while data := answer.body.read1(CHUNK_BYTES):
            transfer.check()
            if total is None:
                self._check_size(url, draft.size_bytes + len(data))
            draft.write(data)
            transfer.done = draft.size_bytes
        if total is not None and draft.size_bytes != total:
            raise UnavailableError(
                f"{http.shown(url)} broke off after {draft.size_bytes} of {total} bytes"
            )

    def _check_size(self, url: str, size: int) -> None:
        if size > self._size_bytes_max:
            raise TerminalError(
                f"{http.shown(url)} has {size} bytes or more; this node takes at most "
                f"{self._size_bytes_max} for one input (--input-max-size)",
                reason="InputTooLarge",
            )


def _params(source: SpecConfig) -> UrlParams:
    params = read_params(UrlParams, source.params, what="source urlDownload", reason="InvalidInput")
    read_sha256(params.checksum_sha256, "checksumSha256")
    return params


def _name(url: str) -> str:
    """The file's name in the target directory."""
    name = posixpath.basename(unquote(http.check_url(url).path))
    try:
        return check_tree_path(name)
    except ValueError as error:
        raise TerminalError(
            f"source urlDownload: params.url {http.shown(url)} must end in a file name, which the "
            f"downloaded file will have: {error}",
            reason="InvalidInput",
        ) from error


def _resumable(answer: http.Answer) -> str:
    """What an If-Range can name: a strong ETag, else the date of the last change."""
    etag = answer.header("ETag")
    if etag.startswith('"'):
        return etag
    return "" if etag else _last_modified(answer)


def _note(answer: http.Answer) -> str:
    """By what to ask next time whether there is anything new."""
    return answer.header("ETag") or _last_modified(answer)


def _header_of(validator: str) -> str:
    """Which header says it."""
    return "ETag" if '"' in validator else "Last-Modified"


def _last_modified(answer: http.Answer) -> str:
    """The date of the last change; empty if there may be another one that bears the same date."""
    changed, now = answer.header("Last-Modified"), answer.header("Date")
    try:
        age = parsedate_to_datetime(now) - parsedate_to_datetime(changed)
    except (TypeError, ValueError):
        return ""
    return changed if age.total_seconds() >= SETTLED_SECONDS else ""


def _first_byte(answer: http.Answer) -> int:
    """Where a part begins, by its Content-Range; -1 if it does not say."""
    unit, _, rest = answer.header("Content-Range").partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else -1
