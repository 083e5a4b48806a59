import pytest

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.config import TuneConfig
from softprompt_dist.recipe import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_passes_the_config(name):
    kind = AdaptConfig if name.startswith("adapt-") else TuneConfig
    assert load_recipe(kind, name).name == name


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
