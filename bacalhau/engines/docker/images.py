"""Images: which one a reference means, bringing it, and removing what nobody needs any more.

A reference is resolved once, to a digest (`repository@sha256:...`), or for an image that exists on
this machine only to its id. Executions that need the same image share one pull, and all wait
together when its registry asks for patience or cannot be reached.
"""

import asyncio
import fnmatch
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docker import auth

from bacalhau.engines.docker.client import EngineClient, RefusedError, lines
from bacalhau.engines.docker.options import DockerOptions
from bacalhau_api.errors import BacalhauError, TerminalError, TransientError, UnavailableError
from bacalhau_controllers.contract import Clock

logger = logging.getLogger(__name__)

HUB = "docker.io"
BACKOFF_SECONDS = 2.0
BACKOFF_SECONDS_MAX = 300.0
REFUSAL_SECONDS = 20.0
"""How long a registry's no is repeated without asking it again."""
PROGRESS_SECONDS = 5.0

INVALID = "ImageInvalid"
_ID = "sha256:"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Reference:
    """An image reference, taken apart. `registry` and `repository` are complete, as the engine
    completes them; `digest` is `sha256:...` or empty, and goes over `tag`."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Raises TerminalError (ImageInvalid) for what is no reference."""
        name, _, digest = text.partition("@")
        head, slash, last = name.rpartition("/")
        last, _, tag = last.partition(":")
        name = head + slash + last
        first, slash, rest = name.partition("/")
        if not slash or not ("." in first or ":" in first or first == "localhost"):
            registry, repository = HUB, name if slash else f"library/{name}"
        else:
            registry, repository = first, rest
        is_name = (
            repository and repository == repository.lower() and not set(repository) & set(" @:")
        )
        if not is_name or not last or (digest and not digest.startswith("sha256:")):
            raise TerminalError(
                f"image {text!r} is no image reference; write name, name:tag or name@sha256:...",
                reason=INVALID,
            )
        if registry == "index.docker.io":
            registry = HUB
        return cls(registry, repository, tag or ("" if digest else "latest"), digest)

    @property
    def name(self) -> str:
        """Registry and repository."""
        return f"{self.registry}/{self.repository}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """All ways to write it that mean the same: what a pattern is held against."""
        short = [self.name]
        if self.registry == HUB:
            short.append(self.repository)
            short.append(self.repository.removeprefix("library/"))
        ends = [f"@{self.digest}"] if self.digest else [f":{self.tag}"]
        if self.tag == "latest" or self.digest:
            ends.append("")
        return tuple(name + end for name in short for end in ends)

    def __str__(self) -> str:
        return self.spellings[0]


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is here. `pinned` is what names it for ever."""

    id: str
    pinned: str
    config: Mapping[str, Any]

    @property
    def user(self) -> str:
        """The user it wants to run as; empty for root."""
        return str(self.config.get("User") or "")


@dataclass(slots=True)
class _Patience:
    """Of one registry: not before `until` (monotonic); `seconds` grow with each failure."""

    seconds: float = 0.0
    until: float = 0.0
    why: str = ""


