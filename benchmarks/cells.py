"""Loss and prompt gradient of every cell beside replicated fp32, on three real-sized backbones.

python -m benchmarks.cells
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import SHAPES, ensure_checkpoint
from benchmarks.ranks import run_ranks
from benchmarks.report import Aim, Report, parser, settings_of

CELLS: dict[str, dict[str, Any]] = {
    "replicated fp32": {"sharding": "replicated"},
    "zero3 fp32": {"sharding": "zero3"},
    "zero3 fp32, checkpointed": {"sharding": "zero3", "activation_checkpointing": "full"},
    "bf16": {"sharding": "zero3", "dtype": "bf16"},
    "int8": {"sharding": "zero3", "quantization": "int8"},
    "int8, replicated": {"sharding": "replicated", "quantization": "int8"},
    "int8, wo whole": {
        "sharding": "zero3",
        "quantization": "int8",
        "quantized_layers": "blocks_without_wo",
    },
    "llm_int8": {"sharding": "replicated", "quantization": "llm_int8"},
    "llm_int8, wo whole": {
        "sharding": "replicated",
        "quantization": "llm_int8",
        "quantized_layers": "blocks_without_wo",
    },
    "nf4": {"sharding": "replicated", "quantization": "nf4"},
}
REFERENCE, *_ = CELLS
BACKBONES = {
    "SmolLM2-135M": "demo:smollm2-135m",
    "tiny T5": "demo:tiny-t5",
    "random T5, 198 M": None,
}
"""Name -> path; None: made for the benchmark."""
EXACT = ("zero3 fp32", "zero3 fp32, checkpointed")
_STATES = {"output_hidden_states": True}
_NUM_ROWS, _INPUT_LENGTH, _PROMPT_LENGTH = 4, 48, 20


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank: loss and gradient in each cell."""
    import torch

    from softprompt_dist.parallel import ranks
    from softprompt_dist.parallel.join import join_world, leave_world

    join_world()
    from softprompt_dist.backbone.load import load_backbone
    from softprompt_dist.config import BackboneConfig
    from softprompt_dist.data.batching import TokenExample, collate
    from softprompt_dist.prompt.module import SoftPrompt
    from softprompt_dist.run.step import accumulate_gradient

    answer: dict[str, Any] = {}
    gradients: dict[str, torch.Tensor] = {}
    for name, cell in CELLS.items():
        backbone = load_backbone(BackboneConfig(path=settings["path"], **cell))
        generator = torch.Generator().manual_seed(0)
        size = (_NUM_ROWS, _INPUT_LENGTH)
        ids = torch.randint(3, backbone.vocabulary_size, size, generator=generator).tolist()
        rows = [TokenExample(tuple(r[: 16 + 8 * i]), tuple(r[:2])) for i, r in enumerate(ids)]
        prompt = SoftPrompt(backbone.embed(torch.tensor(ids[0][:_PROMPT_LENGTH])))
        batch = collate(rows[ranks.rank() :: ranks.world_size()], pad_id=0, family=backbone.family)
        metrics = accumulate_gradient(backbone, prompt, [batch], z_loss=0.0)
        assert prompt.weight.grad is not None
        gradients[name] = prompt.weight.grad
        difference = (gradients[name] - gradients[REFERENCE]).norm() / gradients[REFERENCE].norm()
        answer[name] = {"loss": metrics["loss"], "gradient_difference": float(difference)}
        del backbone
    leave_world()
    return answer


def measure_rounding(settings: dict[str, Any]) -> dict[str, Any]:
    """How far transformers' own gradient in fp32 is from fp64, on a row without padding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from softprompt_dist.backbone.load import family_of, locate_backbone
    from softprompt_dist.config import BackboneConfig

    folder = locate_backbone(BackboneConfig(path=settings["path"]))
    seq2seq = family_of(folder) == "seq2seq"
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    gradients, largest = [], 0.0
    for dtype in (torch.float32, torch.float64):
        model = kind.from_pretrained(str(folder), dtype=dtype).eval().requires_grad_(False)
        table_VD = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, len(table_VD), (1, _INPUT_LENGTH), generator=generator)
        prompt_PD = table_VD[ids[0, :_PROMPT_LENGTH]].clone().requires_grad_()
        embeds = torch.cat([prompt_PD[None], table_VD[ids]], dim=1)
        labels = ids[:, :2] if seq2seq else torch.full(embeds.shape[:2], -100)
        if not seq2seq:
            labels[:, -2:] = ids[:, -2:]
        output = model(inputs_embeds=embeds, labels=labels, use_cache=False, **_STATES)
        output.loss.backward()
        states = output.encoder_hidden_states if seq2seq else output.hidden_states
        largest = max(float(state.abs().max()) for state in states)
        assert prompt_PD.grad is not None
        gradients.append(prompt_PD.grad.double())
    single, double = gradients
    difference = float((single - double).norm() / double.norm())
    return {"gradient_difference": difference, "largest_activation": largest}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options = parser("cells", "Loss and gradient of every cell beside replicated fp32.")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    given = options.parse_args(argv)
    backbones = {name: _path(name, given.out) for name in given.backbones}
    measured = {
        name: run_ranks("benchmarks.cells:measure", {"path": path}, num_ranks=given.ranks)[0]
        for name, path in backbones.items()
    }
    title = f"Loss, and difference of the prompt's gradient, in every cell ({given.ranks} ranks)"
    report = Report("cells", title, settings_of(given), raw={"cells": measured})
    report.rows = [
        {"cell": cell, **{name: _text(found[cell]) for name, found in measured.items()}}
        for cell in CELLS
    ]
    rounding = {
        name: run_ranks("benchmarks.cells:measure_rounding", {"path": path}, num_ranks=1)[0]
        for name, path in backbones.items()
    }
    report.raw["rounding"] = rounding
    report.rows += _rounding_rows(rounding)
    report.notes = ["Loss in nats per token / norm of the gradient's difference over its norm."]
    report.aims = [
        Aim(f"{cell}, {name}", found[cell]["gradient_difference"], 1e-6)
        for cell in EXACT
        for name, found in measured.items()
    ]
    report.publish(given.out)


def _path(name: str, out: Path) -> str:
    path = BACKBONES[name]
    if path is None:
        made = ensure_checkpoint(out / "models" / "t5-200m-fp32", SHAPES["200m"], "fp32")
        path = str(made.resolve())
    return path


def _rounding_rows(rounding: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    own = {name: f"{found['gradient_difference']:.1e}" for name, found in rounding.items()}
    largest = {name: f"{found['largest_activation']:.0f}" for name, found in rounding.items()}
    return [
        {"cell": "transformers, fp32 against fp64", **own},
        {"cell": "largest activation", **largest},
    ]


def _text(found: dict[str, float]) -> str:
    return f"{found['loss']:.5f} / {found['gradient_difference']:.1e}"


if __name__ == "__main__":
    main()
