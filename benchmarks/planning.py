"""Memory as `softprompt plan` predicts it, and as it is: three sizes of T5 in three cells.

python -m benchmarks.planning                two ranks; on the CPU resident memory, on a GPU torch's
python -m benchmarks.planning --sizes small  only one size
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import PeakMemory, resident_bytes
from benchmarks.models import ensure_checkpoint
from benchmarks.ranks import run_ranks
from benchmarks.report import Aim, Report, parser, settings_of
from softprompt_dist.backbone.cell import Cell, Cluster, Workload
from softprompt_dist.backbone.memory_model import Memory, predict_memory
from softprompt_dist.planning.models import find_architecture

_HEADS_OF_64 = {"d_kv": 64, "vocab_size": 32128}
_STEPS = 2


def _size(d_model: int, d_ff: int, num_heads: int, num_layers: int) -> dict[str, int]:
    layers = {"num_layers": num_layers, "num_decoder_layers": num_layers}
    return {"d_model": d_model, "d_ff": d_ff, "num_heads": num_heads, **layers, **_HEADS_OF_64}


SIZES = {
    "small": _size(512, 1024, 6, 8),
    "base": _size(768, 2048, 12, 12),
    "large": _size(1024, 2816, 16, 24),
    "xl": _size(2048, 5120, 32, 24),
}
"""T5 v1.1's."""
CELLS = {
    "replicated fp32": Cell("replicated", "fp32"),
    "zero3 fp32": Cell("zero3", "fp32"),
    "zero3 int8": Cell("zero3", "fp32", "int8"),
}


def measure(settings: dict[str, Any]) -> dict[str, int]:
    """Growth of this rank's memory over loading and some steps, in bytes.

    A tiny model goes first, so that what libraries keep for themselves is not counted.
    """
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    _load_and_step("demo:tiny-t5", settings)
    gc.collect()
    grown = _growth_on_gpu if torch.cuda.is_available() else _growth_on_cpu
    measured = {"bytes": grown(settings)}
    leave_world()
    return measured


def _growth_on_cpu(settings: dict[str, Any]) -> int:
    before = resident_bytes("RssAnon")
    with PeakMemory() as peak:
        _load_and_step(settings["folder"], settings)
    return peak.anonymous_bytes - before


def _growth_on_gpu(settings: dict[str, Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _load_and_step(settings["folder"], settings)
    return torch.cuda.max_memory_allocated() - before


def _load_and_step(path: str, settings: dict[str, Any]) -> None:
    from softprompt_dist.backbone.load import load_backbone
    from softprompt_dist.config import BackboneConfig, OptimizerConfig
    from softprompt_dist.parallel import ranks
    from softprompt_dist.prompt.module import SoftPrompt
    from softprompt_dist.run.optimizer import build_optimizer
    from softprompt_dist.run.step import accumulate_gradient

    work = Workload(**settings["workload"])
    section = {"path": path, "dropout": work.dropout, **settings["cell"]}
    backbone = load_backbone(BackboneConfig.model_validate(section))
    prompt = SoftPrompt(torch.rand(work.prompt_length, backbone.d_model) - 0.5)
    prompt = prompt.to(ranks.device())
    optimizer = build_optimizer(OptimizerConfig(), [prompt.weight])
    for _ in range(_STEPS):
        accumulate_gradient(backbone, prompt, [_batch(work, backbone.vocabulary_size)], 0.0)
        optimizer.step()


def _batch(work: Workload, vocabulary_size: int) -> Any:
    """Random tokens; one row is padded, as is usual, so that the mask is one for every row."""
    from softprompt_dist.data.batching import TokenBatch

    inputs = torch.randint(vocabulary_size, (work.micro_batch, work.input_length))
    targets = torch.randint(vocabulary_size, (work.micro_batch, work.target_length))
    mask = torch.ones_like(inputs)
    mask[0, -work.input_length // 4 :] = 0
    return TokenBatch(inputs, mask, targets, torch.ones_like(targets))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    given = _options(argv)
    on_gpu = torch.cuda.is_available()
    num_ranks = min(given.ranks, torch.cuda.device_count()) if on_gpu else given.ranks
    if not on_gpu:
        # Else the allocator keeps freed blocks for later, and what is counted is its habit.
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    lengths = (given.prompt_length, given.input_length, 8)
    workload = Workload(given.micro_batch, *lengths, given.dropout)
    where = "torch.cuda.max_memory_allocated" if on_gpu else "growth of resident memory"
    title = f"Predicted memory of a rank, {num_ranks} rank(s), against {where}"
    report = Report("planning", title, settings_of(given))
    for size in given.sizes:
        folder = ensure_checkpoint(given.out / "models" / f"t5-{size}-fp32", SIZES[size], "fp32")
        for name, cell in CELLS.items():
            _compare(report, size, name, folder, (cell, workload, num_ranks))
    report.notes.append("GB of 10^9 bytes; the largest of the ranks, as allocated.")
    report.publish(given.out)


def _compare(
    report: Report, size: str, name: str, folder: Path, how: tuple[Cell, Workload, int]
) -> None:
    cell, workload, num_ranks = how
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cluster = Cluster(num_ranks, on_cpu=device == "cpu")
    memory = predict_memory(find_architecture(str(folder)), cell, workload, cluster)
    settings = {"folder": str(folder.resolve()), "cell": vars(cell), "workload": vars(workload)}
    answers = run_ranks("benchmarks.planning:measure", settings, num_ranks=num_ranks, device=device)
    measured = max(answer["bytes"] for answer in answers)
    ratio = memory.allocated / measured
    report.rows.append(_row(size, name, memory, measured))
    report.aims.append(Aim(f"{size}, {name}: off by", abs(ratio - 1), 0.10))
    report.raw[f"{size}, {name}"] = {
        "measured": measured,
        "predicted": {f.name: getattr(memory, f.name) for f in fields(memory)},
    }
    print(f"{size}, {name}: predicted / measured {ratio:.3f}", flush=True)


def _row(size: str, name: str, memory: Memory, measured: int) -> dict[str, str]:
    parts = ("weights", "gathered", "activations", "logits", "buffers")
    return {
        "T5 v1.1": size,
        "cell": name,
        **{part: f"{getattr(memory, part) / 1e9:.3f}" for part in parts},
        "predicted GB": f"{memory.allocated / 1e9:.3f}",
        "measured GB": f"{measured / 1e9:.3f}",
        "predicted / measured": f"{memory.allocated / measured:.3f}",
    }


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("planning", "Predicted against measured memory.")
    options.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES)[:3])
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--micro-batch", type=int, default=2)
    options.add_argument("--prompt-length", type=int, default=100)
    options.add_argument("--input-length", type=int, default=256)
    options.add_argument("--dropout", type=float, default=0.0)
    return options.parse_args(argv)


if __name__ == "__main__":
    main()
