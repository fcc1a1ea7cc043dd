"""The RPC API of a Kubo node: is it there, and adding a directory to it."""

import asyncio
import http.client
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from bacalhau.transfer import http as web
from bacalhau.transfer.progress import CancelledTransferError, Transfer
from bacalhau_api.errors import BacalhauError, UnavailableError
from bacalhau_controllers.runner.ports import Health

HEALTH_SECONDS = 5.0
_BOUNDARY = "bacalhau-part-6a0d1f"
_ADD = {
    # All that decides on the CID is given, so that equal outputs have equal CIDs everywhere.
    "cid-version": "1",
    "raw-leaves": "true",
    "chunker": "size-262144",
    "hash": "sha2-256",
    "wrap-with-directory": "true",
    "pin": "true",
    "progress": "false",
}


async def kubo_health(api: str) -> Health:
    """Whether a Kubo RPC API answers, and its version. Not in the threads of transfers, which may
    all be busy for hours."""
    transfer = Transfer()
    try:
        return await asyncio.to_thread(_ask, api, transfer)
    except asyncio.CancelledError:
        transfer.cancel()
        raise


def _ask(api: str, transfer: Transfer) -> Health:
    url = f"{api}/api/v0/version"
    try:
        with web.get(
            url, None, method="POST", transfer=transfer, stall_seconds=HEALTH_SECONDS
        ) as answer:
            web.check_status(answer, 200)
            version = str(json.loads(answer.body.read(10_000)).get("Version", ""))
        return Health(is_available=True, version=version)
    except BacalhauError as error:
        return Health(is_available=False, reason=error.message)
    except CancelledTransferError:
        return Health(is_available=False, reason=f"{api} took too long")
    except (ValueError, AttributeError):
        return Health(is_available=False, reason=f"{api} is not the RPC API of a Kubo node")


def add_directory(
    api: str,
    files: Iterable[tuple[str, Iterator[bytes]]],
    transfer: Transfer,
    *,
    stall_seconds: float,
) -> str:
    """Add and pin files by their paths; return the CID of the directory that holds them.

    Kubo answers a line for each file while the next are sent; a thread reads them meanwhile, or
    both sides would wait for each other once the buffers are full. Blocking.
    """
    url = f"{api}/api/v0/add?{urlencode(_ADD)}"
    parts = urlsplit(url)
    with web.translated(api, transfer):
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        sock = web.connect(host, port, None, transfer)
        forget = transfer.on_cancel(lambda: web.shut(sock))
        try:
            sock.settimeout(stall_seconds)
            line = sock
            if parts.scheme == "https":
                line = web.tls_context().wrap_socket(sock, server_hostname=host)
            connection = http.client.HTTPConnection(host, port)
            connection.sock = line
            connection.putrequest("POST", f"{parts.path}?{parts.query}")
            connection.putheader("Content-Type", f"multipart/form-data; boundary={_BOUNDARY}")
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            reader = _Reader(line)
            reader.start()
            try:
                for piece in _multipart(files):
                    transfer.check()
                    line.sendall(b"%x\r\n" % len(piece) + piece + b"\r\n")
                    transfer.done += len(piece)
                line.sendall(b"0\r\n\r\n")
            except OSError:
                if reader.wait(1.0):  # it answered before it closed: that says more
                    reader.result()
                raise
            while not reader.wait(1.0):
                transfer.check()
            return reader.result()
        finally:
            forget()
            web.shut(sock)
            sock.close()


def _multipart(files: Iterable[tuple[str, Iterator[bytes]]]) -> Iterator[bytes]:
    for path, pieces in files:
        name = quote(path, safe="")
        yield (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; '
            f'filename="{name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        ).encode()
        for piece in pieces:
            if piece:
                yield piece
        yield b"\r\n"
    yield f"--{_BOUNDARY}--\r\n".encode()


@dataclass
class _Reader:
    """Reads Kubo's answer while the request is being sent."""

    line: Any
    root: str = ""
    failure: Exception | None = None
    _thread: threading.Thread = field(init=False)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="kubo answer", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> str:
        if self.failure is not None:
            raise self.failure
        if not self.root:
            raise UnavailableError("IPFS did not say what the results were added as")
        return self.root

    def _run(self) -> None:
        try:
            response = http.client.HTTPResponse(self.line, method="POST")
            # Kubo needs long for the last lines; the sender's deadline does not count for it.
            response.begin()
            if response.status != 200:
                words = response.read(2000).decode("utf-8", "replace")
                raise UnavailableError(
                    f"IPFS answered {response.status}: {' '.join(words.split())[:300]}"
                )
            for line in response:
                found = json.loads(line)
                if found.get("Type") == "error" or "Message" in found:
                    raise UnavailableError(f"IPFS failed: {str(found.get('Message'))[:300]}")
                if found.get("Name") == "":
                    self.root = str(found.get("Hash", ""))
        except (OSError, ValueError, http.client.HTTPException, BacalhauError) as error:
            self.failure = error
