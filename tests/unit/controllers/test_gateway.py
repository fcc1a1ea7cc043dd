"""The gateway: full list, then numbered changes, and a new hello after anything lost."""

import asyncio
from collections.abc import Iterator

import pytest

from bacalhau_api.errors import TransientError, UnavailableError
from bacalhau_api.meta import Contact, Ref
from bacalhau_api.v1.execution import Desired, Execution, Phase
from bacalhau_api.v1.node import Membership, NodeInfo, NodeSpec
from bacalhau_api.wire import (
    Beat,
    Changes,
    Fact,
    FactBatch,
    Hello,
    Refused,
    Welcome,
    WelcomePart,
)
from bacalhau_controllers.gateway import Gateway
from bacalhau_controllers.inbox import FactInbox
from bacalhau_controllers.node.presence import Presence
from bacalhau_controllers.store import Delete, Why
from tests.support.samples import Bench, execution, job, node, report
from tests.support.simclock import SimLoop


class Line:
    """Carries changes to a node that applies them, or does not answer."""

    def __init__(self) -> None:
        self.sent: list[Changes] = []
        self.is_cut = False

    async def push(self, changes: Changes, timeout_seconds: float) -> None:
        if self.is_cut:
            raise UnavailableError("the line is cut")
        self.sent.append(changes)


