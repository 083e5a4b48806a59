"""What an adaptation makes of a ds_config: DeepSpeed's settings, or a message."""

import json

import pytest

from softprompt_dist.adapt_config import AdaptConfig, EngineConfig
from softprompt_dist.adaptation.engine_config import apply_ds_config, engine_config, read_ds_config
from softprompt_dist.errors import ConfigError

CONFIG = AdaptConfig(backbone="unused", corpus=["unused"])


def zero(**settings):
    return {"zero_optimization": {"stage": 2} | settings}


@pytest.fixture
def settings_of(tmp_path):
    """What DeepSpeed is given for a ds_config, on one rank."""

    def settings(values):
        path = tmp_path / "ds_config.json"
        path.write_text(json.dumps(values))
        read = read_ds_config(path)
        return engine_config(apply_ds_config(CONFIG, read), read, 1)

    return settings


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"zero_optimization": 2}, "sets 'zero_optimization' to 2; it must be an object"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": True}},
            "offload_optimizer' to True",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "must be an object"),
        ({"zero_optimization": {"stage": 3, "offload_param": [1]}}, "must be an object"),
        ({"zero_optimization": {"stage": "two"}}, "stage' to 'two'; it must be a number"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "nvme|'cpu'",
        ),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "Did you mean 'overlap_comm'"),
        ({"bf16": False}, "sets 'bf16' to False; it must be an object"),
        ({"bf16": {"enabled": "false"}}, "bf16.enabled' to 'false'; it must be true or false"),
        ({"fp16": {"enabled": True}}, "sets fp16.enabled to fp16, .* Use bf16"),
        ({"communication_data_type": "fp16"}, "communication_data_type to fp16"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, "data_types.grad_accum_dtype to fp16"),
        ({"communication_data_type": "float9"}, "DeepSpeed refuses it: .*float9"),
        ({"activation_checkpointing": 3}, "DeepSpeed refuses it"),
        ({"amp": {"enabled": True}}, "DeepSpeed refuses it"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "'torch_autocast'.* dtype"),
        ({"tensor_parallel": {"autotp_size": 2}}, "'tensor_parallel'.*Remove it"),
        ({"gradient_allreduce_op": "sum"}, "'gradient_allreduce_op'.*Remove it"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(settings_of, values, expected):
    with pytest.raises(ConfigError, match=expected):
        settings_of(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [("mics_shard_size", 2), ("zero_hpz_partition_size", 4), ("compute_grad_norm", False)],
)
def test_shards_are_those_of_all_ranks(settings_of, key, value):
    with pytest.raises(ConfigError, match=f"zero_optimization.{key} to {value}"):
        settings_of({"zero_optimization": {"stage": 3, key: value}})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"zero_optimization": {"stage": 2, "offload_optimizer": None}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}, "steps_per_print": 5},
        {"bf16": {}, "fp16": {"enabled": False}, "communication_data_type": "bf16"},
    ],
    ids=str,
)
def test_other_settings_reach_deepspeed(settings_of, values):
    settings = settings_of(values)
    assert {k: settings[k] for k in values.keys() - {"zero_optimization", "bf16"}} == {
        k: values[k] for k in values.keys() - {"zero_optimization", "bf16"}
    }
    assert settings["zero_optimization"].items() >= values.get("zero_optimization", {}).items()


def test_master_weights_are_fp32_whatever_the_ds_config_wants(settings_of):
    wanted = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    settings = settings_of({"bf16": wanted, "zero_optimization": {"stage": 2}})
    assert settings["bf16"] == {"enabled": True}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}


def test_a_ds_config_that_is_silent_on_zero_leaves_the_stage_to_the_recipe():
    recipe = CONFIG.model_copy(update={"engine": EngineConfig(zero_stage=2)})
    assert apply_ds_config(recipe, {"bf16": {"enabled": True}}).engine.zero_stage == 2
    said = apply_ds_config(recipe, {"zero_optimization": {"stage": 3}})
    assert said.engine.zero_stage == 3
