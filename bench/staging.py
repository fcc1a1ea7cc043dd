"""What it costs to bring inputs in and results out, beside the plain tools, in one run.

    python bench/staging.py [--mib N] [--rounds N]

Ways, in turn in each round; ratios are of medians:

    url / curl       urlDownload (vetted, hashed, into the cache) over curl -o, same file and server
    again / curl     the same input once more: from the cache
    archive / tar    packing outputs as the s3 publisher does over `tar -czf`
    plain / tar      reading outputs as it does over `tar -cf`

and the most memory the process had beyond what it began with.
"""

import argparse
import asyncio
import contextlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "api", "controllers")]

from bacalhau.publishers.packing import packed, tar_pieces
from bacalhau.storages.url import UrlStorage
from tests.support.inputs import LOOPBACK, USE, input_cache, item

MIB = 1024 * 1024


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    """A directory by HTTP, from a process of its own."""
    code = (
        "import functools, http.server as h\n"
        "class Q(h.SimpleHTTPRequestHandler):\n"
        "    def log_message(self, *a): pass\n"
        f"s = h.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Q, directory={str(directory)!r}))\n"
        "print(s.server_address[1], flush=True)\n"
        "s.serve_forever()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def timed(command: list[str]) -> float:
    """Seconds of a command."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


async def stage(storage: UrlStorage, place: Path, url: str) -> float:
    """Seconds of one fetch."""
    os.makedirs(place)
    began = time.perf_counter()
    await storage.fetch(item("urlDownload", url=url), place, USE)
    return time.perf_counter() - began


def drained(pieces: Iterator[bytes], target: Path) -> float:
    """Seconds to make and write a stream."""
    began = time.perf_counter()
    with target.open("wb") as file:
        for piece in pieces:
            file.write(piece)
    return time.perf_counter() - began


async def measure(size: int, rounds: int, place: Path) -> None:
    """Run all ways, print the table."""
    (place / "www").mkdir()
    words = b"".join(b"%d some words of output, %d\n" % (n, n * n) for n in range(20_000))
    with (place / "www" / "big.bin").open("wb") as file:
        while (left := size - file.tell()) > 0:
            file.write(words[:left])
    outputs = place / "outputs"
    outputs.mkdir()
    shutil.copy(place / "www" / "big.bin", outputs / "big.bin")
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: dict[str, list[float]] = {}
    with served(place / "www") as url:
        for number in range(rounds):
            target = str(place / "curl.out")
            seconds.setdefault("curl", []).append(
                timed(["curl", "-sS", "-o", target, f"{url}/big.bin"])
            )
            async with input_cache(place / f"cache{number}", bytes_max=4 * size) as cache:
                storage = UrlStorage(cache, LOOPBACK, size_bytes_max=4 * size)
                into = place / f"in{number}"
                seconds.setdefault("url", []).append(await stage(storage, into, f"{url}/big.bin"))
                seconds.setdefault("again", []).append(
                    await stage(storage, place / f"again{number}", f"{url}/big.bin")
                )
            shutil.rmtree(place / f"cache{number}")
            shutil.rmtree(into)
            shutil.rmtree(place / f"again{number}")
            out = place / "out.tar"
            seconds.setdefault("tar -czf", []).append(
                timed(["tar", "-C", str(outputs), "-czf", str(out), "."])
            )
            seconds.setdefault("archive", []).append(drained(packed(outputs), out))
            seconds.setdefault("tar -cf", []).append(
                timed(["tar", "-C", str(outputs), "-cf", str(out), "."])
            )
            seconds.setdefault("plain", []).append(drained(tar_pieces(outputs), out))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name:10} {value:8.3f} s {size / MIB / value:8.0f} MiB/s")
    for name, base in (
        ("url", "curl"), ("again", "curl"), ("archive", "tar -czf"), ("plain", "tar -cf"),
    ):  # fmt: skip
        print(f"{name} / {base}: {median[base] / median[name]:.2f} of its rate")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) / 1024
    print(f"peak memory grew by {grown:.0f} MiB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        asyncio.run(measure(options.mib * MIB, options.rounds, Path(place)))


if __name__ == "__main__":
    main()
