"""Inputs that lie on the node already: bound where they are, never copied."""

import asyncio
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from bacalhau.params import read_params
from bacalhau.settings import AllowedPath
from bacalhau.storages.paths import PathRefusedError, PathRules, Vetted, open_beneath
from bacalhau_api.base import Model
from bacalhau_api.errors import TerminalError
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_controllers.runner.ports import Fetched, Health, Progress, Use


class LocalParams(Model):
    """Parameters of the source type `local`.

    create_as   what to make if the path does not exist: `dir`, `file`, or `noCreate`; making
                something needs `readWrite`
    """

    source_path: str = Field(min_length=1)
    read_write: bool = False
    create_as: Literal["dir", "file", "noCreate"] = "noCreate"

    @field_validator("read_write", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        words = {"true": True, "false": False}
        return words.get(value.lower(), value) if isinstance(value, str) else value

    @field_validator("create_as", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        words = {"dir": "dir", "file": "file", "nocreate": "noCreate"}
        return words.get(value.lower(), value) if isinstance(value, str) else value


class LocalStorage:
    """Local paths that the operator allowed. `private` are the node's own directories."""

    def __init__(self, allowed: Sequence[AllowedPath], *, private: Sequence[Path] = ()) -> None:
        self._rules = PathRules(allowed, private)

    async def health(self) -> Health:
        """Available if any path is allowed."""
        if self._rules.is_empty:
            return Health(is_available=False, reason="this node allows no local paths")
        return Health(is_available=True)

    async def admit(self, source: SpecConfig) -> str:
        """Empty if the path may be used as asked for, else why not."""
        try:
            await asyncio.to_thread(self._vet, _params(source))
        except TerminalError as error:
            return error.message
        return ""

    async def fetch(self, item: InputSource, into: Path, use: Use) -> Fetched:
        """Judge the path again, as it is now, and give its real place. Nothing is copied."""
        params = _params(item.source)
        return await asyncio.to_thread(self._bind, params)

    def progress(self, into: Path) -> Progress | None:
        """None: it takes no time to speak of."""
        return None

    def _vet(self, params: LocalParams) -> Vetted:
        is_created = params.create_as != "noCreate"
        if is_created and not params.read_write:
            raise PathRefusedError("createAs needs readWrite: true")
        return self._rules.vet(
            params.source_path, writable=params.read_write, may_be_missing=is_created
        )

    def _bind(self, params: LocalParams) -> Fetched:
        vetted = self._vet(params)
        if vetted.missing:
            _create(vetted, params.create_as)
            vetted = self._rules.vet(params.source_path, writable=params.read_write)
        try:
            fd = open_beneath(vetted.path)
        except OSError as error:
            raise PathRefusedError(
                f"{params.source_path} cannot be used: {error.strerror}"
            ) from error
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise PathRefusedError(f"{params.source_path} is neither a file nor a directory")
        return Fetched(
            source=vetted.path,
            read_only=not params.read_write,
            size_bytes=status.st_size if stat.S_ISREG(status.st_mode) else 0,
        )


def _params(source: SpecConfig) -> LocalParams:
    return read_params(
        LocalParams, source.params, what=f"source {source.type}", reason="InvalidInput"
    )


def _create(vetted: Vetted, create_as: str) -> None:
    """Make the missing components, each in the directory that was opened for it."""
    fd = open_beneath(vetted.path)
    try:
        *parents, last = vetted.missing
        if create_as == "dir":
            parents, last = [*parents, last], ""
        for part in parents:
            try:
                os.mkdir(part, 0o755, dir_fd=fd)
            except FileExistsError:
                pass  # by another execution; if it is no directory, opening it fails
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = below
        if last:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(last, flags, 0o644, dir_fd=fd))
    except OSError as error:
        raise PathRefusedError(f"{vetted.path} cannot be created: {error.strerror}") from error
    finally:
        os.close(fd)
