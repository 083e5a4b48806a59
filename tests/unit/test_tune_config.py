"""From a recipe, overrides and a ds_config to one checked config."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.parallel.verb import VerbParser
from softprompt_dist.recipe import check_values, load_recipe, to_yaml
from softprompt_dist.run.options import tune_config
from softprompt_dist.run.tuning import check_world
from softprompt_dist.scheduling.pipeline_config import PipelineConfig
from softprompt_dist.section import Section
from softprompt_dist.yaml_reading import parse_yaml

RECIPE = """
name: mine
steps: 50
optimizer: {name: adamw, learning_rate: 0.01}
backbone: {path: some/folder, sharding: replicated}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def parse(*typed: str | Path) -> tuple[TuneConfig, dict[str, Any] | None]:
    """What the options of a verb become."""
    parser = VerbParser("tune", "Tune.")
    parser.add_recipe_options()
    return tune_config(parser.parse_args([str(word) for word in typed]))


def refusal(*overrides: str, recipe: Path | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        load_recipe(TuneConfig, recipe, overrides)
    return str(refused.value)


def write_json(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("step=3", "Unknown key 'step'. Did you mean 'steps'?"),
        ("prompt.lenght=3", "Unknown key 'prompt.lenght'. Did you mean 'prompt_length'?"),
        (
            "optimizer.learning_rat=0.1",
            "Unknown key 'optimizer.learning_rat'. Did you mean 'learning_rate'?",
        ),
        ("task.source.trian=a", "Unknown key 'task.source.trian'. Did you mean 'train'?"),
        ("promt.prompt_length=5", "Unknown key 'promt'. Did you mean 'prompt'?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(override: str, nearest: str) -> None:
    assert nearest in refusal(override)


def test_an_unknown_key_lists_the_known_ones_of_its_section() -> None:
    said = refusal("checkpoint.zzz=1")
    assert "Known keys here: every_steps, keep_last." in said
    assert "Did you mean" not in said


def test_all_problems_come_in_one_message(recipe: Path) -> None:
    recipe.write_text(RECIPE + "stepz: 3\nbatch: {global_batch_size: none}\nseed: -1\n")
    said = refusal("prompt.prompt_length=1001", recipe=recipe)
    assert str(recipe) in said
    for name in ("'stepz'", "batch.global_batch_size", "seed", "prompt.prompt_length"):
        assert name in said
    assert "1001" in said


@pytest.mark.parametrize(
    "override",
    [
        "steps=many",
        "steps=0",
        "steps=2.5",
        "steps=",
        "seed=-1",
        "prompt.prompt_length=0",
        "optimizer.learning_rate=0",
        "optimizer.learning_rate=[1, 2]",
        "optimizer.name=sgd",
        "backbone.sharding=zero2",
        "backbone.dropout=1.0",
        "task.labels=fruit",
        "backbone=folder",
        "name=../elsewhere",
        "evaluation.method=beam",
    ],
)
def test_a_wrong_value_is_refused_with_key_and_value(override: str) -> None:
    key, _, value = override.partition("=")
    said = refusal(override)
    assert key in said
    assert value in said or not value


@pytest.mark.parametrize("override", ["steps", "=3", "steps.x=3", "task.labels={a", ""])
def test_an_override_of_the_wrong_form_is_refused(override: str, recipe: Path) -> None:
    assert repr(override) in refusal(override, recipe=recipe)


def test_overrides_reach_nested_keys_and_leave_their_neighbours(recipe: Path) -> None:
    overrides = [
        "optimizer.learning_rate=1e-3",
        "evaluation.every_steps=7",
        "task.labels={'0': bad, '1': good}",
        "steps=9",
        "steps=10",
    ]
    config = load_recipe(TuneConfig, recipe, overrides)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 1e-3)
    assert config.evaluation.every_steps == 7
    assert config.task.labels == {"0": "bad", "1": "good"}
    assert config.steps == 10


def test_precedence_is_command_line_recipe_default(recipe: Path) -> None:
    default = TuneConfig()
    config, _ = parse("--recipe", recipe, "--set", "steps=60")
    assert (default.steps, config.steps) == (30000, 60)
    assert (default.optimizer.learning_rate, config.optimizer.learning_rate) == (0.3, 0.01)
    assert config.batch == default.batch


def test_the_run_directory_is_named_after_the_run_unless_given(recipe: Path) -> None:
    assert parse("--recipe", recipe)[0].run_directory == "runs/mine"
    assert parse("--recipe", recipe, "--set", "run_directory=here")[0].run_directory == "here"


@pytest.mark.parametrize(
    "name", ["here", "20261123", "null", "a: b", "c #d", "a~", "yes", "'e", "1e3"]
)
def test_a_path_on_the_command_line_is_taken_as_typed(recipe: Path, name: str) -> None:
    config, _ = parse("--recipe", recipe, "--set", "run_directory=there", "--run-dir", name)
    assert config.run_directory == name


@pytest.mark.parametrize("text", ["- a\n- b\n", "name: [", "just words", "\tname: x"])
def test_a_recipe_that_is_no_mapping_is_refused(recipe: Path, text: str) -> None:
    recipe.write_text(text)
    assert str(recipe) in refusal(recipe=recipe)


def test_a_recipe_in_another_encoding_is_refused(recipe: Path) -> None:
    recipe.write_bytes("name: \xe9".encode("latin-1"))
    assert str(recipe) in refusal(recipe=recipe)


def test_an_empty_recipe_is_all_defaults(recipe: Path) -> None:
    recipe.write_text("")
    assert load_recipe(TuneConfig, recipe) == TuneConfig()


def test_a_missing_recipe_names_the_nearest_and_all() -> None:
    said = refusal(recipe=Path("demo-t6"))
    assert "Did you mean 'demo-t5'?" in said
    assert "t5-xxl-superglue-boolq" in said


def test_a_config_survives_yaml(tmp_path: Path) -> None:
    overrides = [
        "task.labels={'1': 'ja: été', 'no': 'null'}",
        "task.input_template='{a} #{b}'",
        "optimizer.clipping_threshold=null",
        "optimizer.betas=[0.8, 0.95]",
        "run_directory='20261123'",
        "optimizer.weight_decay=1e-05",
    ]
    config = load_recipe(TuneConfig, None, overrides)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load_recipe(TuneConfig, saved) == config
    assert config != TuneConfig()


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TuneConfig().steps = 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt.initialisation=text"], "prompt.text must be given"),
        (["prompt.initialisation=file"], "prompt.file must be given"),
        (["prompt.text=hello"], "Set prompt.initialisation=text"),
        (["prompt.file=p.safetensors"], "Set prompt.initialisation=file"),
        (["mixture.rates=equal"], "there is nothing to mix"),
        (["mixture.maximum=9"], "there is nothing to mix"),
        (["mixture={rates: equal, temperature: 2, tasks: [{name: b}]}"], "temperature do nothing"),
        (["task.source.revision=v1"], "revision is 'v1', but kind is 'files'"),
        (["task.source={kind: files, subset: a}"], "subset is 'a', but kind is 'files'"),
    ],
)
def test_keys_that_belong_together(overrides: list[str], message: str) -> None:
    assert message in refusal(*overrides)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (
            TuneConfig,
            """run_directory deepspeed_config backbone.path backbone.offload_path prompt.file
            task.source.path task.source.train task.source.validation task.source.test
            task.source.name""",
        ),
        (AdaptConfig, "run_directory backbone tokenizer corpus validation_corpus"),
        (PipelineConfig, "directory scripts tune.recipe tune.deepspeed_config"),
    ],
)
def test_a_path_may_begin_at_home(
    kind: type[Section], keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    given = {
        AdaptConfig: {"corpus": ["a"]},
        PipelineConfig: {"name": "p", "tune": {"recipe": "r", "tasks": ["cb"]}},
    }
    for key in keys.split():
        shown = ["~/x*2"] if "corpus" in key else "~/x"
        needed = {"prompt.file": ["prompt.initialisation=file"]}.get(key, [])
        needed += ["backbone.offload=nvme"] if "offload" in key else []
        config: Any = check_values(
            kind, copy.deepcopy(given.get(kind, {})), [*needed, f"{key}={json.dumps(shown)}"]
        )
        for name in key.split("."):
            config = getattr(config, name)
        assert (config[0] if "corpus" in key else config).startswith("/home/of/mine/x")


@pytest.mark.parametrize(
    ("recipe", "override", "told"),
    [
        ('task: {labels: {"0": no}}', "", 'true or false, as are yes, no, .* in quotes: 0: "no"'),
        ("task: {labels: {0: a}}", "", 'a number. Put text in quotes: "0": text'),
        ("task: {labels: {yes: a}}", "", 'quotes: "yes": text'),
        ("{}", "name=2024-01-01", "a date.* --set 'name=\"...\"'"),
        ("{}", "task.input_template=premise: {text}", "a mapping.*'task.input_template=\"...\"'"),
        ("{}", "backbone.offload=off", 'true or false.*: offload: "no"'),
    ],
)
def test_what_yaml_takes_for_something_else_than_text_is_told(
    recipe: str, override: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        check_values(TuneConfig, parse_yaml(recipe), [override] if override else [])


def test_a_corpus_is_required_to_adapt() -> None:
    with pytest.raises(ConfigError, match="corpus"):
        load_recipe(AdaptConfig, None)


@pytest.mark.parametrize(
    ("total", "micro", "world", "works"),
    [(32, 4, 1, True), (32, 4, 8, True), (32, 4, 3, False), (32, 5, 1, False), (8, 4, 4, False)],
)
def test_ranks_must_divide_the_global_batch(
    total: int, micro: int, world: int, works: bool
) -> None:
    batch = [f"batch.global_batch_size={total}", f"batch.micro_batch_size={micro}"]
    config = load_recipe(TuneConfig, None, batch)
    if works:
        check_world(config, world)
        return
    with pytest.raises(ConfigError) as refused:
        check_world(config, world)
    said = str(refused.value)
    assert f"batch.global_batch_size is {total}" in said
    assert f"{world} ranks x batch.micro_batch_size {micro} = {micro * world}" in said
    advised = int(said.partition("Use batch.global_batch_size=")[2].partition(",")[0])
    assert advised >= total
    check_world(
        load_recipe(TuneConfig, None, [f"batch.global_batch_size={advised}", batch[1]]), world
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batch_size": 32}, "batch.global_batch_size"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "batch.micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "batch.global_batch_size"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.name"),
        ({"scheduler": {"type": "WarmupLR"}}, "optimizer.warmup_steps"),
        ({"gradient_clipping": 1.0}, "optimizer.clipping_threshold"),
        ({"fp16": {"enabled": True}}, "bf16"),
        ({"zero_optimization": {"stage": 1}}, "Use 3 (sharded) or 0 (replicated)"),
        ({"zero_optimization": {"stage": 2}}, "Use 3 (sharded) or 0 (replicated)"),
        ({"zero_optimization": {"stage": "three"}}, "Use 3 (sharded) or 0 (replicated)"),
        ({"zero_optimization": 3}, "zero_optimization"),
        ({"bf16": True}, "bf16"),
        ({"fp16": True}, "fp16"),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}},
            "zero_optimization.stage3_prefetch_bucket_size",
        ),
        ([], "must be a JSON object"),
    ],
)
def test_a_ds_config_that_does_not_fit_is_refused(
    recipe: Path, tmp_path: Path, values: object, message: str
) -> None:
    path = write_json(tmp_path / "ds.json", values)
    with pytest.raises(ConfigError) as refused:
        parse("--recipe", recipe, "--deepspeed_config", path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_ds_config_that_is_not_json_is_refused(
    recipe: Path, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        parse("--recipe", recipe, "--deepspeed_config", path)
    with pytest.raises(ConfigError, match="Cannot read"):
        parse("--recipe", recipe, "--deepspeed_config", tmp_path / "none.json")


def test_a_ds_config_names_all_its_problems_at_once(recipe: Path, tmp_path: Path) -> None:
    values = {"train_batch_size": 8, "fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    path = write_json(tmp_path / "ds.json", values)
    with pytest.raises(ConfigError, match=r"(?s)train_batch_size.*fp16.*stage 2"):
        parse("--recipe", recipe, "--deepspeed_config", path)


@pytest.mark.parametrize(
    ("values", "sharding", "dtype"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero3", "fp32"),
        ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, "zero3", "bf16"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}, "replicated", "fp32"),
        ({}, "replicated", "fp32"),
    ],
)
def test_the_ds_config_decides_sharding_and_dtype(
    recipe: Path, tmp_path: Path, values: dict[str, Any], sharding: str, dtype: str
) -> None:
    path = write_json(tmp_path / "ds.json", values)
    other = "replicated" if sharding == "zero3" else "zero3"
    config, engine = parse(
        "--recipe", recipe, "--set", f"backbone.sharding={other}", "--deepspeed_config", path
    )
    assert (config.backbone.sharding, config.backbone.dtype) == (sharding, dtype)
    assert config.deepspeed_config == str(path)
    assert engine == values


def test_greedy_answers_must_have_an_end() -> None:
    said = refusal("evaluation.method=greedy", "task.append_eos=false")
    assert "evaluation.method=rank or task.append_eos=true" in said
    for allowed in ("evaluation.method=greedy", "task.append_eos=true"):
        load_recipe(TuneConfig, None, [allowed])
    load_recipe(TuneConfig, None, ["evaluation.method=rank", "task.append_eos=false"])
