"""Which Hugging Face folders a run leaves behind, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adaptation.export import ExportedModel, check_export_folder, export_folder
from softprompt_dist.adaptation.model_card import Stage, identity_of
from softprompt_dist.adaptation.run import AdaptationRun, decisive_settings
from softprompt_dist.errors import ConfigError

LAST = "export"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def folder_of(run_folder: Path, config: AdaptConfig, step: int) -> Path:
    """Of the export at `step`, without what its dtype adds to the name."""
    return run_folder / (LAST if step == config.steps else f"{LAST}-step-{step:08d}")


def check_free(config: AdaptConfig, run_folder: Path) -> None:
    """That a run that begins finds no export of another one in its way; no collective.

    Raises:
        ConfigError: an export folder is there and not empty.
    """
    for step in (*config.export.steps, config.steps):
        for folder, _ in _targets(folder_of(run_folder, config, step), config):
            if folder.is_dir() and any(folder.iterdir()):
                raise ConfigError(
                    f"{folder} is not empty, but the run has no checkpoint that it could be "
                    "the export of. Remove or rename it, or pass another --run-dir."
                )


def check_ahead(run: AdaptationRun, run_folder: Path) -> None:
    """All ranks: before anything is trained, that the exports still to come find their place free.

    Raises:
        ConfigError: on all ranks; something else is there.
    """
    config = run.config
    for step in {*config.export.steps, config.steps}:
        if run.step <= step <= config.steps:
            check_targets(run, folder_of(run_folder, config, step), step)


def check_targets(run: AdaptationRun, folder: Path, step: int) -> None:
    """All ranks: that `export_run` at `step` finds its places free.

    Raises:
        ConfigError: on all ranks; something else is there.
    """
    for target, dtype in _targets(folder, run.config):
        check_export_folder(target, _identity(run), step, dtype)


def export_run(
    run: AdaptationRun,
    folder: Path,
    measured: dict[str, float],
    between: Callable[[], None] = lambda: None,
) -> list[Path]:
    """All ranks: the weights as they are, as `folder` and, in further dtypes, beside it.

    Args:
        run: at the step that is exported.
        folder: of the first dtype.
        measured: on the validation text, at this step.
        between: see `export_folder`.

    Returns:
        The folders.

    Raises:
        ConfigError: on all ranks; something else is there.
        MachineError: on all ranks; a folder cannot be written.
    """
    config, source = run.config, run.source
    stage = Stage(
        name=config.name,
        objective=config.objective,
        steps=run.step,
        tokens=run.real_tokens,
        validation=measured,
        seconds=round(run.seconds, 1),
        corpus=[Path(spec).name for spec in config.corpus],
        corpus_fingerprint=run.corpus_fingerprint,
        recipe=config.model_dump(mode="json"),
        identity=_identity(run),
        source=asdict(run.identity),
    )
    model = ExportedModel(
        name=config.name,
        hf_config=source.hf_config,
        tokenizer=source.tokenizer,
        source=source.folder,
        stages=[*source.history, stage.to_json()],
    )
    written = []
    for target, dtype in _targets(folder, config):
        shard_bytes = int(config.export.max_shard_gigabytes * 1e9)
        weights = run.engine.layout.weights()
        export_folder(target, weights, model, dtype, max_shard_bytes=shard_bytes, between=between)
        written.append(target)
    return written


def _targets(folder: Path, config: AdaptConfig) -> Iterator[tuple[Path, torch.dtype]]:
    """The first dtype has the plain name, which later stages and `train` are given."""
    for number, name in enumerate(dict.fromkeys(config.export.dtypes)):
        suffix = f"-{name}" if number else ""
        yield folder.with_name(folder.name + suffix), DTYPES[name]


def _identity(run: AdaptationRun) -> str:
    source = {"weights": run.identity.weights, "tokenizer": run.identity.tokenizer}
    return identity_of(decisive_settings(run) | {"source": source}, run.source.history)
