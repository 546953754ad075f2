"""The selective scan: values and gradients of all backends against fp64, and properties of a recurrence."""

import os
import subprocess
import sys

import pytest
import torch
from interpreter import INTERPRETED, pass_in_the_interpreter
from torch.nn import functional as F

import jrt
from jrt.ops import selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "initial_state")
BACKENDS = [
    pytest.param("chunked", "cpu", id="chunked"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]
ALL = [*BACKENDS, pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.hopper)]
STATES = {"cuda": 16}  # a backend that is built for one number


def make_inputs(batch=2, steps=100, channels=12, states=5, dtype=torch.float64, device="cpu", seed=0):
    """Values with fast and slow decays, as tensors of `dtype`; A, D and the state are fp32 or wider."""
    draw = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    values = {
        "u": normal(batch, steps, channels).to(dtype),
        "delta": F.softplus(normal(batch, steps, channels) - 1).to(dtype),
        "A": -torch.exp(2 * normal(channels, states)).to(wide),
        "B": normal(batch, steps, states).to(dtype),
        "C": normal(batch, steps, states).to(dtype),
        "D": normal(channels).to(wide),
        "initial_state": normal(batch, channels, states).to(wide),
    }
    return {name: x.to(device) for name, x in values.items()}


def call(inputs, backend, **changes):
    x = inputs | changes
    return selective_scan(
        x["u"], x["delta"], x["A"], x["B"], x["C"], x["D"], initial_state=x["initial_state"], gate=x.get("gate"),
        backend=backend,
    )  # fmt: skip


def values_and_gradients(inputs, backend, dtype=None):
    """y, state and the gradients of all inputs under a fixed random loss on both outputs."""
    leaves = {k: x.to(dtype or x.dtype, copy=True).detach().requires_grad_() for k, x in inputs.items()}
    y, state = call(leaves, backend)
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=draw).to(x.device, inputs["u"].dtype).to(x.dtype) for x in (y, state)]
    torch.autograd.backward([y, state], weights)
    return {"y": y, "state": state} | {f"d{k}": x.grad for k, x in leaves.items()}


