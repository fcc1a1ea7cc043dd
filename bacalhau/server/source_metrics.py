"""Metrics of watched directories: how each stands, since when, and what it holds back.

Times are those of the status, as seconds since 1970, so that an age is `time() - metric`.
"""

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric

from bacalhau_api.v1.source import Source, SourcePhase
from bacalhau_controllers.cache import Cache

_COUNTS: Final = ("synced", "waiting", "failed", "drifted")


def source_metrics(cache: Cache) -> Iterator[Metric]:
    """One family after the other, each with a value for every source."""
    sources = [item for item in cache.list("Source") if isinstance(item, Source)]
    phase = _family("phase", "1 for the phase that a source is in.", "phase")
    objects = _family("objects", "Objects that a source declares, by how they stand.", "state")
    problems = _family("problems", "Files and objects that cannot be read or applied.")
    frozen = _family("frozen_deletions", "Deletions that are held back.")
    behind = _family("is_behind", "1 while the revision that was read is not applied as a whole.")
    applied = _family("applied_timestamp_seconds", "When a revision was last applied as a whole.")
    waiting = _family("waiting_since_timestamp_seconds", "Since when it waits, while it does.")
    for source in sources:
        name, status = source.name, source.status
        for each in SourcePhase:
            phase.add_metric((name, str(each)), float(status.phase is each))
        for state in _COUNTS:
            objects.add_metric((name, state), getattr(status.counts, state))
        problems.add_metric((name,), status.problems_total)
        frozen.add_metric((name,), status.freeze.count if status.freeze else 0)
        behind.add_metric((name,), float(status.revision_seen != status.revision_applied))
        if status.applied_at is not None:
            applied.add_metric((name,), status.applied_at.timestamp())
        if status.waiting is not None:
            waiting.add_metric((name,), status.waiting.since.timestamp())
    yield from (phase, objects, problems, frozen, behind, applied, waiting)


def _family(name: str, words: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"bacalhau_source_{name}", words, labels=("source", *labels))
