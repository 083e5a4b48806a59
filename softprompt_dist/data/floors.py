"""Scores to beat: what can be had without a language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softprompt_dist.data.examples import Example
    from softprompt_dist.data.tasks import TaskData


def has_floors(labels: Sequence[str], metrics: Sequence[str]) -> bool:
    """Whether answers that nobody thought about can score.

    Besides labels: WSC asks for referents, and whoever always names the same one is right in all
    rows (some 63 %) that ask about a wrong one.
    """
    return bool(labels) or "wsc" in metrics


def majority_class(task: TaskData, split_examples: Sequence[Example]) -> list[str]:
    """The most frequent target of `task.train` for every example; ties go to the earlier label.

    Of free text, to the text that comes first in train.
    """
    counts = Counter(example.target_text for example in task.train)
    candidates = task.labels or tuple(counts)
    return [max(candidates, key=lambda label: counts[label])] * len(split_examples)


def naive_bayes(task: TaskData, split_examples: Sequence[Example]) -> list[str]:
    """Targets predicted by multinomial naive Bayes fitted on `task.train`.

    scikit-learn's defaults: CountVectorizer (lower case, words of two or more characters) and
    MultinomialNB (alpha 1). Falls back to the majority class where no training text has a word.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    vectorizer = CountVectorizer()
    texts = [example.input_text for example in task.train]
    if not any(map(vectorizer.build_analyzer(), texts)):
        return majority_class(task, split_examples)
    targets = [example.target_text for example in task.train]
    classifier = MultinomialNB().fit(vectorizer.fit_transform(texts), targets)
    if not split_examples:
        return []
    asked = vectorizer.transform([example.input_text for example in split_examples])
    return [str(target) for target in classifier.predict(asked)]
