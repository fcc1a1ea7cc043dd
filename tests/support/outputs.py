"""Outputs of an execution on disk, and the publication that carries them somewhere."""

import io
import tarfile
from datetime import UTC, datetime
from pathlib import Path

from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.execution import Publication, PublicationSpec, Slot
from bacalhau_api.v1.job import SpecConfig

MADE = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


def make_outputs(place: Path, extra: dict[str, bytes] | None = None) -> Path:
    """The directory of an execution that ended, with one result."""
    files = {
        "stdout": b"hello\n", "stderr": b"", "exitCode": b"0", "tables/a.csv": b"a,b\n1,2\n",
    }  # fmt: skip
    for name, data in {**files, **(extra or {})}.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return place


def publication_to(target: SpecConfig, *, partition: int = 2) -> Publication:
    """The publication of partition `partition` of a job."""
    name = f"job-0123abcd-1-{partition}-0"
    return Publication(
        metadata=ObjectMeta(name=name, uid="89ab" * 8, creation_timestamp=MADE),
        spec=PublicationSpec(
            job="job",
            job_uid="0123abcd" * 4,
            execution=name,
            execution_uid="4567cdef" * 4,
            node="edge-1",
            slot=Slot(generation=1, partition=partition),
            publisher=target,
        ),
    )


def read_archive(data: bytes) -> dict[str, bytes]:
    """The files in a tar.gz, by path, in their order there."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            found[info.name] = file.read()
    return found
