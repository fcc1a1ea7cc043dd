"""What is typed behind `-i`, `-o`, `-p` and `--port`, as parts of a task. Pure.

Each function raises Wrong, whose text says what is wrong with its argument, and the remedy.
"""

import csv
import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from bacalhau_api.v1.job import InputSource, Port, ResultPath, SpecConfig

DEFAULT_TARGET: Final = "/inputs"

_KEYS: Final = {
    "src": "src", "source": "src",
    "dst": "dst", "destination": "dst", "target": "dst",
    "opt": "opt",
}  # fmt: skip
_SOURCE_HINT: Final = (
    "write file:///PATH (on the node), https://…, s3://BUCKET/KEY or ipfs://CID, then :PATH or "
    ",dst=PATH for where the job sees it"
)

Options = Mapping[str, str]


class Wrong(ValueError):
    """Something typed that makes no sense; `hint` is the remedy."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def parse_input(text: str) -> InputSource:
    """`SOURCE[:PATH]`, `SOURCE,dst=PATH,opt=KEY=VALUE` or `src=SOURCE,dst=PATH,…`. Fields are
    separated as in CSV: one with a comma in it stands in double quotes."""
    source, target, options = "", "", dict[str, str]()
    for number, part in enumerate(_fields(text)):
        key, sign, value = part.partition("=")
        known = _KEYS.get(key.strip().lower()) if sign else None
        if known is None and number:
            raise Wrong(f"has the unknown part {part!r}", "known: src=, dst=, opt=KEY=VALUE")
        if known == "dst":
            target = value
        elif known == "opt":
            name, _, setting = value.partition("=")
            options[name.strip()] = setting
        else:
            source, given = _split(value if known else part)
            target = target or given
    if not source:
        raise Wrong("names no source", _SOURCE_HINT)
    return InputSource(source=source_config(source, options), target=target or DEFAULT_TARGET)


def source_config(uri: str, options: Options) -> SpecConfig:
    """The source that a URI names, with its options."""
    if uri.startswith("/"):
        return _local(uri, options)
    scheme, sign, rest = uri.partition("://")
    if not sign:
        hint = _SOURCE_HINT
        if uri.startswith(("./", "../", "~")):
            hint = "jobs see the disks of nodes: write the whole path that it has there"
        raise Wrong("is not a source that is known", hint)
    if scheme.lower().startswith("fsspec+"):
        _chosen(options, {})
        return SpecConfig(type="fsspec", params={"url": uri.partition("+")[2]})
    make = _SCHEMES.get(scheme.lower())
    if make is None:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        hint = f"known: {known}; others, on nodes that allow them: fsspec+{scheme}://…"
        raise Wrong(f"has the unknown scheme {scheme}://", hint)
    return make(uri, rest, options)


def parse_publisher(text: str) -> SpecConfig:
    """`local`, `ipfs`, `s3://BUCKET/KEY`, or another type, each with `,opt=KEY=VALUE`."""
    first, *others = _fields(text)
    options: dict[str, str] = {}
    for part in others:
        key, _, value = part.partition("=")
        if key.strip().lower() != "opt":
            raise Wrong(f"has the unknown part {part!r}", "options are written opt=KEY=VALUE")
        name, _, setting = value.partition("=")
        options[name.strip()] = setting
    scheme, sign, rest = first.partition("://")
    if not sign:
        return SpecConfig(type=first.strip(), params=dict(options))
    if scheme.lower() == "ipfs" and not rest:
        return SpecConfig(type="ipfs", params=dict(options))
    if scheme.lower() != "s3":
        raise Wrong(f"has the unknown scheme {scheme}://", "use local, ipfs or s3://BUCKET/KEY")
    bucket, _, key = rest.partition("/")
    if not bucket or not key:
        hint = "such as s3://my-bucket/results/{jobID}/{executionID}"
        raise Wrong("must name a bucket and a key", hint)
    params = {"bucket": bucket, "key": key}
    return SpecConfig(type="s3", params=params | _chosen(options, _S3_PUBLISHER))


def parse_result(text: str) -> ResultPath:
    """`NAME:PATH`."""
    name, colon, path = text.partition(":")
    if not colon or not name or not path.startswith("/"):
        raise Wrong("is not of the form NAME:PATH", "such as results:/outputs")
    return ResultPath(name=name, path=path)


def parse_port(text: str) -> Port:
    """`NAME`, `NAME=HOST` or `NAME=HOST:TARGET`; the empty HOST means: any."""
    name, _, numbers = text.partition("=")
    static, _, target = numbers.partition(":")
    found = []
    for number in (static, target):
        if number and not (number.isascii() and number.isdigit() and int(number) <= 65535):
            raise Wrong(f"{number!r} is not a port", "write NAME=HOST:TARGET, such as http=8080:80")
        found.append(int(number or 0))
    return Port(name=name.strip(), static=found[0], target=found[1])


def parse_pair(text: str) -> tuple[str, str]:
    """`KEY=VALUE`."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise Wrong("is not of the form KEY=VALUE")
    return key.strip(), value


