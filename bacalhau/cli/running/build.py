"""From the flags of `docker run` and `wasm run` to a job in canonical form. Pure: the name's suffix and
the caller's variables come in as arguments.

A job that was put together is checked by the rules that hold for manifests; what they find
wrong is told by the flag that it came from. All problems are told at once, as usage errors.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from bacalhau.cli.running.flags import DockerFlags, RunFlags, WasmFlags
from bacalhau.cli.running.modules import ENTRY_DIRECTORY, IMPORTS_DIRECTORY, module_source
from bacalhau.cli.running.sources import (
    Wrong,
    file_name_of,
    parse_input,
    parse_pair,
    parse_port,
    parse_publisher,
    parse_result,
)
from bacalhau_api.canonical import canonical_job
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.quantity import parse_bytes, parse_cpu, parse_gpu, parse_seconds
from bacalhau_api.selectors import parse_selector
from bacalhau_api.v1.job import (
    Constraint,
    InputSource,
    Job,
    JobSpec,
    JobType,
    Network,
    NetworkType,
    Resources,
    RetryPolicy,
    SpecConfig,
    Task,
    Timeouts,
)

T = TypeVar("T")


class _Reading:
    """Reads texts of flags, and gathers what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def wrong(self, flag: str, message: str, value: str = "", hint: str = "") -> None:
        """One more problem."""
        self.problems.append(Problem(flag, message, value, hint))

    def take(self, flag: str, text: str, parse: Callable[[str], T], default: T) -> T:
        """The value of a flag, or the default where it was not given or is wrong."""
        found = self.all(flag, [text], parse) if text else []
        return found[0] if found else default

    def all(
        self, flag: str, texts: Sequence[str], parse: Callable[[str], T], *, is_secret: bool = False
    ) -> list[T]:
        """The values of a repeated flag, without those that are wrong."""
        found: list[T] = []
        for text in texts:
            try:
                found.append(parse(text))
            except InvalidError as error:
                self.problems += [Problem(flag, p.message, p.value, p.hint) for p in error.problems]
            except ValueError as error:
                hint = error.hint if isinstance(error, Wrong) else ""
                shown = f"{text.partition('=')[0]}=…" if is_secret and "=" in text else text
                self.wrong(flag, str(error), repr(_short(shown)), hint)
        return found

    def check(self) -> None:
        """Raises the usage error, if there is one."""
        if self.problems:
            error = InvalidError(self.problems)
            error.reason = "Usage"
            raise error


def docker_job(
    image: str,
    arguments: Sequence[str],
    flags: DockerFlags,
    *,
    suffix: str,
    environ: Mapping[str, str],
) -> Job:
    """The job of a `docker run`. `suffix` makes a name that is not given unique; `environ` has
    values for `-e NAME`.

    Raises InvalidError, a usage error, with all problems by flag.
    """
    reading = _Reading()
    params: dict[str, Any] = {"image": image}
    for name, value in (
        ("entrypoint", list(flags.entrypoint)),
        ("parameters", list(arguments)),
        ("workingDirectory", flags.workdir),
        ("user", flags.user),
        ("readOnlyRoot", flags.read_only),
        ("shmBytes", reading.take("--shm-size", flags.shm_size, parse_bytes, 0)),
    ):
        params |= {name: value} if value else {}
    base = re.split(r"[@:]", image.rpartition("/")[2])[0]
    name = flags.name or _made_up(base or "docker", suffix)
    return _job(SpecConfig(type="docker", params=params), (), flags, name, environ, reading)


def wasm_job(
    module: str,
    arguments: Sequence[str],
    flags: WasmFlags,
    *,
    suffix: str,
    environ: Mapping[str, str],
) -> Job:
    """The same for `wasm run`. Local module files are read. Raises InvalidError."""
    reading = _Reading()
    entry = reading.all("MODULE", [module], lambda x: module_source(x, ENTRY_DIRECTORY))
    imports = reading.all("-I", flags.import_modules, lambda x: module_source(x, IMPORTS_DIRECTORY))
    params: dict[str, Any] = {"entryModule": entry[0].target if entry else "/"}
    for key, value in (
        ("entrypoint", flags.entry_point),
        ("parameters", list(arguments)),
        ("importModules", [item.target for item in imports]),
    ):
        params |= {key: value} if value else {}
    base = file_name_of(module).partition(".")[0]
    name = flags.name or _made_up(base or "wasm", suffix)
    engine = SpecConfig(type="wasm", params=params)
    return _job(engine, (*entry, *imports), flags, name, environ, reading)


