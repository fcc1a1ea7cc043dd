"""What a container is given, what it is kept from, and how its end is told."""

import asyncio
import os
from pathlib import Path

import pytest

from bacalhau.engines.docker import DockerEngine
from bacalhau.engines.logfile import LogReader
from bacalhau_api.errors import TerminalError
from bacalhau_api.v1.job import Resources
from bacalhau_controllers.runner.ports import Mount, RunPhase
from tests.support.docker_lab import SECONDS_MAX, Lab, output, run, until

MIB = 1024 * 1024


async def test_entrypoint_parameters_environment_and_directory(
    lab: Lab, engine: DockerEngine
) -> None:
    workload = lab.workload(
        'echo "$A $B $BACALHAU_X $(pwd) $0 $1"',
        params={
            "entrypoint": ["/bin/sh", "-c", 'echo "$A $B $BACALHAU_X $(pwd) $0 $1"', "zero"],
            "parameters": ["one"],
            "environmentVariables": ["A=params", "B=params"],
            "workingDirectory": "/tmp",
        },
        env={"B": "task", "BACALHAU_X": "ours"},
    )
    seen = await run(engine, workload)
    assert (seen.exit_code, seen.reason) == (0, "")
    assert output(workload) == "params task ours /tmp zero one\n"


async def test_an_image_without_entrypoint_runs_the_parameters(
    lab: Lab, engine: DockerEngine
) -> None:
    workload = lab.workload("", params={"entrypoint": [], "parameters": ["echo", "plain"]})
    assert (await run(engine, workload)).exit_code == 0
    assert output(workload) == "plain\n"


