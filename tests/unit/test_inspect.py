import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from softprompt_dist import inspect
from softprompt_dist.backbone.load import load_embedding
from softprompt_dist.config import BackboneConfig
from softprompt_dist.errors import ConfigError, PromptFileError
from softprompt_dist.identity import Identity
from softprompt_dist.prompt.file import PromptMetadata, save_prompt
from tests.models import make_t5, save_model

NUM_PIECES, NUM_TABLE_ROWS = 20, 24


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A T5 whose table is longer than its vocabulary, as the released ones are."""
    folder = tmp_path_factory.mktemp("t5")
    model = make_t5(NUM_TABLE_ROWS)
    save_model(model, folder)
    pieces = {f"piece{number}": number for number in range(NUM_PIECES)}
    vocabulary = Tokenizer(models.WordLevel(pieces, unk_token="piece2"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(str(folder))
    return folder, model


@pytest.fixture
def prompt_file(backbone, tmp_path):
    """Row 0 points where piece 7 does, row 1 where piece 3 does, row 2 where a padding row does."""
    folder, model = backbone
    _, identity = load_embedding(BackboneConfig(path=str(folder)))
    table = model.get_input_embeddings().weight.detach()
    prompt = torch.stack([table[7] * 40, table[3] * 0.5, table[NUM_PIECES]])
    metadata = PromptMetadata(
        identity=dataclasses.replace(identity, path="some/t5"),
        task="vader-movies",
        initialisation="class_labels",
        step=12,
        metric="accuracy",
        score=0.75,
        prompt_length=3,
        d_model=32,
        version="0.1.0",
    )
    path = tmp_path / "prompt.safetensors"
    save_prompt(path, prompt, metadata)
    return path, prompt, metadata


def row(output, number):
    (line,) = (line for line in output.splitlines() if line.startswith(f"{number} "))
    return line.split()[1:]


def test_prompt_alone_shows_metadata_shape_and_norms(prompt_file, capsys):
    path, prompt, _ = prompt_file

    inspect.main([str(path)])

    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    norms = prompt.norm(dim=-1)
    assert shown["backbone"] == '"some/t5"'
    assert shown["step"] == "12"
    assert shown["score"] == "0.75"
    assert shown["shape"] == "3 x 32"
    assert shown["row_norms"] == (
        f"min {norms.min():.4g}, mean {norms.mean():.4g}, max {norms.max():.4g}"
    )


def test_backbone_names_the_nearest_pieces_of_each_row(backbone, prompt_file, capsys):
    inspect.main([str(prompt_file[0]), "--backbone", str(backbone[0]), "--neighbours", "3"])

    output = capsys.readouterr().out
    assert row(output, 0)[:2] == ["piece7", "1.000"]
    assert row(output, 1)[:2] == ["piece3", "1.000"]
    assert len(row(output, 0)) == 6
    assert float(row(output, 2)[1]) < 0.99, "rows beyond the vocabulary are no pieces"


def test_rows_can_be_limited(backbone, prompt_file, capsys):
    inspect.main([str(prompt_file[0]), "--backbone", str(backbone[0]), "--rows", "1"])

    output = capsys.readouterr().out
    assert row(output, 0)[0] == "piece7"
    assert "piece3 1.000" not in output


def test_another_backbone_is_refused_unless_forced(backbone, prompt_file, capsys):
    path, prompt, metadata = prompt_file
    save_prompt(path, prompt, dataclasses.replace(metadata, identity=Identity("there", "0123")))
    arguments = [str(path), "--backbone", str(backbone[0])]

    with pytest.raises(PromptFileError, match="0123"):
        inspect.main(arguments)
    assert capsys.readouterr().out == ""

    inspect.main([*arguments, "--force"])
    assert row(capsys.readouterr().out, 0)[0] == "piece7"


def test_prompt_of_another_width_is_refused_even_if_forced(backbone, prompt_file):
    path, prompt, metadata = prompt_file
    save_prompt(path, prompt[:, :16], dataclasses.replace(metadata, d_model=16))

    with pytest.raises(PromptFileError, match="width 16"):
        inspect.main([str(path), "--backbone", str(backbone[0]), "--force"])


def test_several_ranks_are_refused(backbone, prompt_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ConfigError, match="2 ranks"):
        inspect.main([str(prompt_file[0]), "--backbone", str(backbone[0])])
