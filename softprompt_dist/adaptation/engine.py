"""A language model whose weights DeepSpeed trains, at any ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation.engine_config import engine_config
from softprompt_dist.adaptation.fragments import layout_of, publish_weights
from softprompt_dist.adaptation.model import (
    CausalModel,
    Losses,
    LossModel,
    TrainableT5,
    recompute_layers,
)
from softprompt_dist.adaptation.sharded_adafactor import ShardedAdafactor
from softprompt_dist.adaptation.sharded_adamw import ShardedAdamW
from softprompt_dist.adaptation.sharded_optimizer import ShardedOptimizer
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.errors import NonFiniteLossError
from softprompt_dist.lifecycle.watchdog import tick
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.deepspeed_start import start_deepspeed
from softprompt_dist.parallel.host_memory import keep_freed_memory, pin_exactly
from softprompt_dist.private_names import assert_known


@dataclass(frozen=True)
class Update:
    """One update, over all ranks."""

    loss: float
    """Per target token in nats, z-loss included."""
    cross_entropy: float
    num_tokens: int
    """Target tokens that were learned from."""
    gradient_norm: float
    rms: float
    """Root mean square of the change of all weights."""
    relative_rms: float


class AdaptationEngine:
    """A model, its optimizer and where their parts lie. Weights are undefined until they are read.

    All ranks make one together.

    Args:
        config: the recipe.
        hf_config: the model's, with the dropout that is to be trained with.
        ds_config: a ds_config as it was read, or None.
    """

    def __init__(
        self, config: AdaptConfig, hf_config: PretrainedConfig, ds_config: dict[str, Any] | None
    ) -> None:
        ranks.together(lambda: assert_known("transformers"))
        start_deepspeed()
        import deepspeed

        if ranks.device().type == "cpu":
            keep_freed_memory()
        if config.engine.offload_optimizer == "cpu":
            pin_exactly()
        self.config = config
        settings = engine_config(config, ds_config, ranks.world_size())
        model = _build(config, hf_config, settings)
        names = model.model.checkpoint_names()
        if config.engine.activation_checkpointing:
            recompute_layers(model.model)
        self.optimizer = build_optimizer(config, list(model.parameters()))
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings
        )
        self.layout = layout_of(self._engine, names)
        self.optimizer.bind(self.layout)
        if config.compile:
            self._engine.module.compile_losses()

    @property
    def num_weights(self) -> int:
        """Of the whole model."""
        return sum(fragment.numel for _, fragment in self.layout.fragments())

    def publish_weights(self) -> None:
        """All ranks: compute with what was written into the layout's weights."""
        publish_weights(self._engine)

    def update(
        self,
        batches: Sequence[RowBatch],
        learning_rate: float,
        arrive: Callable[[], None] = lambda: None,
    ) -> Update:
        """All ranks: one update on a global batch, of which `batches` are this rank's.

        The loss is the sum over tokens divided by the number of target positions of the global
        batch, a constant, as in T5: gradients do not depend on how the batch is dealt to ranks.
        `arrive` is called where this rank comes to the first thing that it does with the others.

        Raises:
            NonFiniteLossError: on all ranks together; the update was then not made.
        """
        self._engine.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        sums = ranks.all_reduce_sum(self._accumulate(batches, arrive))
        total, cross_entropy, num_tokens = sums.tolist()
        norm = self._step(total / num_tokens)
        size = self.optimizer.update_size
        return Update(
            loss=total / num_tokens,
            cross_entropy=cross_entropy / num_tokens,
            num_tokens=int(num_tokens),
            gradient_norm=norm,
            rms=size.rms,
            relative_rms=size.relative_rms,
        )

    @torch.no_grad()
    def losses(self, batch: RowBatch) -> Losses:
        """All ranks: losses of rows, without gradients or dropout."""
        self._engine.eval()
        losses: Losses = self._engine(batch.to(ranks.device()))
        return losses

    @torch.no_grad()
    def first_logits(self, batch: RowBatch) -> Tensor:
        """All ranks: logits_BV of the first decoder position of rows, in fp32."""
        self._engine.eval()
        logits_BV: Tensor = self._engine(batch.to(ranks.device()), first_only=True)
        return logits_BV

    def _accumulate(self, batches: Sequence[RowBatch], arrive: Callable[[], None]) -> Tensor:
        """Gradients of all micro-batches; this rank's sums of `Losses` in fp64."""
        stage = self._engine.zero_optimization_stage()
        # Stage 3 gathers for the first forward pass, 2 reduces in each backward one, the others in
        # the last.
        first_backward_together = 1 if stage == 2 else len(batches)
        if stage == 3:
            arrive()
        positions = self.config.batch.global_batch_size * self.config.targets_length
        # DeepSpeed takes the mean over ranks of what is a sum here.
        factor = ranks.world_size() / positions
        sums = torch.zeros(3, dtype=torch.float64, device=ranks.device())
        for number, batch in enumerate(batches, start=1):
            losses = self._engine(batch.to(ranks.device()))
            if stage < 3 and number == first_backward_together:
                arrive()
            self._engine.backward(losses.total * factor, scale_wrt_gas=False)
            sums += torch.stack([part.detach().double() for part in losses])
            if number < len(batches):  # the last of them would update the weights
                self._engine.step()
            tick()
        return sums

    def _step(self, loss: float) -> float:
        """The update itself, if loss and gradient are finite; gives the gradient's norm."""
        is_whole = self._engine.zero_optimization_stage() == 0
        norm = _gradient_norm(self._engine.module) if is_whole else 0.0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _not_finite(loss, norm)
        self.optimizer.begin_update()
        self._engine.step()
        if is_whole:
            return norm
        norm = float(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():
            self.optimizer.num_updates -= 1
            raise _not_finite(loss, norm)
        return norm


def build_optimizer(config: AdaptConfig, parameters: list[nn.Parameter]) -> ShardedOptimizer:
    """The optimizer that `config` names; its rate is set before every update."""
    if config.optimizer == "adafactor":
        return ShardedAdafactor(parameters, lr=0.0, weight_decay=config.weight_decay)
    scaled = config.optimizer == "rms_scaled_adamw"
    return ShardedAdamW(parameters, lr=0.0, rms_scaled=scaled, weight_decay=config.weight_decay)


def _build(config: AdaptConfig, hf_config: PretrainedConfig, settings: dict[str, Any]) -> LossModel:
    """The model without weights: in memory that is not written yet, or sharded as it is made."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    stage = config.engine.zero_stage
    autocast = config.dtype == "bf16" and stage == 0
    dtype = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32

    def construct() -> LossModel:
        return LossModel(_language_model(hf_config), config.z_loss, autocast)

    if stage == 3:
        import deepspeed

        # Not told the dtype: fp32 would become the 16-bit type of the device. It reads the config.
        with deepspeed.zero.Init(config_dict_or_path=settings), no_init_weights():
            model = construct()
            _tie(model)
        return model
    with init_empty_weights(include_buffers=False):
        model = construct()
    _tie(model)
    _give_memory(model, dtype)
    return model


def _tie(model: LossModel) -> None:
    """Let a head share its embedding's weight where it does: both contexts make two of it."""
    if isinstance(model.model, CausalModel):
        model.model.model.tie_weights()


def _give_memory(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters without memory get some on this rank's device; those that are shared stay so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=dtype, device=ranks.device())
                made[id(parameter)] = nn.Parameter(values)
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(ranks.device()))


def _language_model(hf_config: PretrainedConfig) -> TrainableT5 | CausalModel:
    if hf_config.is_encoder_decoder:
        return TrainableT5(hf_config)
    return CausalModel(AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False))


def _gradient_norm(model: nn.Module) -> float:
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    return float(norms.norm())


def _not_finite(loss: float, norm: float) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"The loss is {loss} and the gradient's norm {norm}; both must be finite. The update was "
        "not applied. Lower learning_rate."
    )
