"""The flags of `docker run` and `wasm run`, as data; what they mean is for `build` and `submit`.

Names are those that Bacalhau users know; where one has no counterpart there, it is named as other
commands here name it.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

F = TypeVar("F", bound="RunFlags")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFlags:
    """What both commands take. Texts are as typed; the empty text means: not given."""

    name: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The job's name. One that has ended runs again. Default: made up."
        ),
    ] = ""
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", metavar="NAME", help="The namespace.")
    ] = "default"
    target: Annotated[
        str,
        typer.Option(
            metavar="any|all",
            help="any: on some node (a batch job); all: on each node (an ops job).",
        ),
    ] = ""
    type: Annotated[
        str,
        typer.Option(
            metavar="TYPE", help="batch, ops, service or daemon; more exact than --target."
        ),
    ] = ""
    count: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Partitions of a batch job, instances of a service."),
    ] = None
    concurrency: Annotated[int | None, typer.Option(min=0, hidden=True, help="As --count.")] = None
    priority: Annotated[int, typer.Option(metavar="N", help="Higher goes first.")] = 0
    labels: Annotated[
        list[str],
        typer.Option(
            "--labels",
            "--label",
            "-l",
            metavar="KEY=VALUE",
            help="KEY=VALUE of the job, repeatable.",
        ),
    ] = field(default_factory=list)
    constraints: Annotated[
        str,
        typer.Option(
            metavar="SELECTOR",
            help="Which nodes: a selector of their labels, such as 'zone=a,gpu'.",
        ),
    ] = ""
    selector: Annotated[
        str, typer.Option("--selector", "-s", help="As --constraints.", hidden=True)
    ] = ""
    attempts: Annotated[
        int | None,
        typer.Option(min=1, max=100, metavar="N", help="Tries per slot, the first included."),
    ] = None
    task_name: Annotated[str, typer.Option(metavar="NAME", help="The name of the task.")] = "main"
    env: Annotated[
        list[str],
        typer.Option(
            "--env",
            "-e",
            metavar="NAME[=VALUE]",
            help="NAME=VALUE, or NAME to pass on its value here; repeatable.",
        ),
    ] = field(default_factory=list)
    input: Annotated[
        list[str],
        typer.Option(
            "--input", "-i", metavar="SOURCE[:PATH]",
            help="file:///…, https://…, s3://…, ipfs://…; or src=…,dst=…,opt=KEY=VALUE. "
            "Default path: /inputs. Repeatable.",
        ),
    ] = field(default_factory=list)  # fmt: skip
    output: Annotated[
        list[str],
        typer.Option(
            "--output", "-o", metavar="NAME:PATH",
            help="Keep what is in the directory PATH as the result NAME; repeatable.",
        ),
    ] = field(default_factory=list)  # fmt: skip
    publisher: Annotated[
        str,
        typer.Option(
            "--publisher",
            "-p",
            metavar="WHERE",
            help="local, ipfs, or s3://BUCKET/KEY[,opt=region=…].",
        ),
    ] = ""
    cpu: Annotated[str, typer.Option(metavar="CPUS", help="CPUs, such as 2 or 500m.")] = ""
    memory: Annotated[str, typer.Option(metavar="BYTES", help="Memory, such as 512Mi or 2GB.")] = ""
    disk: Annotated[str, typer.Option(metavar="BYTES", help="Disk, such as 10GB.")] = ""
    gpu: Annotated[str, typer.Option(metavar="N", help="GPUs, such as 1.")] = ""
    network: Annotated[
        str,
        typer.Option(
            metavar="TYPE", help="none, http, bridge, host or full. Default: the engine's, none."
        ),
    ] = ""
    domain: Annotated[
        list[str], typer.Option(metavar="DOMAIN", help="Reachable with --network http; repeatable.")
    ] = field(default_factory=list)
    port: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=HOST[:TARGET]]",
            help="A port the workload listens on, such as http=8080:80; repeatable.",
        ),
    ] = field(default_factory=list)
    timeout: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="The job fails after so long, queueing included: 90, 90s, 1h30m."
        ),
    ] = ""
    queue_timeout: Annotated[
        str, typer.Option(metavar="TIME", help="It fails if no node was found after so long.")
    ] = ""
    execution_timeout: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="An execution is stopped and counts as failed after so long."
        ),
    ] = ""
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end of the job.")] = (
        True
    )
    wait_timeout: Annotated[
        str,
        typer.Option(
            "--wait-timeout",
            "--wait-timeout-secs",
            metavar="TIME",
            help="Wait so long at most; the job goes on.",
        ),
    ] = ""
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the output as it comes, to the end.")
    ] = False
    download: Annotated[
        bool, typer.Option("--download", help="Download the results once it is complete.")
    ] = False
    output_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to download to. Default: ./job-NAME")
    ] = None
    id_only: Annotated[
        bool, typer.Option("--id-only", "--quiet", "-q", help="Print nothing but the job's name.")
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the manifest for `apply -f -`, and send nothing."),
    ] = False
    node_details: Annotated[bool, typer.Option("--node-details", hidden=True)] = False
    group_events: Annotated[bool, typer.Option("--group-events", hidden=True)] = False
    server: Annotated[str, typer.Option(hidden=True)] = ""
    api_host: Annotated[str, typer.Option(hidden=True)] = ""
    api_port: Annotated[str, typer.Option(hidden=True)] = ""
    debug: Annotated[bool, typer.Option("--debug", hidden=True)] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerFlags(RunFlags):
    """Those of `docker run`."""

    workdir: Annotated[
        str,
        typer.Option(
            "--workdir", "-w", metavar="PATH", help="The working directory in the container."
        ),
    ] = ""
    entrypoint: Annotated[
        list[str],
        typer.Option(metavar="WORD", help="Instead of the image's; repeat it for its arguments."),
    ] = field(default_factory=list)
    user: Annotated[
        str,
        typer.Option(
            "--user", "-u", metavar="USER", help="uid, uid:gid or a name that the image knows."
        ),
    ] = ""
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Only results and a /tmp in memory are writable.")
    ] = False
    shm_size: Annotated[
        str, typer.Option(metavar="BYTES", help="Size of /dev/shm, such as 1Gi.")
    ] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WasmFlags(RunFlags):
    """Those of `wasm run`."""

    entry_point: Annotated[
        str, typer.Option(metavar="NAME", help="The exported function to call.")
    ] = "_start"
    import_modules: Annotated[
        list[str],
        typer.Option(
            "--import-modules",
            "-I",
            metavar="MODULE",
            help="A module to link, as MODULE; repeatable.",
        ),
    ] = field(default_factory=list)


def command_of(
    flags: type[F], arguments: dict[str, Any], run: Callable[..., int], words: str
) -> Callable[..., int]:
    """A function whose signature is the arguments (name to annotation and default, `...` where
    there is none), then the flags; it calls `run(context, flags, **arguments)`."""
    hints = get_type_hints(flags, include_extras=True)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("context", kind, annotation=typer.Context)]
    for name, (annotation, default) in arguments.items():
        given = inspect.Parameter.empty if default is ... else default
        parameters.append(inspect.Parameter(name, kind, annotation=annotation, default=given))
    for item in dataclasses.fields(flags):
        is_list = item.default_factory is not dataclasses.MISSING
        annotation = _optional(hints[item.name]) if is_list else hints[item.name]
        default = None if is_list else item.default
        parameters.append(
            inspect.Parameter(item.name, kind, annotation=annotation, default=default)
        )

    def command(context: typer.Context, **given: Any) -> int:
        positional = {name: given.pop(name) for name in arguments}
        found = {name: value for name, value in given.items() if value is not None}
        return run(context, flags(**found), **positional)

    command.__doc__ = words
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _optional(annotation: Any) -> Any:
    plain, extras = annotation.__origin__, annotation.__metadata__
    return Annotated[plain | None, *extras]
