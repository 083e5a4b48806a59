"""An adaptation's model, data and cursor, and what of them a checkpoint holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation.checkpoint import FoundCheckpoint
from softprompt_dist.adaptation.engine import AdaptationEngine
from softprompt_dist.adaptation.learning_rate import learning_rate_at
from softprompt_dist.adaptation.measures import measure, own_share
from softprompt_dist.adaptation.saving import RunState
from softprompt_dist.adaptation.sharded_tensor import ShardedTensor
from softprompt_dist.adaptation.source import Source, check_history, find_source
from softprompt_dist.adaptation.verification import check_forms
from softprompt_dist.cache import cache_directory
from softprompt_dist.data.lm.corpus import open_corpus, verify_folders
from softprompt_dist.data.lm.examples import LMData
from softprompt_dist.data.lm.objectives import random_spans_helper
from softprompt_dist.data.lm.rows import RowBatch
from softprompt_dist.data.lm.special_ids import SpecialIds
from softprompt_dist.data.lm.stream import BatchStream, StepBatches
from softprompt_dist.data.lm.token_source import TokenSource
from softprompt_dist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteLossError,
)
from softprompt_dist.identity import Identity, check_same_backbone
from softprompt_dist.lifecycle.watchdog import tick
from softprompt_dist.parallel import polling, ranks, stop
from softprompt_dist.run.random_state import (
    derived_random_state,
    random_state,
    restore_random_state,
)
from softprompt_dist.run.tuning import check_world

log = logging.getLogger(__name__)

FREE_TO_CHANGE: dict[str, Any] = {
    **dict.fromkeys(
        ("name", "run_directory", "steps", "decay_steps", "compile", "engine", "checkpoint"), ...
    ),
    **dict.fromkeys(("export", "log_every_steps", "evaluation", "validation_corpus"), ...),
    **dict.fromkeys(("corpus", "verify_corpus", "tokenizer", "backbone", "health"), ...),
    "batch": {"micro_batch_size"},
}
"""Settings that a resumed run may have differently: none changes what is learned, the end of the
schedule aside, or the corpus' fingerprint decides, or the identity of what is started from."""