def relative_error(x, truth):
    return ((x.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def test_reference_is_the_sum_over_all_earlier_inputs():
    x = make_inputs(steps=9)
    time = x["delta"].cumsum(1)  # (B, T, E)
    age = time[:, :, None] - time[:, None, :]  # (B, T, S, E): time that a write at s has decayed by t
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, :, :, None, None]
    decay = torch.where(causal, torch.exp(age[..., None] * x["A"]), 0)  # (B, T, S, E, N)
    y = torch.einsum("btn,btsen,bse,bsn->bte", x["C"], decay, x["delta"] * x["u"], x["B"]) + x["D"] * x["u"]
    y += torch.einsum("btn,bten,ben->bte", x["C"], torch.exp(time[..., None] * x["A"]), x["initial_state"])
    torch.testing.assert_close(call(x, "reference")[0], y)


@pytest.mark.parametrize("steps", [1, 31, 32, 100])
def test_chunked_gradients_equal_those_of_the_definition(steps):
    x = make_inputs(steps=steps)
    found, truth = values_and_gradients(x, "chunked"), values_and_gradients(x, "reference")
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 63, 64, 1000])
def test_error_is_at_most_twice_that_of_eager_in_the_same_dtype(backend, device, dtype, steps):
    x = make_inputs(steps=steps, channels=72, states=16, dtype=dtype, device=device)
    truth = values_and_gradients(x, "reference", torch.float64)
    eager = values_and_gradients(x, "reference")
    found = values_and_gradients(x, backend)
    for name, value in found.items():
        bound = 2 * relative_error(eager[name], truth[name]) + torch.finfo(torch.float32).eps
        assert value.dtype == eager[name].dtype
        assert relative_error(value, truth[name]) <= bound, name


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("cut", [1, 32, 50, 99])
def test_a_text_read_in_two_parts_is_the_text_read_whole(backend, device, cut):
    x = make_inputs(states=STATES.get(backend, 5), dtype=torch.float32, device=device)
    whole, end = call(x, backend)
    first = {k: x[k][:, :cut] for k in ("u", "delta", "B", "C")}
    second = {k: x[k][:, cut:] for k in ("u", "delta", "B", "C")}
    y, state = call(x, backend, **first)
    rest, state = call(x, backend, **second, initial_state=state)
    torch.testing.assert_close(torch.cat([y, rest], 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-5)


def test_decoding_step_by_step_is_prefill():
    x = make_inputs(steps=40)
    whole, end = call(x, None)
    state, y = x["initial_state"], []
    for t in range(40):
        token, state = call(x, None, **{k: x[k][:, t : t + 1] for k in ("u", "delta", "B", "C")}, initial_state=state)
        y.append(token)
    torch.testing.assert_close(torch.cat(y, 1), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize(("backend", "device"), [pytest.param("reference", "cpu", id="reference"), *BACKENDS])
def test_steps_with_delta_zero_leave_the_state_as_it_was(backend, device):
    x = make_inputs(steps=70, dtype=torch.float32, device=device)
    _, state = call(x, backend, delta=torch.zeros_like(x["delta"]))
    assert torch.equal(state, x["initial_state"])

    padded = {k: F.pad(x[k], (0, 0, 37, 0), value=1.0) for k in ("u", "B", "C")}
    padded["delta"] = F.pad(x["delta"], (0, 0, 37, 0))
    y, end = call(x, backend)
    y_padded, end_padded = call(x, backend, **padded)
    torch.testing.assert_close(y_padded[:, 37:], y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end_padded, end, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), ALL)
def test_without_skip_and_initial_state(backend, device):
    x = make_inputs(states=STATES.get(backend, 5), dtype=torch.float32, device=device)
    leaves = {k: x[k].requires_grad_() for k in ("u", "delta", "A", "B", "C")}
    found = torch.autograd.grad(selective_scan(**leaves, backend=backend)[0].sum(), leaves.values())
    zeros = leaves | {"D": torch.zeros_like(x["D"]), "initial_state": torch.zeros_like(x["initial_state"])}
    truth = torch.autograd.grad(call(zeros, "reference")[0].sum(), leaves.values())
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_step_sizes_that_are_softplus_of_what_is_given(backend, device, dtype, gated):
    """delta_bias, and -inf for padding, which leaves no trace. The gate is a slice, as in the model."""
    x = make_inputs(steps=40, channels=130, states=STATES.get(backend, 5), dtype=dtype, device=device)
    x["delta"] = (x["delta"] * 4 - 2).masked_fill(torch.arange(40, device=device)[:, None] < 7, -torch.inf)
    x["delta_bias"] = torch.linspace(-3, 25, 130, dtype=torch.float64, device=device).to(x["A"].dtype)
    if gated:
        x["gate"] = 3 * torch.randn(2, 40, 260, generator=torch.Generator().manual_seed(2)).to(device, dtype)

    def found(backend, dtype=None):
        leaves = {k: v.to(dtype or v.dtype, copy=True).detach().requires_grad_() for k, v in x.items()}
        gate = {"gate": leaves["gate"][..., 130:]} if gated else {}
        y, state = selective_scan(**leaves | gate, backend=backend)
        draw = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=draw).to(device, x["u"].dtype).to(o.dtype) for o in (y, state)]
        torch.autograd.backward([y, state], weights)
        return {"y": y, "state": state} | {f"d{k}": v.grad for k, v in leaves.items()}

    truth, eager = found("reference", torch.float64), found("reference")
    for name, value in found(backend).items():
        bound = 2 * relative_error(eager[name], truth[name]) + 4 * torch.finfo(torch.float32).eps
        assert value.dtype == eager[name].dtype and relative_error(value, truth[name]) <= bound, name
        if name == "ddelta":
            assert not value[:, :7].any()


@pytest.mark.parametrize(("backend", "device"), ALL)
def test_extreme_steps_stay_finite(backend, device):
    """A product of decays that vanishes must not be divided by, and a growing exponent must not appear."""
    x = make_inputs(states=STATES.get(backend, 5), steps=200, dtype=torch.float32, device=device)
    x["delta"][:, ::3] = 200.0
    x["delta"][:, 1::3] = 1e-6
    truth = values_and_gradients(x, "reference", torch.float64)
    for name, value in values_and_gradients(x, backend).items():
        assert relative_error(value, truth[name]) < 1e-4, name


