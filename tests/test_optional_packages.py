"""Backends that call optional packages, with stand-ins in the packages' place (`stand_ins`).

Shapes: B batch, T tokens, E channels, K taps.
"""

import importlib.machinery
import sys
import types

import pytest
import stand_ins
import torch
from torch import nn

import jrt
from jrt.ops import gated_convolution_linear, packages, silu_convolution, softmax_attention

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def forget_what_is_installed():
    packages._probe.cache_clear()
    yield
    packages._probe.cache_clear()


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def values_and_gradients(function, inputs, dtype, weights):
    """Outputs and gradients in this dtype under the loss sum(weights * outputs)."""
    leaves = {name: x.to(dtype).detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = function(**leaves)
    torch.autograd.backward(outputs, [w.to(y.dtype) for y, w in zip(outputs, weights, strict=True)])
    return [*(y.detach() for y in outputs), *(x.grad for x in leaves.values())]


def compare(package, plain, inputs, dtype):
    """Outputs and gradients of the package are as near to fp64 as twice those of PyTorch in the same dtype."""
    inputs = {name: x.to(dtype).double() for name, x in inputs.items()}
    weights = [torch.randn_like(y) for y in plain(**inputs)]
    truth = values_and_gradients(plain, inputs, torch.float64, weights)
    eager, found = (values_and_gradients(f, inputs, dtype, weights) for f in (plain, package))
    for value, same_dtype, exact in zip(found, eager, truth, strict=True):
        assert value.dtype == same_dtype.dtype and value.shape == exact.shape
        bound = 2 * (same_dtype.double() - exact).norm() + 1e-6 * exact.norm()
        assert (value.double() - exact).norm() <= bound


# ---- causal-conv1d


@pytest.fixture
def causal_conv1d(monkeypatch):
    return stand_ins.Installed(monkeypatch, "causal_conv1d", stand_ins.causal_conv1d_fn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "state", "padding", "packed"])
