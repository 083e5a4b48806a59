import gzip
import hashlib
import json

import pytest

from softprompt_dist.data.rows import stream_rows
from softprompt_dist.data.sources import SPLITS
from softprompt_dist.data.tasks import hash_split, load_task, task_reader
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import SourceConfig, TaskConfig

LABELS = {"0": "negative", "1": "positive"}
ROWS = [{"text": f"snippet number {n}", "label": n % 2} for n in range(60)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def task(splits=SPLITS, **settings):
    source = SourceConfig(**{k: settings.pop(k) for k in (*SPLITS, "sha256") if k in settings})
    return load_task(TaskConfig(name="t", source=source, **({"labels": LABELS} | settings)), splits)


def refusal(tmp_path, rows, **settings):
    train = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        task(train=train, **settings)
    return str(caught.value)


def test_rows_become_examples_by_template_and_label_map(tmp_path):
    row = {"premise": "It {rains}.", "hypothesis": "It is wet.", "label": True}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    data = task(
        train=path,
        validation=path,
        test=path,
        input_template="a {{b}} premise: {premise} hypothesis: {hypothesis}",
        labels={"true": "yes", "false": "no"},
    )
    assert data.train[0].input_text == "a {b} premise: It {rains}. hypothesis: It is wet."
    assert data.train[0].target_text == "yes"
    assert data.labels == ("yes", "no")
    assert data.train == data.validation == data.test


def test_every_format_gives_the_same_task(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    texts = [{"text": f'say "{n}",\nNA, é', "label": str(n % 2)} for n in range(40)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", texts)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    csv_rows = "".join(
        '"{}",{}\r\n'.format(r["text"].replace('"', '""'), r["label"]) for r in texts
    )
    (tmp_path / "c.csv").write_bytes(("\ufefftext,label\r\n" + csv_rows).encode())
    with gzip.open(tmp_path / "d.csv.gz", "wb") as file:
        file.write((tmp_path / "c.csv").read_bytes())
    parquet.write_table(pa.Table.from_pylist(texts), tmp_path / "e.parquet")
    others = ["b.jsonl.gz", "c.csv", "d.csv.gz", "e.parquet"]
    expected = task(train=jsonl)
    assert [task(train=str(tmp_path / name)).splits for name in others] == [expected.splits] * 4


def test_hash_split_is_the_published_rule():
    assert [hash_split(text) for text in "apb"] == ["test", "validation", "train"]
    splits = [hash_split(str(n)) for n in range(5000)]
    assert 0.08 < splits.count("test") / 5000 < 0.12
    assert 0.08 < splits.count("validation") / 5000 < 0.12


def test_absent_splits_come_out_of_train_and_no_text_is_in_two(tmp_path):
    data = task(train=write_jsonl(tmp_path / "rows.jsonl", ROWS * 3))
    texts = [{e.input_text for e in part} for part in (data.train, data.validation, data.test)]
    assert all(texts)
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    assert len(data.train) + len(data.validation) + len(data.test) == 180


def test_the_split_does_not_depend_on_the_template(tmp_path):
    train = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    plain = task(train=train)
    worded = task(train=train, input_template="Review: {text}")
    assert ["Review: " + e.input_text for e in plain.test] == [e.input_text for e in worded.test]


def test_the_first_rows_of_a_split_are_a_fair_sample_even_if_the_file_is_sorted(tmp_path):
    rows = [{"text": f"snippet {n}", "label": int(n >= 500)} for n in range(1000)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = task(train=path, validation=path, max_examples=200)
    for split in (data.train, data.validation):
        positive = sum(example.target_text == "positive" for example in split[:200])
        assert 70 < positive < 130
    write_jsonl(tmp_path / "rows.jsonl", rows[::-1])
    assert task(train=path, validation=path, max_examples=200).digests == data.digests


def test_only_the_absent_split_is_taken_from_train(tmp_path):
    train = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": "kept apart", "label": 0}])
    data = task(train=train, test=test)
    assert [e.input_text for e in data.test] == ["kept apart"]
    assert len(data.train) + len(data.validation) == 60
    assert {hash_split(e.input_text) for e in data.train} == {"train", "test"}


def test_max_examples_limits_training_rows_only_and_digests_follow_the_content(tmp_path):
    train = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    whole, limited = task(train=train), task(train=train, max_examples=7)
    assert limited.train == whole.train[:7]
    assert limited.test == whole.test
    assert limited.digests["train"] != whole.digests["train"]
    assert limited.digests["test"] == whole.digests["test"]


def test_max_examples_of_passages_are_not_all_of_a_few(tmp_path):
    rows = [
        {
            "paragraph": f"Passage {p}.",
            "question": "Is it?",
            "answer": f"answer {a}",
            "label": a % 2,
            "idx": {"paragraph": p, "question": 0, "answer": a},
        }
        for p in range(20)
        for a in range(20)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(train=path, validation=path, test=path)
    config = TaskConfig(catalogue="multirc", source=source, max_examples=40)
    limited = load_task(config, ("train",)).train
    assert len(limited) == 40
    assert len({example.facts["group"] for example in limited}) > 10
    write_jsonl(tmp_path / "rows.jsonl", rows[::-1])
    assert load_task(config, ("train",)).train == limited


def test_a_missing_file_names_the_nearest(tmp_path):
    write_jsonl(tmp_path / "reviews.jsonl", ROWS)
    with pytest.raises(
        DataError, match=r"reviws\.jsonl does not exist\. Did you mean 'reviews\.jsonl'"
    ):
        task(train=str(tmp_path / "reviws.jsonl"))
    with pytest.raises(DataError, match="nor does its folder"):
        task(train=str(tmp_path / "nowhere" / "reviews.jsonl"))


def test_a_source_without_train_is_refused():
    with pytest.raises(DataError, match=r"task\.source\.train is not given"):
        task()


def test_an_unknown_label_is_named_with_its_row_and_the_valid_ones(tmp_path):
    message = refusal(tmp_path, [*ROWS, {"text": "odd", "label": 7}])
    assert "Line 61 of rows.jsonl" in message
    assert "'7'" in message
    assert "0, 1" in message


def test_a_missing_field_names_the_valid_ones(tmp_path):
    message = refusal(tmp_path, ROWS, input_template="{txet}")
    assert "Line 1 of" in message
    assert "'txet'. Did you mean 'text'? Its fields: text, label" in message
    assert "'class'" in refusal(tmp_path, ROWS, label_field="class")


@pytest.mark.parametrize("text", ["", "  \n", None, float("nan")])
def test_an_empty_text_is_refused_with_its_row(tmp_path, text):
    message = refusal(tmp_path, [*ROWS[:4], {"text": text, "label": 0}])
    assert "Line 5 of rows.jsonl has an empty text" in message


def test_a_null_beside_a_text_is_refused(tmp_path):
    rows = [{"text": "a", "more": "b", "label": 0}, {"text": "a", "more": None, "label": 0}]
    message = refusal(tmp_path, rows, input_template="{text} {more}")
    assert "Line 2 of rows.jsonl has an empty text (more is null)" in message
    rows[1]["more"] = ""
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(task(("test",), test=path, input_template="{text} {more}").test) == 2


@pytest.mark.parametrize("template", ["no field", "{}", "{text", "{text!r}", "{text:>8}"])
def test_a_template_without_plain_fields_is_refused(tmp_path, template):
    assert "task.input_template" in refusal(tmp_path, ROWS, input_template=template)


def test_a_field_that_is_no_text_is_refused(tmp_path):
    assert "is a list" in refusal(tmp_path, [{"text": ["a"], "label": 0}])


def test_half_a_character_is_refused(tmp_path):
    assert "half a character" in refusal(tmp_path, [{"text": "\ud83d", "label": 0}])


def test_blank_targets_are_refused(tmp_path):
    assert "task.labels.0 is blank" in refusal(tmp_path, ROWS, labels={"0": " ", "1": "yes"})


def test_a_split_without_rows_is_refused(tmp_path):
    assert "'train' has no rows" in refusal(tmp_path, [])
    assert "hash of the text" in refusal(tmp_path, ROWS[:1])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a", "label": 0}\n{"text": \n', "Line 2 of a.jsonl is not JSON"),
        ("a.jsonl", b"[1]\n", "Line 1 of a.jsonl is not a JSON object"),
        ("a.jsonl", b'{"text": "caf\xe9", "label": 0}\n', "must be UTF-8"),
        ("a.jsonl.gz", b"not gzip", "Cannot read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:30], "Check that the file is whole"),
        ("a.csv", b"text,label\na,0\nb\n", "Line 3 of a.csv has not as many columns"),
        ("a.csv", b"text,label\na,0,9\n", "Line 2 of a.csv has not as many columns"),
        ("a.parquet", b"PAR1 nonsense", "Cannot read"),
        ("a.txt", b"a", "must end in .jsonl, .csv, .parquet"),
    ],
)
def test_an_unreadable_file_says_what_is_wrong(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        task(train=str(tmp_path / name))
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_a_split_that_is_not_asked_for_is_not_read(tmp_path):
    good = write_jsonl(tmp_path / "validation.jsonl", ROWS[:5])
    data = task(("validation",), train="absent.jsonl", validation=good, test="absent.jsonl")
    assert list(data.splits) == list(data.digests) == list(data.records) == ["validation"]
    assert task(("validation",), validation=good).splits == data.splits
    with pytest.raises(DataError, match=r"validation is taken from it unless it is given"):
        task(("validation",), test=good)


def test_which_splits_are_asked_for_changes_none_of_them(tmp_path):
    """Else a prompt tuned without a test split would be scored on rows it has seen."""
    train = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    whole = task(train=train)
    for split in SPLITS:
        assert task((split,), train=train).splits == {split: whole.splits[split]}


def test_a_split_knows_where_it_comes_from(tmp_path):
    path = tmp_path / "rows.jsonl"
    data = task(("validation",), train=write_jsonl(path, ROWS))
    record = data.records["validation"]
    assert (record.origin, record.num_rows, record.num_bad) == ("rows.jsonl", 60, 0)
    assert record.num_examples == len(data.validation)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_with_another_checksum_is_refused_with_both(tmp_path):
    path = tmp_path / "rows.jsonl"
    train = write_jsonl(path, ROWS)
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    assert task(train=train, sha256={"train": actual}).train
    with pytest.raises(DataError) as caught:
        task(train=train, sha256={"train": "0" * 64})
    assert f"rows.jsonl has sha256 {actual}, but" in str(caught.value)
    assert f"task.source.sha256.train is {'0' * 64}" in str(caught.value)
    with pytest.raises(DataError, match=r"sha256\.test is given, but the source has no file"):
        task(train=train, sha256={"test": actual})


def test_metrics_and_family_follow_the_labels(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    data = task(("validation",), validation=path)
    assert data.metrics == ("accuracy",)
    assert data.family == "own: negative, positive"
    free = task(("validation",), validation=path, labels={}, metrics=["accuracy"])
    assert (free.metrics, free.labels, free.family) == (("accuracy",), (), "own: free text")
    assert task(("validation",), validation=path, labels={}).metrics == ("squad",)


def test_without_labels_the_field_is_the_answer_or_a_list_of_right_ones(tmp_path):
    rows = [
        {"text": "a", "label": "one"},
        {"text": "b", "label": ["two", "deux"]},
        {"text": "c", "label": 3},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = task(("validation",), validation=path, labels={})
    found = {e.input_text: (e.target_text, e.facts["answers"]) for e in data.validation}
    assert found == {
        "a": ("one", ["one"]),
        "b": ("two", ["two", "deux"]),
        "c": ("3", ["3"]),
    }


@pytest.mark.parametrize("label", [None, "", " ", [], ["a", ""], ["a", None]])
def test_a_row_without_an_answer_is_refused(tmp_path, label):
    message = refusal(
        tmp_path, [{"text": "x", "label": "y"}, {"text": "a", "label": label}], labels={}
    )
    assert "Line 2 of rows.jsonl has no label: label is" in message


@pytest.mark.parametrize("label", [{"text": "a"}, [["a"]]])
def test_a_nested_answer_is_refused(tmp_path, label):
    message = refusal(tmp_path, [{"text": "a", "label": label}], labels={})
    assert "Line 1 of rows.jsonl: " in message


def test_a_label_that_is_nearly_right_names_the_nearest(tmp_path):
    rows = [{"text": "a", "label": label} for label in ("positiv", None, "", float("nan"))]
    message = refusal(tmp_path, rows, labels={"negative": "bad", "positive": "good"})
    assert "'positiv', which is not in task.labels: negative, positive. Did you mean" in message
    assert "Line 2 of rows.jsonl has no label: label is null" in message
    assert "Line 3 of rows.jsonl has no label: label is ''" in message
    assert "Line 4 of rows.jsonl has no label: label is null" in message


def test_rows_are_named_by_their_field_or_else_by_their_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": 7, "text": "a", "label": 0}\n\n{"key": 8, "text": "b", "label": 1}\n')
    for id_field, expected in ((None, {"a": "1", "b": "2"}), ("key", {"a": "7", "b": "8"})):
        data = task(("test",), test=str(path), id_field=id_field)
        assert {e.input_text: e.id for e in data.test} == expected


def test_an_id_that_stands_twice_or_is_missing_is_refused(tmp_path):
    rows = [row | {"key": n} for n, row in enumerate(ROWS[:20])]
    twice = refusal(tmp_path, [*rows, ROWS[20] | {"key": 3}], id_field="key")
    assert "id 3 stands in lines 4 and 21 of rows.jsonl" in twice
    assert "has no key, which" in refusal(tmp_path, [ROWS[0] | {"key": None}], id_field="key")
    assert "no field 'key'" in refusal(tmp_path, ROWS, id_field="key")


BAD_LINES = [
    '{"text": "fine", "label": 0}',
    "",
    '{"text": "no label"}',
    '{"text": null, "label": 1}',
    "{not json",
    '{"text": "odd", "label": 9}',
    '{"text": ["nested"], "label": 1}',
    '{"text": "also fine", "label": 1}',
    '{"label": 1}',
    '{"text": "\\ud83d", "label": 1}',
]


def test_bad_rows_are_raised_together_with_their_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(BAD_LINES))
    with pytest.raises(DataError) as caught:
        task(("validation",), validation=str(path))
    first, *listed, last = str(caught.value).splitlines()
    assert first == "7 rows cannot be used:"
    assert last == "Correct them, or leave them out with task.skip_bad_rows=true."
    lines = [line.split(" of rows.jsonl")[0].strip() for line in listed[:-1]]
    assert lines == [f"Line {n}" for n in (3, 4, 5, 6, 7)]
    assert listed[-1].strip() == "and 2 more."


def test_bad_rows_may_be_left_out_counted_and_warned_of(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(BAD_LINES))
    data = task(("validation",), validation=str(path), skip_bad_rows=True)
    assert {e.input_text for e in data.validation} == {"fine", "also fine"}
    record = data.records["validation"]
    assert (record.num_rows, record.num_examples, record.num_bad) == (9, 2, 7)
    assert len(record.bad) == 5
    assert "7 of 9 rows of rows.jsonl cannot be used and are left out: Line 3" in caplog.text
    assert "Line 5 of rows.jsonl is not JSON" in caplog.text
    assert "Line 6" not in caplog.text


def test_a_row_counts_for_its_id_only_if_it_can_be_used(tmp_path):
    rows = [{"k": 1, "text": None, "label": 0}, {"k": 1, "text": "a", "label": 0}]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[1]])
    data = task(("test",), test=path, id_field="k", skip_bad_rows=True)
    assert [e.input_text for e in data.test] == ["a"]
    assert data.records["test"].num_bad == 2


def test_a_split_of_bad_rows_alone_is_an_error_all_the_same(tmp_path):
    bad = [{"text": "a", "label": 7}] * 4
    message = refusal(tmp_path, bad, skip_bad_rows=True)
    assert "4 of 4 rows of rows.jsonl cannot be used: Line 1" in message


def test_a_csv_row_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",0\nx,8\n')
    with pytest.raises(DataError, match=r"Line 4 of rows\.csv has the label '8'"):
        task(("test",), test=str(path))


def test_rows_to_predict_need_no_label(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "label": 1}, {"text": "c", "label": "?"}, {"label": 1}]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    to_inputs = task_reader(TaskConfig(labels=LABELS, input_template="It: {text}")).read_input
    *good, bad = stream_rows(path)
    made = [example for row in good for example in to_inputs(row.row, row.where)]
    assert [(e.input_text, e.target_text, e.id) for e in made] == [
        ("It: a", "", "1"),
        ("It: b", "positive", "2"),
        ("It: c", "", "3"),
    ]
    with pytest.raises(DataError, match=r"Line 4 of rows\.jsonl has no field 'text'"):
        to_inputs(bad.row, bad.where)
