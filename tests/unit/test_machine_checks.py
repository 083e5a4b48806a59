"""Software, builds, devices, memory and disks, in situations that are made up."""

from __future__ import annotations

import importlib.metadata
import mmap
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from softprompt_dist.checks import builds, disk, machine, software
from softprompt_dist.checks.communication import Speed, expected_bytes_per_second, judge_speed
from softprompt_dist.checks.finding import Finding
from softprompt_dist.checks.software import (
    TESTED_BITSANDBYTES,
    check_bitsandbytes,
    check_versions,
)
from softprompt_dist.private_names import TESTED_VERSIONS

REPOSITORY = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


def statuses(findings: list[Finding]) -> dict[str, str]:
    assert all(finding.remedy for finding in findings if finding.status != "ok")
    return {finding.name: finding.status for finding in findings}


def test_tested_versions_are_those_of_the_constraints_file() -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([^\s;]+)", constraints, flags=re.MULTILINE))
    tested = TESTED_VERSIONS | {"bitsandbytes": TESTED_BITSANDBYTES}
    assert tested.items() <= pinned.items()


def test_versions_as_tested_are_ok() -> None:
    local = {name: f"{version}+cpu" for name, version in TESTED_VERSIONS.items()}
    assert set(statuses(check_versions(local.__getitem__)).values()) == {"ok"}


def test_other_versions_warn_and_missing_or_unsafe_ones_fail() -> None:
    def version_of(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"torch": "2.9.1", "transformers": "4.57.0"}.get(name, TESTED_VERSIONS[name])

    found = statuses(check_versions(version_of))
    assert (found["deepspeed"], found["torch"], found["transformers"]) == ("fail", "fail", "warn")


def test_a_patch_of_a_library_whose_private_names_are_used_warns() -> None:
    other = TESTED_VERSIONS | {"deepspeed": "0.19.99", "safetensors": "0.8.99"}
    found = statuses(check_versions(other.__getitem__))
    assert (found["deepspeed"], found["safetensors"]) == ("warn", "ok")


def absent(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_bitsandbytes_must_be_there_only_where_the_recipe_needs_it() -> None:
    assert statuses(check_bitsandbytes(version_of=absent)) == {"bitsandbytes": "warn"}
    (found,) = check_bitsandbytes(needed_for="backbone.quantization=nf4", version_of=absent)
    assert found.status == "fail"
    assert "backbone.quantization=nf4" in found.remedy


def test_bitsandbytes_that_does_not_work_is_as_good_as_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(software, "bitsandbytes_problem", lambda: "")
    assert check_bitsandbytes(version_of=lambda name: TESTED_BITSANDBYTES)[0].status == "ok"
    monkeypatch.setattr(software, "bitsandbytes_problem", lambda: "OSError: no libcudart")
    (found,) = check_bitsandbytes(needed_for="nf4", version_of=lambda name: TESTED_BITSANDBYTES)
    assert (found.status, found.found) == ("fail", f"{TESTED_BITSANDBYTES}: OSError: no libcudart")


def test_bitsandbytes_is_tried_by_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    assert software.bitsandbytes_problem() == ""
    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *given: -right(*given))
    assert software.bitsandbytes_problem().startswith("wrong values")
    monkeypatch.setattr(functional, "quantize_4bit", lambda *given, **named: 1 / 0)
    assert software.bitsandbytes_problem() == "ZeroDivisionError: division by zero"


def test_a_dead_builder_s_lock_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert statuses(builds.check_build_locks()) == {"build locks": "ok"}
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (finding,) = builds.check_build_locks()
    assert finding.status == "fail"
    assert f"rm '{lock}'" in finding.remedy
    with lock.open():
        assert builds.check_build_locks()[0].status == "warn"


def test_build_tools_are_needed_where_deepspeed_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(builds.check_build_tools(needed=True)) == {"build tools": "ok"}
    monkeypatch.setattr(builds, "missing_build_tools", lambda: ["ninja"])
    assert statuses(builds.check_build_tools(needed=True)) == {"build tools": "fail"}
    assert statuses(builds.check_build_tools(needed=False)) == {"build tools": "warn"}


def test_whether_the_extension_is_built_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert builds.check_shm_comm(needed=True)[0].found.startswith("not built yet")
    built = tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so"
    built.parent.mkdir()
    built.touch()
    assert builds.check_shm_comm(needed=True)[0].found == "built"
    assert builds.check_shm_comm(needed=False) == []


