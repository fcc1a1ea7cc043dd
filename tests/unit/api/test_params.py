"""Parameters of known types: what is stored, what is refused, and that plug points pass."""

from typing import Any

import pytest

from bacalhau_api.canonical import canonical_job
from bacalhau_api.errors import InvalidError
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.params import (
    KNOWN,
    DockerParams,
    LocalSource,
    NoopParams,
    Role,
    S3Publisher,
    WasmParams,
    canonical_type,
)
from bacalhau_api.v1.job import InputSource, Job, JobSpec, JobType, SpecConfig, Task


def settled(role: Role, kind: str, params: dict[str, Any]) -> SpecConfig:
    """What becomes of a SpecConfig within a job."""
    config = SpecConfig(type=kind, params=params)
    engine = config if role is Role.ENGINE else SpecConfig(type="noop")
    task = Task(
        engine=engine,
        publisher=config if role is Role.PUBLISHER else None,
        input_sources=(InputSource(source=config, target="/in"),) if role is Role.SOURCE else (),
    )
    job = Job(metadata=ObjectMeta(name="a"), spec=JobSpec(type=JobType.BATCH, tasks=(task,)))
    got = canonical_job(job).spec.task
    if role is Role.SOURCE:
        return got.input_sources[0].source
    publisher = got.publisher or SpecConfig(type="")
    return got.engine if role is Role.ENGINE else publisher


E, S, P = Role.ENGINE, Role.SOURCE, Role.PUBLISHER


@pytest.mark.parametrize(
    ("role", "kind", "params", "stored"),
    [
        (E, " Docker ", {"Image": "a", "ENTRYPOINT": None, "Parameters": ["x", 5, True, "y"]},
         {"image": "a", "parameters": ["x", "5", "true", "y"]}),
        (E, "docker", {"image": "a", "environmentVariables": ["A=b=c", "lower="], "workingDirectory": "/w/"},
         {"image": "a", "environmentVariables": ["A=b=c", "lower="], "workingDirectory": "/w"}),
        (E, "noop", {"durationSeconds": "1m", "exitCode": 3, "failOnAttempts": [0, 2]},
         {"durationSeconds": 60.0, "exitCode": 3, "failOnAttempts": [0, 2]}),
        (E, "noop", {"FailOnAttempts": 2, "durationseconds": 0}, {"failOnAttempts": [0, 1]}),
        (E, "quantum", {"Qubits": {"N": [1, 2.5, None]}}, {"Qubits": {"N": [1, 2.5, None]}}),
        (S, "LOCALDIRECTORY", {"SourcePath": "/a/", "ReadWrite": "true", "CreateAs": "NoCreate"},
         {"sourcePath": "/a", "readWrite": True}),
        (S, "urldownload", {"URL": "https://example.org/a.csv?x=1"}, {"url": "https://example.org/a.csv?x=1"}),
        (S, "s3", {"bucket": "bkt", "partition": {"Type": "SUBSTRING", "EndIndex": 3}},
         {"bucket": "bkt", "partition": {"type": "substring", "endIndex": 3}}),
        (S, "git", {"url": "git@example.org:a/b.git", "ref": "main"}, {"url": "git@example.org:a/b.git", "ref": "main"}),
        (P, "s3", {"bucket": "bkt", "key": "r/{jobID}/{executionID}", "encoding": "Plain"},
         {"bucket": "bkt", "key": "r/{jobID}/{executionID}", "encoding": "plain"}),
        (P, "Local", {}, {}), (P, "ipfs", {}, {}), (P, "noop", {}, {}),
    ],
)  # fmt: skip
def test_parameters_are_stored_in_one_spelling(
    role: Role, kind: str, params: dict[str, Any], stored: dict[str, Any]
) -> None:
    got = settled(role, kind, params)
    assert got.params == stored
    assert got.type == canonical_type(role, kind)
    assert settled(role, got.type, got.params) == got


