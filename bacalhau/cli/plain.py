"""One GET over the standard library, for commands that must start fast."""

import http.client
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode, urlsplit

ANSWER_SECONDS = 30.0


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over the socket of a node's agent."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("agent", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """See HTTPConnection."""
        from bacalhau.localsocket import connect

        self.sock = connect(self._path, ANSWER_SECONDS)


def connection_to(server: str, timeout: float) -> http.client.HTTPConnection:
    """A connection, not opened yet, to a server's URL or `unix:PATH`."""
    where = urlsplit(server)
    if where.scheme == "unix":
        return _SocketConnection(Path(server.removeprefix("unix:")), timeout)
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    return kind(where.hostname or "", where.port, timeout=timeout)


def fetch(
    server: str,
    path: str,
    params: Mapping[str, str],
    token: str,
    *,
    seconds: float = ANSWER_SECONDS,
) -> bytes:
    """The body of a good answer. Raises what the client would raise."""
    where = urlsplit(server)
    connection = connection_to(server, seconds)
    prefix = "" if where.scheme == "unix" else where.path
    headers = {"User-Agent": "bacalhau-cli"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    query = f"?{urlencode(params)}" if params else ""
    try:
        connection.request("GET", f"{prefix}{path}{query}", headers=headers)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        from bacalhau.client.errors import connection_error

        raise connection_error(server, error) from error
    finally:
        connection.close()
    if answer.status >= 400:
        from bacalhau.client.errors import error_from

        raise error_from(answer.status, body)
    return body
