"""The docker engine's pure parts: what a container is to be, what its end means, and the rest."""

import gc
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bacalhau.engines.docker import DockerEngine, client, ends, gpus
from bacalhau.engines.docker.body import Place, PortMapping, create_body
from bacalhau.engines.docker.images import Reference
from bacalhau.engines.docker.launch import start_error
from bacalhau.engines.docker.logs import FrameError, Frames
from bacalhau.engines.docker.networks import Networks, bridge_name
from bacalhau.engines.docker.options import DockerOptions, engine_host
from bacalhau.engines.docker.ports import PortRange, variables
from bacalhau.engines.docker.records import Record, Shelf, Stop
from bacalhau.engines.docker.strays import end_strays
from bacalhau.system import SystemClock
from bacalhau_api.errors import InvalidError, TerminalError, TransientError, UnavailableError
from bacalhau_api.params import DockerParams
from bacalhau_api.v1.job import Network, NetworkType, Port, Resources
from bacalhau_controllers.runner.ports import Observation, RunPhase
from bacalhau_controllers.runner.state import Instant
from tests.support.engines import Bench
from tests.support.flushes import record_fsyncs

MIB = 1024 * 1024
BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)


def body(tmp_path: Path, place: Place | None = None, **params: Any) -> dict[str, Any]:
    workload = Bench(tmp_path).workload({}, resources=params.pop("resources", None))
    made = DockerParams.model_validate({"image": "x", **params})
    return create_body(workload, made, place or Place("sha256:1", "owner"))


def test_the_profile_is_the_same_whatever_a_job_asks(tmp_path: Path) -> None:
    config = body(tmp_path, user="0", readOnlyRoot=True)["HostConfig"]
    assert config["CapDrop"] == ["ALL"]
    assert "CapAdd" not in config
    assert config["SecurityOpt"] == ["no-new-privileges:true"]
    assert config["Privileged"] is False
    assert config["NetworkMode"] == "none"
    assert config["Memory"] == config["MemorySwap"] == 64 * MIB
    assert config["PidsLimit"] == 1024
    assert config["ReadonlyRootfs"] is True
    assert "Binds" not in config


def test_limits_below_what_the_engine_takes_are_raised(tmp_path: Path) -> None:
    config = body(tmp_path, resources=Resources(memory_bytes=1, cpu_millis=1))["HostConfig"]
    assert config["Memory"] == config["MemorySwap"] == 6 * MIB
    assert config["NanoCpus"] == 10_000_000


def test_gpus_are_asked_for_by_uuid(tmp_path: Path) -> None:
    made = body(tmp_path, Place("i", "o", gpus=("GPU-1", "GPU-2")))
    (request,) = made["HostConfig"]["DeviceRequests"]
    assert request["DeviceIDs"] == ["GPU-1", "GPU-2"]
    assert made["Labels"]["org.bacalhau.gpus"] == "GPU-1,GPU-2"


def test_ports_are_published(tmp_path: Path) -> None:
    ports = (PortMapping("web", 25000, 80), PortMapping("x", 25001, 81, "127.0.0.1"))
    made = body(tmp_path, Place("i", "o", "net", ports=ports))
    assert made["HostConfig"]["PortBindings"] == {
        "80/tcp": [{"HostIp": "", "HostPort": "25000"}],
        "81/tcp": [{"HostIp": "127.0.0.1", "HostPort": "25001"}],
    }
    assert variables(ports)["BACALHAU_HOST_PORT_web"] == "25000"
    assert variables(ports)["BACALHAU_PORT_web"] == "80"


def test_a_nul_in_a_variable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TerminalError, match="NUL"):
        body(tmp_path, Place("i", "o", env={"A": "a\0b"}))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 64])
def test_frames_however_they_are_cut(size: int) -> None:
    def frame(stream: int, data: bytes) -> bytes:
        return bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data

    whole = frame(1, b"one\n") + frame(2, b"two\n") + frame(1, b"") + frame(1, b"x" * 100)
    frames, found = Frames(), {"stdout": b"", "stderr": b""}
    for at in range(0, len(whole), size):
        for stream, data in frames.feed(whole[at : at + size]):
            found[stream] += data
    assert found == {"stdout": b"one\n" + b"x" * 100, "stderr": b"two\n"}
    with pytest.raises(FrameError):
        list(Frames().feed(b"not frames at all"))


