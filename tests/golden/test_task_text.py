"""Templates of the shipped recipes against the text that T5's own preprocessors gave."""

import json
from pathlib import Path

import pytest

from softprompt_dist.config import TuneConfig
from softprompt_dist.data.tasks import load_task
from softprompt_dist.recipe import load_recipe
from softprompt_dist.task_config import SourceConfig

DATA = Path(__file__).parent / "data"


def labelled_records(name):
    """Pairs of a row and what each registered task made of it.

    Left out: test rows, which have no label, and one with an empty sentence, which we refuse.
    """
    records = map(json.loads, (DATA / name).read_text(encoding="utf-8").splitlines())
    pairs = []
    for record in records:
        rows, outputs = record["tfds"], record["outputs"]
        if isinstance(rows, dict):
            rows, outputs = [rows], {task: [made] for task, made in outputs.items()}
        pairs += [
            (row, {task: made[index] for task, made in outputs.items()})
            for index, row in enumerate(rows)
            if row["label"] >= 0 and row.get("sentence") != ""
        ]
    return pairs


@pytest.mark.parametrize(
    ("recipe", "prefix", "original", "count"),
    [
        ("t5-xxl-superglue-boolq", "", "taskless_super_glue_boolq_v102", 13),
        ("t5-xxl-superglue-boolq", "boolq ", "super_glue_boolq_v102", 13),
        ("t5-base-sst2", "", "taskless_glue_sst2_v200", 14),
        ("t5-base-sst2", "sst2 ", "glue_sst2_v002", 14),
    ],
)
def test_a_recipe_gives_the_original_text(tmp_path, recipe, prefix, original, count):
    file = "superglue_boolq.jsonl" if "boolq" in original else "glue_sst2.jsonl"
    pairs = labelled_records(file)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row, _ in pairs), encoding="utf-8")
    config = load_recipe(TuneConfig, recipe).task
    source = SourceConfig(train=str(path), validation=str(path), test=str(path))
    template = prefix + config.input_template
    task = load_task(config.model_copy(update={"source": source, "input_template": template}))
    assert len(task.train) == count
    expected = [(made[original]["inputs"], made[original]["targets"]) for _, made in pairs]
    assert sorted((e.input_text, e.target_text) for e in task.train) == sorted(expected)