def _made_up(base: str, suffix: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-")[:40].strip("-")
    return f"{words or 'job'}-{suffix}"


def _job(
    engine: SpecConfig,
    modules: Sequence[InputSource],
    flags: RunFlags,
    name: str,
    environ: Mapping[str, str],
    reading: _Reading,
) -> Job:
    kind = _type(flags, reading)
    task = Task(
        name=flags.task_name,
        engine=engine,
        publisher=reading.take("-p", flags.publisher, parse_publisher, None),
        env=dict(
            reading.all("-e", flags.env, lambda text: _variable(text, environ), is_secret=True)
        ),
        input_sources=(*_inputs(flags, reading), *modules),
        result_paths=tuple(reading.all("-o", flags.output, parse_result)),
        resources=_resources(flags, reading),
        network=_network(flags, reading),
        timeouts=_timeouts(flags, reading),
    )
    spec = JobSpec(
        type=kind,
        count=_count(flags, reading),
        priority=flags.priority,
        tasks=(task,),
        constraints=_constraints(flags, reading),
        retry=RetryPolicy() if flags.attempts is None else RetryPolicy(attempts=flags.attempts),
    )
    labels = dict(reading.all("-l", flags.labels, parse_pair))
    meta = ObjectMeta(name=name, namespace=flags.namespace, labels=labels)
    reading.check()
    try:
        return canonical_job(Job(metadata=meta, spec=spec))
    except InvalidError as error:
        reading.problems += [by_flag(problem, flags, engine.type) for problem in error.problems]
    reading.check()
    raise AssertionError("a problem was reported")


def _type(flags: RunFlags, reading: _Reading) -> JobType:
    targets = {"": JobType.BATCH, "any": JobType.BATCH, "all": JobType.OPS}
    kinds = {str(kind): kind for kind in JobType}
    target, kind = flags.target.lower(), flags.type.lower()
    if target not in targets:
        reading.wrong("--target", "is not known", repr(flags.target), "use any or all")
    if kind and kind not in kinds:
        reading.wrong("--type", "is not known", repr(flags.type), f"use {', '.join(kinds)}")
    if target and kind in kinds and kinds[kind].is_per_node != (target == "all"):
        reading.wrong(
            "--type", f"{kind} does not go with --target {target}", hint="give one of the two"
        )
    return kinds.get(kind) or targets.get(target, JobType.BATCH)


def _count(flags: RunFlags, reading: _Reading) -> int:
    if flags.count is not None and flags.concurrency is not None:
        reading.wrong("--concurrency", "means the same as --count", hint="give one of the two")
    given = flags.count if flags.count is not None else flags.concurrency
    return 1 if given is None else given


def _constraints(flags: RunFlags, reading: _Reading) -> tuple[Constraint, ...]:
    if flags.constraints and flags.selector:
        reading.wrong("--selector", "means the same as --constraints", hint="give one of the two")
    return reading.take("--constraints", flags.constraints or flags.selector, parse_selector, ())


def _variable(text: str, environ: Mapping[str, str]) -> tuple[str, str]:
    if "=" in text:
        return parse_pair(text)
    if text not in environ:
        raise Wrong("is not set here", f"write {text}=VALUE")
    return text, environ[text]


def _inputs(flags: RunFlags, reading: _Reading) -> list[InputSource]:
    """Inputs, each at a place of its own: said here, because the default place is not typed."""
    found = reading.all("-i", flags.input, parse_input)
    targets = [item.target for item in found]
    for text, target in zip(flags.input, targets, strict=False):
        if len(found) == len(flags.input) and targets.count(target) > 1:
            reading.wrong("-i", f"two inputs are at {target}", repr(_short(text)), "add ,dst=PATH")
    return found


def _resources(flags: RunFlags, reading: _Reading) -> Resources:
    return Resources(
        cpu_millis=reading.take("--cpu", flags.cpu, parse_cpu, 0),
        memory_bytes=reading.take("--memory", flags.memory, parse_bytes, 0),
        disk_bytes=reading.take("--disk", flags.disk, parse_bytes, 0),
        gpu=reading.take("--gpu", flags.gpu, parse_gpu, 0),
    )


def _network(flags: RunFlags, reading: _Reading) -> Network:
    kinds = {str(kind).lower(): kind for kind in NetworkType}
    word = flags.network.lower()
    if word and word not in kinds:
        known = ", ".join(kinds)
        reading.wrong("--network", "is not known", repr(flags.network), f"use {known}")
    kind = kinds.get(word, NetworkType.DEFAULT)
    if flags.domain and word in kinds and kind is not NetworkType.HTTP:
        reading.wrong("--domain", f"does not go with --network {word}", hint="use --network http")
    if flags.domain and not word:
        kind = NetworkType.HTTP
    ports = tuple(reading.all("--port", flags.port, parse_port))
    if ports and kind not in (NetworkType.BRIDGE, NetworkType.HOST, NetworkType.FULL):
        hint = "add --network bridge, or host"
        reading.wrong("--port", f"does not go with --network {word or 'none'}", hint=hint)
    return Network(type=kind, domains=tuple(flags.domain), ports=ports)


def whole_seconds(text: str) -> int:
    """A duration as whole seconds, rounded up."""
    return math.ceil(parse_seconds(text))


def _timeouts(flags: RunFlags, reading: _Reading) -> Timeouts:
    reading.take("--wait-timeout", flags.wait_timeout, whole_seconds, 0)
    return Timeouts(
        execution_timeout=reading.take(
            "--execution-timeout", flags.execution_timeout, whole_seconds, 0
        ),
        queue_timeout=reading.take("--queue-timeout", flags.queue_timeout, whole_seconds, 0),
        total_timeout=reading.take("--timeout", flags.timeout, whole_seconds, 0),
    )


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


# --- Problems by flag -----------------------------------------------------------------------------

_FLAGS: Final = (
    (r"metadata\.name\b", "--name"),
    (r"metadata\.namespace", "--namespace"),
    (r"metadata\.labels", "-l"),
    (r"spec\.count", "--count"),
    (r"spec\.priority", "--priority"),
    (r"spec\.constraints", "--constraints"),
    (r"spec\.tasks\[0\]\.name", "--task-name"),
    (r"spec\.tasks\[0\]\.env", "-e"),
    (r"spec\.tasks\[0\]\.inputSources", "-i"),
    (r"spec\.tasks\[0\]\.resultPaths", "-o"),
    (r"spec\.tasks\[0\]\.publisher", "-p"),
    (r"spec\.tasks\[0\]\.resources\.cpu", "--cpu"),
    (r"spec\.tasks\[0\]\.resources\.memory", "--memory"),
    (r"spec\.tasks\[0\]\.resources\.disk", "--disk"),
    (r"spec\.tasks\[0\]\.resources\.gpu", "--gpu"),
    (r"spec\.tasks\[0\]\.network\.domains", "--domain"),
    (r"spec\.tasks\[0\]\.network\.ports", "--port"),
    (r"spec\.tasks\[0\]\.network", "--network"),
    (r"spec\.tasks\[0\]\.timeouts\.execution", "--execution-timeout"),
    (r"spec\.tasks\[0\]\.timeouts\.queue", "--queue-timeout"),
    (r"spec\.tasks\[0\]\.timeouts", "--timeout"),
    (r"spec\.tasks\[0\]\.engine\.params\.image", "IMAGE"),
    (r"spec\.tasks\[0\]\.engine\.params\.workingDirectory", "--workdir"),
    (r"spec\.tasks\[0\]\.engine\.params\.user", "--user"),
    (r"spec\.tasks\[0\]\.engine\.params\.shmBytes", "--shm-size"),
    (r"spec\.tasks\[0\]\.engine\.params\.entryModule", "MODULE"),
    (r"spec\.tasks\[0\]\.engine\.params\.importModules", "-I"),
    (r"spec\.tasks\[0\]\.engine\.params\.parameters", "the arguments"),
)


def by_flag(problem: Problem, flags: RunFlags, engine: str) -> Problem:
    """A problem of the job as a problem of the flag that its field came from."""
    flag = next((flag for path, flag in _FLAGS if re.match(path, problem.field)), "")
    if re.match(r"spec\.tasks\[0\]\.engine\.params\.entrypoint", problem.field):
        flag = "--entrypoint" if engine == "docker" else "--entry-point"
    typed = {"-i": flags.input, "-o": flags.output, "--domain": flags.domain, "--port": flags.port}
    index = re.match(r"spec\.tasks\[0\]\.[\w.]+\[(\d+)\]", problem.field)
    texts = typed.get(flag, [])
    value, message = problem.value, problem.message
    if index and int(index[1]) < len(texts):
        value = repr(_short(texts[int(index[1])]))
        last = problem.field.rpartition(".")[2]
        message = f"{last} {message}" if "[" not in last else message
    elif flag == "-i":
        flag = "MODULE"
    if flag == "-e":
        message = f"{problem.field.rpartition('.')[2]}: {message}"
    return Problem(flag or problem.field, message, value, problem.hint)
