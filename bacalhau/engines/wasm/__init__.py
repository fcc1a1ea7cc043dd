"""The WebAssembly engine: core modules with WASI preview 1, each run in a process of its own.

    engine.py    the Engine port: what the agent calls
    modules.py   which module files a workload names, and the cache of compiled ones
    mounts.py    what of the node's disk a guest sees
    link.py      the agent's end of the socket to the fork server
    zygote.py    the fork server's process, which outlives the agent
    forkserver.py  its state and loop
    worker.py    one process per run
    compiler.py  one process per compilation
    warmup.py    what a worker runs before its run
    protocol.py  what passes between agent, zygote and worker
    records.py   the files by which a run is known

Agent-side modules may import anything; zygote, worker and compiler only the standard library and
wasmtime, so that forking them stays cheap.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bacalhau.engines.wasm.engine import WasmEngine

__all__ = ["WasmEngine"]


def __getattr__(name: str) -> object:
    # Imported on first use, because the fork server imports this package too.
    if name == "WasmEngine":
        from bacalhau.engines.wasm.engine import WasmEngine

        return WasmEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
