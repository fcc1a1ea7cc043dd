"""Starts the command of an agent that fails on SIGUSR1, as for a reason that nobody foresaw.

python failing.py python -m bacalhau serve ...
"""

import asyncio
import signal
import sys

from bacalhau.cli import main
from bacalhau_controllers.runner.agent import Agent


def fail_on_signal() -> None:
    """Let `Agent.run` raise at the signal."""
    run = Agent.run

    async def failing(agent: Agent) -> None:
        told = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, told.set)
        running = asyncio.create_task(run(agent))
        try:
            await told.wait()
            raise RuntimeError("told to fail")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    Agent.run = failing  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    fail_on_signal()
    sys.argv = ["bacalhau", *sys.argv[sys.argv.index("bacalhau") + 1 :]]
    main()
