import gzip
import json

import pytest

from softprompt_dist.data.tasks import hash_split, load_task
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import SourceConfig, TaskConfig

LABELS = {"0": "negative", "1": "positive"}
ROWS = [{"text": f"snippet number {n}", "label": n % 2} for n in range(60)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def task(**settings):
    source = SourceConfig(
        **{k: settings.pop(k) for k in ("train", "validation", "test") if k in settings}
    )
    return load_task(TaskConfig(name="t", source=source, **({"labels": LABELS} | settings)))


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


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_empty_text_is_refused_with_its_row(tmp_path, text):
    message = refusal(tmp_path, [*ROWS[:4], {"text": text, "label": 0}])
    assert "Line 5 of rows.jsonl has an empty text" in message


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
