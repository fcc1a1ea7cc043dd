"""Servers that several tests share: started when the first test asks, stopped after the last."""

from collections.abc import Iterator

import pytest

from tests.support.dockerd import Dockerd, running_dockerd
from tests.support.s3 import S3Server, s3_server


@pytest.fixture(scope="session")
def running_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, as other tests left it."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(running_s3: S3Server) -> S3Server:
    """A real S3 server with an empty bucket `data`."""
    running_s3.clear()
    return running_s3


@pytest.fixture(scope="session")
def dockerd() -> Iterator[Dockerd]:
    """A real Docker Engine of our own, started when the first test asks for it."""
    with running_dockerd() as engine:
        yield engine
