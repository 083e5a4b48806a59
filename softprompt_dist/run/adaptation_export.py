"""What an adaptation leaves behind: a Hugging Face folder that says how it was made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from softprompt_dist.backbone.t5_v11 import T5V11
from softprompt_dist.durable import replace_file
from softprompt_dist.errors import MachineError
from softprompt_dist.parallel import ranks
from softprompt_dist.run.adaptation import AdaptationRun, validation_loss
from softprompt_dist.run.environment import redact_command

HISTORY = "adaptation.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(run: AdaptationRun, folder: Path) -> None:
    """All ranks: write weights, config, tokenizer, history and model card into `folder`.

    Raises:
        MachineError: on all ranks, when the folder cannot be written.
    """
    stages = [*_earlier_stages(run), _this_stage(run, validation_loss(run))]
    ranks.on_main(lambda: _write(run, folder, stages))


def write_t5(model: T5V11, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write weights in `dtype`, config and tokenizer so that any transformers version reads them.

    `tie_word_embeddings` false keeps older versions from tying the head; newer ones compare.
    """
    shared_names = set(model._tied_weights_keys)
    weights = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in shared_names
    }
    if model.config.scale_decoder_outputs:
        # T5 v1.1 has no such scale, and older versions apply none: it goes into the head.
        scale = model.config.d_model**-0.5
        weights["lm_head.weight"] = (model.lm_head.weight.detach().float() * scale).to("cpu", dtype)
    config = json.loads(model.config.to_json_string(use_diff=True)) | {
        "scale_decoder_outputs": False,
        "architectures": ["T5ForConditionalGeneration"],
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    _forget_how_it_was_loaded(folder / "tokenizer_config.json")
    replace_file(folder / "config.json", _json(config))
    replace_file(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))


def model_card(name: str, num_parameters: int, stages: list[dict[str, Any]]) -> str:
    """The README.md of an exported folder."""
    rows = "\n".join(
        f"| {s['name']} | {s['objective']} | {s['steps']:,} | {s['tokens']:,} | "
        f"{_loss(s['validation_loss'])} | {s['seconds'] / 60:.0f} |"
        for s in stages
    )
    corpora = "\n".join(f"- {s['name']}: {', '.join(s['corpus'])}" for s in stages)
    commands = "\n".join(s["command"] for s in stages)
    return (
        f"# {name}\n\n"
        f"A T5 v1.1 encoder-decoder with {num_parameters:,} parameters, trained by "
        "`softprompt adapt`.\n\n"
        "| stage | objective | steps | corpus tokens seen | validation loss (nats per target "
        f"token) | minutes |\n|---|---|---|---|---|---|\n{rows}\n\n"
        f"## Corpus\n\n{corpora}\n\n## Commands\n\n```\n{commands}\n```\n"
    )


def _write(run: AdaptationRun, folder: Path, stages: list[dict[str, Any]]) -> None:
    try:
        write_t5(run.model, run.tokenizer, folder, DTYPES[run.config.export.dtypes[0]])
        replace_file(folder / HISTORY, _json(stages))
        num_parameters = sum(p.numel() for p in run.model.parameters())
        card = model_card(run.config.name, num_parameters, stages)
        replace_file(folder / "README.md", card.encode())
    except OSError as error:
        raise MachineError(
            f"Cannot export to {folder}: {error}. Free space or permit it."
        ) from error


def _forget_how_it_was_loaded(path: Path) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {k: v for k, v in settings.items() if k not in {"is_local", "local_files_only"}}
    replace_file(path, _json(kept))


def _earlier_stages(run: AdaptationRun) -> list[dict[str, Any]]:
    history = run.source_folder / HISTORY if run.source_folder else None
    if history is None or not history.is_file():
        return []
    return list(json.loads(history.read_text(encoding="utf-8")))


def _this_stage(run: AdaptationRun, loss: float | None) -> dict[str, Any]:
    config = run.config
    examples = run.step * config.batch.global_batch_size
    return {
        "name": config.name,
        "objective": config.objective,
        "steps": run.step,
        "tokens": round(examples * run.train.tokens_per_example),
        "validation_loss": loss,
        "seconds": round(run.seconds, 1),
        "corpus": [Path(spec).name for spec in config.corpus],
        "command": " ".join(_without_folders(redact_command(sys.orig_argv))),
    }


def _without_folders(command: list[str]) -> list[str]:
    """Paths reduced to their last part: a card must not tell how a machine is laid out."""
    return [Path(part).name if part.startswith("/") else part for part in command]


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
