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
    Publication,
    PublicationPhase,
    PublicationReport,
    PublicationStatus,
)
from bacalhau_api.v1.job import SpecConfig
from tests.support.api_server import RunningServer
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
