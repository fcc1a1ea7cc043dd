"""The operator's own say on which executions a node runs: a command, or a web service, that is told
about each and answers yes or no with a reason.

It is asked last, once the node's own rules have said yes. What is no clear answer (a command that is
not there, is killed or takes too long; a server that is down or stammers) is no yes: the execution is
not run here. It is asked again a few times, then the slot goes elsewhere, as after any fault of a node.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any, Final, Self

import httpx

from bacalhau_api.errors import TransientError, UnavailableError
from bacalhau_api.v1.execution import Execution
from bacalhau_controllers.runner.ports import Probe

AT_ONCE: Final = 4
"""Questions under way at a time, of each probe."""

REASON_MAX: Final = 1000
ANSWER_BYTES_MAX: Final = 64 * 1024
_AGAIN: Final = frozenset({408, 425, 429})
"""Refusals by HTTP that speak of the moment, not of the job."""

_NOT_RUN: Final = frozenset({126, 127})
"""What a shell ends with if it could not run the command."""

_LAST_WORDS_SECONDS: Final = 1.0


def question(execution: Execution) -> dict[str, Any]:
    """What a probe is told: the job in short, and all that the node knows of the execution."""
    spec = execution.spec
    told = execution.wire()
    return {
        "node": spec.node,
        "job": {
            "namespace": execution.metadata.namespace,
            "name": spec.job,
            "uid": spec.job_uid,
            "type": spec.job_type.value,
        },
        "execution": {"metadata": told["metadata"], "spec": told["spec"]},
    }


class ExecProbe:
    """A command for the shell, which gets the question as JSON on its standard input, and of the
    environment only PATH. Exit code 0 is yes; any other is no, and what it wrote to standard error
    is the reason. `seconds` is how long it may take."""

    name = "the node's admission command"

    def __init__(self, command: str, seconds: float) -> None:
        self._command = command
        self._seconds = seconds
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def ask(self, execution: Execution) -> str:
        """See Probe."""
        data = json.dumps(question(execution)).encode()
        async with self._slots:
            code, words = await self._run(data)
        if code == 0:
            return ""
        if code in _NOT_RUN:
            raise _closed(self.name, f"cannot be run: {words or f'exit code {code}'}")
        if code < 0:
            raise _closed(self.name, f"was ended by signal {-code}")
        return words or f"it ended with exit code {code} and gave no reason"

    async def _run(self, data: bytes) -> tuple[int, str]:
        """The exit code, and the end of what it said."""
        with _memory_file(data) as told, _Ear() as ear:
            try:
                process = await asyncio.create_subprocess_exec(
                    "/bin/sh", "-c", self._command,
                    stdin=told,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=ear.take(),
                    env={"PATH": os.environ.get("PATH", os.defpath)},
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise _closed(self.name, f"cannot be run: {error.strerror}") from error
            listening = asyncio.create_task(ear.listen())
            try:
                async with asyncio.timeout(self._seconds):
                    code = await process.wait()
                # What it left running may hold on to its standard error.
                await asyncio.wait([listening], timeout=_LAST_WORDS_SECONDS)
                return code, _reason(ear.heard.decode("utf-8", "replace"))
            except TimeoutError as error:
                raise _closed(self.name, f"gave no answer within {self._seconds:g} s") from error
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()


@contextlib.contextmanager
def _memory_file(data: bytes) -> Iterator[int]:
    """A file to read from. Unlike a pipe it holds up nobody if it is not read."""
    with open(os.memfd_create("question"), "wb+") as file:
        file.write(data)
        file.seek(0)
        yield file.fileno()


class _Ear:
    """The reading end of a pipe, which can be closed while others may yet write to it."""

    def __init__(self) -> None:
        self.heard = b""
        self._ends = list(os.pipe())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for end in self._ends:
            os.close(end)

    def take(self) -> int:
        """The end to write to; ours is closed once somebody listens."""
        return self._ends[1]

    async def listen(self) -> None:
        """Keep the end of what comes, until nobody writes any more."""
        os.close(self._ends.pop())
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        with os.fdopen(self._ends.pop(), "rb", buffering=0) as end:
            transport, _ = await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), end
            )
            try:
                while data := await reader.read(ANSWER_BYTES_MAX):
                    self.heard = (self.heard + data)[-4 * REASON_MAX :]
            finally:
                transport.close()


class HttpProbe:
    """A web service that gets the question by POST. `seconds` is how long it may take.

    Its answer is the JSON object `{"allow": true}` or `{"allow": false, "reason": "..."}`
    (`shouldBid` is understood for `allow`, in any letter case), or 2xx without a body for yes, or
    4xx for no. It is not followed elsewhere.
    """

    name = "the node's admission service"

    def __init__(self, url: str, seconds: float) -> None:
        self._url = url
        self._seconds = seconds
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def ask(self, execution: Execution) -> str:
        """See Probe."""
        data = json.dumps(question(execution)).encode()
        async with self._slots:
            try:
                async with asyncio.timeout(self._seconds):
                    status, body = await self._post(data)
            except TimeoutError as error:
                raise _closed(self.name, f"gave no answer within {self._seconds:g} s") from error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                why = str(error) or type(error).__name__
                raise _closed(self.name, f"cannot be asked: {why}") from error
        is_refused = 400 <= status < 500 and status not in _AGAIN
        if not is_refused and not 200 <= status < 300:
            raise _closed(self.name, f"answered with HTTP {status}")
        if not is_refused and not body.strip():
            return ""
        told = _told(body)
        allow, reason = told.get("allow", told.get("shouldbid")), _reason(told.get("reason"))
        if is_refused:
            return reason or f"it answered with HTTP {status} and gave no reason"
        if not isinstance(allow, bool):
            raise _closed(self.name, "answered with something that says neither yes nor no")
        return "" if allow else reason or "it gave no reason"

    async def _post(self, data: bytes) -> tuple[int, bytes]:
        """Status and body, which is left out if it is too long. Each question has a connection of
        its own: one that has been idle may have been closed at the other end."""
        headers = {"Content-Type": "application/json"}
        async with (
            httpx.AsyncClient(trust_env=False, timeout=None) as client,
            client.stream("POST", self._url, content=data, headers=headers) as answer,
        ):
            body = b""
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > ANSWER_BYTES_MAX:
                    raise _closed(self.name, f"answered with more than {ANSWER_BYTES_MAX} bytes")
            return answer.status_code, body


def make_probes(command: str, url: str, seconds: float) -> tuple[Probe, ...]:
    """Those that were asked for; empty is none."""
    probes: list[Probe] = []
    if command:
        probes.append(ExecProbe(command, seconds))
    if url:
        probes.append(HttpProbe(url, seconds))
    return tuple(probes)


def _told(body: bytes) -> Mapping[str, Any]:
    """The fields of a JSON object by lower-case name; none if it is no object."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return {str(k).lower(): v for k, v in found.items()} if isinstance(found, dict) else {}


def _reason(words: object) -> str:
    """In one line of plain characters, short enough for a report."""
    plain = "".join(c if c.isprintable() else " " for c in words) if isinstance(words, str) else ""
    text = " ".join(plain.split())
    return text if len(text) <= REASON_MAX else "…" + text[-REASON_MAX:]


def _closed(name: str, why: str) -> TransientError:
    return UnavailableError(f"{name} {why}")
