"""A run that was killed is the run that was not: bit for bit, through `-m softprompt_dist.train`.

Launches are few, because each costs its imports: one world of ranks carries out several runs.
"""

import logging
import shutil

import pytest
import torch

from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import SoftpromptError
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run.checkpoint_format import read_checkpoint
from softprompt_dist.run.session import train
from tests import runs

TRAIN = "softprompt_dist.train"
DROPOUT = "backbone.dropout=0.1"
STATE_FILES = ("state.safetensors", "rng.safetensors", "state.json")


def carry_out(plan, recipe, ds_config):
    """Run every `(overrides, must_resume)` of `plan` in this world; errors and warnings of each."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("softprompt_dist").addHandler(handler)
    for overrides, must_resume in plan:
        warnings = []
        config = load_recipe(TuneConfig, recipe, overrides)
        sharded = config.backbone.sharding == "zero3"
        try:
            train(config, ds_config if sharded else None, must_resume=must_resume)
            error = ""
        except SoftpromptError as failure:
            error = str(failure)
        said.append({"error": error, "warnings": "\n".join(warnings)})
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def arguments(tiny_recipe, zero3_json):
    return ["--recipe", tiny_recipe, "--set", DROPOUT, "--deepspeed_config", zero3_json]


@pytest.fixture(scope="module")
def whole_run(folder, arguments, run_modules):
    """Directory of a run of 40 steps that nothing disturbed."""
    run_dir = folder / "whole"
    run_modules(TRAIN, [*arguments, "--run-dir", run_dir], 2)
    return run_dir


@pytest.fixture(scope="module")
def killed_run(folder, arguments, start_modules):
    """Directory of a run whose ranks got SIGKILL between the checkpoints of steps 20 and 30."""
    run_dir = folder / "killed"
    with start_modules(TRAIN, [*arguments, "--run-dir", run_dir], 2) as running:
        running.wait_until(lambda: last_step(run_dir) > 20, timeout=120)
        for rank in (0, 1):
            running.kill(rank)
    assert runs.checkpoint_folder(run_dir, 20).is_dir()
    # Where steps are quick, the ranks may have got further before the signal.
    shutil.rmtree(runs.checkpoint_folder(run_dir, 30), ignore_errors=True)
    return run_dir


@pytest.fixture(scope="module")
def continued(folder, killed_run, whole_run, tiny_recipe, run_functions):
    """One world of two ranks: what became of copies of the killed run and of the whole one."""
    copies = {name: folder / name for name in ("truncated", "flipped", "changed")}
    for copy in copies.values():
        shutil.copytree(killed_run, copy)
    damage = {"truncated": lambda content: content[:-100], "flipped": flip_last_bit}
    for name, change in damage.items():
        file = runs.checkpoint_folder(copies[name], 20) / "state.safetensors"
        file.write_bytes(change(file.read_bytes()))
    finished = folder / "finished"
    shutil.copytree(whole_run, finished)

    zero3 = [DROPOUT, "backbone.sharding=zero3"]
    plan = {
        "truncated": ([*zero3, f"run_directory={copies['truncated']}"], True),
        "flipped": ([*zero3, f"run_directory={copies['flipped']}"], False),
        "changed": (
            [*zero3, f"run_directory={copies['changed']}", "optimizer.learning_rate=0.2"],
            False,
        ),
        "finished": ([*zero3, f"run_directory={finished}"], False),
        "empty": ([f"run_directory={folder / 'empty'}"], True),
        "two ranks, whole": ([f"run_directory={folder / 'two'}"], False),
        "two ranks, half": ([f"run_directory={folder / 'one'}", "steps=20"], False),
    }
    both = run_functions(
        carry_out,
        2,
        plan=list(plan.values()),
        recipe=tiny_recipe,
        ds_config=runs.PARTITION_EVERYTHING,
    )
    assert [said["error"] for said in both[0]] == [said["error"] for said in both[1]]
    return {name: {**said, "run": folder / name} for name, said in zip(plan, both[0], strict=True)}


def last_step(run_dir):
    lines = runs.metrics_without_time(run_dir, "train") if run_dir.exists() else []
    return lines[-1]["step"] if lines else 0


def flip_last_bit(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def assert_same_run(run_dir, reference):
    for name in STATE_FILES:
        ours, theirs = (runs.checkpoint_folder(run, 40) / name for run in (run_dir, reference))
        assert ours.read_bytes() == theirs.read_bytes(), name
    best = "prompt/best.safetensors"
    assert (run_dir / best).read_bytes() == (reference / best).read_bytes()
    assert runs.metrics_without_time(run_dir) == runs.metrics_without_time(reference)


def test_the_whole_run_trains_with_dropout(whole_run):
    losses = [line["loss"] for line in runs.metrics_without_time(whole_run, "train")]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    tensors = runs.checkpoint_tensors(whole_run, 40)
    assert not torch.equal(tensors["prompt"], runs.checkpoint_tensors(whole_run, 30)["prompt"])
    assert any(name.startswith("optimizer.") for name in tensors)
    random_states = read_checkpoint(runs.checkpoint_folder(whole_run, 40)).random_states
    assert not torch.equal(random_states["rank0.cpu"], random_states["rank1.cpu"])


@pytest.mark.drill("D1")
def test_forty_steps_are_twenty_kill_twenty(folder, killed_run, whole_run, arguments, run_modules):
    run_dir = folder / "resumed"
    shutil.copytree(killed_run, run_dir)
    outputs = run_modules(TRAIN, [*arguments, "--run-dir", run_dir, "--resume"], 2)
    assert "resuming after step 20" in outputs[0].stdout
    assert_same_run(run_dir, whole_run)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(continued, whole_run, damage):
    said = continued[damage]
    assert said["error"] == ""
    assert "corrupt-step-00000020" in said["warnings"]
    assert (said["run"] / "checkpoints" / "corrupt-step-00000020").is_dir()
    assert_same_run(said["run"], whole_run)


def test_a_changed_recipe_is_refused_with_both_values(continued, killed_run):
    said = continued["changed"]
    assert "optimizer.learning_rate: saved 0.3, now 0.2" in said["error"]
    assert "--fresh" in said["error"]
    for name in ("config.yaml", "metrics.jsonl"):
        assert (said["run"] / name).read_bytes() == (killed_run / name).read_bytes()


def test_resume_without_a_checkpoint_is_refused(continued):
    assert "holds no checkpoint" in continued["empty"]["error"]
    assert not runs.metrics_without_time(continued["empty"]["run"])


def test_a_finished_run_reports_again_without_training(continued, whole_run):
    assert continued["finished"]["error"] == ""
    finished = continued["finished"]["run"]
    assert_same_run(finished, whole_run)
    for name in ("results.json", "report.md"):
        again = finished / name
        # Both name the prompt's file.
        assert (
            again.read_text().replace(str(finished), str(whole_run))
            == (whole_run / name).read_text()
        )
        assert again.stat().st_mtime_ns > (whole_run / name).stat().st_mtime_ns


def test_two_ranks_continue_on_one_equal_to_rounding(continued, folder, tiny_recipe):
    assert not continued["two ranks, whole"]["error"]
    train(load_recipe(TuneConfig, tiny_recipe, [f"run_directory={folder / 'one'}"]))
    one, two = (runs.metrics_without_time(folder / name, "train") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 41))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], abs=1e-5)
    tensors, expected = (runs.checkpoint_tensors(folder / name, 40) for name in ("one", "two"))
    torch.testing.assert_close(tensors["prompt"], expected["prompt"], rtol=0, atol=1e-5)
