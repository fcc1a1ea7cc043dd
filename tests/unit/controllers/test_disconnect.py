"""The effective disconnect policy: design table and the user's own words."""

from typing import Literal

import pytest

from bacalhau_api.v1.job import DisconnectPolicy, JobType
from bacalhau_controllers.disconnect import (
    describe_disconnect,
    disconnect_warnings,
    effective_disconnect,
)
from tests.support.samples import job_spec


@pytest.mark.parametrize(
    ("type", "sources", "action", "after"),
    [
        pytest.param(JobType.DAEMON, (), "hold", None, id="daemon holds"),
        pytest.param(JobType.OPS, (), "hold", None, id="ops holds"),
        pytest.param(JobType.SERVICE, (), "replace", 300, id="service replaces after 5 min"),
        pytest.param(JobType.BATCH, (), "replace", 1800, id="batch replaces after 30 min"),
        pytest.param(JobType.BATCH, ("s3", "urlDownload"), "replace", 1800, id="data elsewhere"),
        pytest.param(JobType.BATCH, ("s3", "local"), "hold", None, id="data only here"),
        pytest.param(JobType.BATCH, ("localDirectory",), "hold", None, id="the peer's name for it"),
        pytest.param(JobType.BATCH, ("LocalDirectory",), "hold", None, id="in any letter case"),
    ],
)
def test_defaults(type: JobType, sources: tuple[str, ...], action: str, after: int | None) -> None:
    got = effective_disconnect(job_spec(type, sources=sources))
    assert (got.action, got.after_seconds, got.reconcile) == (action, after, "firstAccepted")
    assert got.why


@pytest.mark.parametrize(
    ("type", "asked", "after_asked", "action", "after"),
    [
        (JobType.BATCH, "hold", None, "hold", None),
        (JobType.BATCH, "hold", 60, "hold", None),
        (JobType.BATCH, "stop", None, "stop", 1800),
        (JobType.BATCH, "stop", 60, "stop", 60),
        (JobType.BATCH, None, 60, "replace", 60),
        (JobType.SERVICE, "stop", None, "stop", 300),
        (JobType.OPS, None, 60, "hold", None),
        (JobType.DAEMON, "stop", 60, "stop", 60),
        (JobType.OPS, "replace", 60, "hold", None),
    ],
)
def test_words_of_the_user(
    type: JobType,
    asked: Literal["hold", "replace", "stop"] | None,
    after_asked: int | None,
    action: str,
    after: int | None,
) -> None:
    policy = DisconnectPolicy(action=asked, after_seconds=after_asked, reconcile="keepOriginal")
    got = effective_disconnect(job_spec(type, disconnect=policy, sources=()))
    assert (got.action, got.after_seconds, got.reconcile) == (action, after, "keepOriginal")


def test_local_inputs_do_not_overrule_the_user() -> None:
    spec = job_spec(sources=("local",), disconnect=DisconnectPolicy(action="replace"))
    assert effective_disconnect(spec).action == "replace"


@pytest.mark.parametrize(
    ("type", "policy", "words"),
    [
        (
            JobType.BATCH,
            DisconnectPolicy(),
            (
                "replace after 30 min: a new attempt begins elsewhere; the first result wins "
                "(the default for batch jobs)"
            ),
        ),
        (
            JobType.SERVICE,
            DisconnectPolicy(after_seconds=90, reconcile="keepOriginal"),
            (
                "replace after 90 s: a new attempt begins elsewhere; the original wins if it comes back "
                "(the default for service jobs)"
            ),
        ),
        (
            JobType.SERVICE,
            DisconnectPolicy(),
            (
                "replace after 5 min: a new attempt begins elsewhere; the replacement stays once it "
                "runs (the default for service jobs)"
            ),
        ),
        (
            JobType.BATCH,
            DisconnectPolicy(action="stop", after_seconds=7200),
            (
                "stop after 2 h: the node ends the work by its own clock, and only then is it begun "
                "anew, so that two never run at once (set by spec.disconnect.action)"
            ),
        ),
        (
            JobType.OPS,
            DisconnectPolicy(action="replace"),
            (
                "hold: the work is kept for its node, and what it finished counts (each slot of an ops "
                "or daemon job is one node, so nothing can replace it elsewhere)"
            ),
        ),
    ],
)
def test_says_what_applies_and_why(type: JobType, policy: DisconnectPolicy, words: str) -> None:
    assert describe_disconnect(job_spec(type, disconnect=policy, sources=())) == words


@pytest.mark.parametrize(
    ("type", "sources", "policy", "warned"),
    [
        (JobType.DAEMON, (), DisconnectPolicy(after_seconds=60), ["after"]),
        (JobType.OPS, (), DisconnectPolicy(action="replace", after_seconds=60), ["after"]),
        (JobType.BATCH, (), DisconnectPolicy(action="hold", after_seconds=60), ["after"]),
        (JobType.BATCH, ("local",), DisconnectPolicy(after_seconds=60), ["after"]),
        (JobType.DAEMON, (), DisconnectPolicy(reconcile="keepOriginal"), ["reconcile"]),
        (
            JobType.BATCH,
            (),
            DisconnectPolicy(action="hold", after_seconds=1, reconcile="keepOriginal"),
            ["after", "reconcile"],
        ),
        (JobType.BATCH, (), DisconnectPolicy(after_seconds=60, reconcile="keepOriginal"), []),
        (JobType.DAEMON, (), DisconnectPolicy(action="stop", after_seconds=60), []),
        (JobType.DAEMON, (), DisconnectPolicy(), []),
    ],
)
def test_what_has_no_effect_is_said(
    type: JobType, sources: tuple[str, ...], policy: DisconnectPolicy, warned: list[str]
) -> None:
    told = disconnect_warnings(job_spec(type, disconnect=policy, sources=sources))
    assert [text.partition(" has no effect with hold (")[0] for text in told] == [
        f"spec.disconnect.{name}" for name in warned
    ]
