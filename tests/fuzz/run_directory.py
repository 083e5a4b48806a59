"""Readers of what a run leaves: checkpoints, and the files that say how it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from softprompt_dist.durable import digest_of
from softprompt_dist.lifecycle.status import read_status
from softprompt_dist.run.checkpoint_format import (
    MANIFEST,
    RANDOM_STATES,
    STATE,
    TENSORS,
    encode_checkpoint,
    encode_manifest,
    read_checkpoint,
)
from tests.fuzz.campaign import Target, file_reader
from tests.fuzz.mutations import mutate_json, mutate_lines, mutate_safetensors

_HEARTBEAT = {
    "step": 5, "steps": 9, "loss": 1.5, "tokens_per_second": 10.0, "phase": "training",
    "time": 1.0, "host": "h", "pid": 7, "token": "t",
}  # fmt: skip
_ATTEMPT = {"token": "t", "host": "h", "pid": 7, "started": 3, "job": "1", "restart": 0}
_METRICS = b'{"step": 1, "kind": "train", "time": 1.0, "loss": 2.0}\n' * 2


def run_directory_targets(folder: Path) -> Iterator[Target]:
    """Targets that write what they read into `folder`."""
    yield from _checkpoint_targets(folder / "checkpoints" / "step-00000020")
    yield from _status_targets(folder / "status")


def _status_targets(folder: Path) -> Iterator[Target]:
    def status(path: Path) -> None:
        found = read_status(path.parent)
        assert found is not None
        json.dumps(found.to_json())

    heart, owner = json.dumps(_HEARTBEAT).encode(), json.dumps(_ATTEMPT).encode()
    for name in ("heartbeat.json", "attempt.json", "metrics.jsonl", "environment.json"):
        sample, mutate = {
            "heartbeat.json": (heart, mutate_json),
            "attempt.json": (owner, mutate_json),
            "metrics.jsonl": (_METRICS, mutate_lines),
            "environment.json": (b'{"attempts": [{"time": "x"}]}', mutate_json),
        }[name]
        own = folder / name.partition(".")[0]
        own.mkdir(parents=True)
        (own / "why").write_bytes(b"running\n")
        (own / "heartbeat.json").write_bytes(heart)
        (own / "attempt.json").write_bytes(owner)
        yield Target(name, file_reader(own / name, status), [sample], mutate, 0.003, refuses=False)


def _checkpoint_targets(folder: Path) -> Iterator[Target]:
    folder.mkdir(parents=True)
    state = {"seed": 1, "best_score": 50.0, "recipe": {"a": [1]}}
    files = encode_checkpoint(
        20, {"prompt": torch.ones(2, 3)}, state, [{"cpu": torch.zeros(8, dtype=torch.uint8)}]
    )
    for name, content in files.items():
        (folder / name).write_bytes(content)

    def read_document(path: Path) -> None:
        # Somebody who forges a checkpoint writes a manifest that goes with it.
        parts = {name: (folder / name).read_bytes() for name in (TENSORS, RANDOM_STATES, STATE)}
        digests = {name: digest_of(content) for name, content in parts.items()}
        (folder / MANIFEST).write_bytes(encode_manifest(20, digests))
        found = read_checkpoint(folder)
        assert (found.step, type(found.world_size), type(found.state)) == (20, int, dict)

    def restored(read: Callable[[bytes], object], name: str) -> Callable[[bytes], object]:
        def reading(content: bytes) -> object:
            try:
                return read(content)
            finally:
                (folder / name).write_bytes(files[name])
                (folder / MANIFEST).write_bytes(files[MANIFEST])

        return reading

    forged = restored(file_reader(folder / STATE, read_document), STATE)
    yield Target("checkpoint state", forged, [files[STATE]], mutate_json, 0.006)
    tensors = restored(file_reader(folder / TENSORS, read_document), TENSORS)
    yield Target("checkpoint tensors", tensors, [files[TENSORS]], mutate_safetensors, 0.006)
    manifest = restored(file_reader(folder / MANIFEST, lambda _: read_checkpoint(folder)), MANIFEST)
    yield Target("checkpoint manifest", manifest, [files[MANIFEST]], mutate_json, 0.006)
