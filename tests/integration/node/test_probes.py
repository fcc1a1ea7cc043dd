"""The operator's own say: real commands, and a real web service."""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bacalhau.node.probes import AT_ONCE, REASON_MAX, ExecProbe, HttpProbe, make_probes
from bacalhau_api.errors import TransientError
from tests.support.docker_lab import until
from tests.support.runner import NODE, execution

SECONDS = 30.0


def command(script: str, seconds: float = SECONDS) -> ExecProbe:
    """A Python program as a probe; `told` is what it is told."""
    before = "import json, sys, os, time\ntold = json.load(sys.stdin)\n"
    words = f"{sys.executable} -c '{before}{script}'"
    assert "'" not in before + script
    return ExecProbe(words, seconds)


# -- commands --------------------------------------------------------------------------------------


async def test_a_command_is_told_job_and_execution() -> None:
    script = (
        'spec = told["execution"]["spec"]\n'
        'print(told["node"], told["job"], spec["task"]["engine"], file=sys.stderr)\n'
        "sys.exit(3)"
    )
    why = await command(script).ask(execution("a", inputs=("/data",)))
    expected = {"namespace": "default", "name": "job", "uid": "job-uid", "type": "batch"}
    assert why.startswith(f"{NODE} {expected} {{'type': 'fake'")


async def test_yes_is_exit_code_0_whatever_it_says() -> None:
    assert await command('print("no!", file=sys.stderr)').ask(execution()) == ""
    assert await ExecProbe("exit 0", SECONDS).ask(execution()) == "", "it need not read"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("echo only for friends >&2; exit 1", "only for friends"),
        ("printf 'two\\nlines\\033[31m' >&2; exit 9", "two lines [31m"),
        ("exit 4", "it ended with exit code 4 and gave no reason"),
        ("echo why; exit 1", "it ended with exit code 1 and gave no reason"),
        ("head -c 3000000 /dev/zero | tr '\\0' y >&2; exit 1", "…" + "y" * REASON_MAX),
    ],
)
async def test_no_comes_with_what_it_wrote_to_standard_error(words: str, reason: str) -> None:
    assert await ExecProbe(words, SECONDS).ask(execution()) == reason


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("/no/such/program", "cannot be run: .*not found"),
        ("/etc/passwd", "cannot be run: .*denied"),
        ("kill -9 $$", "was ended by signal 9"),
    ],
)
async def test_what_is_broken_is_no_answer(words: str, why: str) -> None:
    with pytest.raises(TransientError, match=f"the node's admission command {why}"):
        await ExecProbe(words, SECONDS).ask(execution())


async def test_a_command_that_hangs_is_no_answer() -> None:
    with pytest.raises(TransientError, match=r"gave no answer within 0\.3 s"):
        await ExecProbe("sleep 3600", 0.3).ask(execution())


async def test_a_question_that_is_given_up_ends_the_command_with_all_it_started(
    tmp_path: Path,
) -> None:
    pids = tmp_path / "pids"
    asking = asyncio.create_task(
        ExecProbe(f"sleep 3600 & echo $! $$ > {pids}.new; mv {pids}.new {pids}; wait", SECONDS).ask(
            execution()
        )
    )
    await until(pids.exists)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    for pid in pids.read_text().split():
        await until(lambda pid=pid: is_gone(int(pid)))  # type: ignore[misc]