class Inbox(FactInbox):
    """Settles offers at once: stored, or refused from a given sequence on."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[int] = []
        self.fails_from = 10**9
        self.may_store = asyncio.Event()
        self.may_store.set()

    async def offer(self, node: str, incarnation: str, fact: Fact) -> None:
        await self.may_store.wait()
        if fact.seq >= self.fails_from:
            raise TransientError("not now")
        self.stored.append(fact.seq)


class Rig(Bench):
    """A gateway over a real cache."""

    def __init__(self, loop: SimLoop) -> None:
        super().__init__(loop)
        self.line, self.inbox = Line(), Inbox()
        self.presence = Presence(self.clock)
        self.gateway = Gateway(self.cache, self.inbox, self.presence, self.line, self.clock)
        self.gateway.open()
        self.put(node("n1"))
        self.list_id = ""

    def hello(self, session: str = "s1", incarnation: str = "i1") -> Welcome | Refused:
        hello = Hello(node="n1", session=session, incarnation=incarnation, info=NodeInfo())

        async def say() -> Welcome | Refused:
            return self.gateway.hello(hello)

        answer = self.loop.run_until_complete(say())
        self.loop.run_until_idle()
        assert isinstance(answer, Welcome | Refused)
        if isinstance(answer, Welcome):
            self.list_id = answer.list_id
        return answer

    def beat(self, seen: int = 0, session: str = "s1", list_id: str | None = None) -> bool:
        """Whether the node is asked for a hello. It has the last list that was given, unless said
        otherwise."""
        has = self.list_id if list_id is None else list_id
        beat = Beat(node="n1", session=session, list_id=has, changes_seen=seen)
        answer = self.gateway.beat(beat)
        assert not isinstance(answer, Refused)
        return answer.hello_again

    def remove(self, ref: Ref) -> None:
        found = self.cache.get(ref)
        assert found is not None
        delete = Delete(ref, found.metadata.resource_version)
        self.loop.run_until_complete(self.state.commit([delete], Why("test", "Test")))
        self.loop.run_until_idle()

    def close(self) -> None:
        self.loop.run_until_complete(self.gateway.close())
        self.informer.cancel()
        self.loop.run_until_idle()


@pytest.fixture
def rig() -> Iterator[Rig]:
    loop = SimLoop()
    bench = Rig(loop)
    yield bench
    bench.close()
    loop.close()


def test_a_welcome_lists_everything_of_this_node_and_nothing_of_others(rig: Rig) -> None:
    mine, theirs = execution(job("a")), execution(job("b"), node="n2")
    rig.put(mine, theirs)
    welcome = rig.hello()
    assert isinstance(welcome, Welcome)
    assert [e.name for e in welcome.assignments.executions] == [mine.name]
    assert welcome.next_part is None
    assert rig.presence.is_connected("n1")


def test_a_welcome_tells_which_reports_are_stored(rig: Rig) -> None:
    done = execution(job("a"))
    status = done.status.but(report=report(Phase.RUNNING, step=7, incarnation="i1"))
    other = execution(job("b"))
    old = other.status.but(report=report(Phase.RUNNING, step=3, incarnation="i0"))
    rig.put(done.but(status=status), other.but(status=old))
    welcome = rig.hello()
    assert isinstance(welcome, Welcome)
    assert welcome.steps == {done.metadata.uid: 7}, "the step of another incarnation says nothing"


def test_a_late_copy_of_a_hello_is_found_out(rig: Rig) -> None:
    """Its answer is read by nobody, so the agent lacks what was told to another one meanwhile."""
    first = rig.hello("s1")
    assert isinstance(first, Welcome)
    assert not rig.beat(session="s1")
    rig.hello("s2")
    rig.put(execution(job("a")))
    again = rig.hello("s1")
    assert isinstance(again, Welcome)
    assert rig.beat(session="s1", list_id=first.list_id)
    assert not rig.beat(session="s1", list_id=again.list_id)


def test_the_lists_of_two_leaders_differ(rig: Rig) -> None:
    first = rig.hello()
    rig.put(execution(job("a")))
    other = Gateway(rig.cache, rig.inbox, rig.presence, rig.line, rig.clock)
    other.open()
    hello = Hello(node="n1", session="s1", incarnation="i1", info=NodeInfo())

    async def say() -> Welcome | Refused:
        answer = other.hello(hello)
        await other.close()
        return answer

    second = rig.loop.run_until_complete(say())
    assert isinstance(first, Welcome)
    assert isinstance(second, Welcome)
    assert first.list_id != second.list_id


def test_a_long_list_comes_in_parts_and_changes_wait_for_the_last(rig: Rig) -> None:
    many = [execution(job(f"j{i}")) for i in range(12)]
    many = [e.but(spec=e.spec.but(stop_reason="x" * 100_000)) for e in many]
    rig.put(*many)
    welcome = rig.hello()
    assert isinstance(welcome, Welcome)
    names = [e.name for e in welcome.assignments.executions]
    late = execution(job("late"))
    rig.put(late)
    assert rig.line.sent == []
    while welcome.next_part is not None:
        ask = WelcomePart(node="n1", session="s1", part=welcome.next_part)

        async def part(ask: WelcomePart = ask) -> Welcome | Refused:
            return rig.gateway.welcome_part(ask)

        answer = rig.loop.run_until_complete(part())
        assert isinstance(answer, Welcome)
        welcome = answer
        names += [e.name for e in welcome.assignments.executions]
    rig.loop.run_until_idle()
    assert sorted(names) == sorted(e.name for e in many)
    assert [c.number for c in rig.line.sent] == [1]
    assert rig.line.sent[0].assignments.executions[0].name == late.name


def test_changes_are_numbered_and_leave_out_the_nodes_own_word(rig: Rig) -> None:
    rig.hello()
    first = execution(job("a"))
    rig.put(first)
    rig.put(first.but(status=first.status.but(report=report(Phase.RUNNING))))
    rig.put(first.but(spec=first.spec.but(desired=Desired.STOP)))
    rig.remove(first.ref)
    assert [c.number for c in rig.line.sent] == [1, 2, 3]
    assert rig.line.sent[1].assignments.executions[0].spec.desired is Desired.STOP
    assert [g.uid for g in rig.line.sent[2].gone] == [first.metadata.uid]


def test_a_lost_message_ends_in_a_new_hello(rig: Rig) -> None:
    rig.hello()
    rig.line.is_cut = True
    rig.put(execution(job("a")))
    assert rig.gateway.session_of("n1") is None
    assert rig.beat(), "the node is asked to say hello again"
    rig.line.is_cut = False
    welcome = rig.hello("s2")
    assert isinstance(welcome, Welcome)
    assert len(welcome.assignments.executions) == 1
    assert not rig.beat(session="s2")


def test_a_store_that_is_another_one_by_now_asks_for_a_hello(rig: Rig) -> None:
    """It may lack what the node was told, and what it has acknowledged."""
    rig.hello()
    assert not rig.beat()
    rig.store.recreate("another")
    rig.put(node("n1"))
    assert rig.beat()
    rig.hello("s2")
    assert not rig.beat(session="s2")


def test_a_beat_of_an_unknown_session_asks_for_a_hello(rig: Rig) -> None:
    assert rig.beat(session="unknown")
    rig.hello("s1")
    rig.hello("s2")
    assert rig.beat(session="s1"), "only the newest session counts"


def test_facts_are_acknowledged_up_to_the_first_that_was_not_stored(rig: Rig) -> None:
    rig.hello()
    rig.inbox.fails_from = 12
    facts = tuple(Fact(seq=n, namespace="default", name=f"e{n}", uid="u") for n in (10, 11, 12))
    batch = FactBatch(node="n1", session="s1", incarnation="i1", facts=facts)
    answer = rig.loop.run_until_complete(rig.gateway.facts(batch))
    assert answer.seq == 11
    strange = batch.but(incarnation="i2")
    assert isinstance(rig.loop.run_until_complete(rig.gateway.facts(strange)), Refused)


def test_what_another_agent_reported_meanwhile_is_told_to_the_present_one(rig: Rig) -> None:
    """Two agents with one identity: the second has its list from before the first one's word."""
    done = execution(job("a"))
    rig.put(done)
    rig.hello("s1")
    rig.inbox.may_store.clear()
    end = report(Phase.FAILED, step=3)
    uid = done.metadata.uid
    fact = Fact(seq=1, namespace="default", name=done.name, uid=uid, execution=end)
    batch = FactBatch(node="n1", session="s1", incarnation="i1", facts=(fact,))
    storing = rig.loop.create_task(rig.gateway.facts(batch))
    rig.loop.run_until_idle()
    rig.hello("s2")
    rig.put(done.but(status=done.status.but(report=end)))
    assert rig.line.sent == []
    rig.inbox.may_store.set()
    rig.loop.run_until_complete(storing)
    rig.loop.run_until_idle()
    ((told,),) = (changes.assignments.executions for changes in rig.line.sent)
    assert told.status.report == end


