"""Write the table of docs/tasks.md from the catalogue.

python docs/task_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

from softprompt_dist.data.catalogue.registry import CATALOGUE
from softprompt_dist.tasks import hub_text, labels_text

PAGE = Path(__file__).with_name("tasks.md")
START = "<!-- Written by `python docs/task_table.py`; a test compares it with the code. -->\n"
END = "<!-- end -->"


def table() -> str:
    """Every task: labels, metrics, family, hub name, where its text comes from."""
    lines = [
        "| task | labels | metrics | family | hub | text |",
        "|---|---|---|---|---|---|",
    ]
    for task in CATALOGUE.values():
        cells = (
            f"`{task.name}`",
            labels_text(task),
            ", ".join(task.metrics),
            task.family,
            hub_text(task.hub),
            task.source,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page_with_table(page: str) -> str:
    """The page with the table as it should be now."""
    written = START + table() + END
    return re.sub(re.escape(START) + ".*?" + re.escape(END), lambda _: written, page, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
