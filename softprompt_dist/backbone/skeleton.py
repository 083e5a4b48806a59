"""A model without weights, taken apart into frozen blocks, slots and buffers.

Whatever the architecture, three kinds of tensor are left when this is done: the matrices of linear
layers (a slot of a block each), the embedding table, and small tensors (buffers, whole on every
rank). Names are those of the checkpoint.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from softprompt_dist.backbone.flat_weights import FrozenBlock
from softprompt_dist.backbone.layers import FrozenLinear, knows_activation
from softprompt_dist.backbone.t5 import T5
from softprompt_dist.errors import BackboneError

HEAD = "lm_head"
_T5_TYPES = ("t5", "mt5")
_SECOND_FEED_FORWARD = re.compile(
    r"\.(wo|down_proj|dense_4h_to_h|fc2|fc_out|mlp\.c_proj|feed_forward\.w2)\.weight$"
)
_OLD_HEAD = "embed_out.weight"
"""What GPT-NeoX checkpoints call the head that transformers 5 calls lm_head."""
_FORWARD_ARGUMENTS = {"inputs_embeds", "attention_mask", "position_ids", "logits_to_keep"}
"""What the backbone gives a decoder-only model."""


@dataclass
class Skeleton:
    """The model, and where in it which tensor belongs."""

    model: nn.Module
    embedding: str
    """Name of the embedding table."""
    has_own_head: bool
    """Whether the config promises a head that is not the embedding table."""
    blocks: dict[str, FrozenBlock]
    """In the order in which they are used; the head is the last."""
    linears: dict[str, list[tuple[nn.Module, str, FrozenLinear]]]
    """Of each block: the module that holds a linear layer, its attribute there, and the layer."""
    embedding_scale: float = 1.0
    """What the model multiplies a token's row of the table by."""
    buffers: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    """Tensor's name -> the module that holds it and the attribute there."""
    computed: set[str] = field(default_factory=set)
    """Names of the buffers that the model makes for itself, where the checkpoint stores none."""
    ignored: list[str] = field(default_factory=list)
    """Patterns of stored names that transformers knows and leaves aside for this kind of model."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Another name under which a checkpoint may hold a tensor -> its name here."""

    @property
    def head(self) -> str:
        """Name of the head's matrix."""
        return f"{list(self.blocks)[-1]}.weight"

    def quantizable(self, quantized_layers: str) -> set[str]:
        """Names of the matrices that `backbone.quantized_layers` chooses; never the head.

        Raises:
            BackboneError: all but the second feed-forward matrix are to be, and none is known.
        """
        *repeated, _head = (
            {linear.name for _, _, linear in linears} for linears in self.linears.values()
        )
        if quantized_layers == "blocks":
            return set().union(*repeated)
        second = {n for names in repeated for n in names if _SECOND_FEED_FORWARD.search(n)}
        for names in repeated:
            if not names & second:
                raise BackboneError(
                    f"backbone.quantized_layers is {quantized_layers}, but which of "
                    f"{', '.join(sorted(names))} is the second feed-forward matrix is not known. "
                    "Use blocks."
                )
        return set().union(*repeated) - second


def build_skeleton(config: PretrainedConfig) -> Skeleton:
    """The frozen model that a Hugging Face config describes, without weights.

    Raises:
        BackboneError: an architecture that cannot be taken apart safely.
    """
    return _t5_skeleton(config) if config.is_encoder_decoder else _causal_skeleton(config)


def _t5_skeleton(config: Any) -> Skeleton:
    if config.model_type not in _T5_TYPES:
        raise BackboneError(
            f"Encoder-decoder models of type {config.model_type!r} are not known here; "
            f"{' and '.join(_T5_TYPES)} are (T5 v1.0, v1.1, LM-adapted, Flan-T5, mT5)."
        )
    if not knows_activation(config.dense_act_fn):
        raise BackboneError(f"T5 with activation {config.dense_act_fn!r} is not known here.")
    with init_empty_weights(include_buffers=False):
        model = T5(config)
    blocks = {
        f"{stack}.block.{index}": block
        for stack in ("encoder", "decoder")
        for index, block in enumerate(model.get_submodule(stack).block)  # type: ignore[arg-type]
    }
    skeleton = _taken_apart(model, {**blocks, HEAD: model.lm_head}, "shared.weight")
    for stack in ("encoder", "decoder"):
        skeleton.aliases[f"{stack}.embed_tokens.weight"] = "shared.weight"
    skeleton.has_own_head = not model.scales_output
    return skeleton


def _causal_skeleton(config: Any) -> Skeleton:
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    kinds = set(model._no_split_modules or ())  # noqa: SLF001 - how transformers names them
    blocks = {n: m for n, m in model.named_modules() if type(m).__name__ in kinds}
    modules = {id(module): name for name, module in model.named_modules()}
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    _check_causal(model, head, has_blocks=bool(blocks))
    embedding = f"{modules[id(table)]}.weight"
    ignored = [*model._keys_to_ignore_on_load_unexpected, *_never_stored(model)]  # noqa: SLF001
    skeleton = _taken_apart(model, {**blocks, modules[id(head)]: head}, embedding)
    skeleton.ignored = ignored
    skeleton.embedding_scale = _embedding_scale(table, embedding)
    skeleton.has_own_head = not config.tie_word_embeddings
    model.set_input_embeddings(nn.Identity())  # the backbone embeds, not the model
    prefix = f"{model.base_model_prefix}."
    known = [*skeleton.buffers, *_weight_names(skeleton), embedding]
    skeleton.aliases[_OLD_HEAD] = skeleton.head
    skeleton.aliases |= {n.removeprefix(prefix): n for n in known if n.startswith(prefix)}
    return skeleton


