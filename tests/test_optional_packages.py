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
from jrt.ops import gated_convolution_linear, packages, selective_scan, silu_convolution, softmax_attention

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def same_every_time():
    """Fixed random numbers, and nothing known of installed packages."""
    torch.manual_seed(0)
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
    gradients = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values())
    return [*(y.detach() for y in outputs), *gradients]


def compare(package, plain, inputs, dtype):
    """Outputs and gradients of the package have at most twice PyTorch's error in the same dtype against fp64, plus the
    dtype's resolution, in case PyTorch happens to round well. A wrong layout is wrong by much more."""
    inputs = {name: x.to(dtype).double() for name, x in inputs.items()}
    weights = [torch.randn_like(y) for y in plain(**inputs)]
    truth = values_and_gradients(plain, inputs, torch.float64, weights)
    eager, found = (values_and_gradients(f, inputs, dtype, weights) for f in (plain, package))
    for value, same_dtype, exact in zip(found, eager, truth, strict=True):
        assert value.dtype == same_dtype.dtype and value.shape == exact.shape
        bound = 2 * (same_dtype.double() - exact).norm() + torch.finfo(value.dtype).eps * exact.norm()
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


# ---- mamba-ssm


@pytest.fixture
def mamba_ssm(monkeypatch):
    return stand_ins.Installed(monkeypatch, "mamba_ssm.ops.selective_scan_interface", stand_ins.selective_scan_fn)


def scan_inputs(steps, states=5):
    return {
        "u": drawn(2, steps, 6),
        "delta": drawn(2, steps, 6).abs(),
        "A": -drawn(6, states).abs(),
        "B": drawn(2, steps, states),
        "C": drawn(2, steps, states),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", ["y", "state", "both"])
@pytest.mark.parametrize("kind", ["bare", "skip", "model"])
@pytest.mark.parametrize("steps", [1, 40])
def test_scan(mamba_ssm, dtype, outputs, kind, steps):
    """Outputs, last states, and gradients through either and both."""
    inputs = scan_inputs(steps)
    if kind != "bare":
        inputs["D"] = drawn(6)
    if kind == "model":
        inputs |= {"delta": drawn(2, steps, 6), "delta_bias": drawn(6), "wide": drawn(2, steps, 12)}
    padding = torch.arange(steps)[None, :, None] < torch.tensor([0, steps // 2])[:, None, None]

    def scan(backend):
        def call(u, delta, A, B, C, D=None, delta_bias=None, wide=None):
            if delta_bias is not None:
                delta = delta.masked_fill(padding, -torch.inf)
            given = {"A": A, "D": D, "delta_bias": delta_bias}
            if u.dtype == torch.bfloat16:  # weights are in fp32, as in the model
                given = {name: x if x is None else x.float() for name, x in given.items()}
            gate = None if wide is None else wide[..., 6:]
            found = selective_scan(u, delta, B=B, C=C, **given, gate=gate, backend=backend)
            return found if outputs == "both" else found[:1] if outputs == "y" else found[1:]

        return call

    compare(scan("mamba-ssm"), scan("reference"), inputs, dtype)
    assert mamba_ssm.calls


def test_the_scan_is_taken_where_it_serves(mamba_ssm):
    x = {name: value.float() for name, value in scan_inputs(9).items()}
    y, state = selective_scan(**x)
    assert mamba_ssm.calls == 1 and state.dtype == torch.float32 and y.is_contiguous()
    selective_scan(**x, initial_state=state)
    selective_scan(**scan_inputs(9))
    selective_scan(**{name: value if name == "A" else value[:, :1] for name, value in x.items()})  # one token
    assert mamba_ssm.calls == 1


def test_a_mamba_model_reads_and_trains_with_the_package(mamba_ssm):
    """Padding, a cache to go on from, gradients of all weights; and autocast."""
    config = jrt.Config(pattern="MM", width=16, vocab_rows=64, state_dim=4)
    torch.manual_seed(0)
    model = jrt.JRTForCausalLM(jrt.JRTConfig(architecture=config.to_dict()))
    ids, mask = torch.randint(0, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0

    def trained(**options):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, **options):
            out = model(ids, attention_mask=mask, labels=ids, use_cache=True)
        out.loss.backward()
        step = model(ids[:, :1], past_key_values=out.past_key_values).logits
        return out.loss.detach(), step.detach(), [p.grad.clone() for p in model.parameters()]

    loss, step, gradients = trained(enabled=False)
    assert mamba_ssm.calls == 4  # two layers, forward and backward
    narrow = trained()[0]
    assert mamba_ssm.calls == 8
    packages._probe.cache_clear()
    del sys.modules["mamba_ssm"]
    for found, expected in zip(
        [loss, step, *gradients], [*(plain := trained(enabled=False))[:2], *plain[2]], strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(narrow, loss, rtol=0.02, atol=0)


def test_compiled_scans_are_whole_graphs_with_the_package(mamba_ssm):
    x = {name: value.float().requires_grad_() for name, value in scan_inputs(9).items()}

    def loss(x):
        y, state = selective_scan(**x)
        return y.square().sum() + state.sum()

    expected = torch.autograd.grad(loss(x), x.values())
    calls = mamba_ssm.calls
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x.values()), expected)
    assert calls == 2 and mamba_ssm.calls == 4


def test_the_scan_s_operator_obeys_pytorch(mamba_ssm):
    inputs = [x.float().requires_grad_() for x in scan_inputs(9).values()]
    bias, gate = torch.zeros(6, requires_grad=True), torch.ones(2, 9, 6, requires_grad=True)
    for others in ((None, None, None), (torch.ones(6, requires_grad=True), bias, gate)):
        torch.library.opcheck(torch.ops.jrt.selective_scan_mamba_ssm.default, (*inputs, *others))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"initial_state": torch.zeros(2, 6, 5)}, "initial_state is given"),
        ({"B": torch.zeros(2, 9, 5, dtype=torch.bfloat16)}, "expected one of float32, bfloat16 and float16 for all"),
        ({"A": torch.zeros(6, 5, dtype=torch.float64)}, "an input is fp64"),
        ({name: torch.zeros(*shape, 300) for name, shape in (("A", (6,)), ("B", (2, 9)), ("C", (2, 9)))}, "300 states"),
    ],
)
def test_scans_that_the_package_cannot_serve(mamba_ssm, changes, reason):
    given = {name: x.float() for name, x in scan_inputs(9).items()} | changes
    with pytest.raises(ValueError, match=f"'mamba-ssm' cannot serve this call: .*{reason}"):
        selective_scan(**given, backend="mamba-ssm")
    selective_scan(**given)
    assert not mamba_ssm.calls


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


