"""Outputs of executions: lists, single files (resumable), and a whole execution as a tar stream.

Everything is pulled from the node in bounded pieces, as fast as the client reads and no faster.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from bacalhau.archive import TarEntry, stream_tar
from bacalhau.server.problems import ApiError, render
from bacalhau_api.errors import InvalidError, NotFoundError, Problem, UnavailableError
from bacalhau_api.v1.execution import Execution, OutputFile
from bacalhau_api.wire import OutputsPage

if TYPE_CHECKING:  # nodes use this module, and need no scheduler
    from bacalhau.server.ports import NodeReader

PIECE_BYTES = 256 * 1024
PIECE_BYTES_FIRST = 64 * 1024
PIECE_BYTES_MIN = 8 * 1024
PIECE_SECONDS = 1.0
PIECE_TRIES_MAX = 3
PATH_LENGTH_MAX = 4096


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes `start` to `end` (exclusive) of a file of `size` bytes."""

    start: int
    end: int
    size: int


async def list_page(nodes: "NodeReader", execution: Execution, after: str) -> OutputsPage:
    """One page of an execution's files. Raises UnavailableError, NotFoundError."""
    check_output_path(after, field="after", allow_empty=True)
    page = await nodes.list_outputs(
        execution.spec.node, execution.metadata.namespace, execution.name, after
    )
    if page.error:
        raise NotFoundError(f"execution {execution.name} has no outputs to read: {page.error}")
    # Who reads on from the last path would otherwise never come to an end.
    if any(a >= b for a, b in pairwise((after, *(file.path for file in page.files)))):
        raise UnavailableError(f"node {execution.spec.node} lists its outputs out of order")
    return page


async def list_all(nodes: "NodeReader", execution: Execution) -> AsyncIterator[OutputFile]:
    """All files of an execution, in order."""
    after = ""
    while True:
        page = await list_page(nodes, execution, after)
        for file in page.files:
            yield file
        if page.is_last or not page.files:
            return
        after = page.files[-1].path


async def find(nodes: "NodeReader", execution: Execution, path: str) -> OutputFile:
    """One file by its path. Raises NotFoundError."""
    check_output_path(path)
    # Paging from just before the path finds it in one step where lists are sorted by code point.
    page = await list_page(nodes, execution, _just_before(path))
    for file in page.files:
        if file.path == path:
            return file
    async for file in list_all(nodes, execution):
        if file.path == path:
            return file
    hint = f"list them: GET …/executions/{execution.name}/outputs"
    raise NotFoundError(f"execution {execution.name} has no output {render(path)}", hint=hint)


def _just_before(path: str) -> str:
    last = ord(path[-1])
    if last <= 1:
        return path[:-1]
    before = chr(last - 1) if last != 0xE000 else "\ud7ff"
    return path[:-1] + before + "\U0010fffd"


def check_output_path(path: str, *, field: str = "path", allow_empty: bool = False) -> None:
    """Refuse what no output can be called. Raises InvalidError. The node checks again."""
    if allow_empty and not path:
        return
    is_text = "\0" not in path and path.encode("utf-8", "replace").decode() == path
    is_inside = not any(part in ("", ".", "..") for part in path.split("/"))
    if not (is_text and is_inside and len(path) <= PATH_LENGTH_MAX):
        hint = "use a relative path as the list of outputs gives it"
        raise InvalidError([Problem(field, "is not the path of an output", render(path), hint)])


def parse_range(header: str, offset: int, size: int) -> Span:
    """What of a file is asked for, by a Range header or an offset. Raises ApiError (416)."""
    start, end = offset, size
    if header:
        unit, _, ranges = header.partition("=")
        first, dash, last = ranges.strip().partition("-")
        digits = [t for t in (first, last) if t]
        is_number = all(t.isascii() and t.isdigit() and len(t) < 19 for t in digits)
        if unit.strip() == "bytes" and dash and digits and is_number:
            if first:
                start = int(first)
                end = min(size, int(last) + 1) if last else size
            else:
                start = max(0, size - int(last))
        # Several ranges, or other units: the whole file is a correct answer.
    if start > size or (start == size and header and size):
        raise ApiError(
            416,
            "RangeNotSatisfiable",
            f"the file has {size} bytes, which is not more than {start}",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return Span(start, max(start, end), size)


async def read_span(
    nodes: "NodeReader", execution: Execution, path: str, span: Span
) -> AsyncIterator[bytes]:
    """The bytes of a span. Raises UnavailableError in the middle if the file is shorter, or if the
    node does not answer for even the smallest piece.

    The pieces are as large as the line to the node takes in about a second: over a slow one, a
    large piece would hold up what the node has to report, and come too late for whoever asked.
    """
    at, size, tries = span.start, PIECE_BYTES_FIRST, 0
    clock = asyncio.get_running_loop()
    while at < span.end:
        began = clock.time()
        try:
            piece = await nodes.read_output(
                execution.spec.node,
                execution.metadata.namespace,
                execution.name,
                path,
                at,
                min(size, span.end - at),
            )
        except UnavailableError:
            tries += 1
            if tries >= PIECE_TRIES_MAX:
                raise
            size = max(PIECE_BYTES_MIN, size // 8)
            continue
        if not piece:
            raise UnavailableError(f"output {path} ended at {at} of {span.end} bytes")
        tries = 0
        size = _next_size(size, clock.time() - began)
        at += len(piece)
        yield piece


def _next_size(size: int, took_seconds: float) -> int:
    """Larger after a quick piece, smaller after a slow one."""
    if took_seconds < PIECE_SECONDS / 2:
        return min(size * 2, PIECE_BYTES)
    return max(size // 2, PIECE_BYTES_MIN) if took_seconds > PIECE_SECONDS else size


def tar_stream(nodes: "NodeReader", execution: Execution) -> AsyncIterator[bytes]:
    """All outputs of an execution as one tar."""

    async def entries() -> AsyncIterator[TarEntry]:
        async for file in list_all(nodes, execution):
            span = Span(0, file.size_bytes, file.size_bytes)
            read = partial(read_span, nodes, execution, file.path, span)
            yield TarEntry(file.path, file.size_bytes, read)

    return stream_tar(entries())