def _fields(text: str) -> list[str]:
    try:
        (row,) = csv.reader([text.strip()], strict=True)
    except (csv.Error, ValueError) as error:
        raise Wrong(f"cannot be taken apart at its commas: {error}") from error
    if not row or not row[0].strip():
        raise Wrong("is empty")
    return row


def _split(text: str) -> tuple[str, str]:
    """`SOURCE:PATH`. The colon is the last one before a path; `://` is none."""
    match = re.fullmatch(r"(.+):(/(?!/).*)", text.strip(), re.DOTALL)
    return (match[1], match[2]) if match else (text.strip(), "")


def _local(path: str, options: Options) -> SpecConfig:
    params: dict[str, Any] = {"sourcePath": path}
    for name, value in options.items():
        match re.sub(r"[-_]", "", name).lower():
            case "rw" | "readwrite":
                params["readWrite"] = _truth(name, value)
            case "createas":
                params["createAs"] = value
            case _:
                raise Wrong(f"has the unknown option {name!r}", "known: rw, create-as=dir|file")
    return SpecConfig(type="local", params=params)


def _truth(name: str, value: str) -> bool:
    if value.strip().lower() not in ("", "true", "false"):
        raise Wrong(f"option {name} is {value!r}", "write true or false")
    return value.strip().lower() != "false"


def _file(uri: str, rest: str, options: Options) -> SpecConfig:
    if not rest.startswith("/"):
        hint = f"write three slashes before an absolute path: file:///{rest.lstrip('./')}"
        raise Wrong("does not name an absolute path", hint)
    return _local(rest, options)


def _url(uri: str, rest: str, options: Options) -> SpecConfig:
    checksum = _chosen(
        options, {"checksum256": "checksumSha256", "checksumsha256": "checksumSha256"}
    )
    return SpecConfig(type="urlDownload", params={"url": uri} | checksum)


def _ipfs(uri: str, rest: str, options: Options) -> SpecConfig:
    _chosen(options, {})
    return SpecConfig(type="ipfs", params={"cid": rest})


def _s3(uri: str, rest: str, options: Options) -> SpecConfig:
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise Wrong("names no bucket", "write s3://BUCKET/KEY")
    params: dict[str, Any] = {"bucket": bucket} | ({"key": key} if key else {})
    chosen = _chosen(options, _S3_SOURCE)
    partition = {k.removeprefix("partition."): v for k, v in chosen.items() if "." in k}
    params |= {k: v for k, v in chosen.items() if "." not in k}
    return SpecConfig(type="s3", params=params | ({"partition": partition} if partition else {}))


def _git(uri: str, rest: str, options: Options) -> SpecConfig:
    url = uri.partition("+")[2]
    ref = _chosen(options, {"ref": "ref", "branch": "ref", "tag": "ref"})
    return SpecConfig(type="git", params={"url": url} | ref)


def _chosen(options: Options, known: Mapping[str, str]) -> dict[str, str]:
    """Options by the names of parameters. Their own names are read in any spelling."""
    found = {}
    for name, value in options.items():
        folded = re.sub(r"[-_]", "", name).lower()
        if folded not in known:
            words = ", ".join(dict.fromkeys(known.values())) or "none"
            raise Wrong(f"has the unknown option {name!r}", f"known here: {words}")
        found[known[folded]] = value
    return found


_S3_PUBLISHER: Final = {"endpoint": "endpoint", "region": "region", "encoding": "encoding"}
_S3_SOURCE: Final = {
    "endpoint": "endpoint", "region": "region", "filter": "filter",
    "versionid": "versionId", "checksum256": "checksumSha256", "checksumsha256": "checksumSha256",
    "partition": "partition.type", "partition.type": "partition.type",
    "partition.pattern": "partition.pattern", "partition.dateformat": "partition.dateFormat",
}  # fmt: skip

_SCHEMES: Final[Mapping[str, Callable[[str, str, Options], SpecConfig]]] = {
    "file": _file,
    "https": _url,
    "http": _url,
    "s3": _s3,
    "ipfs": _ipfs,
    "git+https": _git,
    "git+http": _git,
}


def file_name_of(uri: str) -> str:
    """The file name at the end of a URI's path; empty if it has none."""
    return urlsplit(uri).path.rpartition("/")[2]
