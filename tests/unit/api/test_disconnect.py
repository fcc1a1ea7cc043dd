"""`spec.disconnect`: its limit can be written as a duration."""

import pytest

from bacalhau_api.errors import InvalidError
from bacalhau_api.jobfile import parse_manifests
from bacalhau_api.v1.job import DisconnectPolicy, Job

FILE = """
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: a}
spec:
  type: batch
  disconnect: %s
  tasks: [{name: main, engine: {type: noop}}]
"""


def policy(text: str) -> DisconnectPolicy:
    (document,) = parse_manifests(FILE % text)
    assert isinstance(document.resource, Job)
    return document.resource.spec.disconnect


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("{after: 5m}", 300),
        ("{after: 90s}", 90),
        ("{after: 1h30m}", 5400),
        ("{after: 45}", 45),
        ('{after: "45"}', 45),
        ("{afterSeconds: 45}", 45),
        ("{after: null}", None),
        ("{after: null, afterSeconds: 45}", 45),
        ("{}", None),
    ],
)
def test_limit(text: str, seconds: int | None) -> None:
    assert policy(text) == DisconnectPolicy(after_seconds=seconds)


def test_beside_other_fields() -> None:
    got = policy("{after: 10m, action: stop, reconcile: keepOriginal}")
    assert got == DisconnectPolicy(after_seconds=600, action="stop", reconcile="keepOriginal")


def test_in_the_flat_form_too() -> None:
    flat = (
        "Name: a\nType: batch\nDisconnect: {After: 5m}\nTasks: [{Name: main, Engine: {Type: noop}}]"
    )
    (document,) = parse_manifests(flat)
    assert isinstance(document.resource, Job)
    assert document.resource.spec.disconnect.after_seconds == 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{after: soon}", "spec.disconnect.after"),
        ("{after: soon}", "is not a duration"),
        ("{after: 1500ms}", "must be whole seconds"),
        ("{after: 0}", "spec.disconnect.after"),
        ("{after: true}", "spec.disconnect.after"),
        ("{after: 5m, afterSeconds: 300}", "is given twice: also as afterSeconds"),
        ("{after: [5m]}", "spec.disconnect.after"),
        ("{aftr: 5m}", "is not a known field"),
        ("5m", "spec.disconnect"),
    ],
)
def test_mistakes_are_named(text: str, words: str) -> None:
    with pytest.raises(InvalidError) as caught:
        policy(text)
    assert words in str(caught.value)


def test_a_limit_of_more_than_ten_years_is_refused() -> None:
    assert policy("{after: 87600h}").after_seconds == 10 * 365 * 86400
    for text in ("{after: 87601h}", "{afterSeconds: 999999999999999}"):
        with pytest.raises(InvalidError, match=r"disconnect.* is too long a time .*10 years"):
            policy(text)
