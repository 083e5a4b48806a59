"""However a backbone is held, its loss and prompt gradient are those of replicated fp32."""

from functools import partial

import cells
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import make_causal, make_llama, make_t5, save_model, small_t5

SAME = 1e-6
"""Relative difference of losses, and of gradients (by their norm)."""
MODELS = {"t5": make_t5, "llama": make_llama}
KINDS = {name: partial(make_causal, name) for name in ("Qwen2", "Gemma", "GPTNeo", "Phi3")}
"""Biases, a scaled embedding, a window of attention, longrope."""
ZERO3 = {"sharding": "zero3"}
INT8 = {"quantization": "int8"}
WITHOUT_WO = {"quantized_layers": "blocks_without_wo"}
FP32_CELLS = {
    "zero3": ZERO3,
    "full": {"activation_checkpointing": "full"},
    "every_2": {"activation_checkpointing": "every_2"},
    "zero3-full": {**ZERO3, "activation_checkpointing": "full"},
    "zero3-every_2": {**ZERO3, "activation_checkpointing": "every_2"},
    "zero3-cpu": {**ZERO3, "offload": "cpu"},
}
INT8_CELLS = {
    "zero3-int8": {**ZERO3, **INT8},
    "zero3-int8-full": {**ZERO3, **INT8, "activation_checkpointing": "full"},
    "zero3-int8-cpu": {**ZERO3, **INT8, "offload": "cpu"},
}
OTHER_CELLS = {
    "bf16": {"dtype": "bf16"},
    "zero3-bf16": {**ZERO3, "dtype": "bf16"},
    "int8-without_wo": {**INT8, **WITHOUT_WO},
    "int8-bf16": {**INT8, "dtype": "bf16"},
    "zero3-int8-bf16": {**ZERO3, **INT8, "dtype": "bf16"},
}
SHARDED = {"zero3": "reference", "zero3-bf16": "bf16", "zero3-int8-bf16": "int8-bf16"}
"""Cell -> the same precision in a whole backbone."""
BITSANDBYTES_CELLS = {
    "llm_int8": {"quantization": "llm_int8"},
    "nf4": {"quantization": "nf4"},
    "nf4-without_wo": {"quantization": "nf4", **WITHOUT_WO},
}
# Loss and gradient may be off by these shares of fp32's. Random models of width 32, and a T5 whose
# attention scores are not divided by anything, suffer more than trained ones of width 4096.
TOLERANCES = {
    "bf16": (1e-3, 0.03),
    "zero3-bf16": (1e-3, 0.03),
    "int8": (1e-3, 0.05),
    "int8-bf16": (1e-3, 0.05),
    "zero3-int8-bf16": (1e-3, 0.05),
    "llm_int8": (2e-3, 0.05),
}
_SECOND_FEED_FORWARD = (".wo.weight", ".down_proj.weight")


def is_quantized(name, tensor, *, with_wo):
    in_block = ".block." in name or ".layers." in name
    is_matrix = tensor.dim() == 2 and "relative_attention_bias" not in name
    return in_block and is_matrix and (with_wo or not name.endswith(_SECOND_FEED_FORWARD))


def rounded_to_int8(weight_RC):
    scale_R1 = weight_RC.abs().amax(dim=1, keepdim=True) / 127
    return (weight_RC / scale_R1).round() * scale_R1


def rounded_to_nf4(weight_RC):
    functional = pytest.importorskip("bitsandbytes").functional
    return functional.dequantize_4bit(
        *functional.quantize_4bit(weight_RC, blocksize=64, quant_type="nf4")
    )


