"""The token of a plan: enough to see later, without having kept the plan, whether the outcome is
still the same, and for which objects it is not.

It holds a seed from which new objects get their uids (places are chosen with the uid, so the same
job with another uid may land elsewhere), and two digests for each object: of what happens, and of
where. It is not a secret and grants nothing.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import Ref
from bacalhau_api.plans import ObjectPlan
from bacalhau_controllers.forecast.changes import ChangeSet

PREFIX: Final = "plan1-"
SEED_LENGTH: Final = 16
TOKEN_LENGTH_MAX: Final = 16 * 1024

_SEED_BYTES: Final = 8
_SET_BYTES: Final = 8
_PART_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Token:
    """A token taken apart. `set` is the digest of what was asked for; `outcomes` has a pair of
    digests (what, where) for each object of the plan."""

    seed: str
    set: str
    outcomes: tuple[tuple[str, str], ...]

    def text(self) -> str:
        """As it is given to users."""
        parts = [bytes.fromhex(self.seed), bytes.fromhex(self.set)]
        parts += [bytes.fromhex(what + where) for what, where in self.outcomes]
        data = b"".join(parts)
        check = hashlib.sha256(data).digest()[:2]
        return PREFIX + base64.urlsafe_b64encode(check + data).decode().rstrip("=")


def read_token(text: str) -> Token:
    """Take a token apart. Raises InvalidError for what no plan ended in."""
    data = _decoded(text.strip())
    seed, data = data[:_SEED_BYTES].hex(), data[_SEED_BYTES:]
    digest, data = data[:_SET_BYTES].hex(), data[_SET_BYTES:]
    size = 2 * _PART_BYTES
    pairs = [data[i : i + size] for i in range(0, len(data), size)]
    outcomes = tuple((pair[:_PART_BYTES].hex(), pair[_PART_BYTES:].hex()) for pair in pairs)
    return Token(seed, digest, outcomes)


def _decoded(text: str) -> bytes:
    problem = Problem("token", "is not the token of a plan", text[:40], "run bacalhau plan again")
    body = text.removeprefix(PREFIX)
    if body == text or len(text) > TOKEN_LENGTH_MAX:
        raise InvalidError([problem])
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvalidError([problem]) from None
    check, data = data[:2], data[2:]
    left = len(data) - _SEED_BYTES - _SET_BYTES
    if hashlib.sha256(data).digest()[:2] != check or left < 0 or left % (2 * _PART_BYTES):
        raise InvalidError([problem])
    return data


def uid_for(seed: str, ref: Ref) -> str:
    """The identity of an object that is new in a plan."""
    return hashlib.sha256(f"{seed}/{ref}".encode()).hexdigest()[:32]


def another_uid(planned: str, fresh: str) -> str:
    """For an object that was made as planned before, and removed since: its executions have other
    names then, which their nodes may still know, and the same places (`placement.turn_hash`)."""
    half = len(planned) // 2
    return fresh[:half] + planned[half:]


def digest_of_set(changes: ChangeSet) -> str:
    """What was asked for: the documents, the owner and what it may prune. Not from where."""
    data: list[Any] = [changes.owner, changes.prune]
    data += [[str(ref), uid] for ref, uid in changes.inventory]
    data += [wanted.resource.encode().decode() for wanted in changes.wanted]
    return _digest(data, _SET_BYTES)


def digests_of(plans: Sequence[ObjectPlan]) -> tuple[tuple[str, str], ...]:
    """What happens to each object, and where."""
    return tuple(
        (_digest(_what(plan), _PART_BYTES), _digest(_where(plan), _PART_BYTES)) for plan in plans
    )


def _what(plan: ObjectPlan) -> list[Any]:
    """All that is binding but the places. Words are not, nor numbers that change by themselves."""
    executions = sorted([e.action, e.slot, e.replaces, e.reason] for e in plan.executions)
    return [
        [plan.action, plan.kind, plan.namespace, plan.name, plan.run],
        [plan.generation, plan.generation_after],
        [[f.field, f.old, f.new] for f in plan.fields],
        [*executions, plan.executions_omitted],
        [plan.queued.slots, plan.queued.what] if plan.queued else None,
        [p.message for p in plan.problems],
        [plan.disconnect.action, plan.disconnect.after_seconds] if plan.disconnect else None,
    ]


def _where(plan: ObjectPlan) -> list[Any]:
    return sorted([e.slot, e.node] for e in plan.executions)


def _digest(data: Any, size: int) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).digest()[:size].hex()
