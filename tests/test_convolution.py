"""The short convolution: packed sequences, states, and the choice of a backend.

The kernels are compared with fp64 in `test_gated`, those of optional packages in `test_optional_packages`.
"""

import itertools

import pytest
import torch
from torch import nn

from jrt.ops import gated_convolution_linear, short_convolution, silu_convolution

CHANNELS = 5
ENDS = [0, 4, 4, 5, 12, 14]  # the second sequence is empty, the third shorter than the filter


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def values_and_gradients(function, inputs, weights=None):
    """Outputs and gradients of `function(**inputs)` under a random loss; `weights` are those of an earlier call."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    outputs = function(**leaves)
    weights = [torch.randn_like(y) for y in outputs] if weights is None else weights
    torch.autograd.backward(outputs, weights)
    return [*outputs, *(x.grad for x in leaves.values())], weights


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("starts_from_states", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_packed_sequences_are_as_if_apart(taps, starts_from_states, gated):
    """Outputs, final states and all gradients."""
    sequences, ends = len(ENDS) - 1, torch.tensor(ENDS)
    inputs = {"u": drawn(1, ENDS[-1], 2 * CHANNELS if gated else CHANNELS), "weight": drawn(CHANNELS, taps)}
    inputs["bias"] = drawn(CHANNELS)
    if starts_from_states:
        inputs["state"] = drawn(sequences, taps - 1, CHANNELS)
    linear = nn.Linear(CHANNELS, 3, dtype=torch.float64)
    mask = (torch.arange(ENDS[-1]) != 7)[None]

    def convolve(u, weight, bias, state, mask, cu_seqlens=None):
        if gated:
            return gated_convolution_linear(u, weight, bias, linear, state, mask, cu_seqlens=cu_seqlens)
        return silu_convolution(u, weight, bias, state, mask, cu_seqlens=cu_seqlens)

    def packed(u, weight, bias, state=None):
        return convolve(u, weight, bias, state, mask, ends)

    def apart(u, weight, bias, state=None):
        ys, states = [], []
        for n, (start, end) in enumerate(itertools.pairwise(ENDS)):
            before = None if state is None else state[n : n + 1]
            y, after = convolve(u[:, start:end], weight, bias, before, mask[:, start:end])
            ys.append(y)
            states.append(after)
        return torch.cat(ys, 1), torch.cat(states)

    truth, weights = values_and_gradients(apart, inputs)
    found, _ = values_and_gradients(packed, inputs, weights)
    for value, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(value, expected)


def test_nothing_of_the_sequence_before_is_read():
    """Not even NaN, forward and backward."""
    u, weight = drawn(1, 9, CHANNELS), drawn(CHANNELS, 4)
    u[:, 3:5] = torch.nan
    ends = torch.tensor([0, 3, 5, 9])
    u.requires_grad_()
    y, state = silu_convolution(u, weight, None, cu_seqlens=ends)
    whole = torch.cat([y[:, :3], y[:, 5:]], 1)
    assert whole.isfinite().all() and state[[0, 2]].isfinite().all()
    (du,) = torch.autograd.grad(whole.sum(), u)
    assert du[:, :3].isfinite().all() and du[:, 5:].isfinite().all()


def test_packed_sequences_are_compiled_without_a_graph_break():
    inputs = {
        "u": drawn(1, ENDS[-1], CHANNELS),
        "weight": drawn(CHANNELS, 3),
        "state": drawn(len(ENDS) - 1, 2, CHANNELS),
    }

    def packed(u, weight, state):
        return silu_convolution(u, weight, None, state, cu_seqlens=torch.tensor(ENDS))

    truth, weights = values_and_gradients(packed, inputs)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for value, expected in zip(values_and_gradients(compiled, inputs, weights)[0], truth, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("starts_from_state", [False, True])
def test_the_state_holds_the_last_inputs(steps, starts_from_state):
    u, weight = drawn(2, steps, CHANNELS), drawn(CHANNELS, 4)
    state = drawn(2, 3, CHANNELS) if starts_from_state else None
    before = torch.zeros(2, 3, CHANNELS, dtype=torch.float64) if state is None else state
    _, after = silu_convolution(u, weight, None, state)
    assert torch.equal(after, torch.cat([before, u], 1)[:, -3:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 9])}, "u has B = 2 rows"),
        ({"state": torch.zeros(2, 3, CHANNELS)}, r"expected \(B, K - 1, E\) = \(2, 2, 5\)"),
        ({"weight": torch.zeros(4, 3)}, r"expected u \(B, T, E\) and weight \(E, K\)"),
        ({"bias": torch.zeros(4)}, r"expected \(E,\) = \(5,\)"),
        ({"mask": torch.ones(2, 9)}, "expected torch.bool"),
        ({"u": [[[0.0]]]}, "u is a list; expected a tensor"),
        ({"weight": torch.zeros(CHANNELS, 3).int()}, "weight is torch.int32; expected a floating-point dtype"),
        ({"state": torch.zeros(2, 2, CHANNELS, device="meta")}, "state is on meta; expected cpu, as u"),
        ({"mask": [[True]]}, "mask is a list; expected a tensor"),
        ({"backend": "conv1d"}, "expected one of"),
        ({"backend": "triton"}, "'triton' cannot serve this call: "),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    given = {"u": torch.zeros(2, 9, CHANNELS), "weight": torch.zeros(CHANNELS, 3), "bias": None} | changes
    with pytest.raises(ValueError, match=message):
        silu_convolution(**given)


@pytest.mark.parametrize("ends", [[0, 4, 8], [1, 9], [0, 6, 4, 9]])
def test_packing_that_does_not_fit_the_tokens_is_said(ends):
    with pytest.raises(ValueError, match="expected to rise from 0 to T = 9"):
        silu_convolution(drawn(1, 9, CHANNELS), drawn(CHANNELS, 3), None, cu_seqlens=torch.tensor(ends))


def test_states_of_another_number_of_sequences_are_refused():
    with pytest.raises(ValueError, match=r"= \(2, 2, 5\)"):
        silu_convolution(
            drawn(1, 9, CHANNELS), drawn(CHANNELS, 3), None, drawn(1, 2, CHANNELS), cu_seqlens=torch.tensor([0, 4, 9])
        )


def test_a_packed_convolution_without_activation():
    u, weight = drawn(1, 9, CHANNELS), drawn(CHANNELS, 3)
    y, _ = short_convolution(u, weight, None, None, torch.tensor([0, 4, 9]))
    parts = [short_convolution(part, weight, None, None)[0] for part in u.split([4, 5], 1)]
    torch.testing.assert_close(y, torch.cat(parts, 1))
