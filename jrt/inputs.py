"""Checks of the arguments of `JRTForCausalLM`. Each function raises ValueError with what was expected.

Some checks read values back from the GPU, which makes the host wait. They are made in the first call on a text, not in
steps of decoding.

Shapes: B batch, T tokens of a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.training.objective import IGNORED

# Arguments that `forward` may ignore: they state what holds for these models anyway, or `generate` passes them on
# unused.
HARMLESS = ("is_causal", "tokenizer", "assistant_tokenizer")
INTEGERS = (torch.int64, torch.int32)  # of ids, lengths and labels


def check_tensor(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected {expected}")


def check_ids(input_ids: Tensor | None, rows: int, is_step: bool) -> Tensor:
    """Returns input_ids if it is (B, T) with ids below `rows`. In steps on a GPU the range is not checked: it would
    wait."""
    check_tensor("input_ids", input_ids, "a tensor of integers of shape (B, T)")
    assert input_ids is not None
    if input_ids.ndim != 2 or input_ids.dtype not in INTEGERS:
        shape, dtype = tuple(input_ids.shape), input_ids.dtype
        raise ValueError(f"input_ids is {dtype} of shape {shape}; expected integers of shape (B, T), int64 or int32")
    if input_ids.numel() == 0:
        raise ValueError("input_ids is empty: expected at least one row and one token")
    if not (is_step and input_ids.is_cuda):
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= rows:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is outside the vocabulary; expected 0 to {rows - 1}")
    return input_ids


def check_going_on(
    input_ids: Tensor, seen: int, use_cache: bool | None, prefix_length: Tensor | None, short_prompt: str | None
) -> None:
    """Checks a call of `generate` with a cache that has read `seen` columns, the prefix among them. transformers would
    read some again."""
    if prefix_length is not None:
        raise ValueError(
            "past_key_values has read the text from its beginning, with its prefix: prefix_length would change nothing, "
            "leave it out"
        )
    if use_cache is False:
        raise ValueError(
            "use_cache=False, or short_prompt='iterate', reads the whole text at each step, so it cannot go on from "
            "past_key_values: leave one of them out"
        )
    if short_prompt not in (None, "none"):
        raise ValueError(
            f"short_prompt={short_prompt!r} fills a prompt up before it is read, and past_key_values has read its "
            "beginning: leave it out"
        )
    if input_ids.shape[1] <= seen:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} columns, and past_key_values has read {seen}: expected the whole "
            "text, with at least one new token after those"
        )


def check_lengths(
    name: str, lengths: Tensor | None, input_ids: Tensor, mask: Tensor | None, most: int | None = None
) -> None:
    """Checks lengths (B,): each counts own tokens of its row, so it is at most their number, and at most `most`.

    mask: (B, T), False for padding. None for an argument that is not given."""
    if lengths is None:
        return
    expected = f"a tensor of integers of shape (B,) = ({input_ids.shape[0]},)"
    check_tensor(name, lengths, expected)
    if lengths.shape != input_ids.shape[:1] or lengths.dtype not in INTEGERS:
        raise ValueError(f"{name} has shape {tuple(lengths.shape)} and dtype {lengths.dtype}; expected {expected}")
    own = input_ids.shape[1] if mask is None else mask.sum(1)
    if bool(((lengths < 0) | (lengths > own)).any()):
        raise ValueError(f"{name} counts each row's own tokens: expected between 0 and the row's length")
    if most is not None and bool((lengths > most).any()):
        raise ValueError(f"{name} is {int(lengths.max())}; expected at most {most}, the encoder's length (enc_length)")


def check_labels(labels: Tensor, expected: torch.Size, rows: int) -> None:
    """Checks labels: of the expected shape (B, T), each an id below `rows` or IGNORED."""
    check_tensor("labels", labels, "a tensor (B, T)")
    if labels.shape != expected:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected {tuple(expected)}")
    if labels.dtype not in INTEGERS:
        raise ValueError(f"labels are {labels.dtype}; expected int64 or int32")
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= rows))]
    if wrong.numel():
        raise ValueError(f"label {wrong[0].item()} is outside the vocabulary; expected 0 to {rows - 1}, or {IGNORED}")


def check_counts(items: object, kept: object, labels: Tensor | None) -> None:
    """Checks `num_items_in_batch` and `logits_to_keep`.

    items: number of labels of a whole batch. A tensor's value is not read: the host would wait for the GPU.
    kept: number of last tokens, or a tensor of their places; these are not consecutive, so they allow no labels."""
    if isinstance(items, Tensor):
        is_one = items.numel() == 1
    else:
        is_one = items is None or (isinstance(items, int | float) and not isinstance(items, bool) and items >= 0)
    if not is_one:
        raise ValueError(f"num_items_in_batch is {items!r}; expected one number of at least 0")
    if isinstance(kept, Tensor):
        if labels is not None:
            raise ValueError("labels need the logits of consecutive tokens: expected a number for logits_to_keep")
    elif isinstance(kept, bool) or not isinstance(kept, int) or kept < 0:
        raise ValueError(f"logits_to_keep is {kept!r}; expected a number of at least 0, or a tensor of places")


def check_sizes(**sizes: object) -> None:
    """Checks sizes of a vocabulary: each is a whole number above 0, or None."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"a vocabulary has at least one token: {name} is {size!r}, expected a number above 0")


def own_mask(attention_mask: Tensor | None, input_ids: Tensor, seen: int) -> Tensor | None:
    """The mask of this call's tokens, (B, T) bool, False for padding; None if there is no padding.

    attention_mask: (B, T), or (B, seen + T) with the `seen` columns of earlier calls; 0 or 1 each. Padding may stand on
    the left only, and only in the first call."""
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask, "a tensor (B, T)")
    batch, length = input_ids.shape
    total = length + seen
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] not in (length, total):
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {shape}; expected (B, T) = {(batch, length)} or {(batch, total)}")
    if seen and length == 1:
        return None  # a token that is generated is never padding
    given = attention_mask[:, -length:]
    if bool((given == 1).all()):
        return None
    if bool(((given != 0) & (given != 1)).any()):
        raise ValueError(
            "attention_mask: expected 1 for a token and 0 for padding; position_ids, cu_seq_lens_q or seq_idx say where "
            "documents of a row begin"
        )
    mask = given.bool()
    if seen:
        raise ValueError("padding after the first call: pad prompts on the left, before anything was read")
    if not bool(mask.any(1).all()):
        raise ValueError("a row of attention_mask is all padding: expected at least one token in each row")
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        raise ValueError(
            "attention_mask has padding to the right of tokens: expected left padding (padding_side='left')"
        )
    return mask


def check_unknown(given: dict[str, object]) -> None:
    """Checks keyword arguments that `forward` does not use: raises ValueError if one could be meant to change the
    result."""
    if given.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds is not supported: pass input_ids")
    if given.get("output_attentions"):
        raise ValueError("output_attentions is not supported: most layers here have no attention weights")
    if (causal := given.get("is_causal")) is not None and causal is not True:
        raise ValueError(
            f"is_causal={causal!r} is not supported: only a prefix is read without the causal mask (prefix_length)"
        )
    unknown = [
        name for name, value in given.items() if value is not None and value is not False and name not in HARMLESS
    ]
    if unknown:
        raise ValueError(f"forward knows no argument {', '.join(unknown)}: leave it out, it would change nothing here")
