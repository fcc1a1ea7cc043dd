"""What a guest can do and see, and how its ends are told apart. Real modules, real processes."""

import asyncio
import contextlib
import dataclasses
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import wasmtime

from bacalhau.engines.logfile import LogReader
from bacalhau.engines.wasm import WasmEngine
from bacalhau.system import SystemClock
from bacalhau_api.errors import TerminalError
from bacalhau_api.v1.job import Network, NetworkType, Resources
from bacalhau_controllers.runner.ports import Mount, Observation, RunPhase, Workload
from tests.support.engines import Bench

MIB = 1024 * 1024


GREEDY = """
(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write"
    (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "x")
  (data (i32.const 8) "\\00\\10\\00\\00\\00\\10\\00\\00")
  (func $write (result i32)
    (call $fd_write (i32.const 1) (i32.const 8) (i32.const 1) (i32.const 16)))
  (func (export "_start")
    (loop $again
      (br_if $again
        (i32.eqz
          (call $open (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 1)
            (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 16)))))
    THEN))
"""
"""Opens a new file again and again until that fails."""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path.resolve())


@pytest.fixture
async def engine(bench: Bench) -> AsyncIterator[WasmEngine]:
    engine = WasmEngine(bench.state, SystemClock())
    await engine.open()
    yield engine
    await engine.close(keep_running=False)


async def run(engine: WasmEngine, workload: Workload) -> Observation:
    await engine.start(workload)
    seen = await asyncio.wait_for(engine.wait(workload.id), 60)
    assert seen.phase is RunPhase.EXITED
    return seen


def wat(bench: Bench, text: str, name: str = "made.wasm") -> Path:
    path = bench.root / name
    path.write_bytes(wasmtime.wat2wasm(text))
    return path


# Arguments, environment, output


