"""The trials of a probe: a row of random tokens is read in different ways, and each time its logits are compared with
those of the row read alone, without padding and without a cache.

Shapes: B rows, T tokens of a row, N new tokens, K positions compared, V vocabulary rows.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList
from transformers.utils import ModelOutput

from jrt.foreign.caches import cache_argument, keeps_no_tokens, select_rows
from jrt.foreign.greedy import ForcedTokens
from jrt.modeling_jrt import JRTForCausalLM
from jrt.probe.findings import Check
from jrt.recurrent_cache import CACHE
from jrt.system.breaks import BREAKS, one_line

LENGTH = 64
"""Tokens of the longest row."""
SHARE = 1e-4
"""The largest deviation in float32 that counts as rounding, as a share of the largest logit."""
SPREADS = 4.0
"""The same in half precision, as a multiple of the spread of one row's logits over batch sizes (`Trials._bound`)."""

TEXT = 24  # prompt tokens of the measured row; the longer row beside it has LENGTH
HALF = 16  # tokens of this prompt that are read in a first call, where a check makes two
STEPS = 4  # tokens that are decoded after the prompt
LONG = LENGTH - STEPS  # prompt tokens of the longer row: a cache that loses old tokens is found only by a long prompt
FEW = 3  # columns of padding of the padded row alone; beside the longer row it has many
BRIEF = 6  # prompt tokens of each row in the batch of ROWS rows
ROWS = 8  # rows of the batches that measure the effect of neighbours, and of rounding in half precision
MOVED = 64  # in the second half of these rows, one in so many embedding values is moved to a neighbouring number

STATES = (CACHE, "cache_params", "state")
"""The names under which `forward` of transformers' models returns and takes its state."""


class Compared(NamedTuple):
    """Logits that should be equal, both (K, V), at K consecutive positions from `start` on."""

    logits: Tensor
    truth: Tensor
    start: int


