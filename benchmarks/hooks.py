"""CPU time of a step where the arithmetic is next to nothing: what hooks and bookkeeping cost.

python -m benchmarks.hooks
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import DTYPES, SHAPES, ensure_checkpoint
from benchmarks.ranks import run_ranks
from benchmarks.report import Aim, Report, parser, settings_of

PLAIN, STAGE3, LEAVES = "Hugging Face", "+ DeepSpeed stage 3", "+ DeepSpeed stage 3, leaf blocks"
OURS, OURS_ZERO3, OURS_INT8 = "ours, replicated", "ours, zero3", "ours, zero3 int8"
_WARM_UP = 8
_PROMPT_LENGTH, _NUM_INPUTS, _NUM_TARGETS = 4, 4, 2


def measure_peer(settings: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of Hugging Face's T5, alone or in a DeepSpeed engine."""
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    from benchmarks.peers import T5WithOwnHead

    variant, dtype = settings["variant"], DTYPES[settings["dtype"]]
    model = T5WithOwnHead.from_pretrained(settings["folder"], dtype=dtype).requires_grad_(False)
    tuned = _Tuned(model.eval())
    ids, labels = _ids()
    run: Callable[..., torch.Tensor] = tuned
    backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward
    finish: Callable[[], Any] = tuned.zero_grad
    if variant != PLAIN:
        engine = _engine(tuned, leaf_blocks=variant == LEAVES, bf16=settings["dtype"] == "bf16")
        run, backward, finish = engine, engine.backward, engine.step
    times = _times(lambda: run(ids, labels), backward, finish, settings["steps"])
    leave_world()
    return times


def measure_ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of our backbone."""
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    from softprompt_dist.backbone.load import load_backbone
    from softprompt_dist.config import BackboneConfig
    from softprompt_dist.data.batching import TokenBatch
    from softprompt_dist.prompt.module import SoftPrompt
    from softprompt_dist.run.loss import token_loss

    backbone = load_backbone(BackboneConfig.model_validate(settings["backbone"]))
    prompt = SoftPrompt(torch.rand(_PROMPT_LENGTH, backbone.d_model) - 0.5)
    ids, labels = _ids()
    batch = TokenBatch(ids, torch.ones_like(ids), labels, torch.ones_like(labels))

    def loss() -> torch.Tensor:
        logits_BTV = backbone(prompt(len(ids), backbone.dtype), batch)
        return token_loss(logits_BTV, batch.labels_BT).total

    def finish() -> None:
        backbone.release()
        prompt.zero_grad()

    times = _times(loss, torch.Tensor.backward, finish, settings["steps"])
    leave_world()
    return times


class _Tuned(torch.nn.Module):
    """A prompt before Hugging Face's T5, as in PEFT but with nothing around it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        table = model.get_input_embeddings().weight
        prompt_PD = torch.rand(_PROMPT_LENGTH, table.shape[1], dtype=table.dtype) - 0.5
        self.prompt_PD = torch.nn.Parameter(prompt_PD)

    def forward(self, ids_BS: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        embeds_BSD = self.model.get_input_embeddings()(ids_BS)
        prompt_BPD = self.prompt_PD.expand(len(ids_BS), -1, -1)
        inputs = torch.cat([prompt_BPD, embeds_BSD], dim=1)
        return self.model(inputs_embeds=inputs, labels=labels_BT, use_cache=False).loss


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options = parser("hooks", "CPU time of one forward and backward of 24 + 24 tiny layers.")
    options.add_argument("--size", choices=sorted(SHAPES), default="24+24 tiny layers")
    options.add_argument("--steps", type=int, default=24, help="the fastest is reported")
    options.add_argument("--repeats", type=int, default=2, help="rounds over all variants")
    options.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    given = options.parse_args(argv)
    name = given.size.replace(" ", "-")
    folder = ensure_checkpoint(
        given.out / "models" / f"t5-{name}-{given.dtype}", SHAPES[given.size], given.dtype
    )
    variants = _variants(folder, given.dtype, given.steps)
    measured: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for _ in range(given.repeats):
        for variant, (function, settings) in variants.items():
            answers = run_ranks(f"benchmarks.hooks:{function}", settings, num_ranks=1)
            measured[variant] += answers
    best = {v: {k: min(a[k] for a in found) for k in found[0]} for v, found in measured.items()}
    total = {v: times["forward"] + times["backward"] for v, times in best.items()}
    title = f"CPU time of forward and backward, {given.size}, {given.dtype}, one rank, one thread"
    report = Report("hooks", title, settings_of(given), raw={**measured})
    report.rows = [
        {
            "path": v,
            "forward, ms": f"{1e3 * best[v]['forward']:.0f}",
            "backward, ms": f"{1e3 * best[v]['backward']:.0f}",
            "release or step, ms": f"{1e3 * best[v]['finish']:.1f}",
            "over plain": f"{total[v] / total[PLAIN]:.2f}x",
        }
        for v in best
    ]
    report.aims = [Aim(f"{OURS_ZERO3}, over plain", total[OURS_ZERO3] / total[PLAIN], 2.0)]
    report.publish(given.out)


def _variants(folder: Path, dtype: str, steps: int) -> dict[str, tuple[str, dict[str, Any]]]:
    base = {"dtype": dtype, "steps": steps}
    backbone = {"path": str(folder.resolve()), "dtype": dtype}
    cells = {
        OURS: {"sharding": "replicated"},
        OURS_ZERO3: {"sharding": "zero3"},
        OURS_INT8: {"sharding": "zero3", "quantization": "int8"},
    }
    peers = {
        v: ("measure_peer", {**base, "variant": v, "folder": str(folder)})
        for v in (PLAIN, STAGE3, LEAVES)
    }
    ours = {
        v: ("measure_ours", {**base, "backbone": {**backbone, **cell}}) for v, cell in cells.items()
    }
    return {**peers, **ours}


def _engine(tuned: _Tuned, *, leaf_blocks: bool, bf16: bool) -> Any:
    import deepspeed
    from transformers.models.t5.modeling_t5 import T5Block

    if leaf_blocks:
        deepspeed.utils.set_z3_leaf_modules(tuned, [T5Block])
    engine, *_ = deepspeed.initialize(
        model=tuned,
        optimizer=torch.optim.SGD([tuned.prompt_PD], lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.eval()
    return engine


def _ids() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(3, 250, (1, _NUM_INPUTS), generator=generator)
    return ids_BS, torch.randint(3, 250, (1, _NUM_TARGETS), generator=generator)


def _times(
    loss: Callable[[], torch.Tensor],
    backward: Callable[[torch.Tensor], Any],
    finish: Callable[[], Any],
    num_steps: int,
) -> dict[str, float]:
    """Least CPU seconds of each phase, over steps after the warm-up."""
    steps: list[tuple[float, ...]] = []
    for _ in range(_WARM_UP + num_steps):
        marks = [time.process_time()]
        value = loss()
        marks.append(time.process_time())
        backward(value)
        marks.append(time.process_time())
        finish()
        marks.append(time.process_time())
        steps.append(tuple(b - a for a, b in zip(marks, marks[1:], strict=False)))
    phases = zip(*steps[_WARM_UP:], strict=True)
    return dict(zip(("forward", "backward", "finish"), map(min, phases), strict=True))


if __name__ == "__main__":
    main()
