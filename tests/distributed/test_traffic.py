"""What moves between ranks in a step, counted where torch.distributed is called."""

import cells
import pytest
import traffic

from tests.models import save_deep_t5

NUM_BLOCKS = 12
CONTROL_BYTES = 32
"""Of a step's messages that are neither weights nor the prompt: the sums of the loss."""
ORDER_BYTES = 4096
"""The same in a first step: DeepSpeed's ranks make sure that they use the blocks in one order."""
ZERO3 = {"sharding": "zero3"}
INT8 = {"quantization": "int8"}
FULL = {"activation_checkpointing": "full"}
CELLS = {
    "replicated": {},
    "fp32": ZERO3,
    "bf16": {**ZERO3, "dtype": "bf16"},
    "int8": {**ZERO3, **INT8},
    "full": {**ZERO3, **FULL},
    "cpu": {**ZERO3, "offload": "cpu"},
}
NODE_CELLS = {
    "replicated": {},
    "node": {**ZERO3, "shard_group": "node"},
    "node-int8": {**ZERO3, **INT8, "shard_group": "node"},
    "world": ZERO3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_deep_t5(tmp_path_factory.mktemp("traffic") / "t5", NUM_BLOCKS)


@pytest.fixture(scope="module")
def on_two(folder, run_functions):
    return run_functions(traffic.traffic_of_cells, 2, folder=folder, cells=CELLS, timeout=240)


def on_its_node(rank):
    return {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(scope="module")
def on_two_nodes(folder, run_functions):
    """Ranks 0 and 1 on one node, 2 and 3 on another."""
    return run_functions(
        traffic.traffic_of_cells,
        4,
        folder=folder,
        cells=NODE_CELLS,
        env=on_its_node,
        timeout=300,
    )


def gathered(on_two, cell):
    """Bytes that a rank receives in a pass forward and back, once the way is known."""
    (found,) = {said[cell]["steps"][-1]["gathered_bytes"] for said in on_two}
    return found


@pytest.mark.parametrize("cell", CELLS)
def test_our_own_count_is_what_torch_distributed_moves(on_two, cell):
    for said in on_two:
        for step in said[cell]["steps"]:
            assert step["own_gathered_bytes"] == step["gathered_bytes"]
            assert step["own_num_gathers"] == step["num_gathers"]


@pytest.mark.parametrize("cell", ["fp32", "bf16", "int8", "full", "cpu"])
def test_a_block_is_gathered_once_forward_and_once_back(on_two, cell):
    for said in on_two:
        half = said[cell]["model_bytes"] / 2  # the other half is the rank's own
        for step in said[cell]["steps"]:
            assert step["num_gathers"] <= 2 * (NUM_BLOCKS + 1)
            assert 1.7 * half < step["gathered_bytes"] <= 2.05 * half
        # The head and the block before it are used again at once.
        assert said[cell]["steps"][-1]["num_gathers"] == 2 * (NUM_BLOCKS + 1) - 2


def test_recomputing_gathers_nothing_more(on_two):
    assert gathered(on_two, "full") == gathered(on_two, "fp32")


def test_what_is_gathered_is_as_small_as_the_weights(on_two):
    assert gathered(on_two, "int8") <= 0.3 * gathered(on_two, "fp32")
    assert gathered(on_two, "bf16") <= 0.51 * gathered(on_two, "fp32")
    assert gathered(on_two, "replicated") == 0


@pytest.mark.parametrize("cell", CELLS)
def test_besides_weights_only_the_prompts_gradient_moves(on_two, cell):
    for said in on_two:
        prompt = ("all_reduce", said[cell]["prompt_bytes"])
        for index, step in enumerate(said[cell]["steps"]):
            rest = [(name, size) for name, _, size in step["calls"] if "gather" not in name]
            assert rest.count(prompt) == 1
            others = sum(size for name, size in rest if (name, size) != prompt)
            assert others <= (CONTROL_BYTES if index else ORDER_BYTES)


def test_no_weight_moves_while_loading(on_two):
    for said in on_two:
        for cell in CELLS:
            moved = sum(size for _, _, size in said[cell]["loading_calls"])
            assert moved < said[cell]["model_bytes"] / 20


def crosses_nodes(members):
    return len({rank // 2 for rank in members}) > 1


@pytest.mark.parametrize("cell", ["node", "node-int8"])
def test_a_node_gathers_within_itself(on_two_nodes, cell):
    for rank, said in enumerate(on_two_nodes):
        mine = [rank // 2 * 2, rank // 2 * 2 + 1]
        prompt_bytes = said[cell]["prompt_bytes"]
        for index, step in enumerate(said[cell]["steps"]):
            gathers = [members for name, members, _ in step["calls"] if "gather" in name]
            assert len(gathers) >= NUM_BLOCKS
            assert all(members == mine for members in gathers)
            crossing = [size for _, members, size in step["calls"] if crosses_nodes(members)]
            assert crossing.count(prompt_bytes) == 1
            assert sum(crossing) - prompt_bytes <= (CONTROL_BYTES if index else ORDER_BYTES)


def test_a_node_holds_the_whole_model_and_half_of_it_each(on_two_nodes):
    for said in on_two_nodes:
        node, world = (said[cell]["steps"][-1]["gathered_bytes"] for cell in ("node", "world"))
        assert node == said["node"]["steps"][-1]["own_gathered_bytes"]
        assert node / world == pytest.approx((1 / 2) / (3 / 4), rel=0.02)
        assert any(crosses_nodes(members) for _, members, _ in said["world"]["steps"][-1]["calls"])


def test_cutting_within_nodes_changes_nothing(on_two_nodes, folder):
    reference = cells.gradients(folder, "replicated", 4, [traffic.NUM_STEPS - 1])[0, 0]
    loss = on_two_nodes[0]["replicated"]["steps"][0]["loss"]
    for cell in ("node", "world"):
        found = cells.gradients(folder, cell, 4, [traffic.NUM_STEPS - 1])
        assert float((found - reference).norm(dim=(2, 3)).max() / reference.norm()) <= 1e-6
        for said in on_two_nodes:
            assert [s["loss"] for s in said[cell]["steps"]] == pytest.approx([loss] * 3, rel=1e-6)
