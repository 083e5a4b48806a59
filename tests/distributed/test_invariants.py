"""What must hold in every run is checked in every run, and all ranks stop together."""

from unittest import mock

import launch
import pytest
import torch

from softprompt_dist.backbone.fingerprint import assert_unchanged, local_checksum
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import SoftpromptError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.equality import assert_same_on_all_ranks
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run import loop, saved_state
from softprompt_dist.run.checkpoint import CheckpointStore
from softprompt_dist.run.session import train
from softprompt_dist.run.step import accumulate_gradient
from softprompt_dist.run.tuning import assert_only_prompt_trains, build_tuning_run
from tests import runs


def caught(work):
    """Type and text of the error, and whether it says that all ranks have it; else None."""
    try:
        work()
    except SoftpromptError as error:
        return [type(error).__name__, str(error), error.on_all_ranks]
    return None


def nudge_on_rank_1(tensor):
    """The smallest change there is."""
    if ranks.rank() == 1:
        with torch.no_grad():
            first = tensor.view(-1)[:1]
            if first.is_floating_point():
                first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
            else:
                first.add_(1)


def draw_of_two_seeds(recipe):
    """What dropout would be drawn from, by a run of seed 0 and by one of seed 1."""
    drawn = []
    for seed in (0, 1):
        build_tuning_run(load_recipe(TuneConfig, recipe, [f"seed={seed}"]))
        drawn.append(torch.rand(4).tolist())
    return drawn


def test_no_rank_of_a_seed_draws_what_another_seed_s_does(run_on_ranks, tiny_recipe):
    first, second = run_on_ranks(draw_of_two_seeds, 2, recipe=tiny_recipe)
    drawn = [tuple(numbers) for numbers in (*first, *second)]
    assert len(set(drawn)) == 4
    again, _ = run_on_ranks(draw_of_two_seeds, 2, recipe=tiny_recipe)
    assert again == first


def break_prompt_equality(recipe, folder):
    run = build_tuning_run(load_recipe(TuneConfig, recipe))
    store = CheckpointStore(f"{folder}/store", keep_last=1)
    state = saved_state.restore(run, None)
    equal = caught(lambda: saved_state.save(run, state, store))
    nudge_on_rank_1(run.prompt.weight)
    state.step = 1
    differ = caught(lambda: saved_state.save(run, state, store))
    return {"equal": equal, "differ": differ}


def break_frozenness(recipe, ds_config):
    """Of a replicated and of a sharded backbone."""
    said = {}
    for sharding in ("replicated", "zero3"):
        config = load_recipe(TuneConfig, recipe, [f"backbone.sharding={sharding}"])
        run = build_tuning_run(config, ds_config if sharding == "zero3" else None)
        checksum = run.backbone_checksum
        said[f"{sharding}, still"] = caught(
            lambda r=run, c=checksum: assert_unchanged(r.backbone, c)
        )
        weight = next(iter(run.backbone.parameters()))
        nudge_on_rank_1(getattr(weight, "ds_tensor", weight))
        said[f"{sharding}, moved"] = caught(
            lambda r=run, c=checksum: assert_unchanged(r.backbone, c)
        )
        said[f"{sharding}, frozen"] = caught(lambda r=run: assert_only_prompt_trains(r))
        stray = torch.nn.Parameter(torch.ones(2))
        # Where modules() does not look, and where adapters of all kinds would be put.
        run.backbone.model.encoder.block[0].computation.layer[0].stray = stray
        said[f"{sharding}, trainable"] = caught(lambda r=run: assert_only_prompt_trains(r))
        checksum = local_checksum(run.backbone)
        nudge_on_rank_1(stray)
        said[f"{sharding}, stray moved"] = caught(
            lambda r=run, c=checksum: assert_unchanged(r.backbone, c)
        )
    return said


def move_the_backbone_during_a_run(recipe, folder):
    def tamper(backbone, *arguments, **options):
        nudge_on_rank_1(backbone.model.lm_head.flat)
        return accumulate_gradient(backbone, *arguments, **options)

    config = load_recipe(TuneConfig, recipe, [f"run_directory={folder}/moved", "steps=2"])
    with mock.patch.object(loop, "accumulate_gradient", tamper):
        return caught(lambda: train(config))