def _never_stored(model: nn.Module) -> Iterator[str]:
    """Patterns of buffers that a class once stored with the weights and now makes for itself."""
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:  # noqa: SLF001 - named nowhere else
            yield f"^{re.escape(_joined(path, name))}$"


def _check_causal(model: Any, head: Any, *, has_blocks: bool) -> None:
    lacking = _FORWARD_ARGUMENTS - set(inspect.signature(model.forward).parameters)
    reasons = {
        "transformers names no repeated block in them": not has_blocks,
        f"their head is a {type(head).__name__}, not a linear layer": type(head) is not nn.Linear,
        f"they take no {', '.join(sorted(lacking))}": bool(lacking),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise BackboneError(
            f"Models of type {model.config.model_type!r} are not known here: {'; '.join(found)}. "
            "Use a Llama-like model or a T5."
        )


def _embedding_scale(table: Any, name: str) -> float:
    """The scale of Gemma's and its like's table, which its own class holds."""
    if type(table) is nn.Embedding:
        return 1.0
    scale: Any = getattr(table, "embed_scale", None)
    if not isinstance(table, nn.Embedding) or scale is None:
        raise BackboneError(
            f"{name} belongs to a {type(table).__name__}, of which is not known how it looks "
            "tokens up. Use a Llama-like model or a T5."
        )
    return float(scale)


def _weight_names(skeleton: Skeleton) -> Iterator[str]:
    for linears in skeleton.linears.values():
        yield from (linear.name for _, _, linear in linears)


def _taken_apart(model: nn.Module, parts: dict[str, nn.Module], embedding: str) -> Skeleton:
    skeleton = Skeleton(model, embedding, has_own_head=False, blocks={}, linears={})
    for name, part in parts.items():
        skeleton.blocks[name] = block = FrozenBlock(part)
        skeleton.linears[name] = list(_replace_linears(block, name))
        _collect_buffers(block.computation, name, skeleton, in_block=True)
        parent, _, attribute = name.rpartition(".")
        model.get_submodule(parent).register_module(attribute, block)
    _collect_buffers(model, "", skeleton, in_block=False)
    return skeleton


def _replace_linears(
    block: FrozenBlock, block_name: str
) -> Iterator[tuple[nn.Module, str, FrozenLinear]]:
    if isinstance(block.computation, nn.Linear):
        block.__dict__["computation"] = frozen = _frozen(block.computation, block_name)
        yield block, "computation", frozen
        return
    for path, module in list(block.computation.named_modules()):
        for attribute, child in list(module.named_children()):
            if type(child) is nn.Linear:
                _check_is_called(module, attribute)
                frozen = _frozen(child, _joined(block_name, path, attribute))
                setattr(module, attribute, frozen)
                yield module, attribute, frozen


def _check_is_called(module: nn.Module, attribute: str) -> None:
    """That a module calls its linear layer, and does not look at the weight, which lies elsewhere.

    Raises:
        BackboneError: it does look at it.
    """
    if f"self.{attribute}.weight" in _source_of(type(module).forward):
        raise BackboneError(
            f"{type(module).__name__} reads the weight of its {attribute} by itself, so this kind "
            "of model is not known here. Use a Llama-like model or a T5."
        )


@cache
def _source_of(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # it has no file
        return ""


def _frozen(linear: nn.Linear, path: str) -> FrozenLinear:
    bias = None if linear.bias is None else torch.empty_like(linear.bias, device="meta")
    name = f"{path}.weight"
    return FrozenLinear(linear.in_features, linear.out_features, name=name, bias=bias)


def _collect_buffers(
    root: nn.Module, root_name: str, skeleton: Skeleton, *, in_block: bool
) -> None:
    """Every stored tensor but the embedding table and the linear layers' matrices."""
    for path, module in root.named_modules():
        held = dict(module.named_parameters(recurse=False))
        if isinstance(module, FrozenLinear) and module.bias is not None:
            held["bias"] = module.bias
        for attribute, buffer in module.named_buffers(recurse=False):
            is_stored = attribute not in module._non_persistent_buffers_set  # noqa: SLF001
            if is_stored and attribute not in held and buffer.is_floating_point():
                name = _joined(root_name, path, attribute)
                skeleton.buffers[name] = (module, attribute)
                skeleton.computed.add(name)
        for attribute, tensor in held.items():
            name = _joined(root_name, path, attribute)
            if name == skeleton.embedding:
                continue
            unknown_matrix = in_block and tensor.dim() > 1 and type(module) is not nn.Embedding
            if unknown_matrix or type(module) is nn.Linear:
                raise BackboneError(
                    f"{name} of shape {tuple(tensor.shape)} in a {type(module).__name__} is "
                    "neither a vector nor the matrix of a linear layer in a repeated block, so it "
                    "can be neither cut nor quantized. This kind of model (mixture of experts, "
                    "convolutions, GPT-2's layers) is not known here; use a Llama-like model or a "
                    "T5."
                )
            skeleton.buffers[name] = (module, attribute)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
