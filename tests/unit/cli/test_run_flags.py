"""`docker run` and `wasm run`: each flag, from the command line to the manifest it stands for."""

import base64
import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bacalhau.cli.app import hoisted, run
from bacalhau.cli.running.build import docker_job
from bacalhau.cli.running.flags import DockerFlags
from bacalhau_api.canonical import canonical_job
from bacalhau_api.jobfile import parse_manifests
from bacalhau_api.v1.job import Job

HELLO = Path(__file__).parents[2] / "programs" / "hello.wasm"
TASK = "spec.tasks.0"

Manifest = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


@pytest.fixture
def manifest(capsys: pytest.CaptureFixture[str]) -> Manifest:
    """What `--dry-run` prints, read by the reader of manifests and as plain data."""

    def dry_run(*words: str) -> dict[str, Any]:
        assert run([words[0], "run", "--dry-run", *words[1:]]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        (document,) = parse_manifests(captured.out)
        assert document.warnings == ()
        assert isinstance(document.resource, Job)
        assert canonical_job(document.resource) == document.resource
        found: dict[str, Any] = yaml.safe_load(captured.out)
        return found

    return dry_run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """What is said of words that make no sense; the exit code is that of usage errors."""

    def told(*words: str) -> str:
        assert run([words[0], "run", "--dry-run", *words[1:]]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        return captured.err

    return told


def at(data: Any, path: str) -> Any:
    """The value at a dotted path; None where there is nothing."""
    for part in path.split("."):
        if isinstance(data, list):
            data = data[int(part)]
        elif part in data:
            data = data[part]
        else:
            return None
    return data


def local(path: str, **more: object) -> dict[str, Any]:
    return {"type": "local", "params": {"sourcePath": path, **more}}


S3 = {"type": "s3", "params": {"bucket": "bucket", "key": "a/*"}}


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("--name web", "metadata.name", "web"),
        ("--namespace lab", "metadata.namespace", "lab"),
        ("-n lab", "metadata.namespace", "lab"),
        ("--type service", "spec.type", "service"),
        ("--target any", "spec.type", "batch"),
        ("--target all", "spec.type", "ops"),
        ("--target all --type daemon", "spec.type", "daemon"),
        ("", "spec.type", "batch"),
        ("--count 4", "spec.count", 4),
        ("--concurrency 4", "spec.count", 4),
        ("--priority 7", "spec.priority", 7),
        ("-l a=b -l c=d=e", "metadata.labels", {"a": "b", "c": "d=e"}),
        ("--labels a=", "metadata.labels", {"a": ""}),
        ("--attempts 1", "spec.retry.attempts", 1),
        ("--task-name step", f"{TASK}.name", "step"),
        ("-e A=1 --env B=x=y", f"{TASK}.env", {"A": "1", "B": "x=y"}),
        ("-e GIVEN_HERE", f"{TASK}.env", {"GIVEN_HERE": "yes"}),
        ("--cpu 500m", f"{TASK}.resources.cpu", "500m"),
        ("--memory 1Gi", f"{TASK}.resources.memory", "1Gi"),
        ("--disk 2GB", f"{TASK}.resources.disk", "2GB"),
        ("--gpu 1", f"{TASK}.resources.gpu", 1),
        ("--network host", f"{TASK}.network.type", "Host"),
        ("--network HTTP --domain a.org", f"{TASK}.network", {"type": "HTTP", "domains": ["a.org"]}),
        ("--domain a.org --domain b.org", f"{TASK}.network.type", "HTTP"),
        ("--network bridge --port web=8080:80", f"{TASK}.network.ports",
         [{"name": "web", "static": 8080, "target": 80}]),
        ("--network bridge --port web", f"{TASK}.network.ports", [{"name": "web"}]),
        ("--network bridge --port web=:80", f"{TASK}.network.ports", [{"name": "web", "target": 80}]),
        ("--timeout 90", f"{TASK}.timeouts.totalTimeout", 90),
        ("--timeout 1h30m", f"{TASK}.timeouts.totalTimeout", 5400),
        ("--timeout 0.5s", f"{TASK}.timeouts.totalTimeout", 1),
        ("--queue-timeout 10", f"{TASK}.timeouts.queueTimeout", 10),
        ("--execution-timeout 10", f"{TASK}.timeouts.executionTimeout", 10),
        ("-o out:/outputs", f"{TASK}.resultPaths", [{"name": "out", "path": "/outputs"}]),
        ("-p local", f"{TASK}.publisher", {"type": "local"}),
        ("-p ipfs", f"{TASK}.publisher", {"type": "ipfs"}),
        ("-p s3://bucket/{jobID}/x,opt=region=eu,opt=encoding=plain", f"{TASK}.publisher",
         {"type": "s3", "params": {"bucket": "bucket", "key": "{jobID}/x", "region": "eu",
                                   "encoding": "plain"}}),
        ("--publisher s3://bucket/k", f"{TASK}.publisher.params", {"bucket": "bucket", "key": "k"}),
        ("--workdir /w", f"{TASK}.engine.params.workingDirectory", "/w"),
        ("-w /w", f"{TASK}.engine.params.workingDirectory", "/w"),
        ("--entrypoint /bin/sh --entrypoint -x", f"{TASK}.engine.params.entrypoint",
         ["/bin/sh", "-x"]),
        ("--user 1000:1000", f"{TASK}.engine.params.user", "1000:1000"),
        ("--read-only", f"{TASK}.engine.params.readOnlyRoot", True),
        ("--shm-size 1Mi", f"{TASK}.engine.params.shmBytes", 2**20),
        ("--constraints zone=a,gpu", "spec.constraints",
         [{"key": "zone", "operator": "=", "values": ["a"]}, {"key": "gpu", "operator": "exists"}]),
        ("-s zone=a", "spec.constraints.0.key", "zone"),
        # Where data comes from, in the short and the long form.
        ("-i s3://bucket/a/*", f"{TASK}.inputSources.0", {"source": S3, "target": "/inputs"}),
        ("-i s3://bucket/a/*:/x", f"{TASK}.inputSources.0", {"source": S3, "target": "/x"}),
        ("-i s3://bucket/a/*,dst=/x", f"{TASK}.inputSources.0", {"source": S3, "target": "/x"}),
        ("-i src=s3://bucket/a/*,dst=/x", f"{TASK}.inputSources.0", {"source": S3, "target": "/x"}),
        ("-i source=s3://bucket/a/*,target=/x", f"{TASK}.inputSources.0.target", "/x"),
        (("-i s3://bucket/a,opt=region=eu,opt=versionID=v,opt=checksum-256=abc,opt=filter=x,"
         "opt=endpoint=http://h:9000"), f"{TASK}.inputSources.0.source.params",
         {"bucket": "bucket", "key": "a", "region": "eu", "versionId": "v", "checksumSha256": "abc",
          "filter": "x", "endpoint": "http://h:9000"}),
        ("-i s3://bucket/a,opt=partition.type=object", f"{TASK}.inputSources.0.source.params.partition",
         {"type": "object"}),
        ("-i file:///srv/d:/d", f"{TASK}.inputSources.0", {"source": local("/srv/d"), "target": "/d"}),
        ("-i /srv/d:/d", f"{TASK}.inputSources.0", {"source": local("/srv/d"), "target": "/d"}),
        ("-i /srv/d", f"{TASK}.inputSources.0", {"source": local("/srv/d"), "target": "/inputs"}),
        ("-i file:///srv/d,dst=/d,opt=rw=true", f"{TASK}.inputSources.0.source",
         local("/srv/d", readWrite=True)),
        ("-i file:///srv/d,opt=rw,opt=create-as=dir", f"{TASK}.inputSources.0.source",
         local("/srv/d", readWrite=True, createAs="dir")),
        ("-i https://h:8080/d/f.csv", f"{TASK}.inputSources.0",
         {"source": {"type": "urlDownload", "params": {"url": "https://h:8080/d/f.csv"}},
          "target": "/inputs"}),
        (
            "-i https://h/f.csv,opt=checksum-256=ab",
            f"{TASK}.inputSources.0.source.params.checksumSha256",
            "ab",
        ),
        (
            "-i fsspec+sftp://h/d:/x",
            f"{TASK}.inputSources.0.source",
            {"type": "fsspec", "params": {"url": "sftp://h/d"}},
        ),
        ("-i https://h/f.csv:/data", f"{TASK}.inputSources.0.target", "/data"),
        ("-i ipfs://QmYwAPJzv5CZsnA/x:/d", f"{TASK}.inputSources.0.source",
         {"type": "ipfs", "params": {"cid": "QmYwAPJzv5CZsnA/x"}}),
        ("-i git+https://h/r.git,opt=ref=v1:/x", f"{TASK}.inputSources.0.source.params.url",
         "https://h/r.git"),
        ('-i "https://h/a,b.csv",dst=/x', f"{TASK}.inputSources.0.source.params.url",
         "https://h/a,b.csv"),
        ("-i /a:/a -i /b:/b", f"{TASK}.inputSources.1.source", local("/b")),
    ],
)  # fmt: skip
def test_flag(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, words: str, path: str, value: object
) -> None:
    monkeypatch.setenv("GIVEN_HERE", "yes")
    assert at(manifest("docker", *words.split(), "ubuntu"), path) == value