@pytest.mark.parametrize(("backend", "device"), ALL)
def test_no_memory_is_read_before_it_is_written_and_results_repeat(backend, device):
    x = make_inputs(states=STATES.get(backend, 5), steps=77, channels=72, dtype=torch.float32, device=device)
    before = values_and_gradients(x, backend)
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty now returns NaN
    try:
        assert torch.empty(3, device=device).isnan().all()
        poisoned = values_and_gradients(x, backend)
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
    for name, value in before.items():
        assert torch.equal(value, poisoned[name]), name


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_other_layouts_and_mixed_dtypes(backend, device):
    """A model hands over views, and delta in fp32 beside bf16 activations."""
    x = make_inputs(dtype=torch.bfloat16, device=device)
    both = torch.cat([x["B"], x["C"]], -1)
    views = {"B": both[..., :5], "C": both[..., 5:], "u": x["u"].mT.contiguous().mT, "delta": x["delta"].float()}
    y, state = call(x, backend, **views)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    truth, _ = call({k: v.double() for k, v in (x | views).items()}, "reference")
    assert relative_error(y, truth) < 4e-3
    grads = values_and_gradients(x | views, backend)
    assert grads["ddelta"].dtype == torch.float32 and grads["du"].dtype == torch.bfloat16


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_registered_operator_obeys_pytorch(backend, device):
    x = make_inputs(steps=40, dtype=torch.float32, device=device)
    leaves = [x[k].requires_grad_() for k in NAMES]
    torch.library.opcheck(torch.ops.jrt.selective_scan.default, (*leaves, backend, True))


@pytest.mark.hopper
def test_the_cuda_operator_obeys_pytorch():
    x = make_inputs(steps=40, states=16, dtype=torch.float32, device="cuda")
    bias = torch.zeros(12, device="cuda", requires_grad=True)
    leaves = [x[k].requires_grad_() for k in NAMES]
    gate = torch.ones_like(leaves[0], requires_grad=True)
    for z in (None, gate):
        torch.library.opcheck(torch.ops.jrt.selective_scan_cuda.default, (*leaves[:-1], bias, leaves[-1], z, True))


@pytest.mark.hopper
@pytest.mark.parametrize("segments", [1, 2, 5, 63])
def test_results_do_not_depend_on_how_a_text_is_cut(monkeypatch, segments):
    from jrt.ops import selective_scan_cuda

    x = make_inputs(steps=1000, channels=300, states=16, dtype=torch.float32, device="cuda")
    monkeypatch.setattr(selective_scan_cuda, "segments", lambda *_: segments)
    truth, eager = values_and_gradients(x, "reference", torch.float64), values_and_gradients(x, "reference")
    for name, value in values_and_gradients(x, "cuda").items():
        bound = 2 * relative_error(eager[name], truth[name]) + 4 * torch.finfo(torch.float32).eps
        assert relative_error(value, truth[name]) <= bound, name


@pytest.mark.parametrize(("backend", "device"), ALL)
def test_compiled_without_a_graph_break(backend, device):
    x = make_inputs(states=STATES.get(backend, 5), steps=40, dtype=torch.float32, device=device)
    leaves = {k: v.requires_grad_() for k, v in x.items()}

    def loss(inputs):
        y, state = call(inputs, backend)
        return y.square().sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    found = torch.autograd.grad(compiled(leaves), leaves.values())
    torch.testing.assert_close(found, torch.autograd.grad(loss(leaves), leaves.values()))


def test_autocast_does_not_narrow_the_sums():
    x = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = values_and_gradients(x, "chunked")
    for name, value in values_and_gradients(x, "chunked").items():
        assert torch.equal(value, inside[name]), name


