"""Plugs are found without being imported, by any letter case, and their absence is explained."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bacalhau import plugs
from bacalhau.engines.noop import NoopEngine
from bacalhau.engines.wasm import WasmEngine
from bacalhau.plugs import Plug
from bacalhau.publishers.local import LocalPublisher
from bacalhau.storages.inline import InlineStorage
from bacalhau.storages.local import LocalStorage
from bacalhau_api.errors import TerminalError

ROOT = Path(__file__).resolve().parents[2]


def test_all_that_is_declared_is_found() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for kind in ("engines", "storages", "publishers"):
        found = {p.name: p.value for p in plugs.plugs(kind).values()}
        assert found.items() >= points[f"bacalhau.{kind}"].items()


def test_loading() -> None:
    assert plugs.load("engines", "noop") is NoopEngine
    assert plugs.load("engines", " WASM ") is WasmEngine
    assert plugs.load("storages", "Local") is LocalStorage
    assert plugs.load("storages", "inline") is InlineStorage
    assert plugs.load("publishers", "local") is LocalPublisher


def test_unknown_name() -> None:
    with pytest.raises(TerminalError, match=r"no engine named 'podman'; known: .*noop.*wasm"):
        plugs.load("engines", "podman")


@pytest.mark.parametrize(
    ("value", "reason", "words"),
    [
        ("not_installed_here:Thing", "PlugMissing", "needs the Python package not_installed_here"),
        ("bacalhau.engines.noop:Missing", "PlugBroken", "is broken"),
    ],
)
def test_plug_that_cannot_be_loaded(value: str, reason: str, words: str) -> None:
    with pytest.raises(TerminalError, match=words) as caught:
        Plug("engines", "x", value, "some-package").load()
    assert caught.value.reason == reason


def test_finding_imports_nothing() -> None:
    code = (
        "import sys; from bacalhau import plugs; plugs.plugs('engines');"
        "print([m for m in sys.modules if m.startswith('bacalhau.engines') or m == 'wasmtime'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'api'}:{ROOT / 'controllers'}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]"


def test_fork_server_stays_small() -> None:
    """It imports neither pydantic nor asyncio, and the agent's part does not import wasmtime."""
    code = (
        "import sys; import bacalhau.engines.wasm.zygote;"
        "print([m for m in ('pydantic', 'asyncio', 'numpy', 'bacalhau_api') if m in sys.modules])"
    )
    other = (
        "import sys; from bacalhau.engines.wasm import WasmEngine; print('wasmtime' in sys.modules)"
    )
    for program, expected in ((code, "[]"), (other, "False")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'api'}:{ROOT / 'controllers'}"},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.strip() == expected
