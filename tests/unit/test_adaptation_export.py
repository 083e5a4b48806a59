import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import softprompt_dist
from softprompt_dist.adapt_config import ArchitectureConfig
from softprompt_dist.adaptation.export import (
    ExportedModel,
    check_export_folder,
    export_folder,
    exported_config,
)
from softprompt_dist.adaptation.model_card import Stage, identity_of, model_card
from softprompt_dist.adaptation.sharded_tensor import Piece, ShardedTensor
from softprompt_dist.backbone.safetensors_file import SafetensorsStream
from softprompt_dist.backbone.t5_v11 import t5_config
from softprompt_dist.errors import ConfigError, MachineError
from tests.damage import disk_full
from tests.models import with_weights

TOKENIZER = Path(softprompt_dist.__file__).parent / "assets" / "tiny-t5"
SMALL = ArchitectureConfig(
    d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=1, num_decoder_layers=1
)
IDS = torch.tensor([[5, 6, 7, 11], [8, 9, 2, 1]])


def stage(**changes):
    values = {
        "name": "adapt-small",
        "objective": "prefix_lm",
        "steps": 40,
        "tokens": 12345,
        "validation": {"prefix_lm_nll": 3.25, "sentinel_leak": 0.0},
        "seconds": 120.0,
        "corpus": ["/home/somebody/texts/novels.txt*3"],
        "corpus_fingerprint": "abc123",
        "recipe": {"steps": 40, "corpus": ["/home/somebody/texts/novels.txt*3"], "z_loss": 1e-4},
        "identity": identity_of({"seed": 0}, []),
    }
    return Stage(**(values | changes)).to_json()


def sharded(model):
    return {
        name: ShardedTensor(tuple(p.shape), (Piece(0, p.detach().view(-1)),))
        for name, p in model.named_parameters()
    }


def export(model, folder, dtype=torch.float32, source=None, **changes):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    exported = ExportedModel("adapt-small", model.config, tokenizer, source, [stage(**changes)])
    export_folder(folder, sharded(model), exported, dtype, max_shard_bytes=100_000)


def small_t5():
    return with_weights(t5_config(SMALL, 6144), seed=0)


def llama(tied):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)).eval()


def logits_of(model):
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=IDS, decoder_input_ids=IDS).logits
        return model(input_ids=IDS).logits


def plain(folder):
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_t5_with_its_own_head_is_the_same_in_plain_transformers(tmp_path, dtype, tolerance):
    model = small_t5()
    export(model, tmp_path / "out", dtype)
    again = plain(tmp_path / "out")
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=tolerance, atol=tolerance)
    assert not torch.equal(again.lm_head.weight, again.shared.weight)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["scale_decoder_outputs"] is False
    assert config["architectures"] == ["T5ForConditionalGeneration"]
    assert config["decoder_start_token_id"] == 0
    assert config["dropout_rate"] == 0.1
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_scale_before_the_head_becomes_part_of_the_head(tmp_path):
    model = small_t5()
    unscaled = logits_of(model)
    model.config.scale_decoder_outputs = True
    expected, head = logits_of(model), model.lm_head.weight.clone()
    export(model, tmp_path / "out")
    torch.testing.assert_close(logits_of(plain(tmp_path / "out")), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, unscaled, rtol=1e-2)
    assert torch.equal(model.lm_head.weight, head), "the state itself stays"


@pytest.mark.parametrize("make", [lambda: llama(True), lambda: llama(False), gpt2])
@pytest.mark.parametrize("with_source", [True, False])
def test_a_decoder_only_model_keeps_its_config_and_its_ties(tmp_path, make, with_source):
    model = make()
    source = tmp_path / "source"
    model.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"a_key_of_its_own": 3}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    export(model, tmp_path / "out", source=source if with_source else None)
    again = plain(tmp_path / "out")
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-5, atol=1e-5)
    head, table = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert (head is table) == model.config.tie_word_embeddings
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("a_key_of_its_own" in exported) == with_source
    assert (tmp_path / "out" / "generation_config.json").exists() == with_source
    assert exported["torch_dtype"] == "float32"