@dataclass
class AdaptationRun:
    """A checked recipe, what was built from it, and how far it is."""

    config: AdaptConfig
    source: Source
    identity: Identity
    """Of what it starts from."""
    engine: AdaptationEngine
    data: LMData
    validation: dict[str, list[RowBatch]]
    """By objective: this rank's share of rows that are not trained on."""
    corpus_fingerprint: str
    special: SpecialIds
    step: int = 0
    examples_consumed: int = 0
    real_tokens: int = 0
    """Of both sides, padding not counted, all ranks and attempts."""
    seconds: float = 0.0
    """Spent in updates, all attempts."""
    measured_step: int = -1
    """Of the latest measurement that came to its end."""

    def batches(self) -> BatchStream:
        """This rank's micro-batches of one update after the other, from where the run is."""
        return BatchStream(
            self.data,
            self.config.batch,
            self.examples_consumed,
            ranks.rank(),
            ranks.world_size(),
        )

    def update(
        self, batches: StepBatches, arrive: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """All ranks: one update; its metrics. `arrive`: see `AdaptationEngine.update`.

        Raises:
            NonFiniteLossError: on all ranks together; the update was then not made.
        """
        rate = learning_rate_at(self.config, self.step)
        try:
            update = self.engine.update(batches.micro_batches, rate, arrive)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"Step {self.step + 1}: {error}") from error
        self.step += 1
        self.examples_consumed = batches.examples_consumed
        self.real_tokens += batches.num_real_tokens
        return {
            "loss": update.loss,
            "cross_entropy": update.cross_entropy,
            "z_loss": update.loss - update.cross_entropy,
            "learning_rate": rate,
            "gradient_norm": update.gradient_norm,
            "update_rms": update.rms,
            "relative_update_rms": update.relative_rms,
            "num_tokens": update.num_tokens,
        }

    def measure(self, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """All ranks: likelihoods and sentinel leak on the validation text; empty without one.

        `between` is called on all ranks before each batch, and may cut it short.
        """
        measured = measure(
            self.engine,
            self.validation,
            objective=self.config.objective,
            sentinel_ids=self.special.sentinels,
            vocabulary_size=len(self.source.tokenizer),
            between=between,
        )
        self.measured_step = self.step
        return measured


def build_run(
    config: AdaptConfig, ds_config: dict[str, Any] | None, *, force: bool = False
) -> AdaptationRun:
    """All ranks: everything a recipe needs, but for the weights, which `fill` or `restore` reads.

    `force`: though the source is no longer what its adaptation.json tells of, with a warning.

    Raises:
        ConfigError: the recipe leaves out what its `init` needs, its lengths do not suit its
            objective, or the world size its batch.
        DataError: a corpus is missing, damaged, too short, or made with another tokenizer.
        BackboneError: the checkpoint to start from cannot be used.
        StoppedError: on all ranks; one of them was sent a signal.
    """
    check_world(config, ranks.world_size())
    source = find_source(config)
    identity = ranks.on_main(source.identity)
    ranks.on_main(lambda: check_history(source, identity, config, force=force))
    stop.end_here_if_asked("looking at the model")
    special = ranks.together(
        lambda: SpecialIds.of(source.tokenizer, config.objective, source.hf_config)
    )
    corpus = _open(config.corpus, source, verify=config.verify_corpus)
    data = ranks.together(lambda: _data(corpus, special, config))
    validation = {}
    if config.validation_corpus:
        text = _open(config.validation_corpus, source, verify=config.verify_corpus)
        validation = ranks.together(lambda: _validation(text, special, config))
    stop.end_here_if_asked("reading the text")
    hf_config = source.training_config(config.dropout)
    # Of span corruption rows may be shorter than they might be.
    as_read = config.model_copy(update={"targets_length": data.targets_length})
    return AdaptationRun(
        config=config,
        source=source,
        identity=identity,
        engine=AdaptationEngine(as_read, hf_config, ds_config),
        data=data,
        validation=validation,
        corpus_fingerprint=corpus.fingerprint,
        special=special,
    )


def start(run: AdaptationRun) -> None:
    """All ranks: read the weights that the run starts from; each draws its own dropout."""
    run.source.fill(run.engine.layout)
    run.engine.publish_weights()
    rank, world_size = ranks.rank(), ranks.world_size()
    restore_random_state(derived_random_state(run.config.seed, 0, rank, world_size))


def state_of(run: AdaptationRun) -> RunState:
    """Weights, optimizer state and cursor as they are, not copied."""
    values = {
        "seed": run.config.seed,
        "examples_consumed": run.examples_consumed,
        "real_tokens": run.real_tokens,
        "seconds": run.seconds,
        "num_updates": run.engine.optimizer.num_updates,
        "measured_step": run.measured_step,
        "decisive": decisive_settings(run),
        "source": asdict(run.identity),
        "lineage": run.source.lineage(),
    }
    small = run.engine.optimizer.small_state()
    return RunState(run.step, _state_tensors(run), small, values, random_state())


def restore(run: AdaptationRun, found: FoundCheckpoint, *, force: bool = False) -> None:
    """All ranks: continue from a checkpoint, whatever ranks or ZeRO stage saved it.

    Raises:
        CheckpointError: it belongs to another recipe or corpus; or it began with another model, and
            not `force`.
    """
    ranks.on_main(lambda: _check_source(run, found, force=force))
    ranks.together(lambda: _check_belongs(run, found))
    optimizer = run.engine.optimizer
    found.read_into(_state_tensors(run))
    saved = found.small()
    ranks.together(lambda: check_forms(found.state, saved, optimizer.small_state()))
    for name, values in optimizer.small_state().items():
        values.copy_(saved[name])
    run.engine.publish_weights()
    found.restore_rng()
    run.step = found.step
    run.examples_consumed = int(found.state["examples_consumed"])
    run.real_tokens = int(found.state["real_tokens"])
    run.seconds = float(found.state["seconds"])
    run.measured_step = int(found.state.get("measured_step", run.step))  # of an older release
    optimizer.num_updates = int(found.state["num_updates"])


def _state_tensors(run: AdaptationRun) -> dict[str, ShardedTensor]:
    moments = run.engine.optimizer.sharded_state()
    return run.engine.layout.weights() | {f"optimizer.{n}": t for n, t in moments.items()}


def decisive_settings(run: AdaptationRun) -> dict[str, Any]:
    """Everything that decides what is learned, but for the number of steps."""
    recipe = run.config.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    return recipe | {"corpus fingerprint": run.corpus_fingerprint}


def _check_belongs(run: AdaptationRun, found: FoundCheckpoint) -> None:
    now, then = decisive_settings(run), found.state.get("decisive")
    then = then if isinstance(then, dict) else {}
    different = [
        f"{key}: saved {then.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key)
    ]
    if different:
        raise CheckpointError(
            f"The checkpoint of step {found.step} belongs to another run: "
            f"{'; '.join(different)}. Use the saved values, another --run-dir, or "
            "--fresh to set the old run aside."
        )


def _check_source(run: AdaptationRun, found: FoundCheckpoint, *, force: bool) -> None:
    """Config, tokenizer and history are the source's; they must be those of the weights saved."""
    checkpoint = f"The checkpoint of step {found.step}"
    try:
        # Release 0.1.0 saved nothing of it.
        there = Identity.from_json(found.state.get("source", {"path": "", "weights": ""}))
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint} is whole, but its {error}. Resume another one, or pass --fresh to set "
            "it aside."
        ) from error
    belongs, refusal = f"{checkpoint} began with", CheckpointError
    check_same_backbone(there, run.identity, belongs, error=refusal, force=force)
    then, now = found.state.get("lineage"), run.source.lineage()
    if then is None or then == now:
        return
    message = (
        f"{checkpoint} began with a model of other stages: {then!r:.500} there, {now!r:.500} here "
        "(adaptation.json). "
    )
    if not force:
        raise CheckpointError(f"{message}Use that model, or accept this one with --force.")
    log.warning("%sIts export will tell of the latter, as forced.", message)


