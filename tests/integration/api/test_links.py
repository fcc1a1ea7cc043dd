"""Download links of published results, signed by a real signer and used against a real server."""

import asyncio
from pathlib import Path

import httpx
import pytest

from bacalhau.publishers.s3 import S3Publisher
from bacalhau.serve.links import LinkSigner
from bacalhau.transfer.s3 import S3Access
from bacalhau.transfer.threads import TransferThreads
from bacalhau_api.v1.execution import (
    Phase,
    Publication,
    PublicationPhase,
    PublicationReport,
    PublicationStatus,
)
from bacalhau_api.v1.job import JobPhase, SlotCounts, SpecConfig
from tests.support.api_objects import make_acceptance, make_execution, stored_job
from tests.support.api_server import RunningServer, Shell
from tests.support.outputs import make_outputs, publication_to, read_archive
from tests.support.s3 import ADMIN, S3Server

PATH = "/apis/bacalhau.org/v1/namespaces/default/publications"


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ADMIN[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN[1])


def delivered(publication: Publication, location: SpecConfig | None) -> Publication:
    """As it is stored once the node has said where the outputs are."""
    report = PublicationReport(
        step=1, incarnation="i", phase=PublicationPhase.DELIVERED, location=location
    )
    return publication.but(status=PublicationStatus(report=report))


def published(s3: S3Server, place: Path, encoding: str) -> Publication:
    """A publication that was really uploaded."""
    threads = TransferThreads()
    params = {"bucket": "data", "key": "r", "endpoint": s3.url, "encoding": encoding}
    publication = publication_to(SpecConfig(type="s3", params=params))
    publisher = S3Publisher(S3Access([s3.url]), threads)
    location = asyncio.run(publisher.publish(publication, make_outputs(place / "o" / "outputs")))
    threads.close()
    return delivered(publication, location)


def test_a_link_downloads_the_archive(
    s3: S3Server, server: RunningServer, http: httpx.Client, tmp_path: Path
) -> None:
    publication = published(s3, tmp_path, "gzip")
    server.put(publication)
    server.sign = LinkSigner(S3Access([s3.url]))
    answer = http.get(f"{PATH}/{publication.name}/link?seconds=60")
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    link = answer.json()["url"]
    assert answer.json()["seconds"] == 60
    assert ADMIN[1] not in link
    archive = httpx.get(link, trust_env=False)
    assert read_archive(archive.content)["stdout"] == b"hello\n"
    stored = http.get(f"{PATH}/{publication.name}").text
    assert "Signature" not in stored, "links are stored nowhere"


@pytest.mark.parametrize(
    ("query", "status"), [("?seconds=0", 400), ("?seconds=604801", 400), ("?seconds=x", 400)]
)
def test_how_long_a_link_lasts(
    server: RunningServer, http: httpx.Client, query: str, status: int
) -> None:
    publication = delivered(publication_to(SpecConfig(type="s3")), None)
    server.put(publication)
    assert http.get(f"{PATH}/{publication.name}/link{query}").status_code == status


def test_what_has_no_link(
    s3: S3Server, server: RunningServer, http: httpx.Client, tmp_path: Path
) -> None:
    server.sign = LinkSigner(S3Access([]))
    assert http.get(f"{PATH}/absent/link").status_code == 404
    plain = published(s3, tmp_path, "plain")
    url = f"{PATH}/{plain.name}/link"
    for location in (None, plain.status.report.location if plain.status.report else None):
        server.put(delivered(plain, location))
        assert http.get(url).status_code == 404
    local = SpecConfig(type="local", params={"node": "n"})
    server.put(delivered(plain, local))
    assert "one archive in S3" in http.get(url).json()["message"]
    elsewhere = SpecConfig(
        type="s3", params={"bucket": "b", "key": "k.tar.gz", "endpoint": "http://10.0.0.1"}
    )
    server.put(delivered(plain, elsewhere))
    assert "--s3-endpoint" in http.get(url).json()["message"]
    server.sign = None
    assert http.get(url).status_code == 503


def of_a_job(server: RunningServer, publication: Publication) -> Publication:
    """The same of a job that is there, with its execution and its accepted result."""
    job = stored_job("job", count=2, phase=JobPhase.COMPLETED)
    job = job.but(status=job.status.but(slots=SlotCounts(total=2, succeeded=1)))
    execution = make_execution(job, phase=Phase.SUCCEEDED)
    server.put(job, execution, make_acceptance(execution, job))
    spec = publication.spec.but(execution=execution.name, execution_uid=execution.metadata.uid)
    return publication.but(spec=spec).with_meta(name=execution.name)


def test_the_command_line_prints_links_that_work(
    s3: S3Server,
    server: RunningServer,
    shell: Shell,
    tmp_path: Path,
) -> None:
    publication = of_a_job(server, published(s3, tmp_path, "gzip"))
    server.put(publication)
    server.sign = LinkSigner(S3Access([s3.url]))
    name = publication.spec.job
    code, out, err = shell("download", name, "--links", "--expires", "90m")
    assert code == 0, err
    header, line = out.splitlines()
    assert header.split() == ["SLOT", "EXECUTION", "LINK"]
    slot, execution, link = line.split()
    assert (slot, execution) == ("0", publication.spec.execution)
    assert "X-Amz-Expires=5400" in link
    assert read_archive(httpx.get(link, trust_env=False).content)["stdout"] == b"hello\n"
    assert "1 of 2 slots have a result" in err
    assert "whoever has a link can download until" in err
    assert shell("download", f"execution/{execution}", "--links")[0] == 0
    for wrong in ("8d", "0s", "soon", "1.5d"):
        code, _, err = shell("download", name, "--links", "--expires", wrong)
        assert code == 2
        assert "--expires" in err


def test_the_command_line_says_why_there_is_no_link(
    s3: S3Server,
    server: RunningServer,
    shell: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.sign = LinkSigner(S3Access([s3.url]))
    publication = of_a_job(server, published(s3, tmp_path, "gzip"))
    name = publication.spec.job

    def told() -> str:
        code, out, err = shell("download", name, "--links")
        assert (code, out) == (1, "")
        return err

    assert "names no publisher" in told()
    server.put(delivered(publication, None))
    assert f"hint: bacalhau wait {name} --for delivered" in told()
    server.put(delivered(publication, SpecConfig(type="local", params={"node": "n"})))
    assert "the publisher s3 with the encoding gzip" in told()
    server.put(publication)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    server.sign = LinkSigner(S3Access([s3.url]))
    assert "the orchestrator has no S3 credentials" in told()
