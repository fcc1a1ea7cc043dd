"""The checked-in modules are what their sources give, to the byte."""

import shutil
from pathlib import Path

import pytest

from tools import build_wasm


@pytest.fixture(autouse=True)
def _needs_the_compiler() -> None:
    try:
        build_wasm.check_version()
    except RuntimeError as error:
        pytest.fail(str(error))


@pytest.mark.timeout(600)
def test_checked_in_modules_are_up_to_date() -> None:
    assert build_wasm.differing() == []


@pytest.mark.timeout(600)
def test_bytes_do_not_depend_on_the_directory(tmp_path: Path) -> None:
    source = tmp_path / "somewhere" / "else" / "hello.c"
    source.parent.mkdir(parents=True)
    shutil.copy(build_wasm.ROOT / "tests/programs/hello.c", source)
    build_wasm.build(source, tmp_path / "hello.wasm")
    checked_in = build_wasm.ROOT / "tests/programs/hello.wasm"
    assert (tmp_path / "hello.wasm").read_bytes() == checked_in.read_bytes()


def test_changed_source_is_noticed(tmp_path: Path) -> None:
    programs = tmp_path / "tests" / "programs"
    programs.mkdir(parents=True)
    for name in ("loop.c", "loop.wasm"):
        shutil.copy(build_wasm.ROOT / "tests/programs" / name, programs)
    assert build_wasm.differing(tmp_path) == []
    text = (programs / "loop.c").read_text()
    (programs / "loop.c").write_text(text.replace("looping", "turning"))
    assert build_wasm.differing(tmp_path) == [programs / "loop.wasm"]
