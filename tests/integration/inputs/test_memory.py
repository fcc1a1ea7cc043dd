"""However large an input or a result is, the agent does not grow with it."""

import contextlib
import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.memory_probe import probe
from tests.support.s3 import S3Server

MIB = 1024 * 1024
GROWTH_MAX = 64 * MIB


def grown(kind: str, place: Path, address: str) -> int:
    """Bytes by which a process grew that moved it."""
    return probe(kind, place, address, timeout_seconds=115).grown_bytes


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    handler = functools.partial(Quiet, directory=str(directory))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_one_gibibyte_over_http(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    for name, size in (("big.bin", 1024 * MIB), ("small.bin", MIB)):
        with (tmp_path / "www" / name).open("wb") as file:
            file.truncate(size)
    (tmp_path / "place").mkdir()
    with served(tmp_path / "www") as url:
        assert grown("url", tmp_path / "place", f"{url}/big.bin") < GROWTH_MAX


def test_a_quarter_of_a_gibibyte_from_s3(tmp_path: Path, s3: S3Server) -> None:
    from boto3.s3.transfer import TransferConfig

    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(256 * MIB)
    s3.put("small.bin", b"x")
    config = TransferConfig(multipart_chunksize=64 * MIB, max_concurrency=2)
    s3.admin.upload_file(str(tmp_path / "big.bin"), "data", "big.bin", Config=config)
    (tmp_path / "place").mkdir()
    assert grown("s3", tmp_path / "place", f"{s3.url}/big.bin") < GROWTH_MAX


@pytest.mark.parametrize("kind", ["s3-out", "s3-out-plain"])
def test_results_to_s3(tmp_path: Path, s3: S3Server, kind: str) -> None:
    (tmp_path / "place" / "outputs").mkdir(parents=True)
    block = os.urandom(8 * MIB)  # so that packing does not make it small
    with (tmp_path / "place" / "outputs" / "big.bin").open("wb") as file:
        for _ in range(20):
            file.write(block)
    assert grown(kind, tmp_path / "place", s3.url) < GROWTH_MAX
