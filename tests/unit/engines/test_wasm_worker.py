"""What a worker does at the end of its run."""

import socket
from pathlib import Path
from typing import Any, cast

import pytest

from bacalhau.engines.wasm import worker
from bacalhau.engines.wasm.records import End

END = End(0, 1.0)


def at_its_end(tmp_path: Path, *, is_over: bool) -> worker._Run:
    """A run that had a result and a shared directory to write to, and one to read."""
    preopens = []
    for name in ("outputs/r", "shared", "in"):
        (tmp_path / name).mkdir(parents=True)
        host = str(tmp_path / name)
        preopens.append({"host": host, "guest": f"/{name}", "writable": name != "in"})
    stdout = str(tmp_path / "outputs" / "stdout")
    job: dict[str, Any] = {"directory": str(tmp_path), "stdout": stdout, "preopens": preopens}
    nothing = cast("Any", None)
    run = worker._Run(job, cast("socket.socket", nothing), nothing, nothing)
    run._is_over = is_over
    return run


@pytest.mark.parametrize("is_over", [True, False])
def test_results_are_on_the_disk_before_the_end_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_over: bool
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(worker, "flush_tree", flushed.append)
    assert at_its_end(tmp_path, is_over=is_over)._with_synced_output(END) is END
    wanted = [tmp_path / "outputs" / "r"]
    assert flushed == (wanted if is_over else []), "one that is cut off is ended at once"


def test_a_result_that_cannot_be_flushed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(worker, "flush_tree", fail)
    end = at_its_end(tmp_path, is_over=True)._with_synced_output(END)
    assert (end.reason, end.is_system_fault) == ("EngineFault", True)
