"""What a node may say of itself in the messages that it sends."""

import pytest
from pydantic import ValidationError

from bacalhau_api.v1.execution import Slot, execution_name
from bacalhau_api.v1.manifest import ManifestSpec
from bacalhau_api.wire import OBJECT_NAME_LENGTH_MAX, Fact, Known, PinRequest

DIGEST = f"sha256:{'0f' * 32}"
NAMED = {"namespace": "default", "name": "e", "uid": "u"}
PIN = {"node": "n", "session": "s", "action": "put", "namespace": "default", "execution": "e"}


def manifest(digest: str) -> ManifestSpec:
    return ManifestSpec(job="j", job_uid="u", generation=1, input=0, digest=digest)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("namespace", "x" * 64),
        ("execution", "x" * (OBJECT_NAME_LENGTH_MAX + 1)),
        ("digest", "x"),
        ("digest", DIGEST + "0"),
        ("digest", DIGEST.upper()),
        ("digest", DIGEST + "\n"),
        ("manifest", manifest("x" * 1000)),
    ],
)
def test_a_pin_request_names_things_that_can_be(field: str, value: object) -> None:
    PinRequest.model_validate(PIN | {"digest": DIGEST, "manifest": manifest(DIGEST)})
    PinRequest.model_validate(PIN)
    with pytest.raises(ValidationError):
        PinRequest.model_validate(PIN | {field: value})


@pytest.mark.parametrize(
    ("field", "length"), [("namespace", 64), ("name", OBJECT_NAME_LENGTH_MAX + 1), ("uid", 65)]
)
def test_facts_and_what_is_known_name_things_that_can_be(field: str, length: int) -> None:
    long = NAMED | {field: "x" * length}
    for model, more in ((Fact, {"seq": 1}), (Known, {})):
        model.model_validate(NAMED | more)
        with pytest.raises(ValidationError):
            model.model_validate(long | more)


def test_the_longest_names_fit() -> None:
    slot = Slot(generation=10**9, node="n" * 63)
    assert len(execution_name("j" * 63, "u" * 32, slot, 1000)) <= OBJECT_NAME_LENGTH_MAX
