"""What names, keys and paths may look like. Each check returns its value, or raises ValueError
with a message for users that says what is wrong and what to write instead.

The names of objects themselves are checked by `bacalhau_api.meta.check_name`.
"""

import ipaddress
import posixpath
import re
from typing import Final

from bacalhau_api.meta import LABEL_VALUE_LENGTH_MAX, check_name

LABEL_KEY_LENGTH_MAX: Final = 253
TEXT_LENGTH_MAX: Final = 64 * 1024
"""The longest free text: an annotation, an environment variable, a `meta` value."""

PATH_LENGTH_MAX: Final = 4096
PORT_NAME_LENGTH_MAX: Final = 237
RESERVED_KEY_PREFIX: Final = "bacalhau.org/"
"""Labels, annotations and `meta` keys that only the system itself writes, but for these:"""

USER_KEYS: Final = frozenset({f"{RESERVED_KEY_PREFIX}prune", f"{RESERVED_KEY_PREFIX}adopt"})
"""What manifests say to a watched directory; see `bacalhau_api.v1.source`."""

RESERVED_ENV_PREFIX: Final = "BACALHAU_"
RESERVED_RESULT_NAMES: Final = frozenset({"stdout", "stderr", "exitcode"})
"""Files that lie beside the result directories, compared without regard to case."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL_IN_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LABEL_KEY = re.compile(r'[^\s=!<>(),"\x00-\x1f\x7f-\x9f]+')
_ENV_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_HOST_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TYPE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*")
_DOMAIN_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?")


def is_reserved(key: str) -> bool:
    """Whether only the system itself writes entries with this key."""
    return key.startswith(RESERVED_KEY_PREFIX) and key not in USER_KEYS


def check_text(value: str) -> str:
    """Text that can be stored and sent: no NUL (no program can be given one), no half of a
    surrogate pair (it has no UTF-8 form)."""
    if "\0" in value:
        raise ValueError("contains a NUL character; remove it")
    if _SURROGATE.search(value):
        raise ValueError("contains half of a surrogate pair, which is not valid Unicode; remove it")
    return value


def check_printable(value: str) -> str:
    """Text shown on terminals: no control characters but tabs and line ends."""
    check_text(value)
    if found := _CONTROL_IN_TEXT.search(value):
        raise ValueError(f"contains the control character {found[0]!r}; remove it")
    return value


def check_long_text(value: str) -> str:
    """Printable text of bounded length."""
    if len(value) > TEXT_LENGTH_MAX:
        raise ValueError(f"has {len(value)} characters, at most {TEXT_LENGTH_MAX} are allowed")
    return check_printable(value)


def check_label_key(value: str) -> str:
    """A key of labels, annotations or `meta`: 1-253 characters that a selector can name."""
    if not value:
        raise ValueError("a key may not be empty")
    if len(value) > LABEL_KEY_LENGTH_MAX:
        raise ValueError(f"a key has at most {LABEL_KEY_LENGTH_MAX} characters")
    if not _LABEL_KEY.fullmatch(check_text(value)):
        raise ValueError(f'the key {value!r} may not contain spaces or any of = ! < > ( ) , "')
    return value


def check_label_value(value: str) -> str:
    """A label's value: at most 256 characters on one line."""
    if len(value) > LABEL_VALUE_LENGTH_MAX:
        raise ValueError(
            f"a label value has at most {LABEL_VALUE_LENGTH_MAX} characters, this has {len(value)};"
            " use an annotation for longer text"
        )
    if found := _CONTROL.search(check_text(value)):
        raise ValueError(f"a label value may not contain the control character {found[0]!r}")
    return value


def check_type_name(value: str) -> str:
    """The type of an engine, source or publisher."""
    if len(value) > 63 or not _TYPE_NAME.fullmatch(value):
        raise ValueError(
            "must be a name: letters and digits, parts joined by '-', '_' or '.', at most 63 long"
        )
    return value


def check_env_name(value: str) -> str:
    """The name of an environment variable given by a task."""
    if value.upper().startswith(RESERVED_ENV_PREFIX):
        raise ValueError(f"names beginning with {RESERVED_ENV_PREFIX} are set by the system")
    if len(value) > 256:
        raise ValueError("a variable name has at most 256 characters")
    if not _ENV_NAME.fullmatch(value):
        raise ValueError(
            "a variable name is upper-case letters, digits and '_', and begins with a letter"
        )
    return value


def check_env_value(value: str) -> str:
    """The value of an environment variable. `env:NAME` stands for the node's own variable NAME."""
    if len(value) > TEXT_LENGTH_MAX:
        raise ValueError(f"has {len(value)} characters, at most {TEXT_LENGTH_MAX} are allowed")
    check_text(value)
    if value.startswith("env:") and not _HOST_ENV_NAME.fullmatch(value[4:]):
        raise ValueError("after 'env:' the name of a variable on the node must follow")
    return value


def check_path(value: str) -> str:
    """An absolute path in the workload. Returns its normal form: no `//`, no final slash."""
    if not value.startswith("/"):
        raise ValueError("must be an absolute path, such as /data")
    if len(value) > PATH_LENGTH_MAX:
        raise ValueError(f"a path has at most {PATH_LENGTH_MAX} characters")
    if found := _CONTROL.search(check_text(value)):
        raise ValueError(f"a path may not contain the control character {found[0]!r}")
    if ".." in value.split("/"):
        raise ValueError("may not contain '..'; write the path it leads to")
    return "/" + posixpath.normpath(value).lstrip("/")


def check_mount_path(value: str) -> str:
    """An absolute path that something is mounted at. Returns its normal form."""
    path = check_path(value)
    if path == "/":
        raise ValueError("may not be the root; name a directory, such as /data")
    return path


def check_result_name(value: str) -> str:
    """The name of a result: one path segment, which becomes a directory of the outputs."""
    check_name(value)
    if value.casefold() in RESERVED_RESULT_NAMES:
        raise ValueError("stdout, stderr and exitCode are kept anyway; choose another name")
    return value


def check_port_name(value: str) -> str:
    """The name of a port: it becomes part of an environment variable."""
    if len(value) > PORT_NAME_LENGTH_MAX:
        raise ValueError(f"a port name has at most {PORT_NAME_LENGTH_MAX} characters")
    if not _HOST_ENV_NAME.fullmatch(value):
        raise ValueError("a port name is letters, digits and '_', and begins with no digit")
    return value


def check_ip(value: str) -> str:
    """An IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        raise ValueError("must be an IP address, such as 127.0.0.1") from None
    return value


def check_domain(value: str) -> str:
    """A domain name with at least one dot, optionally with a leading `*.` or `.`, or an IP
    address. Returns it trimmed and in lower case."""
    domain = value.strip().lower()
    if len(domain) > 253:
        raise ValueError("a domain name has at most 253 characters")
    labels = domain.removeprefix("*").removeprefix(".").removesuffix(".").split(".")
    if len(labels) > 1 and all(len(x) <= 63 and _DOMAIN_LABEL.fullmatch(x) for x in labels):
        return domain
    try:
        return check_ip(domain)
    except ValueError:
        raise ValueError("must be a domain name such as example.org, or an IP address") from None
