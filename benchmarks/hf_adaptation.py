"""The adaptation benchmark's peer: Trainer, DeepSpeed and Adafactor of Hugging Face, our examples.

As one would write it with what they offer: one example a row, `DataCollatorForSeq2Seq`. The
gradient of a batch is a mean of means, and Adafactor is given flat shards by ZeRO; both make
another algorithm of it than ours, of the same cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.optimization import Adafactor

from benchmarks.clock import CpuTime, StepClock
from benchmarks.peers import T5WithOwnHead, has_checkpoint_head, zero3_config
from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.backbone.architecture import architecture_of
from softprompt_dist.data.batching import IGNORED_LABEL
from softprompt_dist.data.lm.corpus import open_corpus
from softprompt_dist.data.lm.examples import LMData
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.parallel import ranks
from softprompt_dist.planning.work import training_operations

Example = dict[str, list[int]]
_ZERO = {
    2: {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
    },
    3: zero3_config("fp32")["zero_optimization"],
}
"""As in Hugging Face's documentation; other stages have nothing to set."""


class CountingTrainer(Trainer):
    """The Trainer on examples in their given order, with a clock on its phases."""

    def __init__(self, clock: StepClock, architecture: Any, **options: Any) -> None:
        super().__init__(**options)
        self._clock, self._architecture = clock, architecture
        # T5's loss is the mean over the tokens of a micro-batch, whatever it is told.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        """The model's loss; timed as forward, and its tokens counted."""
        mask_BS, labels_BT = inputs["attention_mask"], inputs["labels"]
        (rows, num_inputs), num_targets = mask_BS.shape, labels_BT.shape[1]
        counted = {
            "real_tokens": int(mask_BS.sum()) + int((labels_BT != IGNORED_LABEL).sum()),
            "positions": rows * (num_inputs + num_targets),
            "flops": training_operations(self._architecture, rows, num_inputs, num_targets),
        }
        for name, value in counted.items():
            self._clock.add(name, value)
        with self._clock.phase("forward"):
            return super().compute_loss(model, inputs, *rest, **more)


class StepEnds(TrainerCallback):
    """Tells the clock when an update begins and ends."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock
        self._cpu = CpuTime()

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Everything is built."""
        self._cpu.since_last_call()
        self._clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """An update is over."""
        self._clock.add("cpu", self._cpu.since_last_call())
        self._clock.end_step()


def build_trainer(
    config: AdaptConfig, settings: Mapping[str, Any], clock: StepClock, folder: Path
) -> CountingTrainer:
    """All ranks: model, optimizer and examples as `config` has them, ready to train.

    Raises:
        RuntimeError: the head is not the checkpoint's, so that it would be another model.
    """
    path = Path(str(config.backbone))
    data, tokenizer = open_data(config, Path(settings["cache"]))
    per_pass = _micro_batch(config, settings) * ranks.world_size()
    per_update = _examples_per_update(config, settings, per_pass)
    # Before the model: at stage 3 it makes `from_pretrained` partition while it loads.
    arguments = _arguments(config, folder, per_pass, per_update)
    model = T5WithOwnHead.from_pretrained(str(path), dtype=torch.float32)
    if not has_checkpoint_head(model, path):
        raise RuntimeError(f"The head of {path} was lost while loading: this is another model.")
    optimizer = Adafactor(
        model.parameters(),
        lr=config.learning_rate,
        scale_parameter=True,
        relative_step=False,
        warmup_init=False,
    )
    return CountingTrainer(
        clock,
        architecture_of(model.config.model_type, model.config.to_dict()),
        model=model,
        args=arguments,
        train_dataset=_examples(data, config.steps * per_update),
        data_collator=DataCollatorForSeq2Seq(
            tokenizer, padding=settings["padding"], max_length=config.inputs_length
        ),
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[StepEnds(clock)],
    )


def open_data(config: AdaptConfig, cache: Path) -> tuple[LMData, Any]:
    """All ranks: the text as examples, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(config.backbone))
    special = SpecialIds.of(tokenizer, config.objective)
    corpora = cache / "corpora"  # where our runs look
    ranks.on_main(lambda: open_corpus(config.corpus, tokenizer, corpora) and None)
    return LMData(open_corpus(config.corpus, tokenizer, corpora), special, config), tokenizer


def _micro_batch(config: AdaptConfig, settings: Mapping[str, Any]) -> int:
    """Full rows as ours; of single documents, which are shorter, more."""
    is_full = config.objective == "span_corruption"
    return config.batch.micro_batch_size if is_full else int(settings["micro_batch"])


def _examples_per_update(config: AdaptConfig, settings: Mapping[str, Any], per_pass: int) -> int:
    """As many as our greedily packed rows hold, in whole passes."""
    rows = config.batch.global_batch_size
    if config.objective == "span_corruption":
        return rows
    data, _ = open_data(config.model_copy(update={"packing": "greedy"}), Path(settings["cache"]))
    examples = 0
    for _ in range(config.steps):
        examples = data.plan(examples, rows).examples_consumed
    return max(1, round(examples / config.steps / per_pass)) * per_pass


def _arguments(
    config: AdaptConfig, folder: Path, per_pass: int, per_update: int
) -> TrainingArguments:
    stage = config.engine.zero_stage
    ds_config = {
        "zero_optimization": _ZERO.get(stage, {"stage": stage}),
        "zero_allow_untested_optimizer": True,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    return TrainingArguments(
        output_dir=str(folder),
        deepspeed=ds_config,
        use_cpu=ranks.device().type == "cpu",
        per_device_train_batch_size=per_pass // ranks.world_size(),
        gradient_accumulation_steps=per_update // per_pass,
        max_steps=config.steps,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _examples(data: LMData, count: int) -> list[Example]:
    """The first `count`, without padding."""
    batch = data.rows(data.plan(0, count), 0, count)
    return [_example(batch, row) for row in range(count)]


def _example(batch: RowBatch, row: int) -> Example:
    assert batch.input_ids_BS is not None
    assert batch.input_segments_BS is not None
    input_ids = batch.input_ids_BS[row][batch.input_segments_BS[row] > 0].tolist()
    labels = batch.labels_BT[row][batch.target_segments_BT[row] > 0].tolist()
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}
