"""Reading once what several prompts begin with: the questions on one page, say, read the page together.

The state after the common tokens is copied to each prompt's row. Then all rows read as many of their own tokens as the
shortest has; where a row has more, they are forced on it in the first steps of decoding. So it takes no padding inside
a text, which recurrent layers could not skip.

Shapes: B rows, G groups of rows with a common beginning, P tokens of the longest common beginning, R tokens that all
rows then read at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jrt.evaluate.decoding import GREEDY, Start
from jrt.evaluate.subjects import Subject
from jrt.modeling_jrt import CACHE

SHARE = 0.5  # of a prompt that it must have in common with the others of its group
SAVED = 0.25  # of a batch's tokens: a second call is not worth less
STEP = {
    "cuda": 2e12
}  # multiply-adds done in the time of one decoding step; on a GPU launches decide it, elsewhere it is cheap


class Group(NamedTuple):
    """Rows (their indices) that begin with the same `common` tokens, and go on with at least one of their own."""

    rows: list[int]
    common: int


def groups(rows: Sequence[Sequence[int]]) -> list[Group]:
    """All rows in groups with a long common beginning; a group may be a single row. Longest rows first."""
    found: list[Group] = []
    order = sorted(range(len(rows)), key=lambda index: rows[index])
    for before, index in zip([None, *order], order, strict=False):
        row = rows[index]
        if before is not None:
            group = found[-1]
            shortest = min(len(row), *(len(rows[member]) for member in group.rows))
            common = min(group.common, _common(rows[before], row), shortest - 1)
            longest = max(len(row), *(len(rows[member]) for member in group.rows))
            if common >= SHARE * longest:
                found[-1] = Group([*group.rows, index], common)
                continue
        found.append(Group([index], len(row) - 1))
    return sorted(found, key=lambda group: -max(len(rows[index]) for index in group.rows))


def groups_of_one(rows: Sequence[Sequence[int]]) -> list[Group]:
    """Each row by itself, longest first: for models that cannot read a common beginning once."""
    return [Group([index], len(rows[index]) - 1) for index in sorted(range(len(rows)), key=lambda i: -len(rows[i]))]


def outweighs(saved: int, steps: int, parameters: int, device: str) -> bool:
    """Whether reading `saved` tokens fewer takes more time than `steps` more decoding steps."""
    return saved * parameters > steps * STEP.get(device, 0)


def read(subject: Subject, rows: Sequence[Sequence[int]], ends: set[int]) -> Start | None:
    """Reads the common beginnings of `rows`.

    Args:
        ends: tokens at which `generate` ends a row, which therefore cannot be forced.

    Returns:
        None where that saves little, a prompt has one token, or the model's states cannot be copied from row to row.
    """
    if not subject.shares_beginnings:
        return None
    found = groups(rows)
    saved = sum(group.common * (len(group.rows) - 1) for group in found)
    if saved < SAVED * sum(map(len, rows)) or min(group.common for group in found) < 1:
        return None
    rest: list[list[int]] = [[]] * len(rows)
    owner = [0] * len(rows)
    for number, group in enumerate(found):
        for index in group.rows:
            rest[index], owner[index] = list(rows[index][group.common :]), number
    at_once = min(map(len, rest))
    forced = [tokens[at_once:] for tokens in rest]
    if not outweighs(saved, max(map(len, forced)), subject.parameters, subject.device.type):
        return None
    if any(token in ends for tokens in forced for token in tokens):
        return None
    ids, mask = left_padded(
        [rows[group.rows[0]][: group.common] for group in found], subject.pad_token_id, subject.device
    )  # (G, P)
    # One step of `generate`, not a forward call: it knows each model's positions under left padding.
    cache = subject.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=1,
        pad_token_id=subject.pad_token_id,
        return_dict_in_generate=True,
        **GREEDY,
    )[CACHE]
    row_of = torch.tensor(owner, device=subject.device)
    cache.batch_select_indices(row_of)
    first = torch.tensor([tokens[:at_once] for tokens in rest], device=subject.device)  # (B, R)
    return Start(
        torch.cat([ids[row_of], first], dim=1), torch.cat([mask[row_of], torch.ones_like(first)], dim=1), cache, forced
    )


def left_padded(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, (rows, tokens of the longest); mask is 1 on a row's own tokens."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
