"""Chooses and repeats rows of the caches of transformers' models.

For each layer a cache holds keys and values (all, or those in a window), states of a recurrence or convolution, or
both.
"""

import inspect
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from jrt.recurrent_cache import CACHE


def cache_argument(model: PreTrainedModel) -> str:
    """The argument by which `forward` and `generate` of a model take a cache. Before transformers 5.24 Mamba had its
    own."""
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in names and CACHE not in names else CACHE


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Replaces the rows of a cache, in place and in all layers, by those with the given indices.

    rows: (K,) int64, in any order; an index may be repeated or left out. Raises ValueError if the object is no cache of
    transformers."""
    if not isinstance(cache, Cache):
        raise ValueError(
            f"the rows of a {type(cache).__name__} cannot be chosen: expected one of transformers' Cache classes"
        )
    # Recurrent layers do not implement `batch_select_indices`, and layers with attention and a recurrence apply it to
    # keys and values only. All implement `reorder_cache`, which accepts any choice of rows. A cache class that
    # overrides `batch_select_indices` keeps states outside its layers, so its own method is used.
    if type(cache).batch_select_indices is not Cache.batch_select_indices:
        cache.batch_select_indices(rows)
    else:
        cache.reorder_cache(cast(torch.LongTensor, rows))


def keeps_no_tokens(cache: Cache) -> bool:
    """Whether all layers are recurrent, so that the cache does not know how many tokens it has read.

    With such a cache, `generate` reads all ids that it gets, so they must be the unread tokens only. With any other
    cache, `generate` must get the rows from their start, and skips the tokens that the cache holds."""
    return len(cache.is_linear) > 0 and all(cache.is_linear)
