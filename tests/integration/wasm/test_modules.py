"""Compiling: once for all who need it, within limits, and never from a job's machine code."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import wasmtime

from bacalhau.engines.wasm import WasmEngine, protocol
from bacalhau.engines.wasm import engine as engine_module
from bacalhau.engines.wasm.engine import WasmOptions
from bacalhau.engines.wasm.link import ZygoteLink
from bacalhau.engines.wasm.modules import CompileLimits
from bacalhau.system import SystemClock
from bacalhau_api.errors import TerminalError, UnavailableError
from bacalhau_controllers.runner.guard import ENGINE_FAULT
from bacalhau_controllers.runner.ports import Mount, Observation, RunPhase, Workload
from tests.support.engines import Bench, program

MIB = 1024 * 1024


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path.resolve())


@pytest.fixture
async def engine(bench: Bench) -> AsyncIterator[WasmEngine]:
    engine = make(bench)
    await engine.open()
    yield engine
    await engine.close(keep_running=False)


def make(bench: Bench, cache_bytes_max: int = 1 << 30, **limits: float) -> WasmEngine:
    options = WasmOptions(
        cache_bytes_max=cache_bytes_max,
        compile=CompileLimits(**limits),  # type: ignore[arg-type]
    )
    return WasmEngine(bench.state, SystemClock(), options=options)


async def run(engine: WasmEngine, workload: Workload) -> Observation:
    await engine.start(workload)
    seen = await asyncio.wait_for(engine.wait(workload.id), 60)
    assert seen.phase is RunPhase.EXITED
    return seen


def cached(bench: Bench) -> list[Path]:
    return sorted((bench.state / "cache").iterdir())


def leb(value: int) -> bytes:
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def section(number: int, content: bytes) -> bytes:
    return bytes([number]) + leb(len(content)) + content


def bomb(functions: int, operations: int) -> bytes:
    """A valid module that takes long to compile: many long functions of shuffling arithmetic."""
    # local.get 0, local.get 0, i64.mul, local.get 0, i64.rotl, local.set 0
    body = bytes.fromhex("20 00 20 00 7e 20 00 89 21 00") * operations
    code = leb(0) + body + b"\x0b"
    return (
        b"\0asm\x01\0\0\0"
        + section(1, leb(2) + b"\x60\x01\x7e\x00" + b"\x60\x00\x00")
        + section(3, leb(functions + 1) + b"\0" * functions + b"\x01")
        + section(7, leb(1) + b"\x06_start\x00" + leb(functions))
        + section(10, leb(functions + 1) + (leb(len(code)) + code) * functions + b"\x02\x00\x0b")
    )


def write(bench: Bench, data: bytes, name: str = "made.wasm") -> Path:
    path = bench.root / name
    path.write_bytes(data)
    return path


async def test_module_is_compiled_once_for_all(engine: WasmEngine, bench: Bench) -> None:
    copies = [write(bench, program("hello").read_bytes(), f"copy{n}.wasm") for n in range(8)]
    seen = await asyncio.gather(*(run(engine, bench.wasm(path)) for path in copies))
    assert [s.exit_code for s in seen] == [0] * 8
    (entry,) = cached(bench)
    inode, changed = entry.stat().st_ino, entry.stat().st_mtime_ns
    await run(engine, bench.wasm("hello"))
    assert [p.stat().st_ino for p in cached(bench)] == [inode]
    assert entry.stat().st_mtime_ns > changed  # marked as used


async def test_cache_outlives_the_engine(engine: WasmEngine, bench: Bench) -> None:
    await run(engine, bench.wasm("hello"))
    before = [p.stat().st_ino for p in cached(bench)]
    await engine.close(keep_running=False)
    await engine.open()
    assert (await run(engine, bench.wasm("hello"))).exit_code == 0
    assert [p.stat().st_ino for p in cached(bench)] == before


async def test_changed_module_under_the_same_name_is_noticed(
    engine: WasmEngine, bench: Bench
) -> None:
    path = write(bench, program("hello").read_bytes())
    old = path.stat()
    workload = bench.wasm(path)
    await run(engine, workload)
    # As a hostile writer would: same length where possible, same modification time.
    path.write_bytes(wasmtime.wat2wasm('(module (func (export "_start") unreachable))'))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (await run(engine, bench.wasm(path))).reason == "Trap"


async def test_compilation_has_a_time_limit_and_hurts_nobody_else(bench: Bench) -> None:
    unhurried = make(bench)
    await unhurried.open()
    await run(unhurried, bench.wasm("hello"))  # in the cache before
    await unhurried.close(keep_running=False)
    engine = make(bench, seconds_max=0.3)
    await engine.open()
    try:
        # Functions are compiled in parallel: large ones, so that no number of cores makes it quick.
        path = write(bench, bomb(6, 700_000))
        workload = bench.wasm(path)
        bombing = asyncio.create_task(engine.start(workload))
        others = [await run(engine, bench.wasm("hello")) for _ in range(3)]
        assert [o.exit_code for o in others] == [0, 0, 0]
        with pytest.raises(TerminalError, match=r"takes longer than 0.3 s|CPU s") as caught:
            await bombing
        assert caught.value.reason == "CompileFailed"
        assert (await engine.observe(workload.id)).phase is RunPhase.ABSENT
        # Another try does not burn the time again: it gets the very same answer.
        with pytest.raises(TerminalError) as again:
            await engine.start(bench.wasm(path))
        assert again.value is caught.value
        assert len(cached(bench)) == 1
    finally:
        await engine.close(keep_running=False)


async def test_compilation_has_a_memory_limit(bench: Bench) -> None:
    engine = make(bench, memory_bytes_max=256 * MIB)
    await engine.open()
    try:
        with pytest.raises(TerminalError, match="memory") as caught:
            await engine.start(bench.wasm(write(bench, bomb(2, 400_000))))
        assert caught.value.reason == "CompileFailed"
        assert (await run(engine, bench.wasm("hello"))).exit_code == 0
    finally:
        await engine.close(keep_running=False)


async def test_cancelled_start_leaves_the_compilation_to_others(
    engine: WasmEngine, bench: Bench
) -> None:
    path = write(bench, bomb(2, 400_000))
    first = asyncio.create_task(engine.start(bench.wasm(path)))
    second_workload = bench.wasm(path)
    second = asyncio.create_task(engine.start(second_workload))
    await asyncio.sleep(0.05)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert (await asyncio.wait_for(engine.wait(second_workload.id), 60)).exit_code == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"", "not a WebAssembly module", id="empty"),
        pytest.param(b"(module)", "not a WebAssembly module", id="text"),
        pytest.param(b"\x7fELF" + bytes(100), "not a WebAssembly module", id="elf"),
        pytest.param(b"\0asm\x0d\0\x01\0", "component", id="component"),
        pytest.param(b"\0asm\x01\0\0\0\x01\xff", "cannot be compiled", id="cut off"),
    ],
)
async def test_what_is_not_a_module(
    engine: WasmEngine, bench: Bench, data: bytes, words: str
) -> None:
    with pytest.raises(TerminalError, match=words) as caught:
        await engine.start(bench.wasm(write(bench, data)))
    assert caught.value.reason == "CompileFailed"
    assert cached(bench) == []


async def test_compiled_code_is_not_accepted_from_a_job(engine: WasmEngine, bench: Bench) -> None:
    await run(engine, bench.wasm("hello"))
    (entry,) = cached(bench)
    with pytest.raises(TerminalError, match="not a WebAssembly module"):
        await engine.start(bench.wasm(write(bench, entry.read_bytes(), "job.cwasm")))


async def test_module_size_limit(bench: Bench) -> None:
    engine = make(bench, module_bytes_max=1000)
    await engine.open()
    try:
        with pytest.raises(TerminalError, match="more than the 1000 allowed") as caught:
            await engine.start(bench.wasm("hello"))
        assert caught.value.reason == "CompileFailed"
    finally:
        await engine.close(keep_running=False)


async def test_several_memories_are_refused(engine: WasmEngine, bench: Bench) -> None:
    """Each would have the limit to itself."""
    data = bytes.fromhex("0061736d01000000 0505 02 00 01 00 01")
    with pytest.raises(TerminalError, match="multiple memories"):
        await engine.start(bench.wasm(write(bench, data)))


async def test_least_recently_used_modules_are_dropped(bench: Bench) -> None:
    engine = make(bench, cache_bytes_max=1)
    await engine.open()
    try:
        looping = bench.wasm("loop")
        await engine.start(looping)
        assert (await run(engine, bench.wasm("hello"))).exit_code == 0
        assert len(cached(bench)) == 1
        assert (await engine.observe(looping.id)).phase is RunPhase.RUNNING
        assert (await run(engine, bench.wasm("burn", "1"))).exit_code == 0
        assert len(cached(bench)) == 1
    finally:
        await engine.close(keep_running=False)


async def test_spoilt_cache_entry_is_made_again(engine: WasmEngine, bench: Bench) -> None:
    await run(engine, bench.wasm("hello"))
    (entry,) = cached(bench)
    entry.write_bytes(b"spoilt")
    seen = await run(engine, bench.wasm("hello"))
    assert (seen.reason, seen.is_system_fault) == ("StartFailed", True)
    assert (await run(engine, bench.wasm("hello"))).exit_code == 0


async def test_cache_that_others_may_write_to_is_refused(bench: Bench) -> None:
    (bench.state / "cache").mkdir(parents=True, mode=0o777)
    (bench.state / "cache").chmod(0o777)
    engine = make(bench)
    with pytest.raises(TerminalError, match="must belong to this user alone"):
        await engine.open()


# Where a module is


async def test_module_below_a_mounted_directory(engine: WasmEngine, bench: Bench) -> None:
    (bench.root / "app" / "bin").mkdir(parents=True)
    (bench.root / "app" / "bin" / "main.wasm").write_bytes(program("hello").read_bytes())
    workload = bench.workload(
        {"entryModule": "/app/bin/main.wasm"}, mounts=[Mount(bench.root / "app", "/app")]
    )
    assert (await run(engine, workload)).exit_code == 0


async def test_directory_with_one_module_stands_for_it(engine: WasmEngine, bench: Bench) -> None:
    (bench.root / "unpacked").mkdir()
    (bench.root / "unpacked" / "main.wasm").write_bytes(program("hello").read_bytes())
    (bench.root / "unpacked" / "README").write_text("read me")
    mounts = [Mount(bench.root / "unpacked", "/wasm/entry.wasm")]
    workload = bench.workload({"entryModule": "/wasm/entry.wasm"}, mounts=mounts)
    assert (await run(engine, workload)).exit_code == 0
    (bench.root / "unpacked" / "second.wasm").write_bytes(b"")
    with pytest.raises(TerminalError, match="2 files that could be the module"):
        await engine.start(bench.workload({"entryModule": "/wasm/entry.wasm"}, mounts=mounts))


@pytest.mark.parametrize("name", ["/app/link.wasm", "/app/out/hello.wasm", "/app/../app/x", "app"])
async def test_module_paths_cannot_lead_out(engine: WasmEngine, bench: Bench, name: str) -> None:
    (bench.root / "app").mkdir()
    (bench.root / "app" / "link.wasm").symlink_to(program("hello"))
    (bench.root / "app" / "out").symlink_to(program("hello").parent)
    workload = bench.workload({"entryModule": name}, mounts=[Mount(bench.root / "app", "/app")])
    with pytest.raises(TerminalError) as caught:
        await engine.start(workload)
    assert caught.value.reason == "StartFailed"


async def test_a_long_compilation_is_no_fault_of_the_engine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is given up before it counts as one that hangs; the compilation goes on."""
    compile_now, through = ZygoteLink.compile, asyncio.Event()

    async def slowly(link: ZygoteLink, message: protocol.Compile) -> None:
        await through.wait()
        await compile_now(link, message)

    monkeypatch.setattr(ZygoteLink, "compile", slowly)
    engine, workload = make(bench), bench.wasm("hello")
    await engine.open()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "_COMPILE_SECONDS_MAX", 0.2)
            for _ in range(2):
                with pytest.raises(UnavailableError, match="still being compiled") as caught:
                    await engine.start(workload)
                assert caught.value.reason != ENGINE_FAULT
        through.set()
        assert (await run(engine, workload)).exit_code == 0
        assert len(cached(bench)) == 1
    finally:
        await engine.close(keep_running=False)
