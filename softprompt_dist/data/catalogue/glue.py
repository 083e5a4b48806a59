"""Tasks whose text is `key: text` of each field, sorted by key (T5's `glue`)."""

from __future__ import annotations

from softprompt_dist.data.catalogue.fields import KeyedText, Labels, truth

_ENTAILMENT = Labels(("entailment", "not_entailment"))
_PREMISE, _HYPOTHESIS = ("premise", "sentence1"), ("hypothesis", "sentence2")
_PAIR = (("sentence1",), ("sentence2",))
_PAIR_OR_PREMISE = (("sentence1", "premise"), ("sentence2", "hypothesis"))

BOOLQ = KeyedText((("passage",), ("question",)), truth("label", "answer"))
CB = KeyedText((("hypothesis",), ("premise",)), Labels(("entailment", "contradiction", "neutral")))
COPA = KeyedText(
    (("choice1",), ("choice2",), ("premise",), ("question",)), Labels(("choice1", "choice2"))
)
RTE = KeyedText((_HYPOTHESIS, _PREMISE), _ENTAILMENT)
WIC = KeyedText((("sentence1",), ("sentence2",), ("word",)), truth())

SST2 = KeyedText((("sentence", "text"),), Labels(("negative", "positive")))
COLA = KeyedText((("sentence",),), Labels(("unacceptable", "acceptable")))
MRPC = KeyedText(_PAIR, Labels(("not_equivalent", "equivalent")))
QQP = KeyedText(
    (("question1",), ("question2",)),
    Labels(("not_duplicate", "duplicate"), fields=("label", "is_duplicate")),
)
MNLI = KeyedText((_HYPOTHESIS, _PREMISE), Labels(("entailment", "neutral", "contradiction")))
QNLI = KeyedText((("question",), ("sentence",)), _ENTAILMENT)
GLUE_RTE = KeyedText(_PAIR_OR_PREMISE, _ENTAILMENT)
WNLI = KeyedText(_PAIR, Labels(("not_entailment", "entailment")))
