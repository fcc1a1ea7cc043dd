"""The compute node: identity, enrolment, engines, ledger, link, and the agent over them."""

import asyncio
import json
import logging
import os
import platform
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from bacalhau import plugs
from bacalhau.enrolment import Enrolment
from bacalhau.nats.connection import Connection, Credentials
from bacalhau.nats.keys import load_or_make_seed, public_key, write_private
from bacalhau.nats.subjects import node_inbox
from bacalhau.node.ledger import SqliteLedger
from bacalhau.node.link import NatsLink
from bacalhau.node.machine import boot_id, detect_capacity
from bacalhau.node.reader import OutputReader
from bacalhau.node.workspace import DiskWorkspace
from bacalhau.replies import JoinAnswer
from bacalhau.serve.parts import OnFailure, run_beside
from bacalhau.settings import ServeSettings
from bacalhau.version import VERSION
from bacalhau_api.errors import (
    BacalhauError,
    InvalidError,
    Problem,
    TransientError,
    UnavailableError,
)
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.runner.admission import Policy
from bacalhau_controllers.runner.agent import Agent
from bacalhau_controllers.runner.ports import Engine, Publisher, Storage
from bacalhau_controllers.runner.site import AgentSettings

logger = logging.getLogger(__name__)

JOIN_RETRY_SECONDS = 2.0
JOIN_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Membership:
    """Where this node belongs, kept in its data directory: it needs no token again."""

    name: str
    nats_url: str


