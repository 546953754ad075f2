"""Error modes of wrong answers, as the paper's Table 13 counts them: no answer, repetition, irrelevant.

Together they are all wrong answers. The paper does not print its rule for repetition; this one is: a phrase of up to eight
words follows itself (a single word twice), or a phrase of four words comes back anywhere.
"""

from collections.abc import Sequence

MODES = ("no_answer", "repetition", "irrelevant")
_LONGEST_PHRASE = 8
_COMES_BACK = 4


def error_mode(row: dict) -> str | None:
    """The mode of one prediction; None for a right answer."""
    if row["score"]:
        return None
    if not row["prediction"].strip():
        return "no_answer"
    return "repetition" if repeats(row["prediction"]) else "irrelevant"


def share(rows: Sequence[dict], mode: str) -> float:
    """The share of all rows, right ones included, that are wrong in that mode."""
    if mode not in MODES:
        raise ValueError(f"unknown error mode {mode!r}: choose one of {', '.join(MODES)}")
    return sum(error_mode(row) == mode for row in rows) / len(rows)


def repeats(text: str) -> bool:
    """Whether a text repeats itself by the rule above."""
    words = text.lower().split()
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