def break_everything(recipe, folder, ds_config):
    return {
        "prompts": break_prompt_equality(recipe, folder),
        "frozen": break_frozenness(recipe, ds_config),
        "moved": move_the_backbone_during_a_run(recipe, folder),
        "same": caught(lambda: assert_same_on_all_ranks({"a": 1}, "The data")),
        "not the same": caught(lambda: assert_same_on_all_ranks(ranks.rank() + 7, "The data")),
        "batches": caught(
            lambda: build_tuning_run(load_recipe(TuneConfig, recipe, ["batch.micro_batch_size=3"]))
        ),
    }


@pytest.fixture(scope="module")
def broken(tiny_recipe, run_functions, tmp_path_factory):
    """What every rank said when the invariants were broken one after the other."""
    folder = tmp_path_factory.mktemp("broken")
    both = run_functions(
        break_everything,
        2,
        recipe=tiny_recipe,
        folder=folder,
        ds_config=runs.PARTITION_EVERYTHING,
        timeout=120,
    )
    return {"both": both, "folder": folder}


def test_prompts_that_differ_are_never_saved(broken):
    for rank in (0, 1):
        said = broken["both"][rank]["prompts"]
        assert said["equal"] is None
        kind, text, on_all_ranks = said["differ"]
        assert (kind, on_all_ranks) == ("InvariantError", True)
        assert "The prompt differs from rank 0's on ranks [1]" in text
    assert [path.name for path in (broken["folder"] / "store").iterdir()] == ["step-00000000"]


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_a_backbone_that_moved_is_named_with_its_rank(broken, sharding):
    for rank in (0, 1):
        said = broken["both"][rank]["frozen"]
        assert said[f"{sharding}, still"] is None
        for what in ("moved", "stray moved"):
            kind, text, on_all_ranks = said[f"{sharding}, {what}"]
            assert (kind, on_all_ranks) == ("InvariantError", True)
            assert "changed on ranks [1]" in text


@pytest.mark.parametrize("sharding", ["replicated", "zero3"])
def test_only_the_prompt_may_train(broken, sharding):
    for rank in (0, 1):
        said = broken["both"][rank]["frozen"]
        assert said[f"{sharding}, frozen"] is None
        kind, text, _ = said[f"{sharding}, trainable"]
        assert kind == "InvariantError"
        assert "model.encoder.block.0.layer.0.stray" in text


def test_a_run_whose_backbone_moved_has_no_result(broken):
    for rank in (0, 1):
        kind, text, _ = broken["both"][rank]["moved"]
        assert kind == "InvariantError"
        assert "changed on ranks [1]" in text
    assert (broken["folder"] / "moved" / "metrics.jsonl").exists()
    assert not (broken["folder"] / "moved" / "results.json").exists()


def test_ranks_that_read_different_things_stop(broken):
    for rank in (0, 1):
        assert broken["both"][rank]["same"] is None
        kind, text, _ = broken["both"][rank]["not the same"]
        assert kind == "InvariantError"
        assert "The data on ranks [1] is 8, but on rank 0 7" in text


def test_a_batch_that_two_ranks_cannot_share_is_refused_by_both(broken):
    for rank in (0, 1):
        kind, text, on_all_ranks = broken["both"][rank]["batches"]
        assert (kind, on_all_ranks) == ("ConfigError", True)
        assert "2 ranks x batch.micro_batch_size 3 = 6" in text


@pytest.mark.drill("D14")
def test_a_loss_that_is_not_finite_stops_both_ranks_before_the_update(
    tiny_recipe, run_module_on_ranks, tmp_path
):
    run_dir = tmp_path / "run"
    outputs = run_module_on_ranks(
        "faults",
        ["--recipe", tiny_recipe, "--run-dir", run_dir],
        2,
        check=False,
        env=launch.with_fault("1 8 nan"),
    )
    assert [output.returncode for output in outputs] == [4, 4]
    last = runs.metrics_without_time(run_dir, "train")[-1]["step"]
    assert last == 7
    assert f"error: Step {last + 1}: The loss is nan" in outputs[0].stderr
    assert "Traceback" not in outputs[0].stderr + outputs[1].stderr
    assert "error" not in outputs[1].stderr

    newest = max((run_dir / "checkpoints").glob("step-*"))
    assert newest == runs.checkpoint_folder(run_dir, last)
    tensors = runs.checkpoint_tensors(run_dir, last)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (run_dir / "results.json").exists()
