"""Who a container runs as, and whose its result directories are."""

import os
import tarfile
from collections.abc import Iterable
from io import BytesIO

from bacalhau.engines.docker.client import EngineClient, RefusedError
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_api.params import DockerParams
from bacalhau_controllers.runner.ports import Workload

_FILE_BYTES_MAX = 1024 * 1024


def effective_user(params: DockerParams) -> str:
    """Empty for the image's own choice. A node that is not root runs containers as itself, so that
    it can read the results and remove them. Raises TerminalError (StartFailed)."""
    if os.geteuid() == 0:
        return params.user
    own = f"{os.geteuid()}:{os.getegid()}"
    if params.user not in ("", own, str(os.geteuid())):
        raise TerminalError(
            f"params.user: this node is not root and runs containers as {own} only (got "
            f"{params.user!r})",
            reason="StartFailed",
        )
    return own


async def own_results(client: EngineClient, workload: Workload, user: str, container: str) -> None:
    """Give the result directories, which lie beside the streams' files, to the container's user.
    Inputs that may be written to stay whose they are."""
    results = [
        mount.source
        for mount in workload.mounts
        if not mount.read_only and mount.source.parent == workload.stdout.parent
    ]
    if not results or not user or os.geteuid() != 0:
        return
    uid, gid = await find_ids(client, user, container)
    for path in results:
        os.chown(path, uid, gid, follow_symlinks=False)


async def find_ids(client: EngineClient, user: str, container: str) -> tuple[int, int]:
    """Numbers of `user` or `user:group`, by the image's own lists. Raises TerminalError if they do
    not know a name."""
    name, _, group = user.partition(":")
    if name.isdigit() and group.isdigit():
        return int(name), int(group)
    users = await _entries(client, container, "/etc/passwd")
    found = next((e for e in users if len(e) > 3 and name in (e[0], e[2])), None)
    if found is None and not name.isdigit():
        raise TerminalError(f"the image has no user {name!r}", reason="StartFailed")
    uid = int(found[2]) if found else int(name)
    if not group:
        return uid, int(found[3]) if found and found[3].isdigit() else 0
    if group.isdigit():
        return uid, int(group)
    groups = await _entries(client, container, "/etc/group")
    match = next((e for e in groups if e[0] == group), None)
    if match is None:
        raise TerminalError(f"the image has no group {group!r}", reason="StartFailed")
    return uid, int(match[2])


async def _entries(client: EngineClient, container: str, path: str) -> list[list[str]]:
    """The lines of a file like /etc/passwd, in parts; none if there is no such file."""
    try:
        chunks, _ = await client.ask("get_archive", container, path)
    except RefusedError as error:
        if error.status == 404:
            return []
        raise TransientError(f"the image's {path} cannot be read: {error}") from error
    data = await client.in_thread(lambda: _gather(chunks, path), f"reading {path}")
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        member = archive.next()
        file = archive.extractfile(member) if member is not None and member.isreg() else None
        text = file.read().decode("utf-8", "replace") if file else ""
    rows = [line.split(":") for line in text.splitlines()]
    return [row for row in rows if len(row) > 2 and row[2].isdigit()]


def _gather(chunks: Iterable[bytes], path: str) -> bytes:
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > _FILE_BYTES_MAX:
            raise TerminalError(f"the image's {path} is too long", reason="StartFailed")
    return bytes(data)
