"""`serve`: run an orchestrator, a compute node, or both."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bacalhau.cli import serving
from bacalhau.cli.helping import HelpfulCommand
from bacalhau.settings import (
    API_PORT,
    IPFS_SECONDS,
    NATS_PORT,
    NODE_TIMEOUT_SECONDS,
    PROBE_SECONDS,
    DockerSettings,
    ServeSettings,
)

_HERE = "@here"


class _ServeCommand(HelpfulCommand):
    """Lets `--orchestrator` stand alone (this process is one) or take an address (of another)."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As usual, with a value put behind an `--orchestrator` that has none."""
        words = list(args)
        for i, word in enumerate(words):
            is_alone = i + 1 == len(words) or words[i + 1].startswith("-")
            if word == "--orchestrator" and is_alone:
                words[i] = f"--orchestrator={_HERE}"
        return super().parse_args(ctx, words)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=_ServeCommand)(serve)


def serve(
    role: Annotated[
        str, typer.Option(help="orchestrator, compute, or both (also orchestrator,compute).")
    ] = "",
    orchestrator: Annotated[
        str,
        typer.Option(
            metavar="[URL]",
            help="Alone: be an orchestrator. With an address: join that one as a compute node.",
        ),
    ] = "",
    compute: Annotated[bool, typer.Option("--compute", help="Be a compute node.")] = False,
    token: Annotated[
        str, typer.Option(help="The token to join with, from `bacalhau node token`.")
    ] = "",
    data_dir: Annotated[
        Path, typer.Option(help="Where everything is kept.", envvar="BACALHAU_DIR")
    ] = Path("~/.bacalhau"),
    name: Annotated[str, typer.Option(help="The node's name. Default: the host's.")] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="KEY=VALUE, repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address the API listens on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the API; 0: any free one.")
    ] = API_PORT,
    api_token_file: Annotated[
        Path | None,
        typer.Option(help="Digests of API tokens; made with one new token if absent."),
    ] = None,
    insecure_lab: Annotated[
        bool, typer.Option("--insecure-lab", help="Listen beyond loopback without any tokens.")
    ] = False,
    nats_host: Annotated[
        str, typer.Option(help="Address the embedded NATS listens on.")
    ] = "127.0.0.1",
    nats_port: Annotated[
        int, typer.Option(min=-1, max=65535, help="Its port; -1: any free one.")
    ] = NATS_PORT,
    nats_url: Annotated[str, typer.Option(help="Use this NATS instead of the embedded one.")] = "",
    require_approval: Annotated[
        bool,
        typer.Option(
            "--require-approval", help="Nodes that join wait for `bacalhau node approve`."
        ),
    ] = False,
    allow_path: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN[:ro|:rw] of local paths jobs may use, repeatable."),
    ] = None,
    allow_private_urls: Annotated[
        bool,
        typer.Option("--allow-private-urls", help="Let jobs fetch inputs from private addresses."),
    ] = False,
    allow_address: Annotated[
        list[str] | None,
        typer.Option(
            help="ADDRESS[/BITS][:PORT] that jobs may fetch from though not public, repeatable."
        ),
    ] = None,
    input_cache: Annotated[
        str, typer.Option(help="Room for fetched inputs, such as 20GiB.")
    ] = "20GiB",
    input_max_size: Annotated[
        str, typer.Option(help="Of one input, such as 5GiB. Default: the cache's.")
    ] = "",
    s3_endpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of an S3 endpoint besides AWS that gets this node's credentials, repeatable."
        ),
    ] = None,
    ipfs_api: Annotated[
        str, typer.Option(help="Kubo RPC API, such as http://127.0.0.1:5001: enables ipfs.")
    ] = "",
    ipfs_gateway: Annotated[
        str, typer.Option(help="IPFS gateway to read from where there is no API.")
    ] = "",
    ipfs_timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds without a byte before IPFS is given up.")
    ] = IPFS_SECONDS,
    allow_protocol: Annotated[
        list[str] | None,
        typer.Option(help="fsspec protocol that inputs may name, such as gs, repeatable."),
    ] = None,
    allow_network: Annotated[
        list[str] | None,
        typer.Option(help="HTTP, Bridge or Host: a network that jobs may use, repeatable."),
    ] = None,
    allow_env: Annotated[
        list[str] | None,
        typer.Option(
            help="Pattern of this machine's variables that jobs may use by env:NAME, repeatable."
        ),
    ] = None,
    docker_host: Annotated[
        str,
        typer.Option(
            metavar="unix:///PATH",
            help="Socket of the Docker Engine. Default: DOCKER_HOST, or the usual one.",
        ),
    ] = "",
    docker_image: Annotated[
        list[str] | None,
        typer.Option(help="Pattern or digest of images that jobs may use, repeatable."),
    ] = None,
    docker_registry: Annotated[
        list[str] | None,
        typer.Option(help="HOST[:PORT] that images may come from, repeatable."),
    ] = None,
    docker_no_pull: Annotated[
        bool, typer.Option("--docker-no-pull", help="Run only images that are on the node.")
    ] = False,
    docker_keep_images: Annotated[
        str, typer.Option(help="Pulled images to keep, such as 50GB; older ones are removed.")
    ] = "",
    probe_exec: Annotated[
        str,
        typer.Option(
            metavar="COMMAND",
            help="Asked whether an execution may run here: gets it as JSON on standard input; exit "
            "code 0 is yes, any other no, with the reason on standard error.",
        ),
    ] = "",
    probe_http: Annotated[
        str,
        typer.Option(
            metavar="URL", help='The same by POST; answers {"allow": true} or false and a "reason".'
        ),
    ] = "",
    probe_timeout: Annotated[
        float,
        typer.Option(min=0.1, max=300.0, help="Seconds either may take; no answer is no yes."),
    ] = PROBE_SECONDS,
    cpu: Annotated[str, typer.Option(help="CPUs to offer, such as 3.5 or 3500m.")] = "",
    memory: Annotated[str, typer.Option(help="Memory to offer, such as 8GB.")] = "",
    disk: Annotated[str, typer.Option(help="Disk to offer, such as 100GB.")] = "",
    gpu: Annotated[int | None, typer.Option(min=0, help="GPUs to offer.")] = None,
    max_executions: Annotated[int | None, typer.Option(min=1, help="Executions at a time.")] = None,
    node_timeout: Annotated[
        float,
        typer.Option(
            min=1.0,
            max=600.0,
            help="Seconds without a word after which a node counts as out of contact.",
        ),
    ] = NODE_TIMEOUT_SECONDS,
    gitops: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR", help="Keep what a directory declares applied, repeatable."
        ),
    ] = None,
    relaxed_durability: Annotated[
        bool,
        typer.Option(
            "--relaxed-durability",
            help="Acknowledge writes before they are on disk. Faster, not safe.",
        ),
    ] = False,
    upload_limit: Annotated[
        str, typer.Option(help="Most to send of logs and results, such as 1MiB/s; 0: no limit.")
    ] = "",
    outbox_limit: Annotated[
        str,
        typer.Option(
            help="New work is refused while more waits to be handed over, such as 20GB. "
            "Default: half of the disk offered; 0: no bound."
        ),
    ] = "",
    keep_outputs: Annotated[
        str,
        typer.Option(
            help="How long outputs that were handed over stay on the node, such as 7d; 0: until "
            "the job is deleted."
        ),
    ] = "7d",
    keep_outputs_size: Annotated[
        str, typer.Option(help="The oldest of them go when they are more, such as 100GB.")
    ] = "",
    on_exit: Annotated[
        str, typer.Option(help="keep or stop running workloads when this process ends.")
    ] = "keep",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> int:
    """Run an orchestrator, a compute node, or both in one process (the default)."""
    roles = serving.parse_role(role, orchestrator, compute, _HERE)
    settings = ServeSettings(
        role=roles,
        data_dir=data_dir.expanduser(),
        name=name,
        labels=serving.parse_labels(label or []),
        listen_host=host,
        listen_port=port,
        api_token_file=api_token_file.expanduser() if api_token_file else None,
        insecure_lab=insecure_lab,
        nats_host=nats_host,
        nats_port=nats_port,
        nats_url=nats_url,
        orchestrator_url=serving.parse_orchestrator(orchestrator, roles, _HERE),
        join_token=token,
        require_approval=require_approval,
        allow_paths=tuple(serving.parse_allowed(text) for text in allow_path or []),
        allow_networks=serving.parse_networks(allow_network or []),
        allow_env=tuple(allow_env or ()),
        transfers=serving.parse_transfers(
            cache=input_cache,
            input_max=input_max_size,
            addresses=allow_address or [],
            allow_private=allow_private_urls,
            s3_endpoints=s3_endpoint or [],
            ipfs_api=ipfs_api,
            ipfs_gateway=ipfs_gateway,
            ipfs_seconds=ipfs_timeout,
            protocols=allow_protocol or [],
        ),
        docker=DockerSettings(
            host=docker_host,
            images_allowed=tuple(docker_image or ()),
            registries_allowed=tuple(docker_registry or ()),
            pulls=not docker_no_pull,
            images_keep_bytes=serving.parse_size("--docker-keep-images", docker_keep_images),
        ),
        probes=serving.parse_probes(probe_exec, probe_http, probe_timeout),
        capacity=serving.parse_capacity(cpu, memory, disk, gpu, max_executions),
        node_timeout_seconds=node_timeout,
        gitops=serving.parse_gitops(gitops or [], roles),
        relaxed_durability=relaxed_durability,
        upload_bytes_per_second=serving.parse_rate("--upload-limit", upload_limit) or 0,
        outbox_bytes_max=serving.parse_size("--outbox-limit", outbox_limit),
        keep_outputs_seconds=serving.parse_span("--keep-outputs", keep_outputs),
        keep_outputs_bytes=serving.parse_size("--keep-outputs-size", keep_outputs_size) or 0,
        on_exit=serving.choose("--on-exit", on_exit, ("keep", "stop")),
        log_level=serving.choose("--log-level", log_level, ("debug", "info", "warning", "error")),
        log_format=serving.choose("--log-format", log_format, ("text", "json")),
    )
    from bacalhau.serve import run

    result: int | None = run(settings)
    return result or 0
