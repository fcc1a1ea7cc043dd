"""SHA-256 checksums as users write them: 64 hex digits, or base64 as object stores show them."""

import base64
import binascii
import re

from bacalhau_api.errors import TerminalError


def read_sha256(text: str, field: str) -> str:
    """64 lower-case hex digits; empty for empty. Raises TerminalError."""
    text = text.strip().removeprefix("sha256:")
    if not text or re.fullmatch(r"[0-9a-fA-F]{64}", text):
        return text.lower()
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        data = b""
    if len(data) != 32:
        raise TerminalError(
            f"params.{field} must be a SHA-256, as 64 hex digits or in base64 (got {text[:80]!r})",
            reason="InvalidInput",
        )
    return data.hex()
