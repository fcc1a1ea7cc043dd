"""A forward proxy on loopback for programs that connect by themselves, such as git: it connects to
vetted addresses only, and does so itself, so that what was vetted is what is connected to.

It knows CONNECT (for https) and requests with a whole URL (for http), one to a connection. It takes
requests only with a password made for this run, which other users of the machine do not know.
"""

import base64
import contextlib
import secrets
import selectors
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

from bacalhau.transfer.addresses import AddressPolicy
from bacalhau.transfer.http import connect, shut
from bacalhau.transfer.progress import CancelledTransferError, Transfer
from bacalhau_api.errors import BacalhauError, TerminalError

HEAD_BYTES_MAX = 64 * 1024
CONNECTIONS_MAX = 32
_DROPPED = frozenset({"proxy-authorization", "proxy-connection", "connection", "keep-alive"})


class VettingProxy:
    """Runs within a `with` block. `refusals` are the reasons for which it refused a connection:
    the program behind it can only tell that there was one."""

    def __init__(self, policy: AddressPolicy, transfer: Transfer) -> None:
        self._policy = policy
        self._transfer = transfer
        self._password = secrets.token_hex(16)
        self._slots = threading.Semaphore(CONNECTIONS_MAX)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.refusals: list[BacalhauError] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Gives the proxy's URL."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=self._accept, args=(listener,), name="proxy")
            thread.start()
            try:
                yield f"http://git:{self._password}@127.0.0.1:{listener.getsockname()[1]}"
            finally:
                shut(listener)
                thread.join()
                with self._lock:
                    rest = list(self._open)
                for sock in rest:
                    shut(sock)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if not self._slots.acquire(blocking=False):
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True, name="proxy").start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with self._tracked(client):
                client.settimeout(60)
                self._handle(client)
        except (OSError, ValueError, CancelledTransferError):
            pass  # one side went away, or spoke something else
        finally:
            self._slots.release()

    def _handle(self, client: socket.socket) -> None:
        head, rest = _read_head(client)
        line, *headers = head.split("\r\n")
        method, target, _ = line.split(" ")
        expected = "Basic " + base64.b64encode(f"git:{self._password}".encode()).decode()
        given = dict(_header(one) for one in headers)
        if not secrets.compare_digest(given.get("proxy-authorization", ""), expected):
            client.sendall(
                b"HTTP/1.1 407 Proxy Authentication Required\r\n"
                b'Proxy-Authenticate: Basic realm="node"\r\nContent-Length: 0\r\n'
                b"Connection: close\r\n\r\n"
            )
            return
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        port = parts.port or 80
        try:
            server = connect(parts.hostname or "", port, self._policy, self._transfer)
        except (BacalhauError, OSError) as error:
            status = b"502 Bad Gateway"
            if isinstance(error, TerminalError):
                self.refusals.append(error)
                status = b"403 Forbidden"
            client.sendall(
                b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            return
        with self._tracked(server):
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            else:
                path = urlunsplit(("", "", parts.path or "/", parts.query, ""))
                kept = [one for one in headers if _header(one)[0] not in _DROPPED]
                lines = [f"{method} {path} HTTP/1.1", *kept, "Connection: close", "", ""]
                server.sendall("\r\n".join(lines).encode("latin-1"))
            server.sendall(rest)
            _pump(client, server)

    @contextlib.contextmanager
    def _tracked(self, sock: socket.socket) -> Iterator[None]:
        with self._lock:
            self._open.add(sock)
        forget = self._transfer.on_cancel(lambda: shut(sock))
        try:
            with sock:
                yield
        finally:
            forget()
            with self._lock:
                self._open.discard(sock)


def _read_head(client: socket.socket) -> tuple[str, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(8192)
        if not more or len(data) > HEAD_BYTES_MAX:
            raise ValueError("no request")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head.decode("latin-1"), rest


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip().lower(), value.strip()


def _pump(one: socket.socket, two: socket.socket) -> None:
    """Pass on bytes both ways until both sides have ended."""
    with selectors.DefaultSelector() as selector:
        selector.register(one, selectors.EVENT_READ, two)
        selector.register(two, selectors.EVENT_READ, one)
        while selector.get_map():
            ready = selector.select(timeout=120)
            if not ready:
                return
            for key, _ in ready:
                source, target = key.fileobj, key.data
                assert isinstance(source, socket.socket)
                data = source.recv(256 * 1024)
                if data:
                    target.sendall(data)
                else:
                    selector.unregister(source)
                    with contextlib.suppress(OSError):
                        target.shutdown(socket.SHUT_WR)
