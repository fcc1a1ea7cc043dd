"""What every command shares: which server, as whom, and how to write."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bacalhau.client.sync import Client


@dataclass(frozen=True, slots=True)
class Session:
    """One invocation. `server` empty: as the environment says."""

    server: str = ""
    debug: bool = False

    @property
    def address(self) -> str:
        """The server's URL. Raises InvalidError."""
        from bacalhau.client.address import check_server, server_from

        return check_server(self.server) if self.server else server_from(os.environ)

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
