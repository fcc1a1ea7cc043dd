"""Images from a real registry: resolved once, pulled once for all, with credentials and patience."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bacalhau.engines.docker import DockerEngine
from bacalhau.engines.docker.client import EngineClient
from bacalhau.engines.docker.images import Images
from bacalhau.engines.docker.options import DockerOptions
from bacalhau.system import SystemClock
from bacalhau_api.errors import TerminalError, TransientError
from tests.support.docker_lab import Lab, output, run
from tests.support.dockerd import BUSYBOX, Dockerd, busybox_image
from tests.support.registry import Registry, running_registry


def nothing(text: str) -> None:
    """Takes progress."""


@pytest.fixture(scope="module")
def registry(dockerd: Dockerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """An open registry."""
    with running_registry(dockerd, tmp_path_factory.mktemp("registry"), 5001) as made:
        yield made


@pytest.fixture(scope="module")
def locked(dockerd: Dockerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry with a password."""
    root = tmp_path_factory.mktemp("locked")
    with running_registry(dockerd, root, 5002, has_password=True) as made:
        yield made


@pytest.fixture
async def client(dockerd: Dockerd) -> AsyncIterator[EngineClient]:
    """A connection to the engine."""
    made = EngineClient(dockerd.host, starts_max=2, call_seconds=20.0, start_seconds=20.0)
    yield made
    await made.close()


def images(client: EngineClient, state: Path, **options: object) -> Images:
    """The part under test."""
    state.mkdir(exist_ok=True)
    return Images(client, DockerOptions(**options), SystemClock(), state)  # type: ignore[arg-type]


def moving(dockerd: Dockerd, registry: Registry, word: str) -> str:
    """Let tag `job/moving:1` of the registry mean an image that prints `word`; its digest."""
    local = f"test/{word}:1"
    dockerd.load(busybox_image(local, Env=["PATH=/bin", f"V={word}"]))
    pinned = registry.push(local, "job/moving", "1")
    with dockerd.api() as api:
        api.remove_image(local)
    return pinned


async def test_a_tag_is_resolved_once_and_the_same_digest_runs_ever_after(
    lab: Lab, engine: DockerEngine, registry: Registry
) -> None:
    tag = f"{registry.address}/job/moving:1"
    old = await asyncio.to_thread(moving, lab.dockerd, registry, "old")
    params = {"image": tag, "parameters": ["echo $V"]}
    pins = await engine.prepare(lab.workload("", params=params).params, {}, nothing)
    assert pins == {"image": old}
    new = await asyncio.to_thread(moving, lab.dockerd, registry, "new")
    assert new != old
    first = lab.workload("", params=params, pins=pins)
    assert (await run(engine, first)).exit_code == 0
    assert output(first) == "old\n"
    # Another node, which never had it, is told the digest.
    with lab.dockerd.api() as api:
        await engine.remove(first.id)
        await asyncio.to_thread(api.remove_image, old)
    assert await engine.prepare(first.params, pins, nothing) == pins
    second = lab.workload("", params=params, pins=pins)
    assert (await run(engine, second)).exit_code == 0
    assert output(second) == "old\n"
    # Without a pin the tag means what it means now.
    assert await engine.prepare(first.params, {}, nothing) == {"image": new}


async def test_credentials_come_from_dockers_configuration(
    lab: Lab, dockerd: Dockerd, locked: Registry
) -> None:
    await asyncio.to_thread(locked.push, BUSYBOX, "job/secret", "1")
    params = {"image": f"{locked.address}/job/secret:1", "parameters": ["true"]}
    stranger = await lab.open(config_dir=lab.root)
    with pytest.raises(TerminalError) as caught:
        await stranger.prepare(params, {}, nothing)
    assert caught.value.reason == "ImageDenied"
    assert "docker login" in caught.value.hint
    await stranger.close(keep_running=True)
    friend = await lab.open(config_dir=locked.config_dir)
    pins = await friend.prepare(params, {}, nothing)
    assert pins["image"].startswith(f"{locked.address}/job/secret@sha256:")
    await friend.close(keep_running=True)


async def test_wrong_credentials_are_denied_and_not_told(
    lab: Lab, dockerd: Dockerd, locked: Registry
) -> None:
    config = lab.root / "config.json"
    auths = {locked.address: {"username": "worker", "password": "wrong-word"}}
    config.write_text(json.dumps({"auths": auths}))
    engine = await lab.open(config_dir=lab.root)
    with pytest.raises(TerminalError) as caught:
        await engine.prepare({"image": f"{locked.address}/job/other:1"}, {}, nothing)
    assert caught.value.reason == "ImageDenied"
    assert "wrong-word" not in str(caught.value)


async def test_what_is_not_there(engine: DockerEngine, registry: Registry) -> None:
    for image in ("job/nothing:1", "job/moving:no-such-tag"):
        with pytest.raises(TerminalError) as caught:
            await engine.prepare({"image": f"{registry.address}/{image}"}, {}, nothing)
        assert caught.value.reason == "ImageNotFound"
        assert image.split(":")[0] in caught.value.message


