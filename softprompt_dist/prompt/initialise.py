"""Where tuning starts (Lester et al., 2021, section 3.2). Axes: P prompt, D model width, N ids.

Each row is the mean embedding of some vocabulary pieces, as in `prompts.py` of the paper's code;
rows that nothing was given for start at the embedding of a sampled common piece.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from softprompt_dist.config import PromptConfig
from softprompt_dist.errors import PromptFileError
from softprompt_dist.parallel import ranks
from softprompt_dist.prompt.file import load_prompt

log = logging.getLogger(__name__)

Embed = Callable[[Tensor], Tensor]
Encode = Callable[[str], Sequence[int]]
Pieces = Sequence[int]


def initialise_prompt(  # noqa: PLR0913 - what the initialisers need, between them
    config: PromptConfig,
    *,
    embed: Embed,
    vocabulary_size: int,
    encode: Encode,
    labels: Sequence[str],
    d_model: int,
    generator: torch.Generator,
) -> Tensor:
    """All ranks: the prompt before its first update, [P, D] in fp32 on the CPU.

    Args:
        config: which initialisation, and its settings.
        embed: ids_N -> rows of the embedding table [N, D], rounded as activations are. Called once,
            or for the uniform ones and `file` not at all.
        vocabulary_size: rows of the embedding table.
        encode: text -> piece ids without special tokens.
        labels: target strings, for `class_labels`.
        d_model: D.
        generator: a CPU generator in the same state on all ranks.

    Raises:
        PromptFileError: on all ranks; the file of `file` is unreadable or does not fit.
    """
    shape = (config.prompt_length, d_model)
    match config.initialisation:
        case "random_uniform_paper":
            return torch.rand(shape, generator=generator) - 0.5
        case "random_uniform_released":
            return 0.5 * torch.rand(shape, generator=generator)
        case "file":
            path = Path(str(config.file))
            return ranks.on_main(lambda: _from_file(path, shape))
        case "class_labels":
            pieces = _at_most([encode(label) for label in labels], shape[0], "class labels")
        case "text":
            text_pieces = [[piece] for piece in encode(str(config.text))]
            pieces = _at_most(text_pieces, shape[0], "pieces in prompt.text")
        case "sampled_vocabulary":
            pieces = []
    sampled_P = sample_pieces(
        config.prompt_length,
        population=config.sampled_vocabulary_size,
        vocabulary_size=vocabulary_size,
        generator=generator,
    )
    return embedded_rows(pieces, sampled_P, embed)


def sample_pieces(
    prompt_length: int, *, population: int, vocabulary_size: int, generator: torch.Generator
) -> Tensor:
    """Ids of P pieces drawn from the first `population` of the vocabulary, its most common ones.

    Drawn without replacement where there are enough. Special pieces are in the pool, as in the
    paper's code.
    """
    if population > vocabulary_size:
        _warn(
            f"prompt.sampled_vocabulary_size is {population}, but the embedding table has "
            f"{vocabulary_size} rows; sampling from all of them."
        )
        population = vocabulary_size
    if prompt_length > population:
        _warn(
            f"prompt.prompt_length is {prompt_length}, but only {population} pieces are sampled "
            "from; some rows will start equal."
        )
        return torch.randint(population, (prompt_length,), generator=generator)
    return torch.randperm(population, generator=generator)[:prompt_length]


def embedded_rows(pieces: Sequence[Pieces], sampled_P: Tensor, embed: Embed) -> Tensor:
    """Row i is the mean embedding of `pieces[i]` or, if none are given, `sampled_P[i]`.

    Args:
        pieces: piece ids of the first rows, at most P; one may be empty.
        sampled_P: a piece id for each row.
        embed: see `initialise_prompt`; called exactly once.

    Returns:
        [P, D] in fp32 on the CPU.
    """
    given = [torch.tensor(row, dtype=torch.int64) for row in pieces if len(row) > 0]
    rows = [index for index, row in enumerate(pieces) if len(row) > 0]
    embeds_ND = embed(torch.cat([sampled_P, *given])).float().cpu()
    prompt_PD, *given_ND = torch.split(embeds_ND, [len(sampled_P), *map(len, given)])
    prompt_PD = prompt_PD.clone()
    for index, row_ND in zip(rows, given_ND, strict=True):
        prompt_PD[index] = row_ND.mean(dim=0)
    return prompt_PD


def _from_file(path: Path, shape: tuple[int, int]) -> Tensor:
    prompt_PD, _ = load_prompt(path)
    if tuple(prompt_PD.shape) != shape:
        raise PromptFileError(
            f"{path} holds a prompt of {prompt_PD.shape[0]} x {prompt_PD.shape[1]}, but this run "
            f"needs {shape[0]} x {shape[1]} (prompt.prompt_length x the backbone's width)."
        )
    return prompt_PD


def _at_most(pieces: Sequence[Pieces], prompt_length: int, what: str) -> list[Pieces]:
    if len(pieces) > prompt_length:
        _warn(
            f"{len(pieces)} {what}, but prompt.prompt_length is {prompt_length}: the last "
            f"{len(pieces) - prompt_length} are dropped."
        )
    if any(len(row) == 0 for row in pieces[:prompt_length]):
        _warn(f"Some {what} are empty; their rows start at sampled pieces.")
    return list(pieces[:prompt_length])


def _warn(message: str) -> None:
    if ranks.is_main():
        log.warning(message)
