"""A whole adaptation in this process: what it learns, leaves behind, and continues from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from softprompt_dist import adapt
from softprompt_dist.adaptation import loop, session
from softprompt_dist.adaptation import model as adaptation_model
from softprompt_dist.adaptation.curves import draw_curves
from softprompt_dist.adaptation.run import build_run
from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import BackboneError, ConfigError, NonFiniteLossError
from tests import adaptations
from tests.adaptations import assert_same, started, updates, weights_of

OPTIMIZERS = ("adafactor", "rms_scaled_adamw", "adamw")


pytestmark = pytest.mark.usefixtures("world_of_adaptations")


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_loss_falls(make_config, objective, optimizer):
    config = make_config(
        objective=objective,
        optimizer=optimizer,
        learning_rate=0.01 if optimizer == "adamw" else 0.1,
        max_gradient_norm=1.0,
        batch={"global_batch_size": 8, "micro_batch_size": 8},
    )
    losses = [metrics["cross_entropy"] for metrics in updates(started(config), 25)]
    # log(6144) + 1/2: what logits of mean 0 and variance 1 make.
    assert losses[0] == pytest.approx(9.22, abs=0.5), "a fresh head must not be sure of anything"
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
def test_micro_batches_do_not_change_the_update(make_config, objective):
    def after_two(micro_batch_size):
        batch = {"global_batch_size": 12, "micro_batch_size": micro_batch_size}
        run = started(make_config(objective=objective, optimizer="adafactor", batch=batch))
        metrics = updates(run, 2)
        return metrics, weights_of(run)

    whole, weights = after_two(12)
    for micro_batch_size in (1, 4):
        parts, same = after_two(micro_batch_size)
        for ours, theirs in zip(parts, whole, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        for name, expected in weights.items():
            torch.testing.assert_close(same[name], expected, rtol=1e-4, atol=1e-6)


def token_loss_without_gradient(*arguments, **settings):
    """The loss as it is, of which no gradient is a number."""
    loss = token_loss(*arguments, **settings)
    return loss._replace(total=loss.total + (loss.total - loss.total.detach()).sqrt())


token_loss = adaptation_model.token_loss


@pytest.mark.parametrize(
    "engine",
    [{"zero_stage": stage} for stage in (0, 1, 2, 3)]
    + [{"zero_stage": 2, "offload_optimizer": "cpu"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_update_that_is_not_finite_is_not_made(make_config, monkeypatch, engine, dtype):
    run = started(make_config(engine=engine, dtype=dtype))
    updates(run, 1)
    before = weights_of(run)
    monkeypatch.setattr(adaptation_model, "token_loss", token_loss_without_gradient)
    with pytest.raises(NonFiniteLossError, match=r"Step 2: .*must be finite.*Lower learning_rate"):
        updates(run, 1)
    assert_same(weights_of(run), before)
    assert (run.step, run.engine.optimizer.num_updates) == (1, 1)


def test_a_loss_that_is_not_finite_saves_and_stops(make_config):
    config = make_config(optimizer="adamw", learning_rate=1e30)
    with pytest.raises(NonFiniteLossError, match=r"Step (\d): The loss is nan.* step \d is saved"):
        session.adapt(config)
    (saved,) = (Path(config.run_directory) / "checkpoints").iterdir()
    assert saved.name in ("step-00000001", "step-00000002")
    assert not (Path(config.run_directory) / "export").exists()


def test_exports_at_steps_and_in_dtypes_are_the_weights_of_those_steps(make_config):
    config = make_config(
        export={"steps": [2], "dtypes": ["fp32", "bf16"]},
        checkpoint={"every_steps": 100, "keep_last": 1},
    )
    session.adapt(config)
    for step, name in ((2, "export-step-00000002"), (4, "export")):
        weights = adaptations.checkpoint_tensors(config.run_directory, step)
        for suffix, dtype in (("", torch.float32), ("-bf16", torch.bfloat16)):
            found = adaptations.exported(config.run_directory, name + suffix)
            assert len(found) > 20
            for key, tensor in found.items():
                assert tensor.equal(weights[key].to(dtype)), key


def test_an_export_is_the_same_model_in_plain_transformers(make_config):
    config = make_config(objective="prefix_lm", validation_corpus=make_config().corpus)
    session.adapt(config)
    folder = Path(config.run_directory) / "export"
    plain, info = AutoModelForSeq2SeqLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not torch.equal(plain.lm_head.weight, plain.shared.weight)
    assert len(AutoTokenizer.from_pretrained(folder, local_files_only=True)) <= 6144
    run = build_run(config, None)
    session.restore(run, session._store(config, session.RunDirectory(folder.parent)).newest())
    batch = run.validation["prefix_lm"][0]
    logits_BV = run.engine.first_logits(batch)
    inputs, mask = batch.input_ids_BS, batch.input_segments_BS > 0
    with torch.no_grad():
        expected_BTV = plain.eval()(
            input_ids=inputs,
            attention_mask=mask.long(),
            decoder_input_ids=batch.decoder_input_ids_BT,
        ).logits
    torch.testing.assert_close(logits_BV, expected_BTV[:, 0], rtol=1e-5, atol=1e-5)


def test_the_newest_checkpoint_may_be_exported_without_training(make_config, tmp_path):
    config = make_config(steps=3)
    session.adapt(config)
    session.export_newest(make_config(), None, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(found, adaptations.exported(config.run_directory))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_decoder_only_model_is_adapted_and_its_head_stays_tied(make_config, tiny_llama, stage):
    config = make_config(
        init="from_checkpoint",
        backbone=str(tiny_llama),
        tokenizer=None,
        objective="lm",
        engine={"zero_stage": stage},
        validation_corpus=make_config().corpus,
    )
    session.adapt(config)
    folder = Path(config.run_directory) / "export"
    adapted = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    before = AutoModelForCausalLM.from_pretrained(tiny_llama, local_files_only=True)
    ids = torch.arange(8)[None]
    losses = [float(model(input_ids=ids, labels=ids).loss.detach()) for model in (before, adapted)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert adapted.get_output_embeddings().weight is adapted.get_input_embeddings().weight
    measured = [line for line in metrics_of(config) if "lm_nll" in line]
    assert measured[-1]["lm_nll"] < measured[0]["lm_nll"]


def metrics_of(config):
    return [json.loads(line) for line in (Path(config.run_directory) / "metrics.jsonl").open()]


def test_every_step_and_measurement_is_on_record(make_config, monkeypatch):
    monkeypatch.setattr(loop, "draw_curves", draw_curves)
    config = make_config(validation_corpus=make_config().corpus, z_loss=1e-2)
    session.adapt(config)
    trained = [line for line in metrics_of(config) if "gradient_norm" in line]
    measured = [line for line in metrics_of(config) if "span_corruption_nll" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    assert [line["step"] for line in measured] == [0, 4]
    assert [line["learning_rate"] for line in trained[:3]] == [0.01, 0.02, 0.02]
    for line in trained:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["z_loss"])
        assert line["z_loss"] > 0
        assert 0 < line["update_rms"] < line["relative_update_rms"] * 2
        assert line["num_tokens"] > 0
    assert {"prefix_lm_nll", "sentinel_leak"} <= measured[0].keys()
    assert (Path(config.run_directory) / "config.yaml").is_file()
    assert (Path(config.run_directory) / "plots" / "adaptation.png").is_file()


@pytest.mark.parametrize("max_examples", [1, 3])
def test_validation_counts_every_example_also_of_an_incomplete_micro_batch(
    make_config, max_examples
):
    def measured(micro_batch_size):
        config = make_config(
            batch={"global_batch_size": 12, "micro_batch_size": micro_batch_size},
            validation_corpus=make_config().corpus,
            evaluation={"max_examples": max_examples},
        )
        return started(config).measure()

    assert measured(2) == pytest.approx(measured(1), rel=1e-6, abs=1e-6)
    assert measured(4) == pytest.approx(measured(1), rel=1e-6, abs=1e-6)


def test_dropout_is_trained_with_but_not_measured_with(make_config):
    def run_of(dropout):
        validation = make_config().corpus
        return started(make_config(dropout=dropout, validation_corpus=validation))

    without, with_dropout = run_of(0.0), run_of(0.5)
    assert with_dropout.measure() == without.measure()
    losses = [updates(run, 1)[0]["loss"] for run in (without, with_dropout)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_an_adaptation_begins_with_the_weights_of_its_backbone(make_config):
    session.adapt(make_config("first", steps=2))
    folder = Path(make_config("first").run_directory) / "export"
    second = make_config("second", init="from_checkpoint", backbone=str(folder), tokenizer=None)
    expected = {name: weight.view(-1) for name, weight in adaptations.exported(folder, ".").items()}
    for stage in (0, 3):
        changed = second.model_copy(
            update={"engine": second.engine.model_copy(update={"zero_stage": stage})}
        )
        assert_same(weights_of(started(changed)), expected)


@pytest.mark.parametrize(
    ("objective", "packing"),
    [("prefix_lm", "none"), ("prefix_lm", "greedy"), ("span_corruption", "none")],
)
def test_the_decoder_begins_with_what_the_backbones_config_says(
    make_config, tmp_path, objective, packing
):
    session.adapt(make_config("first", steps=1))
    folder = tmp_path / "first" / "export"
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder_start_token_id": 5}))
    (folder / "adaptation.json").unlink()  # which tells of another config.json
    of_backbone = {"init": "from_checkpoint", "backbone": str(folder), "tokenizer": None}
    config = make_config("second", objective=objective, packing=packing, steps=1, **of_backbone)
    with started(config).batches() as batches:
        rows = next(batches).micro_batches[0]
    begins_BT = rows.target_segments_BT.diff(dim=1, prepend=torch.zeros(6, 1)) > 0
    assert set(rows.decoder_input_ids_BT[begins_BT].tolist()) == {5}
    session.adapt(config)
    backbone = load_backbone(BackboneConfig(path=f"{config.run_directory}/export"))
    assert backbone.config.decoder_start_token_id == 5


def test_a_backbone_that_does_not_say_how_its_decoder_begins_is_refused(make_config, tmp_path):
    session.adapt(make_config("first", steps=1))
    folder = tmp_path / "first" / "export"
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["decoder_start_token_id"]
    path.write_text(json.dumps(values))
    config = make_config(init="from_checkpoint", backbone=str(folder), tokenizer=None)
    with pytest.raises(BackboneError, match=r"needs decoder_start_token_id.*\(found None\)"):
        session.adapt(config)
    with pytest.raises(BackboneError, match="needs decoder_start_token_id"):
        load_backbone(BackboneConfig(path=str(folder)))


def test_a_backbone_that_lacks_a_weight_is_refused(make_config, tmp_path):
    session.adapt(make_config("first", steps=1))
    folder = tmp_path / "first" / "export"
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = make_config(init="from_checkpoint", backbone=str(folder), tokenizer=None)
    with pytest.raises(BackboneError, match=r"SelfAttention\.q"):
        session.adapt(config)


def test_a_recipe_must_be_named():
    with pytest.raises(ConfigError, match="--recipe"):
        adapt.main([])
