"""Query parameters that say where a change comes from; they go into the history with it."""

from typing import Annotated

from fastapi import Depends, Query

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.provenance import LENGTH_MAX, Provenance


def _origin(
    source: Annotated[str, Query(max_length=LENGTH_MAX, description="The file.")] = "",
    commit: Annotated[str, Query(max_length=LENGTH_MAX, description="Its git commit.")] = "",
    by: Annotated[str, Query(max_length=LENGTH_MAX, description="Such as alice@laptop.")] = "",
    message: Annotated[str, Query(max_length=LENGTH_MAX, description="Why.")] = "",
) -> Provenance:
    try:
        return Provenance(source=source, commit=commit, by=by, message=message).cleaned()
    except ValueError as error:
        raise InvalidError([Problem("query", str(error))]) from error


Origin = Annotated[Provenance, Depends(_origin)]
"""A parameter of routes that change what users declare."""
