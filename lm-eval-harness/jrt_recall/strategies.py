"""Reading strategies: how often, and in which order, a prompt shows its context and its question.

once            the published default prompt: context, question
question_first  the published "twice" prompt with the context once: question, context, question
twice           the published "twice" prompt: question, context, context, question
Nx              the "twice" form with the context N times (`3x`); `1x` is question_first, `2x` is twice
Nshot           N other documents with their answers in front of the `once` prompt (`2shot`); see `fewshot`
"""

import re
from dataclasses import dataclass

_COUNTED = re.compile(r"(\d+)(?:x|_?times)")
_SHOTS = re.compile(r"(\d+)_?shots?")
MAX_SHOTS = 16
MAX_READINGS = 64  # a typing error such as 1000x should fail, not fill the memory


@dataclass(frozen=True)
class Strategy:
    """A reading strategy: its canonical name, whether the question is announced first, how often the context is shown,
    and how many answered examples stand in front."""

    name: str
    announced: bool
    readings: int
    shots: int = 0


ONCE = Strategy("once", announced=False, readings=1)
QUESTION_FIRST = Strategy("question_first", announced=True, readings=1)
TWICE = Strategy("twice", announced=True, readings=2)


def times(n: int) -> Strategy:
    """The "twice" form with the context n times. Raises ValueError unless 1 <= n <= 64."""
    if not 1 <= n <= MAX_READINGS:
        raise ValueError(f"a context is read 1 to {MAX_READINGS} times, got {n}")
    if n <= 2:
        return (QUESTION_FIRST, TWICE)[n - 1]
    return Strategy(f"{n}x", announced=True, readings=n)


def few_shot(shots: int) -> Strategy:
    """`once` after that many answered examples. Raises ValueError unless 1 <= shots <= 16."""
    if not 1 <= shots <= MAX_SHOTS:
        raise ValueError(f"1 to {MAX_SHOTS} examples stand in front of a prompt, got {shots}")
    return Strategy(f"{shots}shot", announced=False, readings=1, shots=shots)


def strategy_named(name: "str | Strategy") -> Strategy:
    """The strategy of that name: once, twice, question_first (or question-first), Nx (or N-times), Nshot.

    Raises ValueError for any other name."""
    if isinstance(name, Strategy):
        return name
    plain = name.strip().lower().replace("-", "_").replace(" ", "_") if isinstance(name, str) else ""
    for strategy in (ONCE, QUESTION_FIRST, TWICE):
        if plain == strategy.name:
            return strategy
    if counted := _COUNTED.fullmatch(plain):
        return times(int(counted[1]))
    if shots := _SHOTS.fullmatch(plain):
        return few_shot(int(shots[1]))
    raise ValueError(
        f"unknown strategy {name!r}: choose once, twice, question_first, Nx with a number N such as 3x, or Nshot"
    )