def state(code: int, *, started: float = 0, finished: float = 10, **more: Any) -> dict[str, Any]:
    def text(seconds: float) -> str:
        return f"{(BEGAN + timedelta(seconds=seconds)).isoformat()[:19]}.123456789Z"

    times = {"StartedAt": text(started), "FinishedAt": text(finished)}
    return {"Status": "exited", "ExitCode": code, **times, **more}


def test_ends() -> None:
    assert ends.ended(state(0)).reason == ""
    assert ends.ended(state(3)).exit_code == 3
    assert ends.ended(state(137, OOMKilled=True)).reason == "OutOfMemory"
    survived = ends.ended(state(0, OOMKilled=True))
    assert (survived.reason, bool(survived.message)) == ("", True)
    assert ends.ended(state(143), foreign="somebody").phase is RunPhase.VANISHED
    assert ends.ended(state(0), foreign="somebody").exit_code == 0
    stop = Stop("Killed", "stopped", (BEGAN + timedelta(seconds=5)).timestamp())
    assert ends.ended(state(137), stop).reason == "Killed"
    assert ends.ended(state(4, finished=2), stop).reason == "", "it had ended before"
    tini = ends.ended(state(127), stderr_tail="[FATAL tini (7)] exec nope failed: not found")
    assert (tini.reason, "nope" in tini.message) == ("StartFailed", True)
    assert ends.ended(state(127), stderr_tail="sh: nope: not found").reason == ""


@pytest.mark.parametrize(
    ("code", "started", "finished", "keeps", "is_cut"),
    [
        (143, -60, 2, False, True),  # the next engine ended it
        (255, -60, 2, False, True),  # it was gone when the next engine looked
        (137, -60, -15, False, True),  # the orderly end of the engine before
        (1, -60, 2, False, False),  # no signal: its own end
        (143, -600, -300, False, False),  # long before: its own end
        (255, 5, 10, False, False),  # began after: its own end
        (255, -60, 3, True, True),  # live-restore, and gone all the same
        (143, -60, 3, True, False),  # live-restore: nobody but itself ended it
        (255, -60, 3000, True, False),
    ],
)
def test_what_an_engine_took_along(
    code: int, started: float, finished: float, keeps: bool, is_cut: bool
) -> None:
    life = ends.EngineLife(BEGAN.timestamp(), keeps)
    seen = ends.ended(state(code, started=started, finished=finished), life=life)
    assert (seen.phase is RunPhase.VANISHED) is is_cut


@pytest.mark.parametrize(("boot", "is_cut"), [("second", False), ("first", True), ("", False)])
@pytest.mark.parametrize("more", [{}, {"OOMKilled": True}])
def test_an_end_before_a_reboot(boot: str, more: dict[str, Any], is_cut: bool) -> None:
    """Nobody knows whether what it wrote got to the disk. An older node's containers have no boot."""
    life = ends.EngineLife(BEGAN.timestamp(), boot="second")
    seen = ends.ended(state(0, Boot=boot, **more), life=life)
    assert (seen.phase is RunPhase.VANISHED, seen.is_system_fault) == (is_cut, is_cut)
    stop = Stop("Killed", "stopped", BEGAN.timestamp())
    assert ends.ended(state(137, Boot=boot, **more), stop, life=life).reason == "Killed"


def test_a_start_that_was_cut_off_by_the_engines_death() -> None:
    """The next engine runs it on, and says afterwards that it was never started."""
    zero = "0001-01-01T00:00:00Z"
    late = {"Status": "created", "StartedAt": zero, "FinishedAt": "2026-01-02T03:04:05.6Z"}
    fresh = late | {"FinishedAt": zero}
    assert (ends.is_over(late), ends.is_unborn(late)) == (True, False)
    assert (ends.is_over(fresh), ends.is_unborn(fresh)) == (False, True)
    life = ends.EngineLife(BEGAN.timestamp(), keeps_containers=True)
    seen = ends.ended(late | {"ExitCode": 0}, life=life)
    assert (seen.phase, seen.exit_code) == (RunPhase.EXITED, 0)
    assert ends.LOG_LOST in seen.message
    assert ends.ended(late | {"ExitCode": 3}, life=life).exit_code == 3
    assert ends.ended(late | {"ExitCode": 143}, life=life).phase is RunPhase.VANISHED


