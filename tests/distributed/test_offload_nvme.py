"""Parts of blocks that lie on a disk: DeepSpeed writes and reads them, byte for byte."""

from pathlib import Path

import cells
import pytest

from softprompt_dist.backbone.fingerprint import assert_unchanged, local_checksum
from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import InvariantError
from softprompt_dist.parallel import ranks
from tests.models import make_t5, save_model, small_t5

SMALLEST_ON_DISK = 2**20
"""Bytes; DeepSpeed keeps smaller parts in the host's memory."""
MODES = {
    "fp32": {},
    "int8": {"quantization": "int8"},
    "full": {"activation_checkpointing": "full"},
}


def large_t5():
    """Half of one of its layers is worth a file, in fp32 and in int8; half of its head is not."""
    return small_t5(vocab_size=128, d_model=256, d_kv=64, d_ff=3072, num_layers=2, num_heads=4)


def change_a_file(path, offload_path):
    """What every rank says of its checksum before and after rank 1's parts have changed."""
    config = BackboneConfig(
        path=path, sharding="zero3", offload="nvme", offload_path=offload_path, dtype="fp32"
    )
    backbone = load_backbone(config)
    before = local_checksum(backbone)
    assert_unchanged(backbone, before)
    ranks.gather_objects(None)  # no rank reads any longer
    if ranks.rank() == 1:
        [file, *_] = sorted(Path(offload_path).rglob("rank1/*.swp"))
        with file.open("r+b") as opened:
            opened.seek(5000)
            byte = opened.read(1)[0]
            opened.seek(5000)
            opened.write(bytes([byte ^ 1]))
    ranks.gather_objects(None)
    try:
        assert_unchanged(backbone, before)
    except InvariantError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def found(run_functions, tmp_path_factory, extensions_folder):
    """Folder of each model, after all cells have run on it."""
    if not any(extensions_folder.rglob("async_io.so")):
        pytest.skip(
            "DeepSpeed's async_io is not built, which takes minutes: install libaio-dev, and run "
            "python -c 'from deepspeed.ops.op_builder import AsyncIOBuilder as B; B().load()'"
        )
    tmp = tmp_path_factory.mktemp("nvme")
    folders = {
        "large": save_model(large_t5(), tmp / "large"),
        "tiny": save_model(make_t5(), tmp / "tiny"),
    }
    work = {}
    for name, folder in folders.items():
        cells_of = work[str(folder)] = {}
        for mode, settings in MODES.items():
            memory = {"sharding": "zero3", **settings}
            disk = {"offload": "nvme", "offload_path": str(tmp / f"{name}-{mode}")}
            cells_of[mode], cells_of[f"{mode}-nvme"] = memory, memory | disk
    run_functions(cells.gradients_in_cells, 2, work=work, timeout=240)
    return folders


def files_of(folder, mode):
    return sorted((folder.parent / f"{folder.name}-{mode}").rglob("*.swp"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["large", "tiny"])
def test_parts_on_a_disk_change_nothing(found, model, mode):
    expected = cells.gradients(found[model], mode, 2)
    on_disk = cells.gradients(found[model], f"{mode}-nvme", 2)
    assert float((on_disk - expected).norm() / expected.norm()) <= 1e-6


def test_a_byte_that_changes_on_the_disk_is_noticed(found, run_functions):
    both = run_functions(
        change_a_file,
        2,
        path=str(found["large"]),
        offload_path=str(found["large"].parent / "changed"),
        timeout=120,
    )
    assert all("changed on ranks [1]" in said for said in both)


@pytest.mark.parametrize(("mode", "bytes_each"), [("fp32", 4), ("int8", 1)])
def test_each_rank_has_a_file_for_its_part_of_each_layer(found, mode, bytes_each):
    files = files_of(found["large"], mode)
    assert len(files) == 2 * 4
    assert {"rank0", "rank1"} == {file.parent.name for file in files}
    sizes = [file.stat().st_size for file in files]
    weights = 2 * (4 + 8) * 256 * 256 + 4 * 3 * 256 * 3072
    assert min(sizes) >= SMALLEST_ON_DISK
    assert sum(sizes) == pytest.approx(weights * bytes_each, rel=0.02)


def test_small_parts_stay_in_memory(found):
    assert not files_of(found["tiny"], "fp32")
