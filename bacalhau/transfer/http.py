"""HTTP GET for what jobs name: each connection, of each redirect too, goes to an address that was
vetted after the name was looked up and right before connecting to that very address.

Blocking, made for threads: a thread that waits in `recv` with the interpreter's lock released
moves bytes at the speed of the network, and leaves the node's event loop alone. Proxies from the
environment are not used, because behind one nobody knows where a connection ends.
"""

import contextlib
import http.client
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from urllib.parse import SplitResult, quote, urljoin, urlsplit, urlunsplit

from bacalhau.transfer.addresses import AddressPolicy, AddressRefusedError
from bacalhau.transfer.progress import Transfer
from bacalhau.version import VERSION
from bacalhau_api.errors import TerminalError, UnavailableError

REDIRECTS_MAX = 5
CONNECT_SECONDS = 15.0
STALL_SECONDS = 60.0
"""Without a byte from the other side."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRY_LATER = frozenset({408, 425, 429})
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(slots=True)
class Answer:
    """The last answer behind all redirects; `body` is read by `readinto` or `read`."""

    status: int
    headers: http.client.HTTPMessage
    body: http.client.HTTPResponse
    url: str

    @property
    def length(self) -> int | None:
        """Bytes of the body, None if the server does not say."""
        return self.body.length

    def header(self, name: str) -> str:
        """A header's value, empty if there is none."""
        return self.headers.get(name) or ""


def check_url(url: str) -> SplitResult:
    """Raises TerminalError for what is not fetched at all: other schemes, passwords in the URL."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise _invalid(f"{shown(url)} is not a valid URL") from error
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise _invalid(f"{shown(url)} must be a URL such as https://example.org/data.csv")
    if parts.username is not None or parts.password is not None:
        raise _invalid(
            f"{shown(url)} holds a user name or password, which would be stored with the job; "
            "take it out"
        )
    if any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise _invalid(f"{shown(url)} holds spaces or control characters; write them as %XX")
    return parts


def shown(url: str) -> str:
    """A URL for error texts and logs: without what may be secret in it."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "the URL"
    text = urlunsplit((parts.scheme, host, parts.path, "", ""))
    return text if len(text) <= 200 else text[:197] + "..."


@contextlib.contextmanager
def get(
    url: str,
    policy: AddressPolicy | None,
    *,
    headers: Mapping[str, str] | None = None,
    transfer: Transfer | None = None,
    method: str = "GET",
    stall_seconds: float = STALL_SECONDS,
    redirects_max: int = REDIRECTS_MAX,
) -> Iterator[Answer]:
    """Send one request and follow its redirects. With policy None addresses are not vetted: for
    services that the operator named.

    Raises AddressRefusedError, TerminalError for what will not work, UnavailableError for what
    may pass. Statuses other than redirects are left to the caller; see `check_status`.
    """
    transfer = transfer or Transfer()
    for _ in range(redirects_max + 1):
        parts = check_url(url)
        with _requested(parts, policy, headers or {}, transfer, method, stall_seconds) as answer:
            location = answer.header("Location")
            if answer.status not in _REDIRECTS or not location:
                yield answer
                return
        target = urljoin(url, location)
        if parts.scheme == "https" and urlsplit(target).scheme.lower() != "https":
            raise TerminalError(
                f"{shown(url)} redirects to {shown(target)}, which is not encrypted; name that "
                "URL itself if it is what you want",
                reason="RedirectRefused",
            )
        url = target
    raise TerminalError(
        f"{shown(url)} redirects more than {redirects_max} times", reason="RedirectRefused"
    )


