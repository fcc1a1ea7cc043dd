"""What an agent loads: it runs on small machines, and schedules nothing."""

import subprocess
import sys


def test_an_agent_loads_no_scheduler() -> None:
    code = "import sys, bacalhau.serve.compute; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    names = set(loaded.stdout.split())
    assert "bacalhau_controllers.runner.agent" in names
    assert not names & {"numpy", "bacalhau_controllers.job", "bacalhau_controllers.placement"}
