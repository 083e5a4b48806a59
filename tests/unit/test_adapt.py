import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import softprompt_dist
from softprompt_dist import adapt
from softprompt_dist.adapt_config import AdaptConfig, ArchitectureConfig
from softprompt_dist.backbone.t5_v11 import new_t5, read_t5
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import BackboneError, CheckpointError, ConfigError, NonFiniteLossError
from softprompt_dist.recipe import load_recipe
from softprompt_dist.run import adaptation_session, session
from softprompt_dist.run.adaptation import update_weights, validation_loss
from softprompt_dist.run.adaptation_export import write_t5
from softprompt_dist.run.adaptation_rate import build_optimizer, learning_rate_at
from softprompt_dist.run.adaptation_session import build_adaptation_run, export_newest

TOKENIZER = Path(softprompt_dist.__file__).parent / "assets" / "tiny-t5"
SMALL = ArchitectureConfig(
    d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=1, num_decoder_layers=1
)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Sentence {i} is about river number {i * 3}." for i in range(60)))

    def make(run="run", **changes):
        values = {
            "run_directory": str(tmp_path / run),
            "steps": 6,
            "init": "from_config",
            "architecture": SMALL,
            "tokenizer": str(TOKENIZER),
            "corpus": [str(text)],
            "validation_corpus": [str(text)],
            "objective": "span_corruption",
            "inputs_length": 16,
            "targets_length": 16,
            "optimizer": "rms_scaled_adamw",
            "learning_rate": 0.02,
            "schedule": "constant",
            "warmup_steps": 2,
            "evaluation": {"max_examples": 8},
            "batch": {"global_batch_size": 4, "micro_batch_size": 2},
            "checkpoint": {"every_steps": 3, "keep_last": 2},
        }
        return AdaptConfig.model_validate(values | changes)

    return make


def exported_weights(config):
    return adaptation_session.read_t5(Path(config.run_directory) / "export", 0.0).state_dict()


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
@pytest.mark.parametrize("optimizer", ["adafactor", "rms_scaled_adamw"])
def test_the_loss_falls(make_config, objective, optimizer):
    run = build_adaptation_run(
        make_config(
            objective=objective, optimizer=optimizer, learning_rate=0.05, max_gradient_norm=1.0
        )
    )
    losses = [update_weights(run)["cross_entropy"] for _ in range(25)]
    assert losses[0] == pytest.approx(8.72, abs=0.5), "a fresh head must not be sure of anything"
    assert losses[-1] < losses[0] - 0.5


def test_micro_batches_do_not_change_the_update(make_config):
    weights = []
    for micro in (1, 4):
        batch = {"global_batch_size": 4, "micro_batch_size": micro}
        run = build_adaptation_run(make_config(objective="prefix_lm", batch=batch))
        update_weights(run)
        weights.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adafactor", "rms_scaled_adamw", "adamw"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_config, optimizer):
    whole = make_config("whole", optimizer=optimizer, decay_steps=2)
    adaptation_session.adapt(whole)
    half = make_config("half", optimizer=optimizer, steps=3)
    adaptation_session.adapt(half)
    rest = make_config("half", optimizer=optimizer, decay_steps=2)
    adaptation_session.adapt(rest, must_resume=True)
    expected, resumed = exported_weights(whole), exported_weights(rest)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    steps = [json.loads(x)["step"] for x in (Path(rest.run_directory) / "metrics.jsonl").open()]
    assert 6 in steps


def test_a_checkpoint_of_another_recipe_or_corpus_is_refused(make_config, tmp_path):
    adaptation_session.adapt(make_config(steps=3))
    with pytest.raises(CheckpointError, match="learning_rate: saved 0.02, now 0.5"):
        adaptation_session.adapt(make_config(learning_rate=0.5))
    other = tmp_path / "other.txt"
    other.write_text("Quite another text that is long enough for a piece of some length. " * 20)
    with pytest.raises(CheckpointError, match="corpus"):
        adaptation_session.adapt(make_config(corpus=[str(other)]))


