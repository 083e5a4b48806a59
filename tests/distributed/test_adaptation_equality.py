"""An update of all weights is what it would be if one process held them whole.

Any number of ranks, any ZeRO stage: the weights follow those of a plain optimizer on a plain model.
A launch costs its imports, so one world carries out all of its cells.
"""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from softprompt_dist.adapt_config import AdaptConfig, ArchitectureConfig
from softprompt_dist.adaptation.engine import AdaptationEngine
from softprompt_dist.adaptation.model import LossModel, TrainableT5
from softprompt_dist.adaptation.sharded_adafactor import is_factored
from softprompt_dist.adaptation.sharded_tensor import Piece, ShardedTensor
from softprompt_dist.backbone.t5_v11 import t5_config
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.parallel import ranks
from softprompt_dist.run.optimizer import T5XAdafactor
from tests.models import new_weights

ARCHITECTURE = ArchitectureConfig(
    d_model=128, d_kv=32, d_ff=131, num_heads=4, num_layers=1, num_decoder_layers=1
)
"""Large enough for factored moments; 131 x 128 weights fall apart unevenly."""
VOCABULARY, ROWS, INPUTS, TARGETS = 137, 12, 16, 10
MICRO_BATCH_SIZES = {1: 6, 2: 3, 3: 2}
TOLERANCES = {"adafactor": 1e-6, "rms_scaled_adamw": 3e-6, "adamw": 3e-6}
"""Root mean square of the difference to the reference over that of the weight. 1e-6 are sixteen
roundings of fp32, after twenty updates of a hundredth of the weight. Adam's first updates are as
large where a gradient is itself little more than rounding."""
SETTINGS = {
    "adafactor": {"learning_rate": 1e-2},
    "adafactor brief": {"learning_rate": 1e-2, "weight_decay": 1e-3},
    "adafactor slow": {"learning_rate": 1e-4},
    "rms_scaled_adamw": {"learning_rate": 5e-3, "weight_decay": 0.1, "max_gradient_norm": 1.0},
    "adamw": {"learning_rate": 1e-3, "weight_decay": 0.1, "max_gradient_norm": 1.0},
}
STEPS = {"adafactor": 20, "rms_scaled_adamw": 10, "adamw": 10}
"""Of runs with other names fewer."""
OPTIMIZERS = ("adafactor", "rms_scaled_adamw", "adamw")
STAGES = (0, 1, 2, 3)
SMALL_GROUPS = {"sub_group_size": 30_000, "stage3_param_persistence_threshold": 0}
EVERY_STAGE = [{"reference": name, "zero_stage": stage} for name in OPTIMIZERS for stage in STAGES]
OF_TWO_RANKS = [
    {"reference": "adafactor brief", "zero_stage": 2},
    {"reference": "adafactor brief", "zero_stage": 2, "sums_over_shards": True},
    *({"reference": "adafactor brief", "zero_stage": s, "recompute": True} for s in (0, 3)),
    *({"reference": "adafactor brief", "zero_stage": s, "offload": "cpu"} for s in (1, 2, 3)),
    {"reference": "adamw", "zero_stage": 3, "offload": "cpu"},
    *({"reference": "adafactor slow", "zero_stage": s, "dtype": "bf16"} for s in STAGES),
]


def model_config():
    config = t5_config(ARCHITECTURE, VOCABULARY)
    config.dropout_rate = 0.0
    return config


def starting_weights():
    return new_weights(model_config(), seed=0)


def global_batches(name):
    """Rows of two examples each, the second one's targets padded, for every step."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS.get(name, 6)):
        inputs = torch.randint(3, VOCABULARY, (ROWS, INPUTS), generator=generator)
        labels = torch.randint(3, VOCABULARY, (ROWS, TARGETS), generator=generator)
        input_segments, target_segments = torch.ones_like(inputs), torch.ones_like(labels)
        input_segments[:, INPUTS // 2 :] = 2
        target_segments[:, TARGETS // 2 :] = 2
        target_segments[:, -2:], labels[:, -2:] = 0, -100
        decoder_inputs = labels.roll(1, dims=1).clamp(min=0)
        yield inputs, input_segments, decoder_inputs, labels, target_segments


def rows_of(batch, first, last):
    inputs, input_segments, decoder_inputs, labels, target_segments = (x[first:last] for x in batch)
    return RowBatch(
        decoder_input_ids_BT=decoder_inputs,
        labels_BT=labels,
        target_segments_BT=target_segments,
        is_packed=True,
        has_padding=True,
        num_real_tokens=(last - first) * (INPUTS + TARGETS - 2),
        input_ids_BS=inputs,
        input_segments_BS=input_segments,
    )


def config_of(cell, micro_batch_size):
    name = cell["reference"]
    return AdaptConfig.model_validate(
        {
            "corpus": ["unused"],
            "optimizer": name.split()[0],
            "inputs_length": INPUTS,
            "targets_length": TARGETS,
            "dtype": cell.get("dtype", "fp32"),
            "engine": {
                "zero_stage": cell["zero_stage"],
                "offload_optimizer": cell.get("offload", "none"),
                "activation_checkpointing": cell.get("recompute", False),
            },
            "batch": {"global_batch_size": ROWS, "micro_batch_size": micro_batch_size},
            **SETTINGS[name],
        }
    )


# What one process does, with optimizers that know nothing of ranks.


def optimizer_of(config, parameters):
    """(optimizer, step): the original, or torch's AdamW."""
    if config.optimizer == "adafactor":
        optimizer = T5XAdafactor(
            parameters,
            config.learning_rate,
            weight_decay=config.weight_decay,
            multiply_by_parameter_scale=True,
        )
        return optimizer, optimizer.step
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            parameters, config.learning_rate, eps=1e-6, weight_decay=config.weight_decay
        )
        return optimizer, optimizer.step
    groups = [{"params": [parameter]} for parameter in parameters]
    optimizer = torch.optim.AdamW(groups, eps=1e-6, weight_decay=0.0)

    @torch.no_grad()
    def step():
        for group in optimizer.param_groups:
            (weight,) = group["params"]
            group["lr"] = config.learning_rate * max(1e-3, float(weight.square().mean().sqrt()))
            weight.mul_(1 - config.learning_rate * config.weight_decay)
        optimizer.step()

    return optimizer, step


