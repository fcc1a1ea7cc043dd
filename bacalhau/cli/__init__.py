"""The command line, `bacalhau`. This module only starts it, quickly."""

import sys


def main() -> None:
    """The entry point of the `bacalhau` command."""
    arguments = sys.argv[1:]
    if arguments in (["version"], ["version", "--client"], ["--version"]):
        # Answered without loading the framework, which alone takes a tenth of a second.
        from bacalhau.cli.versions import print_version

        code = print_version(client_only=arguments != ["version"])
    else:
        from bacalhau.cli.app import run

        code = run(arguments)
    sys.exit(code)
