"""How far a build is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from softprompt_dist.data.lm.encoding_pool import EncodedRows
from softprompt_dist.data.lm.text_sources import TextSource

_SECONDS_BETWEEN_LINES = 30.0


class _LogLines:
    """What is no terminal gets lines, and few."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


class ProgressBar:
    """Bytes of the sources where all sizes are known, else of text."""

    def __init__(self, sources: Sequence[TextSource], first: int) -> None:
        sizes = [source.num_bytes for source in sources]
        self._before: list[int] | None = None
        total = None
        if None not in sizes:
            known = [size or 0 for size in sizes]
            self._before = [sum(known[:number]) for number in range(len(known))]
            total = sum(known)
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=self._before[first] if self._before and first < len(sizes) else 0,
            unit="B",
            unit_scale=True,
            desc="tokenising",
            file=sys.stderr if is_terminal else _LogLines(),
            mininterval=0.1 if is_terminal else _SECONDS_BETWEEN_LINES,
        )

    def close(self) -> None:
        """Show the last state and leave it there."""
        self._bar.close()

    def show(self, batch: EncodedRows, num_tokens: int) -> None:
        """What was done with this batch."""
        if self._before is None:
            self._bar.update(int(batch.num_bytes.sum()))
        else:
            self._bar.update(max(0, self._before[batch.source] + batch.position - self._bar.n))
        self._bar.set_postfix_str(f"{num_tokens / 1e6:.1f}M tokens", refresh=False)
