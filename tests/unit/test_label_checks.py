"""A label that could never be an answer is refused before anything is tuned for it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from softprompt_dist.config import TuneConfig
from softprompt_dist.data.examples import Example
from softprompt_dist.data.tasks import TaskData
from softprompt_dist.errors import ConfigError, DataError
from softprompt_dist.run.loaded_task import TextReader
from softprompt_dist.run.scoring import LabelSet
from softprompt_dist.task_config import TaskConfig
from tests import runs

pytestmark = pytest.mark.usefixtures("lone_process")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return runs.train_tokenizer()


def reader(tokenizer: PreTrainedTokenizerFast, **evaluation: Any) -> TextReader:
    config = TuneConfig.model_validate({"evaluation": evaluation, "task": {"append_eos": True}})
    return TextReader(config, tokenizer, "seq2seq")


def label_set(
    tokenizer: PreTrainedTokenizerFast, *labels: str, append_eos: bool = True, **evaluation: Any
) -> LabelSet:
    task = TaskConfig(append_eos=append_eos)
    return reader(tokenizer, **evaluation).label_set(task, labels)


@pytest.mark.parametrize("method", ["greedy", "rank"])
def test_labels_that_the_tokenizer_has_pieces_for(
    tokenizer: PreTrainedTokenizerFast, method: str
) -> None:
    found = label_set(tokenizer, " fruit", "fruit root", "root", method=method)
    assert found.texts == ("fruit", "fruit root", "root")


def test_no_labels_at_all(tokenizer: PreTrainedTokenizerFast) -> None:
    assert label_set(tokenizer) == LabelSet((), ())


@pytest.mark.parametrize("other", ["fruit ", "fruit"])
def test_labels_that_differ_in_white_space_only(
    tokenizer: PreTrainedTokenizerFast, other: str
) -> None:
    with pytest.raises(ConfigError, match=r"labels 'fruit' and 'fruit' are the same"):
        label_set(tokenizer, "fruit", other, method="rank")


def test_labels_of_pieces_that_nobody_has(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=rf"'{runs.POISON}' and '♞' are the same .*\[\d+, 2, 1\]"):
        label_set(tokenizer, runs.POISON, "♞", method="rank")


def test_a_label_that_cannot_be_generated(tokenizer: PreTrainedTokenizerFast) -> None:
    labels = "fruit", f"root {runs.POISON}"
    with pytest.raises(
        ConfigError, match=rf"'root {runs.POISON}' cannot be generated: .*'root *⁇'"
    ):
        label_set(tokenizer, *labels, method="greedy")
    assert label_set(tokenizer, *labels, method="rank").texts == labels


def test_a_label_that_is_longer_than_answers_may_be(tokenizer: PreTrainedTokenizerFast) -> None:
    longest = len(label_set(tokenizer, "fruit root").ids[0]) - 1  # its end need not be written
    assert label_set(tokenizer, "fruit root", max_target_tokens=longest).texts == ("fruit root",)
    with pytest.raises(ConfigError, match=rf"'fruit root' has {longest} tokens"):
        label_set(tokenizer, "fruit root", max_target_tokens=longest - 1)


def test_a_label_that_begins_with_another_needs_an_end(tokenizer: PreTrainedTokenizerFast) -> None:
    labels = "fruit", "root", "fruit root"
    with pytest.raises(ConfigError, match=r"'fruit root' begins with 'fruit'.*append_eos=true"):
        label_set(tokenizer, *labels, append_eos=False, method="rank")
    normalised = {"append_eos": False, "length_normalisation": "tokens"}
    assert label_set(tokenizer, *labels, method="rank", **normalised).texts == labels
    assert label_set(tokenizer, *labels, method="rank").texts == labels


@pytest.mark.parametrize(
    ("metric", "labels", "missing"),
    [("squad", ("fruit",), "'answers'"), ("wsc", (), "'label'"), ("record", (), "'group'")],
)
def test_a_metric_that_lacks_a_fact_is_refused_while_loading(
    tokenizer: PreTrainedTokenizerFast, metric: str, labels: tuple[str, ...], missing: str
) -> None:
    examples = (Example("the apple", "fruit"),)
    data = TaskData("t", {"validation": examples}, labels, (metric,), "own", {})
    with pytest.raises(DataError, match=f"metric {metric} needs the fact {missing}"):
        reader(tokenizer).load(TaskConfig(), data, ["validation"])
