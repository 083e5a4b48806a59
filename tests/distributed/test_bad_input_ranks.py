"""Of two ranks that meet a bad input one speaks, and both end."""

import json

import launch


def test_a_bad_label_is_said_once_and_ends_both_ranks(
    tiny_recipe, tiny_data, tmp_path, run_module_on_ranks
):
    rows = (tiny_data / "train.jsonl").read_text().splitlines()
    bad = {"text": "we ate a pear", "label": "salmno"}
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join([*rows, json.dumps(bad)]))
    outputs = run_module_on_ranks(
        "softprompt_dist.train",
        [
            *["--recipe", tiny_recipe, "--run-dir", tmp_path / "run"],
            *["--set", f"task.source.train={train}"],
        ],
        2,
        check=False,
    )
    assert [output.returncode for output in outputs] == [2, 2]
    said = "".join(output.stdout + output.stderr for output in outputs)
    assert said.count("error: ") == 1
    assert launch.without_progress(outputs[0].stderr).startswith(
        f"error: Line {len(rows) + 1} of {train.name}"
    )
    assert "'salmno', which is not in task.labels" in said
    assert "Did you mean 'salmon'?" in said
    assert "Traceback" not in said
