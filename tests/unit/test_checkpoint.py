import contextlib
import errno
import json
import logging
import os
import random
import shutil

import pytest
import torch

from softprompt_dist.errors import CheckpointError
from softprompt_dist.run import checkpoint as checkpoint_module
from softprompt_dist.run.checkpoint import CheckpointStore
from softprompt_dist.run.checkpoint_format import encode_checkpoint
from tests.damage import denied, fill_disk_at_flush, flip_bit, names, truncate

STATE = {"seed": 7, "cursor": 320, "best_score": 0.9}


def tensors_at(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "prompt": torch.randn(5, 8, generator=generator),
        "optimizer.step": torch.tensor(step),
        "half": torch.randn(3, generator=generator).bfloat16(),
    }


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep_last=3)


def save(store, *steps):
    for step in steps:
        store.save(step, tensors_at(step), {**STATE, "step_seen": step})


def assert_is_step(checkpoint, step):
    assert checkpoint.step == step
    assert checkpoint.state == {**STATE, "step_seen": step}
    expected = tensors_at(step)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor)


def test_roundtrip_is_bitwise(store):
    save(store, 20)
    assert_is_step(store.load_newest(), 20)
    assert names(store.folder) == ["step-00000020"]
    assert sorted(p.name for p in (store.folder / "step-00000020").iterdir()) == [
        "manifest.json",
        "rng.safetensors",
        "state.json",
        "state.safetensors",
    ]


def test_random_state_continues_where_the_save_was(store):
    torch.manual_seed(3)
    torch.rand(11)
    save(store, 1)
    expected = torch.rand(4)
    torch.manual_seed(99)
    store.load_newest().restore_rng()
    assert torch.equal(torch.rand(4), expected)


def test_tensors_that_share_memory_can_be_saved(store):
    weight = torch.randn(4, 4)
    store.save(1, {"a": weight, "b": weight, "c": weight.T}, {})
    assert torch.equal(store.load_newest().tensors["c"], weight.T)


def test_nothing_saved_yet(store):
    assert store.load_newest() is None
    store.folder.mkdir()
    assert store.load_newest() is None


@pytest.mark.drill("D20", "D37")
def test_the_last_k_are_kept_and_the_newest_is_chosen_by_step_not_by_time(store):
    save(store, 9, 10, 11, 100)
    assert names(store.folder) == ["step-00000010", "step-00000011", "step-00000100"]
    os.utime(store.folder / "step-00000010", (2e9, 2e9))
    assert_is_step(store.load_newest(), 100)


@pytest.mark.drill("D20")
def test_a_half_deleted_checkpoint_is_not_a_checkpoint(store, monkeypatch):
    def interrupted(path, **kwargs):
        if ".tmp" not in path.name:
            raise KeyboardInterrupt

    save(store, 1, 2, 3)
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(store, 4)
    monkeypatch.undo()
    assert not (store.folder / "step-00000001" / "manifest.json").exists()
    assert_is_step(store.load_newest(), 4)
    save(store, 5)
    assert names(store.folder) == ["step-00000003", "step-00000004", "step-00000005"]


