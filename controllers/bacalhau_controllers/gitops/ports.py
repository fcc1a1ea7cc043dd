"""What the reconciler of sources is given: a directory to read, and hands to change objects with.

`Tree` answers with one moment of a directory. `Objects` is the store on an orchestrator
(`objects.StoreObjects`), or the HTTP API where a client runs next to a directory.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from bacalhau_api.errors import BacalhauError
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.source import Claim, Source, SourceProblem, SourceSpec, SourceStatus


@dataclass(frozen=True, slots=True)
class Declared:
    """One object of one file. `file` is relative to the directory. The same object stands for the
    same text: reading an unchanged file again gives the same `resource`."""

    resource: Resource
    file: str
    line: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TreeView:
    """One moment of a directory.

    `revision` names the content; `commit` the git commit, if it is one. `problems` are about files
    that could not be read or parsed: what they declared is not known. `absent` says in words why
    the directory as a whole could not be read, and `absent_reason` in one; then nothing else counts.
    """

    revision: str = ""
    commit: str = ""
    files: int = 0
    declared: tuple[Declared, ...] = ()
    problems: tuple[SourceProblem, ...] = ()
    mounts: tuple[str, ...] = ()
    absent: str = ""
    absent_reason: Literal["", "Missing", "Unreadable", "Unsettled"] = ""


class Tree(Protocol):
    """A directory of manifests."""

    @property
    def path(self) -> str:
        """Where it is, for people."""
        ...

    async def read(self, spec: SourceSpec) -> TreeView:
        """The directory as it is. Takes as long as the directory needs to come to rest, and gives
        up after a while (`Unsettled`). Never raises for what is wrong with the directory."""
        ...

    def watching(self, wake: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """While open, `wake` is called soon after something in the directory has changed. A hint:
        a change may go unnoticed, and is found by the sweep."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """An object to be brought to what a file declares."""

    declared: Declared
    commit: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """What became of an order. `error` says why not; None otherwise. `versions` are those of the
    object and of its claim if both were written by this; else zeros."""

    ref: Ref
    outcome: str = ""
    error: BacalhauError | None = None
    versions: tuple[int, int] = (0, 0)


class Objects(Protocol):
    """Changes objects in the name of a source, each together with its claim, in one commit.

    All raise TransientError where the store cannot be reached; what is wrong with one object is in
    its Done.
    """

    async def apply(self, source: Source, orders: Sequence[Order]) -> Sequence[Done]:
        """Create or change objects, in any order."""
        ...

    async def prune(self, source: Source, claims: Sequence[Claim], commit: str) -> Sequence[Done]:
        """Delete objects that the source owns, where they are still the claimed ones."""
        ...

    async def release(self, source: Source, claims: Sequence[Claim], why: str) -> Sequence[Done]:
        """Let objects go: they stay, and belong to nobody."""
        ...

    async def report(self, source: Source, status: SourceStatus) -> Source:
        """Store the status. Raises ConflictError if the source was changed since it was read."""
        ...
