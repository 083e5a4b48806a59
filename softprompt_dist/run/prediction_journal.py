"""What is known of an output file that a run may have left half-written: OUTPUT.progress.

One JSON object a line: what the output was made for; a commit for every window that is on the
disk; `complete`, once all rows are. Lines are only added, so that a window costs the same however
many came before. A torn last line is no line.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softprompt_dist.durable import cut_file, extend_file, replace_file
from softprompt_dist.errors import DataError

FORMAT = 1


@dataclass(frozen=True)
class Totals:
    """What is in an output file."""

    rows: int = 0
    """Of the input, wrong ones too."""
    predictions: int = 0
    rows_without_example: int = 0
    """Those of other tasks (MRQA)."""
    bad_rows: int = 0
    truncated_inputs: int = 0
    first_bad: tuple[str, ...] = ()
    """What is wrong with the first few."""


@dataclass(frozen=True)
class Commit:
    """A window that was written, flushed and will not change."""

    num_bytes: int
    """Of the output with this window."""
    sha256: str
    """Of this window's lines."""
    input_sha256: str
    """Of this window's rows; see `rows_digest`."""
    totals: Totals
    """Of all windows so far."""


@dataclass(frozen=True)
class Entry:
    """A line of the journal."""

    values: Mapping[str, Any]
    end: int
    """Where in the file the next one begins."""

    @property
    def commit(self) -> Commit | None:
        """The window that it takes down, if it does.

        Raises:
            DataError: it was changed by hand.
        """
        values = self.values.get("commit")
        if values is None:
            return None
        try:
            totals = {**values["totals"], "first_bad": tuple(values["totals"]["first_bad"])}
            return Commit(**{**values, "totals": Totals(**totals)})
        except (KeyError, TypeError) as error:
            raise DataError(f"The journal is damaged: {error}. Start over with --fresh.") from error


class PredictionJournal:
    """The journal beside an output file."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.progress")

    def entries(self) -> Iterator[Entry]:
        """The whole lines from the first; none where there is no such file.

        Raises:
            OSError: it cannot be read.
        """
        if not self.path.exists():
            return
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                end += len(line)
                values = _values(line)
                if values is None:
                    return
                yield Entry(values, end)

    def made_for(self) -> dict[str, Any] | None:
        """What decides the output's content, or None if nobody has noted it here."""
        first = next(self.entries(), None)
        if first is None or first.values.get("format") != FORMAT:
            return None
        made_for: dict[str, Any] | None = first.values.get("made_for")
        return made_for

    def last(self) -> list[Entry]:
        """The last two entries, or fewer."""
        return list(deque(self.entries(), maxlen=2))

    def start(self, made_for: Mapping[str, Any]) -> int:
        """Begin anew; the journal's size.

        Raises:
            OSError: it cannot be written.
        """
        content = _line({"format": FORMAT, "made_for": made_for})
        replace_file(self.path, content)
        return len(content)

    def cut(self, end: int) -> None:
        """Forget what was added after `end`.

        Raises:
            OSError: it cannot be written.
        """
        cut_file(self.path, end)

    def add_commit(self, commit: Commit) -> None:
        """Take down a window that is on the disk.

        Raises:
            OSError: it cannot be written.
        """
        extend_file(self.path, _line({"commit": asdict(commit)}))

    def add_completion(self, record: Mapping[str, Any]) -> None:
        """Take down that all rows are done, and what is worth knowing of them.

        Raises:
            OSError: it cannot be written.
        """
        extend_file(self.path, _line({"complete": dict(record)}))


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _values(line: bytes) -> dict[str, Any] | None:
    """None where the line is torn."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