@dataclass(slots=True)
class Images:
    """The images of one engine. `state_dir` keeps which of them this node brought."""

    client: EngineClient
    options: DockerOptions
    clock: Clock
    state_dir: Path
    _pulls: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    _patience: dict[str, _Patience] = field(default_factory=dict)
    _refusals: dict[str, tuple[float, TerminalError]] = field(default_factory=dict)
    _used: dict[str, float] = field(default_factory=dict)

    def admit(self, text: str) -> str:
        """Why this node does not run the image, or ''."""
        if text.startswith(_ID):
            return self._admit_id(text)
        try:
            reference = Reference.parse(text)
        except TerminalError as error:
            return error.message
        registries = self.options.registries_allowed
        if registries and reference.registry not in registries:
            return (
                f"image {text!r} is of registry {reference.registry}; this node allows "
                f"{', '.join(registries)}"
            )
        patterns = self.options.images_allowed
        if patterns and not any(_matches(reference, pattern) for pattern in patterns):
            return f"this node does not allow image {text!r}; it allows {', '.join(patterns)}"
        return ""

    def _admit_id(self, text: str) -> str:
        """An image by its id, which says nothing of where it is from."""
        patterns = self.options.images_allowed
        if (patterns or self.options.registries_allowed) and text not in patterns:
            return f"this node does not allow image {text}; its operator can list it by its id"
        return ""

    async def find(self, name: str) -> Image | None:
        """The image as it is here, None if it is not."""
        try:
            found = await self.client.ask("inspect_image", name)
        except RefusedError as error:
            if error.status == 404:
                return None
            if error.status == 400:
                raise TerminalError(f"image {name!r}: {error.message}", reason=INVALID) from error
            raise UnavailableError(f"the Docker engine could not show an image: {error}") from error
        image_id = str(found["Id"])
        self._touch(image_id)
        config = found.get("Config") or found.get("ContainerConfig") or {}
        return Image(image_id, _pinned(name, found), config)

    async def ensure(self, text: str, pin: str, progress: Progress | None = None) -> Image:
        """The image that `text` meant when it was resolved to `pin` (empty: that is now), brought
        here if need be.

        Raises TerminalError (ImageNotFound, ImageDenied, ImageInvalid, ImageMissing) or
        TransientError (RegistryUnavailable, or the engine's own).
        """
        wanted = pin or text
        found = await self.find(wanted)
        if found is not None:
            return found
        if text.startswith(_ID):
            raise TerminalError(f"image {text} is not on this node", reason="ImageMissing")
        reference = Reference.parse(text)
        if pin and "@" not in pin:
            raise TerminalError(
                f"image {text!r} was resolved to {pin}, an image without a registry, which is not "
                "on this node",
                hint="push it to a registry, or constrain the job to nodes that have it",
                reason="ImageMissing",
            )
        if self.options.pull == "never":
            raise TerminalError(
                f"image {text!r} is not on this node, which does not pull images",
                reason="ImageMissing",
            )
        digest = Reference.parse(pin).digest if pin else reference.digest
        if not digest:
            digest = await self._resolve(reference)
        target = f"{_engine_name(reference)}@{digest}"
        if (found := await self.find(target)) is None:
            await self._pull_shared(reference, target, progress)
            found = await self.find(target)
        if found is None:
            raise TransientError(
                f"image {target} was pulled, and is not here", reason="ImageMissing"
            )
        return found

    async def close(self) -> None:
        """Stop pulling."""
        for task in self._pulls.values():
            task.cancel()
        await asyncio.gather(*self._pulls.values(), return_exceptions=True)

    # -- registries ------------------------------------------------------------------------------

    async def _resolve(self, reference: Reference) -> str:
        """The digest a tag means at its registry now, which is asked without pulling."""
        self._check_patience(reference)
        name = f"{_engine_name(reference)}:{reference.tag}"
        credentials = await self._credentials(reference.registry)
        try:
            found = await self.client.ask(
                "inspect_distribution", name, auth_config=credentials or {}
            )
        except RefusedError as error:
            raise self._failed(reference, error.message, error.status) from error
        except UnavailableError as error:
            raise self._wait(reference.registry, error.message) from error
        self._patience.pop(reference.registry, None)
        return str(found["Descriptor"]["digest"])

    async def _pull_shared(
        self, reference: Reference, target: str, progress: Progress | None
    ) -> None:
        """One pull for all who need it; it goes on while one of them waits."""
        task = self._pulls.get(target)
        if task is None:
            self._check_patience(reference)
            task = asyncio.create_task(self._pull(reference, target, progress))
            self._pulls[target] = task
            task.add_done_callback(lambda done: self._pulled(target, done))
        await asyncio.shield(task)

    def _pulled(self, target: str, done: "asyncio.Task[None]") -> None:
        if self._pulls.get(target) is done:
            del self._pulls[target]
        if not done.cancelled():
            done.exception()  # those who wait for it are told

    async def _pull(self, reference: Reference, target: str, progress: Progress | None) -> None:
        credentials = await self._credentials(reference.registry)
        headers = {"X-Registry-Auth": auth.encode_header(credentials or {}).decode()}
        name, _, digest = target.partition("@")
        meter = _Meter(target, self.clock, progress)
        logger.info("Pulls an image", extra={"image": target})
        try:
            async with self.client.stream(
                "/images/create",
                {"fromImage": name, "tag": digest},
                method="POST",
                headers=headers,
                read_seconds=self.options.pull_seconds,
            ) as response:
                async for line in lines(response):
                    if "error" in line:
                        detail = line.get("errorDetail") or {}
                        raise RefusedError(
                            int(detail.get("code") or 500), str(line["error"])[:1024]
                        )
                    meter.take(line)
        except RefusedError as error:
            raise self._failed(reference, error.message, error.status) from error
        except UnavailableError as error:
            raise self._wait(reference.registry, error.message) from error
        self._patience.pop(reference.registry, None)
        logger.info("Pulled an image", extra={"image": target})
        self._remember(target)

    async def _credentials(self, registry: str) -> dict[str, str] | None:
        """What Docker's configuration has for a registry; read anew, so that a login counts at
        once. Helpers are programs, so it is done in a thread."""
        directory = self.options.config_dir
        path = str(directory / "config.json") if directory else None

        def read() -> dict[str, str] | None:
            config = auth.load_config(config_path=path)
            found = auth.resolve_authconfig(config, None if registry == HUB else registry)
            return {k: str(v) for k, v in found.items() if v} if found else None

        try:
            return await self.client.in_thread(read, "reading the registry's credentials")
        except BacalhauError:
            raise
        except Exception as error:
            # Without its words, which might hold a secret.
            kind = type(error).__name__
            raise TransientError(
                f"the credentials for registry {registry} cannot be read ({kind})",
                hint="see the node's Docker config.json and its credential helpers",
                reason="RegistryUnavailable",
            ) from error

    def _check_patience(self, reference: Reference) -> None:
        now = self.clock.monotonic()
        patience = self._patience.get(reference.registry)
        if patience is not None and now < patience.until:
            seconds = patience.until - now
            raise TransientError(
                f"registry {reference.registry} is not asked again for {seconds:.0f} s: "
                f"{patience.why}",
                reason="RegistryUnavailable",
            )
        until, refusal = self._refusals.get(str(reference), (0.0, None))
        if refusal is not None and now < until:
            raise refusal
        self._refusals.pop(str(reference), None)

    def _failed(self, reference: Reference, words: str, status: int) -> BacalhauError:
        """What a registry's or the engine's words mean. The status says little: the engine gives
        500 for a missing password as for a registry that is not there."""
        text = words.lower()
        denied = ("unauthorized", "no basic auth", "denied", "authentication required", "forbidden")
        absent = (
            "manifest unknown",
            "not found",
            "does not exist",
            "name unknown",
            "no such image",
        )
        error: TerminalError
        if any(word in text for word in denied):
            error = TerminalError(
                f"registry {reference.registry} does not let this node have {reference}: {words}",
                hint=f"log in on the node: docker login {reference.registry}",
                reason="ImageDenied",
            )
        elif status == 404 or any(word in text for word in absent):
            error = TerminalError(
                f"registry {reference.registry} has no image {reference}: {words}",
                reason="ImageNotFound",
            )
        elif "invalid reference" in text or status == 400:
            error = TerminalError(f"image {reference}: {words}", reason=INVALID)
        else:
            return self._wait(reference.registry, words)
        self._refusals[str(reference)] = (self.clock.monotonic() + REFUSAL_SECONDS, error)
        if len(self._refusals) > 1000:
            self._refusals.pop(next(iter(self._refusals)))
        return error

    def _wait(self, registry: str, why: str) -> TransientError:
        patience = self._patience.setdefault(registry, _Patience())
        patience.seconds = min(max(patience.seconds * 2, BACKOFF_SECONDS), BACKOFF_SECONDS_MAX)
        patience.until = self.clock.monotonic() + patience.seconds
        patience.why = why
        return TransientError(
            f"registry {registry} cannot be used now: {why}", reason="RegistryUnavailable"
        )

    # -- keeping and removing --------------------------------------------------------------------

    def _touch(self, image_id: str) -> None:
        self._used[image_id] = self.clock.now().timestamp()

    def _remember(self, target: str) -> None:
        kept = self._kept()
        kept[target] = self.clock.now().timestamp()
        self._write_kept(kept)

    def _kept(self) -> dict[str, float]:
        """What this node pulled, and when it was last used, in seconds since the epoch."""
        try:
            data = json.loads((self.state_dir / "images.json").read_text())
            return {str(name): float(at) for name, at in data.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _write_kept(self, kept: Mapping[str, float]) -> None:
        path = self.state_dir / "images.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(kept))
        fresh.replace(path)

    async def clean(self) -> list[str]:
        """Remove what this node pulled and nobody used for long, or that is too much. Never what
        somebody else brought, nor what a container uses. Returns what was removed."""
        kept = self._kept()
        found: dict[str, tuple[str, int]] = {}
        for target in list(kept):
            try:
                image = await self.client.ask("inspect_image", target)
            except RefusedError as error:
                if error.status == 404:
                    del kept[target]
                continue
            found[target] = (str(image["Id"]), int(image.get("Size") or 0))
            kept[target] = max(kept[target], self._used.get(str(image["Id"]), 0.0))
        total = sum(size for _, size in found.values())
        now = self.clock.now().timestamp()
        removed = []
        for target in sorted(found, key=lambda name: kept[name]):
            limit = self.options.images_keep_seconds
            is_old = limit > 0 and now - kept[target] > limit
            if not is_old and total <= self.options.images_keep_bytes:
                continue
            try:
                await self.client.ask("remove_image", target)
            except RefusedError as error:
                if error.status != 404:  # in use
                    continue
            total -= found[target][1]
            del kept[target]
            removed.append(target)
        self._write_kept(kept)
        if removed:
            logger.info("Removed images", extra={"images": removed})
        return removed


class _Meter:
    """Sums up the progress of a pull's layers, now and then, in words."""

    def __init__(self, target: str, clock: Clock, progress: Progress | None) -> None:
        self._target = target
        self._clock = clock
        self._progress = progress
        self._layers: dict[str, tuple[int, int]] = {}
        self._next = clock.monotonic() + PROGRESS_SECONDS if progress is None else 0.0

    def take(self, line: Mapping[str, Any]) -> None:
        """One line of the engine's account."""
        detail = line.get("progressDetail") or {}
        if line.get("id") and detail.get("total"):
            self._layers[str(line["id"])] = (int(detail.get("current") or 0), int(detail["total"]))
        if not self._layers or self._clock.monotonic() < self._next:
            return
        self._next = self._clock.monotonic() + PROGRESS_SECONDS
        done = sum(current for current, _ in self._layers.values())
        total = sum(total for _, total in self._layers.values())
        words = f"pulling image {self._target}: {done / 1e6:.1f} of {total / 1e6:.1f} MB"
        logger.info("Pulling an image", extra={"image": self._target, "progress": words})
        if self._progress is not None:
            self._progress(words)


def _matches(reference: Reference, pattern: str) -> bool:
    if pattern.startswith("sha256:"):
        return reference.digest == pattern
    return any(fnmatch.fnmatchcase(text, pattern) for text in reference.spellings)


def _engine_name(reference: Reference) -> str:
    """Registry and repository as the engine names them: those of Docker Hub go without."""
    if reference.registry == HUB:
        return reference.repository.removeprefix("library/")
    return reference.name


def _pinned(name: str, found: Mapping[str, Any]) -> str:
    """What names the image for ever: a digest of its repository, else its id."""
    if name.startswith(_ID):
        return name
    wanted = Reference.parse(name)
    for text in found.get("RepoDigests") or ():
        known = Reference.parse(text)
        if known.name == wanted.name and wanted.digest in ("", known.digest):
            return str(text)
    return str(found["Id"])
