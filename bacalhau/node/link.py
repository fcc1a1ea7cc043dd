"""The node's line to the orchestrator over NATS: requests out, changes and reads in.

Everything the node receives must carry its own name and the session that the agent chose; the
rest is dropped, because NATS lets any node steer a reply to a subject of another.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from pydantic import ValidationError

from bacalhau.nats.connection import connect
from bacalhau.nats.subjects import encode_token
from bacalhau.node.reader import NodeReader
from bacalhau_api.base import Model
from bacalhau_api.errors import BacalhauError, UnavailableError
from bacalhau_api.wire import (
    Ack,
    Applied,
    Beat,
    BeatReply,
    Changes,
    FactBatch,
    Hello,
    LogRead,
    OutputRead,
    OutputsList,
    Refused,
    Welcome,
    WelcomePart,
)

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_SECONDS = 10.0
READS_MAX = 64
"""Log and output reads served at once; more are answered that the node is busy."""

Handler = Callable[[], Awaitable[None]]
ChangesHandler = Callable[[Changes], Awaitable[Applied | None]]
Reply = TypeVar("Reply", bound=Model)
