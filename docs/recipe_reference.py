"""Write docs/recipes.md from the config's own field docstrings.

python docs/recipe_reference.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.config import TuneConfig
from softprompt_dist.section import Section
from softprompt_dist.task_config import TaskConfig

HEADER = """# Recipes

<!-- Written by `python docs/recipe_reference.py`; a test compares it with the code. -->

A recipe is a YAML file with the keys below; what it leaves out has the default shown. Precedence,
highest first: command line (`--steps`, `--run-dir`, `--deepspeed_config`,
`--set key.subkey=value`), recipe, default. An unknown key is refused, and the nearest valid one is
named. `softprompt train --recipe NAME --dry-run` prints the final config. `~` at the beginning of a
path is the home folder.

## Splits

Where a source has no validation or test split, it is taken from train by the text alone: bucket =
first 32 bits of the text's sha256, modulo 10; bucket 0 is test, 1 is validation, the rest is train.
Equal texts land in the same split, on every machine.
"""


def rows(section: type[Section], prefix: str = "") -> Iterator[str]:
    """One table row a key, nested sections in place."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from rows(annotation, f"{prefix}{name}.")
            continue
        yield row(f"{prefix}{name}", field)
        # The keys of a list's items, but not of a whole task again.
        inner = next((a for a in get_args(annotation) if isinstance(a, type)), None)
        if inner is not None and issubclass(inner, Section) and inner is not TaskConfig:
            yield from (
                row(f"{prefix}{name}[].{key}", each) for key, each in inner.model_fields.items()
            )


def row(name: str, field: FieldInfo) -> str:
    """One line of the table."""
    default = (
        "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
    )
    text = " ".join((field.description or "").split())
    choices = [f"`{value}`" for value in literals(field.annotation)]
    meaning = " ".join(filter(None, [", ".join(choices) + "." if choices else "", text]))
    return f"| `{name}` | {default} | {meaning.replace('|', chr(92) + '|')} |"


def literals(annotation: Any) -> list[Any]:
    """The values that a Literal allows."""
    values = get_args(annotation)
    return list(values) if values and all(isinstance(value, str) for value in values) else []


def reference() -> str:
    """The whole page."""
    parts = [HEADER]
    for title, section in (("train and evaluate", TuneConfig), ("adapt", AdaptConfig)):
        parts.append(f"## Keys of `softprompt {title}`\n")
        parts.append(
            "| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows(section)) + "\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("recipes.md").write_text(reference(), encoding="utf-8")
