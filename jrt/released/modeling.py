"""Models that compute as the release did. Each quirk can be switched on alone (docs/released.md explains them).

`JRTForCausalLM(config)` returns a `ReleasedForCausalLM` if the configuration has quirks. `jrt.configuration_jrt`
imports this module with the first configuration.

Shapes: B batch, T tokens of a call, H heads, d query/key size, D value size, F features.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jrt.cache import ModelState
from jrt.config import Config
from jrt.configuration_jrt import JRTConfig
from jrt.inputs import check_tensor
from jrt.mixers import Prefix, TokenBatch
from jrt.mixers.linear_attention import LinearAttention
from jrt.modeling_jrt import JRTForCausalLM
from jrt.ops import State, linear_attention, taylor_features
from jrt.released.quirks import Quirks
from jrt.short_prompts import PADDED_MIXERS, PaddedBatch, PaddedPrefixLinearAttention, Prompt

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class ReleasedBatch(PaddedBatch):
    """Tokens with the quirks by which they are computed. The mixers here compute any other batch without quirks."""

    quirks: Quirks


class ReleasedLinearAttention(LinearAttention):
    """Based's mixer with `double_add`, `decay_in_steps` and `half_states`."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.has_gain = config.decay_projection

    def forward(self, x: Tensor, batch: TokenBatch, state: State | None) -> tuple[Tensor, State]:
        if not isinstance(batch, ReleasedBatch):
            return super().forward(x, batch, state)
        q, k, v = self.project(x, batch)
        step = state if x.shape[1] == 1 else None  # the state before a one-token step; None in the parallel form
        if batch.quirks.double_add and step is not None:
            state = added_once_more(k, v, step)
        in_state = batch.log_decay if self.has_decay or batch.quirks.decay_in_steps else None
        in_output = in_state if self.has_decay or step is not None else None
        o, after = linear_attention(q, k, v, initial_state=state, mask=batch.mask, log_decay=in_output)
        if in_state is not in_output:  # a decay without a decay projection: the parallel form decays the state only
            _, after = linear_attention(q, k, v, initial_state=state, mask=batch.mask, log_decay=in_state)
        if self.has_decay or (batch.quirks.decay_in_steps and step is not None and self.has_gain):
            o = o * self.decay_proj(x)[..., None]
        return self.out_proj(o.flatten(2)), stored(after, x, batch.quirks)


class ReleasedPrefixLinearAttention(PaddedPrefixLinearAttention):
    """Prefix linear attention with `half_states` and `blank_padding`. Its parent class zeroes the keys of blank
    tokens."""

    def forward(self, x: Tensor, batch: TokenBatch, state: State | None) -> tuple[Tensor, State]:
        y, after = super().forward(x, batch, state)
        return y, stored(after, x, batch.quirks) if isinstance(batch, ReleasedBatch) else after


def added_once_more(k: Tensor, v: Tensor, state: State) -> State:
    """The state before a step, with the step's token already added to S but not to z: the step then adds it again.

    k: (B, 1, H, d), v: (B, 1, H, D), the token."""
    phi = taylor_features(k[:, 0].to(state.S.dtype))  # (B, H, F)
    return State(state.S + phi[..., None] * v[:, 0].to(state.S.dtype)[..., None, :], state.z)


def stored(state: State, x: Tensor, quirks: Quirks) -> State:
    """The state as it is kept for the next call. Under `half_states` it is rounded to the dtype of x if that has 16
    bits."""
    if not quirks.half_states or x.dtype not in HALF:
        return state
    return State(state.S.to(x.dtype).to(state.S.dtype), state.z.to(x.dtype).to(state.z.dtype))


class ReleasedForCausalLM(JRTForCausalLM):
    """A JRTForCausalLM with the quirks of its configuration.

    Under `blank_padding`, `forward` takes the masks that the release's code takes: (B, T) with 0 anywhere, where keys
    are zeroed; or (B, 1, T, T) additive, 0 where a key is visible.
    """

    computes_quirks: ClassVar[bool] = True
    mixers: ClassVar[Mapping[str, type[nn.Module]]] = ChainMap(
        {"L": ReleasedLinearAttention, "P": ReleasedPrefixLinearAttention}, PADDED_MIXERS
    )

    def __init__(self, config: JRTConfig) -> None:
        super().__init__(config)
        if self.quirks.padded_rows:
            self.token_rows = self.core.vocab_rows

    def generate(
        self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, *others: Any, **kwargs: Any
    ) -> Any:
        """As in JRTForCausalLM; under `ignore_batch_padding` the mask is ignored, and every column is read as a
        token."""
        mask = None if self.quirks.ignore_batch_padding else attention_mask
        return super().generate(inputs, mask, *others, **kwargs)

    def token_batch(self, prompt: Prompt, state: ModelState | None) -> ReleasedBatch:
        """As in JRTForCausalLM; the batch carries the quirks to the mixers."""
        if self.quirks.blank_padding and state is None:
            batch, blank = self._padding_read(prompt)
        else:
            mask = None if self.quirks.blank_padding else prompt.attention_mask
            batch = super().token_batch(dataclasses.replace(prompt, attention_mask=mask), state)
            blank = batch.blank if isinstance(batch, PaddedBatch) else None
        return ReleasedBatch(**vars(batch) | {"blank": blank}, quirks=self.quirks)

    def _padding_read(self, prompt: Prompt) -> tuple[TokenBatch, Tensor | None]:
        """For `blank_padding`: the batch in which padding is read as tokens, and (B, T) bool, True where keys are zero.

        The second is None if no key is zeroed."""
        ids, lengths = prompt.input_ids, prompt.prefix_length
        keep = released_mask(prompt.attention_mask, ids)
        self.check_lengths(prompt, keep)
        batch = self.model.token_batch(ids, None, None, None)
        if batch.prefix is None:
            return batch, None
        start = 0 if keep is None else keep.long().argmax(1, keepdim=True)  # (B, 1) first column that is no padding
        own = batch.positions - start
        if lengths is not None:
            columns = batch.prefix.length
            batch = dataclasses.replace(batch, prefix=Prefix(columns, None, own[:, :columns] < lengths[:, None]))
        if not self.core.encoder_mask:
            return batch, None
        if prompt.blank_length is not None:
            return batch, (own >= 0) & (own < prompt.blank_length[:, None])
        if keep is None or ids.shape[1] > self.core.enc_length:  # the release ignores a mask longer than the encoder
            return batch, None
        return batch, ~keep


def released_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """The mask that the release applies: (B, T) bool, False where keys are zeroed; None if it applies none.

    The release ignores a mask that is longer than the text, and every mask of a single token.
    """
    batch, length = input_ids.shape
    if attention_mask is None or length == 1:
        return None
    check_tensor("attention_mask", attention_mask, "a tensor (B, T) or (B, 1, T, T)")
    if attention_mask.ndim == 4:
        attention_mask = attention_mask[:, 0, -1] == 0
    if attention_mask.ndim == 2 and attention_mask.shape[1] > length:
        return None
    if attention_mask.shape not in ((batch, length), (1, length)):
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {shape}; expected (B, T) or (B, 1, T, T) with T = {length}")
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask.expand(batch, length)
