"""How a wrong generation is wrong: no answer, repetition or something irrelevant (the kinds of the paper's Table 13).

The paper prints the shares but not its rule. This one is stated and simple, so compare its shares with each other
rather than with the printed ones: no letter or digit is no answer; a generation repeats itself where a phrase of up to
eight words follows itself (a single word twice), or a phrase of four words comes back anywhere; the rest is irrelevant.
"""

import re
from collections.abc import Sequence

from .metric import contains

NO_ANSWER, REPETITION, IRRELEVANT = "no answer", "repetition", "irrelevant"
KINDS = (NO_ANSWER, REPETITION, IRRELEVANT)
_LONGEST_PHRASE = 8
_COMES_BACK = 4
_WORD = re.compile(r"\w+")


def error_kind(prediction: str, answers: str | Sequence[str]) -> str | None:
    """None for a right generation, else one of KINDS, so that shares of all items and the score sum to one."""
    if contains(prediction, answers):
        return None
    words = _WORD.findall(prediction.lower())
    if not words:
        return NO_ANSWER
    return REPETITION if _repeats(words) else IRRELEVANT


def _repeats(words: list[str]) -> bool:
    phrases = [tuple(words[start : start + _COMES_BACK]) for start in range(len(words) - _COMES_BACK + 1)]
    if len(set(phrases)) < len(phrases):
        return True
    for size in range(1, _LONGEST_PHRASE + 1):
        times = 3 if size == 1 else 2
        for start in range(len(words) - size * times + 1):
            phrase = words[start : start + size]
            if words[start : start + size * times] == phrase * times:
                return True
    return False
