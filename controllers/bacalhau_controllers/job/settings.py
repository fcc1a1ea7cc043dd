"""What an operator may tune about jobs. Seconds, unless a name says otherwise."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JobSettings:
    """Bounds and patience of the job reconciler.

    writes_max            writes in one commit; the rest of the work follows in the next
    bytes_max             bytes in one commit, give or take an object and the job; likewise
    generations_kept      generations whose executions stay in the live set, the current included
    attempts_kept         attempts of one slot that stay in the live set
    verdicts_kept         placement verdicts in a job's status
    verdict_seconds       a verdict whose numbers alone changed is written again after so long
    timeout_grace_seconds the node enforces an execution's timeout; the orchestrator so much later
    delete_patience_seconds  a deletion waits so long for reachable nodes to confirm their stops
    stop_seconds_min      under the policy `stop` no node stops work that it was cut off from for less:
                          nodes that are in contact are heard only now and then
    return_seconds        a node that came back may take so long to tell what ended meanwhile, before
                          another attempt is stopped in favour of what is thought to run there
    fault_backoff_seconds the least pause after a fault of the system
    fault_backoff_seconds_max  the longest
    ready_seconds         a new generation's execution has to run so long before the next old one
                          is replaced: one that dies at once does not take the service with it
    long_run_seconds      a service that ran so long starts its backoff anew
    """

    writes_max: int = 400
    bytes_max: int = 8 * 1024 * 1024
    generations_kept: int = 3
    attempts_kept: int = 5
    verdicts_kept: int = 4
    verdict_seconds: float = 300.0
    timeout_grace_seconds: float = 60.0
    delete_patience_seconds: float = 60.0
    stop_seconds_min: float = 15.0
    return_seconds: float = 10.0
    fault_backoff_seconds: float = 1.0
    fault_backoff_seconds_max: float = 300.0
    ready_seconds: float = 5.0
    long_run_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.writes_max < 4:  # the job, an acceptance, its publication, and one stop
            raise ValueError(f"writes_max is at least 4, not {self.writes_max}")
