"""How wasmtime is set up: the same for compiling and running, or compiled modules do not fit."""

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import wasmtime

CACHE_FORMAT = 1


def make_engine() -> wasmtime.Engine:
    """An engine with this project's settings. A change here needs a new CACHE_FORMAT."""
    config = wasmtime.Config()
    # The memory limit of a store holds for each memory by itself, so a module gets one only.
    config.wasm_multi_memory = False
    config.wasm_threads = False
    return wasmtime.Engine(config)


@cache
def cache_flavour() -> str:
    """Identifies what compiled code depends on beside the module: 16 hex digits."""
    cpu = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            cpu = line
            break
    known = f"{CACHE_FORMAT}\0{metadata.version('wasmtime')}\0{platform.machine()}\0{cpu}"
    return hashlib.sha256(known.encode()).hexdigest()[:16]
