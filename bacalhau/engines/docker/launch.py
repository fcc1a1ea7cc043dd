"""Makes and starts containers: chooses what the node has to give each (ports, GPUs, a network), writes
that down before anything is made, and tells whether a start that was refused can go well another time.
"""

import asyncio
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Final

from bacalhau.engines.docker import body, gpus, guard
from bacalhau.engines.docker.body import Place, PortMapping, container_name
from bacalhau.engines.docker.client import EngineClient, RefusedError
from bacalhau.engines.docker.images import Image
from bacalhau.engines.docker.networks import Networks
from bacalhau.engines.docker.options import DockerOptions, engine_host, socket_path
from bacalhau.engines.docker.ports import PortRange, variables
from bacalhau.engines.docker.records import Record, Shelf
from bacalhau.engines.docker.users import effective_user, own_results
from bacalhau.node.machine import boot_id
from bacalhau_api.errors import BacalhauError, TerminalError, TransientError, UnavailableError
from bacalhau_api.params import DockerParams
from bacalhau_api.v1.job import NetworkType
from bacalhau_controllers.runner.ports import Workload

NOT_STARTED: Final = ("PortTaken", "NetworkGone")
"""Reasons by which the engine says that it did not start it."""

_NO_RETRY = ("oci runtime", "executable file not found", "invalid mount", "no such file", "exec:")
_USED_UP = (
    "no space left on device",
    "cannot allocate memory",
    "resource temporarily unavailable",
    "too many open files",
)
"""What the machine has no more of, whoever in the engine noticed."""

_PORT_TAKEN = ("port is already allocated", "address already in use")


class Launcher:
    """Starts the containers of one owner on one engine."""

    def __init__(
        self,
        client: EngineClient,
        networks: Networks,
        shelf: Shelf,
        options: DockerOptions,
        owner: str,
    ) -> None:
        self._client = client
        self._networks = networks
        self._shelf = shelf
        self._options = options
        self._owner = owner
        self._ports = PortRange(options.port_first, options.port_last)
        self._gpu_lock = asyncio.Lock()

    async def begin(
        self,
        workload: Workload,
        params: DockerParams,
        image: Image,
        *,
        devices: gpus.Probe,
        has_init: bool,
    ) -> Record:
        """Start a container; what was written down of it. Raises TerminalError if it can never be
        started; TransientError after which it may have been, unless the reason is one of
        NOT_STARTED."""
        record = self._record(workload, image)
        place, record = await self._place(workload, params, image, record, devices, has_init)
        name = container_name(self._owner, workload.id)
        request = body.create_body(workload, params, place)
        try:
            await self._client.ask_start("create_container_from_config", request, name)
        except RefusedError as error:
            if error.status == 409:
                words = f"container {name} is there already; it is looked at again"
                raise TransientError(words) from error
            raise start_error(error) from error
        if record.leash_noted:
            await self.hold()
        await own_results(self._client, workload, place.user or image.user, name)
        try:
            await self._client.ask_start("start", name)
        except RefusedError as error:
            raise start_error(error) from error
        return record

    async def hold(self) -> None:
        """Have somebody hold what is on a leash, who outlives the agent."""
        path = socket_path(engine_host(self._options))
        try:
            await asyncio.to_thread(guard.spawn, self._shelf.root, path, self._owner)
        except (OSError, subprocess.SubprocessError) as error:
            raise UnavailableError(
                f"nothing on a leash can be started: its guard cannot be: {error}"
            ) from error

    def _record(self, workload: Workload, image: Image) -> Record:
        leash = workload.leash
        return Record(
            run=workload.id,
            stdout=str(workload.stdout),
            stderr=str(workload.stderr),
            log_index=str(workload.log_index),
            output_bytes_max=workload.output_bytes_max,
            stdout_at=_size(workload.stdout),
            stderr_at=_size(workload.stderr),
            timeout_seconds=workload.timeout_seconds,
            image=image.pinned,
            domains=workload.network.domains,
            leash_noted=str(leash.noted) if leash else "",
            leash_seconds=leash.seconds if leash else 0.0,
            leash_contact=leash.contact if leash else 0.0,
            leash_boot=leash.boot if leash else "",
        )

    async def _place(
        self,
        workload: Workload,
        params: DockerParams,
        image: Image,
        record: Record,
        devices: gpus.Probe,
        has_init: bool,
    ) -> tuple[Place, Record]:
        """Choose what the node has to give. The record is written before anything is made, so that
        a crash leaves nothing that nobody knows of."""
        network = "none"
        env: dict[str, str] = {}
        ports: tuple[PortMapping, ...] = ()
        held = self._held()
        match workload.network.type:
            case NetworkType.BRIDGE:
                network = await self._networks.bridge()
                ports = self._ports.choose(workload.network, held[0])
            case NetworkType.HOST | NetworkType.FULL:
                network = "host"
                ports = self._ports.choose(workload.network, held[0])
            case NetworkType.HTTP:
                network = container_name(self._owner, workload.id)
        async with self._gpu_lock:
            count = workload.resources.gpu
            taken = gpus.take(devices, count, self._held()[1]) if count else ()
            record = replace(
                record,
                network=network if workload.network.type is NetworkType.HTTP else "",
                ports=tuple((p.name, p.host, p.container, p.host_ip) for p in ports),
                gpus=taken,
            )
            await asyncio.to_thread(self._shelf.write, record)
        if record.network:
            network, env = await self._networks.open_http(record)
        env |= variables(ports)
        if taken:
            env["NVIDIA_VISIBLE_DEVICES"] = ",".join(taken)
        return Place(
            image=image.id,
            owner=self._owner,
            network=network,
            ports=ports if network not in ("host", "none") else (),
            env=env,
            user=effective_user(params),
            gpus=taken,
            pids_max=self._options.pids_max,
            has_init=has_init,
            boot=boot_id(),
        ), record

    def _held(self) -> tuple[set[int], set[str]]:
        """The ports and GPUs of runs that have not ended."""
        ports: set[int] = set()
        devices: set[str] = set()
        for name in self._shelf.names():
            record = self._shelf.read(name) if self._shelf.end_of(name) is None else None
            if record is not None:
                ports.update(port[1] for port in record.ports)
                devices.update(record.gpus)
        return ports, devices


def start_error(error: RefusedError) -> BacalhauError:
    """Whether a start that was refused can go well another time."""
    words = error.message.lower()
    if any(text in words for text in _PORT_TAKEN):
        return TransientError(f"a port is in use: {error.message}", reason="PortTaken")
    if "network" in words and "not found" in words:
        return TransientError(f"a network is gone: {error.message}", reason="NetworkGone")
    if error.status >= 500 and any(text in words for text in _USED_UP):
        return UnavailableError(f"the machine cannot start it now: {error.message}")
    if error.status == 400 or any(text in words for text in _NO_RETRY):
        return TerminalError(f"it cannot be started: {error.message}", reason="StartFailed")
    if error.status == 404:
        return TransientError(f"the engine lost what it was to start: {error.message}")
    return UnavailableError(f"the Docker engine failed: {error.message}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
