"""The files of a job: rows, tokenizer, weights. Nothing is fetched and no weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_dist.cache import cache_directory
from softprompt_dist.checks.finding import Finding
from softprompt_dist.config import BackboneConfig, PromptConfig, TuneConfig
from softprompt_dist.data.sources import SPLITS
from softprompt_dist.errors import BackboneError, DataError, SoftpromptError
from softprompt_dist.task_config import TaskConfig
from softprompt_dist.untrusted import open_regular

if TYPE_CHECKING:
    from softprompt_dist.data.sources import HubNames

_READ_WHOLE_BYTES = 256 * 2**20
_HUB_SECONDS = 10.0
_SPLIT_WORDS = {"train": "training", "validation": "validation", "test": "test"}


def check_files(config: TuneConfig) -> list[Finding]:
    """What a tuning run reads besides its backbone."""
    mixed = [check_task(each, name=f"task {each.name}") for each in config.mixture.tasks]
    scored = [
        check_task(each.task, [each.split], name=f"task {each.task.name}")
        for each in config.transfer
    ]
    return [check_task(config.task), *mixed, *scored, *check_prompt(config.prompt)]


def check_backbone_files(folder: Path, config: BackboneConfig) -> list[Finding]:
    """Weights and tokenizer."""
    return [check_weights(folder, config), check_tokenizer(folder)]


def check_tokenizer(folder: Path) -> Finding:
    """Whether it can be read."""
    return tried("tokenizer", lambda: _tokenizer(folder))


def check_weights(folder: Path, config: BackboneConfig) -> Finding:
    """Whether every tensor that config.json asks for is there in its shape."""
    return tried("backbone", lambda: _inventory(folder, config))


def find_backbone(config: BackboneConfig) -> tuple[Path | None, list[Finding]]:
    """The folder of the backbone's files; if it is not here, whether it could be fetched."""
    try:
        folder = local_folder(config)
    except BackboneError as error:
        return None, [Finding("backbone", "fail", config.path, str(error))]
    if folder is not None:
        return folder, []
    if config.path.startswith("demo:"):
        return None, [Finding("backbone", "ok", f"{config.path}: fetched when a run first starts")]
    return None, [tried("backbone", lambda: _on_hub(config.path, "model", config.revision))]


def local_folder(config: BackboneConfig) -> Path | None:
    """The folder of the backbone's files; None if they are still to be fetched.

    Raises:
        BackboneError: a path that does not exist, or a demo backbone that there is not.
    """
    from softprompt_dist.backbone.demo import DEMO_PREFIX, resolve_backbone

    if config.path == f"{DEMO_PREFIX}smollm2-135m":
        converted = (cache_directory() / "backbones").glob("smollm2-135m*/config.json")
        return next((file.parent for file in sorted(converted)), None)
    folder = Path(resolve_backbone(config.path))
    if folder.is_dir():
        return folder
    if config.path.startswith((".", "/", "~")) or config.path.count("/") != 1:
        raise BackboneError(f"Backbone folder {config.path!r} does not exist. Set backbone.path.")
    return _hub_snapshot(config)


def check_task(
    config: TaskConfig, splits: Sequence[str] = SPLITS, *, name: str = "task"
) -> Finding:
    """Rows of local files are read as a run would read them, if they are not too many."""
    source = config.source
    if source.kind == "hub":
        return tried(name, lambda: _hub_rows(config))
    if source.kind == "vader":
        return Finding(name, "ok", f"vader {source.name}: fetched when a run first starts")
    return tried(name, lambda: _rows(config, splits))


def check_prompt(config: PromptConfig) -> list[Finding]:
    """The prompt file that the prompt begins as, if it does."""
    if config.initialisation != "file":
        return []
    from softprompt_dist.prompt.file import load_prompt

    def shape() -> str:
        prompt_PD, _ = load_prompt(str(config.file))
        return f"{config.file}: {list(prompt_PD.shape)}"

    return [tried("prompt file", shape)]


def tried(name: str, work: Callable[[], str]) -> Finding:
    """What `work` found, or the user error that it met."""
    try:
        return Finding(name, "ok", work())
    except SoftpromptError as error:
        return Finding(name, "fail", "cannot be used", str(error))


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a backbone folder.

    Raises:
        BackboneError: missing, unreadable or no JSON object.
    """
    path = folder / "config.json"
    try:
        with open_regular(path) as file:
            values = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"Cannot read {path}: {error}. Fetch it again.") from error
    if not isinstance(values, dict):
        raise BackboneError(f"{path} must be a JSON object. Fetch it again.")
    return values


def _inventory(folder: Path, config: BackboneConfig) -> str:
    from softprompt_dist.backbone.load import inventory_of
    from softprompt_dist.backbone.weight_files import checkpoint_files

    inventory = inventory_of(folder, config)
    inventory.reader.close()
    number = len(checkpoint_files(folder))
    return f"{folder}: {len(inventory.stored)} tensors in {number} file(s), none missing"


def _tokenizer(folder: Path) -> str:
    from softprompt_dist.backbone.load import load_tokenizer

    return f"{len(load_tokenizer(folder)):,} pieces"


def _hub_rows(config: TaskConfig) -> str:
    from softprompt_dist.data.tasks import hub_data_set

    return _dataset(hub_data_set(config))


def _rows(config: TaskConfig, splits: Sequence[str]) -> str:
    from softprompt_dist.data.tasks import load_task

    source = config.source
    named = () if source.kind == "superglue" else (source.train, source.validation, source.test)
    paths = [Path(name) for name in named if name]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise DataError(f"No such file: {', '.join(missing)}. Paths start at {Path.cwd()}.")
    total = sum(path.stat().st_size for path in paths)
    if total > _READ_WHOLE_BYTES:
        return f"{len(paths)} file(s), {total / 1e9:.1f} GB, not read here"
    task = load_task(config, splits)
    counts = (f"{len(task.splits[split])} {_SPLIT_WORDS[split]}" for split in splits)
    return f"{', '.join(counts)} rows"


def _hub_snapshot(config: BackboneConfig) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(config.path, revision=config.revision, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    return folder if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")) else None


def _dataset(names: HubNames) -> str:
    from softprompt_dist.data.hub import find_data_set

    try:
        return _on_hub(names.data_set, "dataset", names.revision)
    except BackboneError as error:
        try:
            found = find_data_set(names.data_set, names.subset, names.revision)
        except SoftpromptError:
            raise
        except Exception:  # as `_on_hub` says
            raise error from None
        at = f" at {found.commit}" if found.commit else ""
        return f"{names.data_set}{at}: on this machine"


def _on_hub(name: str, kind: str, revision: str | None) -> str:
    """Ask the hub for one page about `name`.

    Raises:
        BackboneError: no such name, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_HUB_SECONDS)
    except Exception as error:  # the hub's client raises kinds of its own and of its libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"{name} is not on this machine, and the hub does not offer it ({reason}). Fetch it on "
            "a machine with network, and name the folder or files."
        ) from error
    return f"{name}: on the hub, fetched when a run first starts"
