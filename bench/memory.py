"""How much memory it takes to move very large things, whatever their size.

    python -m bench.memory [--mib N] [--ways url,s3,s3-out,s3-out-plain,local-out] [--directory DIR]

Moves one file of N MiB (10,240 by default) through each input and publisher, each in a process of its
own against a real server, and prints by how much that process grew beyond moving something small.
Needs three times the size on disk. Fails if any grew by more than 64 MiB.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "api", "controllers")]

from bench.staging import served
from tests.support.memory_probe import WORK, probe
from tests.support.s3 import s3_server

MIB = 1024 * 1024
GROWTH_MIB_MAX = 64
BLOCK_BYTES = 8 * MIB
"""Of noise, again and again: farther apart than gzip looks, so that packing makes it no smaller."""


def make_file(path: Path, size: int) -> None:
    """A file that cannot be compressed."""
    block = os.urandom(BLOCK_BYTES)
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            file.write(block[:left])


@contextmanager
def stage(way: str, big: Path, place: Path) -> Iterator[str]:
    """What one way needs; gives the address that it moves from or to."""
    if way == "local-out":
        yield ""
    elif way == "url":
        (place / "www").mkdir()
        os.link(big, place / "www" / "big.bin")
        make_file(place / "www" / "small.bin", MIB)
        with served(place / "www") as url:
            yield f"{url}/big.bin"
    else:
        with s3_server(place / "s3") as s3:
            if way == "s3":
                from boto3.s3.transfer import TransferConfig

                s3.put("small.bin", b"x")
                config = TransferConfig(multipart_chunksize=64 * MIB, max_concurrency=2)
                s3.admin.upload_file(str(big), "data", "big.bin", Config=config)
            yield f"{s3.url}/big.bin" if way == "s3" else s3.url


def measure(way: str, big: Path, root: Path) -> float:
    """Move the file one way, print what it took; MiB by which the process grew."""
    place = root / way
    (place / "work" / "outputs").mkdir(parents=True)
    if way.endswith(("-out", "-plain")):
        os.link(big, place / "work" / "outputs" / "big.bin")
    try:
        with stage(way, big, place) as address:
            found = probe(way, place / "work", address)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    grown, size = found.grown_bytes / MIB, big.stat().st_size / MIB
    print(
        f"{way:13} {size:8.0f} MiB {found.seconds:8.1f} s {size / found.seconds:8.0f} MiB/s"
        f"   grew by {grown:5.1f} MiB",
        flush=True,
    )
    return grown


def main() -> int:
    """Command line; the exit code is 1 if anything grew too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=10 * 1024)
    parser.add_argument("--ways", default=",".join(WORK))
    parser.add_argument("--directory", type=Path, default=None, help="where there is room")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        root = Path(directory)
        free = shutil.disk_usage(root).free
        if free < 3.2 * options.mib * MIB:
            sys.exit(f"{root} has {free // MIB} MiB free; {options.mib} MiB need three times that")
        big = root / "big.bin"
        make_file(big, options.mib * MIB)
        worst = max(measure(way, big, root) for way in options.ways.split(","))
    print(f"the most was {worst:.1f} MiB, of {GROWTH_MIB_MAX} that are allowed")
    return int(worst > GROWTH_MIB_MAX)


if __name__ == "__main__":
    sys.exit(main())
