"""The saving benchmark in small, in a world of one."""

import pytest

from benchmarks import saving, saving_ranks

pytestmark = pytest.mark.usefixtures("lone_process")


def test_every_way_to_save_is_measured_on_the_same_run(tmp_path):
    given = saving._options().parse_args(["--size", "tiny", "--rows", "4", "--out", str(tmp_path)])
    settings = {
        "recipe": saving._recipe(given),
        "cache": str(tmp_path / "cache"),
        "checkpoints": str(tmp_path / "checkpoints"),
        "variants": list(saving.VARIANTS),
        "rounds": 2,
        "steps": 2,
    }
    answer = saving_ranks.adaptation(settings)
    assert answer["bytes"] == 3 * 4 * answer["num_weights"]
    assert not (tmp_path / "checkpoints").exists()
    rows = {row["saving"]: row for row in saving.table([answer])}
    assert list(rows) == list(saving.VARIANTS)
    assert float(rows[saving.NONE]["seconds lost"]) == 0
    blocked = {name: saving.periods([answer], name, "blocked") for name in saving.VARIANTS}
    for beside, foreground in zip(blocked[saving.BESIDE], blocked[saving.FOREGROUND], strict=True):
        assert 0 < beside < foreground
    for name in (saving.BESIDE, saving.FOREGROUND):
        published = saving.periods([answer], name, "published")
        assert all(a >= b for a, b in zip(published, blocked[name], strict=True))


def test_the_saves_of_a_prompt_are_a_share_of_the_steps_between_them(tmp_path):
    answer = saving_ranks.prompt({"folder": str(tmp_path / "run"), "shape": [3, 5], "saves": 4})
    assert len(answer["seconds"]) == 4
    assert answer["bytes"] == 4 * 3 * 5 * 4
    answers = [{"seconds": [1.0, 2.0, 6.0]}, {"seconds": [0.5, 4.0, 1.0]}]
    assert saving.share_of_tuning(answers, step_seconds=5.0) == pytest.approx(100 * 4 / 50)
