"""Answers of every kind, for the tests of metrics."""

import random

from softprompt_dist.metrics.answer import Answer
from softprompt_dist.metrics.registry import METRICS

LABELS = ("no", "yes", "maybe")
WORDS = ("a red barn", "the red barn", "barn", "red", "two barns", "")


def answers_for(metric, count, seed=0):
    """Random answers with every fact; some predictions are right, some wrong, some invalid."""
    generator = random.Random(seed)
    labels = labels_for(metric)
    made = []
    for index in range(count):
        facts = {
            "group": str(index // 3),
            "answers": generator.sample(WORDS, 2),
            "label": generator.randrange(2),
        }
        if metric in ("pearson_corrcoef", "spearman_corrcoef"):
            target = generator.uniform(0, 5)
            guess = target + generator.uniform(-2, 2)
            texts = (generator.choice([f"{guess:.1f}"] * 6 + ["five"]), f"{target:.1f}")
        elif labels:
            target = generator.choice(labels)
            texts = (generator.choice([target, target, *labels, "invalid"]), target)
        else:
            texts = (generator.choice(WORDS), generator.choice(WORDS))
        made.append(Answer(*texts, facts))
    return made


def labels_for(metric):
    kinds = {"unused": (), "two": LABELS[:2]}
    return kinds.get(METRICS[metric].labels, LABELS)
