"""Access to S3: which endpoints, with whose credentials, and what its errors mean.

Credentials are the node's: the standard AWS chain (environment, profile, role of the machine), or
none for public buckets. They are sent only to AWS, or to endpoints that the operator listed: a
job that could name any endpoint could collect the session tokens of the node's role.

Two clients: obstore (Rust) moves the bytes of objects, three to five times as many small ones a
second as boto3 and in bounded memory; boto3 lists and does multipart uploads part by part, because
obstore cannot name keys with empty path parts, nor go on with an upload of an earlier process.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bacalhau_api.errors import BacalhauError, TerminalError, UnavailableError

if TYPE_CHECKING:
    from obstore.store import S3Store

REGION_DEFAULT = "us-east-1"
CONNECT_SECONDS = 10
READ_SECONDS = 60
REQUEST_SECONDS = 180
RETRIES_MAX = 3
CREDENTIALS_SECONDS = 30.0
"""Between two looks for credentials where there were none; one may take seconds."""

BUCKETS_MAX = 64
"""Whose connections are kept; which buckets jobs name is up to them."""

_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
_MISSING = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404", "NotFound"})
_DENIED = frozenset(
    {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch",
     "ExpiredToken", "InvalidToken", "401", "Unauthorized", "AllAccessDisabled"}
)  # fmt: skip
_TERMINAL = frozenset(
    {"InvalidArgument", "InvalidRequest", "InvalidBucketName", "PermanentRedirect", "400",
     "AuthorizationHeaderMalformed", "MethodNotAllowed", "EntityTooLarge", "InvalidRange"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket somewhere. `endpoint` empty: AWS itself."""

    bucket: str
    region: str = ""
    endpoint: str = ""

    def shown(self, key: str = "") -> str:
        """For error texts."""
        at = f" at {self.endpoint}" if self.endpoint else ""
        return f"s3://{self.bucket}/{key}"[:300] + at


class S3Access:
    """The way to buckets. One per process; clients are made on first use.

    `endpoints` are those that jobs may name besides AWS; the one from the environment is both
    allowed and what jobs get that name none.
    """

    def __init__(self, endpoints: Sequence[str] = ()) -> None:
        own = next(filter(None, map(os.environ.get, _ENDPOINT_VARIABLES)), "")
        self._default = normal_endpoint(own) if own else ""
        self._allowed = {normal_endpoint(one) for one in endpoints} | {self._default} - {""}
        self._lock = threading.Lock()
        self._buckets: dict[Place, Bucket] = {}
        # Of its own: buckets are named on the event loop, and to ask may take long.
        self._asking = threading.Lock()
        self._credentials: Any = None
        self._ask_at = 0.0

    def refusal(self, endpoint: str) -> str:
        """Why jobs may not use an endpoint; empty if they may."""
        if not endpoint:
            return ""
        try:
            wanted = normal_endpoint(endpoint)
        except ValueError as error:
            return str(error)
        if wanted in self._allowed:
            return ""
        known = ", ".join(sorted(self._allowed)) or "none but AWS"
        return (
            f"this node does not send its credentials to the endpoint {wanted} (it may use: "
            f"{known}); its operator can allow it with --s3-endpoint"
        )

    def bucket(self, bucket: str, *, region: str = "", endpoint: str = "") -> "Bucket":
        """A bucket. Raises TerminalError if the endpoint is not allowed."""
        why = self.refusal(endpoint)
        if why:
            raise TerminalError(why, reason="EndpointRefused")
        place = Place(bucket, region, normal_endpoint(endpoint) if endpoint else self._default)
        with self._lock:
            found = self._buckets.pop(place, None) or Bucket(place, self)
            self._buckets[place] = found
            while len(self._buckets) > BUCKETS_MAX:
                del self._buckets[next(iter(self._buckets))]
            return found

    @cached_property
    def session(self) -> Any:
        """The boto3 session; may ask the machine for its role, so not on an event loop."""
        import boto3

        return boto3.Session()

    @property
    def credentials(self) -> Any:
        """The node's credentials, refreshed by boto3 itself; None if there are none. That is asked
        again after a while: after a boot, the machine's role may be there later than we are."""
        with self._asking:
            if self._credentials is None and time.monotonic() >= self._ask_at:
                self._credentials = self.session.get_credentials()
                self._ask_at = time.monotonic() + CREDENTIALS_SECONDS
            return self._credentials

    def region(self, place: Place) -> str:
        """As the job says, else as the node is set up."""
        own = next(filter(None, map(os.environ.get, _REGION_VARIABLES)), "")
        return place.region or own or self.session.region_name or REGION_DEFAULT


