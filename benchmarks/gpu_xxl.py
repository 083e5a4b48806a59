"""Steps of prompt tuning T5-XXL on one GPU: PEFT with Hugging Face, and ours, on the same tokens.

python -m benchmarks.gpu_xxl                 needs a GPU; writes a random checkpoint of 22 GB
python -m benchmarks.gpu_xxl --size tiny     the same code in small, also on a CPU
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import frozen_step_flops
from benchmarks.models import DTYPES, SHAPES, ensure_checkpoint, num_parameters, t5_config
from benchmarks.ranks import RankFailedError, run_ranks
from benchmarks.report import GB, Aim, Report, parser, settings_of

PEFT, PEFT_INT8, OURS, OURS_INT8 = "PEFT", "PEFT int8 (bitsandbytes)", "ours", "ours int8"
VARIANTS: dict[str, tuple[str, str]] = {
    PEFT: ("measure_peft", "none"),
    OURS: ("measure_ours", "none"),
    PEFT_INT8: ("measure_peft", "llm_int8"),
    OURS_INT8: ("measure_ours", "int8"),
}
_NUM_TARGETS = 8
_WARM_UP = 2
Step = Callable[[], object]


def measure_ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Times and memory of our step for each batch size."""
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    from softprompt_dist.backbone.load import load_backbone
    from softprompt_dist.config import BackboneConfig, OptimizerConfig
    from softprompt_dist.data.batching import TokenBatch
    from softprompt_dist.parallel import ranks
    from softprompt_dist.prompt.module import SoftPrompt
    from softprompt_dist.run.optimizer import build_optimizer
    from softprompt_dist.run.step import accumulate_gradient

    cell = {"path": settings["folder"], "sharding": "replicated", "dtype": settings["dtype"]}
    if settings["quantization"] != "none":
        cell["quantization"] = settings["quantization"]
    start = time.perf_counter()
    backbone = load_backbone(BackboneConfig.model_validate(cell))
    seconds_to_load = time.perf_counter() - start
    prompt = SoftPrompt(torch.rand(settings["prompt_length"], backbone.d_model) - 0.5)
    prompt = prompt.to(ranks.device())
    optimizer = build_optimizer(OptimizerConfig(name="adamw"), [prompt.weight])

    def make_step(ids_BS: torch.Tensor, targets_BT: torch.Tensor) -> Step:
        ones = (torch.ones_like(ids_BS), torch.ones_like(targets_BT))
        batch = TokenBatch(ids_BS, ones[0], targets_BT, ones[1])

        def step() -> None:
            accumulate_gradient(backbone, prompt, [batch], 0.0)
            optimizer.step()

        return step

    measured = _measure_batches(settings, make_step, ranks.device())
    leave_world()
    return {"seconds_to_load": seconds_to_load, "batches": measured}


def measure_peft(settings: dict[str, Any]) -> dict[str, Any]:
    """Times and memory of a plain loop over PEFT's model for each batch size."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    from benchmarks.peers import T5WithOwnHead
    from softprompt_dist.parallel import ranks

    device = ranks.device()
    options: dict[str, Any] = {"dtype": DTYPES[settings["dtype"]]}
    if settings["quantization"] != "none":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    start = time.perf_counter()
    model = T5WithOwnHead.from_pretrained(settings["folder"], device_map=str(device), **options)
    seconds_to_load = time.perf_counter() - start
    tuned = get_peft_model(
        model,
        PromptTuningConfig(
            task_type=TaskType.SEQ_2_SEQ_LM,
            num_virtual_tokens=settings["prompt_length"],
            num_transformer_submodules=1,
        ),
    ).to(device)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.3)

    def make_step(ids_BS: torch.Tensor, targets_BT: torch.Tensor) -> Step:
        def step() -> None:
            optimizer.zero_grad()
            mask_BS = torch.ones_like(ids_BS)
            tuned(input_ids=ids_BS, attention_mask=mask_BS, labels=targets_BT).loss.backward()
            optimizer.step()

        return step

    measured = _measure_batches(settings, make_step, device)
    return {"seconds_to_load": seconds_to_load, "batches": measured}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    given = _options(argv)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and given.size != "tiny":
        print(
            f"Skipped: --size {given.size} needs a CUDA device, and this machine has none. "
            "--size tiny runs the same code on the CPU."
        )
        return
    shape = SHAPES[given.size]
    device = "cuda" if on_gpu else "cpu"
    folder = ensure_checkpoint(
        given.out / "models" / f"t5-{given.size}-{given.dtype}-{device}",
        shape,
        given.dtype,
        device=device,
    )
    machine = torch.cuda.get_device_name() if on_gpu else "the CPU"
    title = (
        f"Prompt tuning of a random T5 of {num_parameters(shape) / 1e9:.2f} B parameters on "
        f"{machine}, {given.dtype}, prompt {given.prompt_length}, input {given.input_length}"
    )
    report = Report("gpu_xxl", title, settings_of(given))
    peak_flops = given.peak_tflops * 1e12 if given.peak_tflops else _matmul_peak(given, device)
    report.raw["peak_flops"] = peak_flops
    for name in given.variants:
        report.raw[name] = _measure(name, given, folder, device)
    _fill_table(report, given, t5_config(shape), peak_flops)
    report.notes.append(
        f"MFU: against {peak_flops / 1e12:.3g} TFLOP/s "
        + ("as given." if given.peak_tflops else "measured here, one matrix product.")
    )
    report.publish(given.out)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("gpu_xxl", "Step time, memory and MFU of T5-XXL against PEFT on one GPU.")
    options.add_argument("--size", choices=sorted(SHAPES), default="xxl")
    options.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    options.add_argument("--prompt-length", type=int, default=100)
    options.add_argument("--input-length", type=int, default=512)
    options.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    options.add_argument("--steps", type=int, default=8, help="after two; the median is reported")
    options.add_argument("--peak-tflops", type=float, help="of the data sheet, for the MFU")
    options.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    return options.parse_args(argv)


def _measure(name: str, given: argparse.Namespace, folder: Path, device: str) -> dict[str, Any]:
    function, quantization = VARIANTS[name]
    if name == PEFT_INT8 and device == "cpu":
        return {"batches": {}, "skipped": "needs a CUDA device"}
    settings = {
        "folder": str(folder.resolve()),
        "dtype": given.dtype,
        "quantization": quantization,
        "prompt_length": given.prompt_length,
        "input_length": given.input_length,
        "batches": given.batches,
        "steps": given.steps,
    }
    target = f"benchmarks.gpu_xxl:{function}"
    try:
        return run_ranks(target, settings, num_ranks=1, device=device)[0]
    except RankFailedError as error:  # such as no memory for the weights alone
        print(f"{name}: {error}")
        return {"batches": {}, "skipped": str(error).strip().splitlines()[-1][:80]}


def _measure_batches(
    settings: dict[str, Any],
    make_step: Callable[[torch.Tensor, torch.Tensor], Step],
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Batch size -> median seconds and peak bytes; those that do not fit are left out.

    The peaks are of what torch allocates and of what it reserves, in which freed memory counts.
    """
    measured = {}
    for num_rows in settings["batches"]:
        generator = torch.Generator().manual_seed(num_rows)
        ids_BS = torch.randint(3, 200, (num_rows, settings["input_length"]), generator=generator)
        targets_BT = torch.randint(3, 200, (num_rows, _NUM_TARGETS), generator=generator)
        step = make_step(ids_BS.to(device), targets_BT.to(device))
        try:
            measured[str(num_rows)] = _measure_steps(step, settings["steps"], device)
        except torch.OutOfMemoryError:
            break
    return measured