@contextlib.contextmanager
def _requested(
    parts: SplitResult,
    policy: AddressPolicy | None,
    headers: Mapping[str, str],
    transfer: Transfer,
    method: str,
    stall_seconds: float,
) -> Iterator[Answer]:
    url = urlunsplit(parts)
    is_https = parts.scheme.lower() == "https"
    host = _idna(parts.hostname or "")
    port = parts.port or (443 if is_https else 80)
    with translated(url, transfer), contextlib.ExitStack() as stack:
        plain = connect(host, port, policy, transfer)
        stack.callback(plain.close)
        stack.callback(transfer.on_cancel(lambda: shut(plain)))
        plain.settimeout(stall_seconds)
        sock = plain
        if is_https:
            # The certificate is checked against the name, though the address was chosen by us.
            sock = tls_context().wrap_socket(plain, server_hostname=host)
            stack.callback(sock.close)
            stack.callback(transfer.on_cancel(lambda: shut(sock)))
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        stack.callback(connection.close)
        path = urlunsplit(("", "", _ascii(parts.path or "/"), _ascii(parts.query), ""))
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", _host_header(host, port, is_https))
        connection.putheader("User-Agent", f"bacalhau/{VERSION}")
        # The bytes as they are: sizes, checksums and resuming count those.
        connection.putheader("Accept-Encoding", "identity")
        if method == "POST":
            connection.putheader("Content-Length", "0")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        stack.callback(response.close)
        yield Answer(response.status, response.headers, response, url)


def check_status(answer: Answer, *expected: int) -> None:
    """Raises TerminalError or UnavailableError unless the status is one of `expected`."""
    if answer.status in expected:
        return
    words = http.client.responses.get(answer.status, "")
    message = f"{shown(answer.url)} answered {answer.status} {words}".rstrip()
    if answer.status >= 500 or answer.status in _TRY_LATER:
        raise UnavailableError(message)
    hint = {401: "; it needs credentials", 403: "; access is denied", 404: "; check the URL"}
    raise TerminalError(message + hint.get(answer.status, ""), reason="InputFailed")


@contextlib.contextmanager
def translated(url: str, transfer: Transfer) -> Iterator[None]:
    """Turn errors of sockets, TLS and HTTP into the project's. A cancelled transfer stays one."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise TerminalError(
            f"{shown(url)} has a certificate that cannot be trusted: {error.verify_message}",
            reason="InputFailed",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        transfer.check()
        if isinstance(error, http.client.InvalidURL):
            raise _invalid(f"{shown(url)} is not a valid URL") from error
        why = "took too long" if isinstance(error, TimeoutError) else _words(error)
        raise UnavailableError(f"{shown(url)} could not be read: {why}") from error


def connect(
    host: str, port: int, policy: AddressPolicy | None, transfer: Transfer
) -> socket.socket:
    """A connection to one of the host's addresses that the policy lets pass.

    Raises AddressRefusedError if it lets none pass, OSError if none answers, UnavailableError.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(f"{host} is not known here: {_words(error)}") from error
    except UnicodeError as error:
        raise _invalid(f"{host[:100]!r} is not the name of a host") from error
    refused: AddressRefusedError | None = None
    failed: OSError | None = None
    for family, kind, protocol, _, address in found:
        if family not in _FAMILIES:
            continue
        transfer.check()
        try:
            if policy is not None:
                policy.check(host, str(address[0]), port)
        except AddressRefusedError as error:
            refused = refused or error
            continue
        sock = socket.socket(family, kind, protocol)
        forget = transfer.on_cancel(lambda sock=sock: shut(sock))  # type: ignore[misc]
        try:
            sock.settimeout(CONNECT_SECONDS)
            # The very address that was vetted: the name is not looked up again.
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            failed = error
            sock.close()
        finally:
            forget()
    # One refused address decides, so that the message does not depend on what else is up.
    if refused is not None and failed is None:
        raise refused
    raise failed or OSError("it has no address that can be used")


@cache
def tls_context() -> ssl.SSLContext:
    """Certificates are checked by the system's trust store (or SSL_CERT_FILE)."""
    return ssl.create_default_context()


def shut(sock: socket.socket) -> None:
    """Wake whoever waits for a socket, in whatever thread."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _host_header(host: str, port: int, is_https: bool) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port == (443 if is_https else 80) else f"{name}:{port}"


def _idna(host: str) -> str:
    """The name as it goes over the wire."""
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise _invalid(f"{host[:100]!r} is not the name of a host") from error


def _ascii(text: str) -> str:
    """Characters beyond ASCII as %XX; what is written so already stays."""
    return quote(text, safe="/%:=&?~+,;@!$'()*-._[]")


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _invalid(message: str) -> TerminalError:
    return TerminalError(message, reason="InvalidInput")
