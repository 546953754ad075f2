"""The training objective of all models: predict the next token, and recover masked tokens of the prefix (paper,
equation 5).

It has three kinds:

    causal      the next token everywhere
    prefix-lm   the next token after the prefix
    jrt         the next token after the prefix, and masked tokens inside it

Shapes: B rows, T tokens of a row, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jrt.config import Config
from jrt.training.settings import check_fields, check_whole

IGNORED = -100
KINDS = ("causal", "prefix-lm", "jrt")


@dataclass(frozen=True)
class Targets:
    """The model's inputs, and the labels that it has to predict."""

    input_ids: Tensor  # (B, T), masked tokens replaced by the objective's mask token
    labels: Tensor  # (B, T) the token to predict at each place, IGNORED where there is none
    masked: Tensor  # (B, T) bool, True: the label is the masked token of this place; False: the next token
    prefix_length: Tensor | None  # (B,) for the model's encoder; None: the model has none
    weights: Tensor | None = None  # (B, T) fp32 weight of each next-token label; None: all weigh 1

    def totals(self) -> Tensor:
        """(2,) fp32: the summed weight of all next-token labels, and the number of masked labels."""
        counted = self.labels != IGNORED
        following = counted & ~self.masked
        weight = following.sum() if self.weights is None else (self.weights * following).sum()
        return torch.stack([weight.float(), (counted & self.masked).sum().float()])


