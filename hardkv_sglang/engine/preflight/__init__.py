"""What stands between an environment and a start of a compressing server, found without starting one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OK, WARN, REFUSED = "ok", "warn", "refused"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    status: str  # OK; WARN: it starts, but may disappoint; REFUSED: it would not start
    subject: str
    text: str
    remedy: str = ""  # what to do; empty where nothing has to be done
    values: Mapping[str, int] = field(default_factory=dict)  # figures of the text, for scripts

    @classmethod
    def refused(cls, subject: str, message: str) -> Finding:
        """From the message of a refusal, which ends with its remedy after a semicolon."""
        text, _, remedy = message.rpartition("; ")
        return cls(REFUSED, subject, text or remedy, remedy if text else "")


def would_start(findings: Sequence[Finding]) -> bool:
    """Whether nothing found refuses a start."""
    return all(finding.status != REFUSED for finding in findings)
