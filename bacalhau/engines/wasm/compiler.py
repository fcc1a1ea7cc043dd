"""One process, one compilation, under limits: a module that is a bomb costs its own job only.

Forked from the zygote. The module is read once, its digest compared, and what was read is
compiled, so that a file that changes meanwhile cannot put wrong code under a digest.
"""

import hashlib
import os
import resource
import socket
from pathlib import Path
from typing import NoReturn

import wasmtime

from bacalhau.engines.wasm import protocol, records
from bacalhau.engines.wasm.runtime import make_engine

_CORE_HEADER = b"\0asm\x01\0\0\0"
_COMPONENT_HEADER = b"\0asm\x0d\0\x01\0"
_NICE = 5


class CompileError(Exception):
    """The module cannot be compiled; says why, for users."""


class ChangedError(Exception):
    """The file is not the one that was asked for."""


def main(channel: socket.socket, message: protocol.Message) -> NoReturn:
    """Compile, answer, and end the process.

    The answer has `error`, what is wrong with the module, or `fault`, what is wrong here; neither
    if it went well.
    """
    answer: protocol.Message
    try:
        os.setsid()
        os.nice(_NICE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        seconds = message["cpu_seconds_max"]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        limit = message["memory_bytes_max"]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        _compile(Path(message["source"]), message["digest"], Path(message["target"]))
        answer = {}
    except CompileError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "compiling it takes more memory than allowed"}
    except ChangedError:
        answer = {"fault": "the module file changed while it was read"}
    except OSError as error:
        answer = {"fault": f"{error.strerror}: {error.filename}"}
    except BaseException as error:  # noqa: BLE001 the process ends here: it must say why
        answer = {"fault": f"unexpected {error!r}"}
    channel.send(protocol.encode(answer))
    os._exit(0)


def _compile(source: Path, digest: str, target: Path) -> None:
    data = source.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ChangedError
    if data.startswith(_COMPONENT_HEADER):
        raise CompileError(
            "it is a component; this engine runs core modules with WASI preview 1 "
            "(build for wasm32-wasip1)"
        )
    if not data.startswith(_CORE_HEADER):
        raise CompileError("it is not a WebAssembly module (binary format, version 1)")
    try:
        code = wasmtime.Module(make_engine(), data).serialize()
    except wasmtime.WasmtimeError as error:
        raise CompileError(records.printable(str(error))) from error
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(code)
            file.flush()
            # After a power cut a name must not lead to half of the code.
            os.fsync(file.fileno())
        os.rename(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
