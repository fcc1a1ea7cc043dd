"""A small sample of the rounds: real processes in network namespaces, faults from a seed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.cluster import environment, left_over
from tests.e2e.rounds.lab import why_impossible

ROOT = Path(__file__).parents[2]


def rounds(tmp_path: Path, *words: str) -> "subprocess.Popen[str]":
    """The command, with its data in `tmp_path`."""
    why = why_impossible()
    if why:
        pytest.fail(f"this test makes network namespaces: run it as root ({why})")
    # A background job of a shell has it ignored, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.rounds", "--data", str(tmp_path), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.timeout(300)
def test_a_few_rounds(tmp_path: Path) -> None:
    """One with a node that comes back after the limit, one with kill -9 of everything."""
    done = rounds(tmp_path, "--rounds", "2", "--seed", "s106")
    said, _ = done.communicate(timeout=280)
    assert done.returncode == 0, said
    assert "cut-long@" in said
    assert "kill-all@" in said
    assert "0 lost, 0 doubled, 0 orphans, 0 stuck" in said
    assert list(tmp_path.iterdir()) == [], "nothing is kept of rounds that went well"
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_it_is_cut_short(tmp_path: Path, number: signal.Signals) -> None:
    """Namespaces, links and mounts are its own, and go with its processes."""
    links = sorted(os.listdir("/sys/class/net"))
    running = rounds(tmp_path, "--rounds", "50", "--seed", "cut-short")
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("edge-1/serve.json")) and not _agents(tmp_path):
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if number is signal.SIGKILL:
        running.kill()
    else:
        os.killpg(running.pid, number)
    running.communicate(timeout=60)
    assert left_over(tmp_path) == []
    assert sorted(os.listdir("/sys/class/net")) == links
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def _agents(root: Path) -> bool:
    """Whether an agent runs. Its disk cannot be seen from here, its log can."""
    return any("Joined" in log.read_text() for log in root.rglob("edge-1.log"))
