"""Causal softmax attention, full and with a sliding window, against the definition."""

import pytest
import torch

from jrt.ops import softmax_attention


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def definition(q, k, v, scale, window, valid):
    """Each query sees its own key, and the valid ones among the `window` before (None: all before)."""
    queries, keys = q.shape[1], k.shape[1]
    age = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)  # (T, K)
    shown = (age >= 0) & (age <= (keys if window is None else window))
    shown = (shown & valid[:, None]) | (age == 0)  # (B, T, K)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~shown[:, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 6), (9, 9), (70, 70), (70, 73), (70, 76)])
@pytest.mark.parametrize("window", [None, 6, 0])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_its_definition(queries, keys, window, padded):
    """Outputs and gradients, with keys of earlier calls and with padding."""
    if window is not None:
        keys = min(keys, queries + window)
    q, k, v = drawn(3, queries, 3, 8), drawn(3, keys, 3, 8), drawn(3, keys, 3, 8)
    padding = torch.tensor([0, min(2, keys - 1), keys]) if padded else torch.zeros(3)  # the last row is all padding
    valid = torch.arange(keys) >= padding[:, None]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    given = valid if padded or keys > queries > 1 else None
    found = softmax_attention(q, k, v, scale=0.3, window=window, valid=given)
    truth = definition(q, k, v, 0.3, window, valid)
    torch.testing.assert_close(found, truth)
    weights = torch.randn_like(truth)
    for value, expected in zip(
        torch.autograd.grad(found, leaves, weights), torch.autograd.grad(truth, leaves, weights), strict=True
    ):
        torch.testing.assert_close(value, expected)


def test_texts_of_another_length_are_compiled_without_a_graph_break():
    """The second length makes torch.compile take lengths for variables."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: softmax_attention(x, x, x, scale=0.3), backend="eager", fullgraph=True)
    for length in (7, 9, 1):
        x = drawn(2, length, 3, 8)
        torch.testing.assert_close(compiled(x), softmax_attention(x, x, x, scale=0.3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 5, 3, 8)}, r"expected q \(B, T, H, D\)"),
        ({"q": torch.zeros(2, 0, 3, 8)}, "expected at least one query"),
        ({name: torch.zeros(0, 6, 3, 8) for name in "qkv"}, "expected at least one query"),
        ({"k": [[0.0]]}, "k is a list; expected a tensor"),
        ({"valid": [[True]]}, "valid is a list; expected a tensor"),
        ({"q": torch.zeros(2, 7, 3, 8)}, "6 keys for 7 queries: expected 7 to 9"),
        ({"q": torch.zeros(2, 3, 3, 8)}, "6 keys for 3 queries: expected 3 to 5"),
        ({"q": torch.zeros(2, 3, 3, 8), "window": None}, "expected valid"),
        ({"window": -1}, "window is -1"),
        ({"window": 2.5}, "window is 2.5"),
        ({"valid": torch.ones(2, 6)}, "expected torch.bool"),
        ({"backend": "flash"}, "expected one of"),
        ({"backend": "flash-attn"}, "'flash-attn' cannot serve this call: tensors are on cpu"),
        ({"backend": "flex"}, "'flex' cannot serve this call: .* inside torch.compile"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    x = torch.zeros(2, 6, 3, 8)
    given = {"q": x, "k": x, "v": x, "window": 2} | changes
    with pytest.raises(ValueError, match=message):
        softmax_attention(**given, scale=1.0)