async def test_arguments_environment_and_streams(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("hello", "one", "two words", env={"A": "1", "ÄÖ": "ü=;"})
    assert (await run(engine, workload)).exit_code == 0
    assert workload.stdout.read_text() == "hello one two words\nenv A=1\nenv ÄÖ=ü=;\n"
    assert workload.stderr.read_text() == "to stderr\n"


async def test_large_environment(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("hello", env={"A": "x" * 140_000})
    assert (await run(engine, workload)).exit_code == 0
    assert "env A=" + "x" * 140_000 + "\n" in workload.stdout.read_text()


async def test_nothing_of_the_agents_environment_is_there(
    engine: WasmEngine, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_NODE", "hidden")
    workload = bench.wasm("hello")
    await run(engine, workload)
    assert "env " not in workload.stdout.read_text()
    assert bench.state.stat().st_mode & 0o077 == 0
    environments = [path.with_name("environ").read_bytes() for path in command_lines(bench)]
    assert environments
    assert not any(b"SECRET_OF_THE_NODE" in one for one in environments)


def command_lines(bench: Bench) -> list[Path]:
    found: list[Path] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(bench.state).encode() in path.read_bytes():
                found.append(path)
    return found


async def test_output_can_be_followed_while_it_runs(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("hello", "--tick", "40")
    reader = LogReader(workload.stdout, workload.stderr, workload.log_index)
    await engine.start(workload)
    async with asyncio.timeout(30):
        while "tick 2\n" not in "".join(p.text for p in reader.read("stdout").pieces):  # noqa: ASYNC110 another process writes
            await asyncio.sleep(0.01)
    assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING
    await engine.stop(workload.id, 0)


async def test_output_is_complete_and_in_the_index(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("flood", "3000000")
    assert (await run(engine, workload)).exit_code == 0
    assert workload.stdout.stat().st_size == 3_000_000
    reader = LogReader(workload.stdout, workload.stderr, workload.log_index)
    assert reader.size("all") == 3_000_000


# The disk


async def test_no_disk_without_mounts(engine: WasmEngine, bench: Bench) -> None:
    for args in (("/",), (str(bench.root),), ("read", "/etc/passwd"), ("read", "../etc/passwd")):
        workload = bench.wasm("walk", *args)
        assert (await run(engine, workload)).exit_code == 1
        assert workload.stdout.read_bytes() == b""


async def test_read_only_directory(engine: WasmEngine, bench: Bench) -> None:
    data = bench.root / "data"
    (data / "sub").mkdir(parents=True)
    (data / "sub" / "file").write_text("content")
    mount = Mount(data, "/inputs")
    read = bench.wasm("walk", "read", "/inputs/sub/file", mounts=[mount])
    assert (await run(engine, read)).exit_code == 0
    assert read.stdout.read_text() == "content"
    for args in (
        ("write", "/inputs/sub/file", "x"),
        ("write", "/inputs/new", "x"),
        ("link", "sub", "/inputs/l"),
    ):
        write = bench.wasm("walk", *args, mounts=[mount])
        assert (await run(engine, write)).exit_code == 1
        assert "not permitted" in write.stderr.read_text().lower()
    assert (data / "sub" / "file").read_text() == "content"
    assert sorted(p.name for p in data.iterdir()) == ["sub"]


async def test_writable_directory(engine: WasmEngine, bench: Bench) -> None:
    outputs = bench.root / "outputs"
    outputs.mkdir()
    mounts = [Mount(outputs, "/outputs", read_only=False)]
    workload = bench.wasm("walk", "write", "/outputs/result.txt", "42", mounts=mounts)
    assert (await run(engine, workload)).exit_code == 0
    assert (outputs / "result.txt").read_text() == "42"


@pytest.mark.parametrize("target", ["../secret", "/SECRET", "inner", "chain/secret"])
async def test_links_cannot_lead_out(engine: WasmEngine, bench: Bench, target: str) -> None:
    (bench.root / "secret").write_text("secret")
    data = bench.root / "data"
    data.mkdir()
    (data / "inner").symlink_to("..")
    (data / "chain").symlink_to("inner")
    (data / "link").symlink_to(target.replace("/SECRET", str(bench.root / "secret")))
    name = "link/secret" if target == "inner" else "link"
    workload = bench.wasm("walk", "read", f"/data/{name}", mounts=[Mount(data, "/data")])
    assert (await run(engine, workload)).exit_code == 1
    assert workload.stdout.read_bytes() == b""


async def test_guest_cannot_make_its_way_out(engine: WasmEngine, bench: Bench) -> None:
    (bench.root / "secret").write_text("secret")
    data = bench.root / "data"
    data.mkdir()
    mounts = [Mount(data, "/data", read_only=False)]
    await run(engine, bench.wasm("walk", "link", "../secret", "/data/link", mounts=mounts))
    await run(engine, bench.wasm("walk", "link", "/etc", "/data/etc", mounts=mounts))
    for name in ("link", "etc/passwd", "../secret"):
        workload = bench.wasm("walk", "read", f"/data/{name}", mounts=mounts)
        assert (await run(engine, workload)).exit_code == 1
        assert workload.stdout.read_bytes() == b""
    write = bench.wasm("walk", "write", "/data/link", "changed", mounts=mounts)
    assert (await run(engine, write)).exit_code == 1
    assert (bench.root / "secret").read_text() == "secret"


async def test_mounted_file_comes_without_its_neighbours(engine: WasmEngine, bench: Bench) -> None:
    data = bench.root / "data"
    data.mkdir()
    (data / "one.csv").write_text("1,2\n")
    (data / "private.key").write_text("secret")
    mounts = [Mount(data / "one.csv", "/inputs/table.csv")]
    listing = bench.wasm("walk", "/inputs", mounts=mounts)
    assert (await run(engine, listing)).exit_code == 0
    assert listing.stdout.read_text() == "/inputs/table.csv 4\n"
    write = bench.wasm("walk", "write", "/inputs/table.csv", "x", mounts=mounts)
    assert (await run(engine, write)).exit_code == 1
    assert (data / "one.csv").read_text() == "1,2\n"


async def test_files_of_one_directory_appear_together(engine: WasmEngine, bench: Bench) -> None:
    for name in ("a", "b"):
        (bench.root / name).write_text(name)
    mounts = [Mount(bench.root / name, f"/inputs/{name}") for name in ("a", "b")]
    workload = bench.wasm("walk", "/inputs", mounts=mounts)
    assert (await run(engine, workload)).exit_code == 0
    assert sorted(workload.stdout.read_text().splitlines()) == ["/inputs/a 1", "/inputs/b 1"]


async def test_writable_file_is_the_file_itself(engine: WasmEngine, bench: Bench) -> None:
    path = bench.root / "state.txt"
    path.write_text("old content")
    mounts = [Mount(path, "/state/state.txt", read_only=False)]
    workload = bench.wasm("walk", "write", "/state/state.txt", "new", mounts=mounts)
    assert (await run(engine, workload)).exit_code == 0
    assert path.read_text() == "new"


async def test_module_file_is_not_shown_to_the_guest(engine: WasmEngine, bench: Bench) -> None:
    data = bench.root / "data"
    data.mkdir()
    (data / "f").write_text("f")
    source = (await asyncio.to_thread(bench.wasm, "walk")).mounts[0].source
    workload = bench.workload(
        {"entryModule": "/inputs/walk.wasm", "parameters": ["/inputs"]},
        mounts=[Mount(source, "/inputs/walk.wasm"), Mount(data, "/inputs")],
    )
    assert (await run(engine, workload)).exit_code == 0
    assert workload.stdout.read_text() == "/inputs/f 1\n"


async def test_mount_may_not_go_through_a_link(engine: WasmEngine, bench: Bench) -> None:
    real = bench.root / "real"
    (real / "sub").mkdir(parents=True)
    (real / "sub" / "file").write_text("x")
    (bench.root / "alias").symlink_to("real")
    for source in (bench.root / "alias" / "sub", bench.root / "alias" / "sub" / "file"):
        workload = bench.wasm("walk", "/in", mounts=[Mount(source, "/in/x")])
        with_reason = ""
        try:
            await engine.start(workload)
            seen = await asyncio.wait_for(engine.wait(workload.id), 60)
            with_reason, message = seen.reason, seen.message
        except TerminalError as error:
            with_reason, message = error.reason, error.message
        assert with_reason == "StartFailed"
        assert "symbolic link" in message


async def test_file_size_limit(engine: WasmEngine, bench: Bench) -> None:
    outputs = bench.root / "outputs"
    outputs.mkdir()
    workload = bench.wasm(
        "walk",
        "fill",
        "/outputs/big",
        str(50 * MIB),
        mounts=[Mount(outputs, "/outputs", read_only=False)],
        resources=Resources(disk_bytes=4 * MIB),
        output_bytes_max=1 * MIB,
    )
    assert (await run(engine, workload)).exit_code == 1
    assert (outputs / "big").stat().st_size == 4 * MIB
    assert "too large" in workload.stderr.read_text().lower()


@pytest.mark.parametrize(
    ("mounts", "words"),
    [
        pytest.param([("f", "/data/f"), ("d", "/data")], "a mount itself", id="file in a mount"),
        pytest.param([("d", "/x"), ("d", "/x/")], "two mounts", id="same target"),
        pytest.param([("d", "relative")], "absolute path", id="relative target"),
        pytest.param([("d", "/a/../b")], "'..'", id="climbing target"),
        pytest.param([("f", "/")], "cannot be mounted at /", id="file as root"),
        pytest.param([("pipe", "/p")], "neither a file nor a directory", id="fifo"),
    ],
)
async def test_mounts_that_cannot_be_granted(
    engine: WasmEngine, bench: Bench, mounts: list[tuple[str, str]], words: str
) -> None:
    (bench.root / "f").write_text("f")
    (bench.root / "d").mkdir()
    os.mkfifo(bench.root / "pipe")
    workload = bench.wasm("walk", mounts=[Mount(bench.root / s, t) for s, t in mounts])
    with pytest.raises(TerminalError, match=words) as caught:
        await engine.start(workload)
    assert caught.value.reason == "StartFailed"
    assert (await engine.observe(workload.id)).phase is RunPhase.ABSENT


# Limits


async def test_endless_loop_is_ended_in_time(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("loop", timeout_seconds=1.0)
    seen = await run(engine, workload)
    assert (seen.exit_code, seen.reason) == (137, "Timeout")
    assert seen.started_at is not None
    assert seen.finished_at is not None
    # Not much later, however busy the machine is; nor at the engine's next limit, which is minutes.
    assert 1.0 <= (seen.finished_at - seen.started_at).total_seconds() < 10.0
    assert workload.stdout.read_text() == "looping\n"


async def test_sleeping_guest_is_ended_in_time(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("hello", "--tick", "1000", timeout_seconds=0.5)
    assert (await run(engine, workload)).reason == "Timeout"


async def test_flooding_guest_is_ended_in_time(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("flood", "0", timeout_seconds=0.5, output_bytes_max=1 << 40)
    assert (await run(engine, workload)).reason == "Timeout"


@pytest.mark.parametrize(
    ("then", "ends"),
    [
        ("(loop $forever (br $forever))", (137, "Timeout")),
        ("(loop $forever (drop (call $write)) (br $forever))", (137, "OutputLimit")),
        ("(call $exit (i32.const 3))", (3, "")),
        ("(unreachable)", (134, "Trap")),
        ("", (0, "")),
    ],
)
async def test_a_guest_that_opened_all_files_it_may_ends_like_others(
    engine: WasmEngine, bench: Bench, then: str, ends: tuple[int, str]
) -> None:
    """None is left for what ends it."""
    module = wat(bench, GREEDY.replace("THEN", then))
    data = bench.root / "data"
    data.mkdir()
    workload = bench.wasm(
        module,
        mounts=[Mount(data, "/data", read_only=False)],
        timeout_seconds=1.0,
        output_bytes_max=MIB,
    )
    if ends[1] == "OutputLimit":
        workload = dataclasses.replace(workload, timeout_seconds=None)
    seen = await run(engine, workload)
    assert (seen.exit_code, seen.reason, seen.is_system_fault) == (*ends, False)


async def test_memory_bomb(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("membomb", resources=Resources(memory_bytes=32 * MIB))
    seen = await run(engine, workload)
    assert (seen.exit_code, seen.reason) == (137, "OutOfMemory")
    assert not seen.is_system_fault
    assert "out of memory after" in workload.stderr.read_text()


async def test_memory_bomb_that_gives_up_by_itself(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("membomb", "exit", resources=Resources(memory_bytes=32 * MIB))
    seen = await run(engine, workload)
    assert (seen.exit_code, seen.reason) == (9, "")


async def test_module_that_needs_more_memory_than_it_may(engine: WasmEngine, bench: Bench) -> None:
    module = wat(bench, '(module (memory 1600) (func (export "_start")))')
    workload = bench.wasm(module, resources=Resources(memory_bytes=32 * MIB))
    seen = await run(engine, workload)
    assert (seen.exit_code, seen.reason) == (137, "OutOfMemory")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_output_flood(engine: WasmEngine, bench: Bench, stream: str) -> None:
    args = ("0",) if stream == "stdout" else ("0", "stderr")
    workload = bench.wasm("flood", *args, output_bytes_max=MIB)
    seen = await run(engine, workload)
    assert (seen.exit_code, seen.reason) == (137, "OutputLimit")
    assert stream in seen.message
    path = workload.stdout if stream == "stdout" else workload.stderr
    assert path.stat().st_size == MIB


# Traps


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("unreachable", "unreachable"),
        ("memory", "out of bounds"),
        ("divide", "divide by zero"),
        ("stack", ""),
    ],
)
async def test_trap(engine: WasmEngine, bench: Bench, kind: str, words: str) -> None:
    workload = bench.wasm("trap", kind)
    seen = await run(engine, workload)
    assert (seen.exit_code, seen.reason, seen.is_system_fault) == (134, "Trap", False)
    assert words in seen.message
    assert len(seen.message) < 2100
    assert workload.stdout.read_text() == f"about to trap: {kind}\n"


async def test_function_names_in_a_trap_cannot_forge_a_terminal(
    engine: WasmEngine, bench: Bench
) -> None:
    name = "\\1b[2Jcleared" + "x" * 5000
    module = wat(bench, f'(module (func $"{name}" unreachable) (export "_start" (func 0)))')
    seen = await run(engine, bench.wasm(module))
    assert seen.reason == "Trap"
    assert "\x1b" not in seen.message
    assert len(seen.message) < 2100


# Entrypoints and imports


async def test_other_entrypoint_after_initialisation(engine: WasmEngine, bench: Bench) -> None:
    module = wat(
        bench,
        """(module
          (global $ready (mut i32) (i32.const 0))
          (func (export "_initialize") (global.set $ready (i32.const 1)))
          (func (export "work") (if (i32.eqz (global.get $ready)) (then unreachable))))""",
    )
    workload = bench.wasm(module, params={"Entrypoint": "work"})
    assert (await run(engine, workload)).exit_code == 0


@pytest.mark.parametrize(
    ("text", "params", "words"),
    [
        pytest.param(
            '(module (func (export "other")))', {}, "exports no function _start.*other", id="none"
        ),
        pytest.param(
            '(module (func (export "_start") (param i32)))', {}, "take no parameters", id="params"
        ),
        pytest.param(
            '(module (import "env" "magic" (func)) (func (export "_start")))',
            {},
            r"imports env\.magic",
            id="unknown import",
        ),
        pytest.param(
            '(module (import "wasi:http/x" "get" (func)) (func (export "_start")))',
            {},
            "neither WASI",
            id="network import",
        ),
    ],
)
async def test_module_that_does_not_fit(
    engine: WasmEngine, bench: Bench, text: str, params: dict[str, object], words: str
) -> None:
    seen = await run(engine, bench.wasm(wat(bench, text), params=params))
    assert (seen.reason, seen.exit_code, seen.is_system_fault) == ("StartFailed", None, False)
    assert re.search(words, seen.message)


async def test_import_modules_are_linked_by_name(engine: WasmEngine, bench: Bench) -> None:
    base = wat(bench, '(module (func (export "seven") (result i32) i32.const 7))', "base.wasm")
    double = wat(
        bench,
        """(module (import "base" "seven" (func $seven (result i32)))
          (func (export "fourteen") (result i32) (i32.add (call $seven) (call $seven))))""",
        "double.wasm",
    )
    main = wat(
        bench,
        """(module
          (import "double" "fourteen" (func $n (result i32)))
          (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
          (memory (export "memory") 1)
          (func (export "_start") (call $exit (call $n))))""",
        "main.wasm",
    )
    workload = bench.wasm(
        main,
        mounts=[Mount(base, "/lib/base.wasm"), Mount(double, "/lib/double.wasm")],
        params={"ImportModules": ["/lib/base.wasm", "/lib/double.wasm"]},
    )
    assert (await run(engine, workload)).exit_code == 14


async def test_large_exit_codes(engine: WasmEngine, bench: Bench) -> None:
    for given, seen in ((125, 125), (200, 200), (255, 255), (256, 1), (-1, 255)):
        workload = bench.wasm("hello", "--exit", str(given))
        assert (await run(engine, workload)).exit_code == seen


# What is refused before the start


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"network": Network(type=NetworkType.FULL)}, "network", id="network"),
        pytest.param({"resources": Resources(gpu=1)}, "GPU", id="gpu"),
        pytest.param({"env": {"A=B": "1"}}, "environment variable", id="variable name"),
        pytest.param({"env": {"A": "1\0"}}, "environment variable", id="variable value"),
        pytest.param({"env": {"A": "x" * 200_000}}, "put large values into an input", id="huge"),
        pytest.param({"run": "../escape"}, "run id", id="run id"),
        pytest.param({"params": {"entryModul": "/x"}}, "did you mean entryModule", id="typo"),
        pytest.param({"params": {"parameters": "one"}}, "params.parameters", id="no list"),
    ],
)
async def test_refused_workloads(
    engine: WasmEngine, bench: Bench, change: dict[str, object], words: str
) -> None:
    workload = bench.wasm("hello", **change)  # type: ignore[arg-type]
    with pytest.raises(TerminalError, match=words) as caught:
        await engine.start(workload)
    assert caught.value.reason == "StartFailed"
    assert list(await engine.list()) == []
