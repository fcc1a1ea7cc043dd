"""What `bacalhau serve` does to its own process."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bacalhau import serve
from bacalhau.nats.keys import load_or_make_seed
from bacalhau.settings import ServeSettings
from bacalhau_api.errors import InvalidError
from tests.support.flushes import record_fsyncs

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


def _a_file(root: Path) -> Path:
    (root / "file").touch()
    return root / "file"


def _below_a_file(root: Path) -> Path:
    return _a_file(root) / "data"


def _with_a_directory_for_the_key(root: Path) -> Path:
    (root / "node" / "node.seed").mkdir(parents=True)
    return root


@pytest.mark.parametrize("make", [_a_file, _below_a_file, _with_a_directory_for_the_key])
def test_a_data_directory_that_cannot_be_used_is_named_with_the_remedy(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    data_dir = make(tmp_path)
    words = ["serve", "--role", "compute", "--orchestrator", "http://127.0.0.1:9"]
    done = subprocess.run(
        [sys.executable, "-m", "bacalhau", *words, "--data-dir", str(data_dir)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "error: --data-dir: cannot be used" in done.stderr
    assert f"(got {data_dir})" in done.stderr
    assert "hint: something else is in its place" in done.stderr


def test_a_data_directory_of_another_user(tmp_path: Path) -> None:
    def denied(path: str) -> PermissionError:
        return PermissionError(errno.EACCES, "Permission denied", path)

    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for data_dir in (tmp_path, link):  # parts of us use the resolved path
        error = serve._named(data_dir, denied(f"{tmp_path}/serve.lock"))
        assert isinstance(error, InvalidError)
        assert "belongs to user" in error.hint
    elsewhere = denied("/etc/tls.key")
    assert serve._named(tmp_path, elsewhere) is elsewhere


def test_who_a_node_is_outlives_a_power_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = record_fsyncs(monkeypatch)
    path = tmp_path / "node.seed"
    seed = load_or_make_seed(path, "")
    assert flushed == [path.with_name("node.seed.new"), tmp_path]
    assert load_or_make_seed(path, "") == seed
    serve._keep_name(ServeSettings(data_dir=tmp_path), "alpha")
    assert flushed[2:] == [tmp_path / "name.new", tmp_path]


@pytest.mark.parametrize("left", [b"", b"\0\0\0\0\0"])
def test_a_name_that_a_power_failure_spoilt_is_none(tmp_path: Path, left: bytes) -> None:
    """The node comes up, under the name that it had by itself."""
    unnamed = ServeSettings(data_dir=tmp_path)
    name = serve.node_name(unnamed)
    (tmp_path / serve.NAME_FILE).write_bytes(left)
    assert serve.node_name(unnamed) == name
    serve._keep_name(unnamed, name)
    assert (tmp_path / serve.NAME_FILE).read_text() == f"{name}\n"