def plain_run(name, dtype=torch.float32):
    """Weights after the last step, losses and gradient norms of every step."""
    config = config_of({"reference": name, "zero_stage": 0}, ROWS)
    model = LossModel(TrainableT5(model_config()), config.z_loss, autocast=False)
    model.model.load_state_dict(starting_weights())
    model.to(dtype)
    optimizer, step = optimizer_of(config, list(model.parameters()))
    losses, norms = [], []
    for batch in global_batches(name):
        optimizer.zero_grad()
        found = model(rows_of(batch, 0, ROWS))
        (found.total / (ROWS * TARGETS)).backward()
        limit = config.max_gradient_norm or math.inf
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit)))
        step()
        losses.append(float(found.total.detach() / found.num_tokens))
    weights = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    return weights, losses, norms


# What ranks do.


def carry_out(cells, folder):
    """Run every cell in this world; how far this rank's weights are from the reference."""
    return [compared(cell, folder) for cell in cells]


def compared(cell, folder):
    micro_batch_size = MICRO_BATCH_SIZES[ranks.world_size()]
    config = config_of(cell, micro_batch_size)
    stage = cell["zero_stage"]
    zero = {"zero_optimization": {"stage": stage, **SMALL_GROUPS}} if stage == 3 else None
    engine = AdaptationEngine(config, model_config(), zero)
    if cell.get("sums_over_shards"):
        engine.optimizer.sum_over_ranks = lambda values: values
    start = starting_weights()
    for name, tensor in engine.layout.weights().items():
        for piece in tensor.pieces:
            piece.values.copy_(part_of(start[name], piece))
    engine.publish_weights()
    rank, world_size = ranks.rank(), ranks.world_size()
    updates = []
    for batch in global_batches(cell["reference"]):
        firsts = range(rank * micro_batch_size, ROWS, micro_batch_size * world_size)
        own = [rows_of(batch, first, first + micro_batch_size) for first in firsts]
        updates.append(engine.update(own, config.learning_rate))
    expected = load_file(f"{folder}/{cell['reference']}.safetensors")
    return {
        "losses": [update.loss for update in updates],
        "norms": [update.gradient_norm for update in updates],
        "rms": [update.rms for update in updates],
        "num_flats": len(engine.layout.flats),
        "num_factored": sum(is_factored(f.shape) for _, f in engine.layout.fragments()),
        "is_sharded": engine.layout.is_sharded,
        **distances(engine.layout.weights(), expected, start),
    }


def part_of(weight, piece):
    return weight.reshape(-1)[piece.first : piece.first + len(piece.values)]


def distances(tensors, expected, start):
    """Sums over this rank's elements, by name, and the largest of its relative errors."""
    found = {
        "worst_element": 0.0,
        "squared_errors": {},
        "counts": {},
        "dot": 0.0,
        "ours": 0.0,
        "theirs": 0.0,
    }
    for name, tensor in tensors.items():
        ours, theirs, begun = (
            torch.cat([torch.empty(0), *(values(piece) for piece in tensor.pieces)])
            for values in (
                lambda piece: piece.values,
                lambda piece, name=name: part_of(expected[name], piece),
                lambda piece, name=name: part_of(start[name], piece),
            )
        )
        difference = (ours - theirs).double()
        found["counts"][name] = len(ours)
        found["squared_errors"][name] = float(difference @ difference)
        largest = float(difference.abs().max()) if len(ours) else 0.0
        found["worst_element"] = max(found["worst_element"], largest / rms(expected[name]))
        moved, should = (ours - begun).double(), (theirs - begun).double()
        found["dot"] += float(moved @ should)
        found["ours"] += float(moved @ moved)
        found["theirs"] += float(should @ should)
    return found


