"""How wasmtime is set up: the same for compiling and running, or compiled modules do not fit."""

import wasmtime


def make_engine() -> wasmtime.Engine:
    """An engine with this project's settings. A change here needs a new
    `protocol.CACHE_FORMAT`."""
    config = wasmtime.Config()
    # The memory limit of a store holds for each memory by itself, so a module gets one only.
    config.wasm_multi_memory = False
    config.wasm_threads = False
    return wasmtime.Engine(config)
