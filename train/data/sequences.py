"""Training sequences of the mini models: windows of API pages, then questions that the windows answer.

    [name ?]            in some sequences, an announcement of what will be asked
    window ... window   the context: parts of one or more pages, shown once, twice or three times
    name(arguments)     facts of the windows in random order: the name is the question, the arguments are the answer

In 60% of the sequences some words are replaced by others, each always by the same one. Then names and arguments
are new to the model, and it can find the answer only in the context. A batch depends on (seed, step) alone: a resumed
run continues with the right batch, and all model families read the same tokens in the same order.

Shapes: R rows, T tokens of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from jrt.training.settings import check_kind, check_whole
from train.data.pages import Fact, Pages

Batch = dict[str, Tensor]


class Kind(IntEnum):
    """What a token is part of. The weight of its prediction in the loss depends on it."""

    PAD = 0
    TEXT = 1
    HEADING = 2
    AGAIN = 3  # text of a second or third reading
    QUESTION = 4
    ANSWER = 5


@dataclass(frozen=True)
class Recipe:
    """The shares of each kind of sequence, and the weights of the loss.

    Batches of every length have about equally many tokens, so that all steps take about equally long.
    """

    shapes: tuple[tuple[int, int, float], ...] = (  # T, rows, share of steps
        (768, 96, 0.3),
        (1536, 48, 0.35),
        (4608, 16, 0.35),
    )
    readings: tuple[float, ...] = (0.5, 0.43, 0.07)  # share of contexts shown once, twice, three times
    announced: float = 0.35
    asked_in_prefix: float = 0.6  # share of sequences whose prefix ends after a question, as a whole prompt does
    shortest_window: int = 64
    longest_window: int = 2200
    longest_answer: int = 48
    renamed_headings: float = 0.3  # share of sequences where words of headings, questions and answers are replaced
    renamed_text: float = 0.3  # share of sequences where words of the whole text are replaced, except common ones
    common_words: int = 250  # number of the commonest entries that stay
    weight_text: float = 0.2  # weights of the loss, by kind of token; an answer's tokens have weight 1
    weight_again: float = 0.2
    weight_question: float = 0.1

    def __post_init__(self) -> None:
        for shape in self.shapes:
            if not isinstance(shape, list | tuple) or len(shape) != 3:
                raise ValueError(f"recipe.shapes has {shape}: expected [length, rows, share of steps]")
            check_whole("length in recipe.shapes", shape[0], 1)
            check_whole("rows in recipe.shapes", shape[1], 1)
        for name in ("shortest_window", "longest_window", "longest_answer"):
            check_whole(f"recipe.{name}", getattr(self, name), 1)
        check_whole("recipe.common_words", self.common_words, 0)
        if self.longest_window < self.shortest_window:
            raise ValueError(
                f"recipe.longest_window is {self.longest_window}: expected at least the shortest, {self.shortest_window}"
            )
        _check_shares("recipe.shapes", [shape[2] for shape in self.shapes])
        _check_shares("recipe.readings", self.readings)
        if not math.isclose(sum(self.readings), 1, abs_tol=1e-8):
            raise ValueError(f"recipe.readings is {list(self.readings)}: expected shares whose sum is 1")
        for name in ("announced", "asked_in_prefix", "renamed_headings", "renamed_text"):
            check_kind(f"recipe.{name}", getattr(self, name), float)
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}: expected a share between 0 and 1")
        if self.renamed_headings + self.renamed_text > 1:
            raise ValueError("recipe.renamed_headings and recipe.renamed_text are more than all sequences together")
        for name in ("weight_text", "weight_again", "weight_question"):
            _check_shares(f"recipe.{name}", [getattr(self, name)], some=False)

    def shape(self, generator: np.random.Generator, step: int) -> tuple[int, int]:
        """Returns (T, rows) of a step. The first steps have every shape once, so that all are compiled early."""
        if step < len(self.shapes):
            return self.shapes[step][:2]
        shares = np.array([share for _, _, share in self.shapes])
        return self.shapes[generator.choice(len(self.shapes), p=shares / shares.sum())][:2]


def _check_shares(name: str, shares: Sequence[object], some: bool = True) -> None:
    """Raises ValueError if a share is no number of at least 0, or, if `some`, all are 0 or there are none."""
    for share in shares:
        check_kind(name, share, float)
    if any(share < 0 for share in shares) or (some and not sum(shares)):
        raise ValueError(f"{name} has {list(shares)}: expected shares of at least 0" + " and one above it" * some)


@dataclass
class Row:
    ids: np.ndarray  # (T + 1,) int64
    kinds: np.ndarray  # (T + 1,) Kind of each token
    answers: np.ndarray  # (T + 1,) 1, 2, ... for the tokens of each answer, 0 elsewhere
    prefix: int  # tokens that a prefix encoder reads


class Sequences:
    """Builds batches from a corpus.

    `jrt.training.objective` decides which tokens of a prefix are hidden and which labels count there."""

    def __init__(self, pages: Pages, recipe: Recipe, seed: int) -> None:
        self.pages, self.recipe, self.seed = pages, recipe, seed
        counts = np.bincount(pages.tokens[:4_000_000], minlength=len(pages.alphabet.is_closing))
        self.common = np.zeros(len(counts), bool)
        self.common[np.argsort(-counts, kind="stable")[: recipe.common_words]] = True

    def shape(self, step: int) -> tuple[int, int]:
        """(T, R) of training step `step`."""
        return self.recipe.shape(np.random.default_rng([self.seed, step]), step)

    def batch(self, step: int) -> Batch:
        """Returns the batch of training step `step`.

        It has ids (R, T + 1) int64, weights (R, T) fp32 of each token's next token, and prefix_length (R,) int64."""
        generator = np.random.default_rng([self.seed, step])
        length, count = self.recipe.shape(generator, step)
        ids, kinds, _, prefix = self._stacked([self.row(generator, length) for _ in range(count)])
        return _tensors(ids, self._kind_weights()[kinds[:, 1:]], prefix)

    def questions(self, step: int) -> Batch:
        """Returns a validation batch. It is like ``batch``, but no word is replaced and only answers have weight.

        In addition, ``answers`` (R, T) has 1, 2, ... at the tokens of a row's first, second, ... answer, and 0
        elsewhere. Answers inside the prefix are left out, because the prefix encoder has read them."""
        generator = np.random.default_rng([self.seed, 1 << 31, step])
        length, count = self.recipe.shapes[step % len(self.recipe.shapes)][:2]
        ids, kinds, answers, prefix = self._stacked([self.row(generator, length, renames=False) for _ in range(count)])
        answers = np.where(np.arange(length) < prefix[:, None] - 1, 0, answers[:, 1:])
        weights = ((kinds[:, 1:] == Kind.ANSWER) & (answers > 0)).astype(np.float32)
        return _tensors(ids, weights, prefix) | {"answers": torch.from_numpy(answers)}

    def row(self, generator: np.random.Generator, length: int, renames: bool = True) -> Row:
        """One sequence of `length` + 1 tokens, padded at its end."""
        recipe, room = self.recipe, length + 1
        readings = 1 + int(generator.choice(len(recipe.readings), p=recipe.readings))
        share = float(generator.choice([1.0, 1.0, 0.5, 0.25]))  # of the facts that will be asked
        windows = self._windows(generator, room, readings, share)
        context, kinds, facts = self._context(windows)
        order = generator.permutation(len(facts))
        asked = [facts[i] for i in order]  # as many as there is room for
        announced = asked[: int(generator.integers(1, 3))] if generator.random() < recipe.announced else []
        pieces: list[tuple[np.ndarray, int | np.ndarray]] = []
        for fact in announced:
            pieces += [(context[fact.start : fact.opening], Kind.HEADING), (self.pages.alphabet.asks, Kind.TEXT)]
        pieces.append((context, kinds))
        pieces += [(context, np.where(kinds == Kind.HEADING, Kind.HEADING, Kind.AGAIN))] * (readings - 1)
        prefix = sum(len(ids) for ids, _ in pieces)
        in_prefix = 0
        if asked and generator.random() < recipe.asked_in_prefix:
            in_prefix = int(generator.integers(1, len(asked) + 1)) if generator.random() < 0.3 else 1
        answer_of = [np.zeros(prefix, np.int64)]
        for number, fact in enumerate(asked, start=1):
            question, answer = context[fact.start : fact.opening + 1], context[fact.opening + 1 : fact.stop]
            pieces += [(question, Kind.QUESTION), (answer, Kind.ANSWER)]
            answer_of += [np.zeros(len(question), np.int64), np.full(len(answer), number)]
            if number == in_prefix:
                prefix = sum(map(len, answer_of)) - len(answer)
        ids = np.concatenate([ids for ids, _ in pieces]).astype(np.int64)
        kind = np.concatenate([np.broadcast_to(np.asarray(kind, np.int64), ids.shape) for ids, kind in pieces])
        if renames:
            ids = self._renamed(generator, ids, kind)
        row = Row(
            _fitted(ids, room, self.pages.alphabet.pad),
            _fitted(kind, room, Kind.PAD),
            _whole_answers(np.concatenate(answer_of), room),
            0,
        )
        row.prefix = min(prefix, length)
        return row

    def _windows(self, generator: np.random.Generator, room: int, readings: int, share: float) -> list[tuple[int, int]]:
        """Windows whose readings and questions fill the row: often one large, else several."""
        recipe, room = self.recipe, room - 12  # announcements
        largest = min(recipe.longest_window, room // readings - 16)
        if generator.random() < 0.6:
            size = int(largest * generator.uniform(0.6, 1.0))
        else:
            size = _log_uniform(generator, min(recipe.shortest_window, largest), largest)
        chosen: list[tuple[int, int]] = []
        for _ in range(64):
            first, last = max((self.pages.window(generator, size) for _ in range(3)), key=self._count)
            cost = self._cost(first, last, readings, share)
            while cost > room and not chosen and last - first > 1:
                last = first + max(1, int((last - first) * min(0.95, room / cost)))
                cost = self._cost(first, last, readings, share)
            if cost > room:
                size //= 2
            else:
                chosen.append((first, last))
                room -= cost
                size = _log_uniform(generator, recipe.shortest_window, max(recipe.shortest_window, room // readings))
            if room < recipe.shortest_window * readings or size < recipe.shortest_window // 2:
                break
        generator.shuffle(chosen)
        return chosen

    def _count(self, lines: tuple[int, int]) -> int:
        return int((self.pages.openings[slice(*lines)] > 0).sum())

    def _cost(self, first: int, last: int, readings: int, share: float) -> int:
        lines = slice(first, last)
        text = self.pages.stops[last - 1] - self.pages.starts[first]
        facts = (self.pages.stops[lines] - self.pages.starts[lines])[self.pages.openings[lines] > 0].sum()
        return int(readings * text + share * facts) + 24

    def _context(self, windows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, list[Fact]]:
        """Tokens and kinds of the joined windows, and the facts whose name is headed once in them."""
        texts, facts, offset = [], [], 0
        for first, last in windows:
            texts.append(self.pages.text(first, last))
            facts += [
                Fact(f.start + offset, f.opening + offset, f.stop + offset) for f in self.pages.facts(first, last)
            ]
            offset += len(texts[-1])
        context = np.concatenate(texts) if texts else np.zeros(0, np.uint16)
        kinds = np.full(len(context), Kind.TEXT, np.int64)
        headed: dict[bytes, int] = {}
        for fact in facts:
            kinds[fact.start : fact.stop] = Kind.HEADING
            name = context[fact.start : fact.opening].tobytes()
            headed[name] = headed.get(name, 0) + 1
        return context, kinds, [fact for fact in facts if self._is_askable(context, fact, headed)]

    def _is_askable(self, context: np.ndarray, fact: Fact, headed: dict[bytes, int]) -> bool:
        """Headed once, answered shortly, and not by the name itself."""
        name = context[fact.start : fact.opening].tobytes()
        answer = context[fact.opening + 1 : fact.stop]
        return headed[name] == 1 and len(answer) <= self.recipe.longest_answer and answer[:-2].tobytes() != name

    def _renamed(self, generator: np.random.Generator, ids: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        draw = generator.random()
        if draw > self.recipe.renamed_headings + self.recipe.renamed_text:
            return ids
        table = np.arange(len(self.common))
        share = generator.uniform(0.3, 1.0)
        headings_only = draw < self.recipe.renamed_headings
        for words in self.pages.alphabet.word_classes:
            free = words if headings_only else words[~self.common[words]]
            moved = free[generator.random(len(free)) < share]
            table[moved] = generator.permutation(moved)
        if headings_only:
            return np.where((kinds == Kind.TEXT) | (kinds == Kind.AGAIN), ids, table[ids])
        return table[ids]

    def _kind_weights(self) -> np.ndarray:
        weights = np.zeros(len(Kind), np.float32)
        weights[[Kind.TEXT, Kind.HEADING, Kind.AGAIN]] = (
            self.recipe.weight_text,
            self.recipe.weight_text,
            self.recipe.weight_again,
        )
        weights[[Kind.QUESTION, Kind.ANSWER]] = self.recipe.weight_question, 1.0
        return weights

    def _stacked(self, rows: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        ids, kinds, answers = (np.stack([getattr(row, name) for row in rows]) for name in ("ids", "kinds", "answers"))
        return ids, kinds, answers, np.array([row.prefix for row in rows])


def _log_uniform(generator: np.random.Generator, low: int, high: int) -> int:
    return int(np.exp(generator.uniform(np.log(max(low, 1)), np.log(max(high, low, 1)))))


def _whole_answers(numbers: np.ndarray, length: int) -> np.ndarray:
    """`_fitted` for the numbers of answers. An answer that the row's end cuts off counts as none: its beginning alone
    says nothing about the rest."""
    if len(numbers) > length and numbers[length]:
        numbers = np.where(numbers == numbers[length], 0, numbers)
    return _fitted(numbers, length, 0)


def _fitted(values: np.ndarray, length: int, filler: int) -> np.ndarray:
    if len(values) >= length:
        return values[:length]
    return np.concatenate([values, np.full(length - len(values), filler, values.dtype)])


def _tensors(ids: np.ndarray, weights: np.ndarray, prefix: np.ndarray) -> Batch:
    return {
        "ids": torch.from_numpy(np.ascontiguousarray(ids)),
        "weights": torch.from_numpy(weights.astype(np.float32)),
        "prefix_length": torch.from_numpy(prefix.astype(np.int64)),
    }
