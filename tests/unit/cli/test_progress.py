"""What somebody who waits is shown: news, once each."""

from bacalhau.cli.progress import Told
from bacalhau_api.meta import Waiting
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.v1.job import JobPhase
from tests.support.api_objects import T0, make_execution, stored_job


def fetching(execution: Execution, words: str) -> Execution:
    waiting = Waiting(what="Inputs", message=words, since=T0, mover="node n1")
    report = execution.status.report
    assert report is not None
    return execution.but(status=execution.status.but(report=report.but(waiting=waiting)))


def test_what_was_shown_is_not_shown_again() -> None:
    lines: list[str] = []
    told = Told(lines.append)
    job = stored_job("a", count=2, phase=JobPhase.RUNNING)
    one, other = (make_execution(job, n, phase=Phase.PREPARING) for n in range(2))
    for words in ("10 of 64 MiB", "10 of 64 MiB", "20 of 64 MiB"):
        told.job(job)
        told.execution(fetching(one, words))
        told.execution(fetching(other, "something else"))
    assert lines == [
        "job/a Running",
        f"{one.name} Preparing: 10 of 64 MiB",
        f"{one.name} Preparing: 20 of 64 MiB",
    ]
    told.lost("http://x")
    told.job(job)
    assert lines[3:] == ["http://x does not answer; trying again", "job/a Running"]