def is_gone(pid: int) -> bool:
    """Whether a process is no more, or no more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_what_a_command_leaves_running_does_not_hold_up_the_answer() -> None:
    began = time.monotonic()
    assert await ExecProbe("sleep 20 & echo busy >&2; exit 1", SECONDS).ask(execution()) == "busy"
    assert time.monotonic() - began < 15


async def test_a_long_question_is_told_whole() -> None:
    big = execution().but(spec=execution().spec.but(job="x" * 500_000))
    script = 'print(len(told["job"]["name"]), file=sys.stderr); sys.exit(1)'
    assert await command(script).ask(big) == "500000"


async def test_of_the_environment_it_gets_path_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    names = (await ExecProbe("env >&2; exit 1", SECONDS).ask(execution())).split()
    assert {name.partition("=")[0] for name in names} <= {"PATH", "PWD", "SHLVL", "_"}


async def test_only_a_few_commands_run_at_a_time(tmp_path: Path) -> None:
    """Each sees how many there are besides itself."""
    words = f"cd {tmp_path}; touch $$; ls | wc -l >&2; sleep 0.1; rm $$; exit 1"
    probe = ExecProbe(words, SECONDS)
    seen = await asyncio.gather(*(probe.ask(execution()) for _ in range(3 * AT_ONCE)))
    assert max(map(int, seen)) <= AT_ONCE
    before = len(os.listdir("/proc/self/fd"))
    await probe.ask(execution())
    # Fewer where the collector closes what an earlier test has left.
    assert len(os.listdir("/proc/self/fd")) <= before


# -- web services ----------------------------------------------------------------------------------


@dataclass
class Service:
    """Answers each question with the same words."""

    port: int = 0
    status: int = 200
    body: bytes = b""
    location: str = ""
    gate: threading.Event = field(default_factory=threading.Event)
    told: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://someone:hunter2@127.0.0.1:{self.port}/admit"


@pytest.fixture
def service() -> Iterator[Service]:
    """A real web server."""
    made = Service()
    made.gate.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            made.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            made.gate.wait(SECONDS)
            self.send_response(made.status)
            if made.location:
                self.send_header("Location", made.location)
            self.send_header("Content-Length", str(len(made.body)))
            self.end_headers()
            self.wfile.write(made.body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield made
    finally:
        made.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


async def test_a_service_is_told_the_same(service: Service) -> None:
    assert await HttpProbe(service.url, SECONDS).ask(execution("a")) == ""
    (told,) = service.told
    assert told["job"]["name"] == "job"
    assert told["execution"]["metadata"]["name"] == "a"
    assert told["execution"]["spec"]["task"]["engine"]["type"] == "fake"


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, '{"allow": true}', ""),
        (204, "", ""),
        (200, '{"allow": false, "reason": "not on Sundays"}', "not on Sundays"),
        (200, '{"allow": false}', "it gave no reason"),
        (200, '{"ShouldBid": true}', ""),
        (200, '{"shouldBid": false, "Reason": "too big"}', "too big"),
        (403, "", "it answered with HTTP 403 and gave no reason"),
        (403, '{"reason": "who are you?"}', "who are you?"),
        (403, '{"allow": true, "reason": "or not"}', "or not"),
        (404, "<html>", "it answered with HTTP 404 and gave no reason"),
    ],
)
async def test_answers(service: Service, status: int, body: str, why: str) -> None:
    service.status, service.body = status, body.encode()
    assert await HttpProbe(service.url, SECONDS).ask(execution()) == why


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, '{"allow": "yes"}', "says neither yes nor no"),
        (200, "{}", "says neither yes nor no"),
        (200, "ok", "says neither yes nor no"),
        (200, "[" * 50_000, "says neither yes nor no"),
        (200, "x" * 100_000, "more than 65536 bytes"),
        (302, "", "answered with HTTP 302"),
        (429, "", "answered with HTTP 429"),
        (500, '{"allow": true}', "answered with HTTP 500"),
    ],
)
async def test_no_clear_answer(service: Service, status: int, body: str, why: str) -> None:
    service.status, service.body = status, body.encode()
    service.location = "http://127.0.0.1:1/" if status == 302 else ""
    with pytest.raises(TransientError, match=f"the node's admission service .*{why}") as caught:
        await HttpProbe(service.url, SECONDS).ask(execution())
    assert "hunter2" not in caught.value.message


async def test_a_service_that_hangs_or_is_not_there(service: Service) -> None:
    service.gate.clear()
    with pytest.raises(TransientError, match=r"gave no answer within 0\.3 s"):
        await HttpProbe(service.url, 0.3).ask(execution())
    with pytest.raises(TransientError, match="cannot be asked: ") as caught:
        await HttpProbe("http://someone:hunter2@127.0.0.1:1/", SECONDS).ask(execution())
    assert "hunter2" not in caught.value.message


def test_none_unless_asked_for() -> None:
    assert make_probes("", "", 1.0) == ()
    assert [type(p) for p in make_probes("true", "http://x/", 1.0)] == [ExecProbe, HttpProbe]