def test_a_second_derivative_through_a_package_is_an_error(causal_conv1d, flash_attn, mamba_ssm):
    """Their autograd functions would leave out a part of it."""
    x = {name: value.float().requires_grad_() for name, value in scan_inputs(9).items()}
    u, weight = drawn(2, 9, 16).float().requires_grad_(), drawn(16, 3).float()
    q = drawn(1, 9, 2, 8).bfloat16().requires_grad_()
    calls = (
        (u, lambda: silu_convolution(u, weight, None)[0]),
        (q, lambda: softmax_attention(q, q, q, scale=1.0, window=2)),
        (x["u"], lambda: selective_scan(**x)[0]),
    )
    for leaf, call in calls:
        torch.autograd.grad(call().square().sum(), leaf)
        with pytest.raises(ValueError, match="second derivative is wanted"):
            (gradient,) = torch.autograd.grad(call().square().sum(), leaf, create_graph=True)
            torch.autograd.grad(gradient.sum(), leaf)
    assert causal_conv1d.calls == flash_attn.calls == 2


def test_doctor_checks_the_packages_that_are_installed(causal_conv1d, flash_attn, mamba_ssm):
    from jrt.doctor.backends import check_backends

    found = {(check.op, check.backend, check.dtype): check for check in check_backends()}
    for op in ("short convolution", "short convolution, from a state"):
        for dtype in ("float32", "bfloat16"):
            assert found[op, "causal-conv1d", dtype].holds, found[op, "causal-conv1d", dtype]
    for dtype in ("float32", "bfloat16"):
        assert "initial_state is given" in found["selective_scan", "mamba-ssm", dtype].reason
        assert found["selective_scan, from zero", "mamba-ssm", dtype].holds
    for op in ("softmax attention", "sliding window"):
        assert found[op, "flash-attn", "bfloat16"].holds, found[op, "flash-attn", "bfloat16"]
        assert "float32" in found[op, "flash-attn", "float32"].reason
