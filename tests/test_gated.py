"""SwiGLU and the gated short convolution, each with the projection after it: kernels against fp64; when they run."""

import pytest
import torch
from interpreter import INTERPRETED, pass_in_the_interpreter
from torch import nn

from jrt.ops import gated_convolution_linear, gated_pytorch, silu_convolution, swiglu_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In the interpreter these run within `test_kernels_in_the_interpreter`.
kernels = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or the interpreter")
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


def drawn(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE) * scale


def gradients(function, inputs, dtype, weights):
    """Results and gradients under a fixed random loss."""
    leaves = {name: x.to(dtype).detach().requires_grad_() for name, x in inputs.items()}
    found = function(**leaves)
    torch.autograd.backward(found, [w.to(found.dtype) for w in weights])
    return {"y": found.detach()} | {name: x.grad for name, x in leaves.items()}


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def compare(kernel, plain, inputs, dtype):
    """The kernel's error against fp64 is at most twice that of plain PyTorch in the same dtype."""
    inputs = {name: x.to(dtype).double() for name, x in inputs.items()}
    weights = [torch.randn_like(plain(**inputs)).to(dtype)]
    truth = gradients(plain, inputs, torch.float64, weights)
    eager, found = (gradients(f, inputs, dtype, weights) for f in (plain, kernel))
    for name, value in truth.items():
        assert found[name].dtype == dtype and found[name].shape == value.shape
        assert error(found[name], value) <= 2 * error(eager[name], value) + 1e-6, name


