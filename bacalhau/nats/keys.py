"""NKeys: the key pairs that clients of NATS sign in with. The seed never leaves its machine."""

import base64
import os
import re
from pathlib import Path
from typing import Final

import nkeys  # type: ignore[import-untyped]

from bacalhau.flush import fsync_path
from bacalhau_api.errors import TerminalError

_PUBLIC_LENGTH: Final = 56
_SEED_LENGTH: Final = 58
_LETTERS: Final = re.compile("[A-Z2-7]+")


def new_seed() -> str:
    """A fresh seed of a user (`SU…`)."""
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode()


def public_key(seed: str) -> str:
    """The public key (`U…`) of a seed. Raises ValueError if it is not a user's seed."""
    _check(seed, _SEED_LENGTH, "SU", "the seed")
    key: bytes = nkeys.from_seed(bytearray(seed.encode())).public_key
    return key.decode()


def check_public_key(key: str) -> str:
    """Returns the key. Raises ValueError if it is not the public key of a user, or misspelt."""
    _check(key, _PUBLIC_LENGTH, "U", "the public key")
    return key


def _check(text: str, length: int, prefix: str, what: str) -> None:
    if len(text) != length or not text.startswith(prefix):
        raise ValueError(
            f"is not {what} of an NKey user; it has {length} letters, the first {prefix}"
        )
    if not _LETTERS.fullmatch(text):  # padding, too: it would be a shorter key
        raise ValueError("is not a valid NKey; it holds other letters than A-Z and 2-7")
    # The library itself does not look at the checksum.
    raw = base64.b32decode(text + "=" * (-length % 8))
    if nkeys.crc16(raw[:-2]).to_bytes(2, "little") != raw[-2:]:
        raise ValueError("is not a valid NKey; its checksum is wrong")


def load_or_make_seed(path: Path, remedy: str) -> str:
    """The seed kept in a file that only its owner may read; made at first. Raises TerminalError,
    with the remedy as its hint, if what is kept is none."""
    try:
        seed = path.read_text(errors="replace").strip()
        public_key(seed)
        return seed
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise TerminalError(f"the key in {path} {error}", hint=remedy) from error
    seed = new_seed()
    write_private(path, seed + "\n")
    return seed


def write_private(path: Path, text: str) -> None:
    """Replace a file as a whole, readable by its owner only, and on disk when this returns."""
    fresh = path.with_name(path.name + ".new")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    fsync_path(path.parent)
