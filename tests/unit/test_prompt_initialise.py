import logging

import pytest
import torch

from softprompt_dist.config import PromptConfig
from softprompt_dist.errors import PromptFileError
from softprompt_dist.identity import Identity
from softprompt_dist.prompt.file import PromptMetadata, save_prompt
from softprompt_dist.prompt.initialise import initialise_prompt

D_MODEL, VOCABULARY = 8, 40
TABLE = torch.randn(VOCABULARY, D_MODEL, generator=torch.Generator().manual_seed(7))
WORDS = {"good": [30], "very bad": [31, 32], "": [], "so so": [33, 34]}


class Table:
    """An embedding that counts how often it is asked."""

    def __init__(self, dtype=torch.float32):
        self.calls = 0
        self.dtype = dtype

    def __call__(self, ids_N):
        self.calls += 1
        return TABLE[ids_N].to(self.dtype)


def initialise(embed=None, labels=("good", "very bad"), seed=0, **settings):
    return initialise_prompt(
        PromptConfig(**settings),
        embed=embed or Table(),
        vocabulary_size=VOCABULARY,
        encode=WORDS.__getitem__,
        labels=labels,
        d_model=D_MODEL,
        generator=torch.Generator().manual_seed(seed),
    )


def rows_in_table(prompt):
    return [(row == TABLE).all(dim=1).nonzero().flatten().tolist() for row in prompt]


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.safetensors"
    metadata = PromptMetadata(
        identity=Identity("b", "aa"),
        task="task",
        initialisation="class_labels",
        step=1,
        metric="accuracy",
        score=0.5,
        prompt_length=3,
        d_model=D_MODEL,
        version="0",
    )
    save_prompt(path, torch.full((3, D_MODEL), 2.0), metadata)
    return path


def test_class_labels_come_first_and_sampled_pieces_after():
    prompt = initialise(prompt_length=6, sampled_vocabulary_size=20)

    assert torch.equal(prompt[0], TABLE[30])
    torch.testing.assert_close(prompt[1], (TABLE[31] + TABLE[32]) / 2)
    found = rows_in_table(prompt[2:])
    assert all(len(row) == 1 and row[0] < 20 for row in found)
    assert len({row[0] for row in found}) == 4


def test_text_gives_a_row_to_each_piece():
    prompt = initialise(initialisation="text", text="very bad", prompt_length=3)

    assert torch.equal(prompt[:2], TABLE[[31, 32]])


@pytest.mark.parametrize(
    "settings",
    [
        {"initialisation": "class_labels"},
        {"initialisation": "sampled_vocabulary"},
        {"initialisation": "text", "text": ""},
        {"initialisation": "text", "text": "so so"},
    ],
)
@pytest.mark.parametrize("prompt_length", [1, 2, 100, 1000])
def test_table_is_asked_exactly_once_whatever_the_data(settings, prompt_length):
    embed = Table(torch.bfloat16)

    prompt = initialise(embed, prompt_length=prompt_length, **settings)

    assert embed.calls == 1
    assert prompt.shape == (prompt_length, D_MODEL)
    assert prompt.dtype == torch.float32
    assert prompt.isfinite().all()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("random_uniform_paper", -0.5, 0.5), ("random_uniform_released", 0.0, 0.5)],
)
def test_uniform_fills_its_range_without_asking_the_table(name, low, high):
    embed = Table()

    prompt = initialise(embed, initialisation=name, prompt_length=1000)

    width = high - low
    assert embed.calls == 0
    assert low <= prompt.min() < low + 0.01 * width
    assert high - 0.01 * width < prompt.max() <= high
    assert float(prompt.mean()) == pytest.approx((low + high) / 2, abs=0.02 * width)


@pytest.mark.parametrize("name", ["class_labels", "sampled_vocabulary", "random_uniform_paper"])
def test_same_seed_same_prompt(name):
    first, again, other = (
        initialise(initialisation=name, prompt_length=10, seed=seed) for seed in (1, 1, 2)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_beyond_the_prompt_are_dropped_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        prompt = initialise(labels=("very bad", "good", "so so"), prompt_length=2)

    assert torch.equal(prompt[1], TABLE[30])
    assert "3 class labels, but prompt.prompt_length is 2" in caplog.text


def test_text_beyond_the_prompt_is_dropped_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        prompt = initialise(initialisation="text", text="so so", prompt_length=1)

    assert torch.equal(prompt[0], TABLE[33])
    assert "2 pieces in prompt.text" in caplog.text


def test_empty_label_keeps_a_sampled_piece(caplog):
    with caplog.at_level(logging.WARNING):
        prompt = initialise(labels=("", "good"), prompt_length=2)

    assert len(rows_in_table(prompt[:1])[0]) == 1
    assert torch.equal(prompt[1], TABLE[30])
    assert "class labels are empty" in caplog.text


def test_prompt_longer_than_the_population_repeats_pieces_with_a_warning(caplog):
    settings = {"initialisation": "sampled_vocabulary", "sampled_vocabulary_size": 4}
    with caplog.at_level(logging.WARNING):
        prompt = initialise(prompt_length=30, **settings)

    assert {row[0] for row in rows_in_table(prompt)} == {0, 1, 2, 3}
    assert "only 4 pieces" in caplog.text


def test_population_beyond_the_table_is_clamped_with_a_warning(caplog):
    settings = {"initialisation": "sampled_vocabulary", "sampled_vocabulary_size": 5000}
    with caplog.at_level(logging.WARNING):
        prompt = initialise(prompt_length=VOCABULARY, **settings)

    assert sorted(row[0] for row in rows_in_table(prompt)) == list(range(VOCABULARY))
    assert f"has {VOCABULARY} rows" in caplog.text


def test_file_is_taken_as_it_is(prompt_file):
    prompt = initialise(initialisation="file", file=str(prompt_file), prompt_length=3)

    assert torch.equal(prompt, torch.full((3, D_MODEL), 2.0))


def test_file_of_another_length_is_refused(prompt_file):
    with pytest.raises(PromptFileError, match=f"needs 4 x {D_MODEL}"):
        initialise(initialisation="file", file=str(prompt_file), prompt_length=4)
