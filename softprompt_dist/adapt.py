"""`softprompt adapt`: train all weights of a T5 v1.1 on plain text, on one rank or many.

    python -m softprompt_dist.adapt --recipe adapt-tiny-t5-span --run-dir runs/tiny-span
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softprompt_dist.backbone.t5_v11 import T5V11, new_t5, read_t5, write_t5
from softprompt_dist.cache import cache_directory
from softprompt_dist.config import AdaptConfig, load_recipe, to_yaml
from softprompt_dist.data.corpus import tokenise_corpus
from softprompt_dist.data.denoising import DenoisingData, SpecialIds
from softprompt_dist.errors import CheckpointError, ConfigError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.join import join_world, leave_world
from softprompt_dist.parallel.verb import VerbParser, run_verb
from softprompt_dist.run.adaptation import (
    AdaptationRun,
    StopRequest,
    restore,
    save,
    update_weights,
    validation_loss,
)
from softprompt_dist.run.checkpoint import CheckpointStore

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_parser() -> VerbParser:
    """Options of `softprompt adapt`."""
    parser = VerbParser("adapt", "Train all weights of a T5 v1.1 on plain text.")
    parser.add_recipe_options()
    parser.add_argument("--resume", action="store_true", help="refuse to start at step 0")
    return parser


def build(config: AdaptConfig) -> AdaptationRun:
    if config.init == "from_config":
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        size = -(-len(tokenizer) // 64) * 64
        model = new_t5(config.architecture, size, config.dropout, config.seed)
    else:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.backbone)
        model = read_t5(Path(config.backbone), config.dropout)
    special = SpecialIds.of(tokenizer)
    cache = cache_directory() / "corpora"
    train = tokenise_corpus(config.corpus, tokenizer, cache)
    validation = None
    if config.validation_corpus:
        held = tokenise_corpus(config.validation_corpus, tokenizer, cache)
        validation = DenoisingData(held, special, config)
    print('tokens', len(train.token_ids), flush=True)
    return AdaptationRun(
        config, tokenizer, model, DenoisingData(train, special, config), validation, train.fingerprint
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    config = load_recipe(AdaptConfig, options.recipe, options.overrides)
    directory = Path(options.run_dir)
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    join_world()
    run = build(config)
    store = CheckpointStore(directory / "checkpoints", config.checkpoint.keep_last)
    restore(run, store)
    stop = StopRequest()
    start, first = time.time(), run.step
    while run.step < config.steps:
        metrics = update_weights(run)
        if run.step % config.log_every_steps == 0:
            rate = (run.step - first) / (time.time() - start)
            line = {"step": run.step, **metrics, "steps_per_second": rate}
            with (directory / "metrics.jsonl").open("a") as f:
                f.write(json.dumps(line) + "\n")
            print(time.strftime("%H:%M:%S"), json.dumps(line), flush=True)
        if run.step % config.evaluate_every_steps == 0 or run.step == config.steps:
            line = {"step": run.step, "validation": validation_loss(run)}
            with (directory / "metrics.jsonl").open("a") as f:
                f.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        if run.step in config.export_steps or run.step == config.steps:
            write_t5(run.model, run.tokenizer, directory / f"export-{run.step:08d}", DTYPES[config.export_dtype])
        if stop.agreed():
            save(run, store)
            break
        if run.step % config.checkpoint.every_steps == 0 or run.step == config.steps:
            save(run, store)
    leave_world()


if __name__ == "__main__":
    run_verb(main)
