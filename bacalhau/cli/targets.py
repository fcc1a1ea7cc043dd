"""Which objects a command is about: `job/a`, `jobs a b`, `node n1`."""

from collections.abc import Sequence
from dataclasses import dataclass

from bacalhau.cli.exits import usage
from bacalhau.kinds import ALL, JOB, KindNames, find_kind


@dataclass(frozen=True, slots=True)
class Target:
    """A kind, and a name in it; the empty name means all."""

    kind: KindNames
    name: str = ""


def parse_targets(words: Sequence[str]) -> list[Target]:
    """Read `KIND`, `KIND NAME...` or `KIND/NAME...`. Raises InvalidError."""
    if not words:
        raise _wrong("", "says what to show", f"such as jobs, or job/NAME; kinds: {_known()}")
    if "/" not in words[0]:
        kind = _kind(words[0])
        slashed = [word for word in words[1:] if "/" in word]
        if slashed:
            raise _wrong(slashed[0], "mixes `KIND NAME` with `KIND/NAME`", "use one of the two")
        return [Target(kind, name) for name in words[1:]] or [Target(kind)]
    return [_slashed(word) for word in words]


def parse_named(words: Sequence[str]) -> list[Target]:
    """The same, where names are needed."""
    targets = parse_targets(words)
    for target in targets:
        if not target.name:
            kind = target.kind.singular
            raise _wrong(target.kind.plural, "names no object", f"write {kind}/NAME")
    return targets


def job_name(word: str) -> str:
    """The name in `NAME` or `job/NAME`. Raises InvalidError."""
    if "/" not in word:
        return word
    target = _slashed(word)
    if target.kind is not JOB:
        raise _wrong(word, "is not a job", "write NAME or job/NAME")
    return target.name


def _slashed(word: str) -> Target:
    kind, slash, name = word.partition("/")
    if not slash or not name:
        raise _wrong(word, "is not of the form KIND/NAME", "such as job/NAME")
    return Target(_kind(kind), name)


def _kind(word: str) -> KindNames:
    kind = find_kind(word)
    if kind is None:
        raise _wrong(word, "is not a kind", f"kinds: {_known()}")
    return kind


def _known() -> str:
    return ", ".join(kind.plural for kind in ALL)


def _wrong(word: str, message: str, hint: str) -> Exception:
    return usage(repr(word) if word else "the command", message, hint=hint)
