"""What every command shares: which server, as whom, and how to write."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bacalhau.client.sync import Client


@dataclass(frozen=True, slots=True)
class Session:
    """One invocation. `server` empty: as the environment says. `local` asks the agent of this
    machine instead; `node_dir` is its data directory where it is not the usual one."""

    server: str = ""
    debug: bool = False
    local: bool = False
    node_dir: str = ""

    @property
    def address(self) -> str:
        """The server's URL, or `unix:PATH`. Raises InvalidError, NotFoundError (no agent here)."""
        from bacalhau.client.address import check_server, server_from

        if self.is_local:
            return f"unix:{self._socket()}"
        return check_server(self.server) if self.server else server_from(os.environ)

    @property
    def is_local(self) -> bool:
        """True if the agent of this machine is asked."""
        return self.local or bool(self.node_dir) or self.server.startswith("unix:")

    def at_node(self) -> "Session":
        """The same, asking the agent of this machine."""
        return self if self.is_local else replace(self, local=True, server="")

    def _socket(self) -> Path:
        from bacalhau.localsocket import find_socket, is_socket, places, socket_path
        from bacalhau_api.errors import UnavailableError

        if self.server.startswith("unix:"):
            return Path(self.server.removeprefix("unix:"))
        if self.node_dir:
            tried = [socket_path(Path(self.node_dir).expanduser().absolute())]
            found = tried[0] if is_socket(tried[0]) else None
        else:
            tried = [path.absolute() for path in places(os.environ)]
            found = find_socket(os.environ)
        if found is None:
            where = " or ".join(str(path) for path in tried)
            raise UnavailableError(
                f"no agent can be asked at {where}",
                hint="does it run, and as this user? --node-dir DIR names its data directory "
                "(or set BACALHAU_NODE_DIR)",
            )
        return found.absolute()

    @property
    def token(self) -> str:
        """The bearer token; in the environment only, so that no process list shows it."""
        return os.environ.get("BACALHAU_TOKEN", "").strip()

    @contextmanager
    def client(self) -> Iterator["Client"]:
        """A client of the server."""
        from bacalhau.client.sync import Client

        with Client(self.address, token=self.token) as client:
            yield client

    def fetch(self, path: str, params: Mapping[str, str] | None = None) -> Any:
        """GET some JSON with nothing but the standard library: commands that only show things
        start several times faster without an HTTP client and the models."""
        from bacalhau.cli.plain import fetch

        return json.loads(fetch(self.address, path, params or {}, self.token))


def is_terminal() -> bool:
    """True if a person looks at stdout."""
    return sys.stdout.isatty()


def print_json(data: object) -> None:
    """Data for programs: stable, indented, keys as the API has them."""
    print(json.dumps(data, indent=2, ensure_ascii=not _is_utf8()))


def print_yaml(data: object) -> None:
    """The same as YAML."""
    import yaml

    print(yaml.safe_dump(data, sort_keys=False, allow_unicode=_is_utf8()), end="")


def _is_utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
