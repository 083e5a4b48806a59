"""A decoder-only model that is taken apart and put together again is still itself, or refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from softprompt_dist.backbone.base import Backbone
from softprompt_dist.backbone.layers import FrozenRMSNorm
from softprompt_dist.backbone.load import inventory_of, load_backbone
from softprompt_dist.backbone.replacements import replace_norms
from softprompt_dist.backbone.skeleton import build_skeleton
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenExample, collate
from softprompt_dist.errors import BackboneError
from tests import reference
from tests.models import CAUSAL, HEAD_DIM, make_causal, make_t5, save_model

OUR_NORM = {"Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Phi3", "SmolLM3", "Granite", "Apertus"}
_SPARSE = {
    "mlp_layer_types": ["dense"] * 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "GPT2": ({"n_embd": 24, "n_layer": 2, "n_head": 2}, r"h\.0\.attn\.c_attn\.weight .*Conv1D"),
    "Mixtral": ({"num_local_experts": 2}, r"layers\.0\.mlp\.\S+ of shape"),
    "Qwen3Moe": ({**HEAD_DIM, "num_experts": 4}, r"layers\.0\.mlp\.\S+ of shape"),
    "Mamba": ({"state_size": 4}, "they take no position_ids"),
    "Bloom": ({"n_layer": 2, "n_head": 2}, "they take no .*position_ids"),
    "DeepseekV32": (_SPARSE, r"V32Indexer reads the weight of its weights_proj"),
    "GlmMoeDsa": (_SPARSE, r"DsaIndexer reads the weight of its weights_proj"),
}


def save(folder: Path, name: str, **settings: Any) -> Any:
    """Write a random model of a kind."""
    model = make_causal(name, **settings)
    save_model(model, folder)
    return model


def load(folder: Path, **settings: Any) -> Backbone:
    return load_backbone(BackboneConfig(path=str(folder), sharding="replicated", **settings))


def kinds_of_norm(backbone: Backbone) -> set[type]:
    hidden = [m for block in backbone.blocks() for m in block.computation.modules()]
    norms = [m for m in (*hidden, *backbone.model.modules()) if "Norm" in type(m).__name__]
    return {type(norm) for norm in norms}


@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_and_gradient_are_those_of_transformers(
    name: str, tie: bool, tmp_path: Path
) -> None:
    model = save(tmp_path, name, tie_word_embeddings=tie)
    backbone = load(tmp_path, activation_checkpointing="every_2")
    ours, plain = reference.ours(backbone), reference.plain(model)
    reference.assert_equal(ours, plain, logits=1e-5, gradient=1e-5)
    assert (kinds_of_norm(backbone) == {FrozenRMSNorm}) == (name in OUR_NORM)


UNUSED: dict[str, dict[str, torch.Tensor]] = {
    "GPTNeo": {
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 64, 64).tril().bool(),
        "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    "GPTNeoX": {
        "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 64, 64).tril().bool(),
        "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(3),
    },
    "Llama": {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
        "model.layers.0.self_attn.causal_mask": torch.ones(64, 64).tril(),
        "mtp.layers.0.mlp.down_proj.weight": torch.ones(24, 40),
    },
}


@pytest.mark.parametrize("name", UNUSED)
def test_stored_tensors_that_no_model_uses_are_left_aside(name: str, tmp_path: Path) -> None:
    model = save(tmp_path, name)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), **UNUSED[name]}, file, metadata={"format": "pt"})
    ours, plain = reference.ours(load(tmp_path)), reference.plain(model)
    reference.assert_equal(ours, plain, logits=1e-5, gradient=1e-5)


def test_a_bias_that_is_no_mask_is_refused_with_what_to_do(tmp_path: Path) -> None:
    save(tmp_path, "Llama")
    file = tmp_path / "model.safetensors"
    name = "model.layers.0.self_attn.bias"
    save_file({**load_file(file), name: torch.ones(24)}, file, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"self_attn\.bias.*save_pretrained: the copy leaves"):
        load(tmp_path)


def test_constants_of_an_activation_are_those_that_are_stored(tmp_path: Path) -> None:
    """As transformers reads them; the class would make others for itself."""
    model = save(tmp_path, "Apertus")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    beta = [name for name in weights if name.endswith("act_fn.beta")]
    assert len(beta) == 2
    save_file({**weights, **{n: weights[n] * 3 for n in beta}}, file, metadata={"format": "pt"})
    for layer in model.model.layers:
        layer.mlp.act_fn.beta.mul_(3)
    ours, plain = reference.ours(load(tmp_path)), reference.plain(model)
    reference.assert_equal(ours, plain, logits=1e-5, gradient=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_bf16_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    model = save(tmp_path, name)
    expected = reference.plain(model).logits
    for found, in_bf16, exact in zip(
        reference.ours(load(tmp_path, dtype="bf16")).logits,
        reference.plain_logits(model.bfloat16()),
        expected,
        strict=True,
    ):
        assert (found - exact).norm() < 1.5 * (in_bf16 - exact).norm()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_apart_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[name]
    save(tmp_path, name, **settings)
    with pytest.raises(BackboneError, match=reason) as failure:
        load(tmp_path)
    assert "Use a Llama-like model or a T5" in str(failure.value).replace("; use", ". Use")


SECOND_FEED_FORWARD = {
    "Llama": ({}, "mlp.down_proj"),
    "GPTNeo": ({}, "mlp.c_proj"),
    "GPTJ": ({"n_embd": 24, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "mlp.fc_out"),
    "GPTBigCode": ({"n_embd": 24, "n_layer": 2, "n_head": 4}, "mlp.c_proj"),
    "Lfm2": ({"layer_types": ["full_attention"] * 2}, "feed_forward.w2"),
}


@pytest.mark.parametrize("name", SECOND_FEED_FORWARD)
def test_blocks_without_wo_spares_the_second_feed_forward_matrix(name: str, tmp_path: Path) -> None:
    settings, second = SECOND_FEED_FORWARD[name]
    save(tmp_path, name, **settings)
    skeleton = inventory_of(tmp_path, BackboneConfig(path=str(tmp_path))).skeleton
    spared = skeleton.quantizable("blocks") - skeleton.quantizable("blocks_without_wo")
    assert len(spared) == 2
    assert all(n.endswith(f"{second}.weight") for n in spared)


def test_blocks_without_wo_is_refused_where_no_such_matrix_is_known(tmp_path: Path) -> None:
    model = save(tmp_path, "Olmo2")
    skeleton = build_skeleton(model.config)
    for linears in skeleton.linears.values():
        linears[:] = [found for found in linears if found[1] != "down_proj"]
    with pytest.raises(BackboneError, match=r"layers\.0\.mlp\.up_proj\.weight, .*Use blocks"):
        skeleton.quantizable("blocks_without_wo")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "Llama")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(BackboneError, match=r"adapter_config\.json.*merge_and_unload"):
        load(tmp_path)


def test_an_unknown_encoder_decoder_is_refused_by_its_name(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=53, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16
    )
    transformers.BartForConditionalGeneration(config).save_pretrained(str(tmp_path))
    with pytest.raises(BackboneError, match=r"'bart' are not known here; t5 and mt5 are"):
        load(tmp_path)


def test_a_table_that_looks_up_in_its_own_way_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "Llama")

    class OwnTable(nn.Embedding):
        pass

    own_nn = SimpleNamespace(**{**vars(nn), "Embedding": OwnTable})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transformers.models.llama.modeling_llama, "nn", own_nn)
        with pytest.raises(BackboneError, match=r"embed_tokens\.weight belongs to a OwnTable"):
            inventory_of(tmp_path, BackboneConfig(path=str(tmp_path)))


class OnePlusRMSNorm(nn.Module):
    """Gemma's: its weight is added to one."""

    def __init__(self, weight_D: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_D)
        self.eps = 1e-6

    def forward(self, hidden_D: torch.Tensor) -> torch.Tensor:
        normed_D = hidden_D.float()
        normed_D = normed_D * torch.rsqrt(normed_D.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed_D * (1 + self.weight.float())).type_as(hidden_D)


