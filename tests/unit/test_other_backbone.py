"""A prompt or a run that meets another backbone: refused with both values, in every verb."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from softprompt_dist import evaluate, inspect, predict, train
from softprompt_dist.backbone import load
from softprompt_dist.config import TuneConfig
from softprompt_dist.durable import digest_of
from softprompt_dist.metrics.results import read_result
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run import session
from softprompt_dist.run.checkpoint_format import (
    MANIFEST,
    RANDOM_STATES,
    STATE,
    TENSORS,
    encode_manifest,
)
from tests import runs
from tests.messages import Said, assert_message
from tests.models import make_llama, save_model
from tests.unit.test_identity import copy_with, with_dealt_out_pieces, with_keys
from tests.unit.test_wording import byte_level

pytestmark = pytest.mark.usefixtures("lone_process")

EPSILON = with_keys(layer_norm_epsilon=0.1)
OTHERS = {
    "a field of the config": (EPSILON, ["layer_norm_epsilon: 1e-06 there, 0.1 here"]),
    "the vocabulary": (with_dealt_out_pieces, ["tokenizer.vocabulary: ", "tokenizer.ids_of_probe"]),
}


@pytest.fixture(scope="module")
def tuned(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a run of two steps."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    session.train(load_recipe(TuneConfig, tiny_recipe, [f"run_directory={run_dir}", "steps=2"]))
    return run_dir


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest, tiny_t5: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Another backbone with the same weights, and how it is said to differ."""
    change, messages = OTHERS[request.param]
    return copy_with(tiny_t5, tmp_path / "other", change), [*messages, "--force"]


