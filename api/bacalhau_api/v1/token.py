"""JoinToken: the right to enrol one node, once, for a short time."""

from typing import ClassVar, Literal

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.meta import ObjectMeta, Resource


class JoinTokenSpec(Model):
    """The token itself is never stored: `sha256` is the hex digest of its text."""

    sha256: str
    expires_at: Timestamp
    node: str = ""
    """If set, the only node name the token may be used for."""


class JoinToken(Resource):
    """Named by the first 16 digits of its digest. Using it deletes it."""

    namespaced: ClassVar[bool] = False

    kind: Literal["JoinToken"] = "JoinToken"
    metadata: ObjectMeta
    spec: JoinTokenSpec
