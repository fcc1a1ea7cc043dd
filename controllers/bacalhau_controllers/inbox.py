"""Facts on their way from the gateway to the reconciler that stores them.

A fact is offered by the gateway and waits here under the key of the object it speaks of. The
reconciler of that object takes all waiting facts of the key at once, commits what they change, and
only then settles them, which lets the gateway acknowledge. The inbox is bounded, per node and in
total: beyond that an offer is refused, and the node sends the fact again later.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bacalhau_api.errors import TransientError, UnavailableError
from bacalhau_api.meta import Ref
from bacalhau_api.wire import Fact

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """One fact that somebody waits for. `node` is the authenticated sender."""

    node: str
    incarnation: str
    fact: Fact
    settled: asyncio.Future[None]


class FactInbox:
    """Waiting facts of executions and publications. Open only while this process leads.

    An offer is given up sooner than a node's request for an acknowledgement: else one fact that
    cannot be stored would keep all others of its batch from being acknowledged.
    """

    def __init__(
        self,
        *,
        per_node_max: int = 1000,
        total_max: int = 50_000,
        offer_timeout_seconds: float = 8.0,
    ) -> None:
        self._per_node_max = per_node_max
        self._total_max = total_max
        self._offer_timeout_seconds = offer_timeout_seconds
        self._offers: dict[Ref, dict[Offer, None]] = {}
        self._per_node: dict[str, int] = {}
        self._wakers: dict[str, Callable[[Ref], None]] = {}
        self.depth = 0
        self.offered = 0
        self.refused = 0
        self.obsolete = 0

    def open(self, kind: str, wake: Callable[[Ref], None]) -> None:
        """Accept facts about one kind (Execution or Publication); `wake` is called with the key of
        each."""
        self._wakers[kind] = wake

    def close(self, kind: str) -> None:
        """Accept no more facts about a kind, and send those that wait back to their nodes."""
        self._wakers.pop(kind, None)
        error = UnavailableError("this orchestrator does not lead any more")
        for ref in [ref for ref in self._offers if ref.kind == kind]:
            self.fail(self.waiting(ref), error)

    async def offer(self, node: str, incarnation: str, fact: Fact) -> None:
        """Return once the fact is stored, or found to be obsolete.

        Raises TransientError if it was not stored, in which case it is to be offered again. A
        caller that gives up may cancel: the fact may or may not be stored then.
        """
        ref = subject_of(fact)
        if ref is None:
            self.obsolete += 1
            logger.warning(
                "Dropped fact without exactly one report", extra={"node": node, "seq": fact.seq}
            )
            return
        wake = self._admit(ref, node)
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        offer = Offer(node, incarnation, fact, settled)
        self._offers.setdefault(ref, {})[offer] = None
        self._per_node[node] = self._per_node.get(node, 0) + 1
        self.depth += 1
        self.offered += 1
        try:
            wake(ref)
            async with asyncio.timeout(self._offer_timeout_seconds):
                await settled
        except TimeoutError as error:
            raise UnavailableError(
                f"the fact about {ref} was not stored within {self._offer_timeout_seconds} s"
            ) from error
        finally:
            self._remove(ref, offer)

    def waiting(self, ref: Ref) -> tuple[Offer, ...]:
        """The facts that wait for one object, in the order of their arrival."""
        return tuple(self._offers.get(ref, ()))

    def settle(self, offers: Sequence[Offer]) -> None:
        """Say that these facts are stored."""
        for offer in offers:
            if not offer.settled.done():
                offer.settled.set_result(None)
            self._forget(offer)

    def drop(self, offers: Sequence[Offer], reason: str) -> None:
        """Say that these facts speak of nothing that exists. They are never applied."""
        for offer in offers:
            if not offer.settled.done():
                self.obsolete += 1
                fact = offer.fact
                logger.warning(
                    "Dropped obsolete fact",
                    extra={
                        "node": offer.node,
                        "object": str(subject_of(fact)),
                        "uid": fact.uid,
                        "seq": fact.seq,
                        "reason": reason,
                    },
                )
        self.settle(offers)

    def fail(self, offers: Sequence[Offer], error: TransientError) -> None:
        """Say that these facts could not be stored now; their nodes send them again."""
        for offer in offers:
            if not offer.settled.done():
                offer.settled.set_exception(error)
            self._forget(offer)

    def _admit(self, ref: Ref, node: str) -> Callable[[Ref], None]:
        wake = self._wakers.get(ref.kind)
        if wake is None:
            self.refused += 1
            raise UnavailableError("this orchestrator does not lead now")
        if self._per_node.get(node, 0) >= self._per_node_max:
            self.refused += 1
            raise UnavailableError(
                f"{self._per_node_max} facts of node {node} wait to be stored already",
                hint="send them again later",
            )
        if self.depth >= self._total_max:
            self.refused += 1
            raise UnavailableError(
                f"{self._total_max} facts wait to be stored already", hint="send them again later"
            )
        return wake

    def _forget(self, offer: Offer) -> None:
        ref = subject_of(offer.fact)
        if ref is not None:
            self._remove(ref, offer)

    def _remove(self, ref: Ref, offer: Offer) -> None:
        group = self._offers.get(ref)
        if group is None or offer not in group:
            return
        del group[offer]
        if not group:
            del self._offers[ref]
        self.depth -= 1
        self._per_node[offer.node] -= 1
        if not self._per_node[offer.node]:
            del self._per_node[offer.node]


def split_offers(
    offers: Sequence[Offer], uid: str, node: str
) -> tuple[tuple[Offer, ...], tuple[Offer, ...]]:
    """Those that speak of the object with this uid and come from the node that it belongs to, and
    the others."""
    mine = tuple(o for o in offers if o.fact.uid == uid and o.node == node)
    return mine, tuple(o for o in offers if o.fact.uid != uid or o.node != node)


def subject_of(fact: Fact) -> Ref | None:
    """The object a fact speaks of; None for one that carries not exactly one report."""
    if (fact.execution is None) == (fact.publication is None):
        return None
    kind = "Publication" if fact.execution is None else "Execution"
    return Ref(kind, fact.namespace, fact.name)
