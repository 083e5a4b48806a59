"""A sentinel before every target: tuned with, and taken off every answer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from softprompt_dist import evaluate, predict, train
from softprompt_dist.backbone.demo import resolve_backbone
from softprompt_dist.backbone.load import load_tokenizer
from softprompt_dist.config import TuneConfig
from softprompt_dist.data import token_cache
from softprompt_dist.data.batching import tokenise
from softprompt_dist.data.examples import Example
from softprompt_dist.data.tasks import load_task
from softprompt_dist.errors import ConfigError
from softprompt_dist.metrics.results import read_result
from softprompt_dist.recipe import check_values
from softprompt_dist.run import session
from softprompt_dist.run.loaded_task import TextReader
from softprompt_dist.task_config import SourceConfig, TaskConfig
from tests import runs
from tests.messages import Said, assert_message

pytestmark = pytest.mark.usefixtures("lone_process")
SENTINEL = "<extra_id_0>"
SETTINGS: dict[str, Any] = {"family": "seq2seq", "max_input_tokens": 16, "append_eos": True}
Recipe = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """T5's kind, with a hundred sentinels."""
    return load_tokenizer(Path(resolve_backbone("demo:tiny-t5")))


@pytest.fixture(scope="module")
def sentinel_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 that begins whatever it writes with the sentinel, as span corruption teaches."""
    folder = runs.save_t5(tmp_path_factory.mktemp("backbones") / "sentinel")
    tokenizer = runs.train_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [SENTINEL]})
    tokenizer.save_pretrained(str(folder))
    weights = load_file(folder / "model.safetensors")
    # Padding is what the decoder starts with, and stands at no other place.
    start_D = weights["shared.weight"][0].sign() * 20
    weights["shared.weight"][0] = start_D
    weights["lm_head.weight"][tokenizer.convert_tokens_to_ids(SENTINEL)] = start_D
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def recipe(sentinel_t5: Path, tiny_data: Path) -> Recipe:
    """Two steps with the sentinel; answers are written."""
    values = runs.tiny_recipe(sentinel_t5, tiny_data) | {"steps": 2}
    values["task"] |= {"target_prefix": SENTINEL}
    values["evaluation"] |= {"method": "greedy"}
    return values


@pytest.fixture(scope="module")
def tuned(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory."""
    return tune(tmp_path_factory.mktemp("runs") / "sentinel", recipe)


def tune(run_dir: Path, recipe: Recipe, *overrides: str) -> Path:
    """Run in this process."""
    values = copy.deepcopy(recipe)
    session.train(check_values(TuneConfig, values, [*overrides, f"run_directory={run_dir}"]))
    return run_dir


def prompt_of(run_dir: Path) -> Path:
    return run_dir / "prompt" / "best.safetensors"


def answers_in(path: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in path.read_text().splitlines()]


def answer_tokens() -> int:
    """Of the longest answer to the foods, its end included and the sentinel not."""
    return max(map(len, runs.train_tokenizer()(list(runs.ANSWERS.values()))["input_ids"])) + 1


def reader(tokenizer: PreTrainedTokenizerBase, **evaluation: Any) -> TextReader:
    config = TuneConfig.model_validate({"evaluation": evaluation})
    return TextReader(config, tokenizer, "seq2seq")


@pytest.mark.parametrize("target", ["positive", " positive", "not_entailment", "5"])
def test_the_sentinel_is_an_id_before_those_of_the_target(
    tokenizer: PreTrainedTokenizerBase, target: str
) -> None:
    examples = [Example("a film", target)]
    (bare,) = tokenise(examples, tokenizer, **SETTINGS).examples
    (found,) = tokenise(examples, tokenizer, **SETTINGS, target_prefix=SENTINEL).examples
    assert found.target_ids == (len(tokenizer) - 1, *bare.target_ids)
    assert found.input_ids == bare.input_ids


