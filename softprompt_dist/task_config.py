"""Every setting of a task and of several tasks, its default and its rule."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from softprompt_dist.names import Label
from softprompt_dist.section import PathName, Positive, Section

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SourceConfig(Section):
    """Where rows come from."""

    kind: Literal["files", "hub", "vader", "superglue"] = "files"
    """files: jsonl, csv or parquet (the first two also gzip); hub: a Hugging Face data set; vader:
    PyPI; superglue: the official zips, or their folder."""
    path: PathName | None = None
    """superglue: combined.zip, a task's zip such as BoolQ.zip, or a folder of either layout."""
    train: PathName | None = None
    """Path or hub split name."""
    validation: PathName | None = None
    """Path or hub split name; where absent, a tenth of train by hash of the text."""
    test: PathName | None = None
    """Path or hub split name; where absent, a tenth of train by hash of the text."""
    name: PathName | None = None
    """Hub data set name, or for vader: `movies`, `amazon`, `nyt`, `tweets` or `sources`."""
    subset: str | None = None
    """Hub configuration name."""
    revision: str | None = None
    """Hub revision: it is read, or nothing. The commit that was read is recorded in the run."""
    sha256: dict[Literal["train", "validation", "test"], Sha256] = {}
    """files: hex digest that a split's file must have. What files had is recorded in the run."""

    @model_validator(mode="after")
    def _check_pinned(self) -> SourceConfig:
        for key in ("subset", "revision"):
            if getattr(self, key) is not None and self.kind != "hub":
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, but kind is {self.kind!r}, which has none. "
                    f"Remove it, or set kind: hub."
                )
        return self


def source_at(path: Path, split: str) -> SourceConfig:
    """What a command's `--data` names: SuperGLUE's zip or folder, else the file of `split`."""
    if path.suffix == ".zip" or path.is_dir():
        return SourceConfig(kind="superglue", path=str(path))
    return SourceConfig.model_validate({"kind": "files", split: str(path)})


class TaskConfig(Section):
    """Text in, text out: a task of the catalogue, or one's own by a template."""

    catalogue: str | None = None
    """A task of `softprompt tasks list`, which decides text, labels and metrics."""
    prefixed: bool = False
    """catalogue: with T5's task prefix. Prompt tuning leaves it out (taskless)."""
    name: Label = "vader-movies"
    """Default of a catalogue's task: its name there."""
    source: SourceConfig = SourceConfig(kind="vader", name="movies")
    """Default of a catalogue's task: its data set on the hub."""
    input_template: str | None = "{text}"
    """Own task: field names in braces; the row's values are put in."""
    label_field: str | None = "label"
    """Own task: the field whose value `labels` translates."""
    labels: dict[str, str] = {"negative": "negative", "positive": "positive"}
    """Own task: value of `label_field` (as a string) -> the target text; any other value is an
    error. Empty: the value itself is the target text, or a list of texts of which each is right."""
    id_field: str | None = None
    """Own task: a field that names the row; values must differ. Default: the row's number."""
    metrics: list[str] = []
    """Own task: of `softprompt tasks metrics`. Default: accuracy with labels, else squad."""
    append_eos: bool = True
    """Whether the end-of-sequence piece belongs to the target (T5: yes)."""
    target_prefix: str | None = None
    """A special piece such as `<extra_id_0>` put in front of every target and taken off every
    answer: for T5s that know span corruption alone (the paper's section 2.2)."""
    target_separator: str | None = None
    """Decoder-only: text before each target that does not begin with white space. Default: a space,
    where the tokenizer gives it to the word behind it and input_template does not end in one."""
    max_examples: Positive | None = None
    """Use only n training examples (after the split), a fair sample that is always the same."""
    skip_bad_rows: bool = False
    """Leave out and count rows that cannot be read, instead of ending with the first one."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_catalogue(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("catalogue") is not None:
            defaults: dict[str, Any] = {"name": values["catalogue"], "source": {"kind": "hub"}}
            own: dict[str, Any] = {"input_template": None, "label_field": None, "labels": {}}
            return defaults | own | values
        return values

    @model_validator(mode="after")
    def _check_kind(self) -> TaskConfig:
        own = ("input_template", "label_field", "labels", "id_field", "metrics")
        given = [name for name in own if getattr(self, name)]
        if self.catalogue is not None and given:
            raise ValueError(
                f"catalogue is {self.catalogue!r}, which decides {', '.join(given)}. Remove these, "
                "or remove catalogue to describe a task of your own."
            )
        if self.catalogue is None and not (self.input_template and self.label_field):
            raise ValueError(
                "input_template and label_field must be given, or catalogue must name a task of "
                "`softprompt tasks list`."
            )
        if self.prefixed and self.catalogue is None:
            raise ValueError(
                "prefixed is true, but only a catalogue's task has a prefix. Write yours into "
                "input_template."
            )
        return self


class MixtureConfig(Section):
    """Tasks tuned together, beside `task`: which share of the examples each gives."""

    tasks: list[TaskConfig] = Field(default=[], max_length=64)
    """The tasks besides `task`. Empty: no mixture."""
    rates: Literal["proportional", "equal"] = "proportional"
    """proportional to min(examples, maximum) ** (1 / temperature), as T5's mixtures; or equal."""
    maximum: Positive | None = None
    """proportional: no task counts as having more examples than this (T5: 2 ** 19 or so)."""
    temperature: Annotated[float, Field(ge=1.0)] = 1.0
    """proportional: 1 keeps the proportions, greater evens them out."""

    @model_validator(mode="after")
    def _check_keys_matter(self) -> MixtureConfig:
        shaped = self.maximum is not None or self.temperature != 1.0
        if shaped and self.rates == "equal":
            raise ValueError(
                "rates is 'equal', with which maximum and temperature do nothing. Remove them, or "
                "set rates: proportional."
            )
        if not self.tasks and (shaped or self.rates == "equal"):
            raise ValueError(
                "tasks is empty, so that there is nothing to mix. Name tasks besides `task`, or "
                "leave mixture out."
            )
        return self


class TransferConfig(Section):
    """Another task on which the tuned prompt is scored as it is (the paper's section 5)."""

    task: TaskConfig
    """As in `task`."""
    split: Literal["train", "validation", "test"] = "test"
    """Of that task."""
    max_examples: Positive | None = None
    """Score a fair sample of n."""
    translate: dict[str, str] = {}
    """Text in the answers -> what it means here, such as duplicate: equivalent; longest first."""
