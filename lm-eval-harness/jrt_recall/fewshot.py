"""Which answered examples stand in front of a prompt (the paper's Table 14 sets two examples against reading twice).

Examples are other items of the same run, so they are cut by the same protocol. As in lm-eval a blank joins prompt and
answer and an empty line ends an example. The paper does not say how its own were cut: with long windows the protocol's
truncation reaches the first example, and results count the prompts it happened to.
"""

import random
from collections.abc import Sequence


def examples(contexts: Sequence[str], shots: int, seed: int = 0) -> list[list[int]]:
    """For each item the numbers of `shots` others whose context is not its own, drawn by (seed, item).

    Raises ValueError if there are too few others."""
    chosen = []
    for number, context in enumerate(contexts):
        order = random.Random(f"{seed}/{number}").sample(range(len(contexts)), len(contexts))
        others = [other for other in order if contexts[other] != context][:shots]
        if len(others) < shots:
            raise ValueError(f"{shots} examples need as many other documents; item {number} has {len(others)}")
        chosen.append(others)
    return chosen
