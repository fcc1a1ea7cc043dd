"""Enrolment: how a machine becomes a node. The orchestrator's side.

A node makes its NKey seed itself and sends the public key with a one-time token. Using up the
token and creating the Node are one commit, so a token works once, whoever races for it.
"""

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from bacalhau.nats.keys import check_public_key
from bacalhau_api.errors import ConflictError, ForbiddenError, InvalidError, Problem
from bacalhau_api.meta import ObjectMeta, Ref, check_name
from bacalhau_api.v1.node import Membership, Node, NodeSpec
from bacalhau_api.v1.token import JoinToken, JoinTokenSpec
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Delete, Put, Why

TOKEN_PREFIX = "bjt-"
TOKEN_TTL_SECONDS = 3600
_NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class JoinReply:
    """What a new node needs to connect: where NATS is, and whether it is approved already."""

    node: str
    nats_url: str
    is_approved: bool


def _token_ref(token: str) -> tuple[Ref, str]:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return Ref("JoinToken", "", digest[:16]), digest


class Enrolment:
    """Issues join tokens and turns them into nodes."""

    def __init__(
        self, state: State, clock: Clock, ids: Ids, *, nats_url: str, require_approval: bool = False
    ) -> None:
        self._state = state
        self._clock = clock
        self._ids = ids
        self.nats_url = nats_url
        self._require_approval = require_approval
        self.on_joined: Callable[[], Awaitable[object]] = _nothing
        """Called after a node was enrolled, before it is told so: lets it sign in."""

    async def create_token(
        self, *, node: str = "", ttl_seconds: int = TOKEN_TTL_SECONDS, actor: str = "user"
    ) -> str:
        """A new single-use token; only its digest is stored."""
        if not 1 <= ttl_seconds <= 7 * 24 * 3600:
            raise InvalidError(
                [Problem("ttlSeconds", "is out of range", str(ttl_seconds), "use 1 to 604800")]
            )
        if node:
            _check_node_name(node)
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        ref, digest = _token_ref(token)
        now = self._clock.now()
        spec = JoinTokenSpec(
            sha256=digest, expires_at=now + timedelta(seconds=ttl_seconds), node=node
        )
        meta = ObjectMeta(name=ref.name, namespace="", uid=self._ids.uid(), creation_timestamp=now)
        await self._drop_expired(actor)
        await self._state.commit(
            [Put(JoinToken(metadata=meta, spec=spec), 0)], Why(actor, "JoinTokenCreated")
        )
        return token

    async def join(self, token: str, node: str, public_key: str) -> JoinReply:
        """Enrol a node. Raises ForbiddenError for a bad token, ConflictError for a taken name,
        InvalidError for a key that is bad or another node's.

        Joining again with the same key is harmless and needs no token: the key is the identity.
        """
        _check_node_name(node)
        _check_public_key(public_key)
        existing = await self._state.store.get(Ref("Node", "", node))
        if isinstance(existing, Node):
            if existing.spec.public_key == public_key:
                return self._reply(existing)
            raise ConflictError(
                f"node {node} is enrolled already with another key",
                hint="choose another --name, or delete the old node first: "
                f"bacalhau delete node {node}",
            )
        ref, digest = _token_ref(token)
        found = await self._state.store.get(ref)
        if (
            not isinstance(found, JoinToken)
            or not secrets.compare_digest(found.spec.sha256, digest)
            or found.spec.expires_at <= self._clock.now()
            or (found.spec.node and found.spec.node != node)
        ):
            raise ForbiddenError(
                "the join token is not valid: unknown, used, expired, or for another node",
                hint="make a new one on the orchestrator: bacalhau node token",
            )
        if other := self._other_owner(node, public_key):
            problem = Problem("publicKey", f"is the key of node {other} already", public_key)
            raise InvalidError([problem], hint="join under that name, or with another --data-dir")
        created = self.new_node(node, public_key, is_approved=not self._require_approval)
        try:
            await self._state.commit(
                [Delete(ref, found.metadata.resource_version), Put(created, 0)],
                Why(f"node:{node}", "NodeJoined"),
            )
        except ConflictError as error:
            raise ForbiddenError("the join token was used a moment ago by another node") from error
        await self.on_joined()
        return self._reply(created)

    async def ensure(self, node: str, public_key: str) -> None:
        """Enrol the node that lives in the orchestrator's own process, without a token."""
        if other := self._other_owner(node, public_key):
            raise InvalidError(
                [Problem("--name", f"this data directory belongs to node {other}", node)],
                hint="give that name, or another --data-dir",
            )
        ref = Ref("Node", "", node)
        existing = await self._state.store.get(ref)
        if isinstance(existing, Node):
            if existing.spec.public_key == public_key:
                return
            raise ConflictError(
                f"node {node} is enrolled already with another key than the one in this data "
                "directory",
                hint=f"choose another --name, or delete it: bacalhau delete node {node}",
            )
        created = self.new_node(node, public_key, is_approved=True)
        await self._state.commit([Put(created, 0)], Why(f"node:{node}", "NodeJoined"))
        await self.on_joined()

    def new_node(self, node: str, public_key: str, *, is_approved: bool) -> Node:
        """The Node object of a machine that has just enrolled."""
        membership = Membership.APPROVED if is_approved else Membership.PENDING
        meta = ObjectMeta(
            name=node,
            namespace="",
            uid=self._ids.uid(),
            generation=1,
            creation_timestamp=self._clock.now(),
        )
        return Node(metadata=meta, spec=NodeSpec(membership=membership, public_key=public_key))

    def _other_owner(self, node: str, public_key: str) -> str:
        """The name of another node to which the key belongs; empty if there is none."""
        for owner in nodes_by_age(self._state.cache):
            if owner.spec.public_key == public_key:
                return owner.name if owner.name != node else ""
        return ""

    def _reply(self, node: Node) -> JoinReply:
        is_approved = node.spec.membership is Membership.APPROVED
        return JoinReply(node=node.name, nats_url=self.nats_url, is_approved=is_approved)

    async def _drop_expired(self, actor: str) -> None:
        now = self._clock.now()
        tokens = [t for t in self._state.cache.list("JoinToken") if isinstance(t, JoinToken)]
        dead = [t for t in tokens if t.spec.expires_at <= now][:100]
        if dead:
            await self._state.commit(
                [Delete(t.ref, t.metadata.resource_version) for t in dead],
                Why(actor, "JoinTokenExpired"),
            )


def nodes_by_age(cache: Cache) -> list[Node]:
    """All nodes, the oldest first. A key that several came by (two joined at once through two
    orchestrators) belongs to the first of them."""
    nodes = [node for node in cache.list("Node") if isinstance(node, Node)]
    return sorted(nodes, key=lambda node: (node.metadata.creation_timestamp or _NEVER, node.name))


async def _nothing() -> None:
    """Nobody needs to know."""


def _check_node_name(name: str) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise InvalidError([Problem("node", str(error), repr(name)[:80])]) from error


def _check_public_key(key: str) -> None:
    try:
        check_public_key(key)
    except ValueError as error:
        hint = "send the one that belongs to the node's seed"
        raise InvalidError([Problem("publicKey", str(error), repr(key)[:80], hint)]) from error
