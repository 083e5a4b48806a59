"""Predicted memory against arithmetic done by hand and against published parameter counts."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from softprompt_dist.backbone.activations import activation_bytes
from softprompt_dist.backbone.architecture import Architecture, architecture_of
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.backbone.known_architectures import known_architecture, known_names
from softprompt_dist.backbone.memory_model import (
    check_memory,
    gathered_bytes,
    predict_memory,
    sharded_bytes,
    weight_bytes,
)
from softprompt_dist.backbone.skeleton import build_skeleton
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import BackboneError, MachineError

PROMPT_TUNING_TOTALS = {  # Lester et al. 2021, Table 4: total with a prompt of one token
    "google/t5-small-lm-adapt": 76_961_664,
    "google/t5-base-lm-adapt": 247_578_624,
    "google/t5-large-lm-adapt": 783_151_104,
    "google/t5-xl-lm-adapt": 2_849_759_232,
    "google/t5-xxl-lm-adapt": 11_135_336_448,
}
GPUS = Cluster(gpus_per_node=8)
WORK = Workload(micro_batch=4, prompt_length=100, input_length=512, target_length=8)
BF16 = Cell("replicated", "bf16")
INT8 = Cell("replicated", "bf16", "int8")
SHARDED = Cell("zero3", "bf16")
SHARDED_INT8 = Cell("zero3", "bf16", "int8")


def known(name: str) -> Architecture:
    found = known_architecture(name)
    assert found is not None
    return found


@pytest.fixture
def xxl() -> Architecture:
    return known("google/t5-xxl-lm-adapt")


@pytest.mark.parametrize("name", PROMPT_TUNING_TOTALS)
def test_t5_has_the_weights_of_the_paper_s_table(name: str) -> None:
    architecture = known(name)
    assert architecture.num_parameters == PROMPT_TUNING_TOTALS[name] - architecture.d_model


def test_published_parameter_counts(xxl: Architecture) -> None:
    assert xxl.num_parameters == 11_135_332_352
    assert known("meta-llama/Llama-2-7b-hf").num_parameters == 6_738_415_616
    assert known("meta-llama/Llama-2-70b-hf").num_parameters == 68_976_648_192
    assert known("meta-llama/Llama-3.1-8B").num_parameters == 8_030_261_248
    assert known("demo:smollm2-135m").num_parameters == 134_515_008


@pytest.mark.parametrize(
    ("cell", "weights", "other", "total"),
    [
        (SHARDED, 2.78, 1.04, 12.3),
        (BF16, 22.27, 0.2, 30.9),
        (INT8, 11.40, 0.5, 20.4),
        (SHARDED_INT8, 1.43, 1.04, 10.9),
        (Cell("zero3", "bf16", offload="cpu"), 0.0, 1.04, 9.5),
    ],
    ids=["zero3 bf16", "bf16", "int8", "zero3 int8", "zero3 bf16 cpu"],
)
def test_xxl_table_and_what_the_lean_backward_saves(
    xxl: Architecture, cell: Cell, weights: float, other: float, total: float
) -> None:
    """The memory table of the design, row by row, in GB.

    It was made with 15.54 units of one [B, S, D] tensor kept per encoder layer (as torch keeps them
    in bf16 on a CPU, where a norm keeps an fp32 copy) and two for each decoder layer's keys and
    values, shards that include the input embedding, and whole de-quantized blocks. Ours keeps 11
    units, has no embedding on the device and de-quantizes one matrix at a time: less in each row.
    """
    unit = 4 * 612 * 4096 * 2
    kept = 24 * 15.54 * unit + 24 * 2 * unit
    embedding = xxl.embedding_size * 2 / 8 if cell.sharding == "zero3" else 0
    stored = weight_bytes(xxl, cell, GPUS) + (embedding if cell.offload == "none" else 0)
    assert stored / 1e9 == pytest.approx(weights, abs=0.02)
    assert (stored + kept) / 1e9 + other == pytest.approx(total, abs=0.1)

    ours = predict_memory(xxl, cell, WORK, GPUS)
    assert total * 0.75 < ours.allocated / 1e9 < total


def test_a_lean_encoder_layer_keeps_eleven_units(xxl: Architecture) -> None:
    unit = 4 * 612 * 4096 * 2
    cells = [Cell("replicated", "bf16", activation_checkpointing=f"every_{n}") for n in (12, 24)]
    two, one = (activation_bytes(xxl, cell, WORK) for cell in cells)
    # One more checkpointed layer in each stack: its 11 units, and a decoder layer's two, become 1.
    assert (one - two) / unit == pytest.approx(11 - 1 + 2, abs=0.3)


def test_headlines_fit_their_cards(xxl: Architecture) -> None:
    assert predict_memory(xxl, INT8, WORK, Cluster()).total < 24e9
    assert predict_memory(xxl, SHARDED_INT8, WORK, GPUS).total < 12e9
    assert 32e9 > predict_memory(xxl, BF16, WORK, GPUS).total > 24e9


def test_sharding_halves_the_weights_and_gathers_two_blocks(xxl: Architecture) -> None:
    one, two = (weight_bytes(xxl, SHARDED, Cluster(n)) for n in (1, 2))
    assert two == -(-one // 2)
    decoder_layer = 8 * 4096**2 + 3 * 4096 * 10240
    assert gathered_bytes(xxl, SHARDED, GPUS) == 2 * decoder_layer * 2
    assert gathered_bytes(xxl, BF16, GPUS) == 0
    assert gathered_bytes(xxl, INT8, GPUS) == 4096 * 10240 * 2


def test_freed_blocks_are_reserved_beside_the_two_in_use(xxl: Architecture) -> None:
    encoder_layer, decoder_layer = (2 * (n * 4096**2 + 3 * 4096 * 10240) for n in (4, 8))
    sharded, replicated = (predict_memory(xxl, cell, WORK, GPUS) for cell in (SHARDED, BF16))
    # The encoder's three are kept when the decoder's, which are larger, come; of those two count.
    blocks = 3 * encoder_layer + decoder_layer
    fragmentation = 0.05 * (sharded.activations + sharded.gathered + sharded.logits)
    assert sharded.reserved - sharded.allocated == pytest.approx(blocks + fragmentation, abs=1)
    fragmentation = 0.05 * (replicated.activations + replicated.logits)
    assert replicated.reserved - replicated.allocated == pytest.approx(fragmentation, abs=1)


def test_int8_rows_carry_a_scale_and_spare_the_head_and_wo() -> None:
    small = known("google/t5-small-lm-adapt")
    rows = 8 * (3 * 384 + 512 + 2 * 1024 + 512) + 8 * (2 * (3 * 384 + 512) + 2 * 1024 + 512)
    matrices = small.num_parameters - 2 * small.embedding_size - small.small_size
    head = small.head.size * 2
    assert sharded_bytes(small, SHARDED_INT8) == matrices + 4 * rows + head

    without_wo = Cell("zero3", "bf16", "int8", quantized_layers="blocks_without_wo")
    spared = 16 * 512 * 1024
    assert sharded_bytes(small, without_wo) == matrices + 4 * (rows - 16 * 512) + head + spared


def test_shards_within_a_node_do_not_shrink_with_more_nodes(xxl: Architecture) -> None:
    node = Cell("zero3", "bf16", shard_group="node")
    cluster = Cluster(gpus_per_node=4, nodes=2)
    assert weight_bytes(xxl, node, cluster) == weight_bytes(xxl, SHARDED, Cluster(4))
    assert weight_bytes(xxl, SHARDED, cluster) == weight_bytes(xxl, SHARDED, Cluster(8))


def test_checkpointing_and_longer_inputs_move_the_right_part(xxl: Architecture) -> None:
    plain = predict_memory(xxl, SHARDED, WORK, GPUS)
    full = predict_memory(xxl, Cell("zero3", "bf16", activation_checkpointing="full"), WORK, GPUS)
    assert full.activations < plain.activations / 4
    assert full.weights == plain.weights
    longer = predict_memory(xxl, SHARDED, Workload(micro_batch=8), GPUS)
    assert longer.activations == pytest.approx(2 * plain.activations, rel=0.01)


def test_grouped_keys_and_targets_count_in_a_decoder_only_model() -> None:
    seventy = known("meta-llama/Llama-2-70b-hf")
    assert WORK.num_positions(seventy) == 620
    unit = 4 * 620 * 8192 * 2
    # norms 2, attention 4 (keys and values repeated for all heads), feed-forward 2 x 3.5
    layer = activation_bytes(seventy, BF16, WORK) / 80 / unit
    assert layer == pytest.approx(2 + 4 + 2 * 28672 / 8192, rel=0.03)
    assert predict_memory(seventy, SHARDED_INT8, WORK, GPUS).total < 80e9


def test_a_too_small_device_is_refused_with_the_numbers(xxl: Architecture) -> None:
    check_memory(xxl, BF16, WORK, GPUS, 40 * 10**9)
    with pytest.raises(
        MachineError, match=r"needs 30\.\d GB .* which has 24\.0 GB.*softprompt plan"
    ):
        check_memory(xxl, BF16, WORK, GPUS, 24 * 10**9)


def test_the_cell_of_a_recipe() -> None:
    cell = Cell.of(BackboneConfig(sharding="zero3", dtype="bf16"))
    assert (cell.sharding, cell.dtype, cell.quantization) == ("zero3", "bf16", "none")


def test_a_config_json_of_old_t5_is_tied_and_not_gated() -> None:
    old = {"model_type": "t5", "d_model": 512, "d_ff": 2048, "num_heads": 8, "num_layers": 6}
    architecture = architecture_of("t5-small", {**old, "d_kv": 64, "vocab_size": 32128})
    assert architecture.tied_head
    assert architecture.num_parameters == 60_506_624  # as published


_CAUSAL_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
_T5_SIZES = {"d_model": 64, "d_ff": 96, "num_heads": 4, "num_layers": 2, "vocab_size": 100}
_CAUSAL_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": 8},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"tie_word_embeddings": True},
)
_T5_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"d_kv": 8},
    {"feed_forward_proj": "relu"},
    {"feed_forward_proj": "gated-gelu"},
    {"is_gated_act": True},
    {"tie_word_embeddings": False},
    {"num_decoder_layers": 3},
)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(k, c) for k in ("llama", "mistral", "qwen2", "qwen3") for c in _CAUSAL_CHANGES]
    + [(k, c) for k in ("t5", "mt5") for c in _T5_CHANGES],
    ids=str,
)
def test_keys_that_a_config_json_leaves_out_are_those_of_transformers(
    kind: str, changes: dict[str, Any]
) -> None:
    """Same numbers as with all keys written, and as many weights as the loader has room for."""
    sizes = (_T5_SIZES if kind.endswith("t5") else _CAUSAL_SIZES) | changes
    config = CONFIG_MAPPING[kind](**sizes)
    found = architecture_of(kind, {"model_type": kind, **sizes})
    assert found == architecture_of(kind, config.to_dict())
    skeleton = build_skeleton(config)
    linears = [linear for part in skeleton.linears.values() for *_, linear in part]
    num_weights = sum(linear.in_features * linear.out_features for linear in linears)
    num_weights += sum(getattr(*place).numel() for place in skeleton.buffers.values())
    table = 100 * 64
    assert found.tied_head != skeleton.has_own_head
    assert found.num_parameters == num_weights + (table if skeleton.has_own_head else 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "no numbers for model_type 'bert'"),
        ({"model_type": "llama", "hidden_size": 64}, "num_attention_heads=None"),
        ({"model_type": "t5", "num_heads": 0}, "num_heads=0, which must be a whole number"),
        ({"model_type": "t5", "num_heads": "8"}, "num_heads='8'"),
    ],
)
def test_a_config_json_without_the_numbers_is_refused(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(BackboneError, match=message):
        architecture_of("model", config)


@pytest.mark.parametrize("name", known_names())
def test_every_known_model_has_a_prediction(name: str) -> None:
    memory = predict_memory(known(name), SHARDED_INT8, WORK, GPUS)
    assert memory.total > memory.allocated > memory.weights > 0
