"""Training of all weights of a T5 v1.1 on plain text: what a run is made of, and its loop."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.backbone.t5_v11 import T5V11
from softprompt_dist.data.batching import TokenBatch
from softprompt_dist.data.denoising import DenoisingData
from softprompt_dist.errors import CheckpointError, NonFiniteLossError
from softprompt_dist.parallel import ranks
from softprompt_dist.run.adaptation_rate import build_optimizer, learning_rate_at
from softprompt_dist.run.checkpoint import Checkpoint, CheckpointStore
from softprompt_dist.run.loss import token_loss
from softprompt_dist.run.optimizer import optimizer_from_tensors, optimizer_to_tensors

WEIGHT_PREFIX = "model."
OPTIMIZER_PREFIX = "optimizer."
FREE_TO_CHANGE = {
    "run_directory", "steps", "decay_steps", "compile", "checkpoint", "export", "engine",
    "log_every_steps", "evaluation", "validation_corpus",
    "corpus", "tokenizer", "backbone",
}  # fmt: skip
"""Settings that a resumed run may have differently. The corpus is compared by its fingerprint."""

Losses = tuple[Tensor, Tensor, Tensor]
"""Sums over the tokens of a batch: loss with z-loss, cross-entropy in nats, number of tokens."""


@dataclass
class AdaptationRun:
    """A checked recipe, what was built from it, and how far it is."""

    config: AdaptConfig
    tokenizer: Any
    model: T5V11
    train: DenoisingData
    validation: DenoisingData | None
    corpus_fingerprint: str
    source_folder: Path | None = None
    """The checkpoint it started from."""
    optimizer: torch.optim.Optimizer = field(init=False)
    step: int = 0
    seconds: float = 0.0
    """Time spent in updates, over all attempts."""

    def __post_init__(self) -> None:
        """Move the model to this rank's device and give it an optimizer."""
        self.model.to(ranks.device()).train()
        self.optimizer = build_optimizer(self.config, list(self.model.parameters()))
        self._training_losses: Callable[..., Losses] = self._losses
        if self.config.compile:
            self._training_losses = torch.compile(self._losses, dynamic=False)

    def losses(self, batch: TokenBatch) -> Losses:
        """Losses of one micro-batch, with gradients in training."""
        compute = self._training_losses if self.model.training else self._losses
        # Span corruption leaves no padding, and no mask is faster than a full one.
        mask = batch.input_mask_BS if self.config.objective == "prefix_lm" else None
        return compute(batch.input_ids_BS, mask, shift_right(batch.target_ids_BT), batch.labels_BT)

    def _losses(
        self,
        input_ids_BS: Tensor,
        mask_BS: Tensor | None,
        decoder_ids_BT: Tensor,
        labels_BT: Tensor,
    ) -> Losses:
        use_bf16 = self.config.dtype == "bf16"
        with torch.autocast(input_ids_BS.device.type, torch.bfloat16, enabled=use_bf16):
            logits_BTV = self.model(
                input_ids=input_ids_BS,
                attention_mask=mask_BS,
                decoder_input_ids=decoder_ids_BT,
                use_cache=False,
            ).logits
        loss = token_loss(logits_BTV, labels_BT, z_loss=self.config.z_loss)
        return loss.total, loss.cross_entropy.detach(), loss.num_tokens.detach()


def shift_right(target_ids_BT: Tensor) -> Tensor:
    """What the decoder reads: the start piece (T5: padding, 0), then all targets but the last."""
    start_B1 = torch.zeros_like(target_ids_BT[:, :1])
    return torch.cat([start_B1, target_ids_BT[:, :-1]], dim=1)


def update_weights(run: AdaptationRun) -> dict[str, float]:
    """All ranks: one update on the next global batch; returns metrics per token.

    The loss is the sum over tokens divided by the number of target positions of the global batch, a
    constant, as in T5: so gradients do not depend on how the batch is dealt to ranks.

    Raises:
        NonFiniteLossError: on all ranks together, before the update.
    """
    config, rate = run.config, learning_rate_at(run.config, run.step)
    positions = config.batch.global_batch_size * config.targets_length
    run.optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in local_batches(run, run.step):
        losses = run.losses(batch)
        (losses[0] / positions).backward()
        sums += torch.stack([loss.detach().double().cpu() for loss in losses])
    _sum_gradients(run.model)
    total, cross_entropy, num_tokens = _sum_on_device(sums).tolist()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.max_gradient_norm or math.inf)
    if not (math.isfinite(total) and math.isfinite(float(norm))):
        raise NonFiniteLossError(
            f"Step {run.step + 1}: the loss is {total / num_tokens} and the gradient's norm "
            f"{float(norm)}; both must be finite. The update was not applied. Lower learning_rate."
        )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.step += 1
    return {
        "loss": total / num_tokens,
        "cross_entropy": cross_entropy / num_tokens,
        "num_tokens": num_tokens,
        "gradient_norm": float(norm),
        "learning_rate": rate,
    }


