"""results.json: what an evaluation found, for programs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softprompt_dist.durable import replace_file
from softprompt_dist.errors import DataError
from softprompt_dist.identity import Identity
from softprompt_dist.metrics.scores import Scores

FILE_NAME = "results.json"
_MAX_INVALID = 50
_MAX_PROBLEMS = 3
Percent = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Interval = tuple[Percent, Percent]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # what later releases add


class PromptSource(_Frozen):
    """The prompt file that was scored."""

    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class EvaluationResult(_Frozen):
    """Scores of one prompt on one split of one task, all in percent."""

    kind: Literal["evaluation"] = "evaluation"
    format_version: Literal[1] = 1
    task: str
    split: str
    metrics: tuple[str, ...]
    num_answers: Annotated[int, Field(ge=1)]
    values: dict[str, Percent]
    intervals_95: dict[str, Interval]
    score: Percent
    """Mean of `values`."""
    score_interval_95: Interval | None
    num_invalid: Annotated[int, Field(ge=0)]
    invalid: dict[str, int]
    """The most frequent answers that are none -> how often."""
    method: str
    """How answers were made, such as `greedy` or `rank`."""
    prompt: PromptSource | None
    backbone: str
    identity: Identity | None = None
    """Of the backbone; release 0.1.0 did not note it."""
    batch_tokens: int | None = None
    """Positions that each rank scored at a time, on which the rounding depends; nor this."""
    version: str
    """Of softprompt-dist."""
    data: dict[str, Any] = {}
    """Where the split's rows came from: origin, sha256 or revision, counts; and their digest."""
    others: dict[str, dict[str, Percent]] = {}
    """Floors and other answers to the same rows -> their values."""
    verdicts: tuple[str, ...] = ()


def score_fields(scores: Scores) -> dict[str, object]:
    """The fields of an `EvaluationResult` that `scores` decides."""
    return {
        "num_answers": scores.num_answers,
        "values": dict(scores.values),
        "intervals_95": dict(scores.intervals),
        "score": scores.score,
        "score_interval_95": scores.score_interval,
        "num_invalid": scores.num_invalid,
        "invalid": dict(islice(scores.invalid.items(), _MAX_INVALID)),
    }


def prompt_source(path: Path) -> PromptSource:
    """Name and digest of a prompt file.

    Raises:
        OSError: it cannot be read.
    """
    return PromptSource(file=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def write_result(path: Path, result: EvaluationResult) -> None:
    """Write results.json whole.

    Raises:
        OSError: the folder cannot be written.
    """
    replace_file(path, (result.model_dump_json(indent=2) + "\n").encode())


def read_result(path: Path) -> EvaluationResult:
    """The evaluation that a file, or the results.json of a folder, holds.

    Raises:
        DataError: there is none, or it is not what `write_result` writes.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        return EvaluationResult.model_validate_json(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}). Name a {FILE_NAME} of `softprompt evaluate`"
            ", or the folder that holds one."
        ) from error
    except ValidationError as error:
        raise DataError(
            f"{file} is no result of an evaluation: {_problems(error)}. Name a {FILE_NAME} that "
            "`softprompt evaluate` wrote."
        ) from error


def find_results(paths: Sequence[Path]) -> dict[Path, EvaluationResult]:
    """Every result that files and folders name; a folder without one stands for those within it.

    Raises:
        DataError: see `read_result`; or one is named twice.
    """
    files = [file for path in paths for file in _files_of(path)]
    twice = [file for file, count in Counter(file.resolve() for file in files).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]} is named twice. Name every result once.")
    return {file: read_result(file) for file in files}


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir() or (path / FILE_NAME).exists():
        return [path]
    return sorted(path.glob(f"*/{FILE_NAME}")) or [path]


def _problems(error: ValidationError) -> str:
    def told(location: Sequence[int | str], message: str) -> str:
        where = ".".join(map(str, location))
        return f"{where}: {message}" if where else message

    found = [told(each["loc"], each["msg"]) for each in error.errors(include_url=False)]
    others = len(found) - _MAX_PROBLEMS
    return "; ".join(found[:_MAX_PROBLEMS]) + (f"; and {others} more" if others > 0 else "")
