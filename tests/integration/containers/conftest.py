"""A docker engine of the product over the session's real Docker Engine."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau.engines.docker import DockerEngine
from tests.support.docker_lab import Lab
from tests.support.dockerd import Dockerd


@pytest.fixture
async def lab(dockerd: Dockerd, tmp_path: Path) -> AsyncIterator[Lab]:
    """A place to run containers, emptied at the end."""
    lab = Lab(tmp_path, dockerd)
    yield lab
    await lab.close()


@pytest.fixture
async def engine(lab: Lab) -> DockerEngine:
    """An open engine."""
    return await lab.open()
