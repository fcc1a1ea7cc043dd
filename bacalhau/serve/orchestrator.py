"""The orchestrator: NATS, store, cache, reconcilers, the gateway to nodes, and the API."""

import asyncio
import logging
import random
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from bacalhau.enrolment import Enrolment, nodes_by_age
from bacalhau.gitops.watched import run_sources
from bacalhau.nats.connection import Connection, Credentials
from bacalhau.nats.departures import Departures
from bacalhau.nats.endpoint import NodeEndpoint
from bacalhau.nats.external import check_external
from bacalhau.nats.keys import write_private
from bacalhau.nats.server import EmbeddedNats, NatsSettings, NodeUser
from bacalhau.serve.links import LinkSigner
from bacalhau.serve.parts import OnFailure, run_beside
from bacalhau.server.access import access_for, load_tokens
from bacalhau.server.app import ApiServer, create_app
from bacalhau.server.ports import Services
from bacalhau.settings import ServeSettings
from bacalhau.store.jetstream import JetStreamStore
from bacalhau.store.mark import HighWaterMark
from bacalhau.transfer.s3 import S3Access
from bacalhau.version import VERSION
from bacalhau_api.errors import BacalhauError
from bacalhau_api.meta import Resource
from bacalhau_api.v1.node import Node
from bacalhau_controllers.cache import Cache, Informer
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.execution import ExecutionReconciler
from bacalhau_controllers.gateway import Gateway, GatewaySettings
from bacalhau_controllers.gitops import ClaimReconciler
from bacalhau_controllers.inbox import FactInbox
from bacalhau_controllers.job import JobReconciler, JobSettings
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.manifest import ManifestReconciler, PinDesk
from bacalhau_controllers.manifest.reconciler import KINDS as MANIFEST_KINDS
from bacalhau_controllers.node import NodeReconciler
from bacalhau_controllers.node.presence import Presence
from bacalhau_controllers.publishing import PublishingReconciler
from bacalhau_controllers.retention import (
    HistoryReconciler,
    RetentionReconciler,
    history_seconds,
    namespace_key,
)
from bacalhau_controllers.state import State
from bacalhau_controllers.waitages import WaitAges

logger = logging.getLogger(__name__)

SYNC_TIMEOUT_SECONDS = 60.0
USERS_RETRY_SECONDS = 1.0


