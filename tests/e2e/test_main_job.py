"""The README's first command, but for the installation."""

import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.cluster import environment, left_over

EXAMPLE = Path(__file__).parents[2] / "manifests" / "examples" / "hurricanes"


def test_the_main_job_from_nothing(tmp_path: Path) -> None:
    """The figures agree with NOAA's own, such as an ACE of 245 for 2005."""
    scripts = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["sh", str(EXAMPLE / "run.sh")],
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
        env={**environment(), "PATH": f"{scripts}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert rows["2005"][1:5] == ["27", "15", "7", "244.8"]
    assert sum(year.isdigit() for year in rows) == 49  # 48 seasons and the line that counts them
    assert "48 seasons; the energy of a season changed by +1.86 ACE a year" in done.stdout
    assert list(tmp_path.iterdir()) == [], "it cleans up after itself"
    assert left_over(tmp_path) == []
