"""What the messages of the stream look like.

    o.<kind>.<namespace>.<name>                              the object, or its tombstone
    h.<kind>.<namespace>.<name>.<uid>.<previous revision>    one change of it
    l.<name>    a lease, gone when it expires        f.<name>    its newest fencing token

Payloads are the objects' JSON without a resource version, since that is the message's sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote, unquote

from pydantic import ValidationError

from bacalhau.nats.subjects import decode_token, encode_token
from bacalhau_api.errors import BacalhauError
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1 import KINDS
from bacalhau_controllers.store import HistoryEntry, Why, clip

EXPECT: Final = "Nats-Expected-Last-Subject-Sequence"
EXPECT_OF: Final = "Nats-Expected-Last-Subject-Sequence-Subject"
EXPECT_LAST: Final = "Nats-Expected-Last-Sequence"
EXPECT_LAST_ID: Final = "Nats-Expected-Last-Msg-Id"
ID: Final = "Nats-Msg-Id"
TTL: Final = "Nats-TTL"
BATCH: Final = "Nats-Batch-Id"
BATCH_SEQUENCE: Final = "Nats-Batch-Sequence"
BATCH_COMMIT: Final = "Nats-Batch-Commit"
OPERATION: Final = "KV-Operation"
MARKER: Final = "Nats-Marker-Reason"
COMMIT: Final = "Commit"

ALL_OBJECTS: Final = "o.>"

_ACTOR, _REASON, _MESSAGE, _UID, _TIME = "Actor", "Reason", "Message", "Uid", "Time"
# All of printable ASCII but the escape itself and the space, which clients strip at the ends.
_PLAIN = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")


class CorruptError(BacalhauError):
    """A stored message cannot be read: it was written by something else, or damaged."""

    reason = "Corrupt"


@dataclass(frozen=True, slots=True)
class Out:
    """A message to be stored."""

    subject: str
    data: bytes
    headers: Mapping[str, str]


def object_subject(ref: Ref) -> str:
    """Where the object lies."""
    return f"o.{_path(ref)}"


def object_filter(kind: str | None, namespace: str | None) -> str:
    """Covers all objects, those of a kind, or those of a kind in a namespace."""
    if kind is None:
        return ALL_OBJECTS if namespace is None else f"o.*.{encode_token(namespace)}.*"
    if namespace is None:
        return f"o.{encode_token(kind)}.*.*"
    return f"o.{encode_token(kind)}.{encode_token(namespace)}.*"


def history_subject(ref: Ref, uid: str, previous: int) -> str:
    """Where the change that followed revision `previous` lies."""
    return f"h.{_path(ref)}.{encode_token(uid)}.{previous}"


def successor_filter(ref: Ref, revision: int) -> str:
    """Covers the change of an object that followed a revision, of whichever incarnation."""
    return f"h.{_path(ref)}.*.{revision}"


def history_filter(ref: Ref, uid: str | None) -> str:
    """Covers all changes of an object, or of one incarnation."""
    return f"h.{_path(ref)}.{'*' if uid is None else encode_token(uid)}.*"


def history_of_namespace(namespace: str) -> str:
    """Covers all changes of all objects in a namespace."""
    return f"h.*.{encode_token(namespace)}.>"


def lease_subject(name: str) -> str:
    """Where a lease lies while it is held."""
    return f"l.{encode_token(name)}"


def fence_subject(name: str) -> str:
    """Where the newest fencing token of a lease lies; the token is the message's sequence."""
    return f"f.{encode_token(name)}"


def parse_ref(subject: str) -> Ref:
    """The object that a subject under `o.` or `h.` belongs to."""
    tokens = subject.split(".")
    return Ref(decode_token(tokens[1]), decode_token(tokens[2]), decode_token(tokens[3]))


def is_tombstone(headers: Mapping[str, str] | None) -> bool:
    """Whether a message stands for absence. Those that other tools or the server itself leave
    are understood, too."""
    return headers is not None and (OPERATION in headers or MARKER in headers)


def encode_object(resource: Resource) -> bytes:
    """The payload of an object."""
    if resource.metadata.resource_version:
        resource = resource.with_meta(resource_version=0)
    return resource.encode()


def decode_object(kind: str, data: bytes, revision: int) -> Resource:
    """The object of a payload. Raises CorruptError.

    The revision is written into the text, for the text is parsed in one go, several times faster
    than an object can be copied with a field replaced.
    """
    at = data.find(b'"metadata":{') + 12
    model = KINDS.get(kind)
    if model is None or at < 12:
        raise CorruptError(f"a stored object of kind {kind!r} (revision {revision}) is not known")
    try:
        return model.decode(b'%b"resourceVersion":%d,%b' % (data[:at], revision, data[at:]))
    except ValidationError as error:
        raise CorruptError(
            f"the stored {kind} of revision {revision} cannot be read: {error}",
            hint="it was written by a newer version, or damaged",
        ) from error


def history_headers(why: Why, uid: str, now: datetime) -> dict[str, str]:
    """Who, why, when; safe for headers whatever the texts hold."""
    headers = {
        _ACTOR: _plain(why.actor),
        _REASON: _plain(why.reason),
        _UID: _plain(uid),
        _TIME: now.astimezone(UTC).isoformat(),
    }
    if why.message:
        headers[_MESSAGE] = _plain(why.message)
    return headers


def decode_history(
    subject: str, sequence: int, headers: Mapping[str, str] | None, data: bytes
) -> HistoryEntry:
    """The entry of a history message. The change itself is the message right after it."""
    found = headers or {}
    ref, revision = parse_ref(subject), sequence + 1
    return HistoryEntry(
        ref=ref,
        uid=unquote(found.get(_UID, "")),
        revision=revision,
        time=datetime.fromisoformat(found[_TIME]),
        actor=unquote(found.get(_ACTOR, "")),
        reason=unquote(found.get(_REASON, "")),
        message=unquote(found.get(_MESSAGE, "")),
        resource=None if OPERATION in found else decode_object(ref.kind, data, revision),
    )


def _plain(text: str) -> str:
    return quote(clip(text), safe=_PLAIN, errors="replace")


def _path(ref: Ref) -> str:
    return f"{encode_token(ref.kind)}.{encode_token(ref.namespace)}.{encode_token(ref.name)}"
