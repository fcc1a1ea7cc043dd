"""A program that does nothing but what every program does: write a byte, and exit.

Compiled once by each zygote, in a child of its own, and run by each spare worker.
"""

import os

import wasmtime

from bacalhau.engines.wasm.runtime import make_engine

_PROGRAM = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\\08\\00\\00\\00\\01\\00\\00\\00.")
  (func (export "_start")
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))
    (call $exit (i32.const 0))))"""


def compiled() -> bytes:
    """The program's machine code; empty if it cannot be made. The calling process itself gets
    neither engine nor threads."""
    source, sink = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.close(source)
            with os.fdopen(sink, "wb") as file:
                file.write(wasmtime.Module(make_engine(), _PROGRAM).serialize())
        finally:
            os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as file:
        code = file.read()
    os.waitpid(pid, 0)
    return code
