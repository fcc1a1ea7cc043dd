"""Whether one job fits one node, in words, by the rules of placement."""

from collections.abc import Sequence

from bacalhau.replies import Explanation, RuleWords
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from bacalhau_controllers.placement import LOCALITY, RuleFinding


def explain_pair(job: Job, node: Node, findings: Sequence[RuleFinding]) -> Explanation:
    """Explain whether one job could run on one node, by every rule."""
    misses = [f for f in findings if not f.is_ok]
    besides = [f for f in findings if f.rule == LOCALITY]  # a reason, but no rule
    count = len(findings) - len(besides)
    name = f"job {job.name}"
    if not misses:
        headline = f"{name} fits node {node.name}: all {count} rules are met"
    else:
        rules = ", ".join(f.rule for f in misses)
        headline = f"{name} does not fit node {node.name}: {rules} of {count} rules not met"
    return Explanation(
        kind="Node",
        name=node.name,
        headline=headline,
        because=tuple(
            f"{f.rule}: {node.name} {f.message}"
            for f in ([*misses, *besides] if misses else findings)
        ),
        remedies=tuple(dict.fromkeys(f.remedy for f in misses if f.remedy)),
        rules=tuple(
            RuleWords(rule=f.rule, ok=f.is_ok, message=f.message, remedy=f.remedy) for f in findings
        ),
    )
