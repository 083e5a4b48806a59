"""What a check found, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from softprompt_dist.errors import SoftpromptError

Status = Literal["ok", "warn", "fail"]
_NAME_COLUMNS = 20


@dataclass(frozen=True)
class Finding:
    """One line of the table; a remedy wherever the status is not ok."""

    name: str
    status: Status
    found: str
    remedy: str = ""


class ChecksFailedError(SoftpromptError):
    """At least one check failed: the run would stop there."""

    exit_code = 1


def table(findings: Iterable[Finding]) -> str:
    """Aligned lines: status, name, what was found; the remedy below where there is one."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<6}{finding.name:<{_NAME_COLUMNS}}  {finding.found}")
        for number, line in enumerate(finding.remedy.splitlines()):
            lines.append(f"{'':<6}{'':<{_NAME_COLUMNS}}  {'   ' if number else '-> '}{line}")
    return "\n".join(lines)


def verdict(findings: Sequence[Finding]) -> str:
    """One sentence over all findings.

    Raises:
        ChecksFailedError: with the names of the checks that failed.
    """
    failed = list(dict.fromkeys(f.name for f in findings if f.status == "fail"))
    if failed:
        number = "1 check" if len(failed) == 1 else f"{len(failed)} checks"
        raise ChecksFailedError(
            f"{number} failed ({', '.join(failed)}): a run would stop there. The arrows above say "
            "what to do."
        )
    warnings = sum(f.status == "warn" for f in findings)
    return f"No check failed; {warnings or 'no'} warning{'' if warnings == 1 else 's'}."
