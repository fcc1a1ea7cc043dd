"""`serve`: from words on the command line to settings."""

from pathlib import Path

import pytest

import bacalhau.serve
from bacalhau.cli.app import run
from bacalhau.settings import AllowedPath, ProbeSettings, ServeSettings


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """What would have been served."""
    settings: list[ServeSettings] = []

    def remember(given: ServeSettings) -> int:
        settings.append(given)
        return 0

    monkeypatch.setattr(bacalhau.serve, "run", remember)
    monkeypatch.delenv("BACALHAU_DIR", raising=False)
    return settings


def test_alone_it_is_everything_on_loopback(served: list[ServeSettings]) -> None:
    assert run(["serve"]) == 0
    (given,) = served
    assert (given.role, given.listen_host, given.listen_port) == ("both", "127.0.0.1", 1234)
    assert given.data_dir == Path.home() / ".bacalhau"
    assert (given.is_orchestrator, given.is_compute) == (True, True)


def test_orchestrator_with_and_without_an_address(served: list[ServeSettings]) -> None:
    assert run(["serve", "--orchestrator"]) == 0
    assert run(["serve", "--orchestrator", "--compute", "--port", "9"]) == 0
    assert run(["serve", "--orchestrator", "http://10.0.0.1:1234", "--token", "bjt-x"]) == 0
    assert run(["serve", "--role", "compute", "--orchestrator=10.0.0.1", "--token", "bjt-x"]) == 0
    assert [s.role for s in served] == ["orchestrator", "both", "compute", "compute"]
    assert [s.orchestrator_url for s in served] == ["", "", *["http://10.0.0.1:1234"] * 2]
    assert served[2].join_token == "bjt-x"


def test_everything_else(served: list[ServeSettings], tmp_path: Path) -> None:
    words = f"""serve --data-dir {tmp_path} --name edge-1 --label disk=ssd --label zone=a
        --allow-path /data/** --allow-path /out:rw --cpu 2 --memory 4GB --max-executions 8
        --nats-port -1 --on-exit stop --log-format json --require-approval""".split()
    assert run(words) == 0
    (given,) = served
    assert given.data_dir == tmp_path
    assert given.labels == {"disk": "ssd", "zone": "a"}
    assert given.allow_paths == (AllowedPath("/data/**"), AllowedPath("/out", writable=True))
    assert (given.capacity.cpu_millis, given.capacity.executions_max) == (2000, 8)
    assert (given.nats_port, given.on_exit, given.log_format) == (-1, "stop", "json")
    assert given.require_approval


def test_what_waits_and_what_is_kept(served: list[ServeSettings]) -> None:
    words = [
        "serve",
        "--upload-limit",
        "1MiB/s",
        "--outbox-limit",
        "20GB",
        "--keep-outputs",
        "36h",
        "--keep-outputs-size",
        "1TB",
    ]
    assert run(words) == 0
    assert run(["serve", "--outbox-limit", "0", "--upload-limit", "0", "--keep-outputs", "0"]) == 0
    assert run(["serve"]) == 0
    limited, unlimited, plain = served
    assert (limited.upload_bytes_per_second, limited.outbox_bytes_max) == (1 << 20, 20 * 10**9)
    assert (limited.keep_outputs_seconds, limited.keep_outputs_bytes) == (36 * 3600.0, 10**12)
    assert (unlimited.upload_bytes_per_second, unlimited.outbox_bytes_max) == (0, 0)
    assert (unlimited.keep_outputs_seconds, unlimited.keep_outputs_bytes) == (0.0, 0)
    assert (plain.upload_bytes_per_second, plain.outbox_bytes_max) == (0, None)
    assert plain.keep_outputs_seconds == 7 * 86400.0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--role", "boss"], "--role"),
        (["--role", "compute"], "--orchestrator"),
        (["--port", "99999"], "--port"),
        (["--label", "x"], "--label"),
        (["--on-exit", "maybe"], "--on-exit"),
        (["--cpu", "many"], "--cpu"),
        (["--upload-limit", "fast"], "--upload-limit"),
        (["--upload-limit", "100B/s"], "--upload-limit"),
        (["--outbox-limit", "-1"], "--outbox-limit"),
        (["--keep-outputs", "long"], "--keep-outputs"),
    ],
)
def test_what_is_wrong_is_named(
    served: list[ServeSettings],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    named: str,
) -> None:
    assert run(["serve", *words]) == 2
    assert named in capsys.readouterr().err
    assert served == []


def test_whom_it_asks_and_what_it_gives_away(
    served: list[ServeSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--probe-exec", "admit --fast", "--probe-http", "https://x/a", "--probe-timeout", "3"]
    assert run(["serve", *words, "--allow-env", "CI_*", "--allow-env", "TZ"]) == 0
    assert run(["serve"]) == 0
    assert (served[0].allow_env, served[1].allow_env) == (("CI_*", "TZ"), ())
    assert served[0].probes == ProbeSettings("admit --fast", "https://x/a", 3.0)
    assert served[1].probes == ProbeSettings("", "", 10.0)
    for wrong in ("localhost:80", "ftp://x", "http://", "http://x:99999/"):
        assert run(["serve", "--probe-http", wrong]) == 2
        assert "--probe-http" in capsys.readouterr().err
    assert run(["serve", "--probe-timeout", "0"]) == 2
    assert len(served) == 2