@pytest.mark.parametrize(
    ("role", "kind", "params", "says"),
    [
        (E, "docker", {}, "engine.params.image: is missing"),
        (E, "docker", {"image": " "}, "must not be blank"),
        (E, "docker", {"image": "a b"}, "may not contain spaces"),
        (E, "docker", {"image": "a", "paramters": []}, "did you mean parameters?"),
        (E, "docker", {"image": "a", "entrypoint": "sh"}, "entrypoint: must be a list (got 'sh')"),
        (E, "docker", {"image": "a", "parameters": [["x"]]}, "parameters[0]: must be text"),
        (E, "docker", {"image": "a", "workingDirectory": "w"}, "absolute path"),
        (E, "docker", {"image": "a", "environmentVariables": ["BACALHAU_X=1"]}, "set by the system"),
        (E, "docker", {"image": "a", "environmentVariables": ["X"]}, "NAME=value"),
        (E, "docker", {"image": "a", "parameters": ["\0"]}, "NUL"),
        (E, "docker", {"image": "a", "Image": "b"}, "given twice"),
        (E, "wasm", {"entryModule": "/m.wasm"}, "is not the target of an input source"),
        (E, "wasm", {"entryModule": "m.wasm"}, "absolute path"),
        (E, "noop", {"exitCode": 256}, "at most 255"),
        (E, "noop", {"durationSeconds": -1}, "at least 0"),
        (E, "noop", {"durationSeconds": float("nan")}, "is not finite"),
        (E, "noop", {"exitCode": 2**70}, "beyond the range"),
        (E, "noop", {"failOnAttempts": 10**9}, "failOnAttempts: must be a list"),
        (E, "noop", {"failOnAttempts": [-1]}, "failOnAttempts[0]: must be at least 0"),
        (E, "a b", {}, "must be a name"),
        (E, "", {}, "engine.type: is missing"),
        (E, "plug", {"x": {"y": object()}}, "is not plain data, but of type object"),
        (E, "plug", {"x\ud800": 1}, "half of a surrogate"),
        (E, "plug", {"x": "\0"}, "NUL"),
        (S, "local", {"sourcePath": "data"}, "absolute path"),
        (S, "local", {"sourcePath": "/a/../b"}, "'..'"),
        (S, "local", {"sourcePath": "/a", "readWrite": "maybe"}, "true or false"),
        (S, "local", {"sourcePath": "/a", "createAs": "pipe"}, "one of noCreate, dir, file"),
        (S, "urlDownload", {"url": "https://example.org/"}, "must end in a file name"),
        (S, "urlDownload", {"url": "https://example.org"}, "must end in a file name"),
        (S, "urlDownload", {"url": "ftp://example.org/a"}, "https://example.org/data.csv"),
        (S, "urlDownload", {"url": "https://[::1/a"}, "not a valid URL"),
        (S, "urlDownload", {"url": "https://a:99999/b"}, "not a valid URL"),
        (S, "urlDownload", {"url": "https:///a"}, "must be a URL"),
        (S, "inline", {"url": "hello"}, "data URL"),
        (S, "s3", {}, "source.params.bucket: is missing"),
        (S, "s3", {"bucket": "a/b"}, "bucket name"),
        (S, "s3", {"bucket": "bkt", "endpoint": "minio"}, "must be a URL"),
        (S, "s3", {"bucket": "bkt", "filter": "x" * 513}, "at most 512"),
        (S, "s3", {"bucket": "bkt", "partition": {"type": "hash"}}, "must be one of none, object"),
        (S, "s3", {"bucket": "bkt", "partition": {"typ": "date"}}, "did you mean type?"),
        (S, "ipfs", {"cid": "../x"}, "content identifier"),
        (S, "git", {"url": "file:///etc"}, "must be a repository"),
        (S, "git", {"url": "-oProxyCommand=x"}, "must be a repository"),
        (P, "s3", {"bucket": "bkt"}, "publisher.params.key: is missing"),
        (P, "s3", {"bucket": "bkt", "key": "{jobId}"}, "unknown placeholder {jobId}"),
        (P, "local", {"path": "/x"}, "is not a known field"),
        (P, "", {"x": 1}, "publisher.type: is missing"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused(
    role: Role, kind: str, params: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidError) as caught:
        settled(role, kind, params)
    assert says in str(caught.value)
    assert all(p.field.startswith("spec.tasks[0].") for p in caught.value.problems)


def test_wasm_modules_lie_at_targets_or_below() -> None:
    inputs = tuple(
        InputSource(source=SpecConfig(type="local", params={"sourcePath": "/x"}), target=t)
        for t in ("/m.wasm", "/lib/")
    )

    def admitted(entry: str, *imports: str) -> dict[str, Any]:
        params = {"entryModule": entry, "importModules": list(imports)}
        task = Task(engine=SpecConfig(type="wasm", params=params), input_sources=inputs)
        job = Job(metadata=ObjectMeta(name="a"), spec=JobSpec(type=JobType.BATCH, tasks=(task,)))
        return canonical_job(job).spec.task.engine.params

    assert admitted("/m.wasm", "/lib/a.wasm") == {
        "entryModule": "/m.wasm",
        "importModules": ["/lib/a.wasm"],
    }
    for entry, imports in (("/library/x", ()), ("/m.wasm", ("/other.wasm",))):
        with pytest.raises(InvalidError, match="is not the target of an input source"):
            admitted(entry, *imports)


def test_implementations_decode_stored_parameters() -> None:
    assert DockerParams.of({"image": "a"}).parameters == ()
    assert WasmParams.of({"entryModule": "/m"}).entrypoint == "_start"
    assert LocalSource.of({"sourcePath": "/a"}).create_as == "noCreate"
    assert S3Publisher.of({"bucket": "bkt", "key": "k"}).encoding == "gzip"
    with pytest.raises(InvalidError, match="image: is missing"):
        DockerParams.of({})


def test_noop_fails_the_attempts_it_is_told_to() -> None:
    first_two, listed = NoopParams.of({"failOnAttempts": 2}), NoopParams(fail_on_attempts=(1, 3))
    assert [first_two.fails_on(n) for n in range(4)] == [True, True, False, False]
    assert [listed.fails_on(n) for n in range(4)] == [False, True, False, True]
    assert not NoopParams().fails_on(0)


def test_every_role_knows_its_types() -> None:
    assert {role: sorted(types) for role, types in KNOWN.items()} == {
        Role.ENGINE: ["docker", "noop", "wasm"],
        Role.SOURCE: ["git", "inline", "ipfs", "local", "s3", "urlDownload"],
        Role.PUBLISHER: ["ipfs", "local", "noop", "s3"],
    }
