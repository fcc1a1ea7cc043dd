"""DuckDB's command line for tests, and a Docker image of it: the program of the package `duckdb-cli`
with the machine's own libraries that it needs, beside busybox."""

import csv
import importlib.util
import re
import subprocess
from pathlib import Path

from tests.support.dockerd import busybox_image

_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


def program() -> Path:
    """The executable."""
    found = importlib.util.find_spec("duckdb_cli")
    assert found is not None, "this test needs: pip install duckdb-cli"
    assert found.origin is not None
    return Path(found.origin).parent / "duckdb"


def image(tag: str) -> bytes:
    """A `docker load` archive."""
    listed = subprocess.run(["ldd", program()], check=True, capture_output=True, text=True).stdout
    files = {path.lstrip("/"): Path(path).read_bytes() for path in _LIBRARY.findall(listed)}
    files["bin/duckdb"] = program().read_bytes()
    return busybox_image(tag, files=files)


def query(sql: str) -> list[dict[str, str]]:
    """What a query answers, in text."""
    done = subprocess.run(
        [program(), "-csv", "-c", sql], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(done.stdout.splitlines()))