def test_the_dropout_of_the_source_is_kept_and_none_becomes_the_usual(tmp_path):
    hf_config = t5_config(SMALL, 128)
    hf_config.dropout_rate = 0.25
    assert exported_config(hf_config, None, torch.float32)["dropout_rate"] == 0.25
    hf_config.dropout_rate = 0.0
    hf_config.save_pretrained(tmp_path)
    hf_config.dropout_rate = 0.5
    assert exported_config(hf_config, tmp_path, torch.float32)["dropout_rate"] == 0.1


def test_the_tokenizer_says_the_same_and_is_written_for_older_transformers_too(tmp_path):
    export(gpt2(), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "A river <extra_id_0> is wide.<extra_id_1>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert len(again) == len(tokenizer)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "<extra_id_0>" in settings["additional_special_tokens"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & settings.keys()


def test_the_card_tells_recipe_data_and_losses_but_not_where_things_lie(tmp_path):
    export(gpt2(), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| adapt-small | prefix_lm | 40 | 12,345 | 3.250 | 2 |" in card
    assert "novels.txt*3 (fingerprint `abc123`)" in card
    assert "z_loss: 0.0001" in card
    assert "| sentinel_leak | 0.0000 |" in card
    assert "somebody" not in card
    history = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert [entry["name"] for entry in history] == ["adapt-small"]
    assert "somebody" not in json.dumps(history)


def test_stages_of_earlier_releases_are_told_too():
    earlier = json.loads((TOKENIZER / "adaptation.json").read_text())
    card = model_card("both", 1000, "t5", [*earlier, stage()])
    for name in (*(entry["name"] for entry in earlier), "adapt-small"):
        assert f"| {name} |" in card


def test_an_equal_earlier_export_is_left_and_any_other_is_refused(tmp_path):
    model, folder = gpt2(), tmp_path / "out"
    folder.mkdir()
    identity = stage()["identity"]
    check_export_folder(folder, identity, 40, torch.float32)
    export(model, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    export(model, folder, validation={}, seconds=1.0)
    check_export_folder(folder, identity, 40, torch.float32)
    for other in ({"steps": 80}, {"identity": identity_of({"seed": 1}, [])}):
        with pytest.raises(ConfigError, match=r"out is not empty.*--run-dir"):
            export(model, folder, **other)
    with pytest.raises(ConfigError, match="not empty"):
        export(model, folder, torch.bfloat16)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_with_anything_else_is_refused(tmp_path):
    (tmp_path / "adaptation.json").write_text("[]")
    with pytest.raises(ConfigError, match="not empty"):
        check_export_folder(tmp_path, "identity", 40, torch.float32)
    with pytest.raises(ConfigError, match="not empty"):
        check_export_folder(tmp_path / "adaptation.json", "identity", 40, torch.float32)
    check_export_folder(tmp_path / "none", "identity", 40, torch.float32)


def test_identity_changes_with_what_decides_the_weights():
    one = identity_of({"seed": 0, "corpus": "a"}, [])
    assert one == identity_of({"corpus": "a", "seed": 0}, [])
    assert len({one, identity_of({"seed": 1, "corpus": "a"}, []), identity_of({}, [{}])}) == 3


@pytest.mark.parametrize("where", ["weights", "flush"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, where):
    if where == "weights":
        monkeypatch.setattr(SafetensorsStream, "write", disk_full)
    else:
        monkeypatch.setattr("softprompt_dist.adaptation.export.flush_files", disk_full)
    with pytest.raises(MachineError, match=r"Cannot export to .*out: No space left.* free there"):
        export(gpt2(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        MachineError, match=r"Cannot export to .*out: (Not a directory|File exists)"
    ):
        export(gpt2(), tmp_path / "file" / "out")


def test_bf16_halves_the_weights(tmp_path):
    model = gpt2()
    export(model, tmp_path / "out", torch.bfloat16)
    stored = load_file(next((tmp_path / "out").glob("model*.safetensors")))
    for name, tensor in model.named_parameters():
        assert torch.equal(stored[name], tensor.detach().bfloat16())
