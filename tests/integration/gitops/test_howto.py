"""The how-to and the sample repository say what is so."""

import re
import shlex
from pathlib import Path

import pytest

from bacalhau.cli import exits
from bacalhau.cli.app import run

ROOT = Path(__file__).parents[3]
HOWTO = ROOT / "docs" / "howto" / "run-your-fleet-from-git.md"
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", HOWTO.read_text(), re.DOTALL)
        for line in block.splitlines()
        if line.startswith("bacalhau ")
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_their_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)[1:]
    names = words[:2] if words[0] == "gitops" else words[:1]
    assert run([*names, "--help"]) == exits.OK
    told = capsys.readouterr().out
    for option in (word for word in words if word.startswith("-")):
        assert option in told


def test_the_sample_repository_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["gitops", "check", str(ROOT / "manifests" / "gitops" / "fleet")]) == exits.OK
    assert capsys.readouterr().out == "4 objects in 3 files\n"


def test_check_tells_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("kind: Job\nspec: {}\n")
    assert run(["gitops", "check", str(tmp_path)]) == exits.ERROR
    assert "a.yaml:1" in capsys.readouterr().err
    assert run(["gitops", "check", str(tmp_path / "nope")]) == exits.ERROR
