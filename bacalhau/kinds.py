"""The kinds that the API serves: their names in paths, on the command line, and their paths.

Strings only: the command line imports this before it knows whether it needs anything else.
"""

from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

API_ROOT: Final = "/apis/bacalhau.org/v1"
STATUS_PATH: Final = f"{API_ROOT}/agent/status"
"""On the socket of a node's agent only."""


@dataclass(frozen=True, slots=True)
class KindNames:
    """One kind. `plural` is its name in paths; `short` are abbreviations for the command line."""

    kind: str
    plural: str
    short: tuple[str, ...] = ()
    namespaced: bool = True

    @property
    def singular(self) -> str:
        """The lower-case name, as in `job/NAME`."""
        return self.kind.lower()

    def path(self, namespace: str | None = None, name: str = "", sub: str = "") -> str:
        """The URL path of the collection, one object, or a subresource of it.

        `namespace` None of a namespaced kind means all namespaces (collections only).
        """
        where = API_ROOT
        if self.namespaced and namespace is not None:
            where += f"/namespaces/{quote(namespace, safe='')}"
        where += f"/{self.plural}"
        if name:
            where += f"/{quote(name, safe='')}"
        return f"{where}/{sub}" if sub else where


JOB: Final = KindNames("Job", "jobs", ("j",))
EXECUTION: Final = KindNames("Execution", "executions", ("exec", "ex", "e"))
NODE: Final = KindNames("Node", "nodes", ("no", "n"), namespaced=False)
PUBLICATION: Final = KindNames("Publication", "publications", ("pub", "p"))
ACCEPTANCE: Final = KindNames("Acceptance", "acceptances", ("acc", "a"))
NAMESPACE: Final = KindNames("Namespace", "namespaces", ("ns",), namespaced=False)
RETIRED: Final = KindNames("RetiredJob", "retiredjobs", ("retired",))
MANIFEST: Final = KindNames("Manifest", "manifests", ("man", "m"))
SOURCE: Final = KindNames("Source", "sources", ("src",), namespaced=False)
CLAIM: Final = KindNames("Claim", "claims")

ALL: Final = (
    JOB,
    EXECUTION,
    NODE,
    PUBLICATION,
    ACCEPTANCE,
    MANIFEST,
    NAMESPACE,
    RETIRED,
    SOURCE,
    CLAIM,
)
_BY_WORD: Final = {
    word: names
    for names in ALL
    for word in (names.singular, names.plural, *names.short)
}  # fmt: skip


def find_kind(word: str) -> KindNames | None:
    """The kind that a user means by `job`, `Jobs`, `exec`, …; None if there is none."""
    return _BY_WORD.get(word.lower())
