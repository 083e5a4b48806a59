"""Builds the plain text that `demo:tiny-t5` is trained on, from public sources already on disk.

    python -m softprompt_dist.data.demo_corpus --out corpus --debian debs --vader hutto_ICWSM_2014 \
        --novels eltec_eng.txt.xz --questions trec-train.jsonl.gz --held-out sst2-test.jsonl.gz

Every output file holds one document a line. Only texts are used, never labels; texts that a task's
validation or test split holds are left out. Any source may be absent.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import lzma
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from softprompt_dist.errors import DataError

MAX_DOCUMENT_CHARACTERS = 4000
MIN_DOCUMENT_CHARACTERS = 20
VADER_FILES = {
    "vader-movies": "movieReviewSnippets_GroundTruth.txt",
    "vader-products": "amazonReviewSnippets_GroundTruth.txt",
    "vader-editorials": "nytEditorialSnippets_GroundTruth.txt",
    "vader-tweets": "tweets_GroundTruth.txt",
}
WORDNET_KINDS = {
    "03": "thing", "04": "act", "05": "animal", "06": "object", "07": "attribute",
    "08": "body part", "09": "idea", "10": "communication", "11": "event", "12": "feeling",
    "13": "food", "14": "group", "15": "place", "16": "motive", "17": "natural object",
    "18": "person", "19": "phenomenon", "20": "plant", "21": "possession", "22": "process",
    "23": "quantity", "24": "relation", "25": "shape", "26": "state", "27": "substance",
    "28": "time",
}  # fmt: skip
"""Lexicographer file of a noun synset -> its name (WordNet 3.0, lexnames(5WN))."""


def is_held_out(text: str) -> bool:
    """Whether the hash of the text puts it in a task's test (0) or validation (1) tenth."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 10 < 2


def match_key(text: str) -> str:
    """Letters and digits in lower case: equal for two tokenisations of one sentence."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def vader_snippets(path: Path) -> Iterator[str]:
    """Training texts of one VADER ground-truth file (`id<TAB>rating<TAB>text`)."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.split("\t", 2)[-1].strip()
        if text and not is_held_out(text):
            yield text


def open_text(path: Path) -> IO[str]:
    """A UTF-8 file, `.gz` and `.xz` included.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"Text file {path} does not exist. Give a path to plain text, .gz or .xz.")
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    return cast(IO[str], openers.get(path.suffix, open)(path, "rt", encoding="utf-8"))


def json_texts(path: Path) -> Iterator[str]:
    """The field `text` of a jsonl file, gzip or not."""
    with open_text(path) as lines:
        for line in lines:
            yield str(json.loads(line)["text"]).strip()


def wordnet_glosses(path: Path) -> Iterator[str]:
    """One sentence a synset of a WordNet data file: `river (object): a large stream ...`."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        fields, _, gloss = line.partition(" | ")
        parts = fields.split()
        if line.startswith(" ") or len(parts) < 6 or not gloss:
            continue
        count = int(parts[3], 16)
        words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in parts[4 : 4 + 2 * count : 2]]
        kind = WORDNET_KINDS.get(parts[1])
        yield f"{', '.join(words)}{f' ({kind})' if kind else ''}: {gloss.strip()}"


def wordnet_questions(path: Path) -> Iterator[str]:
    """Every noun's gloss once more, as a question with its answer."""
    for line in wordnet_glosses(path):
        match = re.match(r"([^,:(]+)[^:]*?\(([a-z ]+)\): ([^;]+)", line)
        if not match:
            continue
        word, kind, gloss = (part.strip() for part in match.groups())
        yield f"{'Who' if kind == 'person' else 'What'} is {word} ? {kind} : {gloss}"


def thesaurus_entries(path: Path) -> Iterator[str]:
    """One line a word of a MyThes file: `tedious: boring, dull, slow; long-winded, wordy`."""
    word, meanings = "", list[str]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("("):
            if meanings:
                yield f"{word}: {'; '.join(meanings)}"
            word, meanings = line.partition("|")[0], []
            continue
        synonyms = [re.sub(r" \(.*\)$", "", part) for part in line.split("|")[1:]]
        meanings.append(", ".join(s for s in synonyms if s.lower() != word))
    if meanings:
        yield f"{word}: {'; '.join(meanings)}"


def paragraphs(text: str) -> Iterator[str]:
    """Prose paragraphs of a plain text: short lines, code, tables and markup are dropped."""
    for block in re.split(r"\n\s*\n", text):
        prose = re.sub(r"[`*{}]|:[a-z:]+:(?=`)", "", " ".join(block.split()))
        letters = sum(c.isalpha() or c == " " for c in prose)
        if (
            len(prose) >= 60
            and letters >= 0.85 * len(prose)
            and not block.lstrip().startswith("..")
        ):
            yield prose


def html_paragraphs(markup: str) -> Iterator[str]:
    """Text of the `<p>` elements of a page."""
    for body in re.findall(r"<p\b[^>]*>(.*?)</p>", markup, flags=re.DOTALL):
        text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", body)).replace("¶", "").split())
        if len(text) >= 60:
            yield text


