"""Packed rows: rows that hold several documents one after the other, as data collators without padding make them.

No recurrent state, window or prefix may reach from one document into the next. So each document becomes a row of a
padded batch, and the outputs are put back into packed rows.

Shapes: B rows, T tokens of a row, N documents of all rows, L tokens of the longest document.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from jrt.inputs import INTEGERS, check_tensor

DESCRIPTIONS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""The arguments of `forward` that say where documents begin."""
LONGEST = ("max_length_q", "max_length_k")
"""The arguments of `forward` that say how many tokens the longest document has."""


@dataclass(frozen=True)
class Documents:
    """The boundaries of the documents in packed rows."""

    lengths: list[int]  # tokens of each of the N documents, row by row

    def apart(self, packed: Tensor, fill: int) -> Tensor:
        """Turns packed rows (B, T) into rows (N, L) of one document each, filled up with `fill` on the left."""
        return pad_sequence(
            packed.flatten().split(self.lengths), batch_first=True, padding_value=fill, padding_side="left"
        )

    def together(self, apart: Tensor, rows: int) -> Tensor:
        """Turns outputs (N, L, ...) of single documents into outputs (B, T, ...) of the packed rows; rows: B."""
        tokens = torch.cat([row[len(row) - length :] for row, length in zip(apart, self.lengths, strict=True)])
        return tokens.unflatten(0, (rows, -1))


def documents_of(
    input_ids: Tensor, mask: Tensor | None, past: Tensor | None, given: Mapping[str, object]
) -> Documents | None:
    """The documents as described by any of DESCRIPTIONS; None if each row is one text.

    Args:
        input_ids: (B, T).
        mask: (B, T), 0 for padding, which rows with several documents must not have; None: no padding.
        past: (B,) number of tokens of each row in earlier calls; None: there were none.
        given: values of DESCRIPTIONS and LONGEST, None for an argument that is not given. `position_ids`, (B, T),
            (1, T) or (T,), is the index of each token in its document, and `seq_idx`, of the same shape, the number of
            its document. `cu_seq_lens_*`, (N + 1,), say where documents begin in the rows laid end to end, and where
            the last ends.

    Raises:
        ValueError: a description that does not fit, or two that contradict each other; a maximum length below that of
            the longest text, because the rows were then meant to hold several documents.
    """
    described = {name: _integers(name, given[name]) for name in DESCRIPTIONS if given[name] is not None}
    if past is not None:
        described.pop("cu_seq_lens_k", None)  # on top of a cache there are more keys than tokens of the call
    starts = []  # of each description: (B, T) bool, True where a document begins
    for name, value in described.items():
        if name.startswith("cu_seq_lens"):
            starts.append(_starts_of_ends(name, value, input_ids))
        else:
            each = value.expand(len(input_ids), -1) if value.ndim == 1 or len(value) == 1 else value
            if each.shape != input_ids.shape:
                shape, expected = tuple(each.shape), tuple(input_ids.shape)
                raise ValueError(f"{name} has shape {shape}; expected that of input_ids, {expected}")
            if name == "seq_idx":
                starts.append(each.diff(dim=1, prepend=each[:, :1] - 1) != 0)
            else:
                starts.append(_starts_of_positions(each, mask, past))
    if any(not torch.equal(each, starts[0]) for each in starts[1:]):
        raise ValueError(f"{', '.join(DESCRIPTIONS)} put documents at different places: expected the same")
    documents = None
    if starts and bool(starts[0][:, 1:].any()):
        if mask is not None and not bool((mask == 1).all()):
            raise ValueError("attention_mask has padding beside rows of several documents: expected one or the other")
        begins = [*starts[0].flatten().nonzero().flatten().tolist(), input_ids.numel()]
        documents = Documents([end - begin for begin, end in itertools.pairwise(begins)])
    for name in LONGEST if past is None else ():
        if given[name] is not None:
            own = input_ids.shape[1] if mask is None else int(mask.sum(1).max())
            _check_longest(name, given[name], own if documents is None else max(documents.lengths))
    return documents


def _integers(name: str, given: object) -> Tensor:
    check_tensor(name, given, "a tensor of integers")
    assert isinstance(given, Tensor)
    if given.dtype not in INTEGERS or given.numel() == 0 or given.ndim not in (1, 2):
        shape = tuple(given.shape)
        raise ValueError(
            f"{name} is {given.dtype} of shape {shape}; expected integers, int64 or int32, of 1 or 2 dimensions"
        )
    return given


def _starts_of_positions(positions: Tensor, mask: Tensor | None, past: Tensor | None) -> Tensor:
    """Arguments as in `documents_of`, positions: (B, T)."""
    own = torch.ones_like(positions) if mask is None or past is not None else mask.long()  # steps have no padding
    expected = own.cumsum(1) - 1 + (0 if past is None else past[:, None])
    if torch.equal(positions * own, expected * own):  # they just number each row's own tokens: one text
        return (torch.arange(positions.shape[1], device=positions.device) == 0).expand(positions.shape)
    begins = positions == 0
    if not bool((begins | (positions.diff(dim=1, prepend=positions[:, :1]) == 1)).all()):
        raise ValueError(
            "position_ids: expected 0, 1, 2, ... from the start of each document; others are not supported"
        )
    return begins


def _starts_of_ends(name: str, given: Tensor, input_ids: Tensor) -> Tensor:
    ends = given.flatten().tolist()
    tokens = input_ids.numel()
    if ends[0] != 0 or ends[-1] != tokens or any(a >= b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{name} {ends}: expected to rise from 0 to {tokens}, the number of tokens")
    begins = torch.zeros(tokens, dtype=torch.bool, device=input_ids.device)
    begins[torch.tensor(ends[:-1], device=input_ids.device)] = True
    begins = begins.view_as(input_ids)
    if not bool(begins[:, 0].all()):
        raise ValueError(f"{name}: a document reaches over the end of a row; expected each row to begin with one")
    return begins


def _check_longest(name: str, given: object, tokens: int) -> None:
    """tokens: of the longest text."""
    number = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    if not isinstance(number, int) or number < tokens:
        raise ValueError(
            f"{name} is {given}, and the longest text has {tokens} tokens: expected position_ids, cu_seq_lens_q or "
            "seq_idx beside it, which say where documents begin"
        )
