"""The tuning benchmark's peer, set up as its documentation does, on the rows of our recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.clock import StepClock
from benchmarks.flops import frozen_step_flops
from benchmarks.peers import (
    T5WithOwnHead,
    has_checkpoint_head,
    scale_live_window,
    zero3_config,
)
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.batching import tokenise
from softprompt_dist.data.order import ExampleOrder
from softprompt_dist.data.tasks import load_task
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.initialise import initialise_prompt

Row = dict[str, list[int]]


class TimedTrainer(Trainer):
    """The Trainer on rows in their given order, with a clock on its phases."""

    def __init__(self, clock: StepClock, **options: Any) -> None:
        super().__init__(**options)
        self._clock = clock
        # PEFT's forward takes any keyword, so the Trainer believes that the loss is divided by the
        # tokens of the whole batch already, which T5's is not: it would be too large by the number
        # of micro-batches.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        """The model's loss; timed as forward."""
        rows_BS, labels_BT = inputs["input_ids"], inputs["labels"]
        config = self.accelerator.unwrap_model(self.model).get_base_model().config
        peft = self.accelerator.unwrap_model(self.model).active_peft_config
        num_inputs = peft.num_virtual_tokens + rows_BS.shape[1]
        flops = frozen_step_flops(config, len(rows_BS), num_inputs, labels_BT.shape[1])
        self._clock.add("flops", flops)
        with self._clock.phase("forward"):
            return super().compute_loss(model, inputs, *rest, **more)


class StepEnds(TrainerCallback):
    """Tells the clock when an update begins and ends, and times the engine's step."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """The engine exists by now."""
        engine = known["model"]
        if hasattr(engine, "step"):
            engine.step = self._clock.timed("optimizer", engine.step)
        self._clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """An update is over."""
        self._clock.end_step()


def build_trainer(
    config: TuneConfig, clock: StepClock, folder: Path, *, scaled_window: bool
) -> TimedTrainer:
    """All ranks: model, prompt and rows as `config` has them, ready to train.

    Raises:
        RuntimeError: the head is not the checkpoint's, so that it would be another model.
    """
    path = Path(config.backbone.path)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    ds_config = zero3_config(config.backbone.dtype)
    if scaled_window:
        from benchmarks.models import num_parameters_in

        scale_live_window(ds_config, num_parameters_in(path))
    # Before the model: it makes `from_pretrained` partition while it loads.
    arguments = _arguments(config, folder, ds_config)
    model = T5WithOwnHead.from_pretrained(str(path), dtype=torch.float32)
    if not has_checkpoint_head(model, path):
        raise RuntimeError(f"The head of {path} was lost while loading: this is another model.")
    tuned = get_peft_model(model, _peft_config(config))
    _set_prompt(tuned, config)
    return TimedTrainer(
        clock,
        model=tuned,
        args=arguments,
        train_dataset=_rows_in_order(config, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest"),
        callbacks=[StepEnds(clock)],
    )


def _arguments(config: TuneConfig, folder: Path, ds_config: dict[str, Any]) -> TrainingArguments:
    batch = config.batch
    per_pass = batch.micro_batch_size * ranks.world_size()
    return TrainingArguments(
        output_dir=str(folder),
        deepspeed=ds_config,
        use_cpu=ranks.device().type == "cpu",
        per_device_train_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=batch.global_batch_size // per_pass,
        max_steps=config.steps,
        optim="adamw_torch",
        learning_rate=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
    )


def _peft_config(config: TuneConfig) -> PromptTuningConfig:
    return PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_virtual_tokens=config.prompt.prompt_length,
        # PEFT's default for seq2seq, 2, trains a second prompt that nothing reads.
        num_transformer_submodules=1,
    )


def _set_prompt(tuned: Any, config: TuneConfig) -> None:
    """The values that our run starts from."""
    weight = tuned.prompt_encoder["default"].embedding.weight
    initial_PD = initialise_prompt(
        config.prompt,
        embed=lambda ids_N: ids_N,
        vocabulary_size=0,
        encode=lambda text: [],
        labels=(),
        d_model=weight.shape[1],
        generator=torch.Generator().manual_seed(config.seed),
    )
    with torch.no_grad():
        weight.copy_(initial_PD)


def _rows_in_order(config: TuneConfig, tokenizer: Any) -> list[Row]:
    """Rows as our run consumes them: each global batch holds the same ones."""
    train = tokenise(
        load_task(config.task).train,
        tokenizer,
        family="seq2seq",
        max_input_tokens=config.backbone.max_input_tokens,
        append_eos=True,
    ).examples
    count = config.steps * config.batch.global_batch_size
    return [
        {
            "input_ids": list(train[i].input_ids),
            "attention_mask": [1] * len(train[i].input_ids),
            "labels": list(train[i].target_ids),
        }
        for i in ExampleOrder(len(train), config.seed).indices(0, count)
    ]
