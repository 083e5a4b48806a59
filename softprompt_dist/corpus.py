"""`softprompt corpus`: tokenise text once, look at what came out, compare checksums.

softprompt corpus build corpora/novels novels.txt --tokenizer google/t5-v1_1-base
softprompt corpus show corpora/novels
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from softprompt_dist import screen
from softprompt_dist.errors import ConfigError, DataError
from softprompt_dist.parallel.verb import VerbParser, count, run_verb

if TYPE_CHECKING:
    from softprompt_dist.data.lm.corpus import BuiltCorpus
    from softprompt_dist.data.lm.text_sources import TextSource

_SHOWN_CHARACTERS = 300


def build_parser() -> VerbParser:
    """Options of `softprompt corpus`."""
    parser = VerbParser("corpus", "Tokenise text once, for softprompt adapt.")
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=_ActionParser
    )
    build = actions.add_parser("build", help="text to token ids; goes on if interrupted")
    _add_source_options(build)
    _add_build_options(build)
    show = actions.add_parser("show", help="numbers of a corpus, and its first documents")
    show.add_argument("folder", metavar="FOLDER", type=Path)
    show.add_argument(
        "--documents", metavar="N", type=count, default=3, help="how many (default: %(default)s)"
    )
    verify = actions.add_parser("verify", help="compare all checksums")
    verify.add_argument("folder", metavar="FOLDER", type=Path)
    return parser


class _ActionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}\n{self.format_usage().strip()}")


def _add_source_options(build: argparse.ArgumentParser) -> None:
    build.add_argument("folder", metavar="FOLDER", type=Path, help="where the corpus shall be")
    build.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="text with one document a line, .jsonl (both also .gz, .xz), .parquet, or a data set "
        "of the hub: hub:NAME or hub:NAME:CONFIG",
    )
    build.add_argument(
        "--tokenizer", metavar="FOLDER|NAME", required=True, help="that of the backbone"
    )
    build.add_argument(
        "--field", metavar="NAME", default="text", help="which holds the text (default: text)"
    )
    build.add_argument(
        "--split", metavar="NAME", default="train", help="of a hub data set (default: train)"
    )
    build.add_argument(
        "--revision", metavar="REV", help="of a hub data set (default: the newest commit)"
    )


def _add_build_options(build: argparse.ArgumentParser) -> None:
    build.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out rows that are not text and count them; do not end with the first",
    )
    build.add_argument(
        "--part",
        metavar="I/N",
        type=_part,
        help="only every N-th source file, from the I-th, into a folder of its own in FOLDER",
    )
    build.add_argument(
        "--workers",
        metavar="N",
        type=count,
        help="processes that tokenise (default: one a core); changes nothing in the corpus",
    )
    build.add_argument(
        "--shard-tokens",
        metavar="N",
        type=count,
        default=1 << 27,
        help="a shard ends with the document that reaches so many (default: %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    options = build_parser().parse_args(argv)
    for line in _ACTIONS[options.action](options):
        print(line, flush=True)


def _build(options: argparse.Namespace) -> Iterator[str]:
    screen.outlive_readers()
    from softprompt_dist.data.lm.build import BuildRequest, build_corpus
    from softprompt_dist.data.lm.corpus import BuiltCorpus, part_name
    from softprompt_dist.data.lm.text_sources import part_of

    tokenizer = _tokenizer(options.tokenizer)
    sources, folder, part = _sources(options), options.folder, None
    if options.part:
        sources = part_of(sources, *options.part)
        folder = folder / part_name(*options.part)
        part = "/".join(map(str, options.part))
    request = BuildRequest(
        sources,
        field_name=options.field,
        part=part,
        tokens_per_shard=options.shard_tokens,
        skip_bad=options.skip_bad,
        workers=options.workers,
    )
    build_corpus(request, tokenizer, folder)
    yield from _numbers([BuiltCorpus(folder)])
    yield f"Use it with\n  corpus: [{options.folder}]"


def _sources(options: argparse.Namespace) -> list[TextSource]:
    from softprompt_dist.data.lm.hub_source import PREFIX, hub_files
    from softprompt_dist.data.lm.text_sources import file_source

    found: list[TextSource] = []
    for spec in options.sources:
        if spec.startswith(PREFIX):
            found += hub_files(
                spec, split=options.split, revision=options.revision, field_name=options.field
            )
        else:
            found.append(file_source(Path(spec), options.field))
    return found


def _tokenizer(name: str) -> Any:
    from softprompt_dist.backbone.load import load_tokenizer

    if Path(name).is_dir():
        return load_tokenizer(Path(name))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub's client raises kinds of its own and of its libraries
        said = str(error).strip().splitlines()
        raise DataError(
            f"Cannot load tokenizer {name!r}: {said[0] if said else type(error).__name__} It must "
            f"be a folder with tokenizer.json or spiece.model, or a name on the hub."
        ) from error


def _show(options: argparse.Namespace) -> Iterator[str]:
    from softprompt_dist.data.lm.build import TOKENIZER
    from softprompt_dist.data.lm.corpus import built_corpora

    corpora = built_corpora(options.folder)
    yield from _numbers(corpora)
    first = corpora[0]
    tokenizer = _tokenizer(str(first.folder / TOKENIZER))
    shown = min(options.documents, first.num_documents)
    offsets = first.offsets(0, shown).tolist()
    yield f"The first {shown} of {first.num_documents:,} documents, as the tokenizer reads them:"
    for number, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False), 1):
        # Enough ids for what is shown: a document may be a library.
        text = tokenizer.decode(first.tokens(start, min(end, start + _SHOWN_CHARACTERS)))
        cut = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
        yield f"{number:>3}  {end - start:,} tokens  {json.dumps(cut, ensure_ascii=False)}"


def _verify(options: argparse.Namespace) -> Iterator[str]:
    from softprompt_dist.data.lm.corpus import built_corpora

    for corpus in built_corpora(options.folder):
        corpus.verify()
        yield f"{corpus.folder}: {len(corpus.manifest.shards)} shards match their checksums."


def _numbers(corpora: Sequence[BuiltCorpus]) -> Iterator[str]:
    from softprompt_dist.data.lm.corpus import total_of

    manifest = corpora[0].manifest
    documents, tokens = total_of(corpora, "documents"), total_of(corpora, "tokens")
    num_bytes = total_of(corpora, "text_bytes")
    names = [source.name for corpus in corpora for source in corpus.manifest.sources]
    facts = {
        "documents": f"{documents:,}",
        "tokens": f"{tokens:,}, {tokens / documents:,.1f} a document",
        "text": f"{num_bytes / 1e6:,.1f} MB, {num_bytes / tokens:.2f} bytes a token",
        "left out": f"{total_of(corpora, 'empty_documents'):,} empty documents, "
        f"{total_of(corpora, 'bad_rows'):,} bad rows",
        "shards": f"{sum(len(c.manifest.shards) for c in corpora)} of {manifest.token_dtype}",
        "tokenizer": f"{manifest.tokenizer.name} ({manifest.tokenizer.fingerprint[:12]}), "
        f"{manifest.tokenizer.vocabulary_size:,} ids",
        "sources": f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
        "fingerprint": ", ".join(corpus.fingerprint[:12] for corpus in corpora[:4])
        + (", ..." if len(corpora) > 4 else ""),
    }
    yield from (f"{name:<12}{value}" for name, value in facts.items())


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, num_parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= num_parts <= 99999:
        raise argparse.ArgumentTypeError(f"{text} is no part; write 1/16 to 16/16")
    return part, num_parts


_ACTIONS = {"build": _build, "show": _show, "verify": _verify}

if __name__ == "__main__":
    run_verb(main)
