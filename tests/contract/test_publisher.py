"""What every publisher must do."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bacalhau.publishers.local import LocalPublisher
from bacalhau.publishers.s3 import S3Publisher
from bacalhau.transfer.s3 import S3Access
from bacalhau.transfer.threads import TransferThreads
from bacalhau_api.errors import BacalhauError, TransientError
from bacalhau_api.v1.job import SpecConfig
from bacalhau_controllers.runner.ports import Publisher
from tests.support.outputs import make_outputs, publication_to, read_archive
from tests.support.s3 import ADMIN, S3Server


@dataclass
class Rig:
    """A publisher, where it is told to publish, and a way to read what is there."""

    publisher: Publisher
    target: SpecConfig
    read: Callable[[SpecConfig], dict[str, bytes] | None]


@asynccontextmanager
async def local_rig(place: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    yield Rig(LocalPublisher("node"), SpecConfig(type="local"), lambda location: None)


@asynccontextmanager
async def s3_rig(place: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    server: S3Server = request.getfixturevalue("s3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", ADMIN[0])
        patch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN[1])
        threads = TransferThreads()
        params = {"bucket": "data", "key": "results/{executionID}", "endpoint": server.url}
        yield Rig(
            S3Publisher(S3Access([server.url]), threads),
            SpecConfig(type="s3", params=params),
            lambda location: read_archive(server.get(location.params["key"])),
        )
        threads.close()


RIGS: dict[str, Callable[[Path, pytest.FixtureRequest], AbstractAsyncContextManager[Rig]]] = {
    "local": local_rig,
    "s3": s3_rig,
}


@pytest.fixture(params=RIGS)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with RIGS[request.param](tmp_path, request) as rig:
        yield rig


async def test_what_every_publisher_does(rig: Rig, tmp_path: Path) -> None:
    assert (await rig.publisher.health()).is_available
    outputs = make_outputs(tmp_path / "execution" / "outputs")
    publication = publication_to(rig.target)
    location = await rig.publisher.publish(publication, outputs)
    assert location.type == rig.target.type
    found = rig.read(location)
    if found is not None:
        assert found == {
            "stdout": b"hello\n", "stderr": b"", "exitCode": b"0", "tables/a.csv": b"a,b\n1,2\n",
        }  # fmt: skip
    # Publishing twice says and leaves the same.
    assert await rig.publisher.publish(publication, outputs) == location
    assert rig.read(location) == found
    # Outputs that are not there: a disk that is not mounted yet.
    with pytest.raises(TransientError) as caught:
        await rig.publisher.publish(publication, tmp_path / "absent" / "outputs")
    assert isinstance(caught.value, BacalhauError)
