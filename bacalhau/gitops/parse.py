"""From files to declared objects. No I/O: bytes in, objects and problems out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.jobfile import Document, parse_manifests
from bacalhau_api.meta import DEFAULT_NAMESPACE
from bacalhau_api.v1.source import SourceProblem
from bacalhau_controllers.gitops import Declared

FILE_BYTES_MAX: Final = 2 * 1024 * 1024
TEXT_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Parsed:
    """One file: what it declares, or what is wrong with it."""

    declared: tuple[Declared, ...] = ()
    problems: tuple[SourceProblem, ...] = ()


def parse_file(file: str, data: bytes, namespace: str = DEFAULT_NAMESPACE) -> Parsed:
    """Read one file. What names no namespace gets `namespace`.

    An empty file is a problem, not a wish: it is what a full disk or an editor at work leaves. One
    with nothing but comments declares nothing.
    """
    if len(data) > FILE_BYTES_MAX:
        message = f"is larger than {FILE_BYTES_MAX} bytes"
        return Parsed(problems=(wrong(file, "TooLarge", message, "refer to data as an input"),))
    if not data.strip():
        hint = "delete the file to delete what it declared"
        return Parsed(problems=(wrong(file, "Empty", "is empty", hint),))
    if is_comment(data):
        return Parsed()
    try:
        documents = parse_manifests(data, source=file)
    except InvalidError as error:
        return Parsed(problems=tuple(_problem(file, p) for p in error.problems))
    return Parsed(tuple(_declared(file, document, namespace) for document in documents))


def is_comment(data: bytes) -> bool:
    """Whether a file has nothing but comments and document marks in it."""
    lines = (line.strip() for line in data.splitlines())
    return all(not line or line.startswith(b"#") or line in (b"---", b"...") for line in lines)


def wrong(file: str, reason: str, message: str, hint: str = "", line: int = 0) -> SourceProblem:
    """A problem of a file as a whole."""
    return SourceProblem(
        file=file, line=line, reason=reason, message=message[:TEXT_MAX], hint=hint[:TEXT_MAX]
    )


def digest_of(digests: Mapping[str, str]) -> str:
    """Names the content of a directory, from the digest of each file."""
    text = "\n".join(f"{name}\0{digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:40]


def _declared(file: str, document: Document, namespace: str) -> Declared:
    item = document.resource
    # As with `apply -n`, the default namespace is as good as none.
    if item.namespaced and item.metadata.namespace == DEFAULT_NAMESPACE:
        item = item.with_meta(namespace=namespace)
    return Declared(item, file, document.line, document.warnings)


def _problem(file: str, problem: Problem) -> SourceProblem:
    line = problem.where.rpartition(":")[2]
    text = f"{problem.field}: {problem.message}" if problem.field else problem.message
    if problem.value:
        text += f" (got {problem.value})"
    number = int(line) if line.isascii() and line.isdigit() else 0
    return wrong(file, "Invalid", text, problem.hint, number)
