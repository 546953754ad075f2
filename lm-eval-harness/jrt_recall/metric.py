"""`contains`, the published metric: the generation holds an answer, literally and in any letter case."""

import re
from collections.abc import Sequence


def contains(prediction: str, answers: str | Sequence[str]) -> bool:
    """True if `prediction` contains any of `answers` (one string stands for a list of one).

    Literal, case-insensitive (`re.IGNORECASE` on the escaped answer, as published: no Unicode case folding, no
    trimming). Raises ValueError for an empty list, which no prediction could ever satisfy."""
    labels = [answers] if isinstance(answers, str) else list(answers)
    if not labels:
        raise ValueError("contains needs at least one answer, got an empty list")
    return any(re.search(re.escape(label), prediction, re.IGNORECASE) for label in labels)
