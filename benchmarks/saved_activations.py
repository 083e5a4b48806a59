"""Bytes that a frozen encoder layer keeps for backward: Hugging Face under ZeRO-3, and ours.

python -m benchmarks.saved_activations

A count, not a timing: it does not depend on the machine. The cost of a layer is the difference
between a model with one encoder layer more and one without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import DTYPES, ensure_checkpoint, layers_of
from benchmarks.ranks import hush_transformers
from benchmarks.report import Aim, Report, parser, settings_of
from softprompt_dist.backbone.load import load_backbone
from softprompt_dist.config import BackboneConfig
from softprompt_dist.data.batching import TokenBatch
from softprompt_dist.run.loss import token_loss

PEER, PLAIN, OURS, OURS_INT8 = "Hugging Face + DeepSpeed", "Hugging Face", "ours", "ours int8"
_NUM_LAYERS = 2
_PADDED = 40
Logits = Callable[[Tensor], Tensor]
"""prompt_BPD -> logits_BTV of a fixed batch."""


class SavedBytes:
    """What autograd saved in the `with` block, each storage once; parameters do not count."""

    def __init__(self, module: nn.Module) -> None:
        self._weights = _addresses(module)
        self._saved: dict[int, Tensor] = {}
        self.total = 0
        """Bytes saved."""
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def __enter__(self) -> SavedBytes:
        """Itself, watching."""
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop watching; let the tensors go, which the hooks' own cycle would keep."""
        self._hooks.__exit__(*error)
        self.total = sum(t.untyped_storage().nbytes() for t in self._saved.values())
        self._saved.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        if _address(tensor) not in self._weights:
            self._saved[_address(tensor)] = tensor.detach()  # keeps the address taken
        return tensor