class Trials:
    """Runs the checks on one model. All of them use the same random rows."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        self.model, self.pad = model, pad_token_id
        row, self.longer, self.other = _random_rows(model, 3)  # (LENGTH,) each
        self.row = row[: TEXT + STEPS]
        self.cache = True
        self.state: dict[str, Any] = {}  # a copy of the state after the first HALF tokens
        self.rest: Tensor | None = None  # logits (K, V) of the tokens after them, read on top of the original state
        self.bound = SHARE

    def checks(self) -> Iterator[Check]:
        """All checks, in the order of CHECKS. Checks that mean nothing after an earlier failure are not tried."""
        try:
            self.truth = self.read(self.row[None])[0]  # (TEXT + STEPS, V)
            self.longer_truth = self.read(self.longer[None], prompt=LONG)[0]  # (LENGTH, V)
            self.bound = self._bound()
        except BREAKS as error:
            yield Check.failed("decode", SHARE, one_line(error))
            return
        decode = self._check("decode", self._decode)
        yield decode
        if not decode.holds:
            self.cache = False
            yield self._check("no cache", self._decode)
        yield self._check("padding alone", self._padding_alone)
        yield self._check("padding", self._padding)
        yield self._check("neighbours", self._neighbours)
        reason = ""
        if not self.cache:
            reason = "decoding with a cache is wrong"
        elif _reads_ahead(self.model):
            reason = "the model's encoder reads a prompt as a whole"
        for name, trial in (
            ("two calls", self._two_calls),
            ("state copy", self._state_copy),
            ("single tokens", self._single_tokens),
            ("shared state", self._shared_state),
        ):
            yield Check(name, None, self.bound, reason=reason) if reason else self._check(name, trial)

    # The trials.

    def _decode(self) -> list[Compared]:
        logits, _ = self._go_on(self.longer[None, :LONG], forced=[self.longer[LONG:]], new=STEPS)
        return [self._of_longer(logits[0])]

    def _padding_alone(self) -> list[Compared]:
        ids, mask = self._padded(self.row[:TEXT], TEXT + FEW)
        logits, _ = self._go_on(ids[1:], mask[1:], new=1)
        return [self._of_row(logits[0], TEXT)]

    def _padding(self) -> list[Compared]:
        ids, mask = self._padded(self.row[:TEXT], LONG)
        # Two tokens, because padding may do harm at one of the steps only.
        logits, _ = self._go_on(ids, mask, forced=[self.longer[LONG:], self.row[TEXT:]], new=2)
        return [self._of_row(logits[1], TEXT), self._of_longer(logits[0])]

    def _neighbours(self) -> list[Compared]:
        read = TEXT if _reads_ahead(self.model) else BRIEF  # the truth of a prefix encoder is that of its whole prompt
        others = torch.cat([self.longer, self.other]).unfold(0, read, read)[: ROWS - 1]  # (ROWS - 1, read) or fewer
        # The second token, because RWKV mixes the rows of a batch only where it reads one token a row.
        logits, _ = self._go_on(torch.cat([others, self.row[None, :read]]), new=2, read=read)
        return [self._of_row(logits[-1], read)]

    def _single_tokens(self) -> list[Compared]:
        logits, _ = self._go_on(self.row[None, :1], new=STEPS - 1, read=1)
        return [self._of_row(logits[0], 1)]

    def _two_calls(self) -> list[Compared]:
        output = self.model(input_ids=self.row[None, :HALF], use_cache=True)
        state = _state(output)
        self.state = copy.deepcopy(state)  # before the model moves it on
        self.rest = self._rest(state)
        return [self._of_row(output.logits[0], 1), self._of_row(self.rest, HALF + 1)]

    def _state_copy(self) -> list[Compared]:
        if self.rest is None:
            raise ValueError("there is no state that was gone on from")
        return [Compared(self._rest(self.state), self.rest, HALF)]

    def _shared_state(self) -> list[Compared]:
        ids, mask = self._padded(self.row[:HALF], LONG - (TEXT - HALF))
        _, cache = self._go_on(ids, mask, new=1, read=HALF)
        kept = torch.tensor([1, 0, 1], device=ids.device)
        select_rows(cache, kept)
        rest = torch.stack([self.other[HALF:TEXT], self.other[HALF:TEXT], self.row[HALF:TEXT]])
        if keeps_no_tokens(cache):
            ids, mask = rest, torch.ones_like(rest)
        else:
            ids = torch.cat([ids[kept], rest], dim=1)
            mask = torch.cat([mask[kept], torch.ones_like(rest)], dim=1)
        logits, _ = self._go_on(ids, mask, cache=cache, new=1)
        return [self._of_row(logits[2], TEXT)]

    # Helpers of the trials.

    def _padded(self, text: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (2, width): the longer row first, then `text` with padding on its left."""
        ids = torch.stack([self.longer[:width], torch.full_like(self.longer[:width], self.pad)])
        mask = torch.ones_like(ids)
        ids[1, width - len(text) :], mask[1, : width - len(text)] = text, 0
        return ids, mask

    def _of_row(self, logits: Tensor, read: int) -> Compared:
        """Pairs logits (K, V) that follow the first `read` tokens of the measured row with the true ones."""
        return Compared(logits, self.truth[read - 1 : read - 1 + len(logits)], read - 1)

    def _of_longer(self, logits: Tensor) -> Compared:
        """Pairs logits (K, V) that follow the first LONG tokens of the longer row with the true ones."""
        return Compared(logits, self.longer_truth[LONG - 1 : LONG - 1 + len(logits)], LONG - 1)

    def read(self, ids: Tensor, prompt: int = TEXT) -> Tensor:
        """Logits (B, T, V) of whole rows in one call without a cache, with which all others are compared.

        prompt: how many first tokens are the prompt, which a prefix encoder reads without a causal mask."""
        options = {}
        if _reads_ahead(self.model):
            options["prefix_length"] = torch.full((len(ids),), prompt, device=ids.device)
        return self.model(input_ids=ids, use_cache=False, **options).logits

    def _rest(self, state: dict[str, Any]) -> Tensor:
        """Logits (K, V) of the tokens after the first HALF, read on top of the state after those."""
        ids = self.row[None, HALF:]
        if "position_ids" in inspect.signature(self.model.forward).parameters:  # `generate` passes them too
            state = state | {"position_ids": torch.arange(HALF, len(self.row), device=ids.device)[None]}
        return self.model(input_ids=ids, use_cache=True, **state).logits[0]

    def _go_on(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        new: int = 1,
        read: int = TEXT,
        forced: list[Tensor] | None = None,
    ) -> tuple[Tensor, Cache]:
        """Reads ids (B, T) by `generate`, as an evaluation does, then feeds `new` tokens one by one.

        forced: these tokens, for each row; None: those of the measured row that come after its first `read`.
        Returns logits (B, new, V) and the cache."""
        options: dict[str, Any] = {} if cache is None else {cache_argument(self.model): cache}
        if _reads_ahead(self.model):
            options["short_prompt"] = "none"
        following = [self.row[read:]] * len(ids) if forced is None else forced
        output = self.model.generate(  # type: ignore[operator]  # all causal models have GenerationMixin
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            max_new_tokens=new,
            do_sample=False,
            use_cache=self.cache,
            pad_token_id=self.pad,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([ForcedTokens([row[:new].tolist() for row in following])]),
            **options,
        )
        return torch.stack(output.logits, dim=1), output.get(CACHE)

    def _check(self, name: str, trial: Callable[[], list[Compared]]) -> Check:
        try:
            compared = trial()
        except BREAKS as error:
            return Check.failed(name, self.bound, one_line(error))
        scale = largest_logit(self.truth)
        largest, where = -1.0, 0
        for logits, truth, start in compared:
            found = (_difference(logits, truth) / scale).amax(1)  # (K,)
            if not float(found.max()) <= largest:  # this form is also true for a NaN
                largest, where = float(found.max()), start + int(found.argmax())
        reason = "" if math.isfinite(largest) else "logits are not finite"
        return Check(name, largest if math.isfinite(largest) else math.inf, self.bound, f"token {where + 1}", reason)

    def _bound(self) -> float:
        """The largest deviation that counts as rounding, as a share of the largest logit.

        In half precision it is SPREADS times the row's own spread over batch sizes. Where a batch gives its rows bitwise
        the logits of the row alone, this spread is 0, and the one over roundings stands for it."""
        if self.model.dtype in (torch.float32, torch.float64):
            return SHARE
        over_batches, over_roundings = self.spreads()
        return SPREADS * (over_batches or over_roundings)

    def spreads(self) -> tuple[float, float]:
        """The row's spread over batch sizes, and its spread over roundings, as shares of the largest logit.

        The first is the largest difference between the logits of the row alone and those of its copies in a batch. The
        second is the same for copies whose embeddings differ by one rounding error here and there
        (`_rounded_otherwise`)."""
        with self.model.get_input_embeddings().register_forward_hook(_rounded_otherwise):
            many = self.read(self.row.expand(ROWS, -1))  # (ROWS, T, V)
        apart = _difference(many, self.truth).amax((1, 2)) / largest_logit(self.truth)  # (ROWS,)
        return float(apart[: ROWS // 2].max()), float(apart[ROWS // 2 :].max())


def _rounded_otherwise(_module: torch.nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
    """A hook of an embedding: about one in MOVED values of a batch's second half becomes the next number of its
    dtype."""
    moved = torch.randint(MOVED, output.shape, generator=torch.Generator().manual_seed(0)).to(output.device) == 0
    moved[: len(output) // 2] = False
    neighbour = output.float() * (1 + 0.75 * torch.finfo(output.dtype).eps)  # nearest to the next value away from 0
    return torch.where(moved, neighbour.to(output.dtype), output)


def _random_rows(model: PreTrainedModel, count: int) -> list[Tensor]:
    """`count` rows (LENGTH,) of random tokens, the same at each call; without special tokens of the configuration."""
    settings = (model.config, model.config.get_text_config(), model.generation_config)
    special = {token for one in settings for token in _special(one)}
    weight = cast(torch.nn.Embedding, model.get_input_embeddings()).weight
    head = model.get_output_embeddings()
    # CPM-Ant's embedding has more rows than its head: those of its trained prompts, which stand for no token.
    rows = range(len(weight) if head is None else min(len(weight), len(head.weight)))
    ordinary = torch.tensor([token for token in rows if token not in special] or list(rows))
    choice = torch.randint(len(ordinary), (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return list(ordinary[choice].to(weight.device))


def _special(config: object) -> Iterator[int]:
    """Token ids that a configuration names: begin, end, padding, images ..."""
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_ids", "token_index")):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (token for token in values if isinstance(token, int))


def _state(output: ModelOutput) -> dict[str, Any]:
    """The state that a call of `forward` returned, as a keyword argument for the next call."""
    for name in STATES:
        if output.get(name) is not None:
            return {name: output[name]}
    raise ValueError("the model returns no state to go on from")


def _reads_ahead(model: PreTrainedModel) -> bool:
    return isinstance(model, JRTForCausalLM) and model.core.has("P")


def _difference(first: Tensor, second: Tensor) -> Tensor:
    """|first - second| in float32. Two equal infinities differ by 0; a NaN differs from everything by infinity."""
    first, second = first.float(), second.float()
    return torch.where(first == second, 0.0, (first - second).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


def largest_logit(logits: Tensor) -> Tensor:
    """The largest |logit| in float32, the unit of deviations. At least the smallest positive number: a model whose head
    is still zero deviates by 0 from itself."""
    return logits.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def read_row(model: PreTrainedModel) -> Tensor:
    """Logits (T, V) in float32 of the row that the trials measure, read alone and without a cache."""
    trials = Trials(model, 0)
    return trials.read(trials.row[None])[0].float()
