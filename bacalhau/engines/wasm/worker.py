"""One process, one run: loads a compiled module, gives the guest what was granted, records the end.

It is forked from the zygote in advance, sets itself up, and waits for its `Start` message. All
ends that it can see it records itself: the guest's own, traps, the time limit, the output limit.
So they are known even if agent and zygote are both gone. A crash of this process or a kill is
recorded by the zygote.
"""

import contextlib
import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import wasmtime

from bacalhau.engines.leash import Watch
from bacalhau.engines.logwriter import LogWriter, OutputLimitError, Stream
from bacalhau.engines.processes import ProcessId
from bacalhau.engines.wasm import protocol, records
from bacalhau.engines.wasm.records import End
from bacalhau.engines.wasm.runtime import make_engine
from bacalhau.flush import flush_tree

OVERHEAD_BYTES = 256 * 1024 * 1024  # of private memory beside the guest's own
OPEN_FILES_MAX = 1024
PIPE_BYTES = 256 * 1024

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_DRAIN_SECONDS_MAX = 30.0
_RETRY_SECONDS = 1.0
_LEASH_LOOK_SECONDS = 0.5
_LEASH_INSIST_SECONDS = 5.0
_NICE = 5  # below the node's own services


class StartError(Exception):
    """The run cannot begin; says why, for users."""

    def __init__(self, message: str, *, is_system_fault: bool = False) -> None:
        super().__init__(message)
        self.is_system_fault = is_system_fault


class MemoryNeededError(Exception):
    """The memory limit is below what the module begins with."""


def main(channel: socket.socket, warm_up: bytes = b"") -> NoReturn:
    """Wait on the channel for a job and do it. Never returns: the process ends here.

    `warm_up` is compiled code to run beforehand, by those who have the time."""
    code = 70
    try:
        # A session of its own: nothing that is sent to the agent's terminal or group arrives here.
        os.setsid()
        engine = make_engine()
        linker = _make_linker(engine)
        if warm_up:
            _warm_up(engine, linker, warm_up)
        data = channel.recv(protocol.MESSAGE_BYTES_MAX * 2)
        if not data:  # the zygote is gone
            os._exit(0)
        _Run(protocol.decode(data), channel, engine, linker).execute()
    except BaseException as error:  # noqa: BLE001 the process ends here: it must say why
        print(f"worker {os.getpid()}: {error!r}", file=sys.stderr, flush=True)
    os._exit(code)


class _ExitError(Exception):
    """The guest called exit."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _make_linker(engine: wasmtime.Engine) -> wasmtime.Linker:
    """WASI, with an exit that takes every code; wasmtime's own refuses those above 125."""
    linker = wasmtime.Linker(engine)
    linker.define_wasi()

    def proc_exit(code: int) -> None:
        raise _ExitError(code & 0xFFFFFFFF)

    linker.allow_shadowing = True
    kind = wasmtime.FuncType([wasmtime.ValType.i32()], [])
    linker.define_func("wasi_snapshot_preview1", "proc_exit", kind, proc_exit)
    linker.allow_shadowing = False
    return linker


def _warm_up(engine: wasmtime.Engine, linker: wasmtime.Linker, code: bytes) -> None:
    """Run a tiny program (see `warmup.py`), so that what any first run costs (threads of the I/O
    runtime, pages of memory that this process has to itself) is paid before a job arrives."""
    out = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        store = wasmtime.Store(engine)
        config = wasmtime.WasiConfig()
        config.inherit_stdout()
        store.set_wasi(config)
        start = linker.instantiate(store, wasmtime.Module.deserialize(engine, code))
        function = start.exports(store)["_start"]
        if isinstance(function, wasmtime.Func):
            with contextlib.suppress(_ExitError):
                function(store)
    finally:
        os.dup2(out, 1)
        os.close(out)
        os.close(null)


