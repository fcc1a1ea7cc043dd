"""The local publisher delivers by naming where the outputs are."""

from pathlib import Path

import pytest

from bacalhau.publishers.local import LocalPublisher
from bacalhau_api.errors import TransientError
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.execution import Publication, PublicationSpec, Slot
from bacalhau_api.v1.job import SpecConfig

PUBLICATION = Publication(
    metadata=ObjectMeta(name="job-0123abcd-1-0-0"),
    spec=PublicationSpec(
        job="job",
        job_uid="0123abcd" * 4,
        execution="job-0123abcd-1-0-0",
        execution_uid="4567cdef" * 4,
        node="edge-1",
        slot=Slot(generation=1),
        publisher=SpecConfig(type="local"),
    ),
)


async def test_outputs_are_where_they_were(tmp_path: Path) -> None:
    publisher = LocalPublisher("edge-1")
    assert (await publisher.health()).is_available
    first = await publisher.publish(PUBLICATION, tmp_path)
    params = {"node": "edge-1", "execution": "job-0123abcd-1-0-0"}
    assert first == SpecConfig(type="local", params=params)
    assert await publisher.publish(PUBLICATION, tmp_path) == first


@pytest.mark.parametrize("what", ["absent", "file", "link"])
async def test_outputs_that_are_not_there(tmp_path: Path, what: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(TransientError, match="outputs of job-0123abcd-1-0-0"):
        await LocalPublisher("edge-1").publish(PUBLICATION, tmp_path / what)
