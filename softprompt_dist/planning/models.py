"""From what a user calls a model to its numbers, by the shortest way."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path

from softprompt_dist.backbone.architecture import Architecture, architecture_of
from softprompt_dist.backbone.known_architectures import known_architecture, known_names
from softprompt_dist.errors import BackboneError
from softprompt_dist.untrusted import open_regular

_TINY_T5 = "demo:tiny-t5"


def find_architecture(model: str, revision: str | None = None) -> Architecture:
    """The numbers of a public model by name, of a folder, or of a hub name (fetches config.json).

    Raises:
        BackboneError: none of these, or a kind of model without known numbers.
    """
    known = known_architecture(model)
    if known is not None:
        return known
    if model == _TINY_T5:
        return _read(model, Path(str(resources.files("softprompt_dist") / "assets" / "tiny-t5")))
    if Path(model).is_dir():
        return _read(model, Path(model))
    if model.startswith((".", "/", "~", "demo:")) or model.count("/") > 1:
        raise BackboneError(f"There is no folder {model!r}.{_nearest(model)} Set --model.")
    return _read(model, _fetch(model, revision))


def _read(name: str, folder: Path) -> Architecture:
    path = folder / "config.json"
    try:
        with open_regular(path) as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(
            f"Cannot read {path}: {error}. --model needs a Hugging Face folder with config.json."
        ) from error
    if not isinstance(config, dict):
        raise BackboneError(f"{path} is no JSON object. Fetch it again.")
    return architecture_of(name, config)


def _fetch(model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision)).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(
            f"Model {model!r} is neither a folder nor listed here nor reachable on the hub "
            f"({reason}).{_nearest(model)} Give --model a folder with config.json, or one of: "
            f"{', '.join([*known_names(), _TINY_T5])}."
        ) from error


def _nearest(model: str) -> str:
    close = difflib.get_close_matches(model, [*known_names(), _TINY_T5], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