@pytest.mark.parametrize("image", ["UPPER/case", "a b", "x@md5:1", ":1", "a//", "x:"])
async def test_what_is_no_reference(engine: DockerEngine, image: str) -> None:
    with pytest.raises(TerminalError):
        await engine.prepare({"image": image}, {}, nothing)


async def test_a_registry_that_is_away_is_left_alone_for_a_while_by_all(
    client: EngineClient, tmp_path: Path
) -> None:
    part = images(client, tmp_path / "state")
    address = "127.0.0.1:5999"
    with pytest.raises(TransientError) as first:
        await part.ensure(f"{address}/a/b:1", "")
    assert first.value.reason == "RegistryUnavailable"
    began = time.monotonic()
    for name in ("a/b:1", "other/image:2"):
        with pytest.raises(TransientError, match="not asked again for"):
            await part.ensure(f"{address}/{name}", "")
    assert time.monotonic() - began < 1.5
    await part.close()


async def test_executions_share_one_pull_and_hear_of_it(
    client: EngineClient, dockerd: Dockerd, registry: Registry, tmp_path: Path
) -> None:
    """Eight need the image: the engine is asked to pull once."""
    pinned = await asyncio.to_thread(registry.push, BUSYBOX, "job/shared", "1")
    part = images(client, tmp_path / "state")
    pulls = 0
    original = client.stream

    def counting(path: str, *args: object, **more: object):  # type: ignore[no-untyped-def]
        nonlocal pulls
        pulls += path == "/images/create"
        return original(path, *args, **more)  # type: ignore[arg-type]

    client.stream = counting  # type: ignore[method-assign]
    name = f"{registry.address}/job/shared:1"
    found = await asyncio.gather(*(part.ensure(name, "", nothing) for _ in range(8)))
    assert {image.pinned for image in found} == {pinned}
    assert pulls == 1
    await part.close()


async def test_a_pull_tells_how_far_it_is(
    client: EngineClient, dockerd: Dockerd, registry: Registry, tmp_path: Path
) -> None:
    local = "test/large:1"
    junk = b"".join(hash_block(n) for n in range(200_000))
    await asyncio.to_thread(dockerd.load, busybox_image(local, files={"junk": junk}))
    await asyncio.to_thread(registry.push, local, "job/large", "1")
    with dockerd.api() as api:
        await asyncio.to_thread(api.remove_image, local)
    told: list[str] = []
    part = images(client, tmp_path / "state")
    await part.ensure(f"{registry.address}/job/large:1", "", told.append)
    assert told
    assert all("MB" in text and "job/large" in text for text in told)
    await part.close()


async def test_images_that_were_pulled_are_removed_and_no_others(
    client: EngineClient, dockerd: Dockerd, registry: Registry, tmp_path: Path
) -> None:
    pinned = await asyncio.to_thread(moving, dockerd, registry, "cleanup")
    part = images(client, tmp_path / "state", images_keep_bytes=0)
    await part.ensure(pinned, "")
    assert await part.clean() == [pinned]
    assert await part.find(pinned) is None
    assert await part.find(BUSYBOX) is not None, "somebody else brought it"
    assert await part.clean() == []
    await part.close()


async def test_an_image_in_use_is_kept(
    lab: Lab, engine: DockerEngine, client: EngineClient, registry: Registry
) -> None:
    pinned = await asyncio.to_thread(moving, lab.dockerd, registry, "inuse")
    part = images(client, lab.root / "images", images_keep_bytes=0)
    await part.ensure(pinned, "")
    workload = lab.workload("sleep 3600", params={"image": pinned})
    await engine.start(workload)
    assert await part.clean() == []
    assert await part.find(pinned) is not None
    await engine.stop(workload.id, 0.0)
    await engine.remove(workload.id)
    assert await part.clean() == [pinned]
    await part.close()


async def test_a_node_that_does_not_pull(lab: Lab, registry: Registry) -> None:
    engine = await lab.open(pull="never")
    await engine.prepare({"image": BUSYBOX}, {}, nothing)
    with pytest.raises(TerminalError) as caught:
        await engine.prepare({"image": f"{registry.address}/job/elsewhere:1"}, {}, nothing)
    assert caught.value.reason == "ImageMissing"


async def test_what_a_node_allows(lab: Lab) -> None:
    engine = lab.engine(images_allowed=("busybox*", "ghcr.io/team/*"), registries_allowed=())
    assert await engine.admit({"image": "busybox:1.36"}) == ""
    assert await engine.admit({"image": "docker.io/library/busybox"}) == ""
    assert "allows busybox*" in await engine.admit({"image": "alpine"})
    strict = lab.engine(registries_allowed=("ghcr.io",))
    assert await strict.admit({"image": "ghcr.io/x/y:1"}) == ""
    assert "docker.io" in await strict.admit({"image": "busybox"})
    assert "params.image" in await strict.admit({})


def hash_block(number: int) -> bytes:
    """Bytes that do not compress, the same every time."""
    return hashlib.sha256(number.to_bytes(8, "big")).digest()
