"""The catalogue: every task by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import NamedTuple

from softprompt_dist.data.catalogue import coreference, glue, spans, superglue, topics
from softprompt_dist.data.catalogue.definition import CatalogueTask, HubSource, ToExamples
from softprompt_dist.data.catalogue.fields import KeyedText
from softprompt_dist.data.catalogue.similarity import SCORES, stsb
from softprompt_dist.errors import DataError

_BOTH = ("train", "validation", None)
_TRUTH = ("False", "True")


class _Entry(NamedTuple):
    """What the tasks of a suite do not share."""

    name: str
    title: str
    family: str
    to_examples: ToExamples
    metrics: tuple[str, ...] = ("accuracy",)
    fields: tuple[str, ...] = ()
    """Left out where the text is a KeyedText, which knows them."""
    labels: tuple[str, ...] = ()
    """As fields."""


_SUPERGLUE = {
    "BoolQ": _Entry("boolq", "is the answer to the question yes?", "yes_no", glue.BOOLQ),
    "CB": _Entry(
        "cb",
        "does the premise entail or contradict the hypothesis?",
        "entailment",
        glue.CB,
        ("mean_3class_f1", "accuracy"),
    ),
    "COPA": _Entry("copa", "which is the cause, or the effect?", "choice", glue.COPA),
    "MultiRC": _Entry(
        "multirc",
        "is this answer to the question right?",
        "yes_no",
        superglue.multirc,
        ("multirc",),
        ("question", "answer", "paragraph", "idx"),
        _TRUTH,
    ),
    "ReCoRD": _Entry(
        "record",
        "which entity of the passage does @placeholder stand for?",
        "span",
        superglue.record,
        ("record",),
        ("query", "entities", "passage", "idx"),
    ),
    "RTE": _Entry("rte", "does the premise entail the hypothesis?", "entailment", glue.RTE),
    "WiC": _Entry("wic", "has the word one sense in both sentences?", "word_sense", glue.WIC),
    "WSC": _Entry(
        "wsc",
        "what does the starred pronoun refer to?",
        "coreference",
        coreference.wsc,
        ("wsc",),
        ("text", "span1_text", "span1_index", "span2_text", "span2_index"),
    ),
}
"""By the folder in the official zips."""

_GLUE = (
    _Entry("sst2", "is the review positive?", "sentiment", glue.SST2),
    _Entry("mrpc", "do the sentences say the same?", "paraphrase", glue.MRPC, ("f1", "accuracy")),
    _Entry("qqp", "do the questions ask the same?", "paraphrase", glue.QQP, ("f1", "accuracy")),
    _Entry("mnli", "entailment, the sources of training", "entailment", glue.MNLI),
    _Entry("mnli_mismatched", "entailment, other sources", "entailment", glue.MNLI),
    _Entry("qnli", "does the sentence answer the question?", "entailment", glue.QNLI),
    _Entry("glue_rte", "does the first sentence entail the second?", "entailment", glue.GLUE_RTE),
    _Entry(
        "stsb",
        "how similar are the sentences, from 0 to 5?",
        "similarity",
        stsb,
        ("pearson_corrcoef", "spearman_corrcoef"),
        ("sentence1", "sentence2"),
        SCORES,
    ),
    _Entry(
        "cola", "is the sentence grammatical?", "acceptability", glue.COLA, ("matthews_corrcoef",)
    ),
    _Entry("wnli", "does the first sentence entail the second?", "entailment", glue.WNLI),
)

_QUESTION = ("question", "context")
_SQUAD = _Entry("squad", "which span answers it? (1.1)", "span", spans.squad, ("squad",), _QUESTION)
_MRQA = {
    "textbookqa": ("TextbookQA", "textbook_qa", "science of textbooks"),
    "bioasq": ("BioASQ", "bio_asq", "biomedical articles"),
    "race": ("RACE", "race", "school exams"),
    "relation_extraction": ("RelationExtraction", "relation_extraction", "relations"),
    "duorc": ("DuoRC.ParaphraseRC", "duo_rc", "films, in other words"),
    "drop": ("DROP", "drop", "questions that need arithmetic or order"),
    "newsqa": ("NewsQA", "news_qa", "news; in-domain: has a training split"),
}
"""Name -> its subset in MRQA, its name in T5's tasks, what it asks about."""

