"""The compute node: identity, enrolment, engines, ledger, link, and the agent over them."""

import asyncio
import json
import logging
import os
import platform
import random
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from bacalhau import plugs
from bacalhau.enrolment import Enrolment
from bacalhau.localsocket import SOCKET_NAME
from bacalhau.nats.connection import Connection, Credentials
from bacalhau.nats.keys import load_or_make_seed, public_key, write_private
from bacalhau.nats.subjects import node_inbox
from bacalhau.node.face import Face
from bacalhau.node.ledger import SqliteLedger
from bacalhau.node.link import NatsLink
from bacalhau.node.machine import Detected, boot_id, detect_capacity
from bacalhau.node.pins import LinkPins
from bacalhau.node.probes import make_probes
from bacalhau.node.reader import OutputReader
from bacalhau.node.refusal import tell_refusals
from bacalhau.node.status import NodeView
from bacalhau.node.upload import UploadGate
from bacalhau.node.workspace import DiskWorkspace
from bacalhau.replies import JoinAnswer
from bacalhau.serve.parts import OnFailure, run_beside
from bacalhau.serve.transfers import Transfers
from bacalhau.settings import ServeSettings
from bacalhau.version import VERSION
from bacalhau_api.errors import (
    BacalhauError,
    InvalidError,
    Problem,
    TransientError,
    UnavailableError,
)
from bacalhau_api.v1.job import NetworkType
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.runner.admission import Policy
from bacalhau_controllers.runner.agent import Agent
from bacalhau_controllers.runner.ports import Engine
from bacalhau_controllers.runner.site import AgentSettings

logger = logging.getLogger(__name__)

JOIN_RETRY_SECONDS = 2.0
JOIN_TIMEOUT_SECONDS = 30.0
JOIN_AGAIN_TIMEOUT_SECONDS = 3.0
"""A node that restarts while it is cut off does not keep its work waiting for longer."""
FACE_CLOSE_SECONDS = 3.0

