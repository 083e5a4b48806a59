"""Adafactor under ZeRO: factored statistics are those of whole matrices, summed over the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softprompt_dist.adaptation.fragments import Fragment, sharded
from softprompt_dist.adaptation.sharded_optimizer import (
    SMALLEST_SCALE,
    ShardedOptimizer,
    blocks,
    squared_sum,
)
from softprompt_dist.adaptation.sharded_tensor import ShardedTensor
from softprompt_dist.run.optimizer import SMALLEST_FACTORED_AXIS, second_moment_decay


class ShardedAdafactor(ShardedOptimizer):
    """Adafactor without momentum, relative to each parameter's scale, as Mesh-TF and T5X have it.

    Equals `run.optimizer.T5XAdafactor(multiply_by_parameter_scale=True)` on whole parameters, which
    golden values hold to the original. Two sums over the ranks per flat tensor: rows, columns and
    squared weights; then squared updates. ZeRO gives optimizers shards, over which a plain
    Adafactor would be another algorithm for every world size.

    The decay of the statistics counts from the first update of this run (T5X: `step_offset` set to
    the starting step), whatever the learning rate's clock.

    Args:
        parameters: as DeepSpeed wants them.
        lr: learning rate; may be changed between updates.
        decay_rate: the statistics' decay is 1 - step ** -decay_rate.
        clipping_threshold: largest root mean square of an update before lr, of each parameter.
        weight_decay: share of the parameter taken away by each update.
        epsilon: added to squared gradients.
    """

    def __init__(  # noqa: PLR0913 - the hyperparameters of the original
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        decay_rate: float = 0.8,
        clipping_threshold: float = 1.0,
        weight_decay: float = 0.0,
        epsilon: float = 1e-30,
    ) -> None:
        defaults = {
            "lr": lr,
            "decay_rate": decay_rate,
            "clipping_threshold": clipping_threshold,
            "weight_decay": weight_decay,
            "epsilon": epsilon,
        }
        super().__init__(parameters, defaults)

    def update(self, flat: Tensor, fragments: list[Fragment], group: dict[str, Any]) -> None:
        """Move the fragments of `flat` by its gradient, which becomes the update."""
        state = self._state_of(flat, fragments)
        beta2 = second_moment_decay(self.num_updates - 1, group["decay_rate"])
        sums = self._summed(flat, fragments)
        for fragment, of_parameter in zip(fragments, sums, strict=True):
            update_of = _Statistics(of_parameter, state, beta2, group["epsilon"])
            _normalise(fragment, fragment.of(_gradient(flat)), update_of)
        grad = _gradient(flat)
        squared = self.sum_over_ranks(torch.stack([squared_sum(f.of(grad)) for f in fragments]))
        updates, weights = squared.tolist(), torch.stack([s[-1] for s in sums]).tolist()
        changes = []
        for fragment, update, weight in zip(fragments, updates, weights, strict=True):
            rms = (update / fragment.numel) ** 0.5
            scale = max((weight / fragment.numel) ** 0.5, SMALLEST_SCALE)
            size = group["lr"] * scale / max(1.0, rms / group["clipping_threshold"])
            values = fragment.of(flat.data)
            if group["weight_decay"]:
                values.mul_(1.0 - group["weight_decay"])
            values.add_(fragment.of(grad), alpha=-size)
            changes.append(update * size**2)
        self.record(fragments, changes, weights)

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """Second moments of the parameters that are not factored."""
        found = {}
        for flat, fragments in self.layout.flats.items():
            state = self._state_of(flat, fragments)
            for fragment in fragments:
                if not is_factored(fragment.shape):
                    values = state["moments"][fragment.name]
                    tensor = sharded(fragment, values, self.layout.is_sharded)
                    found[f"{fragment.name}.v"] = tensor
        return found

    def small_state(self) -> dict[str, Tensor]:
        """Row and column means of the factored ones."""
        return {
            f"{fragment.name}.{axis}": values
            for flat, fragments in self.layout.flats.items()
            for fragment in fragments
            if is_factored(fragment.shape)
            for axis, values in zip(
                ("v_row", "v_col"),
                self._state_of(flat, fragments)["factors"][fragment.name],
                strict=True,
            )
        }

    def _state_of(self, flat: Tensor, fragments: list[Fragment]) -> dict[str, Any]:
        state = self.state[flat]
        if not state:
            state["factors"] = {
                f.name: [flat.new_zeros(length, requires_grad=False) for length in f.shape]
                for f in fragments
                if is_factored(f.shape)
            }
            state["moments"] = {
                f.name: flat.new_zeros(f.size, requires_grad=False)
                for f in fragments
                if not is_factored(f.shape)
            }
        return state

    def _summed(self, flat: Tensor, fragments: list[Fragment]) -> list[Tensor]:
        """Of each parameter, over all ranks: last the sum of squared weights.

        Before it, where it is factored, the sums of squared gradients of each row and each column.
        """
        sizes = [_num_sums(fragment) for fragment in fragments]
        buffer = flat.new_zeros(sum(sizes), requires_grad=False)
        grad = _gradient(flat)
        for fragment, sums in zip(fragments, buffer.split(sizes), strict=True):
            sums[-1] = squared_sum(fragment.of(flat.data))
            if is_factored(fragment.shape):
                rows = fragment.shape[0]
                for block in blocks(fragment):
                    square = block.of(fragment.of(grad)).square()
                    sums[:rows][block.row_range] += square.sum(dim=1)
                    sums[rows:-1][block.column_range] += square.sum(dim=0)
        return list(self.sum_over_ranks(buffer).split(sizes))


@dataclass(frozen=True)
class _Statistics:
    """What one parameter's update takes, besides its gradient."""

    sums: Tensor
    """Over all ranks; see `_summed`."""
    state: dict[str, Any]
    beta2: float
    epsilon: float


def _normalise(fragment: Fragment, gradient: Tensor, given: _Statistics) -> None:
    """Make the gradient the update: over the root of its second moment, brought up to date."""
    beta2, epsilon = given.beta2, given.epsilon
    if not is_factored(fragment.shape):
        moment = given.state["moments"][fragment.name]
        moment.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        moment.add_(epsilon * (1.0 - beta2))
        gradient.mul_(moment.rsqrt())
        return
    num_rows, num_columns = fragment.shape
    row, column = given.state["factors"][fragment.name]
    row.mul_(beta2).add_(given.sums[:num_rows] / num_columns + epsilon, alpha=1.0 - beta2)
    column.mul_(beta2).add_(given.sums[num_rows:-1] / num_rows + epsilon, alpha=1.0 - beta2)
    row_factor, column_factor = (row / row.mean()).rsqrt(), column.rsqrt()
    for block in blocks(fragment):
        values = block.of(gradient)
        values.mul_(row_factor[block.row_range, None]).mul_(column_factor[block.column_range])


def is_factored(shape: tuple[int, ...]) -> bool:
    """Whether Adafactor keeps rows and columns of a parameter instead of all second moments."""
    return len(shape) == 2 and min(shape) >= SMALLEST_FACTORED_AXIS


def _num_sums(fragment: Fragment) -> int:
    return (sum(fragment.shape) if is_factored(fragment.shape) else 0) + 1


def _gradient(flat: Tensor) -> Tensor:
    assert flat.grad is not None
    return flat.grad