def rms(weight):
    return float(weight.square().mean().sqrt())


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Folder of the weights that plain runs end with, and their losses and norms by name."""
    folder = tmp_path_factory.mktemp("references")
    said = {}
    for name in SETTINGS:
        weights, losses, norms = plain_run(name)
        save_file(weights, folder / f"{name}.safetensors")
        said[name] = {"weights": weights, "losses": losses, "norms": norms}
    return folder, said


@pytest.fixture(scope="module")
def world(references, run_functions):
    """`world(W)`: what each rank of a world of W says of each of its cells."""
    found = {}

    def results(world_size):
        if world_size not in found:
            cells = EVERY_STAGE + (OF_TWO_RANKS if world_size == 2 else [])
            said = run_functions(
                carry_out,
                world_size,
                timeout=300,
                cells=cells,
                folder=references[0],
            )
            found[world_size] = list(zip(cells, zip(*said, strict=True), strict=True))
        return found[world_size]

    return results


def cells_where(results, **wanted):
    """What all ranks say of the cells that have just these features besides their stage."""
    features = {"recompute", "offload", "dtype", "sums_over_shards"}
    return [
        (cell, said)
        for cell, said in results
        if {k: v for k, v in cell.items() if k in features or k in wanted} == wanted
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_are_those_of_one_process(world, references, world_size, optimizer):
    cells = cells_where(world(world_size), reference=optimizer)
    assert [cell["zero_stage"] for cell, _ in cells] == list(STAGES)
    for cell, said in cells:
        check_equal(cell, said, references[1][optimizer])


def check_equal(cell, said, reference):
    optimizer = cell["reference"].split()[0]
    tolerance = TOLERANCES[optimizer]
    assert largest_error(said, reference) < tolerance, cell
    if optimizer == "adafactor":
        assert max(of_rank["worst_element"] for of_rank in said) < 10 * tolerance, cell
    for of_rank in said:
        assert of_rank["losses"] == pytest.approx(reference["losses"], rel=1e-6), cell
        assert of_rank["norms"] == pytest.approx(reference["norms"], rel=1e-5), cell
        assert of_rank["rms"] == said[0]["rms"], cell


def largest_error(said, reference):
    """Of all weights; every element must lie on just one rank, or on all."""
    held = said if said[0]["is_sharded"] else said[:1]
    errors = []
    for name, weight in reference["weights"].items():
        assert sum(of_rank["counts"][name] for of_rank in held) == weight.numel()
        squared_error = sum(of_rank["squared_errors"][name] for of_rank in held)
        errors.append((squared_error / weight.numel()) ** 0.5 / rms(weight))
    return max(errors)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_cells_are_what_they_are_to_be(world, world_size):
    for cell, said in world(world_size):
        assert said[0]["num_factored"] == 20
        assert said[0]["is_sharded"] == (cell["zero_stage"] > 0)
        if cell["zero_stage"] == 3:
            assert said[0]["num_flats"] > 3


def test_statistics_of_shards_would_be_another_algorithm(world, references):
    ((_, said),) = cells_where(world(2), sums_over_shards=True)
    assert largest_error(said, references[1]["adafactor brief"]) > 1e-3


def test_weight_decay(world, references):
    ((cell, said),) = cells_where(world(2), reference="adafactor brief")
    check_equal(cell, said, references[1]["adafactor brief"])


def test_recomputed_layers_change_nothing(world, references):
    cells = cells_where(world(2), recompute=True)
    assert len(cells) == 2
    for cell, said in cells:
        check_equal(cell, said, references[1]["adafactor brief"])


def test_weights_and_moments_may_lie_in_the_memory_of_the_node(world, references):
    cells = cells_where(world(2), offload="cpu")
    assert len(cells) == 4
    for cell, said in cells:
        check_equal(cell, said, references[1][cell["reference"]])


def test_bf16_loses_no_update_that_is_smaller_than_its_resolution(world, references):
    start, expected = starting_weights(), references[1]["adafactor slow"]["weights"]
    in_bf16, *_ = plain_run("adafactor slow", torch.bfloat16)
    whole = {
        n: ShardedTensor(tuple(w.shape), (Piece(0, w.float().view(-1)),))
        for n, w in in_bf16.items()
    }
    assert alignment([distances(whole, expected, start)]) < 0.5, (
        "bf16 weights must lose these updates"
    )
    cells = cells_where(world(2), dtype="bf16")
    assert [cell["zero_stage"] for cell, _ in cells] == list(STAGES)
    for cell, said in cells:
        held = said if said[0]["is_sharded"] else said[:1]
        assert alignment(held) > 0.9, cell


def alignment(said):
    """Cosine of the change of all weights and the one of the reference."""
    dot, ours, theirs = (sum(of_rank[key] for of_rank in said) for key in ("dot", "ours", "theirs"))
    return dot / math.sqrt(ours * theirs)