@pytest.mark.parametrize(("steps", "taps", "offset"), [(1, 4, 0), (2, 4, 8), (17, 3, 4), (17, 2, 0)])
def test_convolution(causal_conv1d, dtype, kind, steps, taps, offset):
    """Outputs, states, gradients; inputs are slices of wider tensors, as in the models."""
    rows, cu_seqlens, mask = 2, None, None
    if kind == "packed":
        rows, cu_seqlens = 1, torch.tensor(sorted({0, steps // 3, steps // 3 + 1, steps}))
    if kind == "padding":
        mask = torch.arange(steps)[None] >= torch.tensor([[0], [steps // 2]])
    inputs = {"wide": drawn(rows, steps, 32), "weight": drawn(16, taps), "bias": drawn(16)}
    if kind == "state":
        inputs["state"] = drawn(rows, taps - 1, 16)

    def convolve(backend):
        def call(wide, weight, bias, state=None):
            u = wide[..., offset : offset + 16]
            return silu_convolution(u, weight, bias, state, mask, cu_seqlens=cu_seqlens, backend=backend)

        return call

    compare(convolve("causal-conv1d"), convolve("pytorch"), inputs, dtype)
    assert causal_conv1d.calls


@pytest.mark.parametrize("has_state", [False, True])
def test_gated_convolution(causal_conv1d, has_state):
    linear = nn.Linear(16, 5, dtype=torch.float64)
    inputs = {"x": drawn(2, 9, 32), "weight": drawn(16, 3)}
    if has_state:
        inputs["state"] = drawn(2, 2, 16)

    def convolve(backend):
        def call(x, weight, state=None):
            projection = linear.to(x.dtype)
            return gated_convolution_linear(x, weight, None, projection, state, backend=backend)

        return call

    compare(convolve("causal-conv1d"), convolve("pytorch"), inputs, torch.float32)


def test_weights_may_be_wider_than_the_inputs(causal_conv1d):
    """Under autocast the inputs are in half precision, the weights are not."""
    u, weight, bias = drawn(2, 9, 16).bfloat16(), drawn(16, 3).float(), drawn(16).bfloat16()
    y, state = silu_convolution(u, weight, bias, drawn(2, 2, 16).float())
    assert causal_conv1d.calls == 1 and y.dtype == state.dtype == torch.bfloat16


def test_the_convolution_is_taken_where_it_serves(causal_conv1d):
    u, weight = drawn(2, 9, 16).float(), drawn(16, 3).float()
    silu_convolution(u, weight, None)
    gated_convolution_linear(torch.cat([u, u], -1), weight, None, nn.Linear(16, 5))
    assert causal_conv1d.calls == 2
    silu_convolution(u.double(), weight, None)
    silu_convolution(u[..., :4], weight[:4], None)
    assert causal_conv1d.calls == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"u": torch.zeros(2, 9, 16, dtype=torch.float64)}, "u is torch.float64"),
        ({"weight": torch.zeros(16, 5)}, "5 taps: expected one of"),
        ({"u": torch.zeros(2, 9, 12), "weight": torch.zeros(12, 3)}, "12 channels: expected a multiple of 8"),
        (
            {"u": torch.zeros(1, 9, 16), "state": torch.zeros(2, 2, 16), "cu_seqlens": torch.tensor([0, 4, 9])},
            "not both",
        ),
    ],
)
def test_convolutions_that_the_package_cannot_serve(causal_conv1d, changes, reason):
    given = {"u": torch.zeros(2, 9, 16), "weight": torch.zeros(16, 3), "bias": None} | changes
    with pytest.raises(ValueError, match=f"'causal-conv1d' cannot serve this call: .*{reason}"):
        silu_convolution(**given, backend="causal-conv1d")
    silu_convolution(**given)
    assert not causal_conv1d.calls


def test_compiled_convolutions_are_whole_graphs_without_the_package(causal_conv1d):
    u, weight = drawn(2, 9, 16).float(), drawn(16, 3).float()
    expected = silu_convolution(u, weight, None, backend="pytorch")
    compiled = torch.compile(silu_convolution, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u, weight, None), expected)
    assert not causal_conv1d.calls


# ---- flash-attn


@pytest.fixture
def flash_attn(monkeypatch):
    return stand_ins.Installed(monkeypatch, "flash_attn", stand_ins.flash_attn_func)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 0, 1, 5, 40])
@pytest.mark.parametrize("steps", [1, 4, 23])
def test_attention(flash_attn, dtype, window, steps):
    inputs = {name: drawn(2, steps, 3, 8) for name in "qkv"}

    def attend(backend):
        return lambda q, k, v: (softmax_attention(q, k, v, scale=0.7, window=window, backend=backend),)

    compare(attend("flash-attn"), attend("sdpa"), inputs, dtype)
    assert flash_attn.calls


def test_windows_of_a_model_take_the_package(flash_attn):
    """Whole texts in half precision: in the first call. Decoding, padding and full attention go elsewhere."""
    config = jrt.Config(pattern="SAS", width=32, vocab_rows=64, heads=2, rotary_dim=16, window=3, mlp_width=48)
    torch.manual_seed(0)
    model = jrt.JRTForCausalLM(jrt.JRTConfig(architecture=config.to_dict())).bfloat16().eval()
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        found = model(ids)
        assert flash_attn.calls == 2
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        model(ids, attention_mask=mask)
        step = model(ids[:, :1], past_key_values=found.past_key_values).logits
        assert flash_attn.calls == 2
        expected = model(torch.cat([ids, ids[:, :1]], 1)).logits
    torch.testing.assert_close(step[:, 0], expected[:, -1], rtol=0.05, atol=0.05)