def test_a_second_agent_under_the_same_name_is_refused_while_the_first_lives(rig: Rig) -> None:
    rig.hello("s1", "i1")
    answer = rig.hello("s2", "i2")
    assert isinstance(answer, Refused)
    assert answer.reason == "DuplicateNode"
    assert isinstance(rig.hello("s3", "i1"), Welcome), "the same ledger may reconnect at once"
    rig.presence.gone("n1")
    assert isinstance(rig.hello("s4", "i2"), Welcome), "a wiped machine may come back"


def test_two_agents_with_one_ledger_are_told_of(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Each ends the other's session, and neither can be told from a node that comes back."""
    agents = ["a0", "b0"]
    rig.hello(session=agents[0])
    for turn in range(1, 8):
        rig.hello(session=agents[turn % 2])
        assert ("Heard two agents as one node" in caplog.text) is (turn > 3)
        other = (turn + 1) % 2
        assert rig.beat(session=agents[other]), "it has to say hello"
        agents[other] = f"{'ab'[other]}{turn}"
    assert caplog.text.count("Heard two agents") == 1


def test_a_node_that_comes_back_again_and_again_is_one_agent(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(20):
        rig.hello(session=f"s{number}")
        if number % 3 == 2:
            assert rig.beat(session=f"s{number - 1}"), "a message that comes late"
        assert not rig.beat(session=f"s{number}")
    assert "Heard two agents" not in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"node": "stranger"}, "UnknownNode", id="not enrolled"),
        pytest.param({"protocol": 99}, "ProtocolVersion", id="another protocol"),
    ],
)
def test_refusals(rig: Rig, change: dict[str, object], reason: str) -> None:
    hello = Hello(node="n1", session="s", incarnation="i", info=NodeInfo()).but(**change)
    answer = rig.gateway.hello(hello)
    assert isinstance(answer, Refused)
    assert answer.reason == reason


def test_a_rejected_node_hears_only_stop(rig: Rig) -> None:
    rig.hello()
    running = execution(job("a"))
    rig.put(running)
    rig.put(node("n1").but(spec=NodeSpec(membership=Membership.REJECTED)))
    told = rig.line.sent[-1].assignments.executions
    assert [e.spec.desired for e in told] == [Desired.STOP]
    kept = rig.cache.get(running.ref)
    assert isinstance(kept, Execution)
    assert kept.spec.desired is Desired.RUN, "what is stored is the job reconciler's to change"


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize(("deadline", "told"), [(30, Desired.STOP), (None, Desired.RUN)])
def test_what_was_given_up_does_not_begin_any_more(
    rig: Rig, is_stored: bool, deadline: int | None, told: Desired
) -> None:
    """Under `stop` another may run by now, which the cache need not know of."""
    pending = execution(job("a"), local_deadline_seconds=deadline)
    if is_stored:
        rig.put(pending.but(status=pending.status.but(contact=Contact.LOST)))
    else:
        rig.put(pending)
        rig.presence.give_up(pending.ref)
    welcome = rig.hello()
    assert isinstance(welcome, Welcome)
    assert [e.spec.desired for e in welcome.assignments.executions] == [told]


def test_a_follower_refuses_everybody(rig: Rig) -> None:
    rig.hello()
    rig.loop.run_until_complete(rig.gateway.close())
    answer = rig.hello()
    assert isinstance(answer, Refused)
    assert answer.reason == "NotLeading"
    assert rig.beat()