@pytest.mark.parametrize(
    ("words", "flag", "remedy"),
    [
        ("--target some", "--target", "use any or all"),
        ("--type cron", "--type", "batch, ops, service, daemon"),
        ("--target any --type daemon", "--type", "give one of the two"),
        ("--count 2 --concurrency 3", "--concurrency", "give one of the two"),
        ("--count 2 --target all", "--count", "leave it out"),
        ("--constraints a=b --selector c", "--selector", "give one of the two"),
        ("--constraints a>b", "--constraints", "whole numbers"),
        ("-l novalue", "-l", "KEY=VALUE"),
        ("-e NOT_SET_HERE_9", "-e", "write NOT_SET_HERE_9=VALUE"),
        ("-e lower=1", "-e", "upper-case"),
        ("-e BACALHAU_X=1", "-e", "set by the system"),
        ("--cpu lots", "--cpu", "500m"),
        ("--memory 1q", "--memory", "unknown unit"),
        ("--disk -1", "--disk", ""),
        ("--gpu 1.5", "--gpu", "whole number"),
        ("--network lan", "--network", "use default, none"),
        ("--domain a.org --network bridge", "--domain", "--network http"),
        ("--domain nodots", "--domain", "domain name"),
        ("--port a=1:x --network bridge", "--port", "8080:80"),
        ("--port a=80 --network bridge", "--port", "1024"),
        ("--port a=8080", "--port", "--network bridge"),
        ("--timeout soon", "--timeout", "90s"),
        ("--timeout 5 --execution-timeout 10", "--timeout", "raise it"),
        ("--wait-timeout never", "--wait-timeout", "90s"),
        ("-o nopath", "-o", "results:/outputs"),
        ("-o stdout:/x", "-o", "choose another name"),
        ("-o a:/x -o b:/x", "-o", "used twice"),
        ("-p ftp://x", "-p", "s3://BUCKET/KEY"),
        ("-p s3://bucket", "-p", "such as s3://"),
        ("-p s3://bucket/{jobId}", "-p", "{jobID}"),
        ("-p local,region=x", "-p", "opt=KEY=VALUE"),
        ("-i ./data:/x", "-i", "the whole path"),
        ("-i data:/x", "-i", "file:///PATH"),
        ("-i file://data:/x", "-i", "file:///data"),
        ("-i ftp://h/x:/x", "-i", "known: file://"),
        ("-i s3://bucket/k,dest=/x", "-i", "dst="),
        ("-i s3://bucket/k,opt=color=red", "-i", "region"),
        ("-i file:///a,opt=rw=maybe", "-i", "true or false"),
        ("-i /a -i /b", "-i", "dst=PATH"),
        ("-i /a:/x/../y", "-i", ".."),
        ("-i https://h/", "-i", "file name"),
        ("-i ,dst=/x", "-i", ""),
        ("--workdir here", "--workdir", "absolute path"),
        ("--user a:b:c", "--user", "1000:1000"),
        ("--shm-size x", "--shm-size", "512Mi"),
        ("--name Ä", "--name", "letters, digits"),
        ("-n a/b", "--namespace", "letters, digits"),
        ("--download --no-wait", "--download", "leave one of them out"),
        ("--output-dir x", "--output-dir", "add --download"),
        ("--id-only --follow", "--id-only", "leave one of them out"),
    ],
)
def test_a_wrong_flag_is_named_with_its_remedy(
    refused: Refused, words: str, flag: str, remedy: str
) -> None:
    told = refused("docker", *words.split(" "), "ubuntu")
    assert told.startswith(f"error: {flag}: "), told
    assert remedy in told