class Bucket:
    """One bucket, through both clients. The first use of each is blocking work."""

    def __init__(self, place: Place, access: S3Access) -> None:
        self.place = place
        self._access = access
        self._lock = threading.Lock()
        self._is_anonymous = False
        self._client: Any = None
        self._store: S3Store | None = None

    @property
    def client(self) -> Any:
        """boto3."""
        with self._lock:
            self._notice_credentials()
            if self._client is None:
                self._client = self._make_client()
            return self._client

    @property
    def store(self) -> "S3Store":
        """obstore."""
        with self._lock:
            self._notice_credentials()
            if self._store is None:
                self._store = self._make_store()
            return self._store

    def _notice_credentials(self) -> None:
        """Clients that were made without credentials are of no use once there are some."""
        is_anonymous = self._access.credentials is None
        if is_anonymous is not self._is_anonymous:
            self._is_anonymous = is_anonymous
            self._client = self._store = None

    def _make_client(self) -> Any:
        from botocore import UNSIGNED
        from botocore.config import Config

        return self._access.session.client(
            "s3",
            region_name=self._access.region(self.place),
            endpoint_url=self.place.endpoint or None,
            config=Config(
                # The default still signs links in an old way that many servers refuse.
                signature_version=UNSIGNED if self._is_anonymous else "s3v4",
                s3={"addressing_style": "path" if self.place.endpoint else "auto"},
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"total_max_attempts": RETRIES_MAX + 1, "mode": "standard"},
                # Checksums in trailers are more than S3-compatible servers understand.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                max_pool_connections=16,
                tcp_keepalive=True,
            ),
        )

    def _make_store(self) -> "S3Store":
        from obstore.store import S3Store

        place = self.place
        config: Any = {"region": self._access.region(place)}
        if place.endpoint:
            config["endpoint"] = place.endpoint
        provider = None
        if self._is_anonymous:
            config["skip_signature"] = True
        else:
            from obstore.auth.boto3 import Boto3CredentialProvider

            provider = Boto3CredentialProvider(self._access.session, ttl=timedelta(minutes=5))
            # It would bring the session's region along, over the job's.
            provider.config = {}
        return S3Store(
            place.bucket,
            config=config,
            credential_provider=provider,
            client_options={
                "allow_http": place.endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "timeout": timedelta(seconds=REQUEST_SECONDS),
            },
            retry_config={
                "max_retries": RETRIES_MAX,
                "retry_timeout": timedelta(seconds=READ_SECONDS),
            },
        )


def normal_endpoint(text: str) -> str:
    """`scheme://host[:port]`. Raises ValueError for what is no endpoint, passwords included."""
    parts = urlsplit(text.strip())
    try:
        port = parts.port
    except ValueError:
        raise ValueError("the endpoint has a port that is none") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("an endpoint may not hold a user name or password")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an endpoint must be a URL such as https://s3.example.org")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("an endpoint is a host, without a path: the bucket is given apart")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    is_usual = port in (None, 443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{host}" if is_usual else f"{parts.scheme}://{host}:{port}"


def is_plain_key(key: str) -> bool:
    """True if obstore can name it: it makes a path of a key."""
    parts = key.split("/")
    return all(part not in ("", ".", "..") for part in parts) and key.isprintable()


@contextlib.contextmanager
def translated(what: str, *, verb: str = "read") -> Iterator[None]:
    """Turn errors of both clients into the project's: never with headers, signatures or keys in
    their texts. `what` is the place, as `Place.shown` tells it."""
    try:
        yield
    except BacalhauError:
        raise
    except Exception as error:
        code = error_code(error)
        if code is None:
            raise
        raise _error(what, verb, code) from error


def error_code(error: Exception) -> str | None:
    """The S3 error code, or a word for what else it was; None if it is no client's error."""
    module = type(error).__module__.partition(".")[0]
    name = type(error).__name__
    if module in ("botocore", "boto3", "s3transfer"):
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", "") or "Unknown")
        return name
    if module == "obstore" or isinstance(error, FileNotFoundError | PermissionError | OSError):
        found = re.search(r"<Code>(\w+)</Code>", str(error))
        if found:
            return found[1]
        if "Precondition" in name:
            return "PreconditionFailed"
        if isinstance(error, FileNotFoundError) or name == "NotFoundError":
            return "NoSuchKey"
        if isinstance(error, PermissionError) or "Permission" in name or "Unauth" in name:
            return "AccessDenied"
        return "Unreachable" if module == "obstore" else None
    return None


def _error(what: str, verb: str, code: str) -> BacalhauError:
    if code in _MISSING:
        return TerminalError(f"{what} does not exist", reason="NotFound")
    if code in _DENIED or code in ("NoCredentialsError", "UnauthorizedSSOTokenError"):
        return TerminalError(
            f"{what} may not be {_PARTICIPLES.get(verb, verb)} with this node's credentials "
            f"({code}); its operator sets them by the standard AWS chain",
            reason="AccessDenied",
        )
    if code in _TERMINAL or code == "ParamValidationError":
        return TerminalError(f"{what} cannot be {_PARTICIPLES.get(verb, verb)}: {code}")
    return UnavailableError(f"{what} could not be {_PARTICIPLES.get(verb, verb)}: {code}")


_PARTICIPLES = {"write": "written", "list": "listed"}
