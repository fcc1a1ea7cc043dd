"""The OpenAPI document without a running server: it depends on types alone.

python -m bacalhau.server.openapi > docs/openapi.json
"""

import json
import sys
from typing import Any, cast

from bacalhau.server.app import create_app
from bacalhau.server.ports import Enrolment, NodeReader, Services
from bacalhau.system import SystemClock, SystemIds
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.state import State


def document() -> dict[str, Any]:
    """The document, as served at /openapi.json."""
    clock = SystemClock()
    services = Services(
        state=State(MemoryStore(clock), Cache()),
        # No request is ever served.
        nodes=cast(NodeReader, None),
        enrolment=cast(Enrolment, None),
        clock=clock,
        ids=SystemIds(),
    )
    return create_app(services).openapi()


def text() -> str:
    """The document as it is kept in docs/openapi.json."""
    return json.dumps(document(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
