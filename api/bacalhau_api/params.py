"""The parameters of the known engines, sources and publishers, as types.

Other types are plug points: they pass through with whatever parameters they have, as long as their
type looks like a name. Whether a node can run, fetch or publish one is for the node to say.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema

from bacalhau_api.base import Model
from bacalhau_api.names import RESERVED_ENV_PREFIX, check_path, check_text, check_type_name
from bacalhau_api.shape import Findings, Loc, Shaper
from bacalhau_api.tree import Fields, Node, from_plain, is_null, shown
from bacalhau_api.v1.job import SpecConfig


class Role(StrEnum):
    """What a SpecConfig selects."""

    ENGINE = "engine"
    SOURCE = "source"
    PUBLISHER = "publisher"


class Params(Model):
    """Parameters of one known type."""

    # Validators are built on first use: a command needs those of one or two types.
    model_config = ConfigDict(defer_build=True)

    @classmethod
    def of(cls, params: Mapping[str, object]) -> Self:
        """Decode stored parameters. Raises InvalidError."""
        findings = Findings()
        shaper = Shaper(findings, ignore_case=True)
        data = shaper.shape_model(from_plain(params), cls, ())
        decoded = shaper.validate(data, cls)
        findings.check()
        assert decoded is not None
        return decoded


# --- Parts ----------------------------------------------------------------------------------------


def _check_filled(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank")
    return check_text(value)


def _check_word(value: str) -> str:
    if re.search(r"[\s\x00-\x1f\x7f]", _check_filled(value)):
        raise ValueError("may not contain spaces or control characters")
    return value


def _check_http_url(value: str) -> str:
    _check_word(value)
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is not a valid URL") from None
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise ValueError("must be a URL such as https://example.org/data.csv")
    if parts.username is not None or parts.password is not None:
        raise ValueError("may not hold a user name or password: the job is stored and shown")
    return value


def _check_file_url(value: str) -> str:
    if not urlsplit(_check_http_url(value)).path.rpartition("/")[2]:
        raise ValueError("must end in a file name, which the downloaded file will have")
    return value


def _check_git_url(value: str) -> str:
    if not re.fullmatch(r"(https?|ssh)://\S+|[\w.-]+@[\w.-]+:\S+", _check_word(value)):
        raise ValueError("must be a repository such as https://example.org/repo.git")
    return value


def _check_data_url(value: str) -> str:
    if not value.startswith("data:") or "," not in value:
        raise ValueError("must be a data URL such as data:,hello or data:;base64,aGVsbG8=")
    return check_text(value)


def _check_cid(value: str) -> str:
    if not re.fullmatch(r"(/ipfs/)?[A-Za-z0-9]{8,128}(/\S*)?", value):
        raise ValueError("must be a content identifier such as bafybeig… or Qm…")
    return value


def _check_bucket(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", value):
        raise ValueError("must be a bucket name: letters, digits, '.', '-' and '_'")
    return value


ATTEMPTS_MAX: Final = 100
"""Attempts of one slot; see RetryPolicy."""

KEY_PLACEHOLDERS: Final = ("jobID", "executionID", "nodeID", "partition", "date", "time")
"""What may stand in braces in an S3 publisher's key."""


def _check_key_template(value: str) -> str:
    for word in re.findall(r"\{([^{}]*)\}", _check_filled(value)):
        if word not in KEY_PLACEHOLDERS:
            known = ", ".join(f"{{{x}}}" for x in KEY_PLACEHOLDERS)
            raise ValueError(f"has the unknown placeholder {{{word[:40]}}}; use {known}")
    return value


def _check_variable(value: str) -> str:
    name, equals, _ = check_text(value).partition("=")
    if not equals or not name:
        raise ValueError("must be of the form NAME=value")
    if name.upper().startswith(RESERVED_ENV_PREFIX):
        raise ValueError(f"names beginning with {RESERVED_ENV_PREFIX} are set by the system")
    return value


def _check_directory(value: str) -> str:
    return check_path(value) if value else value


def _check_user(value: str) -> str:
    if value and not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,63}(:[A-Za-z0-9_][\w.-]{0,63})?", value):
        raise ValueError("must be a user such as 1000, 1000:1000 or nobody")
    return value


def _check_pattern(value: str) -> str:
    if len(value) > 512:
        raise ValueError("a pattern has at most 512 characters")
    return check_text(value)


def _one_of(*words: str) -> BeforeValidator:
    """Takes these words in any letter case."""
    folded = {word.lower(): word for word in words}
    return BeforeValidator(lambda x: folded.get(x.lower(), x) if isinstance(x, str) else x)


def _first_attempts(value: Any) -> Any:
    """A number of attempts is kept as the list of them."""
    if isinstance(value, list):
        return tuple(value)
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return tuple(range(value)) if is_count and 0 <= value <= ATTEMPTS_MAX else value


