"""The Python client: `Client` and `AsyncClient`, typed by the same models as the server.

    from bacalhau.client import Client
    from bacalhau_api.v1 import Job

    with Client() as client:
        applied = client.apply(open("job.yaml").read())
        done = client.wait(applied.job.name)
        for record in client.logs(done.job):
            print(record.text, end="")

Errors are those of `bacalhau_api.errors`. Imported on first use, because the command line needs
neither HTTP nor the models for much of what it does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bacalhau.client.aio import AsyncClient
    from bacalhau.client.errors import WaitTimeoutError
    from bacalhau.client.sync import Client
    from bacalhau.client.waiting import Waited, WatchUpdate

_WHERE = {
    "AsyncClient": "aio",
    "Client": "sync",
    "WaitTimeoutError": "errors",
    "Waited": "waiting",
    "WatchUpdate": "waiting",
}

__all__ = ["AsyncClient", "Client", "WaitTimeoutError", "Waited", "WatchUpdate"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
