"""`--help` of everything: it can be read, and its examples are command lines that exist."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from bacalhau.cli import examples
from bacalhau.cli.app import app, hoisted, run
from bacalhau.cli.session import Session

ROOT: Any = typer.main.get_command(app)
_LINE = re.compile(r"\bbacalhau ((?:'[^']*'|\"[^\"]*\"|[^|;&>)#'\"])*)")


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


def lines() -> list[str]:
    found = examples._EXAMPLES.values()
    return [match[1].strip() for group in found for line in group for match in _LINE.finditer(line)]


@pytest.mark.parametrize("path", [(), *commands(ROOT)], ids=" ".join)
def test_help(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*path, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"Usage: {' '.join(('bacalhau', *path))} [OPTIONS]")
    assert "<str>" not in out
    assert "{" not in out.split("\n\n")[0]
    text = out.split("\n\n")[1].strip()
    assert len(text) > 10, "it says what it does"


def test_each_command_with_arguments_of_its_own_has_examples() -> None:
    ours = {"docker run", "wasm run", "apply", "get", "logs", "wait", "download", "serve"}
    assert ours <= set(examples._EXAMPLES)


def test_examples_are_of_commands_that_exist() -> None:
    known = {"", *(" ".join(path) for path in commands(ROOT))}
    assert set(examples._EXAMPLES) <= known


@pytest.mark.parametrize("line", lines())
def test_an_example_can_be_parsed(line: str) -> None:
    words = hoisted(shlex.split(line))
    command, context = ROOT, ROOT.make_context("bacalhau", words, resilient_parsing=True)
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.commands[name]
        context.obj = Session()
        if not hasattr(command, "commands"):
            # Parsed in earnest: an unknown option, or a missing argument, raises.
            command.make_context(name, words, parent=context)


@pytest.mark.parametrize("words", [(), ("node",), ("docker",), ("wasm",)], ids=" ".join)
def test_a_command_group_alone_shows_its_help(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 0
    out, err = capsys.readouterr()
    assert "Commands:\n" in out
    assert err == ""


def test_completion_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, sign in (("bash", "complete -o"), ("zsh", "#compdef bacalhau"), ("fish", "--command"),
                        ("powershell", "Register-ArgumentCompleter")):  # fmt: skip
        assert run(["completion", shell]) == 0
        assert sign in capsys.readouterr().out
    assert run(["completion", "cmd"]) == 2