_DPR = _Entry(
    "dpr",
    "what does the starred pronoun refer to? (T5 trains WSC with it)",
    "coreference",
    coreference.dpr,
    fields=("sentence", "pronoun", "candidates"),
)
_TOPICS = {
    "CogComp/trec": _Entry("trec", "what is asked for?", "question_kind", topics.TREC),
    "stanfordnlp/imdb": _Entry(
        "imdb",
        "is the review positive?",
        "sentiment",
        topics.imdb,
        fields=("text",),
        labels=topics.IMDB.targets,
    ),
    "fancyzhx/ag_news": _Entry("ag_news", "what is the news about?", "topic", topics.AG_NEWS),
}
"""By hub name."""
_TOPIC_SOURCES = {
    "trec": "in T5's manner; label texts of ours",
    "imdb": "prompt-tuning's pr:imdb_v100_negative_positive_verbalizers",
    "ag_news": "in T5's manner; label texts of ours",
}


def _made(entry: _Entry, suite: str, prefix: str, hub: HubSource, source: str) -> CatalogueTask:
    text = entry.to_examples
    labels, fields = entry.labels, entry.fields
    if isinstance(text, KeyedText):
        labels, fields = text.labels.targets, tuple(names[0] for names in text.keys)
    return CatalogueTask(
        name=entry.name,
        title=entry.title,
        suite=suite,
        family=entry.family,
        prefix=prefix,
        to_examples=text,
        labels=labels,
        metrics=entry.metrics,
        hub=hub,
        fields=fields,
        folder=next((folder for folder, own in _SUPERGLUE.items() if own is entry), None),
        source=source,
    )


def _superglue_tasks() -> Iterator[CatalogueTask]:
    for entry in _SUPERGLUE.values():
        config, prefix, suffix = {"wsc": ("wsc.fixed", "wsc: ", "_simple")}.get(
            entry.name, (entry.name, f"{entry.name} ", "")
        )
        hub = HubSource("aps/super_glue", config, None, *_BOTH)
        source = f"T5's super_glue_{entry.name}_v102{suffix}"
        yield _made(entry, "superglue", prefix, hub, source)


def _glue_tasks() -> Iterator[CatalogueTask]:
    for entry in _GLUE:
        config = {"mnli_mismatched": "mnli"}.get(entry.name, entry.name.removeprefix("glue_"))
        validation = {"mnli": "validation_matched", "mnli_mismatched": "validation_mismatched"}.get(
            entry.name, "validation"
        )
        hub = HubSource("nyu-mll/glue", config, None, "train", validation, None)
        source = f"T5's glue_{entry.name.removeprefix('glue_')}_v002"
        yield _made(entry, "glue", f"{config} ", hub, source)


def _mrqa_tasks() -> Iterator[CatalogueTask]:
    for name, (subset, original, about) in _MRQA.items():
        in_domain = name == "newsqa"
        # As prompt-tuning reads it: the only split of an out-of-domain set is called test.
        splits = _BOTH if in_domain else (None, "test", None)
        title = f"which span answers it? ({about})"
        entry = _Entry(name, title, "span", spans.Mrqa(subset), ("squad",), _QUESTION)
        hub = HubSource("mrqa-workshop/mrqa", None, None, *splits)
        source = f"prompt-tuning's mrqa_{original}_v100_examples"
        yield _made(entry, "mrqa", f"{original} " if in_domain else "", hub, source)


def _other_tasks() -> Iterator[CatalogueTask]:
    hub = HubSource("rajpurkar/squad", None, None, *_BOTH)
    yield _made(_SQUAD, "squad", "", hub, "T5's squad_v010_allanswers")
    name = "community-datasets/definite_pronoun_resolution"
    hub = HubSource(name, None, None, "train", None, "test")
    yield _made(_DPR, "dpr", "wsc: ", hub, "T5's dpr_v001_simple")
    for name, entry in _TOPICS.items():
        # The main branch of trec is a script, which the hub's client no longer runs.
        revision = "refs/convert/parquet" if entry.name == "trec" else None
        hub = HubSource(name, None, revision, "train", None, "test")
        yield _made(entry, "classification", f"{entry.name} ", hub, _TOPIC_SOURCES[entry.name])


CATALOGUE: dict[str, CatalogueTask] = {
    task.name: task
    for tasks in (_superglue_tasks(), _glue_tasks(), _mrqa_tasks(), _other_tasks())
    for task in tasks
}
"""Name -> task, suite by suite."""


def find_task(name: str) -> CatalogueTask:
    """The task of this name.

    Raises:
        DataError: there is none; the nearest is named.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    close = difflib.get_close_matches(name.lower(), CATALOGUE, n=1)
    nearest = f" Did you mean {close[0]!r}?" if close else ""
    raise DataError(
        f"The catalogue has no task {name!r}.{nearest} `softprompt tasks list` shows all of them."
    )
