"""The cache class by which transformers' `generate` passes our models' states from call to call."""

from __future__ import annotations

import dataclasses

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from jrt.cache import ModelState

# The name of the cache in arguments and outputs; transformers 5.24 changed it. `forward` and `generate` here take both
# names.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"


class RecurrentCache(Cache):
    """transformers' cache interface around one `ModelState`."""

    is_compileable = False
    is_croppable = False

    def __init__(self, state: ModelState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # then `generate` passes only the tokens after the first `get_seq_length()`, as for attention

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.state is None else self.state.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no bound

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = None if self.state is None else self.state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = None if self.state is None else self.state.select(indices)

    def reset(self) -> None:
        self.state = None

    def crop(self, max_length: int) -> None:
        raise ValueError("a recurrent state cannot be cropped: it does not keep the tokens apart")


def state_of(cache: object) -> ModelState | None:
    """The state in a cache, None without a cache; raises ValueError for a cache of another class."""
    if cache is None:
        return None
    if not isinstance(cache, RecurrentCache):
        kind = type(cache).__name__
        raise ValueError(f"past_key_values is a {kind}; expected the RecurrentCache that an earlier call returned")
    return cache.state


def one_cache(past_key_values: RecurrentCache | None, cache: RecurrentCache | None) -> RecurrentCache | None:
    """The cache, given under either of its two names; raises ValueError if both are given."""
    if past_key_values is not None and cache is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one")
    return past_key_values if cache is None else cache