async def test_a_container_has_no_power(lab: Lab, engine: DockerEngine) -> None:
    """No capabilities in any set, no new privileges, a seccomp filter, no network but loopback."""
    script = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; ls /sys/class/net"
    workload = lab.workload(script)
    assert (await run(engine, workload)).exit_code == 0
    words = output(workload).split()
    values = dict(zip(words[:-1:2], words[1::2], strict=False))
    assert {values[f"Cap{name}:"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert values["NoNewPrivs:"] == "1"
    assert values["Seccomp:"] == "2"
    assert words[-1] == "lo"


async def test_exit_codes(lab: Lab, engine: DockerEngine) -> None:
    failing = lab.workload("exit 42")
    assert (await run(engine, failing)).exit_code == 42
    signalled = lab.workload("kill -9 $$")
    seen = await run(engine, signalled)
    assert (seen.exit_code, seen.reason, seen.is_system_fault) == (137, "", False)


async def test_a_command_that_is_not_there(lab: Lab, engine: DockerEngine) -> None:
    workload = lab.workload("", params={"entrypoint": ["/no/such/program"], "parameters": []})
    seen = await run(engine, workload)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, 127, "StartFailed")
    assert "/no/such/program" in seen.message


async def test_memory_is_limited_and_there_is_no_swap(lab: Lab, engine: DockerEngine) -> None:
    greedy = lab.workload(
        "x=0123456789abcdef; while :; do x=$x$x; done",
        resources=Resources(memory_bytes=32 * MIB),
    )
    seen = await run(engine, greedy)
    assert (seen.exit_code, seen.reason, seen.is_system_fault) == (137, "OutOfMemory", False)
    config = lab.inspect(greedy)["HostConfig"]
    assert config["Memory"] == config["MemorySwap"] == 32 * MIB


async def test_a_child_that_needed_too_much_is_told_beside_a_success(
    lab: Lab, engine: DockerEngine
) -> None:
    script = "(x=0123456789abcdef; while :; do x=$x$x; done); echo survived; exit 0"
    workload = lab.workload(script, resources=Resources(memory_bytes=32 * MIB))
    seen = await run(engine, workload)
    assert (seen.exit_code, seen.reason) == (0, "")
    assert "memory" in seen.message


async def test_processes_are_limited(lab: Lab, engine: DockerEngine) -> None:
    await engine.close(keep_running=True)
    small = await lab.open(pids_max=16)
    workload = lab.workload("for i in $(seq 40); do sleep 5 & done; wait")
    seen = await run(small, workload)
    assert seen.exit_code != 0
    assert "fork" in output(workload, "stderr")


async def test_cpu_is_limited(lab: Lab, engine: DockerEngine) -> None:
    workload = lab.workload(":", resources=Resources(cpu_millis=500))
    assert (await run(engine, workload)).exit_code == 0
    assert lab.inspect(workload)["HostConfig"]["NanoCpus"] == 500_000_000


async def test_shared_memory_has_the_size_asked_for(lab: Lab, engine: DockerEngine) -> None:
    workload = lab.workload("df -k /dev/shm | tail -1", params={"shmBytes": 8 * MIB})
    assert (await run(engine, workload)).exit_code == 0
    assert output(workload).split()[1] == str(8 * 1024)


async def test_a_root_that_cannot_be_written_to(lab: Lab, engine: DockerEngine) -> None:
    workload = lab.workload(
        "touch /x; touch /tmp/x && echo tmp; touch /outputs/a/x && echo result",
        params={"readOnlyRoot": True},
        results=("a",),
    )
    assert (await run(engine, workload)).exit_code == 0
    assert output(workload) == "tmp\nresult\n"
    assert "Read-only" in output(workload, "stderr")


async def test_inputs_are_read_only_unless_told(lab: Lab, engine: DockerEngine) -> None:
    data = lab.root / "data"
    data.mkdir()
    (data / "x").write_text("input")
    workload = lab.workload(
        "cat /in/x; echo new > /in/y; echo new > /rw/y && echo written",
        mounts=(Mount(data, "/in"), Mount(data, "/rw", read_only=False)),
    )
    await run(engine, workload)
    assert output(workload) == "inputwritten\n"
    assert "Read-only" in output(workload, "stderr")
    assert (data / "y").read_text() == "new\n"
    assert data.stat().st_uid == os.getuid()


async def test_a_mount_whose_source_is_missing_is_refused_and_not_made(
    lab: Lab, engine: DockerEngine
) -> None:
    missing = lab.root / "missing"
    workload = lab.workload(":", mounts=(Mount(missing, "/in"),))
    with pytest.raises(TerminalError) as caught:
        await engine.start(workload)
    assert caught.value.reason == "StartFailed"
    assert not missing.exists()
    assert list(await engine.list()) == []


@pytest.mark.parametrize(
    ("user", "ids"),
    [("1234", (1234, 1235)), ("1234:77", (1234, 77)), ("worker", (1234, 1235)),
     ("worker:workers", (1234, 1235)), ("4321", (4321, 0))],
)  # fmt: skip
async def test_results_belong_to_the_user_the_container_runs_as(
    lab: Lab, engine: DockerEngine, user: str, ids: tuple[int, int]
) -> None:
    workload = lab.workload(
        "id -u; echo done > /outputs/a/file", params={"user": user}, results=("a",)
    )
    seen = await run(engine, workload)
    assert seen.exit_code == 0, output(workload, "stderr")
    assert output(workload) == f"{ids[0]}\n"
    written = workload.stdout.parent / "a" / "file"
    assert written.read_text() == "done\n"
    status = written.parent.stat()
    assert (status.st_uid, status.st_gid) == ids


async def test_a_user_the_image_does_not_know(lab: Lab, engine: DockerEngine) -> None:
    workload = lab.workload(":", params={"user": "nobody-here"}, results=("a",))
    with pytest.raises(TerminalError, match="nobody-here"):
        await engine.start(workload)
    assert list(await engine.list()) == []


async def test_stop_asks_first(lab: Lab, engine: DockerEngine) -> None:
    """SIGTERM reaches even a process 1 that installs no handler, and one that does may tidy up."""
    plain = lab.workload("exec sleep 3600")
    polite = lab.workload("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done")
    await engine.start(plain)
    await engine.start(polite)
    await until(lambda: "ready" in output(polite))
    began = asyncio.get_running_loop().time()
    await asyncio.gather(engine.stop(plain.id, 30.0), engine.stop(polite.id, 30.0))
    assert asyncio.get_running_loop().time() - began < 25
    seen = await engine.observe(polite.id)
    assert (seen.exit_code, seen.reason) == (3, "Killed")
    assert output(polite) == "ready\nbye\n"
    assert (await engine.observe(plain.id)).exit_code == 143


async def test_stop_kills_what_does_not_listen(lab: Lab, engine: DockerEngine) -> None:
    deaf = lab.workload("trap '' TERM; echo ready; while :; do sleep 0.1; done")
    await engine.start(deaf)
    await until(lambda: "ready" in output(deaf))
    await engine.stop(deaf.id, 1.0)
    seen = await engine.observe(deaf.id)
    assert (seen.exit_code, seen.reason) == (137, "Killed")


async def test_logs_are_live_and_keep_stream_and_time(lab: Lab, engine: DockerEngine) -> None:
    fifo = lab.root / "gate"
    os.mkfifo(fifo)
    workload = lab.workload(
        "echo one; echo two >&2; cat /gate; echo three", mounts=(Mount(fifo, "/gate"),)
    )
    await engine.start(workload)
    reader = LogReader(workload.stdout, workload.stderr, workload.log_index)
    await until(lambda: reader.size() == len("one\ntwo\n"))
    assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING
    await asyncio.to_thread(Path(fifo).write_text, "open\n")
    seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert seen.exit_code == 0
    pieces = reader.read("all", is_final=True).pieces
    streams = {piece.stream: piece.text for piece in pieces if piece.stream == "stderr"}
    assert streams == {"stderr": "two\n"}
    assert output(workload) == "one\nopen\nthree\n"
    assert all(piece.time is not None for piece in pieces)


async def test_the_last_lines_before_an_end_are_not_lost(lab: Lab, engine: DockerEngine) -> None:
    """What follows an engine's log may end before them, about each fourth time on a busy machine."""
    script = "head -c 100000 /dev/zero | tr '\\0' y; printf 'last'; printf end >&2"
    workloads = [lab.workload(script) for _ in range(24)]
    for first in range(0, len(workloads), 4):
        some = workloads[first : first + 4]
        seen = await asyncio.gather(*(run(engine, workload) for workload in some))
        assert [one.exit_code for one in seen] == [0] * len(some)
    written = [(w.stdout.read_bytes()[99_998:], w.stderr.read_bytes()) for w in workloads]
    assert written == [(b"yylast", b"end")] * len(workloads)


async def test_long_lines_binary_and_a_missing_last_newline(lab: Lab, engine: DockerEngine) -> None:
    script = "head -c 100000 /dev/zero | tr '\\0' y; printf '\\377\\000'; printf end >&2"
    workload = lab.workload(script)
    assert (await run(engine, workload)).exit_code == 0
    assert workload.stdout.read_bytes() == b"y" * 100_000 + b"\xff\x00"
    assert workload.stderr.read_bytes() == b"end"


async def test_output_that_is_too_long_is_cut_and_said(lab: Lab, engine: DockerEngine) -> None:
    workload = lab.workload("yes", output_bytes_max=300_000)
    seen = await run(engine, workload)
    assert (seen.phase, seen.reason) == (RunPhase.EXITED, "OutputLimit")
    assert "300000" in seen.message
    assert workload.stdout.stat().st_size == 300_000
    kept = lab.inspect(workload)["HostConfig"]["LogConfig"]
    assert kept["Type"] == "local"
    assert int(kept["Config"]["max-size"]) <= 32 * 300_000, "nor may the engine's copy fill it"
    assert kept["Config"]["max-file"] == "1"


async def test_every_line_of_quick_containers_is_kept(lab: Lab, engine: DockerEngine) -> None:
    """The end of a container comes at the same time as its last lines."""
    workloads = [lab.workload("seq 2000; seq 500 >&2") for _ in range(16)]
    await asyncio.gather(*(engine.start(w) for w in workloads))
    await asyncio.gather(*(asyncio.wait_for(engine.wait(w.id), SECONDS_MAX) for w in workloads))
    for workload in workloads:
        assert output(workload).split() == [str(n) for n in range(1, 2001)]
        assert output(workload, "stderr").split() == [str(n) for n in range(1, 501)]


async def test_no_thread_for_a_container(lab: Lab, engine: DockerEngine) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    first = lab.workload("sleep 3600")
    await engine.start(first)
    before = threads()
    more = [lab.workload("sleep 3600") for _ in range(12)]
    await asyncio.gather(*(engine.start(w) for w in more))
    assert threads() <= before + 12  # the pools fill up, and no more than that
    assert threads() < 40
    for workload in (first, *more):
        assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING


async def test_labels_of_an_image_are_not_taken_for_ours(lab: Lab, engine: DockerEngine) -> None:
    workload = lab.workload("sleep 3600")
    await engine.start(workload)
    labels = lab.inspect(workload)["Config"]["Labels"]
    assert labels["org.bacalhau.run"] == workload.id
    assert all(name.startswith("org.bacalhau.") for name in labels)
    assert list(await engine.list()) == [workload.id]


async def test_two_nodes_share_an_engine(lab: Lab, engine: DockerEngine, tmp_path: Path) -> None:
    other_lab = Lab(tmp_path / "other", lab.dockerd)
    other = await other_lab.open()
    mine, theirs = lab.workload("sleep 3600", run="x.0"), other_lab.workload("echo b", run="x.0")
    await engine.start(mine)
    assert (await run(other, theirs)).exit_code == 0
    assert (await engine.observe(mine.id)).phase is RunPhase.RUNNING
    await other_lab.close()
    assert (await engine.observe(mine.id)).phase is RunPhase.RUNNING