@pytest.mark.parametrize("file", ["state.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip_bit, truncate, os.remove])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(store, caplog, file, damage):
    save(store, 10, 20)
    damage(store.folder / "step-00000020" / file)
    with caplog.at_level(logging.WARNING):
        assert_is_step(store.load_newest(), 10)
    assert names(store.folder) == ["corrupt-step-00000020", "step-00000010"]
    assert file in caplog.text
    save(store, 20)
    assert_is_step(store.load_newest(), 20)


@pytest.mark.parametrize("damage", [truncate, os.remove, lambda path: path.write_text("[]")])
def test_a_damaged_manifest_is_set_aside(store, damage):
    save(store, 10, 20)
    damage(store.folder / "step-00000020" / "manifest.json")
    assert_is_step(store.load_newest(), 10)


@pytest.mark.drill("D7")
def test_every_single_bit_flip_is_noticed_or_harmless(store):
    save(store, 10, 20)
    newest = store.folder / "step-00000020"
    whole = {path: path.read_bytes() for path in newest.iterdir()}
    generator = random.Random(0)
    for _ in range(60):
        path = generator.choice(sorted(whole))
        content = bytearray(whole[path])
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):  # a format version above ours
            found = store.load_newest()
            assert_is_step(found, found.step)
        shutil.rmtree(newest, ignore_errors=True)
        newest.mkdir()
        for original, bytes_ in whole.items():
            original.write_bytes(bytes_)


def test_a_checkpoint_under_another_step_number_is_refused(store):
    save(store, 10, 20)
    (store.folder / "step-00000010").rename(store.folder / "step-00000030")
    assert_is_step(store.load_newest(), 20)


def test_junk_is_ignored_or_set_aside(store):
    save(store, 10)
    (store.folder / "notes").mkdir()
    (store.folder / "step-latest").write_text("garbage")
    (store.folder / "step-00000040").mkdir()
    (store.folder / "step-00000050").write_text("a file")
    assert_is_step(store.load_newest(), 10)
    assert names(store.folder) == [
        "corrupt-step-00000040",
        "corrupt-step-00000050",
        "notes",
        "step-00000010",
        "step-latest",
    ]


def test_leftovers_of_a_killed_save_are_cleaned_and_never_loaded(store):
    save(store, 10)
    shutil.copytree(store.folder / "step-00000010", store.folder / ".tmp-step-abc")
    assert_is_step(store.load_newest(), 10)
    assert names(store.folder) == ["step-00000010"]


def test_a_kill_in_the_first_save_leaves_a_run_that_starts_at_step_0(store):
    (store.folder / ".tmp-step-abc").mkdir(parents=True)
    assert store.load_newest() is None


def test_all_damaged_never_means_step_0(store):
    save(store, 10, 20)
    for step in (10, 20):
        flip_bit(store.folder / f"step-{step:08d}" / "state.safetensors")
    for _ in range(2):  # also at the second attempt, when both are already set aside
        with pytest.raises(CheckpointError, match=r"2 damaged .* --fresh"):
            store.load_newest()


def test_a_fresh_start_keeps_the_old_files_but_does_not_see_them(store):
    save(store, 10, 20)
    flip_bit(store.folder / "step-00000020" / "state.json")
    assert_is_step(store.load_newest(), 10)
    store.discard_all()
    assert store.load_newest() is None
    assert names(store.folder) == ["discarded-step-00000010", "discarded-step-00000020"]
    save(store, 10)
    store.discard_all()
    assert names(store.folder)[1] == "discarded-step-00000010-2"


def test_a_published_checkpoint_is_never_overwritten(store):
    save(store, 10)
    path = store.folder / "step-00000010" / "state.safetensors"
    before = path.stat().st_mtime_ns, path.read_bytes()
    save(store, 10)
    with pytest.raises(CheckpointError, match="published already, with other tensors"):
        store.save(10, tensors_at(11), STATE)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_a_damaged_published_checkpoint_makes_way_for_the_same_step(store):
    save(store, 10)
    truncate(store.folder / "step-00000010" / "state.safetensors")
    save(store, 10)
    assert_is_step(store.load_newest(), 10)
    assert "corrupt-step-00000010" in names(store.folder)


@pytest.mark.drill("D9")
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_disk_full_at_any_flush_leaves_the_old_checkpoints(store, monkeypatch, call):
    save(store, 10)
    fill_disk_at_flush(monkeypatch, call)
    with pytest.raises(
        CheckpointError, match=r"No space left .* needs [\d,]+ bytes, [\d,]+ are free"
    ):
        save(store, 20)
    monkeypatch.undo()
    assert names(store.folder) == ["step-00000010"]
    assert_is_step(store.load_newest(), 10)


def test_an_interrupted_write_leaves_no_trace(store, monkeypatch):
    def interrupted(path, content):
        path.write_bytes(content[:10])
        raise KeyboardInterrupt

    save(store, 10)
    monkeypatch.setattr(checkpoint_module, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(store, 20)
    assert names(store.folder) == ["step-00000010"]


def test_a_write_that_does_not_read_back_is_an_error(store, monkeypatch):
    def lying_disk(path, content):
        path.write_bytes(content[:-1] + b"?")

    save(store, 10)
    monkeypatch.setattr(checkpoint_module, "write_file", lying_disk)
    with pytest.raises(CheckpointError, match="does not read back"):
        save(store, 20)
    assert_is_step(store.load_newest(), 10)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "checkpoints", keep_last=1)
    with pytest.raises(CheckpointError, match=r"could not be written: Not a directory.*--run-dir"):
        save(store, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(store):
    save(store, 10)
    store.folder.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            save(store, 20)
        assert_is_step(store.load_newest(), 10)
    finally:
        store.folder.chmod(0o755)


@pytest.mark.drill("D11")
def test_a_write_that_is_denied_leaves_what_was_saved(store, monkeypatch):
    save(store, 10)
    monkeypatch.setattr(checkpoint_module, "write_file", denied)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(store, 20)
    assert names(store.folder) == ["step-00000010"]
    assert_is_step(store.load_newest(), 10)


@pytest.mark.drill("D11")
def test_permission_denied_is_named_and_nothing_is_set_aside(store, monkeypatch):
    save(store, 10)
    monkeypatch.setattr(checkpoint_module, "read_checkpoint", denied)
    with pytest.raises(CheckpointError, match=r"Permission denied.*permissions"):
        store.load_newest()
    with pytest.raises(CheckpointError, match=r"Permission denied.*permissions"):
        save(store, 10)
    assert names(store.folder) == ["step-00000010"]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_the_run(store, monkeypatch, caplog):
    def denied(path, **kwargs):
        if not kwargs:
            raise PermissionError(errno.EACCES, "Permission denied")

    save(store, 1, 2, 3)
    monkeypatch.setattr(shutil, "rmtree", denied)
    save(store, 4)
    assert "could not be removed" in caplog.text
    assert_is_step(store.load_newest(), 4)


def test_a_later_format_is_refused_not_set_aside(store):
    save(store, 10)
    manifest = store.folder / "step-00000010" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 2}))
    with pytest.raises(CheckpointError, match="format 2; this release reads 1"):
        store.load_newest()
    assert names(store.folder) == ["step-00000010"]


def test_another_world_size_derives_the_random_state(store, caplog):
    torch.manual_seed(5)
    save(store, 10)
    folder = store.folder / "step-00000010"
    saved = torch.get_rng_state()
    two = [{"cpu": saved}, {"cpu": saved}]
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in encode_checkpoint(10, tensors_at(10), STATE, two).items():
        (folder / name).write_bytes(content)
    first = store.load_newest()
    assert "Saved on 2 rank(s), resumed on 1" in caplog.text
    assert not torch.equal(first.rng["cpu"], saved)
    torch.rand(3)
    assert torch.equal(store.load_newest().rng["cpu"], first.rng["cpu"])


def test_keep_last_must_be_positive(tmp_path):
    with pytest.raises(CheckpointError, match="keep_last is 0"):
        CheckpointStore(tmp_path, keep_last=0)


def test_state_must_be_json(store):
    with pytest.raises(TypeError):
        store.save(1, {}, {"a": object()})
