"""The fork server: a process of its own, which outlives the agent and is found again by its socket.

It has wasmtime loaded but neither engine nor threads, so that a fork of it is a cheap and safe
start of a worker. A few workers are forked in advance (see `forkserver.py`). It ends by itself
once it has been without a child and without an agent for a while.

    python -m bacalhau.engines.wasm.zygote DIRECTORY NAME

returns once the server listens on `DIRECTORY/zygote.NAME.sock`; the server itself goes on
detached. Exit status 3: another one of that name is running.
"""

import argparse
import contextlib
import errno
import fcntl
import gc
import os
import resource
import signal
import socket
import sys
from pathlib import Path

from bacalhau.engines.wasm import protocol
from bacalhau.engines.wasm.forkserver import ForkServer

ALREADY_RUNNING = 3
SPARE_WORKERS = 2
IDLE_SECONDS = 60.0
_LOG_BYTES_MAX = 1024 * 1024


def _listen(directory: int, name: str) -> socket.socket:
    # Through the descriptor, because a socket's path has at most 108 bytes.
    path = f"/proc/self/fd/{directory}/{protocol.socket_name(name)}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(mask)
    listener.listen(16)
    return listener


def _take_lock(directory: int, name: str) -> int:
    """Held for as long as the process lives; exits if another one holds it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(f"zygote.{name}.lock", flags, 0o600, dir_fd=directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            sys.exit(ALREADY_RUNNING)
        raise
    return fd


def _detach() -> int:
    """Go on in a child with a session of its own. The parent ends well once something is written
    to the descriptor returned."""
    ready, wake = os.pipe()
    if os.fork():
        os.close(wake)
        # Nothing to read: the server ended before it was ready, and has said why on stderr.
        os._exit(0 if os.read(ready, 1) else 1)
    os.close(ready)
    os.setsid()
    return wake


def _open_log(directory: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    log = os.open("zygote.log", flags, 0o600, dir_fd=directory)
    if os.fstat(log).st_size > _LOG_BYTES_MAX:
        os.ftruncate(log, 0)
    return log


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description="Fork server of the wasm engine.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("name")
    parser.add_argument("--spare-workers", type=int, default=SPARE_WORKERS)
    parser.add_argument("--idle-seconds", type=float, default=IDLE_SECONDS)
    options = parser.parse_args()
    directory = os.open(options.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    lock = _take_lock(directory, options.name)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = _listen(directory, options.name)
    ready = _detach()
    log = _open_log(directory)
    null = os.open(os.devnull, os.O_RDONLY)
    os.write(ready, b"+")
    for fd, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(fd, target)
    for fd in (ready, null, log):
        os.close(fd)
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page it looks at
    ForkServer(listener, options.spare_workers, options.idle_seconds, lock).serve()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(protocol.socket_name(options.name), dir_fd=directory)


if __name__ == "__main__":
    main()
