import pytest

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.errors import ConfigError
from softprompt_dist.recipe import check_values


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_only_the_clock_of_rsqrt_has_a_rate_of_its_own(schedule):
    with pytest.raises(ConfigError, match=f"schedule is '{schedule}'.*Set learning_rate"):
        check_values(AdaptConfig, {"corpus": ["text.txt"], "schedule": schedule})
    given = {"corpus": ["text.txt"], "schedule": schedule, "learning_rate": 0.01}
    assert check_values(AdaptConfig, given).learning_rate == 0.01
    assert check_values(AdaptConfig, {"corpus": ["text.txt"]}).learning_rate == 1.0