def save_rounded(folder, destination, rounded, *, with_wo=True):
    """A copy of a model whose blocks hold the numbers that a quantized copy stands for."""
    destination.mkdir()
    (destination / "config.json").write_text((folder / "config.json").read_text())
    weights = {
        name: rounded(tensor) if is_quantized(name, tensor, with_wo=with_wo) else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def with_outliers(model):
    """Trained models have them where few expect them: in the second feed-forward matrix."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_SECOND_FEED_FORWARD):
                parameter[:, 5] *= 50
    return model


class Said:
    """What all ranks of a launch said of each model's cells."""

    def __init__(self, folder, results):
        self.folder = folder
        self.results = results

    def of(self, model, cell):
        """Losses [ranks, steps] and gradients [ranks, steps, P, D]."""
        folder = self.folder / model
        losses = [result[str(folder)][cell]["losses"] for result in self.results]
        return torch.tensor(losses), cells.gradients(folder, cell, len(self.results))

    def everywhere(self, model, cell, key):
        return {result[str(self.folder / model)][cell][key] for result in self.results}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and their rounded copies."""
    folder = tmp_path_factory.mktemp("cells")
    for name, make in KINDS.items():
        save_model(make(), folder / name)
    for name, make in MODELS.items():
        original = save_model(make(), folder / name)
        save_rounded(original, folder / f"{name}-rounded", rounded_to_int8)
        without_wo = folder / f"{name}-rounded-without_wo"
        save_rounded(original, without_wo, rounded_to_int8, with_wo=False)
        save_model(with_outliers(make()), folder / f"{name}-outliers")
    return folder


def reference_work(folder):
    reference = {"reference": {}}
    work = {}
    for name in MODELS:
        work[f"{name}-rounded"] = work[f"{name}-rounded-without_wo"] = reference
        work[f"{name}-outliers"] = {
            **reference,
            "int8": INT8,
            "int8-without_wo": {**INT8, **WITHOUT_WO},
        }
    return {folder / name: settings for name, settings in work.items()}


@pytest.fixture(scope="module")
def on_two(folder, run_functions):
    """Every cell that needs no library, on two ranks."""
    every = {"reference": {}, **FP32_CELLS, "int8": INT8, **INT8_CELLS, **OTHER_CELLS}
    work = {folder / name: every for name in MODELS} | reference_work(folder)
    pairs = {name: every[name] for name in (*SHARDED, *SHARDED.values())}
    work |= {folder / name: pairs for name in KINDS}
    work = {str(place): settings for place, settings in work.items()}
    return Said(folder, run_functions(cells.gradients_in_cells, 2, work=work, timeout=300))


def smallest_t5():
    """Its matrices have one, two or four elements: a rank's part may hold nothing of any."""
    sizes = {"vocab_size": 5, "d_model": 2, "d_kv": 1, "d_ff": 1, "num_layers": 1, "num_heads": 1}
    return small_t5(head_deviation=1.0, **sizes)


@pytest.fixture(scope="module")
def on_three(folder, run_functions):
    """Sizes of which none can be divided by three, and one model hardly larger than the world."""
    work = {
        str(folder / name): {
            "three-zero3": ZERO3,
            "three-zero3-int8": INT8_CELLS["zero3-int8"],
            "three-zero3-full": FP32_CELLS["zero3-full"],
        }
        for name in MODELS
    }
    smallest = {"whole": {}, "zero3": ZERO3, "int8": INT8, "zero3-int8": INT8_CELLS["zero3-int8"]}
    work[str(save_model(smallest_t5(), folder / "smallest"))] = smallest
    return Said(folder, run_functions(cells.gradients_in_cells, 3, work=work, timeout=300))


@pytest.fixture(scope="module")
def of_bitsandbytes(folder, run_functions):
    """On one rank: nothing is shared in these cells."""
    pytest.importorskip("bitsandbytes")
    work = {}
    for name in MODELS:
        work[str(folder / name)] = BITSANDBYTES_CELLS
        for with_wo, suffix in ((True, "nf4"), (False, "nf4-without_wo")):
            place = folder / f"{name}-{suffix}"
            save_rounded(folder / name, place, rounded_to_nf4, with_wo=with_wo)
            work[str(place)] = {"reference": {}}
    return Said(folder, run_functions(cells.gradients_in_cells, 1, work=work, timeout=300))


def differences(found, expected):
    """Greatest relative difference of losses and of gradients, over ranks and steps."""
    losses, gradients = found
    loss, gradient_PD = expected[0][0, 0], expected[1][0, 0]
    assert gradient_PD.norm() > 1e-3
    off = (gradients - gradient_PD).flatten(2).norm(dim=2) / gradient_PD.norm()
    return float(((losses - loss) / loss).abs().max()), float(off.max())


def assert_same(found, expected, tolerance=SAME):
    loss, gradient = differences(found, expected)
    assert loss <= tolerance
    assert gradient <= tolerance


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cell", FP32_CELLS)
def test_a_cell_in_fp32_changes_nothing(on_two, model, cell):
    assert_same(on_two.of(model, cell), on_two.of(model, "reference"))


@pytest.mark.parametrize("model", [*MODELS, *KINDS])
@pytest.mark.parametrize("cell", SHARDED)
def test_sharding_changes_no_bit(on_two, model, cell):
    losses, gradients = on_two.of(model, cell)
    expected_losses, expected_gradients = on_two.of(model, SHARDED[cell])
    assert torch.equal(losses, expected_losses)
    assert torch.equal(gradients, expected_gradients)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cell", INT8_CELLS)
def test_int8_is_the_same_sharded_and_whole(on_two, model, cell):
    assert_same(on_two.of(model, cell), on_two.of(model, "int8"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("cell", "copy"), [("int8", "rounded"), ("int8-without_wo", "rounded-without_wo")]
)
def test_int8_computes_with_the_rounded_weights_of_the_blocks(on_two, model, cell, copy):
    assert_same(on_two.of(model, cell), on_two.of(f"{model}-{copy}", "reference"), 1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cell", ["nf4", "nf4-without_wo"])
def test_nf4_computes_with_the_rounded_weights_of_the_blocks(of_bitsandbytes, model, cell):
    expected = of_bitsandbytes.of(f"{model}-{cell}", "reference")
    assert_same(of_bitsandbytes.of(model, cell), expected, 1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cell", TOLERANCES)
def test_a_rounded_cell_is_close_to_fp32(on_two, request, model, cell):
    holder = request.getfixturevalue("of_bitsandbytes") if cell == "llm_int8" else on_two
    loss, gradient = differences(holder.of(model, cell), on_two.of(model, "reference"))
    loss_tolerance, gradient_tolerance = TOLERANCES[cell]
    assert 0 < loss <= loss_tolerance
    assert SAME < gradient <= gradient_tolerance


@pytest.mark.parametrize("model", MODELS)
def test_the_second_feed_forward_matrix_unquantized_is_closer_to_fp32(on_two, model):
    name = f"{model}-outliers"
    reference = on_two.of(name, "reference")
    _, gradient = differences(on_two.of(name, "int8"), reference)
    _, gradient_without = differences(on_two.of(name, "int8-without_wo"), reference)
    assert gradient_without < 0.8 * gradient


@pytest.mark.parametrize("model", MODELS)
def test_three_ranks_that_do_not_divide_a_block_change_nothing(on_two, on_three, model):
    assert_same(on_three.of(model, "three-zero3"), on_two.of(model, "reference"))
    assert_same(on_three.of(model, "three-zero3-full"), on_two.of(model, "reference"))
    assert_same(on_three.of(model, "three-zero3-int8"), on_two.of(model, "int8"))


def test_a_matrix_smaller_than_the_world_changes_nothing(on_three):
    assert_same(on_three.of("smallest", "zero3"), on_three.of("smallest", "whole"))
    assert_same(on_three.of("smallest", "zero3-int8"), on_three.of("smallest", "int8"))


@pytest.mark.parametrize("model", MODELS)
def test_nothing_stays_gathered_and_all_have_one_identity(on_two, model):
    every = [*FP32_CELLS, *INT8_CELLS, *OTHER_CELLS]
    for cell in every:
        left = on_two.everywhere(model, cell, "gathered_bytes_left")
        assert (left == {0}) == cell.startswith("zero3")
    assert len(set.union(*(on_two.everywhere(model, c, "identity") for c in every))) == 1
