"""GPUs of this node, through NVML, and which of them the engine's containers hold."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bacalhau_api.errors import TransientError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. `uuid` names it for ever."""

    uuid: str
    name: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found: the devices, or why there are none."""

    gpus: tuple[Gpu, ...] = ()
    missing: str = ""


GpuProbe = Callable[[], Probe]


def probe_nvml() -> Probe:
    """Ask the driver. May block for a moment."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ModuleNotFoundError:
        return Probe(missing="the Python package nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Probe(missing=f"NVML: {error}")
    try:
        found = []
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            uuid, name = (
                _text(pynvml.nvmlDeviceGetUUID(handle)),
                _text(pynvml.nvmlDeviceGetName(handle)),
            )
            found.append(Gpu(uuid, name, memory))
        return Probe(tuple(found), "" if found else "the driver knows no GPU")
    except pynvml.NVMLError as error:
        return Probe(missing=f"NVML: {error}")
    finally:
        pynvml.nvmlShutdown()


def offered(probe: Probe, info: Mapping[str, Any]) -> Probe:
    """Those of the devices that the engine can give to containers: it needs a runtime for it, or
    else it fails only when a container is started."""
    if not probe.gpus:
        return probe
    has_runtime = "nvidia" in (info.get("Runtimes") or {})
    devices = info.get("DiscoveredDevices") or ()
    has_cdi = any("nvidia.com/gpu" in str(one.get("ID", "")) for one in devices)
    if has_runtime or has_cdi:
        return probe
    return Probe(missing="the Docker engine has no NVIDIA runtime (nvidia-container-toolkit)")


def take(probe: Probe, count: int, held: Collection[str]) -> tuple[str, ...]:
    """The uuids of so many devices that nobody holds. Raises TransientError."""
    free = [gpu.uuid for gpu in probe.gpus if gpu.uuid not in held]
    if len(free) < count:
        why = probe.missing or f"{len(free)} of {len(probe.gpus)} are free"
        raise TransientError(f"{count} GPUs cannot be had now: {why}", reason="GpuUnavailable")
    return tuple(free[:count])


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
