"""Tasks that T5 does not have; the text is in its manner, the label texts are ours."""

from __future__ import annotations

from collections.abc import Iterator

from softprompt_dist.data.catalogue.definition import Row
from softprompt_dist.data.catalogue.fields import KeyedText, Labels, text
from softprompt_dist.data.examples import Example

IMDB = Labels(("negative", "positive"))

TREC = KeyedText(
    (("question", "text"),),
    Labels(
        ("abbreviation", "entity", "description", "human", "location", "number"),
        {
            "ABBR": "abbreviation",
            "ENTY": "entity",
            "DESC": "description",
            "HUM": "human",
            "LOC": "location",
            "NUM": "number",
        },
        ("coarse_label", "coarse", "label"),
    ),
)
AG_NEWS = KeyedText(
    (("text",),),
    Labels(
        ("world", "sports", "business", "technology"),
        {
            "World": "world",
            "Sports": "sports",
            "Business": "business",
            "Sci/Tech": "technology",
        },
    ),
)


def imdb(row: Row, for_training: bool) -> Iterator[Example]:
    """The review alone, as in google-research/prompt-tuning's `recycling`.

    Raises:
        ValueError: a field is missing or of a wrong kind.
    """
    yield Example(text(row, "text"), IMDB.target(row))
