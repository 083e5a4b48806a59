"""One, two and three ranks write the same bytes, also where a kill lies between them."""

from pathlib import Path

import pytest

from softprompt_dist.config import TuneConfig
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run.prediction import predict
from softprompt_dist.run.prediction_desk import PredictionRequest
from softprompt_dist.run.prediction_rows import BLOCK_ROWS
from tests import runs
from tests.prompts import save_untuned

PREDICT = "softprompt_dist.predict"
NUM_ROWS = 2 * BLOCK_ROWS + 1
"""The last window has one row: most ranks have nothing to do there."""
CELLS = {"rank": "replicated", "greedy": "zero3"}


def answer_rows(run_dir, folder, sharding):
    """Files of the answers by each method, in this world."""
    for method in CELLS:
        settings = [f"evaluation.method={method}", f"backbone.sharding={sharding[method]}"]
        config = load_recipe(TuneConfig, Path(run_dir) / "config.yaml", settings)
        request = PredictionRequest(
            Path(run_dir) / "prompt" / "best.safetensors",
            Path(run_dir) / "rows.jsonl",
            Path(folder) / f"{method}.jsonl",
            window=BLOCK_ROWS,
        )
        is_sharded = sharding[method] == "zero3"
        predict(config, request, runs.PARTITION_EVERYTHING if is_sharded else None)


@pytest.fixture(scope="module")
def run_dir(lively_t5, tiny_data, tmp_path_factory):
    """Folder of a prompt, its config and the rows that it is to answer."""
    folder = tmp_path_factory.mktemp("run")
    recipe = runs.tiny_recipe(lively_t5, tiny_data)
    recipe["evaluation"] |= {"length_normalisation": "tokens", "batch_tokens": 1024}
    save_untuned(folder, recipe)
    rows = [{"text": row["text"]} for row in runs.make_rows(NUM_ROWS, seed=3)]
    runs.write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def alone(run_dir, run_functions, tmp_path_factory):
    """Method -> what one rank writes with a replicated backbone, in a process like the others.

    Not in this one: more threads add the same numbers in another order.
    """
    folder = tmp_path_factory.mktemp("alone")
    sharding = dict.fromkeys(CELLS, "replicated")
    run_functions(answer_rows, 1, run_dir=run_dir, folder=folder, sharding=sharding, timeout=200)
    written = {method: (folder / f"{method}.jsonl").read_bytes() for method in CELLS}
    for lines in written.values():
        assert lines.count(b"\n") == NUM_ROWS
        assert len({line.partition(b'"prediction"')[2] for line in lines.splitlines()}) > 3
    return written


def test_two_ranks_write_the_same_bytes(run_dir, alone, run_functions, tmp_path):
    arguments = {"run_dir": run_dir, "folder": tmp_path, "sharding": CELLS}
    run_functions(answer_rows, 2, timeout=200, **arguments)
    for method, expected in alone.items():
        assert (tmp_path / f"{method}.jsonl").read_bytes() == expected


@pytest.fixture
def command(run_dir, zero3_json):
    """Options of a run that writes often."""
    return [
        *["--prompt", run_dir / "prompt" / "best.safetensors", "--window", "1"],
        *["--input", run_dir / "rows.jsonl", "--deepspeed_config", zero3_json],
        *["--method", "greedy", "--output"],
    ]


def test_two_ranks_that_were_killed_are_continued_by_three(
    command, alone, start_modules, run_modules, tmp_path
):
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.progress"
    with start_modules(PREDICT, [*command, output], 2) as running:
        running.wait_until(lambda: journal.exists() and b"commit" in journal.read_bytes(), 120)
        running.kill(1)
        running.kill(0)
    assert b"complete" not in journal.read_bytes()
    with output.open("ab") as file:
        file.write(b'{"row": 513, "id": "51')
    outputs = run_modules(PREDICT, [*command, output], 3)
    assert "out.jsonl continues after row" in outputs[0].stdout
    assert not outputs[1].stdout
    assert output.read_bytes() == alone["greedy"]