def _open(specs: list[str], source: Source, *, verify: bool) -> TokenSource:
    """Rank 0 tokenises what must be; the others find it in the cache, or fill their own node's.

    Checksums of folders are dealt over the ranks.
    """

    def work() -> TokenSource:
        return open_corpus(specs, source.tokenizer, cache_directory() / "corpora")

    doing = "tokenising the text"
    polling.on_main(lambda: work() and None, doing, tick)
    with polling.alone(doing):
        tokens = ranks.together(work)
    if verify:
        ranks.together(lambda: verify_folders(specs, ranks.rank(), ranks.world_size()))
    return tokens


def _data(corpus: TokenSource, special: SpecialIds, config: AdaptConfig) -> LMData:
    data = LMData(corpus, special, config)
    data.require_rows(config.batch.global_batch_size)
    return data


def _validation(
    text: TokenSource, special: SpecialIds, config: AdaptConfig
) -> dict[str, list[RowBatch]]:
    """This rank's rows of each objective. Only the one that is trained must be had."""
    found: dict[str, list[RowBatch]] = {}
    for setting in _measured(config, special):
        count, size = config.evaluation.max_examples, config.batch.micro_batch_size
        try:
            rows = LMData(text, special, setting).validation_batches(count, size)
            found[setting.objective] = own_share(rows)
        except (ConfigError, DataError) as error:
            if setting.objective == config.objective:
                raise type(error)(f"validation_corpus: {error}") from error
            if ranks.is_main():
                log.warning("%s is not measured: %s", setting.objective, error)
    return found


def _measured(config: AdaptConfig, special: SpecialIds) -> Iterator[AdaptConfig]:
    """The objectives that are measured: of an encoder-decoder both, whichever it trains on."""
    if config.objective == "lm":
        yield config
        return
    length = config.inputs_length
    is_prefix = config.objective == "prefix_lm"
    targets = config.targets_length if is_prefix else length
    yield config.model_copy(
        update={"objective": "prefix_lm", "packing": "none", "targets_length": targets}
    )
    spans = random_spans_helper(length, config.noise_density, config.mean_noise_span_length)
    if special.num_sentinels:
        yield config.model_copy(
            update={"objective": "span_corruption", "targets_length": spans.num_targets}
        )
