"""Where the server is: an address given, or the environment, or this machine."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from bacalhau_api.errors import InvalidError, Problem

DEFAULT_PORT = 1234
DEFAULT_SERVER = f"http://127.0.0.1:{DEFAULT_PORT}"
UNIX = "unix:"


def server_from(environ: Mapping[str, str]) -> str:
    """The server's URL by BACALHAU_SERVER, or BACALHAU_API_HOST and BACALHAU_API_PORT.

    The host may be a whole URL; `0.0.0.0`, which other clients use for "here", is dialled as
    loopback. Raises InvalidError for what is no address.
    """
    if server := environ.get("BACALHAU_SERVER", "").strip():
        return check_server(server)
    host = environ.get("BACALHAU_API_HOST", "").strip()
    port = environ.get("BACALHAU_API_PORT", "").strip()
    if not host and not port:
        return DEFAULT_SERVER
    if "://" in host:
        given = urlsplit(host)
        base = f"{given.scheme}://{given.netloc}"
        return check_server(f"{base}:{port}" if port and ":" not in given.netloc else base)
    host = "127.0.0.1" if host in ("", "0.0.0.0") else host
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return check_server(f"http://{host}:{port or DEFAULT_PORT}")


def socket_of(server: str) -> Path | None:
    """The Unix socket that a `unix:PATH` address stands for; None for other addresses."""
    return Path(server.removeprefix(UNIX)) if server.startswith(UNIX) else None


def check_server(server: str) -> str:
    """A server's URL in its normal form; `unix:PATH` is the socket of a node's agent. Raises
    InvalidError."""
    if server.startswith(UNIX):
        path = server.removeprefix(UNIX)
        if not path.startswith("/") or "\0" in path:
            hint = f"such as {UNIX}/var/lib/bacalhau/node/agent.sock"
            raise InvalidError([Problem("server", "is not an absolute path", server[:200], hint)])
        return server
    text = server if "://" in server else f"http://{server}"
    hint = f"such as {DEFAULT_SERVER}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InvalidError([Problem("server", str(error), server[:200], hint)]) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise InvalidError([Problem("server", "is not an http(s) address", server[:200], hint)])
    if parts.username or parts.password:
        hint = "give a token by BACALHAU_TOKEN instead"
        raise InvalidError([Problem("server", "may not hold credentials", "", hint)])
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default = DEFAULT_PORT if parts.scheme == "http" else 443
    return f"{parts.scheme}://{host}:{port or default}{parts.path.rstrip('/')}"