class LiveBytes(TorchDispatchMode):
    """Storages that operations made and that are still alive, however they are kept.

    The saved-tensor hooks do not see what a function puts aside on its own; this does.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._weights = _addresses(module)
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and remember what it made."""
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in self._weights:
                storage = tensor.untyped_storage()
                self._made[_address(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return sum(size for reference, size in self._made.values() if not reference.expired())


def count(module: nn.Module, logits: Logits, prompt_BPD: Tensor) -> tuple[int, int]:
    """Bytes saved for backward by one forward, as (the hooks, what is alive) see them."""
    prompt_BPD = prompt_BPD.clone().requires_grad_()
    with SavedBytes(module) as saved:
        logits_BTV = logits(prompt_BPD)
    del logits_BTV
    with LiveBytes(module) as live:
        logits_BTV = logits(prompt_BPD)
    alive = live.total
    del logits_BTV  # not before: its graph holds what is counted
    return saved.total, alive


def peer_logits(folder: Path, dtype: str, batch: TokenBatch) -> tuple[nn.Module, Logits]:
    """Hugging Face's model on a batch."""
    from benchmarks.peers import T5WithOwnHead

    model = T5WithOwnHead.from_pretrained(str(folder), dtype=DTYPES[dtype])
    model.requires_grad_(False).eval()

    def logits(prompt_BPD: Tensor) -> Tensor:
        embeds_BSD = model.get_input_embeddings()(batch.input_ids_BS)
        ones_BP = batch.input_mask_BS.new_ones(prompt_BPD.shape[:2])
        return model(
            inputs_embeds=torch.cat([prompt_BPD.to(embeds_BSD.dtype), embeds_BSD], dim=1),
            attention_mask=torch.cat([ones_BP, batch.input_mask_BS], dim=1),
            labels=batch.labels_BT,
            use_cache=False,
        ).logits

    return model, logits


def our_logits(
    folder: Path, dtype: str, batch: TokenBatch, quantization: str = "none"
) -> tuple[nn.Module, Logits]:
    """Our backbone on a batch."""
    config = {"path": str(folder.resolve()), "sharding": "replicated", "dtype": dtype}
    if quantization != "none":
        config["quantization"] = quantization
    backbone = load_backbone(BackboneConfig.model_validate(config))
    return backbone, lambda prompt_BPD: backbone(prompt_BPD, batch)


@contextmanager
def deepspeed_linear() -> Iterator[None]:
    """DeepSpeed's linear for ZeRO-3 in the place of torch's, as its partitioning puts it."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    original = functional.linear
    functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        functional.linear = original


def make_batch(num_rows: int, num_inputs: int, seed: int = 0) -> TokenBatch:
    """Random ids; all rows but the first are padded at their end."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(3, 250, (num_rows, num_inputs), generator=generator)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1:, -min(_PADDED, num_inputs // 2) :] = 0
    target_ids_BT = torch.randint(3, 250, (num_rows, 2), generator=generator)
    return TokenBatch(ids_BS * mask_BS, mask_BS, target_ids_BT, torch.ones_like(target_ids_BT))


def layer_bytes(
    variant: str, folders: Sequence[Path], dtype: str, batch: TokenBatch, prompt_BPD: Tensor
) -> tuple[int, int]:
    """Bytes that the last encoder layer keeps, as (the hooks, what is alive) see them.

    Args:
        variant: one of the four paths.
        folders: the model without the layer, and with it.
        dtype: `fp32` or `bf16`.
        batch: its tokens.
        prompt_BPD: the prompt of each row.
    """
    counts = []
    for folder in folders:
        if variant in (PEER, PLAIN):
            module, logits = peer_logits(folder, dtype, batch)
        else:
            quantization = "int8" if variant == OURS_INT8 else "none"
            module, logits = our_logits(folder, dtype, batch, quantization)
        with deepspeed_linear() if variant == PEER else torch.enable_grad():
            counts.append(count(module, logits, prompt_BPD))
    (saved, live), (saved_more, live_more) = counts
    return saved_more - saved, live_more - live


def gradient_difference(folder: Path, batch: TokenBatch, prompt_BPD: Tensor) -> float:
    """Largest difference of the prompt's gradient from the peer's in fp32, over its largest."""
    gradients = []
    for _, logits in (
        peer_logits(folder, "fp32", batch),
        our_logits(folder, "fp32", batch),
    ):
        prompt = prompt_BPD.clone().requires_grad_()
        token_loss(logits(prompt), batch.labels_BT).total.backward()
        assert prompt.grad is not None
        gradients.append(prompt.grad)
    theirs, ours = gradients
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main(argv: Sequence[str] | None = None) -> None:
    """Count and report."""
    options = parser("saved_activations", "Bytes kept for backward by an encoder layer.")
    options.add_argument("--tiny", action="store_true", help="d_model 64 instead of 1024")
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--positions", type=int, default=356, help="prompt and input")
    options.add_argument("--prompt-length", type=int, default=100)
    options.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    given = options.parse_args(argv)
    os.environ["DS_ACCELERATOR"] = "cpu"
    hush_transformers()
    folders = make_models(given.out / "models", tiny=given.tiny)
    d_model = layers_of(1, tiny=given.tiny)["d_model"]
    batch = make_batch(given.rows, given.positions - given.prompt_length)
    prompt_BPD = 0.5 * torch.randn(given.rows, given.prompt_length, d_model)
    report = Report(
        "saved_activations",
        f"Kept for backward by an encoder layer, [{given.rows}, {given.positions}] of width "
        f"{d_model}, with padding",
        settings_of(given),
    )
    for dtype in given.dtypes:
        unit = given.rows * given.positions * d_model * DTYPES[dtype].itemsize
        counted = {
            variant: layer_bytes(variant, folders, dtype, batch, prompt_BPD)
            for variant in (PEER, PLAIN, OURS, OURS_INT8)
        }
        report.raw[dtype] = counted
        report.rows += [_row(dtype, v, counted[v], counted[PEER], unit) for v in counted]
        report.aims += [
            Aim(f"{v} over {PEER}, {dtype}", counted[v][0] / counted[PEER][0], 0.45)
            for v in (OURS, OURS_INT8)
        ]
    difference = gradient_difference(folders[-1], batch, prompt_BPD)
    report.aims.append(Aim("difference of the prompt's gradient, fp32, relative", difference, 1e-6))
    report.notes = [
        "A unit is one [B, S, d_model] tensor. `saved`: by saved-tensor hooks; `alive`: all that "
        "operations made and that lives on after forward, however it is kept."
    ]
    report.publish(given.out)


def make_models(folder: Path, *, tiny: bool) -> list[Path]:
    """Two checkpoints in fp32 that differ by one encoder layer."""
    prefix = "t5-tiny" if tiny else "t5-large"
    return [
        ensure_checkpoint(folder / f"{prefix}-{n}-layers", layers_of(n, tiny=tiny), "fp32")
        for n in (_NUM_LAYERS, _NUM_LAYERS + 1)
    ]


def _row(
    dtype: str, variant: str, counted: tuple[int, int], peer: tuple[int, int], unit: int
) -> dict[str, str]:
    saved, live = counted
    return {
        "path": f"{variant}, {dtype}",
        "saved, MB a layer": f"{saved / 1e6:.2f}",
        "saved, units": f"{saved / unit:.2f}",
        "alive, units": f"{live / unit:.2f}",
        "over the peer": f"{saved / peer[0]:.3f}x",
    }


def _addresses(module: nn.Module) -> set[int]:
    return {_address(tensor) for tensor in [*module.parameters(), *module.buffers()]}


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


if __name__ == "__main__":
    main()
