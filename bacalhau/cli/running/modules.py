"""How the modules of `wasm run` get to the node.

A file of this machine travels in the job itself, packed; a URI is fetched by the node. Two
runs of one file carry the same bytes: nothing of times or owners is packed.
"""

import base64
import gzip
import io
import tarfile
from pathlib import Path
from typing import Final

from bacalhau.cli.running.sources import Wrong, file_name_of, parse_input
from bacalhau.cli.text import size
from bacalhau_api.v1.job import InputSource, SpecConfig

INLINE_BYTES_MAX: Final = 480 * 1024
"""Of a module as it stands in the job: a job has at most 512 KiB."""

FILE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Larger files are not even packed to see whether they fit."""

ENTRY_DIRECTORY: Final = "/wasm"
IMPORTS_DIRECTORY: Final = "/wasm/imports"

_MAGIC: Final = b"\0asm"
_VERSION_1: Final = b"\x01\0\0\0"


def module_source(text: str, directory: str) -> InputSource:
    """The input that brings a module, given as a local file or as a URI, to a place in
    `directory`. Raises Wrong."""
    if "://" in text:
        given = parse_input(text if "=" in text else f"src={text}")
        name = file_name_of(text.split(",")[0].removeprefix("src=")) or "module.wasm"
        return given.but(target=f"{directory}/{name}")
    path = Path(text).expanduser()
    data = _read(path)
    _check_module(data)
    return InputSource(source=inline(data, path.name), target=f"{directory}/{_safe(path.name)}")


def inline(data: bytes, name: str) -> SpecConfig:
    """A file as an inline source. Packed, it is the one file of a directory: a module may be
    named by that. Raises Wrong if it is too large for a job."""
    plain = f"data:application/wasm;base64,{base64.b64encode(data).decode()}"
    packed = f"data:application/gzip;base64,{base64.b64encode(_packed(data, name)).decode()}"
    url = min(plain, packed, key=len)
    if len(url) > INLINE_BYTES_MAX:
        most = INLINE_BYTES_MAX // 4 * 3
        raise Wrong(
            f"has {size(len(data))}, {size(len(url) // 4 * 3)} packed: too much to travel in the "
            f"job, which holds {size(most)}",
            "put it where nodes reach it, and name that: https://…, s3://BUCKET/KEY, or "
            "file:///PATH on the node (which allows it with `serve --allow-path`)",
        )
    return SpecConfig(type="inline", params={"url": url})


def _packed(data: bytes, name: str) -> bytes:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        entry = tarfile.TarInfo(_safe(name))
        entry.size, entry.mode = len(data), 0o644
        archive.addfile(entry, io.BytesIO(data))
    return gzip.compress(tar.getvalue(), mtime=0)


def _safe(name: str) -> str:
    """A file name without what paths and archives could trip over."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
    return safe.lstrip(".")[-90:] or "module.wasm"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        hint = "name a file of this machine, or where nodes find it: https://…, s3://…, file:///…"
        raise Wrong(f"cannot be read: {error.strerror or error}", hint) from error
    if len(data) > FILE_BYTES_MAX:
        raise Wrong(
            f"is larger than {size(FILE_BYTES_MAX)}", "let nodes fetch it: https://… or s3://…"
        )
    return data


def _check_module(data: bytes) -> None:
    if not data.startswith(_MAGIC):
        is_text = data.lstrip()[:7] in (b"(module", b"(compon")
        hint = "assemble it first: wat2wasm FILE" if is_text else "it begins with \\0asm"
        raise Wrong("is not a WebAssembly module", hint)
    if data[4:8] != _VERSION_1:
        hint = "build it for wasm32-wasip1 (WASI preview 1)"
        raise Wrong("is a WebAssembly component, not a module", hint)
