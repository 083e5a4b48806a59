"""Sharded tensors and checkpoints, written by three ranks and read by two and by one."""

import errno
import os
import random
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from softprompt_dist.adaptation import checkpoint, sharded_files, verification
from softprompt_dist.adaptation.checkpoint import AdaptationCheckpointStore
from softprompt_dist.adaptation.sharded_files import WeightFormat, read_into, write_tensors
from softprompt_dist.adaptation.sharded_tensor import Piece, ShardedTensor
from softprompt_dist.backbone.safetensors_file import SafetensorsStream
from softprompt_dist.errors import CheckpointError, MachineError
from softprompt_dist.parallel import ranks

SHAPES = {"a.matrix": (13, 7), "b.vector": (11,), "c.tiny": (2,), "d.replicated": (3, 4), "e.0": ()}
STEP = 40


def values_of(name, nan=False):
    """Bits of every kind: -0.0, denormals; infinities and NaNs with a payload where asked for."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    low, high = -(2**31), 2**31 - 1
    bits = torch.randint(low, high, SHAPES[name], generator=generator, dtype=torch.int32)
    special = torch.tensor([0x7F800000, -(2**31), 0x7FC12345, 1], dtype=torch.int32)
    if bits.dim():
        bits.view(-1)[: min(4, bits.numel())] = special[: bits.numel()]
    values = bits.view(torch.float32)
    return values if nan else values.nan_to_num(nan=1.0)  # infinities: the largest there are


def sharded(values, seed):
    """This rank's part of a random cut; the tensors with it that hold the part."""
    tensors, held = {}, {}
    for name, whole in sorted(values.items()):
        if name in ("d.replicated", "e.0"):
            held[name] = [whole.clone().view(-1)]
            tensors[name] = ShardedTensor(SHAPES[name], (Piece(0, held[name][0]),), True)
            continue
        chance = random.Random(f"{seed}/{name}")
        size = prod(SHAPES[name])
        cuts = sorted({0, size, *(chance.randrange(size) for _ in range(4))})
        owners = [chance.randrange(ranks.world_size()) for _ in cuts[1:]]
        own = [
            Piece(first, whole.view(-1)[first:last].clone())
            for first, last, owner in zip(cuts[:-1], cuts[1:], owners, strict=True)
            if owner == ranks.rank()
        ]
        chance.shuffle(own)
        tensors[name] = ShardedTensor(SHAPES[name], tuple(own))
    return tensors


def all_values(nan=False):
    return {name: values_of(name, nan) for name in SHAPES}


def is_right(tensors):
    """Whether every piece has the bits it should."""
    return all(
        torch.equal(
            piece.values.view(torch.int32),
            values_of(name)
            .view(-1)[piece.first : piece.first + len(piece.values)]
            .view(torch.int32),
        )
        for name, tensor in tensors.items()
        for piece in tensor.pieces
    )


def emptied():
    return {name: torch.full(shape, 9.0) for name, shape in SHAPES.items()}


def error_of(work):
    try:
        work()
    except (MachineError, CheckpointError) as error:
        return [type(error).__name__, str(error), error.on_all_ranks]
    return None


def write(folder):
    sharded_files.CHUNK_BYTES = 36
    checkpoint._SHARD_BYTES = 100
    folder = Path(folder)
    tensors = sharded(all_values(), seed=1)
    with moved_bytes() as moved:
        digests = write_tensors(folder, tensors, WeightFormat(max_shard_bytes=380))
    (folder / "nan").mkdir(exist_ok=True)
    write_tensors(folder / "nan", sharded(all_values(nan=True), seed=1))
    store = AdaptationCheckpointStore(folder / "checkpoints", keep_last=2)
    torch.manual_seed(ranks.rank())
    for step in (20, STEP):
        store.save(step, tensors, {"rows": torch.arange(3.0)}, {"seed": 5, "consumed": step})
    full = {call: full_at(call, folder, tensors, store) for call in (0, 3, 9)}
    return {
        "digests": {name: [d.num_bytes, d.sha256] for name, d in digests.items()},
        "num_pieces": [len(tensor.pieces) for tensor in tensors.values()],
        "rng": torch.get_rng_state()[:64].tolist(),
        "full": full,
        "warned": warnings_of_a_save_that_rank_2_cannot_see(folder / "local", tensors),
        "unchanged": is_right(tensors),
        "moved_bytes": sum(moved),
        "own_bytes": sum(
            4 * len(piece.values)
            for tensor in tensors.values()
            for piece in tensor.pieces
            if not tensor.is_replicated
        ),
    }


@contextmanager
def moved_bytes():
    """Sizes of the tensors that this rank gives to others meanwhile."""
    sizes = []
    calls = {name: getattr(dist, name) for name in ("reduce", "batch_isend_irecv")}

    def counting(call):
        def counted(given, *arguments, **settings):
            operations = given if isinstance(given, list) else [given]
            sent = [o for o in operations if getattr(o, "op", dist.isend) is dist.isend]
            sizes.extend(getattr(o, "tensor", o).nbytes for o in sent)
            return call(given, *arguments, **settings)

        return counted

    for name, call in calls.items():
        setattr(dist, name, counting(call))
    yield sizes
    for name, call in calls.items():
        setattr(dist, name, call)


def warnings_of_a_save_that_rank_2_cannot_see(folder, tensors):
    messages = []
    checkpoint.log.warning = lambda text, *arguments: messages.append(text % arguments)
    if ranks.rank() == 2:
        checkpoint.os.path.isdir = lambda path: False
    AdaptationCheckpointStore(folder, keep_last=1).save(1, tensors, {}, {})
    return messages


