"""The how-to pages: their commands are run as a reader would run them, and do what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import environment, left_over
from tests.e2e.rounds.lab import unshare, why_impossible

ROOT = Path(__file__).parents[2]
CABLE = ROOT / "docs" / "howto" / "pull-the-cable.md"


def commands(page: Path) -> list[str]:
    """The fenced shell commands of a page, in order."""
    return re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run(shell: list[str], script: str, tmp_path: Path) -> str:
    """What a script prints in a shell that stops at the first error."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(
        [*shell, "-eu", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env={**environment(), "PATH": path, "TMPDIR": str(tmp_path)},
    )
    logs = "".join(log.read_text()[-2000:] for log in tmp_path.rglob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return done.stdout


@pytest.mark.timeout(300)
def test_pull_the_cable(tmp_path: Path) -> None:
    why = why_impossible()
    if why:
        pytest.fail(f"this test makes network namespaces: run it as root ({why})")
    enter, *inside = commands(CABLE)
    assert sorted(enter.split()) == sorted([*unshare(is_root=False), "bash"])
    said = run([*unshare(is_root=os.geteuid() == 0), "bash"], "\n".join(inside), tmp_path)
    held, _, replaced = said.partition("replace after 5 s")
    assert "If cut off: hold" in " ".join(held.split())
    assert "Running/Unknown" in held
    assert "its work is kept for it" in held
    assert "tick 299" in held
    assert re.search(r"count-\S+-0\s.*Succeeded", held)
    assert not re.search(r"count-\S+-1\s", said), "nothing was replaced"
    assert re.search(r"replaced-\S+-0\s.*Lost", replaced)
    assert re.search(r"replaced-\S+-0\s.*Succeeded", replaced)
    assert re.search(r"replaced-\S+-1\s.*Stopped", replaced)
    assert left_over(tmp_path) == []
