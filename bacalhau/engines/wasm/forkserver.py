"""The fork server's state and loop: who is connected, who its children are, what each gets to do.

It knows nothing of jobs beyond that: all that must last is in the files of `records.py`. How the
process comes to be is in `zygote.py`.
"""

import contextlib
import gc
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from bacalhau.engines.wasm import compiler, protocol, records, warmup, worker
from bacalhau.engines.wasm.records import End

_RETRY_SECONDS = 1.0
_UNSENT_MAX = 10_000
_CREDENTIALS = struct.Struct("3i")


class _Client:
    """An agent's connection. Packets that it has not taken yet wait here."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unsent: deque[bytes] = deque()


class _Child:
    """A worker (spare until it gets a run) or a compiler."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel
        self.pidfd = os.pidfd_open(pid)
        self.job: protocol.Message | None = None
        self.is_compiler = False
        self.has_started = False
        self.deadline: float | None = None  # of a compilation, monotonic
        self.answer: protocol.Message | None = None  # a compiler's
        self.is_overdue = False
        self.end: End | None = None  # a worker's, that it could not write down
        self.retry_at: float | None = None  # its end could not be written


class ForkServer:
    """Serves until there is nothing and nobody left to serve. `lock` is held meanwhile."""

    def __init__(
        self, listener: socket.socket, spare_workers: int, idle_seconds: float, lock: int
    ) -> None:
        self._listener = listener
        self._lock = lock
        self._warm_up = warmup.compiled() if spare_workers else b""
        self._spare_wanted = spare_workers
        self._idle_seconds = idle_seconds
        self._selector = selectors.EpollSelector()
        self._clients: dict[socket.socket, _Client] = {}
        self._children: dict[int, _Child] = {}  # by pid
        self._runs: dict[str, _Child] = {}
        self._spare: list[_Child] = []
        self._idle_since = time.monotonic()
        self._is_draining = False
        self._watch(listener, self._accept)

    def serve(self) -> None:
        """Until there is nothing and nobody left to serve."""
        while not self._is_over():
            wants_spare = len(self._spare) < self._spare_wanted and not self._is_draining
            events = self._selector.select(0 if wants_spare else self._next_deadline())
            for key, mask in events:
                callback: Callable[[int], None] = key.data
                callback(mask)
            self._check_times()
            if wants_spare and not events:
                # Only when nothing else is to be done: a burst of starts comes first.
                self._fork_spare()
        for child in [*self._spare, *self._children.values()]:
            child.channel.close()

    def _is_over(self) -> bool:
        if self._runs or any(c.is_compiler for c in self._children.values()):
            self._idle_since = time.monotonic()
            return False
        if self._is_draining:
            return True
        if self._clients:
            self._idle_since = time.monotonic()
            return False
        return time.monotonic() - self._idle_since >= self._idle_seconds

    def _next_deadline(self) -> float | None:
        times = [c.deadline for c in self._children.values() if c.deadline is not None]
        times += [c.retry_at for c in self._children.values() if c.retry_at is not None]
        if not self._clients:
            times.append(self._idle_since + self._idle_seconds)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _check_times(self) -> None:
        now = time.monotonic()
        for child in list(self._children.values()):
            if child.deadline is not None and now >= child.deadline:
                child.deadline = None
                child.is_overdue = True
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            if child.retry_at is not None and now >= child.retry_at:
                child.retry_at = None
                self._ended(child)

    # Agents

    def _accept(self, _: int) -> None:
        try:
            sock, _address = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(raw)[1] not in (os.geteuid(), 0):
            sock.close()
            return
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, protocol.SOCKET_BUFFER_BYTES)
        client = _Client(sock)
        self._clients[sock] = client
        self._watch(sock, lambda mask: self._talk(client, mask))
        self._tell(client, {"op": "hello", "pid": os.getpid()})

    def _talk(self, client: _Client, mask: int) -> None:
        if mask & selectors.EVENT_WRITE and client.sock in self._clients:
            self._flush(client)
        if not mask & selectors.EVENT_READ or client.sock not in self._clients:
            return
        try:
            data = client.sock.recv(protocol.MESSAGE_BYTES_MAX * 2)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        message = protocol.decode(data)
        match message["op"]:
            case "start":
                self._start(client, message)
            case "compile":
                self._compile(client, message)
            case "drain":
                self._is_draining = True
            case "shutdown":
                self._is_draining = True
                for child in self._children.values():
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.sock, None) is not None:
            self._selector.unregister(client.sock)
            client.sock.close()

    def _tell(self, client: _Client, message: protocol.Message) -> None:
        client.unsent.append(protocol.encode(message))
        self._flush(client)

    def _tell_all(self, message: protocol.Message) -> None:
        for client in list(self._clients.values()):
            self._tell(client, message)

    def _flush(self, client: _Client) -> None:
        try:
            while client.unsent:
                client.sock.send(client.unsent[0])
                client.unsent.popleft()
        except BlockingIOError:
            if len(client.unsent) > _UNSENT_MAX:
                self._drop(client)  # it connects again and looks at the files
                return
        except OSError:
            client.unsent.clear()  # gone, but what it said last is still to be read
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        key = self._selector.get_key(client.sock)
        if key.events != events:
            self._selector.modify(client.sock, events, key.data)

    # Children

    def _start(self, client: _Client, message: protocol.Message) -> None:
        run = message["id"]
        if run in self._runs:
            if self._runs[run].has_started:
                self._tell(client, {"op": "started", "id": run})
            return  # else the answer follows
        while True:
            try:
                child = self._spare.pop() if self._spare else self._fork_worker()
            except OSError as error:
                text = f"no process can be made for it: {error}"
                self._tell(client, {"op": "refused", "id": run, "error": text})
                return
            try:
                child.channel.send(protocol.encode(message))
                break
            except OSError:
                continue  # a spare that died; it is reaped like any other child
        child.job = message
        self._runs[run] = child

    def _compile(self, client: _Client, message: protocol.Message) -> None:
        try:
            child = self._fork(lambda channel: compiler.main(channel, message))
        except OSError as error:
            text = f"no process can be made to compile it: {error}"
            answer = {"op": "compiled", "key": message["key"], "fault": text}
            self._tell(client, answer)
            return
        child.is_compiler = True
        child.job = message
        child.deadline = time.monotonic() + message["timeout_seconds"]

    def _fork_spare(self) -> None:
        try:
            self._spare.append(self._fork_worker(self._warm_up))
        except OSError:
            self._spare_wanted = len(self._spare)  # go on without

    def _fork_worker(self, warm_up: bytes = b"") -> _Child:
        return self._fork(lambda channel: worker.main(channel, warm_up))

    def _fork(self, main: Callable[[socket.socket], NoReturn]) -> _Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with contextlib.suppress(OSError):
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, protocol.SOCKET_BUFFER_BYTES)
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            try:
                gc.disable()
                _close_all_but(theirs.fileno())
                main(theirs)
            finally:
                os._exit(70)
        theirs.close()
        child = _Child(pid, ours)
        self._children[pid] = child
        self._watch(ours, lambda _: self._hear(child))
        self._watch(child.pidfd, lambda _: self._ended(child))
        return child

    def _hear(self, child: _Child) -> None:
        if child.pid not in self._children:
            return  # reaped by an earlier event of the same round
        try:
            data = child.channel.recv(protocol.MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
        except OSError:
            data = b""
        if not data or child.job is None:
            self._selector.unregister(child.channel)  # its end comes through the pidfd
        elif child.is_compiler:
            child.answer = protocol.decode(data)
        elif data == protocol.STARTED:
            child.has_started = True
            self._tell_all({"op": "started", "id": child.job["id"]})
        elif data == protocol.ENDED:
            # The end is on disk; the process itself is about to be gone.
            self._forget_run(child)
        else:
            with contextlib.suppress(ValueError, TypeError):  # a guest may have got out of its box
                child.end = End(**protocol.decode(data))

    def _ended(self, child: _Child) -> None:
        """A child is a zombie: record what it could not, and only then let it go.

        Until it is reaped its number cannot be given out again, and it still counts as running.
        """
        if child.pid not in self._children:
            return
        try:
            status = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            status = None
        # What it said last may not have been heard yet.
        while child.channel in self._selector.get_map():
            self._hear(child)
        if child.job is not None and not child.is_compiler and child.job["id"] in self._runs:
            try:
                self._record(child, status)
            except OSError as error:
                print(f"zygote: the end of a run cannot be recorded: {error}", file=sys.stderr)
                with contextlib.suppress(KeyError):  # it is not the first try
                    self._selector.unregister(child.pidfd)
                child.retry_at = time.monotonic() + _RETRY_SECONDS
                return
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(child.pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)
        os.close(child.pidfd)
        child.channel.close()
        self._children.pop(child.pid, None)
        if child in self._spare:
            self._spare.remove(child)
        elif child.is_compiler:
            self._compiled(child, status)
        else:
            self._forget_run(child)

    def _forget_run(self, child: _Child) -> None:
        if child.job is None or self._runs.get(child.job["id"]) is not child:
            return
        run = child.job["id"]
        del self._runs[run]
        directory = Path(child.job["directory"])
        if records.read_end(directory) is None and records.read_started(directory) is None:
            text = "its worker ended before it began"
            self._tell_all({"op": "refused", "id": run, "error": text})
        else:
            if not child.has_started:
                self._tell_all({"op": "started", "id": run})
            self._tell_all({"op": "ended", "id": run})

    def _record(self, child: _Child, status: os.waitid_result | None) -> None:
        """Write the end of a run whose worker did not."""
        if child.job is None:
            return
        directory = Path(child.job["directory"])
        started = records.read_started(directory)
        if started is None or started.process.pid != child.pid:
            return  # it never began, or another worker has it
        if records.read_end(directory) is None:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                end = child.end or _abnormal_end(directory, status, child.job)
                records.write_end(directory, end)

    def _compiled(self, child: _Child, status: os.waitid_result | None) -> None:
        if child.job is None:
            return
        answer: protocol.Message = {"op": "compiled", "key": child.job["key"]}
        if child.is_overdue:
            answer["error"] = f"compiling takes longer than {child.job['timeout_seconds']:g} s"
        elif child.answer is not None:
            answer |= child.answer
        elif status is not None and status.si_status == signal.SIGXCPU:
            answer["error"] = f"compiling takes more than {child.job['cpu_seconds_max']} CPU s"
        elif status is not None and status.si_status in (signal.SIGABRT, signal.SIGSEGV):
            # The compiler aborts where it gets no memory.
            answer["error"] = "the compiler crashed, likely for want of memory"
        else:
            answer["fault"] = "the compiler was killed"
        with contextlib.suppress(OSError):
            target = Path(child.job["target"])
            target.with_name(f".{target.name}.{child.pid}").unlink(missing_ok=True)
        self._tell_all(answer)

    def _watch(self, what: socket.socket | int, callback: Callable[[int], None]) -> None:
        self._selector.register(what, selectors.EVENT_READ, callback)


def _abnormal_end(directory: Path, status: os.waitid_result | None, job: protocol.Message) -> End:
    now = time.time()
    if records.was_stopped(directory):
        return records.stopped_end(now)
    number = status.si_status if status is not None else 0
    is_exit = status is not None and status.si_code == os.CLD_EXITED
    if is_exit and number == protocol.LEASHED and job["leash"] is not None:
        return records.leashed_end(now, job["leash"]["seconds"])
    if is_exit:
        text = f"its worker ended unexpectedly with status {number}; see the zygote's log"
        return End(None, now, "EngineFault", text, is_system_fault=True)
    if number == signal.SIGALRM:
        return End(137, now, "Timeout", f"ran longer than the {job['timeout_seconds']:g} s allowed")
    if number == signal.SIGKILL:
        text = "killed from outside, by the kernel for want of memory or by somebody"
        return End(137, now, "Killed", text, is_system_fault=True)
    text = f"its worker crashed: {signal.strsignal(number) or number}"
    return End(128 + number, now, "EngineFault", text, is_system_fault=True)


def _close_all_but(fd: int) -> None:
    """In a fresh child: let go of the listener, of the agents and of its siblings' channels."""
    os.closerange(3, fd)
    os.closerange(fd + 1, 1 << 20)
