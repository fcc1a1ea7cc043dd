"""What one round of work on a job came to."""

from dataclasses import dataclass
from typing import Final

from bacalhau_api.v1.job import JobPhase
from bacalhau_controllers.job.placing import Placer
from bacalhau_controllers.job.tally import Tally

NEW_GENERATION: Final = "NewGeneration"
"""Why what an earlier generation left is stopped."""


@dataclass(slots=True)
class Outcome:
    """The slots counted, who was placed, and whether the job is over (`ended`)."""

    tally: Tally
    placer: Placer
    ended: JobPhase | None = None
    reason: str = ""
    message: str = ""
    ops_nodes: tuple[str, ...] | None = None
