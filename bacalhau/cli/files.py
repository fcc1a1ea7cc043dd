"""Manifests from files, directories and standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.jobfile import Document, parse_manifests
from bacalhau_api.meta import DEFAULT_NAMESPACE

SUFFIXES: Final = (".yaml", ".yml", ".json")
FILE_BYTES_MAX: Final = 2 * 1024 * 1024


def read_documents(
    paths: Sequence[Path],
    *,
    recursive: bool,
    namespace: str = DEFAULT_NAMESPACE,
    texts: Sequence[tuple[str, bytes]] | None = None,
) -> list[Document]:
    """All documents of some files. `-` is standard input; of a directory, the files in it that
    look like manifests. What names no namespace gets `namespace`. `texts` are the files' if they
    were read already.

    Raises InvalidError with the problems of all files together.
    """
    documents: list[Document] = []
    problems: list[Problem] = []
    for source, text in texts if texts is not None else read_texts(paths, recursive=recursive):
        try:
            documents += parse_manifests(text, source=source)
        except InvalidError as error:
            problems += error.problems
    if problems:
        raise InvalidError(problems)
    return [_placed(document, namespace) for document in documents]


def read_texts(paths: Sequence[Path], *, recursive: bool) -> list[tuple[str, bytes]]:
    """What these files hold, each with its name. Raises InvalidError."""
    texts = []
    for path in paths:
        if str(path) == "-":
            texts.append(("<stdin>", sys.stdin.buffer.read(FILE_BYTES_MAX + 1)))
            continue
        for file in _files(path, recursive=recursive):
            texts.append((str(file), _read(file)))
    for source, text in texts:
        if len(text) > FILE_BYTES_MAX:
            hint = "keep data out of job files: refer to it as an input"
            message = f"is larger than {FILE_BYTES_MAX} bytes"
            raise InvalidError([Problem(source, message, hint=hint)])
    return texts


def _files(path: Path, *, recursive: bool) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(
        file
        for file in (path.rglob("*") if recursive else path.iterdir())
        if file.suffix.lower() in SUFFIXES and file.is_file()
    )
    if not found:
        hint = f"manifests end in {', '.join(SUFFIXES)}"
        raise InvalidError([Problem(str(path), "has no manifests in it", hint=hint)])
    return found


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        problem = Problem(str(file), f"cannot be read: {error.strerror or error}")
        raise InvalidError([problem]) from error


def _placed(document: Document, namespace: str) -> Document:
    item = document.resource
    if not item.namespaced or namespace == DEFAULT_NAMESPACE:
        return document
    if item.metadata.namespace not in (DEFAULT_NAMESPACE, namespace):
        hint = f"drop -n, or write namespace: {namespace}"
        message = f"{item.ref} is in another namespace than {namespace}"
        raise InvalidError([Problem(f"{document.source}:{document.line}", message, hint=hint)])
    placed = item.with_meta(namespace=namespace)
    return Document(placed, document.warnings, document.source, document.line)
