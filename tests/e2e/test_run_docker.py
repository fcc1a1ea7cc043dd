"""`docker run` from the image to its output, on a real Docker Engine."""

from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Cluster
from tests.support.dockerd import BUSYBOX, running_dockerd


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An orchestrator, and one node with an engine."""
    with running_dockerd() as engine:
        made = Cluster(tmp_path_factory.mktemp("fleet"))
        data = made.root / "data"
        data.mkdir()
        (data / "words.txt").write_text("one two\n")
        made.start()
        args = ["--docker-host", engine.host, "--allow-path", f"{data}/**", "--on-exit", "stop"]
        made.add_agent("docker-1", args=args)
        yield made
        assert made.close() == []


def test_a_container_gets_what_the_flags_say(cluster: Cluster) -> None:
    into = cluster.root / "results"
    script = 'echo "$GREETING $1 in $PWD as $(id -u)"; cat /in/words.txt; cat /in/* >/out/copy'
    done = cluster.run(
        "docker", "run", "-f", "--download", "--output-dir", str(into),
        "-e", "GREETING=hello", "-w", "/tmp", "-u", "0", "-i", f"{cluster.root}/data:/in",
        "-o", "out:/out", "--memory", "32Mi", BUSYBOX, "--", "sh", "-c", script, "sh", "--server",
    )  # fmt: skip
    shown = [line for line in done.stdout.splitlines() if str(into) not in line]
    assert shown == ["hello --server in /tmp as 0", "one two"]
    assert (into / "out" / "copy").read_text() == "one two\n"


def test_the_exit_code_is_that_of_the_container(cluster: Cluster) -> None:
    words = (
        "docker",
        "run",
        "--attempts",
        "1",
        "--entrypoint",
        "sh",
        "--entrypoint",
        "-c",
        BUSYBOX,
    )
    done = cluster.run(*words, "echo goodbye >&2; exit 42", check=False)
    assert done.returncode == 42
    assert "] goodbye" in done.stderr


def test_what_the_node_lacks_is_said_while_it_waits(cluster: Cluster) -> None:
    done = cluster.run(
        "docker", "run", "--wait-timeout", "5", "--gpu", "7", BUSYBOX, "true", check=False
    )
    assert done.returncode == 4
    assert "waiting: " in done.stderr
    assert "gpu" in done.stderr.lower()
