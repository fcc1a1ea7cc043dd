"""A NATS server or cluster that is not ours: can it carry the store, and what is not known of it."""

import json
import logging
from typing import Final

from bacalhau.nats.transport import Transport
from bacalhau_api.errors import InvalidError, OutcomeUnknownError, Problem, UnavailableError

logger = logging.getLogger(__name__)

API_LEVEL_MIN: Final = 2
"""The level of the JetStream API at which atomic batches exist (server 2.12)."""


async def check_external(transport: Transport) -> None:
    """Raises InvalidError if the account cannot carry the store, UnavailableError if it does not
    answer.

    Whether the server syncs each write to disk is not told to clients, so that is only warned of.
    (The server's version is checked when connecting.)
    """
    try:
        answer = json.loads((await transport.request("$JS.API.INFO", b"")).data)
    except UnavailableError as error:
        raise _lacking("JetStream is not enabled for this account") from error
    except OutcomeUnknownError as error:
        raise UnavailableError(f"JetStream does not answer: {error}") from error
    if "error" in answer:
        raise _lacking(f"JetStream refuses: {answer['error'].get('description')}")
    level = int(answer.get("api", {}).get("level", 0))
    if level < API_LEVEL_MIN:
        raise _lacking(f"its JetStream API has level {level}, {API_LEVEL_MIN} is needed")
    logger.warning(
        "Durability of the NATS server is not known; it should run with sync_interval always, "
        "or a power failure can lose minutes of acknowledged writes"
    )


def _lacking(what: str) -> InvalidError:
    return InvalidError(
        [Problem("--nats-url", what)],
        hint="use NATS 2.14 or later with JetStream, or leave out --nats-url for the embedded server",
    )
