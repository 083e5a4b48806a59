"""Rows in every shape that occurs, and rows that are wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from softprompt_dist.data.catalogue.definition import is_labelled
from softprompt_dist.data.catalogue.fields import KeyedText
from softprompt_dist.data.catalogue.registry import CATALOGUE, find_task
from softprompt_dist.data.catalogue.samples import sample_rows
from softprompt_dist.errors import DataError
from softprompt_dist.metrics.registry import find_metrics

PASSAGE = {
    "text": "Ann met Bo.<br>Bo left.",
    "questions": [
        {
            "question": "Who left?",
            "idx": 4,
            "answers": [{"text": "Bo", "idx": 8, "label": 1}, {"text": "Ann", "idx": 9}],
        }
    ],
}
WSC = {
    "text": "Ann saw Bo when he left .",
    "span1_text": "Bo",
    "span1_index": 2,
    "span2_text": "he",
    "span2_index": 4,
    "idx": 0,
    "label": 1,
}


def examples(task, row, *, for_training=False):
    return list(CATALOGUE[task].to_examples(row, for_training))


def made(task, row, **settings):
    return [(e.input_text, e.target_text) for e in examples(task, row, **settings)]


def without(row, field):
    return {key: value for key, value in row.items() if key != field}


@pytest.mark.parametrize("name", CATALOGUE)
def test_samples_are_rows_of_their_task(name):
    task = find_task(name)
    rows = sample_rows(name)
    assert len(rows) == 3
    targets = {e.target_text for row in rows for e in task.to_examples(row, False)}
    assert all(is_labelled(e) for row in rows for e in task.to_examples(row, False))
    assert len(targets) > 1
    assert not task.labels or targets <= set(task.labels)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_missing_field_is_named(name):
    row = sample_rows(name)[1]
    task = find_task(name)
    present = [field for field in task.fields if field in row]
    assert present or name in {"trec", "wsc", "multirc"}
    for field in present:
        with pytest.raises(ValueError, match=field):
            list(task.to_examples(without(row, field), False))
        with pytest.raises(ValueError, match=f"{field}.*None.*expected"):
            list(task.to_examples(row | {field: None}, False))


@pytest.mark.parametrize("name", CATALOGUE)
def test_metrics_exist_and_suit_the_labels(name):
    task = find_task(name)
    assert [metric.name for metric in find_metrics(task.metrics, task.labels)] == [*task.metrics]


def test_keys_are_sorted_as_t5_sorts_them():
    keyed = {n: t for n, t in CATALOGUE.items() if isinstance(t.to_examples, KeyedText)}
    assert len(keyed) == 16
    assert all(list(task.fields) == sorted(task.fields) for task in keyed.values())


def test_related_tasks_share_a_family():
    families = {name: task.family for name, task in CATALOGUE.items()}
    assert len({families[n] for n in ("cb", "rte", "mnli", "qnli", "wnli", "glue_rte")}) == 1
    assert families["mrpc"] == families["qqp"]
    assert families["sst2"] == families["imdb"]
    assert {families[n] for n, t in CATALOGUE.items() if t.suite == "mrqa"} == {families["squad"]}
    assert families["boolq"] != families["wic"]


@pytest.mark.parametrize(
    ("task", "label", "target"),
    [
        ("boolq", True, "True"),
        ("boolq", "true", "True"),
        ("boolq", "False", "False"),
        ("boolq", 0, "False"),
        ("boolq", "1", "True"),
        ("boolq", None, "<unk>"),
        ("boolq", -1, "<unk>"),
        ("boolq", "", "<unk>"),
    ],
)
def test_true_and_false_in_every_spelling(task, label, target):
    row = {"question": "q", "passage": "p", "label": label}
    assert made(task, row) == [("passage: p question: q", target)]


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("boolq", {"question": "q", "passage": "p", "answer": True}, "True"),
        ("sst2", {"text": "fine", "label": 1}, "positive"),
        ("rte", {"sentence1": "p", "sentence2": "h", "label": 0}, "entailment"),
        ("glue_rte", {"premise": "p", "hypothesis": "h", "label": "entailment"}, "entailment"),
        ("qqp", {"question1": "a", "question2": "b", "is_duplicate": "1"}, "duplicate"),
        ("trec", {"text": "Who?", "coarse": "HUM"}, "human"),
        ("trec", {"text": "Who?", "coarse_label": 3}, "human"),
        ("ag_news", {"text": "News.", "label": "Sci/Tech"}, "technology"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "score": "0.3"}, "0.4"),
        ("dpr", {"sentence": "It is it.", "pronoun": "it", "candidates": ["x", "y"]}, "<unk>"),
    ],
)
def test_declared_field_names_and_label_spellings(task, row, expected):
    assert [target for _, target in made(task, row)] == [expected]


def test_rte_reads_sentences_as_premise_and_hypothesis():
    row = {"sentence1": "p", "sentence2": "h", "label": 1}
    assert made("rte", row) == [("hypothesis: h premise: p", "not_entailment")]


@pytest.mark.parametrize("label", [7, "7", "yes", 1.5, [1], {}, -2])
def test_an_unknown_label_is_refused(label):
    with pytest.raises(ValueError, match=r"'label' is .*; one of False, True is expected"):
        made("boolq", {"question": "q", "passage": "p", "label": label})


def test_a_truth_is_no_class_number():
    with pytest.raises(ValueError, match="'label' is True; one of entailment, contradiction"):
        made("cb", {"premise": "p", "hypothesis": "h", "label": True})


def test_multirc_nested_and_flat_rows_agree():
    first = ("question: Who left? answer: Bo paragraph: Ann met Bo. Bo left.", "True")
    second = ("question: Who left? answer: Ann paragraph: Ann met Bo. Bo left.", "<unk>")
    assert made("multirc", {"idx": 2, "passage": PASSAGE}) == [first, second]
    flat = {
        "paragraph": PASSAGE["text"],
        "question": "Who left?",
        "answer": "Bo",
        "idx": {"paragraph": 2, "question": 4, "answer": 8},
        "label": 1,
    }
    assert made("multirc", flat) == [first]
    (example,) = examples("multirc", flat)
    assert {e.facts["group"] for e in examples("multirc", {"idx": 2, "passage": PASSAGE})} == {
        example.facts["group"]
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"passage": PASSAGE}, "'idx' is None; a whole number"),
        ({"idx": 1, "passage": "text"}, "'passage' is 'text'; an object"),
        ({"idx": 1, "passage": {"text": "t"}}, "'questions' is None; a list of objects"),
        ({"paragraph": "p", "question": "q", "answer": "a", "idx": 3}, "'idx' is 3; an object"),
    ],
)
def test_a_malformed_multirc_row_says_where(row, message):
    with pytest.raises(ValueError, match=message):
        made("multirc", row)


def test_record_of_the_hub_is_put_in_order():
    row = {
        "passage": "Bo and Ann.",
        "query": "@placeholder left",
        "entities": ["Bo", "Ann", "Bo"],
        "answers": ["Bo", "Ann", "Bo"],
        "idx": {"passage": 3, "query": 5},
    }
    text = "query: @placeholder left entities: Ann, Bo passage: Bo and Ann."
    assert made("record", row) == [(text, "Ann"), (text, "Bo")]
    assert examples("record", row)[0].facts == {"group": "3-5", "answers": ["Ann", "Bo"]}


def test_wsc_trains_on_right_referents_only():
    assert made("wsc", WSC) == [("Ann saw Bo when *he* left .", "Bo")]
    wrong = WSC | {"label": False, "span1_text": "Ann", "span1_index": 0}
    assert made("wsc", wrong, for_training=True) == []
    assert [e.facts for e in examples("wsc", wrong)] == [{"label": 0}]


def test_wsc_without_a_label_keeps_its_referent_and_is_known():
    (example,) = examples("wsc", without(WSC, "label"), for_training=True)
    assert example.target_text == "Bo"
    assert not is_labelled(example)


def test_a_text_of_wsc_that_t5_knows_by_heart():
    text = (
        "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the "
        "magic pebble in an iron safe . Some day they might want to use it , but really for now, "
        "what more could they wish for?"
    )
    row = WSC | {"text": text, "span1_text": "the magic pebble", "span1_index": 15}
    row |= {"span2_text": "it", "span2_index": 28}
    assert made("wsc", row) == [(text.replace(" it ,", " *it* ,"), "the magic pebble")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"span2_index": 3}, "'span2_index' is 3; the number of the word 'he'"),
        ({"span2_index": 99}, "'span2_index' is 99"),
        ({"span2_index": 0, "span2_text": "Ann"}, "the first will not do"),
        ({"span1_text": "Cy"}, "'span1_text' is 'Cy'; a part of 'text'"),
        ({"span2_index": "x"}, "'span2_index' is 'x'; a whole number"),
        ({"target": 3}, "'target' is 3; an object"),
    ],
)
def test_a_wsc_row_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        made("wsc", WSC | change)


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["a-b"], "answer_start": [0]},
        ["a-b"],
        [{"text": "a-b", "char_spans": [[0, 2]]}],
    ],
)
def test_answers_of_squad_in_every_form(answers):
    (example,) = examples("squad", {"question": "q", "context": "a-b", "answers": answers})
    assert (example.target_text, example.facts["answers"]) == ("a - b", ["a - b"])


def test_questions_without_answers_have_no_target():
    (example,) = examples("squad", {"question": "q", "context": "c", "answers": {"text": []}})
    assert not is_labelled(example)


@pytest.mark.parametrize("answers", ["a", {"start": [0]}, [3], [{"start": 0}]])
def test_answers_that_are_no_texts_are_refused(answers):
    with pytest.raises(ValueError, match="'answers' is .*; a list of texts"):
        made("squad", {"question": "q", "context": "c", "answers": answers})


def test_mrqa_takes_the_rows_of_its_own_set():
    row = {"question": "q", "context": "c", "answers": ["c"], "subset": "DROP"}
    assert made("drop", row) == [("question: q context: c", "c")]
    assert made("race", row) == []
    assert made("race", without(row, "subset")) == made("drop", row)


def test_mrqa_s_own_files_have_a_header_and_nested_questions():
    questions = [
        {"qid": "1", "question": "q?", "detected_answers": [{"text": "c"}]},
        {"qid": "2", "question": "r", "answers": ["d", "e"]},
    ]
    assert made("drop", {"context": "c d e", "qas": questions}) == [
        ("question: q ? context: c d e", "c"),
        ("question: r context: c d e", "d"),
    ]
    assert made("drop", {"header": {"dataset": "DROP", "split": "dev"}}) == []
    with pytest.raises(ValueError, match="the header says 'DROP'; the set 'RACE' is expected"):
        made("race", {"header": {"dataset": "DROP"}})


@pytest.mark.parametrize("score", ["high", 5.1, -0.5, True, [1], float("nan")])
def test_a_similarity_is_a_number_from_0_to_5(score):
    with pytest.raises(ValueError, match=r"'label' is .*; a number from 0 to 5"):
        made("stsb", {"sentence1": "a", "sentence2": "b", "label": score})


def test_dpr_has_two_candidates():
    row = {"sentence": "A saw b.", "pronoun": "b", "candidates": ["A"], "label": 0}
    with pytest.raises(ValueError, match="'candidates' is .*; two texts"):
        made("dpr", row)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(DataError, match=r"no task 'BoolQ'\. Did you mean 'boolq'\?"):
        find_task("BoolQ")


def test_the_table_of_the_docs_is_that_of_the_code():
    path = Path(__file__).parents[2] / "docs" / "task_table.py"
    spec = importlib.util.spec_from_file_location("task_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.table() in page
    assert page == module.page_with_table(page), "run: python docs/task_table.py"