class _Run:
    """The life of one run. Any of three threads may come to its end; the first one records it."""

    def __init__(
        self,
        message: protocol.Message,
        channel: socket.socket,
        engine: wasmtime.Engine,
        linker: wasmtime.Linker,
    ) -> None:
        self._job = message
        self._channel = channel
        self._engine = engine
        self._linker = linker
        self._directory = Path(message["directory"])
        self._ending = threading.Lock()
        self._is_over = False  # the guest runs no more
        self._writer: LogWriter
        self._reader: threading.Thread
        self._null = -1
        self._exports: Mapping[str, object] = {}

    def execute(self) -> NoReturn:
        """Claim the run, do it, record its end."""
        me = ProcessId.of(os.getpid())
        if me is None:
            raise RuntimeError("no /proc")
        started = records.Started(me, zygote=os.getppid(), time=time.time())
        if not records.write_started(self._directory, started):
            os._exit(0)  # another worker has it
        if records.read_end(self._directory) is not None:
            os._exit(0)  # it was stopped before; whoever did that looked for a process until now
        self._send(protocol.STARTED)
        try:
            self._confine()
            self._writer = LogWriter(
                Path(self._job["stdout"]),
                Path(self._job["stderr"]),
                Path(self._job["log_index"]),
                bytes_max=self._job["output_bytes_max"],
            )
            end = self._guest()
        except MemoryNeededError as error:
            end = _ended(137, "OutOfMemory", str(error))
        except StartError as error:
            end = _ended(None, "StartFailed", str(error), is_fault=error.is_system_fault)
        except OSError as error:
            end = _ended(None, "StartFailed", f"the node cannot start it: {error}", is_fault=True)
        except Exception as error:  # noqa: BLE001 whatever it is, it ends the run
            end = _ended(None, "EngineFault", f"unexpected {error!r}", is_fault=True)
        self._is_over = True
        with contextlib.suppress(OSError):
            (self._directory / records.OVER).touch()
        self._finish(end)

    def _confine(self) -> None:
        """Take away what the process does not need, in case the guest gets out of its box."""
        os.umask(0o022)
        os.nice(_NICE)
        os.chdir(self._directory)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _lower(resource.RLIMIT_NOFILE, OPEN_FILES_MAX)
        _lower(resource.RLIMIT_DATA, self._job["memory_bytes_max"] + OVERHEAD_BYTES)
        if self._job["file_bytes_max"]:
            _lower(resource.RLIMIT_FSIZE, self._job["file_bytes_max"])
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)

    def _guest(self) -> End:
        # Closed in any case: what the guest left open may be all that this process may have.
        with contextlib.closing(wasmtime.Store(self._engine)) as store:
            return self._run_in(store)

    def _run_in(self, store: wasmtime.Store) -> End:
        store.set_limits(memory_size=self._job["memory_bytes_max"], table_elements=10_000_000)
        config = wasmtime.WasiConfig()
        config.argv = [self._job["module"]["name"], *self._job["argv"]]
        config.env = self._job["env"].items()
        config.inherit_stdout()
        config.inherit_stderr()
        for preopen in self._job["preopens"]:
            _preopen(config, preopen)
        store.set_wasi(config)
        self._capture_output()
        self._watch_time()
        self._watch_contact()
        try:
            return self._call(store, self._link(store))
        except _ExitError as error:
            # As a shell would see it, except that no failure becomes a success.
            code = error.code
            return _ended(code if code <= 255 else code & 255 or 1)
        except wasmtime.Trap as error:
            end = _ended(134, "Trap", error.message)
        except wasmtime.WasmtimeError as error:
            end = _ended(134, "Trap", str(error))
        return self._blamed_on_memory(store, end)

    def _link(self, store: wasmtime.Store) -> wasmtime.Instance:
        for item in self._job["imports"]:
            module = self._load(item)
            self._check_imports(store, module, f"import module {item['name']}")
            name = item["name"].removesuffix(".wasm")
            with self._starting(f"import module {item['name']} cannot be linked"):
                self._linker.define_module(store, name, module)
        module = self._load(self._job["module"])
        self._check_imports(store, module, "module")
        with self._starting("the module cannot be instantiated"):
            return self._linker.instantiate(store, module)

    @contextlib.contextmanager
    def _starting(self, what: str) -> Iterator[None]:
        """Tell a module that does not fit from one whose start function ended or trapped."""
        try:
            yield
        except wasmtime.Trap:
            raise
        except wasmtime.WasmtimeError as error:
            if "memory limits" not in str(error) and "memory minimum size" not in str(error):
                raise StartError(f"{what}: {error}") from error
            limit = self._job["memory_bytes_max"]
            raise MemoryNeededError(f"needs more than {limit} bytes to start: {error}") from error

    def _call(self, store: wasmtime.Store, instance: wasmtime.Instance) -> End:
        exports = instance.exports(store)
        entrypoint = self._job["entrypoint"]
        function = exports.get(entrypoint)
        if not isinstance(function, wasmtime.Func):
            names = [e for e in exports if isinstance(exports[e], wasmtime.Func)]
            known = ", ".join(sorted(map(str, names))[:20]) or "none"
            raise StartError(
                f"the module exports no function {entrypoint}; exported functions: {known}"
            )
        kind = function.type(store)
        if kind.params or kind.results:
            raise StartError(f"function {entrypoint} must take no parameters and return nothing")
        initialize = exports.get("_initialize")
        self._exports = exports
        if entrypoint != "_start" and isinstance(initialize, wasmtime.Func):
            initialize(store)
        function(store)
        return _ended(0)

    def _blamed_on_memory(self, store: wasmtime.Store, end: End) -> End:
        """A refused growth of memory is not reported as such. A program that traps with its
        memory (almost) at the limit did so because an allocation failed."""
        sizes = [
            m.data_len(store) for m in self._exports.values() if isinstance(m, wasmtime.Memory)
        ]
        size, limit = max(sizes, default=0), self._job["memory_bytes_max"]
        if not size or limit - size >= max(limit // 8, 2 * 1024 * 1024):
            return end
        message = f"trapped with {size} of {limit} bytes of memory in use: {end.message}"
        return _ended(137, "OutOfMemory", message)

    def _load(self, code: protocol.Code) -> wasmtime.Module:
        try:
            return wasmtime.Module.deserialize_file(self._engine, code["path"])
        except wasmtime.WasmtimeError as error:
            with contextlib.suppress(OSError):
                os.unlink(code["cached"])  # the next run has it compiled anew
            raise StartError(
                f"the compiled module cannot be loaded: {error}", is_system_fault=True
            ) from error

    def _check_imports(self, store: wasmtime.Store, module: wasmtime.Module, what: str) -> None:
        for item in module.imports:
            name = item.name or ""
            try:
                self._linker.get(store, item.module, name)
            except wasmtime.WasmtimeError as error:
                raise StartError(
                    f"the {what} imports {item.module}.{name}, which neither WASI preview 1 nor "
                    "an import module provides; add the module to importModules"
                ) from error

    def _capture_output(self) -> None:
        """Lead file descriptors 1 and 2 through a thread into the log.

        The guest's calls run without Python's lock, so the thread works beside it.
        """
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        pipes: dict[int, Stream] = {}
        streams: tuple[tuple[int, Stream], ...] = ((1, "stdout"), (2, "stderr"))
        for number, stream in streams:
            source, sink = os.pipe2(os.O_CLOEXEC)
            with contextlib.suppress(OSError):
                fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            os.dup2(sink, number)
            os.close(sink)
            pipes[source] = stream
        threading.stack_size(512 * 1024)
        self._reader = threading.Thread(target=self._copy, args=(pipes,), daemon=True)
        self._reader.start()

    def _copy(self, pipes: dict[int, Stream]) -> None:
        poll = select.poll()
        for fd in pipes:
            poll.register(fd, select.POLLIN)
        try:
            while pipes:
                for fd, _ in poll.poll():
                    data = os.read(fd, PIPE_BYTES)
                    if data:
                        self._writer.write(pipes[fd], data)
                    else:
                        poll.unregister(fd)
                        del pipes[fd]
        except OutputLimitError as error:
            self._finish(_ended(137, "OutputLimit", str(error)))
        except OSError as error:
            message = f"its output cannot be written: {error}"
            self._finish(_ended(137, "EngineFault", message, is_fault=True))

    def _watch_time(self) -> None:
        seconds = self._job["timeout_seconds"]
        if seconds is None:
            return

        def expire() -> None:
            time.sleep(seconds)
            self._finish(_ended(137, "Timeout", f"ran longer than the {seconds:g} s allowed"))

        threading.Thread(target=expire, daemon=True).start()
        # Should the thread be held up, the kernel ends the process a little later.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds * 1.05 + 1.0)

    def _watch_contact(self) -> None:
        """End the guest when its node was cut off for too long, whether or not an agent lives."""
        leash = self._job["leash"]
        if leash is None:
            return
        watch = Watch(
            Path(leash["noted"]),
            boot=leash["boot"],
            contact=leash["contact"],
            seconds=leash["seconds"],
        )

        def hold() -> None:
            # In short steps: a sleep does not count the time for which the machine is suspended.
            while (left := watch.seconds_left()) > 0:
                time.sleep(min(left, _LEASH_LOOK_SECONDS))
            if self._is_over:
                return
            threading.Thread(target=insist, daemon=True).start()
            self._finish(records.leashed_end(time.time(), leash["seconds"]))

        def insist() -> None:
            # The guest must end, even if that cannot be recorded.
            time.sleep(_LEASH_INSIST_SECONDS)
            if not self._is_over:
                os._exit(protocol.LEASHED)

        threading.Thread(target=hold, daemon=True).start()

    def _finish(self, end: End) -> NoReturn:
        """Record the end and leave. A second thread that gets here waits for the exit."""
        self._ending.acquire()
        signal.setitimer(signal.ITIMER_REAL, 0)
        reader = getattr(self, "_reader", None)
        if reader is not None and reader is not threading.current_thread():
            os.dup2(self._null, 1)
            os.dup2(self._null, 2)
            self._ending.release()
            reader.join(_DRAIN_SECONDS_MAX)  # it may itself find that the output is too long
            self._ending.acquire()
        self._record(self._with_synced_output(end))
        self._send(protocol.ENDED)
        os._exit(0)

    def _with_synced_output(self, end: End) -> End:
        """The end, once the log and what the guest wrote are on disk too: a record that outlives a
        power failure must not speak for files that do not."""
        writer = getattr(self, "_writer", None)
        try:
            if writer is not None:
                writer.sync()
            if self._is_over:  # others end the guest by leaving, and that has to be soon
                self._sync_results()
        except OSError as error:
            return _ended(137, "EngineFault", f"its output was lost: {error}", is_fault=True)
        return end

    def _sync_results(self) -> None:
        """Flush what counts as the result. What the guest shares with others is not ours."""
        outputs = Path(self._job["stdout"]).parent
        for preopen in self._job["preopens"]:
            host = Path(preopen["host"])
            if preopen["writable"] and host.is_relative_to(outputs):
                flush_tree(host)

    def _record(self, end: End) -> None:
        while True:
            try:
                records.write_end(self._directory, end)
                return
            except FileNotFoundError:
                return  # the run's directory was deleted: nobody wants to know
            except OSError:
                # A full disk, or a guest that has all files open. It is not to go on meanwhile.
                if not self._is_over and self._send(protocol.encode(asdict(end))):
                    os._exit(0)
                # What this process knows is known to nobody else, so it stays.
                time.sleep(_RETRY_SECONDS)

    def _send(self, what: bytes) -> bool:
        """Tell the zygote. False if it is gone."""
        try:
            self._channel.send(what)
        except OSError:
            return False
        return True


def _ended(
    exit_code: int | None, reason: str = "", message: str = "", *, is_fault: bool = False
) -> End:
    return End(exit_code, time.time(), reason, records.printable(message), is_fault)


def _preopen(config: wasmtime.WasiConfig, preopen: protocol.Preopen) -> None:
    """Grant one directory, and be sure that it is the one that was checked.

    The path was free of symbolic links when it was vetted. It is opened once, the kernel is asked
    what was opened, and that descriptor is what the guest gets.
    """
    host = preopen["host"]
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(host, flags)
    except OSError as error:
        raise StartError(
            f"the source of {preopen['guest']} cannot be opened: {error.strerror}: {host}",
            is_system_fault=True,
        ) from error
    try:
        found = os.readlink(f"/proc/self/fd/{fd}")
        if found != host:
            raise StartError(
                f"the source of {preopen['guest']} is {host}, but that leads to {found}; "
                "a mount may not go through a symbolic link"
            )
        config.preopen_dir(f"/proc/self/fd/{fd}", preopen["guest"], preopen["writable"])
    except wasmtime.WasmtimeError as error:
        raise StartError(f"{preopen['guest']} cannot be granted: {error}") from error
    finally:
        os.close(fd)


def _lower(what: int, value: int) -> None:
    """Set a limit, unless a lower one holds already."""
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))
