from pathlib import Path

import pytest

import softprompt_dist

PACKAGE = Path(softprompt_dist.__file__).parent


def updates(recipe):
    from softprompt_dist.adapt_config import AdaptConfig
    from softprompt_dist.recipe import load_recipe
    from softprompt_dist.run.adaptation import update_weights, validation_loss
    from softprompt_dist.run.adaptation_session import build_adaptation_run

    run = build_adaptation_run(load_recipe(AdaptConfig, recipe))
    losses = [update_weights(run)["cross_entropy"] for _ in range(3)]
    weights = [float(p.detach().double().norm()) for p in run.model.parameters()]
    return {"losses": losses, "validation": validation_loss(run), "weights": weights}


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
def test_two_ranks_train_as_one(tmp_path, run_on_ranks, monkeypatch, objective):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    lines = [f"Sentence {i}{' and more' * (i % 7)} of river {i * 3}." for i in range(80)]
    text.write_text("\n".join(lines))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
name: tiny
init: from_config
tokenizer: {PACKAGE / "assets" / "tiny-t5"}
architecture:
  {{d_model: 16, d_kv: 4, d_ff: 24, num_heads: 2, num_layers: 1, num_decoder_layers: 1}}
corpus: [{text}]
validation_corpus: [{text}]
objective: {objective}
inputs_length: 16
targets_length: 16
optimizer: rms_scaled_adamw
learning_rate: 0.02
schedule: constant
warmup_steps: 0
max_gradient_norm: 1.0
evaluation: {{max_examples: 8}}
batch: {{global_batch_size: 8, micro_batch_size: 2}}
""")
    (one,) = run_on_ranks(updates, 1, recipe=str(recipe))
    two = run_on_ranks(updates, 2, recipe=str(recipe))
    assert two[0] == two[1], "the ranks must stay equal"
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two[0]["validation"] == pytest.approx(one["validation"], rel=1e-5)
    assert two[0]["weights"] == pytest.approx(one["weights"], rel=1e-4)