def debian_documents(folder: Path) -> dict[str, Iterator[str]]:
    """Texts of Debian packages unpacked (`dpkg -x`) somewhere below `folder`, by output name."""
    nouns = sorted(folder.rglob("data.noun"))
    others = [p for name in ("verb", "adj", "adv") for p in sorted(folder.rglob(f"data.{name}"))]
    thesaurus = sorted(folder.rglob("th_en_US_v2.dat"))
    foldoc = sorted(folder.rglob("foldoc.dict.dz")) + sorted(folder.rglob("jargon.dict.dz"))
    pages = sorted(folder.rglob("python3.11/html/**/*.html"))
    fortunes = [p for p in sorted(folder.rglob("games/fortunes/*")) if not p.suffix]
    return {
        "wordnet": (line for p in nouns + others for line in wordnet_glosses(p)),
        "wordnet-questions": (line for p in nouns for line in wordnet_questions(p)),
        "thesaurus": (t for p in thesaurus for t in thesaurus_entries(p)),
        "computing-dictionaries": (t for p in foldoc for t in paragraphs(_read_gzip(p))),
        "python-documentation": (t for p in pages for t in html_paragraphs(_read(p))),
        "fortunes": (" ".join(t.split()) for p in fortunes for t in _read(p).split("\n%\n")),
    }


def novel_documents(path: Path) -> Iterator[str]:
    """Paragraphs joined to documents of about a page, so that prefixes have something to say."""
    document: list[str] = []
    with open_text(path) as lines:
        for line in lines:
            document.append(line.strip())
            if sum(map(len, document)) >= MAX_DOCUMENT_CHARACTERS // 2:
                yield " ".join(document)
                document = []
    yield " ".join(document)


def write_documents(
    path: Path, documents: Iterable[str], held_out: frozenset[str], validation: IO[str]
) -> int:
    """Write the documents, one a line, but those of `held_out`; one in 128 goes to `validation`.

    Returns:
        The number of characters written to `path`.
    """
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for document in documents:
            text = " ".join(document.split())[:MAX_DOCUMENT_CHARACTERS]
            if len(text) < MIN_DOCUMENT_CHARACTERS or match_key(text) in held_out:
                continue
            if any(unicodedata.category(c) == "Cc" for c in text):  # struck over, or drawn
                continue
            if hashlib.sha256(text.encode()).digest()[-1] < 2:
                validation.write(text + "\n")
            else:
                written += out.write(text + "\n")
    return written


def train_tokenizer(files: Sequence[Path], folder: Path, num_pieces: int) -> None:
    """Train a T5 tokenizer: pad 0, eos 1, unk 2, unigram pieces, 100 sentinels at the end."""
    import sentencepiece
    from transformers import T5Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(map(str, files)), model_prefix=str(model), vocab_size=num_pieces - 100,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=0.9998,
        input_sentence_size=400_000, shuffle_input_sentence=True, num_threads=1,
        minloglevel=1,
    )  # fmt: skip
    model.with_suffix(".vocab").unlink()
    T5Tokenizer.from_pretrained(folder, extra_ids=100).save_pretrained(folder)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _read_gzip(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")


def build_parser() -> argparse.ArgumentParser:
    """The command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m softprompt_dist.data.demo_corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder for the text files")
    parser.add_argument("--debian", type=Path, help="folder with unpacked Debian packages")
    parser.add_argument("--vader", type=Path, help="unpacked hutto_ICWSM_2014 folder")
    parser.add_argument("--novels", type=Path, help="ELTeC-eng, one paragraph a line")
    parser.add_argument("--questions", type=Path, help="TREC training questions, jsonl with `text`")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="jsonl files whose "
                        "texts must not be in the corpus")  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, help="train a tokenizer into this folder")
    parser.add_argument("--num-pieces", type=int, default=6144, help="sentinels included")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write every source that is given as one text file; then train the tokenizer on them."""
    arguments = build_parser().parse_args(argv)
    sources: dict[str, Iterator[str]] = {}
    if arguments.vader:
        sources |= {k: vader_snippets(arguments.vader / v) for k, v in VADER_FILES.items()}
    if arguments.questions:
        sources["questions"] = json_texts(arguments.questions)
    if arguments.debian:
        sources |= debian_documents(arguments.debian)
    if arguments.novels:
        sources["novels"] = novel_documents(arguments.novels)
    if not sources:
        raise DataError("No source is given. Give at least one, such as --novels FILE.")
    held_out = frozenset(match_key(t) for path in arguments.held_out for t in json_texts(path))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "validation.txt").open("w", encoding="utf-8") as validation:
        for name, documents in sources.items():
            path = arguments.out / f"{name}.txt"
            characters = write_documents(path, documents, held_out, validation)
            print(f"{name}: {characters:,} characters")
    if arguments.tokenizer:
        small = [n for n in sources if n == "questions" or n.startswith("vader-")]
        files = [arguments.out / f"{name}.txt" for name in [*sources, *small * 7]]
        train_tokenizer(files, arguments.tokenizer, arguments.num_pieces)


if __name__ == "__main__":
    main()
