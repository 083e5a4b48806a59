"""Arithmetic of a step: matrix products of a frozen T5 v1.1, and what the machine can do of them.

A frozen weight costs its forward product and, in backward, only the product that carries the
gradient on. Axes: B rows, S encoder positions (prompt, input and padding), T decoder positions.
"""

from __future__ import annotations

from typing import Any

import torch


def frozen_step_flops(config: Any, num_rows: int, num_inputs: int, num_targets: int) -> float:
    """FLOPs of forward and backward over [B, S] encoder and [B, T] decoder positions.

    Args:
        config: a T5Config.
        num_rows: B.
        num_inputs: S.
        num_targets: T.
    """
    inner = config.num_heads * config.d_kv
    attention_weights = 4 * config.d_model * inner
    feed_forward_weights = 3 * config.d_model * config.d_ff
    num_layers, num_decoder_layers = config.num_layers, config.num_decoder_layers
    at_inputs = num_layers * (attention_weights + feed_forward_weights)
    at_inputs += num_decoder_layers * attention_weights // 2  # cross-attention's k and v
    at_targets = num_decoder_layers * (3 * attention_weights // 2 + feed_forward_weights)
    at_targets += config.d_model * config.vocab_size
    weights = 2.0 * num_rows * (at_inputs * num_inputs + at_targets * num_targets)
    pairs = num_layers * num_inputs**2
    pairs += num_decoder_layers * (num_targets**2 + num_targets * num_inputs)
    attention = 2.0 * 2 * num_rows * inner * pairs
    # Backward: one product for each weight, two for each of attention's, which has no frozen side.
    return 2 * weights + 3 * attention


def matmul_peak(settings: dict[str, Any]) -> dict[str, float]:
    """FLOP/s of the best of many square products on this rank, while the other ranks do the same.

    Args:
        settings: `size` of the square, `dtype` (a name in torch), `seconds` to try for.
    """
    from softprompt_dist.adaptation.peak import measured_peak
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    torch.distributed.barrier()
    dtype = getattr(torch, settings["dtype"])
    best = measured_peak(dtype, size=settings["size"], seconds=settings["seconds"])
    leave_world()
    return {"flops_per_second": best}
