"""The evaluation benchmark's peer: PEFT's prompt on Hugging Face's T5, by the Trainer's `predict`.

Axes: B batch, A answers (the label set), T target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from benchmarks.peers import T5WithOwnHead, has_checkpoint_head
from softprompt_dist.data.batching import IGNORED_LABEL, TokenExample
from softprompt_dist.run.scoring import Prediction

if TYPE_CHECKING:
    from benchmarks.evaluation_ranks import Work


class PeftPredictor:
    """Answers as PEFT and the Trainer give them.

    greedy: `Seq2SeqTrainer.predict` with generation, of rows without labels: with them it would
    read each input once more, for a loss. rank: PEFT has nothing for it; each row is
    repeated for every label as its target, and the label's log-probability is taken of the logits.

    Raises:
        RuntimeError: the head is not the checkpoint's, so that it would be another model.
    """

    def __init__(self, work: Work, folder: Path) -> None:
        from benchmarks.evaluation_ranks import IdsAsText

        self._work = work
        self._ids = IdsAsText(work.tokenizer)
        self._folder = folder
        path = Path(work.settings["path"])
        model = T5WithOwnHead.from_pretrained(str(path), dtype=torch.float32)
        if not has_checkpoint_head(model, path):
            raise RuntimeError(f"The head of {path} was lost while loading: another model.")
        prompt_length = work.settings["prompt_length"]
        self._model = get_peft_model(
            model,
            PromptTuningConfig(
                task_type=TaskType.SEQ_2_SEQ_LM,
                num_virtual_tokens=prompt_length,
                # PEFT's default for seq2seq, 2, keeps a second prompt that nothing reads.
                num_transformer_submodules=1,
            ),
        )
        _set_prompt(self._model, work)

    def predict(self, examples: Sequence[TokenExample], method: str) -> list[Prediction]:
        """An answer for each example, in order."""
        return self._generated(examples) if method == "greedy" else self._ranked(examples)

    def _generated(self, examples: Sequence[TokenExample]) -> list[Prediction]:
        length = self._work.max_target_tokens
        rows = [_row(example) for example in examples]
        trainer = self._trainer(predict_with_generate=True)
        found = trainer.predict(rows, max_new_tokens=length, num_beams=1, do_sample=False)
        ids_BT = torch.as_tensor(found.predictions)[:, 1 : 1 + length]  # after the start token
        return [Prediction(text) for text in self._ids.batch_decode(ids_BT.tolist())]

    def _ranked(self, examples: Sequence[TokenExample]) -> list[Prediction]:
        labels = self._work.labels
        rows = [{**_row(e), "labels": list(ids)} for e in examples for ids in labels.ids]
        trainer = self._trainer(predict_with_generate=False)
        trainer.preprocess_logits_for_metrics = _label_scores
        found = torch.as_tensor(trainer.predict(rows).predictions)
        scores_BA = found.view(len(examples), len(labels.ids))
        return [
            Prediction(labels.texts[best], tuple(scores))
            for best, scores in zip(
                scores_BA.argmax(dim=1).tolist(), scores_BA.tolist(), strict=True
            )
        ]

    def _trainer(self, *, predict_with_generate: bool) -> Seq2SeqTrainer:
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(self._folder),
            use_cpu=True,
            per_device_eval_batch_size=self._work.settings["batch_size"],
            predict_with_generate=predict_with_generate,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        tokenizer = self._work.tokenizer
        kind = DataCollatorWithPadding if predict_with_generate else DataCollatorForSeq2Seq
        pad = kind(tokenizer, padding="longest")

        def collate(rows: list[dict[str, Any]]) -> Any:
            batch = pad(rows)
            self._work.count(batch["input_ids"])
            return batch

        return Seq2SeqTrainer(
            model=self._model, args=arguments, data_collator=collate, processing_class=tokenizer
        )


def _set_prompt(tuned: Any, work: Work) -> None:
    weight = tuned.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(work.initial_prompt(weight.shape[1]))


def _row(example: TokenExample) -> dict[str, list[int]]:
    return {
        "input_ids": list(example.input_ids),
        "attention_mask": [1] * len(example.input_ids),
    }


def _label_scores(outputs: Any, labels_BT: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's label, [B]; nothing larger leaves the Trainer's loop."""
    logits_BTV = outputs[0] if isinstance(outputs, tuple) else outputs
    loss_BT = F.cross_entropy(
        logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return -loss_BT.sum(dim=1)
