import hashlib
import io
import tarfile

import pytest

from softprompt_dist.data import sources, vader
from softprompt_dist.data.tasks import load_task
from softprompt_dist.errors import DataError
from softprompt_dist.task_config import SourceConfig, TaskConfig

SNIPPETS = {
    "movieReviewSnippets": (
        "1\t2.25\tA fine clich\u00e9.\r\n2\t-1.5\tDull\u0085 and\tlong.\r\n3\t0.0\tIt is.\r\n"
    ),
    "amazonReviewSnippets": "1_1\t-0.9\t padded \r\n",
    "nytEditorialSnippets": "1_1\t0.4\tNoon.\r\n",
    "tweets": "1\t0.1\tYay\r\n2\t1.4\tOh\r\n",
}


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path):
    inner = tar_of(
        {f"hutto_ICWSM_2014/{n}_GroundTruth.txt": text.encode() for n, text in SNIPPETS.items()}
    )
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    path.write_bytes(tar_of({"vaderSentiment-3.3.2/setup.py": b"", name: inner}))
    return path


def test_movies_are_labelled_by_the_sign_of_the_rating_and_zero_is_dropped(archive):
    assert vader.read_vader(archive, "movies") == [
        {"text": "A fine clich\u00e9.", "rating": 2.25, "id": "1", "label": "positive"},
        {"text": "Dull\u0085 and\tlong.", "rating": -1.5, "id": "2", "label": "negative"},
    ]


def test_every_file_is_a_task_of_sentiment(archive):
    found = {name: vader.read_vader(archive, name) for name in ("amazon", "nyt", "tweets")}
    labels = {name: [row["label"] for row in rows] for name, rows in found.items()}
    assert labels == {
        "amazon": ["negative"],
        "nyt": ["positive"],
        "tweets": ["positive", "positive"],
    }


def test_sources_are_labelled_by_their_file(archive):
    rows = vader.read_vader(archive, "sources")
    assert [row["label"] for row in rows] == ["movies"] * 3 + ["amazon", "nyt", "tweets", "tweets"]
    assert rows[3]["text"] == "padded"


def test_a_foreign_archive_is_refused(tmp_path):
    for name, content in {
        "a.tar.gz": tar_of({"x/setup.py": b""}),
        "b.tar.gz": b"not a tar",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="Cannot read"):
            vader.read_vader(tmp_path / name, "movies")


def test_a_cached_distribution_is_read_without_a_network(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "downloads" / archive.name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(archive.read_bytes())
    monkeypatch.setattr(vader, "_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    assert len(vader.vader_rows("movies")) == 2


def test_splits_and_digests_of_a_task_stay_what_they_were(monkeypatch):
    """Prompts and results of earlier versions are compared by these."""
    rows = [
        {"text": f"snippet {n}", "label": ("negative", "positive")[n % 2], "rating": 1.0, "id": "1"}
        for n in range(100)
    ]
    monkeypatch.setattr(sources, "vader_rows", lambda name: rows)
    data = load_task(TaskConfig())
    assert {split: (len(data.splits[split]), d[:16]) for split, d in data.digests.items()} == {
        "train": (76, "54e3fee9371b63ac"),
        "validation": (16, "88e929c4d651a02b"),
        "test": (8, "276472f13a88a57c"),
    }
    assert data.records["train"].sha256 == vader.vader_sha256()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"name": "films"},
            "'films'; the vader source has movies, amazon, nyt, tweets and sources",
        ),
        ({"name": "movies", "test": "t.jsonl"}, "task.source.test is 't.jsonl'"),
        ({"name": "movies", "sha256": {"train": "0" * 64}}, "kind is vader, which has no files"),
    ],
)
def test_settings_that_do_not_fit_the_source_are_refused(settings, words):
    with pytest.raises(DataError, match=words):
        load_task(TaskConfig(source=SourceConfig(kind="vader", **settings)))