def test_all_that_is_wrong_is_told_at_once(refused: Refused) -> None:
    told = refused("docker", "--cpu", "x", "--memory", "y", "-i", "z", "u")
    assert [line.split(":")[1].strip() for line in told.splitlines()] == ["-i", "--cpu", "--memory"]


def test_values_of_variables_are_not_shown(refused: Refused) -> None:
    assert "hunter2" not in refused("docker", "-e", "pass=hunter2", "u")
    assert "hunter2" not in refused("docker", "-e", "=hunter2", "u")


@pytest.mark.parametrize(
    ("words", "parameters"),
    [
        (["ubuntu"], None),
        (["ubuntu", "ls", "-l", "--name", "x", "--server", "y"],
         ["ls", "-l", "--name", "x", "--server", "y"]),
        (["ubuntu", "--", "ls", "-l"], ["ls", "-l"]),
        (["ubuntu", "--", "--", "x"], ["--", "x"]),
        (["ubuntu", "sh", "-c", "a -- b", "--", "c"], ["sh", "-c", "a -- b", "--", "c"]),
        (["--", "ubuntu", "-x"], ["-x"]),
        (["--wait=false", "ubuntu", "x", "--wait=false"], ["x", "--wait=false"]),
        (["-eA=b", "ubuntu", "-e"], ["-e"]),
        (["-fe", "A=b", "ubuntu", ""], [""]),
    ],
)  # fmt: skip
def test_what_follows_the_image_is_the_containers(
    manifest: Manifest, words: list[str], parameters: list[str] | None
) -> None:
    params = at(manifest("docker", *words), f"{TASK}.engine.params")
    assert params["image"] == "ubuntu"
    assert params.get("parameters") == parameters


