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


@dataclass(frozen=True)
class Documents:
    """The boundaries of the documents in packed rows."""

    lengths: list[int]  # tokens of each of the N documents, row by row

    def apart(self, packed: Tensor, fill: int) -> Tensor:
        """Turns packed rows (B, T) into rows (N, L) of one document each, filled up with `fill` on the left."""
        return pad_sequence(
            packed.flatten().split(self.lengths), batch_first=True, padding_value=fill, padding_side="left"
        )

    def mask(self, device: torch.device) -> Tensor:
        """The attention mask (N, L) of `apart`'s result: 0 where it filled up, else 1."""
        lengths = torch.tensor(self.lengths, device=device)
        return (torch.arange(max(self.lengths), device=device) >= max(self.lengths) - lengths[:, None]).long()

    def together(self, apart: Tensor, rows: int) -> Tensor:
        """Turns outputs (N, L, ...) of single documents into outputs (B, T, ...) of the packed rows; rows: B."""
        tokens = torch.cat([row[len(row) - length :] for row, length in zip(apart, self.lengths, strict=True)])
        return tokens.unflatten(0, (rows, -1))


def documents_of(
    input_ids: Tensor,
    mask: Tensor | None,
    past: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    seq_idx: Tensor | None,
) -> Documents | None:
    """The documents as described by any of DESCRIPTIONS; None if each row is one text.

    Args:
        input_ids: (B, T).
        mask: (B, T), 0 for padding, which rows with several documents must not have; None: no padding.
        past: (B,) number of tokens of each row in earlier calls; None: there were none.
        position_ids: (B, T), (1, T) or (T,): the index of each token in its document.
        cu_seq_lens_q, cu_seq_lens_k: (N + 1,): where documents begin in the rows laid end to end, and where the last
            ends.
        seq_idx: (B, T): the number of each token's document in its row.

    Raises:
        ValueError: a description that does not fit, or two that contradict each other.
    """
    rows, length = input_ids.shape
    starts = []
    for name, given in zip(DESCRIPTIONS, (position_ids, cu_seq_lens_q, cu_seq_lens_k, seq_idx), strict=True):
        if given is not None:
            check_tensor(name, given, "a tensor of integers")
            if given.dtype not in INTEGERS or given.numel() == 0 or given.ndim not in (1, 2):
                shape = tuple(given.shape)
                raise ValueError(
                    f"{name} is {given.dtype} of shape {shape}; expected integers, int64 or int32, of 1 or 2 dimensions"
                )
    if position_ids is not None:
        positions = position_ids.expand(rows, -1) if position_ids.ndim == 1 or len(position_ids) == 1 else position_ids
        if _count_own_tokens(_checked("position_ids", positions, input_ids), mask, past):
            starts.append(_first_column(input_ids))
        else:
            starts.append(_starts_of_positions(positions))
    if cu_seq_lens_q is not None:
        starts.append(_starts_of_ends("cu_seq_lens_q", cu_seq_lens_q, input_ids))
    if cu_seq_lens_k is not None and past is None:  # on top of a cache there are more keys than tokens of the call
        starts.append(_starts_of_ends("cu_seq_lens_k", cu_seq_lens_k, input_ids))
    if seq_idx is not None:
        number = _checked("seq_idx", seq_idx, input_ids)
        starts.append(torch.cat([_first_column(input_ids)[:, :1], number[:, 1:] != number[:, :-1]], dim=1))
    if any(not torch.equal(each, starts[0]) for each in starts[1:]):
        raise ValueError(f"{', '.join(DESCRIPTIONS)} put documents at different places: expected the same")
    if not starts or not bool(starts[0][:, 1:].any()):
        return None
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("attention_mask has padding beside rows of several documents: expected one or the other")
    begins = [*starts[0].flatten().nonzero().flatten().tolist(), rows * length]
    return Documents([end - begin for begin, end in itertools.pairwise(begins)])


def check_longest(
    longest: Mapping[str, object], documents: Documents | None, input_ids: Tensor, mask: Tensor | None
) -> None:
    """Raises ValueError if a maximum length (by name, None if not given) is less than the tokens of the longest text,
    because the rows were then meant to hold several documents.

    mask: (B, T), as in `forward`."""
    for name, given in longest.items():
        if given is None:
            continue
        own = input_ids.shape[1] if mask is None else int(mask.sum(1).max())
        tokens = own if documents is None else max(documents.lengths)
        number = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
        if not isinstance(number, int) or number < tokens:
            raise ValueError(
                f"{name} is {given}, and the longest text has {tokens} tokens: expected position_ids, cu_seq_lens_q or "
                "seq_idx beside it, which say where documents begin"
            )


def _first_column(input_ids: Tensor) -> Tensor:
    """(B, T) bool, True at the start of each row."""
    return (torch.arange(input_ids.shape[1], device=input_ids.device) == 0).expand(input_ids.shape)


def _count_own_tokens(positions: Tensor, mask: Tensor | None, past: Tensor | None) -> bool:
    """Whether `positions` (B, T) just number each row's own tokens from 0, so that each row is one text."""
    own = torch.ones_like(positions) if mask is None or past is not None else mask.long()  # steps have no padding
    expected = own.cumsum(1) - 1 + (0 if past is None else past[:, None])
    return torch.equal(positions * own, expected * own)


def _checked(name: str, given: Tensor, input_ids: Tensor) -> Tensor:
    if given.shape != input_ids.shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}; expected that of input_ids, {tuple(input_ids.shape)}")
    return given


def _starts_of_positions(positions: Tensor) -> Tensor:
    """(B, T) bool, True where a document begins."""
    begins = positions == 0
    follows = positions[:, 1:] == positions[:, :-1] + 1
    if not bool((begins[:, 1:] | follows).all()) or not bool(begins[:, 0].all()):
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
