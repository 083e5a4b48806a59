"""What is done to a generated text before it is judged."""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIRST_SENTINEL = "<extra_id_0>"


def remove_first_sentinel(text: str, sentinel: str = _FIRST_SENTINEL) -> str:
    """Without one leading `sentinel`, and without white space before the rest.

    For backbones trained by span corruption only, which begin every answer with `<extra_id_0>`; the
    `remove_extra_id_0` of google-research/prompt-tuning.
    """
    return text.removeprefix(sentinel).lstrip()


def translate(text: str, meanings: Mapping[str, str]) -> str:
    """Each key of `meanings` in `text` replaced by its value, in one pass, longest keys first.

    So a prompt of one task is judged by another's labels: duplicate -> equivalent also turns
    not_duplicate into not_equivalent, as google-research/prompt-tuning's `qqp_to_mrpc` does.
    """
    if not meanings:
        return text
    keys = sorted(meanings, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, keys)), lambda found: meanings[found[0]], text)