def test_a_flag_behind_the_image_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["docker", "run", "--dry-run", "ubuntu", "--follow"]) == 0
    captured = capsys.readouterr()
    assert "--follow stands behind ubuntu" in captured.err
    assert at(yaml.safe_load(captured.out), f"{TASK}.engine.params.parameters") == ["--follow"]


def test_common_options_are_not_taken_from_the_workload() -> None:
    line = ["docker", "run", "ubuntu", "tool", "--server", "x", "--debug"]
    assert hoisted(line) == line
    assert hoisted(["--server", "x", "wasm", "run", "m", "--debug"]) == [
        "--server", "x", "wasm", "run", "m", "--debug",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("ubuntu", "ubuntu-s"),
        ("ghcr.io/org/My_Tool:1.2@sha256:0", "my-tool-s"),
        ("h:5000/a/b:x", "b-s"),
        ("___", "job-s"),
    ],
)
def test_names_are_made_up_from_the_image(image: str, name: str) -> None:
    assert docker_job(image, (), DockerFlags(), suffix="s", environ={}).name == name


# --- Modules --------------------------------------------------------------------------------------


def test_a_local_module_travels_in_the_job(manifest: Manifest) -> None:
    first, second = (manifest("wasm", str(HELLO), "a", "--b") for _ in range(2))
    params = at(first, f"{TASK}.engine.params")
    assert params == {"entryModule": "/wasm/hello.wasm", "parameters": ["a", "--b"]}
    (source,) = at(first, f"{TASK}.inputSources")
    assert source["target"] == "/wasm/hello.wasm"
    url = source["source"]["params"]["url"]
    assert len(url) < HELLO.stat().st_size, "it is packed"
    packed = gzip.decompress(base64.b64decode(url.removeprefix("data:application/gzip;base64,")))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        (member,) = archive.getmembers()
        file = archive.extractfile(member)
        assert file is not None
        assert file.read() == HELLO.read_bytes()
    assert at(first, "spec") == at(second, "spec"), "the same file is the same run"


