"""Outputs that stay on the node, from where the orchestrator serves them for download."""

import os
import stat
from pathlib import Path

from bacalhau_api.errors import TransientError
from bacalhau_api.v1.execution import Publication
from bacalhau_api.v1.job import SpecConfig
from bacalhau_controllers.runner.ports import Health, Progress


class LocalPublisher:
    """Delivers by having the outputs where they are. `node` is this node's name."""

    def __init__(self, node: str) -> None:
        self._node = node

    async def health(self) -> Health:
        """Needs nothing, so it is always there."""
        return Health(is_available=True)

    async def publish(self, publication: Publication, outputs: Path) -> SpecConfig:
        """Name the place. Raises TransientError if the directory is not there (a disk that is not
        mounted yet)."""
        try:
            is_directory = stat.S_ISDIR(os.lstat(outputs).st_mode)
        except OSError as error:
            raise TransientError(
                f"the outputs of {publication.spec.execution} cannot be read on {self._node}: "
                f"{error.strerror}"
            ) from error
        if not is_directory:
            raise TransientError(
                f"the outputs of {publication.spec.execution} on {self._node} are not a directory"
            )
        params = {"node": self._node, "execution": publication.spec.execution}
        return SpecConfig(type="local", params=params)

    def progress(self, uid: str) -> Progress | None:
        """None: nothing moves."""
        return None
