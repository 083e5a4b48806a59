"""What an adaptation is measured by on text it does not train on. B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.parallel import ranks
from softprompt_dist.progress import counted


class MeasuredModel(Protocol):
    """What is asked of a model. Under ZeRO-3 a call of either is a collective."""

    def losses(self, batch: RowBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Scalar sums over the tokens of rows: loss with z-loss, cross-entropy, how many."""

    def first_logits(self, batch: RowBatch) -> Tensor:
        """logits_BV behind the start piece of the first example of each row."""


def own_share(batches: Iterable[RowBatch]) -> list[RowBatch]:
    """This rank's part of batches that are dealt out one by one."""
    return list(islice(batches, ranks.rank(), None, ranks.world_size()))


def measure(  # noqa: PLR0913 - all of them the caller's own
    model: MeasuredModel,
    rows: Mapping[str, Sequence[RowBatch]],
    *,
    objective: str,
    sentinel_ids: Collection[int] = (),
    vocabulary_size: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """All ranks: likelihoods of validation rows in nats per target token, and the sentinel leak.

    Ranks may hold different numbers of batches, or none: whoever has fewer repeats one that then
    does not count, so that all make equally many forward passes. Sums are fp64.

    Args:
        model: must not train in its calls.
        rows: this rank's share of the validation rows, by objective; the same keys in the same
            order on all ranks.
        objective: of the run.
        sentinel_ids: of the tokenizer; empty: there is no leak to measure.
        vocabulary_size: of the tokenizer; the model's may be padded.
        between: called on all ranks before each batch; what it raises there ends the measurement.

    Returns:
        For each objective that has any rows `<objective>_nll`, cross-entropy alone; `z_loss`, what
        the run's objective adds to it; with sentinels and prefix-LM rows `sentinel_leak`: percent
        of the greedy continuations that begin with a sentinel.
    """
    measured = {}
    with torch.no_grad():
        for name, batches in rows.items():
            total, cross_entropy, num_tokens = _summed_losses(model, batches, between)
            if num_tokens:
                measured[f"{name}_nll"] = cross_entropy / num_tokens
            if num_tokens and name == objective:
                measured["z_loss"] = (total - cross_entropy) / num_tokens
        if sentinel_ids and "prefix_lm" in rows:
            ids = torch.tensor(sorted(sentinel_ids), device=ranks.device())
            prefixes = rows["prefix_lm"]
            leaked, num_rows = _summed_leaks(model, prefixes, ids, vocabulary_size, between)
            if num_rows:
                measured["sentinel_leak"] = 100.0 * leaked / num_rows
    return measured


def _summed_losses(
    model: MeasuredModel, batches: Sequence[RowBatch], between: Callable[[], None]
) -> tuple[float, ...]:
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device())
    for batch, counts in _in_step(batches, between):
        losses = torch.stack([part.double() for part in model.losses(batch)])
        if counts:
            sums += losses
    return tuple(ranks.all_reduce_sum(sums).tolist())


def _summed_leaks(
    model: MeasuredModel,
    batches: Sequence[RowBatch],
    sentinel_ids: Tensor,
    vocabulary_size: int,
    between: Callable[[], None],
) -> tuple[float, ...]:
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device())
    for batch, counts in _in_step(batches, between):
        next_ids_B = model.first_logits(batch)[:, :vocabulary_size].argmax(dim=-1)
        num_leaked = torch.isin(next_ids_B, sentinel_ids).sum()
        if counts:
            sums += torch.stack([num_leaked, torch.full_like(num_leaked, len(next_ids_B))])
    return tuple(ranks.all_reduce_sum(sums).tolist())


def _in_step(
    batches: Sequence[RowBatch], between: Callable[[], None]
) -> Iterator[tuple[RowBatch, bool]]:
    """All ranks: equally many batches on each, and whether one counts or is a repetition."""
    lengths = ranks.gather_objects(len(batches))
    if max(lengths) == 0:
        return
    spare = batches[0] if batches else None
    if min(lengths) == 0:
        spare = next(s for s in ranks.gather_objects(spare) if s is not None)
    assert spare is not None
    for number in counted(range(max(lengths)), "measuring", "batches"):
        between()
        yield (batches[number], True) if number < len(batches) else (spare, False)
