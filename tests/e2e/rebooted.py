"""Starts the command of an agent as after a reboot of its machine: under another boot id.

    python rebooted.py BOOT_ID python -m bacalhau serve ...

Everything else of a reboot, which is that no process of before exists, is done by whoever uses it.
The monotonic clock goes on, because the agent's workloads read it, too; moments of another boot
are never compared with present ones, whatever it says.
"""

import os
import sys
from pathlib import Path

from bacalhau.cli import main
from bacalhau.node import machine


def reboot(name: str) -> None:
    """Let this process believe that this is the boot `name`."""
    file = os.memfd_create("boot_id")
    os.write(file, name.encode())
    machine._BOOT_ID = Path(f"/proc/self/fd/{file}")


if __name__ == "__main__":
    reboot(sys.argv[1])
    sys.argv = ["bacalhau", *sys.argv[sys.argv.index("bacalhau") + 1 :]]
    main()