def local_batches(run: AdaptationRun, step: int) -> list[TokenBatch]:
    """This rank's micro-batches of the global batch of `step`."""
    batch = run.config.batch
    first = step * batch.global_batch_size
    starts = range(
        first + ranks.rank() * batch.micro_batch_size,
        first + batch.global_batch_size,
        batch.micro_batch_size * ranks.world_size(),
    )
    return [run.train.batch(s, batch.micro_batch_size).to(ranks.device()) for s in starts]


@torch.no_grad()
def validation_loss(run: AdaptationRun) -> float | None:
    """All ranks: validation cross-entropy in nats per target token; None without such text."""
    if run.validation is None:
        return None
    size = run.config.batch.micro_batch_size
    count = min(len(run.validation), run.config.evaluation.max_examples)
    sums = torch.zeros(2, dtype=torch.float64)
    run.model.eval()
    for start in range(ranks.rank() * size, count, size * ranks.world_size()):
        _, cross_entropy, num_tokens = run.losses(
            run.validation.batch(start, min(size, count - start)).to(ranks.device())
        )
        sums += torch.stack([cross_entropy.double().cpu(), num_tokens.double().cpu()])
    run.model.train()
    cross_entropy_sum, num_tokens_sum = _sum_on_device(sums).tolist()
    return cross_entropy_sum / num_tokens_sum


def save(run: AdaptationRun, store: CheckpointStore) -> None:
    """All ranks: publish weights, optimizer state and cursor."""
    weights = {WEIGHT_PREFIX + n: p.detach().cpu() for n, p in run.model.named_parameters()}
    values = {
        "seed": run.config.seed,
        "seconds": run.seconds,
        "corpus_fingerprint": run.corpus_fingerprint,
        "recipe": run.config.model_dump(mode="json", exclude=FREE_TO_CHANGE),
    }
    moments = {OPTIMIZER_PREFIX + n: t for n, t in optimizer_to_tensors(run.optimizer).items()}
    store.save(run.step, weights | moments, values)


def restore(run: AdaptationRun, store: CheckpointStore) -> bool:
    """All ranks: continue from the newest checkpoint; False where none was ever saved.

    Raises:
        CheckpointError: none is valid, or the newest belongs to another recipe or corpus.
    """
    checkpoint = store.load_newest()
    if checkpoint is None:
        return False
    _check_belongs(run, checkpoint)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            parameter.copy_(checkpoint.tensors[WEIGHT_PREFIX + name])
    moments = {
        name.removeprefix(OPTIMIZER_PREFIX): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(OPTIMIZER_PREFIX)
    }
    optimizer_from_tensors(run.optimizer, moments)
    checkpoint.restore_rng()
    run.step = checkpoint.step
    run.seconds = float(checkpoint.state.get("seconds", 0.0))
    return True


class StopRequest:
    """Inside its `with`, a SIGTERM (a cluster's warning) is remembered until the update is done."""

    def __init__(self) -> None:
        self._wanted = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        """Begin to remember."""
        self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        """Let the signal do again what it did before."""
        signal.signal(signal.SIGTERM, self._previous)

    def agreed(self) -> bool:
        """All ranks: whether any of them was asked to stop."""
        return bool(ranks.all_reduce_max(torch.tensor(int(self._wanted), device=ranks.device())))

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True


def _sum_on_device(sums: Tensor) -> Tensor:
    return ranks.all_reduce_sum(sums.to(ranks.device())).cpu()


def _sum_gradients(model: nn.Module) -> None:
    if ranks.world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = ranks.all_reduce_sum(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _check_belongs(run: AdaptationRun, checkpoint: Checkpoint) -> None:
    now = run.config.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    now["corpus"] = run.corpus_fingerprint
    then = {**checkpoint.state["recipe"], "corpus": checkpoint.state["corpus_fingerprint"]}
    different = [
        f"{k}: saved {then.get(k)!r}, now {now[k]!r}" for k in now if now[k] != then.get(k)
    ]
    if different:
        raise CheckpointError(
            f"The checkpoint of step {checkpoint.step} belongs to another run: "
            f"{'; '.join(different)}. Use the saved values, another --run-dir, or "
            "--fresh to set the old run aside."
        )
