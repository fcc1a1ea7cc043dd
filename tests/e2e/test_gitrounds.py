"""A small sample of the random work on watched directories; `python -m tests.e2e.gitrounds` does it for
as long as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import environment, left_over

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_a_directory_that_is_worked_on_is_followed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.gitrounds", "--operations", "20", "--between", "20",
         "--mishaps", "4", "--seed", "s1", "--data", str(tmp_path), "--verbose"],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "20 operations" in done.stdout
    assert "0 wrong deletions, runs or writes" in done.stdout
    assert list(tmp_path.iterdir()) == [], "nothing is kept of what went well"
    assert left_over(tmp_path) == []
