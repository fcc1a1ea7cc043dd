"""What `bacalhau serve` does to its own process."""

import subprocess
import sys
from pathlib import Path

import pytest

from bacalhau import serve
from bacalhau.settings import ServeSettings
from bacalhau_api.errors import InvalidError

SCRIPT = """
import resource, sys
from bacalhau.serve import _allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
_allow_open_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("limits", "becomes"), [((64, 512), "512 512"), ((300, 300), "300 300")])
def test_more_open_files_than_a_shell_allows(limits: tuple[int, int], becomes: str) -> None:
    words = [sys.executable, "-c", SCRIPT, *map(str, limits)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == becomes


def test_a_name_that_was_refused_is_not_kept(tmp_path: Path) -> None:
    """It would stand in the way of the right one."""
    settings = ServeSettings(data_dir=tmp_path, name="beta")
    assert serve.node_name(settings) == "beta"
    unnamed = ServeSettings(data_dir=tmp_path)
    assert serve.node_name(unnamed) != "beta"
    serve._keep_name(settings, "beta")
    assert serve.node_name(unnamed) == "beta"


def test_a_kept_name_that_is_damaged_is_given_anew(tmp_path: Path) -> None:
    (tmp_path / serve.NAME_FILE).write_bytes(b"\xff\xfe\x00")
    unnamed = ServeSettings(data_dir=tmp_path)
    with pytest.raises(InvalidError, match="--name") as caught:
        serve.node_name(unnamed)
    assert "give the node a name" in caught.value.hint
    named = ServeSettings(data_dir=tmp_path, name="beta")
    serve._keep_name(named, serve.node_name(named))
    assert serve.node_name(unnamed) == "beta"
