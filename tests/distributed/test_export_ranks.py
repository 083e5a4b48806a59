"""An export by two ranks, each of which holds a part of every weight."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import softprompt_dist
from softprompt_dist.adaptation.export import ExportedModel, check_export_folder, export_folder
from softprompt_dist.adaptation.model_card import Stage, identity_of
from softprompt_dist.adaptation.sharded_tensor import Piece, ShardedTensor
from softprompt_dist.backbone.safetensors_file import SafetensorsStream
from softprompt_dist.errors import ConfigError, MachineError
from softprompt_dist.parallel import ranks
from tests.damage import disk_full

TOKENIZER = Path(softprompt_dist.__file__).parent / "assets" / "tiny-t5"


def model_of(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)).eval()


def own_part(model):
    tensors = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().view(-1)
        cut = len(values) // 3
        first, last = ((0, cut), (cut, len(values)))[ranks.rank()]
        piece = Piece(first, values[first:last].clone())
        tensors[name] = ShardedTensor(tuple(parameter.shape), (piece,))
    return tensors


def stage(steps):
    return Stage(
        name="ranks", objective="lm", steps=steps, tokens=1, validation={}, seconds=1.0,
        corpus=["a.txt"], corpus_fingerprint="f", recipe={}, identity=identity_of({}, []),
    ).to_json()  # fmt: skip


def export(folder):
    model = model_of(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    out = Path(folder) / "out"

    def attempt(steps):
        try:
            exported = ExportedModel("ranks", model.config, tokenizer, None, [stage(steps)])
            export_folder(out, own_part(model), exported, torch.float32)
            check_export_folder(out, identity_of({}, []), steps, torch.float32)
        except (MachineError, ConfigError) as error:
            return str(error)
        return None

    write, SafetensorsStream.write = SafetensorsStream.write, disk_full
    errors = [attempt(5)]
    ranks.gather_objects(None)
    left = [path.name for path in Path(folder).iterdir()]
    ranks.gather_objects(None)
    SafetensorsStream.write = write
    return {"errors": [*errors, attempt(5), attempt(5), attempt(6)], "left": left}


def test_two_ranks_export_one_model_and_raise_the_same_errors(run_on_ranks, tmp_path):
    folder = tmp_path / "exports"
    folder.mkdir()
    first, second = run_on_ranks(export, 2, folder=folder)
    assert first["errors"] == second["errors"]
    full, written, again, other = first["errors"]
    assert "No space left" in full
    assert first["left"] == []
    assert written is None
    assert again is None
    assert "not empty" in other
    assert [path.name for path in folder.iterdir()] == ["out"]
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder / "out").eval()(ids).logits
        torch.testing.assert_close(logits, model_of(0)(ids).logits, rtol=1e-5, atol=1e-5)
