"""Which fsspec protocols an operator may let inputs name. Strings only: fsspec is not imported."""

import re
from typing import Final

LOCAL: Final = frozenset(
    {"file", "local", "memory", "dir", "reference", "blockcache", "filecache", "simplecache",
     "cached", "asynclocal", "async_wrapper", "zip", "tar", "libarchive", "jlab", "jupyter",
     "data", "generic", "dask", "root", "arrow_hdfs", "git", "lakefs"}
)  # fmt: skip
"""What reads the node's own disk, memory or processes, or leads to other protocols."""

BETTER: Final = {"http": "urlDownload", "https": "urlDownload", "s3": "s3", "s3a": "s3",
                 "ipfs": "ipfs"}  # fmt: skip
"""What has a source type of its own, which vets addresses or is faster."""


def check_protocol(text: str) -> str:
    """A protocol as `--allow-protocol` takes it. Raises ValueError."""
    name = text.strip().lower().removesuffix("://")
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", name):
        raise ValueError("write the name of an fsspec protocol, such as gs")
    if name in LOCAL:
        raise ValueError("it would read this node's own disk or memory")
    if name in BETTER:
        raise ValueError(f"use the source type {BETTER[name]}, which every node has")
    return name
