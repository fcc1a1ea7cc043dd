"""Stored objects: decoding any kind, and resources given as quantities."""

import json

import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from bacalhau_api.errors import InvalidError
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1 import Node, decode_resource
from bacalhau_api.v1.job import Job, Resources
from tests.support.jobs import jobs


@settings(deadline=None)
@given(jobs())
def test_every_object_reads_back(job: Job) -> None:
    assert decode_resource(job.encode()) == job
    assert decode_resource(job.encode().decode()) == job


def test_any_order_and_spacing_of_keys_is_fine() -> None:
    node = Node(metadata=ObjectMeta(name="a"))
    text = json.dumps(dict(reversed(node.wire().items())), indent=2)
    assert decode_resource(text) == node


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"kind": "Pod"}', "'Pod'"),
        ("{}", "None"),
        ('{"kind": 5}', "5"),
        ('{"kind": ["Job"]}', "Job"),
        ("[]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"apiVersion":"bacalhau.org/v1","kind":"Pod","x":', "'Pod'"),
    ],
)
def test_what_is_no_known_object_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidError, match=r"kind|JSON") as caught:
        decode_resource(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"apiVersion":"bacalhau.org/v1","kind":"Node","kind":"Job","metadata":{"name":"a"}}',
        '{"apiVersion":"bacalhau.org/v2","kind":"Node","metadata":{"name":"a"}}',
        '{"apiVersion":"bacalhau.org/v1","kind":"Node","metadata":{"name":"a"},"x":1}',
        '{"apiVersion":"bacalhau.org/v1","kind":"Node","metadata":{"name":"a"}',
    ],
)
def test_malformed_objects_are_validation_errors(text: str) -> None:
    with pytest.raises(ValidationError):
        decode_resource(text)


def test_resources_take_quantities_wherever_they_are_decoded() -> None:
    text = '{"cpu": "500m", "memory": "1Gi", "disk": 5, "gpu": "1"}'
    assert Resources.decode(text) == Resources(
        cpu_millis=500, memory_bytes=2**30, disk_bytes=5, gpu=1
    )
    assert Resources.decode('{"cpu": 2}') == Resources(cpu_millis=2000)
    with pytest.raises(ValidationError, match="cpu is not an amount of CPU"):
        Resources.decode('{"cpu": "half"}')
    with pytest.raises(ValidationError):
        Resources.decode('{"cpuMillis": "500"}')