class OtherEpsilonRMSNorm(OnePlusRMSNorm):
    """A plain norm that adds its epsilon to the root."""

    def forward(self, hidden_D: torch.Tensor) -> torch.Tensor:
        root = hidden_D.pow(2).mean(-1, keepdim=True).sqrt() + self.eps
        return hidden_D / root * self.weight


class PlainRMSNorm(OnePlusRMSNorm):
    """Llama's."""

    def forward(self, hidden_D: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_D, self.weight.shape, self.weight, self.eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, 300.0, 1e6])
def test_only_a_plain_norm_is_replaced_whatever_its_weights(
    dtype: torch.dtype, value: float
) -> None:
    """1 + 300 and 300 are nearly, 1 + 1e6 and 1e6 in bf16 wholly, the same."""
    weight_D = torch.full((16,), value, dtype=dtype)
    kinds = (OnePlusRMSNorm, OtherEpsilonRMSNorm, PlainRMSNorm)
    model = nn.Sequential(*(kind(weight_D) for kind in kinds))
    replace_norms(model)
    assert [type(child) for child in model] == [OnePlusRMSNorm, OtherEpsilonRMSNorm, FrozenRMSNorm]
    assert all(child.weight is weight_D for child in model)


CACHED = ("Mistral", "GPTNeoX", "GPTNeo", "Gemma2", "Gemma3Text", "Llama4Text", "StableLm")
ANSWERS_AT = torch.tensor([[20, 21, 22, 23, 24, 25, 26, 1], [30, 31, 1, 0, 0, 0, 0, 0]])
LENGTHS = (8, 3)
LONG = (
    TokenExample((5, 6, 7, 8, 1, 9, 10, 11, 12, 13, 14, 15, 16), (20, 1)),
    TokenExample((9, 10, 1), (20, 1)),
)
"""Longer than the sliding windows of `CAUSAL`, and padded where they are shorter."""