def linear_of(weight, bias):
    """A plain nn.Linear whose weights carry gradients to `weight` and `bias`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        linear._parameters.pop(name)
        setattr(linear, name, value)
    return linear


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 24), (1, 5, 600)])
def test_swiglu(dtype, shape):
    inputs = {"x": drawn(*shape[:2], 2 * shape[2]), "w": drawn(8, shape[2], scale=0.1), "b": drawn(8)}

    def function(ops):
        return lambda x, w, b: ops(x, linear_of(w, b))

    compare(function(swiglu_linear), function(gated_pytorch.swiglu_linear), inputs, dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("steps", "channels", "taps"), [(1, 8, 3), (2, 130, 4), (17, 40, 3), (261, 8, 2)])
def test_gated_convolution(dtype, biased, steps, channels, taps):
    inputs = {"x": drawn(2, steps, 2 * channels), "taps": drawn(channels, taps), "w": drawn(6, channels, scale=0.2)}
    if biased:
        inputs |= {"tap_bias": drawn(channels), "b": drawn(6)}

    def function(ops):
        return lambda x, taps, w, tap_bias=None, b=None: ops(x, taps, tap_bias, linear_of(w, b), None, None)[0]

    compare(function(gated_convolution_linear), function(gated_pytorch.gated_convolution_linear), inputs, dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [2, 4])
def test_silu_convolution_of_a_slice(dtype, taps):
    inputs = {"x": drawn(2, 21, 48), "taps": drawn(24, taps), "tap_bias": drawn(24)}

    def function(ops):
        return lambda x, taps, tap_bias: ops(x[..., :24], taps, tap_bias, None, None)[0]

    compare(function(silu_convolution), function(gated_pytorch.silu_convolution), inputs, dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("has_state", "own"), [(False, None), (True, None), (True, 0.7), (True, 0.0)])
@pytest.mark.parametrize(
    ("rows", "steps", "ends", "channels", "taps"),
    [
        (2, 2, None, 8, 4),
        (1, 17, [0, 1, 1, 4, 17], 130, 4),
        (1, 132, [0, 125, 128, 129, 132], 8, 3),  # segments and tiles are cut
    ],
)
def test_states_padding_and_packed_sequences(dtype, gated, has_state, own, rows, steps, ends, channels, taps):
    """Outputs and all gradients, that of the state among them. own: share of tokens that are no padding; None: no mask."""
    cu_seqlens = None if ends is None else torch.tensor(ends, device=DEVICE)
    mask = None if own is None else torch.rand(rows, steps, device=DEVICE) < own
    inputs = {"x": drawn(rows, steps, 2 * channels if gated else channels), "taps": drawn(channels, taps)}
    inputs |= {"tap_bias": drawn(channels), "w": drawn(6, channels, scale=0.2)}
    if has_state:
        inputs["state"] = drawn(rows if ends is None else len(ends) - 1, taps - 1, channels)

    def function(gated_op, silu_op):
        def call(x, taps, tap_bias, w, state=None):
            if gated:
                return gated_op(x, taps, tap_bias, linear_of(w, None), state, mask, cu_seqlens=cu_seqlens)[0]
            return silu_op(x, taps, tap_bias, state, mask, cu_seqlens=cu_seqlens)[0] @ w.mT

        return call

    plain = function(gated_pytorch.gated_convolution_linear, gated_pytorch.silu_convolution)
    compare(function(gated_convolution_linear, silu_convolution), plain, inputs, dtype)


@kernels
def test_the_kernels_read_nothing_of_the_sequence_before():
    x, taps = drawn(1, 30, 16).float(), drawn(8, 3).float()
    x[:, 10:15] = torch.nan
    x.requires_grad_()
    ends = torch.tensor([0, 10, 15, 30], device=DEVICE)
    linear = linear_of(drawn(4, 8).float(), None)
    y, state = gated_convolution_linear(x, taps, None, linear, cu_seqlens=ends, backend="triton")
    expected = torch.stack([x[0, end - 2 : end, :8] for end in (10, 15, 30)])
    torch.testing.assert_close(state, expected, equal_nan=True, rtol=0, atol=0)
    others = torch.cat([y[:, :10], y[:, 15:]], 1)
    assert others.isfinite().all()
    (dx,) = torch.autograd.grad(others.sum(), x)
    assert dx[:, :10].isfinite().all() and dx[:, 15:].isfinite().all()


@kernels
@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_state_is_that_of_plain_pytorch(steps, has_state, padded):
    x, taps = drawn(2, steps, 16).float().requires_grad_(), drawn(16, 4).float()
    before = drawn(2, 3, 16).float() if has_state else None
    mask = torch.arange(steps, device=DEVICE).expand(2, -1) != steps - 1 if padded else None
    for u in (x, x.detach()):
        _, state = silu_convolution(u, taps, None, before, mask)
        _, expected = gated_pytorch.silu_convolution(u, taps, None, before, mask)
        assert torch.equal(state, expected)


@kernels
def test_operators_obey_pytorch():
    x, taps, bias = (t.float().requires_grad_() for t in (drawn(2, 5, 16), drawn(8, 3), drawn(8)))
    w, b = drawn(4, 8).float().requires_grad_(), drawn(4).float().requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.jrt.swiglu_linear.default, (x, w, b), test_utils=checks)
    torch.library.opcheck(torch.ops.jrt.gated_convolution_linear.default, (x, taps, bias, w, b), test_utils=checks)
    torch.library.opcheck(torch.ops.jrt.silu_convolution.default, (x, drawn(16, 3).float(), None), test_utils=checks)
    packed, cu_seqlens = x.detach()[:1].requires_grad_(), torch.tensor([0, 2, 5], device=DEVICE)
    mask = torch.tensor([[True, True, False, True, True]], device=DEVICE)
    states = drawn(2, 2, 16).float().requires_grad_()
    of_gated = (packed, taps, bias, w, b, states[..., :8], mask, cu_seqlens)
    torch.library.opcheck(torch.ops.jrt.gated_convolution_linear.default, of_gated, test_utils=checks)
    of_silu = (packed, drawn(16, 3).float(), None, states, mask, cu_seqlens)
    torch.library.opcheck(torch.ops.jrt.silu_convolution.default, of_silu, test_utils=checks)


@kernels
def test_compiled_training_takes_the_kernel_without_a_graph_break():
    x, linear = torch.randn(2, 5, 24, device=DEVICE, requires_grad=True), nn.Linear(12, 7, device=DEVICE)
    operators = []

    def counted(graph, inputs):
        operators.extend(node.target for node in graph.graph.nodes)
        return graph

    found = torch.compile(swiglu_linear, fullgraph=True, backend=counted)(x, linear)
    torch.testing.assert_close(found, gated_pytorch.swiglu_linear(x, linear))
    assert any("swiglu_linear" in str(operator) for operator in operators)


@kernels
@pytest.mark.parametrize("name", ["swiglu", "gated", "silu"])
def test_derivatives_that_the_kernels_lack_are_pytorch_s_or_an_error(name):
    taps, linear = drawn(8, 3).float(), nn.Linear(8, 4).to(DEVICE)
    functions = {
        "swiglu": lambda x: swiglu_linear(x, linear),
        "gated": lambda x: gated_convolution_linear(x, taps, None, linear)[0],
        "silu": lambda x: silu_convolution(x[..., :8], taps, None)[0],
    }
    x = drawn(2, 5, 16).float().requires_grad_()
    _, tangent = torch.func.jvp(functions[name], (x,), (torch.ones_like(x),))
    step = 1e-3
    expected = (functions[name](x + step) - functions[name](x - step)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=0.02, atol=0.02)
    (dx,) = torch.autograd.grad(functions[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="second derivative is wanted"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.gpu
def test_results_repeat_and_no_memory_is_read_before_it_is_written():
    x, taps, w = (t.bfloat16().requires_grad_() for t in (drawn(2, 300, 64), drawn(32, 3), drawn(16, 32)))

    def step():
        y, _ = gated_convolution_linear(x, taps, None, linear_of(w, None))
        return torch.autograd.grad(y.square().sum(), (x, taps, w))

    before = step()
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty now returns NaN
    try:
        poisoned = step()
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
    for old, new in zip(before, poisoned, strict=True):
        assert torch.equal(old, new)


@kernels
def test_a_projection_that_is_more_than_a_linear_is_called():
    """An adapter or a hook is not passed by."""
    x = drawn(2, 3, 16).float().requires_grad_()
    linear = nn.Linear(8, 4).to(DEVICE)
    seen = []
    linear.register_forward_hook(lambda *_: seen.append(True))

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    swiglu_linear(x, linear)
    assert seen
    doubled = Doubled(8, 4).to(DEVICE)
    doubled.load_state_dict(linear.state_dict())
    torch.testing.assert_close(swiglu_linear(x, doubled), 2 * swiglu_linear(x, linear))

    wrapped = nn.Linear(8, 4).to(DEVICE)  # as accelerate wraps a module whose weights are elsewhere
    wrapped.weight = nn.Parameter(torch.empty_like(wrapped.weight, device="meta"))
    wrapped.forward = linear.forward
    torch.testing.assert_close(swiglu_linear(x, wrapped), swiglu_linear(x, linear))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_kernels_in_the_interpreter():
    """Triton looks for its interpreter once: a process of its own."""
    pass_in_the_interpreter(__file__)


@pytest.mark.parametrize("channels", [1, 3])
def test_values_without_a_gate_of_their_own_are_refused(channels):
    """Two values and one gate would be multiplied by broadcasting."""
    x, linear = torch.zeros(2, 4, channels), torch.nn.Linear(2, 5)
    for call in (
        lambda: swiglu_linear(x, linear),
        lambda: gated_convolution_linear(x, torch.zeros(2, 3), None, linear),
    ):
        with pytest.raises(ValueError, match="expected an even last dimension"):
            call()
