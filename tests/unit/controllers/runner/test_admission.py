"""The node's own word on what may run, and what it gives to what runs."""

from typing import Any

import pytest

from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import (
    InputSource,
    JobType,
    Network,
    NetworkType,
    Resources,
    ResultPath,
    SpecConfig,
)
from bacalhau_api.v1.node import Capability
from bacalhau_controllers.runner.admission import (
    Offers,
    Policy,
    decide,
    environment,
    resources_of,
)
from bacalhau_controllers.runner.state import Admitted, Denied
from tests.support.runner import CAPACITY, execution


def offers(**changes: Any) -> Offers:
    one = {"fake": Capability(name="fake")}
    return Offers(**({"engines": one, "storages": one, "publishers": one} | changes))


def verdict(
    of: Execution, policy: Policy | None = None, there: Offers | None = None, why: str = ""
) -> Admitted | Denied:
    refusals = [why for _ in of.spec.task.input_sources]
    return decide(of, policy or Policy(capacity=CAPACITY), there or offers(), refusals)


def source(target: str) -> InputSource:
    return InputSource(source=SpecConfig(type="fake"), target=target)


def with_task(**changes: Any) -> Execution:
    of = execution()
    return of.but(spec=of.spec.but(task=of.spec.task.but(**changes)))


def test_a_plain_execution_is_admitted() -> None:
    assert verdict(execution(inputs=("/x",), results=("r",))) == Admitted()


@pytest.mark.parametrize(
    ("of", "reason", "word"),
    [
        pytest.param(execution(engine="docker"), "EngineMissing", "fake", id="engine"),
        pytest.param(
            with_task(input_sources=(InputSource(source=SpecConfig(type="s3"), target="/x"),)),
            "StorageMissing", "'s3'", id="storage",
        ),
        pytest.param(
            with_task(publisher=SpecConfig(type="s3")), "PublisherMissing", "'s3'", id="publisher"
        ),
        pytest.param(
            with_task(network=Network(type=NetworkType.FULL)), "NetworkRefused", "Full", id="full"
        ),
        pytest.param(
            with_task(network=Network(type=NetworkType.HTTP)), "NetworkRefused", "HTTP", id="http"
        ),
        pytest.param(with_task(env={"A": "env:PATH"}), "EnvRefused", "PATH", id="env"),
        pytest.param(
            execution(resources=Resources(gpu=1)), "Capacity", "GPUs: 1 asked, 0 there", id="gpu"
        ),
        pytest.param(
            execution(resources=Resources(memory_bytes=1 << 40)), "Capacity", "memory", id="memory"
        ),
        pytest.param(
            with_task(result_paths=(ResultPath(name="../x", path="/r"),)), "PathRefused", "name",
            id="result name",
        ),
        pytest.param(
            with_task(result_paths=(ResultPath(name="stdout", path="/r"),)), "PathRefused",
            "stdout", id="reserved name",
        ),
        pytest.param(
            with_task(
                result_paths=(ResultPath(name="a", path="/r"), ResultPath(name="A", path="/s"))
            ),
            "PathRefused", "two results", id="same name but for case",
        ),
        pytest.param(
            with_task(result_paths=(ResultPath(name="a", path="r"),)), "PathRefused", "absolute",
            id="relative path",
        ),
        pytest.param(
            with_task(result_paths=(ResultPath(name="a", path="/a/../.."),)), "PathRefused", "..",
            id="dots",
        ),
        pytest.param(
            with_task(input_sources=(source("/"),)), "PathRefused", "root", id="root"
        ),
        pytest.param(
            with_task(
                input_sources=(source("/d/"),),
                result_paths=(ResultPath(name="a", path="/d"),),
            ),
            "PathRefused", "/d", id="two at one place",
        ),
    ],
)  # fmt: skip
def test_refusals_name_the_rule_and_the_value(of: Execution, reason: str, word: str) -> None:
    got = verdict(of)
    assert isinstance(got, Denied)
    assert got.reason == reason
    assert word in got.message
    assert not got.is_system_fault


def test_what_is_only_down_is_a_fault_of_the_node() -> None:
    down = {"fake": Capability(name="fake", available=False, reason="no daemon")}
    for there, reason in (
        (offers(engines=down), "EngineUnavailable"),
        (offers(storages=down), "StorageUnavailable"),
    ):
        got = verdict(execution(inputs=("/x",)), there=there)
        assert isinstance(got, Denied)
        assert (got.reason, got.is_system_fault) == (reason, True)
        assert "no daemon" in got.message
    wants_publisher = with_task(publisher=SpecConfig(type="fake"))
    assert verdict(wants_publisher, there=offers(publishers=down)) == Admitted()  # it may be back


def test_a_source_is_refused_in_the_storages_words() -> None:
    got = verdict(execution(inputs=("/x",)), why="/x is not allowed")
    assert isinstance(got, Denied)
    assert (got.reason, got.message) == ("SourceRefused", "input 0 (fake): /x is not allowed")


def test_networks_are_closed_by_default_and_can_be_opened() -> None:
    for kind in (NetworkType.DEFAULT, NetworkType.NONE):
        assert verdict(with_task(network=Network(type=kind))) == Admitted()
    opened = Policy(capacity=CAPACITY, networks_allowed=frozenset({NetworkType.HOST}))
    assert verdict(with_task(network=Network(type=NetworkType.HOST)), opened) == Admitted()
    assert verdict(with_task(network=Network(type=NetworkType.NONE)), opened) != Admitted()


def test_a_noop_publisher_is_no_publisher() -> None:
    assert verdict(with_task(publisher=SpecConfig(type="noop"))) == Admitted()


def test_host_variables_need_to_be_allowed_by_their_whole_name() -> None:
    policy = Policy(
        capacity=CAPACITY,
        env_allowed=("DATA_*", "HOME"),
        host_env={"DATA_KEY": "k", "MY_DATA_KEY": "secret", "HOMEWORK": "secret"},
    )
    for value, is_admitted in (
        ("env:DATA_KEY", True),
        ("env:MY_DATA_KEY", False),  # an unanchored match would give it away
        ("env:HOMEWORK", False),
        ("env:DATA_NONE", False),  # allowed, but not set
        ("plain", True),
    ):
        got = verdict(with_task(env={"A": value}), policy)
        assert (got == Admitted()) is is_admitted, value
        assert not isinstance(got, Denied) or "secret" not in got.message
    assert "secret" not in repr(policy)


def test_the_environment_of_a_workload() -> None:
    policy = Policy(capacity=CAPACITY, env_allowed=("KEY",), host_env={"KEY": "value"})
    of = with_task(env={"A": "1", "B": "env:KEY", "BACALHAU_JOB_ID": "forged"})
    assert environment(of, policy) == {
        "A": "1",
        "B": "value",
        "BACALHAU_ATTEMPT": "0",
        "BACALHAU_EXECUTION_ID": "job-1",
        "BACALHAU_JOB_ID": "job",
        "BACALHAU_JOB_NAMESPACE": "default",
        "BACALHAU_JOB_TYPE": JobType.BATCH.value,
        "BACALHAU_NODE_ID": "n1",
        "BACALHAU_PARTITION_COUNT": "1",
        "BACALHAU_PARTITION_INDEX": "0",
    }


def test_resources_left_open_take_the_nodes_defaults() -> None:
    policy = Policy(capacity=CAPACITY, defaults=Resources(cpu_millis=7, memory_bytes=8))
    of = execution(resources=Resources(memory_bytes=9))
    assert resources_of(of.spec.task, policy) == Resources(cpu_millis=7, memory_bytes=9)