_ATTEMPT: Final = {"type": "integer", "minimum": 0, "maximum": ATTEMPTS_MAX}
Attempts = Annotated[
    tuple[Annotated[int, Field(ge=0, le=ATTEMPTS_MAX)], ...],
    BeforeValidator(_first_attempts),
    WithJsonSchema({"anyOf": [_ATTEMPT, {"type": "array", "items": _ATTEMPT}]}),
]
Text = Annotated[str, AfterValidator(check_text)]
Filled = Annotated[str, AfterValidator(_check_filled)]
Word = Annotated[str, AfterValidator(_check_word)]
AbsolutePath = Annotated[str, AfterValidator(check_path)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
HttpUrl = Annotated[str, AfterValidator(_check_http_url)]
OptionalHttpUrl = Annotated[str, AfterValidator(lambda x: _check_http_url(x) if x else x)]
Bucket = Annotated[str, AfterValidator(_check_bucket)]


# --- Engines --------------------------------------------------------------------------------------


class DockerParams(Params):
    """A container."""

    image: Word = Field(max_length=1024, description="Name, tag or digest of the image.")
    entrypoint: tuple[Text, ...] = Field(default=(), description="Empty: the image's own.")
    parameters: tuple[Text, ...] = Field(default=(), description="Arguments.")
    environment_variables: tuple[Annotated[str, AfterValidator(_check_variable)], ...] = Field(
        default=(), description="`NAME=value`; the task's env goes over these."
    )
    working_directory: Annotated[str, AfterValidator(_check_directory)] = ""
    user: Annotated[str, AfterValidator(_check_user)] = Field(
        default="", description="`uid`, `uid:gid` or names that the image knows. Empty: its own."
    )
    read_only_root: bool = Field(
        default=False,
        description="Only results, writable inputs and a /tmp in memory are writable.",
    )
    shm_bytes: int = Field(
        default=0, ge=0, le=2**40, description="Size of /dev/shm. 0: the engine's default."
    )


class WasmParams(Params):
    """A WebAssembly module. Its environment is the task's `env`."""

    entry_module: AbsolutePath = Field(description="Where an input source puts the module.")
    entrypoint: Filled = Field(default="_start", description="The exported function to call.")
    parameters: tuple[Text, ...] = Field(default=(), description="Arguments.")
    import_modules: tuple[AbsolutePath, ...] = Field(
        default=(), description="Modules to link, where input sources put them."
    )


class NoopParams(Params):
    """Does nothing, for so long and with such an end: for tests and trials."""

    duration_seconds: float = Field(default=0.0, ge=0, le=10 * 365 * 86400)
    exit_code: int = Field(default=0, ge=0, le=255)
    stdout: Text = Field(default="", description="Text to print.")
    stderr: Text = Field(default="", description="Text to print as an error.")
    fail_on_attempts: Attempts = Field(
        default=(),
        description="Attempts that fail: a list counted from 0, or how many at first.",
    )
    output_bytes: int = Field(default=0, ge=0, le=2**40, description="Bytes to put out besides.")

    def fails_on(self, attempt: int) -> bool:
        """Whether attempt number `attempt`, counted from 0, is to fail."""
        return attempt in self.fail_on_attempts


# --- Sources --------------------------------------------------------------------------------------


class LocalSource(Params):
    """A file or directory of the node, which its operator has to allow."""

    source_path: AbsolutePath
    read_write: bool = False
    create_as: Annotated[Literal["noCreate", "dir", "file"], _one_of("noCreate", "dir", "file")] = (
        Field(default="noCreate", description="What to create if nothing is there.")
    )


class InlineSource(Params):
    """Data in the job itself, as a `data:` URL; of type application/gzip: a tar.gz directory."""

    url: Annotated[str, AfterValidator(_check_data_url)]


class UrlSource(Params):
    """One file, fetched by HTTP. It appears in the target directory under its own name."""

    url: Annotated[str, AfterValidator(_check_file_url)]
    checksum_sha256: Text = Field(
        default="", description="64 hex digits, or base64. With it nothing is fetched twice."
    )


class S3Partition(Params):
    """How the objects are shared out among the partitions of a job."""

    type: Annotated[
        Literal["none", "object", "regex", "substring", "date"],
        _one_of("none", "object", "regex", "substring", "date"),
    ] = "none"
    pattern: Pattern = Field(default="", description="regex: its groups make the partition key.")
    start_index: int = Field(default=0, ge=0, le=10_000)
    end_index: int = Field(default=0, ge=0, le=10_000)
    date_format: Pattern = ""


class S3Source(Params):
    """Objects of a bucket. A key that ends in `/` or `*` is a prefix."""

    bucket: Bucket
    key: Text = ""
    filter: Pattern = Field(default="", description="A regular expression on what follows the key.")
    region: Text = ""
    endpoint: OptionalHttpUrl = ""
    version_id: Text = ""
    checksum_sha256: Text = ""
    partition: S3Partition = S3Partition()


class IpfsSource(Params):
    """A file or directory in IPFS."""

    cid: Annotated[str, AfterValidator(_check_cid)]


class GitSource(Params):
    """A checkout of a repository."""

    url: Annotated[str, AfterValidator(_check_git_url)]
    ref: Text = Field(default="", description="Branch, tag or commit; empty: the default branch.")


# --- Publishers -----------------------------------------------------------------------------------


class LocalPublisher(Params):
    """Kept on the node, served through the orchestrator."""


class NoopPublisher(Params):
    """Nothing is published."""


class IpfsPublisher(Params):
    """Added to IPFS."""


class S3Publisher(Params):
    """Put into a bucket."""

    bucket: Bucket
    key: Annotated[str, AfterValidator(_check_key_template)] = Field(
        description="May contain " + ", ".join(f"{{{x}}}" for x in KEY_PLACEHOLDERS) + "."
    )
    region: Text = ""
    endpoint: OptionalHttpUrl = ""
    encoding: Annotated[Literal["gzip", "plain"], _one_of("gzip", "plain")] = "gzip"


KNOWN: Final[Mapping[Role, Mapping[str, type[Params]]]] = {
    Role.ENGINE: {"docker": DockerParams, "wasm": WasmParams, "noop": NoopParams},
    Role.SOURCE: {
        "local": LocalSource,
        "inline": InlineSource,
        "urlDownload": UrlSource,
        "s3": S3Source,
        "ipfs": IpfsSource,
        "git": GitSource,
    },
    Role.PUBLISHER: {
        "local": LocalPublisher,
        "s3": S3Publisher,
        "ipfs": IpfsPublisher,
        "noop": NoopPublisher,
    },
}
"""The known types of each role, by their stored spelling."""

_OTHER_NAMES: Final = {(Role.SOURCE, "localdirectory"): "local"}
_SPELLINGS: Final = _OTHER_NAMES | {
    (role, name.lower()): name for role, types in KNOWN.items() for name in types
}


def canonical_type(role: Role, name: str) -> str:
    """The stored spelling of a type: known ones in any letter case, others as they are."""
    trimmed = name.strip()
    return _SPELLINGS.get((role, trimmed.lower()), trimmed)


def shape_config(role: Role, shaper: Shaper, node: Node, loc: Loc) -> Any:
    """Shape the SpecConfig at `loc`: the known types' parameters are matched in any letter case,
    checked, and stored with their canonical names and without defaults.

    A publisher without a type is no publisher: None.
    """
    data = shaper.shape_model(node, SpecConfig, loc)
    if not isinstance(node, Fields):
        return data
    name = canonical_type(role, data["type"]) if isinstance(data.get("type"), str) else ""
    params_loc = (*loc, "params")
    params = shaper.origins.get(params_loc)
    if not name:
        return _without_type(role, shaper, node, loc)
    data["type"] = name
    model = KNOWN[role].get(name)
    if model is not None:
        data["params"] = _known_params(model, shaper, params, params_loc)
    else:
        _check_plug_type(shaper, node, loc, name)
        data["params"] = (
            {} if params is None or is_null(params) else shaper.plain(params, params_loc)
        )
    return data


def _without_type(role: Role, shaper: Shaper, node: Fields, loc: Loc) -> None:
    if role is Role.PUBLISHER and all(
        is_null(v) or shown(v) in ("''", "a mapping of 0") for v in node.entries.values()
    ):
        return
    known = ", ".join(KNOWN[role])
    shaper.refused.update((loc, (*loc, "type")))
    below = shaper.name_of(("type",))
    shaper.findings.add(node, "is missing", below=below, hint=f"say which, such as one of {known}")


def _check_plug_type(shaper: Shaper, node: Fields, loc: Loc, name: str) -> None:
    type_loc = (*loc, "type")
    where = shaper.origins.get(type_loc, node)
    try:
        check_type_name(name)
    except ValueError as error:
        shaper.refuse(where, type_loc, str(error), value=shown(where))


def _known_params(model: type[Params], shaper: Shaper, node: Node | None, loc: Loc) -> Any:
    sub = Shaper(shaper.findings, True, shaper.is_flat, {}, shaper.origins, shaper.refused)
    empty: dict[str, Any] = {}
    if node is None or is_null(node):
        shaper.origins.pop(loc, None)  # what is missing in it is missing in the config
        data: Any = empty
    else:
        data = sub.shape_model(node, model, loc)
    checked = sub.validate(data, model, loc)
    return empty if checked is None else checked.wire()
