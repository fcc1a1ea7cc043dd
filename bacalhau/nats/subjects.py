"""How names become tokens of NATS subjects, and back.

A token must not be empty, nor hold a dot, a wildcard or a space; our names may hold dots, and a
namespace may be empty. Everything but letters, digits, `-` and `_` is written as `=XX`, one per
UTF-8 byte; the empty name is a lone `=`.
"""

import re
from functools import lru_cache
from urllib.parse import unquote

from bacalhau_api.errors import InvalidError, Problem

ALL_REQUESTS = "node.>"
ALL_READS = "agent.>"

TOKEN_LENGTH_MAX = 1024
"""The server closes a connection over a line of more than 4 KiB, and a subject has up to three
tokens made of names. What is refused is not kept in the caches below, either."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_EMPTY = "="


@lru_cache(maxsize=65536)
def encode_token(name: str) -> str:
    """One subject token that stands for `name`. Raises InvalidError for one that is too long."""
    token = _UNSAFE.sub(_escape, name) or _EMPTY
    if len(token) > TOKEN_LENGTH_MAX:
        raise InvalidError([Problem("name", "is longer than that of any object", name[:80])])
    return token


@lru_cache(maxsize=65536)
def decode_token(token: str) -> str:
    """The name that `encode_token` was given."""
    if "=" not in token:
        return token
    return "" if token == _EMPTY else unquote(token.replace("=", "%"), errors="strict")


def _escape(match: re.Match[str]) -> str:
    return "".join(f"={byte:02X}" for byte in match[0].encode())


def node_subject(node: str, verb: str) -> str:
    """What a node publishes requests on: `node.<name>.<verb>`; `*` as node listens to all."""
    return f"node.{_node(node)}.{verb}"


def agent_subject(node: str, verb: str) -> str:
    """What a node answers on: `agent.<name>.<verb>`."""
    return f"agent.{_node(node)}.{verb}"


def node_inbox(node: str) -> str:
    """The inbox prefix under which a node may receive replies."""
    return f"_INBOX_{encode_token(node)}"


def _node(node: str) -> str:
    return node if node == "*" else encode_token(node)
