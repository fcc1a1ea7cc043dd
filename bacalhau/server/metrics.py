"""Prometheus metrics: objects by kind and phase from the cache, requests, watchers, gauges.

Counts are read when they are scraped, so that they cannot drift from what is stored.
"""

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bacalhau.kinds import ALL
from bacalhau.server.hub import WatchHub
from bacalhau.server.ports import Services
from bacalhau.server.source_metrics import source_metrics
from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Phase, PublicationPhase
from bacalhau_api.v1.job import JobPhase
from bacalhau_api.v1.node import Membership, Node
from bacalhau_controllers.cache import Cache

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
_PHASES: Final = {
    "Job": tuple(JobPhase),
    "Execution": tuple(Phase),
    "Publication": tuple(PublicationPhase),
}


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, services: Services, hub: WatchHub) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "bacalhau_api_requests",
            "Answered requests by method and status.",
            ("method", "status"),
            registry=self._registry,
        )
        self._registry.register(_StateCollector(services, hub))

    def count_request(self, method: str, status: int) -> None:
        """One more answer. Methods that do not exist share one label."""
        self._requests.labels(method if method in _METHODS else "other", str(status)).inc()

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)


class _StateCollector(Collector):
    def __init__(self, services: Services, hub: WatchHub) -> None:
        self._services = services
        self._hub = hub

    def collect(self) -> Iterator[Metric]:
        """Called for each scrape."""
        cache = self._services.state.cache
        objects = GaugeMetricFamily("bacalhau_objects", "Stored objects by kind.", labels=("kind",))
        for names in ALL:
            objects.add_metric((names.kind,), len(cache.list(names.kind)))
        yield objects
        phases = GaugeMetricFamily(
            "bacalhau_phase", "Stored objects by kind and phase.", labels=("kind", "phase")
        )
        for kind, members in _PHASES.items():
            for member in members:
                phases.add_metric((kind, str(member)), len(cache.by_phase(kind, str(member))))
        yield phases
        yield _nodes(cache)
        yield from source_metrics(cache)
        watchers = GaugeMetricFamily("bacalhau_api_watchers", "Open watches.")
        watchers.add_metric((), len(self._hub))
        yield watchers
        cursor = cache.cursor
        revision = GaugeMetricFamily("bacalhau_cache_revision", "Newest revision in the cache.")
        revision.add_metric((), cursor.revision if cursor else 0)
        yield revision
        for name, value in self._services.gauges().items():
            gauge = GaugeMetricFamily(f"bacalhau_{name}", "A gauge of one of the parts.")
            gauge.add_metric((), value)
            yield gauge


def _nodes(cache: Cache) -> Metric:
    family = GaugeMetricFamily(
        "bacalhau_nodes", "Nodes by membership and contact.", labels=("membership", "contact")
    )
    nodes = [node for node in cache.list("Node") if isinstance(node, Node)]
    for membership in Membership:
        for contact in Contact:
            count = sum(
                n.spec.membership is membership and n.status.contact is contact for n in nodes
            )
            family.add_metric((str(membership), str(contact)), count)
    return family
