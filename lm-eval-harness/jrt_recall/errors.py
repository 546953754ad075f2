"""How a wrong generation is wrong: no answer, repetition or something irrelevant (the kinds of the paper's Table 13).

The paper prints the shares but not its rule. This one is stated and simple, so compare its shares with each other
rather than with the printed ones: no letter or digit is no answer; a generation of which at most half of the word
pairs are distinct repeats itself; the rest is irrelevant.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

from .metric import contains

NO_ANSWER, REPETITION, IRRELEVANT = "no answer", "repetition", "irrelevant"
KINDS = (NO_ANSWER, REPETITION, IRRELEVANT)
_MIN_PAIRS = 4
_WORD = re.compile(r"\w+")


def error_kind(prediction: str, answers: str | Sequence[str]) -> str | None:
    """None for a right generation, else one of KINDS, so that shares of all items and the score sum to one."""
    if contains(prediction, answers):
        return None
    words = _WORD.findall(prediction.lower())
    if not words:
        return NO_ANSWER
    pairs = list(pairwise(words))
    if len(pairs) >= _MIN_PAIRS and len(set(pairs)) <= len(pairs) / 2:
        return REPETITION
    return IRRELEVANT
