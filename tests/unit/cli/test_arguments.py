"""How words on the command line are understood."""

from pathlib import Path

import pytest

from bacalhau.cli.app import hoisted, run
from bacalhau.cli.files import read_documents
from bacalhau.cli.printer import LogPrinter
from bacalhau.cli.serving import (
    parse_allowed,
    parse_capacity,
    parse_labels,
    parse_orchestrator,
    parse_role,
)
from bacalhau.cli.targets import Target, job_name, parse_named, parse_targets
from bacalhau.kinds import EXECUTION, JOB, NODE
from bacalhau.replies import LogRecord
from bacalhau.settings import AllowedPath
from bacalhau_api.errors import InvalidError


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        (["jobs"], [Target(JOB)]),
        (["Job", "a", "b"], [Target(JOB, "a"), Target(JOB, "b")]),
        (["job/a", "node/n"], [Target(JOB, "a"), Target(NODE, "n")]),
        (["exec/x"], [Target(EXECUTION, "x")]),
        (["ex", "x"], [Target(EXECUTION, "x")]),
    ],
)
def test_targets(words: list[str], targets: list[Target]) -> None:
    assert parse_targets(words) == targets


@pytest.mark.parametrize(
    "words", [[], ["foo"], ["foo/a"], ["job/"], ["jobs", "node/n"], ["job/a", "b"]]
)
def test_bad_targets(words: list[str]) -> None:
    with pytest.raises(InvalidError):
        parse_targets(words)


def test_names_are_needed_where_one_object_is_meant() -> None:
    with pytest.raises(InvalidError, match="names no object"):
        parse_named(["jobs"])
    assert job_name("job/a") == job_name("a") == "a"
    with pytest.raises(InvalidError, match="not a job"):
        job_name("node/a")


def test_common_options_may_stand_anywhere() -> None:
    words = [
        "get",
        "jobs",
        "--server",
        "x",
        "-o",
        "json",
        "--debug",
        "--api-port=9",
        "--",
        "--server",
    ]
    assert hoisted(words) == [
        "--server", "x", "--debug", "--api-port=9", "get", "jobs", "-o", "json", "--", "--server",
    ]  # fmt: skip


HERE = "@here"


@pytest.mark.parametrize(
    ("role", "orchestrator", "compute", "expected"),
    [
        ("", "", False, "both"),
        ("", HERE, False, "orchestrator"),
        ("", "", True, "compute"),
        ("", HERE, True, "both"),
        ("", "http://x", False, "compute"),
        ("", "http://x", True, "compute"),
        ("orchestrator,compute", "", False, "both"),
        ("Compute", "http://x", False, "compute"),
        ("orchestrator", HERE, False, "orchestrator"),
    ],
)
def test_roles(role: str, orchestrator: str, compute: bool, expected: str) -> None:
    assert parse_role(role, orchestrator, compute, HERE) == expected


def test_roles_that_make_no_sense() -> None:
    with pytest.raises(InvalidError, match="--role"):
        parse_role("boss", "", False, HERE)
    with pytest.raises(InvalidError, match="--orchestrator"):
        parse_role("orchestrator", "http://x", False, HERE)
    with pytest.raises(InvalidError, match="needs an orchestrator"):
        parse_orchestrator("", "compute", HERE)
    assert parse_orchestrator("10.0.0.1", "compute", HERE) == "http://10.0.0.1:1234"


def test_allowed_paths() -> None:
    assert parse_allowed("/data/**") == AllowedPath("/data/**")
    assert parse_allowed("/data:rw") == AllowedPath("/data", writable=True)
    assert parse_allowed("/odd:name") == AllowedPath("/odd:name")
    with pytest.raises(InvalidError, match="absolute"):
        parse_allowed("data")


def test_labels_and_capacity() -> None:
    assert parse_labels(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    with pytest.raises(InvalidError, match="--label"):
        parse_labels(["a"])
    capacity = parse_capacity("1.5", "8GB", "", None, 3)
    assert (capacity.cpu_millis, capacity.memory_bytes, capacity.disk_bytes) == (
        1500,
        8 * 10**9,
        None,
    )
    with pytest.raises(InvalidError, match="--memory"):
        parse_capacity("", "much", "", None, None)


def test_log_lines_of_several_slots_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    printer = LogPrinter(with_prefix=True, is_raw=False)
    for slot, text in (("0", "one "), ("1", "uno\ndos "), ("0", "two\nthree"), ("1", "tres\n")):
        printer.show(LogRecord(execution=f"e{slot}", slot=slot, stream="stdout", text=text))
    printer.finish()
    assert capsys.readouterr().out == "[1] uno\n[0] one two\n[1] dos tres\n[0] three\n"


def test_another_attempt_of_a_slot_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    printer = LogPrinter(with_prefix=False, is_raw=False)
    for attempt in (0, 0, 1, 0):
        name = f"e{attempt}"
        printer.show(
            LogRecord(execution=name, slot="0", attempt=attempt, stream="stdout", text="x")
        )
    assert capsys.readouterr().err == "[e1] attempt 2 of slot 0\n[e0] attempt 1 of slot 0\n"


JOB_TEXT = "{apiVersion: bacalhau.org/v1, kind: Job, metadata: {name: NAME}, spec: {type: batch, tasks: [{name: main, engine: {type: noop}}]}}"


def test_files_of_a_directory_in_order(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yml", "c.json", "ignored.txt"):
        (tmp_path / name).write_text(JOB_TEXT.replace("NAME", name[0]))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/d.yaml").write_text(JOB_TEXT.replace("NAME", "d"))
    documents = read_documents([tmp_path], recursive=False)
    assert [d.resource.name for d in documents] == ["a", "b", "c"]
    documents = read_documents([tmp_path], recursive=True, namespace="team")
    assert [d.resource.name for d in documents] == ["a", "b", "c", "d"]
    assert {d.resource.metadata.namespace for d in documents} == {"team"}


def test_problems_of_all_files_come_together(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(JOB_TEXT.replace("batch", "bacth"))
    (tmp_path / "b.yaml").write_text("kind: [")
    with pytest.raises(InvalidError) as error:
        read_documents([tmp_path], recursive=False)
    assert "a.yaml" in str(error.value)
    assert "b.yaml" in str(error.value)
    with pytest.raises(InvalidError, match="cannot be read"):
        read_documents([tmp_path / "none.yaml"], recursive=False)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["get", "executions", "--node-dir"], 2),
        (["--server"], 2),
        (["plan", "-f", "x", "--server"], 1),  # its 2 means that something would change
    ],
)
def test_an_option_without_its_value_does_not_take_the_command_for_it(
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == code
    assert f"Option '{words[-1]}' requires an argument." in capsys.readouterr().err
