"""What a user of `softprompt adapt` can get wrong: one message with value, rule and remedy."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from softprompt_dist import adapt
from tests import adaptations
from tests.corpora import contents
from tests.messages import assert_message

pytestmark = pytest.mark.usefixtures("lone_process")


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    adaptations.make_quick(monkeypatch, tmp_path / "cache")


def without_outcome(run_dir):
    """What lies in a run directory, but for the files that say how the latest attempt ended."""
    names = {"DONE", "why", "heartbeat.json"}
    return {name: content for name, content in contents(run_dir).items() if name not in names}


@pytest.fixture
def refused(said, tmp_path):
    """`refused(*arguments, **changes)`: what the verb says; it must leave nothing of a run.

    But for the reason, which tells a batch script that it need not try again.
    """

    def outcome(*arguments, **changes):
        run_dir = tmp_path / "run"
        before, was_done = without_outcome(run_dir), (run_dir / "DONE").exists()
        recipe = adaptations.write_recipe(tmp_path, adaptations.recipe_values(tmp_path, **changes))
        found = said(adapt.main, "--recipe", recipe, "--run-dir", run_dir, *arguments)
        assert without_outcome(run_dir) == before
        if (run_dir / "why").exists() and "--export" not in arguments:
            assert (run_dir / "why").read_text().startswith("fatal: ")
            assert (run_dir / "DONE").exists() == was_done
        return found

    return outcome


@pytest.fixture
def finished(said, tmp_path):
    """Folder of a run of two steps."""
    values = adaptations.recipe_values(tmp_path, steps=2)
    recipe = adaptations.write_recipe(tmp_path, values)
    assert said(adapt.main, "--recipe", recipe, "--run-dir", tmp_path / "run")[0] == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"learning_rat": 1.0}, ["'learning_rat'", "Did you mean 'learning_rate'?"]),
        ({"dtype": "fp16"}, ["dtype", "'fp16'", "use bf16"]),
        ({"inputs_length": 4}, ["inputs_length", "greater than or equal to 8", "(found 4)"]),
        ({"init": "from_checkpoint"}, ["`backbone` must name a checkpoint", "--set backbone="]),
        ({"tokenizer": None}, ["init is from_config", "`tokenizer`"]),
        ({"corpus": []}, ["corpus", "at least 1 item"]),
        ({"batch": {"global_batch_size": 10, "micro_batch_size": 4}},
         ["global_batch_size is 10", "1 ranks", "global_batch_size=12"]),
        ({"inputs_length": 9}, ["inputs_length 9", "one whole span", "Set inputs_length to 10"]),
        ({"inputs_length": 128}, ["targets of 29 tokens", "is 16", "Set targets_length to"]),
        ({"batch": {"global_batch_size": 6000, "micro_batch_size": 6}},
         ["examples: fewer than the 6,000 rows of one batch need", "Give more text"]),
        ({"objective": "prefix_lm", "packing": "complementary_pairs", "targets_length": 32},
         ["inputs_length is 16 and targets_length 32", "Set both to 32"]),
        ({"objective": "lm"}, ["objective is lm", "encoder-decoder", "Set objective to prefix_lm"]),
        ({"corpus": ["missing.txt"]}, ["missing.txt"]),
        ({"tokenizer": "no/such/folder"}, ["no/such/folder"]),
        ({"engine": {"zero_stage": 0, "offload_optimizer": "cpu"}}, ["offload_optimizer", "stage"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_recipe_that_cannot_work(refused, changes, parts):
    assert_message(refused(**changes), *parts)


def test_a_file_of_short_texts_that_makes_no_example(refused, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("two words\n")
    assert_message(refused(corpus=[str(short)]), "not one example", "Give more text")
    short.write_text(" \n\n")
    assert_message(refused(corpus=[str(short)]), "short.txt")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"optimizer": {"type": "Adam"}}, ["'optimizer'", "belongs to the recipe", "Remove it"]),
        ({"fp16": {"enabled": True}}, ["fp16", "overflow", "se bf16"]),
        ({"zero_optimization": {"stage": "3"}}, ["stage", "'3'", "must be a number"]),
        (["zero"], ["must be a JSON object"]),
    ],
    ids=str,
)
def test_a_ds_config_that_cannot_be(refused, tmp_path, values, parts):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    assert_message(refused("--deepspeed_config", path), *parts)


def test_a_ds_config_that_is_no_json(refused, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text("{")
    assert_message(refused("--deepspeed_config", path), "ds.json")
    assert_message(refused("--deepspeed_config", tmp_path / "none.json"), "none.json")


def test_an_objective_of_encoder_decoders_for_a_decoder(refused, tiny_llama):
    outcome = refused(init="from_checkpoint", backbone=str(tiny_llama), objective="prefix_lm")
    assert_message(outcome, "objective is prefix_lm", "decoder-only", "Set objective to lm")


def test_a_tokenizer_larger_than_the_embedding(refused, tiny_t5):
    outcome = refused(
        init="from_checkpoint",
        backbone=str(tiny_t5),
        tokenizer=str(adaptations.TOKENIZER),
        objective="prefix_lm",
    )
    assert_message(outcome, "The tokenizer has", "beyond the 256 rows", "Set `tokenizer`")


@pytest.mark.parametrize("lacks", ["head", "gate"])
def test_a_t5_of_the_first_version(refused, tiny_t5, tmp_path, lacks):
    folder = Path(shutil.copytree(tiny_t5, tmp_path / "t5"))
    if lacks == "gate":
        config = json.loads((folder / "config.json").read_text())
        relu = {"feed_forward_proj": "relu", "is_gated_act": False, "dense_act_fn": "relu"}
        (folder / "config.json").write_text(json.dumps(config | relu))
    else:
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = refused(
        init="from_checkpoint", backbone=str(folder), tokenizer=None, objective="prefix_lm"
    )
    assert_message(outcome, "not a whole T5 v1.1", "gated", "Set `backbone`")


def change_weights(folder, change):
    """Load, change and write."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_a_t5_with_two_embedding_tables(refused, tiny_t5, tmp_path):
    def split(weights):
        table = weights.pop("shared.weight")
        names = (f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder"))
        return weights | {name: table + i for i, name in enumerate(names)}

    folder = Path(shutil.copytree(tiny_t5, tmp_path / "two"))
    change_weights(folder, split)
    outcome = refused(
        init="from_checkpoint", backbone=str(folder), tokenizer=None, objective="prefix_lm"
    )
    assert_message(outcome, folder, "decoder.embed_tokens.weight", "which are different")


def test_a_backbone_that_holds_nan(refused, tiny_t5, tmp_path):
    def break_a_row(weights):
        weights["shared.weight"][7, 3] = float("nan")
        return weights

    folder = Path(shutil.copytree(tiny_t5, tmp_path / "nan"))
    change_weights(folder, break_a_row)
    outcome = refused(
        init="from_checkpoint", backbone=str(folder), tokenizer=None, objective="prefix_lm"
    )
    assert_message(outcome, folder, "holds NaN", "row 7 of shared.weight", "fetch it again")


def test_a_tied_decoder_whose_stored_head_is_another(refused, tiny_llama, tmp_path):
    def give_a_head(weights):
        return weights | {"lm_head.weight": weights["model.embed_tokens.weight"] * 2}

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    change_weights(folder, give_a_head)
    outcome = refused(init="from_checkpoint", backbone=str(folder), tokenizer=None, objective="lm")
    assert_message(outcome, folder, "lm_head.weight", "Set tie_word_embeddings to false")


def test_a_backbone_that_is_not_there(refused):
    outcome = refused(init="from_checkpoint", backbone="no/such/folder/at/all")
    assert_message(outcome, "no/such/folder/at/all")


@pytest.mark.parametrize("option", ["--resume", "--export"])
def test_options_that_need_a_checkpoint(refused, tmp_path, option):
    arguments = ["--export", tmp_path / "out"] if option == "--export" else [option]
    assert_message(refused(*arguments), "holds no checkpoint", "--run-dir")
    assert not (tmp_path / "out").exists()


def test_steps_that_are_done_already(refused, finished):
    assert_message(refused(steps=1), "steps is 1", "has done 2 already", "Raise steps", "--fresh")


def test_an_export_into_a_folder_with_something_in_it(refused, finished, tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    outcome = refused("--export", folder, steps=2)
    assert_message(outcome, "kept is not empty", "Remove or rename it")
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert len(list(folder.iterdir())) == 1


def test_an_export_folder_in_the_way_is_said_before_the_first_step(refused, tmp_path):
    folder = tmp_path / "run" / "export"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    assert_message(refused(), "export is not empty", "--run-dir")


def test_another_recipe_than_the_checkpoints(refused, finished):
    outcome = refused(steps=4, learning_rate=0.5)
    assert_message(outcome, "learning_rate: saved 0.02, now 0.5", "--fresh")
