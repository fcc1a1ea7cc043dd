"""A real HTTP server on loopback that can misbehave: cut lines, redirects, changed files, delays."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class File:
    """One file of the site. `cuts` are byte counts after which the next answers break off."""

    data: bytes = b""
    etag: str = ""
    last_modified: str = ""
    cuts: list[int] = field(default_factory=list)
    status: int = 200
    location: str = ""
    is_sized: bool = True
    ignores_ranges: bool = False
    ignores_conditions: bool = False
    gate: threading.Event | None = None
    """Waited for halfway through the body."""
    halfway: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    path: str
    headers: dict[str, str]
    sent: int


class Site:
    """Files by path, and what was asked of them."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.requests: list[Request] = []
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """The address of a file."""
        return f"http://{host}:{self.port}{path}"


@contextlib.contextmanager
def web_site() -> Iterator[Site]:
    """A site that is up within the block."""
    site = Site()
    server = _Server(("127.0.0.1", 0), _Handler)
    server.site = site
    site.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        for file in site.files.values():
            if file.gate is not None:
                file.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    site: Site

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is not worth a word."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        """Serve one file, as told."""
        path = self.path.partition("?")[0]
        file = self.server.site.files.get(path)
        if file is None:
            self._send(404, b"", {})
            return
        if file.location:
            self._send(file.status, b"", {"Location": file.location})
            return
        headers = {}
        if file.etag:
            headers["ETag"] = file.etag
        if file.last_modified:
            headers["Last-Modified"] = file.last_modified
        asked = {name.lower(): value for name, value in self.headers.items()}
        if file.status != 200:
            self._send(file.status, b"", headers)
        elif (file.etag and asked.get("if-none-match") == file.etag) or (
            file.last_modified and asked.get("if-modified-since") == file.last_modified
        ):
            self._send(304, b"", headers)
        else:
            self._body(file, asked, headers)

    def _body(self, file: File, asked: dict[str, str], headers: dict[str, str]) -> None:
        data, status = file.data, 200
        wanted = asked.get("range", "").removeprefix("bytes=").rstrip("-")
        validator = asked.get("if-range")
        if (
            wanted
            and not file.ignores_ranges
            and (file.ignores_conditions or validator in (None, file.etag or file.last_modified))
        ):
            first = int(wanted)
            if first >= len(file.data):
                self._send(416, b"", headers)
                return
            data, status = file.data[first:], 206
            headers["Content-Range"] = f"bytes {first}-{len(file.data) - 1}/{len(file.data)}"
        self._send(status, data, headers, file)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], file: File | None = None
    ) -> None:
        asked = dict(self.headers.items())
        cut = file.cuts.pop(0) if file is not None and file.cuts else len(data)
        self.server.site.requests.append(Request(self.path, asked, min(cut, len(data))))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if file is None or file.is_sized:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if file is not None and file.gate is not None:
            half = len(data) // 2
            self.wfile.write(data[:half])
            self.wfile.flush()
            file.halfway.set()
            file.gate.wait(60)
            data, cut = data[half:], cut - half
        self.wfile.write(data[:cut])
        if cut < len(data) or (file is not None and not file.is_sized):
            self.close_connection = True