def test_async_io_is_looked_for_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "async_io_problem", lambda on_gpu: "no libaio")
    assert builds.check_async_io(needed=False, on_gpu=False) == []
    (found,) = builds.check_async_io(needed=True, on_gpu=False)
    assert (found.status, found.found) == ("fail", "no libaio")
    monkeypatch.setattr(builds, "async_io_problem", lambda on_gpu: "")
    assert builds.check_async_io(needed=True, on_gpu=False)[0].status == "ok"


def test_bf16_is_judged_by_its_speed() -> None:
    assert machine.check_bf16(0.5, wanted=True)[0].status == "ok"
    (emulated,) = machine.check_bf16(8.0, wanted=True)
    assert emulated.status == "warn"
    assert "bf16 is emulated here: use fp32" in emulated.remedy
    assert machine.check_bf16(8.0, wanted=False)[0].status == "ok"
    assert machine.bf16_slowdown(size=16, repetitions=1) > 0


@pytest.mark.parametrize(
    ("free_mib", "num_ranks", "on_gpu", "status"),
    [
        (64, 2, False, "warn"),
        (200, 2, False, "ok"),
        (200, 8, False, "warn"),
        (200, 2, True, "warn"),
        (2000, 8, True, "ok"),
    ],
)
def test_shared_memory_must_hold_the_ranks_buffers(
    free_mib: int, num_ranks: int, on_gpu: bool, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = Usage(4000 * 2**20, 0, free_mib * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = machine.check_shared_memory(num_ranks, on_gpu=on_gpu)
    assert statuses(found) == {"/dev/shm": status}


def test_buffers_that_no_process_uses_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    assert machine.check_shared_memory_leftovers() == []
    buffer = tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0"
    buffer.write_bytes(bytes(2**20))
    (found,) = machine.check_shared_memory_leftovers()
    assert found.status == "warn"
    assert f"rm {buffer}" in found.remedy
    with buffer.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert machine.check_shared_memory_leftovers() == []


def test_folders_are_tried_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = disk.check_folder("run directory", tmp_path / "not" / "yet")
    assert finding.status == "ok"
    assert list(tmp_path.iterdir()) == []

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(disk, "replace_file", full)
    (finding,) = disk.check_folder("run directory", tmp_path)
    assert finding.status == "fail"
    assert "No space left" in finding.found


def test_a_full_disk_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**8))
    assert statuses(disk.check_folder("cache", tmp_path)) == {"cache": "warn"}
    assert disk.check_disk_speed("cache", tmp_path) == []


def test_disk_speed_is_measured_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_PROBE_BYTES", 2**20)
    (found,) = disk.check_disk_speed("run directory", tmp_path / "not" / "yet")
    assert re.match(r"write [\d,]+ MB/s, read [\d,]+ MB/s (perhaps )?from the ", found.found)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(disk, "measure_write", lambda path: path.write_bytes(b"x") * 1e6)
    assert disk.check_disk_speed("run directory", tmp_path)[0].status == "warn"
    assert list(tmp_path.iterdir()) == []


def test_reading_tells_how_long_all_of_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "small", tmp_path / "large"]
    files[0].write_bytes(bytes(10**3))
    files[1].write_bytes(bytes(10**6))
    read = []

    def measured(path: Path) -> disk.ReadSpeed:
        read.append(path)
        return disk.ReadSpeed(speed, cached=True)

    monkeypatch.setattr(disk, "measure_read", measured)
    speed = 1e6
    (found,) = disk.check_read_speed("backbone speed", files)
    assert read == [files[1]]
    assert found.status == "ok"
    assert "from the page cache, so the disk itself may be slower: 1.0 s for all" in found.found
    speed = 1e3
    assert disk.check_read_speed("backbone speed", files)[0].status == "warn"


@pytest.mark.parametrize(
    ("nodes", "received", "status"),
    [(1, 300e9, "ok"), (1, 20e9, "warn"), (2, 20e9, "ok"), (2, 1.2e9, "warn")],
)
def test_gpus_are_held_to_the_speed_that_the_planner_counts_on(
    nodes: int, received: float, status: str
) -> None:
    expected = expected_bytes_per_second("NVIDIA H100 80GB HBM3", nodes)
    assert expected == {1: 360e9, 2: 22e9}[nodes]
    speed = Speed(8, 400 * 2**20, received, seconds=0.01, latency=1e-5)
    assert statuses([judge_speed("all-gather", speed, expected)]) == {"all-gather": status}


def test_a_device_without_numbers_is_slow_only_where_anything_would_be() -> None:
    assert expected_bytes_per_second("cpu", 1) is None
    for received, status in ((0.2e9, "ok"), (0.05e9, "warn")):
        speed = Speed(2, 8 * 2**20, received, seconds=0.01, latency=1e-5)
        assert judge_speed("all-reduce", speed, None).status == status
