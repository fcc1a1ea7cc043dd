"""A sample of the simulated world in every test run; long runs are `python -m tests.simulation`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.campaign import judge, shrink
from tests.simulation.world import Fault, Faults, World
from tests.simulation.world.users import QUEUE_TIMEOUT_SECONDS

SAMPLE, TOGETHER = 300, 20
"""Seeds from 0 on, and how many of them make one test case."""

REPEATED = range(1000, 1008)
ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "api"), str(ROOT / "controllers")])


@pytest.mark.parametrize("first", range(0, SAMPLE, TOGETHER))
def test_invariants_hold(first: int) -> None:
    for seed in range(first, first + TOGETHER):
        verdict = judge(seed, None)
        assert not verdict.words, verdict.words


@pytest.mark.parametrize("seed", range(4))
def test_a_world_without_faults_settles_soon(seed: int) -> None:
    """Whoever asked for a limit of its time in the queue may have to wait for just that, once what
    had its place has run."""
    outcome = World(seed, Faults.none()).run()
    assert outcome.settled_after < 60 + QUEUE_TIMEOUT_SECONDS
    assert outcome.runs > 0


def test_same_seed_same_trace() -> None:
    """In this process and in another one, whose strings hash differently."""
    code = (
        "from tests.simulation.campaign import judge\n"
        f"print(*(judge(seed, None).digest for seed in range({REPEATED.start}, {REPEATED.stop})))"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": PATH, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
        timeout=110,
    )
    assert there.stdout.split() == [judge(seed, None).digest for seed in REPEATED]


def test_a_failure_says_how_to_run_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.simulation.world.world.unsettled", lambda world: ["nothing is right"]
    )
    monkeypatch.setattr("tests.simulation.world.world.REST_SECONDS_MAX", 90.0)
    words = judge(5, "net-loss=0.02,crash-node").words
    assert "I9: no rest; nothing is right" in words
    assert "--seed 5 --faults 'crash-node=2,net-loss=0.02'" in words


def test_fewer_faults_are_found_that_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.simulation.world.world.unsettled", lambda world: ["never"])
    monkeypatch.setattr("tests.simulation.world.world.REST_SECONDS_MAX", 90.0)
    found = list(shrink(5, "net-loss=0.02,crash-node,partition"))
    assert found[-1].invariant == "I9"
    assert "faults: none" in found[-1].words


def test_faults_are_switched_by_name() -> None:
    faults = Faults.parse("all,-clone-node,net-loss=0.5")
    assert faults.rate(Fault.CLONE_NODE) == 0
    assert faults.rate(Fault.NET_LOSS) == 0.5
    assert faults.rate(Fault.PARTITION) > 0
    assert Faults.parse(str(faults)) == faults
    with pytest.raises(ValueError, match="nonsense"):
        Faults.parse("nonsense")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["simulation", "--seeds", "0"], "--seeds: must be at least 1 (got 0)"),
        (["simulation", "--seed", "5", "--faults", "nonsense"], "clone-node"),
        (["simulation", "--seed", "5", "--faults", "net-loss=much"], "'much'"),
        (
            ["simulation.planted", "nonsense"],
            "no such bugs: nonsense; there are: acknowledge-before",
        ),
        (["simulation.sweep", "--stride", "0"], "--stride: must be at least 1 (got 0)"),
        (["e2e.rounds", "--rounds", "0"], "--rounds: must be at least 1 (got 0)"),
    ],
)
def test_a_run_of_nothing_does_not_pass(command: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{command[0]}", *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATH},
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