def test_the_backward_pass_is_ordered_where_that_is_asked_for(monkeypatch):
    asked = []

    def flash_attn_func(*args, deterministic, **kwargs):
        asked.append(deterministic)
        return stand_ins.flash_attn_func(*args, **kwargs)

    stand_ins.Installed(monkeypatch, "flash_attn", flash_attn_func)
    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    softmax_attention(q, q, q, scale=1.0, window=2)
    torch.use_deterministic_algorithms(True)
    try:
        softmax_attention(q, q, q, scale=1.0, window=2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("dtype", "size", "changes", "reason"),
    [
        (torch.float32, 8, {}, "q, k and v are torch.float32"),
        (torch.bfloat16, 264, {}, "head size 264: expected at most 256"),
        (torch.bfloat16, 8, {"valid": torch.ones(1, 4, dtype=torch.bool)}, "whole texts without padding"),
    ],
)
def test_attention_that_the_package_cannot_serve(flash_attn, dtype, size, changes, reason):
    q = torch.zeros(1, 4, 2, size, dtype=dtype)
    with pytest.raises(ValueError, match=f"'flash-attn' cannot serve this call: .*{reason}"):
        softmax_attention(q, q, q, scale=1.0, window=2, backend="flash-attn", **changes)
    softmax_attention(q, q, q, scale=1.0, window=2, **changes)
    assert not flash_attn.calls


def test_compiled_windows_are_whole_graphs_without_the_package(flash_attn):
    q, k, v = (drawn(1, 9, 2, 8).bfloat16() for _ in range(3))

    def attend(q, k, v):
        return softmax_attention(q, k, v, scale=0.5, window=2)

    found = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    assert not flash_attn.calls
    torch.testing.assert_close(found, attend(q, k, v), rtol=0.02, atol=0.02)


# ---- all packages


def test_gradients_that_differ_from_run_to_run_are_not_taken_where_they_are_forbidden(causal_conv1d):
    u, weight = torch.zeros(2, 9, 16), torch.zeros(16, 3, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="differ from run to run"):
            silu_convolution(u, weight, None, backend="causal-conv1d")
        with torch.no_grad():
            silu_convolution(u, weight, None, backend="causal-conv1d")
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_package_that_is_absent_broken_or_too_old_is_a_reason(monkeypatch, tmp_path):
    u, weight = torch.zeros(2, 9, 16), torch.zeros(16, 3)

    def reason():
        packages._probe.cache_clear()
        with pytest.raises(ValueError, match="cannot serve this call") as refusal:
            silu_convolution(u, weight, None, backend="causal-conv1d")
        silu_convolution(u, weight, None)
        return str(refusal.value)

    assert "tensors are on cpu; expected a CUDA device" in reason()
    monkeypatch.setattr(packages, "DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    assert "is not installed" in reason()
    monkeypatch.delitem(sys.modules, "causal_conv1d")
    (tmp_path / "causal_conv1d.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "cannot be imported (ImportError: undefined symbol: _ZN3c10): build it again" in reason()
    old = types.ModuleType("causal_conv1d")
    old.__spec__ = importlib.machinery.ModuleSpec("causal_conv1d", loader=None)
    monkeypatch.setitem(sys.modules, "causal_conv1d", old)
    assert "has no causal_conv1d.causal_conv1d_fn: install another version" in reason()


def test_forward_mode_derivatives_are_left_to_pytorch(causal_conv1d):
    u, weight = drawn(2, 9, 16).float(), drawn(16, 3).float()
    _, tangent = torch.func.jvp(lambda x: silu_convolution(x, weight, None)[0], (u,), (torch.ones_like(u),))
    assert tangent.abs().sum() > 0 and not causal_conv1d.calls


def test_doctor_checks_the_packages_that_are_installed(causal_conv1d, flash_attn):
    from jrt.doctor.backends import check_backends

    found = {(check.op, check.backend, check.dtype): check for check in check_backends()}
    for op in ("short convolution", "short convolution, from a state"):
        for dtype in ("float32", "bfloat16"):
            assert found[op, "causal-conv1d", dtype].holds, found[op, "causal-conv1d", dtype]
    for op in ("softmax attention", "sliding window"):
        assert found[op, "flash-attn", "bfloat16"].holds, found[op, "flash-attn", "bfloat16"]
        assert "float32" in found[op, "flash-attn", "float32"].reason
