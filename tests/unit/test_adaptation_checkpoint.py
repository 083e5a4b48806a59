import errno
import json
import logging
import os
import resource
import shutil
import signal

import pytest
import torch

from softprompt_dist import durable
from softprompt_dist.adaptation import sharded_files, verification
from softprompt_dist.adaptation.checkpoint import AdaptationCheckpointStore
from softprompt_dist.adaptation.sharded_tensor import Piece, ShardedTensor
from softprompt_dist.backbone.safetensors_file import SafetensorsStream
from softprompt_dist.errors import CheckpointError
from softprompt_dist.run.checkpoint import CheckpointStore
from tests.damage import denied, disk_full, fill_disk_at_flush, flip_bit, names, truncate

STATE = {"seed": 7, "examples_consumed": 320}
SHAPES = {"model.shared.weight": (12, 5), "model.norm.weight": (5,), "moment.shared": (12, 5)}
WEIGHTS = "model.safetensors"
FILES = [WEIGHTS, "small.safetensors", "rng.safetensors", "state.json"]


def values_at(step, name):
    generator = torch.Generator().manual_seed(1000 * step + sorted(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def sharded(tensors):
    """In two pieces each, as views of the tensors."""
    return {
        name: ShardedTensor(
            tuple(tensor.shape),
            (Piece(2, tensor.view(-1)[2:]), Piece(0, tensor.view(-1)[:2])),
        )
        for name, tensor in tensors.items()
    }


def tensors_at(step):
    return {name: values_at(step, name) for name in SHAPES}


def small_at(step):
    return {"rows": torch.arange(4) * float(step), "step": torch.tensor(step)}


@pytest.fixture
def store(tmp_path):
    return AdaptationCheckpointStore(tmp_path / "checkpoints", keep_last=2, keep_steps={10, 30})


def save(store, *steps):
    for step in steps:
        store.save(step, sharded(tensors_at(step)), small_at(step), {**STATE, "seen": step})


def assert_newest_is(store, step):
    found = store.newest()
    assert found.step == step
    assert found.state == {**STATE, "seen": step}
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    found.read_into(sharded(tensors))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, values_at(step, name))
    small = found.small()
    assert small.keys() == small_at(step).keys()
    assert all(torch.equal(small[name], tensor) for name, tensor in small_at(step).items())


def test_what_is_read_is_what_was_saved(store):
    save(store, 20)
    assert_newest_is(store, 20)
    assert sorted(p.name for p in (store.folder / "step-00000020").iterdir()) == sorted(
        [*FILES, "manifest.json"]
    )


def test_nothing_saved_yet(store):
    assert store.newest() is None
    store.folder.mkdir()
    assert store.newest() is None


def test_the_last_ones_and_those_to_be_exported_are_kept(store):
    save(store, 10, 20, 30, 40, 50)
    assert names(store.folder) == [f"step-{step:08d}" for step in (10, 30, 40, 50)]
    save(store, 60)
    assert names(store.folder) == [f"step-{step:08d}" for step in (10, 30, 50, 60)]


@pytest.mark.drill("D7")
@pytest.mark.parametrize("damage", [flip_bit, truncate, os.remove])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(store, caplog, file, damage):
    save(store, 10, 20)
    damage(store.folder / "step-00000020" / file)
    with caplog.at_level(logging.WARNING):
        assert_newest_is(store, 10)
    assert names(store.folder) == ["corrupt-step-00000020", "step-00000010"]
    assert file in caplog.text
    save(store, 20)
    assert_newest_is(store, 20)


@pytest.mark.parametrize(
    "damage",
    [truncate, os.remove, lambda path: path.write_text("[]"), lambda path: path.write_text("{}")],
)
def test_a_damaged_manifest_is_set_aside(store, damage):
    save(store, 10, 20)
    damage(store.folder / "step-00000020" / "manifest.json")
    assert_newest_is(store, 10)


@pytest.mark.drill("D8")
def test_all_damaged_never_means_step_0(store):
    save(store, 20)
    flip_bit(store.folder / "step-00000020" / WEIGHTS)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"1 damaged .* --fresh"):
            store.newest()
    store.discard_all()
    assert store.newest() is None


@pytest.mark.drill("D2")
def test_leftovers_of_a_killed_save_are_removed_and_never_loaded(store):
    save(store, 10)
    shutil.copytree(store.folder / "step-00000010", store.folder / ".tmp-step-abc")
    assert_newest_is(store, 10)
    assert names(store.folder) == ["step-00000010"]