def _measure_steps(step: Step, num_steps: int, device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = list(_seconds(step, _WARM_UP + num_steps, device))[_WARM_UP:]
    measured = {"seconds": statistics.median(seconds), "peak_bytes": 0.0, "reserved_bytes": 0.0}
    if device.type == "cuda":
        measured["peak_bytes"] = float(torch.cuda.max_memory_allocated())
        measured["reserved_bytes"] = float(torch.cuda.max_memory_reserved())
    return measured


def _seconds(step: Step, count: int, device: torch.device) -> Iterator[float]:
    for _ in range(count):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - start


def _matmul_peak(given: argparse.Namespace, device: str) -> float:
    size = 8192 if device == "cuda" else 512
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[given.dtype]
    settings = {"size": size, "dtype": dtype, "seconds": 2.0}
    answers = run_ranks("benchmarks.flops:matmul_peak", settings, num_ranks=1, device=device)
    return float(answers[0]["flops_per_second"])


def _fill_table(report: Report, given: argparse.Namespace, config: Any, peak_flops: float) -> None:
    num_inputs = given.prompt_length + given.input_length
    fitting = {name: report.raw[name]["batches"] for name in given.variants}
    for num_rows in map(str, given.batches):
        for name, batches in fitting.items():
            if num_rows not in batches:
                words = report.raw[name].get("skipped", "does not fit")
                report.rows.append({"path": name, "batch": num_rows, "step, ms": words})
                continue
            seconds = batches[num_rows]["seconds"]
            flops = frozen_step_flops(config, int(num_rows), num_inputs, _NUM_TARGETS)
            peer = fitting.get(PEFT, {}).get(num_rows)
            report.rows.append(
                {
                    "path": name,
                    "batch": num_rows,
                    "step, ms": f"{1e3 * seconds:.1f}",
                    "tokens/s": f"{int(num_rows) * num_inputs / seconds:.0f}",
                    "over PEFT": f"{peer['seconds'] / seconds:.2f}x" if peer else "",
                    "allocated, GB": f"{batches[num_rows]['peak_bytes'] / GB:.2f}",
                    "reserved, GB": f"{batches[num_rows]['reserved_bytes'] / GB:.2f}",
                    "MFU": f"{flops / seconds / peak_flops:.1%}",
                }
            )
    report.aims += _aims(fitting, config, num_inputs, peak_flops)


def _aims(
    fitting: dict[str, dict[str, dict[str, float]]],
    config: Any,
    num_inputs: int,
    peak_flops: float,
) -> list[Aim]:
    """At the batch size that suits each best."""
    rates = {
        name: {int(n): int(n) / values["seconds"] for n, values in batches.items()}
        for name, batches in fitting.items()
        if batches
    }
    if OURS not in rates:
        return []
    num_rows, rate = max(rates[OURS].items(), key=lambda item: item[1])
    flops = frozen_step_flops(config, num_rows, num_inputs, _NUM_TARGETS) / num_rows
    found = [Aim(f"MFU in {OURS}, batch {num_rows}, %", 100 * flops * rate / peak_flops, 50, True)]
    if PEFT in rates:
        best = max(rates[PEFT].values())
        found.append(Aim("examples/s over PEFT, each at its best batch", rate / best, 1.3, True))
    return found


if __name__ == "__main__":
    main()
