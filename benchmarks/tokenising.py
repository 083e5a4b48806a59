"""Text to ids on one core: as `softprompt corpus build` does it, and as the tokenizer itself does.

python -m benchmarks.tokenising novels.txt --tokenizer google/t5-v1_1-base
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.report import Aim, Report, parser, settings_of
from softprompt_dist.data.encoding import EncoderSpec
from softprompt_dist.data.lm.documents import RawRows, documents_of
from softprompt_dist.data.lm.encoding_pool import encode_rows
from softprompt_dist.data.lm.text_sources import file_source

OURS = "corpus build"
WHOLE_TEXTS = "whole texts, tokenizers' batch"
USUAL = "whole texts, tokenizer(...)"
Ids = Callable[[RawRows], list[int]]


def main() -> None:
    """Run it; see --help."""
    options = parser("tokenising", __doc__.splitlines()[0])
    options.add_argument("text", type=Path, help="a text file with one document a line, or .jsonl")
    options.add_argument("--tokenizer", required=True, help="folder, or name on the hub")
    given = options.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    spec = EncoderSpec.of(tokenizer)
    encode, backend = spec.encoder(), spec.load_backend()

    def whole_texts(raw: RawRows) -> list[int]:
        encoded = backend.encode_batch_fast(documents_of(raw).texts, add_special_tokens=False)
        return [i for one in encoded for i in one.ids]

    def usual(raw: RawRows) -> list[int]:
        texts = documents_of(raw).texts
        ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return [i for one in ids for i in one]

    ways: dict[str, Ids] = {
        OURS: lambda raw: encode_rows(raw, encode).token_ids.tolist(),
        WHOLE_TEXTS: whole_texts,
        USUAL: usual,
    }
    publish(_measured(given.text, ways), given)


def _measured(path: Path, ways: dict[str, Ids]) -> dict[str, dict[str, float]]:
    """CPU seconds of each way over the same batches, turn by turn."""
    seconds = dict.fromkeys(ways, 0.0)
    num_bytes = num_tokens = 0
    for raw in _batches(path):
        num_bytes += sum(map(len, raw.values))
        ids = []
        for name, way in ways.items():
            start = time.process_time()
            ids.append(way(raw))
            seconds[name] += time.process_time() - start
        if any(not np.array_equal(ids[0], other) for other in ids[1:]):
            raise SystemExit(f"Ids differ in the rows from {raw.first_row}.")
        num_tokens += len(ids[0])
    return {
        name: {"seconds": spent, "bytes": num_bytes, "tokens": num_tokens}
        for name, spent in seconds.items()
    }


def _batches(path: Path) -> Iterator[RawRows]:
    return file_source(path).rows(0, 1)


def publish(measured: dict[str, dict[str, float]], given: argparse.Namespace) -> None:
    """Print and write the table."""
    speeds = {name: m["bytes"] / m["seconds"] / 1e6 for name, m in measured.items()}
    rows = [
        {
            "way": name,
            "MB per core and second": f"{speeds[name]:.2f}",
            "M tokens per core and second": f"{m['tokens'] / m['seconds'] / 1e6:.2f}",
        }
        for name, m in measured.items()
    ]
    first = measured[OURS]
    report = Report(
        "tokenising",
        "Text to ids, per core",
        settings_of(given),
        rows=rows,
        aims=[Aim("MB of text per core and second", speeds[OURS], 3, at_least=True)],
        notes=[
            f"{first['bytes'] / 1e6:.1f} MB of text, {first['tokens']:,.0f} tokens; processor "
            f"time, decoding and checks of the text included; all ids are equal."
        ],
        raw=measured,
    )
    report.publish(given.out)


if __name__ == "__main__":
    main()
