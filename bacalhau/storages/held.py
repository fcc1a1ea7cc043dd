"""Which inputs the cache holds how much of: what this node tells the scheduler.

An input is noted by its key (`bacalhau_api.locality`) with the contents that it was made of, each
time it is given to an execution. What of that is still here is counted when it is asked for, so
that eviction needs to tell nobody.
"""

import heapq
import sqlite3
from collections.abc import Iterable
from typing import Final, Protocol

from bacalhau_api.v1.node import HELD_INPUTS_MAX, HeldInput

TOLD_BYTES_MIN: Final = 1024 * 1024
"""Less is brought in no time."""

INPUTS_MAX: Final = 256
CONTENTS_MAX: Final = 4096
"""Of one input: the largest ones are counted."""

SCHEMA: Final = """
create table if not exists inputs (
    key text primary key, total integer not null, used integer not null
) strict;
create table if not exists input_contents (
    key text not null, sha256 text not null, primary key (key, sha256)
) strict, without rowid;
"""

_HELD: Final = """
select key, sum(blobs.size) as held, inputs.total
from inputs join input_contents using (key) join blobs using (sha256)
group by key having held >= ? order by held desc, key limit ?
"""


class Sized(Protocol):
    """A content."""

    @property
    def sha256(self) -> str:
        """Its name."""
        ...

    @property
    def size_bytes(self) -> int:
        """How large it is."""
        ...


def note(db: sqlite3.Connection, key: str, contents: Iterable[Sized], used: int) -> None:
    """Note what an input consists of, in place of what it did before. `used` orders the notes."""
    distinct = {one.sha256: one.size_bytes for one in contents}
    largest = heapq.nlargest(CONTENTS_MAX, distinct, key=lambda sha256: distinct[sha256])
    db.execute("begin immediate")
    try:
        db.execute("delete from input_contents where key = ?", (key,))
        db.executemany(
            "insert into input_contents values (?, ?)", [(key, sha256) for sha256 in largest]
        )
        total = sum(distinct.values())
        db.execute("insert or replace into inputs values (?, ?, ?)", (key, total, used))
        db.execute(
            "delete from inputs where key in "
            "(select key from inputs order by used desc limit -1 offset ?)",
            (INPUTS_MAX,),
        )
        db.execute("delete from input_contents where key not in (select key from inputs)")
        db.execute("commit")
    except BaseException:
        db.execute("rollback")
        raise


def held(db: sqlite3.Connection) -> tuple[HeldInput, ...]:
    """The inputs of which most is here, by key."""
    rows = db.execute(_HELD, (TOLD_BYTES_MIN, HELD_INPUTS_MAX)).fetchall()
    found = [HeldInput(key=key, size_bytes=size, total_bytes=total) for key, size, total in rows]
    return tuple(sorted(found, key=lambda one: one.key))
