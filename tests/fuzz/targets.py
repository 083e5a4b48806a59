"""Every reader of files that somebody else may have written, with small valid samples for each."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import save

from softprompt_dist.adapt_config import AdaptConfig
from softprompt_dist.adapt_stages import load_stages
from softprompt_dist.backbone.architecture import architecture_of
from softprompt_dist.backbone.checkpoint_reader import CheckpointReader
from softprompt_dist.backbone.engine import read_engine_config
from softprompt_dist.backbone.weight_files import checkpoint_files
from softprompt_dist.config import TuneConfig
from softprompt_dist.data.catalogue.samples import sample_rows
from softprompt_dist.data.lm.documents import RawRows, documents_of
from softprompt_dist.data.lm.manifest import (
    Counts,
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    fingerprint_of,
    read_manifest,
    write_manifest,
)
from softprompt_dist.data.lm.text_sources import file_source
from softprompt_dist.data.reading import TaskReader
from softprompt_dist.data.rows import stream_member
from softprompt_dist.data.sources import SplitSource
from softprompt_dist.data.split_reading import check_rows, read_split
from softprompt_dist.data.tasks import task_reader
from softprompt_dist.errors import BackboneError
from softprompt_dist.identity import Identity
from softprompt_dist.prompt.file import PromptMetadata, load_prompt, save_prompt
from softprompt_dist.recipe import apply_override, check_values, load_recipe, to_yaml
from softprompt_dist.task_config import TaskConfig
from tests.fuzz.campaign import Target, file_reader
from tests.fuzz.mutations import (
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_safetensors,
)
from tests.fuzz.run_directory import run_directory_targets

_CATALOGUE = ("boolq", "record", "multirc", "wsc", "squad", "stsb")
_PROMPT = PromptMetadata(
    identity=Identity("demo:tiny-t5", "f" * 32, {"model_type": "t5"}, {"vocabulary": "e" * 64}),
    task="foods", initialisation="text", step=30, metric="accuracy", score=87.5, prompt_length=2,
    d_model=3, version="0.1.0",
)  # fmt: skip
METADATA = dataclasses.asdict(_PROMPT)
"""Of a prompt of 2 x 3 values."""


def all_targets(folder: Path) -> list[Target]:
    """Targets that write what they read into `folder`."""
    return [
        *_recipe_targets(folder / "recipes"),
        *_row_targets(),
        *_corpus_targets(folder / "corpus"),
        *_prompt_targets(folder / "prompts"),
        *run_directory_targets(folder / "run"),
        *_backbone_targets(folder / "backbone"),
    ]


def _recipe_targets(folder: Path) -> Iterator[Target]:
    tune = [
        b"name: a\nsteps: 5\noptimizer: {learning_rate: 0.3}\ntask: {name: x, labels: {a: b}}\n",
        b"mixture:\n  tasks:\n  - {name: y, source: {kind: files, train: t.jsonl}}\ntransfer: []\n",
        b"task: {catalogue: boolq}\nevaluation:\n  method: rank\n  # why\nbackbone: {path: x/y}\n",
    ]
    adapt = [
        b"corpus: [a.txt]\nbackbone: x\nsteps: 5\nlearning_rate: 1e-3\n",
        b"name: both\nbackbone: x\ncorpus: [a*3]\nstages:\n  one: {steps: 3}\n  b:\n    seed: 4\n",
    ]

    def check(config: TuneConfig | AdaptConfig) -> None:
        # What is accepted can be written down, and read back as the same.
        text = to_yaml(config)
        assert type(config).model_validate(yaml.safe_load(text.encode().decode())) == config

    def read_tune(path: Path) -> None:
        check(load_recipe(TuneConfig, path))

    def read_stages(path: Path) -> None:
        for stage in load_stages(str(path)):
            check(stage)

    def override(content: bytes) -> None:
        values: dict[str, Any] = {"task": {"name": "x"}}
        apply_override(values, content.decode("utf-8", "surrogateescape"))
        check(check_values(TuneConfig, values))

    yield Target("recipe", file_reader(folder / "t.yaml", read_tune), tune, mutate_bytes, 0.02)
    stages = file_reader(folder / "a.yaml", read_stages)
    yield Target("stages", stages, adapt, mutate_bytes, 0.006)
    settings = [b"steps=5", b"optimizer.learning_rate=0.1", b"task={name: y, labels: {a: b}}"]
    yield Target("override", override, settings, mutate_bytes, 0.012)


def _row_targets() -> Iterator[Target]:
    own = task_reader(TaskConfig.model_validate({"name": "own", "labels": {"a": "x", "b": "y"}}))
    rows = b'{"text": "one two", "label": "a"}\n\n{"text": "\\u00e9 3", "label": "b", "n": 1.5}\n'
    table = b'text,label\r\none,a\n"two, ""three""\nfour",b\n'

    def examples(reader: TaskReader, origin: str, content: bytes) -> None:
        source = SplitSource(origin, lambda: stream_member(lambda: io.BytesIO(content), origin))
        read = read_split("train", source, reader, absent=(), asked=("train",))
        for example in read.examples("train"):
            # What is accepted can be written down.
            text = example.id + example.input_text + example.target_text
            (text + json.dumps(example.facts, ensure_ascii=False)).encode()
        check_rows([read], skip_bad_rows=False)

    yield Target("jsonl", partial(examples, own, "a.jsonl"), [rows], mutate_bytes, 0.17)
    yield Target("csv", partial(examples, own, "a.csv"), [table], mutate_bytes, 0.12)
    packed = [gzip.compress(rows)]
    yield Target("jsonl.gz", partial(examples, own, "a.jsonl.gz"), packed, _mutate_packed, 0.02)
    yield Target("parquet", partial(examples, own, "a.parquet"), [_parquet()], mutate_bytes, 0.01)
    for name in _CATALOGUE:
        reader = task_reader(TaskConfig.model_validate({"catalogue": name}))
        sample = "".join(json.dumps(row) + "\n" for row in sample_rows(name)).encode()
        read = partial(examples, reader, "a.jsonl")
        yield Target(f"jsonl of {name}", read, [sample], mutate_lines, 0.012)


def _mutate_packed(chosen: Random, sample: bytes) -> bytes:
    if chosen.random() < 0.5:
        return mutate_bytes(chosen, sample)
    return gzip.compress(mutate_bytes(chosen, gzip.decompress(sample)), 1, mtime=0)


def _parquet() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    table = pa.table({"text": ["one", "two"], "label": ["a", "b"]})
    parquet.write_table(table, file)
    return file.getvalue()


def _corpus_targets(folder: Path) -> Iterator[Target]:
    def documents(content: bytes) -> None:
        lines = content.splitlines(keepends=True)
        for kind in ("json", "line"):
            for text in documents_of(RawRows(0, 1, lines, kind, "text")).texts:
                text.encode()

    def text_file(path: Path) -> None:
        for raw in file_source(path).rows(0, 1):
            documents_of(raw)

    lines = b'{"text": "a \\u00e9"}\n\n{"text": "b", "n": [1, {"c": null}]}\n'
    yield Target(
        "documents",
        documents,
        [lines, b"a plain line\nanother\n"],
        mutate_bytes,
        0.26,
        refuses=False,
    )
    packed = file_reader(folder / "t.txt.gz", text_file)
    yield Target("text.gz", packed, [gzip.compress(lines)], _mutate_packed, 0.02)
    shard = ShardRecord(
        name="shard-00000", documents=2, tokens=5, text_bytes=9, empty_documents=0, bad_rows=0,
        tokens_sha256="a" * 64, offsets_sha256="b" * 64,
    )  # fmt: skip
    manifest = Manifest(
        fingerprint=fingerprint_of("t", [shard]), token_dtype="uint16", field="text", part=None,
        tokens_per_shard=10, sources=(SourceRecord(name="a.txt"),), shards=(shard,),
        tokenizer=TokenizerRecord(name="t", fingerprint="t", vocabulary_size=9),
        total=Counts(documents=2, tokens=5, text_bytes=9, empty_documents=0, bad_rows=0),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, manifest)
    sample = (folder / "manifest.json").read_bytes()
    read = file_reader(folder / "manifest.json", lambda path: read_manifest(path.parent))
    yield Target("corpus manifest", read, [sample], mutate_json, 0.12)


def _prompt_targets(folder: Path) -> Iterator[Target]:
    path = folder / "best.safetensors"
    save_prompt(path, torch.arange(6.0).reshape(2, 3), _PROMPT)
    sample = path.read_bytes()

    def read(path: Path) -> None:
        prompt_PD, metadata = load_prompt(path)
        assert tuple(prompt_PD.shape) == (metadata.prompt_length, metadata.d_model)
        assert bool(torch.isfinite(prompt_PD).all())
        json.dumps(dataclasses.asdict(metadata), ensure_ascii=False).encode()

    yield Target("prompt file", file_reader(path, read), [sample], mutate_safetensors, 0.12)


def _backbone_targets(folder: Path) -> Iterator[Target]:
    weights = {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(2, 2, dtype=torch.int8),
               "b.weight_scale": torch.ones(2, 1)}  # fmt: skip
    pickled = [io.BytesIO(), io.BytesIO()]
    for file, as_zip in zip(pickled, (True, False), strict=True):
        torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=as_zip)

    def tensors(path: Path) -> None:
        reader = CheckpointReader(path.parent)
        for name in reader.shapes:
            if reader.shapes[name] and 0 not in reader.shapes[name] and reader.holds_numbers(name):
                reader.tensor(name)
        reader.close()

    def engine(path: Path) -> None:
        read_engine_config(path)

    def architecture(content: bytes) -> None:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BackboneError("what is no JSON does not come so far") from error
        architecture_of("x", values if isinstance(values, dict) else {})

    config = b'{"model_type": "t5", "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 9,' \
             b' "d_kv": 4, "vocab_size": 16}'  # fmt: skip
    index = b'{"metadata": {"total_size": 9}, "weight_map": {"a": "model-1.safetensors"}}'
    ds_config = b'{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}'
    one = file_reader(folder / "one" / "model.safetensors", tensors)
    yield Target("safetensors weights", one, [save(weights)], mutate_safetensors, 0.01)
    old = file_reader(folder / "old" / "pytorch_model.bin", tensors)
    samples = [file.getvalue() for file in pickled]
    yield Target(".bin weights", old, samples, mutate_bytes, 0.008)
    many = folder / "many" / "model.safetensors.index.json"
    read_index = file_reader(many, lambda path: checkpoint_files(path.parent))
    (many.parent / "model-1.safetensors").write_bytes(save(weights))
    yield Target("index of weights", read_index, [index], mutate_json, 0.012)
    yield Target(
        "ds_config", file_reader(folder / "ds.json", engine), [ds_config], mutate_json, 0.015
    )
    yield Target("architecture", architecture, [config], mutate_json, 0.015)
