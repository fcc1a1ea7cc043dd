"""Examples at the end of `--help`. Every one of them is a line that works as it stands, given
objects of those names."""

from typing import Final

import typer
from typer.core import TyperCommand

from bacalhau.cli.helping import HelpfulCommand

_EXAMPLES: Final[dict[str, tuple[str, ...]]] = {
    "": (
        "bacalhau serve                            # a server and a node, on this machine",
        "bacalhau wasm run hello.wasm              # a program as a job",
        "bacalhau apply -f job.yaml --wait         # a declared job",
        "bacalhau get jobs; bacalhau explain job NAME; bacalhau logs -f NAME",
    ),
    "docker run": (
        "bacalhau docker run ubuntu echo hello",
        "bacalhau docker run -f ubuntu -- sh -c 'ls /inputs; exit 3'",
        "bacalhau docker run -i s3://logs/2024/*,dst=/logs -o out:/out --count 4 IMAGE",
        "bacalhau docker run --target all --constraints zone=a ubuntu uname -a",
        "bacalhau docker run --dry-run ubuntu date > job.yaml",
    ),
    "wasm run": (
        "bacalhau wasm run -f hello.wasm one two",
        "bacalhau wasm run -i file:///srv/data:/inputs -o out:/out --download app.wasm",
        "bacalhau wasm run --count 8 --memory 64Mi https://example.org/app.wasm",
        "bacalhau wasm run --dry-run hello.wasm | bacalhau apply -f -",
    ),
    "apply": (
        "bacalhau apply -f job.yaml",
        "bacalhau apply -f jobs/ -R --dry-run",
        "bacalhau wasm run --dry-run app.wasm | bacalhau apply -f - --wait",
    ),
    "get": (
        "bacalhau get jobs",
        "bacalhau get executions --field-selector job=NAME,phase=Failed -o wide",
        "bacalhau get job/NAME -o yaml",
        "bacalhau get jobs --watch",
    ),
    "describe": ("bacalhau describe job NAME", "bacalhau describe node/edge-1"),
    "plan": (
        "bacalhau plan -f jobs/",
        "bacalhau plan -f job.yaml -o json > plan.json; echo $?",
    ),
    "diff": ("bacalhau diff -f job.yaml", "bacalhau diff job/NAME --from g1 --to g2"),
    "simulate": ("bacalhau simulate --without node/edge-1",),
    "rollback": ("bacalhau rollback job/NAME --to g1 -m 'wrong day'",),
    "explain": (
        "bacalhau explain job NAME",
        "bacalhau explain node edge-1 -o json",
        "bacalhau explain node edge-1 --job NAME",
    ),
    "history": ("bacalhau history job NAME", "bacalhau history job NAME --changes"),
    "logs": (
        "bacalhau logs NAME",
        "bacalhau logs -f --tail 20 NAME",
        "bacalhau logs execution/NAME --stream stderr",
    ),
    "wait": (
        "bacalhau wait NAME",
        "bacalhau wait NAME --for running --timeout 60",
        "bacalhau wait NAME && bacalhau download NAME",
    ),
    "download": (
        "bacalhau download NAME",
        "bacalhau download NAME -o results --layout partitions",
        "bacalhau download execution/NAME          # also of a failed attempt",
    ),
    "rerun": ("bacalhau rerun NAME --wait", 'bacalhau rerun NAME --nonce "$(date +%F)"'),
    "stop": ("bacalhau stop NAME -m 'wrong input'",),
    "delete": ("bacalhau delete job NAME", "bacalhau delete -f job.yaml --ignore-not-found"),
    "serve": (
        "bacalhau serve --allow-path '/srv/data/**'",
        "bacalhau serve --role orchestrator --host 0.0.0.0 --api-token-file tokens --nats-host 0.0.0.0",
        "bacalhau serve --role compute --orchestrator URL --token TOKEN --label zone=a",
    ),
    "node list": ("bacalhau node list -o wide -l zone=a",),
    "node drain": ("bacalhau node drain edge-1; bacalhau get executions --field-selector node=edge-1",),
    "node token": ("bacalhau node token --node edge-1 --ttl 600",),
    "gitops run": (
        "bacalhau gitops run fleet/",
        "bacalhau gitops run fleet/ --mode detect --once",
    ),
    "gitops check": ("bacalhau gitops check fleet/",),
    "gitops status": ("bacalhau gitops status", "bacalhau gitops status fleet --objects"),
    "gitops approve": ("bacalhau gitops approve fleet",),
    "gitops suspend": ("bacalhau gitops suspend fleet --for 2h -m 'moving the disk'",),
    "gitops restore": ("bacalhau gitops restore fleet job/NAME",),
    "completion": (
        "source <(bacalhau completion bash)",
        "bacalhau completion fish > ~/.config/fish/completions/bacalhau.fish",
    ),
}  # fmt: skip


def add_examples(app: typer.Typer, prefix: str = "") -> None:
    """Put examples below the help of all commands of an application that have some, and have them
    all name their values in one way."""
    for command in app.registered_commands:
        name = command.name or (command.callback.__name__ if command.callback else "")
        command.epilog = epilog(f"{prefix}{name.replace('_', '-')}")
        if command.cls is None or command.cls is TyperCommand:
            command.cls = HelpfulCommand


def epilog(command: str) -> str | None:
    """The examples of a command as the text that stands below its options; None without any.

    `\\b` keeps the lines as they are.
    """
    lines = lines_of(command)
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines) if lines else None


def lines_of(command: str) -> tuple[str, ...]:
    """The examples alone."""
    return _EXAMPLES.get(command, ())
