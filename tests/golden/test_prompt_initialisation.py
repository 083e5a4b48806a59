"""The released code's own prompts, from the indices it drew (PyTorch cannot redraw them).

`tiny_embedding_rows.npz` holds the rows that the cases use of the paper code's test table.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from softprompt_dist.config import PromptConfig
from softprompt_dist.prompt.initialise import embedded_rows, initialise_prompt

DATA = Path(__file__).parent / "data" / "prompt_init"


def records(name, **wanted):
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    return [c for c in cases if all(c.get(key) == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def embed():
    with np.load(DATA / "tiny_embedding_rows.npz", allow_pickle=False) as file:
        rows = dict(zip(file["ids"].tolist(), torch.tensor(file["rows"]), strict=True))
    return lambda ids_N: torch.stack([rows[piece] for piece in ids_N.tolist()])


@pytest.mark.parametrize(
    "case", records("class_labels.jsonl", fallback="sample5000"), ids=lambda c: str(c["labels"])
)
def test_rows_of_class_labels(case, embed):
    pieces = case["ids"][: case["P"]]
    sampled = torch.tensor(case["fallback_indices"])
    expected = torch.tensor([[np.nan if v is None else v for v in row] for row in case["prompt"]])
    # The original gives an empty label a row of NaN; ours stays at its sampled piece.
    empty = [index for index, row in enumerate(pieces) if not row]
    assert expected.isnan().any(dim=1).nonzero().flatten().tolist() == empty
    expected[empty] = embed(sampled)[empty]

    prompt = embedded_rows(pieces, sampled, embed)

    torch.testing.assert_close(prompt, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    records("string_and_sampled.jsonl", kind="from_embedded_string"),
    ids=lambda c: f"{c['text'][:10]}-{c['P']}",
)
def test_rows_of_a_text(case, embed):
    pieces = [[piece] for piece in case["ids"][: case["P"]]]

    prompt = embedded_rows(pieces, torch.tensor(case["fallback_indices"]), embed)

    assert torch.equal(prompt, torch.tensor(case["prompt"]))


@pytest.mark.parametrize(
    "case",
    records("string_and_sampled.jsonl", kind="from_sample_of_embeddings"),
    ids=lambda c: f"{c['population_size']}-{c['P']}",
)
def test_rows_of_sampled_vocabulary(case, embed):
    prompt = embedded_rows([], torch.tensor(case["indices"]), embed)

    assert torch.equal(prompt, torch.tensor(case["prompt"]))


@pytest.mark.parametrize("shape", [(100, 64), (20, 512)])
def test_released_uniform_has_the_original_distribution(shape):
    expected = json.loads((DATA / "uniform_scale0p5.json").read_text())
    expected = expected[f"uniform0p5_{shape[0]}x{shape[1]}"]
    config = PromptConfig(initialisation="random_uniform_released", prompt_length=shape[0])

    prompt = initialise_prompt(
        config,
        embed=pytest.fail,
        vocabulary_size=1,
        encode=pytest.fail,
        labels=(),
        d_model=shape[1],
        generator=torch.Generator().manual_seed(0),
    )

    assert prompt.shape == shape
    assert 0.0 <= prompt.min() < prompt.max() < 0.5
    for statistic in ("min", "max", "mean", "std"):
        assert float(getattr(prompt, statistic)()) == pytest.approx(expected[statistic], abs=5e-3)