@pytest.mark.parametrize(
    ("module", "kind", "params"),
    [
        ("https://h/app.wasm", "urlDownload", {"url": "https://h/app.wasm"}),
        ("s3://bucket/x/app.wasm", "s3", {"bucket": "bucket", "key": "x/app.wasm"}),
        ("file:///srv/app.wasm", "local", {"sourcePath": "/srv/app.wasm"}),
        ("s3://bucket/x/app.wasm,opt=region=eu", "s3",
         {"bucket": "bucket", "key": "x/app.wasm", "region": "eu"}),
    ],
)  # fmt: skip
def test_a_module_elsewhere_is_fetched(
    manifest: Manifest, module: str, kind: str, params: dict[str, str]
) -> None:
    made = manifest("wasm", module)
    source = {"type": kind, "params": params}
    assert at(made, f"{TASK}.inputSources") == [{"source": source, "target": "/wasm/app.wasm"}]
    assert at(made, f"{TASK}.engine.params.entryModule") == "/wasm/app.wasm"
    assert at(made, "metadata.name").startswith("app-")


def test_imports_and_entry_point(manifest: Manifest) -> None:
    made = manifest("wasm", "--entry-point", "go", "-I", str(HELLO), "-I", "https://h/b.wasm",
                    "-i", "/d:/d", "https://h/app.wasm")  # fmt: skip
    params = at(made, f"{TASK}.engine.params")
    assert params["entrypoint"] == "go"
    assert params["importModules"] == ["/wasm/imports/hello.wasm", "/wasm/imports/b.wasm"]
    targets = [source["target"] for source in at(made, f"{TASK}.inputSources")]
    assert targets == ["/d", "/wasm/app.wasm", *params["importModules"]]


@pytest.mark.parametrize(
    ("content", "message", "remedy"),
    [
        (None, "No such file", "https://"),
        (b"(module)", "is not a WebAssembly module", "wat2wasm"),
        (b"#!/bin/sh\n", "is not a WebAssembly module", "\\0asm"),
        (b"\0asm\x0d\0\x01\0", "is a WebAssembly component", "wasm32-wasip1"),
    ],
)
def test_what_is_no_module(
    refused: Refused, tmp_path: Path, content: bytes | None, message: str, remedy: str
) -> None:
    file = tmp_path / "m.wasm"
    if content is not None:
        file.write_bytes(content)
    told = refused("wasm", str(file))
    assert told.startswith("error: MODULE: ")
    assert message in told
    assert remedy in told


def test_a_large_module_gets_a_remedy(refused: Refused, tmp_path: Path) -> None:
    import random

    file = tmp_path / "m.wasm"
    file.write_bytes(b"\0asm\x01\0\0\0" + random.Random(1).randbytes(400_000))
    told = refused("wasm", str(file))
    assert "390.6 KiB" in told
    assert "s3://BUCKET/KEY" in told
    assert "--allow-path" in told
