"""The docker engine: runs containers on a Docker Engine that lives on this machine.

`engine.py` is the port; `client.py` talks to the engine with deadlines; `body.py` says what a
container is to be; `runs.py` keeps and watches each run; `images.py`, `networks.py`, `ports.py`,
`gpus.py` see to what a container needs.
"""

from bacalhau.engines.docker.engine import DockerEngine
from bacalhau.engines.docker.options import DockerOptions

__all__ = ["DockerEngine", "DockerOptions"]
