"""Valid jobs, drawn by hypothesis: the raw material of the property tests."""

import string
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from bacalhau_api.canonical import canonical_job
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.job import (
    Constraint,
    DisconnectPolicy,
    ExitRule,
    InputSource,
    Job,
    JobSpec,
    JobType,
    Network,
    NetworkType,
    Port,
    Resources,
    RestartPolicy,
    ResultPath,
    RetryPolicy,
    SpecConfig,
    Task,
    Timeouts,
    UpdateStrategy,
)

_LETTERS = string.ascii_letters + string.digits
names = st.text(_LETTERS, min_size=1, max_size=12)
# Words that a careless reader turns into something else, beside plain text.
_TRAPS = ("on", "no", "1.10", "010", "null", "~", "12:30", "1_000", "=", "<<", "0x1f", "é ü", "1e3")
texts = st.one_of(
    st.sampled_from(_TRAPS),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20),
)
_keys = st.text(_LETTERS + "._/-", min_size=1, max_size=20)
_text_maps = st.dictionaries(
    _keys.filter(lambda key: not key.startswith("bacalhau.org/")), texts, max_size=4
)
_env = st.dictionaries(
    st.text(string.ascii_uppercase, min_size=1, max_size=8),
    texts.filter(lambda x: not x.startswith("env:")),
    max_size=4,
).filter(lambda env: not any(k.startswith("BACALHAU") for k in env))

_engines: SearchStrategy[SpecConfig] = st.one_of(
    st.builds(
        lambda image, args: SpecConfig(
            type="docker", params={"image": image, **({"parameters": args} if args else {})}
        ),
        names,
        st.lists(texts, max_size=3),
    ),
    st.builds(lambda code: SpecConfig(type="noop", params={"exitCode": code}), st.integers(1, 9)),
    st.builds(
        lambda name, params: SpecConfig(type=f"plug{name}", params=params),
        names,
        st.dictionaries(names, st.one_of(st.booleans(), st.integers(-9, 9), texts), max_size=3),
    ),
)
_sources: SearchStrategy[SpecConfig] = st.one_of(
    st.builds(lambda n: SpecConfig(type="local", params={"sourcePath": f"/{n}"}), names),
    st.builds(lambda n: SpecConfig(type="inline", params={"url": f"data:,{n}"}), names),
    st.builds(
        lambda n: SpecConfig(
            type="s3",
            params={
                "bucket": f"b{n}",
                "versionId": n,
                "partition": {"type": "regex", "pattern": n},
            },
        ),
        names,
    ),
)
_publishers: SearchStrategy[SpecConfig | None] = st.one_of(
    st.none(),
    st.just(SpecConfig(type="local")),
    st.builds(lambda n: SpecConfig(type="s3", params={"bucket": f"b{n}", "key": n}), names),
)
_constraints = st.builds(
    lambda key, case: Constraint(key=key, operator=case[0], values=case[1]),
    _keys,
    st.sampled_from(
        [
            ("=", ("a",)),
            ("!=", ("",)),
            ("in", ("a", "b")),
            ("exists", ()),
            ("!", ()),
            ("gt", ("5",)),
        ]
    ),
)
_networks = st.one_of(
    st.just(Network()),
    st.just(Network(type=NetworkType.NONE)),
    st.just(Network(type=NetworkType.HTTP, domains=("example.org", "10.0.0.1"))),
    st.builds(
        lambda port: Network(
            type=NetworkType.BRIDGE,
            ports=(Port(name="web", static=port, target=80, host_network="127.0.0.1"),),
        ),
        st.integers(1024, 65535),
    ),
)


@st.composite
def _tasks(draw: Any) -> Task:
    sources = draw(st.lists(_sources, max_size=3))
    results = draw(st.lists(names, max_size=3, unique_by=str.casefold))
    return Task(
        name=draw(names),
        engine=draw(_engines),
        publisher=draw(_publishers),
        env=draw(_env),
        meta=draw(_text_maps),
        input_sources=tuple(
            InputSource(
                source=source, alias=draw(st.sampled_from(["", f"in{i}"])), target=f"/in/{i}"
            )
            for i, source in enumerate(sources)
        ),
        result_paths=tuple(ResultPath(name=f"r{n}", path=f"/out/{n}") for n in results),
        resources=Resources(
            cpu_millis=draw(st.integers(0, 10**6)),
            memory_bytes=draw(st.integers(0, 2**62)),
            disk_bytes=draw(st.integers(0, 2**40)),
            gpu=draw(st.integers(0, 8)),
        ),
        network=draw(_networks),
        timeouts=Timeouts(
            execution_timeout=draw(st.integers(0, 1000)),
            queue_timeout=draw(st.integers(0, 1000)),
            total_timeout=draw(st.sampled_from([0, 5000])),
        ),
    )


@st.composite
def jobs(draw: Any) -> Job:
    """A job in canonical form, with every field in use now and then."""
    job_type = draw(st.sampled_from(JobType))
    spec = JobSpec(
        type=job_type,
        count=1 if job_type.is_per_node else draw(st.integers(0, 50)),
        priority=draw(st.integers(-10, 10)),
        tasks=(draw(_tasks()),),
        constraints=tuple(draw(st.lists(_constraints, max_size=3))),
        meta=draw(_text_maps),
        retry=draw(
            st.sampled_from(
                [
                    RetryPolicy(),
                    RetryPolicy(attempts=5, backoff_seconds=0.5),
                    RetryPolicy(exit_rules=(ExitRule(codes=(1, 2), action="fail"),)),
                ]
            )
        ),
        restart=draw(st.sampled_from([RestartPolicy(), RestartPolicy(policy="never")])),
        disconnect=draw(
            st.sampled_from(
                [DisconnectPolicy(), DisconnectPolicy(after_seconds=9, action="replace")]
            )
        ),
        update=draw(st.sampled_from([UpdateStrategy(), UpdateStrategy(max_unavailable=3)])),
        suspend=draw(st.booleans()),
        run_nonce=draw(st.sampled_from(["", "again"])),
    )
    meta = ObjectMeta(
        name=draw(names),
        namespace=draw(st.sampled_from(["default", "team-a"])),
        labels=draw(_text_maps),
        annotations=draw(_text_maps),
    )
    return canonical_job(Job(metadata=meta, spec=spec))
