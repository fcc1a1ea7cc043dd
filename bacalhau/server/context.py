"""What all routes share, and the small checks that many of them begin with."""

from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request

from bacalhau.server.actions import Actions, not_found
from bacalhau.server.hub import WatchHub
from bacalhau.server.logs import Logs
from bacalhau.server.metrics import Metrics
from bacalhau.server.offload import InThread
from bacalhau.server.pages import Pager
from bacalhau.server.ports import Services
from bacalhau.server.waiter import Waiter
from bacalhau_api.errors import UnavailableError
from bacalhau_api.meta import Ref, Resource
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.forecast import Applier

R = TypeVar("R", bound=Resource)


@dataclass(frozen=True, slots=True)
class Context:
    """One server's parts."""

    services: Services
    hub: WatchHub
    pager: Pager
    logs: Logs
    actions: Actions
    metrics: Metrics
    applier: Applier

    @property
    def cache(self) -> Cache:
        """The cache, if it can be read. Raises UnavailableError while it is being filled."""
        cache = self.services.state.cache
        if not cache.is_synced:
            raise UnavailableError(
                "the server is still reading its store", hint="try again in a moment"
            )
        return cache

    def close(self) -> None:
        """End all watches and followed logs."""
        self.hub.close()
        self.logs.close()

    def find(self, kind: type[R], ref: Ref) -> R:
        """An object. Raises NotFoundError."""
        found = self.cache.get(ref)
        if not isinstance(found, kind):
            raise not_found(ref)
        return found


def make_context(services: Services) -> Context:
    """Wire the parts up."""
    cache = services.state.cache
    hub = WatchHub(cache)
    return Context(
        services=services,
        hub=hub,
        pager=Pager(cache, services.clock, services.ids),
        logs=Logs(services, Waiter(cache)),
        actions=Actions(services),
        metrics=Metrics(services, hub),
        applier=Applier(
            services.state,
            services.clock,
            services.ids,
            settings=services.job_settings,
            offload=InThread(),
        ),
    )


def actor_of(request: Request) -> str:
    """Who is asking, as it goes into the history; found out by the guard."""
    actor: str = request.scope["bacalhau.actor"]
    return actor