def test_only_states_between_chunks_are_kept():
    x = make_inputs(steps=512, channels=32, states=16, dtype=torch.float32)
    leaves = {k: v.requires_grad_() for k, v in x.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        call(leaves, "chunked")
    assert sum(kept) < 4 * x["u"].numel()  # all states would be 16 times u
    with torch.no_grad():
        _, _, between = torch.ops.jrt.selective_scan(*leaves.values(), "chunked", False)
    assert between.numel() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(2, 3)}, r"expected u \(B, T, E\)"),
        ({"delta": torch.zeros(2, 6, 12)}, "expected delta of shape"),
        ({"B": torch.zeros(2, 7, 4)}, "expected B of shape"),
        ({"initial_state": torch.zeros(2, 5, 12)}, "expected initial_state of shape"),
        ({"C": torch.zeros(2, 7, 5, dtype=torch.long)}, "floating-point"),
        ({"D": torch.zeros(12, device="meta")}, "D is on meta; expected cpu, as u"),
        ({"A": [[1.0]]}, "A is a list; expected a tensor"),
        ({"delta": None}, "delta is a NoneType; expected a tensor"),
        ({"u": torch.zeros(2, 7, 12).to(torch.float8_e4m3fn)}, "floating-point dtype of 16 bits or more"),
        ({"gate": torch.zeros(2, 7, 11)}, "expected gate of shape"),
        ({k: torch.zeros(2, 0, n) for k, n in (("u", 12), ("delta", 12), ("B", 5), ("C", 5))}, "at least one step"),
        ({k: torch.zeros(0, 7, n) for k, n in (("u", 12), ("delta", 12), ("B", 5), ("C", 5))}, "at least one step"),
    ],
)
def test_wrong_inputs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(make_inputs(steps=7, dtype=torch.float32), None, **changes)


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(ValueError, match="backend 'fast': expected one of"):
        call(make_inputs(), "fast")
    with pytest.raises(ValueError, match="'cuda' cannot serve this call: tensors are on cpu"):
        call(make_inputs(), "cuda")
    with pytest.raises(ValueError, match=r"'triton' cannot serve this call: .*'chunked'"):
        call(make_inputs(), "triton")


def test_a_call_on_the_cpu_loads_neither_triton_nor_dynamo():
    """Both cost seconds. `jrt` itself brings transformers along, so the ops are imported from under a bare name."""
    code = (
        "import sys, types, torch; jrt = sys.modules['jrt'] = types.ModuleType('jrt'); jrt.__path__ = sys.argv[1:];"
        "from jrt.ops import selective_scan as f; u = torch.rand(1, 3, 2, requires_grad=True);"
        "f(u, u, -torch.rand(2, 4), torch.rand(1, 3, 4), torch.rand(1, 3, 4))[0].sum().backward();"
        "assert not {'triton', 'torch._dynamo'} & set(sys.modules)"
    )
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code, *jrt.__path__], check=True, env=without_gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
def test_triton_kernels_in_the_interpreter(monkeypatch):
    """Two slices of channels, two chunks, a ragged end. Triton looks for its interpreter once: a process of its own."""
    if not INTERPRETED:
        pass_in_the_interpreter(f"{__file__}::test_triton_kernels_in_the_interpreter")
        return
    x = make_inputs(batch=2, steps=6, channels=66, states=2, dtype=torch.float32)
    monkeypatch.setitem(sys.modules["jrt.ops.selective_scan"].CHUNK, "triton", 4)
    truth = values_and_gradients(x, "reference", torch.float64)
    for name, value in values_and_gradients(x, "triton").items():
        assert relative_error(value, truth[name]) < 1e-6, name


def test_derivatives_that_no_kernel_has_are_the_definition_s_or_an_error():
    """PyTorch would take zero for an operator without a rule."""
    x = make_inputs(steps=9)
    tangents = {name: torch.randn_like(value) for name, value in x.items()}

    def scan(backend):
        def call(*values):
            return call_by_name(dict(zip(x, values, strict=True)), backend)

        return torch.func.jvp(call, tuple(x.values()), tuple(tangents.values()))[1]

    call_by_name = call
    torch.testing.assert_close(scan(None), scan("reference"))
    assert scan("reference")[0].abs().sum() > 0
    with pytest.raises(ValueError, match="'chunked' cannot serve this call"):
        scan("chunked")

    x["u"].requires_grad_()
    for backend in ("reference", None):
        (du,) = torch.autograd.grad(call(x, backend)[0].square().sum(), x["u"], create_graph=True)
        if backend == "reference":
            assert torch.autograd.grad(du.sum(), x["u"])[0].abs().sum() > 0
        else:
            with pytest.raises(ValueError, match=r"second derivative is wanted .* backend='reference'"):
                torch.autograd.grad(du.sum(), x["u"])
