"""`bacalhau version`, without anything that takes time to load."""

import http.client
import json
import os
import sys

from bacalhau.cli.text import clean
from bacalhau.version import VERSION

SERVER_SECONDS = 3.0


def server_version(server: str) -> str | None:
    """The version of the server; None if nobody answers soon."""
    from urllib.parse import urlsplit

    from bacalhau.cli.plain import connection_to

    where = urlsplit(server)
    connection = connection_to(server, SERVER_SECONDS)
    try:
        connection.request("GET", f"{'' if where.scheme == 'unix' else where.path}/version")
        body = connection.getresponse().read(65536)
        found = json.loads(body)["version"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return found if isinstance(found, str) else None


def print_version(*, client_only: bool, server: str = "", as_json: bool = False) -> int:
    """Print both versions. That no server answers is no error here."""
    found = None
    if not client_only:
        from bacalhau.client.address import server_from

        server = server or server_from(os.environ)
        found = server_version(server)
    if as_json:
        print(json.dumps({"client": VERSION, "server": found}))
        return 0
    print(f"client: {VERSION}")
    if not client_only:
        print(f"server: {clean(found) if found else 'none answers'} ({clean(server)})")
    sys.stdout.flush()
    return 0
