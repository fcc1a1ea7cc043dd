"""The tutorial's commands, run as they stand: in one shell, in a home and a network of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import environment, left_over

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
_BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks() -> list[tuple[str, list[str]]]:
    """The commands of each block, and the lines that the tutorial says they print."""
    found: list[tuple[str, list[str]]] = []
    for kind, text in _BLOCK.findall(TUTORIAL.read_text()):
        if kind == "sh":
            found.append((text, []))
        else:
            found[-1][1].extend(text.splitlines())
    return found


def is_printed(line: str, output: str) -> bool:
    """Whether a line is in an output; `…` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in line.split("…"))
    return re.search(f"^{pattern}$", output, re.MULTILINE) is not None


def namespaced() -> list[str]:
    """The words that give a command a network of its own, with a loopback."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    words = ["unshare", *as_root, "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    probe = [*words, "ip", "link", "set", "lo", "up"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.fail(
            "this test needs network namespaces and the command `ip`: run it as root, after "
            f"apt-get install iproute2 util-linux ({tried.stderr.strip()})"
        )
    return [*words, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@pytest.mark.timeout(300)  # some thirty commands, each a process
def test_the_commands_of_the_tutorial_do_what_it_says(tmp_path: Path) -> None:
    bin_dir, home = tmp_path / "bin", tmp_path / "home"
    bin_dir.mkdir()
    home.mkdir()
    command = bin_dir / "bacalhau"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bacalhau "$@"\n')
    command.chmod(0o755)
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "api", "controllers"))
    shell_env = {
        **{k: v for k, v in environment().items() if not k.startswith("BACALHAU_")},
        "HOME": str(home),
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "PYTHONPATH": paths,
    }
    told = blocks()
    script = "set -eu\n" + "".join(f"{text}\necho '=== end of block'\n" for text, _ in told)
    with (tmp_path / "errors").open("w+") as errors:
        done = subprocess.run(
            [*namespaced(), "bash", "-c", script],
            cwd=ROOT, env=shell_env, stdout=subprocess.PIPE, stderr=errors, text=True,
            timeout=280, check=False,
        )  # fmt: skip
        errors.seek(0)
        said = errors.read()
    assert done.returncode == 0, f"{done.stdout}\n{said}"
    outputs = done.stdout.split("=== end of block\n")
    assert len(outputs) == len(told) + 1
    for (text, lines), output in zip(told, outputs, strict=False):
        for line in lines:
            assert is_printed(line, output), f"{line!r} is not what this prints:\n{text}\n{output}"
    assert list(home.glob("bacalhau-tutorial")) == []
    assert left_over(tmp_path) == []


def test_the_tutorial_tells_what_is_printed() -> None:
    assert sum(bool(lines) for _, lines in blocks()) >= 5
