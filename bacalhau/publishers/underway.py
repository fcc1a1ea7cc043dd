"""Which publications are under way, and how far each is."""

from collections.abc import Iterator
from contextlib import contextmanager

from bacalhau.transfer.progress import Transfer
from bacalhau_api.v1.execution import Publication
from bacalhau_controllers.runner.ports import Progress


class UnderWay:
    """The transfers of one publisher, by the uid of the publication."""

    def __init__(self) -> None:
        self._transfers: dict[str, Transfer] = {}

    @contextmanager
    def begin(self, publication: Publication) -> Iterator[Transfer]:
        """A transfer, for the duration of the block."""
        uid, transfer = publication.metadata.uid, Transfer()
        self._transfers[uid] = transfer
        try:
            yield transfer
        finally:
            if self._transfers.get(uid) is transfer:
                del self._transfers[uid]

    def progress(self, uid: str) -> Progress | None:
        """Bytes of outputs that were taken up for sending, and all of them. The last few are on
        their way still. None if it is not under way."""
        transfer = self._transfers.get(uid)
        if transfer is None:
            return None
        total = transfer.total
        # A tar has headers as well: more than all would look odd.
        done = transfer.done if total is None else min(transfer.done, total)
        return Progress(done, total)
