"""One recipe (YAML) plus dotted overrides becomes one checked, frozen config.

Precedence, highest first: command line (`--steps`, `--set key=value`), recipe file, the defaults of
`config.py`. Unknown keys are refused with the nearest valid one; all problems are named at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from softprompt_dist.errors import ConfigError
from softprompt_dist.redaction import is_secret_key, places_of_secrets, redact_command, redact_text
from softprompt_dist.section import Section
from softprompt_dist.untrusted import read_bounded
from softprompt_dist.yaml_reading import MAX_BYTES, parse_yaml

RecipeT = TypeVar("RecipeT", bound=Section)

_WORDS = {False: "no", True: "yes", None: ""}
_KINDS = (
    (bool, "true or false, as are yes, no, on and off"),
    ((int, float), "a number"),
    (date, "a date"),
    (dict, "a mapping, because of a colon or braces"),
    (list, "a list"),
    (type(None), "nothing"),
)
_PROBLEMS_SHOWN = 40
_LONGEST_SHOWN = 300


def load_recipe(
    kind: type[RecipeT], recipe: str | Path | None, overrides: Sequence[str] = ()
) -> RecipeT:
    """Read a recipe by packaged name or path, apply `a.b=value` overrides, check everything.

    Raises:
        ConfigError: the file is missing or unreadable, or any key or value is wrong; all
            problems of the recipe are named in one message.
    """
    values = {} if recipe is None else read_recipe(recipe)
    return check_values(kind, values, overrides, name=str(recipe or "The recipe"))


def check_values(
    kind: type[RecipeT],
    values: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    name: str = "The recipe",
) -> RecipeT:
    """The config of a recipe's values, which may be changed, with overrides on top.

    Raises:
        ConfigError: any key or value is wrong; all problems of `name` are named in one message.
    """
    for override in overrides:
        apply_override(values, override)
    _refuse_secrets(values, name)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [f"  - {_describe(kind, e)}" for e in error.errors(include_url=False)]
        shown = "\n".join(problems[:_PROBLEMS_SHOWN])
        more = len(problems) - _PROBLEMS_SHOWN
        rest = f"\n  - and {more} more" if more > 0 else ""
        # Not `from error`: its own words hold the values.
        raise ConfigError(f"{name} has problems:\n{shown}{rest}") from None


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    folder = resources.files("softprompt_dist") / "recipes"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def resolve_recipe(recipe: str | Path) -> Path:
    """A path as it is, or the file of the packaged recipe of that name.

    Raises:
        ConfigError: neither a file nor a packaged recipe.
    """
    path = Path(recipe)
    try:
        if path.is_file():
            return path
    except OSError:  # a name that is too long for a file
        pass
    names = recipe_names()
    if str(recipe) in names:
        return Path(str(resources.files("softprompt_dist") / "recipes" / f"{recipe}.yaml"))
    hint = difflib.get_close_matches(str(recipe), names, n=1)
    nearest = f" Did you mean {hint[0]!r}?" if hint else ""
    raise ConfigError(
        f"Recipe {str(recipe)!r:.200} is neither a file nor a packaged recipe.{nearest} "
        f"Packaged: {', '.join(names)}."
    )


def to_yaml(config: Section) -> str:
    """The whole config as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The keys of a recipe by packaged name or path, not checked yet.

    Raises:
        ConfigError: missing, unreadable, or no mapping.
    """
    path = resolve_recipe(recipe)
    try:
        values = parse_yaml(read_bounded(path, 4 * MAX_BYTES).decode("utf-8"))
    except (OSError, ValueError) as error:
        said = redact_text(str(error))
        raise ConfigError(f"Cannot read recipe {path}: {said}. Correct the file.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"Recipe {path} must be a mapping of keys, found {type(values).__name__}."
        )
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one key of `values`, as `a.b=value` in YAML says.

    Raises:
        ConfigError: it has another form, or `a` is no section.
    """
    key, separator, text = override.partition("=")
    shown = _shown(redact_command([override])[0])
    if not separator or not key:
        raise ConfigError(f"Override {shown} must have the form key.subkey=value.")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        said = "it is no YAML" if is_secret_key(key) else str(error)
        raise ConfigError(f"Override {shown} has no readable YAML value: {said}") from None
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"Override {shown}: {parent!r} is a value, not a section.")
        node = child
    node[last] = value


def _describe(kind: type[Section], error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        valid = _keys(_section_at(kind, location[:-1]))
        close = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.4)
        nearest = f" Did you mean {close[0]!r}?" if close else ""
        return f"Unknown key {name!r}.{nearest} Known keys here: {', '.join(valid)}."
    if error["type"] == "missing":
        return _describe_missing(kind, location)
    message = error["msg"].removeprefix("Value error, ")
    value = f" (found {_shown(error['input'])})" if name else ""
    hint = (
        " fp16 breaks T5 (its activations overflow); use bf16." if error["input"] == "fp16" else ""
    )
    return f"{name + ': ' if name else ''}{message}{value}{hint}{_read_as(error, location)}"


def _read_as(error: Any, location: Sequence[str]) -> str:
    """Where YAML made something else of what should be text: how to write it."""
    value = error["input"]
    is_choice = error["type"] == "literal_error" and isinstance(value, bool)
    if error["type"] != "string_type" and not is_choice:
        return ""
    kind = next((word for each, word in _KINDS if isinstance(value, each)), type(value).__name__)
    text = _WORDS[value] if isinstance(value, bool | None) else "..."
    if location[-1] == "[key]":
        shown = f'"{text if isinstance(value, bool) else value}": text'
    else:
        name = ".".join(location)
        shown = f'{location[-1]}: "{text}", or --set \'{name}="{text}"\''
    return f" To YAML this is {kind}. Put text in quotes: {shown}."


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a very large number"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _refuse_secrets(values: dict[str, Any], name: str) -> None:
    """A recipe is copied into the run directory, into reports and model cards."""
    if places := places_of_secrets(values):
        raise ConfigError(
            f"{name}: {', '.join(places[:_PROBLEMS_SHOWN])} looks like a password or an access "
            "token, and a recipe is copied into the run's files. Remove it, and give it to the "
            "program that needs it in the environment (such as HF_TOKEN), or in a file of its own."
        )


def _describe_missing(kind: type[Section], location: Sequence[str]) -> str:
    name = ".".join(location)
    field = _section_at(kind, location[:-1]).model_fields.get(location[-1])
    value = "'[...]'" if field and get_origin(field.annotation) is list else "..."
    meaning = f" {' '.join(field.description.split())}" if field and field.description else ""
    return f"{name} is missing. Add it to the recipe, or --set {name}={value}.{meaning}"


def _section_at(kind: type[Section], location: Sequence[str]) -> type[Section]:
    for name in location:
        if name.isdigit():  # a place in a list of sections
            continue
        field = kind.model_fields.get(name)
        inner = next(_sections(field.annotation), None) if field else None
        if inner is None:
            break
        kind = inner
    return kind


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if get_origin(annotation) in (Union, list):
        for argument in get_args(annotation):
            yield from _sections(argument)
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation


def _keys(kind: type[Section]) -> list[str]:
    return list(kind.model_fields)
