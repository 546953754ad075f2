"""Rows of the caches that transformers' models decode with: choosing and repeating them.

A cache holds a layer's keys and values (all, or those in a window), or the states of its recurrence and convolution, or both.
"""

import inspect
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from jrt.modeling_jrt import CACHE


def cache_argument(model: PreTrainedModel) -> str:
    """The name by which `forward` and `generate` of a model take a cache: Mamba's had one of its own before 5.24."""
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in names and CACHE not in names else CACHE


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keeps these rows (any number, repeated or not, (K,) int64) of all layers, in that order; changes the cache in place.

    Raises ValueError for an object that is no cache of transformers'."""
    if not isinstance(cache, Cache):
        raise ValueError(
            f"the rows of a {type(cache).__name__} cannot be chosen: expected one of transformers' Cache classes"
        )
    # Layers with a recurrence have no `batch_select_indices` of their own, and those with attention beside it choose the
    # keys only. All have `reorder_cache`, which takes any choice of rows. A cache class that keeps states outside its
    # layers says itself how to choose.
    if type(cache).batch_select_indices is not Cache.batch_select_indices:
        cache.batch_select_indices(rows)
    else:
        cache.reorder_cache(cast(torch.LongTensor, rows))


def keeps_no_tokens(cache: Cache) -> bool:
    """Whether the cache does not know how many tokens it has read, because no layer keeps them.

    On top of such a cache, `generate` reads all it is given, so it must be given the unread tokens only; on top of any other,
    it is given rows from their start and reads what the cache has not."""
    return len(cache.is_linear) > 0 and all(cache.is_linear)