@pytest.mark.drill("D39")
def test_a_save_while_the_disk_is_away_is_tried_again(store, monkeypatch):
    save(store, 10)
    real, calls = sharded_files._write_files, iter(range(10))

    def away(*arguments):
        if next(calls) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*arguments)

    monkeypatch.setattr(durable, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(sharded_files, "_write_files", away)
    save(store, 20)
    assert_newest_is(store, 20)
    assert names(store.folder) == ["step-00000010", "step-00000020"]
    calls = iter(range(10))
    monkeypatch.setattr(durable, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(CheckpointError, match="Stale file handle"):
        save(store, 30)
    assert_newest_is(store, 20)


def test_a_published_checkpoint_is_never_overwritten(store):
    save(store, 10)
    path = store.folder / "step-00000010" / WEIGHTS
    before = path.stat().st_ino, path.stat().st_mtime_ns
    save(store, 10)
    with pytest.raises(CheckpointError, match="published already, with other tensors"):
        store.save(10, sharded(tensors_at(11)), small_at(10), STATE)
    with pytest.raises(CheckpointError, match="published already, with other tensors"):
        store.save(10, sharded(tensors_at(10)), small_at(11), STATE)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    assert names(store.folder) == ["step-00000010"]


def test_a_damaged_published_checkpoint_makes_way_for_the_same_step(store):
    save(store, 10)
    truncate(store.folder / "step-00000010" / WEIGHTS)
    save(store, 10)
    assert_newest_is(store, 10)
    assert "corrupt-step-00000010" in names(store.folder)


@pytest.mark.drill("D9")
@pytest.mark.parametrize("place", ["weights", *range(1, 8)])
def test_a_full_disk_leaves_the_old_checkpoints(store, monkeypatch, place):
    save(store, 20)
    if place == "weights":
        monkeypatch.setattr(SafetensorsStream, "write", disk_full)
    else:
        fill_disk_at_flush(monkeypatch, place)
    needed = r"No space left .* needs [\d,]{3,} bytes, [\d,]+ are free .* Free some space"
    with pytest.raises(CheckpointError, match=needed):
        save(store, 25)
    monkeypatch.undo()
    assert names(store.folder) == ["step-00000020"]
    assert_newest_is(store, 20)


def test_a_file_that_may_not_grow_further_is_a_full_disk(store):
    """A real refusal of the system, in the middle of a write."""
    save(store, 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large\. It needs"):
            save(store, 25)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(store.folder) == ["step-00000020"]
    assert_newest_is(store, 20)


def test_a_write_that_does_not_read_back_is_an_error(store, monkeypatch):
    save(store, 10)
    write = SafetensorsStream.write

    def lying_disk(self, values_N):
        write(self, values_N)
        with open(self._file.name, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))

    monkeypatch.setattr(SafetensorsStream, "write", lying_disk)
    with pytest.raises(CheckpointError, match="does not read back"):
        save(store, 20)
    assert names(store.folder) == ["corrupt-step-00000020", "step-00000010"]
    assert_newest_is(store, 10)


def test_random_state_continues_where_the_save_was(store):
    torch.manual_seed(3)
    save(store, 1)
    expected = torch.rand(4)
    torch.manual_seed(99)
    store.newest().restore_rng()
    assert torch.equal(torch.rand(4), expected)


def test_tensors_of_another_model_are_named(store):
    save(store, 10)
    found = store.newest()
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*'model.more'"):
        found.read_into(sharded({**tensors, "model.more": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight is \(5,\), not \(6,\)"):
        found.read_into(sharded({**tensors, "model.norm.weight": torch.zeros(6)}))


def test_what_another_kind_of_run_saved_is_refused_and_left(store):
    save(store, 10)
    with pytest.raises(CheckpointError, match=r"step 10 belongs to another run.*--fresh"):
        CheckpointStore(store.folder, keep_last=1).load_newest()
    shutil.rmtree(store.folder)
    CheckpointStore(store.folder, keep_last=1).save(20, {"prompt": torch.zeros(2, 2)}, {})
    with pytest.raises(CheckpointError, match=r"step 20 belongs to another run.*--fresh"):
        store.newest()
    assert names(store.folder) == ["step-00000020"]


def test_a_later_format_is_refused_not_set_aside(store):
    save(store, 10)
    manifest = store.folder / "step-00000010" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 2}))
    with pytest.raises(CheckpointError, match="format 2; this release reads 1"):
        store.newest()
    assert names(store.folder) == ["step-00000010"]


def test_permission_denied_is_named_and_nothing_is_set_aside(store, monkeypatch):
    save(store, 10)
    monkeypatch.setattr(verification, "digest_of_file", denied)
    with pytest.raises(CheckpointError, match=r"Permission denied.*permissions"):
        store.newest()
    assert names(store.folder) == ["step-00000010"]


def test_checkpoints_of_several_files(store, monkeypatch):
    from softprompt_dist.adaptation import checkpoint

    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 270)
    monkeypatch.setattr(sharded_files, "CHUNK_BYTES", 28)
    save(store, 10, 20)
    files = {p.name for p in (store.folder / "step-00000020").iterdir()}
    assert {"model-00002-of-00002.safetensors", "model.safetensors.index.json"} <= files
    assert_newest_is(store, 20)
    truncate(store.folder / "step-00000020" / "model.safetensors.index.json")
    assert_newest_is(store, 10)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    store = AdaptationCheckpointStore(tmp_path / "file" / "checkpoints", keep_last=1)
    with pytest.raises(CheckpointError, match=r"could not be written: Not a directory.*--run-dir"):
        save(store, 1)


def test_keep_last_must_be_positive(tmp_path):
    with pytest.raises(CheckpointError, match="keep_last is 0"):
        AdaptationCheckpointStore(tmp_path, keep_last=0)


def test_state_must_be_json(store):
    with pytest.raises(TypeError):
        store.save(1, {}, {}, {"a": object()})