@pytest.mark.parametrize(
    ("code", "started", "finished", "words"),
    [
        (0, -60, -10, "it ended while"),
        (3, -60, -10, "exit code 3; it ended while"),
        (0, -60, 1, "it ended while"),  # the new engine had hardly begun
        (0, -60, 10, ""),
        (0, 5, 10, ""),
    ],
)
def test_what_a_log_may_lack_is_said(
    code: int, started: float, finished: float, words: str
) -> None:
    life = ends.EngineLife(BEGAN.timestamp(), keeps_containers=True)
    seen = ends.ended(state(code, started=started, finished=finished), life=life)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, code, "")
    assert seen.message.startswith(words)
    assert (ends.LOG_LOST in seen.message) is bool(words)


def test_moments() -> None:
    assert ends.moment("0001-01-01T00:00:00Z") is None
    assert ends.moment("") is None
    found = ends.moment("2026-01-02T03:04:05.123456789+01:00")
    assert found == datetime(2026, 1, 2, 2, 4, 5, 123456, tzinfo=UTC)
    assert ends.moment("2026-01-02T03:04:05.1Z") == datetime(
        2026, 1, 2, 3, 4, 5, 100000, tzinfo=UTC
    )


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1", "docker.io/library/busybox:1"),
        ("team/app", "docker.io/team/app:latest"),
        ("ghcr.io/team/app:2", "ghcr.io/team/app:2"),
        ("127.0.0.1:5000/a/b/c:3", "127.0.0.1:5000/a/b/c:3"),
        ("localhost/a", "localhost/a:latest"),
        ("a@sha256:" + "1" * 64, "docker.io/library/a@sha256:" + "1" * 64),
        ("a:1@sha256:" + "1" * 64, "docker.io/library/a@sha256:" + "1" * 64),
        ("index.docker.io/library/a:1", "docker.io/library/a:1"),
    ],
)
def test_references(text: str, complete: str) -> None:
    assert str(Reference.parse(text)) == complete


def test_records_survive_and_the_first_end_stands(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "runs")
    shelf.open()
    record = Record(
        "r.0", "out", "err", "log", 10,
        ports=(("web", 1, 2, ""),), domains=("a.b",), gpus=("G",),
    )  # fmt: skip
    shelf.write(record)
    assert Shelf(shelf.root).read("r.0") == record
    end = Observation(RunPhase.EXITED, 3, started_at=BEGAN, finished_at=BEGAN)
    shelf.write_end("r.0", end)
    shelf.write_end("r.0", Observation(RunPhase.VANISHED))
    assert Shelf(shelf.root).end_of("r.0") == end
    shelf.mark_stop("r.0", Stop("Timeout", "late", 1.0))
    shelf.mark_stop("r.0", Stop("Killed", "stopped", 2.0))
    assert Shelf(shelf.root).stop_of("r.0") == Stop("Timeout", "late", 1.0)
    assert (shelf.was_started("r.0"), shelf.started_at("r.0")) == (False, None)
    at = Instant(wall=BEGAN, mono=12.5, boot="b")
    shelf.mark_started("r.0", at)
    assert (shelf.was_started("r.0"), shelf.started_at("r.0")) == (True, at)
    (shelf.root / "r.0" / "started").write_text("")
    assert (shelf.was_started("r.0"), shelf.started_at("r.0")) == (True, None)
    (shelf.root / "r.0" / "run.json").write_text("{torn")
    assert Shelf(shelf.root).read("r.0") is None
    shelf.remove("r.0")
    assert shelf.names() == []
    assert shelf.end_of("r.0") is None


