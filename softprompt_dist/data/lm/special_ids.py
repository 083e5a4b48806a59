"""The ids of a tokenizer that objectives put between, behind and in place of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from softprompt_dist.errors import DataError


@dataclass(frozen=True)
class SpecialIds:
    """Ids that are not text."""

    pad: int
    """Fills rows."""
    eos: int
    first_sentinel: int | None = None
    """`<extra_id_0>`; the others count down from it. None where there is none."""
    num_sentinels: int = 0
    decoder_start: int | None = None
    """Starts the decoder of an encoder-decoder; None: the padding piece does."""

    @property
    def start(self) -> int:
        """What the decoder of an encoder-decoder begins with."""
        return self.pad if self.decoder_start is None else self.decoder_start

    @property
    def sentinels(self) -> range:
        """Ids of all sentinels; empty where there are none."""
        if self.first_sentinel is None:
            return range(0)
        return range(self.first_sentinel - self.num_sentinels + 1, self.first_sentinel + 1)

    @classmethod
    def of(cls, tokenizer: Any, objective: str, hf_config: Any = None) -> SpecialIds:
        """Those of a tokenizer and its model's configuration, as far as `objective` needs them.

        Raises:
            DataError: it has no end-of-sequence piece; or no padding piece and the objective is
                not `lm`; or no sentinels and the objective is `span_corruption`.
        """
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        first_sentinel, num_sentinels = _sentinels(tokenizer.get_vocab())
        if objective == "lm" and pad is None:
            pad = eos
        needed = {"eos_token": eos, "pad_token": pad}
        if objective == "span_corruption":
            needed["<extra_id_0>"] = first_sentinel
        missing = [name for name, found in needed.items() if found is None]
        if missing:
            raise DataError(
                f"The tokenizer has no {' and no '.join(missing)}, which objective {objective} "
                "needs. Set `tokenizer` to a T5 tokenizer folder, or add the pieces to this one."
            )
        start = getattr(hf_config, "decoder_start_token_id", None)
        return cls(pad, eos, first_sentinel, num_sentinels, start)


def _sentinels(vocabulary: dict[str, int]) -> tuple[int | None, int]:
    first = vocabulary.get("<extra_id_0>")
    if first is None:
        return None, 0
    count = 1
    while vocabulary.get(f"<extra_id_{count}>") == first - count:
        count += 1
    return first, count