@torch.no_grad()
@pytest.mark.parametrize("name", CACHED)
def test_kept_keys_and_values_answer_as_the_whole_row_does(name: str, tmp_path: Path) -> None:
    model = save(tmp_path, name)
    backbone = load(tmp_path).eval()
    prompt_PD = reference.make_prompt(backbone.d_model)
    prompt_BPD = prompt_PD.expand(len(LONG), -1, -1)
    batch = collate(LONG, pad_id=0, family="causal")
    at_once = torch.cat(
        backbone.score_answers(prompt_BPD, batch, ANSWERS_AT.split(1), lambda logits, _: logits), 1
    )
    for answer, length in enumerate(LENGTHS):
        ids = ANSWERS_AT[answer, :length]
        reading = backbone.read(prompt_BPD, batch)
        steps = [reading.logits_BV]
        for piece in ids[:-1]:
            reading = backbone.extend(reading, piece.expand(len(LONG)))
            steps.append(reading.logits_BV)
        for row, example in enumerate(LONG):
            whole = [TokenExample(example.input_ids, tuple(ids.tolist()))]
            (expected,) = reference.plain_logits(model, whole)
            found = torch.stack(steps, dim=1)[row]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            found = at_once[row, answer, :length]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def some_rows(count: int, generator: torch.Generator) -> list[TokenExample]:
    """Of 1 to 18 input and 1 to 4 target tokens."""

    def ids(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return tuple(torch.randint(3, 53, (length,), generator=generator).tolist())

    return [TokenExample(ids(18), ids(4)) for _ in range(count)]


def answers_to(backbone: Backbone, rows: list[TokenExample]) -> list[dict[str, torch.Tensor]]:
    """What is made of the rows in one batch: by training, by ranking and token by token."""
    prompt_BPD = reference.make_prompt(backbone.d_model).expand(len(rows), -1, -1)
    batch = collate(rows, pad_id=0, family=backbone.family)
    trained = backbone(prompt_BPD, batch)
    (ranked,) = backbone.score_answers(prompt_BPD, batch, [ANSWERS_AT], lambda logits, _: logits)
    likely_BAT = ranked.log_softmax(-1).gather(-1, ANSWERS_AT.expand(len(rows), -1, -1)[..., None])
    scores_BA = torch.stack(
        [likely_BAT[:, i, :length].sum(dim=(1, 2)) for i, length in enumerate(LENGTHS)], dim=1
    )
    reading = backbone.read(prompt_BPD, batch)
    steps = [reading.logits_BV]
    for piece in ANSWERS_AT[0, :-1]:
        reading = backbone.extend(reading, piece.expand(len(rows)))
        steps.append(reading.logits_BV)
    made = torch.stack(steps, dim=1)
    return [
        {
            "trained": trained[i, : len(row.target_ids)],
            "ranked": ranked[i],
            "label": scores_BA[i].argmax(),
            "made": made[i],
        }
        for i, row in enumerate(rows)
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", ["T5", *CAUSAL])
def test_a_row_answers_as_it_does_alone_in_any_company(name: str, tmp_path: Path) -> None:
    save_model(make_t5() if name == "T5" else make_causal(name), tmp_path)
    backbone = load(tmp_path).eval()
    generator = torch.Generator().manual_seed(5)
    for size in (2, 3, 5):
        rows = some_rows(size, generator)
        for row, found in zip(rows, answers_to(backbone, rows), strict=True):
            (alone,) = answers_to(backbone, [row])
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