def test_resume_and_export_need_a_checkpoint(make_config, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        adaptation_session.adapt(make_config(), must_resume=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        export_newest(make_config("empty"), tmp_path / "out")


def test_a_request_to_stop_saves_and_the_same_command_continues(make_config, monkeypatch):
    def update_and_be_warned(run):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update_weights(run)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(adaptation_session, "update_weights", update_and_be_warned)
    config = make_config(checkpoint={"every_steps": 100, "keep_last": 1})
    adaptation_session.adapt(config)
    folder = Path(config.run_directory)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (folder / "export").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    adaptation_session.adapt(config, must_resume=True)
    assert (folder / "export" / "model.safetensors").is_file()


def test_a_non_finite_loss_stops_before_the_update(make_config):
    run = build_adaptation_run(make_config())
    with torch.no_grad():
        run.model.lm_head.weight[0] = float("inf")
    before = run.model.shared.weight.clone()
    with pytest.raises(NonFiniteLossError, match="Step 1"):
        update_weights(run)
    assert torch.equal(run.model.shared.weight, before)
    assert run.step == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_an_export_is_the_same_model_in_plain_transformers(make_config, dtype, tolerance):
    config = make_config(export={"dtypes": [dtype]})
    adaptation_session.adapt(config)
    folder = Path(config.run_directory) / "export"
    run = build_adaptation_run(config)
    adaptation_session.restore(
        run, adaptation_session.CheckpointStore(folder.parent / "checkpoints", 1)
    )
    plain = AutoModelForSeq2SeqLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch = tokenizer(["A river is wide", "Cold"], return_tensors="pt", padding=True)
    batch["decoder_input_ids"] = torch.tensor([[0, 5, 6], [0, 7, 8]])
    with torch.no_grad():
        expected, logits = run.model.eval()(**batch).logits, plain.eval()(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    assert not torch.equal(plain.lm_head.weight, plain.shared.weight)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["tie_word_embeddings"] is False
    assert saved["decoder_start_token_id"] == 0


def test_a_scale_before_the_head_is_exported_as_part_of_the_head(tmp_path):
    model = new_t5(SMALL, 6144, 0.0, 0).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        unscaled = model(input_ids=ids, decoder_input_ids=ids).logits
        model.config.scale_decoder_outputs = True
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        write_t5(model, AutoTokenizer.from_pretrained(TOKENIZER), tmp_path, torch.float32)
        plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, local_files_only=True).eval()
        logits = plain(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, unscaled, rtol=1e-2)
    assert json.loads((tmp_path / "config.json").read_text())["scale_decoder_outputs"] is False


def test_a_new_t5_has_no_scale_before_its_head():
    assert new_t5(SMALL, 6144, 0.0, 0).config.scale_decoder_outputs is False


def test_validation_counts_every_piece_also_of_an_incomplete_micro_batch(make_config):
    def loss(max_examples, size):
        batch = {"global_batch_size": size, "micro_batch_size": size}
        config = make_config(batch=batch, evaluation={"max_examples": max_examples})
        return validation_loss(build_adaptation_run(config))

    one, three = loss(1, 1), loss(3, 1)
    assert one != pytest.approx(three, rel=1e-5)
    assert loss(1, 4) == pytest.approx(one, rel=1e-6)
    assert loss(3, 2) == pytest.approx(three, rel=1e-6)


def test_tuning_does_not_continue_an_adaptation(make_config, tiny_recipe):
    config = make_config(steps=3)
    adaptation_session.adapt(config)
    tuning = load_recipe(TuneConfig, tiny_recipe, [f"run_directory={config.run_directory}"])
    with pytest.raises(CheckpointError, match=r"step 3 belongs to another run(.|\n)*--fresh"):
        session.train(tuning)


def test_adapting_an_export_continues_its_history(make_config):
    adaptation_session.adapt(make_config("first", name="first"))
    folder = Path(make_config("first").run_directory) / "export"
    second = make_config(
        "second", name="second", init="from_checkpoint", backbone=str(folder), tokenizer=None,
        objective="prefix_lm",
    )  # fmt: skip
    before = read_t5(folder, 0.0).state_dict()
    run = build_adaptation_run(second)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
    adaptation_session.adapt(second)
    card = (Path(second.run_directory) / "export" / "README.md").read_text()
    assert "| first | span_corruption | 6 |" in card
    assert "| second | prefix_lm | 6 |" in card
    assert str(Path(second.run_directory).parent) not in card


def test_a_model_without_a_head_of_its_own_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    write_t5(
        new_t5(SMALL, 6144, 0.0, 0),
        AutoTokenizer.from_pretrained(TOKENIZER),
        tmp_path,
        torch.float32,
    )
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="SelfAttention.q"):
        read_t5(tmp_path, 0.0)


def test_what_init_needs_must_be_given(make_config):
    with pytest.raises(ConfigError, match="tokenizer"):
        build_adaptation_run(make_config(tokenizer=None))
    with pytest.raises(ConfigError, match="backbone"):
        build_adaptation_run(make_config(init="from_checkpoint"))
    with pytest.raises(ConfigError, match="--recipe"):
        adapt.main([])


def test_schedules(make_config):
    rsqrt = make_config(schedule="rsqrt", learning_rate=1.0, warmup_steps=100, start_step=0)
    assert learning_rate_at(rsqrt, 0) == learning_rate_at(rsqrt, 100) == 0.1
    assert learning_rate_at(rsqrt, 400) == 0.05
    late = make_config(schedule="rsqrt", learning_rate=1.0, warmup_steps=100, start_step=1_000_000)
    assert learning_rate_at(late, 0) == 1e-3
    constant = make_config(warmup_steps=4, steps=20, decay_steps=10)
    assert learning_rate_at(constant, 0) == pytest.approx(0.005)
    assert learning_rate_at(constant, 10) == 0.02
    assert learning_rate_at(constant, 15) == pytest.approx(0.01)
    cosine = make_config(schedule="cosine", warmup_steps=1, steps=10)
    assert learning_rate_at(cosine, 5) == pytest.approx(0.01)
    assert learning_rate_at(cosine, 10) == pytest.approx(0.0)


def test_a_scaled_step_is_relative_to_the_size_of_the_matrix(make_config):
    small = torch.nn.Parameter(torch.full((4, 4), 0.1))
    large = torch.nn.Parameter(torch.full((4, 4), 10.0))
    tiny = torch.nn.Parameter(torch.zeros(4))
    optimizer = build_optimizer(make_config(warmup_steps=0), [small, large, tiny])
    for parameter in (small, large, tiny):
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    torch.testing.assert_close(small.detach(), torch.full((4, 4), 0.1 * 0.98))
    torch.testing.assert_close(large.detach(), torch.full((4, 4), 10.0 * 0.98))
    torch.testing.assert_close(tiny.detach(), torch.full((4,), -0.02 * 1e-3))
