"""`softprompt evaluate` writes the same bytes on one, two and three ranks, sharded or not."""

import itertools
import json
from unittest.mock import patch

import pytest

from softprompt_dist import evaluate
from tests import runs
from tests.prompts import save_untuned

METHODS = ("rank", "greedy")
COUNTS = (23, 2)
"""Of rows: they make uneven shards, and fewer than three ranks could share."""
FILES = ("predictions.jsonl", "results.json", "report.md", "confusion.png")


def evaluate_everything(prompt, folder, zero3_json):
    """The verb with every method, sharding and count, one after the other in this world."""
    shardings = {"replicated": [], "zero3": ["--deepspeed_config", zero3_json]}
    with patch("softprompt_dist.parallel.join.leave_world"):
        for method, sharding, count in itertools.product(METHODS, shardings, COUNTS):
            output = f"{folder}/{sharding}/{method}-{count}"
            arguments = ["--prompt", prompt, "--method", method, "--max-examples", str(count)]
            evaluate.main([*arguments, "--output", output, *shardings[sharding]])


@pytest.fixture(scope="module")
def prompt(lively_t5, tmp_path_factory):
    """A random prompt beside the config of a run with 23 rows to score."""
    folder = tmp_path_factory.mktemp("run")
    data = runs.write_splits(folder / "data")
    runs.write_rows(data / "test.jsonl", runs.make_rows(23, seed=4))
    recipe = runs.tiny_recipe(lively_t5, data)
    recipe["evaluation"] |= {"batch_tokens": 64, "length_normalisation": "tokens"}
    return save_untuned(folder, recipe)


@pytest.fixture(scope="module")
def on_ranks(prompt, zero3_json, run_functions, tmp_path_factory):
    """Number of ranks -> the folder of what they wrote."""
    folders = {world_size: tmp_path_factory.mktemp("written") for world_size in (1, 2, 3)}
    for world_size, folder in folders.items():
        arguments = {"prompt": prompt, "folder": folder, "zero3_json": zero3_json}
        run_functions(evaluate_everything, world_size, timeout=240, **arguments)
    return folders


def written(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_on_any_number_of_ranks(on_ranks, method, count):
    expected = written(on_ranks[1] / "replicated" / f"{method}-{count}")
    rows = [json.loads(line) for line in expected["predictions.jsonl"].splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == count
    assert json.loads(expected["results.json"])["num_answers"] == count
    assert len({row["prediction"] for row in rows}) > 1
    for folder in on_ranks.values():
        for sharding in ("replicated", "zero3"):
            assert written(folder / sharding / f"{method}-{count}") == expected


def test_the_verb_alone_writes_them_too(on_ranks, prompt, zero3_json, run_modules, tmp_path):
    arguments = ["--prompt", prompt, "--method", "greedy", "--output", tmp_path]
    outputs = run_modules(
        "softprompt_dist.evaluate", [*arguments, "--deepspeed_config", zero3_json], 2
    )
    assert written(tmp_path) == written(on_ranks[1] / "replicated" / "greedy-23")
    assert outputs[0].stdout.startswith("foods, test\n")
    assert outputs[1].stdout == ""
