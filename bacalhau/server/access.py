"""Who may talk to the API: where it may listen, which tokens it knows, which hosts it answers to.

Simple on purpose: every token may do everything. Tokens are kept as digests only.
"""

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import check_name

TOKEN_PREFIX = "bat-"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Access:
    """What a server demands of its callers.

    `tokens` maps a user's name to the hex SHA-256 of the bearer token; empty means that no token
    is asked for. With `loopback_hosts_only`, requests whose Host header is not a loopback name are
    refused, so that a web page cannot reach the server through a name that it rebinds.
    """

    tokens: Mapping[str, str] = field(default_factory=dict)
    loopback_hosts_only: bool = True

    def user_of(self, authorization: str) -> str | None:
        """The user whose token this Authorization header carries, or None."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            return None
        digest = digest_of(token.strip())
        found = None
        for name, known in self.tokens.items():
            # No early exit: the time taken says nothing about which token is close.
            if hmac.compare_digest(known, digest):
                found = name
        return found


def digest_of(token: str) -> str:
    """How a token is kept. Tokens are 256 random bits, so that no salt or stretching is needed."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def is_loopback(host: str) -> bool:
    """True for names and addresses that mean this machine only."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def access_for(host: str, tokens: Mapping[str, str], *, insecure_lab: bool) -> Access:
    """The rules for listening on `host`. Raises InvalidError where that would be an open door.

    Whoever can submit a job can run code on the nodes, so that beyond loopback tokens are needed.
    """
    if is_loopback(host):
        return Access(tokens=tokens, loopback_hosts_only=not tokens)
    if not tokens and not insecure_lab:
        raise InvalidError(
            [
                Problem(
                    "--host",
                    "anyone who reaches this address could run code on your nodes",
                    host,
                    "give --api-token-file FILE to ask callers for a token (made at first start), "
                    "or --insecure-lab to let everybody in",
                )
            ]
        )
    return Access(tokens=tokens, loopback_hosts_only=False)


def load_tokens(path: Path) -> tuple[dict[str, str], str | None]:
    """Read a token file: lines of `NAME SHA256-HEX`, `#` begins a comment.

    If there is no file, one is made with a fresh token for `admin`, and the token itself is
    returned as second value, this one time. Raises InvalidError for a malformed file.
    """
    if not path.exists():
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        tokens = {"admin": digest_of(token)}
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("# name and SHA-256 of each API token; the tokens themselves are not kept\n")
            file.writelines(f"{name} {digest}\n" for name, digest in tokens.items())
        return tokens, token
    tokens = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not _is_name(words[0]) or not _DIGEST.fullmatch(words[1]):
            message = "is not of the form `NAME SHA256-HEX`"
            hint = "make the digest with: printf %s TOKEN | sha256sum"
            raise InvalidError([Problem(f"{path}:{number}", message, hint=hint)])
        tokens[words[0]] = words[1]
    if not tokens:
        raise InvalidError([Problem(str(path), "holds no token", hint="delete it to make one")])
    return tokens, None


def _is_name(word: str) -> bool:
    try:
        check_name(word)
    except ValueError:
        return False
    return True
