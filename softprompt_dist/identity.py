"""Which backbone a file belongs to: weights, configuration and tokenizer, in one object.

It stands in prompt files, checkpoints, results, journals of predictions and exports, and is
compared wherever one of them meets a backbone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from softprompt_dist.errors import SoftpromptError

log = logging.getLogger(__name__)

Accept = Callable[["Identity"], None]
"""Raises where a backbone is not the one that something belongs to; on one rank."""

_CHANGING_NOTHING = {
    "architectures", "attn_implementation", "auto_map", "chunk_size_feed_forward", "dtype",
    "finetuning_task", "gradient_checkpointing", "id2label", "initializer_factor",
    "initializer_range", "is_decoder", "label2id", "num_labels", "output_past", "prefix",
    "pretraining_tp", "problem_type", "quantization_config", "return_dict", "task_specific_params",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript", "use_bfloat16",
}  # fmt: skip
"""Fields of a config.json that change no number of the frozen model: of loading and of training,
and the tie of head and table, which the digest of the weights shows (transformers 5 reads a T5's
as true whatever it says)."""
_NUM_SHOWN = 8


@dataclass(frozen=True)
class Identity:
    """What the numbers of a backbone depend on, and in which form they were computed.

    What is empty is not known, and not compared: files of release 0.1.0 do not have all of it.
    """

    path: str
    """Where it comes from, as the recipe says; not compared."""
    weights: str
    """Digest of names, shapes and samples of all tensors; the same in every precision."""
    config: dict[str, JsonValue] = field(default_factory=dict)
    """See `config_that_counts`."""
    tokenizer: dict[str, str | int | None] = field(default_factory=dict)
    """See `tokenizer_identity`."""
    dtype: str = ""
    """Of activations and unquantized weights; not compared."""
    quantization: str = ""
    """How matrices were held; not compared."""

    @classmethod
    def from_json(cls, values: object) -> Identity:
        """What `dataclasses.asdict` made, or an earlier or later release; unknown keys are left.

        Raises:
            ValueError: it is no such thing.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(["identity", *map(str, first["loc"])])
            raise ValueError(f"{place}: {first['msg']}") from None

    @property
    def name(self) -> str:
        """For people: where it comes from, the beginning of its digest, how it was held."""
        quantized = "" if self.quantization in ("", "none") else f", {self.quantization}"
        return f"{self.path} ({self.digest[:12]}, {self.dtype}{quantized})"

    @property
    def digest(self) -> str:
        """32 hexadecimal digits, of all that is compared."""
        content = json.dumps([self.weights, self.config, self.tokenizer], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def differences(self, here: Identity) -> list[str]:
        """Where the backbone `here` is another one, such as `rms_norm_eps: 1e-06 there, 0.1 here`.

        A field that one side lacks counts as the default that this release of transformers has.
        """
        found = []
        if self.weights and here.weights and self.weights != here.weights:
            found.append(_difference("weights", self.weights, here.weights))
        if self.config and here.config and self.config != here.config:
            found += _config_differences(self.config, here.config)
        for name in sorted(self.tokenizer.keys() & here.tokenizer.keys()):
            if self.tokenizer[name] != here.tokenizer[name]:
                label = f"tokenizer.{name}"
                found.append(_difference(label, self.tokenizer[name], here.tokenizer[name]))
        return found


def accept_any(identity: Identity) -> None:
    """Any backbone will do."""


def check_same_backbone(
    there: Identity, here: Identity, belongs: str, *, error: type[SoftpromptError], force: bool
) -> None:
    """Refuse a backbone that is not the one a file belongs to.

    Args:
        there: of the file.
        here: of the backbone.
        belongs: the file and its relation, such as "best.safetensors was tuned for".
        error: what to raise.
        force: only warn.

    Raises:
        SoftpromptError: of the type `error`, with both values of all that differs.
    """
    different = there.differences(here)
    if not different:
        return
    lines = "".join(f"\n  - {line}" for line in different[:_NUM_SHOWN])
    if len(different) > _NUM_SHOWN:
        lines += f"\n  - and {len(different) - _NUM_SHOWN} more"
    message = (
        f"{belongs} backbone {there.path!r:.200}, and the one here, {here.path!r:.200}, is "
        f"another:{lines}\nIts numbers hold only with the backbone that they were made with. "
    )
    if not force:
        raise error(f"{message}Use that one, or accept this one with --force.")
    log.warning("%sIt is used all the same, as forced.", message)


def config_that_counts(model_config: Any) -> dict[str, JsonValue]:
    """The fields of a Hugging Face configuration that change what the frozen model computes.

    Defaults are filled in, so a key that a config.json leaves out is as good as one that says the
    same. All fields count but those known to change nothing: of loading, of training from nothing,
    of generation (decoding here is the recipe's), and dropout (the recipe's, too). A field that
    nobody has heard of counts.
    """
    values: dict[str, JsonValue] = json.loads(model_config.to_json_string(use_diff=False))
    return _counting(values)


def _counting(values: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {
        name: _counting(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not (name.startswith("_") or "drop" in name or name in _changing_nothing())
    }


@cache
def _changing_nothing() -> frozenset[str]:
    from transformers import GenerationConfig

    of_generation = vars(GenerationConfig()).keys() - {"decoder_start_token_id"}
    return frozenset(of_generation | _CHANGING_NOTHING)


def _config_differences(there: Mapping[str, JsonValue], here: Mapping[str, JsonValue]) -> list[str]:
    then, now = dict(_flat(_counting(there))), dict(_flat(_counting(here)))
    names = [name for name in then if name in now or _says_something(then[name])]
    different = [name for name in names if then[name] != now.get(name)]
    left_out = [name for name in now if name not in then and _says_something(now[name])]
    if left_out and not different:
        # Only what was found equal to the trusted side is given to transformers.
        defaults = dict(_flat(_completed(there)))
        then = {name: defaults.get(name) for name in left_out} | then
        different = [name for name in left_out if then[name] != now[name]]
    return [_difference(name, then[name], now.get(name)) for name in sorted(different)]


def _says_something(value: JsonValue) -> bool:
    """Whether a field differs from one that is missing."""
    return value is not None and value is not False


def _completed(config: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """With the fields that transformers has got since, at the values that go with the others."""
    from transformers import AutoConfig

    values = _counting(config)
    try:
        return config_that_counts(AutoConfig.for_model(**values))
    except Exception:  # what transformers raises of a wrong value is of many kinds
        return values


def _flat(values: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _difference(name: str, there: object, here: object) -> str:
    return f"{name}: {_shown(there)} there, {_shown(here)} here"


def _shown(value: object) -> str:
    return f"{value:.80}" if isinstance(value, str) else f"{value!r:.80}"
