"""The asynchronous client, addresses, and what happens when nobody is there."""

import socket
from pathlib import Path

import pytest

from bacalhau.client import AsyncClient, Client
from bacalhau.client.address import server_from
from bacalhau.client.errors import ConnectError, error_from
from bacalhau_api.errors import (
    BacalhauError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    OutcomeUnknownError,
    TerminalError,
    UnavailableError,
)
from bacalhau_api.v1.execution import Phase
from bacalhau_api.v1.job import Job, JobPhase
from tests.support.api_objects import (
    make_acceptance,
    make_execution,
    make_job,
    make_node,
    stored_job,
)
from tests.support.api_server import RunningServer


async def test_async_client_does_what_the_other_does(server: RunningServer, tmp_path: Path) -> None:
    async with AsyncClient(server.url) as client:
        assert (await client.apply(make_job())).outcome == "created"
        assert [j.name async for j in client.list(Job)] == ["a"]
        assert (await client.stop("a")).is_stopped
        assert [h.reason for h in await client.history(Job, "a")] == ["Created", "Stopped"]
        with pytest.raises(NotFoundError):
            await client.get(Job, "b")
        job = stored_job("done", phase=JobPhase.COMPLETED)
        execution = make_execution(job, phase=Phase.SUCCEEDED)
        server.put(job, execution, make_acceptance(execution, job), make_node())
        server.nodes.write("n1", execution.name, "stdout", "hi\n")
        server.nodes.finish("n1", execution.name)
        assert [r.text async for r in client.logs(job)] == ["hi\n"]
        assert (await client.wait("done", timeout_seconds=10)).is_reached
        done = await client.download("done", tmp_path / "out")
        assert (done.path / "stdout").read_text() == "hi\n"
        async with client.open_output(execution.name, "stdout") as pieces:
            assert b"".join([piece async for piece in pieces]) == b"hi\n"
        assert (await client.version()).version == "0.1.0"


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        number: int = sock.getsockname()[1]
        return number


def test_nobody_there() -> None:
    with Client(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(ConnectError) as error:
            client.get(Job, "a")
        assert "bacalhau serve" in error.value.hint
        with pytest.raises(ConnectError):
            next(client.watch(Job))


def test_something_else_there(tmp_path: Path) -> None:
    from http.server import HTTPServer, SimpleHTTPRequestHandler
    from threading import Thread

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Quiet) as other:
        thread = Thread(target=other.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{other.server_port}"
        with Client(url) as client, pytest.raises(BacalhauError, match="the server answered 404"):
            client.get(Job, "a")
        other.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"reason":"Invalid","message":"m","problems":[{"field":"f","message":"x"}]}', InvalidError),
        (401, b'{"reason":"Unauthorized","message":"m"}', ForbiddenError),
        (403, b'{"reason":"Forbidden","message":"m"}', ForbiddenError),
        (404, b'{"reason":"NotFound","message":"m"}', NotFoundError),
        (409, b'{"reason":"Conflict","message":"m"}', ConflictError),
        (413, b'{"reason":"PayloadTooLarge","message":"m"}', TerminalError),
        (429, b'{"reason":"TooManyRequests","message":"m"}', UnavailableError),
        (503, b'{"reason":"OutcomeUnknown","message":"m","new":1}', OutcomeUnknownError),
        (503, b'{"reason":"Unavailable","message":"m"}', UnavailableError),
        (502, b"<html>Bad Gateway</html>", UnavailableError),
        (500, b"", BacalhauError),
    ],
)  # fmt: skip
def test_errors_come_back_as_the_tree(status: int, body: bytes, kind: type[BacalhauError]) -> None:
    assert type(error_from(status, body)) is kind


@pytest.mark.parametrize(
    ("environ", "server"),
    [
        ({}, "http://127.0.0.1:1234"),
        ({"BACALHAU_SERVER": "https://x.example"}, "https://x.example:443"),
        ({"BACALHAU_SERVER": "x.example:9"}, "http://x.example:9"),
        ({"BACALHAU_API_HOST": "10.0.0.1"}, "http://10.0.0.1:1234"),
        ({"BACALHAU_API_HOST": "0.0.0.0", "BACALHAU_API_PORT": "9"}, "http://127.0.0.1:9"),
        ({"BACALHAU_API_PORT": "9"}, "http://127.0.0.1:9"),
        ({"BACALHAU_API_HOST": "https://x.example", "BACALHAU_API_PORT": "9"}, "https://x.example:9"),
        ({"BACALHAU_API_HOST": "::1"}, "http://[::1]:1234"),
        ({"BACALHAU_SERVER": "http://a", "BACALHAU_API_HOST": "b"}, "http://a:1234"),
    ],
)  # fmt: skip
def test_addresses(environ: dict[str, str], server: str) -> None:
    assert server_from(environ) == server


@pytest.mark.parametrize(
    "bad", ["ftp://x", "http://", "http://x:port", "http://u:p@x", "http://[::1"]
)
def test_bad_addresses(bad: str) -> None:
    with pytest.raises(InvalidError):
        server_from({"BACALHAU_SERVER": bad})