def full_at(call, folder, tensors, store):
    """Errors of this rank when rank 0's disk is full at a write."""
    write_chunk, calls = SafetensorsStream.write, 0

    def full(self, values_N):
        nonlocal calls
        calls += 1
        if calls > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_chunk(self, values_N)

    SafetensorsStream.write = full
    place = folder / "full"
    place.mkdir(exist_ok=True)
    plain = error_of(lambda: write_tensors(place, tensors, WeightFormat(max_shard_bytes=200)))
    calls = 0
    saved = error_of(lambda: store.save(STEP + 5, tensors, {}, {}))
    SafetensorsStream.write = write_chunk
    return [plain, saved]


def read(folder):
    sharded_files.CHUNK_BYTES = 20
    tensors = sharded(emptied(), seed=2)
    read_into(Path(folder), tensors)
    resumed = sharded(emptied(), seed=3)
    found = AdaptationCheckpointStore(Path(folder) / "checkpoints", keep_last=2).newest()
    found.read_into(resumed)
    found.restore_rng()
    return {
        "step": found.step,
        "state": found.state,
        "right": is_right(tensors) and is_right(resumed),
        "small": found.small()["rows"].tolist(),
        "rng": torch.get_rng_state()[:64].tolist(),
    }


def flip_last_bit(path):
    """The bytes before."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return whole


def find(folder):
    """What is found where rank 1 does not see the files, and after damage to one or another."""

    def not_there(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    folder = Path(folder)
    store = AdaptationCheckpointStore(folder, keep_last=2)
    digest_of_file = verification.digest_of_file
    if ranks.rank() == 1:
        verification.digest_of_file = not_there
    error = error_of(store.newest)
    verification.digest_of_file = digest_of_file
    newest = folder / f"step-{STEP:08d}"
    is_left = newest.exists()
    ranks.gather_objects(None)
    steps = []
    for name in ("model-00001-of-00003.safetensors", "small.safetensors"):
        whole = ranks.on_main(partial(flip_last_bit, newest / name))
        steps.append(store.newest().step)
        ranks.on_main(lambda: (folder / f"corrupt-{newest.name}").rename(newest) and None)
        ranks.on_main(partial((newest / name).write_bytes, whole))
    return {"error": error, "is_left": is_left, "steps": steps}


def read_and_find(folder):
    return {"read": read(folder), "found": find(f"{folder}/checkpoints")}


@pytest.fixture(scope="module")
def written(run_functions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return folder, run_functions(write, 3, folder=folder)


def test_three_ranks_write_what_one_would(written):
    folder, outputs = written
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    stored = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    assert stored.keys() == SHAPES.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor.view(torch.int32), values_of(name).view(torch.int32)), name
    for name, tensor in load_file(folder / "nan" / "model.safetensors").items():
        assert torch.equal(tensor.view(torch.int32), values_of(name, True).view(torch.int32)), name
    assert all(output["digests"] == outputs[0]["digests"] for output in outputs)
    assert set(outputs[0]["digests"]) == {*files, "model.safetensors.index.json"}
    assert any(0 in output["num_pieces"] for output in outputs), "some rank holds nothing of one"
    assert all(output["unchanged"] for output in outputs), "writing changes nothing"


def test_a_rank_moves_what_it_holds_and_no_more(written):
    _, (main, *others) = written
    assert main["moved_bytes"] == 0
    assert [output["moved_bytes"] for output in others] == [o["own_bytes"] for o in others]
    assert all(output["moved_bytes"] > 0 for output in others)
    stored = sum(4 * prod(SHAPES[name]) for name in ("a.matrix", "b.vector", "c.tiny"))
    assert sum(output["own_bytes"] for output in (main, *others)) == stored


def test_a_save_that_a_node_cannot_see_is_told_at_once(written):
    _, outputs = written
    (message,) = outputs[0]["warned"]
    assert "cannot see it" in message
    assert [output["warned"] for output in outputs[1:]] == [[], []]


@pytest.mark.parametrize("call", ["0", "3", "9"])
def test_a_disk_that_is_full_for_rank_0_is_an_error_on_all_ranks(written, call):
    folder, outputs = written
    plain, saved = outputs[0]["full"][call]
    assert plain[0] == "MachineError"
    assert "No space left" in plain[1]
    assert saved[0] == "CheckpointError"
    assert "Earlier checkpoints are intact" in saved[1]
    assert plain[2]
    assert saved[2]
    assert all(output["full"][call] == [plain, saved] for output in outputs)
    assert list((folder / "full").iterdir()) == []
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000020", f"step-{STEP:08d}"]


@pytest.fixture(scope="module")
def two_ranks(written, run_functions):
    return run_functions(read_and_find, 2, folder=written[0])


@pytest.mark.parametrize("world_size", [2, 1])
def test_another_number_of_ranks_reads_it(written, two_ranks, monkeypatch, world_size):
    folder, writers = written
    monkeypatch.setattr(sharded_files, "CHUNK_BYTES", 0)  # so that what `read` sets is undone
    outputs = [said["read"] for said in two_ranks] if world_size == 2 else [read(folder)]
    for output in outputs:
        assert output["right"]
        assert output["step"] == STEP
        assert output["state"] == {"seed": 5, "consumed": STEP}
        assert output["small"] == [0, 1, 2]
        assert output["rng"] not in [writer["rng"] for writer in writers]


def test_a_node_without_the_folder_stops_all_and_sets_nothing_aside(two_ranks):
    first, second = (said["found"] for said in two_ranks)
    assert first["error"] == second["error"]
    kind, message, _ = first["error"]
    assert kind == "CheckpointError"
    assert "not for rank 1 on" in message
    assert "shared file system" in message
    assert first["is_left"]
    assert second["is_left"]


def test_damage_that_one_rank_finds_counts_for_all(two_ranks):
    assert [said["found"]["steps"] for said in two_ranks] == [[20, 20], [20, 20]]
