import pytest

from softprompt_dist.adapt_stages import is_adaptation, load_stages
from softprompt_dist.adaptation.learning_rate import learning_rate_at
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.planning.adaptation import DEFAULT_STEPS, DEFAULT_TOKENS, PRESETS, rows_of
from softprompt_dist.recipe import load_recipe, recipe_names

OWN = ["backbone=google/t5-v1_1-small", "corpus=[tokens]"]
"""What a preset leaves to its user."""


def own_of(name):
    return OWN if name in PRESETS else []


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_passes_the_config(name):
    if is_adaptation(name):
        assert load_stages(name, own_of(name))[0].name.startswith(name)
    else:
        assert load_recipe(TuneConfig, name).name == name


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_s_kind_is_known_by_its_keys(name):
    assert is_adaptation(name) == (name in {"tiny-t5", "tiny-t5-long", *PRESETS})


def test_overrides_tell_the_kind_where_a_recipe_does_not(tmp_path):
    recipe = tmp_path / "short.yaml"
    recipe.write_text("steps: 3\n")
    assert not is_adaptation(str(recipe))
    assert is_adaptation(str(recipe), ["corpus=[text.txt]"])
    recipe.write_text("stages: {a: {}}\n")
    assert is_adaptation(str(recipe))
    recipe.write_text("corpus: [text.txt]\ntask: {}\nprompt: {}\n")
    assert not is_adaptation(str(recipe)), "most keys decide, so that one too many can be named"


def test_the_recipes_of_the_readme_are_shipped():
    shipped = {"demo", "demo-t5", "t5-xxl-superglue-boolq", "t5-base-sst2"}
    assert shipped <= set(recipe_names())


def test_the_paper_recipe_has_the_papers_settings():
    config = load_recipe(TuneConfig, "t5-xxl-superglue-boolq")
    assert config.prompt.prompt_length == 100
    assert config.prompt.initialisation == "class_labels"
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adafactor", 0.3)
    assert (config.optimizer.weight_decay, config.optimizer.decay_rate) == (1e-5, 0.8)
    assert config.optimizer.start_step == 1_100_000
    assert (config.batch.global_batch_size, config.steps) == (32, 30000)
    assert (config.backbone.dropout, config.z_loss) == (0.1, 1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_of_lm_adaptation_has_the_papers_settings(name):
    (config,) = load_stages(name, OWN)
    lengths = (config.inputs_length, config.targets_length)
    assert lengths == PRESETS[name]
    assert config.batch.global_batch_size == rows_of(DEFAULT_TOKENS, *lengths)
    assert (config.objective, config.packing) == ("prefix_lm", "greedy")
    assert (config.steps, config.export.steps) == (DEFAULT_STEPS, [10_000, 50_000])
    assert config.export.dtypes == ["fp32", "bf16"]
    assert (config.optimizer, config.z_loss, config.dropout) == ("adafactor", 1e-4, 0.0)
    assert (config.max_gradient_norm, config.weight_decay, config.dtype) == (None, 0.0, "bf16")


@pytest.mark.parametrize(
    ("update", "rate"), [(0, 0.001), (10_000, 0.000995), (50_000, 0.000976), (100_000, 0.000953)]
)
@pytest.mark.parametrize("name", PRESETS)
def test_the_learning_rate_of_a_preset_goes_on_from_a_million_steps(name, update, rate):
    (config,) = load_stages(name, OWN)
    assert round(learning_rate_at(config, update), 6) == rate
    (decaying,) = load_stages(name, [*OWN, "decay_steps=10000"])
    expected = rate if update <= 90_000 else 0.0
    assert round(learning_rate_at(decaying, update), 6) == expected


def test_the_presets_differ_in_their_rows_only():
    first, second = (load_stages(name, OWN)[0].model_dump() for name in PRESETS)
    different = {key for key in first if first[key] != second[key]}
    assert different == {"name", "run_directory", "inputs_length", "targets_length", "batch"}


def test_pairs_are_a_way_to_run_the_preset_with_equal_sides():
    overrides = ["packing=complementary_pairs", "batch.global_batch_size=1024"]
    (config,) = load_stages("paper-512-512", [*OWN, *overrides])
    assert config.inputs_length == config.targets_length


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_asks_for_its_corpus_and_its_backbone(name):
    with pytest.raises(
        ConfigError, match=r"corpus is missing.*--set corpus='\[\.\.\.\]'.*corpus build"
    ):
        load_stages(name, OWN[:1])
    with pytest.raises(ConfigError, match="--set backbone=google/t5-v1_1-base, or a folder"):
        load_stages(name, OWN[1:])
