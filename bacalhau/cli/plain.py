"""One GET over the standard library, for commands that must start fast."""

import http.client
from collections.abc import Mapping
from urllib.parse import urlencode, urlsplit

ANSWER_SECONDS = 30.0


def fetch(server: str, path: str, params: Mapping[str, str], token: str) -> bytes:
    """The body of a good answer. Raises what the client would raise."""
    where = urlsplit(server)
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    connection = kind(where.hostname or "", where.port, timeout=ANSWER_SECONDS)
    headers = {"User-Agent": "bacalhau-cli"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    query = f"?{urlencode(params)}" if params else ""
    try:
        connection.request("GET", f"{where.path}{path}{query}", headers=headers)
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
