"""Signs download links with the credentials of this orchestrator, if it has any."""

import asyncio

from bacalhau.publishers.s3 import presigned_link
from bacalhau.transfer.s3 import S3Access
from bacalhau_api.errors import NotFoundError, TerminalError
from bacalhau_api.v1.job import SpecConfig

SIGN_SECONDS = 20.0
"""The first time this machine may be asked for its role."""


class LinkSigner:
    """Callable as `bacalhau.server.ports.SignLink`."""

    def __init__(self, access: S3Access) -> None:
        self._access = access

    async def __call__(self, location: SpecConfig, seconds: int) -> str:
        """A link. Raises NotFoundError for what has none."""
        try:
            async with asyncio.timeout(SIGN_SECONDS):
                return await asyncio.to_thread(presigned_link, self._access, location, seconds)
        except TerminalError as error:
            raise NotFoundError(error.message) from error