@dataclass(frozen=True)
class Objective:
    """Makes targets from token ids.

    The loss is the mean over next-token labels plus `masked_weight` times the mean over masked labels. The paper
    divides that sum by 1 + `masked_weight`; its released code, and this one, do not.
    """

    kind: str  # one of KINDS
    mask_token: int  # id that replaces every masked token
    masked_weight: float = 0.25
    masked_share: float = 0.15  # of a prefix's tokens; 0 leaves the masked loss out (the paper's Table 11)
    masked_rows: float = 1.0  # share of rows with masked tokens
    predicts_first: bool = False  # whether the prefix's last place predicts the first token after the prefix
    ignored_token: int | None = None  # id that is masked but never a label; the release's code does this to id 0

    def __post_init__(self) -> None:
        check_fields(self, "objective")
        if self.kind not in KINDS:
            raise ValueError(f"objective {self.kind!r}: expected one of {', '.join(KINDS)}")
        for name in ("masked_share", "masked_rows"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a share between 0 and 1")
        if self.masked_weight < 0:
            raise ValueError(f"masked_weight is {self.masked_weight}: expected a number of at least 0")
        if self.mask_token < 0:
            raise ValueError(f"mask_token is {self.mask_token}: expected a token id")
        if self.ignored_token is not None and self.ignored_token < 0:
            raise ValueError(f"ignored_token is {self.ignored_token}: expected a token id, or null for none")

    def __call__(
        self,
        ids: Tensor,
        prefix_length: Tensor | None,
        generator: torch.Generator,
        *,
        weights: Tensor | None = None,
        first_row: int = 0,
        all_rows: int | None = None,
    ) -> Targets:
        """Chooses the tokens to mask at random, and makes the targets, on the device of `ids`.

        Args:
            ids: (B, T + 1) consecutive tokens.
            prefix_length: (B,) tokens that the encoder reads; None without a prefix.
            generator: on the device of `ids`.
            weights: (B, T) weight of the prediction of each following token; None: all weigh 1.
            first_row: rows of the same batch that stand before these, on other devices or in other passes.
            all_rows: rows of the whole batch. Draws are made for all of them, so that a batch hides the same tokens
                however it is split.
        """
        if self.kind != "jrt" or not self.masked_share or prefix_length is None:
            return self.targets(ids, prefix_length, None, weights)
        rows, length = ids.shape[0], ids.shape[1] - 1
        total = first_row + rows if all_rows is None else all_rows
        draw = torch.rand((total, length), generator=generator, device=ids.device)
        hidden = draw[first_row : first_row + rows] < self.masked_share
        if self.masked_rows < 1:
            own = torch.rand((total, 1), generator=generator, device=ids.device)
            hidden &= own[first_row : first_row + rows] < self.masked_rows
        return self.targets(ids, prefix_length, hidden, weights)

    def targets(
        self, ids: Tensor, prefix_length: Tensor | None, hidden: Tensor | None, weights: Tensor | None = None
    ) -> Targets:
        """As `__call__`, with given places to mask: hidden (B, T) bool; places outside of the prefix are ignored."""
        inputs, labels = ids[:, :-1], ids[:, 1:]  # (B, T)
        nothing = torch.zeros_like(inputs, dtype=torch.bool)
        if self.kind == "causal" or prefix_length is None:
            return Targets(inputs, labels, nothing, prefix_length, weights)
        columns = torch.arange(inputs.shape[1], device=ids.device)
        inside = columns < prefix_length[:, None] - int(self.predicts_first)  # (B, T)
        labels = labels.masked_fill(inside, IGNORED)
        if hidden is None:
            return Targets(inputs, labels, nothing, prefix_length, weights)
        hidden = hidden & inside
        counted = hidden if self.ignored_token is None else hidden & (inputs != self.ignored_token)
        labels = torch.where(counted, inputs, labels)
        return Targets(inputs.masked_fill(hidden, self.mask_token), labels, counted, prefix_length, weights)


def prefix_of(config: Config, kind: str, length: int, prefix_length: int | None = None) -> int:
    """Tokens of each training sequence that are its prefix: 0 for `causal`, else what the model's encoder reads.

    Args:
        config: the model; with P in its pattern, the prefix follows from it.
        kind: one of KINDS.
        length: tokens of a training sequence.
        prefix_length: the prefix of patterns without P, which have no encoder; with P, a prefix shorter than
            enc_length.

    Raises:
        ValueError: model, objective and lengths contradict each other.
    """
    check_objective(config, kind)
    if prefix_length is not None:
        check_whole("prefix_length", prefix_length, 0)
    encodes = config.has("P")
    if kind == "causal":
        if prefix_length:
            raise ValueError(f"prefix_length is {prefix_length}: the objective 'causal' has no prefix")
        return 0
    if encodes and prefix_length == 0:
        raise ValueError(
            f"prefix_length is 0, but pattern {config.pattern!r} has a prefix encoder: leave it out, or give at least 1"
        )
    prefix = prefix_length or (config.enc_length if encodes else 0)
    if prefix < 1:
        raise ValueError(
            f"the objective {kind!r} needs a prefix, and pattern {config.pattern!r} has no encoder that says how long: "
            "give prefix_length"
        )
    if encodes and prefix > config.enc_length:
        raise ValueError(f"prefix_length is {prefix}, but the model's encoder reads at most {config.enc_length} tokens")
    if prefix >= length:
        raise ValueError(
            f"sequences have {length} tokens and the prefix takes {prefix}: nothing is left to predict; "
            "use longer sequences or a shorter encoder (enc_length)"
        )
    return prefix


def check_objective(config: Config, kind: str) -> None:
    """Raises ValueError for an unknown kind, and for one that counts tokens that the model's encoder has read."""
    if kind not in KINDS:
        raise ValueError(f"objective {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "causal" and config.has("P"):
        raise ValueError(
            f"pattern {config.pattern!r} has a prefix encoder, which the objective 'causal' leaves without a prefix: "
            "use 'jrt' or 'prefix-lm'"
        )


def mean_loss(logits: Tensor, labels: Tensor, items: int | Tensor | None = None) -> Tensor:
    """Mean cross-entropy over all labels that are not IGNORED, fp32 scalar; 0 if there are none.

    Args:
        logits: (..., V).
        labels: (...) ids, IGNORED where there is no label.
        items: the divisor of the sum; None: the number of labels.
    """
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    counted = (labels != IGNORED).sum() if items is None else torch.as_tensor(items, device=total.device)
    return total / counted.clamp(min=1)


def greedy_answers(likeliest: Tensor, targets: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Counts answers that greedy decoding would give: (correct, total), int64 scalars.

    Greedy decoding gives an answer exactly if each of its tokens is the most likely one after the prompt and the
    answer's tokens before it. So one pass over prompt and answer is enough, and no decoding is needed.

    Args:
        likeliest: (B, T) argmax of the logits at each place.
        targets: (B, T) the token that follows each place.
        answers: (B, T) 1, 2, ... for the tokens of each row's answers, 0 elsewhere.
    """
    rows = torch.arange(len(answers), device=answers.device)[:, None]
    most = answers.max() + 1
    number = torch.where(answers > 0, answers + most * rows, 0)  # (B, T) one number for each answer of the batch
    asked = number.unique()
    wrong = number[(likeliest != targets) & (answers > 0)].unique()
    total = (asked > 0).sum()
    return total - len(wrong), total
