"""How fast, and in how much memory, a checkpoint becomes a sharded frozen model.

python -m benchmarks.loading
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.memory import PeakMemory
from benchmarks.models import SHAPES, ensure_checkpoint, num_parameters, warm_page_cache
from benchmarks.ranks import run_ranks
from benchmarks.report import GB, Aim, Report, parser, settings_of

PEER, OURS, OURS_INT8 = "Hugging Face + DeepSpeed", "ours", "ours int8, quantized on the way"
OURS_INT8_COPY = "ours int8, of a converted copy"


def measure_peer(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of the peer: `from_pretrained` under a live HfDeepSpeedConfig."""
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    from benchmarks.peers import has_checkpoint_head, load_under_zero3, shard_bytes

    folder = Path(settings["folder"])
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": settings["dtype"] == "bf16"},
    }
    with PeakMemory() as peak:
        start = _together()
        model, _alive = load_under_zero3(folder, ds_config, settings["dtype"])
        seconds = _together() - start
    answer = _answer(seconds, peak, shard_bytes(model.parameters()))
    answer["head_is_the_checkpoints"] = has_checkpoint_head(model, folder)
    leave_world()
    return answer


def measure_ours(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of ours: `load_backbone`."""
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    from benchmarks.peers import shard_bytes
    from softprompt_dist.backbone.load import load_backbone
    from softprompt_dist.config import BackboneConfig

    config = BackboneConfig.model_validate(settings["backbone"])
    with PeakMemory() as peak:
        start = _together()
        backbone = load_backbone(config)
        seconds = _together() - start
    answer = _answer(seconds, peak, shard_bytes([*backbone.parameters(), *backbone.buffers()]))
    leave_world()
    return answer


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options = parser("loading", "Seconds and memory to load a sharded frozen model.")
    options.add_argument("--size", choices=sorted(SHAPES), default="1.4b")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--repeats", type=int, default=3, help="the median is reported")
    options.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    given = options.parse_args(argv)
    shape = SHAPES[given.size]
    folder = ensure_checkpoint(
        given.out / "models" / f"t5-{given.size}-{given.dtype}", shape, given.dtype
    )
    file_bytes = warm_page_cache(folder)
    backbone = {"path": str(folder.resolve()), "sharding": "zero3", "dtype": given.dtype}
    int8 = {**backbone, "quantization": "int8"}
    copy = _int8_copy(folder)
    warm_page_cache(copy)
    variants = {
        PEER: ("measure_peer", {"folder": str(folder), "dtype": given.dtype}),
        OURS: ("measure_ours", {"backbone": backbone}),
        OURS_INT8: ("measure_ours", {"backbone": int8}),
        OURS_INT8_COPY: ("measure_ours", {"backbone": {**int8, "path": str(copy.resolve())}}),
    }
    # Round by round, so that a busy moment of the machine meets all variants alike.
    measured: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in variants}
    for _ in range(given.repeats):
        for name, (function, settings) in variants.items():
            target = f"benchmarks.loading:{function}"
            measured[name].append(run_ranks(target, settings, num_ranks=given.ranks))
    title = (
        f"Loading {num_parameters(shape) / 1e9:.2f} B parameters ({file_bytes / GB:.2f} GB of "
        f"{given.dtype}) on {given.ranks} ranks, warm page cache"
    )
    report = Report("loading", title, settings_of(given), raw={**measured})
    summaries = {name: _summary(rounds) for name, rounds in measured.items()}
    report.rows = [_row(name, s, summaries[PEER]) for name, s in summaries.items()]
    report.aims = _aims(summaries)
    report.notes = [
        "Peak RSS counts mapped files of libraries and weights too; anonymous memory does not. "
        "Hugging Face's head, lost under ZeRO-3, is repaired first."
    ]
    report.publish(given.out)


def _int8_copy(folder: Path) -> Path:
    """What `softprompt convert` makes of a checkpoint, once."""
    copy = folder.with_name(f"{folder.name}-int8-copy")
    if not (copy / "config.json").is_file():
        convert = [sys.executable, "-m", "softprompt_dist.convert", "--backbone", str(folder)]
        subprocess.run([*convert, "--output", str(copy), "--precision", "int8"], check=True)
    return copy


def _together() -> float:
    import torch.distributed as dist

    dist.barrier()
    return time.perf_counter()


def _answer(seconds: float, peak: PeakMemory, shard: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "shard_bytes": shard,
        "rss_before_bytes": peak.resident_before,
        "peak_rss_bytes": peak.resident_bytes,
        "peak_anonymous_bytes": peak.anonymous_bytes,
    }


def _summary(rounds: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Median seconds; of memory the worst rank of the worst round."""
    answers = [answer for answers in rounds for answer in answers]
    worst = {
        key: max(answer[key] for answer in answers) for key in answers[0] if key.endswith("bytes")
    }
    over = max(a["peak_rss_bytes"] - a["shard_bytes"] for a in answers)
    seconds = median(max(a["seconds"] for a in answers) for answers in rounds)
    return {**worst, "seconds": seconds, "over_shard_bytes": over}


def _row(name: str, summary: dict[str, float], peer: dict[str, float]) -> dict[str, str]:
    return {
        "path": name,
        "seconds": f"{summary['seconds']:.2f}",
        "times as fast": f"{peer['seconds'] / summary['seconds']:.1f}x",
        "shard, GB": f"{summary['shard_bytes'] / GB:.2f}",
        "RSS before, GB": f"{summary['rss_before_bytes'] / GB:.2f}",
        "peak RSS, GB": f"{summary['peak_rss_bytes'] / GB:.2f}",
        "peak - shard, GB": f"{summary['over_shard_bytes'] / GB:.2f}",
        "peak anonymous, GB": f"{summary['peak_anonymous_bytes'] / GB:.2f}",
    }


def _aims(summaries: dict[str, dict[str, float]]) -> list[Aim]:
    peer, ours, int8 = (summaries[name] for name in (PEER, OURS, OURS_INT8))
    return [
        Aim("times as fast as the peer", peer["seconds"] / ours["seconds"], 5.0, at_least=True),
        Aim("worst rank's peak RSS beyond its shard, GB", ours["over_shard_bytes"] / GB, 0.6),
        Aim("the same, int8, GB", int8["over_shard_bytes"] / GB, 0.6),
        Aim("int8 shard over bf16 shard", int8["shard_bytes"] / ours["shard_bytes"], 0.53),
    ]


if __name__ == "__main__":
    main()
