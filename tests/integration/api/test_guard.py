"""The door: sizes, hosts, origins, tokens, headers, and the one shape of errors."""

import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from bacalhau.client.sync import Client
from bacalhau.nats.keys import new_seed, public_key
from bacalhau.server.access import Access, access_for, digest_of, is_loopback, load_tokens
from bacalhau.server.app import ApiServer
from bacalhau.server.guard import BODY_BYTES_MAX
from bacalhau_api.errors import ForbiddenError, InvalidError
from bacalhau_api.v1.job import Job
from tests.support.api_objects import make_job, stored_job
from tests.support.api_server import RunningServer, running_server

JOBS = "/apis/bacalhau.org/v1/namespaces/default/jobs"
SHAPE = {"reason", "message", "field", "value", "hint", "problems"}


def check_shape(answer: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    """Every error looks alike."""
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    assert set(body) == SHAPE
    assert body["reason"] == reason
    assert body["message"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers
    return body


def test_errors_of_all_kinds_have_one_shape(http: httpx.Client) -> None:
    json = {"content-type": "application/json"}
    check_shape(http.get("/nowhere"), 404, "NotFound")
    check_shape(http.get(f"{JOBS}/"), 404, "NotFound")
    check_shape(http.delete(JOBS), 405, "MethodNotAllowed")
    check_shape(http.get(f"{JOBS}/none"), 404, "NotFound")
    check_shape(http.get(f"{JOBS}?limit=x"), 400, "Invalid")
    check_shape(http.put(f"{JOBS}/a", content="{", headers=json), 400, "Invalid")
    check_shape(http.put(f"{JOBS}/a", content=b"\xff\xfe", headers=json), 400, "Invalid")
    check_shape(http.put(f"{JOBS}/a", content="[]", headers=json), 400, "Invalid")
    check_shape(http.put(f"{JOBS}/a", content="", headers=json), 400, "Invalid")
    check_shape(http.put(f"{JOBS}/a", content="[" * 10_000, headers=json), 400, "Invalid")
    check_shape(http.put(f"{JOBS}/a", content="{}"), 415, "UnsupportedMediaType")
    check_shape(http.post(f"{JOBS}/a/rerun", content="{]", headers=json), 400, "Invalid")
    check_shape(http.post(f"{JOBS}/a/rerun", json={"nonse": 1}), 400, "Invalid")
    check_shape(http.post(f"{JOBS}/a/stop", content="{}"), 415, "UnsupportedMediaType")


def test_allow_names_all_methods(http: httpx.Client) -> None:
    answer = http.request("TRACE", f"{JOBS}/a")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "DELETE, GET, PATCH, PUT"
    assert http.delete(JOBS).headers["allow"] == "GET, POST"
    assert http.post("/healthz").headers["allow"] == "GET"


def test_large_bodies_are_refused_before_they_are_parsed(http: httpx.Client) -> None:
    json = {"content-type": "application/json"}
    body = b"x" * (BODY_BYTES_MAX + 1)
    check_shape(http.put(f"{JOBS}/a", content=body, headers=json), 413, "PayloadTooLarge")
    chunks = iter([b"x" * 65536] * 64)  # no Content-Length
    check_shape(http.put(f"{JOBS}/a", content=chunks, headers=json), 413, "PayloadTooLarge")
    gzip = json | {"content-encoding": "gzip"}
    check_shape(http.put(f"{JOBS}/a", content=b"x", headers=gzip), 415, "UnsupportedMediaType")


@pytest.mark.parametrize(
    ("extra", "status"),
    [("", b"413"), ("Origin: http://evil.example\r\n", b"403")],
)
def test_who_still_sends_gets_the_answer_too(
    server: RunningServer, extra: str, status: bytes
) -> None:
    """A connection that is closed with bytes unread is reset, and the answer is lost with it."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        length = 2 * BODY_BYTES_MAX
        head = f"PUT {JOBS}/a HTTP/1.1\r\nHost: {host}\r\n{extra}Connection: close\r\n"
        raw.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        raw.recv(1, socket.MSG_PEEK)  # it has answered
        for _ in range(64):
            raw.sendall(b"x" * (length // 64))
        answer = b""
        while part := raw.recv(65536):
            answer += part
    assert answer.split()[1] == status
    assert answer.endswith(b"}")


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 400])
def test_odd_lengths(server: RunningServer, length: str) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(
            f"PUT {JOBS}/a HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n".encode()
        )
        assert raw.recv(65536).split()[1] in (b"400", b"413")


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.168.1.2", "a b"])
def test_other_hosts_are_refused_on_loopback(http: httpx.Client, host: str) -> None:
    check_shape(http.get("/version", headers={"host": host}), 403, "Forbidden")


@pytest.mark.parametrize(
    "host", ["localhost:1234", "127.0.0.1", "[::1]:9", "x.localhost", "LOCALHOST"]
)
def test_loopback_hosts_are_served(http: httpx.Client, host: str) -> None:
    assert http.get("/version", headers={"host": host}).status_code == 200


def test_pages_of_other_origins_are_refused(http: httpx.Client, client: Client) -> None:
    client.apply(make_job())
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
    ):
        check_shape(http.post(f"{JOBS}/a/stop", headers=headers), 403, "Forbidden")
    assert not client.get(Job, "a").is_stopped
    own = {"origin": str(http.base_url).rstrip("/")}
    assert http.post(f"{JOBS}/a/stop", headers=own).status_code == 200


def test_tokens(tmp_path: Path) -> None:
    access = Access(tokens={"alice": digest_of("right"), "bob": digest_of("other")})
    with running_server(tmp_path, access) as server:
        with httpx.Client(base_url=server.url, trust_env=False) as http:
            for path in ("/healthz", "/readyz", "/version"):
                assert http.get(path).status_code == 200
            for path in (JOBS, "/metrics", "/openapi.json", "/nowhere"):
                check_shape(http.get(path), 401, "Unauthorized")
            for given in ("Bearer wrong", "Basic right", "Bearer", "right", "Bearer \xff"):
                headers = [(b"authorization", given.encode("latin-1"))]
                check_shape(http.get(JOBS, headers=headers), 401, "Unauthorized")
            join = http.post(
                "/apis/bacalhau.org/v1/nodes/join",
                json={"token": "x", "node": "n", "publicKey": public_key(new_seed())},
            )
            check_shape(join, 403, "Forbidden")
        with (
            Client(server.url) as nobody,
            pytest.raises(ForbiddenError, match="asks for a token"),
        ):
            nobody.apply(make_job())
        with Client(server.url, token="right") as alice:
            alice.apply(make_job())
            assert [h.actor for h in alice.history(Job, "a")] == ["user:alice"]


def test_the_token_file_holds_digests_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokens"
    tokens, fresh = load_tokens(path)
    assert fresh is not None
    assert fresh not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert Access(tokens=tokens).user_of(f"Bearer {fresh}") == "admin"
    assert load_tokens(path) == (tokens, None)
    for text in ("admin secret", "a b c", "# nothing", "../x " + "0" * 64):
        path.write_text(text)
        with pytest.raises(InvalidError):
            load_tokens(path)


def test_listening_beyond_loopback_needs_a_decision() -> None:
    with pytest.raises(InvalidError, match="--insecure-lab"):
        access_for("0.0.0.0", {}, insecure_lab=False)
    assert not access_for("0.0.0.0", {}, insecure_lab=True).loopback_hosts_only
    assert access_for("0.0.0.0", {"a": "x"}, insecure_lab=False).tokens
    assert access_for("127.0.0.1", {}, insecure_lab=False).loopback_hosts_only


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost.", True),
     ("0.0.0.0", False), ("::", False), ("", False), ("localhost.evil", False), ("10.0.0.1", False)],
)  # fmt: skip
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_port_in_use_is_an_error_with_a_remedy(server: RunningServer) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(InvalidError, match="cannot listen"):
        ApiServer(server.app, "127.0.0.1", port).bind()
    with pytest.raises(InvalidError, match="cannot listen"):
        ApiServer(server.app, "no.such.host.invalid", 0).bind()


def test_too_many_requests_at_once(
    http: httpx.Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put(stored_job())
    with http.stream("GET", JOBS, params={"watch": "true"}) as stream:
        lines = stream.iter_lines()  # held: when it is collected, the answer is closed
        next(lines)
        guard = server.app.middleware_stack
        while not hasattr(guard, "_requests_max"):
            guard = guard.app  # type: ignore[union-attr]
        monkeypatch.setattr(guard, "_requests_max", 1)
        answer = http.get("/version")
        check_shape(answer, 429, "TooManyRequests")
        assert answer.headers["retry-after"]


def test_a_bug_tells_nothing(
    http: httpx.Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.app.context.metrics, "render", broken, raising=False)
    answer = http.get("/metrics")
    assert answer.status_code == 500
    assert answer.json()["reason"] == "InternalError"
    assert "secret" not in answer.text