class Compute:
    """One compute node. Enter to start; leaving stops it. Workloads go on if so told."""

    def __init__(
        self,
        settings: ServeSettings,
        name: str,
        clock: Clock,
        ids: Ids,
        enrolment: Enrolment | None,
        on_failure: OnFailure,
    ) -> None:
        self._on_failure = on_failure
        self._settings = settings
        self._name = name
        self._clock = clock
        self._ids = ids
        self._enrolment = enrolment
        # Without symbolic links: engines refuse mounts that go through one.
        self._data = settings.data_dir.resolve() / "node"
        self._parts = AsyncExitStack()
        self.agent: Agent | None = None

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
        self._data.mkdir(parents=True, exist_ok=True, mode=0o700)
        seed = load_or_make_seed(self._data / "node.seed")
        nats_url = await self._enrol(public_key(seed))
        connection = Connection(
            nats_url,
            Credentials(seed=seed),
            inbox_prefix=node_inbox(self._name),
            name=f"node {self._name}",
        )
        # Without waiting: a node that restarts while it is cut off takes up its work at once.
        await connection.open(timeout=None)
        parts.push_async_callback(connection.close)
        workspace = DiskWorkspace(self._data, self._clock)
        reader = OutputReader(workspace, self._clock)
        link = NatsLink(self._name, connection, reader)
        await link.open()
        parts.push_async_callback(link.close)
        self.agent = Agent(
            self._name,
            SqliteLedger(self._data / "ledger.db", self._clock, self._ids),
            self._engines(),
            self._storages(),
            self._publishers(),
            workspace,
            link,
            self._clock,
            random.Random(),
            self._ids,
            self._agent_settings(),
        )
        reader.bind(self.agent)
        await self._run(parts, self.agent)

    async def _run(self, parts: AsyncExitStack, agent: Agent) -> None:
        """Run the agent; return once it has taken up what an earlier life left."""

        async def close() -> None:
            await agent.close(keep_running=self._settings.on_exit == "keep")

        parts.push_async_callback(close)
        task = run_beside(parts, "agent", agent.run(), self._on_failure)
        recovered = asyncio.create_task(agent.recovered())
        await asyncio.wait({task, recovered}, return_when=asyncio.FIRST_COMPLETED)
        recovered.cancel()
        if task.done():
            task.result()

    # -- identity --------------------------------------------------------------------------------

    async def _enrol(self, key: str) -> str:
        """Where this node's NATS is. Enrols it the first time."""
        settings = self._settings
        if self._enrolment is not None:
            await self._enrolment.ensure(self._name, key)
            return self._enrolment.nats_url
        kept = self._read_membership()
        if kept is not None and (kept.name == self._name):
            return settings.nats_url or kept.nats_url
        if kept is not None:
            raise InvalidError(
                [Problem("--name", f"this data directory belongs to node {kept.name}", self._name)],
                hint="give that name, or another --data-dir",
            )
        if not settings.orchestrator_url or not settings.join_token:
            raise InvalidError(
                [Problem("--token", "this node has not joined an orchestrator yet")],
                hint="make a token on the orchestrator with `bacalhau node token`, then: bacalhau "
                "serve --role compute --orchestrator URL --token TOKEN",
            )
        reply = await self._join(key)
        nats_url = settings.nats_url or reply.nats_url
        text = json.dumps({"name": self._name, "natsUrl": nats_url})
        write_private(self._data / "membership.json", text)
        logger.info("Joined", extra={"node": self._name, "nats": nats_url})
        return nats_url

    def _read_membership(self) -> _Membership | None:
        try:
            data = json.loads((self._data / "membership.json").read_text())
            return _Membership(data["name"], data["natsUrl"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidError(
                [Problem(str(self._data / "membership.json"), "cannot be read")],
                hint="delete it and join again with a new token",
            ) from error

    async def _join(self, key: str) -> JoinAnswer:
        """Ask the orchestrator to enrol us, patiently while it cannot be reached."""
        from bacalhau.client import AsyncClient

        settings = self._settings
        async with AsyncClient(settings.orchestrator_url) as client:
            deadline = self._clock.monotonic() + JOIN_TIMEOUT_SECONDS
            while True:
                try:
                    return await client.join(settings.join_token, self._name, key)
                except TransientError as error:
                    if self._clock.monotonic() > deadline:
                        raise UnavailableError(
                            f"could not join through {settings.orchestrator_url}: {error.message}",
                            hint="is the orchestrator running, and can this machine reach it?",
                        ) from error
                await self._clock.sleep(JOIN_RETRY_SECONDS)

    # -- plugs -----------------------------------------------------------------------------------

    def _engines(self) -> dict[str, Engine]:
        return {
            name: make(self._data / "engines" / name, self._clock)
            for name, make in _loaded("engines").items()
        }

    def _storages(self) -> dict[str, Storage]:
        allowed = self._settings.allow_paths
        arguments: dict[str, dict[str, Any]] = {
            "local": {"allowed": allowed, "private": (self._settings.data_dir,)}
        }
        found = {n: make(**arguments.get(n, {})) for n, make in _loaded("storages").items()}
        if "local" in found:
            found["localdirectory"] = found["local"]
        return found

    def _publishers(self) -> dict[str, Publisher]:
        return {
            name: make(self._name) if name == "local" else make()
            for name, make in _loaded("publishers").items()
        }

    def _agent_settings(self) -> AgentSettings:
        settings = self._settings
        labels = {
            "os_type": platform.system().lower(),
            "os_arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(
                platform.machine(), platform.machine()
            ),
            **settings.labels,
        }
        capacity, executions_max = detect_capacity(self._data, settings.capacity)
        return AgentSettings(
            boot=boot_id(),
            policy=Policy(
                capacity=capacity,
                executions_max=executions_max,
                env_allowed=settings.allow_env,
                host_env=dict(os.environ),
            ),
            version=VERSION,
            labels=labels,
            local_paths=tuple(str(path) for path in settings.allow_paths),
        )


def _loaded(kind: plugs.Kind) -> dict[str, Any]:
    """The plugs of one kind that can be imported; the others are named in the log."""
    found: dict[str, Any] = {}
    for name in plugs.plugs(kind):
        try:
            found[name] = plugs.load(kind, name)
        except BacalhauError as error:
            logger.warning("Plug is not available", extra={"plug": name, "why": error.message})
    return found
