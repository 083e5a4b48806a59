"""What a verb says of a bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Outcome = tuple[int, str, str]
"""Exit code, standard output and standard error."""
Said = Callable[..., Outcome]
"""`said(main, *arguments)`; see the fixture."""


def assert_message(outcome: Outcome, *parts: str | Path) -> None:
    code, _, err = outcome
    assert code == 2
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in err, err