class Orchestrator:
    """One orchestrator. Enter to start; leaving stops it, and everything it started."""

    def __init__(
        self, settings: ServeSettings, clock: Clock, ids: Ids, on_failure: OnFailure
    ) -> None:
        self._settings = settings
        self._on_failure = on_failure
        self._clock = clock
        self._ids = ids
        self._parts = AsyncExitStack()
        self._embedded: EmbeddedNats | None = None
        self.api_url = ""
        self.nats_url = settings.nats_url
        self.enrolment: Enrolment

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as parts:
            await self._start(parts)
            self._parts = parts.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._parts.aclose()

    async def _start(self, parts: AsyncExitStack) -> None:
        settings, clock = self._settings, self._clock
        tokens: dict[str, str] = {}
        if settings.api_token_file is not None:
            tokens, fresh = load_tokens(settings.api_token_file)
            if fresh is not None:
                print(f"API token for user admin, shown this once: {fresh}", flush=True)
        access = access_for(settings.listen_host, tokens, insecure_lab=settings.insecure_lab)

        nats = await self._connect(parts)
        cache = Cache()
        store = JetStreamStore(
            nats, clock, self._ids, history_seconds_of=lambda name: history_seconds(cache, name)
        )
        found = await store.open()
        parts.push_async_callback(store.close)
        mark = HighWaterMark(settings.data_dir / "store.mark")
        if not settings.relaxed_durability:
            mark.check(found)

        # Users' writes do not depend on who leads, so the API has a state without the fence.
        own, shared = State(store, cache), State(store, cache)
        self.enrolment = Enrolment(
            shared,
            clock,
            self._ids,
            nats_url=self.nats_url,
            require_approval=settings.require_approval,
        )
        endpoint = NodeEndpoint(nats)
        silent = settings.node_timeout_seconds
        presence = Presence(clock, beat_timeout_seconds=silent, grace_seconds=2 * silent)
        inbox = FactInbox()
        beats = GatewaySettings(beat_seconds=silent / 3, duplicate_seconds=silent)
        gateway = Gateway(cache, inbox, presence, endpoint, clock, beats)

        desk = PinDesk(own, clock, lambda node, session: gateway.session_of(node) == session)

        async def lead() -> None:
            gateway.open()
            await endpoint.open(gateway, desk)

        async def follow() -> None:
            await endpoint.close()
            await gateway.close()

        manager = Manager(
            own,
            clock,
            random.Random(),
            holder=self._holder(),
            on_started_leading=lead,
            on_stopped_leading=follow,
        )
        job_settings = JobSettings(stop_seconds_min=silent)
        ages = WaitAges(clock)
        manager.add(JobReconciler(own, clock, settings=job_settings, ages=ages), "Job")
        manager.add(ExecutionReconciler(own, clock, inbox, presence, ages), "Execution")
        manager.add(PublishingReconciler(own, clock, inbox, presence), "Publication")
        manager.add(NodeReconciler(own, clock, presence), "Node")
        for kind in MANIFEST_KINDS:
            manager.add(ManifestReconciler(own, kind), kind)
        manager.add(RetentionReconciler(own, clock), "Job", key=namespace_key)
        manager.add(HistoryReconciler(own, clock, store), "Namespace")
        manager.add(ClaimReconciler(own, clock), "Claim")

        def gauges() -> Mapping[str, float]:
            return {"leader": float(manager.is_leader.is_set()), "facts_waiting": inbox.depth} | {
                f"work_queue_depth_{name}": controller.queue.depth
                for name, controller in manager.controllers.items()
            }

        app = create_app(
            Services(
                state=shared,
                nodes=endpoint,
                enrolment=self.enrolment,
                clock=clock,
                ids=self._ids,
                version=VERSION,
                gauges=gauges,
                sign=LinkSigner(S3Access(settings.transfers.s3_endpoints)),
                is_ready=lambda: cache.is_synced and nats.is_connected,
                job_settings=job_settings,
            ),
            access,
        )
        api = ApiServer(app, settings.listen_host, settings.listen_port)
        port = api.bind()
        host = f"[{settings.listen_host}]" if ":" in settings.listen_host else settings.listen_host
        self.api_url = f"http://{host}:{port}"

        informer = Informer(store, cache, clock, random.Random())
        self._beside(parts, "informer", informer.run())
        async with asyncio.timeout(SYNC_TIMEOUT_SECONDS):
            await cache.wait_synced()
        self._beside(parts, "store mark", mark.keep(lambda: cache.cursor, clock))
        if self._embedded is not None:
            users = _NodeUsers(self._embedded, cache)
            await users.apply()
            self.enrolment.on_joined = users.apply
            self._beside(parts, "node users", users.run())
            system = Connection(
                self._embedded.url, self._embedded.system_credentials, name="departures"
            )
            await system.open()
            parts.push_async_callback(system.close)

            def on_gone(key: str) -> None:
                if (node := users.name_of(key)) is not None:
                    presence.gone(node)

            self._beside(parts, "departures", Departures(system, on_gone).run())
        self._beside(parts, "manager", manager.run())
        parts.push_async_callback(manager.close)
        sources = await run_sources(
            settings.gitops, store, cache, clock, self._ids, holder=self._holder()
        )
        for name, source in sources.items():
            self._beside(parts, f"source {name}", source.run())
            parts.push_async_callback(source.close)
        serving = self._beside(parts, "api", api.run_until_told())

        async def end_api() -> None:
            api.should_exit = True
            await asyncio.wait([serving])

        parts.push_async_callback(end_api)

    def _beside(
        self, parts: AsyncExitStack, name: str, work: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None]:
        return run_beside(parts, name, work, self._on_failure)

    def _holder(self) -> str:
        """Who this is in the lease: the same after a restart on the same data, which nobody else
        uses meanwhile, so that a killed orchestrator need not wait for its own lease to expire."""
        path = self._settings.data_dir / "orchestrator.id"
        if not path.exists():
            write_private(path, self._ids.uid())
        return path.read_text().strip()

    async def _connect(self, parts: AsyncExitStack) -> Connection:
        """The embedded server, started, or the given one."""
        settings = self._settings
        if settings.nats_url:
            connection = Connection(settings.nats_url, Credentials(), name="orchestrator")
        else:
            self._embedded = EmbeddedNats(
                NatsSettings(
                    data_dir=settings.data_dir / "nats",
                    host=settings.nats_host,
                    port=max(settings.nats_port, 0),
                    relaxed=settings.relaxed_durability,
                )
            )
            await self._embedded.start()
            parts.push_async_callback(self._embedded.stop)
            self._beside(parts, "nats", self._embedded.supervised())
            self.nats_url = self._embedded.node_url
            connection = Connection(
                self._embedded.url, self._embedded.credentials, name="orchestrator"
            )
        await connection.open()
        parts.push_async_callback(connection.close)
        if self._embedded is None:
            await check_external(connection)
        return connection


class _NodeUsers:
    """Keeps the embedded server's users in step with the Node objects."""

    def __init__(self, server: EmbeddedNats, cache: Cache) -> None:
        self._server = server
        self._cache = cache
        self._changed = asyncio.Event()
        self._applied: list[NodeUser] | None = None
        self._lock = asyncio.Lock()
        self._names: dict[str, str] = {}
        cache.observe(self._on_change)

    def name_of(self, public_key: str) -> str | None:
        """The node that signs in with this key."""
        return self._names.get(public_key)

    def _on_change(self, old: Resource | None, new: Resource | None) -> None:
        if not isinstance(new or old, Node):
            return
        keys = [n.spec.public_key if isinstance(n, Node) else "" for n in (old, new)]
        if keys[0] != keys[1]:
            self._changed.set()

    async def run(self) -> None:
        """Apply each change, for ever."""
        while True:
            await self._changed.wait()
            if not await self.apply():
                await asyncio.sleep(USERS_RETRY_SECONDS)

    async def apply(self) -> bool:
        """Tell the server who may connect now. False if it did not take that: `run` tries again."""
        async with self._lock:
            self._changed.clear()
            nodes = [node for node in nodes_by_age(self._cache) if node.spec.public_key]
            wanted = [NodeUser(node.name, node.spec.public_key) for node in nodes]
            if wanted == self._applied:
                return True
            try:
                users = await self._server.set_nodes(wanted)
            except BacalhauError as error:
                logger.error("Failed to set node users", extra={"error": error.message})
                self._changed.set()
                return False
            self._applied = wanted
            self._names = {user.public_key: user.name for user in users}
            return True