def test_tokens_are_kept_apart_from_those_without(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    monkeypatch.setattr(token_cache, "FEWEST_ROWS_KEPT", 1)
    examples = [Example("a film", "positive")]
    tables = [
        token_cache.tokens_of(examples, tokenizer, **SETTINGS, target_prefix=prefix)
        for prefix in (None, SENTINEL, None, "<extra_id_1>")
    ]
    lengths = [len(table[0].target_ids) for table in tables]
    assert lengths == [2, 3, 2, 3]
    assert len(list((tmp_path / "tokens").glob("*.arrow"))) == 3


def test_labels_have_it_among_their_ids_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    plain, prefixed = TaskConfig(), TaskConfig(target_prefix=SENTINEL)
    read = reader(tokenizer, max_target_tokens=1)
    bare = read.label_set(plain, ("positive", "negative"))
    found = read.label_set(prefixed, ("positive", "negative"))
    assert found.texts == bare.texts == ("positive", "negative")
    assert found.ids == tuple((len(tokenizer) - 1, *ids) for ids in bare.ids)
    # The recipe's limit is of what is answered.
    assert (read.max_target_tokens(plain, 9), read.max_target_tokens(prefixed, 9)) == (1, 2)
    assert reader(tokenizer).max_target_tokens(prefixed, 9) == 9


@pytest.mark.parametrize("piece", ["", "sentinel", "▁the", "<extra_id_0> ", "</s>", "<pad>"])
@pytest.mark.parametrize("labels", [(), ("positive",)])
def test_it_must_be_a_special_piece(
    tokenizer: PreTrainedTokenizerBase, piece: str, labels: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=rf"target_prefix is '{piece}', .* as {SENTINEL}, or"):
        reader(tokenizer).label_set(TaskConfig(target_prefix=piece), labels)


def test_a_tokenizer_may_have_none(said: Said, tiny_recipe: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", tiny_recipe, "--set", f"task.target_prefix={SENTINEL}"]
    outcome = said(train.main, *arguments, "--run-dir", tmp_path / "run")
    assert_message(outcome, f"task.target_prefix is '{SENTINEL}'", "It has none to use")


def test_a_decoder_only_backbone_has_no_sentinels(
    said: Said, tiny_recipe: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    arguments = ["--set", f"backbone.path={tiny_llama}", "--set", f"task.target_prefix={SENTINEL}"]
    arguments += ["--run-dir", str(tmp_path / "run")]
    outcome = said(train.main, "--recipe", tiny_recipe, *arguments)
    assert_message(outcome, "this backbone is decoder-only", "Leave target_prefix out")


def test_a_tuned_prompt_is_transferred_with_it(recipe: Recipe, tiny_data: Path) -> None:
    def check(**transfer: Any) -> None:
        task = runs.task("elsewhere", tiny_data, runs.ANSWERS, target_prefix=transfer.pop("prefix"))
        values = {**copy.deepcopy(recipe), "transfer": [{"task": task, **transfer}]}
        check_values(TuneConfig, values, [])

    check(prefix=SENTINEL)
    with pytest.raises(ConfigError, match=r"transfer.0.task.target_prefix is None.*Set it to that"):
        check(prefix=None)
    with pytest.raises(ConfigError, match=rf"tuned to answer with '{SENTINEL}'"):
        check(prefix="<extra_id_1>", translate={"fruit": "fish"})


def test_answers_are_written_and_judged_without_it(
    said: Said, tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = answers_in(tuned / "predictions" / "test.jsonl")
    untuned = json.loads((tuned / "predictions" / "untuned.json").read_text())["foods"]
    assert len(set(answers)) > 1
    assert not any(text.startswith(SENTINEL) for text in (*answers, *untuned))

    scoring = ["--prompt", prompt_of(tuned), "--output"]
    assert said(evaluate.main, *scoring, tmp_path / "same")[0] == 0
    assert answers_in(tmp_path / "same" / "predictions.jsonl") == answers
    assert "target_prefix" not in caplog.text
    limit = f"evaluation.max_target_tokens={answer_tokens() + 1}"
    raw = ["--set", "task.target_prefix=null", "--set", limit]
    assert said(evaluate.main, *scoring, tmp_path / "raw", *raw)[0] == 0
    assert f"tuned with target_prefix {SENTINEL}, but that of foods is null" in caplog.text
    written = answers_in(tmp_path / "raw" / "predictions.jsonl")
    for text, answer in zip(written, answers, strict=True):
        assert text.startswith(SENTINEL)
        assert text.removeprefix(SENTINEL).lstrip() == answer


def test_predict_writes_the_same_answers(
    said: Said, tuned: Path, tiny_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    asked = ["--prompt", prompt_of(tuned), "--input", tiny_data / "test.jsonl", "--output", output]
    assert said(predict.main, *asked)[0] == 0
    answers = answers_in(tuned / "predictions" / "test.jsonl")
    assert sorted(answers_in(output)) == sorted(answers)
    outcome = said(predict.main, *asked, "--set", "task.target_prefix=null")
    assert_message(outcome, f"task.target_prefix: '{SENTINEL}' then, None now")


def test_right_answers_are_right(said: Said, tuned: Path, tmp_path: Path) -> None:
    """Rows whose label is what the prompt answers to them."""
    lines = (tuned / "predictions" / "test.jsonl").read_text().splitlines()
    rows = [{"text": row["input"], "label": row["prediction"]} for row in map(json.loads, lines)]
    data = runs.write_rows(tmp_path / "test.jsonl", rows)
    arguments = ["--set", "task.labels={}", "--set", "task.metrics=[squad]", "--data", data]
    arguments += ["--set", f"evaluation.max_target_tokens={answer_tokens()}"]
    arguments += ["--output", tmp_path / "out"]
    assert said(evaluate.main, "--prompt", prompt_of(tuned), *arguments)[0] == 0
    assert read_result(tmp_path / "out").values["em"] == 100


def test_another_task_inherits_it(
    said: Said, tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"id": "a", "question": "what", "context": "a river", "answers": {"text": ["river"]}}
    data = runs.write_rows(tmp_path / "mine.jsonl", [row])
    asked = ["--prompt", prompt_of(tuned), "--task", "squad", "--split", "validation"]
    outcome = said(evaluate.main, *asked, "--data", data, "--output", tmp_path / "out")
    assert outcome[0] == 0, outcome
    assert "target_prefix" not in caplog.text
    (answer,) = answers_in(tmp_path / "out" / "predictions.jsonl")
    assert answer
    assert SENTINEL not in answer


def test_a_run_without_it_is_not_continued_with_it(
    said: Said, tuned: Path, recipe: Recipe, tmp_path: Path
) -> None:
    file = runs.write_recipe(tmp_path / "recipe.yaml", recipe)
    arguments = ["--recipe", file, "--run-dir", tuned, "--set", "task.target_prefix=null"]
    outcome = said(train.main, *arguments)
    assert_message(outcome, f"task.target_prefix: saved '{SENTINEL}', now None", "--fresh")


def test_the_demo_is_tuned_to_rank_labels_after_it(tiny_data: Path, tmp_path: Path) -> None:
    """Beside a task without it, whose targets stay as they are."""
    values = runs.tiny_recipe(Path("demo:tiny-t5"), tiny_data) | {"steps": 1}
    values["checkpoint"] = {"every_steps": 1}
    plain = tune(tmp_path / "plain", values)
    prefixed = tune(tmp_path / "prefixed", values, f"task.target_prefix={SENTINEL}")
    (before,), (after,) = (runs.metrics_without_time(run, "train") for run in (plain, prefixed))
    assert before["num_tokens"] == 16  # a label is one piece and its end
    assert after["num_tokens"] == 24
    assert set(answers_in(prefixed / "predictions" / "test.jsonl")) <= set(runs.ANSWERS.values())
    assert runs.prompt_metadata(prompt_of(prefixed))["target_prefix"] == SENTINEL
    assert runs.prompt_metadata(prompt_of(plain))["target_prefix"] == ""

    other = runs.task("others", tiny_data, runs.ANSWERS)
    mixed = {**values, "task": {**values["task"], "target_prefix": SENTINEL}}
    mixed["mixture"] = {"tasks": [other]}
    mixture = tune(tmp_path / "mixture", mixed)
    (mixed_step,) = runs.metrics_without_time(mixture, "train")
    assert 16 < mixed_step["num_tokens"] < 24
    assert runs.prompt_metadata(prompt_of(mixture))["target_prefix"] == f"{SENTINEL} + "


def test_the_prompt_starts_from_the_labels_alone(recipe: Recipe, tmp_path: Path) -> None:
    still = "optimizer.learning_rate=1e-12"
    runs_of = [
        tune(tmp_path / name, recipe, "steps=1", still, "checkpoint.every_steps=1", *overrides)
        for name, overrides in {"with": [], "without": ["task.target_prefix=null"]}.items()
    ]
    prompts = [runs.checkpoint_tensors(run, 1)["prompt"] for run in runs_of]
    assert float((prompts[0] - prompts[1]).abs().max()) < 1e-6


def test_a_special_piece_in_a_row_is_text_and_one_in_a_template_is_told_of(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"good </s> {SENTINEL} film", "</s>"]
    tokens = tokenise([Example(*texts)], tokenizer, target_prefix=SENTINEL, **SETTINGS)
    (example,) = tokens.examples
    special = set(tokenizer.all_special_ids)
    assert [i for i in example.input_ids if i in special] == [tokenizer.eos_token_id]
    prefix = tokenizer.convert_tokens_to_ids(SENTINEL)
    assert [i for i in example.target_ids if i in special] == [prefix, tokenizer.eos_token_id]
    assert tokenizer.decode(example.target_ids[1:-1]) == "</s>"

    file = str(runs.write_rows(tmp_path / "a.jsonl", [{"text": texts[0], "label": "positive"}]))
    source = SourceConfig(train=file, validation=file, test=file)
    for template, told in ("{text}", False), ("{text} </s>", True):
        task = TaskConfig(source=source, input_template=template)
        reader(tokenizer, method="rank").load(task, load_task(task), ["train"])
        assert ("'</s>' in the template" in caplog.text) is told