@pytest.mark.drill("D38")
def test_every_verb_refuses_another_backbone_unless_forced(
    said: Said,
    tuned: Path,
    other: tuple[Path, list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, messages = other
    prompt, run_dir = tuned / "prompt" / "best.safetensors", tmp_path / "run"
    shutil.copytree(tuned, run_dir)
    here = ["--set", f"backbone.path={folder}"]
    row = runs.write_rows(tmp_path / "rows.jsonl", [{"text": "we saw a green apple"}])
    to = ["--input", str(row), "--output", str(tmp_path / "out.jsonl")]
    run = ["--recipe", str(run_dir / "config.yaml"), "--run-dir", str(run_dir), "--resume"]
    verbs = {
        evaluate: ["--prompt", str(prompt), *here],
        predict: ["--prompt", str(prompt), *here, *to],
        inspect: [str(prompt), "--backbone", str(folder)],
        train: [*run, "--steps", "4", *here],
    }
    for verb, arguments in verbs.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load, "fill", None)  # no weight is read for a message
            assert_message(said(verb.main, *arguments), *messages)
        caplog.clear()
        assert said(verb.main, *arguments, "--force")[0] == 0
        assert caplog.text.count(messages[0]) == 1


def test_a_prompt_file_to_begin_with_must_be_of_this_backbone(
    said: Said, tuned: Path, other: tuple[Path, list[str]], tiny_recipe: Path, tmp_path: Path
) -> None:
    folder, messages = other
    begin = ["prompt.initialisation=file", f"prompt.file={tuned / 'prompt/best.safetensors'}"]
    settings = [*begin, f"backbone.path={folder}", "steps=1"]
    arguments = ["--recipe", str(tiny_recipe), "--run-dir", str(tmp_path / "run")]
    arguments += [word for setting in settings for word in ("--set", setting)]
    assert_message(said(train.main, *arguments), *messages)
    assert said(train.main, *arguments, "--force")[0] == 0


def test_results_tell_which_backbone_answered_and_in_which_precision(
    said: Said, tuned: Path, tmp_path: Path
) -> None:
    there = runs.prompt_metadata(tuned / "prompt" / "best.safetensors")["identity"]
    arguments = ["--prompt", str(tuned / "prompt" / "best.safetensors"), "--output", str(tmp_path)]
    assert said(evaluate.main, *arguments, "--set", "backbone.dtype=bf16")[0] == 0
    found = json.loads((tmp_path / "results.json").read_text())["identity"]
    assert found == there | {"dtype": "bf16"}
    assert found["config"]["layer_norm_epsilon"] == 1e-6
    assert found["tokenizer"]["pieces"] == runs.VOCABULARY - 28
    assert there["dtype"] == "fp32"
    earlier = json.loads((tuned / "results.json").read_text())
    assert earlier.pop("identity") == there
    (tmp_path / "results.json").write_text(json.dumps(earlier | {"of_a_later_release": 1}))
    assert read_result(tmp_path).identity is None


def test_a_checkpoint_of_release_0_1_is_compared_by_its_weights(
    said: Said, tuned: Path, tiny_t5: Path, lively_t5: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(tuned, run_dir)
    as_release_0_1(run_dir)
    arguments = ["--recipe", str(run_dir / "config.yaml"), "--run-dir", str(run_dir), "--resume"]
    arguments += ["--steps", "3", "--set"]
    outcome = said(train.main, *arguments, f"backbone.path={lively_t5}")
    assert_message(outcome, "weights: ", " there, ", "--force")
    assert said(train.main, *arguments, f"backbone.path={tiny_t5}")[0] == 0


def test_a_mixture_of_release_0_1_goes_on(
    said: Said, tiny_t5: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """And not with a task less."""
    sides = runs.task("sides", runs.write_splits(tmp_path, runs.SIDES), runs.SIDES)
    recipe = runs.tiny_recipe(tiny_t5, tiny_data) | {"steps": 2, "mixture": {"tasks": [sides]}}
    run_dir = tmp_path / "run"
    path = runs.write_recipe(tmp_path / "recipe.yaml", recipe)
    session.train(load_recipe(TuneConfig, path, [f"run_directory={run_dir}"]))
    as_release_0_1(run_dir)
    arguments = ["--recipe", str(path), "--run-dir", str(run_dir), "--resume", "--steps", "3"]
    fewer = said(train.main, *arguments, "--set", "mixture.tasks=[]")
    assert_message(fewer, "mixture.tasks: saved 1, now 0", "--fresh")
    assert said(train.main, *arguments)[0] == 0


def test_a_run_of_release_0_1_reads_no_rows_in_another_way(
    said: Said, tiny_data: Path, tmp_path: Path
) -> None:
    """It put nothing before inputs and targets; of a decoder-only backbone that must be said."""
    tokenizer = byte_level(adds_bos=True)
    folder = save_model(make_llama(len(tokenizer)), tmp_path / "llama")
    tokenizer.save_pretrained(folder)
    path = runs.write_recipe(
        tmp_path / "recipe.yaml", runs.tiny_recipe(folder, tiny_data) | {"steps": 2}
    )
    as_it_did, run_dir = (
        ["backbone.prepend_bos=false", 'task.target_separator=""'],
        tmp_path / "run",
    )
    session.train(load_recipe(TuneConfig, path, [f"run_directory={run_dir}", *as_it_did]))
    as_release_0_1(run_dir)
    arguments = ["--recipe", str(path), "--run-dir", str(run_dir), "--resume", "--steps", "3"]
    keys = ("backbone.prepend_bos: saved False", "task.target_separator: saved ''")
    assert_message(said(train.main, *arguments), *(f"{key}, now None" for key in keys))
    sets = [word for setting in as_it_did for word in ("--set", setting)]
    assert said(train.main, *arguments, *sets)[0] == 0


def as_release_0_1(run_dir: Path) -> None:
    """Its checkpoint of step 2 with the keys that release 0.1.0 wrote."""
    folder = runs.checkpoint_folder(run_dir, 2)
    document = json.loads((folder / STATE).read_text())
    state = document["state"]
    state["backbone_fingerprint"] = state.pop("identity")["weights"]
    del state["recipe"]["backbone"]["prepend_bos"]
    for task in (state["recipe"]["task"], *state["recipe"]["mixture"]["tasks"]):
        del task["target_separator"]
    (folder / STATE).write_text(json.dumps(document))
    names = (TENSORS, RANDOM_STATES, STATE)
    digests = {name: digest_of((folder / name).read_bytes()) for name in names}
    (folder / MANIFEST).write_bytes(encode_manifest(2, digests))
