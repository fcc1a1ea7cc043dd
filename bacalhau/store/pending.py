"""A commit on its way: its messages, what they depend on, and who waits for the answer."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bacalhau.store.codec import COMMIT, EXPECT, EXPECT_OF, Out, fence_subject
from bacalhau_api.errors import ConflictError, FencedError
from bacalhau_api.meta import Ref
from bacalhau_controllers.store import Fence


@dataclass(slots=True)
class Change:
    """One object of a commit: two messages, the history entry and right after it the object.

    `expect` is what the caller expects; `expect_sent` what the server is told, which is the
    tombstone's sequence where an object is created over one. `history_prefix` lacks only the
    previous revision.
    """

    ref: Ref
    subject: str
    history_prefix: str
    expect: int
    data: bytes
    object_headers: Mapping[str, str]
    history_headers: Mapping[str, str]
    is_removal: bool = False
    expect_sent: int = -1

    def __post_init__(self) -> None:
        if self.expect_sent < 0:
            self.expect_sent = self.expect

    @property
    def history_subject(self) -> str:
        """Where the history entry goes."""
        return f"{self.history_prefix}.{self.expect_sent}"


@dataclass(slots=True, eq=False)
class Pending:
    """One commit. `done` gets the sequence of its first message, or an error."""

    id: str
    changes: Sequence[Change]
    fence: Fence | None
    done: asyncio.Future[int]
    size_bytes: int
    is_under_way: bool = False
    may_have_happened: bool = False
    was_refused: bool = False
    tried: set[str] = field(default_factory=set)

    @property
    def messages_count(self) -> int:
        """How many messages it makes."""
        return 2 * len(self.changes)

    def messages(self) -> Iterator[Out]:
        """History entry and object of each change; the first entry carries the fence."""
        fence = self.fence
        for change in self.changes:
            headers = {**change.history_headers, COMMIT: self.id}
            if fence is not None:
                headers |= {EXPECT: str(fence.token), EXPECT_OF: fence_subject(fence.name)}
                fence = None
            yield Out(change.history_subject, change.data, headers)
            expect = {EXPECT: str(change.expect_sent)}
            yield Out(change.subject, change.data, {**change.object_headers, **expect})

    def pair(self) -> tuple[Out, Out]:
        """The messages of its only change, for `Sender.pair`, which takes care of the fence."""
        (change,) = self.changes
        entry_headers = {**change.history_headers, COMMIT: self.id}
        object_headers = {**change.object_headers, EXPECT: str(change.expect_sent)}
        return (
            Out(change.history_subject, change.data, entry_headers),
            Out(change.subject, change.data, object_headers),
        )

    def guards(self) -> Iterator[tuple[str, int]]:
        """The subjects whose sequence the commit depends on, and what it expects there."""
        for change in self.changes:
            yield change.subject, change.expect_sent
        if self.fence is not None:
            yield fence_subject(self.fence.name), self.fence.token

    def succeed(self, first: int) -> None:
        """Tell the caller that it is stored, from sequence `first` on."""
        if not self.done.done():
            self.done.set_result(first)

    def fail(self, error: BaseException) -> None:
        """Tell the caller that it is not."""
        if not self.done.done():
            self.done.set_exception(error)


def revision_of(first: int, index: int) -> int:
    """The revision of change number `index` of a commit whose first message is at `first`."""
    return first + 2 * index + 1


def fenced(fence: Fence) -> FencedError:
    """The error for a fence that is outdated."""
    return FencedError(f"the lease {fence.name!r} was taken by another since token {fence.token}")


def conflict(ref: Ref, expect: int, found: int) -> ConflictError:
    """The error for an object that is not at the revision expected; 0 stands for absent."""
    return ConflictError(
        f"{ref} was expected at revision {expect} and is at {found}", hint="read it again"
    )