_KEY_REMEDY = (
    "put a copy of it back; or delete it, have the orchestrator forget the node (bacalhau delete "
    "node NAME), and start with --orchestrator URL and a new --token"
)


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
        await self._parts.__aexit__(kind, error, trace)

    async def _start(self, parts: AsyncExitStack) -> None:
        self._data.mkdir(parents=True, exist_ok=True, mode=0o700)
        seed = load_or_make_seed(self._data / "node.seed", _KEY_REMEDY)
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
        watch = tell_refusals(connection, self._name, self._clock)
        run_beside(parts, "refusals", watch, self._on_failure)
        workspace = DiskWorkspace(self._data, self._clock)
        reader = OutputReader(workspace, self._clock)
        gate = UploadGate(self._settings.upload_bytes_per_second, self._clock)
        link = NatsLink(self._name, connection, reader, gate)
        await link.open()
        parts.push_async_callback(link.close)
        transfers = Transfers(self._settings, self._name, self._data, boot_id(), LinkPins(link))
        parts.push_async_callback(transfers.close)
        ledger = SqliteLedger(self._data / "ledger.db", self._clock, self._ids)
        engines = self._engines()
        self.agent = Agent(
            self._name,
            ledger,
            engines,
            transfers.storages(),
            transfers.publishers(),
            workspace,
            link,
            self._clock,
            random.Random(),
            self._ids,
            self._agent_settings(await self._detected(engines)),
            transfers.cache,
        )
        reader.bind(self.agent)
        view = NodeView(self.agent, ledger, connection, self._clock, self._data)
        view.upload_bytes_per_second = gate.bytes_per_second
        self._open_face(parts, view, reader)
        await self._run(parts, self.agent)

    def _open_face(self, parts: AsyncExitStack, view: NodeView, reader: OutputReader) -> None:
        """Answer people on this machine. Work does not depend on it: if it cannot be had, the
        agent runs without."""
        path = self._data / SOCKET_NAME
        face = Face(view, reader, path)
        try:
            self._data.chmod(0o700)
            face.open()
        except OSError as error:
            logger.warning(
                "Failed to open the node's own socket; `bacalhau node status` will not work",
                extra={"path": str(path), "error": str(error)},
            )
            return
        serving = run_beside(parts, "face", face.run(), self._on_failure)

        async def close() -> None:
            face.close()
            await asyncio.wait([serving], timeout=FACE_CLOSE_SECONDS)

        parts.push_async_callback(close)

    async def _run(self, parts: AsyncExitStack, agent: Agent) -> None:
        """Run the agent; return once it has taken up what an earlier life left."""

        async def close(kind: object, error: BaseException | None, trace: object) -> None:
            # A failure is nobody's wish: as after a kill -9, the next agent finds what runs. With
            # a full disk it could not even be written down that runs were ended by the shutdown.
            is_failure = error is not None
            await agent.close(keep_running=is_failure or self._settings.on_exit == "keep")

        parts.push_async_exit(close)
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
        if kept is not None and kept.name != self._name:
            raise InvalidError(
                [Problem("--name", f"this data directory belongs to node {kept.name}", self._name)],
                hint="give that name, or another --data-dir",
            )
        has_token = bool(settings.orchestrator_url and settings.join_token)
        if kept is not None:
            again = await self._join_again(key) if has_token else ""
            return again or settings.nats_url or kept.nats_url
        if not has_token:
            raise InvalidError(
                [Problem("--token", "this node has not joined an orchestrator yet")],
                hint="make a token on the orchestrator with `bacalhau node token`, then: bacalhau "
                "serve --role compute --orchestrator URL --token TOKEN",
            )
        nats_url = self._remember(await self._join(key, JOIN_TIMEOUT_SECONDS))
        logger.info("Joined", extra={"node": self._name, "nats": nats_url})
        return nats_url

    async def _join_again(self, key: str) -> str:
        """Enrol with the token given: this node may have been deleted since it joined, and if not,
        nothing changes. Where its NATS is; empty if it goes on with what it was told before."""
        try:
            async with asyncio.timeout(JOIN_AGAIN_TIMEOUT_SECONDS):
                reply = await self._join(key, patience_seconds=0.0)
            nats_url = self._remember(reply)
        except (BacalhauError, OSError) as error:  # also too late, also on a full disk
            logger.warning(
                "Failed to join with the token; the node goes on with its earlier membership",
                extra={"node": self._name, "why": str(error) or "no answer in time"},
            )
            return ""
        logger.info("Joined again with the token", extra={"node": self._name, "nats": nats_url})
        return nats_url

    def _remember(self, reply: JoinAnswer) -> str:
        nats_url = self._settings.nats_url or reply.nats_url
        if self._read_membership() != _Membership(self._name, nats_url):
            text = json.dumps({"name": self._name, "natsUrl": nats_url})
            write_private(self._data / "membership.json", text)
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

    async def _join(self, key: str, patience_seconds: float) -> JoinAnswer:
        """Ask the orchestrator to enrol us, patiently while it cannot be reached."""
        from bacalhau.client import AsyncClient

        settings = self._settings
        async with AsyncClient(settings.orchestrator_url) as client:
            deadline = self._clock.monotonic() + patience_seconds
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
            name: make(self._data / "engines" / name, self._clock, **self._engine_options(name))
            for name, make in _loaded("engines").items()
        }

    def _engine_options(self, name: str) -> dict[str, Any]:
        if name != "docker":
            return {}
        from bacalhau.engines.docker.options import DockerOptions

        given = self._settings.docker
        keep = given.images_keep_bytes
        options = DockerOptions(
            host=given.host,
            images_allowed=given.images_allowed,
            registries_allowed=given.registries_allowed,
            pull="missing" if given.pulls else "never",
            images_keep_bytes=DockerOptions().images_keep_bytes if keep is None else keep,
        )
        return {"options": options, "allows_private": self._settings.allow_private_urls}

    async def _detected(self, engines: Mapping[str, Engine]) -> Detected | None:
        """What the Docker engine knows of the machine; None if there is none."""
        docker: Any = engines.get("docker")
        return None if docker is None else await docker.detect()

    def _agent_settings(self, detected: Detected | None) -> AgentSettings:
        settings = self._settings
        labels = {
            "os_type": platform.system().lower(),
            "os_arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(
                platform.machine(), platform.machine()
            ),
            **settings.labels,
        }
        capacity, executions_max = detect_capacity(self._data, settings.capacity, engine=detected)
        networks = {NetworkType.NONE, *map(NetworkType, settings.allow_networks)}
        if NetworkType.HOST in networks:
            networks.add(NetworkType.FULL)
        return AgentSettings(
            boot=boot_id(),
            policy=Policy(
                capacity=capacity,
                executions_max=executions_max,
                networks_allowed=frozenset(networks),
                env_allowed=settings.allow_env,
                host_env=dict(os.environ),
            ),
            probes=make_probes(
                settings.probes.command, settings.probes.url, settings.probes.seconds
            ),
            version=VERSION,
            labels=labels,
            local_paths=tuple(str(path) for path in settings.allow_paths),
            outbox_bytes_max=(
                max(capacity.disk_bytes // 2, 1)  # 0 is no bound
                if settings.outbox_bytes_max is None
                else settings.outbox_bytes_max
            ),
            retention_seconds=settings.keep_outputs_seconds,
            retention_bytes=settings.keep_outputs_bytes,
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