def test_records_and_ends_are_on_the_disk_once_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file before it has its name, then the names."""
    flushed = record_fsyncs(monkeypatch)
    shelf = Shelf(tmp_path / "runs")
    shelf.open()
    shelf.write(Record("r.0", "out", "err", "log", 10))
    assert [path.name for path in flushed] == ["run.json.new", "r.0", "runs"]
    flushed.clear()
    shelf.write_end("r.0", Observation(RunPhase.EXITED, 3))
    assert [path.name for path in flushed] == ["end.json.new", "r.0"]


def test_ports_of_a_range() -> None:
    ports = PortRange(40100, 40103)
    network = Network(type=NetworkType.BRIDGE, ports=(Port(name="a"), Port(name="b", target=80)))
    first = ports.choose(network, ())
    assert len({p.host for p in first}) == 2
    assert [p.container for p in first] == [first[0].host, 80]
    second = ports.choose(network, {p.host for p in first})
    assert not {p.host for p in first} & {p.host for p in second}
    with pytest.raises(TransientError):
        ports.choose(network, range(40100, 40104))


def test_gpus_are_offered_only_if_the_engine_can_give_them() -> None:
    found = gpus.Probe((gpus.Gpu("GPU-1"), gpus.Gpu("GPU-2")))
    assert "runtime" in gpus.offered(found, {"Runtimes": {"runc": {}}}).missing
    assert gpus.offered(found, {"Runtimes": {"nvidia": {}}}) == found
    cdi = {"DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}]}
    assert gpus.offered(found, cdi) == found
    none = gpus.Probe(missing="no driver")
    assert gpus.offered(none, {"Runtimes": {"nvidia": {}}}).missing == "no driver"
    assert gpus.take(found, 1, {"GPU-1"}) == ("GPU-2",)
    with pytest.raises(TransientError, match="1 of 2 are free"):
        gpus.take(found, 2, {"GPU-1"})


def test_a_machine_without_a_gpu_says_why() -> None:
    probe = gpus.probe_nvml()
    assert probe.gpus or probe.missing


@pytest.mark.parametrize(
    "host", ["tcp://10.0.0.1:2375", "ssh://x", "/var/run/docker.sock", "unix://x"]
)
def test_an_engine_elsewhere_is_refused(host: str) -> None:
    with pytest.raises(InvalidError, match="--docker-host"):
        engine_host(DockerOptions(host=host), {})


def test_where_the_engine_is() -> None:
    assert engine_host(DockerOptions(), {}) == "unix:///var/run/docker.sock"
    assert engine_host(DockerOptions(), {"DOCKER_HOST": "unix:///a"}) == "unix:///a"
    assert engine_host(DockerOptions(host="unix:///b"), {"DOCKER_HOST": "unix:///a"}) == "unix:///b"


async def test_no_more_jobs_with_network_http_than_networks_fit() -> None:
    """Refused for now, before anything is made."""
    networks = Networks(None, "owner", allows_private=False, jobs_max=0)  # type: ignore[arg-type]
    record = Record(run="a.1", stdout="", stderr="", log_index="", output_bytes_max=0)
    with pytest.raises(TransientError, match="as many as it may have"):
        await networks.open_http(record)


def test_names_of_bridges_fit_the_kernel() -> None:
    assert len(bridge_name("x" * 300)) <= 15
    assert bridge_name("a") != bridge_name("b")


@pytest.mark.parametrize("name", ["", "a", "0123456789ab", "docker", "A" * 64])
def test_only_a_whole_id_says_whose_processes_to_end(name: str) -> None:
    with pytest.raises(ValueError, match="whole id"):
        end_strays(name)
    assert end_strays("0" * 64) == 0


def test_a_call_that_nobody_takes_leaves_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is killed between the look whether it listens and the call."""
    monkeypatch.setattr(client, "_check_listens", lambda host, seconds: None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(UnavailableError, match="no Docker engine answers"):
            client._connect(f"unix://{tmp_path}/none", "", 5.0)
        gc.collect()
    assert seen == []


async def test_gpus_are_known_before_the_engine_is_there(tmp_path: Path) -> None:
    """What a node says it has counts until it ends, and a machine may start the engine last."""
    options = DockerOptions(host=f"unix://{tmp_path}/nobody.sock")
    probe = gpus.Probe((gpus.Gpu("GPU-1"), gpus.Gpu("GPU-2")))
    engine = DockerEngine(tmp_path, SystemClock(), options=options, probe=lambda: probe)
    assert (await engine.detect()).gpus == 2


# -- starts that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "words", "kind"),
    [
        (500, "OCI: mkdir runtime-runc/moby/cc: no space left on device", UnavailableError),
        (500, "OCI: mkdir /sys/fs/cgroup/memory/cc: cannot allocate memory", UnavailableError),
        (500, "OCI: container init was OOM-killed (memory limit too low?)", TerminalError),
        (400, 'OCI: exec: "x": executable file not found in $PATH', TerminalError),
        (500, "driver failed programming external connectivity", UnavailableError),
    ],
)
def test_a_machine_that_is_used_up_is_not_the_jobs_fault(
    status: int, words: str, kind: type[Exception]
) -> None:
    words = words.replace("OCI:", "failed to create shim task: OCI runtime create failed:")
    assert isinstance(start_error(client.RefusedError(status, words)), kind)
