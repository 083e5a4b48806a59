import pytest

from softprompt_dist.config import OptimizerConfig, TuneConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run.optimizer import learning_rate_at


def test_the_rate_is_constant_unless_asked_otherwise():
    config = OptimizerConfig(learning_rate=0.3)
    assert {learning_rate_at(config, update) for update in (0, 1, 29_999)} == {0.3}


def test_linear_decay_reaches_zero_after_the_last_step_and_not_before():
    config = OptimizerConfig(learning_rate=0.2, linear_decay_steps=40)
    rates = [learning_rate_at(config, update) for update in range(40)]
    assert rates[0] == 0.2
    assert rates[20] == pytest.approx(0.1)
    assert rates[39] == pytest.approx(0.2 / 40)


def test_decay_and_warm_up_go_together():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, linear_decay_steps=100)
    assert learning_rate_at(config, 5) == pytest.approx(0.5 * 0.95)


def test_steps_at_a_rate_of_zero_are_refused():
    with pytest.raises(ConfigError, match="learning rate is 0 from step 40 on"):
        load_recipe(TuneConfig, "demo", ["steps=41", "optimizer.linear_decay_steps=40"])
